//! Debian's kernel package, downloaded with the host's own apt: its mirror, its proxy, its verification of signatures.

use super::BootError;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The package that depends on the newest cloud kernel: small, without drivers of real hardware.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Reading apt's lists takes under a second.
const LOOKUP_TIME_MAX: Duration = Duration::from_secs(60);
/// 30 MB over a slow line.
const DOWNLOAD_TIME_MAX: Duration = Duration::from_secs(600);

/// Downloads the kernel package into `scratch` and gives its path.
pub(crate) fn download(scratch: &Path) -> Result<PathBuf, BootError> {
    let listing = run(
        "apt-cache",
        &["depends", META_PACKAGE],
        scratch,
        LOOKUP_TIME_MAX,
    )
    .map_err(|error| no_lists(error, META_PACKAGE))?;
    let package = concrete_package(&listing).ok_or_else(|| BootError::Command {
        command: format!("apt-cache depends {META_PACKAGE}"),
        message: "it names no kernel; run: sudo apt-get update".to_owned(),
    })?;
    // As root, apt drops to its own user, which cannot write to a directory of ours.
    let arguments = ["-q", "-o", "APT::Sandbox::User=root", "download", &package];
    run("apt-get", &arguments, scratch, DOWNLOAD_TIME_MAX)
        .map_err(|error| no_lists(error, &package))?;
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

/// The kernel that the meta-package depends on, by what `apt-cache depends` prints.
fn concrete_package(listing: &str) -> Option<String> {
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
        .find(|name| name.starts_with("linux-image-") && plain(name))
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

/// Runs a program in `dir` and gives what it printed. Its output goes to files, so that it never waits for us.
fn run(
    program: &'static str,
    arguments: &[&str],
    dir: &Path,
    time_max: Duration,
) -> Result<String, BootError> {
    let command = format!("{program} {}", arguments.join(" "));
    let out_path = dir.join("apt.out");
    let error_path = dir.join("apt.err");
    let file = |path: &Path| File::create(path).map_err(BootError::io("create", path));
    let child = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(file(&out_path)?)
        .stderr(file(&error_path)?)
        .spawn();
    let mut child = match child {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(BootError::Absent {
                program,
                mend: "this host has no apt: download Debian's linux-image-*-cloud-amd64 package elsewhere and run: vistara kernel add FILE.deb".to_owned(),
            });
        }
        other => other.map_err(BootError::io("run", Path::new(program)))?,
    };
    let deadline = Instant::now() + time_max;
    let status = loop {
        match child
            .try_wait()
            .map_err(BootError::io("wait for", Path::new(program)))?
        {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => {
                // Killing fails only where it has just ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let text =
        |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    match status {
        Some(status) if status.success() => Ok(text(&out_path)),
        Some(_) => Err(BootError::Command {
            command,
            message: last_lines(&text(&error_path)),
        }),
        None => Err(BootError::Command {
            command,
            message: format!("it took longer than {} s", time_max.as_secs()),
        }),
    }
}

fn last_lines(text: &str) -> String {
    /// Enough for apt's errors, which come last.
    const LINES: usize = 6;
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_in_what_apt_prints() {
        let listing = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-49-cloud-amd64\n  Conflicts: x\n";
        assert_eq!(
            concrete_package(listing).as_deref(),
            Some("linux-image-6.1.0-49-cloud-amd64")
        );
        assert_eq!(concrete_package("linux-image-cloud-amd64\n"), None);
        assert_eq!(concrete_package("  Depends: linux-image-;reboot\n"), None);
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let error = run("sleep", &["60"], dir.path(), Duration::from_millis(30)).unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
    }

    #[test]
    fn a_missing_program_says_what_to_do_instead() {
        let dir = tempfile::tempdir().unwrap();
        let error = run("vistara-no-such-program", &[], dir.path(), LOOKUP_TIME_MAX).unwrap_err();
        assert!(error.to_string().contains("vistara kernel add"), "{error}");
    }
}
