//! The machine of an earlier node: what became of it is found out before anything else.
//!
//! One whose monitor runs, as far as is known, may not be to be taken over: its control socket is gone, it stands still, or its
//! backend is not usable on this host now. It is looked for again and again; who asks for its end meanwhile is heard.

use super::super::handle::Command;
use super::{Actor, STOP_GRACE, at};
use crate::node::Fate;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use vistara_control::{Event, VmGone};
use vistara_model::MachineState;

/// Pause before it is looked again what became of an earlier node's machine, where that could not be told.
pub(super) const ADOPT_PAUSE: Duration = Duration::from_secs(2);

/// What was asked of a machine that cannot be reached.
#[derive(Default)]
struct Unreachable {
    /// The request, for when it can be reached after all.
    asked: Option<Event>,
    /// When it is ended all the same.
    end_at: Option<Instant>,
}

impl Actor {
    /// Finds out what became of an earlier node's machine, however long that takes. Until then it is what it was; whoever wants
    /// it gone need not wait for that.
    pub(super) async fn find_out(&mut self) {
        let mut wanted = Unreachable::default();
        if self.record.end.is_some() || self.record.state == MachineState::Stopping {
            self.shared
                .asked_to_end
                .store(self.record.provisional, Ordering::Relaxed);
        }
        // Whether or not it can be reached, it ends with its lease.
        let guarded = self.set_guard(None).await;
        loop {
            match self.node.origin(&self.record, &self.dir).await {
                // What was left of the earlier node's work is swept away.
                Ok(Fate::Over(_)) if self.is_between_runs() => {
                    self.trouble = None;
                    self.clear_away().await;
                    return self.prepare(std::time::Instant::now());
                }
                Ok(Fate::Running(vm)) => {
                    self.trouble = None;
                    self.hold_as_recorded(vm.as_ref()).await;
                    self.take_up(vm);
                    let adopted = Event::Adopted {
                        signal: self.record.stop_signal,
                        grace: STOP_GRACE,
                    };
                    self.on(adopted).await;
                    if let Err(message) = guarded {
                        self.end_unguarded(message).await;
                    }
                    if matches!(
                        self.record.state,
                        MachineState::Running | MachineState::Paused
                    ) {
                        self.arm_time_limit();
                    }
                    if let Some(asked) = wanted.asked {
                        self.on(asked).await;
                    }
                    return;
                }
                Ok(Fate::Over(event)) => {
                    self.trouble = None;
                    self.record.proof.unseen = true;
                    self.learn_unseen_end(&event).await;
                    return self.on(event).await;
                }
                Err(message) => {
                    tracing::warn!(machine = %self.record.id, message, "a machine cannot be taken over yet");
                    self.trouble = Some(format!("it cannot be reached: {message}"));
                    self.publish().await;
                }
            }
            if self.wait_to_look_again(&mut wanted).await && self.end_unreachable(&mut wanted).await
            {
                return;
            }
        }
    }

    /// Waits until it is time to look again; whether the time for its end has come first.
    async fn wait_to_look_again(&mut self, wanted: &mut Unreachable) -> bool {
        let again = Instant::now() + ADOPT_PAUSE;
        loop {
            tokio::select! {
                biased;
                () = at(wanted.end_at) => return true,
                () = tokio::time::sleep_until(again) => return false,
                Some(command) = self.commands.recv() => {
                    let grace = match command {
                        Command::Kill => {
                            wanted.asked = Some(Event::KillAsked);
                            Duration::ZERO
                        }
                        Command::Stop { signal, grace } => {
                            let signal = signal.unwrap_or(self.record.stop_signal);
                            let stop = Event::StopAsked { signal, grace };
                            // Who wanted it killed is not asked to be patient.
                            wanted.asked.get_or_insert(stop);
                            grace
                        }
                        other @ (Command::Signal(_)
                        | Command::Pause(_)
                        | Command::Resume(_)
                        | Command::Hold(..)
                        | Command::Remove) => {
                            self.obey(other).await;
                            continue;
                        }
                    };
                    self.shared
                        .asked_to_end
                        .store(self.record.provisional, Ordering::Relaxed);
                    let end_at = Instant::now() + grace;
                    wanted.end_at = Some(wanted.end_at.map_or(end_at, |before| before.min(end_at)));
                }
            }
        }
    }

    /// Ends it by what is recorded of it; whether that is done. Where it is not, `trouble` says why and it is tried again.
    async fn end_unreachable(&mut self, wanted: &mut Unreachable) -> bool {
        match self.node.end_unreachable(&self.record, &self.dir).await {
            Ok(()) => {
                self.trouble = None;
                self.record.proof.unseen = true;
                self.on(Event::KillAsked).await;
                self.on(Event::VmGone(VmGone::Killed)).await;
                true
            }
            Err(message) => {
                tracing::error!(machine = %self.record.id, message, "a machine that cannot be reached cannot be ended");
                self.trouble = Some(format!("it cannot be ended: {message}"));
                self.publish().await;
                // Not at once again: what keeps it may need a moment, and others want to be heard meanwhile.
                wanted.end_at = Some(Instant::now() + ADOPT_PAUSE);
                false
            }
        }
    }
}
