//! The asker's side of one request, from the first question to a taken offer.
//!
//! ```text
//! asking ── all answered, or time is up ──► taking(best) ── taken ──► placed
//!    ▲                                        │ over, or no answer
//!    │          another round, others asked   ▼
//!    └────────────────────────────────── next best, or none left ──► unplaced
//! ```
//! A `Take` whose answer does not come may have been heard: its node is told to release before the next is tried, and what
//! nobody takes up ends there by itself. The machine starts only when `Placed` was said, so it never starts twice.

use super::{Candidate, Decision, Offer, Policy, RequestId, Shortlist, decide, shortlist};
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::{NodeId, Wanted};

/// How long offers are waited for.
const OFFERS_WAIT: Duration = Duration::from_millis(800);
/// How long an answer to a take is waited for.
const TAKE_WAIT: Duration = Duration::from_secs(2);
/// How often others are asked when nobody took it.
const ROUNDS_MAX: u32 = 4;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum SearchInput {
    /// A node offers.
    Offered(Offer),
    /// A node refuses, to offer or to be taken, for this reason.
    Refused(NodeId, String),
    /// A node says that its offer is taken.
    Taken(NodeId),
    /// The time that was asked for has come.
    Timer,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum SearchOutput {
    /// Ask this node for an offer.
    Ask(NodeId),
    /// Take its offer.
    Take(NodeId),
    /// Its offer is not wanted any more.
    Release(NodeId),
    /// Come back at this time, whatever was asked for before.
    WakeAt(Duration),
    /// It has a place, and for these reasons.
    Placed(NodeId, Decision),
    /// It has none.
    Unplaced(Unplaced),
}

/// Why there is no place.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("no node took it: {} known to fit, {} asked, {} refused", .fitting, .asked, .refusals.len())]
pub struct Unplaced {
    /// How many fitted by what they say.
    pub fitting: usize,
    /// How many were asked in all.
    pub asked: usize,
    /// What they said.
    pub refusals: Vec<(NodeId, String)>,
    /// Why others were not asked.
    pub shortlist: Shortlist,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Asking { waiting: BTreeSet<NodeId> },
    Taking { node: NodeId, decision: Decision },
    Over,
}

/// One request on its way.
#[derive(Debug, Clone)]
pub struct Search {
    wanted: Wanted,
    policy: Policy,
    request: RequestId,
    round: u32,
    wake: Duration,
    tried: BTreeMap<NodeId, Candidate>,
    offers: BTreeMap<NodeId, Offer>,
    refusals: Vec<(NodeId, String)>,
    shortlist: Shortlist,
    phase: Phase,
}

impl Search {
    /// A request that has asked nobody yet: [`Search::begin`] it.
    pub fn new(wanted: Wanted, policy: Policy, request: RequestId) -> Search {
        Search {
            wanted,
            policy,
            request,
            round: 0,
            wake: Duration::ZERO,
            tried: BTreeMap::new(),
            offers: BTreeMap::new(),
            refusals: Vec::new(),
            shortlist: Shortlist::default(),
            phase: Phase::Over,
        }
    }

    /// Its number.
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// What it wants.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Whom it asked or did not ask, and why.
    pub fn shortlist(&self) -> &Shortlist {
        &self.shortlist
    }

    /// Whether there is nothing more to do.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Asks the first round.
    pub fn begin<'a>(
        &mut self,
        now: Duration,
        known: impl IntoIterator<Item = &'a Candidate>,
        rng: &mut impl Rng,
    ) -> Vec<SearchOutput> {
        let known = known
            .into_iter()
            .filter(|one| !self.tried.contains_key(&one.facts.node))
            .collect::<Vec<_>>();
        self.shortlist = shortlist(&self.wanted, &self.policy, known.iter().copied(), rng);
        self.round += 1;
        if self.shortlist.asked.is_empty() {
            return self.give_up();
        }
        let waiting: BTreeSet<NodeId> = self.shortlist.asked.iter().copied().collect();
        for candidate in known {
            if waiting.contains(&candidate.facts.node) {
                self.tried.insert(candidate.facts.node, candidate.clone());
            }
        }
        let mut outputs: Vec<_> = waiting.iter().copied().map(SearchOutput::Ask).collect();
        self.phase = Phase::Asking { waiting };
        outputs.push(self.wake_at(now + OFFERS_WAIT));
        outputs
    }

    /// Goes on. `known` is asked for only when another round begins.
    pub fn handle<'a, K: IntoIterator<Item = &'a Candidate>>(
        &mut self,
        now: Duration,
        input: SearchInput,
        known: impl FnOnce() -> K,
        rng: &mut impl Rng,
    ) -> Vec<SearchOutput> {
        match input {
            SearchInput::Offered(offer) => {
                let expected = self.tried.contains_key(&offer.node);
                match &mut self.phase {
                    Phase::Asking { waiting } if expected && offer.request == self.request => {
                        waiting.remove(&offer.node);
                        let all = waiting.is_empty();
                        self.offers.insert(offer.node, offer);
                        if all { self.choose(now) } else { Vec::new() }
                    }
                    // Too late: it is not to hold what nobody takes.
                    Phase::Taking { node, .. } if *node != offer.node => {
                        vec![SearchOutput::Release(offer.node)]
                    }
                    Phase::Asking { .. } | Phase::Taking { .. } | Phase::Over => Vec::new(),
                }
            }
            SearchInput::Refused(node, reason) => match &mut self.phase {
                Phase::Asking { waiting } => {
                    if !waiting.remove(&node) {
                        return Vec::new();
                    }
                    let all = waiting.is_empty();
                    self.refusals.push((node, reason));
                    if all {
                        self.choose_or_again(now, known, rng)
                    } else {
                        Vec::new()
                    }
                }
                Phase::Taking { node: taking, .. } if *taking == node => {
                    self.refusals.push((node, reason));
                    self.offers.remove(&node);
                    self.choose_or_again(now, known, rng)
                }
                Phase::Taking { .. } | Phase::Over => Vec::new(),
            },
            SearchInput::Taken(from) => {
                match std::mem::replace(&mut self.phase, Phase::Over) {
                    Phase::Taking { node, decision } if node == from => {
                        self.offers.remove(&node);
                        let mut outputs = self.release_all();
                        outputs.push(SearchOutput::Placed(node, decision));
                        outputs
                    }
                    other => {
                        self.phase = other;
                        // Whoever was given up has been told so, and is told again.
                        let stale = self.tried.contains_key(&from) && !self.is_over();
                        (stale.then_some(SearchOutput::Release(from)).into_iter()).collect()
                    }
                }
            }
            SearchInput::Timer if now < self.wake => Vec::new(),
            SearchInput::Timer => match &self.phase {
                Phase::Asking { waiting } => {
                    let silent: Vec<NodeId> = waiting.iter().copied().collect();
                    for node in silent {
                        self.refusals.push((node, "no answer".to_owned()));
                    }
                    self.choose_or_again(now, known, rng)
                }
                Phase::Taking { node, .. } => {
                    let node = *node;
                    self.refusals
                        .push((node, "no answer when it was taken".to_owned()));
                    self.offers.remove(&node);
                    let mut outputs = vec![SearchOutput::Release(node)];
                    outputs.extend(self.choose_or_again(now, known, rng));
                    outputs
                }
                Phase::Over => Vec::new(),
            },
        }
    }

    fn wake_at(&mut self, at: Duration) -> SearchOutput {
        self.wake = at;
        SearchOutput::WakeAt(at)
    }

    fn release_all(&mut self) -> Vec<SearchOutput> {
        std::mem::take(&mut self.offers)
            .into_keys()
            .map(SearchOutput::Release)
            .collect()
    }

    fn give_up(&mut self) -> Vec<SearchOutput> {
        self.phase = Phase::Over;
        let mut outputs = self.release_all();
        outputs.push(SearchOutput::Unplaced(Unplaced {
            fitting: self.shortlist.fitting,
            asked: self.tried.len(),
            refusals: std::mem::take(&mut self.refusals),
            shortlist: self.shortlist.clone(),
        }));
        outputs
    }

    fn choose_or_again<'a, K: IntoIterator<Item = &'a Candidate>>(
        &mut self,
        now: Duration,
        known: impl FnOnce() -> K,
        rng: &mut impl Rng,
    ) -> Vec<SearchOutput> {
        let outputs = self.choose(now);
        if !outputs.is_empty() {
            return outputs;
        }
        let mut outputs = self.release_all();
        if self.round < ROUNDS_MAX {
            outputs.extend(self.begin(now, known(), rng));
        } else {
            outputs.extend(self.give_up());
        }
        outputs
    }

    /// Takes the best offer; nothing where there is none.
    fn choose(&mut self, now: Duration) -> Vec<SearchOutput> {
        let pairs = self
            .offers
            .iter()
            .filter_map(|(node, offer)| Some((self.tried.get(node)?, offer)));
        let decision = decide(&self.wanted, &self.policy, pairs);
        let Some(best) = decision.ranked.first() else {
            return Vec::new();
        };
        let node = best.node;
        self.phase = Phase::Taking { node, decision };
        vec![SearchOutput::Take(node), self.wake_at(now + TAKE_WAIT)]
    }
}
