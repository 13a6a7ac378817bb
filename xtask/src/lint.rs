//! The checks that run no product code: formatting, clippy, layers, licences and bans.

use crate::layers;
use crate::tests::Tally;
use anyhow::{Context as _, Result};
use std::path::Path;
use std::process::{Command, Stdio};

/// One check: its name, cargo's subcommand to look for, and the arguments.
const CHECKS: &[(&str, &str, &[&str])] = &[
    ("formatting", "fmt", &["fmt", "--all", "--check"]),
    (
        "clippy",
        "clippy",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ],
    ),
    // Advisories need their database from the network; they are checked beside this, and do not fail a build that
    // cannot reach it.
    (
        "licences, bans and sources",
        "deny",
        &["deny", "check", "licenses", "bans", "sources"],
    ),
];

/// Runs every check whatever the others say. A missing tool is a skipped check, and said so.
pub(crate) fn run(root: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    for (name, tool, arguments) in CHECKS {
        if !has_subcommand(tool) {
            let mend = match *tool {
                "deny" => "cargo install --locked cargo-deny",
                _ => "rustup component add rustfmt clippy",
            };
            tally.skip(format!("{name}: cargo {tool} is not installed ({mend})"));
            continue;
        }
        eprintln!("== {name}: cargo {}", arguments.join(" "));
        let status = cargo(root, arguments)
            .status()
            .with_context(|| format!("run cargo {tool}"))?;
        tally.check(name, status.success());
    }
    let layered = layers::check(root);
    if let Err(error) = &layered {
        eprintln!("{error:#}");
    }
    tally.check("layers", layered.is_ok());
    if has_subcommand("deny") {
        let status = cargo(root, &["deny", "check", "advisories"]).status();
        if !status.is_ok_and(|status| status.success()) {
            tally.skip("advisories: see above; the database may be out of reach".to_owned());
        }
    }
    Ok(tally)
}

pub(crate) fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.args(arguments).current_dir(root);
    command
}

/// Whether `cargo <name>` exists and runs.
pub(crate) fn has_subcommand(name: &str) -> bool {
    Command::new("cargo")
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
