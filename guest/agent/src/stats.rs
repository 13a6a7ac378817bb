//! What the guest uses, from the kernel's own counters.

use std::fs;
use vistara_guest_protocol::GuestStats;

/// Microseconds of one tick in `/proc/stat`: a hundred a second, whatever the kernel's own rate.
const TICK_US: u64 = 10_000;

/// The kernel's count of processes killed for want of memory.
pub(crate) fn oom_kills() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    field(&text, "oom_kill").unwrap_or(0)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.strip_prefix([' ', ':'])?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    })
}

/// All figures; zero where the kernel does not tell.
pub(crate) fn read() -> GuestStats {
    let mut stats = GuestStats::default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |name| field(&memory, name).unwrap_or(0).saturating_mul(1024);
    stats.memory_total = bytes("MemTotal");
    stats.memory_available = bytes("MemAvailable");
    let cpu = fs::read_to_string("/proc/stat").unwrap_or_default();
    if let Some(line) = cpu.lines().find(|line| line.starts_with("cpu ")) {
        // user, nice, system, idle, iowait, irq, softirq, steal; guest time is within user time.
        let ticks: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .take(8)
            .filter_map(|tick| tick.parse().ok())
            .collect();
        let total: u64 = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        stats.cpu_total_us = total.saturating_mul(TICK_US);
        stats.cpu_busy_us = total.saturating_sub(idle).saturating_mul(TICK_US);
    }
    stats.processes = count_processes();
    if let Ok(disk) = rustix::fs::statvfs("/") {
        stats.disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
        stats.disk_used = disk
            .f_blocks
            .saturating_sub(disk.f_bfree)
            .saturating_mul(disk.f_frsize);
    }
    let net = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    for (name, figures) in net.lines().filter_map(|line| line.split_once(':')) {
        let figures: Vec<u64> = figures
            .split_whitespace()
            .filter_map(|figure| figure.parse().ok())
            .collect();
        if name.trim() != "lo" {
            stats.net_received += figures.first().copied().unwrap_or(0);
            stats.net_sent += figures.get(8).copied().unwrap_or(0);
        }
    }
    stats
}

fn count_processes() -> u32 {
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    let user_process = |name: &str| {
        // Kernel threads are children of process 2, which is one itself.
        let Ok(stat) = fs::read_to_string(format!("/proc/{name}/stat")) else {
            return false;
        };
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1));
        name != "2" && parent != Some("2")
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let numbers = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    u32::try_from(numbers.filter(|name| user_process(name)).count()).unwrap_or(u32::MAX)
}
