//! Provisional runs: a unikernel is tried with a program that may need more, and nothing of the run is seen by anybody until
//! it has ended well; else it never was, and the command runs on Linux.
//!
//! The rule: **what a provisional run did becomes visible only when its program has ended by itself and no sign was seen that
//! it missed anything; else the run is undone.** So that nothing can be seen before: its output is held back, it has no
//! network, and no directory or volume of anybody's; its disk is its own and goes with it. What cannot be held for long is
//! not held longer: a run that takes too long or prints too much is undone too, and its command goes to Linux the next time.
//!
//! What tells that something was missed is the kernel, not the program: [`provisional_calls`] are told as they are made,
//! also where the program says nothing of its failure. The end itself is one of them, so that silence is no proof: a run of
//! which nothing was told is undone.

use crate::retry::{KERNEL_MARK, program_words};
use std::time::Duration;
use vistara_model::{Accelerator, EndReason, ExitStatus};

/// Longest provisional run. It is what a program that runs long loses, once; and how long the user may wait for the first
/// byte. Ordinary commands end in a fraction of it.
const PROVISIONAL_MAX: Duration = Duration::from_secs(5);
/// The same where processors are emulated, and all takes several times as long.
const PROVISIONAL_EMULATED_MAX: Duration = Duration::from_secs(15);
/// Most output that is held back: it lies in memory, and who prints more wants to be read meanwhile.
pub const HELD_BYTES_MAX: usize = 1 << 20;

/// Longest provisional run under this accelerator.
pub fn provisional_max(accelerator: Accelerator) -> Duration {
    match accelerator {
        Accelerator::Kvm => PROVISIONAL_MAX,
        Accelerator::Tcg => PROVISIONAL_EMULATED_MAX,
    }
}

// Which calls tell of what: read from the maps of system calls of Nanos 0.1.55 (commit ee67af2), and from the table of names of
// its module. What the table has no name for cannot be asked about: `close_range`, `openat2`, `faccessat2`, `pidfd_open`,
// `landlock_*`. Left out since nobody sees whether they were done: locks of memory and of files on a disk that nobody shares
// (`mlock`, `flock`), advice (`readahead`, `membarrier`, `mbind`, `sync_file_range`, `pkey_*`), and what asks for a turn on the
// processor (`sched_set*`); `setrlimit` and `prctl`, since every program's start makes them, and what they leave out is rare.

/// What makes processes, or becomes another one. The C library's `fork` and `posix_spawn` are a `clone`, which makes threads
/// too, so that only one that failed is a sign; the same goes for `clone3`.
const PROCESS: &[&str] = &["fork", "vfork", "execve", "execveat"];
const THREADS: &[&str] = &["clone", "clone3"];
/// What reaches out of the machine, or may.
const NETWORK: &[&str] = &["bind", "listen", "sendto", "sendmsg", "sendmmsg"];
/// What makes the program another user: in a unikernel it succeeds and does nothing, or fails.
const USERS: &[&str] = &[
    "capset",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setuid",
];
/// What a unikernel says it has done, and has not: what is asked about it later is answered wrongly.
const IGNORED: &[&str] = &[
    "chmod",
    "chown",
    "fchmod",
    "fchmodat",
    "fchown",
    "fchownat",
    "lchown",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "umask",
    "wait4",
];
/// What a unikernel lacks, and a Linux guest has.
const MISSING: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "chroot",
    "delete_module",
    "fanotify_init",
    "fanotify_mark",
    "finit_module",
    "flistxattr",
    "fremovexattr",
    "futimesat",
    "getgroups",
    "getpgid",
    "getpgrp",
    "getppid",
    "getpriority",
    "getresgid",
    "getresuid",
    "getsid",
    "init_module",
    "io_cancel",
    "ioperm",
    "iopl",
    "ioprio_get",
    "ioprio_set",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "listxattr",
    "llistxattr",
    "lremovexattr",
    "memfd_create",
    "mknod",
    "mknodat",
    "modify_ldt",
    "mount",
    "mq_getsetattr",
    "mq_notify",
    "mq_open",
    "mq_timedreceive",
    "mq_timedsend",
    "mq_unlink",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "name_to_handle_at",
    "open_by_handle_at",
    "perf_event_open",
    "personality",
    "pivot_root",
    "preadv2",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "pwritev2",
    "quotactl",
    "reboot",
    "remap_file_pages",
    "removexattr",
    "request_key",
    "sched_getattr",
    "sched_getparam",
    "sched_getscheduler",
    "sched_rr_get_interval",
    "seccomp",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "setdomainname",
    "sethostname",
    "setns",
    "setpgid",
    "setpriority",
    "setsid",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
    "splice",
    "swapoff",
    "swapon",
    "syslog",
    "tee",
    "umount2",
    "unshare",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vmsplice",
    "waitid",
];
/// What the kernel says of its own accord in such a machine (Nanos 0.1.55): how it begins and ends. Other lines with a time
/// before them may be the program's, as of a kernel's log that it prints.
const KERNEL_LINES: &[(&str, &str)] = &[
    ("NET: no network interface found", ""),
    ("elf_symtable_add: ", " would overlap in rangemap; skipping"),
    ("setsockopt unimplemented: fd ", ""),
    ("sigaction flag SA_NOCLDSTOP unsupported", ""),
    ("sigaction flag SA_NOCLDWAIT unsupported", ""),
    // It matters only to a program that gets the same signal twice; nobody outside sends it one while it is tried.
    ("sigaction flag SA_RESETHAND unsupported", ""),
];
/// Most bytes of a kernel's line that are looked at.
const KERNEL_LINE_MAX: usize = 1024;
/// The end by itself.
pub const PROVISIONAL_END: &str = "exit_group";

/// The calls that the kernel is to tell of.
pub fn provisional_calls() -> Vec<&'static str> {
    let single = ["socket", "connect", PROVISIONAL_END];
    [PROCESS, THREADS, NETWORK, USERS, IGNORED, MISSING, &single].concat()
}

/// What was seen of a run so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProvisionalRun {
    /// Sockets that were made.
    sockets: u32,
    /// Those of them that were to reach a service in the machine itself that is not there: the C library asks for its name
    /// service cache so, before it reads the files.
    vain: u32,
    ended: bool,
    /// The end of what the kernel has said: its words come in pieces.
    kernel_tail: String,
    /// The beginning of a line of the kernel's.
    kernel_line: String,
    /// Whether one of its lines may not be its own.
    kernel_doubt: bool,
    sign: Option<String>,
}

/// What becomes of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It stands, and is shown.
    Stands,
    /// It never was. The text says what was seen, as a sentence without its full stop.
    Undone(String),
}

impl ProvisionalRun {
    /// The kernel told of a call. Its result is the number or the error's name that it gave, as in `-ENOENT`; none where it
    /// has not come back.
    pub fn call(&mut self, name: &str, result: Option<&str>) {
        let failed = result.is_some_and(|result| result.starts_with('-'));
        if PROCESS.contains(&name) || (THREADS.contains(&name) && failed) {
            self.see("it tried to make a process");
        } else if NETWORK.contains(&name) {
            self.see("it used the network");
        } else if USERS.contains(&name) {
            self.see("it changed its user, and in a unikernel all is root");
        } else if IGNORED.contains(&name) {
            self.see(format!(
                "it made the call {name}, which a unikernel answers without doing it"
            ));
        } else if MISSING.contains(&name) {
            self.see(format!("it made the call {name}, which a unikernel lacks"));
        } else if name == "socket" && failed {
            self.see("it asked for a socket that a unikernel lacks");
        } else if name == "socket" && result.is_some() {
            self.sockets += 1;
        } else if name == "connect" {
            match result {
                Some("-ENOENT") => self.vain += 1,
                Some(_) => self.see("it used the network"),
                // It says more when it comes back, and if it never does, the run takes too long.
                None => {}
            }
        } else if name == PROVISIONAL_END && self.ended {
            // A program has one end: one of them was its own words.
            self.unclear();
        } else if name == PROVISIONAL_END {
            self.ended = true;
        }
    }

    /// It took longer than [`provisional_max`] says.
    pub fn took_too_long(&mut self, bound: Duration) {
        self.see(format!(
            "it took more than {} s, longer than its output is held back",
            bound.as_secs()
        ));
    }

    /// It printed more than [`HELD_BYTES_MAX`].
    pub fn printed_too_much(&mut self) {
        self.see(format!(
            "it printed more than {} KiB, which is all that is held back",
            HELD_BYTES_MAX >> 10
        ));
    }

    /// The node that held its output back has gone, and the output with it.
    pub fn lost_its_node(&mut self) {
        self.see("the node that held its output back was restarted");
    }

    /// The kernel printed this; a piece may begin and end within a word.
    pub fn kernel_said(&mut self, words: &str) {
        self.hear_lines(words);
        self.kernel_tail.push_str(words);
        if self.kernel_tail.contains(KERNEL_MARK) {
            self.see("it tried to make a process");
        }
        let mut from = self.kernel_tail.len().saturating_sub(KERNEL_MARK.len());
        while !self.kernel_tail.is_char_boundary(from) {
            from -= 1;
        }
        self.kernel_tail.drain(..from);
    }

    /// What the program printed and what its kernel told cannot be told apart: what would be shown might lack some of it.
    pub fn unclear(&mut self) {
        self.see("what it printed cannot be told from what its kernel tells");
    }

    fn hear_lines(&mut self, words: &str) {
        for piece in words.split_inclusive('\n') {
            if self.kernel_line.len() + piece.len() > KERNEL_LINE_MAX {
                self.kernel_doubt = true;
                self.kernel_line.clear();
                continue;
            }
            self.kernel_line.push_str(piece);
            if !piece.ends_with('\n') {
                continue;
            }
            let line = std::mem::take(&mut self.kernel_line);
            let said = line
                .split_once("] ")
                .map_or("", |(_, said)| said.trim_end());
            let is_known =
                |(begin, end): &(&str, &str)| said.starts_with(begin) && said.ends_with(end);
            self.kernel_doubt |= !KERNEL_LINES.iter().any(is_known);
        }
    }

    /// What speaks against the run already; it need not be waited for any longer.
    pub fn sign(&self) -> Option<&str> {
        self.sign.as_deref()
    }

    /// The run is over: how it ended, and what its program printed.
    pub fn judge(mut self, status: Option<ExitStatus>, output: &str) -> Verdict {
        let doubt = self.kernel_doubt || !self.kernel_line.is_empty();
        // Its words may stand within a line of the program's.
        self.kernel_tail.clear();
        self.kernel_said(output);
        if let Some(line) = program_words(output) {
            self.see(format!("it said {line:?}"));
        }
        if self.sockets > self.vain {
            self.see("it used the network");
        }
        match status {
            Some(ExitStatus::Code(_)) if self.ended => {}
            Some(ExitStatus::Signal(number)) => {
                self.see(format!(
                    "signal {number} ended it, perhaps the kernel's fault"
                ));
            }
            Some(ExitStatus::Code(_)) => self.see("its end was not told by the kernel"),
            None => self.see("the unikernel failed"),
        }
        if doubt {
            self.unclear();
        }
        match self.sign {
            None => Verdict::Stands,
            Some(seen) => Verdict::Undone(seen),
        }
    }

    fn see(&mut self, sign: impl Into<String>) {
        if self.sign.is_none() {
            self.sign = Some(sign.into());
        }
    }
}

/// Whether an undone run is followed by one on Linux: not where the user or the time limit has ended it.
pub fn rerun_follows(end: &EndReason, asked_to_end: bool) -> bool {
    match end {
        EndReason::TimedOut => false,
        // The monitor's end is the node's doing, where the user has not asked for it.
        EndReason::Stopped { .. }
        | EndReason::Exited { .. }
        | EndReason::StartFailed { .. }
        | EndReason::GuestPanic { .. }
        | EndReason::VmmFailed { .. }
        | EndReason::BootFailed { .. }
        | EndReason::PrepareFailed { .. }
        | EndReason::Lost { .. } => !asked_to_end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: Option<ExitStatus> = Some(ExitStatus::Code(0));

    fn run(calls: &[(&str, &str)]) -> ProvisionalRun {
        let mut run = ProvisionalRun::default();
        for (name, result) in calls {
            run.call(name, (!result.is_empty()).then_some(*result));
        }
        run
    }

    fn undone(verdict: &Verdict) -> &str {
        match verdict {
            Verdict::Stands => "stands",
            Verdict::Undone(seen) => seen,
        }
    }

    #[test]
    fn what_ends_by_itself_without_a_sign_stands_whatever_its_code() {
        for code in [0, 1, 255] {
            let run = run(&[("socket", "3"), ("connect", "-ENOENT"), ("exit_group", "")]);
            let verdict = run.judge(Some(ExitStatus::Code(code)), "out\n");
            assert_eq!(verdict, Verdict::Stands);
        }
    }

    #[test]
    fn every_sign_undoes_a_run_that_says_all_is_well() {
        for (calls, wanted) in [
            (&[("fork", "-ENOSYS")][..], "it tried to make a process"),
            (&[("execve", "-ENOSYS")], "it tried to make a process"),
            (&[("clone3", "-EINVAL")], "it tried to make a process"),
            (&[("clone", "-ENOSYS")], "it tried to make a process"),
            (&[("socket", "-97")], "it asked for a socket"),
            (&[("chmod", "0")], "it made the call chmod"),
            (&[("getppid", "-ENOSYS")], "it made the call getppid"),
            (&[("exit_group", "")], "what it printed cannot be told"),
            (&[("connect", "-113")], "it used the network"),
            (&[("connect", "0")], "it used the network"),
            (&[("bind", "0")], "it used the network"),
            (&[("socket", "3")], "it used the network"),
            (&[("shmget", "-ENOSYS")], "it made the call shmget"),
            (&[("setuid", "0")], "it changed its user"),
        ] {
            let mut run = run(calls);
            run.call("exit_group", None);
            let verdict = run.judge(WELL, "");
            assert!(
                undone(&verdict).starts_with(wanted),
                "{calls:?}: {verdict:?}"
            );
        }
        let ended = || run(&[("exit_group", "")]);
        for words in [
            "sh: fork: Function not implemented\n",
            "abc[1.213] clone: attempted to create new process\n",
        ] {
            assert_ne!(ended().judge(WELL, words), Verdict::Stands, "{words}");
        }
        let mut long = ended();
        long.took_too_long(provisional_max(Accelerator::Kvm));
        assert!(undone(&long.judge(WELL, "")).starts_with("it took more than"));
        let mut much = ended();
        much.printed_too_much();
        assert!(undone(&much.judge(WELL, "")).starts_with("it printed more than"));
    }

    #[test]
    fn the_kernels_words_are_heard_in_pieces_too() {
        let words = "[1.0] é\n[1.213] clone: attempted to create new process\nrest\n";
        for length in 1..words.len() {
            let mut run = run(&[("exit_group", "")]);
            let mut rest = words;
            while !rest.is_empty() {
                let mut cut = length.min(rest.len());
                while !rest.is_char_boundary(cut) {
                    cut += 1;
                }
                run.kernel_said(&rest[..cut]);
                rest = &rest[cut..];
            }
            assert_ne!(run.judge(WELL, ""), Verdict::Stands, "pieces of {length}");
        }
    }

    #[test]
    fn threads_are_no_processes() {
        assert_eq!(run(&[("clone3", "5")]).sign(), None);
        assert_eq!(run(&[("clone", "5")]).sign(), None);
    }

    #[test]
    fn a_line_that_may_not_be_the_kernels_undoes_the_run() {
        let usual = "[0.66] NET: no network interface found\n[0.71] elf_symtable_add: \"x\" [1 2) would overlap in rangemap; skipping\n";
        for (words, stands) in [
            ("", true),
            (usual, true),
            ("[12.345678] usb 1-1: new device\n", false),
            ("[12.345678] NET: no net", false),
            ("[12.345678] NET: Registered\n", false),
        ] {
            let mut run = run(&[("exit_group", "")]);
            for piece in words.as_bytes().chunks(7) {
                run.kernel_said(std::str::from_utf8(piece).unwrap());
            }
            let verdict = run.judge(WELL, "after\n");
            assert_eq!(verdict == Verdict::Stands, stands, "{words}: {verdict:?}");
        }
    }

    #[test]
    fn no_call_is_told_twice() {
        let mut calls = provisional_calls();
        calls.sort_unstable();
        let all = calls.len();
        calls.dedup();
        assert_eq!(calls.len(), all);
    }

    #[test]
    fn where_nothing_is_told_nothing_is_believed() {
        assert_ne!(
            ProvisionalRun::default().judge(WELL, "42\n"),
            Verdict::Stands
        );
        for status in [None, Some(ExitStatus::Signal(11))] {
            let verdict = run(&[("exit_group", "")]).judge(status, "");
            assert_ne!(verdict, Verdict::Stands, "{status:?}");
        }
    }

    #[test]
    fn what_the_user_has_ended_is_not_begun_again() {
        let killed = EndReason::Stopped { status: None };
        assert!(rerun_follows(&killed, false));
        assert!(!rerun_follows(&killed, true));
        assert!(!rerun_follows(&EndReason::TimedOut, false));
    }
}
