//! Runs one simulation and prints what came of it; fails where something was broken. Or runs networks of growing size, and prints
//! what membership costs each of their nodes.

use anyhow::{Result, bail};
use clap::Parser;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use vistara_sim::{Report, Scenario, World};

/// A network of nodes in virtual time.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many nodes; 1,000 if not said, and up to 10,000 for the curve.
    #[arg(long)]
    nodes: Option<usize>,
    /// Where all chances come from; the same seed gives the same run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, this one and those after it.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Seconds of virtual time; 180 if not said, and 100 for the curve.
    #[arg(long)]
    time: Option<u64>,
    /// Most members in a node's table.
    #[arg(long, default_value_t = 256)]
    members_max: usize,
    /// How often the network falls apart for some seconds.
    #[arg(long, default_value_t = 2)]
    cuts: u32,
    /// How many nodes die, each for up to a minute; a twelfth of them if not said, and a sixtieth for the curve: as many a second.
    #[arg(long)]
    deaths: Option<usize>,
    /// Runs networks of 10, 30, 100, … up to `--nodes` nodes without cuts, quiet ones and such in which nodes die, and prints what
    /// each node sends for membership, and how that grows.
    #[arg(long)]
    curve: bool,
}

impl Arguments {
    fn scenario(&self, nodes: usize, seed: u64) -> Scenario {
        let scenario = Scenario::new(nodes, seed);
        Scenario {
            time: Duration::from_secs(self.time.unwrap_or(180)),
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
        let nodes = arguments.nodes.unwrap_or(1000);
        let report = run(arguments.scenario(nodes, seed));
        print!("{report}");
        println!("took {:.1?}", began.elapsed());
        holds(&report)?;
    }
    Ok(())
}

/// Runs it; on a terminal, says how far it is.
fn run(scenario: Scenario) -> Report {
    let (nodes, end) = (scenario.nodes, scenario.time.as_secs());
    let shows = std::io::stderr().is_terminal();
    let report = World::new(scenario).run_and_tell(|now| {
        if shows {
            eprint!("\r{nodes} nodes: {} of {end} s ", now.as_secs());
        }
    });
    if shows {
        eprint!("\r\x1b[K");
    }
    report
}

fn holds(report: &Report) -> Result<()> {
    if !report.violations.is_empty() {
        bail!("seed {}: an invariant was broken", report.scenario.seed);
    }
    Ok(())
}

/// Sizes of the curve: about three times more each time.
const SIZES: [usize; 7] = [10, 30, 100, 300, 1000, 3000, 10_000];

/// Long enough for the beginning, in which all tell of themselves, to weigh little.
const CURVE_TIME: Duration = Duration::from_secs(100);
/// One of so many dies within the 20 s of those 100 in which nodes die: as many a second as of a twelfth within 100 s.
const CURVE_DEATHS_SHARE: usize = 60;

fn curve(arguments: &Arguments) -> Result<()> {
    let most = arguments.nodes.unwrap_or(10_000);
    let time = arguments.time.map_or(CURVE_TIME, Duration::from_secs);
    println!(
        "bytes that a node sends for membership each second; tables of {}, {time:?}, seed {}, no cuts",
        arguments.members_max, arguments.seed
    );
    println!(
        "   nodes   quiet: median       most   exponent |   nodes die: median       most   exponent    took"
    );
    let mut curves = [Curve::default(), Curve::default()];
    for nodes in SIZES.into_iter().filter(|size| *size <= most) {
        let began = Instant::now();
        let mut row = format!("{nodes:>8}");
        let deaths = arguments
            .deaths
            .unwrap_or(nodes.div_ceil(CURVE_DEATHS_SHARE));
        for (curve, deaths) in curves.iter_mut().zip([0, deaths]) {
            let scenario = Scenario {
                time,
                deaths,
                cuts: 0,
                ..arguments.scenario(nodes, arguments.seed)
            };
            let report = run(scenario);
            holds(&report)?;
            let (median, most) = report.gossip_median_and_most();
            let step = curve.exponent_from_last(nodes, median);
            let step = step.map_or(String::new(), |step| format!("{step:.2}"));
            let border = if deaths == 0 { "" } else { " |" };
            let width = if deaths == 0 { 16 } else { 20 };
            row += &format!("{border}{median:>width$} {most:>10} {step:>10}");
            curve.points.push((nodes, median));
        }
        println!("{row} {:>6.1?}", began.elapsed());
    }
    let [quiet, restless] = curves.map(|curve| curve.exponent());
    println!(
        "bytes grow with this power of the number of nodes, fitted to all: {quiet:.2} quiet, {restless:.2} where nodes die"
    );
    Ok(())
}

/// Bytes a node and second, by the number of nodes.
#[derive(Debug, Default)]
struct Curve {
    points: Vec<(usize, u64)>,
}

impl Curve {
    fn logarithms(&self) -> impl Iterator<Item = (f64, f64)> {
        (self.points.iter()).map(|(nodes, bytes)| ((*nodes as f64).ln(), (*bytes as f64).ln()))
    }

    /// The power with which it grew since the last point.
    fn exponent_from_last(&self, nodes: usize, bytes: u64) -> Option<f64> {
        let (x, y) = self.logarithms().last()?;
        Some(((bytes as f64).ln() - y) / ((nodes as f64).ln() - x))
    }

    /// The power that fits all points best, by least squares of logarithms.
    fn exponent(&self) -> f64 {
        let count = self.points.len() as f64;
        let (x, y) =
            (self.logarithms()).fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let (x, y) = (x / count, y / count);
        let (mut both, mut square) = (0.0, 0.0);
        for one in self.logarithms() {
            both += (one.0 - x) * (one.1 - y);
            square += (one.0 - x) * (one.0 - x);
        }
        both / square
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_of_a_square_root_is_a_half() {
        let points = [10, 100, 1000, 10_000].map(|nodes: usize| (nodes * nodes, nodes as u64 * 7));
        let curve = Curve {
            points: points.to_vec(),
        };
        assert!((curve.exponent() - 0.5).abs() < 1e-9);
        let step = curve
            .exponent_from_last(10_usize.pow(10), 700_000)
            .unwrap_or_default();
        assert!((step - 0.5).abs() < 1e-9, "{step}");
    }
}
