//! Taking over what an earlier node left: machines that run on, those that ended meanwhile, and what a crash left half made.

use super::Node;
use crate::fault::chain;
use crate::logbook::{Limits, LogBook};
use crate::machine::{Actor, Loaded, Origin, Record, load, machine_dirs};
use crate::stock::Note;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vistara_control::{Event, VmGone};
use vistara_host::process::{ProcessHandle, ProcessIdentity};
use vistara_machine::{Adoption, Vm, VmEnd};
use vistara_model::{EndReason, MachineId, MachineState};

/// How long a killed monitor may take to be gone: the kernel frees a guest of some GiB in well under a second.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// What became of an earlier node's machine.
pub(crate) enum Fate {
    /// Its monitor runs.
    Running(Arc<dyn Vm>),
    /// It is over, for this reason.
    Over(Event),
}

impl Node {
    /// Takes over every machine whose directory is here.
    pub(super) async fn adopt_all(self: &Arc<Self>) {
        let root = self.options.state_dir.join("machines");
        let dirs = match machine_dirs(&root) {
            Ok(dirs) => dirs,
            Err(error) => {
                tracing::error!(path = %root.display(), %error, "machines of an earlier node cannot be listed");
                return;
            }
        };
        for (id, dir) in dirs {
            if let Err(message) = self.adopt(&id, dir.clone()).await {
                tracing::error!(machine = %id, path = %dir.display(), message, "a machine could not be taken over");
            }
        }
    }

    async fn adopt(self: &Arc<Self>, id: &MachineId, dir: PathBuf) -> Result<(), String> {
        let record = match load(&dir).map_err(|error| error.to_string())? {
            Loaded::Record(record) => *record,
            Loaded::Nothing => {
                let cleared = self.clear_rest(id, &dir).await;
                if cleared.is_err() {
                    self.machines().left.insert(id.clone(), dir);
                }
                return cleared;
            }
            Loaded::Damaged(why) => return Err(format!("its record is damaged: {why}")),
            Loaded::Foreign(format) => {
                return Err(format!(
                    "its record has format {format}, and this version reads {}",
                    Record::FORMAT
                ));
            }
        };
        let log_dir = dir.join("log");
        let (log, origin) = if record.state == MachineState::Ended {
            (LogBook::closed(&log_dir, Limits::default()), Origin::Ended)
        } else {
            let log =
                LogBook::open(&log_dir, Limits::default()).map_err(|error| error.to_string())?;
            (log, Origin::Earlier)
        };
        let handle = Actor::start(Arc::clone(self), dir, record, log, origin);
        self.machines().by_id.insert(id.clone(), handle);
        Ok(())
    }

    /// Clears away what is left of a machine that never began. Where its monitor may run, and cannot be ended now, its
    /// directory stays, which is all that is known of it, and its number is nobody else's.
    async fn clear_rest(&self, id: &MachineId, dir: &Path) -> Result<(), String> {
        let note = Note::read(dir).filter(Note::may_run);
        if let Some(note) = &note {
            self.machines().slots.insert(note.slot);
            let vmms = self.all_vmms();
            if !vmms.iter().any(|vmm| note.is_of(vmm.capabilities().kind)) {
                return Err(format!("{} is not usable on this host now", note.vmm));
            }
        }
        tracing::info!(machine = %id, "the rest of a machine that never began is cleared away");
        self.sweep(id, dir).await?;
        std::fs::remove_dir_all(dir).map_err(|error| error.to_string())?;
        if let Some(note) = note {
            self.release_slot(note.slot);
        }
        Ok(())
    }

    /// Tries again to clear away what could not be, after monitors were looked for anew.
    pub(crate) async fn clear_left(&self) {
        let left = std::mem::take(&mut self.machines().left);
        for (id, dir) in left {
            if let Err(message) = self.clear_rest(&id, &dir).await {
                tracing::error!(machine = %id, path = %dir.display(), message, "the rest of a machine stays");
                self.machines().left.insert(id, dir);
            }
        }
    }

    /// What became of a machine that an earlier node had. An error means that it cannot be told now; asking again later
    /// may do.
    pub(crate) async fn origin(&self, record: &Record, dir: &Path) -> Result<Fate, String> {
        let Some(vm) = &record.vm else {
            self.sweep(&record.id, dir).await?;
            let event = match &record.end {
                Some(EndReason::Stopped { .. }) => {
                    Event::Lost("it was stopped while it was being prepared".to_owned())
                }
                _ => Event::Lost("the node ended while the machine was being prepared".to_owned()),
            };
            return Ok(Fate::Over(event));
        };
        let lost = |message: String| Ok(Fate::Over(Event::Lost(message)));
        let boot_id = vistara_host::facts::boot_id().map_err(|error| error.to_string())?;
        if vm.boot_id != boot_id {
            return lost("the host was restarted while the machine ran".to_owned());
        }
        let Some(vmm) = self.mechanisms.vmm(vm.kind) else {
            return Err(format!("{} is not usable on this host now", vm.kind));
        };
        match vmm.adopt(dir, vm).await.map_err(|error| chain(&error))? {
            Adoption::Running(vm) => Ok(Fate::Running(Arc::from(vm))),
            Adoption::Gone(VmEnd::GuestPanic { message }) => {
                Ok(Fate::Over(Event::VmGone(VmGone::GuestPanic(message))))
            }
            Adoption::Gone(VmEnd::GuestOff) => Ok(Fate::Over(Event::VmGone(VmGone::GuestOff))),
            Adoption::Gone(VmEnd::Killed) => {
                lost("its monitor ended while no node was running".to_owned())
            }
            Adoption::Gone(VmEnd::Crashed { message }) => lost(format!(
                "its monitor died while no node was running: {message}"
            )),
        }
    }

    /// Ends a machine that cannot be taken over: its monitor and what belongs to it, by what is recorded of them.
    pub(crate) async fn end_unreachable(&self, record: &Record, dir: &Path) -> Result<(), String> {
        let Some(vm) = &record.vm else {
            return self.sweep(&record.id, dir).await;
        };
        if self.mechanisms.vmm(vm.kind).is_none() {
            // Its backend would know what else belongs to it; the process is what matters.
            let identity = ProcessIdentity {
                pid: vm.pid,
                start_ticks: vm.pid_start_ticks,
                boot_id: vm.boot_id.clone(),
            };
            let process = ProcessHandle::adopt(&identity).map_err(|error| error.to_string())?;
            if let Some(process) = process {
                process.kill().map_err(|error| error.to_string())?;
                tokio::time::timeout(KILL_LIMIT, process.wait())
                    .await
                    .map_err(|_| format!("its monitor (process {}) does not end", vm.pid))?
                    .map_err(|error| error.to_string())?;
            }
        }
        self.sweep(&record.id, dir).await
    }

    /// Ends what a crash between a launch and its record may have left.
    async fn sweep(&self, id: &MachineId, dir: &Path) -> Result<(), String> {
        for vmm in self.all_vmms() {
            vmm.sweep(id, dir).await.map_err(|error| chain(&error))?;
        }
        Ok(())
    }
}
