//! The world: nodes that live and die, what reaches them, and when they are to act.

use crate::checks::Checks;
use crate::net::{Cut, Network, Queue};
use crate::node::{Job, Node};
use crate::scenario::{Event, Fault, Report, Scenario};
use crate::wire::{MACHINE, Wire, id, number};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;
use vistara_control::membership::{Life, Output};
use vistara_control::placement::SearchInput;
use vistara_control::services::{
    Holder, Keepers, ServiceId, Slot, Spec, Terms, ToKeeper, choose_keepers,
};
use vistara_control::{Question, Requirement, Standing, authorize};
use vistara_model::{GrantId, GrantLimits, GrantTerms, NodeId, Right, Stock};

/// How long a slot may stand empty after a death: 10.2 s until the lease is over, at most a pause of an overseer, and a
/// search; three times that where messages are lost.
pub const EMPTY_MAX: Duration = Duration::from_secs(60);
/// Within which a death is noticed.
pub const NOTICED_WITHIN: Duration = Duration::from_secs(10);
/// How long a node that has just come may believe what its first pages said.
const STALE_MAX: Duration = Duration::from_secs(30);
/// How long after a cut a network is held to that.
const CALM_AFTER: Duration = Duration::from_secs(15);
/// What a node may send for membership each second, over half a minute, in a network of any size.
pub const GOSSIP_BYTES_MAX: u64 = 24_000;

/// Networks of at most this many nodes begin with nodes that know nobody. In larger ones each knows others at the start, as
/// if they had been there for long.
const JOIN_ONE_BY_ONE_MAX: usize = 100;

/// What goes on.
pub struct World {
    pub(crate) scenario: Scenario,
    pub(crate) queue: Queue<Event>,
    pub(crate) net: Network,
    pub(crate) rng: SmallRng,
    pub(crate) nodes: Vec<Node>,
    pub(crate) specs: BTreeMap<ServiceId, Spec>,
    pub(crate) checks: Checks,
    pub(crate) quiet_since: Duration,
    pub(crate) steps: u64,
}

impl World {
    /// A world in which nothing has happened yet.
    pub fn new(scenario: Scenario) -> World {
        let mut rng = SmallRng::seed_from_u64(scenario.seed);
        let net = Network::new(scenario.weather, rng.random());
        let nodes = (0..scenario.nodes)
            .map(|number| Node::new(number, &scenario, &mut rng))
            .collect();
        let mut world = World {
            queue: Queue::default(),
            net,
            rng,
            nodes,
            specs: BTreeMap::new(),
            checks: Checks::default(),
            quiet_since: Duration::ZERO,
            steps: 0,
            scenario,
        };
        world.plan();
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(self) -> Report {
        self.run_and_tell(|_| {})
    }

    /// The same, telling the time of the world each second of it.
    pub fn run_and_tell(mut self, mut tell: impl FnMut(Duration)) -> Report {
        let end = self.scenario.time;
        while let Some(event) = self.queue.next(end) {
            self.steps += 1;
            if matches!(event, Event::Look) {
                tell(self.queue.now());
            }
            self.happen(event);
            if !self.checks.violations.is_empty() {
                break;
            }
        }
        self.report()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { to, from, wire } if self.nodes[to].up => {
                self.hear(to, from, *wire);
                self.after(to);
            }
            Event::Arrive { .. } => {}
            Event::Wake { node, at } => {
                if self.nodes[node].up && self.nodes[node].wake == Some(at) {
                    self.nodes[node].wake = None;
                    self.act(node);
                    self.after(node);
                }
            }
            Event::Join(node) if self.scenario.nodes > JOIN_ONE_BY_ONE_MAX => {
                self.know(node);
                self.after(node);
            }
            Event::Join(node) => {
                let peer = self.rng.random_range(0..node.max(1));
                let outputs = self.nodes[node].membership.join(id(peer));
                self.members(node, outputs);
                self.after(node);
            }
            Event::Die(node) => self.die(node),
            Event::Rise(node) => self.rise(node),
            Event::Cut(cut) => {
                self.quiet_since = self.queue.now();
                self.net.cut = cut;
            }
            Event::Create(service) => self.create(service),
            Event::TaskEnds {
                node,
                boot,
                job: (slot, generation),
            } => {
                let local = self.local(node);
                let one = &mut self.nodes[node];
                let Some(job) = one.jobs.get_mut(&slot).filter(|_| one.boot == boot) else {
                    return;
                };
                if job.holder.generation() == generation && job.runs {
                    let outputs = job.holder.finish(local, id(node), 0);
                    if !outputs.is_empty() {
                        job.runs = false;
                        let now = self.queue.now();
                        (self.checks).gone(now, slot, node, generation, MACHINE, false);
                        self.holder(node, slot, outputs);
                    }
                }
                self.after(node);
            }
            Event::CopyGone {
                node,
                boot,
                job: (slot, generation),
            } => {
                let one = &self.nodes[node];
                let same = one.jobs.get(&slot).map(|job| job.holder.generation());
                if one.boot == boot && same == Some(generation) {
                    self.copy_gone(node, slot);
                    self.after(node);
                }
            }
            Event::Noticed(node, boot) => {
                if self.nodes[node].boot == boot && !self.nodes[node].up {
                    let now = self.queue.now();
                    // Who came in the meantime was told what others believed then, and hears the rest when it next
                    // asks for a page, half a minute later at most.
                    let died = now.saturating_sub(NOTICED_WITHIN);
                    let long = |one: &&Node| one.up && one.up_since + STALE_MAX <= died;
                    let fooled = (self.nodes.iter())
                        .filter(long)
                        .filter(|one| one.membership.life(id(node)) == Some(Life::Alive))
                        .count();
                    // Not while parts of the network do not hear each other, or have just begun to and tell each other
                    // of all that happened.
                    if self.net.cut == Cut::None && self.quiet_since + CALM_AFTER <= died {
                        self.checks.deaths_noticed(now, node, fooled);
                    }
                }
            }
            Event::Look => self.look(),
        }
    }

    /// Has a node know others from before: a network that is there already.
    fn know(&mut self, node: usize) {
        let local = self.local(node);
        let all = self.nodes.len();
        let some = (4 * self.scenario.members_max).min(all);
        let numbers = rand::seq::index::sample(&mut self.rng, all, some).into_vec();
        let news = numbers.iter().filter(|number| **number != node);
        let news: Vec<_> = news
            .map(|number| self.nodes[*number].membership.news())
            .collect();
        let outputs = self.nodes[node].membership.recall(local, news);
        self.members(node, outputs);
    }

    pub(crate) fn local(&self, node: usize) -> Duration {
        self.nodes[node].local(self.queue.now())
    }

    /// Notes when the node is to act next, and checks what it holds.
    fn after(&mut self, node: usize) {
        let now = self.queue.now();
        let one = &mut self.nodes[node];
        let stock = one.stock;
        let promised = one.book.promised();
        let at = one
            .global(one.wake_at())
            .max(now + Duration::from_millis(1));
        if one.wake.is_none_or(|wake| at < wake) {
            one.wake = Some(at);
            self.queue.at(at, Event::Wake { node, at });
        }
        self.checks.promised(now, node, promised, stock);
    }

    pub(crate) fn send(&mut self, from: usize, to: NodeId, wire: Wire) {
        let to = number(to);
        let now = self.queue.now();
        if from == to {
            let wire = Box::new(wire);
            self.queue.at(now, Event::Arrive { to, from, wire });
            return;
        }
        if let Wire::Member(packet) = &wire {
            self.nodes[from].traffic.count(packet);
        }
        let [first, second] = self.net.arrivals(from, to);
        if let Some(delay) = second {
            let wire = Box::new(wire.clone());
            self.queue.at(now + delay, Event::Arrive { to, from, wire });
        }
        if let Some(delay) = first {
            let wire = Box::new(wire);
            self.queue.at(now + delay, Event::Arrive { to, from, wire });
        }
    }

    pub(crate) fn members(&mut self, node: usize, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send(to, packet) => self.send(node, to, Wire::Member(packet)),
                Output::Changed(..) | Output::Evicted(_) | Output::Facts(_) => {}
            }
        }
    }

    /// What the asker holds of the node: the truth, which the node's books say, too.
    fn grant(&self, asker: usize, node: usize) -> (Option<GrantTerms>, Standing) {
        let lot = (asker.wrapping_mul(31) ^ node.wrapping_mul(17)) % 100;
        let until_s = if lot == 2 { 60 } else { 1 << 40 };
        let terms = GrantTerms {
            id: GrantId::from_random([0; 8]),
            node: id(node),
            holder: id(asker),
            rights: [Right::Run].into(),
            until_s,
            limits: GrantLimits::default(),
        };
        let standing = if lot == 1 {
            Standing::Revoked
        } else {
            Standing::Live
        };
        ((lot != 0).then_some(terms), standing)
    }

    /// The node's own decision.
    fn admits(&self, asker: usize, node: usize) -> bool {
        let (terms, standing) = self.grant(asker, node);
        let question = Question {
            node: id(node),
            terms: terms.as_ref(),
            standing,
            now_s: self.queue.now().as_secs(),
            requirement: Requirement::Right(Right::Run),
        };
        self.scenario.fault == Some(Fault::AuthorityIgnored) || authorize(&question).is_ok()
    }

    /// Who was promised what, told without the code that is tested.
    fn is_granted(&self, asker: usize, node: usize) -> bool {
        match (asker.wrapping_mul(31) ^ node.wrapping_mul(17)) % 100 {
            0 | 1 => false,
            2 => self.queue.now().as_secs() <= 60,
            _ => true,
        }
    }

    fn hear(&mut self, node: usize, from: usize, wire: Wire) {
        let local = self.local(node);
        let asker = id(from);
        match wire {
            Wire::Member(packet) => {
                let outputs = self.nodes[node].membership.handle(local, asker, packet);
                self.members(node, outputs);
            }
            Wire::Ask(request) => {
                let admits = self.admits(from, node);
                let book = &mut self.nodes[node].book;
                let size = Stock::one(MACHINE);
                let answer = if !admits {
                    Wire::Refused(request, "no grant".to_owned())
                } else {
                    match book.offer(local, id(node), (asker, request), size, 1) {
                        Ok(offer) => Wire::Offered(offer),
                        Err(refused) => Wire::Refused(request, refused.to_string()),
                    }
                };
                self.send(node, asker, answer);
            }
            Wire::Take(request) => {
                let answer = match self.nodes[node].book.take(local, asker, request) {
                    Ok(_) => Wire::Taken(request),
                    Err(refused) => Wire::Refused(request, refused.to_string()),
                };
                self.send(node, asker, answer);
            }
            Wire::Release(request) => {
                let one = &mut self.nodes[node];
                // What is used is given back by the machine's end alone.
                if !one.jobs.values().any(|job| job.room == (asker, request)) {
                    one.book.decline(asker, request);
                }
            }
            Wire::Offered(offer) => {
                self.search(node, offer.request, SearchInput::Offered(offer));
            }
            Wire::Refused(request, why) => {
                self.search(node, request, SearchInput::Refused(asker, why));
            }
            Wire::Taken(request) => self.search(node, request, SearchInput::Taken(asker)),
            Wire::Run {
                request,
                spec,
                slot,
                generation,
                keepers,
            } => {
                let now = self.queue.now();
                // Each request is looked at for itself: the grant may have ended since there was an offer.
                let admits = self.admits(from, node);
                let one = &mut self.nodes[node];
                if !admits {
                    one.book.decline(asker, request);
                    return;
                }
                if one.jobs.contains_key(&slot) || one.book.begin(local, asker, request).is_err() {
                    return;
                }
                let holder = Holder::new(Terms::default(), slot, generation, keepers, local);
                let room = (asker, request);
                let runs = false;
                one.jobs.insert(
                    slot,
                    Job {
                        holder,
                        spec,
                        room,
                        runs,
                    },
                );
                let granted = self.is_granted(from, node);
                self.checks.served(now, from, node, granted);
            }
            Wire::NotRun(slot, largest) => {
                if let Some(overseer) = self.nodes[node].overseers.get_mut(&slot.service) {
                    overseer.failed(slot, largest);
                }
            }
            Wire::ToKeeper(question) => self.keep(node, from, question),
            Wire::FromKeeper(answer) => self.kept(node, asker, answer),
        }
    }

    /// Does what is due on a node.
    fn act(&mut self, node: usize) {
        let local = self.local(node);
        let one = &mut self.nodes[node];
        one.book.expire(local);
        one.state(local);
        if one.membership.wake_at() <= local {
            let outputs = one.membership.poll(local);
            self.members(node, outputs);
        }
        self.meet_keepers(node);
        let one = &mut self.nodes[node];
        let due: Vec<_> = one
            .search_wakes
            .iter()
            .take_while(|(at, _)| *at <= local)
            .copied()
            .collect();
        for (at, request) in due {
            self.nodes[node].search_wakes.remove(&(at, request));
            if self.nodes[node].searches.contains_key(&request) {
                self.search(node, request, SearchInput::Timer);
            }
        }
        let due: Vec<Slot> = (self.nodes[node].jobs.iter())
            .filter(|(_, job)| job.holder.wake_at() <= local)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in due {
            if let Some(job) = self.nodes[node].jobs.get_mut(&slot) {
                let outputs = job.holder.poll(local);
                self.holder(node, slot, outputs);
            }
        }
        let due: Vec<ServiceId> = (self.nodes[node].overseers.iter())
            .filter(|(_, overseer)| overseer.wake_at() <= local)
            .map(|(service, _)| *service)
            .collect();
        for service in due {
            let one = &mut self.nodes[node];
            let membership = &one.membership;
            let lives = |other: NodeId| membership.life(other) == Some(Life::Alive);
            let pair = (one.overseers.get_mut(&service), one.keepers.get(&service));
            if let (Some(overseer), Some(keeper)) = pair {
                let actions = overseer.poll(local, keeper, lives);
                self.oversee(node, service, actions);
            }
        }
        let due: Vec<ServiceId> = (self.nodes[node].changes.iter())
            .filter(|(_, change)| change.wake_at() <= local)
            .map(|(service, _)| *service)
            .collect();
        for service in due {
            if let Some(change) = self.nodes[node].changes.get_mut(&service) {
                let outputs = change.poll(local);
                self.change(node, service, outputs);
            }
        }
    }

    fn die(&mut self, node: usize) {
        let now = self.queue.now();
        if !self.nodes[node].up {
            return;
        }
        let jobs = std::mem::take(&mut self.nodes[node].jobs);
        let one = &mut self.nodes[node];
        one.up = false;
        one.boot += 1;
        let boot = one.boot;
        for (slot, job) in jobs {
            if job.runs {
                let wanted = self.is_wanted(slot);
                let generation = job.holder.generation();
                (self.checks).gone(now, slot, node, generation, MACHINE, wanted);
            }
        }
        self.queue
            .at(now + NOTICED_WITHIN, Event::Noticed(node, boot));
    }

    fn rise(&mut self, node: usize) {
        if self.nodes[node].up {
            return;
        }
        let now = self.queue.now();
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        self.nodes[node].restart(now, &self.scenario, &mut rng);
        // Remembered peers, of which some live.
        for _ in 0..3 {
            let peer = self.rng.random_range(0..self.nodes.len());
            let outputs = self.nodes[node].membership.join(id(peer));
            self.members(node, outputs);
        }
        self.after(node);
    }

    fn create(&mut self, service: ServiceId) {
        let now = self.queue.now();
        let Some(spec) = self.specs.get(&service).copied() else {
            return;
        };
        let up = (self.nodes.iter().enumerate()).filter(|(_, one)| one.up);
        let keepers = Keepers {
            epoch: 1,
            nodes: choose_keepers(service, &[], up.map(|(number, _)| id(number)), |_| true),
        };
        for number in 0..spec.replicas {
            self.checks.wanted(now, Slot { service, number });
        }
        // Whoever creates it tells them until they know.
        for keeper in keepers.nodes.clone() {
            let begin = ToKeeper::Begin {
                keepers: keepers.clone(),
                spec,
                records: BTreeMap::new(),
            };
            let wire = Box::new(Wire::ToKeeper(begin));
            let to = number(keeper);
            self.queue.at(now, Event::Arrive { to, from: to, wire });
        }
    }
}
