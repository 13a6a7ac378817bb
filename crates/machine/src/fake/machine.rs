//! One fake machine: a thread, the channels that the host opened to it, and its end.

use super::{FakeEnd, Faults, GuestMain};
use crate::{
    AtRest, Capture, CaptureInfo, ChannelStream, LaunchPlan, Quiet, Snapshot, Vm, VmEnd, VmRecord,
    VmUsage, VmmError,
};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use vistara_host::files::sealable_memory_file;
use vistara_host::{facts, process::ProcessIdentity};
use vistara_model::VmmKind;

/// Most bytes of console kept, as a real monitor's ring would.
const CONSOLE_MAX: usize = 64 << 10;

/// Channels waiting for the guest, as many as a real socket's backlog would take without complaint.
const CHANNELS_WAITING_MAX: usize = 16;

/// What a captured machine holds, in its monitor's state and, from this place on, in its memory.
const CAPTURED: &[u8] = b"a fake machine's";
const CAPTURED_AT: u64 = 5 << 20;

/// The value behind a lock that a panicking guest may have left: every value here is whole at any time.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Machines of this process by directory. An ended one stays until its directory is launched in again: its end may still
/// be asked for.
fn registry() -> &'static Mutex<HashMap<PathBuf, Arc<Machine>>> {
    static REGISTRY: OnceLock<Mutex<HashMap<PathBuf, Arc<Machine>>>> = OnceLock::new();
    REGISTRY.get_or_init(Mutex::default)
}

/// One fake machine.
pub(super) struct Machine {
    record: VmRecord,
    info: CaptureInfo,
    faults: Arc<Mutex<Faults>>,
    started: Instant,
    state: Mutex<State>,
    changed: Condvar,
    end: watch::Sender<Option<VmEnd>>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<UnixStream>,
    /// The channel that the guest has taken last; a second handle on it, to end it with the machine.
    taken: Option<UnixStream>,
    console: Vec<u8>,
}

impl Machine {
    pub(super) fn start(
        plan: &LaunchPlan,
        main: GuestMain,
        faults: Arc<Mutex<Faults>>,
    ) -> Result<Arc<Machine>, VmmError> {
        static LAUNCHES: AtomicU64 = AtomicU64::new(0);
        let failed = |error: std::io::Error| VmmError::Launch {
            step: "starting a thread",
            message: error.to_string(),
        };
        let own = own_identity().map_err(failed)?;
        let machine = Arc::new(Machine {
            record: VmRecord {
                kind: VmmKind::Fake,
                pid: own.pid,
                pid_start_ticks: own.start_ticks,
                boot_id: own.boot_id,
                fences: vec!["none: a fake machine is a thread of the node".to_owned()],
                backend: serde_json::json!({ "launch": LAUNCHES.fetch_add(1, Ordering::Relaxed) }),
            },
            info: info(plan),
            faults,
            started: Instant::now(),
            state: Mutex::default(),
            changed: Condvar::new(),
            end: watch::Sender::new(None),
        });
        let guest = FakeGuest {
            plan: plan.clone(),
            machine: machine.clone(),
        };
        let name = format!("fake-{}", plan.id.short());
        std::thread::Builder::new()
            .name(name)
            .spawn(move || run(&guest, &main))
            .map_err(failed)?;
        locked(registry()).insert(plan.dir.clone(), machine.clone());
        Ok(machine)
    }

    pub(super) fn find(dir: &Path) -> Option<Arc<Machine>> {
        locked(registry()).get(dir).cloned()
    }

    pub(super) fn record(&self) -> &VmRecord {
        &self.record
    }

    pub(super) fn end(&self) -> Option<VmEnd> {
        self.end.borrow().clone()
    }

    /// The machine's end, unless it has one: channels are closed, and the guest's thread finds nothing to do any more.
    pub(super) fn finish(&self, end: VmEnd) {
        let mut state = locked(&self.state);
        self.end.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(end);
            }
            first
        });
        state.waiting.clear();
        if let Some(channel) = state.taken.take() {
            // The guest may have closed it already.
            let _ = channel.shutdown(Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn write_console(&self, text: &str) {
        let console = &mut locked(&self.state).console;
        console.extend_from_slice(text.as_bytes());
        let excess = console.len().saturating_sub(CONSOLE_MAX);
        console.drain(..excess);
    }
}

/// What a fork must have in common with this machine.
pub(super) fn info(plan: &LaunchPlan) -> CaptureInfo {
    CaptureInfo {
        kind: VmmKind::Fake,
        version: "1".to_owned(),
        accelerator: plan.accelerator,
        cpu: String::new(),
        counter_khz: None,
        vcpus: plan.vcpus,
        memory: plan.memory,
        disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
        nic: plan.nic.is_some(),
        without_bounds: true,
    }
}

fn own_identity() -> std::io::Result<ProcessIdentity> {
    let pid = std::process::id();
    Ok(ProcessIdentity {
        pid,
        start_ticks: facts::start_ticks(pid).ok_or(std::io::ErrorKind::NotFound)?,
        boot_id: facts::boot_id()?,
    })
}

/// The life of a machine, on its thread.
fn run(guest: &FakeGuest, main: &GuestMain) {
    let faults = locked(&guest.machine.faults).clone();
    if let Some(delay) = faults.boot_delay {
        // Waits for the kill or the delay's end, whichever is first.
        let state = locked(&guest.machine.state);
        let waited = guest
            .machine
            .changed
            .wait_timeout_while(state, delay, |_| !guest.is_killed());
        drop(waited);
    }
    let end = match faults.end_at_once {
        Some(end) => end,
        None => catch_unwind(AssertUnwindSafe(|| main(guest)))
            .unwrap_or_else(|_| FakeEnd::MonitorCrash("the fake guest panicked".to_owned())),
    };
    let end = match end {
        FakeEnd::Off => VmEnd::GuestOff,
        FakeEnd::Panic(reason) => {
            let message = format!("Kernel panic - not syncing: {reason}");
            guest.console(&format!("{message}\n"));
            VmEnd::GuestPanic { message }
        }
        FakeEnd::MonitorCrash(message) => VmEnd::Crashed { message },
    };
    guest.machine.finish(end);
}

/// A guest's view of its fake machine.
pub struct FakeGuest {
    plan: LaunchPlan,
    machine: Arc<Machine>,
}

impl FakeGuest {
    /// What the machine was launched with.
    pub fn plan(&self) -> &LaunchPlan {
        &self.plan
    }

    /// Waits for the host to open the channel and gives the guest's end, in blocking mode; `None` once the machine is
    /// gone. The host has at most one channel open at a time: take the next when this one is at its end.
    pub fn next_channel(&self) -> Option<UnixStream> {
        let mut state = locked(&self.machine.state);
        loop {
            if self.is_killed() {
                return None;
            }
            if let Some(stream) = state.waiting.pop_front() {
                state.taken = stream.try_clone().ok();
                return Some(stream);
            }
            state = self
                .machine
                .changed
                .wait_timeout(state, Duration::from_secs(1))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Writes to the console.
    pub fn console(&self, text: &str) {
        self.machine.write_console(text);
    }

    /// Whether the machine is gone.
    pub fn is_killed(&self) -> bool {
        self.machine.end.borrow().is_some()
    }
}

/// A capture of a fake machine, which others may be kept from reading.
fn captured(info: &CaptureInfo, unreadable: bool) -> std::io::Result<Capture> {
    let memory = sealable_memory_file(info.memory.0)?;
    memory.write_all_at(CAPTURED, CAPTURED_AT)?;
    let state = sealable_memory_file(CAPTURED.len() as u64)?;
    state.write_all_at(CAPTURED, 0)?;
    let memory = match unreadable {
        true => {
            let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
            File::options().write(true).open(path)?
        }
        false => memory,
    };
    Capture::seal(info.clone(), memory, state)
}

/// A handle on a fake machine.
pub(super) struct FakeVm {
    machine: Arc<Machine>,
    capturable: bool,
}

impl FakeVm {
    pub(super) fn new(machine: Arc<Machine>, capturable: bool) -> FakeVm {
        FakeVm {
            machine,
            capturable,
        }
    }

    fn alive(&self) -> Result<(), VmmError> {
        match self.machine.end() {
            None => Ok(()),
            Some(_) => Err(VmmError::Ended),
        }
    }
}

#[async_trait::async_trait]
impl Vm for FakeVm {
    fn record(&self) -> &VmRecord {
        &self.machine.record
    }

    async fn open_channel(&self) -> Result<ChannelStream, VmmError> {
        let io = |source: std::io::Error| VmmError::Io {
            operation: "opening the channel of",
            path: PathBuf::from("a fake machine"),
            source,
        };
        if let Some(message) = locked(&self.machine.faults).channel_failure.clone() {
            return Err(VmmError::Control {
                operation: "opening the agent's channel",
                message,
            });
        }
        let (host, guest) = UnixStream::pair().map_err(io)?;
        host.set_nonblocking(true).map_err(io)?;
        {
            let mut state = locked(&self.machine.state);
            self.alive()?;
            if state.waiting.len() >= CHANNELS_WAITING_MAX {
                return Err(io(std::io::ErrorKind::WouldBlock.into()));
            }
            state.waiting.push_back(guest);
        }
        self.machine.changed.notify_all();
        ChannelStream::from_std(host).map_err(io)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.alive()
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.alive()
    }

    async fn capture(&self) -> Result<Capture, VmmError> {
        self.alive()?;
        if !self.capturable {
            return Err(VmmError::Unsupported {
                kind: VmmKind::Fake,
                reason: "this machine was not launched to be captured".to_owned(),
            });
        }
        let faults = locked(&self.machine.faults).clone();
        if let Some(message) = faults.capture_failure {
            return Err(VmmError::Control {
                operation: "the capture",
                message,
            });
        }
        self.machine.finish(VmEnd::Killed);
        let made = captured(&self.machine.info, faults.capture_unreadable);
        made.map_err(|error| VmmError::Control {
            operation: "the capture",
            message: error.to_string(),
        })
    }

    fn can_snapshot(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn snapshot(&self, quiet: Quiet, at_rest: AtRest) -> Result<Snapshot, VmmError> {
        self.alive()?;
        let faults = locked(&self.machine.faults).clone();
        let refused = |message: String| VmmError::Control {
            operation: "the snapshot",
            message,
        };
        if let Some(message) = faults.capture_failure {
            return Err(refused(message));
        }
        quiet.await?;
        let begin = Instant::now();
        let capture = at_rest().and_then(|()| captured(&self.machine.info, false));
        Ok(Snapshot {
            capture: capture.map_err(|error| refused(error.to_string()))?,
            pause: begin.elapsed(),
        })
    }

    async fn kill(&self) -> Result<(), VmmError> {
        if self.capturable {
            locked(&self.machine.faults).can_end()?;
        }
        self.machine.finish(VmEnd::Killed);
        Ok(())
    }

    async fn wait(&self) -> VmEnd {
        let mut end = self.machine.end.subscribe();
        loop {
            if let Some(end) = end.borrow_and_update().clone() {
                return end;
            }
            if end.changed().await.is_err() {
                // The sender lives in the machine, which we hold.
                return VmEnd::Killed;
            }
        }
    }

    async fn console(&self, limit: usize) -> Vec<u8> {
        let state = locked(&self.machine.state);
        state.console[state.console.len().saturating_sub(limit)..].to_vec()
    }

    fn usage(&self) -> VmUsage {
        match self.alive() {
            // One page, so that a reader can tell a running machine from none.
            Ok(()) => VmUsage {
                resident_bytes: 4096,
                cpu_time: self.machine.started.elapsed() / 1000,
            },
            Err(_) => VmUsage::default(),
        }
    }

    fn trouble(&self) -> Option<String> {
        self.alive().ok()?;
        locked(&self.machine.faults).trouble.clone()
    }
}
