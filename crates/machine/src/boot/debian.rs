//! Debian's kernel packages, downloaded with the host's own apt: its mirror, its proxy, its verification of signatures.

use super::BootError;
use super::program::Program;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The package that depends on the newest cloud kernel: small, without drivers of real hardware.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Reading apt's lists takes under a second.
const LOOKUP_TIME_MAX: Duration = Duration::from_secs(60);
/// A kernel has 30 MB, its source 140, and lines are slow.
const DOWNLOAD_TIME_MAX: Duration = Duration::from_secs(1800);

/// Downloads the kernel package into `scratch` and gives its path.
pub(crate) fn download(scratch: &Path) -> Result<PathBuf, BootError> {
    let package = newest(META_PACKAGE, "linux-image-", scratch)
        .map_err(|error| no_lists(error, META_PACKAGE))?;
    fetch(&package, scratch).map_err(|error| no_lists(error, &package))
}

/// The package, of a name that begins so, on which this one depends.
pub(super) fn newest(meta: &str, prefix: &str, scratch: &Path) -> Result<String, BootError> {
    let listing = run("apt-cache", &["depends", meta], scratch, LOOKUP_TIME_MAX)?;
    concrete_package(&listing, prefix).ok_or_else(|| BootError::Command {
        command: format!("apt-cache depends {meta}"),
        message: format!("it names no {prefix}… package"),
    })
}

/// The version of a package that apt would take.
pub(super) fn version(package: &str, scratch: &Path) -> Result<String, BootError> {
    let arguments = ["show", "--no-all-versions", package];
    let words = run("apt-cache", &arguments, scratch, LOOKUP_TIME_MAX)?;
    let version = words
        .lines()
        .find_map(|line| line.strip_prefix("Version: "));
    let version = version.map(str::trim).filter(|version| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".+-~:".contains(&byte);
        !version.is_empty() && version.len() <= 100 && version.bytes().all(plain)
    });
    version
        .map(str::to_owned)
        .ok_or_else(|| BootError::Command {
            command: format!("apt-cache show {package}"),
            message: "it names no version".to_owned(),
        })
}

/// Downloads a package, or `package=version`, into `scratch`, which holds no other, and gives its path. Apt checks that its sources signed it.
pub(super) fn fetch(package: &str, scratch: &Path) -> Result<PathBuf, BootError> {
    // As root, apt drops to its own user, which cannot write to a directory of ours.
    let arguments = ["-q", "-o", "APT::Sandbox::User=root", "download", package];
    run("apt-get", &arguments, scratch, DOWNLOAD_TIME_MAX)?;
    let entries = fs::read_dir(scratch).map_err(BootError::io("read directory", scratch))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .ok_or_else(|| BootError::Command {
            command: format!("apt-get download {package}"),
            message: "it left no package".to_owned(),
        })
}

/// The package with this beginning that the meta-package depends on, by what `apt-cache depends` prints.
fn concrete_package(listing: &str, prefix: &str) -> Option<String> {
    let plain = |name: &str| {
        name.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
    };
    listing
        .lines()
        .filter_map(|line| {
            line.trim()
                .trim_start_matches('|')
                .strip_prefix("Depends: ")
        })
        .map(|name| name.split(':').next().unwrap_or(name))
        .find(|name| name.starts_with(prefix) && plain(name))
        .map(str::to_owned)
}

/// Adds what to do to apt's own words.
fn no_lists(error: BootError, package: &str) -> BootError {
    match error {
        BootError::Command { command, message } => BootError::Command {
            command,
            message: format!(
                "{message}\nIf apt's lists are old or missing, run: sudo apt-get update. Where Debian's packages are out of reach, download {package} elsewhere and run: vistara kernel add FILE.deb"
            ),
        },
        other => other,
    }
}

fn run(
    program: &'static str,
    arguments: &[&str],
    dir: &Path,
    time_max: Duration,
) -> Result<String, BootError> {
    let program = Program {
        name: program,
        arguments,
        dir,
        time_max,
        // Proxies are told by variables.
        environment: &[],
        bare: false,
        mend: "this host has no apt: download Debian's linux-image-*-cloud-amd64 package elsewhere and run: vistara kernel add FILE.deb",
    };
    program.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_in_what_apt_prints() {
        let listing = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-49-cloud-amd64\n  Conflicts: x\n";
        assert_eq!(
            concrete_package(listing, "linux-image-").as_deref(),
            Some("linux-image-6.1.0-49-cloud-amd64")
        );
        assert_eq!(
            concrete_package("linux-image-cloud-amd64\n", "linux-image-"),
            None
        );
        assert_eq!(
            concrete_package("  Depends: linux-image-;reboot\n", "linux-image-"),
            None
        );
    }

    #[test]
    fn a_missing_program_says_what_to_do_instead() {
        let dir = tempfile::tempdir().unwrap();
        let error = run("vistara-no-such-program", &[], dir.path(), LOOKUP_TIME_MAX).unwrap_err();
        assert!(error.to_string().contains("vistara kernel add"), "{error}");
    }
}
