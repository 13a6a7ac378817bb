//! How tasks end on the node that runs them.
//!
//! A task is done where its own program has ended; where only its machine has (the monitor died, the guest's kernel panicked,
//! the host went down) nobody knows how far the program came: an at-most-once task is lost then, an at-least-once task is
//! run again. Which of these it is keepers decide, by whether they are told an outcome or that the copy is gone.

use super::copies::{Body, Job};
use super::{Known, Task};
use crate::fence::boottime;
use crate::machine::Handle;
use std::sync::Arc;
use vistara_control::services::wire;
use vistara_control::services::{Holder, ServiceId, Slot};
use vistara_model::{EndReason, MachineState};

/// What the end of a task's machine says of the task.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    /// Its program has ended, with this exit code.
    Program(u8),
    /// Its program never began, for this reason.
    NeverBegan(String),
    /// Nobody knows how far it came, for this reason.
    Unclear(String),
}

/// Of a machine that had been told to end before this start of the node (`found`) it is not known who stopped it: its user, or
/// the node when its lease was lost.
fn ending(end: Option<&EndReason>, found: bool) -> Ending {
    let Some(end) = end else {
        return Ending::Unclear("its machine has ended without a reason".to_owned());
    };
    let why = || {
        end.message()
            .unwrap_or_else(|| "its machine was stopped".to_owned())
    };
    match end {
        EndReason::Exited { .. } | EndReason::StartFailed { .. } | EndReason::TimedOut => {
            Ending::Program(end.exit_code())
        }
        EndReason::Stopped { .. } if !found => Ending::Program(end.exit_code()),
        EndReason::PrepareFailed { .. } => Ending::NeverBegan(why()),
        EndReason::Stopped { .. }
        | EndReason::GuestPanic { .. }
        | EndReason::VmmFailed { .. }
        | EndReason::BootFailed { .. }
        | EndReason::Lost { .. } => Ending::Unclear(why()),
    }
}

impl Task {
    /// A machine of an earlier start that has ended: of a task whose program has come to its end keepers may not know.
    pub(super) fn take_over_ended(&mut self, handle: &Arc<Handle>) {
        let now = boottime();
        let record = handle.record();
        let (Some(own), Some(copy)) = (self.own(), &record.copy_of) else {
            return;
        };
        let number = u128::from_str_radix(&copy.service, 16).map(ServiceId);
        let Some(known) = number.ok().and_then(|id| self.known.get_mut(&id)) else {
            return;
        };
        let document = known.sealed.document();
        if document.removed {
            return self.clear(Arc::clone(handle), None);
        }
        let (Some(keepers), true) = (known.keepers.clone(), document.task.is_some()) else {
            return;
        };
        let Ending::Program(code) = ending(record.end.as_ref(), true) else {
            return;
        };
        if known.jobs.contains_key(&copy.number) {
            return;
        }
        let slot = Slot {
            service: known.id(),
            number: copy.number,
        };
        let mut holder = Holder::resumed(self.terms, slot, copy.generation, keepers, now);
        let outputs = holder.finish(now, own, code);
        let mut job = Job::new(holder, None, None);
        job.body = Body::Ended;
        known.jobs.insert(copy.number, job);
        self.carry_out(slot, outputs);
    }

    /// A task's machine has ended.
    pub(super) fn task_ended(&mut self, slot: Slot, end: Option<&EndReason>) {
        let now = boottime();
        let (Some(own), Some(job)) = (self.own(), self.job(slot)) else {
            return;
        };
        let ending = ending(end, job.end_found);
        tracing::info!(
            service = super::id_text(slot.service),
            slot = slot.number,
            ?ending,
            "a task's machine has ended"
        );
        match ending {
            Ending::Program(code) => {
                job.body = Body::Ended;
                let outputs = job.holder.finish(now, own, code);
                self.carry_out(slot, outputs);
            }
            // What it printed stays to be read until the slot is run here again, or the task is forgotten.
            Ending::NeverBegan(why) => {
                job.body = Body::None;
                self.could_not(slot, why);
            }
            Ending::Unclear(why) => {
                job.body = Body::None;
                self.let_go(slot, &why);
            }
        }
    }

    /// Keepers have noted that a task is done; or others were granted it, and this end counts no more. Its machine stays, for
    /// what it printed.
    pub(super) fn told(&mut self, slot: Slot, noted: bool) {
        let known = self.known.get_mut(&slot.service);
        if let Some(job) = known.and_then(|known| known.jobs.remove(&slot.number)) {
            let generation = job.holder.generation().0;
            tracing::info!(
                service = super::id_text(slot.service),
                slot = slot.number,
                generation,
                noted,
                "keepers were told that a task is done"
            );
        }
    }

    /// The copies that this node holds, and the machine of a task that has ended here.
    pub(super) fn shown_copies(&self, known: &Known) -> Vec<wire::Copy> {
        let mut copies: Vec<wire::Copy> = known.jobs.values().map(Job::shown).collect();
        if known.document().task.is_none() {
            return copies;
        }
        let service = super::id_text(known.id());
        for handle in self.node.all() {
            let record = handle.record();
            let copy = record.copy_of.as_ref();
            let Some(copy) = copy.filter(|copy| copy.service == service) else {
                continue;
            };
            let runs = known.jobs.get(&copy.number);
            if record.state != MachineState::Ended
                || runs.is_some_and(|job| !matches!(job.body, Body::Ended))
            {
                continue;
            }
            copies.retain(|shown| shown.number != copy.number);
            copies.push(wire::Copy {
                number: copy.number,
                generation: copy.generation,
                machine: Some(handle.id.to_string()),
                state: MachineState::Ended.to_string(),
                restarts: 0,
                trouble: None,
            });
        }
        copies
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_model::ExitStatus;

    #[test]
    fn only_what_a_program_did_itself_is_its_tasks_end() {
        let message = || "why".to_owned();
        let status = ExitStatus::Code(3);
        let exited = EndReason::Exited {
            status,
            out_of_memory: false,
        };
        let missing = EndReason::StartFailed {
            code: 127,
            message: message(),
        };
        let stopped = EndReason::Stopped {
            status: Some(status),
        };
        let unprepared = EndReason::PrepareFailed { message: message() };
        for found in [false, true] {
            assert_eq!(ending(Some(&exited), found), Ending::Program(3));
            assert_eq!(ending(Some(&missing), found), Ending::Program(127));
            let never = Ending::NeverBegan(message());
            assert_eq!(ending(Some(&unprepared), found), never);
            for unclear in [
                EndReason::VmmFailed { message: message() },
                EndReason::BootFailed { message: message() },
                EndReason::Lost { message: message() },
                EndReason::GuestPanic { message: message() },
            ] {
                let ending = ending(Some(&unclear), found);
                assert!(matches!(ending, Ending::Unclear(_)), "{ending:?}");
            }
            assert!(matches!(ending(None, found), Ending::Unclear(_)));
        }
        // Stopped by its user; or, for all that is known, by a node that had lost its lease.
        assert_eq!(ending(Some(&stopped), false), Ending::Program(3));
        assert!(matches!(ending(Some(&stopped), true), Ending::Unclear(_)));
    }
}
