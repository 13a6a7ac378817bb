//! Prints what the facts say of programs in a root file-system tar, as a table:
//!
//! `cargo run --release -p vistara-image --example verdicts -- ROOT.tar PROGRAM…`
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "an example shows things, and stops at what goes wrong"
)]

use std::path::Path;
use vistara_image::{Asked, ImageStore, Limits, ProgressSink};
use vistara_model::ImageConfig;

#[tokio::main]
async fn main() {
    let mut words = std::env::args().skip(1);
    let source = words.next().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::open(directory.path(), Limits::default()).unwrap();
    let image = store
        .import(
            Path::new(&source),
            Some(&"local/verdicts:1".parse().unwrap()),
            Some(ImageConfig::default()),
            &ProgressSink::default(),
        )
        .await
        .unwrap();
    println!("| program | kind | may create processes | how sure | signs | took |");
    println!("|---|---|---|---|---|---|");
    for word in words {
        let started = std::time::Instant::now();
        let argv = [word.clone()];
        let facts = store
            .program_facts(&image, &Asked::new(&argv, &[], "/"))
            .unwrap();
        let program = facts.program;
        let mut signs: Vec<String> = program
            .processes
            .evidence
            .iter()
            .take(4)
            .map(ToString::to_string)
            .collect();
        signs.extend(program.processes.doubt);
        signs.extend(program.missing.iter().map(|name| format!("lacks {name}")));
        signs.extend(program.whole_system.iter().map(ToString::to_string));
        let linkage = program.linkage.map(|it| it.to_string()).unwrap_or_default();
        println!(
            "| {word} | {:?} {linkage}, {} libraries {:?} | {:?} | {} | {} | {} ms |",
            program.kind,
            program.libraries.len(),
            program.runtimes,
            program.processes.may_create,
            program.processes.confidence,
            signs.join("; "),
            started.elapsed().as_millis(),
        );
    }
}
