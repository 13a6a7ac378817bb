//! Who is in the table, where, and who makes room.
//!
//! Places and ranks are keyed hashes, of two keys: pings and pages go by places, and so tell them; who stays in a full
//! table goes by ranks, which nothing tells.

use super::{Life, Member, Membership, News, Output, Tie};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher};
use std::ops::RangeBounds;
use std::time::Duration;
use vistara_model::NodeId;

/// How long who is dead keeps its place. After a cut that takes less time a network is what it was; else each half would have
/// filled its tables with its own, and who is in few tables is pinged by few, and missed late.
const DEAD_STAY: Duration = Duration::from_secs(300);

/// A member's place, or rank: a hash that only this node can compute, so that nobody can choose it.
pub(super) type Place = (u64, NodeId);

/// What is secret in one life of a node.
#[derive(Clone)]
pub(super) struct Keys {
    place: [u8; 32],
    rank: [u8; 32],
    number: [u8; 32],
    numbers: u64,
    rng_seed: u64,
    hashing: [u64; 4],
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    pub(super) fn new(seed: u64) -> Keys {
        let key = |what| blake3::derive_key(what, &seed.to_le_bytes());
        let mut hashing = [0; 4];
        let bytes = key("vistara 2026 membership tables in memory");
        for (key, word) in hashing.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *key = u64::from_le_bytes(*word);
        }
        Keys {
            place: key("vistara 2026 membership place"),
            rank: key("vistara 2026 membership rank"),
            number: key("vistara 2026 membership number"),
            numbers: 0,
            rng_seed: head(&key("vistara 2026 membership rng")),
            hashing,
        }
    }

    /// How tables in memory hash ids.
    pub(super) fn hashing(&self) -> Hashing {
        Hashing(self.hashing)
    }

    /// What chances are drawn from: who guesses its state learns nothing of the keys.
    pub(super) fn rng_seed(&self) -> u64 {
        self.rng_seed
    }

    /// A number that nobody can foresee.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        head(blake3::keyed_hash(&self.number, &self.numbers.to_le_bytes()).as_bytes())
    }

    pub(super) fn place(&self, node: NodeId) -> Place {
        let hash = blake3::keyed_hash(&self.place, node.as_bytes());
        (head(hash.as_bytes()), node)
    }

    pub(super) fn rank(&self, node: NodeId) -> Place {
        let hash = blake3::keyed_hash(&self.rank, node.as_bytes());
        (head(hash.as_bytes()), node)
    }
}

fn head(bytes: &[u8; 32]) -> u64 {
    let mut head = [0; 8];
    head.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(head)
}

/// The members, by their ids, and by their places, which is the order in which they are pinged and told of in pages.
#[derive(Debug, Clone)]
pub(super) struct Members {
    /// Where in `all` each is: asked for each piece of news, for which the keyed hash of places would be slow.
    by_id: HashMap<NodeId, usize, Hashing>,
    by_place: BTreeMap<Place, usize>,
    /// Members, and what was left of them in slots that are in `free`.
    all: Vec<Member>,
    free: Vec<usize>,
}

impl Members {
    pub(super) fn new(hashing: Hashing) -> Members {
        Members {
            by_id: HashMap::with_hasher(hashing),
            by_place: BTreeMap::new(),
            all: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_place.len()
    }

    pub(super) fn get(&self, node: NodeId) -> Option<&Member> {
        self.all.get(*self.by_id.get(&node)?)
    }

    pub(super) fn get_mut(&mut self, node: NodeId) -> Option<&mut Member> {
        self.all.get_mut(*self.by_id.get(&node)?)
    }

    /// Takes up one that is not there yet.
    fn insert(&mut self, place: Place, member: Member) {
        let slot = self.free.pop().unwrap_or(self.all.len());
        match self.all.get_mut(slot) {
            Some(one) => *one = member,
            None => self.all.push(member),
        }
        self.by_id.insert(place.1, slot);
        self.by_place.insert(place, slot);
    }

    fn remove(&mut self, place: Place) -> Option<Member> {
        let slot = self.by_place.remove(&place)?;
        self.by_id.remove(&place.1);
        self.free.push(slot);
        self.all.get(slot).cloned()
    }

    /// All, by their places.
    pub(super) fn values(&self) -> impl Iterator<Item = &Member> {
        self.by_place
            .values()
            .filter_map(|slot| self.all.get(*slot))
    }

    /// Those whose places are within a range.
    pub(super) fn range(
        &self,
        places: impl RangeBounds<Place>,
    ) -> impl Iterator<Item = (&Place, &Member)> {
        (self.by_place.range(places))
            .filter_map(|(place, slot)| Some((place, self.all.get(*slot)?)))
    }

    /// The last place that is taken.
    pub(super) fn last_place(&self) -> Option<Place> {
        self.by_place.last_key_value().map(|(place, _)| *place)
    }
}

/// Hashes ids for tables in memory, under a key, so that nobody can choose ids that fall together: NH of UMAC (Black and others,
/// 1999), whose collisions are as rare as chance has them for whoever sees no hashes. Nothing goes by the order of such a table.
#[derive(Clone)]
pub(super) struct Hashing([u64; 4]);

impl std::fmt::Debug for Hashing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hashing")
    }
}

impl BuildHasher for Hashing {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher {
            keys: self.0,
            sum: 0,
        }
    }
}

/// Of one id. What else is written, as the length of what follows, is the same for all ids and counts for nothing.
pub(super) struct IdHasher {
    keys: [u64; 4],
    sum: u128,
}

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        for keys in self.keys.as_chunks::<2>().0 {
            let [one, other] = keys.map(|key| words.next().unwrap_or_default().wrapping_add(key));
            self.sum = (self.sum).wrapping_add(u128::from(one) * u128::from(other));
        }
    }

    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        // Tables take the lowest bits and the highest ones, which the product's halves make up for each other.
        ((self.sum >> 64) as u64) ^ (self.sum as u64)
    }
}

impl Membership {
    /// Keeps a member in the table whatever comes, or does so no more: whom the user named, or who has given or got a
    /// grant. At most half of the table is pinned; says whether this one is, or is not any more, as was asked.
    pub fn pin(&mut self, node: NodeId, pinned: bool) -> bool {
        let full = self.pinned >= self.config.members_max / 2;
        let Some(member) = self.members.get_mut(node) else {
            return false;
        };
        if member.pinned == pinned {
            return true;
        }
        if pinned && full {
            return false;
        }
        member.pinned = pinned;
        let ranks = if member.heard {
            &mut self.known
        } else {
            &mut self.hearsay
        };
        if pinned {
            ranks.remove(&member.rank);
            self.pinned += 1;
        } else {
            ranks.insert(member.rank);
            self.pinned -= 1;
        }
        true
    }

    /// A member has spoken to this node.
    pub(super) fn heard(&mut self, node: NodeId) {
        if let Some(member) = self.members.get_mut(node) {
            member.denied = false;
            if !member.heard {
                member.heard = true;
                if self.hearsay.remove(&member.rank) {
                    self.known.insert(member.rank);
                }
            }
        }
    }

    /// Whether there are others that it has no room for.
    pub(super) fn is_full(&self) -> bool {
        let most = self.config.members_max;
        self.members.len() >= most || self.hearsay.len() >= most.div_ceil(2)
    }

    /// Who makes room for a newcomer that is bound so; nobody where none has to, an error where none does.
    fn victim(&self, rank: Place, tie: Tie) -> Result<Option<NodeId>, ()> {
        let most = self.config.members_max;
        let heard = tie >= Tie::Heard;
        let stays = tie == Tie::Pinned && self.pinned < most / 2;
        let crowded = !heard && self.hearsay.len() >= most.div_ceil(2);
        if self.members.len() < most && !crowded {
            return Ok(None);
        }
        let goes = |(_, node): &&Place| {
            let member = self.members.get(*node);
            member.is_some_and(|member| !member.pinned && (!crowded || !member.heard))
        };
        let mut dead = (self.dead.iter())
            .take_while(|(since, _)| *since + DEAD_STAY <= self.now)
            .map(|(_, rank)| rank);
        if let Some((_, dead)) = dead.find(goes) {
            return Ok(Some(*dead));
        }
        let last = self.hearsay.last();
        let gone = if heard {
            let known = self.known.last();
            last.or(known.filter(|last| stays || **last > rank))
        } else {
            last.filter(|last| **last > rank)
        };
        gone.map(|(_, node)| Some(*node)).ok_or(())
    }

    /// Enters somebody new, if there is a place; says whether. It is not pinned yet.
    pub(super) fn enter(
        &mut self,
        now: Duration,
        news: News,
        (tie, until): (Tie, Option<Duration>),
        outputs: &mut Vec<Output>,
    ) -> bool {
        let rank = self.keys.rank(news.node);
        let heard = tie >= Tie::Heard;
        match self.victim(rank, tie) {
            Ok(None) => {}
            Ok(Some(gone)) => {
                self.remove(gone);
                outputs.push(Output::Evicted(gone));
            }
            Err(()) => return false,
        }
        let ranks = if heard {
            &mut self.known
        } else {
            &mut self.hearsay
        };
        ranks.insert(rank);
        self.members.insert(
            self.keys.place(news.node),
            Member {
                news: News {
                    life: Life::Dead,
                    ..news
                },
                until,
                deadline: now,
                facts: None,
                facts_sent: 0,
                rank,
                heard,
                pinned: false,
                denied: false,
                said_alive: None,
            },
        );
        self.believe(now, news, until, outputs);
        true
    }

    /// Has a member that is dead and not pinned out of the table; says whether it is.
    pub fn forget(&mut self, node: NodeId) -> bool {
        let forgotten = self
            .members
            .get(node)
            .is_some_and(|member| member.news.life == Life::Dead && !member.pinned);
        if forgotten {
            self.remove(node);
        }
        forgotten
    }

    fn remove(&mut self, node: NodeId) {
        if let Some(member) = self.members.remove(self.keys.place(node)) {
            self.dead.remove(&(member.deadline, member.rank));
            self.alive -= usize::from(member.news.life == Life::Alive);
            self.pinned -= usize::from(member.pinned);
            self.hearsay.remove(&member.rank);
            self.known.remove(&member.rank);
            self.suspicions.remove(&(member.deadline, node));
            self.fresh_facts.remove(&(member.facts_sent, node));
        }
    }
}
