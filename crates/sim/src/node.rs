//! One node: the decisions of the product, with what they keep in memory and what survives a restart.

use crate::scenario::{Fault, Scenario};
use crate::traffic::Traffic;
use crate::wire::{MACHINE, facts, id};
use rand::RngExt;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_control::membership::{Config, Membership};
use vistara_control::placement::{Book, RequestId, Search};
use vistara_control::services::{Change, Holder, Keeper, Overseer, ServiceId, Slot, Spec};
use vistara_model::{Bytes, Generation, NodeId, Stock};

/// How often a node states itself anew, if nothing changes before.
const STATE_PERIOD: Duration = Duration::from_secs(60);

/// A slot that a node has been picked for.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) holder: Holder,
    pub(crate) spec: Spec,
    pub(crate) room: (NodeId, RequestId),
    pub(crate) runs: bool,
}

/// One node.
pub(crate) struct Node {
    number: usize,
    pub(crate) up: bool,
    pub(crate) boot: u64,
    pub(crate) up_since: Duration,
    /// How fast its clock runs, and what it showed at the beginning.
    pub(crate) rate: f64,
    offset: Duration,
    pub(crate) stock: Stock,
    pub(crate) membership: Membership,
    pub(crate) book: Book,
    pub(crate) keepers: BTreeMap<ServiceId, Keeper>,
    pub(crate) overseers: BTreeMap<ServiceId, Overseer>,
    pub(crate) changes: BTreeMap<ServiceId, Change>,
    pub(crate) rounds: u64,
    pub(crate) jobs: BTreeMap<Slot, Job>,
    pub(crate) searches: BTreeMap<RequestId, (Search, (Spec, Slot, Generation))>,
    pub(crate) search_wakes: BTreeSet<(Duration, RequestId)>,
    pub(crate) wake: Option<Duration>,
    /// When it next speaks to keepers that it does not know.
    pub(crate) next_meeting: Duration,
    stated: Option<Stock>,
    stated_at: Duration,
    version: u64,
    pub(crate) traffic: Traffic,
    /// What it had sent when its load was looked at last.
    pub(crate) looked_bytes: u64,
}

fn config(scenario: &Scenario) -> Config {
    Config {
        members_max: scenario.members_max,
        ..Config::default()
    }
}

impl Node {
    pub(crate) fn new(number: usize, scenario: &Scenario, rng: &mut SmallRng) -> Node {
        let stock = Stock {
            memory: Bytes(MACHINE.0 * u64::from(scenario.machines_per_node)),
            machines: scenario.machines_per_node,
        };
        // Within the margin of leases.
        let rate = 1.0 + rng.random_range(-0.015..0.015);
        let offset = Duration::from_secs(rng.random_range(1..1_000_000));
        let seed = rng.random();
        Node {
            number,
            up: true,
            boot: 1,
            up_since: Duration::ZERO,
            rate,
            offset,
            stock,
            membership: Membership::new(config(scenario), id(number), 1, seed, offset),
            book: book(stock, scenario),
            keepers: BTreeMap::new(),
            overseers: BTreeMap::new(),
            changes: BTreeMap::new(),
            rounds: 0,
            jobs: BTreeMap::new(),
            searches: BTreeMap::new(),
            search_wakes: BTreeSet::new(),
            wake: None,
            next_meeting: Duration::ZERO,
            stated: None,
            stated_at: Duration::ZERO,
            version: 0,
            traffic: Traffic::default(),
            looked_bytes: 0,
        }
    }

    /// Its clock at a time of the world.
    pub(crate) fn local(&self, now: Duration) -> Duration {
        self.offset + now.mul_f64(self.rate)
    }

    /// The time of the world at which its clock shows this.
    pub(crate) fn global(&self, local: Duration) -> Duration {
        match local {
            Duration::MAX => Duration::MAX,
            // One more microsecond: rounding must not wake it before its time.
            local => {
                local.saturating_sub(self.offset).div_f64(self.rate) + Duration::from_micros(1)
            }
        }
    }

    /// When it is to act next, by its clock.
    pub(crate) fn wake_at(&self) -> Duration {
        let mut at = self.membership.wake_at();
        if let Some((wake, _)) = self.search_wakes.first() {
            at = at.min(*wake);
        }
        at = self
            .jobs
            .values()
            .fold(at, |at, job| at.min(job.holder.wake_at()));
        at = self
            .overseers
            .values()
            .fold(at, |at, one| at.min(one.wake_at()));
        self.changes
            .values()
            .fold(at, |at, one| at.min(one.wake_at()))
    }

    /// States what is free, when that has changed or was said long ago.
    pub(crate) fn state(&mut self, local: Duration) {
        let free = self.book.free();
        let changed = self.stated != Some(free) && local >= self.stated_at + Duration::from_secs(2);
        if changed || local >= self.stated_at + STATE_PERIOD {
            self.version += 1;
            self.stated = Some(free);
            self.stated_at = local;
            // A later start states later versions.
            let version = (self.boot << 32) + self.version;
            self.membership.state(version, facts(free));
        }
    }

    /// Starts again: memory is lost, what keepers stored is not, and the clock shows something else.
    pub(crate) fn restart(&mut self, now: Duration, scenario: &Scenario, rng: &mut SmallRng) {
        let old = std::mem::replace(self, Node::new(self.number, scenario, rng));
        self.boot = old.boot + 1;
        self.up_since = now;
        self.traffic = old.traffic;
        self.looked_bytes = old.looked_bytes;
        let local = self.local(now);
        let (node, start) = (id(self.number), self.boot);
        self.membership = Membership::new(config(scenario), node, start, rng.random(), local);
        for (service, mut keeper) in old.keepers {
            keeper.restarted(local);
            self.keepers.insert(service, keeper);
            self.overseers.insert(service, Overseer::new(node, local));
        }
    }
}

fn book(stock: Stock, scenario: &Scenario) -> Book {
    match scenario.fault {
        // As if what is offered were not counted.
        Some(Fault::OffersForgotten) => Book::new(stock.plus(stock)),
        _ => Book::new(stock),
    }
}
