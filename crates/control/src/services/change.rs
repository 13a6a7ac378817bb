//! Handing a service over to other keepers: one instance of Paxos for each epoch, whose value is who is next.
//!
//! ```text
//! preparing ── a majority promises ──► sealing ── a majority is sealed ──► announcing ──► over
//!                                                  what they knew, merged    Begin, again and again
//! ```
//! From a majority's seals on, nothing is granted in the old epoch: any grant by a majority was made by one of the sealed
//! ones before, and stands in what it hands over. Anybody may run a change at any time; two at once end in the same value.

use super::{Ballot, FromKeeper, Keepers, Record, ServiceId, Spec, ToKeeper, merge_records};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::NodeId;

/// How often a question is repeated that was not answered by enough.
const AGAIN: Duration = Duration::from_secs(1);
/// How often, at most.
const TRIES_MAX: u32 = 10;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeOutput {
    /// Send this to a keeper, present or next.
    Send(NodeId, ToKeeper),
    /// Nothing more: the next ones were told, or too few answered.
    Over {
        /// Whether they were told.
        done: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Preparing {
        promised: BTreeSet<NodeId>,
        before: Option<(Ballot, Keepers)>,
    },
    Sealing {
        next: Keepers,
        sealed: BTreeSet<NodeId>,
        spec: Option<Spec>,
        records: BTreeMap<u32, Record>,
    },
    Announcing(ToKeeper),
    Over,
}

/// One change under way.
#[derive(Debug, Clone)]
pub struct Change {
    service: ServiceId,
    present: Keepers,
    wished: Keepers,
    ballot: Ballot,
    phase: Phase,
    next_try: Duration,
    tries: u32,
}

impl Change {
    /// A change from the present keepers to others. `round` grows with each change that this node begins, across restarts.
    /// [`Change::poll`] it.
    pub fn new(
        service: ServiceId,
        me: NodeId,
        round: u64,
        present: Keepers,
        next: Vec<NodeId>,
        now: Duration,
    ) -> Change {
        Change {
            wished: Keepers {
                epoch: present.epoch + 1,
                nodes: next,
            },
            service,
            present,
            ballot: Ballot(round, me),
            phase: Phase::Preparing {
                promised: BTreeSet::new(),
                before: None,
            },
            next_try: now,
            tries: 0,
        }
    }

    /// Whether nothing more will come of it.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// When to [`Change::poll`] next.
    pub fn wake_at(&self) -> Duration {
        if self.is_over() {
            Duration::MAX
        } else {
            self.next_try
        }
    }

    /// Asks, again where too few have answered.
    pub fn poll(&mut self, now: Duration) -> Vec<ChangeOutput> {
        if self.is_over() || now < self.next_try {
            return Vec::new();
        }
        self.tries += 1;
        self.next_try = now + AGAIN;
        if self.tries > TRIES_MAX {
            let done = matches!(self.phase, Phase::Announcing(_));
            self.phase = Phase::Over;
            return vec![ChangeOutput::Over { done }];
        }
        self.say()
    }

    fn say(&self) -> Vec<ChangeOutput> {
        let (to, what): (BTreeSet<NodeId>, ToKeeper) = match &self.phase {
            Phase::Preparing { .. } => (
                self.present.nodes.iter().copied().collect(),
                ToKeeper::Prepare {
                    service: self.service,
                    epoch: self.present.epoch,
                    ballot: self.ballot,
                },
            ),
            Phase::Sealing { next, .. } => (
                self.present.nodes.iter().copied().collect(),
                ToKeeper::Seal {
                    service: self.service,
                    ballot: self.ballot,
                    next: next.clone(),
                },
            ),
            Phase::Announcing(begin) => {
                let mut to: BTreeSet<NodeId> = self.present.nodes.iter().copied().collect();
                if let ToKeeper::Begin { keepers, .. } = begin {
                    to.extend(&keepers.nodes);
                }
                (to, begin.clone())
            }
            Phase::Over => return Vec::new(),
        };
        to.into_iter()
            .map(|node| ChangeOutput::Send(node, what.clone()))
            .collect()
    }

    /// Takes a keeper's answer.
    pub fn handle(&mut self, now: Duration, from: NodeId, answer: FromKeeper) -> Vec<ChangeOutput> {
        if !self.present.nodes.contains(&from) || answer.service() != self.service {
            return Vec::new();
        }
        let majority = self.present.majority();
        let goes_on = match (&mut self.phase, answer) {
            (
                Phase::Preparing { promised, before },
                FromKeeper::Promised {
                    ballot,
                    before: theirs,
                    ..
                },
            ) if ballot == self.ballot => {
                promised.insert(from);
                // What may have been agreed on already is what is proposed again: the one of the largest ballot.
                if theirs.as_ref().map(|one| one.0) > before.as_ref().map(|one| one.0) {
                    *before = theirs;
                }
                if promised.len() < majority {
                    None
                } else {
                    let next = before.take().map_or(self.wished.clone(), |(_, next)| next);
                    Some(Phase::Sealing {
                        next,
                        sealed: BTreeSet::new(),
                        spec: None,
                        records: BTreeMap::new(),
                    })
                }
            }
            (
                Phase::Sealing {
                    next,
                    sealed,
                    spec,
                    records,
                },
                FromKeeper::Sealed {
                    ballot,
                    spec: theirs,
                    records: more,
                    ..
                },
            ) if ballot == self.ballot => {
                sealed.insert(from);
                merge_records(records, more);
                let newer = spec.is_none_or(|known| theirs.version > known.version);
                if newer {
                    *spec = Some(theirs);
                }
                let enough = spec.filter(|_| sealed.len() >= majority);
                enough.map(|spec| {
                    Phase::Announcing(ToKeeper::Begin {
                        keepers: next.clone(),
                        spec,
                        records: std::mem::take(records),
                    })
                })
            }
            // An answer to what was asked in an earlier phase, or under another ballot, says nothing now.
            (_, _) => None,
        };
        match goes_on {
            Some(phase) => {
                self.phase = phase;
                self.tries = 1;
                self.next_try = now + AGAIN;
                self.say()
            }
            None => Vec::new(),
        }
    }
}
