//! A process that is in its cgroup from the beginning (version 2, Linux 5.7), and where wanted the first of a process namespace.
//!
//! To move a process into a cgroup the kernel holds every fork and end on the host until all CPUs have noticed, which takes 10
//! to 30 ms; one that is made in it by `clone3` is never moved. The standard library cannot ask for that. So the child that it
//! has made, which does nothing yet, makes the real one: in the cgroup, with its own parent as parent. It tells its number and
//! goes.

// One `clone3`, and the end of the process that makes it.
#![allow(unsafe_code)]

use crate::launch::errno;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// `CLONE_INTO_CGROUP` of linux/sched.h.
const INTO_CGROUP: u64 = 0x2_0000_0000;
/// `CLONE_PARENT` of linux/sched.h: the new process is a sibling of its maker.
const PARENT: u64 = 0x8000;

/// The child's side, prepared before the fork.
pub(crate) struct Birth {
    cgroup: OwnedFd,
    own_processes: bool,
    number: PipeWriter,
}

/// The side of the process that launches.
pub(crate) struct Newborn {
    number: PipeReader,
}

/// Prepares a birth in the cgroup at `dir`, which must be one of version 2; as the first process of a namespace of its own where
/// `own_processes` says so.
pub(crate) fn prepare(dir: &Path, own_processes: bool) -> io::Result<(Birth, Newborn)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(dir, flags, Mode::empty())?;
    let (reader, writer) = io::pipe()?;
    Ok((
        Birth {
            cgroup,
            own_processes,
            number: writer,
        },
        Newborn { number: reader },
    ))
}

impl Birth {
    /// Called between fork and exec. Goes on in a new process in the cgroup, with `true`; or, where the kernel cannot make one
    /// there, outside of it, with `false`: in this process, or in a new one where that is to be the first of its namespace. System
    /// calls only.
    ///
    /// # Errors
    /// Where a process namespace was wanted and cannot be made.
    pub(crate) fn goes_on_inside(&self) -> rustix::io::Result<bool> {
        let apart = if self.own_processes {
            libc::CLONE_NEWPID as u64
        } else {
            0
        };
        // SAFETY: a structure of numbers, for which zero is a value.
        let mut wanted: libc::clone_args = unsafe { std::mem::zeroed() };
        wanted.flags = INTO_CGROUP | PARENT | apart;
        wanted.cgroup = u64::try_from(self.cgroup.as_raw_fd()).unwrap_or(u64::MAX);
        // SAFETY: without CLONE_VM this is a fork, by the kernel alone: no handler runs and no lock is taken. The new process
        // makes system calls only until it execs, as this one would have; this one ends without running anything more.
        let mut made = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const wanted,
                size_of::<libc::clone_args>(),
            )
        };
        if made == 0 {
            return Ok(true);
        }
        let mut refused = Ok(false);
        if made < 0 && self.own_processes {
            const NONE: libc::c_long = 0;
            let flags = libc::c_long::from(libc::CLONE_PARENT | libc::CLONE_NEWPID);
            // SAFETY: as above.
            made = unsafe { libc::syscall(libc::SYS_clone, flags, NONE, NONE, NONE, NONE) };
            if made == 0 {
                return Ok(false);
            }
            refused = Err(errno());
        }
        let number = i32::try_from(made.max(0)).unwrap_or(0);
        // The reader takes nothing for an error, and this process's end with it.
        let _ = rustix::io::write(&self.number, &number.to_ne_bytes());
        if made > 0 {
            // SAFETY: ends this process, whose only thread this is.
            unsafe { libc::_exit(0) }
        }
        refused
    }
}

impl Newborn {
    /// The number of the process that was made in the cgroup; `None` where the first one went on. Called once the launch has
    /// succeeded or failed, so it never waits.
    pub(crate) fn number(mut self) -> io::Result<Option<u32>> {
        let mut bytes = [0; 4];
        self.number.read_exact(&mut bytes)?;
        Ok(u32::try_from(i32::from_ne_bytes(bytes))
            .ok()
            .filter(|number| *number > 0))
    }
}

/// Takes the exit status of one that has failed before its program ran, so that nothing is left of it.
pub(crate) fn bury(number: u32) {
    let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It has told its failure by ending, or is about to end.
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
}

/// Ends one that runs and is nobody's, so that nothing is left of it.
pub(crate) fn end_and_bury(number: u32) {
    let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Our own child: the number is its own until its status is taken.
        let _ = kill_process(pid, Signal::KILL);
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
}

#[cfg(test)]
mod tests {
    use crate::cgroup::Cgroup;
    use crate::launch::Launch;
    use crate::process::ProcessEnd;
    use std::path::PathBuf;
    use std::time::Duration;

    /// A cgroup of version 2 that can be made here; its controllers do not matter.
    fn second() -> Option<Cgroup> {
        let tops = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        let found = tops
            .into_iter()
            .find(|top| top.join("cgroup.controllers").exists())?;
        let dir = found.join(format!("vistara-birth-{}", std::process::id()));
        std::fs::create_dir(&dir).ok()?;
        Some(Cgroup::from_dirs(vec![dir]))
    }

    fn no_child_is_left() {
        let found = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        assert_eq!(found.unwrap_err(), rustix::io::Errno::CHILD);
    }

    fn sleeper(cgroup: &Cgroup) -> Launch {
        let mut launch = Launch::new("/bin/sleep");
        launch.args = vec!["100".into()];
        launch.cgroup = Some(cgroup.clone());
        launch
    }

    #[tokio::test]
    async fn a_process_begins_in_its_cgroup_as_our_own_child() {
        let Some(cgroup) = second() else {
            return println!("SKIP: no cgroup of version 2 can be made here");
        };
        let launched = sleeper(&cgroup).start().unwrap();
        let pid = launched.process.identity().pid;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.split_whitespace().collect();
        assert_eq!(fields[3], std::process::id().to_string(), "its parent");
        assert_eq!(fields[5], pid.to_string(), "leads its session");
        assert_eq!(cgroup.pids(), [pid]);
        cgroup.destroy(Duration::from_secs(5)).await.unwrap();
        // Its status is ours to take.
        assert_eq!(
            launched.process.wait().await.unwrap(),
            ProcessEnd::Signaled(9)
        );
        no_child_is_left();
    }

    #[tokio::test]
    async fn the_first_process_of_a_namespace_begins_in_its_cgroup_too() {
        if !crate::facts::is_root() {
            return println!("SKIP: process namespaces take root");
        }
        let Some(cgroup) = second() else {
            return println!("SKIP: no cgroup of version 2 can be made here");
        };
        let not_one = tempfile::tempdir().unwrap();
        std::fs::write(not_one.path().join("cgroup.procs"), "").unwrap();
        let other = Cgroup::from_dirs(vec![not_one.path().to_owned()]);
        // Where the kernel makes no process in it, the cgroup is entered.
        for (place, its) in [(&cgroup, true), (&other, false)] {
            let mut launch = sleeper(place);
            launch.own_processes = true;
            let launched = launch.start().unwrap();
            let pid = launched.process.identity().pid;
            let read = |name: &str| {
                let text = std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
                text.split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            assert_eq!(
                read("stat")[3],
                std::process::id().to_string(),
                "its parent"
            );
            let status = read("status");
            let numbers = status.iter().position(|word| word == "NSpid:").unwrap();
            assert_eq!(
                status[numbers + 1..numbers + 3],
                [pid.to_string(), "1".into()]
            );
            if its {
                assert_eq!(cgroup.pids(), [pid]);
            } else {
                let entered = std::fs::read_to_string(not_one.path().join("cgroup.procs"));
                assert_eq!(entered.unwrap(), "0");
            }
            launched.process.kill().unwrap();
            let end = launched.process.wait().await.unwrap();
            assert_eq!(end, ProcessEnd::Signaled(9), "its status is ours to take");
            no_child_is_left();
        }
        cgroup.destroy(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_fails_before_its_program_leaves_nothing() {
        let Some(cgroup) = second() else {
            return println!("SKIP: no cgroup of version 2 can be made here");
        };
        let mut launch = Launch::new("/no/such/program");
        launch.cgroup = Some(cgroup.clone());
        let error = launch.start().unwrap_err();
        assert_eq!(error.step, "loading the program");
        for own_processes in [false, true] {
            let mut launch = sleeper(&cgroup);
            launch.own_processes = own_processes;
            launch.read_only.push("/no/such/directory".into());
            let error = launch.start().unwrap_err();
            if crate::facts::is_root() {
                assert_eq!(error.step, "making a directory read-only");
            }
            no_child_is_left();
        }
        cgroup.destroy(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn where_no_process_can_be_made_in_it_the_cgroup_is_entered() {
        // No cgroup, which the kernel tells at the same place as one of its own in which it makes no process.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        let cgroup = Cgroup::from_dirs(vec![dir.path().to_owned()]);
        let launched = sleeper(&cgroup).start().unwrap();
        let entered = std::fs::read_to_string(dir.path().join("cgroup.procs")).unwrap();
        assert_eq!(entered, "0");
        launched.process.kill().unwrap();
        assert_eq!(
            launched.process.wait().await.unwrap(),
            ProcessEnd::Signaled(9)
        );
        no_child_is_left();
    }
}
