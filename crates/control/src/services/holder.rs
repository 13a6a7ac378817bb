//! A node's side of one copy: gets the lease, renews it, and stops the copy in time when it cannot.
//!
//! ```text
//! acquiring ── a majority grants ──► holding ── task ended ──► finishing ── a majority notes it ──► over
//!     │ denied, or time is up           │ the lease runs out, or is denied      │ none can: others were granted it
//!     ▼ Withdraw, Failed                ▼ Stop                                  ▼ Ended(false)
//!    over                              over                                    over
//! ```
//! That a task has ended is said until it is noted, with or without a lease: nothing runs any more, and what a node that
//! was away knows is worth as much. So a node that has started again and finds the task's end finishes without having acquired.
//! A holder that is over never comes back: another try is another holder, under a larger generation.

use super::{Denied, FromKeeper, Keepers, Outcome, Slot, Terms, ToKeeper};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::{Generation, NodeId};

/// Questions whose time is remembered: more than are under way in one lease.
const SENT_MAX: usize = 16;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HolderOutput {
    /// Send this to a keeper.
    Send(NodeId, ToKeeper),
    /// Start the copy.
    Start,
    /// There is no lease to be had. The largest generation that was seen is told.
    Failed(Generation),
    /// Stop the copy now: it must be gone within [`Terms::stop_time`].
    Stop,
    /// The task's end is known to the keepers; or, where `false`, others were granted the slot and it counts no more.
    Ended(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Acquiring,
    Holding,
    Finishing(Outcome),
    Over,
}

/// One copy on one node.
#[derive(Debug, Clone)]
pub struct Holder {
    terms: Terms,
    slot: Slot,
    generation: Generation,
    keepers: Keepers,
    phase: Phase,
    /// Whether the copy may have run: it is never said then that it did not.
    began: bool,
    since: Duration,
    next_ask: Duration,
    number: u64,
    /// When each question was asked.
    sent: BTreeMap<u64, Duration>,
    /// When the last question was asked that each keeper granted.
    granted: BTreeMap<NodeId, Duration>,
    /// Until when a lease of earlier keepers counts.
    carried: Option<Duration>,
    denied: BTreeSet<NodeId>,
    noted: BTreeSet<NodeId>,
    superseded: BTreeSet<NodeId>,
    largest: Generation,
}

impl Holder {
    /// A node that has been picked for a slot. [`Holder::poll`] it.
    pub fn new(
        terms: Terms,
        slot: Slot,
        generation: Generation,
        keepers: Keepers,
        now: Duration,
    ) -> Holder {
        Holder {
            terms,
            slot,
            generation,
            keepers,
            phase: Phase::Acquiring,
            began: false,
            since: now,
            next_ask: now,
            number: 0,
            sent: BTreeMap::new(),
            granted: BTreeMap::new(),
            carried: None,
            denied: BTreeSet::new(),
            noted: BTreeSet::new(),
            superseded: BTreeSet::new(),
            largest: generation,
        }
    }

    /// A node that has started again and finds the copy that it had before: it asks for the lease anew, and where there is none to
    /// be had its copy has run all the same.
    pub fn resumed(
        terms: Terms,
        slot: Slot,
        generation: Generation,
        keepers: Keepers,
        now: Duration,
    ) -> Holder {
        Holder {
            began: true,
            ..Holder::new(terms, slot, generation, keepers, now)
        }
    }

    /// Which slot.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Under which generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether nothing more will come of it.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Whether its program has ended, and not all that are to note it have.
    pub fn is_finishing(&self) -> bool {
        matches!(self.phase, Phase::Finishing(_))
    }

    /// Until when the lease is valid, by this node's clock: the time from which on fewer than a majority's grants count.
    pub fn valid_until(&self) -> Option<Duration> {
        let mut asked: Vec<Duration> = (self.keepers.nodes.iter())
            .filter_map(|keeper| self.granted.get(keeper).copied())
            .collect();
        asked.sort_unstable_by(|one, other| other.cmp(one));
        let present = asked.get(self.keepers.majority() - 1);
        (present.map(|asked| *asked + self.terms.held())).max(self.carried)
    }

    /// When the copy has to begin to stop.
    fn stop_at(&self) -> Option<Duration> {
        (self.valid_until()).map(|until| until.saturating_sub(self.terms.stop_time))
    }

    /// When to [`Holder::poll`] next.
    pub fn wake_at(&self) -> Duration {
        match self.phase {
            Phase::Acquiring => self.next_ask.min(self.since + self.terms.acquire),
            Phase::Holding => self.next_ask.min(self.stop_at().unwrap_or(Duration::ZERO)),
            Phase::Finishing(_) => self.next_ask,
            Phase::Over => Duration::MAX,
        }
    }

    /// Does what is due. Late is safe for others only if the machine's clock stands still, too: the caller polls in time.
    pub fn poll(&mut self, now: Duration) -> Vec<HolderOutput> {
        let mut outputs = Vec::new();
        match self.phase {
            Phase::Acquiring if now >= self.since + self.terms.acquire => {
                self.give_up(&mut outputs);
                return outputs;
            }
            Phase::Holding if self.stop_at().is_none_or(|at| now >= at) => {
                self.phase = Phase::Over;
                outputs.push(HolderOutput::Stop);
                return outputs;
            }
            Phase::Finishing(outcome) if now >= self.next_ask => {
                self.next_ask = now + self.terms.acquire / 2;
                let slot = self.slot;
                let done = ToKeeper::Done { slot, outcome };
                let late = (self.keepers.nodes.iter()).filter(|one| !self.noted.contains(one));
                outputs.extend(late.map(|keeper| HolderOutput::Send(*keeper, done.clone())));
                return outputs;
            }
            Phase::Acquiring | Phase::Holding => {}
            Phase::Finishing(_) | Phase::Over => return outputs,
        }
        if now >= self.next_ask {
            let (slot, generation) = (self.slot, self.generation);
            // While acquiring, and after a renewal that failed, soon again: an answer may have been lost.
            self.next_ask = now
                + if self.fresh(now) {
                    self.terms.renew
                } else {
                    self.terms.acquire / 4
                };
            self.number += 1;
            self.sent.insert(self.number, now);
            if self.sent.len() > SENT_MAX {
                self.sent.pop_first();
            }
            let question = ToKeeper::Ask {
                number: self.number,
                epoch: self.keepers.epoch,
                slot,
                generation,
            };
            self.to_all(&question, &mut outputs);
        }
        outputs
    }

    /// Whether the lease is at most one renewal and a bit old.
    fn fresh(&self, now: Duration) -> bool {
        let spent = self.terms.renew * 3 / 2;
        (self.valid_until()).is_some_and(|until| until + spent > now + self.terms.held())
    }

    /// Takes a keeper's answer.
    pub fn handle(&mut self, now: Duration, from: NodeId, answer: FromKeeper) -> Vec<HolderOutput> {
        let mut outputs = Vec::new();
        if !self.keepers.nodes.contains(&from) || self.phase == Phase::Over {
            return outputs;
        }
        match answer {
            FromKeeper::Granted {
                number,
                slot,
                generation,
            } => {
                let asked = self.sent.get(&number).copied();
                if let Some(asked) = asked.filter(|_| (slot, generation) == self.what()) {
                    let last = self.granted.entry(from).or_insert(asked);
                    *last = (*last).max(asked);
                    self.denied.remove(&from);
                }
                let valid = self.stop_at().is_some_and(|at| now < at);
                if self.phase == Phase::Acquiring && valid {
                    self.phase = Phase::Holding;
                    self.began = true;
                    outputs.push(HolderOutput::Start);
                }
            }
            FromKeeper::Denied {
                slot,
                generation,
                why,
            } if (slot, generation) == self.what() => self.refused(now, from, why, &mut outputs),
            FromKeeper::DoneNoted(slot, generation) if (slot, generation) == self.what() => {
                self.superseded.remove(&from);
                self.noted.insert(from);
                let finishing = matches!(self.phase, Phase::Finishing(_));
                if finishing && self.noted.len() >= self.keepers.majority() {
                    self.phase = Phase::Over;
                    outputs.push(HolderOutput::Ended(true));
                }
            }
            FromKeeper::Superseded(slot, generation) if (slot, generation) == self.what() => {
                self.superseded.insert(from);
                let finishing = matches!(self.phase, Phase::Finishing(_));
                if finishing && self.is_beyond(&self.superseded) {
                    self.phase = Phase::Over;
                    outputs.push(HolderOutput::Ended(false));
                }
            }
            FromKeeper::Denied { .. }
            | FromKeeper::DoneNoted(..)
            | FromKeeper::Superseded(..)
            | FromKeeper::LostNoted(..)
            | FromKeeper::Promised { .. }
            | FromKeeper::Sealed { .. } => {}
        }
        outputs
    }

    /// The task has ended by itself, here, with this exit code.
    pub fn finish(&mut self, now: Duration, here: NodeId, exit_code: u8) -> Vec<HolderOutput> {
        match self.phase {
            Phase::Acquiring | Phase::Holding => {}
            Phase::Finishing(_) | Phase::Over => return Vec::new(),
        }
        self.phase = Phase::Finishing(Outcome {
            node: here,
            generation: self.generation,
            exit_code,
        });
        self.next_ask = now;
        self.poll(now)
    }

    /// The copy could not be made: whoever is next need neither wait nor take it for begun.
    pub fn never_ran(&mut self) -> Vec<HolderOutput> {
        let mut outputs = Vec::new();
        self.began = false;
        match self.phase {
            Phase::Acquiring | Phase::Holding => self.give_up(&mut outputs),
            Phase::Finishing(_) | Phase::Over => {}
        }
        outputs
    }

    /// The copy is gone: whoever is next need not wait for the lease's end.
    pub fn gone(&self) -> Vec<HolderOutput> {
        let mut outputs = Vec::new();
        let (slot, generation) = (self.slot, self.generation);
        self.to_all(&ToKeeper::Released { slot, generation }, &mut outputs);
        outputs
    }

    /// Ends it at the owner's word: stops a copy that runs, gives up a lease that is not there yet.
    pub fn end(&mut self) -> Vec<HolderOutput> {
        let mut outputs = Vec::new();
        match self.phase {
            Phase::Acquiring => self.give_up(&mut outputs),
            Phase::Holding => {
                self.phase = Phase::Over;
                outputs.push(HolderOutput::Stop);
            }
            Phase::Finishing(_) | Phase::Over => {}
        }
        outputs
    }

    /// Others look after it now, as it was told by somebody trusted.
    pub fn moved(&mut self, now: Duration, keepers: Keepers) {
        if keepers.epoch > self.keepers.epoch {
            // The earlier ones' grants count to their end: the present ones have taken them over as given later. They
            // count for a copy that runs, not for one that is to begin.
            self.carried = self
                .valid_until()
                .filter(|_| self.phase != Phase::Acquiring);
            self.granted.clear();
            self.sent.clear();
            self.keepers = keepers;
            self.denied.clear();
            self.noted.clear();
            self.superseded.clear();
            self.next_ask = now;
        }
    }

    /// So many say no that the others are no majority any more.
    fn is_beyond(&self, no: &BTreeSet<NodeId>) -> bool {
        no.len() + self.keepers.majority() > self.keepers.nodes.len()
    }

    fn what(&self) -> (Slot, Generation) {
        (self.slot, self.generation)
    }

    fn refused(
        &mut self,
        now: Duration,
        from: NodeId,
        why: Denied,
        outputs: &mut Vec<HolderOutput>,
    ) {
        match why {
            Denied::Moved(keepers) => {
                self.moved(now, keepers);
                return;
            }
            // Not for long: it is being handed over.
            Denied::Sealed => return,
            Denied::Old(generation) => self.largest = self.largest.max(generation),
            Denied::Held | Denied::Closed => {}
        }
        self.denied.insert(from);
        if self.is_beyond(&self.denied) {
            match self.phase {
                Phase::Acquiring => self.give_up(outputs),
                Phase::Holding => {
                    self.phase = Phase::Over;
                    outputs.push(HolderOutput::Stop);
                }
                Phase::Finishing(_) | Phase::Over => {}
            }
        }
    }

    fn give_up(&mut self, outputs: &mut Vec<HolderOutput>) {
        self.phase = Phase::Over;
        let (slot, generation) = (self.slot, self.generation);
        let parting = if self.began {
            ToKeeper::Released { slot, generation }
        } else {
            ToKeeper::Withdraw { slot, generation }
        };
        self.to_all(&parting, outputs);
        outputs.push(HolderOutput::Failed(self.largest));
    }

    fn to_all(&self, question: &ToKeeper, outputs: &mut Vec<HolderOutput>) {
        for keeper in &self.keepers.nodes {
            outputs.push(HolderOutput::Send(*keeper, question.clone()));
        }
    }
}
