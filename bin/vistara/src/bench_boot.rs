//! `vistara bench boot`: the same static program as a unikernel and in a Linux guest, from pressing Enter to its first line,
//! with the memory that its monitor then holds; and beside it the bare monitor with the unikernel's own disk. All in one
//! run, in turn, so that a noisy host slows all alike.

use crate::bench_command::{Scratch, Series, millis, tempdir};
use crate::environment;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use crate::progress;
use serde::Serialize;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vistara_api::{Client, RunRequest};
use vistara_model::{Accelerator, Bytes};

/// Name of the image that is made for the measurement and removed after it.
pub(crate) const IMAGE: &str = "vistara-bench-boot";
/// Where the program lies in it.
pub(crate) const PROGRAM: &str = "/up";
/// Runs of each kind that are not counted: caches and templates are warm afterwards.
pub(crate) const WARM_UP: u32 = 1;

/// One way of running the program.
#[derive(Debug, Serialize)]
struct Way {
    /// `nanovms`, `linux` (forked from a template, as users get it) or `linux, booted`.
    name: String,
    /// Milliseconds from starting `vistara run` to the program's first line.
    first_line: Series,
    /// Median of the monitor's resident memory once the program has spoken.
    resident_bytes: u64,
    /// The memory that the guest was given.
    memory_bytes: u64,
}

/// What `--json` prints. Times are milliseconds, memory is bytes.
#[derive(Debug, Serialize)]
struct Report {
    count: u32,
    accelerator: String,
    ways: Vec<Way>,
    /// From starting the bare monitor, with the unikernel's disk and kernel, to the program's first line.
    raw_nanovms: Option<Series>,
    /// Median of `nanovms` by that of the bare monitor.
    nanovms_to_raw: Option<f64>,
    /// Median of `nanovms` by that of `linux, booted`: both cold.
    nanovms_to_linux_cold: Option<f64>,
    /// Resident memory of `nanovms` by that of `linux, booted`.
    nanovms_to_linux_memory: Option<f64>,
}

/// How one kind of run is asked for.
struct Kind {
    name: &'static str,
    flags: &'static [&'static str],
    /// What `--hypervisor` gets.
    hypervisor: &'static str,
}

const NANOVMS: Kind = Kind {
    name: "nanovms",
    flags: &[],
    hypervisor: "nanovms",
};
const LINUX: [Kind; 2] = [
    Kind {
        name: "linux",
        flags: &[],
        hypervisor: "qemu",
    },
    Kind {
        name: "linux, booted",
        flags: &["--no-template"],
        hypervisor: "qemu",
    },
];

/// Runs the measurements.
pub(crate) async fn boot(
    client: &Client,
    places: &Places,
    hypervisors: &[String],
    json: bool,
    count: u32,
) -> Result<u8, Failure> {
    let mut kinds = Vec::new();
    for name in hypervisors {
        match name.as_str() {
            "nanovms" => kinds.push(&NANOVMS),
            "linux" => kinds.extend(&LINUX),
            other => {
                return Err(Failure::new(format!("{other:?} cannot be measured here"))
                    .hint("--hypervisor nanovms,linux"));
            }
        }
    }
    let report = with_image(client, measure(client, places, &kinds, count)).await?;
    if json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    Ok(0)
}

/// Measures while the image is there.
pub(crate) async fn with_image<T>(
    client: &Client,
    measure: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    import(client).await?;
    let measured = measure.await;
    // It is a few hundred bytes; the measurement's own failure says more.
    let _ = client.remove_image(IMAGE, true).await;
    measured
}

/// Makes an image of one file.
async fn import(client: &Client) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::because("cannot make the program's image", error);
    let program = vistara_node::bare_program();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    archive
        .append_data(
            &mut header,
            PROGRAM.trim_start_matches('/'),
            program.as_slice(),
        )
        .map_err(failed)?;
    let bytes = archive.into_inner().map_err(failed)?;
    let events = client.import(Some(IMAGE), Cursor::new(bytes)).await?;
    progress::show(events, true).await?;
    Ok(())
}

async fn measure(
    client: &Client,
    places: &Places,
    kinds: &[&Kind],
    count: u32,
) -> Result<Report, Failure> {
    let scratch = tempdir(places)?;
    let explained = client
        .explain(&RunRequest {
            image: IMAGE.to_owned(),
            command: vec![PROGRAM.to_owned()],
            hypervisor: Some("qemu".to_owned()),
            ..RunRequest::default()
        })
        .await?;
    let accelerator = match explained.choice.accelerator.as_str() {
        "kvm" => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    };
    let mut times: Vec<Vec<f64>> = kinds.iter().map(|_| Vec::new()).collect();
    let mut memory: Vec<Vec<u64>> = kinds.iter().map(|_| Vec::new()).collect();
    let mut given = vec![0; kinds.len()];
    let mut raw = Vec::new();
    for round in 0..WARM_UP + count {
        for (index, kind) in kinds.iter().enumerate() {
            let run = one_run(client, places, kind, &scratch).await?;
            if round >= WARM_UP {
                times[index].push(millis(run.first_line));
                memory[index].push(run.resident_bytes);
            }
            given[index] = run.memory_bytes;
            if let Some(disk) = run.disk {
                let took = bare(client, accelerator, Bytes(run.memory_bytes), &disk).await?;
                if round >= WARM_UP {
                    raw.push(millis(took));
                }
            }
        }
    }
    let ways: Vec<Way> = (kinds.iter().zip(times).zip(memory).zip(given))
        .map(|(((kind, times), mut memory), memory_bytes)| {
            memory.sort_unstable();
            Way {
                name: kind.name.to_owned(),
                first_line: Series::of(times),
                resident_bytes: memory.get(memory.len() / 2).copied().unwrap_or(0),
                memory_bytes,
            }
        })
        .collect();
    let way = |name: &str| ways.iter().find(|way| way.name == name);
    let raw_nanovms = (!raw.is_empty()).then(|| Series::of(raw));
    let (nanovms, cold) = (way("nanovms"), way("linux, booted"));
    let both = nanovms.zip(cold);
    Ok(Report {
        count,
        accelerator: explained.choice.accelerator,
        nanovms_to_raw: nanovms
            .zip(raw_nanovms)
            .map(|(way, raw)| way.first_line.median / raw.median),
        nanovms_to_linux_cold: both
            .map(|(nanovms, cold)| nanovms.first_line.median / cold.first_line.median),
        nanovms_to_linux_memory: both
            .map(|(nanovms, cold)| nanovms.resident_bytes as f64 / cold.resident_bytes as f64),
        raw_nanovms,
        ways,
    })
}

/// What one run gave.
struct Run {
    first_line: Duration,
    resident_bytes: u64,
    memory_bytes: u64,
    /// A copy of a unikernel's disk.
    disk: Option<PathBuf>,
}

async fn one_run(
    client: &Client,
    places: &Places,
    kind: &Kind,
    scratch: &Scratch,
) -> Result<Run, Failure> {
    let failed = |error: std::io::Error| Failure::because("cannot run vistara", error);
    let name = format!("bench-boot-{}", std::process::id());
    let begin = Instant::now();
    let mut child = Command::new("/proc/self/exe")
        .arg("--socket")
        .arg(&places.socket)
        .arg("--state-dir")
        .arg(&places.state_dir)
        .args(["run", "--quiet", "--no-stdin", "--name", &name])
        .args(["--network", "none", "--hypervisor", kind.hypervisor])
        .args(kind.flags)
        .args([IMAGE, PROGRAM])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut first = [0; 1];
    let read = match child.stdout.take() {
        Some(mut out) => out.read(&mut first).map_err(failed)?,
        None => 0,
    };
    let first_line = begin.elapsed();
    let told = after_first_line(client, &name, kind, scratch).await;
    let removed = client.remove_machine(&name, true).await;
    let _ = child.kill();
    child.wait().map_err(failed)?;
    if read == 0 {
        return Err(Failure::new(format!(
            "the program said nothing: {}",
            kind.name
        )));
    }
    removed?;
    let (resident_bytes, memory_bytes, disk) = told?;
    Ok(Run {
        first_line,
        resident_bytes,
        memory_bytes,
        disk,
    })
}

/// The monitor's memory, the guest's, and a copy of a unikernel's disk, while the program waits.
async fn after_first_line(
    client: &Client,
    name: &str,
    kind: &Kind,
    scratch: &Scratch,
) -> Result<(u64, u64, Option<PathBuf>), Failure> {
    let detail = client.machine(name).await?;
    let pid = detail
        .vmm_pid
        .ok_or_else(|| Failure::new("the machine has no monitor"))?;
    let resident = crate::bench_command::resident(pid)?;
    let disk = match kind.name {
        "nanovms" => {
            let copy = scratch.as_ref().join("unikernel.img");
            let from = Path::new(&detail.dir).join("overlay.img");
            // An earlier round's, if there was one.
            let _ = std::fs::remove_file(&copy);
            vistara_node::clone_sparse(&from, &copy).map_err(|error| {
                Failure::because(format!("cannot copy {}", from.display()), error)
            })?;
            Some(copy)
        }
        _ => None,
    };
    Ok((resident, detail.memory_bytes, disk))
}

/// The bare monitor with this disk and the node's Nanos kernel.
async fn bare(
    client: &Client,
    accelerator: Accelerator,
    memory: Bytes,
    disk: &Path,
) -> Result<Duration, Failure> {
    let kernels = client.kernels().await?;
    let kernel = kernels
        .into_iter()
        .find(|kernel| kernel.payload == "nanos" && kernel.default)
        .ok_or_else(|| {
            Failure::new("there is no Nanos kernel").hint("vistara kernel add nanos FILE")
        })?;
    let qemu =
        environment::path(environment::QEMU).unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
    vistara_node::raw_nanos_boot(
        &qemu,
        kernel.path.as_ref(),
        accelerator,
        memory,
        disk,
        false,
    )
    .map_err(|error| Failure::because("the bare monitor did not come up", error))
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "{}, {} runs of each, in turn\n\n{:<30}{:>9}{:>9}{:>9}{:>14}\n",
        report.accelerator, report.count, "milliseconds", "min", "median", "max", "resident"
    );
    let mut row = |name: &str, series: &Series, resident: Option<u64>| {
        let resident = resident.map_or_else(String::new, |bytes| Bytes(bytes).to_string());
        text.push_str(&format!(
            "{name:<30}{:>9.1}{:>9.1}{:>9.1}{resident:>14}\n",
            series.min, series.median, series.max
        ));
    };
    for way in &report.ways {
        row(&way.name, &way.first_line, Some(way.resident_bytes));
    }
    if let Some(raw) = &report.raw_nanovms {
        row("bare monitor, unikernel's disk", raw, None);
    }
    text.push('\n');
    for (what, ratio) in [
        ("nanovms to the bare monitor", report.nanovms_to_raw),
        ("nanovms to linux, both cold", report.nanovms_to_linux_cold),
        ("nanovms to linux, memory", report.nanovms_to_linux_memory),
    ] {
        if let Some(ratio) = ratio {
            text.push_str(&format!("{what:<30}{ratio:>9.3}\n"));
        }
    }
    text
}
