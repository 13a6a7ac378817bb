//! Who is there: membership by gossip, with suspicion, after SWIM (Das, Gupta, Motivala 2002).
//!
//! ```text
//!            no answer, directly          nobody took it back
//!            nor through helpers          in time
//!   alive ─────────────────────► suspect ──────────────► dead
//!     ▲   or somebody says dead     │ its own word           │
//!     └─────────────────────────────┴────────────────────────┘
//! ```
//! Each half second a node pings another, in an order of its own; who does not answer is pinged through three helpers, then
//! suspected, then, three seconds later, dead. Every packet carries news. A node that hears itself suspected says that it
//! lives, with a larger incarnation. Others' word alone kills nobody: who is said to be dead, and is not suspected yet, is
//! suspected first.
//!
//! **Bounds.** A packet has at most [`Config::packet_bytes`]; a node sends at most a constant number a second, however large
//! the network is. A table holds [`Config::members_max`]; of larger networks a node knows a random part (the members whose
//! keyed hash is smallest), and passes news of the others on.
//!
//! **Facts** are bytes with a version: what they say and that their subject signed them is the caller's to check, before
//! they are handed in.
//!
//! The machine has no clock and no socket: [`Membership::handle`] and [`Membership::poll`] take the time, and answer with
//! what is to be sent and what has changed. The caller polls at [`Membership::wake_at`]. Senders are authenticated.

mod news;
mod probe;
#[cfg(test)]
mod tests;

use news::Rumours;
use probe::Probe;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use vistara_model::NodeId;

/// Bytes of one piece of news on the wire, at most: a key, a number, a state.
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
    /// How long its answer is waited for before helpers are asked.
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
    /// How often a dead member is tried, so that parts of a network find together again.
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

/// One piece of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct News {
    /// About whom.
    pub node: NodeId,
    /// Which of its lives and denials: only the node itself makes it larger.
    pub incarnation: u64,
    /// What is said.
    pub life: Life,
}

impl News {
    /// Whether this replaces the other, both about one node.
    fn outweighs(&self, other: &News) -> bool {
        (self.incarnation, self.life) > (other.incarnation, other.life)
    }
}

/// What a node states about itself, signed by it; opaque here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stated {
    /// Who.
    pub node: NodeId,
    /// Grows with each statement. It stands within what is signed, and the caller has compared them.
    pub version: u64,
    /// What, with its signature.
    pub bytes: Arc<[u8]>,
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Answer this. Says which version of the receiver's facts the sender has.
    Ping {
        /// Comes back in the answer.
        number: u64,
        /// The newest version of the receiver's facts that the sender has.
        version: u64,
    },
    /// An answer.
    Ack {
        /// The ping's number.
        number: u64,
    },
    /// Ping this one in my stead.
    PingFor {
        /// Comes back in the answer.
        number: u64,
        /// Whom.
        target: NodeId,
    },
    /// It answered you.
    AckFor {
        /// The number of the `PingFor`.
        number: u64,
        /// Who answered.
        target: NodeId,
    },
    /// News only.
    Gossip,
    /// Send a page of your table, from here on.
    Pull {
        /// A place in the table: a number that only its owner understands.
        from: u64,
    },
    /// A page.
    Page {
        /// Where the next one begins, if there is one.
        next: Option<u64>,
    },
}

/// What goes from one node to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it is for.
    pub body: Body,
    /// What happened to others, and first of all to the sender.
    pub news: Vec<News>,
    /// What others state.
    pub facts: Vec<Stated>,
}

impl Packet {
    /// Bytes on the wire, at most.
    pub fn bytes(&self) -> usize {
        let facts = self
            .facts
            .iter()
            .map(|one| one.bytes.len() + FACTS_HEAD_BYTES);
        HEAD_BYTES + self.news.len() * NEWS_BYTES + facts.sum::<usize>()
    }
}

/// What is to be done, or has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this.
    Send(NodeId, Packet),
    /// A member is now believed to be this.
    Changed(NodeId, Life),
    /// There are newer facts about a member.
    Facts(Stated),
}

#[derive(Debug, Clone)]
struct Member {
    news: News,
    /// When a suspicion ends in death.
    deadline: Duration,
    facts: Option<Stated>,
    /// How often the facts were passed on, while they are.
    facts_sent: u32,
}

/// A member's place in the table: a hash that only this node knows, so that nobody can choose to be in it; and the order in
/// which members are pinged.
type Place = (u64, NodeId);

/// One node's view of the network.
#[derive(Debug, Clone)]
pub struct Membership {
    config: Config,
    me: News,
    salt: u64,
    rng: SmallRng,
    own_facts: Option<Stated>,
    own_facts_sent: u32,
    members: BTreeMap<Place, Member>,
    alive: usize,
    suspicions: BTreeSet<(Duration, NodeId)>,
    rumours: Rumours,
    /// Members with facts that are passed on, by how often they were.
    fresh_facts: BTreeSet<(u32, NodeId)>,
    probes: Vec<Probe>,
    probe_cursor: Place,
    next_number: u64,
    /// Whom somebody says to be alive and this node believes to be dead: pinged next.
    doubts: VecDeque<NodeId>,
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
        let mut rng = SmallRng::seed_from_u64(seed);
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
            rumours: Rumours::new(config.rumours_max),
            config,
            me,
            salt: rng.random(),
            rng,
            own_facts: None,
            own_facts_sent: 0,
            members: BTreeMap::new(),
            alive: 0,
            suspicions: BTreeSet::new(),
            fresh_facts: BTreeSet::new(),
            probes: Vec::new(),
            probe_cursor: (0, node),
            next_number: 0,
            doubts: VecDeque::new(),
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

    /// When to [`Membership::poll`] next.
    pub fn wake_at(&self) -> Duration {
        let mut at = self.next_probe.min(self.next_reach).min(self.next_sync);
        if self.rumours.waiting() {
            at = at.min(self.next_gossip);
        }
        if let Some((deadline, _)) = self.suspicions.first() {
            at = at.min(*deadline);
        }
        (self.probes.iter()).fold(at, |at, probe| at.min(probe.next_at()))
    }

    /// What is believed of each member.
    pub fn members(&self) -> impl Iterator<Item = (NodeId, Life, Option<&Stated>)> {
        (self.members.values()).map(|one| (one.news.node, one.news.life, one.facts.as_ref()))
    }

    /// What is believed of one; nothing where it is not known.
    pub fn life(&self, node: NodeId) -> Option<Life> {
        self.members.get(&self.place(node)).map(|one| one.news.life)
    }

    /// How many are believed to be alive.
    pub fn alive(&self) -> usize {
        self.alive
    }

    /// Takes up a node that the user named, and asks it whom it knows.
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
            self.enter(Duration::ZERO, news, false, &mut outputs);
        }
        self.send(node, Body::Pull { from: 0 }, &mut outputs);
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

    /// Takes leave: tells some, who tell the others.
    pub fn leave(&mut self) -> Vec<Output> {
        self.me.life = Life::Dead;
        let mut outputs = Vec::new();
        for node in self.some_alive(2 * self.config.gossip_fanout + 2, self.me.node) {
            self.send(node, Body::Gossip, &mut outputs);
        }
        outputs
    }

    /// Takes what another node sent. Facts in it have been verified.
    pub fn handle(&mut self, now: Duration, from: NodeId, packet: Packet) -> Vec<Output> {
        let mut outputs = Vec::new();
        if from == self.me.node {
            return outputs;
        }
        let page = matches!(packet.body, Body::Page { .. });
        let most = if page {
            self.config.page_bytes
        } else {
            self.config.packet_bytes
        };
        // More than may be sent is no packet of ours.
        if packet.bytes() > most {
            return outputs;
        }
        let met = self.life(from).is_none();
        for news in &packet.news {
            self.hear(now, from, *news, page, &mut outputs);
        }
        if !packet.news.iter().any(|news| news.node == from) {
            // It speaks, so it lives.
            let incarnation = self
                .members
                .get(&self.place(from))
                .map_or(0, |one| one.news.incarnation);
            let news = News {
                node: from,
                incarnation,
                life: Life::Alive,
            };
            self.hear(now, from, news, page, &mut outputs);
        }
        for stated in packet.facts {
            self.learn(stated, &mut outputs);
        }
        match packet.body {
            Body::Ping { number, version } => {
                let newer = |own: &&Stated| own.version > version;
                let own = self.own_facts.as_ref().filter(newer).cloned();
                let mut answer = self.packet(Body::Ack { number }, Some(from), own.as_ref());
                answer.facts.splice(0..0, own);
                outputs.push(Output::Send(from, answer));
            }
            Body::Ack { number } => self.acked(from, number, &mut outputs),
            Body::PingFor { number, target } => {
                self.ping_for(now, from, number, target, &mut outputs);
            }
            Body::AckFor { number, target } => self.acked(target, number, &mut outputs),
            Body::Gossip => {}
            Body::Pull { from: place } => {
                let page = self.page(place);
                outputs.push(Output::Send(from, page));
            }
            Body::Page { next: Some(next) } if self.members.len() < self.config.members_max => {
                self.send(from, Body::Pull { from: next }, &mut outputs);
            }
            Body::Page { .. } => {}
        }
        if met && !page && self.life(from) == Some(Life::Alive) && self.members.len() == 1 {
            // The first one met: it may know the others.
            self.send(from, Body::Pull { from: 0 }, &mut outputs);
        }
        outputs
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        while let Some((deadline, node)) = self.suspicions.first().copied() {
            if deadline > now {
                break;
            }
            self.suspicions.pop_first();
            if let Some(news) = self.members.get(&self.place(node)).map(|one| one.news) {
                let life = Life::Dead;
                self.believe(now, News { life, ..news }, true, &mut outputs);
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
            self.next_reach = now + self.config.reach_period;
            self.rumours.forget(now);
            if let Some(node) = self.some_dead() {
                self.doubt(node);
            }
        }
        if now >= self.next_sync {
            self.next_sync = now + self.config.sync_period;
            let from = self.rng.random();
            for node in self.some_alive(1, self.me.node) {
                self.send(node, Body::Pull { from }, &mut outputs);
            }
        }
        outputs
    }

    /// SplitMix64's finish over the salt and the key's first eight bytes.
    fn place(&self, node: NodeId) -> Place {
        let mut head = [0; 8];
        head.copy_from_slice(&node.as_bytes()[..8]);
        let mut word = u64::from_le_bytes(head) ^ self.salt;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31), node)
    }

    /// The members from a random place on that pass, once around.
    fn from_random_place(&mut self, pass: impl Fn(&Member) -> bool, most: usize) -> Vec<NodeId> {
        let Some(((last, _), _)) = self.members.last_key_value() else {
            return Vec::new();
        };
        let last = *last;
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

    fn some_alive(&mut self, most: usize, but: NodeId) -> Vec<NodeId> {
        let most = most.min(self.alive);
        self.from_random_place(
            |member| member.news.life == Life::Alive && member.news.node != but,
            most,
        )
    }

    fn some_dead(&mut self) -> Option<NodeId> {
        if self.alive == self.members.len() {
            return None;
        }
        self.from_random_place(|member| member.news.life == Life::Dead, 1)
            .pop()
    }
}
