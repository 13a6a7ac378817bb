//! From a plan to a running Firecracker, or to nothing at all.
//!
//! The call returns once the guest's processors run: by then every setting has been accepted, or Firecracker has said why not
//! and is gone.

use super::api::{self, Api, ApiError, Session};
use super::configure::{self, INITRAMFS, KERNEL, SNAPSHOT_STATE, disk_name};
use super::console::{BOX_MAX, Console};
use super::network::{FENCES, Helper, NetworkFailure, TAP};
use super::stage::{Apart, Belongs, Stage};
use super::state::{self, BackendRecord};
use super::vm::{CLEANUP_LIMIT, FirecrackerVm, Parts, clean_up, log_tail};
use super::{Tools, io_error};
use crate::vmm::{BUILDING, GOING_ON};
use crate::{LaunchPlan, Start, VmRecord, VmmError};
use rustix::fs::OFlags;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_host::cgroup::{Cgroup, Limits};
use vistara_host::files::{self, OutputBox};
use vistara_host::launch::{Launch, LaunchError, Launched, Rlimit};
use vistara_host::process::{ProcessEnd, ProcessHandle};
use vistara_model::{PortMapping, VmmKind};
use vistara_nanos::kernel::{KERNEL_BYTES_MAX, neutralise_pvh_note};

/// Bytes of complaints (of the jailer, or of a Firecracker that panics) that are kept.
const OUTPUT_BOX: u64 = 64 << 10;
/// Bytes that a unikernel may print before it waits for a reader: what the system lets anybody have.
const OUTPUT_PIPE_BYTES: usize = 1 << 20;
/// Descriptors that Firecracker may have: each connection through vsock takes one.
const DESCRIPTORS_MAX: u64 = 2048;
/// Without a memory cgroup: address space beyond the memory limit. A bound against running wild rather than a fence.
const ADDRESS_SPACE_BEYOND: u64 = 4 << 30;
/// Machines are killed before the node and before most of the host when memory runs out.
const OOM_SCORE: i16 = 500;
/// How long Firecracker may take until its API answers. With its jailer that is some 20 ms on a quiet host.
const API_LIMIT: Duration = Duration::from_secs(20);
/// Characters of complaints that are told.
const TOLD: usize = 2_000;

/// What has been started, so that it can be taken back.
struct Started {
    process: ProcessHandle,
    errors: OutputBox,
    record: VmRecord,
    backend: BackendRecord,
    cgroup: Option<Cgroup>,
    /// The description of a unikernel's output that Firecracker has, too.
    pipe: Option<File>,
    in_memory: Option<File>,
    network: Option<Helper>,
}

/// Why a machine whose process runs does not start.
enum Failure {
    /// At this step, for this reason.
    At(&'static str, String),
    /// This port could not be published.
    Port(PortMapping),
}

fn failed(step: &'static str) -> impl Fn(String) -> VmmError {
    move |message| VmmError::Launch { step, message }
}

/// Starts the machine.
pub(super) async fn start(
    tools: &Arc<Tools>,
    plan: &LaunchPlan,
) -> Result<FirecrackerVm, VmmError> {
    let begin = Instant::now();
    let runtime = tokio::runtime::Handle::current();
    let blocking = {
        let (tools, plan) = (tools.clone(), plan.clone());
        tokio::task::spawn_blocking(move || spawn(&tools, &plan, &runtime))
    };
    let mut started = match blocking.await {
        Ok(result) => result?,
        Err(error) => return Err(failed("starting Firecracker")(error.to_string())),
    };
    let spawned = begin.elapsed();
    let api = Api::new(&started.backend.root);
    let running = tokio::select! {
        biased;
        running = set_up(&api, tools, plan, started.network.as_ref()) => running,
        end = started.process.wait() => Err(Failure::At("starting Firecracker", describe(end))),
    };
    match running {
        Ok(()) => {}
        Err(Failure::At(step, message)) => return Err(give_up(started, plan, step, message).await),
        Err(Failure::Port(port)) => {
            give_up(started, plan, "publishing a port", String::new()).await;
            return Err(VmmError::PortTaken(port));
        }
    }
    if let Some(pipe) = &started.pipe
        && let Err(error) = wait_for_readers(pipe)
    {
        let step = "making its output wait for its reader";
        return Err(give_up(started, plan, step, error.to_string()).await);
    }
    let seccomp = seccomp(started.record.pid);
    started.record.fences.push(seccomp.to_owned());
    tracing::debug!(id = %plan.id, pid = started.record.pid, ?spawned, ready = ?begin.elapsed(), "Firecracker runs");
    Ok(FirecrackerVm::new(Parts {
        dir: plan.dir.clone(),
        record: started.record,
        backend: started.backend,
        process: started.process,
        errors: Some(started.errors),
        console: Console::open(&plan.dir).with_box(started.in_memory),
        printed: state::open_output(&plan.dir),
        network: started.network.map(|helper| Some(helper.process)),
    }))
}

/// Waits for the API and for the network, makes all settings, and lets the guest run.
async fn set_up(
    api: &Api,
    tools: &Tools,
    plan: &LaunchPlan,
    network: Option<&Helper>,
) -> Result<(), Failure> {
    let published = async {
        let (Some(helper), Some(nic)) = (network, &plan.nic) else {
            return Ok(());
        };
        let published = helper.publish(&plan.dir, &nic.ports).await;
        published.map_err(|failure| match failure {
            NetworkFailure::Port(port) => Failure::Port(port),
            NetworkFailure::Other(message) => Failure::At("making its network", message),
        })
    };
    // At once: each takes some milliseconds in which it mostly waits.
    let (mut session, ()) = tokio::try_join!(set(api, tools, plan), published)?;
    let step = |step: &'static str| move |error: ApiError| Failure::At(step, error.to_string());
    match &plan.start {
        Start::Fork(capture) => {
            let bounds = configure::bounds_of_fork(plan, capture.info());
            go_on(&mut session, bounds).await.map_err(step(GOING_ON))
        }
        Start::Linux(_) | Start::Nanos(_) => session
            .start_instance()
            .await
            .map_err(step("starting the guest")),
    }
}

/// Loads what a fork goes on from. Its bounds are not the captured machine's, and hold before it runs.
async fn go_on(session: &mut Session, bounds: Vec<configure::Setting>) -> Result<(), ApiError> {
    let load = configure::load(bounds.is_empty());
    session
        .put("/snapshot/load", &load, api::SNAPSHOT_LIMIT)
        .await?;
    if bounds.is_empty() {
        // There is nothing to be told, and it goes on already.
        return Ok(());
    }
    for bound in bounds {
        session.patch(&bound.path, &bound.body).await?;
    }
    session.resume().await
}

/// Waits for the API, and makes the settings of a machine that boots. The connection is for what remains to be said.
async fn set(api: &Api, tools: &Tools, plan: &LaunchPlan) -> Result<Session, Failure> {
    let mut session = tokio::time::timeout(API_LIMIT, api.listening())
        .await
        .map_err(|_| {
            Failure::At(
                "waiting for Firecracker's API",
                format!("it does not listen after {API_LIMIT:?}"),
            )
        })?
        .map_err(|error| Failure::At(BUILDING, error.to_string()))?;
    if let Start::Fork(_) = &plan.start {
        return Ok(session);
    }
    let settings = configure::settings(
        plan,
        tools.version,
        Some(TAP),
        tools.cpu_template.as_ref().map(|template| template.body()),
    )
    .map_err(|error| Failure::At(BUILDING, error.to_string()))?;
    for setting in settings {
        session
            .put(&setting.path, &setting.body, api::ANSWER_LIMIT)
            .await
            .map_err(|error| {
                Failure::At(
                    BUILDING,
                    format!("{}: {error}", setting.path.trim_start_matches('/')),
                )
            })?;
    }
    Ok(session)
}

/// Firecracker makes its standard output one that never waits, and drops what does not fit. The description is ours as well:
/// a guest whose output nobody reads shall wait.
fn wait_for_readers(pipe: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(pipe)?;
    Ok(rustix::fs::fcntl_setfl(pipe, flags - OFlags::NONBLOCK)?)
}

fn seccomp(pid: u32) -> &'static str {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let filtered = status
        .lines()
        .any(|line| line.split_whitespace().eq(["Seccomp:", "2"]));
    if filtered {
        "the seccomp filter of Firecracker's build (one for glibc lets everything pass)"
    } else {
        "no seccomp filter: this build of Firecracker has none"
    }
}

fn describe(end: io::Result<ProcessEnd>) -> String {
    match end {
        Ok(ProcessEnd::Exited(code)) => format!("it ended at once with exit code {code}"),
        Ok(ProcessEnd::Signaled(signal)) => format!("it was ended at once by signal {signal}"),
        Ok(ProcessEnd::Unknown) => "it ended at once".to_owned(),
        Err(error) => format!("it cannot be watched: {error}"),
    }
}

/// Takes everything back, and says what went wrong with Firecracker's own words where it spoke.
async fn give_up(
    started: Started,
    plan: &LaunchPlan,
    step: &'static str,
    message: String,
) -> VmmError {
    // Its last words are complete only once it is gone; one that hangs has none to wait for.
    let gone = Duration::from_millis(200);
    if tokio::time::timeout(gone, started.process.wait())
        .await
        .is_err()
    {
        if let Err(error) = started.process.kill() {
            tracing::error!(%error, id = %plan.id, "a Firecracker that did not start cannot be killed");
        }
        await_end(&started.process, plan).await;
    }
    let mut words = started.errors.tail(TOLD);
    if words.is_empty() {
        words = log_tail(&started.backend.root).complaints();
    }
    clean_up(&plan.dir, started.cgroup.as_ref()).await;
    state::remove_all_files(&plan.dir);
    let message = if words.is_empty() || message.contains(&words) {
        message
    } else {
        format!("{message}: {words}")
    };
    failed(step)(message)
}

/// Prepares and starts the process. Blocking.
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
    spawn_in(tools, plan, cgroup.clone(), fences, runtime).inspect_err(|_| {
        runtime.block_on(clean_up(&plan.dir, cgroup.as_ref()));
        state::remove_all_files(&plan.dir);
    })
}

/// How this plan's Firecracker is set apart, and what that says of the fences.
fn apart(tools: &Tools, plan: &LaunchPlan, fences: &mut Vec<String>) -> Apart {
    match (plan.fence.uid_gid, &tools.jailer) {
        (Some((uid, gid)), Ok(_)) => {
            fences.push(format!(
                "Firecracker's jailer: own root directory, user {uid}, group {gid}"
            ));
            Apart::Jailed(uid, gid)
        }
        (Some((uid, gid)), Err(reason)) => {
            fences.push(format!("no root directory of its own: {reason}"));
            Apart::Fenced(uid, gid)
        }
        (None, _) => {
            fences.push("no user or root directory of its own: the node may not give it".into());
            Apart::Same
        }
    }
}

fn spawn_in(
    tools: &Tools,
    plan: &LaunchPlan,
    cgroup: Option<Cgroup>,
    mut fences: Vec<String>,
    runtime: &tokio::runtime::Handle,
) -> Result<Started, VmmError> {
    state::remove_all_files(&plan.dir);
    let apart = apart(tools, plan, &mut fences);
    let mut stage = Stage::make(&plan.dir, apart, &tools.program_name, plan.id.as_ref())?;
    let mut launch = Launch::new(match (&apart, &tools.jailer) {
        (Apart::Jailed(..), Ok(jailer)) => jailer,
        _ => &tools.program,
    });
    launch.args = arguments(tools, plan, apart, &stage);
    launch.working_dir = stage.root().to_owned();
    show_files(plan, &mut stage, &mut launch)?;
    launch.binds = stage.take_binds();
    let sets_apart = apart.user().is_some();
    (launch.own_processes, launch.own_network) = (sets_apart, sets_apart);
    match apart {
        Apart::Jailed(..) => launch.keep_capabilities = true,
        Apart::Fenced(uid, gid) => {
            launch.uid_gid = Some((uid, gid));
            launch.groups = kvm_group();
        }
        Apart::Same => {}
    }
    let memory =
        |error: io::Error| failed("making room for Firecracker's output")(error.to_string());
    let errors = OutputBox::new(OUTPUT_BOX).map_err(memory)?;
    launch.errors = Some(errors.writer().map_err(memory)?);
    let (mut pipe, mut in_memory) = (None, None);
    launch.output = Some(match plan.start {
        Start::Nanos(_) => {
            let path = plan.dir.join(state::OUTPUT_PIPE);
            let both = output_pipe(&path).map_err(io_error("making the pipe", &path))?;
            let copy = both.try_clone().map_err(memory)?;
            pipe = Some(both);
            copy
        }
        Start::Linux(_) | Start::Fork(_) if tools.version.limits_serial() => {
            let path = plan.dir.join(state::LIVE_CONSOLE);
            let (_, writer) = Console::create(&plan.dir).map_err(io_error("making", &path))?;
            writer
        }
        Start::Linux(_) | Start::Fork(_) => {
            let output = OutputBox::new(BOX_MAX).map_err(memory)?;
            in_memory = Some(output.writer().map_err(memory)?);
            output.writer().map_err(memory)?
        }
    });
    launch.cgroup = cgroup.clone();
    launch.oom_score_adj = OOM_SCORE;
    if apart == Apart::Same {
        launch.rlimits.push((Rlimit::Descriptors, DESCRIPTORS_MAX));
    }
    if cgroup.is_none() {
        let bytes = plan.fence.memory_max.0.saturating_add(ADDRESS_SPACE_BEYOND);
        launch.rlimits.push((Rlimit::AddressSpace, bytes));
        fences.push(format!("address space at most {} MiB", bytes >> 20));
        fences.push("no limit on processes: no cgroup may be made here".to_owned());
    }
    let Launched {
        process,
        fences: held,
    } = launch
        .start()
        .map_err(|error: LaunchError| failed("starting Firecracker")(told(&error)))?;
    fences.extend(held);
    let network = match start_network(tools, plan, apart, &process, cgroup.as_ref()) {
        Ok(network) => network,
        Err(error) => {
            runtime.block_on(end_unknown(&process, plan));
            return Err(error);
        }
    };
    if network.is_some() {
        fences.push(FENCES.to_owned());
    }
    let backend = BackendRecord {
        cgroup: cgroup
            .as_ref()
            .map(|cgroup| cgroup.dirs().to_vec())
            .unwrap_or_default(),
        root: stage.root().to_owned(),
        writable_disks: plan
            .disks
            .iter()
            .filter(|disk| !disk.read_only)
            .map(|disk| disk.path.clone())
            .collect(),
        unikernel: matches!(plan.start, Start::Nanos(_)),
        capture: plan.capturable.then(|| super::info(tools, plan)),
        shape: (!matches!(plan.start, Start::Nanos(_))
            && !plan.huge_pages
            && tools.version.resets_forks_vsock())
        .then(|| super::info(tools, plan)),
        network: network.as_ref().map(Helper::record),
    };
    let noted = serde_json::to_value(&backend).and_then(|value| {
        let record = VmRecord {
            kind: VmmKind::Firecracker,
            pid: process.identity().pid,
            pid_start_ticks: process.identity().start_ticks,
            boot_id: process.identity().boot_id.clone(),
            fences,
            backend: value,
        };
        state::write_launch(&plan.dir, &record).map_err(serde_json::Error::io)?;
        Ok(record)
    });
    match noted {
        Ok(record) => Ok(Started {
            process,
            errors,
            record,
            backend,
            cgroup,
            pipe,
            in_memory,
            network,
        }),
        Err(error) => {
            runtime.block_on(end_unknown(&process, plan));
            Err(failed("noting the launch")(error.to_string()))
        }
    }
}

/// Ends a Firecracker that nobody can ever take over. What is its is removed only then.
async fn end_unknown(process: &ProcessHandle, plan: &LaunchPlan) {
    if let Err(error) = process.kill() {
        tracing::error!(%error, id = %plan.id, "a Firecracker that nobody knows cannot be killed");
    }
    await_end(process, plan).await;
}

/// Waits until a killed process is gone, and not for ever: one that the kernel holds may stay.
async fn await_end(process: &ProcessHandle, plan: &LaunchPlan) {
    match tokio::time::timeout(CLEANUP_LIMIT, process.wait()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::error!(%error, id = %plan.id, "a Firecracker that did not start cannot be watched");
        }
        Err(_) => {
            tracing::error!(id = %plan.id, "a Firecracker that did not start does not end");
        }
    }
}

/// Gives the machine its network, where it is to have one.
fn start_network(
    tools: &Tools,
    plan: &LaunchPlan,
    apart: Apart,
    process: &ProcessHandle,
    cgroup: Option<&Cgroup>,
) -> Result<Option<Helper>, VmmError> {
    // Both have been looked at before anything was started.
    let (Some(_), Some((uid, _)), Ok(network)) = (&plan.nic, apart.user(), &tools.network) else {
        return Ok(None);
    };
    network.start(plan, uid, process, cgroup, OOM_SCORE)
}

fn told(error: &LaunchError) -> String {
    format!("{error}: {}", error.source)
}

/// The device's group, where that is not root's: KVM is offered only if everybody may open the device then.
fn kvm_group() -> Vec<u32> {
    use std::os::unix::fs::MetadataExt;
    let group = std::fs::metadata("/dev/kvm").map(|data| data.gid());
    group.ok().filter(|gid| *gid != 0).into_iter().collect()
}

fn arguments(tools: &Tools, plan: &LaunchPlan, apart: Apart, stage: &Stage) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    if let Apart::Jailed(uid, gid) = apart {
        for (name, value) in [
            ("--id", OsString::from(plan.id.to_string())),
            ("--exec-file", tools.program.clone().into()),
            ("--uid", uid.to_string().into()),
            ("--gid", gid.to_string().into()),
            ("--chroot-base-dir", stage.base().into()),
            (
                "--resource-limit",
                format!("no-file={DESCRIPTORS_MAX}").into(),
            ),
        ] {
            args.extend([name.into(), value]);
        }
        args.push("--".into());
    } else {
        args.extend(["--id".into(), plan.id.to_string().into()]);
    }
    for word in [
        "--api-sock",
        api::API_SOCKET,
        "--log-path",
        super::vm::LOG,
        // Its last line at this level is how a later node knows that all went well. What a guest makes it log is trimmed.
        "--level",
        "Info",
    ] {
        args.push(word.into());
    }
    args
}

/// Puts the machine's files where Firecracker finds them.
fn show_files(plan: &LaunchPlan, stage: &mut Stage, launch: &mut Launch) -> Result<(), VmmError> {
    // Firecracker 1.8 opens its log, and does not make it.
    stage.write(super::vm::LOG, &mut std::io::empty())?;
    match &plan.start {
        Start::Linux(boot) => {
            stage.show(KERNEL, &boot.kernel, Belongs::ToMany)?;
            stage.show(INITRAMFS, &boot.initramfs, Belongs::ToMany)?;
        }
        Start::Nanos(boot) => show_nanos(&boot.kernel, stage)?,
        Start::Fork(capture) => {
            let file = |result: io::Result<File>| {
                result.map_err(|error| failed("taking the capture")(error.to_string()))
            };
            stage.write(SNAPSHOT_STATE, &mut file(capture.state())?)?;
            // The only descriptor that the jailer leaves.
            launch.input = Some(file(capture.memory())?);
            launch.proc_at = stage.show_own_descriptors()?;
        }
    }
    for (index, disk) in plan.disks.iter().enumerate() {
        let belongs = if disk.read_only {
            Belongs::ToMany
        } else {
            Belongs::ToMachine
        };
        stage.show(&disk_name(index), &disk.path, belongs)?;
    }
    Ok(())
}

/// Firecracker prefers a kernel's PVH entry, which Nanos' does not survive: it sees a copy without one, unless the kernel has
/// none to begin with.
fn show_nanos(kernel: &Path, stage: &mut Stage) -> Result<(), VmmError> {
    use std::io::Read;
    let mut bytes = Vec::new();
    File::open(kernel)
        .and_then(|file| {
            let limit = KERNEL_BYTES_MAX as u64 + 1;
            file.take(limit).read_to_end(&mut bytes)
        })
        .map_err(io_error("reading", kernel))?;
    if bytes.len() > KERNEL_BYTES_MAX {
        return Err(failed("reading the kernel")(
            "it is larger than any kernel".to_owned(),
        ));
    }
    let fit = neutralise_pvh_note(&bytes)
        .map_err(|error| failed("reading the kernel")(error.to_string()))?;
    if fit == bytes {
        return stage.show(KERNEL, kernel, Belongs::ToMany);
    }
    stage.write(KERNEL, &mut fit.as_slice())
}

/// A named pipe, open at both its ends: so it is never without a reader.
fn output_pipe(path: &Path) -> io::Result<File> {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let both = File::options().read(true).write(true).open(path)?;
    // Some systems bound what a user may have in pipes; it is less then.
    let _ = rustix::pipe::fcntl_setpipe_size(&both, OUTPUT_PIPE_BYTES);
    Ok(both)
}

/// The files of a capture, as Firecracker has written them, copied to files in memory that can be sealed.
pub(super) fn copy_to_memory(from: &File, len_max: u64) -> io::Result<File> {
    use std::os::unix::fs::FileExt;
    const PIECE: usize = 256 << 10;
    const PAGE: usize = 4096;
    const ZEROS: [u8; PAGE] = [0; PAGE];
    let len = from.metadata()?.len();
    if len > len_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let to = files::sealable_memory_file(len)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = files::next_data(from, at, len)? {
        at = start;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            from.read_exact_at(&mut piece[..want], at)?;
            // Page by page: what is zero takes no memory.
            for (index, page) in piece[..want].chunks(PAGE).enumerate() {
                if *page != ZEROS[..page.len()] {
                    to.write_all_at(page, at + (index * PAGE) as u64)?;
                }
            }
            at += want as u64;
        }
    }
    Ok(to)
}
