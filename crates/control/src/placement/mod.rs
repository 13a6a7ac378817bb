//! Where a machine runs: which nodes are asked, what they promise, and whose offer is taken.
//!
//! ```text
//! asker                                              nodes
//!   shortlist: of those that fit by what they say of
//!   themselves, all or a sample ── Ask ──────────────► Book::offer: really has it? then holds it for a while
//!   decide: the best of the offers ◄─── Offer | refusal
//!        ── Take ─────────────────────────────────────► Book::take: still held? then it is the asker's
//!        ── Release (the others) ─────────────────────► Book::release
//! ```
//! What a node states about itself only steers who is asked; nothing is taken without its promise. A promise is a
//! reservation: it counts against the node's stock until it is taken, released, or over, so the same memory is never
//! promised twice. [`Search`] is the asker's side as one state machine.

mod book;
mod decide;
mod hypercore;
mod search;
#[cfg(test)]
mod tests;

pub use book::{
    ASKER_OFFERS_MAX, ASKER_OVER_MAX, Book, Held, Hold, OFFERS_MAX, OVER_MAX, Offer, OfferRefused,
    RequestId, TakeRefused,
};
pub use decide::{Decision, Ranked, decide};
pub use hypercore::{POLICY_BYTES_MAX, PolicyError, Rules, Weights, read_policy};
pub use search::{Search, SearchInput, SearchOutput, Unplaced};

use rand::Rng;
use rand::seq::IteratorRandom;
use std::time::Duration;
use vistara_model::{Architecture, Bytes, Hypervisor, NodeFacts, NodeId, Stock, Wanted};

/// Networks of at most this many fitting nodes are asked as a whole.
pub const ASK_ALL_MAX: usize = 8;
/// How many nodes are asked in larger ones. Four of a random sample find room in all but 0.11 % of requests in a network
/// that is 90 % full, two in all but 2.5 %.
pub const ASK_SAMPLE: usize = 4;
/// For policies that look for something rare, the best [`ASK_SAMPLE`] of this many are asked.
const POOL: usize = 4 * ASK_SAMPLE;
/// Nodes that do not fit and are named with their reasons; the others are counted.
const UNFIT_NAMED_MAX: usize = 32;

/// What the asker itself knows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Seen {
    /// Whether the node has given the asker (or its user) a grant that counts.
    pub granted: bool,
    /// Whether membership believes it dead or suspects it.
    pub doubtful: bool,
    /// Median time to it and back.
    pub rtt: Option<Duration>,
    /// How much that varies.
    pub jitter: Option<Duration>,
    /// Share of what was lost on the way, 0 to 1.
    pub loss: Option<f64>,
    /// Machines that it ran for the asker to their end.
    pub kept: u32,
    /// Machines that it took and lost, and receipts that did not verify.
    pub broken: u32,
}

impl Seen {
    /// How far it can be trusted by what was seen of it, 0 to 1: the rule of succession, so one of which nothing is
    /// known has one half. Nobody's word about themselves goes into it.
    pub fn reputation(&self) -> f64 {
        (f64::from(self.kept) + 1.0) / (f64::from(self.kept) + f64::from(self.broken) + 2.0)
    }
}

/// A node that might take it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// What it says of itself.
    pub facts: NodeFacts,
    /// What the asker knows of it.
    pub seen: Seen,
}

/// Which of several fitting nodes is best.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Policy {
    /// The one with most left.
    #[default]
    Spread,
    /// The one with least left.
    Pack,
    /// The one that answers soonest.
    Nearest,
    /// The one that asks least.
    Cheapest,
    /// One that has a template of the image, or the image.
    ImageLocal,
    /// By weights, within rules.
    Weighted(Rules),
}

impl Policy {
    /// The word for it.
    pub fn name(&self) -> &str {
        match self {
            Policy::Spread => "spread",
            Policy::Pack => "pack",
            Policy::Nearest => "nearest",
            Policy::Cheapest => "cheapest",
            Policy::ImageLocal => "image-local",
            Policy::Weighted(rules) => &rules.name,
        }
    }

    /// The policy of this name; a policy by weights comes from a [file](read_policy).
    pub fn named(name: &str) -> Option<Policy> {
        match name {
            "spread" => Some(Policy::Spread),
            "pack" => Some(Policy::Pack),
            "nearest" => Some(Policy::Nearest),
            "cheapest" => Some(Policy::Cheapest),
            "image-local" => Some(Policy::ImageLocal),
            _ => None,
        }
    }
}

/// Why a node is not asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// No authority.
    #[error("it has given no grant")]
    NotGranted,
    /// It does not answer.
    #[error("it does not answer now")]
    Doubtful,
    /// It takes nothing new.
    #[error("it is being drained")]
    Draining,
    /// Not among those that the user trusts.
    #[error("it is not on the trust list")]
    Untrusted,
    /// It is to be another one.
    #[error("it is one to keep apart from")]
    Apart,
    /// Another instruction set.
    #[error("it is {0}")]
    Arch(Architecture),
    /// The hypervisor does not work there.
    #[error("{0} does not work there")]
    Hypervisor(Hypervisor),
    /// Somewhere else.
    #[error("its region is {}", .0.as_deref().unwrap_or("not told"))]
    Region(Option<String>),
    /// Too little room.
    #[error("it has {0} free")]
    Room(Stock),
    /// Too few processors.
    #[error("it has {0} processors")]
    Cpus(u32),
    /// Its owner takes no machines of that size.
    #[error("its owner takes machines of at most {0}")]
    OwnersLimit(Bytes),
    /// Too dear.
    #[error("it asks {0} millionths for a GiB and hour")]
    Price(u64),
    /// A capability is missing.
    #[error("it is not capable of {0:?}")]
    Incapable(String),
    /// A rule of the policy is broken.
    #[error("policy: {0}")]
    Rule(String),
}

/// Whether a node may be asked, by what is known of it.
///
/// # Errors
/// [`Unfit`]: the first reason against it.
pub fn fits(wanted: &Wanted, policy: &Policy, candidate: &Candidate) -> Result<(), Unfit> {
    let Candidate { facts, seen } = candidate;
    let wish = &wanted.constraints;
    if !seen.granted {
        return Err(Unfit::NotGranted);
    }
    if seen.doubtful {
        return Err(Unfit::Doubtful);
    }
    if facts.terms.draining {
        return Err(Unfit::Draining);
    }
    if (wish.trusted.as_ref()).is_some_and(|trusted| !trusted.contains(&facts.node)) {
        return Err(Unfit::Untrusted);
    }
    if wish.apart_from.contains(&facts.node) {
        return Err(Unfit::Apart);
    }
    if facts.arch != wanted.arch {
        return Err(Unfit::Arch(facts.arch.clone()));
    }
    let works = match wanted.hypervisor {
        Hypervisor::Auto => !facts.hypervisors.is_empty(),
        one @ (Hypervisor::Firecracker | Hypervisor::Nanovms | Hypervisor::Qemu) => {
            facts.hypervisors.contains(&one)
        }
    };
    if !works {
        return Err(Unfit::Hypervisor(wanted.hypervisor));
    }
    let there = |region: &String| wish.regions.contains(region);
    if !wish.regions.is_empty() && !facts.region.as_ref().is_some_and(there) {
        return Err(Unfit::Region(facts.region.clone()));
    }
    if !facts.free.holds(Stock::one(wanted.memory)) {
        return Err(Unfit::Room(facts.free));
    }
    if wanted.cpus.vcpus() > facts.cpus {
        return Err(Unfit::Cpus(facts.cpus));
    }
    match facts.terms.memory_max {
        Some(limit) if wanted.memory > limit => return Err(Unfit::OwnersLimit(limit)),
        _ => {}
    }
    if (wish.price_micros_max).is_some_and(|limit| facts.price_micros > limit) {
        return Err(Unfit::Price(facts.price_micros));
    }
    if let Some(missing) = wish
        .capabilities
        .iter()
        .find(|one| !facts.is_capable_of(one))
    {
        return Err(Unfit::Incapable(missing.clone()));
    }
    match policy {
        Policy::Weighted(rules) if rules.enforce => match rules.broken_by(candidate) {
            Some(rule) => Err(Unfit::Rule(rule)),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// How good a node is; smaller is better, compared from the left.
pub(crate) type Rank = [u64; 3];

/// How good a node is by a policy, and in words why.
pub(crate) fn rank(
    wanted: &Wanted,
    policy: &Policy,
    candidate: &Candidate,
    free: Stock,
    price_micros: u64,
) -> (Rank, String) {
    let Candidate { facts, seen } = candidate;
    let left = free.minus(Stock::one(wanted.memory));
    // Thousandths of its memory that would be in use with this machine.
    let full = 1000
        - u64::try_from(
            u128::from(left.memory.0) * 1000 / u128::from(facts.capacity.memory.0.max(1)),
        )
        .unwrap_or(1000)
        .min(1000);
    let rtt = seen.rtt.map_or(u64::MAX, |rtt| {
        u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)
    });
    let far = || {
        seen.rtt.map_or("distance unknown".to_owned(), |rtt| {
            format!("{rtt:.1?} away")
        })
    };
    let use_of_it = || format!("{}.{} % full with it", full / 10, full % 10);
    match policy {
        Policy::Spread => ([full, rtt, price_micros], use_of_it()),
        Policy::Pack => ([1000 - full, rtt, price_micros], use_of_it()),
        Policy::Nearest => ([rtt, full, price_micros], far()),
        Policy::Cheapest => (
            [price_micros, full, rtt],
            format!("{price_micros} millionths for a GiB and hour"),
        ),
        Policy::ImageLocal => {
            let (grade, words) = match wanted.image {
                Some(image) if facts.templates.contains(&image) => (0, "has a template"),
                Some(image) if facts.images.contains(&image) => (1, "has the image"),
                _ => (2, "has to get the image"),
            };
            ([grade, full, rtt], format!("{words}, {}", use_of_it()))
        }
        Policy::Weighted(rules) => {
            let score = rules.score(candidate, price_micros);
            // Where rules are not enforced, who breaks one comes behind all who keep them.
            let (grade, words) = match rules.broken_by(candidate) {
                Some(rule) => (1, format!("score {score:.3}, although {rule}")),
                None => (0, format!("score {score:.3}")),
            };
            let millionths = ((1e3 - score).clamp(0.0, 1e4) * 1e6) as u64;
            ([grade, millionths, full], words)
        }
    }
}

/// Whom to ask.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Shortlist {
    /// These, the best by what is known first.
    pub asked: Vec<NodeId>,
    /// How many fit.
    pub fitting: usize,
    /// Those that do not, with the reasons; at most 32 of them.
    pub unfit: Vec<(NodeId, Unfit)>,
    /// How many more do not.
    pub unfit_more: usize,
}

/// Whom to ask of all that are known: everybody in a small network, else a random sample, so that askers who know the same
/// do not all run to the same node.
pub fn shortlist<'a>(
    wanted: &Wanted,
    policy: &Policy,
    known: impl IntoIterator<Item = &'a Candidate>,
    rng: &mut impl Rng,
) -> Shortlist {
    let mut list = Shortlist::default();
    let mut fitting = Vec::new();
    for candidate in known {
        match fits(wanted, policy, candidate) {
            Ok(()) => fitting.push(candidate),
            Err(unfit) if list.unfit.len() < UNFIT_NAMED_MAX => {
                list.unfit.push((candidate.facts.node, unfit));
            }
            Err(_) => list.unfit_more += 1,
        }
    }
    list.fitting = fitting.len();
    let (pool, asked) = match policy {
        _ if fitting.len() <= ASK_ALL_MAX => (fitting.len(), fitting.len()),
        Policy::Spread => (ASK_SAMPLE, ASK_SAMPLE),
        Policy::Pack
        | Policy::Nearest
        | Policy::Cheapest
        | Policy::ImageLocal
        | Policy::Weighted(_) => (POOL, ASK_SAMPLE),
    };
    let mut pool: Vec<_> = fitting
        .into_iter()
        .sample(rng, pool)
        .into_iter()
        .map(|one| {
            let facts = &one.facts;
            let (rank, _) = rank(wanted, policy, one, facts.free, facts.price_micros);
            (rank, facts.node)
        })
        .collect();
    pool.sort_unstable();
    list.asked = pool.into_iter().take(asked).map(|(_, node)| node).collect();
    list
}
