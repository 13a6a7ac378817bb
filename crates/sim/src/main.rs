//! Runs one simulation and prints what came of it; fails where something was broken.

use anyhow::{Result, bail};
use clap::Parser;
use std::time::{Duration, Instant};
use vistara_sim::{Scenario, World};

/// A network of nodes in virtual time.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many nodes.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Where all chances come from; the same seed gives the same run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, this one and those after it.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Seconds of virtual time.
    #[arg(long, default_value_t = 180)]
    time: u64,
    /// Most members in a node's table.
    #[arg(long, default_value_t = 256)]
    members_max: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    for seed in arguments.seed..arguments.seed + arguments.seeds {
        let scenario = Scenario {
            time: Duration::from_secs(arguments.time),
            members_max: arguments.members_max,
            ..Scenario::new(arguments.nodes, seed)
        };
        let began = Instant::now();
        let report = World::new(scenario).run();
        print!("{report}");
        println!("took {:.1?}", began.elapsed());
        if !report.violations.is_empty() {
            bail!("seed {seed}: an invariant was broken");
        }
    }
    Ok(())
}
