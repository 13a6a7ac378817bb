//! Pinging, directly and through helpers.
//!
//! Of larger networks a helper knows the target seldom, and pings no strangers: so a packet that is lost is made good by
//! asking again, and helpers are for paths that are broken.

use super::table::Place;
use super::{Age, Body, Life, Membership, News, Output};
use std::time::Duration;
use vistara_model::NodeId;

/// Most pings of this node's own under way: several periods' worth.
const OWN_MAX: usize = 64;
/// Most in others' stead: they take nothing from one's own.
const OTHERS_MAX: usize = 64;
/// Most in the stead of one of them: it pings two others a second, and waits for one.
const EACH_MAX: usize = 8;

/// Which of the doubted are pinged in one period, the urgent first or the others: with bare pings, 700 bytes a second.
const DOUBTS_A_PERIOD: [bool; 4] = [true, false, false, false];

/// A ping under way.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    number: u64,
    target: NodeId,
    /// For whom; nobody else where it is this node's own.
    asked_by: Option<(NodeId, u64)>,
    /// Whether others were asked to ping in this node's stead, and who.
    helped: bool,
    helpers: Vec<NodeId>,
    /// Whether who does not answer is suspected: not where it was dead when it was asked, once, and has spoken meanwhile.
    suspects: bool,
    /// When it is sent again; nothing where it is not any more.
    again_at: Option<Duration>,
    /// When it has failed.
    fails_at: Duration,
}

impl Probe {
    pub(super) fn next_at(&self) -> Duration {
        self.again_at.unwrap_or(self.fails_at)
    }
}

impl Membership {
    /// Pings whoever is next.
    pub(super) fn probe(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        // Some that are doubted: one of whom that was said just now, if there is one.
        for urgent in DOUBTS_A_PERIOD {
            let members = &self.members;
            let is_dead = |node| Some(members.get(node)?.news.life == Life::Dead);
            if let Some(node) = self.doubts.pop(urgent, is_dead) {
                self.ping(now, node, None, true, outputs);
            }
        }
        let first = self.is_hearsays_turn();
        let next = [first, !first]
            .into_iter()
            .find_map(|hearsay| self.next_of(hearsay).map(|place| (hearsay, place)));
        if let Some((hearsay, place)) = next {
            self.cursors[usize::from(hearsay)] = place;
            self.ping(now, place.1, None, false, outputs);
        }
    }

    /// Tries one that is dead, behind no doubts: there may be hundreds.
    pub(super) fn reach(&mut self, now: Duration, node: NodeId, outputs: &mut Vec<Output>) {
        self.ping(now, node, None, true, outputs);
    }

    /// Whether somebody is pinged who was only heard of: as often as there are such members, and every other time at most.
    fn is_hearsays_turn(&mut self) -> bool {
        let hearsay = self.hearsay.len();
        let others = self.members.len() - hearsay;
        if others == 0 {
            return true;
        }
        let share = hearsay.min(others);
        self.hearsay_turn += share;
        let turn = self.hearsay_turn >= share + others;
        if turn {
            self.hearsay_turn = 0;
        }
        turn
    }

    /// The next that is not dead of those that were only heard of, or of the others.
    fn next_of(&self, hearsay: bool) -> Option<Place> {
        let cursor = self.cursors[usize::from(hearsay)];
        let after = (
            std::ops::Bound::Excluded(cursor),
            std::ops::Bound::Unbounded,
        );
        let around = (self.members.range(after)).chain(self.members.range(..=cursor));
        around
            .filter(|(_, member)| member.news.life != Life::Dead)
            .find(|(_, member)| (member.heard || member.pinned) != hearsay)
            .map(|(place, _)| *place)
    }

    pub(super) fn ping(
        &mut self,
        now: Duration,
        target: NodeId,
        asked_by: Option<(NodeId, u64)>,
        doubted: bool,
        outputs: &mut Vec<Output>,
    ) {
        let own = asked_by.is_none();
        let asker = asked_by.map(|(asker, _)| asker);
        let alike = (self.probes.iter()).filter(|probe| probe.asked_by.is_none() == own);
        let same = (self.probes.iter())
            .filter(|probe| asker.is_some() && probe.asked_by.map(|(asker, _)| asker) == asker);
        let most = if own { OWN_MAX } else { OTHERS_MAX };
        if alike.count() >= most || same.count() >= EACH_MAX {
            return;
        }
        let number = self.keys.number();
        // Who is dead answers nobody in most cases: it is not tried again, and helpers are not asked.
        let again = own && self.life(target) != Some(Life::Dead);
        self.probes.push(Probe {
            number,
            target,
            asked_by,
            helped: false,
            helpers: Vec::new(),
            suspects: again,
            again_at: again.then(|| now + self.config.ack_wait),
            fails_at: now + self.config.probe_wait,
        });
        // In others' stead, or because of what others say: how often is theirs to decide.
        if doubted || !own {
            outputs.push(self.bare_ping(target, number));
        } else {
            let body = self.ping_body(target, number);
            self.send(target, body, outputs);
        }
    }

    fn ping_body(&self, target: NodeId, number: u64) -> Body {
        let facts = self.members.get(target).and_then(|one| one.facts.as_ref());
        let version = facts.map_or(0, |facts| facts.version);
        Body::Ping { number, version }
    }

    /// A ping beside the usual ones, with no more than has to be said.
    fn bare_ping(&self, target: NodeId, number: u64) -> Output {
        let body = self.ping_body(target, number);
        Output::Send(target, self.bare(body, target))
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
            self.ping(now, target, Some((from, number)), false, outputs);
        }
    }

    /// An answer came through a helper. It counts if the helper was asked, and takes back a suspicion.
    pub(super) fn acked_for(
        &mut self,
        now: Duration,
        from: NodeId,
        number: u64,
        target: NodeId,
        outputs: &mut Vec<Output>,
    ) {
        if (self.answered(number, target, |probe| probe.helpers.contains(&from))).is_none() {
            return;
        }
        let Some(member) = self.members.get_mut(target) else {
            return;
        };
        member.denied = false;
        if member.news.life == Life::Suspect {
            let life = Life::Alive;
            let news = News {
                life,
                ..member.news
            };
            self.believe(now, news, None, outputs);
        }
    }

    /// An answer came. That its sender lives was heard already.
    pub(super) fn acked(&mut self, target: NodeId, number: u64, outputs: &mut Vec<Output>) {
        let probe = self.answered(number, target, |_| true);
        if let Some((asker, number)) = probe.and_then(|probe| probe.asked_by) {
            let packet = self.bare(Body::AckFor { number, target }, asker);
            outputs.push(Output::Send(asker, packet));
        }
    }

    /// The probe that this answers, which is over then.
    fn answered(
        &mut self,
        number: u64,
        target: NodeId,
        counts: impl Fn(&Probe) -> bool,
    ) -> Option<Probe> {
        let found =
            |probe: &Probe| probe.number == number && probe.target == target && counts(probe);
        let index = self.probes.iter().position(found)?;
        Some(self.probes.swap_remove(index))
    }

    /// Tries again, asks helpers, and suspects who answered nobody.
    pub(super) fn poll_probes(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        let mut index = 0;
        while let Some(probe) = self.probes.get_mut(index) {
            if probe.again_at.is_some_and(|at| at <= now) {
                let next = now + self.config.ack_wait;
                probe.again_at = Some(next).filter(|at| *at < probe.fails_at);
                let (number, target) = (probe.number, probe.target);
                let helped = std::mem::replace(&mut probe.helped, true);
                outputs.push(self.bare_ping(target, number));
                if !helped {
                    let helpers = self.some_alive(self.config.helpers, target);
                    for helper in &helpers {
                        let packet = self.bare(Body::PingFor { number, target }, *helper);
                        outputs.push(Output::Send(*helper, packet));
                    }
                    if let Some(probe) = self.probes.get_mut(index) {
                        probe.helpers = helpers;
                    }
                }
                index += 1;
            } else if probe.fails_at <= now {
                let probe = self.probes.swap_remove(index);
                let known = self.members.get(probe.target).map(|one| one.news);
                match known {
                    Some(news) if probe.suspects && news.life == Life::Alive => {
                        let life = Life::Suspect;
                        let until = Age::NEW.until(now);
                        self.believe(now, News { life, ..news }, until, outputs);
                    }
                    _ => {}
                }
            } else {
                index += 1;
            }
        }
    }
}
