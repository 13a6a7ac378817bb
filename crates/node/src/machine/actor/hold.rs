//! Holding a machine still and letting it go on.

use super::{Actor, SIGNAL_BOUND};
use crate::fault::{Answer, Fault, chain};
use crate::machine::now_ns;
use std::sync::Arc;
use tokio::task::JoinHandle;
use vistara_control::Event;
use vistara_machine::Vm;
use vistara_model::{MachineName, MachineState, Payload};

fn being_captured(name: &MachineName) -> Fault {
    Fault::conflict(format!("a snapshot of machine {name} is being taken"))
        .hint("try again in a moment")
}

impl Actor {
    /// A monitor's guest as the record has it: an earlier node may have died between the two.
    pub(super) async fn hold_as_recorded(&self, vm: &dyn Vm) {
        let done = match self.record.state {
            MachineState::Paused => vm.pause().await,
            _ => vm.resume().await,
        };
        if let Err(error) = done {
            // One whose guest is over, for example; its end is told anyway.
            tracing::debug!(machine = %self.record.id, error = chain(&error), "a machine could not be held, or let go on");
        }
    }

    pub(super) async fn pause(&mut self) -> Answer<()> {
        let name = self.record.name.clone();
        match self.life.state() {
            MachineState::Paused => return Ok(()),
            MachineState::Running if self.record.held => return Err(being_captured(&name)),
            MachineState::Running => {}
            state @ (MachineState::Preparing
            | MachineState::Booting
            | MachineState::Stopping
            | MachineState::Ended) => {
                return Err(Fault::conflict(format!(
                    "machine {name} is {state}, and only one that runs can be paused"
                )));
            }
        }
        if self.record.provisional {
            return Err(Fault::conflict(format!(
                "machine {name} is being tried as a unikernel, and may yet begin anew on Linux"
            ))
            .hint("try again in a few seconds"));
        }
        let Some(vm) = self.vm.clone() else {
            return Err(Fault::conflict(format!("machine {name} is not running")));
        };
        vm.pause().await?;
        self.on(Event::Paused).await;
        Ok(())
    }

    /// Notes whether the guest's processes are held still for a snapshot, before they are.
    pub(super) async fn note_held(&mut self, held: bool) -> Answer<()> {
        let name = self.record.name.clone();
        match self.life.state() {
            _ if !held => {}
            MachineState::Running if self.record.held => return Err(being_captured(&name)),
            MachineState::Running => {}
            MachineState::Paused => {
                return Err(Fault::conflict(format!("machine {name} is paused"))
                    .hint(format!("vistara resume {name}")));
            }
            state @ (MachineState::Preparing
            | MachineState::Booting
            | MachineState::Stopping
            | MachineState::Ended) => {
                return Err(Fault::conflict(format!(
                    "machine {name} is {state}, and only one that runs can be captured"
                )));
            }
        }
        self.record.held = held;
        self.unsaved = true;
        self.publish().await;
        Ok(())
    }

    pub(super) async fn resume(&mut self) -> Answer<()> {
        let name = self.record.name.clone();
        match self.life.state() {
            MachineState::Running => return Ok(()),
            MachineState::Paused => {}
            state @ (MachineState::Preparing
            | MachineState::Booting
            | MachineState::Stopping
            | MachineState::Ended) => {
                return Err(Fault::conflict(format!(
                    "machine {name} is {state}, not paused"
                )));
            }
        }
        let Some(vm) = self.vm.clone() else {
            return Err(Fault::conflict(format!("machine {name} is not running")));
        };
        vm.resume().await?;
        self.on(Event::Resumed).await;
        self.after_the_pause(&vm);
        Ok(())
    }

    /// As [`Actor::resume`], of a machine that is to end, for which nobody waits.
    pub(super) fn go_on(&mut self) {
        let Some(vm) = self.vm.clone() else { return };
        let (id, held) = (self.record.id.clone(), Arc::clone(&vm));
        tokio::spawn(async move {
            if let Err(error) = held.resume().await {
                tracing::warn!(machine = %id, error = chain(&error), "a paused machine could not go on");
            }
        });
        self.after_the_pause(&vm);
    }

    /// The guest's clock stood, and where a node has taken it over meanwhile nobody has spoken with it yet.
    fn after_the_pause(&mut self, vm: &Arc<dyn Vm>) {
        if self.session.as_ref().is_none_or(JoinHandle::is_finished) {
            self.begin_session(vm);
        }
        if self.record.backend.payload != Payload::Linux {
            return;
        }
        let mut sessions = self.shared.agent.subscribe();
        let id = self.record.id.clone();
        tokio::spawn(async move {
            let found = async { sessions.wait_for(Option::is_some).await.ok()?.clone() };
            let Ok(Some(agent)) = tokio::time::timeout(SIGNAL_BOUND, found).await else {
                return;
            };
            if let Err(error) = agent.set_clock(now_ns()).await {
                tracing::warn!(machine = %id, %error, "the clock of a machine that was paused could not be set");
            }
        });
    }
}
