//! The contract between a node and a virtual machine monitor.
//!
//! A [`Vmm`] starts machines and takes over those that an earlier process started; a [`Vm`] is one of them. The words
//! here are a machine's, not any monitor's: a backend that lacks something says so in [`Capabilities`], and a plan that
//! asks for it is refused before anything is started.
//!
//! What every backend keeps (the conformance suite checks it):
//! - `launch` either gives a running [`Vm`] or leaves nothing: no process, socket, cgroup or file but what it found.
//! - A machine outlives the process that launched it. Its [`VmRecord`] is enough to [`Vmm::adopt`] it later.
//! - The agent's channel takes one connection at a time. Closing it harms nothing, and it can be opened again.
//! - `wait` gives the same answer however often and by however many callers it is asked.
//! - `kill` returns when the machine is gone; on one that is gone already it succeeds.
//! - Nothing that a guest does makes a method panic, block for ever or use unbounded memory.

use crate::Capture;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vistara_model::{Accelerator, Bytes, MachineId, PortMapping, Rates, VmmKind};

/// The host's end of the channel to the agent in a guest.
pub type ChannelStream = tokio::net::UnixStream;

/// What a guest without an agent prints. It ends with the machine. A guest whose output nobody reads waits.
pub type OutputStream = tokio::net::unix::pipe::Receiver;

/// What a backend can do, so that a plan is refused early and with a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Which monitor, for messages and records.
    pub kind: VmmKind,
    /// The monitor's version, as it prints it.
    pub version: String,
    /// Accelerators with which it really runs guests here.
    pub accelerators: Vec<Accelerator>,
    /// Whether host directories can be shared ([`LaunchPlan::shares`]); the reason where not.
    pub shares: Result<(), String>,
    /// Whether it can give user-mode networking ([`LaunchPlan::nic`]); the reason where not.
    pub user_network: Result<(), String>,
    /// Whether it can bound what goes through the network ([`Rates::network_per_s`]); the reason where not. What goes through
    /// disks every backend can.
    pub network_rate: Result<(), String>,
    /// Whether each machine's monitor sees a root directory of its own; the reason where not.
    pub own_root: Result<(), String>,
    /// Whether machines can be paused.
    pub pause: bool,
    /// Most virtual CPUs in one machine.
    pub vcpus_max: u32,
    /// Whether machines can be captured and forked; the reason where not.
    pub capture: Result<(), String>,
    /// What tells the processor that its guests see from the host's own, where it is not that.
    pub cpu_template: Option<String>,
}

/// Why a machine with [`LaunchPlan::huge_pages`] is refused what goes by captured memory: the captured lies in a file of small
/// pages, and forks map that.
pub(crate) const CAPTURED_HUGE_PAGES: &str = "capturing or forking a machine with huge pages";

/// How a Linux guest is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinuxBoot {
    /// Uncompressed kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent in it.
    pub initramfs: PathBuf,
    /// Words for the kernel's command line that come from the payload; the backend adds what its own devices need.
    pub cmdline: String,
}

impl LinuxBoot {
    /// The same whose kernel tells on its console what it does.
    pub fn telling(mut self) -> LinuxBoot {
        let words = self.cmdline.split(' ').filter(|word| *word != "quiet");
        self.cmdline = words.collect::<Vec<_>>().join(" ");
        self
    }
}

/// How a Nanos unikernel is started. There is no agent in it: [`Vm::open_channel`] is refused, what it prints comes by
/// [`Vm::open_output`], and what it is told it finds on its first disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NanosBoot {
    /// The kernel.
    pub kernel: PathBuf,
}

/// From what a machine starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// A Linux guest boots.
    Linux(LinuxBoot),
    /// A unikernel boots.
    Nanos(NanosBoot),
    /// A captured machine goes on where it was when it was captured. The plan's shape (processors, memory, disks, network
    /// interface) must be that machine's, and its disks must hold what that machine's held at that moment.
    Fork(Arc<Capture>),
}

/// One disk of a machine, in the order in which the guest sees them (`vda`, `vdb`, …).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// A raw image. The monitor's own user need not be able to open it: the backend opens it and hands it over.
    pub path: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A user-mode network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Ports of the host that lead into the guest. `host_port` is never 0 here: the caller has chosen.
    pub ports: Vec<PortMapping>,
    /// Hardware address.
    pub mac: [u8; 6],
}

/// A host directory that the guest can mount by its tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestShare {
    /// Tag by which the guest mounts it: at most 36 bytes.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// Whether the guest may not write. Enforced on the host's side.
    pub read_only: bool,
}

/// Limits and identity of the monitor's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// User and group to run as; absent where the node has no right to change them.
    pub uid_gid: Option<(u32, u32)>,
    /// Most memory of the monitor with its guest, in bytes.
    pub memory_max: Bytes,
    /// Most processes and threads.
    pub pids_max: u32,
    /// Share of CPU time in thousandths of one CPU; absent for no quota.
    pub cpu_millis: Option<u32>,
}

/// Everything a backend needs to start one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Whose machine.
    pub id: MachineId,
    /// A directory of this machine's own, owned by the node, for sockets and logs. It exists.
    pub dir: PathBuf,
    /// How guest code is executed; one of [`Capabilities::accelerators`].
    pub accelerator: Accelerator,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// Whether that is of the host's huge pages (2 MiB), of which there are enough. Such a machine cannot be captured or forked.
    pub huge_pages: bool,
    /// What it starts from.
    pub start: Start,
    /// Whether the machine is to be captured ([`Vm::capture`]).
    pub capturable: bool,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network interface, where there is to be one.
    pub nic: Option<Nic>,
    /// Host directories.
    pub shares: Vec<GuestShare>,
    /// Bounds on what it moves: its own, whatever it goes on from.
    pub rates: Rates,
    /// Fences.
    pub fence: Fence,
}

/// What a later process needs to take a machine over. Written to the machine's directory by the node as it is; the
/// fields beyond these are the backend's own, under `backend`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Which backend launched it.
    pub kind: VmmKind,
    /// The monitor's process id on this host.
    pub pid: u32,
    /// The process's start time (field 22 of `/proc/PID/stat`, clock ticks since boot): a reused pid is told by it.
    pub pid_start_ticks: u64,
    /// The host's boot id: after a reboot nothing is left to adopt.
    pub boot_id: String,
    /// Which fences really hold, in words, for `inspect`.
    pub fences: Vec<String>,
    /// The backend's own fields.
    pub backend: serde_json::Value,
}

/// What became of a machine that an earlier process started.
pub enum Adoption {
    /// It runs, and is ours again.
    Running(Box<dyn Vm>),
    /// It is gone; everything it left outside its directory (cgroup, helper processes) has been cleaned up.
    Gone(VmEnd),
}

/// How a machine came to an end, as its monitor saw it. What the program in it did is the agent's to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum VmEnd {
    /// The guest switched itself off or rebooted.
    GuestOff,
    /// The guest's kernel panicked; its last words from the console.
    GuestPanic {
        /// The line that tells of it, with what came after, at most 2,000 characters.
        message: String,
    },
    /// We killed it.
    Killed,
    /// The monitor died by itself or by somebody else's hand.
    Crashed {
        /// Exit status or signal, and the end of what it printed.
        message: String,
    },
}

/// What a machine uses on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmUsage {
    /// Resident memory of the monitor, guest memory included, in bytes.
    pub resident_bytes: u64,
    /// CPU time the monitor has used since it started.
    pub cpu_time: Duration,
}

/// What a guest's balloon device tells of its memory. All in bytes; what the guest does not say is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonReport {
    /// What the balloon shall hold.
    pub target: u64,
    /// What it holds: memory that the host has back.
    pub held: u64,
    /// What the guest uses for nothing.
    pub free: Option<u64>,
    /// What new programs could have without swapping.
    pub available: Option<u64>,
    /// What the guest could give back of its caches at once.
    pub caches: Option<u64>,
    /// Page faults that waited for a disk, counted since its boot.
    pub major_faults: Option<u64>,
}

/// What is waited for right before a machine is held still for [`Vm::snapshot`]: that its guest is ready for it. Nothing is
/// captured where it fails.
pub type Quiet = std::pin::Pin<Box<dyn Future<Output = Result<(), VmmError>> + Send>>;

/// What is done while a machine is held still for [`Vm::snapshot`]; blocks on files.
pub type AtRest = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// A machine as it was at one moment; it has gone on since.
#[derive(Debug)]
pub struct Snapshot {
    /// What others go on from.
    pub capture: Capture,
    /// How long the machine was held still.
    pub pause: Duration,
}

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The monitor, or something it needs, is not on this host.
    #[error("{what} is not installed; {mend}")]
    Absent {
        /// What is missing.
        what: String,
        /// The command that installs it.
        mend: String,
    },
    /// The plan asks for something this backend cannot do.
    #[error("{kind} cannot do this: {reason}")]
    Unsupported {
        /// Which backend.
        kind: VmmKind,
        /// What, and why not.
        reason: String,
    },
    /// A step on the way to a running machine failed. Nothing of it is left.
    #[error("starting the machine failed at {step}: {message}")]
    Launch {
        /// Which step.
        step: &'static str,
        /// What happened, with the monitor's own words where it spoke.
        message: String,
    },
    /// A published port is taken.
    #[error("port {0} of the host is already in use or may not be bound")]
    PortTaken(PortMapping),
    /// A request to a running monitor failed. The machine is as it was.
    #[error("the monitor did not do {operation}: {message}")]
    Control {
        /// Which request.
        operation: &'static str,
        /// What it said.
        message: String,
    },
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// A file or process could not be handled.
    #[error("{operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Step of a launch in which a monitor takes its settings, and what it starts from.
pub(crate) const BUILDING: &str = "building the machine";
/// Step of a launch in which a monitor goes on from a capture, where that is one of its own.
pub(crate) const GOING_ON: &str = "going on from the capture";

impl VmmError {
    /// Whether a fork that failed like this says that no other can go on from its capture either. What failed for the
    /// machine's own files, its cgroup, its ports, or for want of something on the host, says nothing of the capture.
    pub fn speaks_against_capture(&self) -> bool {
        match self {
            VmmError::Unsupported { .. } | VmmError::Control { .. } => true,
            VmmError::Launch { step, .. } => [BUILDING, GOING_ON].contains(step),
            VmmError::Absent { .. }
            | VmmError::PortTaken(_)
            | VmmError::Ended
            | VmmError::Io { .. } => false,
        }
    }
}

/// A virtual machine monitor on this host.
#[async_trait::async_trait]
pub trait Vmm: Send + Sync {
    /// What it can do here. Cheap: probes have run by the time the backend exists.
    fn capabilities(&self) -> &Capabilities;

    /// Starts a machine. Returns as soon as its monitor runs; the guest may still be booting.
    ///
    /// # Errors
    /// Any [`VmmError`]; nothing is left behind then.
    async fn launch(&self, plan: &LaunchPlan) -> Result<Box<dyn Vm>, VmmError>;

    /// Refuses what [`Vmm::launch`] would refuse before it starts anything: what this backend cannot do, and a capture that
    /// does not fit the plan or this host. Blocks on nothing.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`].
    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        let _ = plan;
        Ok(())
    }

    /// Takes over a machine that an earlier process launched in `dir`.
    ///
    /// # Errors
    /// Only where it cannot be told whether the machine runs; the machine is left alone then.
    async fn adopt(&self, dir: &Path, record: &VmRecord) -> Result<Adoption, VmmError>;

    /// The end of the console of a machine that has ended, at most `limit` bytes, as far as `dir` still has it. Blocks on
    /// files.
    fn kept_console(&self, dir: &Path, limit: usize) -> Vec<u8> {
        let _ = (dir, limit);
        Vec::new()
    }

    /// Ends whatever a launch of machine `id` left whose record was never written, because the node died in between.
    /// The machine's directory is `dir`; it stays.
    ///
    /// # Errors
    /// [`VmmError::Io`] where something was found and could not be ended.
    async fn sweep(&self, id: &MachineId, dir: &Path) -> Result<(), VmmError> {
        let _ = (id, dir);
        Ok(())
    }
}

/// One running machine.
#[async_trait::async_trait]
pub trait Vm: Send + Sync {
    /// What a later process needs to adopt it.
    fn record(&self) -> &VmRecord;

    /// Opens the agent's channel. The guest may not have opened its end yet: what is written waits for it.
    ///
    /// # Errors
    /// [`VmmError::Ended`] once the machine is gone.
    async fn open_channel(&self) -> Result<ChannelStream, VmmError>;

    /// Opens what a unikernel prints: every byte that nobody has read yet, also after the machine's end. Two readers share
    /// the bytes, so that there should be one. The end of a machine whose guest ended by itself is told once all is read.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`] in a machine with an agent, [`VmmError::Io`].
    fn open_output(&self) -> Result<OutputStream, VmmError> {
        Err(VmmError::Unsupported {
            kind: self.record().kind,
            reason: "a guest with an agent has no output of its own".to_owned(),
        })
    }

    /// Asks the guest to end, as a power button does. What it makes of it is its own affair.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    async fn press_power_button(&self) -> Result<(), VmmError> {
        Err(VmmError::Unsupported {
            kind: self.record().kind,
            reason: "its machines have no power button".to_owned(),
        })
    }

    /// Holds the guest still; on a paused machine it does nothing.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`], [`VmmError::Control`] or [`VmmError::Ended`].
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets a paused guest go on; on a running machine it does nothing.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    async fn resume(&self) -> Result<(), VmmError>;

    /// Captures a machine that was launched as [`LaunchPlan::capturable`], and ends it: its memory now belongs to the
    /// capture. Its writable disks hold what the capture expects of a fork's. Nobody should be connected to its channel.
    /// After an error the machine is paused or gone; it should be killed.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`], [`VmmError::Control`] or [`VmmError::Ended`].
    async fn capture(&self) -> Result<Capture, VmmError>;

    /// Whether [`Vm::snapshot`] can be asked for.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`] with the reason.
    fn can_snapshot(&self) -> Result<(), VmmError> {
        Err(VmmError::Unsupported {
            kind: self.record().kind,
            reason: "capturing a machine that goes on".to_owned(),
        })
    }

    /// Captures the machine and lets it go on; a paused one stays paused. What can be copied while it runs is copied before
    /// `quiet` is awaited. `at_rest` runs while it is held still, and should
    /// copy its writable disks, which the capture expects as they are at that moment. The returned future should not be
    /// dropped before it is done: the machine would stay held.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`], [`VmmError::Control`], [`VmmError::Io`] or [`VmmError::Ended`]. The machine goes on.
    async fn snapshot(&self, quiet: Quiet, at_rest: AtRest) -> Result<Snapshot, VmmError> {
        drop((quiet, at_rest));
        self.can_snapshot()?;
        Err(VmmError::Ended)
    }

    /// Ends the machine at once and waits until it is gone, its helpers and cgroup with it.
    ///
    /// # Errors
    /// [`VmmError::Io`] where the process cannot be signalled.
    async fn kill(&self) -> Result<(), VmmError>;

    /// Waits for the machine's end.
    async fn wait(&self) -> VmEnd;

    /// The end of the guest's console, at most `limit` bytes, whatever it holds; empty once it is lost.
    async fn console(&self, limit: usize) -> Vec<u8>;

    /// What it uses on the host now; zeros once it is gone.
    fn usage(&self) -> VmUsage;

    /// What the guest's balloon device last told; nothing where there is none, or while the machine is held still.
    async fn balloon(&self) -> Option<BalloonReport> {
        None
    }

    /// A condition of the running machine that its owner should hear of, such as a paused guest because the host's disk
    /// is full. Empty while all is well.
    fn trouble(&self) -> Option<String>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_model::Protocol;

    #[test]
    fn only_failures_at_the_capture_speak_against_it() {
        let text = || "a reason".to_owned();
        let launch = |step| VmmError::Launch {
            step,
            message: text(),
        };
        let table = [
            (
                VmmError::Unsupported {
                    kind: VmmKind::Qemu,
                    reason: text(),
                },
                true,
            ),
            (
                VmmError::Control {
                    operation: "resume",
                    message: text(),
                },
                true,
            ),
            (launch("building the machine"), true),
            (launch("going on from the capture"), true),
            (launch("creating its cgroup"), false),
            (launch("making the guest's memory"), false),
            (launch("making room for output"), false),
            (launch("starting QEMU"), false),
            (launch("noting the launch"), false),
            (
                VmmError::Absent {
                    what: text(),
                    mend: text(),
                },
                false,
            ),
            (
                VmmError::PortTaken(PortMapping {
                    host_address: std::net::Ipv4Addr::LOCALHOST,
                    host_port: 80,
                    guest_port: 80,
                    protocol: Protocol::Tcp,
                }),
                false,
            ),
            (VmmError::Ended, false),
            (
                VmmError::Io {
                    operation: "opening the disk",
                    path: "/d/overlay.img".into(),
                    source: std::io::ErrorKind::StorageFull.into(),
                },
                false,
            ),
        ];
        for (error, against) in table {
            assert_eq!(error.speaks_against_capture(), against, "{error}");
        }
    }
}
