//! Starting a program behind fences.

use crate::cgroup::Cgroup;
use crate::process::ProcessHandle;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A program to start. It inherits nothing but what is named here, leads a session of its own and outlives us.
#[derive(Debug)]
pub struct Launch {
    /// Absolute path.
    pub program: PathBuf,
    /// Arguments after the program's name.
    pub args: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors that it inherits **under their own numbers** (so arguments can name `fd.as_raw_fd()`, and nothing has
    /// to be renumbered). They are closed here once it runs.
    pub inherit: Vec<OwnedFd>,
    /// User and group to become; absent to stay what we are.
    pub uid_gid: Option<(u32, u32)>,
    /// Supplementary groups: none but these.
    pub groups: Vec<u32>,
    /// Keeps its capabilities (for a helper that fences itself); else they are dropped.
    pub keep_capabilities: bool,
    /// Largest core file, descriptors, file size: (resource, soft and hard limit).
    pub rlimits: Vec<(Rlimit, u64)>,
    /// Its cgroup, entered before the program begins.
    pub cgroup: Option<Cgroup>,
    /// Where standard output and standard error go; nowhere where absent.
    pub output: Option<File>,
    /// -1000 to 1000: higher is killed earlier when the host runs out of memory.
    pub oom_score_adj: i16,
}

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rlimit {
    /// Bytes of a core file.
    Core,
    /// Open descriptors.
    Descriptors,
    /// Bytes of any file that it writes.
    FileSize,
    /// Bytes of address space.
    AddressSpace,
}

/// Why a program could not be started. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
#[error("starting {program:?}")]
pub struct LaunchError {
    /// Which.
    pub program: PathBuf,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// A started program, and which fences hold.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub process: ProcessHandle,
    /// The fences that hold, in words.
    pub fences: Vec<String>,
}

impl Launch {
    /// A launch of `program` without anything: no arguments, environment or descriptors.
    pub fn new(program: impl Into<PathBuf>) -> Launch {
        Launch {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            inherit: Vec::new(),
            uid_gid: None,
            groups: Vec::new(),
            keep_capabilities: false,
            rlimits: Vec::new(),
            cgroup: None,
            output: None,
            oom_score_adj: 0,
        }
    }

    /// Starts it. Blocking for some milliseconds, until the program's image is loaded. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn start(self) -> Result<Launched, LaunchError> {
        Err(LaunchError {
            program: self.program,
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }
}
