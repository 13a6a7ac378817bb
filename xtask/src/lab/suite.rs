//! The real-machine tests inside the lab: built here, run there by nextest's profile `lab`, counted here.

use super::Lab;
use super::host;
use super::options::Options;
use crate::lint::{cargo, has_subcommand};
use crate::tests::{Case, KERNELS_VARIABLE, Outcome, cases, kernel_store, read_junit};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Stdio;

/// Huge pages of 2 MiB that the lab has for the tests of machines that take them: one such machine's, and some to spare.
const HUGE_PAGES: u32 = 72;
/// Whose tests they are: the monitors', and the whole system's with Firecracker.
const PROGRAMS: [&str; 2] = ["vistara-machine::vm_", "vistara::vm_daemon_"];
const PROFILE: &str = "lab";
/// How many times longer than elsewhere a test may take: everything is translated, the guests' code twice over.
const PATIENCE: &str = "4";

pub(super) fn run(root: &Path, lab: &Lab, options: &Options, arguments: &[String]) -> Result<u8> {
    let nextest = host::find("cargo-nextest").filter(|_| has_subcommand("nextest"));
    let nextest = nextest.context("needed: cargo install --locked cargo-nextest")?;
    let dir = root.join("target/lab/tests");
    let results = root.join("target/nextest").join(PROFILE);
    for dir in [&dir, &results] {
        fs::create_dir_all(dir).with_context(|| format!("make {dir:?}"))?;
    }
    let _alone = alone(&dir)?;
    let report = results.join("junit.xml");
    // A report of an earlier run must not be taken for this one's; there may be none.
    let _ = fs::remove_file(&report);

    let metadata = dir.join("cargo.json");
    written(root, &["metadata", "--format-version", "1"], &metadata)?;
    let binaries = dir.join("binaries.json");
    let list = [
        "nextest",
        "list",
        // As `cargo xtask test` builds them: of two packages alone libraries would have other features, and be built anew.
        "--workspace",
        "--list-type=binaries-only",
        "--message-format=json",
    ];
    written(root, &list, &binaries)?;
    freeze(&binaries, &dir.join("bin"))?;

    let mut environment = vec![];
    let mut default = |name: &str, value: String| {
        let given = options.env.iter().any(|(given, _)| given == name);
        if !given && std::env::var_os(name).is_none() {
            environment.push((name.to_owned(), value));
        }
    };
    let accelerator = accelerator(options, std::env::var(ACCELERATOR_VARIABLE).ok());
    default(ACCELERATOR_VARIABLE, accelerator.clone());
    default("VISTARA_TEST_PATIENCE", PATIENCE.to_owned());
    // Nobody else runs a machine there.
    default("VISTARA_TEST_MAY_TAKE_KVM", "1".to_owned());
    if let Some(store) = kernel_store(root) {
        default(KERNELS_VARIABLE, store.display().to_string());
    }
    let set_aside = format!("echo {HUGE_PAGES} >/proc/sys/vm/nr_hugepages; exec \"$@\"");
    let mut words: Vec<String> = ["sh", "-c", &set_aside, "sh"].map(str::to_owned).into();
    words.push(nextest.display().to_string());
    words.extend(["nextest", "run", "--profile", PROFILE, "--no-fail-fast"].map(str::to_owned));
    for (name, path) in [
        ("--binaries-metadata", &binaries),
        ("--cargo-metadata", &metadata),
    ] {
        words.extend([name.to_owned(), path.display().to_string()]);
    }
    words.extend(arguments.iter().cloned());
    let mut options = options.clone();
    options.shares.push(results);
    std::env::set_current_dir(root).with_context(|| format!("enter {root:?}"))?;
    let begin = std::time::Instant::now();
    let status = lab.run(&options, &words, &environment)?;
    println!("== in the lab: {} s", begin.elapsed().as_secs());
    let Ok(text) = fs::read_to_string(&report) else {
        bail!("nextest ended with {status} in the lab, without a report");
    };
    let tally = read_junit(&text);
    let (table, not_run) = by_combination(&cases(&text), &accelerator);
    print!("{table}");
    let mut failed = tally.finish().is_err();
    // Whoever asks for some tests does not ask for the others.
    if !not_run.is_empty() && arguments.is_empty() && !options.allow_skips {
        println!("FAILED: no test has run of {}", not_run.join("; "));
        failed = true;
    }
    Ok(if failed && status == 0 { 1 } else { status })
}

/// What the tests of QEMU run with: `--env` goes before the caller's environment, and that before KVM.
fn accelerator(options: &Options, caller: Option<String>) -> String {
    let mut given = options.env.iter().rev();
    let given = given
        .find(|(name, _)| name == ACCELERATOR_VARIABLE)
        .and_then(|(_, value)| value.clone());
    given.or(caller).unwrap_or_else(|| "kvm".to_owned())
}

/// Keeps others out of the directories of a run, which each would clear for itself, until it is dropped.
///
/// # Errors
/// Another run is going on.
fn alone(dir: &Path) -> Result<fs::File> {
    let path = dir.join("lock");
    let lock = fs::File::create(&path).with_context(|| format!("make {path:?}"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("the lab's tests are being run in this checkout already ({path:?} is locked)")
        }
        Err(error) => Err(error).with_context(|| format!("lock {path:?}")),
    }
}

const ACCELERATOR_VARIABLE: &str = "VISTARA_TEST_ACCELERATOR";

/// What runs what, by the program of its tests, and whether the accelerator is to be named; each must be there, or the run says
/// which is not.
const COMBINATIONS: [(&str, &str, bool); 5] = [
    ("firecracker, linux", "vm_firecracker", false),
    ("firecracker, nanos", "vm_firecracker_nanos", false),
    ("qemu, linux", "vm_qemu", true),
    ("qemu, nanos", "vm_nanos", true),
    ("node, firecracker", "vm_daemon_firecracker", false),
];

/// A table of how the tests of each combination ended, and of which none has run.
fn by_combination(cases: &[Case], accelerator: &str) -> (String, Vec<String>) {
    let mut not_run = vec![];
    let mut text = format!(
        "== {:<22}{:>8}{:>8}{:>8}\n",
        "combination", "passed", "failed", "skipped"
    );
    for (name, binary, accelerated) in COMBINATIONS {
        let name = match accelerated {
            true => name.replacen(',', &format!("-{accelerator},"), 1),
            false => name.to_owned(),
        };
        let own = |case: &&Case| case.binary.rsplit("::").next() == Some(binary);
        let count = |wanted: fn(&Outcome) -> bool| {
            let those = cases.iter().filter(own);
            those.filter(|case| wanted(&case.outcome)).count()
        };
        let passed = count(|outcome| matches!(outcome, Outcome::Passed | Outcome::Flaky(_)));
        let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
        let skipped = count(|outcome| matches!(outcome, Outcome::Skipped(_)));
        let remark = match (passed, failed, skipped) {
            (0, 0, 0) => "  NOT RUN",
            (0, 0, _) => "  SKIPPED AS A WHOLE",
            _ => "",
        };
        text.push_str(&format!(
            "== {name:<22}{passed:>8}{failed:>8}{skipped:>8}{remark}\n"
        ));
        if !remark.is_empty() {
            not_run.push(name);
        }
    }
    (text, not_run)
}

/// Copies the tests' programs to `to` and names the copies in nextest's list of them: a run takes long, and a build
/// meanwhile would take the programs from under it.
fn freeze(list: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).with_context(|| format!("make {to:?}"))?;
    let text = fs::read_to_string(list).with_context(|| format!("read {list:?}"))?;
    let mut metadata: serde_json::Value = serde_json::from_str(&text).context("nextest's list")?;
    let binaries = metadata["rust-binaries"].as_object_mut();
    let binaries = binaries.context("nextest's list names no programs")?;
    binaries.retain(|name, _| PROGRAMS.iter().any(|one| name.starts_with(one)));
    for binary in binaries.values_mut() {
        let path = binary["binary-path"]
            .as_str()
            .context("a program without a path")?;
        let name = Path::new(path)
            .file_name()
            .context("a program without a name")?;
        let copy = to.join(name);
        fs::copy(path, &copy).with_context(|| format!("copy {path} to {copy:?}"))?;
        binary["binary-path"] = copy.display().to_string().into();
    }
    fs::write(list, metadata.to_string()).with_context(|| format!("write {list:?}"))
}

/// Runs cargo with its standard output going to a file.
fn written(root: &Path, arguments: &[&str], path: &Path) -> Result<()> {
    let file = fs::File::create(path).with_context(|| format!("write {path:?}"))?;
    let status = cargo(root, arguments)
        .stdin(Stdio::null())
        .stdout(file)
        .status()
        .with_context(|| format!("run cargo {}", arguments[0]))?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_counts_each_combination_and_says_what_did_not_run() {
        let case = |binary: &str, outcome| Case {
            binary: binary.to_owned(),
            name: "x".to_owned(),
            outcome,
        };
        let cases = [
            case("a::vm_firecracker", Outcome::Passed),
            case("a::vm_firecracker", Outcome::Failed("why".to_owned())),
            case(
                "a::vm_firecracker_nanos",
                Outcome::Skipped("no KVM".to_owned()),
            ),
            case("a::vm_qemu", Outcome::Passed),
        ];
        let (table, not_run) = by_combination(&cases, "tcg");
        assert_eq!(
            not_run,
            ["firecracker, nanos", "qemu-tcg, nanos", "node, firecracker"]
        );
        let words = |line: &str| {
            line.split_whitespace()
                .skip(3)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let lines: Vec<String> = table.lines().skip(1).map(words).collect();
        assert_eq!(
            lines,
            [
                "1 1 0",
                "0 0 1 SKIPPED AS A WHOLE",
                "1 0 0",
                "0 0 0 NOT RUN",
                "0 0 0 NOT RUN"
            ]
        );
    }

    #[test]
    fn one_run_keeps_others_out_until_it_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let first = alone(dir.path()).unwrap();
        let refused = alone(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("already"), "{refused}");
        drop(first);
        alone(dir.path()).unwrap();
    }

    #[test]
    fn the_accelerator_is_the_one_that_the_tests_are_told() {
        let with = |words: &[&str], caller: Option<&str>| {
            let options = Options::parse(words).unwrap();
            accelerator(&options, caller.map(str::to_owned))
        };
        let given = ["--tests", "--env", "VISTARA_TEST_ACCELERATOR=tcg"];
        assert_eq!(with(&["--tests"], None), "kvm");
        assert_eq!(with(&["--tests"], Some("tcg")), "tcg");
        assert_eq!(with(&given, Some("kvm")), "tcg");
    }
}
