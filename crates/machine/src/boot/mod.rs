//! Boot payloads: what a monitor is told to start.
