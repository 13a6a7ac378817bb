//! The real-machine tests inside the lab: built here, run there by nextest's profile `lab`, counted here.

use super::Lab;
use super::host;
use super::options::Options;
use crate::lint::{cargo, has_subcommand};
use crate::tests::{KERNELS_VARIABLE, kernel_store, read_junit};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Stdio;

/// Whose tests they are.
const PACKAGE: &str = "vistara-machine";
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
    let report = results.join("junit.xml");
    // A report of an earlier run must not be taken for this one's; there may be none.
    let _ = fs::remove_file(&report);

    let metadata = dir.join("cargo.json");
    written(root, &["metadata", "--format-version", "1"], &metadata)?;
    let binaries = dir.join("binaries.json");
    let list = [
        "nextest",
        "list",
        "--package",
        PACKAGE,
        "--list-type=binaries-only",
        "--message-format=json",
    ];
    written(root, &list, &binaries)?;

    let mut environment = vec![];
    let mut default = |name: &str, value: String| {
        let given = options.env.iter().any(|(given, _)| given == name);
        if !given && std::env::var_os(name).is_none() {
            environment.push((name.to_owned(), value));
        }
    };
    default("VISTARA_TEST_ACCELERATOR", "kvm".to_owned());
    default("VISTARA_TEST_PATIENCE", PATIENCE.to_owned());
    if let Some(store) = kernel_store(root) {
        default(KERNELS_VARIABLE, store.display().to_string());
    }
    let mut words: Vec<String> = vec![nextest.display().to_string()];
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
    let failed = tally.finish().is_err();
    Ok(if failed && status == 0 { 1 } else { status })
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
