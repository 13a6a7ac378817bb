//! The states of a machine.
//!
//! ```text
//! preparing ──► booting ──► running ◄──► paused
//!     │            │           │            │
//!     │            │           ▼            │
//!     │            │        stopping ◄──────┘
//!     ▼            ▼           ▼
//!     └──────────► ended ◄─────┘      (from any state: the VMM may die)
//! ```
//! The moves themselves are decided in `vistara-control`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Disks, kernel and addresses are being made ready; no VMM runs yet.
    Preparing,
    /// The VMM runs; the agent has not answered yet.
    Booting,
    /// The program runs.
    Running,
    /// The VMM holds the guest still.
    Paused,
    /// The program was asked to end, or has ended and the machine is being taken down.
    Stopping,
    /// Over. The reason is kept beside it.
    Ended,
}

impl MachineState {
    /// Whether a VMM may exist in this state.
    pub fn may_have_vmm(self) -> bool {
        match self {
            MachineState::Preparing | MachineState::Ended => false,
            MachineState::Booting
            | MachineState::Running
            | MachineState::Paused
            | MachineState::Stopping => true,
        }
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MachineState::Preparing => "preparing",
            MachineState::Booting => "booting",
            MachineState::Running => "running",
            MachineState::Paused => "paused",
            MachineState::Stopping => "stopping",
            MachineState::Ended => "ended",
        })
    }
}
