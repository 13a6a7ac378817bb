//! Holding a machine still and letting it go on.

use super::{Actor, SIGNAL_BOUND};
use crate::fault::{Answer, Fault, chain};
use crate::machine::handle::Shared;
use crate::machine::now_ns;
use crate::machine::session::News;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinHandle;
use vistara_api::ErrorKind;
use vistara_control::Event;
use vistara_guest_client::Agent;
use vistara_machine::Vm;
use vistara_model::{MachineName, MachineState, Payload};

/// How long a guest may take to let its processes go on, and a lost session to come back for that, each time it is tried.
const THAW_BOUND: Duration = Duration::from_secs(5);
/// Tries before that is left to the next session, or to who resumes the machine; and the pause between two.
const THAW_TRIES: u32 = 5;
const THAW_PAUSE: Duration = Duration::from_millis(200);
/// How the trouble begins of a machine whose guest is not held, or does not go on, as its record says.
const NOT_AS_RECORDED: &str = "its guest could not be held, or let go on";

fn being_captured(name: &MachineName) -> Fault {
    Fault::conflict(format!("a snapshot of machine {name} is being taken"))
        .hint("try again in a moment")
}

impl Shared {
    /// Lets the processes go on that were held for a snapshot, through whichever session there is. Gives whether it was done
    /// here; where it was not, a session has done it, or [`Shared::to_thaw`] says that it is still to be done.
    pub(crate) async fn thaw(&self) -> bool {
        self.to_thaw.store(true, Ordering::SeqCst);
        self.reconnect.notify_one();
        for _ in 0..THAW_TRIES {
            if self.vm.borrow().is_none() {
                // The machine has ended.
                return false;
            }
            let mut sessions = self.agent.subscribe();
            let found = async { sessions.wait_for(Option::is_some).await.ok()?.clone() };
            let agent = tokio::time::timeout(THAW_BOUND, found).await;
            let Ok(Some(agent)) = agent else { continue };
            // Whoever takes the mark does it: what is done twice could let go what is held for another snapshot by then.
            if !self.to_thaw.swap(false, Ordering::SeqCst) {
                return false;
            }
            match tokio::time::timeout(THAW_BOUND, agent.thaw()).await {
                Ok(Ok(())) => {
                    set_clock(&agent).await;
                    return true;
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a guest did not let its processes go on")
                }
                Err(_) => tracing::debug!("a guest did not let its processes go on in time"),
            }
            // Before the session is looked for anew: one that began meanwhile has seen no mark.
            self.to_thaw.store(true, Ordering::SeqCst);
            // A session that is dead is followed by another, which has no reason to wait.
            self.reconnect.notify_one();
            let _ = tokio::time::timeout(THAW_PAUSE, sessions.changed()).await;
        }
        false
    }
}

/// Sets a guest's clock after it has stood still. One that does not answer goes on with the time that it has.
pub(in crate::machine) async fn set_clock(agent: &Agent) {
    match tokio::time::timeout(THAW_BOUND, agent.set_clock(now_ns())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a guest's clock was not set after a snapshot"),
        Err(_) => tracing::debug!("a guest's clock was not set in time after a snapshot"),
    }
}

impl Actor {
    /// A monitor's guest as the record has it: an earlier node may have died between the two.
    pub(super) async fn hold_as_recorded(&mut self, vm: &dyn Vm) {
        let done = match self.record.state {
            MachineState::Paused => vm.pause().await,
            _ => vm.resume().await,
        };
        if let Err(error) = done {
            let error = chain(&error);
            self.trouble = Some(format!("{NOT_AS_RECORDED}: {error}"));
            tracing::warn!(machine = %self.record.id, error, "a machine could not be held, or let go on");
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
        if held && self.unsaved {
            self.record.held = false;
            self.publish().await;
            let message = format!("the record of machine {name} cannot be written");
            return Err(Fault::new(ErrorKind::Host, message)
                .hint("free some disk space, or see `vistara doctor`"));
        }
        // One that is still said to be held is let go once more by the next node, which does no harm.
        Ok(())
    }

    /// A guest that should run may stand still all the same: its monitor did not let it go on after a snapshot.
    async fn resume_running(&mut self) -> Answer<()> {
        let to_thaw = self.shared.to_thaw.load(Ordering::SeqCst);
        if self.record.held && !to_thaw {
            return Err(being_captured(&self.record.name));
        }
        let Some(vm) = self.vm.clone() else {
            return Ok(());
        };
        vm.resume().await?;
        self.trouble_is_over().await;
        if to_thaw {
            let (shared, news) = (Arc::clone(&self.shared), self.news.0.clone());
            tokio::spawn(async move {
                if shared.thaw().await {
                    // The machine may have ended.
                    let _ = news.send(News::Thawed).await;
                }
            });
        }
        Ok(())
    }

    async fn trouble_is_over(&mut self) {
        let trouble = self.trouble.as_ref();
        if trouble.is_some_and(|trouble| trouble.starts_with(NOT_AS_RECORDED)) {
            self.trouble = None;
            self.publish().await;
        }
    }

    pub(super) async fn resume(&mut self) -> Answer<()> {
        let name = self.record.name.clone();
        match self.life.state() {
            MachineState::Running => return self.resume_running().await,
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
        self.trouble_is_over().await;
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
