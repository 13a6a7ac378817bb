//! Small questions about the host, each answered from the kernel's own files.

// `unsafe` for reading the time-stamp counter and for trying `unshare` in a forked child.
#![allow(unsafe_code)]

use rustix::thread::UnshareFlags;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The host's boot id, 36 characters; it changes with every boot.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Whether this process acts as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process may make namespaces and mount in them. The host may refuse some of them all the same.
pub fn may_make_namespaces() -> bool {
    effective_capabilities() >> CAP_SYS_ADMIN & 1 == 1
}

/// Processors that this process may use, a CPU quota of our own cgroup included; at least 1.
pub fn cpus() -> u32 {
    std::thread::available_parallelism()
        .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

fn meminfo(key: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| {
            let value = line.strip_prefix(key)?.strip_prefix(':')?;
            value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("no {key} in /proc/meminfo"),
            )
        })
}

/// Memory that could be given away now without swapping, in bytes.
///
/// # Errors
/// Where `/proc/meminfo` cannot be read.
pub fn memory_available() -> io::Result<u64> {
    meminfo("MemAvailable")
}

/// All memory of the host, in bytes.
///
/// # Errors
/// Where `/proc/meminfo` cannot be read.
pub fn memory_total() -> io::Result<u64> {
    meminfo("MemTotal")
}

/// Bytes that an unprivileged process may still write on the file system of `path`.
///
/// # Errors
/// Where `path` does not exist.
pub fn disk_free(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Frequency of the time-stamp counter in kHz, measured over 20 ms and then remembered; absent where there is none that
/// ticks evenly. Blocking.
///
/// QEMU's translation hands the host's counter to the guest unchanged, so this is the guest's frequency there too.
pub fn tsc_khz() -> Option<u32> {
    static MEASURED: OnceLock<Option<u32>> = OnceLock::new();
    *MEASURED.get_or_init(measure_tsc)
}

#[cfg(target_arch = "x86_64")]
fn measure_tsc() -> Option<u32> {
    const WINDOW: Duration = Duration::from_millis(20);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    if !flags.split_whitespace().any(|flag| flag == "constant_tsc") {
        return None;
    }
    let (start_time, start_ticks) = time_and_ticks();
    std::thread::sleep(WINDOW);
    let (end_time, end_ticks) = time_and_ticks();
    let ticks = end_ticks.checked_sub(start_ticks)?;
    let nanos = u64::try_from(end_time.duration_since(start_time).as_nanos()).ok()?;
    u32::try_from(u128::from(ticks) * 1_000_000 / u128::from(nanos.max(1))).ok()
}

/// A moment by both clocks: of some tries the one in which the two were read closest together.
#[cfg(target_arch = "x86_64")]
fn time_and_ticks() -> (Instant, u64) {
    // SAFETY: RDTSC reads a register and is present in every x86-64 processor; user space may use it on Linux (a process
    // that forbade itself to is not ours).
    let ticks = || unsafe { core::arch::x86_64::_rdtsc() };
    let mut best = (u64::MAX, Instant::now(), 0);
    for _ in 0..8 {
        let before = ticks();
        let time = Instant::now();
        let after = ticks();
        let width = after.saturating_sub(before);
        if width < best.0 {
            best = (width, time, before + width / 2);
        }
    }
    (best.1, best.2)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure_tsc() -> Option<u32> {
    None
}

/// Whether the wall clock can be believed: not before the year 2025. Certificates and leases fail in odd ways when it is
/// not.
pub fn clock_is_sane() -> bool {
    const BEGIN_OF_2025: Duration = Duration::from_secs(1_735_689_600);
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .is_ok_and(|since| since > BEGIN_OF_2025)
}

/// Which namespaces a process of ours may create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Namespaces {
    /// User namespaces.
    pub user: bool,
    /// Mount namespaces, within a user namespace where that is needed.
    pub mount: bool,
    /// Network namespaces, likewise.
    pub network: bool,
}

/// Tries each kind of namespace in a child process. Blocking, some milliseconds.
pub fn namespaces() -> Namespaces {
    let user = unshare_works(UnshareFlags::NEWUSER);
    let either =
        |flag| unshare_works(flag) || (user && unshare_works(UnshareFlags::NEWUSER | flag));
    Namespaces {
        user,
        mount: either(UnshareFlags::NEWNS),
        network: either(UnshareFlags::NEWNET),
    }
}

fn unshare_works(flags: UnshareFlags) -> bool {
    // SAFETY: the child makes two system calls and ends by `_exit`: it allocates nothing, takes no lock, runs no handler
    // and shares nothing that it changes (CLONE_FILES and CLONE_FS are not among the flags).
    let child = unsafe { libc::fork() };
    match child {
        -1 => false,
        0 => {
            // SAFETY: as above.
            unsafe {
                let failed = libc::unshare(flags.bits() as i32) != 0;
                libc::_exit(i32::from(failed))
            }
        }
        pid => {
            let Some(pid) = rustix::process::Pid::from_raw(pid) else {
                return false;
            };
            loop {
                match rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
                    Err(rustix::io::Errno::INTR) => {}
                    Ok(Some((_, status))) => return status.exit_status() == Some(0),
                    _ => return false,
                }
            }
        }
    }
}

/// `CAP_SYS_ADMIN` of linux/capability.h.
pub(crate) const CAP_SYS_ADMIN: u32 = 21;

/// This process's effective capabilities, one bit each; 0 where they cannot be read.
pub(crate) fn effective_capabilities() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        .unwrap_or(0)
}

/// Fields of `/proc/PID/stat` from the third on (index 0 is the state): the second may hold blanks and brackets.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// When a process started: field 22 of `/proc/PID/stat`, in clock ticks since boot. Absent where there is none.
pub fn start_ticks(pid: u32) -> Option<u64> {
    stat_fields(pid)?.get(19)?.parse().ok()
}

/// What a process does, as `/proc/PID/stat` has it: `R`, `S`, `T` (held), `Z` (ended) and others. Absent where there is none.
pub(crate) fn state(pid: u32) -> Option<char> {
    stat_fields(pid)?.first()?.chars().next()
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessUsage {
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// User and system time since it started.
    pub cpu_time: Duration,
}

/// What this process uses; absent once it is gone.
pub fn process_usage(pid: u32) -> Option<ProcessUsage> {
    let fields = stat_fields(pid)?;
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let pages = fields.get(21)?.parse::<u64>().ok()?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(ProcessUsage {
        resident_bytes: pages.saturating_mul(rustix::param::page_size() as u64),
        cpu_time: Duration::from_millis(ticks.saturating_mul(1000) / per_second),
    })
}

/// Memory of a process that it shares with no other and that no file holds, in bytes; absent once it is gone.
pub fn private_memory(pid: u32) -> Option<u64> {
    status_bytes(pid, "RssAnon:")
}

/// A number of kilobytes in `/proc/PID/status`, as bytes.
fn status_bytes(pid: u32, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The most memory that a process has held at any time, in bytes; absent once it is gone.
pub fn memory_peak(pid: u32) -> Option<u64> {
    status_bytes(pid, "VmHWM:")
}

/// Percentage of the last ten seconds in which something on this host waited for memory; absent where the kernel does not
/// tell (`CONFIG_PSI`).
pub fn memory_stalled() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/pressure/memory").ok()?;
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let mut words = some.split_whitespace();
    words
        .find_map(|word| word.strip_prefix("avg10="))?
        .parse()
        .ok()
}

/// The processor as programs see it: its name and a digest-like list of what it can do, so that two hosts with the same text
/// show guests the same processor.
pub fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |key: &str| {
        text.lines()
            .find_map(|line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == key).then(|| value.trim().to_owned())
            })
            .unwrap_or_default()
    };
    format!("{}, {}", line("model name"), line("flags"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_answers_with_plausible_figures() {
        assert_eq!(boot_id().unwrap().len(), 36);
        assert!(cpus() >= 1);
        assert!(memory_available().unwrap() <= memory_total().unwrap());
        assert!(disk_free(Path::new("/")).unwrap() > 0);
        assert!(disk_free(Path::new("/no/such/path")).is_err());
        println!("{:?} clock {}", namespaces(), clock_is_sane());
    }

    #[test]
    fn the_counter_is_measured_to_a_thousandth() {
        let Some(first) = tsc_khz() else {
            println!("SKIP: no constant time-stamp counter");
            return;
        };
        let second = measure_tsc().unwrap();
        println!("{first} kHz, again {second} kHz");
        assert!(first.abs_diff(second) <= first / 1000);
    }

    #[test]
    fn a_process_is_known_by_its_start_and_its_use() {
        let pid = std::process::id();
        assert!(start_ticks(pid).unwrap() > 0);
        let resident = process_usage(pid).unwrap().resident_bytes;
        assert!(resident > 100_000);
        let private = private_memory(pid).unwrap();
        assert!((1..=resident + (1 << 20)).contains(&private), "{private}");
        assert!(memory_peak(pid).unwrap() >= private);
        assert_eq!(memory_peak(u32::MAX), None);
        assert_eq!(private_memory(u32::MAX), None);
        assert!(memory_stalled().is_none_or(|percent| (0.0..=100.0).contains(&percent)));
        // Beyond the largest number that a kernel gives.
        assert_eq!(start_ticks(u32::MAX), None);
        assert_eq!(process_usage(u32::MAX), None);
    }
}
