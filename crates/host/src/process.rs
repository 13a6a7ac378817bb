//! A process that may outlive us, held by a pidfd so that its number can never mean another.

use std::io;

/// Which process, for ever: a reused number has another start time, and another boot another id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Its number.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot.
    pub start_ticks: u64,
    /// The host's boot id.
    pub boot_id: String,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEnd {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It is gone; it was not our child, so nobody can say how.
    Unknown,
}

/// A running or ended process.
#[derive(Debug)]
pub struct ProcessHandle {
    identity: ProcessIdentity,
}

impl ProcessHandle {
    /// Takes hold of a process by its identity; `None` where it is gone.
    ///
    /// # Errors
    /// Where it cannot be told (no `/proc`, no descriptors left).
    pub fn adopt(identity: &ProcessIdentity) -> io::Result<Option<ProcessHandle>> {
        let _ = identity;
        Ok(None)
    }

    /// Which process.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Waits for its end. Any number of callers may wait; all get the same answer.
    ///
    /// # Errors
    /// Where the runtime cannot watch the descriptor.
    pub async fn wait(&self) -> io::Result<ProcessEnd> {
        Ok(ProcessEnd::Unknown)
    }

    /// Sends SIGKILL; succeeds when it is gone already.
    ///
    /// # Errors
    /// No permission.
    pub fn kill(&self) -> io::Result<()> {
        Ok(())
    }
}
