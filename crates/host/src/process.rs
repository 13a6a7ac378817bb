//! A process that may outlive us, held by a pidfd so that its number can never mean another.

// One call: registering the pidfd with the runtime.
#![allow(unsafe_code)]

use crate::facts;
use rustix::process::{
    PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

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

/// A running or ended process. Dropping it changes nothing for the process.
#[derive(Debug)]
pub struct ProcessHandle {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
    end: OnceCell<ProcessEnd>,
}

impl ProcessHandle {
    /// Takes hold of a child that this process has just started and not yet waited for.
    pub(crate) fn of_child(pid: u32) -> io::Result<ProcessHandle> {
        let pidfd = open(pid)?.ok_or(io::ErrorKind::NotFound)?;
        let identity = ProcessIdentity {
            pid,
            start_ticks: facts::start_ticks(pid).ok_or(io::ErrorKind::NotFound)?,
            boot_id: facts::boot_id()?,
        };
        Ok(ProcessHandle {
            identity,
            pidfd,
            end: OnceCell::new(),
        })
    }

    /// Takes hold of a process by its identity; `None` where it is gone.
    ///
    /// # Errors
    /// Where it cannot be told (no `/proc`, no descriptors left).
    pub fn adopt(identity: &ProcessIdentity) -> io::Result<Option<ProcessHandle>> {
        if facts::boot_id()? != identity.boot_id {
            return Ok(None);
        }
        // The descriptor first: if the start time read after it fits, both mean the same process.
        let Some(pidfd) = open(identity.pid)? else {
            return Ok(None);
        };
        Ok(
            (facts::start_ticks(identity.pid) == Some(identity.start_ticks)).then(|| {
                ProcessHandle {
                    identity: identity.clone(),
                    pidfd,
                    end: OnceCell::new(),
                }
            }),
        )
    }

    /// Which process.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Its process namespace, for [`crate::launch::Launch::processes_of`].
    ///
    /// # Errors
    /// `NotFound` where it is gone, or no permission.
    pub fn process_namespace(&self) -> io::Result<File> {
        self.namespace("pid")
    }

    /// One of its namespaces, by its name in `/proc`.
    pub(crate) fn namespace(&self, kind: &str) -> io::Result<File> {
        let file = File::open(format!("/proc/{}/ns/{kind}", self.identity.pid))?;
        // Looked at after it was opened: if it is the same process still, the file is its.
        if facts::start_ticks(self.identity.pid) != Some(self.identity.start_ticks) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(file)
    }

    /// Waits for its end. Any number of callers may wait; all get the same answer. Another handle on the same process may
    /// have taken the exit status first: the answer is [`ProcessEnd::Unknown`] then. Needs a tokio runtime.
    ///
    /// # Errors
    /// Where the runtime cannot watch the descriptor.
    pub async fn wait(&self) -> io::Result<ProcessEnd> {
        self.end
            .get_or_try_init(|| async {
                // SAFETY: the registration owns its copy of the descriptor, which nothing else closes or replaces, and an
                // `OwnedFd` always gives the same number.
                let watched = unsafe {
                    AsyncFd::register_with_interest(self.pidfd.try_clone()?, Interest::READABLE)
                }?;
                loop {
                    // Readable once the process has ended; the descriptor stays readable, so one look is enough.
                    drop(watched.readable().await?);
                    if let Some(end) = self.collect()? {
                        return Ok(end);
                    }
                }
            })
            .await
            .copied()
    }

    /// Takes the exit status where there is one; `None` while the process runs.
    fn collect(&self) -> io::Result<Option<ProcessEnd>> {
        loop {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            return match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(None) => Ok(None),
                Ok(Some(status)) => Ok(Some(
                    match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => ProcessEnd::Exited(code),
                        (None, Some(signal)) => ProcessEnd::Signaled(signal),
                        (None, None) => ProcessEnd::Unknown,
                    },
                )),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CHILD) => Ok(Some(ProcessEnd::Unknown)),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// How it ended, where [`ProcessHandle::wait`] has been told already.
    pub fn known_end(&self) -> Option<ProcessEnd> {
        self.end.get().copied()
    }

    /// Holds all its threads still, as far as it is not gone; waits until they are, at most `bound`.
    ///
    /// # Errors
    /// No permission, or `TimedOut`.
    pub async fn hold(&self, bound: std::time::Duration) -> io::Result<()> {
        self.signal(Signal::STOP)?;
        let held = async {
            // Stopped, dead, or about to be.
            while !facts::state(self.identity.pid).is_none_or(|state| "TtZX".contains(state)) {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        let held = tokio::time::timeout(bound, held).await;
        held.map_err(|_| io::ErrorKind::TimedOut.into())
    }

    /// Lets a process that is held go on.
    ///
    /// # Errors
    /// No permission.
    pub fn go_on(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends SIGKILL; succeeds when it is gone already.
    ///
    /// # Errors
    /// No permission.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn open(pid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
