//! What stands on the command line of `cargo xtask lab`.

use anyhow::{Context as _, Result, bail};
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const USAGE: &str = "usage: cargo xtask lab [options] [--] COMMAND…
       cargo xtask lab [options] --tests [--] [ARGUMENTS FOR cargo nextest run…]
       cargo xtask lab --prepare

Runs COMMAND as root in a virtual machine whose /dev/kvm works, with this host's files (changes are forgotten) and this
directory. Its status is the command's; 124 when the time is over, 125 when the lab fails.

  --memory MB         memory of the machine (3072; with --tests 6144)
  --cpus N            its processors (1; more are rarely faster, see docs/internals/lab.md)
  --timeout SEC       kill everything after this time (600; with --tests 3600)
  --cgroup v1|v2      which control groups are mounted (v2)
  --share DIR         a directory whose changes are the host's; may be repeated
  --env NAME[=VALUE]  an environment variable for COMMAND; may be repeated. PATH, HOME, TERM, LANG, LC_*, VISTARA_*, RUST*,
                      CARGO* and NEXTEST* are passed without being asked for
  --console           show what the machine's kernel prints
  --tests             build the real-machine tests here and run them inside, on KVM; counts them. Without arguments it fails
                      where no test of a combination of monitor and guest has run
  --allow-skips       not so
  --prepare           only fetch and make what a run needs; prints the kernel's release";

/// Least memory with which the kernel, its initramfs and a shell have room.
const MEMORY_MIB_MIN: u32 = 256;
/// QEMU translates for as many at most; the host has far fewer.
const CPUS_MAX: u32 = 64;
const TIMEOUT_S: u64 = 600;
/// Of the memory, half is where files go; a node wants some GiB free. Tests of whole nodes take more than a command.
const MEMORY_MIB: u32 = 3072;
const MEMORY_TESTS_MIB: u32 = 6144;
/// A suite boots some hundred machines, one after the other.
const TIMEOUT_TESTS_S: u64 = 3600;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cgroup {
    V1,
    V2,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Prepare,
    /// At least one word.
    Command(Vec<String>),
    /// Arguments for nextest.
    Tests(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) timeout: Duration,
    pub(super) cgroup: Cgroup,
    /// Absolute, existing directories.
    pub(super) shares: Vec<PathBuf>,
    /// Variables by name; without a value, the caller's.
    pub(super) env: Vec<(String, Option<String>)>,
    pub(super) console: bool,
    /// A combination of which no test has run is no failure.
    pub(super) allow_skips: bool,
    pub(super) what: What,
}

impl Options {
    pub(super) fn parse(words: &[&str]) -> Result<Options> {
        let mut options = Options {
            memory_mib: MEMORY_MIB,
            cpus: 1,
            timeout: Duration::ZERO,
            cgroup: Cgroup::V2,
            shares: vec![],
            env: vec![],
            console: false,
            allow_skips: false,
            what: What::Command(vec![]),
        };
        let (mut timeout, mut memory, mut tests, mut prepare) = (None, None, false, false);
        let mut words = words.iter().copied();
        let mut rest: Vec<String> = vec![];
        while let Some(word) = words.next() {
            let (name, given) = match word.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value)),
                _ => (word, None),
            };
            let mut value = || {
                given
                    .or_else(|| words.next())
                    .with_context(|| format!("{name} needs a value\n{USAGE}"))
            };
            match name {
                "--memory" => memory = Some(number(name, value()?)?),
                "--cpus" => options.cpus = number(name, value()?)?,
                "--timeout" => timeout = Some(number::<u64>(name, value()?)?),
                "--cgroup" => {
                    options.cgroup = match value()? {
                        "v1" => Cgroup::V1,
                        "v2" => Cgroup::V2,
                        other => bail!("--cgroup is v1 or v2, not {other}"),
                    }
                }
                "--share" => {
                    let dir = value()?;
                    let path = std::fs::canonicalize(dir)
                        .with_context(|| format!("--share {dir}: it must be there"))?;
                    if !path.is_dir() {
                        bail!("--share {dir} is not a directory");
                    }
                    options.shares.push(path);
                }
                "--env" => {
                    let text = value()?;
                    options.env.push(match text.split_once('=') {
                        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                        None => (text.to_owned(), None),
                    });
                }
                "--console" if given.is_none() => options.console = true,
                "--tests" if given.is_none() => tests = true,
                "--allow-skips" if given.is_none() => options.allow_skips = true,
                "--prepare" if given.is_none() => prepare = true,
                "--" => {
                    rest.extend(words.by_ref().map(str::to_owned));
                }
                _ if name.starts_with('-') => bail!("{word} is unknown\n{USAGE}"),
                _ => {
                    rest.push(word.to_owned());
                    rest.extend(words.by_ref().map(str::to_owned));
                }
            }
        }
        let usual = if tests { MEMORY_TESTS_MIB } else { MEMORY_MIB };
        options.memory_mib = memory.unwrap_or(usual);
        if options.memory_mib < MEMORY_MIB_MIN {
            bail!("--memory: the least is {MEMORY_MIB_MIN}");
        }
        if !(1..=CPUS_MAX).contains(&options.cpus) {
            bail!("--cpus is 1 to {CPUS_MAX}");
        }
        if options.allow_skips && !tests {
            bail!("--allow-skips goes with --tests\n{USAGE}");
        }
        let timeout_s = timeout.unwrap_or(if tests { TIMEOUT_TESTS_S } else { TIMEOUT_S });
        if timeout_s == 0 {
            bail!("--timeout is at least 1");
        }
        options.timeout = Duration::from_secs(timeout_s);
        options.what = match (tests, prepare, rest.is_empty()) {
            (true, false, _) => What::Tests(rest),
            (false, true, true) => What::Prepare,
            (false, false, false) => What::Command(rest),
            (false, false, true) => bail!("which command?\n{USAGE}"),
            (true, true, _) | (false, true, false) => bail!("--prepare stands alone\n{USAGE}"),
        };
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T> {
    text.parse()
        .ok()
        .with_context(|| format!("{name}: {text} is not a number that fits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(words: &[&str]) -> String {
        Options::parse(words).unwrap_err().to_string()
    }

    #[test]
    fn a_command_begins_at_the_first_word_that_is_no_option_and_keeps_its_own_options() {
        for words in [
            &["--cpus", "2", "ls", "--all", "--", "--cpus"][..],
            &["--cpus=2", "--", "ls", "--all", "--", "--cpus"],
        ] {
            let options = Options::parse(words).unwrap();
            assert_eq!(options.cpus, 2);
            let command = ["ls", "--all", "--", "--cpus"].map(str::to_owned);
            assert_eq!(options.what, What::Command(command.to_vec()));
        }
    }

    #[test]
    fn what_is_not_said_has_its_default_and_tests_have_more_time() {
        let options = Options::parse(&["true"]).unwrap();
        assert_eq!((options.memory_mib, options.cpus), (3072, 1));
        assert_eq!(options.timeout, Duration::from_secs(600));
        assert_eq!(options.cgroup, Cgroup::V2);
        let options = Options::parse(&["--tests", "--", "-E", "binary(vm_qemu)"]).unwrap();
        assert_eq!(options.timeout, Duration::from_secs(3600));
        assert_eq!(options.memory_mib, 6144);
        let arguments = ["-E", "binary(vm_qemu)"].map(str::to_owned).to_vec();
        assert_eq!(options.what, What::Tests(arguments));
        let options = Options::parse(&["--timeout", "5", "--tests", "--memory=512"]).unwrap();
        assert_eq!(options.memory_mib, 512);
        assert_eq!(options.timeout, Duration::from_secs(5));
        assert_eq!(options.what, What::Tests(vec![]));
        assert!(!options.allow_skips);
        let options = Options::parse(&["--tests", "--allow-skips"]).unwrap();
        assert!(options.allow_skips);
    }

    #[test]
    fn variables_and_shares_may_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let words = [
            "--env",
            "A=b=c",
            "--env=D",
            "--share",
            path,
            "--share=/",
            "true",
        ];
        let options = Options::parse(&words).unwrap();
        let env = [
            ("A".to_owned(), Some("b=c".to_owned())),
            ("D".to_owned(), None),
        ];
        assert_eq!(options.env, env);
        let shares = [std::fs::canonicalize(path).unwrap(), "/".into()];
        assert_eq!(options.shares, shares);
    }

    #[test]
    fn faults_are_named() {
        for (words, part) in [
            (&["--cpus"][..], "--cpus needs a value"),
            (&["--cpus", "many", "true"], "many is not a number"),
            (&["--cpus", "0", "true"], "--cpus is 1 to"),
            (&["--memory", "64", "true"], "the least is 256"),
            (&["--timeout=0", "true"], "at least 1"),
            (&["--cgroup", "v3", "true"], "v1 or v2"),
            (&["--share", "/no/such", "true"], "it must be there"),
            (&["--fast", "true"], "--fast is unknown"),
            (&["--console=yes", "true"], "--console=yes is unknown"),
            (&["--allow-skips", "true"], "goes with --tests"),
            (&[], "which command?"),
            (&["--"], "which command?"),
            (&["--prepare", "true"], "stands alone"),
            (&["--prepare", "--tests"], "stands alone"),
        ] {
            let fault = fault(words);
            assert!(fault.contains(part), "{words:?}: {fault}");
        }
    }
}
