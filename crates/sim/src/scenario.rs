//! What is to happen in a run, and what came of it.

use crate::net::{Cut, Weather};
use crate::traffic::Traffic;
use crate::wire::{Wire, number};
use crate::world::{EMPTY_MAX, GOSSIP_BYTES_MAX, World};
use rand::RngExt;
use std::fmt;
use std::time::Duration;
use vistara_control::membership::Life;
use vistara_control::services::{Semantics, ServiceId, Slot, Spec};
use vistara_model::Generation;

/// A rule of the product that is broken on purpose, to see that the checks see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Copies go on when their lease is over.
    LeaseIgnored,
    /// What is offered is not counted as used.
    OffersForgotten,
    /// Nobody looks at grants.
    AuthorityIgnored,
}

/// A run.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Nodes.
    pub nodes: usize,
    /// Where all chances come from.
    pub seed: u64,
    /// How long it runs.
    pub time: Duration,
    /// Services, of three copies each.
    pub services: u32,
    /// Tasks, at-most-once and at-least-once in turn.
    pub tasks: u32,
    /// Nodes that die, each for up to a minute.
    pub deaths: usize,
    /// Times that the network falls apart.
    pub cuts: u32,
    /// Most machines on a node.
    pub machines_per_node: u32,
    /// Most members in a node's table.
    pub members_max: usize,
    /// The network.
    pub weather: Weather,
    /// A rule to break.
    pub fault: Option<Fault>,
}

impl Scenario {
    /// A run with this many nodes in which much goes wrong.
    pub fn new(nodes: usize, seed: u64) -> Scenario {
        let share = |part: usize| nodes.div_ceil(part);
        Scenario {
            nodes,
            seed,
            time: Duration::from_secs(180),
            services: u32::try_from(share(20)).unwrap_or(u32::MAX),
            tasks: u32::try_from(share(10)).unwrap_or(u32::MAX),
            deaths: share(12),
            cuts: 2,
            machines_per_node: 4,
            members_max: 1024,
            weather: Weather::default(),
            fault: None,
        }
    }
}

/// What happens.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Arrive {
        to: usize,
        from: usize,
        wire: Box<Wire>,
    },
    Wake {
        node: usize,
        at: Duration,
    },
    Join(usize),
    Die(usize),
    Rise(usize),
    Cut(Cut),
    Create(ServiceId),
    TaskEnds {
        node: usize,
        boot: u64,
        job: (Slot, Generation),
    },
    CopyGone {
        node: usize,
        boot: u64,
        job: (Slot, Generation),
    },
    Noticed(usize, u64),
    Look,
}

/// Over how many seconds a node's load is held to its bound.
const LOAD_PERIOD_S: u64 = 30;

/// When a network has found together, and services begin.
const SETTLED: Duration = Duration::from_secs(15);

impl World {
    /// Puts in what is to happen.
    pub(crate) fn plan(&mut self) {
        let scenario = self.scenario.clone();
        for node in 0..scenario.nodes {
            let at = Duration::from_millis(node as u64 * 2000 / scenario.nodes as u64);
            self.queue.at(at, Event::Join(node));
        }
        let time = scenario.time;
        // The last deaths leave time for everything to be placed again.
        let busy = time.saturating_sub(EMPTY_MAX + SETTLED + Duration::from_secs(5));
        let within = |world: &mut World| SETTLED + busy.mul_f64(world.rng.random());
        for number in 0..scenario.services + scenario.tasks {
            let service = ServiceId(self.rng.random());
            let is_service = number < scenario.services;
            let semantics = match number % 2 {
                _ if is_service => Semantics::Service,
                0 => Semantics::AtLeastOnce,
                _ => Semantics::AtMostOnce,
            };
            let spec = Spec {
                service,
                version: 1,
                replicas: if is_service { 3 } else { 1 },
                semantics,
            };
            self.specs.insert(service, spec);
            let at = if is_service {
                SETTLED + Duration::from_millis(u64::from(number) * 10 % 5000)
            } else {
                within(self)
            };
            self.queue.at(at, Event::Create(service));
        }
        for _ in 0..scenario.deaths {
            let node = self.rng.random_range(0..scenario.nodes);
            let at = within(self) + Duration::from_secs(5);
            let away = Duration::from_secs(self.rng.random_range(2..60));
            self.queue.at(at, Event::Die(node));
            self.queue.at(at + away, Event::Rise(node));
        }
        for number in 0..scenario.cuts {
            let border = self.rng.random_range(1..scenario.nodes.max(2));
            let cut = if number % 2 == 0 {
                Cut::Halves(border)
            } else {
                Cut::OneWay(border)
            };
            let at = SETTLED + busy.mul_f64(f64::from(number + 1) / f64::from(scenario.cuts + 1));
            let length = Duration::from_secs(self.rng.random_range(3..20));
            self.queue.at(at, Event::Cut(cut));
            self.queue.at(at + length, Event::Cut(Cut::None));
        }
        for second in 1..=time.as_secs() {
            self.queue.at(Duration::from_secs(second), Event::Look);
        }
    }

    /// Looks at everything that is looked at each second.
    pub(crate) fn look(&mut self) {
        let now = self.queue.now();
        // What happened while parts did not hear each other is not held against anybody until they had time to mend it.
        if self.net.cut == Cut::None && now >= self.quiet_since + EMPTY_MAX {
            self.checks.nothing_empty_since(now, EMPTY_MAX);
        }
        if now.as_secs().is_multiple_of(LOAD_PERIOD_S) {
            for node in 0..self.nodes.len() {
                let one = &mut self.nodes[node];
                let bytes = one.traffic.all().bytes;
                let before = std::mem::replace(&mut one.looked_bytes, bytes);
                let load = (bytes - before) / LOAD_PERIOD_S;
                self.checks.load(now, node, load, GOSSIP_BYTES_MAX);
            }
        }
    }

    /// Of those in nodes' tables that live, the share that is not believed to.
    fn mistaken(&self) -> f64 {
        let (mut mistaken, mut all) = (0_u32, 0_u32);
        for node in self.nodes.iter().filter(|node| node.up) {
            for (member, life, _) in node.membership.members() {
                if self.nodes[number(member)].up {
                    all += 1;
                    mistaken += u32::from(life != Life::Alive);
                }
            }
        }
        f64::from(mistaken) / f64::from(all.max(1))
    }

    pub(crate) fn report(self) -> Report {
        let seconds = self.queue.now().as_secs().max(1);
        let mut gossip: Vec<u64> = (self.nodes.iter())
            .map(|node| node.traffic.all().bytes / seconds)
            .collect();
        let busiest = (self.nodes.iter())
            .map(|node| node.traffic)
            .max_by_key(|traffic| traffic.all().bytes)
            .unwrap_or_default();
        gossip.sort_unstable();
        let mistaken = self.mistaken();
        let mut traffic = Traffic::default();
        for node in &self.nodes {
            traffic += &node.traffic;
        }
        let mut gaps = self.checks.gaps.clone();
        gaps.sort_unstable();
        Report {
            scenario: self.scenario,
            steps: self.steps,
            checked: self.checks.checked,
            gaps,
            gossip,
            traffic,
            busiest,
            ended: self.checks.ended(),
            lost: self.checks.lost(),
            mistaken,
            violations: self.checks.violations,
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// What was run.
    pub scenario: Scenario,
    /// Events.
    pub steps: u64,
    /// Checks.
    pub checked: u64,
    /// How long slots were empty before somebody ran them, sorted.
    pub gaps: Vec<Duration>,
    /// Bytes that each node sent for membership in a second, sorted.
    pub gossip: Vec<u64>,
    /// What that was, of all nodes together.
    pub traffic: Traffic,
    /// What it was of the node that sent most.
    pub busiest: Traffic,
    /// Tasks that ended.
    pub ended: usize,
    /// Tasks that were reported lost.
    pub lost: usize,
    /// Of those in nodes' tables that lived at the end, the share that was not believed to.
    pub mistaken: f64,
    /// What was broken; nothing in a good run.
    pub violations: Vec<String>,
}

/// The value below which this share of them lies.
fn part<T: Copy + Default>(sorted: &[T], share: f64) -> T {
    let index = (sorted.len() as f64 * share) as usize;
    let last = sorted.len().saturating_sub(1);
    sorted.get(index.min(last)).copied().unwrap_or_default()
}

impl Report {
    /// Bytes that half of the nodes sent at most for membership in a second, and that no node sent more than.
    pub fn gossip_median_and_most(&self) -> (u64, u64) {
        (part(&self.gossip, 0.5), part(&self.gossip, 1.0))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scenario {
            nodes, seed, time, ..
        } = &self.scenario;
        writeln!(f, "{nodes} nodes, {time:?}, seed {seed}")?;
        writeln!(f, "{} events, {} checks", self.steps, self.checked)?;
        writeln!(
            f,
            "placed {} times, empty before: p50 {:.1?}, p99 {:.1?}, longest {:.1?}",
            self.gaps.len(),
            part(&self.gaps, 0.5),
            part(&self.gaps, 0.99),
            part(&self.gaps, 1.0),
        )?;
        writeln!(f, "tasks: {} ended, {} lost", self.ended, self.lost)?;
        writeln!(
            f,
            "believed to be gone at the end, of those that live: {:.2} %",
            self.mistaken * 100.0
        )?;
        writeln!(
            f,
            "membership, bytes a node and second: p50 {}, p99 {}, most {}",
            part(&self.gossip, 0.5),
            part(&self.gossip, 0.99),
            part(&self.gossip, 1.0),
        )?;
        write!(f, "{}", self.traffic)?;
        write!(f, "of these, the node that sent most:\n{}", self.busiest)?;
        match self.violations.as_slice() {
            [] => writeln!(f, "all invariants held"),
            broken => {
                for one in broken {
                    writeln!(f, "BROKEN {one}")?;
                }
                Ok(())
            }
        }
    }
}
