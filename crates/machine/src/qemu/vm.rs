//! One running QEMU, its supervisor, and its end.
//!
//! ```text
//! running ◄──► paused        (pause, resume; a full host disk pauses too, and we resume when there is room)
//!    │            │
//!    ▼            ▼
//! guest over: QEMU waits, we read its console, note the end, and say quit
//!    │
//!    ▼
//! process gone (also by kill, or by itself): helpers, cgroup and sockets are removed, the end is told
//! ```
//! The supervisor is a task of this handle and goes with it; the machine does not. An end is decided once, by whoever is
//! first ([`Inner::decide`]), and noted on disk before QEMU is told to go.

use super::console::ConsoleTail;
use super::qmp::{Qmp, QmpError, RunState};
use super::state::{self, BackendRecord};
use super::{command, io_error};
use crate::{
    AtRest, Capture, CaptureInfo, ChannelStream, OutputStream, Quiet, Snapshot, Vm, VmEnd,
    VmRecord, VmUsage, VmmError, resolver,
};
use std::convert::Infallible;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use vistara_host::cgroup::Cgroup;
use vistara_host::files::OutputBox;
use vistara_host::process::{ProcessEnd, ProcessHandle};
use vistara_host::{facts, sockets};

/// How long QEMU may take to go after it was told to, before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(5);
/// How long each of the things that go with a machine may take to go.
pub(super) const CLEANUP_LIMIT: Duration = Duration::from_secs(5);
/// How long a kill may take in all: the kernel frees a guest of some GiB in well under a second.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked whether a unikernel's last words have been read; only after its end.
const OUTPUT_LOOK: Duration = Duration::from_millis(5);
/// How often a full disk is looked at; only while it is full.
const FULL_DISK_POLL: Duration = Duration::from_secs(1);
/// How long after a question for the machine's state that had no answer it is asked again. What rang may have been the
/// last event that QEMU sends, so nothing else would; a host that is too busy to answer should not be asked more often.
const STATUS_RETRY: Duration = Duration::from_secs(1);
/// How often it is looked whether the host has other name servers.
const RESOLVER_LOOK: Duration = Duration::from_secs(5);
/// Room on the host from which a guest that waits for it goes on.
const ROOM_MIN: u64 = 16 << 20;
/// How much of what QEMU printed is told when it fails.
pub(super) const OUTPUT_TOLD: usize = 2_000;

/// Parts of a running machine.
pub(super) struct Parts {
    pub(super) dir: PathBuf,
    pub(super) record: VmRecord,
    pub(super) backend: BackendRecord,
    pub(super) process: ProcessHandle,
    pub(super) helpers: Vec<ProcessHandle>,
    pub(super) output: Option<OutputBox>,
    /// The reader's end of a unikernel's output; held so that what it printed outlasts the machine.
    pub(super) printed: Option<File>,
    /// What a capture is made of, in a machine that is to be captured.
    pub(super) capture: Option<(CaptureInfo, CaptureFiles)>,
}

/// The files into which a machine that is to be captured writes itself.
pub(super) struct CaptureFiles {
    /// Its memory.
    pub(super) memory: File,
    /// Everything else.
    pub(super) state: File,
}

/// A machine in QEMU.
pub(super) struct QemuVm {
    pub(super) inner: Arc<Inner>,
    supervisor: JoinHandle<()>,
}

impl Drop for QemuVm {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

pub(super) struct Inner {
    pub(super) parts: Parts,
    pub(super) qmp: Qmp,
    console: tokio::sync::Mutex<ConsoleTail>,
    /// The owner wants the guest held, so that nobody else lets it go on.
    pub(super) held: AtomicBool,
    trouble: Mutex<Option<String>>,
    decided: Mutex<Option<VmEnd>>,
    end: watch::Sender<Option<VmEnd>>,
}

/// The value behind a lock that a panicking thread may have left: every value here is whole at any time.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QemuVm {
    /// Takes a running machine with its connected QMP, and supervises it.
    pub(super) fn new(parts: Parts, qmp: Qmp, held: bool) -> QemuVm {
        let console = ConsoleTail::new(state::read_console(&parts.dir));
        let inner = Arc::new(Inner {
            parts,
            qmp,
            console: tokio::sync::Mutex::new(console),
            held: AtomicBool::new(held),
            trouble: Mutex::new(None),
            decided: Mutex::new(None),
            end: watch::Sender::new(None),
        });
        let supervisor = tokio::spawn(supervise(inner.clone()));
        QemuVm { inner, supervisor }
    }

    fn ended(&self) -> bool {
        self.inner.end.borrow().is_some()
    }

    pub(super) fn control(&self, operation: &'static str) -> impl Fn(QmpError) -> VmmError + '_ {
        move |error| match error {
            QmpError::Closed => VmmError::Ended,
            error if locked(&self.inner.decided).is_some() => {
                tracing::debug!(%error, operation, "asked of a machine at its end");
                VmmError::Ended
            }
            error => VmmError::Control {
                operation,
                message: error.to_string(),
            },
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
    let guest_is_over = tokio::select! {
        end = inner.parts.process.wait() => {
            inner.process_is_over(end);
            false
        }
        () = inner.watch_guest() => true,
        never = inner.keep_resolver() => match never {},
    };
    if guest_is_over {
        tokio::select! {
            () = inner.output_is_read() => {}
            // It was killed meanwhile; there is nobody to ask then.
            _ = inner.parts.process.wait() => {}
        }
        if let Err(error) = inner.qmp.quit().await {
            tracing::warn!(%error, pid = inner.parts.record.pid, "QEMU would not quit");
        }
        let gone = tokio::time::timeout(QUIT_LIMIT, inner.parts.process.wait()).await;
        if gone.is_err() {
            if let Err(error) = inner.parts.process.kill() {
                tracing::error!(%error, pid = inner.parts.record.pid, "QEMU cannot be killed");
            }
            if let Err(error) = inner.parts.process.wait().await {
                tracing::error!(%error, pid = inner.parts.record.pid, "QEMU cannot be watched");
            }
        }
    }
    let cgroup = (!inner.parts.backend.cgroup.is_empty())
        .then(|| Cgroup::from_dirs(inner.parts.backend.cgroup.clone()));
    clean_up(&inner.parts.helpers, cgroup.as_ref()).await;
    state::remove_live_files(&inner.parts.dir);
    let end = locked(&inner.decided).clone();
    inner.end.send_replace(end);
}

/// Ends what goes with a machine: helper processes, then its cgroup. Failures are logged: there is nobody to mend them.
pub(super) async fn clean_up(helpers: &[ProcessHandle], cgroup: Option<&Cgroup>) {
    for helper in helpers {
        let pid = helper.identity().pid;
        if let Err(error) = helper.kill() {
            tracing::warn!(%error, pid, "a helper of a machine cannot be killed");
            continue;
        }
        if tokio::time::timeout(CLEANUP_LIMIT, helper.wait())
            .await
            .is_err()
        {
            tracing::warn!(pid, "a helper of a machine does not go");
        }
    }
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup.destroy(CLEANUP_LIMIT).await
    {
        tracing::warn!(%error, dirs = ?cgroup.dirs(), "a machine's cgroup stays");
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

    fn process_is_over(&self, end: std::io::Result<ProcessEnd>) {
        if let (Some(_), Ok(ProcessEnd::Exited(status))) = (&self.parts.printed, &end)
            && let Some(end) = unikernel_end(*status)
            // What QEMU says of itself is never said in the guest's name.
            && self.complaint().is_empty()
        {
            return self.decide(end);
        }
        let how = match end {
            Ok(ProcessEnd::Exited(code)) => format!("QEMU ended by itself with exit code {code}"),
            Ok(ProcessEnd::Signaled(signal)) => format!("QEMU was ended by signal {signal}"),
            Ok(ProcessEnd::Unknown) => "QEMU is gone, nobody knows how".to_owned(),
            Err(error) => format!("QEMU cannot be watched: {error}"),
        };
        let over_limit = Cgroup::from_dirs(self.parts.backend.cgroup.clone())
            .out_of_memory_kills()
            .is_some_and(|kills| kills > 0);
        let reason = if over_limit {
            " because the machine exceeded its memory limit on the host"
        } else {
            ""
        };
        let printed = match self.complaint() {
            text if text.is_empty() => text,
            text => format!(": {text}"),
        };
        self.decide(VmEnd::Crashed {
            message: format!("{how}{reason}{printed}"),
        });
    }

    /// Waits until somebody has read all that a unikernel printed: until then QEMU, which holds the pipe, must stay, or a
    /// node that dies would take the last words with it.
    async fn output_is_read(&self) {
        let Some(printed) = &self.parts.printed else {
            return;
        };
        while rustix::io::ioctl_fionread(printed).is_ok_and(|unread| unread > 0) {
            tokio::time::sleep(OUTPUT_LOOK).await;
        }
    }

    /// What QEMU has printed.
    fn complaint(&self) -> String {
        let output = self.parts.output.as_ref();
        output.map_or(String::new(), |output| output.tail(OUTPUT_TOLD))
    }

    /// Follows the guest until it is over; its end is decided then, and QEMU still waits. Pends for ever where QEMU does not
    /// speak any more: its process is watched by others.
    async fn watch_guest(&self) {
        let mut unanswered = false;
        loop {
            let waits_for_room = locked(&self.trouble).is_some();
            if unanswered {
                tokio::time::sleep(STATUS_RETRY).await;
            } else if waits_for_room {
                tokio::select! {
                    () = self.qmp.changed() => {}
                    () = tokio::time::sleep(FULL_DISK_POLL) => self.go_on_if_there_is_room().await,
                }
            } else {
                self.qmp.changed().await;
            }
            let status = self.qmp.status().await;
            unanswered = status.is_err();
            match status {
                Ok(RunState::Running | RunState::Paused) => *locked(&self.trouble) = None,
                Ok(RunState::IoError) => self.tell_of_io_error().await,
                Ok(RunState::Ended) => {
                    self.pull_console().await;
                    let end = match self.console.lock().await.panic_message() {
                        Some(message) => VmEnd::GuestPanic { message },
                        None => VmEnd::GuestOff,
                    };
                    return self.decide(end);
                }
                Ok(RunState::InternalError) => {
                    self.pull_console().await;
                    return self.decide(VmEnd::Crashed {
                        message:
                            "the accelerator could not go on with the guest (KVM internal error)"
                                .to_owned(),
                    });
                }
                Err(error) => {
                    if self.qmp.is_closed() {
                        tracing::debug!(%error, "QEMU speaks no more");
                        std::future::pending::<()>().await;
                    }
                    tracing::warn!(%error, pid = self.parts.record.pid, "QEMU does not tell its state");
                }
            }
        }
    }

    /// Tells a machine that does not see the host's own files of new name servers.
    async fn keep_resolver(&self) -> Infallible {
        let dir = self.parts.dir.join(state::RESOLVER);
        if !dir.exists() {
            std::future::pending::<()>().await;
        }
        loop {
            tokio::time::sleep(RESOLVER_LOOK).await;
            let dir = dir.clone();
            // It fails only where the runtime shuts down.
            let _ = tokio::task::spawn_blocking(move || resolver::keep(&dir)).await;
        }
    }

    async fn tell_of_io_error(&self) {
        let full = self.qmp.disk_is_full().await.unwrap_or(true);
        let text = if full {
            "the host's disk is full; the machine waits and goes on by itself once there is room"
        } else {
            "the host's disk failed; the machine waits until it is resumed"
        };
        let mut trouble = locked(&self.trouble);
        if trouble.is_none() {
            tracing::warn!(pid = self.parts.record.pid, "a machine is held: {text}");
        }
        *trouble = Some(text.to_owned());
    }

    async fn go_on_if_there_is_room(&self) {
        if self.held.load(Ordering::Relaxed) {
            return;
        }
        let disks = self.parts.backend.writable_disks.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let room = |disk: &PathBuf| facts::disk_free(disk).is_ok_and(|free| free >= ROOM_MIN);
            disks.iter().all(room)
        });
        if looked.await.unwrap_or(false)
            && let Err(error) = self.qmp.cont().await
        {
            tracing::warn!(%error, pid = self.parts.record.pid, "a held machine does not go on");
        }
    }

    /// Takes new console output from QEMU, and keeps it: QEMU has it no longer then.
    async fn pull_console(&self) {
        // A unikernel's console is its output.
        if self.parts.printed.is_some() {
            return;
        }
        let mut console = self.console.lock().await;
        match self
            .qmp
            .read_ring(command::CONSOLE, command::CONSOLE_RING)
            .await
        {
            Ok(new) if new.is_empty() => {}
            Ok(new) => {
                console.push(&new);
                state::write_console(&self.parts.dir, console.bytes());
            }
            Err(error) => tracing::debug!(%error, "the console cannot be read"),
        }
    }
}

/// Codes with which Nanos ends through `isa-debug-exit` when its kernel has failed: in its debugger, by a fault, at something
/// that cannot be.
const KERNEL_FAILED: std::ops::RangeInclusive<i32> = 125..=127;

/// The end of a unikernel that ended QEMU itself, by its debugging device: with an odd status, twice its code and one.
fn unikernel_end(status: i32) -> Option<VmEnd> {
    if status & 1 == 0 {
        return None;
    }
    Some(match status >> 1 {
        code if KERNEL_FAILED.contains(&code) => VmEnd::GuestPanic {
            message: "the unikernel's kernel failed".to_owned(),
        },
        _ => VmEnd::GuestOff,
    })
}

#[async_trait::async_trait]
impl Vm for QemuVm {
    fn record(&self) -> &VmRecord {
        &self.inner.parts.record
    }

    async fn open_channel(&self) -> Result<ChannelStream, VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        if self.inner.parts.printed.is_some() {
            return Err(VmmError::Unsupported {
                kind: self.inner.parts.record.kind,
                reason: "there is no agent in a unikernel".to_owned(),
            });
        }
        let dir = &self.inner.parts.dir;
        let stream =
            sockets::connect_in(dir, state::CHANNEL_SOCKET).and_then(ChannelStream::from_std);
        match stream {
            Ok(stream) => Ok(stream),
            // Its socket goes with the machine.
            Err(_) if locked(&self.inner.decided).is_some() => Err(VmmError::Ended),
            Err(source) => Err(io_error("connecting to", &dir.join(state::CHANNEL_SOCKET))(
                source,
            )),
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

    async fn press_power_button(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        let pressed = self.inner.qmp.power_down().await;
        pressed.map_err(self.control("the power button"))
    }

    async fn pause(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        self.inner.held.store(true, Ordering::Relaxed);
        self.inner.qmp.stop().await.map_err(self.control("pause"))
    }

    async fn resume(&self) -> Result<(), VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        self.inner.held.store(false, Ordering::Relaxed);
        self.inner.qmp.cont().await.map_err(self.control("resume"))
    }

    async fn capture(&self) -> Result<Capture, VmmError> {
        if self.ended() {
            return Err(VmmError::Ended);
        }
        let Some((info, files)) = &self.inner.parts.capture else {
            return Err(VmmError::Unsupported {
                kind: self.inner.parts.record.kind,
                reason: "this machine was not launched to be captured".to_owned(),
            });
        };
        self.inner.held.store(true, Ordering::Relaxed);
        let control = self.control("the capture");
        self.inner.qmp.stop().await.map_err(&control)?;
        let saved = self.inner.qmp.save_state(&files.state).await;
        saved.map_err(&control)?;
        self.inner.decide(VmEnd::Killed);
        // Its end is awaited below, however it comes about.
        if self.inner.qmp.quit().await.is_err() {
            self.kill().await?;
        }
        if tokio::time::timeout(KILL_LIMIT, self.told()).await.is_err() {
            self.kill().await?;
        }
        let seal = || {
            let (memory, state) = (files.memory.try_clone()?, files.state.try_clone()?);
            Capture::seal(info.clone(), memory, state)
        };
        // How it ended says nothing to anybody: its state is the capture's now.
        state::remove_all_files(&self.inner.parts.dir);
        seal().map_err(|error| VmmError::Control {
            operation: "the capture",
            message: error.to_string(),
        })
    }

    fn can_snapshot(&self) -> Result<(), VmmError> {
        self.inner.captured_as().map(drop)
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
        if !self.ended() {
            self.inner.pull_console().await;
        }
        self.inner.console.lock().await.last(limit)
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

    fn trouble(&self) -> Option<String> {
        if self.ended() {
            return None;
        }
        locked(&self.inner.trouble).clone()
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
