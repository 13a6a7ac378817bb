//! Who runs a copy of a service, or a task: exactly one node at a time for each slot, whoever dies.
//!
//! ```text
//!  overseer (on the first living keeper) ── place slot, generation g ──► a node
//!                                                                         │ Ask(slot, g)   to all keepers
//!    keepers: one unexpired grant for each slot, generations only grow ◄──┤
//!                                                                         ▼ granted by a majority
//!                                                           Holder: starts its copy, renews,
//!                                                           stops it before the lease is over
//! ```
//! **Why two copies are never live.** A keeper grants a slot to one node until that grant is over by its own clock. A node
//! runs its copy only while more than half of the keepers' grants to it are valid, counted from *before it asked*. Two
//! majorities share a keeper, and that one granted to one of them only. Whom an overseer picks, and what membership believes,
//! matter for speed, never for this. This is the lease of PaxosLease (Trencséni, Gazsó, Reinhardt 2012), with generations.
//!
//! **Clocks.** Only spans are compared, never times. A lease of [`Terms::lease`] counts that much less [`Terms::margin`] for
//! its holder and as much more for the keeper, so both clocks' rates may be off by the margin, 2 %. Within
//! [`Terms::stop_time`] before its end the copy must be gone.
//!
//! **Keepers change** by [`Change`]: more than half of the present ones seal themselves and hand their records over before
//! the next ones grant anything; which ones are next is agreed by one instance of Paxos.
//!
//! **What survives.** A keeper's record ([`KeeperState`]) is on its disk before it answers. A keeper that restarts takes each
//! grant for fresh.
//!
//! Everybody here belongs to the nodes that the service's owner trusts with it: a keeper that lies can break its promises.

mod change;
mod holder;
mod keeper;
mod overseer;
#[cfg(test)]
mod tests;
pub mod wire;

pub use change::{Change, ChangeOutput};
pub use holder::{Holder, HolderOutput};
pub use keeper::{Keeper, KeeperState, Record, merge_records};
pub use overseer::{Action, Overseer};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::{Generation, NodeId};

/// How many look after one service. Two of five may die at once.
pub const KEEPERS: usize = 5;
/// Most slots of a service.
pub const REPLICAS_MAX: u32 = 1024;

/// A service's or a task's number: 128 random bits. For a task it is what makes a second run known as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceId(pub u128);

/// One copy of a service, whoever runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slot {
    /// Of which service.
    pub service: ServiceId,
    /// Which copy.
    pub number: u32,
}

/// What becomes of a copy whose node is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Semantics {
    /// It runs elsewhere, under a new generation; it never ends by itself.
    Service,
    /// A task that is run again until it has ended once, under the same [`ServiceId`] as its idempotency key.
    AtLeastOnce,
    /// A task that is reported lost and never begun a second time.
    AtMostOnce,
}

/// How a task has ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which node ran it to its end.
    pub node: NodeId,
    /// Under which generation.
    pub generation: Generation,
    /// The program's exit code, as a shell has it.
    pub exit_code: u8,
}

/// What a keeper has noted of a task that is begun no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It has ended by itself.
    Done(Outcome),
    /// It may have begun, and nobody knows how it went.
    Lost,
}

/// How a task has ended, by what keepers of one epoch have noted. That it has ended is a fact, whoever knows it: its holder has
/// seen it. That it is lost takes more than half of them: one alone may have missed that its holder renews. So what is
/// lost is done after all where its holder comes back and knows how it ended.
pub fn end_of(keepers: &Keepers, noted: impl IntoIterator<Item = End>) -> Option<End> {
    let (mut done, mut lost): (Option<Outcome>, usize) = (None, 0);
    for end in noted {
        match end {
            End::Done(outcome) => {
                done = Some(
                    done.filter(|one| one.generation >= outcome.generation)
                        .unwrap_or(outcome),
                );
            }
            End::Lost => lost += 1,
        }
    }
    let lost = (lost >= keepers.majority()).then_some(End::Lost);
    done.map(End::Done).or(lost)
}

/// What is looked after. Its owner signs it; the newest version counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// What.
    pub service: ServiceId,
    /// Grows with each change.
    pub version: u64,
    /// How many copies; one for a task.
    pub replicas: u32,
    /// What becomes of a lost one.
    pub semantics: Semantics,
}

/// Times. The same for all that look after one service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// How long a grant counts.
    pub lease: Duration,
    /// By what part of it clocks may differ, in thousandths.
    pub margin: u32,
    /// How long a copy takes to be gone once it is told to.
    pub stop_time: Duration,
    /// How often a holder renews.
    pub renew: Duration,
    /// How long a node tries to get a lease before it gives up.
    pub acquire: Duration,
}

impl Default for Terms {
    fn default() -> Terms {
        Terms {
            lease: Duration::from_secs(10),
            margin: 20,
            stop_time: Duration::from_secs(1),
            renew: Duration::from_millis(2500),
            acquire: Duration::from_secs(2),
        }
    }
}

impl Terms {
    /// How long a holder counts on a grant, from before it asked.
    pub fn held(&self) -> Duration {
        self.lease * (1000 - self.margin) / 1000
    }

    /// How long a keeper keeps one, from when it granted.
    pub fn kept(&self) -> Duration {
        self.lease * (1000 + self.margin) / 1000
    }
}

/// Who looks after a service now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keepers {
    /// Grows with each change.
    pub epoch: u64,
    /// They, the one that oversees first.
    pub nodes: Vec<NodeId>,
}

impl Keepers {
    /// How many are more than half.
    pub fn majority(&self) -> usize {
        self.nodes.len() / 2 + 1
    }
}

/// The nodes that look after a service, of all that may: those whose hash with it is largest. Everybody who knows the same
/// nodes finds the same ones, and a node that comes or goes changes few of them (rendezvous hashing, Thaler and Ravishankar
/// 1998).
pub fn keepers_of(service: ServiceId, granted: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
    let mut all: Vec<([u8; 32], NodeId)> = granted
        .into_iter()
        .map(|node| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&service.0.to_le_bytes());
            hasher.update(node.as_bytes());
            (*hasher.finalize().as_bytes(), node)
        })
        .collect();
    all.sort_unstable_by(|one, other| other.cmp(one));
    all.dedup();
    all.truncate(KEEPERS);
    all.into_iter().map(|(_, node)| node).collect()
}

/// Who is to look after a service, of all that its owner names. Those that do already (`present`) and are counted on stay, in
/// their order; others that live come in beside them, up to [`KEEPERS`].
///
/// They are odd in number wherever that is possible: of two, both are needed, and of four, three, so that the last one only adds
/// a death that stops all. So one that is away makes up an odd number, as it may come back; where nobody is away one is left out.
pub fn choose_keepers(
    service: ServiceId,
    present: &[NodeId],
    named: impl IntoIterator<Item = NodeId>,
    counted_on: impl Fn(NodeId) -> bool,
) -> Vec<NodeId> {
    let named: BTreeSet<NodeId> = named.into_iter().collect();
    let stays = |node: &&NodeId| named.contains(node);
    let mut next: Vec<NodeId> = (present.iter().filter(stays).copied())
        .filter(|node| counted_on(*node))
        .collect();
    next.truncate(KEEPERS);
    let beside = |node: &NodeId| !present.contains(node);
    let fresh = named.iter().copied().filter(beside);
    let more = keepers_of(service, fresh.filter(|node| counted_on(*node)));
    next.extend(more.into_iter().take(KEEPERS - next.len()));
    if !next.is_empty() && next.len().is_multiple_of(2) {
        let away = |node: &NodeId| !counted_on(*node);
        let mut known = present.iter().filter(stays).copied();
        let known = known.find(away);
        let other = || {
            let fresh = named.iter().copied().filter(beside);
            keepers_of(service, fresh.filter(away)).first().copied()
        };
        match known.or_else(other) {
            Some(one) => next.push(one),
            None => {
                next.pop();
            }
        }
    }
    next
}

/// Who is to look after a service in place of the present keepers: those of them that are not `away` stay, though they may not be
/// alive at this moment, and of the others that are named only who `lives` comes in. Nothing where that is the same nodes, or nobody.
pub fn next_keepers(
    service: ServiceId,
    present: &[NodeId],
    away: &BTreeSet<NodeId>,
    named: impl IntoIterator<Item = NodeId>,
    lives: impl Fn(NodeId) -> bool,
) -> Option<Vec<NodeId>> {
    let counted_on = |node| match present.contains(&node) {
        true => !away.contains(&node),
        false => lives(node),
    };
    let next = choose_keepers(service, present, named, counted_on);
    let same = next.iter().all(|node| present.contains(node))
        && present.iter().all(|node| next.contains(node));
    (!next.is_empty() && !same).then_some(next)
}

/// A proposal's number: larger ones win, and no two proposers use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot(pub u64, pub NodeId);

/// What is asked of a keeper, by a holder or another keeper. The slot's service says which keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToKeeper {
    /// Grant, or renew, this slot for me.
    Ask {
        /// Comes back with the answer.
        number: u64,
        /// Which keepers are meant.
        epoch: u64,
        /// Which slot.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
    },
    /// My copy never ran and will not: forget the grant.
    Withdraw {
        /// Which slot.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
    },
    /// My copy ran and is gone: whoever is next need not wait.
    Released {
        /// Which slot.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
    },
    /// The task has ended: its holder says so, or a keeper that has it noted.
    Done {
        /// Which.
        slot: Slot,
        /// How.
        outcome: Outcome,
    },
    /// Note that it is lost.
    Lose {
        /// Which.
        slot: Slot,
        /// Under which generation it ran.
        generation: Generation,
    },
    /// Take no smaller ballot from now on.
    Prepare {
        /// Which service.
        service: ServiceId,
        /// Which keepers are meant.
        epoch: u64,
        /// The proposal.
        ballot: Ballot,
    },
    /// Grant no more, hand over to these.
    Seal {
        /// Which service.
        service: ServiceId,
        /// The proposal.
        ballot: Ballot,
        /// Who is next.
        next: Keepers,
    },
    /// You look after this from now on; or somebody else does.
    Begin {
        /// Who.
        keepers: Keepers,
        /// What.
        spec: Spec,
        /// What those before knew.
        records: BTreeMap<u32, Record>,
    },
}

impl ToKeeper {
    /// Which service it is about.
    pub fn service(&self) -> ServiceId {
        match self {
            ToKeeper::Ask { slot, .. }
            | ToKeeper::Withdraw { slot, .. }
            | ToKeeper::Released { slot, .. }
            | ToKeeper::Done { slot, .. }
            | ToKeeper::Lose { slot, .. } => slot.service,
            ToKeeper::Prepare { service, .. } | ToKeeper::Seal { service, .. } => *service,
            ToKeeper::Begin { spec, .. } => spec.service,
        }
    }
}

/// Why a keeper does not grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Denied {
    /// Somebody else has it.
    Held,
    /// A generation as large as this was granted before.
    Old(Generation),
    /// The slot is not wanted any more, or its task is over or lost.
    Closed,
    /// Another set of keepers is meant, or none yet.
    Sealed,
    /// These look after it now.
    Moved(Keepers),
}

/// What a keeper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromKeeper {
    /// Granted.
    Granted {
        /// The question's number.
        number: u64,
        /// Which slot.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
    },
    /// Not granted.
    Denied {
        /// Which slot.
        slot: Slot,
        /// Under which generation it was asked for.
        generation: Generation,
        /// Why.
        why: Denied,
    },
    /// The task's end is noted.
    DoneNoted(Slot, Generation),
    /// That it is lost is noted.
    LostNoted(Slot, Generation),
    /// No smaller ballot will be taken.
    Promised {
        /// Which service.
        service: ServiceId,
        /// The proposal.
        ballot: Ballot,
        /// What was proposed to it before.
        before: Option<(Ballot, Keepers)>,
    },
    /// Sealed: this is all it knows.
    Sealed {
        /// Which service.
        service: ServiceId,
        /// The proposal.
        ballot: Ballot,
        /// What it looked after.
        spec: Spec,
        /// What it knows.
        records: BTreeMap<u32, Record>,
    },
    /// The task's end is not noted: the slot was granted to others since.
    Superseded(Slot, Generation),
}

impl FromKeeper {
    /// Which service it is about.
    pub fn service(&self) -> ServiceId {
        match self {
            FromKeeper::Granted { slot, .. }
            | FromKeeper::Denied { slot, .. }
            | FromKeeper::DoneNoted(slot, _)
            | FromKeeper::LostNoted(slot, _)
            | FromKeeper::Superseded(slot, _) => slot.service,
            FromKeeper::Promised { service, .. } | FromKeeper::Sealed { service, .. } => *service,
        }
    }
}
