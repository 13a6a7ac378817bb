//! Who is in the table, where, and who makes room.
//!
//! Places and ranks are keyed hashes, of two keys: pings and pages go by places, and so tell them; who stays in a full
//! table goes by ranks, which nothing tells.

use super::{Life, Member, Membership, News, Output};
use std::time::Duration;
use vistara_model::NodeId;

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
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    pub(super) fn new(seed: u64) -> Keys {
        let key = |what| blake3::derive_key(what, &seed.to_le_bytes());
        Keys {
            place: key("vistara 2026 membership place"),
            rank: key("vistara 2026 membership rank"),
            number: key("vistara 2026 membership number"),
            numbers: 0,
            rng_seed: head(&key("vistara 2026 membership rng")),
        }
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

    fn place(&self, node: NodeId) -> Place {
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

impl Membership {
    pub(super) fn place(&self, node: NodeId) -> Place {
        self.keys.place(node)
    }

    /// Keeps a member in the table whatever comes, or does so no more: whom the user named, or who has given or got a
    /// grant. At most half of the table is pinned; says whether this one is, or is not any more, as was asked.
    pub fn pin(&mut self, node: NodeId, pinned: bool) -> bool {
        let place = self.place(node);
        let full = self.pinned >= self.config.members_max / 2;
        let Some(member) = self.members.get_mut(&place) else {
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
        let place = self.place(node);
        if let Some(member) = self.members.get_mut(&place) {
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

    /// Who makes room for a newcomer that has spoken or not; nobody where none has to, an error where none does.
    fn victim(&self, rank: Place, heard: bool) -> Result<Option<NodeId>, ()> {
        let most = self.config.members_max;
        let crowded = !heard && self.hearsay.len() >= most.div_ceil(2);
        if self.members.len() < most && !crowded {
            return Ok(None);
        }
        let is_dead = |member: &&Member| {
            member.news.life == Life::Dead && !member.pinned && (!crowded || !member.heard)
        };
        if self.alive < self.members.len()
            && let Some(dead) = self.members.values().find(is_dead)
        {
            return Ok(Some(dead.news.node));
        }
        let last = self.hearsay.last();
        let gone = if heard {
            let known = self.known.last();
            last.or(known.filter(|last| **last > rank))
        } else {
            last.filter(|last| **last > rank)
        };
        gone.map(|(_, node)| Some(*node)).ok_or(())
    }

    /// Enters somebody new who has spoken or not, if there is a place; says whether.
    pub(super) fn enter(
        &mut self,
        now: Duration,
        news: News,
        (heard, tell): (bool, bool),
        outputs: &mut Vec<Output>,
    ) -> bool {
        let rank = self.keys.rank(news.node);
        match self.victim(rank, heard) {
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
            self.place(news.node),
            Member {
                news: News {
                    life: Life::Dead,
                    ..news
                },
                deadline: Duration::ZERO,
                facts: None,
                facts_sent: 0,
                rank,
                heard,
                pinned: false,
                denied: false,
            },
        );
        self.believe(now, news, tell, outputs);
        true
    }

    /// Has a member that is dead and not pinned out of the table; says whether it is.
    pub fn forget(&mut self, node: NodeId) -> bool {
        let forgotten = (self.members.get(&self.place(node)))
            .is_some_and(|member| member.news.life == Life::Dead && !member.pinned);
        if forgotten {
            self.remove(node);
        }
        forgotten
    }

    fn remove(&mut self, node: NodeId) {
        if let Some(member) = self.members.remove(&self.place(node)) {
            self.alive -= usize::from(member.news.life == Life::Alive);
            self.pinned -= usize::from(member.pinned);
            self.hearsay.remove(&member.rank);
            self.known.remove(&member.rank);
            self.suspicions.remove(&(member.deadline, node));
            self.fresh_facts.remove(&(member.facts_sent, node));
        }
    }
}
