//! `vistara bench mesh`: what the way to another node costs, on two nodes that the benchmark starts for itself, each with a
//! state directory and a daemon of its own, on loopback or at the two ends of a cable between namespaces. Whatever was made
//! for it is gone when it ends, also where a measurement fails or is interrupted.
//!
//! | part | what is compared |
//! |---|---|
//! | exec | a command in a machine of the far node, asked for at the near one and at the far one itself, in turn |
//! | placement | the choice among many known nodes, without their own time and the way to them |
//! | images | the layers of an image from node to node, each way, against iperf3 over the same link, in turn |
//! | idle | processor time of a node that does nothing and knows many |

mod exec;
mod idle;
mod images;
mod nodes;
mod options;

pub(crate) use options::BenchMeshOptions;

use self::nodes::Two;
use self::options::{BenchLink, MeshPart};
use crate::bench_command::{Series, millis, tempdir};
use crate::failure::{Failure, eprint_line};
use crate::output::{print, print_json};
use crate::places::Places;
use crate::session::signals::Signals;
use serde::Serialize;
use std::path::Path;
use vistara_api::Client;
use vistara_node::{PLACEMENT_POLICIES, placement_times};

/// What the issue asks for.
const PLACEMENT_MS_AIM: f64 = 5.0;
const EXEC_OVER_MS_AIM: f64 = 2.0;
const IMAGES_AIM: f64 = 0.5;
const IDLE_PERCENT_AIM: f64 = 0.5;
/// Placements that are timed for each policy.
const PLACEMENTS: u32 = 100;
/// The same networks in each run.
const PLACEMENT_SEED: u64 = 7;

/// One policy's placements, in milliseconds.
#[derive(Debug, Serialize)]
struct Placement {
    policy: &'static str,
    took: Series,
}

/// What `--json` prints. A part that was not measured is absent, and `skipped` says why.
#[derive(Debug, Serialize)]
struct Report {
    /// `loopback`, or the cable's rate.
    link: String,
    /// The host's load before anything was measured: processes that wanted a processor in the last minute.
    load: Option<f64>,
    exec: Option<exec::Exec>,
    placement_known: Option<u32>,
    placement: Vec<Placement>,
    images: Option<images::Images>,
    idle: Option<idle::Idle>,
    skipped: Vec<String>,
}

/// Says at once, and in the report, what is not measured.
fn skip(skipped: &mut Vec<String>, part: &str, why: &Failure) {
    let words = format!("{part} not measured: {}", why.message);
    eprint_line(&format!("SKIP: {words}"));
    skipped.push(words);
}

pub(crate) async fn mesh(
    client: &Client,
    places: &Places,
    options: &BenchMeshOptions,
) -> Result<u8, Failure> {
    let scratch = tempdir(places)?;
    let mut report = Report {
        link: match options.link {
            BenchLink::Loopback => "loopback".to_owned(),
            BenchLink::Namespace => format!("a cable of {} Mbit/s", options.rate),
        },
        load: load(),
        exec: None,
        placement_known: None,
        placement: Vec::new(),
        images: None,
        idle: None,
        skipped: Vec::new(),
    };
    let wants = |part| options.only.is_empty() || options.only.contains(&part);
    if wants(MeshPart::Placement) {
        report.placement_known = Some(options.known);
        report.placement = placement(options.known)?;
    }
    if wants(MeshPart::Exec) || wants(MeshPart::Images) || wants(MeshPart::Idle) {
        let cable = (options.link == BenchLink::Namespace).then_some(options.rate);
        let failed = |error| Failure::because("cannot catch signals", error);
        let mut signals = Signals::install().map_err(failed)?;
        let two = Two::start(scratch.as_ref(), places, cable).await?;
        let measured = tokio::select! {
            measured = with_nodes(client, &two, scratch.as_ref(), options, &wants, &mut report) => measured,
            (name, number) = signals.end() => {
                Err(Failure::new(format!("ended by SIG{name}")).code(128 + number))
            }
        };
        two.end().await;
        measured?;
    }
    if options.json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    Ok(0)
}

async fn with_nodes(
    client: &Client,
    two: &Two,
    scratch: &Path,
    options: &BenchMeshOptions,
    wants: &impl Fn(MeshPart) -> bool,
    report: &mut Report,
) -> Result<(), Failure> {
    if wants(MeshPart::Exec) {
        let image = options.image.as_deref();
        match exec::exec(client, two, image, options.count).await {
            Ok(exec) => report.exec = Some(exec),
            // Where the user says which, it is to be measured.
            Err(failure) if options.image.is_some() => return Err(failure),
            Err(failure) => skip(&mut report.skipped, "exec", &failure),
        }
    }
    if wants(MeshPart::Images) {
        let (images, missing) = images::images(two, options.size, options.transfers).await?;
        report.images = Some(images);
        if let Some(missing) = missing {
            skip(&mut report.skipped, "iperf3", &missing);
        }
    }
    if wants(MeshPart::Idle) && options.link == BenchLink::Namespace {
        let why = Failure::new("its peers are on this host's loopback: leave --link out");
        skip(&mut report.skipped, "idle", &why);
    } else if wants(MeshPart::Idle) {
        let count = options.peers as usize;
        report.idle = Some(idle::idle(two, scratch, count, options.watch).await?);
    }
    Ok(())
}

fn placement(known: u32) -> Result<Vec<Placement>, Failure> {
    (PLACEMENT_POLICIES.into_iter())
        .map(|policy| {
            let times = placement_times(known as usize, policy, PLACEMENTS, PLACEMENT_SEED)
                .ok_or_else(|| Failure::new(format!("{policy}: a placement found no place")))?;
            let took = Series::of(times.into_iter().map(millis).collect());
            Ok(Placement { policy, took })
        })
        .collect()
}

/// The host's load, as far as it can be read.
fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Whether an aim is reached, in a word.
fn verdict(reached: bool) -> &'static str {
    if reached { "reached" } else { "MISSED" }
}

fn row(text: &mut String, name: &str, series: &Series) {
    text.push_str(&format!(
        "{name:<44}{:>10.2}{:>10.2}{:>10.2}\n",
        series.min, series.median, series.max
    ));
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "two nodes, {} between them; the host's load was {}\n\n{:<44}{:>10}{:>10}{:>10}\n",
        report.link,
        (report.load).map_or("not told".to_owned(), |load| format!("{load:.1}")),
        "",
        "min",
        "median",
        "max"
    );
    if let Some(exec) = &report.exec {
        exec.describe(&mut text);
    }
    for one in &report.placement {
        let name = format!("placement, {}, ms", one.policy);
        row(&mut text, &name, &one.took);
    }
    if let Some(known) = report.placement_known {
        let worst = (report.placement.iter()).map(|one| one.took.median);
        let worst = worst.fold(0.0, f64::max);
        text.push_str(&format!(
            "  among {known} nodes at most {worst:.2} ms in the median; aim {PLACEMENT_MS_AIM} ms: {}\n",
            verdict(worst < PLACEMENT_MS_AIM)
        ));
    }
    if let Some(images) = &report.images {
        images.describe(&mut text);
    }
    if let Some(idle) = &report.idle {
        idle.describe(&mut text);
    }
    for skipped in &report.skipped {
        text.push_str(&format!("SKIP: {skipped}\n"));
    }
    text
}
