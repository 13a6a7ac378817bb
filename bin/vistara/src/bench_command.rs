//! `vistara bench run`: how long it takes from pressing Enter to a program's first output, against the least that the same
//! monitor needs with the same kernel to print a line. Both are measured in turn, in one run, so that a noisy host slows
//! both alike.

use crate::arguments::{Baseline, BenchCommand};
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use serde::Serialize;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vistara_api::{Client, Image, Machine, RunRequest, StopRequest};
use vistara_model::{Accelerator, Bytes};

/// What runs the machines: the baseline is the same monitor with a Linux guest, whatever `auto` would choose for `echo`.
const HYPERVISOR: &str = "qemu";
/// Memory of the guests on both sides: what `vistara run` gives when nothing is said.
const MEMORY: Bytes = Bytes::mib(512);
/// Machines that are kept running while the node's memory for each is measured.
const HELD: u32 = 4;
/// Runs of each side that are not counted: caches are warm afterwards.
const WARM_UP: u32 = 1;

/// Least, middle and greatest of a series, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Series {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Series {
    pub(crate) fn of(mut values: Vec<f64>) -> Series {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
        Series {
            min: at(0),
            median: (at(low) + at(high)) / 2.0,
            max: at(values.len().saturating_sub(1)),
        }
    }
}

/// What `--json` prints. Times are milliseconds, memory is bytes.
#[derive(Debug, Serialize)]
struct Report {
    /// Counted runs of each side.
    count: u32,
    /// From starting `vistara run` to the first byte of the program's output; its machines are forked from a template
    /// wherever they would be for a user.
    vistara: Series,
    /// The same with `--no-template`: the machine boots.
    cold: Series,
    /// From starting the monitor to the first line of the bare guest.
    raw: Series,
    /// The median of `vistara` by that of `raw`.
    ratio: f64,
    /// The median of `cold` by that of `raw`.
    cold_ratio: f64,
    /// What the CLI and the node add around the monitor's launch and the guest: from starting the CLI to the monitor's
    /// launch, and from the node's hearing of the output to its coming out of the CLI.
    overhead: Series,
    /// The monitor.
    vmm: String,
    /// `kvm` or `tcg`.
    accelerator: String,
    /// The guest's kernel.
    kernel: String,
    /// Memory of the node without any machine.
    node_resident_bytes: u64,
    /// What the node's memory grows by for each machine.
    node_resident_bytes_per_machine: u64,
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Runs the measurements.
pub(crate) async fn bench(
    client: &Client,
    places: &Places,
    command: &BenchCommand,
) -> Result<u8, Failure> {
    let (json, count, image) = match command {
        BenchCommand::Run { json, count, image } => (json, count, image),
        BenchCommand::Fork {
            json,
            hypervisor,
            count,
            image,
        } => {
            let image = image.as_deref();
            return crate::bench_fork::fork(client, places, *hypervisor, image, *count, *json)
                .await;
        }
        BenchCommand::Burst {
            json,
            hypervisor,
            count,
            image,
        } => {
            let image = image.as_deref();
            return crate::bench_fork::burst(client, places, *hypervisor, image, count, *json)
                .await;
        }
        BenchCommand::Mesh(options) => {
            return crate::bench_mesh::mesh(client, places, options).await;
        }
        BenchCommand::Boot {
            vs: Some(Baseline::Raw),
            json,
            count,
            ..
        } => return crate::bench_raw::boot(client, places, *json, *count).await,
        BenchCommand::Boot {
            hypervisor,
            json,
            count,
            vs: None,
        } => {
            return crate::bench_boot::boot(client, places, hypervisor, *json, *count).await;
        }
    };
    let image = chosen(client.images().await?, image.as_deref())?;
    let name = image.names.first().cloned().unwrap_or(image.id);
    let request = RunRequest {
        image: name.clone(),
        command: vec!["echo".to_owned()],
        hypervisor: Some(HYPERVISOR.to_owned()),
        ..RunRequest::default()
    };
    let choice = client.explain(&request).await?.choice;
    let accelerator = match choice.accelerator.as_str() {
        "kvm" => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    };
    let kernel = client
        .kernels()
        .await?
        .into_iter()
        .find(|kernel| kernel.payload == "linux" && kernel.default)
        .ok_or_else(|| {
            Failure::new("there is no guest kernel").hint("vistara kernel add debian")
        })?;
    let qemu = crate::environment::path(crate::environment::QEMU)
        .unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
    let scratch = tempdir(places)?;
    let mut ours = Vec::new();
    let mut cold = Vec::new();
    let mut raw = Vec::new();
    let mut overhead = Vec::new();
    for round in 0..WARM_UP + count {
        let bare = vistara_node::raw_boot(
            &qemu,
            kernel.path.as_ref(),
            accelerator,
            MEMORY,
            scratch.as_ref(),
        )
        .map_err(|error| Failure::because("the bare monitor did not come up", error))?;
        let (booted, _) = one_run(client, places, &name, &["--no-template"]).await?;
        let (whole, around) = one_run(client, places, &name, &[]).await?;
        if round >= WARM_UP {
            raw.push(millis(bare));
            cold.push(millis(booted));
            ours.push(millis(whole));
            overhead.push(around);
        }
    }
    let (node_resident_bytes, node_resident_bytes_per_machine) = memory(client, &name).await?;
    let (vistara, cold, raw) = (Series::of(ours), Series::of(cold), Series::of(raw));
    let report = Report {
        count: *count,
        ratio: vistara.median / raw.median,
        cold_ratio: cold.median / raw.median,
        vistara,
        cold,
        raw,
        overhead: Series::of(overhead),
        vmm: choice.vmm,
        accelerator: choice.accelerator,
        kernel: kernel.version,
        node_resident_bytes,
        node_resident_bytes_per_machine,
    };
    if *json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    Ok(0)
}

pub(crate) fn chosen(images: Vec<Image>, wanted: Option<&str>) -> Result<Image, Failure> {
    let fits = |image: &Image| match wanted {
        Some(wanted) => {
            let tagged = format!("{wanted}:latest");
            image
                .names
                .iter()
                .any(|name| name == wanted || *name == tagged)
        }
        None => true,
    };
    images.into_iter().find(fits).ok_or_else(|| {
        let what = wanted.map_or_else(
            || "there is no image".to_owned(),
            |name| format!("there is no image {name:?}"),
        );
        Failure::new(what).hint("`make run` makes one; or: vistara images import FILE --name NAME")
    })
}

/// A directory of this run's own, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl AsRef<std::path::Path> for Scratch {
    fn as_ref(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays of it is a file of some hundred bytes.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn tempdir(places: &Places) -> Result<Scratch, Failure> {
    let dir = places
        .state_dir
        .join("tmp")
        .join(format!("bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)
        .map_err(|error| Failure::because(format!("cannot make {}", dir.display()), error))?;
    Ok(Scratch(dir))
}

/// One run as a user makes it: a process of its own. Gives the whole time, and what of it was around the machine.
async fn one_run(
    client: &Client,
    places: &Places,
    image: &str,
    flags: &[&str],
) -> Result<(Duration, f64), Failure> {
    let failed = |error: std::io::Error| Failure::because("cannot run vistara", error);
    let name = format!("bench-{}", std::process::id());
    let begin = Instant::now();
    let mut child = Command::new("/proc/self/exe")
        .arg("--socket")
        .arg(&places.socket)
        .arg("--state-dir")
        .arg(&places.state_dir)
        .args(["run", "--quiet", "--name", &name])
        .args(["--hypervisor", HYPERVISOR])
        .args(flags)
        .args([image, "echo", "up"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut out = child
        .stdout
        .take()
        .ok_or_else(|| Failure::new("the run has no output"))?;
    let mut first = [0; 1];
    let read = out.read(&mut first).map_err(failed)?;
    let whole = begin.elapsed();
    let status = child.wait().map_err(failed)?;
    if read == 0 || !status.success() {
        return Err(Failure::new(format!("a run of {image} failed: {status}")));
    }
    let detail = client.machine(&name).await?;
    client.remove_machine(&name, true).await?;
    let at = |step: &str| {
        detail
            .timings
            .iter()
            .find(|timing| timing.step == step)
            .map(|timing| timing.begin_ms)
    };
    let inside = match (at("launch").or(at("fork")), at("first output")) {
        (Some(launch), Some(output)) => output - launch,
        _ => return Err(Failure::new("the node told no timings")),
    };
    Ok((whole, millis(whole) - inside))
}

pub(crate) fn resident(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| Failure::because(format!("cannot read {path}"), error))?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .map(|kib| kib << 10)
        .ok_or_else(|| Failure::new(format!("{path} names no resident memory")))
}

/// The node's memory without machines, and its growth for each.
async fn memory(client: &Client, image: &str) -> Result<(u64, u64), Failure> {
    let pid = client.version().await?.pid;
    let before = resident(pid)?;
    let mut machines: Vec<Machine> = Vec::new();
    for _ in 0..HELD {
        let request = RunRequest {
            image: image.to_owned(),
            command: ["sleep", "1000"].map(str::to_owned).to_vec(),
            memory: Some("128m".to_owned()),
            hypervisor: Some(HYPERVISOR.to_owned()),
            auto_remove: true,
            ..RunRequest::default()
        };
        machines.push(client.run(&request).await?);
    }
    let mut running = Ok(());
    for machine in &machines {
        // Waits until the program runs, as an attached client does.
        let request = vistara_api::AttachRequest {
            from_start: true,
            ..Default::default()
        };
        running = match client.attach(&machine.id, &request).await {
            Ok(mut streams) => streams.output.next().await.map(drop),
            Err(error) => Err(error),
        };
        if running.is_err() {
            break;
        }
    }
    let after = resident(pid);
    for machine in &machines {
        let now = StopRequest {
            grace_ms: Some(0),
            signal: None,
        };
        client.stop(&machine.id, &now).await?;
    }
    running?;
    Ok((before, after?.saturating_sub(before) / u64::from(HELD)))
}

fn table(report: &Report) -> String {
    let row = |name: &str, series: Series| {
        format!(
            "{name:<34}{:>9.1}{:>9.1}{:>9.1}\n",
            series.min, series.median, series.max
        )
    };
    format!(
        "{} with {}, guest kernel {}, {} runs of each, in turn\n\n{:<34}{:>9}{:>9}{:>9}\n{}{}{}{}\nratio of the medians: {:.3}, booted {:.3}\nthe node's memory: {}, and {} for each machine\n",
        report.vmm,
        report.accelerator,
        report.kernel,
        report.count,
        "milliseconds",
        "min",
        "median",
        "max",
        row("vistara run, to the first output", report.vistara),
        row("the same, booted (--no-template)", report.cold),
        row("bare monitor, to the first line", report.raw),
        row("of the first, CLI and node", report.overhead),
        report.ratio,
        report.cold_ratio,
        Bytes(report.node_resident_bytes),
        Bytes(report.node_resident_bytes_per_machine),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_series_is_between_its_two_middle_values() {
        let series = Series::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert!((series.median - 2.5).abs() < 1e-9 && (series.min - 1.0).abs() < 1e-9);
        assert!((Series::of(vec![5.0, 1.0, 3.0]).median - 3.0).abs() < 1e-9);
    }
}
