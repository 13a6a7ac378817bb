//! What this node says of itself and hears of others, what it has promised, and the choice of a node for a machine.
//!
//! Facts come with the network's gossip. Joined nodes that take no part in it and have given a grant are asked every few
//! seconds; and before a choice whoever has given one. What is chosen, and why, is `vistara_control::placement`'s.

use super::{Asker, Mesh, lock};
use crate::fault::{Answer, Fault, blocking};
use crate::node::Node;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vistara_api::{Client, ErrorKind, NodeTerms};
use vistara_control::membership::Life;
use vistara_control::placement::{Book, Candidate, RequestId, Seen, TakeRefused};
use vistara_mesh::{PeerState, facts};
use vistara_model::{
    Architecture, Bytes, Hypervisor, ImageMark, KvmVerdict, MARKS_MAX, MachineState, NodeFacts,
    NodeId, OwnerTerms, Stock, VmmKind,
};

/// How often those are asked that say nothing by themselves, and this node looks whether it has something to say.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// How long their answer is waited for.
const ASK_BOUND: Duration = Duration::from_secs(3);
/// Asked at a time.
const ASKED_AT_ONCE: usize = 32;
/// What was asked for and is older is not shown and not counted on any more.
const HEARD_MAX: Duration = Duration::from_secs(30);
/// How long a statement is given again before another is made: many may ask, and facts only steer whom one asks.
const STATEMENT_FRESH: Duration = Duration::from_secs(2);
/// Machines of one node, in what it says of itself.
const MACHINES_MAX: u32 = 1024;

/// What was heard of another node.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    pub(crate) facts: NodeFacts,
    pub(crate) at: Instant,
    pub(crate) at_ns: u64,
    /// How long an answer takes; nothing where there is no connection to measure it.
    pub(crate) rtt: Option<Duration>,
}

/// What the owner has the node say, as it is written down. Blocks.
pub(super) fn read_terms(path: &Path) -> Answer<NodeTerms> {
    let damaged = |why: String| {
        Fault::new(ErrorKind::Host, format!("{path:?} cannot be read: {why}"))
            .hint("say it again: vistara node terms …")
    };
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(NodeTerms::default()),
        Err(error) => Err(damaged(error.to_string())),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string())),
    }
}

/// This node's side of placement.
pub(crate) struct Placing {
    mesh: Arc<Mesh>,
    node: Arc<Node>,
    /// Reaches this very node.
    client: Client,
    since: Instant,
    book: Mutex<Book>,
    heard: Mutex<HashMap<NodeId, Heard>>,
    stated: Mutex<Option<(Instant, Vec<u8>)>>,
}

impl Placing {
    pub(crate) fn new(mesh: Arc<Mesh>, node: Arc<Node>, client: Client) -> Arc<Placing> {
        Arc::new(Placing {
            mesh,
            node,
            client,
            since: Instant::now(),
            book: Mutex::default(),
            heard: Mutex::default(),
            stated: Mutex::default(),
        })
    }

    /// The time, as the book counts it.
    pub(super) fn now(&self) -> Duration {
        self.since.elapsed()
    }

    fn terms_path(&self) -> std::path::PathBuf {
        self.mesh.dir().join("terms.json")
    }

    /// What the owner has this node say. Blocks.
    pub(crate) fn terms(&self) -> Answer<NodeTerms> {
        read_terms(&self.terms_path())
    }

    /// Has this node say something else. Blocks.
    pub(crate) fn set_terms(&self, terms: &NodeTerms) -> Answer<()> {
        *lock(&self.stated) = None;
        let path = self.terms_path();
        let fresh = path.with_extension("new");
        serde_json::to_vec(terms)
            .map_err(std::io::Error::other)
            .and_then(|bytes| std::fs::write(&fresh, bytes))
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(|error| Fault::new(ErrorKind::Host, format!("cannot write {path:?}: {error}")))
    }

    /// What there is for machines, and what of it no machine has: what the host could give now, and no more than what machines
    /// that run have left of all of it though they may not have touched theirs yet.
    fn stock(&self) -> (Stock, Stock) {
        let total = vistara_host::facts::memory_total().unwrap_or(0);
        let available = vistara_host::facts::memory_available().unwrap_or(0);
        let mut used = Stock::default();
        for handle in self.node.all() {
            let record = handle.record();
            if record.state != MachineState::Ended {
                let memory = record.spec.memory;
                used = used.plus(Stock::one(
                    memory.max(record.linux_memory.unwrap_or(Bytes(0))),
                ));
            }
        }
        let all = Stock {
            memory: Bytes(total),
            machines: MACHINES_MAX,
        };
        let mut left = all.minus(used);
        left.memory = Bytes(left.memory.0.min(available));
        (all, left)
    }

    /// The book, over what there is now.
    pub(super) fn book<T>(&self, work: impl FnOnce(&mut Book, Duration) -> T) -> T {
        let (_, left) = self.stock();
        let now = self.now();
        let mut book = lock(&self.book);
        book.set_stock(left);
        book.expire(now);
        work(&mut book, now)
    }

    /// What this node states about itself. Blocks.
    pub(crate) fn own(&self, id: NodeId) -> Answer<NodeFacts> {
        let terms = self.terms()?;
        let host = self.node.facts();
        let (capacity, _) = self.stock();
        let free = self.book(|book, _| book.free());
        let images = self.node.mechanisms().images.list()?;
        let kvm = matches!(host.kvm, KvmVerdict::Works);
        let fake = self.node.mechanisms().vmm(VmmKind::Fake).is_some();
        let linux = host.linux_kernel.is_some() || fake;
        let mut hypervisors = BTreeSet::new();
        if host.qemu.is_some() && linux {
            hypervisors.insert(Hypervisor::Qemu);
        }
        if host.firecracker.is_some() && kvm && linux {
            hypervisors.insert(Hypervisor::Firecracker);
        }
        if host.nanos_kernel.is_some() && (host.qemu.is_some() || host.firecracker.is_some()) {
            hypervisors.insert(Hypervisor::Nanovms);
        }
        Ok(NodeFacts {
            node: id,
            version: crate::machine::now_ns() / 1_000_000,
            arch: Architecture::host(),
            cpus: host.cpus,
            capacity,
            free,
            queue_depth: 0,
            hypervisors,
            kvm,
            images: (images.iter().take(MARKS_MAX))
                .map(|image| ImageMark::of(&image.id))
                .collect(),
            templates: BTreeSet::new(),
            ready_ms: None,
            region: terms.region,
            price_micros: terms.price_micros,
            labels: terms.labels.into_iter().collect(),
            terms: OwnerTerms {
                draining: terms.draining,
                memory_max: terms.memory_max_bytes.map(Bytes),
            },
        })
    }

    /// The same, signed.
    pub(crate) async fn statement(self: &Arc<Self>) -> Answer<Vec<u8>> {
        if let Some((at, bytes)) = lock(&self.stated).as_ref()
            && at.elapsed() < STATEMENT_FRESH
        {
            return Ok(bytes.clone());
        }
        let open = self.mesh.open().await?;
        let placing = Arc::clone(self);
        let bytes = blocking(move || {
            let own = placing.own(open.identity.id())?;
            facts::state(&open.identity, &own).map_err(|error| Fault::internal(&error))
        })
        .await??;
        *lock(&self.stated) = Some((Instant::now(), bytes.clone()));
        Ok(bytes)
    }

    /// What a node says of itself: to the network, while it is believed to live, or when it was asked, while that is fresh.
    pub(crate) fn heard(&self, node: &NodeId) -> Option<Heard> {
        let asked = lock(&self.heard)
            .get(node)
            .filter(|heard| heard.at.elapsed() < HEARD_MAX)
            .cloned();
        let link = self.mesh.link();
        let rtt = link.and_then(|link| link.round_trip(node));
        let rtt = rtt.or(asked.as_ref().and_then(|asked| asked.rtt));
        let member = self.mesh.member(node);
        let gossiped = member
            .filter(|member| member.life != Life::Dead)
            .and_then(|member| {
                let card = member.card.filter(|card| !card.leaves)?;
                Some(Heard {
                    facts: card.facts.clone(),
                    at: member.at?,
                    at_ns: member.at_ns,
                    rtt,
                })
            });
        // What was asked for before a choice may be newer.
        let newest = [asked, gossiped].into_iter().flatten();
        newest.max_by_key(|heard| heard.facts.version)
    }

    /// Tells the network what this node has, and asks those who take no part in it, as long as the node lives.
    pub(crate) fn listen_to_others(self: &Arc<Self>) {
        let placing = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                let Some(mesh) = placing.upgrade().map(|placing| Arc::clone(&placing.mesh)) else {
                    return;
                };
                // Soon where something has changed, and now and then.
                let _ = tokio::time::timeout(ASK_EVERY, mesh.restate.notified()).await;
                drop(mesh);
                let Some(placing) = placing.upgrade() else {
                    return;
                };
                if placing.mesh.link().is_some() {
                    placing.tell_others().await;
                    placing.ask_others(false).await;
                }
            }
        });
    }

    /// Has the network hear what this node has now, if that is news.
    async fn tell_others(self: &Arc<Self>) {
        let (Some(gossip), Ok(open)) = (self.mesh.gossip(), self.mesh.open().await) else {
            return;
        };
        let (placing, id) = (Arc::clone(self), open.identity.id());
        match blocking(move || placing.own(id)).await.flatten() {
            Ok(facts) => gossip.state(facts),
            Err(fault) => {
                tracing::warn!(error = fault.0.message, "this node cannot state itself");
            }
        }
    }

    /// Asks joined nodes that answer and have given a grant: all of them, or those that say nothing by themselves.
    pub(crate) async fn ask_others(&self, all: bool) {
        let Ok(open) = self.mesh.open().await else {
            return;
        };
        let peers = lock(&open.peers).all().to_vec();
        let known: BTreeSet<NodeId> = peers.iter().map(|peer| peer.id).collect();
        let speaks = |node: &NodeId| {
            let member = self.mesh.member(node);
            member.is_some_and(|member| member.card.is_some() && member.life == Life::Alive)
        };
        let asked = peers
            .into_iter()
            .filter(|peer| peer.grant.is_some() && self.answers(&peer.id))
            .filter(|peer| all || !speaks(&peer.id))
            .map(|peer| self.ask(peer.id));
        futures_util::stream::iter(asked)
            .buffer_unordered(ASKED_AT_ONCE)
            .for_each(|()| std::future::ready(()))
            .await;
        lock(&self.heard)
            .retain(|node, heard| known.contains(node) && heard.at.elapsed() < HEARD_MAX);
    }

    fn answers(&self, node: &NodeId) -> bool {
        matches!(self.mesh.state(node), Some(PeerState::Connected { .. }))
    }

    async fn ask(&self, node: NodeId) {
        let begin = Instant::now();
        let client = self.client.on(node.to_string());
        let Ok(Ok(answer)) = tokio::time::timeout(ASK_BOUND, client.facts()).await else {
            return;
        };
        let rtt = begin.elapsed();
        let read = STANDARD.decode(&answer.statement).ok();
        match read.map(|bytes| facts::read(&bytes)) {
            Some(Ok(facts)) if facts.node == node => {
                let mut heard = lock(&self.heard);
                let newer = (heard.get(&node)).is_none_or(|old| old.facts.version < facts.version);
                if newer {
                    let at_ns = crate::machine::now_ns();
                    let at = Instant::now();
                    heard.insert(
                        node,
                        Heard {
                            facts,
                            at,
                            at_ns,
                            rtt: Some(rtt),
                        },
                    );
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, node = node.short(), "a statement is thrown away");
            }
            Some(Ok(_)) | None => {
                tracing::debug!(node = node.short(), "a statement is thrown away");
            }
        }
    }

    /// All that may be asked, this node among them.
    pub(super) async fn candidates(self: &Arc<Self>) -> Answer<Vec<(Candidate, String)>> {
        let open = self.mesh.open().await?;
        let own_id = open.identity.id();
        let placing = Arc::clone(self);
        let own = blocking(move || placing.own(own_id)).await??;
        let peers = lock(&open.peers).all().to_vec();
        let mut candidates = vec![(
            Candidate {
                facts: own,
                seen: Seen {
                    granted: true,
                    rtt: Some(Duration::ZERO),
                    ..Seen::default()
                },
            },
            "here".to_owned(),
        )];
        for peer in peers {
            let Some(heard) = self.heard(&peer.id) else {
                continue;
            };
            let member = self.mesh.member(&peer.id);
            let suspect = member.is_some_and(|member| member.life != Life::Alive);
            let seen = Seen {
                granted: peer.grant.is_some(),
                doubtful: !self.answers(&peer.id) || suspect,
                rtt: heard.rtt,
                ..Seen::default()
            };
            let called = peer.name.unwrap_or_else(|| peer.id.short());
            candidates.push((
                Candidate {
                    facts: heard.facts,
                    seen,
                },
                called,
            ));
        }
        Ok(candidates)
    }

    /// A client of a candidate.
    pub(super) fn client_of(&self, node: NodeId, own: NodeId) -> Client {
        if node == own {
            self.client.clone()
        } else {
            self.client.on(node.to_string())
        }
    }

    /// Offers a place to whoever asks, and holds it.
    pub(crate) fn offer(
        &self,
        own: NodeId,
        asker: &Asker,
        request: RequestId,
        memory: Bytes,
    ) -> Answer<vistara_control::placement::Offer> {
        let records = || {
            self.node
                .all()
                .iter()
                .map(|handle| handle.record())
                .collect()
        };
        asker.could_have(memory, records)?;
        let terms = self.terms()?;
        let too_large = terms.memory_max_bytes.is_some_and(|max| memory.0 > max);
        if terms.draining || too_large {
            return Err(Fault::conflict(if terms.draining {
                "this node takes nothing new: it is being drained".to_owned()
            } else {
                "this node's owner takes no machines of that size".to_owned()
            }));
        }
        let from = asker.node().unwrap_or(own);
        self.book(|book, now| {
            book.offer(
                now,
                own,
                (from, request),
                Stock::one(memory),
                terms.price_micros,
            )
        })
        .map_err(|error| Fault::conflict(error.to_string()))
    }

    /// Whether nothing is promised to anybody.
    pub(crate) fn promises_nothing(&self) -> bool {
        let now = self.now();
        let mut book = lock(&self.book);
        book.expire(now);
        book.promised() == Stock::default()
    }

    /// An offer is taken.
    pub(crate) fn take(&self, from: NodeId, request: RequestId) -> Answer<()> {
        self.book(|book, now| book.take(now, from, request))
            .map(drop)
            .map_err(|error| Fault::conflict(error.to_string()))
    }

    /// An offer is given back. What its machine has begun to use is not.
    pub(crate) fn decline(&self, from: NodeId, request: RequestId) {
        self.book(|book, _| book.decline(from, request));
    }

    /// A machine that had begun under an offer is entered and counts by itself; or there is none.
    pub(crate) fn counted(&self, from: NodeId, request: RequestId) {
        self.book(|book, _| book.ended(from, request));
    }

    /// Whether a machine may be made: under what was promised to its asker, or beside what was promised to others. An
    /// offer that is over is as good as none.
    pub(crate) fn admits(
        &self,
        from: NodeId,
        request: Option<RequestId>,
        memory: Bytes,
    ) -> Answer<()> {
        self.book(|book, now| {
            match request.map(|request| book.begin(now, from, request)) {
                Some(Ok(_)) => return Ok(()),
                Some(Err(error @ TakeRefused::Begun)) => {
                    return Err(Fault::conflict(error.to_string()));
                }
                Some(Err(TakeRefused::Over)) | None => {}
            }
            let promised = book.promised();
            if promised.machines > 0 && !book.free().holds(Stock::one(memory)) {
                return Err(Fault::new(
                    ErrorKind::Host,
                    format!(
                        "{promised} are promised to others for some seconds, and {} are left",
                        book.free()
                    ),
                )
                .hint("try again in half a minute, or with less memory"));
            }
            Ok(())
        })
    }
}
