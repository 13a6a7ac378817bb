//! Machines at one moment, for others to go on from: kept on disk as snapshots, or in memory as long as forks are made of one.
//!
//! Unlike a template, a moment has run a user's programs: it belongs to whoever may use this node, and nothing shares it.
//!
//! ```text
//! snapshots/<id>/
//!   overlay.img                   the writable disk as it was
//!   memory, state, capture.json   as `vistara_machine::Capture` writes them
//!   snapshot.json                 what it is of, with every digest; written last: a directory without it was never finished,
//!                                 is never used, and is swept away by the next node
//! ```
//! An incremental one rests on another, its base, and keeps only what differs; `memory.same` and `overlay.same` say where. A base
//! stays as long as something rests on it.
//!
//! For other nodes it is packed into one file beside these (`packed.zst`, and its digest in `packed.json`), which goes with it. What
//! comes from another node has names that end in `.arriving` until all of it is here.
//!
//! A snapshot that is damaged, or of another version, is listed with its reason and stays: it is somebody's.

mod delta;
mod files;
mod packed;
mod room;
mod store;

pub(crate) use files::{About, Unusable};
pub(crate) use room::{Captures, Room};
pub(crate) use store::{Listed, Reserved, Snapshots, Stays};

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use vistara_machine::Capture;

/// A machine at one moment.
#[derive(Debug)]
pub(crate) struct Moment {
    pub(crate) capture: Arc<Capture>,
    /// The writable disk as it was, whatever becomes of its name.
    pub(crate) overlay: File,
    /// The image's root disk.
    pub(crate) root: PathBuf,
}
