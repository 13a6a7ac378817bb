//! The end of a machine that may run only for so long: the copy of a service, while its node has a lease for it.
//!
//! ```text
//! the machine's directory/lease:  the moment (CLOCK_BOOTTIME) at which it must be gone; the node replaces it with each renewal
//! a guard, a process of its own:  sleeps until then, reads it again, and ends the machine where it was not put off
//! ```
//! Machines outlive their node's process, and so does the guard. It is there before the machine is, knows the machine by its
//! directory, and ends it by its recorded process and its cgroup, whatever monitor runs it. The clock goes on while the host
//! sleeps. Where the file is gone the guard goes, too: it is removed once the machine has ended.
//!
//! Fake machines are threads of this process, and so are their guards.

use crate::machine::Shared;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vistara_host::cgroup::{Cgroups, Limits};
use vistara_host::launch::Launch;
use vistara_host::process::{ProcessHandle, ProcessIdentity};

/// When the machine must be gone, in nanoseconds of `CLOCK_BOOTTIME`.
const LEASE: &str = "lease";
/// Which process guards it.
const GUARD: &str = "guard.json";
/// Where the node notes the monitor, and where monitors do right after they have started.
const RECORDS: [&str; 2] = ["record.json", "launch.json"];
/// The cgroup of all guards, where there may be any: it ends neither with the node's nor with a machine's.
const CGROUP: &str = "guards";
/// Longest sleep of a guard: a lease is shorter.
const SLEEP_MAX: Duration = Duration::from_secs(60);
/// How a guard is killed last, where the host runs out of memory.
const OOM_SCORE: i16 = -900;

/// How guards are started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardProgram {
    /// The program: it ends in [`stand`].
    pub program: PathBuf,
    /// Its first arguments; the machine's directory is the last.
    pub args: Vec<OsString>,
}

/// The clock by which leases are counted: it goes on while the host sleeps.
pub(crate) fn boottime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// Puts a machine's end off, or sets it for the first time. Blocks on a file.
pub(crate) fn renew(dir: &Path, until: Duration) -> io::Result<()> {
    let fresh = dir.join("lease.new");
    std::fs::write(&fresh, format!("{}\n", until.as_nanos()))?;
    std::fs::rename(&fresh, dir.join(LEASE))
}

/// Whether a machine's end is set. Blocks on a file.
pub(crate) fn has_lease(dir: &Path) -> bool {
    dir.join(LEASE).exists()
}

/// The machine has ended: nobody need guard it. Blocks on files.
pub(crate) fn lift(dir: &Path) {
    for name in [LEASE, GUARD] {
        // There may be none.
        let _ = std::fs::remove_file(dir.join(name));
    }
}

/// When a machine must be gone; none where it is over. What cannot be read makes it now: the file is replaced as a whole, so
/// that there is no half of one.
fn deadline(dir: &Path) -> Option<Duration> {
    match std::fs::read_to_string(dir.join(LEASE)) {
        Ok(text) => Some(
            text.trim()
                .parse()
                .map_or(Duration::ZERO, Duration::from_nanos),
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(Duration::ZERO),
    }
}

/// Waits for a machine's deadline: true where it is over, false where the machine has ended before.
fn wait(dir: &Path) -> bool {
    loop {
        let Some(until) = deadline(dir) else {
            return false;
        };
        let now = boottime();
        let Some(left) = until.checked_sub(now).filter(|left| !left.is_zero()) else {
            return true;
        };
        let at = now + left.min(SLEEP_MAX);
        let at = rustix::time::Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at.subsec_nanos()),
        };
        // Woken too early it looks again.
        let _ = rustix::thread::clock_nanosleep_absolute(rustix::thread::ClockId::Boottime, &at);
    }
}

#[derive(Deserialize)]
struct Noted {
    vm: Option<Monitor>,
    #[serde(flatten)]
    own: Option<Monitor>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Monitor {
    pid: u32,
    pid_start_ticks: u64,
    boot_id: String,
}

impl Monitor {
    fn identity(self) -> ProcessIdentity {
        ProcessIdentity {
            pid: self.pid,
            start_ticks: self.pid_start_ticks,
            boot_id: self.boot_id,
        }
    }
}

/// The processes that are noted in a machine's directory. Blocks on files.
fn noted(dir: &Path) -> Vec<ProcessIdentity> {
    let read = |name| std::fs::read(dir.join(name)).ok();
    (RECORDS.iter().filter_map(read))
        .filter_map(|bytes| serde_json::from_slice::<Noted>(&bytes).ok())
        .filter_map(|noted| noted.vm.or(noted.own))
        .map(Monitor::identity)
        .collect()
}

/// Ends a machine, by whatever of it can be found. Blocks.
fn end(dir: &Path) {
    for identity in noted(dir) {
        if let Ok(Some(process)) = ProcessHandle::adopt(&identity) {
            let _ = process.kill();
        }
    }
    let name = dir.file_name().and_then(|name| name.to_str());
    let cgroup = Cgroups::detect().ok().zip(name);
    if let Some(cgroup) = cgroup.and_then(|(cgroups, name)| cgroups.find(name)) {
        for pid in cgroup.pids() {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                // One that has just gone is gone.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// What a guard does, to its end: the machine in this directory is gone when its lease is over. Blocks.
pub fn stand(dir: &Path) {
    if wait(dir) {
        end(dir);
    }
}

/// A guard that is there.
pub(crate) enum Guard {
    /// A process, of this start or an earlier one.
    Process(ProcessHandle),
    /// A thread.
    Thread,
}

impl Guard {
    /// Waits until it is gone, which it should not be before its machine.
    pub(crate) async fn gone(&self) {
        match self {
            Guard::Process(process) => {
                if process.wait().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Guard::Thread => std::future::pending().await,
        }
    }

    /// Sends it home: its machine has ended.
    pub(crate) fn dismiss(&self) {
        if let Guard::Process(process) = self {
            // It goes by itself, later.
            let _ = process.kill();
        }
    }
}

/// Sets a guard on a machine whose lease is in its directory, unless there is one. Blocks.
pub(crate) fn post(
    program: Option<&GuardProgram>,
    dir: &Path,
    shared: &Arc<Shared>,
) -> io::Result<Guard> {
    let Some(program) = program else {
        return in_thread(dir.to_owned(), Arc::clone(shared));
    };
    if let Ok(bytes) = std::fs::read(dir.join(GUARD))
        && let Ok(known) = serde_json::from_slice::<Monitor>(&bytes)
        && let Some(process) = ProcessHandle::adopt(&known.identity())?
    {
        return Ok(Guard::Process(process));
    }
    let mut launch = Launch::new(program.program.clone());
    launch.args.clone_from(&program.args);
    launch.args.push(dir.into());
    // The monitor may be another user's.
    launch.keep_capabilities = true;
    launch.oom_score_adj = OOM_SCORE;
    launch.cgroup = Cgroups::detect().ok().and_then(|cgroups| {
        let limits = Limits {
            memory_max: None,
            pids_max: None,
            cpu_millis: None,
        };
        (cgroups.find(CGROUP)).or_else(|| cgroups.create(CGROUP, &limits).ok())
    });
    let launched = launch.start().map_err(io::Error::other)?;
    let identity = launched.process.identity();
    let note = Monitor {
        pid: identity.pid,
        pid_start_ticks: identity.start_ticks,
        boot_id: identity.boot_id.clone(),
    };
    // Without the note a later node sets another one beside it, which does no harm.
    let _ = serde_json::to_vec(&note).map(|bytes| std::fs::write(dir.join(GUARD), bytes));
    Ok(Guard::Process(launched.process))
}

fn in_thread(dir: PathBuf, shared: Arc<Shared>) -> io::Result<Guard> {
    std::thread::Builder::new()
        .name("guard".to_owned())
        .spawn(move || {
            if !wait(&dir) {
                return;
            }
            let vm = shared.vm.borrow().clone();
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            if let (Some(vm), Ok(runtime)) = (vm, runtime) {
                let _ = runtime.block_on(vm.kill());
            }
        })
        .map(|_| Guard::Thread)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Instant;
    use vistara_host::facts;

    fn sleeper() -> (std::process::Child, ProcessIdentity) {
        let child = Command::new("/bin/sleep").arg("100").spawn().unwrap();
        let identity = ProcessIdentity {
            pid: child.id(),
            start_ticks: facts::start_ticks(child.id()).unwrap(),
            boot_id: facts::boot_id().unwrap(),
        };
        (child, identity)
    }

    fn note(dir: &Path, name: &str, identity: &ProcessIdentity) {
        let monitor = Monitor {
            pid: identity.pid,
            pid_start_ticks: identity.start_ticks,
            boot_id: identity.boot_id.clone(),
        };
        let json = match name {
            "record.json" => serde_json::json!({ "format": 1, "vm": monitor, "spec": {} }),
            _ => serde_json::to_value(&monitor).unwrap(),
        };
        std::fs::write(dir.join(name), json.to_string()).unwrap();
    }

    #[test]
    fn a_machine_whose_lease_is_put_off_lives_on_and_ends_when_it_is_not() {
        for name in RECORDS {
            let dir = tempfile::tempdir().unwrap();
            let (mut child, identity) = sleeper();
            note(dir.path(), name, &identity);
            let span = Duration::from_millis(300);
            renew(dir.path(), boottime() + span).unwrap();
            let path = dir.path().to_owned();
            let guard = std::thread::spawn(move || stand(&path));
            let begun = Instant::now();
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(100));
                renew(dir.path(), boottime() + span).unwrap();
                assert!(child.try_wait().unwrap().is_none());
            }
            guard.join().unwrap();
            assert!(!child.wait().unwrap().success());
            assert!(begun.elapsed() >= Duration::from_millis(800));
        }
    }

    #[test]
    fn a_guard_goes_when_the_machine_has_ended_and_kills_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let (mut child, mut identity) = sleeper();
        // Another process with the same number.
        identity.start_ticks += 1;
        note(dir.path(), "record.json", &identity);
        renew(dir.path(), boottime()).unwrap();
        stand(dir.path());
        lift(dir.path());
        stand(dir.path());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
