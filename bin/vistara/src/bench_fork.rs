//! `vistara bench fork` and `vistara bench burst`: how long it takes from asking the node for a machine until its program runs
//! and until it answers a first command, against the least by which the same monitor forks a guest with the same kernel and
//! memory. Both are measured in turn, in one run.

use crate::bench_command::{Series, chosen, millis, tempdir};
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{
    AttachRequest, Client, CreateTemplateRequest, ExecRequest, ForkRequest, Machine, RunRequest,
};
use vistara_model::{Accelerator, Bytes};
use vistara_node::{RawFork, RawTemplate};

const HYPERVISOR: &str = "qemu";
/// Memory of the guests on both sides.
const MEMORY: Bytes = Bytes::mib(128);
/// Runs of each side that are not counted: the first one makes the template.
const WARM_UP: u32 = 1;
/// Raw forks that are launched at once in a burst: more take each other's processors.
const RAW_WORKERS: usize = 4;

/// What is measured, for `--json`. Times are milliseconds, memory is bytes.
#[derive(Debug, Serialize)]
struct ForkReport {
    conditions: Conditions,
    /// Counted runs of each.
    count: u32,
    /// From the start of a bare monitor to its guest's answer: neither disk, network, fences nor identity.
    raw: Series,
    /// From asking the node for a machine until its program runs, identity given, network and disk attached.
    run: Series,
    /// From asking the node for a machine until a command executed in it has ended.
    first_exec: Series,
    /// The same as `run`, of a copy of a machine that runs.
    live: Series,
    /// How long that machine was held still.
    live_pause: Series,
    /// Medians of `run`, `first_exec` and `live` by that of `raw`.
    ratio: f64,
    first_exec_ratio: f64,
    live_ratio: f64,
    /// Proportional set size of the monitors, idle: medians.
    raw_pss_bytes: u64,
    pss_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Conditions {
    vmm: String,
    accelerator: String,
    kernel: String,
    memory_bytes: u64,
    cpus: usize,
    /// Load of the host when it began and when it ended.
    load: [f64; 2],
    /// Whether this is a release build.
    release: bool,
}

/// What both benches need.
struct Bench<'a> {
    client: &'a Client,
    image: String,
    raw: RawTemplate,
    conditions: Conditions,
    _scratch: crate::bench_command::Scratch,
}

fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

impl<'a> Bench<'a> {
    async fn prepare(
        client: &'a Client,
        places: &Places,
        image: Option<&str>,
    ) -> Result<Bench<'a>, Failure> {
        let image = chosen(client.images().await?, image)?;
        let image = image.names.first().cloned().unwrap_or(image.id);
        let before = load();
        let request = CreateTemplateRequest {
            image: image.clone(),
            command: vec!["sleep".to_owned()],
            memory: Some(MEMORY.0.to_string()),
            hypervisor: Some(HYPERVISOR.to_owned()),
            ..CreateTemplateRequest::default()
        };
        client.create_template(&request).await?;
        let choice = client.explain(&request_of(&image)).await?.choice;
        let accelerator = match choice.accelerator.as_str() {
            "kvm" => Accelerator::Kvm,
            _ => Accelerator::Tcg,
        };
        let mut kernels = client.kernels().await?.into_iter();
        let kernel = kernels
            .find(|kernel| kernel.payload == "linux" && kernel.default)
            .ok_or_else(|| {
                Failure::new("there is no guest kernel").hint("vistara kernel add debian")
            })?;
        let qemu = crate::environment::path(crate::environment::QEMU)
            .unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
        let scratch = tempdir(places)?;
        let raw = RawTemplate::make(
            &qemu,
            kernel.path.as_ref(),
            accelerator,
            MEMORY,
            scratch.as_ref(),
        )
        .map_err(|error| Failure::because("the bare monitor cannot be forked", error))?;
        Ok(Bench {
            client,
            image,
            raw,
            conditions: Conditions {
                vmm: choice.vmm,
                accelerator: choice.accelerator,
                kernel: kernel.version,
                memory_bytes: MEMORY.0,
                cpus: std::thread::available_parallelism().map_or(1, usize::from),
                load: [before, before],
                release: !cfg!(debug_assertions),
            },
            _scratch: scratch,
        })
    }

    fn fork_raw(&self) -> Result<RawFork, Failure> {
        let forked = self.raw.fork();
        forked.map_err(|error| Failure::because("the bare monitor cannot be forked", error))
    }

    /// A machine whose program runs.
    async fn machine(&self) -> Result<Machine, Failure> {
        let machine = self.client.run(&request_of(&self.image)).await?;
        let request = AttachRequest::default();
        let mut streams = self.client.attach(&machine.id, &request).await?;
        loop {
            match streams.output.next().await? {
                Some(StreamItem::Event(StreamEvent::Started { machine })) => return Ok(*machine),
                Some(StreamItem::Event(StreamEvent::Failed { error })) => {
                    return Err(Failure::refused(&error));
                }
                Some(_) => {}
                None => return Err(Failure::new("a machine ended before its program ran")),
            }
        }
    }

    async fn exec(&self, machine: &str) -> Result<(), Failure> {
        let request = ExecRequest {
            command: vec!["true".to_owned()],
            ..ExecRequest::default()
        };
        let mut streams = self.client.exec(machine, &request).await?;
        while let Some(item) = streams.output.next().await? {
            match item {
                StreamItem::Event(StreamEvent::Exited { exit_code: 0, .. }) => return Ok(()),
                StreamItem::Event(StreamEvent::Failed { error }) => {
                    return Err(Failure::refused(&error));
                }
                _ => {}
            }
        }
        Err(Failure::new("the first command in a machine failed"))
    }

    async fn pss_of(&self, machine: &str) -> Result<u64, Failure> {
        let pid = self.client.machine(machine).await?.vmm_pid;
        pss(pid.ok_or_else(|| Failure::new("a machine has no monitor"))?)
    }
}

fn request_of(image: &str) -> RunRequest {
    RunRequest {
        image: image.to_owned(),
        command: ["sleep", "100000"].map(str::to_owned).to_vec(),
        memory: Some(MEMORY.0.to_string()),
        hypervisor: Some(HYPERVISOR.to_owned()),
        ..RunRequest::default()
    }
}

/// What a process takes of the host's memory, its share of what several have.
fn pss(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| Failure::because(format!("cannot read {path}"), error))?;
    let kib = text.lines().find_map(|line| {
        let rest = line.strip_prefix("Pss:")?.trim();
        rest.strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    kib.map(|kib| kib << 10)
        .ok_or_else(|| Failure::new(format!("{path} names no share")))
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// `vistara bench fork`.
pub(crate) async fn fork(
    client: &Client,
    places: &Places,
    image: Option<&str>,
    count: u32,
    json: bool,
) -> Result<u8, Failure> {
    let mut bench = Bench::prepare(client, places, image).await?;
    let source = bench.machine().await?;
    let measured = fork_rounds(&bench, &source, count).await;
    client.remove_machine(&source.id, true).await?;
    let mut report = measured?;
    bench.conditions.load[1] = load();
    report.conditions = bench.conditions;
    if json {
        print_json(&report)?;
    } else {
        print(&fork_table(&report))?;
    }
    Ok(0)
}

async fn fork_rounds(
    bench: &Bench<'_>,
    source: &Machine,
    count: u32,
) -> Result<ForkReport, Failure> {
    let (mut raw, mut run, mut first_exec) = (Vec::new(), Vec::new(), Vec::new());
    let (mut live, mut live_pause) = (Vec::new(), Vec::new());
    let (mut raw_pss, mut ours_pss) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP + count {
        let bare = bench.fork_raw()?;
        let bare_pss = pss(bare.pid())?;
        let took = bare.took;
        drop(bare);
        let begin = Instant::now();
        let machine = bench.machine().await?;
        let started = begin.elapsed();
        let answered = bench.exec(&machine.id).await;
        let executed = begin.elapsed();
        let our_pss = bench.pss_of(&machine.id).await;
        bench.client.remove_machine(&machine.id, true).await?;
        answered?;
        let begin = Instant::now();
        let forked = bench
            .client
            .fork(&source.id, &ForkRequest::default())
            .await?;
        let copied = begin.elapsed();
        for machine in &forked.machines {
            bench.client.remove_machine(&machine.id, true).await?;
        }
        if round >= WARM_UP {
            raw.push(millis(took));
            raw_pss.push(bare_pss);
            run.push(millis(started));
            first_exec.push(millis(executed));
            ours_pss.push(our_pss?);
            live.push(millis(copied));
            live_pause.push(forked.pause_ms);
        }
    }
    let (raw, run, first_exec) = (Series::of(raw), Series::of(run), Series::of(first_exec));
    let live = Series::of(live);
    Ok(ForkReport {
        conditions: Conditions {
            vmm: String::new(),
            accelerator: String::new(),
            kernel: String::new(),
            memory_bytes: 0,
            cpus: 0,
            load: [0.0; 2],
            release: false,
        },
        count,
        ratio: run.median / raw.median,
        first_exec_ratio: first_exec.median / raw.median,
        live_ratio: live.median / raw.median,
        raw,
        run,
        first_exec,
        live,
        live_pause: Series::of(live_pause),
        raw_pss_bytes: median(raw_pss),
        pss_bytes: median(ours_pss),
    })
}

fn told(conditions: &Conditions) -> String {
    format!(
        "{} with {}, guest kernel {}, {} of memory, one virtual CPU, {} processors, load {:.1} to {:.1}, {} build",
        conditions.vmm,
        conditions.accelerator,
        conditions.kernel,
        Bytes(conditions.memory_bytes),
        conditions.cpus,
        conditions.load[0],
        conditions.load[1],
        if conditions.release {
            "release"
        } else {
            "debug"
        },
    )
}

/// A table that is a text and Markdown alike.
fn fork_table(report: &ForkReport) -> String {
    let row = |name: &str, series: Series, ratio: Option<f64>| {
        let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        format!(
            "| {name:<58} | {:>8.1} | {:>8.1} | {:>8.1} | {ratio:>6} |\n",
            series.min, series.median, series.max
        )
    };
    format!(
        "{}; {} of each, in turn.\n\n| {:<58} | {:>8} | {:>8} | {:>8} | {:>6} |\n|---|---:|---:|---:|---:|\n{}{}{}{}{}\nMonitors' memory, idle (PSS, median): {} of ours, {} of the raw ones.\n",
        told(&report.conditions),
        report.count,
        "milliseconds",
        "min",
        "median",
        "max",
        "ratio",
        row(
            "raw fork: bare monitor, to its guest's answer",
            report.raw,
            Some(1.0)
        ),
        row(
            "run: asked for, to the program running",
            report.run,
            Some(report.ratio)
        ),
        row(
            "run: asked for, to the first command answered",
            report.first_exec,
            Some(report.first_exec_ratio)
        ),
        row(
            "fork of a running machine: asked for, to it running",
            report.live,
            Some(report.live_ratio)
        ),
        row(
            "of that, the time for which the machine stood still",
            report.live_pause,
            None
        ),
        Bytes(report.pss_bytes),
        Bytes(report.raw_pss_bytes),
    )
}

/// One size of a burst.
#[derive(Debug, Serialize)]
struct Burst {
    machines: u32,
    /// Milliseconds until all bare forks had answered.
    raw_ms: f64,
    /// Milliseconds until all programs ran.
    run_ms: f64,
    /// Milliseconds until all copies of a running machine ran.
    live_ms: f64,
    /// Machines in a second, by ours and by the raw ones.
    run_per_s: f64,
    raw_per_s: f64,
    /// `run_ms` by `raw_ms`.
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct BurstReport {
    conditions: Conditions,
    bursts: Vec<Burst>,
}

/// `vistara bench burst`.
pub(crate) async fn burst(
    client: &Client,
    places: &Places,
    image: Option<&str>,
    sizes: &[u32],
    json: bool,
) -> Result<u8, Failure> {
    let mut bench = Bench::prepare(client, places, image).await?;
    let source = bench.machine().await?;
    let mut bursts = Vec::new();
    let mut failed = None;
    // Caches are warm afterwards.
    for (index, size) in std::iter::once(&1).chain(sizes).enumerate() {
        match one_burst(&bench, &source, *size).await {
            Ok(burst) if index > 0 => bursts.push(burst),
            Ok(_) => {}
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    client.remove_machine(&source.id, true).await?;
    if let Some(error) = failed {
        return Err(error);
    }
    bench.conditions.load[1] = load();
    let report = BurstReport {
        conditions: bench.conditions,
        bursts,
    };
    if json {
        print_json(&report)?;
    } else {
        print(&burst_table(&report))?;
    }
    Ok(0)
}

async fn one_burst(bench: &Bench<'_>, source: &Machine, size: u32) -> Result<Burst, Failure> {
    let begin = Instant::now();
    let raw = raw_burst(bench, size)?;
    let raw_time = begin.elapsed();
    drop(raw);
    let begin = Instant::now();
    let asked = (0..size).map(|_| bench.machine());
    let made: Vec<Result<Machine, Failure>> = futures_util::future::join_all(asked).await;
    let run_time = begin.elapsed();
    let mut machines = Vec::new();
    let mut failed = None;
    for one in made {
        match one {
            Ok(machine) => machines.push(machine),
            Err(error) => failed = Some(error),
        }
    }
    remove_all(bench, &machines).await?;
    if let Some(error) = failed {
        return Err(error);
    }
    let request = ForkRequest {
        count: size,
        ..ForkRequest::default()
    };
    let begin = Instant::now();
    let forked = bench.client.fork(&source.id, &request).await?;
    let live_time = begin.elapsed();
    remove_all(bench, &forked.machines).await?;
    let seconds = |time: std::time::Duration| time.as_secs_f64().max(f64::MIN_POSITIVE);
    Ok(Burst {
        machines: size,
        raw_ms: millis(raw_time),
        run_ms: millis(run_time),
        live_ms: millis(live_time),
        run_per_s: f64::from(size) / seconds(run_time),
        raw_per_s: f64::from(size) / seconds(raw_time),
        ratio: seconds(run_time) / seconds(raw_time),
    })
}

async fn remove_all(bench: &Bench<'_>, machines: &[Machine]) -> Result<(), Failure> {
    let removed = machines
        .iter()
        .map(|machine| bench.client.remove_machine(&machine.id, true));
    for result in futures_util::future::join_all(removed).await {
        result?;
    }
    Ok(())
}

/// So many bare forks, all of which have answered.
fn raw_burst(bench: &Bench<'_>, size: u32) -> Result<Vec<RawFork>, Failure> {
    let next = std::sync::atomic::AtomicU32::new(0);
    let work = || {
        let mut mine = Vec::new();
        while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < size {
            mine.push(bench.fork_raw()?);
        }
        Ok(mine)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..RAW_WORKERS).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for worker in workers {
            let mine: Result<Vec<RawFork>, Failure> = worker
                .join()
                .unwrap_or_else(|_| Err(Failure::new("a worker of the bench failed")));
            all.extend(mine?);
        }
        Ok(all)
    })
}

fn burst_table(report: &BurstReport) -> String {
    let rows: String = report
        .bursts
        .iter()
        .map(|burst| {
            format!(
                "| {:>8} | {:>8.0} | {:>8.0} | {:>8.0} | {:>8.1} | {:>8.1} | {:>6.2} |\n",
                burst.machines,
                burst.raw_ms,
                burst.run_ms,
                burst.live_ms,
                burst.raw_per_s,
                burst.run_per_s,
                burst.ratio
            )
        })
        .collect();
    format!(
        "{}. Until the last of so many answers (raw) or its program runs.\n\n| machines | raw, ms | run, ms | fork, ms | raw, 1/s | run, 1/s | ratio |\n|---:|---:|---:|---:|---:|---:|---:|\n{rows}",
        told(&report.conditions)
    )
}
