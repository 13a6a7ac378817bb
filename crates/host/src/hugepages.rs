//! Huge pages of 2 MiB that the host's owner has set aside.

use std::io;
use std::path::Path;

/// Bytes of a page.
pub const PAGE: u64 = 2 << 20;

/// Where the kernel counts them.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// How many there are, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Set aside.
    pub total: u64,
    /// That nobody has touched, and that nobody was promised.
    pub free: u64,
}

/// What is set aside on this host; a kernel without huge pages has none.
///
/// # Errors
/// The kernel's files cannot be read.
pub fn pool() -> io::Result<Pool> {
    pool_at(Path::new(POOL))
}

fn pool_at(dir: &Path) -> io::Result<Pool> {
    let count = |name: &str| match std::fs::read_to_string(dir.join(name)) {
        Ok(text) => text
            .trim()
            .parse::<u64>()
            .map_err(|_| io::Error::other(format!("{name} of the huge pages is {text:?}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    };
    let untouched = count("free_hugepages")?;
    Ok(Pool {
        total: count("nr_hugepages")?,
        free: untouched.saturating_sub(count("resv_hugepages")?),
    })
}

/// Bytes of huge pages that a process has touched; 0 where it is gone or may not be looked at.
pub fn touched(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    touched_in(&text)
}

fn touched_in(rollup: &str) -> u64 {
    let lines = rollup.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let is_huge = matches!(name, "Private_Hugetlb" | "Shared_Hugetlb");
        let kib = rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
        is_huge.then_some(kib << 10)
    });
    lines.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_were_promised_is_not_free() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pool_at(dir.path()).unwrap(), Pool { total: 0, free: 0 });
        let files = [("nr", "10"), ("free", "7"), ("resv", "3")];
        for (name, count) in files {
            let path = dir.path().join(format!("{name}_hugepages"));
            std::fs::write(path, format!("{count}\n")).unwrap();
        }
        assert_eq!(pool_at(dir.path()).unwrap(), Pool { total: 10, free: 4 });
        std::fs::write(dir.path().join("nr_hugepages"), "many").unwrap();
        let refused = pool_at(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("many"), "{refused}");
    }

    #[test]
    fn private_and_shared_pages_are_counted_and_no_others() {
        let text = "00400000-7fff [rollup]\nRss: 9 kB\nShared_Hugetlb:     4096 kB\nPrivate_Hugetlb:    2048 kB\nAnonHugePages: 2048 kB\n";
        assert_eq!(touched_in(text), 6 << 20);
        assert_eq!(touched(std::process::id()), 0);
    }
}
