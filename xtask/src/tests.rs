//! Running the tests and counting them honestly: passed, failed, and skipped with the reason.
//!
//! A test that cannot run on this host prints `SKIP: <reason>` and returns; it is counted as skipped, not as passed.
//! With cargo-nextest the counts come from its JUnit report, without it from what `cargo test` prints.

use crate::lint::{cargo, has_subcommand};
use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Test binaries of this name start real virtual machines.
const VM_PREFIX: &str = "vm_";
/// How a test says that it cannot run here.
const SKIPS: [&str; 2] = ["SKIP:", "SKIPPED:"];
/// Lines of a failed test's output that are shown again at the end.
const WORDS_MAX: usize = 40;
/// Where the real-machine tests find a kernel store.
pub(crate) const KERNELS_VARIABLE: &str = "VISTARA_TEST_KERNELS";

/// A set of tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    /// Those that need neither root nor a virtual machine.
    Default,
    /// Those with real machines.
    Vm,
}

impl Tier {
    /// Its profile in `.config/nextest.toml`.
    fn profile(self) -> &'static str {
        match self {
            Tier::Default => "default",
            Tier::Vm => "vm",
        }
    }
}

/// What came of checks and tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<String>,
    /// Those of the passed that failed first.
    flaky: Vec<String>,
    /// The end of what failed tests printed, where it is known.
    words: Vec<String>,
}

impl Tally {
    pub(crate) fn skip(&mut self, reason: String) {
        self.skipped.push(reason);
    }

    pub(crate) fn check(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed.push(name.to_owned());
        }
    }

    pub(crate) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.flaky.extend(other.flaky);
        self.words.extend(other.words);
    }

    /// Prints what was skipped and failed, and last the counts.
    pub(crate) fn finish(self) -> Result<()> {
        for reason in &self.skipped {
            println!("SKIPPED {reason}");
        }
        // Once more at the end, where whoever sees only the last of a long output finds it.
        for words in &self.words {
            println!("{words}");
        }
        for name in &self.flaky {
            println!("FLAKY {name}: failed, and passed when it was run again");
        }
        for name in &self.failed {
            println!("FAILED {name}");
        }
        println!(
            "{} passed, {} failed, {} skipped, {} of the passed flaky",
            self.passed,
            self.failed.len(),
            self.skipped.len(),
            self.flaky.len()
        );
        if self.failed.is_empty() {
            Ok(())
        } else {
            bail!("not everything passed")
        }
    }
}

/// Runs these tiers, each whatever became of the one before.
pub(crate) fn run(root: &Path, tiers: &[Tier]) -> Result<Tally> {
    let nextest = has_subcommand("nextest");
    if !nextest {
        eprintln!(
            "== cargo nextest is not installed (cargo install --locked cargo-nextest): using cargo test"
        );
    }
    let mut tally = Tally::default();
    for tier in tiers {
        eprintln!("== tests: {}", tier.profile());
        tally.add(if nextest {
            with_nextest(root, *tier)?
        } else {
            with_cargo_test(root, *tier)?
        });
    }
    Ok(tally)
}

/// A kernel store with Debian's kernel for the tests: the caller's, or one kept under `target`. Where it cannot be had they
/// are skipped, and say so.
pub(crate) fn kernel_store(root: &Path) -> Option<PathBuf> {
    if let Some(store) = std::env::var_os(KERNELS_VARIABLE) {
        return Some(store.into());
    }
    let store = root.join("target/vm-tests/kernels");
    let run = [
        "run",
        "--quiet",
        "--package",
        "vistara-machine",
        "--example",
        "fetch_kernel",
    ];
    // Its output would stand among the command's own.
    let fetched = cargo(root, &run)
        .arg("--")
        .arg(&store)
        .stdout(Stdio::null())
        .status();
    if fetched.is_ok_and(|status| status.success()) {
        return Some(store);
    }
    eprintln!("== no kernel for the real-machine tests: see above");
    None
}

fn provide_kernel(root: &Path, tests: &mut Command) {
    if let Some(store) = kernel_store(root) {
        tests.env(KERNELS_VARIABLE, store);
    }
}

/// Makes the image that the tests of the whole system run. Where it cannot be made they are skipped, and say so.
fn provide_image(root: &Path) {
    if let Err(error) = crate::demo_image::make(&root.join("target/demo")) {
        eprintln!("== no image for the tests of the whole system: {error:#}");
    }
}

fn with_nextest(root: &Path, tier: Tier) -> Result<Tally> {
    let report = root
        .join("target/nextest")
        .join(tier.profile())
        .join("junit.xml");
    // A report of an earlier run must not be taken for this one's; there may be none.
    let _ = std::fs::remove_file(&report);
    let arguments = [
        "nextest",
        "run",
        "--workspace",
        "--no-fail-fast",
        "--profile",
        tier.profile(),
    ];
    let mut command = cargo(root, &arguments);
    command.arg("--no-tests=pass");
    if tier == Tier::Vm {
        provide_kernel(root, &mut command);
        provide_image(root);
    }
    let status = command.status().context("run cargo nextest")?;
    let Ok(text) = std::fs::read_to_string(&report) else {
        if status.success() {
            return Ok(Tally::default());
        }
        bail!("cargo nextest failed before it ran any test");
    };
    let tally = read_junit(&text);
    if !status.success() && tally.failed.is_empty() {
        bail!("cargo nextest failed, and its report does not say why");
    }
    Ok(tally)
}

/// How one test ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    /// At the second try, with the end of what it printed at the first.
    Flaky(String),
    /// With the end of what it printed.
    Failed(String),
    /// It could not run here, for this reason.
    Skipped(String),
}

/// One test of a report.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Case {
    /// The program that it is part of, as nextest names it.
    pub(crate) binary: String,
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
}

/// Reads a JUnit report. It is made by nextest, so only what that writes is understood.
pub(crate) fn cases(text: &str) -> Vec<Case> {
    let case = |case: &str| {
        let (head, rest) = case.split_once('>').unwrap_or((case, ""));
        let body = if head.ends_with('/') {
            ""
        } else {
            rest.split("</testcase>").next().unwrap_or("")
        };
        let attribute = |name: &str| {
            let (_, value) = head.split_once(&format!("{name}=\""))?;
            Some(unescape(value.split('"').next()?))
        };
        let binary = attribute("classname").unwrap_or_default();
        let name = attribute("name").unwrap_or_default();
        let skipped = body.lines().find_map(|line| {
            // The first line of the output follows its tag directly.
            let line = line.rsplit('>').next().unwrap_or(line);
            Some(unescape(skip_reason(line.trim())?))
        });
        let outcome = if body.contains("<failure") || body.contains("<error") {
            Outcome::Failed(last_words(&format!("{binary} {name}"), body))
        } else if let Some(reason) = skipped {
            Outcome::Skipped(reason)
        } else if body.contains("<flaky") {
            Outcome::Flaky(last_words(&format!("{binary} {name}"), body))
        } else {
            Outcome::Passed
        };
        Case {
            binary,
            name,
            outcome,
        }
    };
    text.split("<testcase ").skip(1).map(case).collect()
}

/// Counts a JUnit report.
pub(crate) fn read_junit(text: &str) -> Tally {
    let mut tally = Tally::default();
    for case in cases(text) {
        let name = format!("{} {}", case.binary, case.name);
        match case.outcome {
            Outcome::Passed => tally.passed += 1,
            Outcome::Flaky(words) => {
                tally.passed += 1;
                tally.words.push(words);
                tally.flaky.push(name);
            }
            Outcome::Failed(words) => {
                tally.words.push(words);
                tally.failed.push(name);
            }
            Outcome::Skipped(reason) => tally.skipped.push(format!("{name}: {reason}")),
        }
    }
    tally
}

/// The end of what a failed test printed.
fn last_words(name: &str, body: &str) -> String {
    let lines: Vec<&str> = body.lines().filter(|line| !line.is_empty()).collect();
    let begin = lines.len().saturating_sub(WORDS_MAX);
    format!("---- {name}\n{}", unescape(&lines[begin..].join("\n")))
}

fn skip_reason(line: &str) -> Option<&str> {
    // Where one thread runs all tests, as in the lab, the name of a test stands before its first word.
    let said = match line.strip_prefix("test ") {
        Some(rest) => rest.split_once(" ... ")?.1,
        None => line,
    };
    let reason = SKIPS.iter().find_map(|word| said.strip_prefix(word))?;
    Some(reason.trim())
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}
#[derive(Debug, Deserialize)]
struct Package {
    targets: Vec<Target>,
}
#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

fn with_cargo_test(root: &Path, tier: Tier) -> Result<Tally> {
    let output = cargo(root, &["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("run cargo metadata")?;
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let targets = metadata
        .packages
        .iter()
        .flat_map(|package| &package.targets);
    let mut names: Vec<&str> = targets
        .filter(|target| target.kind.iter().any(|kind| kind == "test"))
        .map(|target| target.name.as_str())
        .filter(|name| name.starts_with(VM_PREFIX) == (tier == Tier::Vm))
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() && tier == Tier::Vm {
        return Ok(Tally::default());
    }
    let mut arguments = vec!["test", "--workspace", "--no-fail-fast"];
    if tier == Tier::Default {
        arguments.extend(["--lib", "--bins"]);
    }
    for name in &names {
        arguments.extend(["--test", name]);
    }
    arguments.extend(["--", "--show-output"]);
    if tier == Tier::Vm {
        arguments.push("--test-threads=2");
    }
    let mut command = cargo(root, &arguments);
    if tier == Tier::Vm {
        provide_kernel(root, &mut command);
        provide_image(root);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("run cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut lines = Vec::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("read what cargo test prints")?;
        println!("{line}");
        lines.push(line);
    }
    let status = child.wait().context("wait for cargo test")?;
    let tally = read_cargo_test(&lines);
    if !status.success() && tally.failed.is_empty() {
        bail!("cargo test failed before it ran all tests");
    }
    Ok(tally)
}

/// Counts `test <name> ... ok|FAILED` lines; a `SKIP:` line in a test's shown output turns a pass into a skip.
fn read_cargo_test(lines: &[String]) -> Tally {
    let mut tally = Tally::default();
    let mut shown = String::new();
    for line in lines {
        if let Some(name) = line.strip_prefix("---- ") {
            shown = name
                .trim_end_matches(" ----")
                .trim_end_matches(" stdout")
                .to_owned();
        } else if let Some(reason) = skip_reason(line) {
            tally.skipped.push(format!("{shown}: {reason}"));
        } else if let Some(test) = line.strip_prefix("test ") {
            if test.ends_with(" ... ok") {
                tally.passed += 1;
            } else if let Some(name) = test.strip_suffix(" ... FAILED") {
                tally.failed.push(name.to_owned());
            }
        }
    }
    tally.passed = tally.passed.saturating_sub(tally.skipped.len());
    tally
}

#[cfg(test)]
mod reading {
    use super::*;

    #[test]
    fn a_junit_report_is_counted_with_its_skips_and_failures() {
        let report = r#"<?xml version="1.0"?>
<testsuites name="nextest-run" tests="3" failures="1">
  <testsuite name="a">
    <testcase name="one" classname="a" time="0.1"/>
    <testcase name="two" classname="a" time="0.1">
      <system-out>SKIP: no &lt;kvm&gt; here
more</system-out>
    </testcase>
    <testcase name="four" classname="a" time="0.1">
      <system-out>
running 1 test
test four ... SKIP: no kernel
ok
</system-out>
    </testcase>
    <testcase name="five" classname="a::vm_x" time="0.1">
      <flakyFailure type="test failure with exit code 101"><system-err>at first</system-err></flakyFailure>
    </testcase>
    <testcase name="three" classname="a::vm_x" time="0.1">
      <failure type="test failure">SKIP: never</failure>
    </testcase>
  </testsuite>
</testsuites>"#;
        let tally = read_junit(report);
        assert_eq!(tally.passed, 2);
        assert_eq!(tally.flaky, ["a::vm_x five"]);
        assert_eq!(tally.skipped, ["a two: no <kvm> here", "a four: no kernel"]);
        assert_eq!(tally.failed, ["a::vm_x three"]);
        assert_eq!(tally.words.len(), 2);
        assert!(tally.words[0].contains("at first"), "{:?}", tally.words);
        assert!(tally.words[1].contains("SKIP: never"), "{:?}", tally.words);
    }

    #[test]
    fn what_cargo_test_prints_is_counted_in_the_same_way() {
        let text = "running 3 tests\ntest one ... ok\ntest two ... ok\ntest three ... FAILED\n\nsuccesses:\n\n---- two stdout ----\nSKIP: no kvm\n";
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let tally = read_cargo_test(&lines);
        assert_eq!((tally.passed, tally.failed.len()), (1, 1));
        assert_eq!(tally.skipped, ["two: no kvm"]);
    }
}
