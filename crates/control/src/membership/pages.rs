//! Pages of tables: who is asked for one, and who gets one, both in bounds.

use super::{Body, Membership, Output};
use std::collections::BTreeMap;
use std::time::Duration;
use vistara_model::NodeId;

/// Most pages of one table, asked for one after the other: more than the largest table has.
pub(super) const PAGES_MAX: u32 = 64;
/// How long a page is waited for; until then its peer is not asked again.
const PAGE_WAIT: Duration = Duration::from_secs(10);
/// Most peers that are asked at a time: a join, a sync or two, and what nobody answered.
const ASKED_MAX: usize = 16;
/// One peer gets a page a second, and a whole table at once.
const EACH_PERIOD: Duration = Duration::from_secs(1);
const EACH_BURST: u32 = PAGES_MAX;
/// All together get 32 a second, half a megabyte, and eight tables at once.
const ALL_PERIOD: Duration = Duration::from_micros(31_250);
const ALL_BURST: u32 = 8 * PAGES_MAX;
/// Most peers whose pages, or words of strangers, are counted: more do not get a page each second.
const COUNTED_MAX: usize = 1024;

/// News of strangers that one peer may tell: 16 a second, and a large part of a network at once. Large networks have each
/// member hear each other one now and then only; what does not fit comes with the next page.
const STRANGERS_PERIOD: Duration = Duration::from_micros(62_500);
const STRANGERS_BURST: u32 = 256;

/// How much peers have told of strangers.
#[derive(Debug, Clone, Default)]
pub(super) struct Strangers {
    /// Up to when each has used up what it may tell.
    told: BTreeMap<NodeId, Duration>,
}

impl Strangers {
    /// Whether a peer's word of one more stranger counts now.
    pub(super) fn may_tell(&mut self, now: Duration, by: NodeId) -> bool {
        let used = self.told.get(&by).copied().unwrap_or_default();
        let Some(next) = spend(used, now, STRANGERS_PERIOD, STRANGERS_BURST) else {
            return false;
        };
        if self.told.len() >= COUNTED_MAX && !self.told.contains_key(&by) {
            self.told.retain(|_, until| *until > now);
            if self.told.len() >= COUNTED_MAX {
                return false;
            }
        }
        self.told.insert(by, next);
        true
    }
}

/// A page that was asked for.
#[derive(Debug, Clone, Copy)]
struct Pull {
    number: u64,
    /// How many more may follow.
    left: u32,
    until: Duration,
}

/// What is asked for, and what was given.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages {
    pulls: BTreeMap<NodeId, Pull>,
    /// Up to when each peer has used up what it gets.
    given: BTreeMap<NodeId, Duration>,
    given_all: Duration,
}

/// Up to when a bucket is used up with one more, if it has one.
pub(super) fn spend(
    used_until: Duration,
    now: Duration,
    period: Duration,
    burst: u32,
) -> Option<Duration> {
    let next = used_until.max(now) + period;
    (next <= now + period * burst).then_some(next)
}

impl Pages {
    /// Whether this page was asked for.
    pub(super) fn is_asked(&self, now: Duration, from: NodeId, number: u64) -> bool {
        let pull = self.pulls.get(&from);
        pull.is_some_and(|pull| pull.number == number && now < pull.until)
    }

    /// A page came: how many more of its table may follow; nothing where nobody asked for it.
    pub(super) fn asked(&mut self, now: Duration, from: NodeId, number: u64) -> Option<u32> {
        let pull = self.pulls.get(&from).copied();
        let pull = pull.filter(|pull| pull.number == number && now < pull.until)?;
        self.pulls.remove(&from);
        Some(pull.left)
    }

    /// Whether a peer gets a page now.
    pub(super) fn may_answer(&mut self, now: Duration, to: NodeId) -> bool {
        let Some(all) = spend(self.given_all, now, ALL_PERIOD, ALL_BURST) else {
            return false;
        };
        let used = self.given.get(&to).copied().unwrap_or_default();
        let Some(own) = spend(used, now, EACH_PERIOD, EACH_BURST) else {
            return false;
        };
        if self.given.len() >= COUNTED_MAX && !self.given.contains_key(&to) {
            self.given.retain(|_, until| *until > now);
            if self.given.len() >= COUNTED_MAX {
                return false;
            }
        }
        self.given_all = all;
        self.given.insert(to, own);
        true
    }
}

impl Membership {
    /// Asks for a page, if this peer is not being asked already; up to `left` pages in all.
    pub(super) fn pull(&mut self, to: NodeId, from: u64, left: u32, outputs: &mut Vec<Output>) {
        let now = self.now;
        self.pages.pulls.retain(|_, pull| now < pull.until);
        let busy = self.pages.pulls.contains_key(&to) || self.pages.pulls.len() >= ASKED_MAX;
        let Some(left) = left.checked_sub(1).filter(|_| !busy) else {
            return;
        };
        let number = self.keys.number();
        let until = now + PAGE_WAIT;
        (self.pages.pulls).insert(
            to,
            Pull {
                number,
                left,
                until,
            },
        );
        self.send(to, Body::Pull { number, from }, outputs);
    }

    /// Asks a peer from the beginning, whatever it was asked before.
    pub(super) fn pull_anew(&mut self, to: NodeId, from: u64, outputs: &mut Vec<Output>) {
        self.pages.pulls.remove(&to);
        self.pull(to, from, PAGES_MAX, outputs);
    }
}
