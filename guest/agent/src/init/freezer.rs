//! Holding every process but the agent still, by control groups: a process does not notice, as it would a signal.
//!
//! Processes of the root group, in which a group cannot be held, are moved to one of ours meanwhile; groups that programs
//! made are held where they are. The group is held before anything is moved into it, so that what was moved makes no more
//! processes, and looking again finds fewer each time.

use rustix::io::Errno;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// Our group.
const OURS: &str = "/sys/fs/cgroup/vistara.held";
/// What `statfs` calls the file system of control groups, version 2.
const CGROUP2: u64 = 0x6367_7270;
/// How long a process may take to be still: one that waits for a disk cannot be held.
const BOUND: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(1);
/// Looks for processes of the root group; each finds only what was made since the one before.
const ROUNDS_MAX: usize = 64;
/// Parent of the kernel's own threads, which stay where they are.
const KTHREADD: u32 = 2;

/// What is held.
#[derive(Debug)]
pub(super) struct Frozen {
    groups: Vec<PathBuf>,
}

/// Holds everything still. After an error everything goes on.
pub(super) fn freeze() -> io::Result<Frozen> {
    let system = rustix::fs::statfs(ROOT)?;
    if u64::try_from(system.f_type).ok() != Some(CGROUP2) {
        let message = format!("the guest's kernel has no control groups at {ROOT}");
        return Err(io::Error::new(io::ErrorKind::Unsupported, message));
    }
    match fs::create_dir(OURS) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let mut frozen = Frozen { groups: Vec::new() };
    let held = hold_all(&mut frozen);
    if held.is_err() {
        frozen.thaw();
    }
    held.map(|()| frozen)
}

fn hold_all(frozen: &mut Frozen) -> io::Result<()> {
    for entry in fs::read_dir(ROOT)?.flatten() {
        let group = entry.path();
        if group.join("cgroup.freeze").exists()
            && state(&group, "cgroup.freeze", "1")? != Some(true)
        {
            fs::write(group.join("cgroup.freeze"), "1")?;
            frozen.groups.push(group);
        }
    }
    let mut rounds = 0;
    while move_all()? > 0 {
        rounds += 1;
        if rounds > ROUNDS_MAX {
            return Err(io::Error::other("processes are made without end"));
        }
    }
    let until = Instant::now() + BOUND;
    for group in &frozen.groups {
        while state(group, "cgroup.events", "frozen 1")? == Some(false) {
            if Instant::now() > until {
                let message = "a process could not be held within 2 s; try again";
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}

/// Whether a file of a group has this line; nothing where the group is gone.
fn state(group: &Path, file: &str, line: &str) -> io::Result<Option<bool>> {
    match fs::read_to_string(group.join(file)) {
        Ok(text) => Ok(Some(text.lines().any(|found| found == line))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Moves every process of the root group to ours, and says how many there were.
fn move_all() -> io::Result<usize> {
    let mut moved = 0;
    let all = fs::read_to_string(format!("{ROOT}/cgroup.procs"))?;
    for pid in all.lines().filter_map(|line| line.parse::<u32>().ok()) {
        if pid == std::process::id() || pid == KTHREADD || parent(pid) == Some(KTHREADD) {
            continue;
        }
        match fs::write(format!("{OURS}/cgroup.procs"), pid.to_string()) {
            Ok(()) => moved += 1,
            // It has ended.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(moved)
}

/// The parent of a process, if that is there.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(1)?.parse().ok()
}

impl Frozen {
    /// Lets everything go on, where it was before.
    pub(super) fn thaw(&self) {
        for group in &self.groups {
            if let Err(error) = fs::write(group.join("cgroup.freeze"), "0") {
                super::console(&format!("letting {} go on: {error}", group.display()));
            }
        }
        for _ in 0..ROUNDS_MAX {
            let procs = fs::read_to_string(format!("{OURS}/cgroup.procs")).unwrap_or_default();
            if procs.is_empty() {
                break;
            }
            for pid in procs.lines() {
                // One that has ended, or whose parents make more: the next round looks again, and the group may stay.
                let _ = fs::write(format!("{ROOT}/cgroup.procs"), pid);
            }
        }
        // It stays where it is not empty yet.
        let _ = fs::remove_dir(OURS);
    }
}
