//! From a plan to a running QEMU, or to nothing at all.
//!
//! The call returns once QEMU has greeted us over its machine protocol: by then the disks are attached and the ports are
//! bound, or QEMU has said why not and gone. That costs the guest nothing, which is booting already.

use super::state::{self, BackendRecord};
use super::vm::{CaptureFiles, OUTPUT_TOLD, Parts, QemuVm, clean_up};
use super::{Tools, command};
use crate::{LaunchPlan, Start, VmRecord, VmmError};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;
use vistara_host::cgroup::{Cgroup, Limits};
use vistara_host::files::{OutputBox, sealable_memory_file};
use vistara_host::launch::{Launch, LaunchError, Launched, Rlimit};
use vistara_host::process::ProcessHandle;
use vistara_host::sockets;
use vistara_model::{Accelerator, VmmKind};

/// Bytes of QEMU's complaints that are kept.
const OUTPUT_BOX: u64 = 64 << 10;

/// Descriptors that QEMU may have: each connection through user networking takes one.
const DESCRIPTORS_MAX: u64 = 4096;

/// Without a memory cgroup: address space beyond the memory limit, for libraries, stacks and QEMU's own reserve. A bound
/// against running wild rather than a fence.
const ADDRESS_SPACE_BEYOND: u64 = 8 << 30;

/// Machines are killed before the node and before most of the host when memory runs out.
const OOM_SCORE: i16 = 500;

/// What has been started, so that it can be taken back.
struct Started {
    spawned: Spawned,
    helpers: Vec<ProcessHandle>,
    cgroup: Option<Cgroup>,
}

fn failed(step: &'static str) -> impl Fn(String) -> VmmError {
    move |message| VmmError::Launch { step, message }
}

/// Starts the machine.
pub(super) async fn start(
    tools: &std::sync::Arc<Tools>,
    plan: &LaunchPlan,
) -> Result<QemuVm, VmmError> {
    let begin = Instant::now();
    let runtime = tokio::runtime::Handle::current();
    let blocking = {
        let (tools, plan) = (tools.clone(), plan.clone());
        tokio::task::spawn_blocking(move || spawn(&tools, &plan, &runtime))
    };
    let started = match blocking.await {
        Ok(result) => result?,
        Err(error) => return Err(failed("starting QEMU")(error.to_string())),
    };
    let spawned = begin.elapsed();
    let connected = tokio::select! {
        biased;
        connected = connect(&plan.dir, started.spawned.captured) => connected,
        _ = started.spawned.process.wait() => Err("QEMU ended at once".to_owned()),
    };
    match connected {
        Ok(qmp) => {
            let Spawned {
                process,
                output,
                record,
                backend,
                kept,
                ..
            } = started.spawned;
            tracing::debug!(id = %plan.id, pid = record.pid, ?spawned, ready = ?begin.elapsed(), "QEMU runs");
            let parts = Parts {
                dir: plan.dir.clone(),
                record,
                backend,
                process,
                helpers: started.helpers,
                output: Some(output),
                printed: state::open_output(&plan.dir),
                capture: kept.map(|files| (super::info(tools, plan), files)),
            };
            Ok(QemuVm::new(parts, qmp, false))
        }
        Err(message) => Err(give_up(started, plan, message).await),
    }
}

/// Waits until QEMU speaks; a fork then takes over the captured state, which it has by this number, and goes on.
async fn connect(dir: &Path, captured: Option<i32>) -> Result<super::Qmp, String> {
    let stream = sockets::connect_in(dir, state::QMP_SOCKET).map_err(|error| error.to_string())?;
    let qmp = super::greet(stream).await?;
    if let Some(descriptor) = captured {
        let loaded = qmp.load_state_and_cont(descriptor).await;
        loaded.map_err(|error| format!("it cannot go on from there: {error}"))?;
    }
    Ok(qmp)
}

/// Takes everything back, and says what went wrong in QEMU's own words where it spoke.
async fn give_up(started: Started, plan: &LaunchPlan, message: String) -> VmmError {
    // Its last words are complete only once it is gone; one that hangs has none to wait for.
    let gone = std::time::Duration::from_millis(200);
    if tokio::time::timeout(gone, started.spawned.process.wait())
        .await
        .is_err()
        && let Err(error) = started.spawned.process.kill()
    {
        tracing::error!(%error, pid = started.spawned.record.pid, "a QEMU that does not answer cannot be killed");
    }
    if tokio::time::timeout(super::CLEANUP_LIMIT, started.spawned.process.wait())
        .await
        .is_err()
    {
        tracing::error!(
            pid = started.spawned.record.pid,
            "a killed QEMU does not go"
        );
    }
    let kills = started
        .cgroup
        .as_ref()
        .and_then(Cgroup::out_of_memory_kills);
    let message = match kills {
        Some(1..) => format!("{message}: the machine exceeded its memory limit on the host"),
        _ => message,
    };
    clean_up(&started.helpers, started.cgroup.as_ref()).await;
    state::remove_all_files(&plan.dir);
    let words = started.spawned.output.tail(OUTPUT_TOLD);
    if let Some(port) = command::taken_port(plan, &words) {
        return VmmError::PortTaken(port);
    }
    failed(crate::vmm::BUILDING)(if words.is_empty() { message } else { words })
}

/// Prepares and starts the processes. Blocking.
fn spawn(
    tools: &Tools,
    plan: &LaunchPlan,
    runtime: &tokio::runtime::Handle,
) -> Result<Started, VmmError> {
    let mut fences = Vec::new();
    let cgroup = match &tools.cgroups {
        Ok(groups) => {
            let limits = Limits {
                memory_max: Some(plan.fence.memory_max.0),
                pids_max: Some(plan.fence.pids_max),
                cpu_millis: plan.fence.cpu_millis,
            };
            let created = groups.create(plan.id.as_ref(), &limits);
            Some(created.map_err(|error| failed("creating its cgroup")(error.to_string()))?)
        }
        Err(reason) => {
            fences.push(format!("no cgroup ({reason})"));
            None
        }
    };
    let mut helpers = Vec::new();
    let result = spawn_in(tools, plan, cgroup.as_ref(), &mut helpers, fences);
    match result {
        Ok(spawned) => Ok(Started {
            spawned,
            helpers,
            cgroup,
        }),
        Err(error) => {
            runtime.block_on(clean_up(&helpers, cgroup.as_ref()));
            state::remove_all_files(&plan.dir);
            Err(error)
        }
    }
}

/// The monitor's process and what goes with it.
struct Spawned {
    process: ProcessHandle,
    output: OutputBox,
    record: VmRecord,
    backend: BackendRecord,
    /// The files of a machine that is to be captured.
    kept: Option<CaptureFiles>,
    /// The number that the file has in QEMU from which a fork's devices go on.
    captured: Option<i32>,
}

fn spawn_in(
    tools: &Tools,
    plan: &LaunchPlan,
    cgroup: Option<&Cgroup>,
    helpers: &mut Vec<ProcessHandle>,
    mut fences: Vec<String>,
) -> Result<Spawned, VmmError> {
    state::remove_all_files(&plan.dir);
    let mut inherit: Vec<OwnedFd> = Vec::new();
    let mut hand_over = |fd: OwnedFd| {
        let number = fd.as_raw_fd();
        inherit.push(fd);
        number
    };
    let listen = |name: &str| {
        sockets::listen_in(&plan.dir, name)
            .map_err(super::io_error("listening at", &plan.dir.join(name)))
    };
    let foreign_user = plan.fence.uid_gid.is_some();
    let mut handles = command::Handles {
        qmp: hand_over(listen(state::QMP_SOCKET)?.into()),
        ..command::Handles::default()
    };
    let memory_file = |result: io::Result<File>| {
        result.map_err(|error| failed("making the guest's memory")(error.to_string()))
    };
    if !matches!(plan.start, Start::Nanos(_)) {
        handles.channel = Some(hand_over(listen(state::CHANNEL_SOCKET)?.into()));
    }
    let mut kept = None;
    let mut captured = None;
    match &plan.start {
        Start::Linux(boot) => {
            handles.kernel = Some(hand_over(readable(&boot.kernel, foreign_user)?.into()));
            let initramfs = readable(&boot.initramfs, foreign_user)?;
            handles.initramfs = Some(hand_over(initramfs.into()));
            if plan.capturable {
                let memory = memory_file(sealable_memory_file(super::guest_memory(plan).0))?;
                let state = memory_file(sealable_memory_file(0))?;
                handles.memory = Some(hand_over(memory_file(memory.try_clone())?.into()));
                kept = Some(CaptureFiles { memory, state });
            }
        }
        Start::Nanos(boot) => {
            let kernel = readable(&boot.kernel, foreign_user)?;
            if !is_program_for_x86_64(&kernel) {
                let path = boot.kernel.display();
                let message = format!("{path} is no kernel for x86-64");
                return Err(failed(crate::vmm::BUILDING)(message));
            }
            handles.kernel = Some(hand_over(kernel.into()));
            let path = plan.dir.join(state::OUTPUT_PIPE);
            let (writer, both) =
                output_pipe(&path).map_err(super::io_error("making the pipe", &path))?;
            handles.output = Some(hand_over(writer.into()));
            // Held and never used: a pipe without a reader would make QEMU throw away what is printed.
            hand_over(both.into());
        }
        Start::Fork(capture) => {
            handles.memory = Some(hand_over(memory_file(capture.memory())?.into()));
            captured = Some(hand_over(memory_file(capture.state())?.into()));
        }
    }
    for disk in &plan.disks {
        let file = File::options()
            .read(true)
            .write(!disk.read_only)
            .open(&disk.path)
            .map_err(super::io_error("opening the disk", &disk.path))?;
        handles.disks.push(hand_over(file.into()));
    }
    for (index, share) in plan.shares.iter().enumerate() {
        let stream = serve(tools, plan, cgroup, helpers, index).map_err(|message| {
            failed("serving a shared directory")(format!("{}: {message}", share.path.display()))
        })?;
        handles.shares.push(hand_over(stream));
    }
    let output = OutputBox::new(OUTPUT_BOX)
        .map_err(|error| failed("making room for output")(error.to_string()))?;
    let mut launch = Launch::new(&tools.program);
    launch.args = command::arguments(plan, &handles, tools.tsc_khz);
    launch.output = Some(
        output
            .writer()
            .map_err(|error| failed("making room for output")(error.to_string()))?,
    );
    launch.inherit = inherit;
    launch.uid_gid = plan.fence.uid_gid;
    if plan.accelerator == Accelerator::Kvm && foreign_user {
        // `/dev/kvm` belongs to a group of its own on most hosts. Where that is root's, the monitor does not join it: KVM is
        // offered only if everybody may open the device then (`kvm::monitors_may_open`).
        let group = std::fs::metadata("/dev/kvm").map(|data| data.gid());
        launch.groups.extend(group.ok().filter(|gid| *gid != 0));
    }
    tools
        .apart
        .set(plan, &mut launch, &mut fences)
        .map_err(|error| failed("setting it apart from the host")(error.to_string()))?;
    launch.cgroup = cgroup.cloned();
    launch.oom_score_adj = OOM_SCORE;
    launch.rlimits.push((Rlimit::Descriptors, DESCRIPTORS_MAX));
    if cgroup.is_none() {
        let bytes = plan.fence.memory_max.0.saturating_add(ADDRESS_SPACE_BEYOND);
        launch.rlimits.push((Rlimit::AddressSpace, bytes));
        fences.push(format!("address space at most {} MiB", bytes >> 20));
        // RLIMIT_NPROC is no substitute: it counts all threads of the user, and without a cgroup that is mostly somebody
        // who does other things beside. QEMU's seccomp filter keeps it from starting programs, not from threads.
        fences.push("no limit on processes: no cgroup may be made here".to_owned());
    }
    let Launched {
        process,
        fences: held,
    } = launch
        .start()
        .map_err(|error| failed("starting QEMU")(told(&error)))?;
    fences.extend(held);
    fences.push("QEMU's seccomp filter".to_owned());
    let backend = BackendRecord {
        cgroup: cgroup
            .map(|cgroup| cgroup.dirs().to_vec())
            .unwrap_or_default(),
        helpers: helpers
            .iter()
            .map(|helper| (helper.identity().pid, helper.identity().start_ticks))
            .collect(),
        writable_disks: plan
            .disks
            .iter()
            .filter(|disk| !disk.read_only)
            .map(|disk| disk.path.clone())
            .collect(),
        // Neither a unikernel nor shared directories can be captured.
        info: (plan.shares.is_empty() && !matches!(plan.start, Start::Nanos(_)))
            .then(|| super::info(tools, plan)),
    };
    let record = serde_json::to_value(&backend).and_then(|value| {
        let record = VmRecord {
            kind: VmmKind::Qemu,
            pid: process.identity().pid,
            pid_start_ticks: process.identity().start_ticks,
            boot_id: process.identity().boot_id.clone(),
            fences,
            backend: value,
        };
        state::write_launch(&plan.dir, &record).map_err(serde_json::Error::io)?;
        Ok(record)
    });
    match record {
        Ok(record) => Ok(Spawned {
            process,
            output,
            record,
            backend,
            kept,
            captured,
        }),
        Err(error) => {
            helpers.push(process);
            Err(failed("noting the launch")(error.to_string()))
        }
    }
}

fn told(error: &LaunchError) -> String {
    format!("{error}: {}", error.source)
}

/// Starts the server of a share and connects to it.
fn serve(
    tools: &Tools,
    plan: &LaunchPlan,
    cgroup: Option<&Cgroup>,
    helpers: &mut Vec<ProcessHandle>,
    index: usize,
) -> Result<OwnedFd, String> {
    let virtiofsd = tools.virtiofsd.as_ref().ok_or("there is no virtiofsd")?;
    let share = &plan.shares[index];
    if !share.path.is_dir() {
        return Err("it is no directory".to_owned());
    }
    let name = format!("share{index}.sock");
    let text = |error: io::Error| error.to_string();
    let listener = sockets::listen_in(&plan.dir, &name).map_err(text)?;
    let stream = sockets::connect_in(&plan.dir, &name).map_err(text);
    std::fs::remove_file(plan.dir.join(&name)).map_err(text)?;
    let stream = stream?;
    let mut launch = virtiofsd.launch(share, listener.into());
    launch.cgroup = cgroup.cloned();
    launch.oom_score_adj = OOM_SCORE;
    let launched = launch.start().map_err(|error| told(&error))?;
    helpers.push(launched.process);
    // QEMU sets the mode it wants; it takes a blocking one.
    stream.set_nonblocking(false).map_err(text)?;
    Ok(stream.into())
}

/// Bytes that a unikernel may print before it waits for a reader: what the system lets anybody have.
const OUTPUT_PIPE_BYTES: usize = 1 << 20;

/// A named pipe: its writer's end, and one that is both.
fn output_pipe(path: &Path) -> io::Result<(File, File)> {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let both = File::options().read(true).write(true).open(path)?;
    let writer = File::options().write(true).open(path)?;
    // Some systems bound what a user may have in pipes; it is less then.
    let _ = rustix::pipe::fcntl_setpipe_size(&both, OUTPUT_PIPE_BYTES);
    Ok((writer, both))
}

/// Whether the file begins as an ELF program for x86-64 does. QEMU takes anything else for a kernel of Linux's first years, and runs
/// it where there is no initramfs to refuse.
fn is_program_for_x86_64(file: &File) -> bool {
    use std::os::unix::fs::FileExt;
    const ELF_OF_64_BITS: &[u8] = b"\x7fELF\x02";
    const X86_64: [u8; 2] = [62, 0];
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).is_ok()
        && header.starts_with(ELF_OF_64_BITS)
        && header[18..] == X86_64
}

/// A file that the monitor's user can open again by `/proc/self/fd`: itself where everybody may read it, else a copy in
/// memory.
fn readable(path: &Path, foreign_user: bool) -> Result<File, VmmError> {
    let error = super::io_error("opening", path);
    let mut file = File::open(path).map_err(&error)?;
    let open_to_all = file.metadata().map_err(&error)?.mode() & 0o4 != 0;
    if !foreign_user || open_to_all {
        return Ok(file);
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(&error)?;
    let mut copy = vistara_host::files::memory_file().map_err(&error)?;
    copy.write_all(&bytes)
        .and_then(|()| copy.rewind())
        .map_err(&error)?;
    Ok(copy)
}
