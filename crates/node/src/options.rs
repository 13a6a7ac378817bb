//! What a node is told when it starts. Validated by the caller; nothing here re-reads flags or the environment.

use crate::fence::GuardProgram;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vistara_machine::Vmm;
use vistara_machine::firecracker::CpuTemplate;
use vistara_model::Bytes;

/// Where monitors come from.
#[derive(Clone)]
pub enum Vmms {
    /// Those found on this host.
    Detect,
    /// This one only, as tests give it.
    Given(Arc<dyn Vmm>),
}

/// What a node is told when it starts.
#[derive(Clone)]
pub struct NodeOptions {
    /// Directory of everything it keeps. Made with mode 0700 where absent.
    pub state_dir: PathBuf,
    /// Unix socket it serves. Its directory is made with mode 0700 where absent.
    pub socket: PathBuf,
    /// Leave after this long without machines and requests; absent to stay.
    pub idle_exit: Option<Duration>,
    /// The program's version, told in every answer.
    pub version: String,
    /// Where monitors come from.
    pub vmms: Vmms,
    /// `qemu-system-x86_64`, where it is not on `PATH`.
    pub qemu: Option<PathBuf>,
    /// `virtiofsd`, where it is in no usual place.
    pub virtiofsd: Option<PathBuf>,
    /// `firecracker`, where it is in no usual place.
    pub firecracker: Option<PathBuf>,
    /// `jailer`, where it is not beside `firecracker`.
    pub jailer: Option<PathBuf>,
    /// `slirp4netns`, where it is not on `PATH`.
    pub slirp4netns: Option<PathBuf>,
    /// What Firecracker's guests see of the processor; all that KVM offers where absent.
    pub cpu_template: Option<CpuTemplate>,
    /// How long a guest may take to answer after its start.
    pub boot_bound: Duration,
    /// What templates may take together; absent for what suits this host.
    pub template_limits: Option<TemplateLimits>,
    /// What ends copies of services whose lease is over while no node looks after them; absent where machines are threads of
    /// this process, as in tests.
    pub guard: Option<GuardProgram>,
    /// Most of the host's memory for machines that are kept ready for requests to come; zero for none, absent for what suits
    /// this host.
    pub warm_memory: Option<Bytes>,
}

/// What templates may take together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateLimits {
    /// Of the host's memory.
    pub memory_bytes: u64,
    /// Of the disk.
    pub disk_bytes: u64,
}

/// Share of the host's memory that templates may hold: forks use the same pages, so that it is not lost to them.
const TEMPLATES_MEMORY_SHARE: u64 = 8;
/// Bytes on disk: some fifty templates of usual machines.
const TEMPLATES_DISK_BYTES: u64 = 4 << 30;

impl TemplateLimits {
    /// What suits this host.
    pub fn of_this_host() -> TemplateLimits {
        TemplateLimits {
            memory_bytes: vistara_host::facts::memory_total().unwrap_or(0) / TEMPLATES_MEMORY_SHARE,
            disk_bytes: TEMPLATES_DISK_BYTES,
        }
    }
}

/// Share of the host's memory that ready machines may take where nobody says otherwise, and the most of it: a burst's
/// worth on a server, a few on a laptop.
const WARM_MEMORY_SHARE: u64 = 32;
const WARM_MEMORY_MAX: u64 = 1 << 30;

impl NodeOptions {
    /// What ready machines may take.
    pub(crate) fn warm_budget(&self) -> Bytes {
        self.warm_memory.unwrap_or_else(|| {
            let total = vistara_host::facts::memory_total().unwrap_or(0);
            Bytes((total / WARM_MEMORY_SHARE).min(WARM_MEMORY_MAX))
        })
    }

    /// How long a guest may take to boot unless the options say otherwise. Under emulation on a host with many more
    /// machines than processors a boot takes many seconds; one that needs two minutes is stuck.
    pub const BOOT_BOUND: Duration = Duration::from_secs(120);
}
