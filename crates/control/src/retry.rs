//! When a program that was chosen for a unikernel is run again on Linux: a pure rule.
//!
//! What Nanos shows of a call that it lacks, by its source (2026): a system call without a handler (`fork`, `vfork`,
//! `execve`, …) fails with ENOSYS and the kernel says nothing; a `clone` that is not for a thread fails the same way and the
//! kernel says `clone: attempted to create new process`, but only at `log_level:warn` or more, while its own default is
//! errors only. So the marks that are sure to be seen are the program's own words for ENOSYS, on which the C library, Go and
//! Rust agree closely enough.
//!
//! Assumed: who builds the manifest sets `log_level:warn`, so that the kernel's line is there for glibc's `fork`,
//! `posix_spawn`, `popen` and `system`, all of which are a clone. Where it is not, only the program's words count.

use vistara_model::{Correction, EndReason, ExitStatus, Hypervisor, Payload};

/// What is told by the kernel.
pub(crate) const KERNEL_MARK: &str = "clone: attempted to create new process";
/// What programs say of ENOSYS: the C library's words, Go's, Rust's and the name itself.
const PROGRAM_MARKS: &[&str] = &[
    "function not implemented",
    "os error 38",
    "errno 38",
    "enosys",
];

/// A line of a console is quoted up to here; a guest may write lines of any length.
const SHOWN_MAX: usize = 120;

/// How a program that ran as a unikernel ended, and what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended<'a> {
    /// What the user asked for: only what `auto` chose is taken back.
    pub asked: Hypervisor,
    /// What was booted.
    pub payload: Payload,
    /// Why the machine is gone.
    pub end: &'a EndReason,
    /// The end of what came over its console, the kernel's lines and the program's; some KiB are enough.
    pub console: &'a str,
    /// The user said that it may be run again.
    pub retry_safe: bool,
    /// It has been run again before.
    pub retried: bool,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AfterUnikernel {
    /// What happened stands.
    Stands,
    /// What happened stands, but the image's facts were wrong.
    Learned {
        /// For the image's facts.
        correction: Correction,
    },
    /// It is run again, on Linux, once.
    RetryOnLinux {
        /// For the user, as a sentence.
        reason: String,
        /// For the image's facts.
        correction: Correction,
    },
}

/// A sign on the console that a call was missing.
enum Mark {
    /// The kernel's word: a process was really tried.
    Process,
    /// The program's word, in this line.
    Words(String),
}

fn mark(console: &str) -> Option<Mark> {
    if console.contains(KERNEL_MARK) {
        return Some(Mark::Process);
    }
    program_words(console).map(Mark::Words)
}

/// The last line in which a program speaks of a missing call.
pub(crate) fn program_words(console: &str) -> Option<String> {
    let line = console.lines().rev().find(|line| {
        let line = line.to_ascii_lowercase();
        PROGRAM_MARKS.iter().any(|mark| line.contains(mark))
    })?;
    let shown: String = line
        .chars()
        .filter(|c| !c.is_control())
        .take(SHOWN_MAX)
        .collect();
    Some(shown.trim().to_owned())
}

/// What follows after a program ended as a unikernel.
pub fn after_unikernel(ended: &Ended<'_>) -> AfterUnikernel {
    // Asked for by name: the user's wish, and the facts were never trusted.
    if ended.payload != Payload::Nanos || ended.asked != Hypervisor::Auto {
        return AfterUnikernel::Stands;
    }
    let Some(mark) = mark(ended.console) else {
        return AfterUnikernel::Stands;
    };
    let seen = match &mark {
        Mark::Process => "it tried to make a process".to_owned(),
        Mark::Words(line) => format!("it said {line:?}"),
    };
    let correction = Correction { seen: seen.clone() };
    let failed = match ended.end {
        EndReason::Exited { status, .. } => *status != ExitStatus::Code(0),
        // Its end was not its own doing, so that running it again would not be what was asked for.
        EndReason::StartFailed { .. }
        | EndReason::Stopped { .. }
        | EndReason::TimedOut
        | EndReason::GuestPanic { .. }
        | EndReason::VmmFailed { .. }
        | EndReason::BootFailed { .. }
        | EndReason::PrepareFailed { .. }
        | EndReason::Lost { .. } => {
            return match mark {
                Mark::Process => AfterUnikernel::Learned { correction },
                Mark::Words(_) => AfterUnikernel::Stands,
            };
        }
    };
    match mark {
        // It may have done without what it was refused, and says that its work is done; the next run need not do without.
        Mark::Process if !failed => AfterUnikernel::Learned { correction },
        // A program that succeeds may write any words.
        Mark::Words(_) if !failed => AfterUnikernel::Stands,
        Mark::Process | Mark::Words(_) if ended.retry_safe && !ended.retried => {
            AfterUnikernel::RetryOnLinux {
                reason: format!(
                    "as a unikernel it failed, and {seen}; it is run again on Linux, once"
                ),
                correction,
            }
        }
        Mark::Process | Mark::Words(_) => AfterUnikernel::Learned { correction },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXITED_1: EndReason = EndReason::Exited {
        status: ExitStatus::Code(1),
        out_of_memory: false,
    };
    const EXITED_0: EndReason = EndReason::Exited {
        status: ExitStatus::Code(0),
        out_of_memory: false,
    };
    const KERNEL: &str = "starting\n[1.213] clone: attempted to create new process\nbye";

    fn ended<'a>(end: &'a EndReason, console: &'a str) -> Ended<'a> {
        Ended {
            asked: Hypervisor::Auto,
            payload: Payload::Nanos,
            end,
            console,
            retry_safe: true,
            retried: false,
        }
    }

    fn outcome(ended: &Ended<'_>) -> &'static str {
        match after_unikernel(ended) {
            AfterUnikernel::Stands => "stands",
            AfterUnikernel::Learned { .. } => "learned",
            AfterUnikernel::RetryOnLinux { .. } => "retried",
        }
    }

    #[test]
    fn a_program_that_failed_for_want_of_a_call_is_run_again_whoever_says_so() {
        for console in [
            KERNEL,
            "sh: fork: Function not implemented",
            "fork/exec /bin/ls: function not implemented",
            "Error: Function not implemented (os error 38)",
        ] {
            assert_eq!(outcome(&ended(&EXITED_1, console)), "retried", "{console}");
        }
    }

    #[test]
    fn a_failure_without_a_mark_stands() {
        assert_eq!(outcome(&ended(&EXITED_1, "no such file")), "stands");
    }

    #[test]
    fn it_is_run_again_once_and_only_where_that_is_safe() {
        let first = ended(&EXITED_1, KERNEL);
        let unsafe_to_retry = Ended {
            retry_safe: false,
            ..first
        };
        let second = Ended {
            retried: true,
            ..first
        };
        assert_eq!(outcome(&unsafe_to_retry), "learned");
        assert_eq!(outcome(&second), "learned");
    }

    #[test]
    fn what_was_asked_for_by_name_or_ran_on_linux_is_left_alone() {
        let first = ended(&EXITED_1, KERNEL);
        let by_name = Ended {
            asked: Hypervisor::Nanovms,
            ..first
        };
        let linux = Ended {
            payload: Payload::Linux,
            ..first
        };
        assert_eq!(outcome(&by_name), "stands");
        assert_eq!(outcome(&linux), "stands");
    }

    #[test]
    fn success_is_never_taken_back_but_the_kernels_word_is_remembered() {
        assert_eq!(outcome(&ended(&EXITED_0, KERNEL)), "learned");
        assert_eq!(outcome(&ended(&EXITED_0, "ENOSYS is 38")), "stands");
    }

    #[test]
    fn an_end_that_was_not_the_programs_own_is_not_run_again() {
        assert_eq!(outcome(&ended(&EndReason::TimedOut, KERNEL)), "learned");
        let stopped = EndReason::Stopped { status: None };
        assert_eq!(outcome(&ended(&stopped, "ENOSYS")), "stands");
    }
}
