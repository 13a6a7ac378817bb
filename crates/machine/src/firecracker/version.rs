//! Which Firecracker it is, and what that one can do.

/// A version such as 1.16.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// The oldest whose guests start: since this one it tells of its devices by ACPI, and kernels such as Debian's look nowhere
    /// else.
    pub(super) const OLDEST: Version = Version {
        major: 1,
        minor: 8,
        patch: 0,
    };
    /// The one that all this was tried with.
    #[cfg(test)]
    pub(super) const NEWEST_TRIED: Version = Version {
        major: 1,
        minor: 16,
        patch: 1,
    };

    /// Reads what `--version` prints: `Firecracker v1.16.1`, then whatever follows.
    pub(super) fn parse(text: &str) -> Option<Version> {
        let word = text.lines().next()?.trim().strip_prefix("Firecracker v")?;
        // A build of one's own may say `1.16.0-dev`.
        let mut numbers = word.split(|byte: char| !byte.is_ascii_digit());
        let mut next = || numbers.next()?.parse().ok();
        Some(Version {
            major: next()?,
            minor: next()?,
            patch: next().unwrap_or(0),
        })
    }

    fn at_least(self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }

    /// Whether the guest of a fork is told at once that its connections are gone. Before, it hears of it with the first packet of
    /// a new connection, and closes that one with the others.
    pub(super) fn resets_forks_vsock(self) -> bool {
        self.at_least(1, 10)
    }

    /// Whether what a guest writes to its serial console can be limited, and what it makes Firecracker log is.
    pub(super) fn limits_serial(self) -> bool {
        self.at_least(1, 16)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_firecracker_prints_them() {
        let read = |text: &str| Version::parse(text).map(|version| version.to_string());
        assert_eq!(
            read("Firecracker v1.16.1\n\n2026-… exiting successfully"),
            Some("1.16.1".to_owned())
        );
        assert_eq!(read("Firecracker v1.14.0-dev"), Some("1.14.0".to_owned()));
        assert_eq!(read("Jailer v1.16.1"), None);
        assert_eq!(read("Firecracker v"), None);
        assert!(Version::parse("Firecracker v1.7.9").unwrap() < Version::OLDEST);
        assert!(Version::parse("Firecracker v1.10.0").unwrap() > Version::OLDEST);
    }
}
