//! Pinging, directly and through helpers.

use super::{Body, Life, Membership, News, Output};
use std::time::Duration;
use vistara_model::NodeId;

/// Most pings under way: three periods' worth of one's own, and some for others.
const PROBES_MAX: usize = 64;

/// A ping under way.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    number: u64,
    target: NodeId,
    /// For whom; nobody else where it is this node's own.
    asked_by: Option<(NodeId, u64)>,
    /// When helpers are asked; nothing once they are.
    indirect_at: Option<Duration>,
    /// When it has failed.
    fails_at: Duration,
}

impl Probe {
    pub(super) fn next_at(&self) -> Duration {
        self.indirect_at.unwrap_or(self.fails_at)
    }
}

impl Membership {
    /// Pings whoever is next.
    pub(super) fn probe(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        if let Some(node) = self.doubts.pop_front() {
            self.ping(now, node, None, outputs);
        }
        let cursor = self.probe_cursor;
        let after = (
            std::ops::Bound::Excluded(cursor),
            std::ops::Bound::Unbounded,
        );
        let around = (self.members.range(after)).chain(self.members.range(..=cursor));
        let next = around
            .filter(|(_, member)| member.news.life != Life::Dead)
            .map(|(place, _)| *place)
            .next();
        if let Some(place) = next {
            self.probe_cursor = place;
            self.ping(now, place.1, None, outputs);
        }
    }

    fn ping(
        &mut self,
        now: Duration,
        target: NodeId,
        asked_by: Option<(NodeId, u64)>,
        outputs: &mut Vec<Output>,
    ) {
        if self.probes.len() >= PROBES_MAX {
            return;
        }
        self.next_number += 1;
        let number = self.next_number;
        let own = asked_by.is_none();
        self.probes.push(Probe {
            number,
            target,
            asked_by,
            indirect_at: own.then(|| now + self.config.ack_wait),
            fails_at: now + self.config.probe_wait,
        });
        let facts = self
            .members
            .get(&self.place(target))
            .and_then(|one| one.facts.as_ref());
        let version = facts.map_or(0, |facts| facts.version);
        self.send(target, Body::Ping { number, version }, outputs);
    }

    pub(super) fn ping_for(
        &mut self,
        now: Duration,
        from: NodeId,
        number: u64,
        target: NodeId,
        outputs: &mut Vec<Output>,
    ) {
        // Only members are pinged: nobody makes this node send to strangers.
        if target != self.me.node && self.life(target).is_some() {
            self.ping(now, target, Some((from, number)), outputs);
        }
    }

    /// An answer came. That its sender lives was heard already; one that came through a helper counts as an answer.
    pub(super) fn acked(&mut self, target: NodeId, number: u64, outputs: &mut Vec<Output>) {
        let found = |probe: &Probe| probe.number == number && probe.target == target;
        if let Some(index) = self.probes.iter().position(found) {
            let probe = self.probes.swap_remove(index);
            if let Some((asker, number)) = probe.asked_by {
                self.send(asker, Body::AckFor { number, target }, outputs);
            }
        }
    }

    /// Asks helpers, and suspects who answered nobody.
    pub(super) fn poll_probes(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        let mut index = 0;
        while let Some(probe) = self.probes.get_mut(index) {
            if probe.indirect_at.is_some_and(|at| at <= now) {
                probe.indirect_at = None;
                let (number, target) = (probe.number, probe.target);
                for helper in self.some_alive(self.config.helpers, target) {
                    self.send(helper, Body::PingFor { number, target }, outputs);
                }
                index += 1;
            } else if probe.fails_at <= now {
                let probe = self.probes.swap_remove(index);
                let known = self
                    .members
                    .get(&self.place(probe.target))
                    .map(|one| one.news);
                match known {
                    Some(news) if probe.asked_by.is_none() && news.life == Life::Alive => {
                        let life = Life::Suspect;
                        self.believe(now, News { life, ..news }, true, outputs);
                    }
                    _ => {}
                }
            } else {
                index += 1;
            }
        }
    }
}
