//! Compiles the agent for the guest: static, small, with settings of its own whatever this build's are.
//!
//! A nested cargo does it, in a target directory of its own: two builds of one directory would wait for each other. What
//! the outer cargo and its tools set for this build is not handed on; where packages come from is.

use sha2::{Digest, Sha256};
use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Settings of the profile `release` for the agent: size first, since every guest loads it before anything else.
const PROFILE: [(&str, &str); 6] = [
    ("OPT_LEVEL", "s"),
    ("LTO", "fat"),
    ("CODEGEN_UNITS", "1"),
    ("PANIC", "abort"),
    ("STRIP", "symbols"),
    ("DEBUG", "false"),
];

/// Static, and at fixed addresses: nothing has to be relocated before the first instruction.
const FLAGS: &str = "-Ctarget-feature=+crt-static -Crelocation-model=static";

fn main() -> Result<(), Box<dyn Error>> {
    let guest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..");
    let root = guest.join("..");
    for part in ["agent", "protocol"] {
        println!(
            "cargo:rerun-if-changed={}",
            guest.join(part).join("src").display()
        );
        println!(
            "cargo:rerun-if-changed={}",
            guest.join(part).join("Cargo.toml").display()
        );
    }
    println!(
        "cargo:rerun-if-changed={}",
        root.join("Cargo.toml").display()
    );
    println!(
        "cargo:rerun-if-changed={}",
        root.join("Cargo.lock").display()
    );
    println!("cargo:rerun-if-changed=build.rs");

    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    let target = format!("{architecture}-unknown-linux-gnu");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // OUT_DIR is TARGET/PROFILE/build/PACKAGE/out: all builds of this workspace share the agent's.
    let shared = out
        .ancestors()
        .nth(4)
        .ok_or("OUT_DIR is not where cargo puts it")?
        .join("guest-agent");
    let program = compile(&root, &target, &shared)?;
    let bytes = fs::read(&program)?;
    check_static(&bytes)?;
    fs::write(out.join("agent"), &bytes)?;
    println!(
        "cargo:rustc-env=VISTARA_AGENT_FILE={}",
        out.join("agent").display()
    );
    println!(
        "cargo:rustc-env=VISTARA_AGENT_SHA256={:x}",
        Sha256::digest(&bytes)
    );
    Ok(())
}

fn compile(root: &Path, target: &str, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args([
        "build",
        "--release",
        "--locked",
        "--package",
        "vistara-guest-agent",
    ]);
    cargo
        .args(["--bin", "vistara-guest-agent", "--target", target])
        .arg("--target-dir")
        .arg(directory);
    if env::var("CARGO_NET_OFFLINE").is_ok_and(|offline| offline == "true") {
        cargo.arg("--offline");
    }
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        if !is_handed_on(name) {
            cargo.env_remove(name);
        }
    }
    for (key, value) in PROFILE {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    cargo.env("RUSTFLAGS", FLAGS);
    let output = cargo.output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("compiling the guest's agent failed:\n{words}").into());
    }
    Ok(directory.join(target).join("release/vistara-guest-agent"))
}

/// Whether the nested build gets a variable of ours: where cargo lives and where packages come from, but nothing about
/// this package, this profile, or a tool that stands in for the compiler.
fn is_handed_on(name: &str) -> bool {
    const PACKAGES: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRY_",
        "CARGO_REGISTRIES_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_UNSTABLE_",
    ];
    const OURS: [&str; 10] = [
        "CARGO",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "CLIPPY_",
        "PROFILE",
        "TARGET",
        "OUT_DIR",
        "OPT_LEVEL",
        "DEBUG",
    ];
    let starts = |list: &[&str]| list.iter().any(|prefix| name.starts_with(prefix));
    starts(&PACKAGES) || !starts(&OURS)
}

/// A guest has no dynamic linker: an ELF program must name none (program header type 3).
fn check_static(bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let short = |at: usize| {
        bytes
            .get(at..at + 2)
            .map(|two| usize::from(u16::from_le_bytes([two[0], two[1]])))
    };
    let table = bytes
        .get(32..40)
        .and_then(|eight| eight.try_into().ok())
        .map(u64::from_le_bytes);
    let (Some(table), Some(size), Some(count)) = (table, short(54), short(56)) else {
        return Err("the agent is no ELF program".into());
    };
    let table = usize::try_from(table)?;
    let interpreter = (0..count).any(|index| short(table + index * size) == Some(3));
    if interpreter {
        Err("the agent is not linked statically".into())
    } else {
        Ok(())
    }
}
