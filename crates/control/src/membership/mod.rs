//! Who is there: membership by gossip, with suspicion, after SWIM (Das, Gupta, Motivala 2002).
//!
//! ```text
//!            no answer, directly          nobody took it back
//!            nor through helpers          in time
//!   alive ─────────────────────► suspect ──────────────► dead
//!     ▲   or somebody says dead     │ its own word           │
//!     └─────────────────────────────┴────────────────────────┘
//! ```
//! Each half second a node pings another, in an order of its own; who does not answer is pinged again and through three
//! helpers, then suspected, then, three seconds later, dead. Every packet carries news. A node that hears itself suspected says that it
//! lives, with a larger incarnation. Others' word alone kills nobody: who is said to be dead, and is not suspected yet, is
//! suspected first. Nor does it raise the dead: who is dead here and alive to others is pinged, and its own word counts.
//! Others' word takes back one suspicion; after that this node's own pings decide, until one is answered.
//!
//! **Pings.** At least every other one goes to a member that has spoken or is pinned, while there is one: ids that somebody has
//! invented delay the others' by half at most. One peer's word of strangers counts at a bounded rate, beyond those whose facts
//! came along.
//!
//! **Bounds.** A packet has at most [`Config::packet_bytes`]. Of its own accord a node sends at most a constant number a
//! second, however large the network is; beside that, one answer for a ping, with news at a bounded rate, a bounded number of
//! bare pings in others' stead at a time, and pages at a bounded rate. A page counts only if it was asked for.
//!
//! **The table** holds [`Config::members_max`]; of larger networks a node knows a random part (the members whose keyed hash
//! is smallest; it is used for nothing else, so that nobody learns it), and passes news of the others on. Whom this node has
//! only heard of fills half of it at most and makes room for whom it has heard. Who was joined or
//! [pinned](Membership::pin) stays.
//!
//! **Facts** are bytes with a version: what they say and that their subject signed them is the caller's to check, before
//! they are handed in.
//!
//! The machine has no clock and no socket: [`Membership::handle`] and [`Membership::poll`] take the time, and answer with
//! what is to be sent and what has changed. The caller polls at [`Membership::wake_at`]. Senders are authenticated.

mod age;
mod chance;
mod news;
mod packet;
mod pages;
mod probe;
mod rumours;
mod table;
#[cfg(test)]
mod tests;

pub use age::{Age, Told};
use news::Doubts;
pub use packet::{Body, News, Packet, Stated};
use pages::{Pages, Strangers};
use probe::Probe;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rumours::Rumours;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use table::{Keys, Members};
use vistara_model::NodeId;

/// Bytes of one piece of news on the wire, at most: a key, a number, a state, an age.
pub const NEWS_BYTES: usize = 44;
/// Bytes of a packet beside news and facts.
pub const HEAD_BYTES: usize = 48;
/// Bytes that facts have beside themselves.
pub const FACTS_HEAD_BYTES: usize = 46;
/// Longest facts.
pub const FACTS_BYTES_MAX: usize = 640;

/// How it runs. The defaults notice a death within 10 s with room to spare.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// How often one member is pinged.
    pub probe_period: Duration,
    /// How long its answer is waited for before it is pinged again and helpers are asked; and again after that.
    pub ack_wait: Duration,
    /// How long in all before it is suspected.
    pub probe_wait: Duration,
    /// How many are asked to ping in one's stead.
    pub helpers: usize,
    /// How long a suspect has to say that it lives.
    pub suspicion: Duration,
    /// How often news are sent by themselves, while there are any.
    pub gossip_period: Duration,
    /// To how many.
    pub gossip_fanout: usize,
    /// How often a dead member is tried at least, so that parts of a network find together again.
    pub reach_period: Duration,
    /// How often somebody is asked for a page of its table.
    pub sync_period: Duration,
    /// Largest packet: what fits a datagram everywhere.
    pub packet_bytes: usize,
    /// Largest page of a table: it goes over a stream.
    pub page_bytes: usize,
    /// Most members in the table.
    pub members_max: usize,
    /// Most pieces of news being passed on or remembered.
    pub rumours_max: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            probe_period: Duration::from_millis(500),
            ack_wait: Duration::from_millis(350),
            probe_wait: Duration::from_millis(1000),
            helpers: 3,
            suspicion: Duration::from_secs(3),
            gossip_period: Duration::from_millis(250),
            gossip_fanout: 2,
            reach_period: Duration::from_secs(5),
            sync_period: Duration::from_secs(30),
            packet_bytes: 1100,
            page_bytes: 16 << 10,
            members_max: 1024,
            rumours_max: 2048,
        }
    }
}

/// What is believed of a member. Later ones outweigh earlier ones of the same incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Life {
    /// It answers.
    Alive,
    /// It did not answer.
    Suspect,
    /// It is gone, or has left.
    Dead,
}

/// How a member is bound to this node; later ones more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tie {
    /// Others have told of it.
    Hearsay,
    /// It has spoken to this node.
    Heard,
    /// It stays whatever comes.
    Pinned,
}

/// What is to be done, or has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this.
    Send(NodeId, Packet),
    /// A member is now believed to be this.
    Changed(NodeId, Life),
    /// It is no member any more: others took its place in the table.
    Evicted(NodeId),
    /// There are newer facts about a member.
    Facts(Stated),
}

#[derive(Debug, Clone)]
struct Member {
    news: News,
    /// Until when this is passed on; nothing where it is not.
    until: Option<Duration>,
    /// When a suspicion ends in death; of the dead, since when they are.
    deadline: Duration,
    facts: Option<Stated>,
    /// How often the facts were passed on, while they are.
    facts_sent: u32,
    /// Who stays when the table is full: the smallest.
    rank: table::Place,
    /// Whether it has spoken to this node.
    heard: bool,
    /// Whether it stays whatever comes.
    pinned: bool,
    /// Whether others' word took back a suspicion since it answered last.
    denied: bool,
    /// Up to which incarnation others have said that it lives, while it was dead here.
    said_alive: Option<u64>,
}

/// One node's view of the network.
#[derive(Debug, Clone)]
pub struct Membership {
    config: Config,
    me: News,
    keys: Keys,
    /// The latest time that this machine was told.
    now: Duration,
    rng: SmallRng,
    own_facts: Option<Stated>,
    own_facts_sent: u32,
    members: Members,
    /// The ranks of those that were only heard of, and of those that have spoken; the pinned are in neither.
    hearsay: BTreeSet<table::Place>,
    known: BTreeSet<table::Place>,
    pinned: usize,
    alive: usize,
    /// The ranks of those that are believed to be gone, and since when.
    dead: BTreeSet<(Duration, table::Place)>,
    suspicions: BTreeSet<(Duration, NodeId)>,
    rumours: Rumours,
    /// Members with facts that are passed on, by how often they were.
    fresh_facts: BTreeSet<(u32, NodeId)>,
    probes: Vec<Probe>,
    /// Up to where the heard and the pinned were pinged, and up to where the others.
    cursors: [table::Place; 2],
    /// What the others' next ping has saved up.
    hearsay_turn: usize,
    /// Whom somebody contradicts this node about: pinged next.
    doubts: Doubts,
    pages: Pages,
    strangers: Strangers,
    /// Up to when answers have used up what news they may carry.
    answers_until: Duration,
    /// The same of its own facts, for which others ask.
    asked_facts_until: Duration,
    next_probe: Duration,
    next_gossip: Duration,
    next_reach: Duration,
    next_sync: Duration,
}

/// Bits of an incarnation that count denials within one start of a node.
const DENIAL_BITS: u32 = 24;

impl Membership {
    /// A node that knows nobody. `start` is how often the node has started with its key, `seed` random.
    pub fn new(config: Config, node: NodeId, start: u64, seed: u64, now: Duration) -> Membership {
        let keys = Keys::new(seed);
        let mut rng = SmallRng::seed_from_u64(keys.rng_seed());
        let me = News {
            node,
            incarnation: start << DENIAL_BITS,
            life: Life::Alive,
        };
        // Nodes that start together are not to speak all at once.
        let mut soon = |period: Duration| now + period.mul_f64(rng.random::<f64>());
        let (next_probe, next_gossip) = (soon(config.probe_period), soon(config.gossip_period));
        let (next_reach, next_sync) = (soon(config.reach_period), soon(config.sync_period));
        Membership {
            rumours: Rumours::new(config.rumours_max, keys.hashing()),
            config,
            members: Members::new(keys.hashing()),
            me,
            keys,
            now,
            rng,
            own_facts: None,
            own_facts_sent: 0,
            hearsay: BTreeSet::new(),
            known: BTreeSet::new(),
            pinned: 0,
            alive: 0,
            dead: BTreeSet::new(),
            suspicions: BTreeSet::new(),
            fresh_facts: BTreeSet::new(),
            probes: Vec::new(),
            cursors: [(0, node); 2],
            hearsay_turn: 0,
            doubts: Doubts::default(),
            pages: Pages::default(),
            strangers: Strangers::default(),
            answers_until: Duration::ZERO,
            asked_facts_until: Duration::ZERO,
            next_probe,
            next_gossip,
            next_reach,
            next_sync,
        }
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.me.node
    }

    /// What it says of itself.
    pub fn news(&self) -> News {
        self.me
    }

    /// When to [`Membership::poll`] next: before that it would send nothing and change nothing. [`Duration::MAX`] where nothing will be
    /// due until somebody is heard, joined or kept. What is handed in may bring it forward.
    pub fn wake_at(&self) -> Duration {
        let due = [
            // Whom there is to ping, to tell, to try again, and to ask for a page.
            (self.someone_to_ping(), self.next_probe),
            (self.rumours.waiting() && self.alive > 0, self.next_gossip),
            (!self.dead.is_empty(), self.next_reach),
            (self.alive > 0, self.next_sync),
        ];
        let due = due.into_iter().filter(|(is_due, _)| *is_due);
        (due.map(|(_, at)| at))
            .chain(self.suspicions.first().map(|(deadline, _)| *deadline))
            .chain(self.probes.iter().map(Probe::next_at))
            .min()
            .unwrap_or(Duration::MAX)
    }

    /// Whether [`Membership::probe`] has something to do.
    fn someone_to_ping(&self) -> bool {
        self.members.len() > self.dead.len() || !self.doubts.is_empty()
    }

    /// What is believed of each member.
    pub fn members(&self) -> impl Iterator<Item = (NodeId, Life, Option<&Stated>)> {
        (self.members.values()).map(|one| (one.news.node, one.news.life, one.facts.as_ref()))
    }

    /// What is believed of one; nothing where it is not known.
    pub fn life(&self, node: NodeId) -> Option<Life> {
        self.members.get(node).map(|one| one.news.life)
    }

    /// How it is bound to this node; nothing where it is not known.
    pub fn tie(&self, node: NodeId) -> Option<Tie> {
        let member = self.members.get(node)?;
        Some(if member.pinned {
            Tie::Pinned
        } else if member.heard {
            Tie::Heard
        } else {
            Tie::Hearsay
        })
    }

    /// How many are believed to be alive.
    pub fn alive(&self) -> usize {
        self.alive
    }

    /// Takes up a node that the user named, in a full table in another's place, [pins](Membership::pin) it, and asks it whom it knows.
    pub fn join(&mut self, node: NodeId) -> Vec<Output> {
        let mut outputs = Vec::new();
        let incarnation = 0;
        let life = Life::Alive;
        if node == self.me.node {
            return outputs;
        }
        if self.life(node).is_none() {
            let news = News {
                node,
                incarnation,
                life,
            };
            self.enter(self.now, news, (Tie::Pinned, None), &mut outputs);
        }
        self.pin(node, true);
        self.pull_anew(node, 0, &mut outputs);
        outputs
    }

    /// Takes up a node whose life this one has to know, and [pins](Membership::pin) it, in a full table in another's place. Where nobody has
    /// said that it lives it is suspected until it has answered, which it is asked next, and nobody is told so.
    pub fn keep(&mut self, now: Duration, node: NodeId) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.now = self.now.max(now);
        if node != self.me.node && self.life(node).is_none() {
            let news = News {
                node,
                incarnation: 0,
                life: Life::Suspect,
            };
            if self.enter(now, news, (Tie::Pinned, None), &mut outputs) {
                self.doubt(node, self.me.node);
            }
        }
        self.pin(node, true);
        outputs
    }

    /// Takes up members that this node has heard in an earlier life. What is believed of others already stays.
    pub fn recall(
        &mut self,
        now: Duration,
        members: impl IntoIterator<Item = News>,
    ) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.now = self.now.max(now);
        for news in members {
            if news.node != self.me.node && self.life(news.node).is_none() {
                self.enter(now, news, (Tie::Heard, None), &mut outputs);
            }
        }
        outputs
    }

    /// States something new about this node. Longer facts than [`FACTS_BYTES_MAX`] are not taken.
    pub fn state(&mut self, version: u64, bytes: Arc<[u8]>) {
        if bytes.len() <= FACTS_BYTES_MAX {
            let node = self.me.node;
            self.own_facts = Some(Stated {
                node,
                version,
                bytes,
            });
            self.fresh_facts.remove(&(self.own_facts_sent, node));
            self.own_facts_sent = 0;
            self.fresh_facts.insert((0, node));
        }
    }

    /// Takes leave: tells some, who tell the others; its last facts go along.
    pub fn leave(&mut self) -> Vec<Output> {
        self.me.life = Life::Dead;
        let mut outputs = Vec::new();
        let own = self.own_facts.clone();
        for node in self.some_alive(2 * self.config.gossip_fanout + 2, self.me.node) {
            let mut packet = self.packet(Body::Gossip, node, own.as_ref());
            packet.facts.extend(own.clone());
            outputs.push(Output::Send(node, packet));
        }
        outputs
    }

    /// A first word to a node that is no member yet, which answers if it is one of ours. It tells nothing but that this node
    /// is here.
    pub fn greeting(&mut self) -> Packet {
        Packet {
            body: Body::Ping {
                number: self.keys.number(),
                version: 0,
            },
            news: vec![self.me.into()],
            facts: Vec::new(),
        }
    }

    /// Whether a packet is looked at: it is no larger than may be sent, and a page was asked for. To be asked before anything
    /// in it is verified.
    pub fn takes(&self, now: Duration, from: NodeId, packet: &Packet) -> bool {
        let (most, asked) = match packet.body {
            Body::Page { number, .. } => (
                self.config.page_bytes,
                self.pages.is_asked(now.max(self.now), from, number),
            ),
            Body::Ping { .. }
            | Body::Ack { .. }
            | Body::PingFor { .. }
            | Body::AckFor { .. }
            | Body::Gossip
            | Body::Pull { .. } => (self.config.packet_bytes, true),
        };
        asked && packet.bytes() <= most
    }

    /// Takes what another node sent. Facts in it have been verified.
    pub fn handle(&mut self, now: Duration, from: NodeId, packet: Packet) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.now = self.now.max(now);
        if from == self.me.node {
            return outputs;
        }
        let page = matches!(packet.body, Body::Page { .. });
        if !self.takes(now, from, &packet) {
            return outputs;
        }
        let pull = match packet.body {
            Body::Page { number, .. } => match self.pages.asked(now, from, number) {
                None => return outputs,
                left => left,
            },
            _ => None,
        };
        let met = self.life(from).is_none();
        for told in &packet.news {
            let about = told.news.node;
            let vouched = packet.facts.iter().any(|stated| stated.node == about);
            self.hear(now, from, (*told, vouched), page, &mut outputs);
        }
        if !packet.news.iter().any(|told| told.news.node == from) {
            // It speaks, so it lives.
            let incarnation = self.members.get(from).map_or(0, |one| one.news.incarnation);
            let news = News {
                node: from,
                incarnation,
                life: Life::Alive,
            };
            self.hear(now, from, (news.into(), false), page, &mut outputs);
        }
        self.heard(from);
        for stated in packet.facts {
            self.learn(stated, &mut outputs);
        }
        match packet.body {
            Body::Ping { number, version } => {
                let own = self.facts_for(now, version);
                let answer = self.answer(now, Body::Ack { number }, from, own);
                outputs.push(Output::Send(from, answer));
            }
            Body::Ack { number } => self.acked(from, number, &mut outputs),
            Body::PingFor { number, target } => {
                self.ping_for(now, from, number, target, &mut outputs);
            }
            Body::AckFor { number, target } => {
                self.acked_for(now, from, number, target, &mut outputs);
            }
            Body::Gossip => {}
            Body::Pull {
                number,
                from: place,
            } => {
                if self.pages.may_answer(now, from) {
                    let page = self.page(number, place);
                    outputs.push(Output::Send(from, page));
                }
            }
            Body::Page { next, .. } => {
                // Who stands in a page was only heard of. Members stand in pages by chance: where one says nothing new, the others hardly would.
                let new = outputs.iter().any(|one| matches!(one, Output::Changed(..)));
                if let (Some(next), Some(left), false, true) = (next, pull, self.is_full(), new) {
                    self.pull(from, next, left, &mut outputs);
                }
            }
        }
        if met && !page && self.life(from) == Some(Life::Alive) && self.members.len() == 1 {
            // The first one met: it may know the others.
            self.pull(from, 0, pages::PAGES_MAX, &mut outputs);
        }
        outputs
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.now = self.now.max(now);
        while let Some((deadline, node)) = self.suspicions.first().copied() {
            if deadline > now {
                break;
            }
            self.suspicions.pop_first();
            if let Some((news, until)) = self.members.get(node).map(|one| (one.news, one.until)) {
                // No younger than the suspicion.
                let life = Life::Dead;
                self.believe(now, News { life, ..news }, until, &mut outputs);
            }
        }
        self.poll_probes(now, &mut outputs);
        if now >= self.next_probe {
            self.next_probe = now + self.config.probe_period;
            self.probe(now, &mut outputs);
        }
        if now >= self.next_gossip {
            self.next_gossip = now + self.config.gossip_period;
            if self.rumours.waiting() {
                for node in self.some_alive(self.config.gossip_fanout, self.me.node) {
                    self.send(node, Body::Gossip, &mut outputs);
                }
            }
        }
        if now >= self.next_reach {
            self.next_reach = now + self.reach_pause();
            self.rumours.forget(now);
            if let Some(node) = self.some_dead() {
                self.reach(now, node, &mut outputs);
            }
        }
        if now >= self.next_sync {
            self.next_sync = now + self.config.sync_period;
            let from = self.rng.random();
            for node in self.some_alive(1, self.me.node) {
                self.pull(node, from, pages::PAGES_MAX, &mut outputs);
            }
        }
        outputs
    }
}
