//! Members that are chosen by chance: whom to tell, whom to ask for a page, whom of the dead to try.

use super::{Life, Member, Membership};
use rand::RngExt;
use std::time::Duration;
use vistara_model::NodeId;

/// Within which as many are tried as are dead, if that takes no more than a bare ping each quarter of a second: after a cut there are
/// more than a hundred, most of which live.
const REACHED_WITHIN: Duration = Duration::from_secs(20);

impl Membership {
    /// The members from a random place on that pass, once around.
    fn around_random_place(&mut self, pass: impl Fn(&Member) -> bool, most: usize) -> Vec<NodeId> {
        let Some((last, _)) = self.members.last_place() else {
            return Vec::new();
        };
        let mut found: Vec<NodeId> = Vec::with_capacity(most);
        for _ in 0..most {
            let start = (self.rng.random_range(0..=last), NodeId::from_bytes([0; 32]));
            let around = (self.members.range(start..)).chain(self.members.range(..start));
            let next = around
                .map(|(_, member)| member)
                .find(|member| pass(member) && !found.contains(&member.news.node));
            match next {
                Some(member) => found.push(member.news.node),
                None => break,
            }
        }
        found
    }

    pub(super) fn some_alive(&mut self, most: usize, but: NodeId) -> Vec<NodeId> {
        let most = most.min(self.alive);
        self.around_random_place(
            |member| member.news.life == Life::Alive && member.news.node != but,
            most,
        )
    }

    /// How long until the next of the dead is tried: all of them within [`REACHED_WITHIN`], where there are that many.
    pub(super) fn reach_pause(&self) -> Duration {
        let many = u32::try_from(self.dead.len()).unwrap_or(u32::MAX).max(1);
        let least = self.config.gossip_period.min(self.config.reach_period);
        (REACHED_WITHIN / many).clamp(least, self.config.reach_period)
    }

    /// One of the dead; every other time one of those that are pinned, if there are such.
    pub(super) fn some_dead(&mut self) -> Option<NodeId> {
        if self.dead.is_empty() {
            return None;
        }
        let is_dead = |member: &Member| member.news.life == Life::Dead;
        let pinned = self.rng.random::<bool>().then(|| {
            self.around_random_place(|member| is_dead(member) && member.pinned, 1)
                .pop()
        });
        let any = |this: &mut Membership| this.around_random_place(is_dead, 1).pop();
        pinned.flatten().or_else(|| any(self))
    }
}
