//! A second run, on Linux: of a program that failed as a unikernel and may be run twice, or in the place of a provisional run
//! that never was.

use super::Actor;
use crate::logbook::Stream;
use crate::machine::now_ns;
use crate::machine::unikernel::{Again, Undone, after, take_up_held, undone, unseen_end};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use vistara_control::{Event, Lifecycle, rerun_follows};
use vistara_model::{EndReason, ExitStatus, MachineState, Payload};

impl Actor {
    /// A unikernel's end is on its disk even where no session saw it to the last.
    pub(super) async fn learn_unseen_end(&mut self, event: &Event) {
        if self.record.backend.payload != Payload::Nanos || self.life.end().is_some() {
            return;
        }
        if self.record.provisional {
            return self.learn_held_end().await;
        }
        let (dir, event) = (self.dir.clone(), event.clone());
        let found = tokio::task::spawn_blocking(move || unseen_end(&dir, &event)).await;
        if let Ok(Some((exited, words))) = found {
            self.shared.hear(&words);
            self.note_cut();
            self.on(exited).await;
        }
    }

    /// A provisional run has an end only where it stands.
    async fn learn_held_end(&mut self) {
        let begin = self.record.log_base.stdout;
        loop {
            let (dir, log) = (self.dir.clone(), Arc::clone(&self.log));
            let held =
                tokio::task::spawn_blocking(move || take_up_held(&dir, &log, begin, now_ns()));
            let held = held.await.unwrap_or_else(|error| Err(error.into()));
            let error = match held {
                Ok(Some(status)) => {
                    self.trouble = None;
                    if matches!(status, ExitStatus::Signal(_)) {
                        // It may have been ended while it still spoke; the file does not say.
                        self.note_cut();
                    }
                    let out_of_memory = false;
                    let exited = Event::ProgramExited {
                        status,
                        out_of_memory,
                    };
                    return self.on(exited).await;
                }
                Ok(None) => return,
                Err(error) => error,
            };
            // It stands, and some of it may have been shown: whatever comes now, it is not begun anew.
            if error.kind() == std::io::ErrorKind::InvalidData {
                self.shared.asked_to_end.store(true, Ordering::Relaxed);
                let message = format!("what it printed was set aside and is damaged: {error}");
                return self.on(Event::Lost(message)).await;
            }
            tracing::error!(machine = %self.record.id, %error, "the output of a run that stands could not be shown yet");
            self.trouble = Some(format!(
                "its output cannot be recorded and waits until it can ({error}); free some disk space"
            ));
            self.publish().await;
            tokio::time::sleep(super::earlier::ADOPT_PAUSE).await;
        }
    }

    /// Begins anew on Linux where a unikernel was the wrong choice and the program may be run twice, or has not run at all
    /// as far as anybody can tell.
    pub(super) async fn run_again(&mut self) -> bool {
        if self.record.backend.payload != Payload::Nanos {
            return false;
        }
        let again = match self.record.provisional {
            true => match self.undo().await {
                Some(Err(message)) => {
                    self.end_undone(message);
                    None
                }
                Some(Ok(again)) => Some(again),
                None => None,
            },
            false => self.retry().await,
        };
        let Some(again) = again else {
            return false;
        };
        tracing::info!(machine = %self.record.id, reason = again.reason, "a program is run again");
        self.clear_away().await;
        self.life = Lifecycle::default();
        let record = &mut self.record;
        if !record.provisional {
            // A run that never was has taken of the time that the user gives it, all the same.
            record.started_ns = None;
            self.limit = None;
        }
        record.generation.0 += 1;
        record.proof.begin_again();
        record.undone = record.provisional.then(|| again.reason.clone());
        record.undone_boot_id =
            (record.undone.as_ref()).and_then(|_| vistara_host::facts::boot_id().ok());
        record.provisional = false;
        record.retried = true;
        record.log_base = self.log.offsets();
        record.hypervisor = again.choice.hypervisor;
        record.backend = again.choice.backend;
        record.kernel = again.kernel;
        record.spec.memory = again.memory;
        record.reasons = again.choice.reasons;
        record.reasons.push(again.reason);
        record.state = self.life.state();
        record.end = None;
        record.vm = None;
        self.grace = None;
        // That was the other's.
        self.usage = None;
        self.shared.started.store(false, Ordering::Relaxed);
        self.shared.asked_to_end.store(false, Ordering::Relaxed);
        self.prepare(self.zero.unwrap_or_else(Instant::now));
        true
    }

    /// The run that was undone was the last one: there is no Linux for it here.
    fn end_undone(&mut self, message: String) {
        tracing::warn!(machine = %self.record.id, message, "an undone run cannot be run on Linux");
        self.record.undone = Some(message.clone());
        let end = Some(EndReason::PrepareFailed { message });
        self.life = Lifecycle::resumed(MachineState::Ended, end.clone());
        self.record.end = end;
    }

    /// Whether the node ended while it prepared the run on Linux that is to be in the place of an undone one.
    pub(super) fn is_between_runs(&self) -> bool {
        let record = &self.record;
        let boot_id = vistara_host::facts::boot_id().ok();
        record.undone.is_some()
            && record.vm.is_none()
            && record.end.is_none()
            && record.state == MachineState::Preparing
            // What went with its host does not come back unasked.
            && (boot_id.is_some() && record.undone_boot_id == boot_id)
    }

    /// The run in the place of a provisional one, or why there can be none; nothing where that stands or somebody has ended it.
    async fn undo(&mut self) -> Option<Result<Again, String>> {
        let end = self.record.end.clone()?;
        let asked_to_end = self.shared.asked_to_end.load(Ordering::Relaxed);
        let stands = matches!(end, EndReason::Exited { .. }) && self.undone.is_none();
        if stands || !rerun_follows(&end, asked_to_end) || self.lost_with_the_host() {
            return None;
        }
        let why = self.undone.take().unwrap_or_else(|| Undone {
            seen: end
                .message()
                .unwrap_or_else(|| "its machine ended before it did".to_owned()),
            // It need not have been the command.
            learned: false,
        });
        Some(undone(&self.node, &self.record, why).await)
    }

    /// Whether the machine went when its host did, so that it is not to come back unasked, or was not there yet.
    fn lost_with_the_host(&self) -> bool {
        if !matches!(self.record.end, Some(EndReason::Lost { .. })) {
            return false;
        }
        let boot_id = vistara_host::facts::boot_id().ok();
        let vm = self.record.vm.as_ref();
        vm.is_none_or(|vm| Some(&vm.boot_id) != boot_id.as_ref())
    }

    async fn retry(&self) -> Option<Again> {
        // What a user ends is not begun again.
        if self.shared.asked_to_end.load(Ordering::Relaxed) {
            return None;
        }
        let console = self.shared.last_words();
        let again = after(&self.node, &self.record, &console).await?;
        let notice = format!("vistara: {}\n", again.reason);
        let (log, at) = (Arc::clone(&self.log), self.log.offsets().stderr);
        let told = tokio::task::spawn_blocking(move || {
            log.append(Stream::Stderr, at, now_ns(), notice.as_bytes())
        });
        if !matches!(told.await, Ok(Ok(()))) {
            // It stands with the choice's reasons as well.
            tracing::warn!(machine = %self.record.id, "the notice of a second run could not be recorded");
        }
        Some(again)
    }
}
