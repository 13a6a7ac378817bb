//! A keeper: what it has granted, and what it grants.
//!
//! Invariants: a slot's generation never falls; while a grant is not over, nobody else is granted the slot; a keeper that is
//! sealed grants and changes nothing; what is done or lost is never granted again.

use super::{
    Ballot, Denied, End, FromKeeper, Keepers, Outcome, REPLICAS_MAX, Semantics, Spec, Terms,
    ToKeeper,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use vistara_model::{Generation, NodeId};

/// What a keeper knows of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Record {
    /// The largest generation that was granted.
    pub largest: Generation,
    /// Who was granted it last and did not withdraw, and under which generation.
    pub held: Option<(Generation, NodeId)>,
    /// Handed over with more than one holder: which of them had a majority is not known, so nobody renews.
    pub contested: bool,
    /// Until when, by the keeper's clock. Means nothing to others, nor to a later start.
    #[serde(skip)]
    pub until: Duration,
    /// How the task has ended. (Bytes and files of earlier versions have `false` here: nothing ended then.)
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// The task was lost, for as long as nobody says how it ended.
    pub lost: bool,
}

impl Record {
    /// Whether somebody was granted it and may have begun.
    pub fn was_granted(&self) -> bool {
        self.held.is_some() || self.contested
    }

    /// Whether somebody has it now.
    pub fn is_held(&self, now: Duration) -> bool {
        self.was_granted() && now < self.until
    }

    /// What of it is over, if anything.
    pub fn end(&self) -> Option<End> {
        let lost = self.lost.then_some(End::Lost);
        self.outcome.map(End::Done).or(lost)
    }

    /// What remains when another keeper's record is taken in: the larger generation, and everything that forbids.
    fn merge(self, other: Record) -> Record {
        let differ = self.held.is_some() && other.held.is_some() && self.held != other.held;
        let contested = self.contested || other.contested || differ;
        let later = |one: &Outcome| {
            other
                .outcome
                .is_none_or(|other| one.generation >= other.generation)
        };
        Record {
            largest: self.largest.max(other.largest),
            held: self.held.or(other.held).filter(|_| !contested),
            contested,
            until: self.until.max(other.until),
            outcome: self.outcome.filter(later).or(other.outcome),
            lost: self.lost || other.lost,
        }
    }
}

/// All records of two sets.
pub fn merge_records(all: &mut BTreeMap<u32, Record>, more: BTreeMap<u32, Record>) {
    for (number, record) in more {
        let known = all.entry(number).or_default();
        *known = known.merge(record);
    }
}

/// One keeper of one service. All of it is stored before an answer goes out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeper {
    node: NodeId,
    terms: Terms,
    spec: Spec,
    keepers: Keepers,
    records: BTreeMap<u32, Record>,
    promised: Option<Ballot>,
    accepted: Option<(Ballot, Keepers)>,
    /// Others look after it now.
    moved: Option<Keepers>,
}

/// What a keeper keeps over a restart. Renewals change nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperState {
    /// Whose it is.
    pub node: NodeId,
    /// What it looks after.
    pub spec: Spec,
    /// With whom.
    pub keepers: Keepers,
    /// What it knows of each slot.
    pub records: BTreeMap<u32, Record>,
    /// The largest ballot that it has promised.
    pub promised: Option<Ballot>,
    /// What it has sealed itself for.
    pub accepted: Option<(Ballot, Keepers)>,
    /// Who looks after it now.
    pub moved: Option<Keepers>,
}

impl Keeper {
    /// What is to be on disk before an answer goes out.
    pub fn state(&self) -> KeeperState {
        let mut records = self.records.clone();
        for record in records.values_mut() {
            record.until = Duration::ZERO;
        }
        KeeperState {
            node: self.node,
            spec: self.spec,
            keepers: self.keepers.clone(),
            records,
            promised: self.promised,
            accepted: self.accepted.clone(),
            moved: self.moved.clone(),
        }
    }

    /// The keeper that an earlier start has stored.
    pub fn restored(state: KeeperState, terms: Terms, now: Duration) -> Keeper {
        let mut keeper = Keeper {
            node: state.node,
            terms,
            spec: state.spec,
            keepers: state.keepers,
            records: state.records,
            promised: state.promised,
            accepted: state.accepted,
            moved: state.moved,
        };
        keeper.restarted(now);
        keeper
    }

    /// A keeper of a service that begins, or of one that is taken over with what was known of it. Each grant in the records
    /// counts as given just now.
    pub fn new(
        node: NodeId,
        terms: Terms,
        spec: Spec,
        keepers: Keepers,
        records: BTreeMap<u32, Record>,
        now: Duration,
    ) -> Keeper {
        let mut keeper = Keeper {
            node,
            terms,
            spec,
            keepers,
            records,
            promised: None,
            accepted: None,
            moved: None,
        };
        keeper.restarted(now);
        keeper
    }

    /// The node has started again, with another clock: what was granted may be valid for as long as if it were granted now.
    pub fn restarted(&mut self, now: Duration) {
        for record in self.records.values_mut() {
            record.until = now + self.terms.kept();
        }
    }

    /// Whose it is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// What it looks after.
    pub fn spec(&self) -> Spec {
        self.spec
    }

    /// With whom; those after it where it is none any more.
    pub fn keepers(&self) -> &Keepers {
        self.moved.as_ref().unwrap_or(&self.keepers)
    }

    /// Whether it still has a say.
    pub fn is_active(&self) -> bool {
        self.moved.is_none()
    }

    /// What it knows of a slot.
    pub fn record(&self, number: u32) -> Record {
        self.records.get(&number).copied().unwrap_or_default()
    }

    /// Whether it grants nothing because others are to look after it soon.
    pub fn is_sealed(&self) -> bool {
        self.accepted.is_some()
    }

    /// Those that this keeper has sealed itself for.
    pub fn next(&self) -> Option<&Keepers> {
        self.accepted.as_ref().map(|(_, next)| next)
    }

    /// What a keeper that does not know of the present epoch is to be told.
    pub fn announcement(&self) -> ToKeeper {
        ToKeeper::Begin {
            keepers: self.keepers.clone(),
            spec: self.spec,
            records: self.records.clone(),
        }
    }

    /// Takes a newer description. Its owner's signature was checked.
    pub fn update(&mut self, spec: Spec) {
        let newer = spec.service == self.spec.service && spec.version > self.spec.version;
        if newer && spec.replicas <= REPLICAS_MAX && spec.semantics == self.spec.semantics {
            self.spec = spec;
        }
    }

    /// Answers a question. The state is to be stored before the answer is sent.
    pub fn handle(
        &mut self,
        now: Duration,
        from: NodeId,
        question: ToKeeper,
    ) -> Option<FromKeeper> {
        if question.service() != self.spec.service {
            return None;
        }
        match question {
            ToKeeper::Ask {
                number,
                epoch,
                slot,
                generation,
            } => Some(
                match self.grant(now, from, epoch, slot.number, generation) {
                    Ok(()) => FromKeeper::Granted {
                        number,
                        slot,
                        generation,
                    },
                    Err(why) => FromKeeper::Denied {
                        slot,
                        generation,
                        why,
                    },
                },
            ),
            // A service's copy never ends by itself and is never lost: whoever says so would close the slot for good.
            ToKeeper::Done { .. } | ToKeeper::Lose { .. }
                if self.spec.semantics == Semantics::Service =>
            {
                None
            }
            // What was handed over is not changed here any more.
            ToKeeper::Withdraw { .. }
            | ToKeeper::Released { .. }
            | ToKeeper::Done { .. }
            | ToKeeper::Lose { .. }
                if self.is_sealed() =>
            {
                None
            }
            ToKeeper::Withdraw { slot, generation } => {
                if let Some(record) = self.own(slot.number, generation, from) {
                    record.held = None;
                }
                None
            }
            ToKeeper::Released { slot, generation } => {
                if let Some(record) = self.own(slot.number, generation, from) {
                    record.until = now;
                }
                None
            }
            ToKeeper::Done {
                slot,
                outcome: Outcome { generation, .. },
            }
            | ToKeeper::Lose { slot, generation }
                if self.moved.is_some() =>
            {
                let why = Denied::Moved(self.keepers().clone());
                Some(FromKeeper::Denied {
                    slot,
                    generation,
                    why,
                })
            }
            ToKeeper::Done { slot, outcome } => {
                let told = self.keepers.nodes.contains(&from);
                if from != outcome.node && !told {
                    return None;
                }
                let generation = outcome.generation;
                let record = self.records.entry(slot.number).or_default();
                // What was handed over by several may not say who holds it: of the last generation only one had a majority.
                let same = record.held == Some((generation, outcome.node))
                    || record.outcome == Some(outcome)
                    || (record.contested && generation == record.largest);
                let later = |noted: Outcome| noted.generation > generation;
                if record.outcome.is_some_and(later) {
                    return Some(FromKeeper::Superseded(slot, generation));
                }
                // One that was replaced does not count any more.
                if !same && generation <= record.largest {
                    return Some(FromKeeper::Superseded(slot, generation));
                }
                // One that was granted by others is as true, but it is theirs to say: whoever may ask could say it himself.
                if !same && !told {
                    return None;
                }
                record.outcome = Some(outcome);
                record.largest = record.largest.max(generation);
                Some(FromKeeper::DoneNoted(slot, generation))
            }
            ToKeeper::Lose { slot, generation } => {
                if !self.keepers.nodes.contains(&from) {
                    return None;
                }
                let record = self.records.entry(slot.number).or_default();
                if record.outcome.is_some() {
                    return None;
                }
                if !record.is_held(now) && record.largest <= generation {
                    record.lost = true;
                }
                record
                    .lost
                    .then_some(FromKeeper::LostNoted(slot, generation))
            }
            ToKeeper::Prepare {
                service,
                epoch,
                ballot,
            } => {
                let stale = self.promised.is_some_and(|promised| ballot < promised);
                if epoch != self.keepers.epoch || stale {
                    return None;
                }
                self.promised = Some(ballot);
                Some(FromKeeper::Promised {
                    service,
                    ballot,
                    before: self.accepted.clone(),
                })
            }
            ToKeeper::Seal {
                service,
                ballot,
                next,
            } => {
                let stale = self.promised.is_some_and(|promised| ballot < promised);
                if next.epoch != self.keepers.epoch + 1 || stale {
                    return None;
                }
                self.promised = Some(ballot);
                self.accepted = Some((ballot, next));
                Some(FromKeeper::Sealed {
                    service,
                    ballot,
                    spec: self.spec,
                    records: self.records.clone(),
                })
            }
            ToKeeper::Begin {
                keepers,
                spec,
                records,
            } => {
                if keepers.epoch <= self.keepers().epoch {
                    return None;
                }
                if !keepers.nodes.contains(&self.node) {
                    self.moved = Some(keepers);
                    return None;
                }
                // One that goes on begins with what all knew.
                self.update(spec);
                merge_records(&mut self.records, records);
                self.restarted(now);
                self.promised = None;
                self.accepted = None;
                self.keepers = keepers;
                self.moved = None;
                None
            }
        }
    }

    fn own(&mut self, number: u32, generation: Generation, from: NodeId) -> Option<&mut Record> {
        let record = self.records.get_mut(&number)?;
        (record.held == Some((generation, from))).then_some(record)
    }

    fn grant(
        &mut self,
        now: Duration,
        from: NodeId,
        epoch: u64,
        number: u32,
        generation: Generation,
    ) -> Result<(), Denied> {
        if let Some(keepers) = &self.moved {
            return Err(Denied::Moved(keepers.clone()));
        }
        if epoch < self.keepers.epoch {
            return Err(Denied::Moved(self.keepers.clone()));
        }
        if epoch != self.keepers.epoch || self.accepted.is_some() {
            return Err(Denied::Sealed);
        }
        if number >= self.spec.replicas {
            return Err(Denied::Closed);
        }
        let record = self.records.entry(number).or_default();
        if record.end().is_some() {
            return Err(Denied::Closed);
        }
        if record.held != Some((generation, from)) {
            if record.is_held(now) {
                return Err(Denied::Held);
            }
            if generation <= record.largest {
                return Err(Denied::Old(record.largest));
            }
            // Whoever was granted it and did not say that it never began may have begun.
            if self.spec.semantics == Semantics::AtMostOnce && record.was_granted() {
                return Err(Denied::Closed);
            }
        }
        record.largest = record.largest.max(generation);
        record.held = Some((generation, from));
        record.contested = false;
        record.until = now + self.terms.kept();
        Ok(())
    }
}
