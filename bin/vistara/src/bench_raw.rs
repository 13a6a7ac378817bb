//! `vistara bench boot --vs raw`: from the call of the interface to an agent that answers, against a bare Firecracker with the
//! same kernel, initramfs, disks and settings. In turn, in one run, so that a noisy host slows both alike.

use crate::bench_boot::{IMAGE, PROGRAM, WARM_UP, with_image};
use crate::bench_command::{Series, millis, tempdir};
use crate::environment;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use futures_util::StreamExt as _;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use vistara_api::{Client, MachineDetail, RunRequest};
use vistara_node::RawFirecracker;

/// What is measured: the only monitor with a baseline of this kind.
const HYPERVISOR: &str = "firecracker";
/// The step that begins when the agent has answered.
const AFTER_READY: &str = "configure";
/// How long a machine may take until its program runs.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// How often it is looked afterwards whether the node has noted its steps, and how many times.
const LOOK: Duration = Duration::from_millis(100);
const LOOKS: u32 = 20;

/// What `--json` prints. Times are milliseconds.
#[derive(Debug, Serialize)]
struct Report {
    count: u32,
    hypervisor: String,
    accelerator: String,
    /// From the call to the agent's answer: as the node tells it from the arrival of the request, and a whole exchange of
    /// client and node for the way there.
    ours: Series,
    /// From the start of a bare Firecracker to the agent's answer.
    raw: Series,
    /// The median of `ours` by that of `raw`.
    ratio: f64,
    /// What happens on our way, by name.
    steps: BTreeMap<String, Series>,
    /// The stages of the guest's boot in the bare one. What is left of `raw` is Firecracker's own.
    raw_steps: BTreeMap<String, Series>,
}

pub(crate) async fn boot(
    client: &Client,
    places: &Places,
    json: bool,
    count: u32,
) -> Result<u8, Failure> {
    let report = with_image(client, measure(client, places, count)).await?;
    if json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    Ok(0)
}

async fn measure(client: &Client, places: &Places, count: u32) -> Result<Report, Failure> {
    let scratch = tempdir(places)?;
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    let mut steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut raw_steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut baseline: Option<RawFirecracker> = None;
    let mut accelerator = String::new();
    for round in 0..WARM_UP + count {
        // Who comes second finds the host as the first has left it, so they take turns. What is to be like ours must have seen it.
        let mut bare_run = None;
        if let Some(like) = baseline.as_ref().filter(|_| round % 2 == 1) {
            bare_run = Some(bare(like).await?);
        }
        let begin = Instant::now();
        client.version().await?;
        let exchange = millis(begin.elapsed());
        let name = format!("bench-raw-{}", std::process::id());
        let ready = one_run(client, &name).await;
        if let (Ok(detail), None) = (&ready, &baseline) {
            let program = environment::path(environment::FIRECRACKER);
            let like = RawFirecracker::like(detail.dir.as_ref(), program, scratch.as_ref()).await;
            baseline = Some(like.map_err(|error| did_not_come_up(&error))?);
        }
        let removed = client.remove_machine(&name, true).await;
        let detail = ready?;
        removed?;
        let (bare_ms, bare_stages) = match (bare_run, &baseline) {
            (Some(run), _) => run,
            (None, Some(like)) => bare(like).await?,
            (None, None) => return Err(Failure::new("there is nothing to compare with")),
        };
        accelerator = detail
            .machine
            .choice
            .as_ref()
            .map(|choice| choice.accelerator.clone())
            .unwrap_or_default();
        if round < WARM_UP {
            continue;
        }
        raw.push(bare_ms);
        ours.push(exchange + ready_at(&detail).unwrap_or(f64::NAN));
        for timing in &detail.timings {
            let series = steps.entry(timing.step.clone()).or_default();
            series.push(timing.took_ms);
        }
        for (name, took) in bare_stages {
            let series = raw_steps.entry(name.to_owned()).or_default();
            series.push(millis(took));
        }
    }
    let (ours, raw) = (Series::of(ours), Series::of(raw));
    Ok(Report {
        count,
        hypervisor: HYPERVISOR.to_owned(),
        accelerator,
        ratio: ours.median / raw.median,
        ours,
        raw,
        steps: by_name(steps),
        raw_steps: by_name(raw_steps),
    })
}

fn by_name(steps: BTreeMap<String, Vec<f64>>) -> BTreeMap<String, Series> {
    let steps = steps.into_iter();
    steps
        .map(|(name, series)| (name, Series::of(series)))
        .collect()
}

/// Milliseconds of a bare Firecracker from its start to the agent's answer, and the stages of its guest.
async fn bare(like: &RawFirecracker) -> Result<(f64, Vec<(&'static str, Duration)>), Failure> {
    let failed = |error| did_not_come_up(&error);
    like.reset().map_err(failed)?;
    let begin = Instant::now();
    let run = like.start().map_err(failed)?;
    let ready = vistara_node::raw_agent_ready(&run).await;
    let stages = ready.map_err(|error| did_not_come_up(&error))?;
    Ok((millis(begin.elapsed()), stages))
}

fn did_not_come_up(error: &dyn std::error::Error) -> Failure {
    Failure::because("the bare Firecracker did not come up", told(error))
}

/// An error with what it comes from.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", told(source)),
        None => error.to_string(),
    }
}

/// When the agent had answered, in milliseconds from the request.
fn ready_at(detail: &MachineDetail) -> Option<f64> {
    let mut steps = detail.timings.iter();
    let after = steps.find(|timing| timing.step == AFTER_READY)?;
    Some(after.begin_ms)
}

/// A machine whose agent has answered. It may be there also after a failure.
async fn one_run(client: &Client, name: &str) -> Result<MachineDetail, Failure> {
    let request = RunRequest {
        image: IMAGE.to_owned(),
        command: vec![PROGRAM.to_owned()],
        name: Some(name.to_owned()),
        hypervisor: Some(HYPERVISOR.to_owned()),
        network: Some("none".to_owned()),
        no_template: true,
        ..RunRequest::default()
    };
    client.run(&request).await?;
    // Its first word, or its end: asking the node meanwhile would take processor time of which the guest may have need.
    let mut words = client.logs(name, true, None, None).await?;
    let word = tokio::time::timeout(READY_LIMIT, words.next()).await;
    let mut detail = client.machine(name).await?;
    for _ in 0..LOOKS {
        if ready_at(&detail).is_some() {
            return Ok(detail);
        }
        // The word may come before the node has noted the steps.
        tokio::time::sleep(LOOK).await;
        detail = client.machine(name).await?;
    }
    let why = match (word, &detail.machine.message) {
        (Err(_), _) => format!("it has not said a word after {READY_LIMIT:?}"),
        (Ok(_), Some(message)) => message.clone(),
        (Ok(_), None) => "its agent has not answered".to_owned(),
    };
    Err(Failure::new(format!("a machine did not start: {why}")))
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "{} with {}, {} runs of each, in turn\n\n{:<34}{:>9}{:>9}{:>9}\n",
        report.hypervisor, report.accelerator, report.count, "milliseconds", "min", "median", "max"
    );
    let mut row = |name: &str, series: &Series| {
        text.push_str(&format!(
            "{name:<34}{:>9.1}{:>9.1}{:>9.1}\n",
            series.min, series.median, series.max
        ));
    };
    row("call to agent ready", &report.ours);
    row("bare Firecracker to agent ready", &report.raw);
    for (name, series) in &report.steps {
        row(&format!("  of ours: {name}"), series);
    }
    for (name, series) in &report.raw_steps {
        row(&format!("  of the bare: {name}"), series);
    }
    text.push_str(&format!("\nratio of the medians: {:.3}\n", report.ratio));
    text
}
