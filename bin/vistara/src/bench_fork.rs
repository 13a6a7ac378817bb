//! `vistara bench fork` and `vistara bench burst`: how long it takes from asking the node for a machine until its program runs
//! and until it answers a first command, against the least by which the same monitor forks a guest with the same kernel and
//! memory. Both are measured in turn, in one run.

mod burst;

pub(crate) use burst::burst;

use crate::bench_command::{Series, chosen, millis, tempdir};
use crate::bench_raw::told as told_whole;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{
    AttachRequest, Client, CreateTemplateRequest, ExecRequest, ForkRequest, Machine, RunRequest,
};
use vistara_model::{Accelerator, Bytes};
use vistara_node::{RawFirecracker, RawFork, RawRun, RawTemplate, VmmError, raw_agent_ready};

/// Memory of the guests on both sides.
const MEMORY: Bytes = Bytes::mib(128);
/// Runs of each side that are not counted: the first one makes the template.
const WARM_UP: u32 = 1;
/// The step of a start that ends with the agent's answer.
const GREETING: &str = "greeting";
/// How long the stock may take to be ready, and to grow by one more machine, and how often it is looked at.
const STOCK_BOUND: Duration = Duration::from_secs(30);
const STOCK_LOOK: Duration = Duration::from_millis(50);

/// What is measured, for `--json`. Times are milliseconds, memory is bytes.
#[derive(Debug, Serialize)]
struct ForkReport {
    conditions: Conditions,
    /// Counted runs of each.
    count: u32,
    /// From the start of a bare monitor to its guest's answer: neither disk, network, fences nor identity.
    raw: Series,
    /// From asking the node for a machine, forked when it is asked for, until its agent has answered: as far as the bare one gets.
    agent: Series,
    /// From asking the node for a machine until its program runs, identity given, network and disk attached; forked when
    /// it is asked for.
    run: Series,
    /// The same until a command executed in it has ended.
    first_exec: Series,
    /// As the two before, of a machine from the stock; absent where the node keeps none.
    warm: Option<Series>,
    warm_first_exec: Option<Series>,
    /// The same as `run`, of a copy of a machine that runs; absent where the monitor makes none.
    live: Option<Series>,
    /// How long that machine was held still.
    live_pause: Option<Series>,
    /// Medians of `agent`, `run`, `first_exec`, `warm`, `warm_first_exec` and `live` by that of `raw`.
    agent_ratio: f64,
    ratio: f64,
    first_exec_ratio: f64,
    warm_ratio: Option<f64>,
    warm_first_exec_ratio: Option<f64>,
    live_ratio: Option<f64>,
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
    /// The key of its template.
    template: String,
    hypervisor: Hypervisor,
    raw: Baseline,
    conditions: Conditions,
    _scratch: crate::bench_command::Scratch,
}

/// Whose forks are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Hypervisor {
    Qemu,
    Firecracker,
}

impl Hypervisor {
    fn name(self) -> &'static str {
        match self {
            Hypervisor::Qemu => "qemu",
            Hypervisor::Firecracker => "firecracker",
        }
    }

    /// What ours have for a network. A bare Firecracker would need a tap made for it, so there neither has one.
    fn network(self) -> Option<String> {
        match self {
            Hypervisor::Qemu => None,
            Hypervisor::Firecracker => Some("none".to_owned()),
        }
    }
}

/// What ours are measured against.
enum Baseline {
    Qemu(RawTemplate),
    Firecracker(RawFirecracker),
}

/// A bare fork that has answered; it ends with this.
enum Bare {
    Qemu(RawFork),
    Firecracker(RawRun, Duration),
}

impl Bare {
    fn pid(&self) -> u32 {
        match self {
            Bare::Qemu(fork) => fork.pid(),
            Bare::Firecracker(run, _) => run.pid(),
        }
    }

    /// From the start of its monitor to its answer.
    fn took(&self) -> Duration {
        match self {
            Bare::Qemu(fork) => fork.took,
            Bare::Firecracker(_, took) => *took,
        }
    }
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
        hypervisor: Hypervisor,
        image: Option<&str>,
    ) -> Result<Bench<'a>, Failure> {
        let image = chosen(client.images().await?, image)?;
        let image = image.names.first().cloned().unwrap_or(image.id);
        let before = load();
        let request = CreateTemplateRequest {
            image: image.clone(),
            command: vec!["sleep".to_owned()],
            memory: Some(MEMORY.0.to_string()),
            hypervisor: Some(hypervisor.name().to_owned()),
            network: hypervisor.network(),
            ..CreateTemplateRequest::default()
        };
        let template = client.create_template(&request).await?.template.key;
        let choice = client
            .explain(&request_of(&image, hypervisor))
            .await?
            .choice;
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
        let scratch = tempdir(places)?;
        let raw = match hypervisor {
            Hypervisor::Qemu => {
                let qemu = crate::environment::path(crate::environment::QEMU)
                    .unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
                let kernel = kernel.path.as_ref();
                RawTemplate::make(&qemu, kernel, accelerator, MEMORY, scratch.as_ref())
                    .map(Baseline::Qemu)
                    .map_err(|error| cannot_be_forked(&error))?
            }
            Hypervisor::Firecracker => {
                Baseline::Firecracker(captured(client, &image, scratch.as_ref()).await?)
            }
        };
        Ok(Bench {
            client,
            image,
            template,
            hypervisor,
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

    /// Waits for it: not for a task that others wait for.
    fn fork_raw(&self) -> Result<Bare, Failure> {
        match &self.raw {
            Baseline::Qemu(template) => {
                let forked = template.fork().map(Bare::Qemu);
                forked.map_err(|error| cannot_be_forked(&error))
            }
            Baseline::Firecracker(like) => {
                let restored = async {
                    let (run, begin) = like.restore().await?;
                    raw_agent_ready(&run).await?;
                    Ok(Bare::Firecracker(run, begin.elapsed()))
                };
                waited_for(restored)?.map_err(|error: VmmError| cannot_be_forked(&error))
            }
        }
    }

    /// A machine that is forked for this request, whose program runs.
    async fn forked(&self) -> Result<Machine, Failure> {
        self.machine(&RunRequest {
            // With a name of its own none of the stock can stand in for it.
            hostname: Some("forked".to_owned()),
            ..request_of(&self.image, self.hypervisor)
        })
        .await
    }

    /// A machine as a user gets it, from the stock where there is one, whose program runs.
    async fn usual(&self) -> Result<Machine, Failure> {
        self.machine(&request_of(&self.image, self.hypervisor))
            .await
    }

    /// Machines in stock of the template that is measured.
    async fn in_stock(&self) -> Result<u32, Failure> {
        let all = self.client.templates().await?;
        let ours = all.iter().find(|template| template.key == self.template);
        Ok(ours.map_or(0, |template| template.warm))
    }

    /// Waits until so many are in stock, or it has not grown for long; says how many there are.
    async fn stocked(&self, count: u32) -> Result<u32, Failure> {
        let (mut most, mut grown) = (self.in_stock().await?, Instant::now());
        while most < count && grown.elapsed() < STOCK_BOUND {
            tokio::time::sleep(STOCK_LOOK).await;
            let now = self.in_stock().await?;
            if now > most {
                (most, grown) = (now, Instant::now());
            }
        }
        Ok(most)
    }

    async fn machine(&self, request: &RunRequest) -> Result<Machine, Failure> {
        let machine = self.client.run(request).await?;
        started(self.client, &machine.id).await
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

/// What comes of this, on a thread of its own: a caller in a burst has no other, and one in a task may not wait.
fn waited_for<T: Send>(work: impl Future<Output = T> + Send) -> Result<T, Failure> {
    let wait = || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        Ok(runtime.enable_all().build()?.block_on(work))
    };
    let waited: std::io::Result<T> = std::thread::scope(|scope| {
        let waited = scope.spawn(wait).join();
        waited.unwrap_or_else(|_| Err(std::io::Error::other("it panicked")))
    });
    waited.map_err(|error| Failure::because("a worker of the bench failed", error))
}

fn cannot_be_forked(error: &VmmError) -> Failure {
    Failure::because("the bare monitor cannot be forked", told_whole(error))
}

/// A bare Firecracker like our machines of this image, captured when its guest's agent had answered.
async fn captured(client: &Client, image: &str, dir: &Path) -> Result<RawFirecracker, Failure> {
    let request = RunRequest {
        no_template: true,
        ..request_of(image, Hypervisor::Firecracker)
    };
    let machine = client.run(&request).await?;
    let like = async {
        started(client, &machine.id).await?;
        let detail = client.machine(&machine.id).await?;
        let program = crate::environment::path(crate::environment::FIRECRACKER);
        let like = RawFirecracker::like(detail.dir.as_ref(), program, dir).await;
        like.map_err(|error| cannot_be_forked(&error))
    };
    let like = like.await;
    client.remove_machine(&machine.id, true).await?;
    let like = like?;
    let taken = async {
        like.reset()?;
        let run = like.start()?;
        raw_agent_ready(&run).await?;
        like.capture(run).await
    };
    taken.await.map_err(|error| cannot_be_forked(&error))?;
    Ok(like)
}

/// Waits until a machine's program runs.
async fn started(client: &Client, machine: &str) -> Result<Machine, Failure> {
    let request = AttachRequest::default();
    let mut streams = client.attach(machine, &request).await?;
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

fn request_of(image: &str, hypervisor: Hypervisor) -> RunRequest {
    RunRequest {
        image: image.to_owned(),
        command: ["sleep", "100000"].map(str::to_owned).to_vec(),
        memory: Some(MEMORY.0.to_string()),
        hypervisor: Some(hypervisor.name().to_owned()),
        network: hypervisor.network(),
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
    hypervisor: Hypervisor,
    image: Option<&str>,
    count: u32,
    json: bool,
) -> Result<u8, Failure> {
    let mut bench = Bench::prepare(client, places, hypervisor, image).await?;
    let source = bench.forked().await?;
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

/// Asks for as much as it takes until the node keeps a stock; says whether it does.
async fn begin_stock(bench: &Bench<'_>) -> Result<bool, Failure> {
    for _ in 0..2 {
        let machine = bench.usual().await?;
        bench.client.remove_machine(&machine.id, true).await?;
    }
    Ok(bench.stocked(1).await? > 0)
}

/// What one run took, in milliseconds from asking for it.
struct OneRun {
    /// Until its agent had answered.
    agent: f64,
    started: f64,
    executed: f64,
    pss: u64,
    warm: bool,
}

/// Measures a machine until its program runs, and until it has answered a first command, and removes it.
async fn one_run(
    bench: &Bench<'_>,
    machine: impl Future<Output = Result<Machine, Failure>>,
) -> Result<OneRun, Failure> {
    let begin = Instant::now();
    let machine = machine.await?;
    let started = begin.elapsed();
    let answered = bench.exec(&machine.id).await;
    let executed = begin.elapsed();
    let pss = bench.pss_of(&machine.id).await;
    let detail = bench.client.machine(&machine.id).await;
    bench.client.remove_machine(&machine.id, true).await?;
    answered?;
    let detail = detail?;
    let mut steps = detail.timings.iter();
    let greeting = steps
        .find(|timing| timing.step == GREETING)
        .ok_or_else(|| Failure::new("a machine does not tell when its agent answered"))?;
    Ok(OneRun {
        agent: greeting.begin_ms + greeting.took_ms,
        started: millis(started),
        executed: millis(executed),
        pss: pss?,
        warm: detail.warm,
    })
}

async fn fork_rounds(
    bench: &Bench<'_>,
    source: &Machine,
    count: u32,
) -> Result<ForkReport, Failure> {
    let (mut raw, mut agent) = (Vec::new(), Vec::new());
    let (mut run, mut first_exec) = (Vec::new(), Vec::new());
    let (mut warm, mut warm_first_exec) = (Vec::new(), Vec::new());
    let (mut live, mut live_pause) = (Vec::new(), Vec::new());
    let (mut raw_pss, mut ours_pss) = (Vec::new(), Vec::new());
    let keeps_stock = begin_stock(bench).await?;
    for round in 0..WARM_UP + count {
        let counts = round >= WARM_UP;
        let bare = bench.fork_raw()?;
        let bare_pss = pss(bare.pid())?;
        let took = bare.took();
        drop(bare);
        let ours = one_run(bench, bench.forked()).await?;
        if counts {
            raw.push(millis(took));
            raw_pss.push(bare_pss);
            agent.push(ours.agent);
            run.push(ours.started);
            first_exec.push(ours.executed);
            ours_pss.push(ours.pss);
        }
        if keeps_stock && bench.stocked(1).await? > 0 {
            let ours = one_run(bench, bench.usual()).await?;
            if counts && ours.warm {
                warm.push(ours.started);
                warm_first_exec.push(ours.executed);
            }
            // What is made in its place must not be in front of what is measured next.
            bench.stocked(1).await?;
        }
        let begin = Instant::now();
        let forked = bench
            .client
            .fork(&source.id, &ForkRequest::default())
            .await?;
        let copied = begin.elapsed();
        for machine in &forked.machines {
            bench.client.remove_machine(&machine.id, true).await?;
        }
        if counts {
            live.push(millis(copied));
            live_pause.push(forked.pause_ms);
        }
    }
    let (raw, run, first_exec) = (Series::of(raw), Series::of(run), Series::of(first_exec));
    let agent = Series::of(agent);
    let some = |values: Vec<f64>| (!values.is_empty()).then(|| Series::of(values));
    let (warm, warm_first_exec) = (some(warm), some(warm_first_exec));
    let (live, live_pause) = (some(live), some(live_pause));
    let by_raw = |series: &Option<Series>| series.map(|series| series.median / raw.median);
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
        agent_ratio: agent.median / raw.median,
        agent,
        ratio: run.median / raw.median,
        first_exec_ratio: first_exec.median / raw.median,
        warm_ratio: by_raw(&warm),
        warm_first_exec_ratio: by_raw(&warm_first_exec),
        warm,
        warm_first_exec,
        live_ratio: by_raw(&live),
        raw,
        run,
        first_exec,
        live,
        live_pause,
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
    let maybe = |name: &str, series: Option<Series>, ratio: Option<f64>| {
        series.map_or_else(String::new, |series| row(name, series, ratio))
    };
    format!(
        "{}; {} of each, in turn.\n\n| {:<58} | {:>8} | {:>8} | {:>8} | {:>6} |\n|---|---:|---:|---:|---:|\n{}{}{}{}{}{}{}{}\nMonitors' memory, idle (PSS, median): {} of ours, {} of the raw ones.\n",
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
            "run, forked: asked for, to its agent's answer",
            report.agent,
            Some(report.agent_ratio)
        ),
        row(
            "run, forked: asked for, to the program running",
            report.run,
            Some(report.ratio)
        ),
        row(
            "run, forked: asked for, to the first command answered",
            report.first_exec,
            Some(report.first_exec_ratio)
        ),
        maybe(
            "run, from the stock: asked for, to the program running",
            report.warm,
            report.warm_ratio
        ),
        maybe(
            "run, from the stock: to the first command answered",
            report.warm_first_exec,
            report.warm_first_exec_ratio
        ),
        maybe(
            "fork of a running machine: asked for, to it running",
            report.live,
            report.live_ratio
        ),
        maybe(
            "of that, the time for which the machine stood still",
            report.live_pause,
            None
        ),
        Bytes(report.pss_bytes),
        Bytes(report.raw_pss_bytes),
    )
}
