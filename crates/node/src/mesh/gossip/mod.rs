//! The task that runs this node's membership (`vistara_control::membership`): its clock, its packets, and what is known of
//! the others by their signed cards.
//!
//! ```text
//! the link's packets ─► decode ─► cards verified ─► Membership ─► packets, changes ─► the link, what is shown
//! ```
//! It runs while this node listens for others and its owner has not made it private. Being a member gives nobody any right:
//! who may do what is decided elsewhere, by grants. Nothing here waits for a disk, a peer or a request.

mod memory;
#[cfg(test)]
mod tests;
mod tick;
mod wire;

use super::{Open, lock};
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use vistara_control::membership::{
    Body, Config, FACTS_BYTES_MAX, Life, Membership, News, Output, Packet, Stated, Tie,
};
use vistara_mesh::card::{CARD_ADDRESSES_MAX, CARD_BYTES_MAX, Card};
use vistara_mesh::{Heard, Link, PAGE_BYTES_MAX, Whereabouts};
use vistara_model::{NodeFacts, NodeId, OwnerTerms, Stock};

const _: () = assert!(CARD_BYTES_MAX <= FACTS_BYTES_MAX);

/// How often joined nodes, and those of shared services, that say nothing are greeted, and the dead are looked through.
const TICK: Duration = Duration::from_secs(5);
/// How often members are written down.
const WRITE_EVERY: Duration = Duration::from_secs(60);
/// A node states itself anew after so long though nothing has changed.
const STATE_EVERY: Duration = Duration::from_secs(60);
/// Free memory that differs by less than this part of all is not worth telling everybody.
const FREE_STEPS: u64 = 16;
/// Who is dead for so long, and was not joined, is no member any more.
const DEAD_MAX: Duration = Duration::from_secs(24 * 3600);
/// The same for who has said goodbye.
const LEFT_MAX: Duration = Duration::from_secs(600);
/// Signatures checked for one sender each second, and at once: a page has some 25 cards, a table is some pages.
const CHECKS_PER_S: f64 = 16.0;
const CHECKS_BURST: f64 = 512.0;
/// The same for all senders together, once for those that are pinned and once for all others, so that no crowd has nobody's
/// card taken: a twentieth of a core each.
const ALL_CHECKS_PER_S: f64 = 500.0;
const ALL_CHECKS_BURST: f64 = 4096.0;
/// Senders whose checks are counted.
const SENDERS_MAX: usize = 2048;
/// Packets that are looked at before something falls due, where both wait: a node that was slow itself blames nobody for it.
const BEFORE_DUE: usize = 256;
/// How long a goodbye gets to be on its way before the link is closed.
const GOODBYE: Duration = Duration::from_millis(100);

/// What is known of a member by its card.
#[derive(Debug, Clone)]
struct Known {
    card: Arc<Card>,
    bytes: Arc<[u8]>,
    /// When it came; nothing where an earlier start heard it.
    at: Option<Instant>,
    at_ns: u64,
}

/// A member, as it is believed to be.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) id: NodeId,
    pub(crate) life: Life,
    pub(crate) card: Option<Arc<Card>>,
    /// When its card came.
    pub(crate) at: Option<Instant>,
    pub(crate) at_ns: u64,
}

impl Member {
    /// The word for how it is.
    pub(crate) fn word(&self) -> &'static str {
        let leaves = self.card.as_ref().is_some_and(|card| card.leaves);
        match self.life {
            Life::Alive => "alive",
            Life::Suspect => "suspect",
            Life::Dead if leaves => "left",
            Life::Dead => "dead",
        }
    }
}

/// A budget that fills up by and by.
#[derive(Debug, Clone, Copy)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn new(burst: f64) -> Budget {
        Budget {
            left: burst,
            at: Instant::now(),
        }
    }

    fn spend(&mut self, per_s: f64, burst: f64) -> bool {
        let since = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        self.left = (self.left + since * per_s).min(burst);
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }
}

struct State {
    machine: Membership,
    known: HashMap<NodeId, Known>,
    /// Since when the dead are dead.
    dead: HashMap<NodeId, Instant>,
    /// What this node has said of itself last, and when.
    own: Option<(Card, Instant)>,
    checks: HashMap<NodeId, Budget>,
    /// For those that are not pinned, and for those that are.
    all_checks: [Budget; 2],
    written: Instant,
}

/// This node's part in the network that it has joined.
pub(crate) struct Gossip {
    open: Arc<Open>,
    link: Link,
    begun: Instant,
    state: Mutex<State>,
    memory: PathBuf,
    /// The machine was given something to do by others than its task, which is to look when that is due.
    stirred: Notify,
    stop: CancellationToken,
}

/// What a node states that takes leave: who it is, and nothing of what it has.
fn nothing(facts: NodeFacts) -> NodeFacts {
    NodeFacts {
        node: facts.node,
        version: facts.version,
        arch: facts.arch,
        cpus: 0,
        capacity: Stock::default(),
        free: Stock::default(),
        queue_depth: 0,
        hypervisors: BTreeSet::new(),
        kvm: false,
        images: BTreeSet::new(),
        templates: BTreeSet::new(),
        ready_ms: None,
        region: None,
        price_micros: 0,
        labels: BTreeSet::new(),
        terms: OwnerTerms::default(),
    }
}

/// Whether what a node says of itself has changed so much that everybody is told.
fn is_news(old: &Card, said: Duration, facts: &NodeFacts, whereabouts: &Whereabouts) -> bool {
    let step = facts.capacity.memory.0 / FREE_STEPS;
    let moved = old.facts.free.memory.0.abs_diff(facts.free.memory.0) > step;
    let same = NodeFacts {
        version: old.facts.version,
        free: old.facts.free,
        ..facts.clone()
    };
    let machines = old.facts.free.machines != facts.free.machines;
    said >= STATE_EVERY
        || moved
        || machines
        || old.facts != same
        || old.whereabouts() != *whereabouts
}

impl Gossip {
    /// Begins to take part: recalls whom an earlier start knew, and greets whom the user has joined. Blocks on a file.
    pub(super) fn begin(open: Arc<Open>, link: Link, memory: PathBuf) -> Option<Arc<Gossip>> {
        let mut seed = [0; 8];
        // Without chance, others could foresee what this node does: then it takes no part.
        getrandom::fill(&mut seed).ok()?;
        let (id, start) = (open.identity.id(), open.identity.generation());
        let (seed, now) = (u64::from_le_bytes(seed), Instant::now());
        let machine = Membership::new(Config::default(), id, start, seed, Duration::ZERO);
        let recalled = memory::read(&memory);
        let gossip = Arc::new(Gossip {
            open,
            link,
            begun: now,
            state: Mutex::new(State {
                machine,
                known: HashMap::new(),
                dead: HashMap::new(),
                own: None,
                checks: HashMap::new(),
                all_checks: [Budget::new(ALL_CHECKS_BURST); 2],
                written: now,
            }),
            memory,
            stirred: Notify::new(),
            stop: CancellationToken::new(),
        });
        let weak = Arc::downgrade(&gossip);
        let heard = gossip.link.hear(Arc::new(move |node: &NodeId| {
            let gossip = weak.upgrade();
            gossip.is_some_and(|gossip| lock(&gossip.state).machine.life(*node).is_some())
        }));
        gossip.recall(recalled);
        tokio::spawn(Arc::clone(&gossip).run(heard));
        Some(gossip)
    }

    fn recall(&self, cards: Vec<(Card, Arc<[u8]>)>) {
        let mut state = lock(&self.state);
        // Their own word says which life they live by now.
        let news = (cards.iter())
            .filter(|(card, _)| !card.leaves)
            .map(|(card, _)| News {
                node: card.facts.node,
                incarnation: 0,
                life: Life::Alive,
            });
        let outputs = state.machine.recall(self.now(), news);
        self.carry_out(&mut state, outputs, &mut HashMap::new());
        for (card, bytes) in cards {
            let node = card.facts.node;
            if state.machine.life(node).is_none() {
                continue;
            }
            self.link.know(node, card.whereabouts());
            if self.open.knows(&node) {
                state.machine.pin(node, true);
            }
            let card = Arc::new(card);
            let (at, at_ns) = (None, 0);
            let known = Known {
                card,
                bytes,
                at,
                at_ns,
            };
            state.known.insert(node, known);
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Waits until a time of the machine's, or for ever where that is beyond all clocks.
    async fn until(&self, due: Duration) {
        match self.begun.checked_add(due) {
            Some(due) => tokio::time::sleep_until(due.into()).await,
            None => std::future::pending().await,
        }
    }

    async fn run(self: Arc<Self>, mut heard: mpsc::Receiver<Heard>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = lock(&self.state).machine.wake_at();
            tokio::select! {
                () = self.stop.cancelled() => return,
                one = heard.recv() => match one {
                    Some(one) => self.hear(one),
                    None => return,
                },
                // Something may be due earlier now.
                () = self.stirred.notified() => {}
                () = self.until(due) => {
                    for _ in 0..BEFORE_DUE {
                        match heard.try_recv() {
                            Ok(one) => self.hear(one),
                            Err(_) => break,
                        }
                    }
                    let mut state = lock(&self.state);
                    let outputs = state.machine.poll(self.now());
                    self.carry_out(&mut state, outputs, &mut HashMap::new());
                }
                _ = tick.tick() => self.tick(),
            }
        }
    }

    fn is_joined(&self, node: &NodeId) -> bool {
        lock(&self.open.peers).get(node).is_some()
    }

    /// Whether this node has to know how it is: it was joined, or looks after a service with this one.
    fn is_sought(&self, node: &NodeId) -> bool {
        self.is_joined(node) || lock(&self.open.partners).contains(node)
    }

    fn hear(&self, heard: Heard) {
        match heard {
            Heard::Connected(node) => {
                let known = lock(&self.state).machine.life(node);
                // Who was taken for dead hears so, and says that it lives.
                if known == Some(Life::Dead) || (known.is_none() && self.is_sought(&node)) {
                    self.greet(node);
                }
            }
            Heard::Packet(from, bytes) => {
                let Some(mut packet) = wire::decode(&bytes) else {
                    tracing::debug!(from = from.short(), "a packet makes no sense");
                    return;
                };
                let mut state = lock(&self.state);
                let mut cards = HashMap::new();
                if !state.machine.takes(self.now(), from, &packet) {
                    return;
                }
                packet
                    .facts
                    .retain(|stated| state.verified(from, stated, &mut cards));
                let met = state.machine.life(from).is_none();
                let outputs = state.machine.handle(self.now(), from, packet);
                self.carry_out(&mut state, outputs, &mut cards);
                if met {
                    let outputs = self.met(&mut state, from);
                    self.carry_out(&mut state, outputs, &mut cards);
                } else if state.machine.tie(from) == Some(Tie::Heard) && self.is_joined(&from) {
                    // It was known before it was joined, or from an earlier start.
                    state.machine.pin(from, true);
                }
            }
        }
    }

    /// A node has spoken that is, or was, no member: it stays one if it was joined, or is known otherwise, also where the table had
    /// no place for it.
    fn met(&self, state: &mut State, node: NodeId) -> Vec<Output> {
        if self.is_joined(&node) {
            return state.machine.join(node);
        }
        if self.open.knows(&node) {
            return state.machine.keep(self.now(), node);
        }
        Vec::new()
    }

    /// Says something to a node of which nobody knows yet whether it takes part. One that does not stays unknown: it is not
    /// told of.
    fn greet(&self, node: NodeId) {
        let greeting = lock(&self.state).machine.greeting();
        self.send(node, &greeting);
    }

    fn send(&self, to: NodeId, packet: &Packet) {
        let Some(bytes) = wire::encode(packet) else {
            return;
        };
        if matches!(packet.body, Body::Page { .. }) {
            debug_assert!(bytes.len() <= PAGE_BYTES_MAX);
            self.link.say_long(&to, bytes);
        } else {
            self.link.say(to, bytes);
        }
    }

    /// Does what the machine wants done. `cards` are those that were verified just now.
    fn carry_out(
        &self,
        state: &mut State,
        outputs: Vec<Output>,
        cards: &mut HashMap<(NodeId, u64), Card>,
    ) {
        for output in outputs {
            match output {
                Output::Send(to, packet) => self.send(to, &packet),
                Output::Changed(node, life) => {
                    // Others can bring about as many changes of strangers as they like.
                    if self.is_joined(&node) {
                        tracing::info!(member = node.short(), ?life, "a joined node's life");
                    } else {
                        tracing::debug!(member = node.short(), ?life, "a member's life");
                    }
                    if life == Life::Dead {
                        state.dead.insert(node, Instant::now());
                    } else {
                        state.dead.remove(&node);
                    }
                }
                Output::Evicted(node) => self.forgotten(state, node),
                Output::Facts(stated) => {
                    let Some(card) = cards.remove(&(stated.node, stated.version)) else {
                        continue;
                    };
                    self.link.know(stated.node, card.whereabouts());
                    state.known.insert(
                        stated.node,
                        Known {
                            card: Arc::new(card),
                            bytes: stated.bytes,
                            at: Some(Instant::now()),
                            at_ns: crate::machine::now_ns(),
                        },
                    );
                }
            }
        }
    }

    /// Tells the network what this node has, if that is news.
    pub(crate) fn state(&self, mut facts: NodeFacts) {
        let mut addresses = self.link.addresses();
        // Those that lead here from everywhere come first.
        addresses.sort_by_key(|address| match address.ip() {
            IpAddr::V4(ip) => ip.is_private() || ip.is_loopback(),
            IpAddr::V6(ip) => ip.is_unique_local() || ip.is_loopback(),
        });
        addresses.truncate(CARD_ADDRESSES_MAX);
        let relay = self.link.home();
        let whereabouts = Whereabouts {
            addresses,
            relays: relay.into_iter().collect(),
        };
        let mut state = lock(&self.state);
        if let Some((old, at)) = &state.own {
            if !is_news(old, at.elapsed(), &facts, &whereabouts) {
                return;
            }
            // Clocks may be set back.
            facts.version = facts.version.max(old.facts.version.saturating_add(1));
        }
        let card = Card {
            facts,
            addresses: whereabouts.addresses,
            relay,
            leaves: false,
        };
        self.say_of_itself(&mut state, card);
    }

    fn say_of_itself(&self, state: &mut State, card: Card) {
        match card.sign(&self.open.identity) {
            Ok(bytes) => {
                state.machine.state(card.facts.version, Arc::from(bytes));
                state.own = Some((card, Instant::now()));
            }
            Err(error) => tracing::warn!(%error, "this node cannot state itself to the network"),
        }
    }

    /// A node was joined, or is joined again.
    pub(super) fn joined(&self, node: NodeId) {
        let mut state = lock(&self.state);
        if state.machine.life(node).is_none() {
            drop(state);
            self.greet(node);
            return;
        }
        let outputs = state.machine.join(node);
        self.carry_out(&mut state, outputs, &mut HashMap::new());
        drop(state);
        self.stirred.notify_one();
    }

    /// A node that was joined is not any more. It stays a member while it lives.
    pub(super) fn unjoined(&self, node: NodeId) {
        let pinned = lock(&self.open.ledger).has_live_grant(&node, super::now_s());
        lock(&self.state).machine.pin(node, pinned);
    }

    /// Says goodbye, and takes part no longer. Members are written down for the next start, or forgotten.
    pub(super) async fn end(&self, remember: bool) {
        let cards = {
            let mut state = lock(&self.state);
            if let Some((card, _)) = &state.own {
                let mut card = card.clone();
                card.facts.version = card.facts.version.saturating_add(1);
                card.leaves = true;
                // Who leaves has nothing for anybody, is nowhere, and says no more of itself than that.
                card.addresses.clear();
                card.relay = None;
                card.facts = nothing(card.facts);
                self.say_of_itself(&mut state, card);
            }
            let outputs = state.machine.leave();
            let said = !outputs.is_empty();
            self.carry_out(&mut state, outputs, &mut HashMap::new());
            (state.to_remember(), said)
        };
        self.link.deafen();
        self.stop.cancel();
        let (cards, said) = cards;
        let path = self.memory.clone();
        let kept = tokio::task::spawn_blocking(move || {
            if remember {
                write(&path, &cards);
            } else {
                let _ = std::fs::remove_file(&path);
            }
        });
        let _ = kept.await;
        if said {
            tokio::time::sleep(GOODBYE).await;
        }
    }

    /// All members.
    pub(crate) fn members(&self) -> Vec<Member> {
        let state = lock(&self.state);
        let all = state.machine.members();
        all.map(|(id, life, _)| state.member(id, life)).collect()
    }

    /// One of them.
    pub(crate) fn member(&self, node: &NodeId) -> Option<Member> {
        let state = lock(&self.state);
        let life = state.machine.life(*node)?;
        Some(state.member(*node, life))
    }
}

impl State {
    fn member(&self, id: NodeId, life: Life) -> Member {
        let known = self.known.get(&id);
        Member {
            id,
            life,
            card: known.map(|known| Arc::clone(&known.card)),
            at: known.and_then(|known| known.at),
            at_ns: known.map_or(0, |known| known.at_ns),
        }
    }

    /// Whether a card is newer than what is known and signed by whom it is about. What is known already costs no check.
    fn verified(
        &mut self,
        from: NodeId,
        stated: &Stated,
        cards: &mut HashMap<(NodeId, u64), Card>,
    ) -> bool {
        // One that an earlier start heard may come again: whether it still holds was not known.
        let least = (self.known.get(&stated.node)).map_or(1, |known| {
            let version = known.card.facts.version;
            version.saturating_add(u64::from(known.at.is_some()))
        });
        if stated.version < least || stated.node == self.machine.node() {
            return false;
        }
        let pinned = self.machine.tie(from) == Some(Tie::Pinned);
        let many = self.checks.len() > 2 * SENDERS_MAX;
        if many && !pinned && !self.checks.contains_key(&from) {
            return false;
        }
        let own = self
            .checks
            .entry(from)
            .or_insert_with(|| Budget::new(CHECKS_BURST));
        if !own.spend(CHECKS_PER_S, CHECKS_BURST)
            || !self.all_checks[usize::from(pinned)].spend(ALL_CHECKS_PER_S, ALL_CHECKS_BURST)
        {
            return false;
        }
        match Card::read(&stated.bytes) {
            Ok(card) if card.facts.node == stated.node && card.facts.version == stated.version => {
                cards.insert((stated.node, stated.version), card);
                true
            }
            Ok(_) | Err(_) => {
                tracing::debug!(from = from.short(), "a card is thrown away");
                false
            }
        }
    }

    /// The cards of members: first of those that are not dead, then of the dead, which may be cut off as this node may be, for a
    /// day. Among either the pinned come first, and then those that have spoken.
    fn to_remember(&self) -> Vec<Arc<[u8]>> {
        let lately = |id: &NodeId| {
            let since = self.dead.get(id);
            since.is_none_or(|since| since.elapsed() < DEAD_MAX)
        };
        let mut found: Vec<_> = (self.machine.members())
            .filter(|(id, life, _)| *life != Life::Dead || lately(id))
            .filter_map(|(id, life, _)| {
                let known = self.known.get(&id).filter(|known| !known.card.leaves)?;
                let order = (life == Life::Dead, Reverse(self.machine.tie(id)));
                Some((order, known))
            })
            .collect();
        found.sort_by_key(|(order, _)| *order);
        found.truncate(memory::REMEMBERED_MAX);
        (found.into_iter())
            .map(|(_, known)| Arc::clone(&known.bytes))
            .collect()
    }
}

/// Blocks.
fn write(path: &std::path::Path, cards: &[Arc<[u8]>]) {
    if let Err(error) = memory::write(path, cards) {
        tracing::warn!(%error, ?path, "members cannot be remembered");
    }
}
