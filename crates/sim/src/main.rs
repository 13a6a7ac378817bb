//! Runs one simulation and prints what came of it; fails where something was broken. Or runs networks of growing size, and prints
//! what membership costs each of their nodes.

use anyhow::{Result, bail};
use clap::Parser;
use std::time::{Duration, Instant};
use vistara_sim::{Report, Scenario, World};

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
    /// How often the network falls apart for some seconds.
    #[arg(long, default_value_t = 2)]
    cuts: u32,
    /// How many nodes die, each for up to a minute; a twelfth of them if not said.
    #[arg(long)]
    deaths: Option<usize>,
    /// Runs networks of 10, 30, 100, … up to `--nodes` nodes, quiet ones and such in which nodes die, and prints what each node
    /// sends for membership.
    #[arg(long)]
    curve: bool,
}

impl Arguments {
    fn scenario(&self, nodes: usize, seed: u64) -> Scenario {
        let scenario = Scenario::new(nodes, seed);
        Scenario {
            time: Duration::from_secs(self.time),
            members_max: self.members_max,
            cuts: self.cuts,
            deaths: self.deaths.unwrap_or(scenario.deaths),
            ..scenario
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.curve {
        return curve(&arguments);
    }
    for seed in arguments.seed..arguments.seed + arguments.seeds {
        let began = Instant::now();
        let report = World::new(arguments.scenario(arguments.nodes, seed)).run();
        print!("{report}");
        println!("took {:.1?}", began.elapsed());
        holds(&report)?;
    }
    Ok(())
}

fn holds(report: &Report) -> Result<()> {
    if !report.violations.is_empty() {
        bail!("seed {}: an invariant was broken", report.scenario.seed);
    }
    Ok(())
}

/// Sizes of the curve: about three times more each time.
const SIZES: [usize; 7] = [10, 30, 100, 300, 1000, 3000, 10_000];

fn curve(arguments: &Arguments) -> Result<()> {
    println!(
        "bytes that a node sends for membership each second, median and most; tables of {}, {} s, seed {}",
        arguments.members_max, arguments.time, arguments.seed
    );
    println!("   nodes          quiet       most |    a twelfth dies       most");
    for nodes in SIZES.into_iter().filter(|size| *size <= arguments.nodes) {
        let scenario = arguments.scenario(nodes, arguments.seed);
        let quiet = World::new(Scenario {
            deaths: 0,
            cuts: 0,
            ..scenario.clone()
        });
        let quiet = quiet.run();
        let restless = World::new(Scenario {
            cuts: 0,
            ..scenario
        })
        .run();
        let (still, still_most) = quiet.gossip_median_and_most();
        let (median, most) = restless.gossip_median_and_most();
        println!("{nodes:>8} {still:>14} {still_most:>10} | {median:>17} {most:>10}");
        holds(&quiet)?;
        holds(&restless)?;
    }
    Ok(())
}
