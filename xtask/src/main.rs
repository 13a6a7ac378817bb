//! The repository's own chores: `cargo xtask <chore>`. Nothing here is part of the product.

mod demo_image;
mod lab;
mod layers;
mod lint;
mod tests;
mod verdicts;
mod verdicts_cases;

use anyhow::{Context as _, Result, bail};
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask <chore>

  layers                  check that crates depend on each other as layers.toml says
  lint                    formatting, clippy, layers, licences
  test                    lint, all tests, the real-machine tests; ends with one line of counts
  unit                    the tests that need neither root nor a virtual machine
  demo-image [--out DIR]  an image of Debian with python3, as an OCI archive; prints its path
  verdicts                what auto says of real Debian programs, and how they ran as unikernels, into docs/unikernels.md
  lab [OPTIONS] COMMAND…  a command in a virtual machine whose /dev/kvm works; `cargo xtask lab --help`
  lab --tests             the real-machine tests in there, on KVM";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<ExitCode> {
    match words {
        ["lab", "--help" | "-h"] => println!("{}", lab::USAGE),
        ["lab", words @ ..] => return Ok(lab::main(&root()?, words).into()),
        ["layers"] => layers::check(&root()?)?,
        ["lint"] => lint::run(&root()?)?.finish()?,
        ["unit"] => tests::run(&root()?, &[tests::Tier::Default])?.finish()?,
        ["test"] => {
            let mut tally = lint::run(&root()?)?;
            tally.add(tests::run(
                &root()?,
                &[tests::Tier::Default, tests::Tier::Vm],
            )?);
            tally.finish()?;
        }
        ["verdicts"] => verdicts::run(&root()?)?,
        ["demo-image"] => demo_image::make(&root()?.join("target/demo"))?,
        ["demo-image", "--out", dir] => demo_image::make(dir.as_ref())?,
        _ => bail!("{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The repository's root: the directory above this package's.
fn root() -> Result<PathBuf> {
    let package = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = package.parent().context("xtask has no parent directory")?;
    Ok(root.to_owned())
}
