//! A monitor without virtual machines, for tests: the same contract, kept by threads of this process.
//!
//! A machine is one thread that runs the guest the test gives ([`FakeVmm::new`]). It outlives the [`Vm`] handle and the
//! [`FakeVmm`] itself, so that a test can play a node's restart: another `FakeVmm` in the same process adopts it.

use crate::{Adoption, Capabilities, LaunchPlan, Vm, VmRecord, Vmm, VmmError};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What runs as the guest. Called on a thread of its own; its return is the machine's end. Once the machine is killed
/// [`FakeGuest::next_channel`] gives `None` and open channels are at their end: the thread should then return.
pub type GuestMain = Arc<dyn Fn(&FakeGuest) -> FakeEnd + Send + Sync>;

/// A guest's view of its fake machine.
pub struct FakeGuest {
    plan: LaunchPlan,
}

impl FakeGuest {
    /// What the machine was launched with.
    pub fn plan(&self) -> &LaunchPlan {
        &self.plan
    }

    /// Waits for the host to open the channel and gives the guest's end, in blocking mode; `None` once the machine is
    /// gone. The host has at most one channel open at a time.
    pub fn next_channel(&self) -> Option<UnixStream> {
        None
    }

    /// Writes to the console.
    pub fn console(&self, text: &str) {
        let _ = text;
    }

    /// Whether the machine has been killed.
    pub fn is_killed(&self) -> bool {
        false
    }
}

/// How a fake guest ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FakeEnd {
    /// It switches itself off.
    Off,
    /// Its kernel panics with this line.
    Panic(String),
    /// Its monitor dies with this message.
    MonitorCrash(String),
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every launch fails with this message.
    pub launch_failure: Option<String>,
    /// The guest starts this long after the launch.
    pub boot_delay: Option<Duration>,
    /// The machine ends like this as soon as it has started.
    pub end_at_once: Option<FakeEnd>,
    /// What [`Vm::trouble`] tells.
    pub trouble: Option<String>,
}

/// A monitor of fake machines.
pub struct FakeVmm {
    capabilities: Capabilities,
}

impl FakeVmm {
    /// A monitor whose machines all run this guest.
    pub fn new(guest: GuestMain) -> FakeVmm {
        let _ = guest;
        FakeVmm {
            capabilities: Capabilities {
                kind: vistara_model::VmmKind::Fake,
                version: "1".to_owned(),
                accelerators: vec![vistara_model::Accelerator::Tcg],
                shares: Ok(()),
                user_network: true,
                pause: true,
                vcpus_max: 64,
            },
        }
    }

    /// Sets what goes wrong from now on; [`Faults::trouble`] also in machines that run.
    pub fn set_faults(&self, faults: Faults) {
        let _ = faults;
    }

    /// Replaces what [`FakeVmm::capabilities`] answers, for tests of refusals.
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> FakeVmm {
        self.capabilities = capabilities;
        self
    }
}

#[async_trait::async_trait]
impl Vmm for FakeVmm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn launch(&self, _plan: &LaunchPlan) -> Result<Box<dyn Vm>, VmmError> {
        Err(VmmError::Ended)
    }

    async fn adopt(&self, _dir: &Path, _record: &VmRecord) -> Result<Adoption, VmmError> {
        Err(VmmError::Ended)
    }
}
