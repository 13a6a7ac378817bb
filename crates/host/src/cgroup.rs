//! One cgroup for each machine: limits, use, and a kill that nothing escapes. Versions 1 and 2.

use std::io;
use std::time::Duration;

/// What a machine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_max: Option<u64>,
    /// Processes and threads.
    pub pids_max: Option<u32>,
    /// Thousandths of one CPU.
    pub cpu_millis: Option<u32>,
}

/// Where this process may create cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    _parents: Vec<std::path::PathBuf>,
}

impl Cgroups {
    /// Finds out where we may create cgroups and which controllers we have there; the reason where we may not.
    ///
    /// # Errors
    /// The reason, in words.
    pub fn detect() -> Result<Cgroups, String> {
        Err("not looked for".to_owned())
    }

    /// Controllers at hand, in words: `v1: cpu, memory, pids`.
    pub fn describe(&self) -> String {
        String::new()
    }

    /// Creates the cgroup `name` (letters, digits, `-`), with these limits as far as the controllers go.
    ///
    /// # Errors
    /// The system's; nothing is left then.
    pub fn create(&self, name: &str, limits: &Limits) -> io::Result<Cgroup> {
        let _ = (name, limits);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// One machine's cgroup. Dropping the value leaves the cgroup as it is: it belongs to the machine, not to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Vec<std::path::PathBuf>,
}

impl Cgroup {
    /// The cgroup at these directories, as [`Cgroup::dirs`] gave them.
    pub fn from_dirs(dirs: Vec<std::path::PathBuf>) -> Cgroup {
        Cgroup { dirs }
    }

    /// Its directories: one under version 2, one for each controller under version 1.
    pub fn dirs(&self) -> &[std::path::PathBuf] {
        &self.dirs
    }

    /// Which limits hold, in words.
    pub fn holds(&self) -> Vec<String> {
        Vec::new()
    }

    /// Bytes of memory charged now, where that is counted.
    pub fn memory_bytes(&self) -> Option<u64> {
        None
    }

    /// CPU time used so far, where that is counted.
    pub fn cpu_time(&self) -> Option<Duration> {
        None
    }

    /// Kills every process in it and removes it, waiting at most `bound`. Succeeds where it is gone already.
    ///
    /// # Errors
    /// The system's, or `TimedOut`.
    pub async fn destroy(&self, bound: Duration) -> io::Result<()> {
        let _ = bound;
        Ok(())
    }
}
