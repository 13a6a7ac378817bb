//! Running a program of the host: with a bound of time, its words kept in files so that it never waits for us.

use super::BootError;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often a program is looked at while it runs.
const LOOK: Duration = Duration::from_millis(20);

/// A program to run.
#[derive(Debug)]
pub(super) struct Program<'a> {
    pub(super) name: &'static str,
    pub(super) arguments: &'a [&'a str],
    /// Where it runs; its output lies there meanwhile.
    pub(super) dir: &'a Path,
    pub(super) time_max: Duration,
    /// Variables beside the inherited ones.
    pub(super) environment: &'a [(&'a str, &'a str)],
    /// Whether it inherits nothing but where programs are.
    pub(super) bare: bool,
    /// What to do where it is not installed.
    pub(super) mend: &'a str,
}

impl Program<'_> {
    /// Runs it and gives what it printed.
    pub(super) fn run(&self) -> Result<String, BootError> {
        self.watched(&mut |_| {})
    }

    /// The same; `watch` is called many times a second with the file of its output.
    pub(super) fn watched(&self, watch: &mut dyn FnMut(&Path)) -> Result<String, BootError> {
        let command = format!("{} {}", self.name, self.arguments.join(" "));
        let out_path = self.output();
        let error_path = self.dir.join("program.err");
        let file = |path: &Path| File::create(path).map_err(BootError::io("create", path));
        let mut program = Command::new(self.name);
        if self.bare {
            program.env_clear();
            program.envs(
                ["PATH", "HOME", "TMPDIR"]
                    .iter()
                    .filter_map(|name| Some((name, std::env::var_os(name)?))),
            );
        }
        let child = program
            .args(self.arguments)
            .current_dir(self.dir)
            .env("LC_ALL", "C")
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file(&out_path)?)
            .stderr(file(&error_path)?)
            .spawn();
        let mut child = match child {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(BootError::Absent {
                    program: self.name,
                    mend: self.mend.to_owned(),
                });
            }
            other => other.map_err(BootError::io("run", Path::new(self.name)))?,
        };
        let deadline = Instant::now() + self.time_max;
        let status = loop {
            match child
                .try_wait()
                .map_err(BootError::io("wait for", Path::new(self.name)))?
            {
                Some(status) => break Some(status),
                None if Instant::now() >= deadline => {
                    // Killing fails only where it has just ended by itself.
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
                None => std::thread::sleep(LOOK),
            }
            watch(&out_path);
        };
        match status {
            Some(status) if status.success() => Ok(text(&out_path)),
            Some(_) => Err(BootError::Command {
                command,
                message: last_lines(&text(&error_path)),
            }),
            None => Err(BootError::Command {
                command,
                message: format!("it took longer than {} s", self.time_max.as_secs()),
            }),
        }
    }

    fn output(&self) -> PathBuf {
        self.dir.join("program.out")
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn last_lines(text: &str) -> String {
    /// Enough for the errors of apt and make, which come last.
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

    fn program<'a>(name: &'static str, arguments: &'a [&'a str], dir: &'a Path) -> Program<'a> {
        Program {
            name,
            arguments,
            dir,
            time_max: Duration::from_secs(20),
            environment: &[],
            bare: false,
            mend: "install it",
        }
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let program = Program {
            time_max: Duration::from_millis(30),
            ..program("sleep", &["60"], dir.path())
        };
        let error = program.run().unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
    }

    #[test]
    fn a_missing_program_says_what_to_do_instead() {
        let dir = tempfile::tempdir().unwrap();
        let error = program("vistara-no-such-program", &[], dir.path())
            .run()
            .unwrap_err();
        assert!(error.to_string().contains("install it"), "{error}");
    }

    #[test]
    fn the_end_of_what_a_failed_program_said_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let words = ["-c", "seq 1 20 >&2; exit 3"];
        let error = program("sh", &words, dir.path()).run().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("15\n16") && !text.contains("14"), "{text}");
    }

    #[test]
    fn a_bare_program_inherits_where_programs_are_and_nothing_of_the_callers_wishes() {
        let dir = tempfile::tempdir().unwrap();
        let program = Program {
            environment: &[("GIVEN", "1")],
            bare: true,
            ..program("env", &[], dir.path())
        };
        let text = program.run().unwrap();
        let names: Vec<&str> = text
            .lines()
            .filter_map(|line| Some(line.split_once('=')?.0))
            .collect();
        assert!(
            names.contains(&"PATH") && names.contains(&"GIVEN"),
            "{text}"
        );
        assert!(
            !names.iter().any(|name| name.starts_with("CARGO")),
            "{text}"
        );
    }
}
