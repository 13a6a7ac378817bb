//! What must always hold, checked from outside: by what machines run where, not by what anybody believes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_control::services::{Semantics, ServiceId, Slot};
use vistara_model::{Bytes, Generation, Stock};

/// Violations that are told; the first says what went wrong.
const VIOLATIONS_MAX: usize = 20;

/// One running copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Copy {
    node: usize,
    generation: Generation,
}

/// What runs, what ran, and what was broken.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    live: BTreeMap<Slot, BTreeSet<Copy>>,
    memory: BTreeMap<usize, Bytes>,
    begun: BTreeMap<ServiceId, u32>,
    lost: BTreeSet<ServiceId>,
    ended: BTreeSet<ServiceId>,
    generations: BTreeMap<Slot, Generation>,
    /// Since when nobody runs a slot that somebody should run.
    empty_since: BTreeMap<Slot, Duration>,
    /// How long slots stood empty, of those that are filled again.
    pub(crate) gaps: Vec<Duration>,
    /// What was broken.
    pub(crate) violations: Vec<String>,
    /// How often something was checked.
    pub(crate) checked: u64,
}

impl Checks {
    fn hold(&mut self, now: Duration, holds: bool, what: impl FnOnce() -> String) {
        self.checked += 1;
        if !holds && self.violations.len() < VIOLATIONS_MAX {
            self.violations
                .push(format!("at {:.3} s: {}", now.as_secs_f64(), what()));
        }
    }

    /// A slot is to be run from now on.
    pub(crate) fn wanted(&mut self, now: Duration, slot: Slot) {
        self.empty_since.entry(slot).or_insert(now);
    }

    /// A copy starts.
    pub(crate) fn started(
        &mut self,
        now: Duration,
        slot: Slot,
        semantics: Semantics,
        node: usize,
        generation: Generation,
        (memory, stock): (Bytes, Stock),
    ) {
        let others = self.live.entry(slot).or_default().clone();
        self.hold(now, others.is_empty(), || {
            format!(
                "two live copies of {slot:?}: {others:?}, and node {node} starts {generation:?}"
            )
        });
        let last = self.generations.get(&slot).copied();
        self.hold(now, last.is_none_or(|last| generation > last), || {
            format!("{slot:?} starts under {generation:?} after {last:?}")
        });
        self.generations.insert(slot, generation);
        let begun = self.begun.entry(slot.service).or_default();
        *begun += 1;
        let begun = *begun;
        if semantics == Semantics::AtMostOnce {
            self.hold(now, begun == 1, || {
                format!("an at-most-once task begins {begun} times")
            });
            let lost = self.lost.contains(&slot.service);
            self.hold(now, !lost, || {
                "a task begins that was reported lost".to_owned()
            });
        }
        let used = self.memory.entry(node).or_default();
        used.0 += memory.0;
        let used = *used;
        self.hold(now, used <= stock.memory, || {
            format!("node {node} runs machines of {used} in {}", stock.memory)
        });
        (self.live.entry(slot).or_default()).insert(Copy { node, generation });
        if let Some(since) = self.empty_since.remove(&slot) {
            self.gaps.push(now - since);
        }
    }

    /// A copy is gone: stopped, ended, or its node is dead.
    pub(crate) fn gone(
        &mut self,
        now: Duration,
        slot: Slot,
        node: usize,
        generation: Generation,
        memory: Bytes,
        wanted: bool,
    ) {
        let Some(copies) = self.live.get_mut(&slot) else {
            return;
        };
        if !copies.remove(&Copy { node, generation }) {
            return;
        }
        if let Some(used) = self.memory.get_mut(&node) {
            used.0 = used.0.saturating_sub(memory.0);
        }
        if wanted && copies.is_empty() {
            self.empty_since.insert(slot, now);
        }
    }

    /// A task has ended by itself.
    pub(crate) fn task_ended(&mut self, service: ServiceId) {
        self.ended.insert(service);
        self.empty_since.retain(|slot, _| slot.service != service);
    }

    /// A task is reported lost.
    pub(crate) fn task_lost(&mut self, now: Duration, slot: Slot) {
        let live = self
            .live
            .get(&slot)
            .is_some_and(|copies| !copies.is_empty());
        self.hold(now, !live, || format!("{slot:?} is reported lost and runs"));
        self.lost.insert(slot.service);
        self.empty_since.remove(&slot);
    }

    /// A task is settled: it has ended, or was reported lost.
    pub(crate) fn is_settled(&self, service: ServiceId) -> bool {
        self.ended.contains(&service) || self.lost.contains(&service)
    }

    /// How many tasks were lost.
    pub(crate) fn lost(&self) -> usize {
        self.lost.len()
    }

    /// How many tasks have ended.
    pub(crate) fn ended(&self) -> usize {
        self.ended.len()
    }

    /// A node has promised this much of that.
    pub(crate) fn promised(&mut self, now: Duration, node: usize, promised: Stock, stock: Stock) {
        self.hold(now, stock.holds(promised), || {
            format!("node {node} promised {promised} of {stock}")
        });
    }

    /// A request was served.
    pub(crate) fn served(&mut self, now: Duration, asker: usize, node: usize, granted: bool) {
        self.hold(now, granted, || {
            format!("node {node} serves node {asker}, which it never granted")
        });
    }

    /// Each slot that stands empty for longer than this is a violation.
    pub(crate) fn nothing_empty_since(&mut self, now: Duration, most: Duration) {
        let empty: Vec<(Slot, Duration)> = self
            .empty_since
            .iter()
            .map(|(slot, at)| (*slot, *at))
            .collect();
        for (slot, since) in empty {
            self.hold(now, since + most >= now, || {
                format!("{slot:?} is empty since {:.1} s", since.as_secs_f64())
            });
        }
    }

    /// Each figure of the network's traffic is within its bound.
    pub(crate) fn load(&mut self, now: Duration, node: usize, bytes_per_s: u64, most: u64) {
        self.hold(now, bytes_per_s <= most, || {
            format!("node {node} gossips {bytes_per_s} bytes a second")
        });
    }

    /// A death was noticed by this many of those that knew the node, and by now all should have.
    pub(crate) fn deaths_noticed(&mut self, now: Duration, node: usize, fooled: usize) {
        self.hold(now, fooled == 0, || {
            format!("{fooled} nodes believe node {node} to be alive, which is dead")
        });
    }
}
