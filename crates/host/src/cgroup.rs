//! One cgroup for each machine: limits, use, and a kill that nothing escapes. Versions 1 and 2.
//!
//! Machines' cgroups lie under one of our own, `vistara`: at the top of each hierarchy for a root node, or under the
//! node's own cgroup where that was delegated to it (systemd's `Delegate=yes`). Nothing else is touched, but that version 2
//! wants a cgroup with children to hold no processes: a delegated node therefore moves itself into the child
//! `vistara-node`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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

/// Period over which a CPU quota is reckoned, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// What of it the limits above need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The cgroup of all that is ours, and the one into which a delegated node moves itself.
const OURS: &str = "vistara";
const NODE: &str = "vistara-node";

/// How often a cgroup's end is looked for while it is being emptied; the kernel gives no event under version 1.
const EMPTY_POLL: Duration = Duration::from_millis(2);

/// Where this process may create cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    version: Version,
    /// Version 2: our one directory. Version 1: one of each controller's hierarchy.
    parents: Vec<PathBuf>,
    controllers: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Cgroups {
    /// Finds out where we may create cgroups and which controllers we have there.
    ///
    /// # Errors
    /// The reason why we may not, in words.
    pub fn detect() -> Result<Cgroups, String> {
        let own = fs::read_to_string("/proc/self/cgroup")
            .map_err(|error| format!("/proc/self/cgroup: {error}"))?;
        detect_under(Path::new("/sys/fs/cgroup"), &own)
    }

    /// Controllers at hand, in words: `v1: cpu, memory, pids`.
    pub fn describe(&self) -> String {
        let version = match self.version {
            Version::One => "v1",
            Version::Two => "v2",
        };
        format!("{version}: {}", self.controllers.join(", "))
    }

    /// The cgroup `name`, where it exists: left by a process that died before it could note what it had created.
    pub fn find(&self, name: &str) -> Option<Cgroup> {
        let dirs: Vec<PathBuf> = self
            .parents
            .iter()
            .map(|parent| parent.join(name))
            .collect();
        let plain = Path::new(name).file_name() == Some(name.as_ref());
        (plain && dirs.iter().any(|dir| dir.is_dir())).then(|| Cgroup::from_dirs(dirs))
    }

    /// Creates the cgroup `name` (letters, digits, `-`, `_`), with these limits as far as the controllers go.
    ///
    /// # Errors
    /// The system's; nothing is left then.
    pub fn create(&self, name: &str, limits: &Limits) -> io::Result<Cgroup> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut group = Cgroup {
            dirs: Vec::new(),
            holds: Vec::new(),
        };
        for parent in &self.parents {
            let dir = parent.join(name);
            let made = match fs::create_dir(&dir) {
                // Left by a machine of this very name that is gone: ids are never reused, so it is ours and empty.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            };
            if let Err(error) = made.and_then(|()| {
                group.dirs.push(dir.clone());
                self.limit(&dir, limits, &mut group.holds)
            }) {
                for dir in &group.dirs {
                    // The first error is the one to tell.
                    let _ = fs::remove_dir(dir);
                }
                return Err(error);
            }
        }
        Ok(group)
    }

    /// Writes those limits whose files are in `dir`.
    fn limit(&self, dir: &Path, limits: &Limits, holds: &mut Vec<String>) -> io::Result<()> {
        let quota = |millis: u32| u64::from(millis) * CPU_PERIOD_US / 1000;
        let (memory_file, memory) = match self.version {
            Version::One => ("memory.limit_in_bytes", limits.memory_max),
            Version::Two => ("memory.max", limits.memory_max),
        };
        if let Some(max) = memory
            && write_if_there(&dir.join(memory_file), &max.to_string())?
        {
            holds.push(format!("memory at most {} MiB", max >> 20));
            // Swap would let a machine grow beyond its limit; not every kernel counts it.
            if self.version == Version::Two {
                let _ = write_if_there(&dir.join("memory.swap.max"), "0");
            }
        }
        if let Some(max) = limits.pids_max
            && write_if_there(&dir.join("pids.max"), &max.to_string())?
        {
            holds.push(format!("at most {max} threads"));
        }
        if let Some(millis) = limits.cpu_millis {
            // The kernel takes no quota below one millisecond.
            let quota = quota(millis).max(1000);
            let written = match self.version {
                Version::One => {
                    write_if_there(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?
                        && write_if_there(&dir.join("cpu.cfs_quota_us"), &quota.to_string())?
                }
                Version::Two => {
                    write_if_there(&dir.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))?
                }
            };
            if written {
                holds.push(format!("at most {} of a CPU", f64::from(millis) / 1000.0));
            }
        }
        Ok(())
    }
}

/// Writes to a control file; `false` where the controller is not here.
fn write_if_there(path: &Path, text: &str) -> io::Result<bool> {
    match fs::write(path, text) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        // A control file cannot be created, so the kernel says this of one that is not there.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !path.exists() => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn detect_under(root: &Path, own: &str) -> Result<Cgroups, String> {
    // Each line of /proc/self/cgroup is `id:controllers:path`; version 2 has id 0 and no controllers.
    let lines: Vec<(&str, &str)> = own
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.split_once(':')
        })
        .collect();
    let second = if root.join("cgroup.controllers").exists() {
        Some(root.to_owned())
    } else {
        Some(root.join("unified")).filter(|path| path.join("cgroup.controllers").exists())
    };
    let mut reasons = Vec::new();
    if let Some(top) = second {
        let own_path = lines.iter().find(|(list, _)| list.is_empty());
        match version_two(&top, own_path.map_or("/", |(_, path)| path)) {
            Ok(found) => return Ok(found),
            Err(reason) => reasons.push(format!("v2: {reason}")),
        }
    }
    match version_one(root, &lines) {
        Ok(found) => Ok(found),
        Err(reason) => {
            reasons.push(format!("v1: {reason}"));
            Err(reasons.join("; "))
        }
    }
}

fn version_one(root: &Path, lines: &[(&str, &str)]) -> Result<Cgroups, String> {
    let mut parents: Vec<PathBuf> = Vec::new();
    let mut controllers = Vec::new();
    let mut reason = "no controllers are mounted".to_owned();
    for controller in CONTROLLERS {
        let top = root.join(controller);
        if !top.join("cgroup.procs").exists() {
            continue;
        }
        let own = lines
            .iter()
            .find(|(list, _)| list.split(',').any(|name| name == controller))
            .map_or("", |(_, path)| *path);
        let candidates = bases(&top, own).map(|base| base.join(OURS));
        match candidates.iter().find_map(|path| made(path).ok()) {
            Some(parent) => {
                // `cpu` and `cpu,cpuacct` may be one hierarchy under two names: the same directory twice does no harm
                // but to `remove_dir`, so it is taken once.
                let real = fs::canonicalize(&parent).unwrap_or(parent);
                if !parents.contains(&real) {
                    parents.push(real);
                }
                controllers.push(controller.to_owned());
            }
            None => reason = format!("no permission to create {}", candidates[0].display()),
        }
    }
    if controllers.is_empty() {
        return Err(reason);
    }
    Ok(Cgroups {
        version: Version::One,
        parents,
        controllers,
    })
}

fn version_two(top: &Path, own: &str) -> Result<Cgroups, String> {
    let mut reason = String::new();
    for base in &bases(top, own) {
        let available = fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
        let wanted: Vec<&str> = CONTROLLERS
            .into_iter()
            .filter(|name| available.split_whitespace().any(|have| have == *name))
            .collect();
        if wanted.is_empty() {
            reason = format!("{} has none of cpu, memory, pids", base.display());
            continue;
        }
        let parent = base.join(OURS);
        if let Err(error) = made(&parent) {
            reason = format!("{}: {error}", parent.display());
            continue;
        }
        let passed = pass_on(base, &wanted).or_else(|error| {
            // Processes of its own keep a cgroup from passing controllers on: step aside, but only from our own one.
            if error.raw_os_error() != Some(libc::EBUSY) || base == top {
                return Err(error);
            }
            let aside = made(&base.join(NODE))?;
            fs::write(aside.join("cgroup.procs"), "0")?;
            pass_on(base, &wanted)
        });
        if let Err(error) = passed.and_then(|()| pass_on(&parent, &wanted)) {
            reason = format!("{} cannot pass controllers on: {error}", base.display());
            continue;
        }
        return Ok(Cgroups {
            version: Version::Two,
            parents: vec![parent],
            controllers: wanted.into_iter().map(str::to_owned).collect(),
        });
    }
    Err(reason)
}

/// Where ours may be made, for a process in `own` of the hierarchy at `top`: at its top, where that was delegated, or right there.
fn bases(top: &Path, own: &str) -> [PathBuf; 3] {
    let own = own.trim_start_matches('/');
    [Path::new(""), delegated(own), Path::new(own)].map(|base| top.join(base))
}

/// The cgroup that was delegated to the node, as seen by a process in `own`: the node itself before and after it has moved
/// aside, or a helper of its in one of our cgroups. All of them must find the same place.
fn delegated(own: &str) -> &Path {
    let own = Path::new(own);
    let Some(parent) = own.parent() else {
        return own;
    };
    if own.file_name() == Some(NODE.as_ref()) {
        return parent;
    }
    match parent.parent() {
        Some(above) if parent.file_name() == Some(OURS.as_ref()) => above,
        Some(_) | None => own,
    }
}

fn pass_on(base: &Path, controllers: &[&str]) -> io::Result<()> {
    let file = base.join("cgroup.subtree_control");
    let present = fs::read_to_string(&file)?;
    for name in controllers {
        if !present.split_whitespace().any(|have| have == *name) {
            fs::write(&file, format!("+{name}"))?;
        }
    }
    Ok(())
}

/// The directory, created where it was not there; an error where it cannot be written to.
fn made(path: &Path) -> io::Result<PathBuf> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK)?;
    Ok(path.to_owned())
}

/// The file by which a process of one thread enters the cgroup at `dir`: by writing `0` to it.
///
/// Version 1 has one for single threads beside the one for whole processes. For a process of one thread they mean the same,
/// but moving a whole process makes the kernel hold every fork and end on the host and wait until all CPUs have noticed (10 to
/// 30 ms), and a thread that moves itself is spared that (since Linux 5.6).
pub(crate) fn entrance(dir: &Path) -> io::Result<fs::File> {
    let open = |name: &str| fs::OpenOptions::new().write(true).open(dir.join(name));
    match open("tasks") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => open("cgroup.procs"),
        other => other,
    }
}

/// One machine's cgroup. Dropping the value leaves the cgroup as it is: it belongs to the machine, not to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
    holds: Vec<String>,
}

/// Limits of a cgroup's memory as they were before they were raised.
#[derive(Debug)]
pub struct RaisedMemory(Vec<(PathBuf, u64)>);

impl RaisedMemory {
    /// Sets them again. What is beyond them is given up by the kernel, or its processes' end.
    ///
    /// # Errors
    /// The system's.
    pub fn take_back(self) -> io::Result<()> {
        let mut failed = Ok(());
        for (path, limit) in self.0 {
            if let Err(error) = fs::write(&path, limit.to_string()) {
                failed = Err(error);
            }
        }
        failed
    }
}

impl Cgroup {
    /// The cgroup at these directories, as [`Cgroup::dirs`] gave them.
    pub fn from_dirs(dirs: Vec<PathBuf>) -> Cgroup {
        Cgroup {
            dirs,
            holds: Vec::new(),
        }
    }

    /// Its directories: one under version 2, one for each controller under version 1.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Its directory under version 2, where a process can be made in it.
    pub(crate) fn home(&self) -> Option<&Path> {
        match self.dirs.as_slice() {
            [dir] if !dir.join("tasks").exists() => Some(dir),
            _ => None,
        }
    }

    /// Which limits hold, in words; known to the value that created it only.
    pub fn holds(&self) -> &[String] {
        &self.holds
    }

    fn number(&self, file: &str) -> Option<u64> {
        let text = self
            .dirs
            .iter()
            .find_map(|dir| fs::read_to_string(dir.join(file)).ok())?;
        text.trim().parse().ok()
    }

    /// Bytes of memory charged now, where that is counted.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.number("memory.current")
            .or_else(|| self.number("memory.usage_in_bytes"))
    }

    /// CPU time used so far, where that is counted (version 2 only: version 1 counts it in a hierarchy we do not use).
    pub fn cpu_time(&self) -> Option<Duration> {
        let text = self
            .dirs
            .iter()
            .find_map(|dir| fs::read_to_string(dir.join("cpu.stat")).ok())?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))?;
        Some(Duration::from_micros(line.trim().parse().ok()?))
    }

    /// How many processes of it the kernel killed because its memory limit was reached, where that is counted.
    pub fn out_of_memory_kills(&self) -> Option<u64> {
        let text = self.dirs.iter().find_map(|dir| {
            fs::read_to_string(dir.join("memory.events"))
                .or_else(|_| fs::read_to_string(dir.join("memory.oom_control")))
                .ok()
        })?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))?;
        line.trim().parse().ok()
    }

    /// Processes in it now.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self
            .dirs
            .iter()
            .filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok())
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .collect::<Vec<u32>>()
            })
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Lets its processes have this much more memory than they might have so far, where that is limited: for good, unless it is
    /// taken back.
    ///
    /// # Errors
    /// The system's.
    pub fn raise_memory_max(&self, by: u64) -> io::Result<RaisedMemory> {
        let mut raised = RaisedMemory(Vec::new());
        for dir in &self.dirs {
            for name in ["memory.max", "memory.limit_in_bytes"] {
                let path = dir.join(name);
                let Ok(text) = fs::read_to_string(&path) else {
                    continue;
                };
                // `max` is no number.
                let Ok(limit) = text.trim().parse::<u64>() else {
                    continue;
                };
                if let Err(error) = fs::write(&path, limit.saturating_add(by).to_string()) {
                    // What is told is why it could not be had.
                    let _ = raised.take_back();
                    return Err(error);
                }
                raised.0.push((path, limit));
            }
        }
        Ok(raised)
    }

    fn kill_all(&self) {
        for dir in &self.dirs {
            if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
                return;
            }
        }
        for pid in self.pids() {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                // It may have ended since the list was read; what is still there is killed in the next round.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Removes what is empty of it; `true` once nothing is left.
    fn remove(&self) -> io::Result<bool> {
        let mut gone = true;
        for dir in &self.dirs {
            match fs::remove_dir(dir) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => gone = false,
                Err(error) => return Err(error),
            }
        }
        Ok(gone)
    }

    /// Kills every process in it and removes it, waiting at most `bound`. Succeeds where it is gone already.
    ///
    /// # Errors
    /// The system's, or `TimedOut`.
    pub async fn destroy(&self, bound: Duration) -> io::Result<()> {
        let deadline = Instant::now() + bound;
        while !self.remove()? {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.kill_all();
            tokio::time::sleep(EMPTY_POLL).await;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
