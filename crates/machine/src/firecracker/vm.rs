//! One running Firecracker, its supervisor, and its end.
//!
//! ```text
//! running ◄──► paused        (pause, resume: the process is held, see [`FirecrackerVm::hold`])
//!    │            │
//!    ▼            ▼
//! process gone (the guest's end is Firecracker's; or by kill, or by itself): the end is read from its exit status, its log
//! and the guest's console, and noted; cgroup and directory are removed, the end is told
//! ```
//! The supervisor is a task of this handle and goes with it; the machine does not. An end is decided once, by whoever is
//! first ([`Inner::decide`]). Firecracker has no state in which it waits to be asked what happened: all that its end is told
//! by lies in files, so that a later process can tell it as well.

use super::api::{Api, ApiError};
use super::channel;
use super::console::{Console, panic_message};
use super::state::{self, BackendRecord};
use super::{io_error, network};
use crate::{
    AtRest, BalloonReport, Capture, CaptureInfo, ChannelStream, OutputStream, Quiet, Snapshot, Vm,
    VmEnd, VmRecord, VmUsage, VmmError,
};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use vistara_host::cgroup::Cgroup;
use vistara_host::facts;
use vistara_host::files::{self, OutputBox};
use vistara_host::process::{ProcessEnd, ProcessHandle};

/// Firecracker's log, in its directory.
pub(super) const LOG: &str = "log";

/// How long a cgroup may take to go.
pub(super) const CLEANUP_LIMIT: Duration = Duration::from_secs(5);
/// How long a kill may take in all: the kernel frees a guest of some GiB in well under a second.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long a process may take to stand still.
const HOLD_LIMIT: Duration = Duration::from_secs(5);
/// How long after its API has gone silent Firecracker may take to be gone itself.
const GONE_LIMIT: Duration = Duration::from_secs(1);
/// How often the sizes of console and log, and the room on the host's disk, are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// Room on the host below which a guest's writes will soon fail.
const ROOM_MIN: u64 = 16 << 20;
/// Bytes of log beyond which its beginning is given back.
const LOG_MAX: u64 = 1 << 20;
/// Bytes of the log's end that are looked at.
const LOG_TAIL: u64 = 8 << 10;
/// How much of what Firecracker said is told when it fails.
const TOLD: usize = 2_000;

/// Parts of a running machine.
pub(super) struct Parts {
    pub(super) dir: PathBuf,
    pub(super) record: VmRecord,
    pub(super) backend: BackendRecord,
    pub(super) process: ProcessHandle,
    pub(super) errors: Option<OutputBox>,
    pub(super) console: Console,
    /// The reader's end of a unikernel's output; held so that what it printed outlasts the machine.
    pub(super) printed: Option<File>,
    /// What gives it a network, where something shall; nothing in it where that was gone already when the machine was taken
    /// over.
    pub(super) network: Option<Option<ProcessHandle>>,
}

/// A machine in Firecracker.
pub(super) struct FirecrackerVm {
    pub(super) inner: Arc<Inner>,
    supervisor: JoinHandle<()>,
}

impl Drop for FirecrackerVm {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

pub(super) struct Inner {
    pub(super) parts: Parts,
    pub(super) api: Api,
    /// Whether the whole process is held.
    pub(super) held: AtomicBool,
    /// The agent's channel, as it was opened last.
    channel: Mutex<Option<OwnedFd>>,
    trouble: Mutex<Option<String>>,
    network_lost: AtomicBool,
    decided: Mutex<Option<VmEnd>>,
    end: watch::Sender<Option<VmEnd>>,
}

/// The value behind a lock that a panicking thread may have left: every value here is whole at any time.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FirecrackerVm {
    /// Takes a running machine, and supervises it.
    pub(super) fn new(parts: Parts) -> FirecrackerVm {
        let inner = Arc::new(Inner {
            api: Api::new(&parts.backend.root),
            parts,
            held: AtomicBool::new(false),
            channel: Mutex::new(None),
            trouble: Mutex::new(None),
            network_lost: AtomicBool::new(false),
            decided: Mutex::new(None),
            end: watch::Sender::new(None),
        });
        let supervisor = tokio::spawn(supervise(inner.clone()));
        FirecrackerVm { inner, supervisor }
    }

    fn ended(&self) -> bool {
        self.inner.end.borrow().is_some()
    }

    /// Holds the whole process. Firecracker's own pause would do, but that a vsock of version 1.16 hears nothing any more after
    /// it: it then waits for the guest to confirm a reset that only a snapshot sends.
    async fn hold(&self) -> Result<(), VmmError> {
        let held = self.inner.parts.process.hold(HOLD_LIMIT).await;
        held.map_err(|error| VmmError::Control {
            operation: "pause",
            message: error.to_string(),
        })?;
        self.inner.held.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn go_on(&self) -> Result<(), VmmError> {
        let going = self.inner.parts.process.go_on();
        going.map_err(|error| VmmError::Control {
            operation: "resume",
            message: error.to_string(),
        })?;
        self.inner.held.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// What a machine that goes on from this one must have in common with it.
    pub(super) fn snapshot_of(&self) -> Result<&CaptureInfo, VmmError> {
        let parts = &self.inner.parts;
        parts.backend.shape.as_ref().ok_or_else(|| {
            let why = match parts.backend.unikernel {
                true => "a unikernel",
                false => {
                    "a machine with huge pages, one in a Firecracker older than 1.10, or one that an earlier version of this program started"
                }
            };
            VmmError::Unsupported {
                kind: parts.record.kind,
                reason: format!("capturing {why}"),
            }
        })
    }

    /// Closes the agent's channel at this end: it is dead, and whoever has it would find that out only by and by.
    pub(super) fn close_channel(&self) {
        if let Some(channel) = locked(&self.inner.channel).take() {
            // It may be closed already.
            let _ = rustix::net::shutdown(&channel, rustix::net::Shutdown::Both);
        }
    }

    /// What a request's failure means for the machine.
    pub(super) async fn control(&self, operation: &'static str, error: ApiError) -> VmmError {
        if let ApiError::Gone(_) = error
            && tokio::time::timeout(GONE_LIMIT, self.inner.parts.process.wait())
                .await
                .is_ok()
        {
            // Whoever asked for something else hears why it is not done only here.
            if let Ok(end) = tokio::time::timeout(GONE_LIMIT, self.told()).await {
                tracing::warn!(operation, ?end, dir = %self.inner.parts.dir.display(), "Firecracker has ended over a request");
            }
            return VmmError::Ended;
        }
        if locked(&self.inner.decided).is_some() {
            return VmmError::Ended;
        }
        VmmError::Control {
            operation,
            message: error.to_string(),
        }
    }

    async fn told(&self) -> VmEnd {
        let mut end = self.inner.end.subscribe();
        loop {
            if let Some(end) = end.borrow_and_update().clone() {
                return end;
            }
            if end.changed().await.is_err() {
                // The sender lives in `self`.
                return VmEnd::Crashed {
                    message: "its supervisor is gone".to_owned(),
                };
            }
        }
    }
}

async fn supervise(inner: Arc<Inner>) {
    let end = {
        let mut gone = std::pin::pin!(inner.parts.process.wait());
        let mut lost = std::pin::pin!(lose_network(&inner));
        loop {
            tokio::select! {
                end = &mut gone => break end,
                () = &mut lost => {}
                () = tokio::time::sleep(HOUSEKEEPING) => keep_house(&inner).await,
            }
        }
    };
    let reader = inner.clone();
    let read = tokio::task::spawn_blocking(move || {
        let parts = &reader.parts;
        let errors = parts.errors.as_ref();
        let complaint = errors.map_or(String::new(), |errors| errors.tail(TOLD));
        let end = read_end(end, &parts.backend, &parts.console, &complaint);
        reader.decide(end);
        if let Err(error) = parts.console.keep() {
            tracing::warn!(%error, dir = %parts.dir.display(), "a machine's console could not be kept");
        }
    });
    if let Err(error) = read.await {
        inner.decide(VmEnd::Crashed {
            message: format!("nobody could see how it ended: {error}"),
        });
    }
    let cgroup = (!inner.parts.backend.cgroup.is_empty())
        .then(|| Cgroup::from_dirs(inner.parts.backend.cgroup.clone()));
    clean_up(&inner.parts.dir, cgroup.as_ref()).await;
    let end = locked(&inner.decided).clone();
    inner.end.send_replace(end);
}

/// Ends what goes with a machine whose process is gone. Failures are logged: there is nobody to mend them.
pub(super) async fn clean_up(dir: &Path, cgroup: Option<&Cgroup>) {
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup.destroy(CLEANUP_LIMIT).await
    {
        tracing::warn!(%error, dirs = ?cgroup.dirs(), "a machine's cgroup stays");
    }
    let dir = dir.to_owned();
    let removed = tokio::task::spawn_blocking(move || state::remove_live_files(&dir));
    if let Err(error) = removed.await {
        tracing::warn!(%error, "a machine's files could not be removed");
    }
}

/// Notes the end of what gives the machine its network. Never comes back.
async fn lose_network(inner: &Inner) {
    if let Some(helper) = &inner.parts.network {
        if let Some(helper) = helper {
            // One that cannot be watched is as one that works.
            if helper.wait().await.is_err() {
                std::future::pending::<()>().await;
            }
            // It ends with the machine, a moment before.
            tokio::time::sleep(GONE_LIMIT).await;
        }
        tracing::warn!(dir = %inner.parts.dir.display(), "what gave a machine its network has ended");
        inner.network_lost.store(true, Ordering::Relaxed);
    }
    std::future::pending().await
}

async fn keep_house(inner: &Arc<Inner>) {
    let keeper = inner.clone();
    let kept = tokio::task::spawn_blocking(move || {
        let parts = &keeper.parts;
        parts.console.trim();
        trim_log(&parts.backend.root);
        if parts.network.is_some() {
            network::keep_resolver(&parts.dir);
        }
        let full = |disk: &PathBuf| facts::disk_free(disk).is_ok_and(|free| free < ROOM_MIN);
        let full = parts.backend.writable_disks.iter().any(full);
        let text = "the host's disk is full; what the guest writes to its disk fails";
        *locked(&keeper.trouble) = full.then(|| text.to_owned());
    });
    if let Err(error) = kept.await {
        tracing::warn!(%error, "a machine's files could not be looked at");
    }
}

/// Gives the log's beginning back to the file system.
fn trim_log(root: &Path) {
    use rustix::fs::{FallocateFlags, fallocate};
    let path = root.join(LOG);
    let large = |data: std::fs::Metadata| data.is_file() && data.blocks() * 512 > LOG_MAX;
    if !std::fs::symlink_metadata(&path).is_ok_and(large) {
        return;
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let trimmed = files::open_foreign_to_change(root, LOG).and_then(|file| {
        let len = file.metadata()?.len().saturating_sub(LOG_TAIL);
        Ok(fallocate(&file, flags, 0, len)?)
    });
    if let Err(error) = trimmed {
        tracing::warn!(%error, root = %root.display(), "a monitor's log could not be trimmed");
    }
}

/// The end of Firecracker's log. It is Firecracker's own: nothing in it is believed that would matter to others.
pub(super) struct LogTail(String);

pub(super) fn log_tail(root: &Path) -> LogTail {
    let read = || {
        let file = files::open_foreign(root, LOG)?;
        let len = file.metadata()?.len();
        let start = len.saturating_sub(LOG_TAIL);
        let mut bytes = vec![0; usize::try_from(len - start).unwrap_or(0)];
        let got = file.read_at(&mut bytes, start)?;
        bytes.truncate(got);
        Ok::<_, std::io::Error>(bytes)
    };
    LogTail(String::from_utf8_lossy(&read().unwrap_or_default()).into_owned())
}

impl LogTail {
    /// Whether the last it did was to end as it should.
    fn ended_well(&self) -> bool {
        self.0.contains("exiting successfully. exit_code=0")
    }

    /// Whether it ended by a triple fault of the guest's: how Nanos, and a Linux that was told so, restarts.
    fn triple_fault(&self) -> bool {
        // Before 1.16 in other words.
        self.0.contains("exit reason on vcpu run: Shutdown")
            || self.0.contains("Received KVM_EXIT_SHUTDOWN signal")
    }

    /// Its last lines, without their times and without what is said of every request.
    pub(super) fn complaints(&self) -> String {
        let lines: Vec<&str> = self
            .0
            .lines()
            .filter(|line| {
                let noise = [
                    "API call duration",
                    "request was executed",
                    "The API server received",
                    "Running Firecracker",
                    "Listening on API",
                    "API server started",
                    "exit_code=",
                ];
                !noise.iter().any(|words| line.contains(words))
            })
            .map(|line| line.split_once("] ").map_or(line, |(_, words)| words))
            .collect();
        let text = lines[lines.len().saturating_sub(8)..].join("; ");
        text.chars().take(TOLD).collect()
    }
}

/// How a machine whose process is gone has ended. Blocks on files.
pub(super) fn read_end(
    end: std::io::Result<ProcessEnd>,
    backend: &BackendRecord,
    console: &Console,
    complaint: &str,
) -> VmEnd {
    let log = log_tail(&backend.root);
    let (reset, fault) = match end {
        Ok(ProcessEnd::Exited(code)) => (code == 0, log.triple_fault()),
        Ok(ProcessEnd::Signaled(_)) => (false, false),
        // It was another process's child: only its log can tell.
        Ok(ProcessEnd::Unknown) | Err(_) => (log.ended_well(), log.triple_fault()),
    };
    match (backend.unikernel, reset, fault) {
        // Its kernel restarts by a triple fault when its program has ended, which Firecracker sometimes calls an error and
        // sometimes not. When the kernel itself has failed it tells a device of QEMU's, which is not here, and then resets the
        // machine by the keyboard controller.
        (true, _, true) => return VmEnd::GuestOff,
        (true, true, false) => {
            return VmEnd::GuestPanic {
                message: "the unikernel's kernel failed".to_owned(),
            };
        }
        // A panic ends in a reboot as well.
        (false, true, _) | (false, _, true) => {
            return match panic_message(&console.last(usize::MAX)) {
                Some(message) => VmEnd::GuestPanic { message },
                None => VmEnd::GuestOff,
            };
        }
        (_, false, false) => {}
    }
    let how = match end {
        Ok(ProcessEnd::Exited(code)) => format!("Firecracker ended with exit code {code}"),
        Ok(ProcessEnd::Signaled(signal)) => format!("Firecracker was ended by signal {signal}"),
        Ok(ProcessEnd::Unknown) => "Firecracker is gone, nobody saw how".to_owned(),
        Err(error) => format!("Firecracker cannot be watched: {error}"),
    };
    let over_limit = Cgroup::from_dirs(backend.cgroup.clone())
        .out_of_memory_kills()
        .is_some_and(|kills| kills > 0);
    let reason = if over_limit {
        " because the machine exceeded its memory limit on the host"
    } else {
        ""
    };
    let complaints = log.complaints();
    let words: Vec<&str> = [complaint, &complaints]
        .into_iter()
        .filter(|words| !words.is_empty())
        .collect();
    let words = if words.is_empty() {
        String::new()
    } else {
        format!(": {}", words.join("; "))
    };
    VmEnd::Crashed {
        message: format!("{how}{reason}{words}"),
    }
}

impl Inner {
    /// The machine's end, unless it has one already. Noted on disk at once.
    fn decide(&self, end: VmEnd) {
        let mut decided = locked(&self.decided);
        if decided.is_none() {
            state::write_end(&self.parts.dir, &end);
            *decided = Some(end);
        }
    }
}

#[async_trait::async_trait]
impl Vm for FirecrackerVm {
    fn record(&self) -> &VmRecord {
        &self.inner.parts.record
    }

    async fn open_channel(&self) -> Result<ChannelStream, VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        let parts = &self.inner.parts;
        if parts.backend.unikernel {
            return Err(VmmError::Unsupported {
                kind: parts.record.kind,
                reason: "there is no agent in a unikernel".to_owned(),
            });
        }
        tokio::select! {
            biased;
            _ = self.told() => Err(VmmError::Ended),
            opened = channel::open(&parts.backend.root) => {
                let opened = opened.map_err(|_| VmmError::Control {
                    operation: "opening the agent's channel",
                    message: format!("nobody listens in the guest after {:?}", channel::OPEN_LIMIT),
                })?;
                // Where there is no descriptor left for it, a snapshot's end is found out later.
                *locked(&self.inner.channel) = opened.as_fd().try_clone_to_owned().ok();
                Ok(opened)
            }
        }
    }

    fn open_output(&self) -> Result<OutputStream, VmmError> {
        let parts = &self.inner.parts;
        let Some(printed) = &parts.printed else {
            return Err(VmmError::Unsupported {
                kind: parts.record.kind,
                reason: "a guest with an agent has no output of its own".to_owned(),
            });
        };
        let path = parts.dir.join(state::OUTPUT_PIPE);
        printed
            .try_clone()
            .and_then(OutputStream::from_file)
            .map_err(io_error("opening", &path))
    }

    async fn pause(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        self.hold().await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        self.go_on()
    }

    async fn capture(&self) -> Result<Capture, VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        super::snapshot::capture(self).await
    }

    fn can_snapshot(&self) -> Result<(), VmmError> {
        self.snapshot_of().map(drop)
    }

    async fn snapshot(&self, quiet: Quiet, at_rest: AtRest) -> Result<Snapshot, VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        super::snapshot::snapshot(self, quiet, at_rest).await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Ok(());
        }
        let process = PathBuf::from(format!("/proc/{}", self.inner.parts.record.pid));
        self.inner.decide(VmEnd::Killed);
        self.inner
            .parts
            .process
            .kill()
            .map_err(io_error("killing", &process))?;
        match tokio::time::timeout(KILL_LIMIT, self.told()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(io_error("killing", &process)(
                std::io::ErrorKind::TimedOut.into(),
            )),
        }
    }

    async fn wait(&self) -> VmEnd {
        self.told().await
    }

    async fn console(&self, limit: usize) -> Vec<u8> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || inner.parts.console.last(limit))
            .await
            .unwrap_or_default()
    }

    fn usage(&self) -> VmUsage {
        if self.ended() || self.inner.parts.process.known_end().is_some() {
            return VmUsage::default();
        }
        facts::process_usage(self.inner.parts.record.pid).map_or(VmUsage::default(), |usage| {
            VmUsage {
                resident_bytes: usage.resident_bytes,
                cpu_time: usage.cpu_time,
            }
        })
    }

    async fn balloon(&self) -> Option<BalloonReport> {
        if self.ended() || self.inner.parts.backend.unikernel {
            return None;
        }
        let told = self.inner.api.balloon().await.ok()?;
        let bytes = |mib: u64| mib.saturating_mul(1 << 20);
        Some(BalloonReport {
            target: bytes(told.target_mib),
            held: bytes(told.actual_mib),
            free: told.free_memory,
            available: told.available_memory,
            caches: told.disk_caches,
            major_faults: told.major_faults,
        })
    }

    fn trouble(&self) -> Option<String> {
        if self.ended() {
            return None;
        }
        let lost = "its network is gone, since slirp4netns has ended; start the machine again";
        let network = self.inner.network_lost.load(Ordering::Relaxed);
        network
            .then(|| lost.to_owned())
            .or_else(|| locked(&self.inner.trouble).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unikernels_end_is_read_from_the_log_in_the_words_of_each_version() {
        let dir = tempfile::tempdir().unwrap();
        let backend = BackendRecord {
            root: dir.path().to_owned(),
            unikernel: true,
            ..BackendRecord::default()
        };
        let console = Console::open(dir.path());
        let end = |log: &str, code: i32| {
            std::fs::write(dir.path().join(LOG), log).unwrap();
            read_end(Ok(ProcessEnd::Exited(code)), &backend, &console, "")
        };
        let good = "Firecracker exiting successfully. exit_code=0";
        for (fault, code) in [
            (
                "[i:fc_vcpu 0] Unexpected exit reason on vcpu run: Shutdown",
                1,
            ),
            ("[i:fc_vcpu 0] Received KVM_EXIT_SHUTDOWN signal", 0),
        ] {
            assert_eq!(end(&format!("{fault}\n{good}\n"), code), VmEnd::GuestOff);
        }
        let reset = end(&format!("[i:main] Vmm is stopping.\n{good}\n"), 0);
        assert!(matches!(reset, VmEnd::GuestPanic { .. }), "{reset:?}");
        let crash = end(
            "[i:main] Shutting down VM after intercepting signal 31",
            148,
        );
        assert!(matches!(crash, VmEnd::Crashed { .. }), "{crash:?}");
    }
}
