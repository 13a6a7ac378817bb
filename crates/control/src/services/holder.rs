//! A node's side of one copy: gets the lease, renews it, and stops the copy in time when it cannot.
//!
//! ```text
//! acquiring ── a majority grants ──► holding ── task ended ──► finishing ── a majority notes it ──► over
//!     │ denied, or time is up           │ the lease runs out, or is denied      │ the lease runs out
//!     ▼ Withdraw, Failed                ▼ Stop                                  ▼ Ended
//!    over                              over                                    over
//! ```
//! A holder that is over never comes back: another try is another holder, under a larger generation.

use super::{Denied, FromKeeper, Keepers, Slot, Terms, ToKeeper};
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
    /// The task's end is known to the keepers; or, where `false`, may not be.
    Ended(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Acquiring,
    Holding,
    Finishing,
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
            since: now,
            next_ask: now,
            number: 0,
            sent: BTreeMap::new(),
            granted: BTreeMap::new(),
            carried: None,
            denied: BTreeSet::new(),
            noted: BTreeSet::new(),
            largest: generation,
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
            Phase::Holding | Phase::Finishing => {
                self.next_ask.min(self.stop_at().unwrap_or(Duration::ZERO))
            }
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
            Phase::Finishing if self.valid_until().is_none_or(|until| now >= until) => {
                self.phase = Phase::Over;
                outputs.push(HolderOutput::Ended(false));
                return outputs;
            }
            Phase::Acquiring | Phase::Holding | Phase::Finishing => {}
            Phase::Over => return outputs,
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
            let question = if self.phase == Phase::Finishing {
                ToKeeper::Done { slot, generation }
            } else {
                self.number += 1;
                self.sent.insert(self.number, now);
                if self.sent.len() > SENT_MAX {
                    self.sent.pop_first();
                }
                ToKeeper::Ask {
                    number: self.number,
                    epoch: self.keepers.epoch,
                    slot,
                    generation,
                }
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
                    outputs.push(HolderOutput::Start);
                }
            }
            FromKeeper::Denied {
                slot,
                generation,
                why,
            } if (slot, generation) == self.what() => self.refused(now, from, why, &mut outputs),
            FromKeeper::DoneNoted(slot, generation) if (slot, generation) == self.what() => {
                self.noted.insert(from);
                if self.phase == Phase::Finishing && self.noted.len() >= self.keepers.majority() {
                    self.phase = Phase::Over;
                    outputs.push(HolderOutput::Ended(true));
                }
            }
            FromKeeper::Denied { .. }
            | FromKeeper::DoneNoted(..)
            | FromKeeper::LostNoted(..)
            | FromKeeper::Promised { .. }
            | FromKeeper::Sealed { .. } => {}
        }
        outputs
    }

    /// The task has ended by itself.
    pub fn finish(&mut self, now: Duration) -> Vec<HolderOutput> {
        if self.phase != Phase::Holding {
            return Vec::new();
        }
        self.phase = Phase::Finishing;
        self.next_ask = now;
        self.poll(now)
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
            Phase::Finishing | Phase::Over => {}
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
            self.next_ask = now;
        }
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
        // So many deny that the others are no majority any more.
        if self.denied.len() + self.keepers.majority() > self.keepers.nodes.len() {
            match self.phase {
                Phase::Acquiring => self.give_up(outputs),
                Phase::Holding => {
                    self.phase = Phase::Over;
                    outputs.push(HolderOutput::Stop);
                }
                Phase::Finishing | Phase::Over => {}
            }
        }
    }

    fn give_up(&mut self, outputs: &mut Vec<HolderOutput>) {
        self.phase = Phase::Over;
        let (slot, generation) = (self.slot, self.generation);
        self.to_all(&ToKeeper::Withdraw { slot, generation }, outputs);
        outputs.push(HolderOutput::Failed(self.largest));
    }

    fn to_all(&self, question: &ToKeeper, outputs: &mut Vec<HolderOutput>) {
        for keeper in &self.keepers.nodes {
            outputs.push(HolderOutput::Send(*keeper, question.clone()));
        }
    }
}
