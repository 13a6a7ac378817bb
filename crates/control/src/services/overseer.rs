//! What the keepers of a service do about it: find nodes for slots that nobody runs, report lost tasks, replace dead keepers.
//!
//! Each keeper has one, and only the first living one acts, by what it believes. Two that both believe to be first do no
//! harm: leases decide. What it decides is from its own keeper's record, which may lack a renewal; a wrong guess costs a
//! question that is denied.

use super::{FromKeeper, Keeper, Keepers, Semantics, Slot, ToKeeper};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::{Generation, NodeId};

/// How often it looks.
const LOOK: Duration = Duration::from_millis(500);
/// First pause after a slot was given to somebody; doubled up to [`PAUSE_MAX`] while it stays empty.
const PAUSE_MIN: Duration = Duration::from_secs(3);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(20);
/// After how many nodes that got no lease for an at-most-once task it is taken for granted to somebody: others know a grant that
/// was not withdrawn, though this keeper does not.
const TRIES_MAX: u32 = 3;
/// How long a keeper may be away before another takes its place.
const REPLACE_AFTER: Duration = Duration::from_secs(20);
/// How long a keeper stays sealed before somebody else finishes what was begun.
const SEALED_MAX: Duration = Duration::from_secs(5);
/// How often the present epoch is announced to the other keepers: one that missed its beginning hears of it.
const ANNOUNCE: Duration = Duration::from_secs(10);

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Find a node for this slot, apart from these nodes, and have it hold the slot under this generation.
    Place {
        /// Which slot.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
        /// Who runs other copies.
        apart_from: BTreeSet<NodeId>,
    },
    /// Send this to a keeper.
    Send(NodeId, ToKeeper),
    /// The task is lost: tell whoever asked for it.
    Lost(Slot, Generation),
    /// Hand over to other keepers: those that live, and others in place of these.
    Replace {
        /// Who is away.
        away: BTreeSet<NodeId>,
    },
}

#[derive(Debug, Clone, Default)]
struct Care {
    not_before: Duration,
    pause: Duration,
    tries: u32,
    largest: Generation,
    lost_noted: BTreeSet<NodeId>,
    lost_told: bool,
}

/// A task's end, until all that keep have it noted.
#[derive(Debug, Clone, Default)]
struct News {
    not_before: Duration,
    pause: Duration,
    heard: BTreeSet<NodeId>,
}

/// The look after one service.
#[derive(Debug, Clone)]
pub struct Overseer {
    me: NodeId,
    next_look: Duration,
    next_announce: Duration,
    cares: BTreeMap<u32, Care>,
    news: BTreeMap<u32, News>,
    away_since: BTreeMap<NodeId, Duration>,
    /// Who was to be replaced when that was last said, and when.
    replaced: (BTreeSet<NodeId>, Duration),
    sealed_since: Option<Duration>,
}

impl Overseer {
    /// One that has looked at nothing yet.
    pub fn new(me: NodeId, now: Duration) -> Overseer {
        Overseer {
            me,
            next_look: now + LOOK,
            next_announce: now + ANNOUNCE,
            cares: BTreeMap::new(),
            news: BTreeMap::new(),
            away_since: BTreeMap::new(),
            replaced: (BTreeSet::new(), now),
            sealed_since: None,
        }
    }

    /// When to [`Overseer::poll`] next.
    pub fn wake_at(&self) -> Duration {
        self.next_look
    }

    /// Looks at what its keeper knows. `lives` says who is believed to be alive.
    pub fn poll(
        &mut self,
        now: Duration,
        keeper: &Keeper,
        lives: impl Fn(NodeId) -> bool,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if now < self.next_look {
            return actions;
        }
        self.next_look = now + LOOK;
        let keepers = keeper.keepers().clone();
        if !keeper.is_active() {
            return actions;
        }
        self.watch_keepers(now, keeper, &keepers, &lives, &mut actions);
        self.spread_ends(now, keeper, &keepers, &mut actions);
        let first = (keepers.nodes.iter()).find(|node| **node == self.me || lives(**node));
        if first != Some(&self.me) || keeper.is_sealed() {
            return actions;
        }
        if now >= self.next_announce {
            self.next_announce = now + ANNOUNCE;
            let others = keepers.nodes.iter().filter(|node| **node != self.me);
            actions.extend(others.map(|node| Action::Send(*node, keeper.announcement())));
        }
        let spec = keeper.spec();
        let holders: BTreeMap<u32, NodeId> = (0..spec.replicas)
            .filter_map(|number| {
                let record = keeper.record(number);
                let (_, node) = record.held.filter(|_| record.is_held(now))?;
                Some((number, node))
            })
            .collect();
        for number in 0..spec.replicas {
            let record = keeper.record(number);
            if record.outcome.is_some() || record.is_held(now) {
                self.cares.remove(&number);
                continue;
            }
            let slot = Slot {
                service: spec.service,
                number,
            };
            let care = self.cares.entry(number).or_default();
            if now < care.not_before {
                continue;
            }
            care.pause = (care.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
            care.not_before = now + care.pause;
            care.largest = care.largest.max(record.largest);
            let once = spec.semantics == Semantics::AtMostOnce;
            let may_have_begun = record.was_granted() || care.tries >= TRIES_MAX;
            if record.lost || (once && may_have_begun) {
                if !care.lost_told {
                    let generation = care.largest;
                    let lose = ToKeeper::Lose { slot, generation };
                    let all = keepers.nodes.iter();
                    actions.extend(all.map(|node| Action::Send(*node, lose.clone())));
                }
                continue;
            }
            care.largest = Generation(care.largest.0 + 1);
            actions.push(Action::Place {
                slot,
                generation: care.largest,
                apart_from: holders.values().copied().collect(),
            });
        }
        actions
    }

    /// Takes what another keeper noted.
    pub fn handle(&mut self, from: NodeId, answer: &FromKeeper, keepers: &Keepers) -> Vec<Action> {
        let mut actions = Vec::new();
        match answer {
            FromKeeper::LostNoted(slot, generation) if keepers.nodes.contains(&from) => {
                if let Some(care) = self.cares.get_mut(&slot.number) {
                    care.lost_noted.insert(from);
                    if !care.lost_told && care.lost_noted.len() >= keepers.majority() {
                        care.lost_told = true;
                        actions.push(Action::Lost(*slot, *generation));
                    }
                }
            }
            FromKeeper::DoneNoted(slot, _) | FromKeeper::Superseded(slot, _) => {
                if let Some(news) = self.news.get_mut(&slot.number) {
                    news.heard.insert(from);
                }
            }
            FromKeeper::LostNoted(..)
            | FromKeeper::Granted { .. }
            | FromKeeper::Denied { .. }
            | FromKeeper::Promised { .. }
            | FromKeeper::Sealed { .. } => {}
        }
        actions
    }

    /// A node that was picked for a slot does not run it. The largest generation that it saw is told where it got no lease,
    /// and none (zero) where it got one and could not use it.
    pub fn failed(&mut self, slot: Slot, largest: Generation) {
        let care = self.cares.entry(slot.number).or_default();
        // Where there is no room for it, or no machine could be made, nobody has begun it.
        care.tries += u32::from(largest > Generation(0));
        care.largest = care.largest.max(largest);
    }

    /// Tells the other keepers of ended tasks: who has it noted may be fewer than the holder told, and one that was not
    /// told would look for a node, or report it lost.
    fn spread_ends(
        &mut self,
        now: Duration,
        keeper: &Keeper,
        keepers: &Keepers,
        actions: &mut Vec<Action>,
    ) {
        let spec = keeper.spec();
        for number in 0..spec.replicas {
            let Some(outcome) = keeper.record(number).outcome else {
                continue;
            };
            let slot = Slot {
                service: spec.service,
                number,
            };
            let news = self.news.entry(number).or_default();
            if now < news.not_before {
                continue;
            }
            let late: Vec<NodeId> = (keepers.nodes.iter().copied())
                .filter(|node| *node != self.me && !news.heard.contains(node))
                .collect();
            news.pause = (news.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
            news.not_before = now + news.pause;
            let done = ToKeeper::Done { slot, outcome };
            actions.extend(
                late.into_iter()
                    .map(|node| Action::Send(node, done.clone())),
            );
        }
    }

    fn watch_keepers(
        &mut self,
        now: Duration,
        keeper: &Keeper,
        keepers: &Keepers,
        lives: &impl Fn(NodeId) -> bool,
        actions: &mut Vec<Action>,
    ) {
        for node in &keepers.nodes {
            if *node == self.me || lives(*node) {
                self.away_since.remove(node);
            } else {
                self.away_since.entry(*node).or_insert(now);
            }
        }
        (self.away_since).retain(|node, _| keepers.nodes.contains(node));
        let away: BTreeSet<NodeId> = (self.away_since.iter())
            .filter(|(_, since)| now >= **since + REPLACE_AFTER)
            .map(|(node, _)| *node)
            .collect();
        let first = (keepers.nodes.iter()).find(|node| **node == self.me || lives(**node));
        let stuck = if keeper.is_sealed() {
            now >= *self.sealed_since.get_or_insert(now) + SEALED_MAX
        } else {
            self.sealed_since = None;
            false
        };
        // Not each time it looks; all that are away at once, whenever each of them has gone.
        let (told, at) = &self.replaced;
        let due = *told != away || now >= *at + REPLACE_AFTER;
        if stuck || (due && !away.is_empty() && first == Some(&self.me)) {
            self.sealed_since = keeper.is_sealed().then_some(now);
            self.replaced = (away.clone(), now);
            actions.push(Action::Replace { away });
        }
    }
}
