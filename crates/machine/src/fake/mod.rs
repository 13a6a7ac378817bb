//! A monitor without virtual machines, for tests: the same contract, kept by threads of this process.
//!
//! A machine is one thread that runs the guest the test gives ([`FakeVmm::new`]). It outlives the [`Vm`] handle and the
//! [`FakeVmm`] itself, so that a test can play a node's restart: another `FakeVmm` in the same process adopts it by its
//! record and directory. What it cannot play: a pause holds nothing still, no limit is kept, and a fork's guest begins
//! anew instead of going on.

mod machine;

use crate::{Adoption, Capabilities, LaunchPlan, Start, Vm, VmEnd, VmRecord, Vmm, VmmError};
use machine::{FakeVm, Machine};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vistara_model::{Accelerator, MachineId, VmmKind};

pub use machine::FakeGuest;

/// What runs as the guest. Called on a thread of its own; its return is the machine's end. Once the machine is killed
/// [`FakeGuest::next_channel`] gives `None` and open channels are at their end: the thread should then return.
pub type GuestMain = Arc<dyn Fn(&FakeGuest) -> FakeEnd + Send + Sync>;

/// How a fake guest ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FakeEnd {
    /// It switches itself off.
    Off,
    /// Its kernel panics with this reason.
    Panic(String),
    /// Its monitor dies with this message.
    MonitorCrash(String),
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every launch fails with this message.
    pub launch_failure: Option<String>,
    /// Every launch of a fork fails with this message.
    pub fork_failure: Option<String>,
    /// Every launch of a fork fails with this message, for what the machine lacks rather than the capture.
    pub fork_shortage: Option<String>,
    /// Every launch of a fork with published ports finds the first of them taken.
    pub ports_taken: bool,
    /// Every capture fails with this message.
    pub capture_failure: Option<String>,
    /// Captures serve forks, and cannot be read by who wants to write them to a disk.
    pub capture_unreadable: bool,
    /// Machines that are to be captured are not ended: every kill of one, and every sweep, fails with this message.
    pub end_failure: Option<String>,
    /// The guest starts this long after the launch.
    pub boot_delay: Option<Duration>,
    /// The machine ends like this as soon as it has started, before its guest.
    pub end_at_once: Option<FakeEnd>,
    /// No channel to a guest can be opened: every try fails with this message.
    pub channel_failure: Option<String>,
    /// It cannot be told what became of an earlier process's machine: every adoption fails with this message.
    pub adoption_failure: Option<String>,
    /// What [`Vm::trouble`] tells, in machines that run and in those to come.
    pub trouble: Option<String>,
}

impl Faults {
    fn can_end(&self) -> Result<(), VmmError> {
        match self.end_failure.clone() {
            Some(message) => Err(VmmError::Control {
                operation: "the kill",
                message,
            }),
            None => Ok(()),
        }
    }
}

/// A monitor of fake machines.
pub struct FakeVmm {
    capabilities: Capabilities,
    guest: GuestMain,
    faults: Arc<Mutex<Faults>>,
}

impl FakeVmm {
    /// A monitor whose machines all run this guest.
    pub fn new(guest: GuestMain) -> FakeVmm {
        FakeVmm {
            capabilities: Capabilities {
                kind: VmmKind::Fake,
                version: "1".to_owned(),
                accelerators: vec![Accelerator::Tcg],
                shares: Ok(()),
                user_network: Ok(()),
                network_rate: Ok(()),
                own_root: Ok(()),
                pause: true,
                vcpus_max: 64,
                capture: Ok(()),
                cpu_template: None,
            },
            guest,
            faults: Arc::default(),
        }
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        *machine::locked(&self.faults) = faults;
    }

    /// Replaces what [`FakeVmm::capabilities`] answers, for tests of refusals.
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> FakeVmm {
        self.capabilities = capabilities;
        self
    }

    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        let unsupported = |reason: String| VmmError::Unsupported {
            kind: VmmKind::Fake,
            reason,
        };
        if !self.capabilities.accelerators.contains(&plan.accelerator) {
            return Err(unsupported(format!("no accelerator {}", plan.accelerator)));
        }
        if plan.vcpus == 0 || plan.vcpus > self.capabilities.vcpus_max {
            return Err(unsupported(format!("{} vCPUs", plan.vcpus)));
        }
        if !plan.shares.is_empty() {
            self.capabilities.shares.clone().map_err(unsupported)?;
        }
        if plan.nic.is_some() {
            self.capabilities
                .user_network
                .clone()
                .map_err(unsupported)?;
        }
        if let Start::Fork(capture) = &plan.start
            && let Some(difference) = capture.info().difference(&machine::info(plan))
        {
            return Err(unsupported(format!(
                "going on from a machine of another kind: {difference}"
            )));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Vmm for FakeVmm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        FakeVmm::check(self, plan)
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<Box<dyn Vm>, VmmError> {
        self.check(plan)?;
        for disk in &plan.disks {
            std::fs::File::options()
                .read(true)
                .write(!disk.read_only)
                .open(&disk.path)
                .map_err(|source| VmmError::Io {
                    operation: "opening the disk",
                    path: disk.path.clone(),
                    source,
                })?;
        }
        if let Some(message) = machine::locked(&self.faults).launch_failure.clone() {
            return Err(VmmError::Launch {
                step: "starting the machine",
                message,
            });
        }
        if let Start::Fork(_) = &plan.start {
            let faults = machine::locked(&self.faults).clone();
            if let Some(message) = faults.fork_failure {
                return Err(VmmError::Launch {
                    step: crate::vmm::GOING_ON,
                    message,
                });
            }
            if let Some(message) = faults.fork_shortage {
                return Err(VmmError::Launch {
                    step: "creating its cgroup",
                    message,
                });
            }
            let port = plan.nic.as_ref().and_then(|nic| nic.ports.first());
            if let (true, Some(port)) = (faults.ports_taken, port) {
                return Err(VmmError::PortTaken(port.clone()));
            }
        }
        let machine = Machine::start(plan, self.guest.clone(), self.faults.clone())?;
        Ok(Box::new(FakeVm::new(machine, plan.capturable)))
    }

    async fn adopt(&self, dir: &Path, record: &VmRecord) -> Result<Adoption, VmmError> {
        if let Some(message) = machine::locked(&self.faults).adoption_failure.clone() {
            return Err(VmmError::Control {
                operation: "taking the machine over",
                message,
            });
        }
        match Machine::find(dir).filter(|machine| machine.record() == record) {
            Some(machine) => match machine.end() {
                None => Ok(Adoption::Running(Box::new(FakeVm::new(machine, false)))),
                Some(end) => Ok(Adoption::Gone(end)),
            },
            None => Ok(Adoption::Gone(VmEnd::Crashed {
                message: "no such machine in this process".to_owned(),
            })),
        }
    }

    async fn sweep(&self, _id: &MachineId, dir: &Path) -> Result<(), VmmError> {
        machine::locked(&self.faults).can_end()?;
        if let Some(machine) = Machine::find(dir) {
            machine.finish(VmEnd::Killed);
        }
        Ok(())
    }
}
