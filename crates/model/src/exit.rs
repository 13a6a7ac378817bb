//! How a program, and how the machine around it, came to an end.

use serde::{Deserialize, Serialize};

/// How a program in a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called exit with this code, 0 to 255.
    Code(u8),
    /// A signal of this number ended it.
    Signal(u8),
}

impl ExitStatus {
    /// The code a shell would report: the program's own, or 128 plus the signal's number.
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(number) => 128u8.saturating_add(number),
        }
    }
}

/// Why a machine is no longer running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum EndReason {
    /// Its program ended by itself.
    Exited {
        /// How.
        status: ExitStatus,
        /// Whether the guest's kernel killed something for want of memory while it ran.
        out_of_memory: bool,
    },
    /// The program could not be started in the guest (missing, not executable, no such user or directory).
    StartFailed {
        /// 126 (found, not runnable), 127 (not found) or 125 (anything else), as docker has them.
        code: u8,
        /// What was wrong, in words.
        message: String,
    },
    /// Somebody stopped or killed it.
    Stopped {
        /// The program's own end, where it had one before the machine went.
        status: Option<ExitStatus>,
    },
    /// It ran longer than its time limit.
    TimedOut,
    /// The guest's kernel panicked.
    GuestPanic {
        /// The kernel's last words, from the console.
        message: String,
    },
    /// The VMM died or was killed by something other than us.
    VmmFailed {
        /// What is known of it.
        message: String,
    },
    /// The machine never came up.
    BootFailed {
        /// What is known of it.
        message: String,
    },
    /// The node could not prepare it (disk, image, kernel, permission).
    PrepareFailed {
        /// What was wrong, in words.
        message: String,
    },
    /// The host went down or lost the machine while no node was looking.
    Lost {
        /// What is known of it.
        message: String,
    },
}

impl EndReason {
    /// The exit code `vistara run` and `vistara wait` give: the program's own, else 124 to 127 or 137 as docker has them.
    pub fn exit_code(&self) -> u8 {
        match self {
            EndReason::Exited { status, .. } => status.shell_code(),
            EndReason::StartFailed { code, .. } => *code,
            EndReason::Stopped { status } => status.map_or(137, ExitStatus::shell_code),
            EndReason::TimedOut => 124,
            EndReason::GuestPanic { .. }
            | EndReason::VmmFailed { .. }
            | EndReason::BootFailed { .. }
            | EndReason::PrepareFailed { .. }
            | EndReason::Lost { .. } => 125,
        }
    }

    /// One line for a person, or nothing where the exit code alone says it all.
    pub fn message(&self) -> Option<String> {
        match self {
            EndReason::Exited {
                status,
                out_of_memory: true,
            } => Some(format!(
                "the guest ran out of memory (exit code {}); give it more with --memory",
                status.shell_code()
            )),
            EndReason::Exited { .. } | EndReason::Stopped { .. } => None,
            EndReason::StartFailed { message, .. }
            | EndReason::VmmFailed { message }
            | EndReason::BootFailed { message }
            | EndReason::PrepareFailed { message }
            | EndReason::Lost { message } => Some(message.clone()),
            EndReason::TimedOut => Some("stopped at its time limit (--timeout)".to_owned()),
            EndReason::GuestPanic { message } => {
                Some(format!("the guest's kernel panicked: {message}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_killed_by_signal_nine_reports_137() {
        let end = EndReason::Exited {
            status: ExitStatus::Signal(9),
            out_of_memory: false,
        };
        assert_eq!(end.exit_code(), 137);
    }

    #[test]
    fn reasons_survive_a_round_trip_through_the_record() {
        let end = EndReason::Exited {
            status: ExitStatus::Code(7),
            out_of_memory: true,
        };
        let text = serde_json::to_string(&end).unwrap();
        assert_eq!(serde_json::from_str::<EndReason>(&text).unwrap(), end);
    }
}
