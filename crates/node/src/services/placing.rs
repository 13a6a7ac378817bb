//! Finding nodes for copies: a keeper's search among those that the owner has named, and offers that this node makes for the
//! owner's account. Whom to ask and what to take is `vistara_control::placement`'s.

use super::{About, Event, Known, Task, post};
use crate::fault::blocking;
use crate::fence::boottime;
use crate::mesh::{Asker, Mesh};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_control::membership::Life;
use vistara_control::placement::{
    Candidate, Offer, Policy, RequestId, Search, SearchInput, SearchOutput, Seen, read_policy,
};
use vistara_control::services::wire::{self, FromNode, ToNode};
use vistara_control::services::{Keepers, ServiceId, Slot};
use vistara_mesh::service::ServiceDocument;
use vistara_model::{
    Architecture, Bytes, Constraints, Generation, ImageMark, NodeId, Stock, Wanted,
};

/// How long a node that did not get a copy running is passed by, where others are there.
const AVOIDED: Duration = Duration::from_secs(30);
/// How long a copy that was placed counts as being where it was placed, before keepers know.
const PLACED_COUNTS: Duration = Duration::from_secs(10);
/// Answers on their way.
const ANSWERS_MAX: usize = 64;
/// Longest search with all its rounds.
const SEARCH_BOUND: Duration = Duration::from_secs(20);

/// Why a copy has no node.
pub(super) struct Unplaced {
    /// In words.
    why: String,
    /// Who took it and then did not run it.
    by: Option<NodeId>,
}

struct Wish {
    slot: Slot,
    generation: Generation,
    apart_from: BTreeSet<NodeId>,
}

/// What a keeper has in mind about the slots of a service.
#[derive(Default)]
pub(super) struct Care {
    wishes: VecDeque<Wish>,
    searching: bool,
    placed: BTreeMap<u32, (NodeId, Duration)>,
    /// Who was given each slot last: only that one is heard about it.
    given: BTreeMap<u32, (NodeId, Generation)>,
    avoided: BTreeMap<NodeId, Duration>,
    troubles: BTreeMap<u32, String>,
}

impl Care {
    pub(super) fn trouble(&self, number: u32) -> Option<String> {
        self.troubles.get(&number).cloned()
    }
}

/// How a copy's node is chosen.
fn policy(document: &ServiceDocument) -> Policy {
    let placement = &document.placement;
    let rules = placement.rules.as_ref();
    let rules = rules.and_then(|rules| read_policy(rules.as_bytes()).ok());
    match (rules, &placement.policy) {
        (Some((rules, _)), _) => Policy::Weighted(rules),
        (None, Some(name)) => Policy::named(name).unwrap_or_default(),
        (None, None) => Policy::default(),
    }
}

fn wanted(document: &ServiceDocument, apart_from: BTreeSet<NodeId>) -> Wanted {
    let placement = &document.placement;
    Wanted {
        memory: document.memory,
        cpus: document.cpus,
        arch: Architecture::host(),
        hypervisor: document.hypervisor,
        image: Some(ImageMark::of(&document.image)),
        constraints: Constraints {
            regions: placement.regions.iter().cloned().collect(),
            capabilities: placement.capabilities.iter().cloned().collect(),
            price_micros_max: placement.price_micros_max,
            apart_from,
            ..Constraints::default()
        },
    }
}

/// One search with all it needs, on a task of its own.
struct Looking {
    events: mpsc::Sender<Event>,
    mesh: Arc<Mesh>,
    own: NodeId,
    known: Vec<Candidate>,
    document: ServiceDocument,
    bytes: Arc<[u8]>,
    keepers: Keepers,
    wish: Wish,
    avoided: BTreeSet<NodeId>,
    start: Duration,
}

impl Looking {
    fn now(&self) -> Duration {
        boottime().saturating_sub(self.start)
    }

    /// Asks a node, this one included.
    async fn ask(&self, to: NodeId, body: ToNode) -> Result<wire::Answer, String> {
        let request = wire::Request {
            service: ServiceId(self.document.service),
            version: self.document.version,
            document: None,
            body,
        };
        if to != self.own {
            return post::ask(&self.mesh, to, request, &self.bytes).await;
        }
        let (reply, answer) = tokio::sync::oneshot::channel();
        let asked = Event::Asked {
            from: self.own,
            request,
            reply,
        };
        let gone = |_| "the node is leaving".to_owned();
        self.events.send(asked).await.map_err(|_| gone(()))?;
        let answer = answer.await.map_err(|_| gone(()))?;
        answer.map_err(|fault| fault.0.message)
    }

    async fn run(self: Arc<Self>) {
        let found = tokio::time::timeout(SEARCH_BOUND, Arc::clone(&self).find()).await;
        let outcome = found.unwrap_or_else(|_| {
            Err(Unplaced {
                why: "no node answered in time".to_owned(),
                by: None,
            })
        });
        let placed = Event::Placed {
            slot: self.wish.slot,
            generation: self.wish.generation,
            outcome,
        };
        // The node may be leaving.
        let _ = self.events.send(placed).await;
    }

    async fn find(self: Arc<Self>) -> Result<NodeId, Unplaced> {
        let others = &self.wish.apart_from;
        let both: BTreeSet<NodeId> = others.union(&self.avoided).copied().collect();
        // Apart from other copies and from nodes that have just failed; and where that leaves nobody, less so.
        let mut tries = vec![both, others.clone()];
        if !self.document.placement.apart {
            tries.push(self.avoided.clone());
            tries.push(BTreeSet::new());
        }
        tries.dedup();
        let mut last = None;
        for apart_from in tries {
            match Arc::clone(&self).search(apart_from).await {
                Ok((node, request)) => return self.hand_to(node, request).await,
                Err(why) => last = Some(last.unwrap_or(why)),
            }
        }
        Err(Unplaced {
            why: last.unwrap_or_default(),
            by: None,
        })
    }

    async fn hand_to(&self, node: NodeId, request: RequestId) -> Result<NodeId, Unplaced> {
        let run = ToNode::Run {
            request: request.0,
            slot: self.wish.slot,
            generation: self.wish.generation,
            keepers: self.keepers.clone(),
        };
        let giving = Event::Giving {
            slot: self.wish.slot,
            generation: self.wish.generation,
            to: node,
        };
        // Before it is asked: it may say at once that it does not run it. The node may be leaving.
        let _ = self.events.send(giving).await;
        let why = match self.ask(node, run).await {
            Ok(wire::Answer {
                body: FromNode::Nothing,
                ..
            }) => return Ok(node),
            Ok(wire::Answer {
                body: FromNode::Refused(why),
                ..
            })
            | Err(why) => why,
            Ok(_) => "it does not know the service".to_owned(),
        };
        Err(Unplaced {
            why: format!("{}: {why}", node.short()),
            by: Some(node),
        })
    }

    async fn search(
        self: Arc<Self>,
        apart_from: BTreeSet<NodeId>,
    ) -> Result<(NodeId, RequestId), String> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| error.to_string())?;
        let (for_request, for_rng) = random.split_at(16);
        let request = RequestId(u128::from_le_bytes(
            for_request.try_into().unwrap_or([0; 16]),
        ));
        let mut rng =
            SmallRng::seed_from_u64(u64::from_le_bytes(for_rng.try_into().unwrap_or([0; 8])));
        let wanted = wanted(&self.document, apart_from);
        let mut search = Search::new(wanted, policy(&self.document), request);
        let (answers_in, mut answers) = mpsc::channel(ANSWERS_MAX);
        let mut wake = self.now();
        let mut outputs = search.begin(self.now(), &self.known, &mut rng);
        loop {
            for output in std::mem::take(&mut outputs) {
                match output {
                    SearchOutput::WakeAt(at) => wake = at,
                    SearchOutput::Placed(node, _) => return Ok((node, request)),
                    SearchOutput::Unplaced(unplaced) => {
                        let told = unplaced.refusals.iter();
                        let mut why: Vec<String> = told
                            .map(|(node, why)| format!("{}: {why}", node.short()))
                            .collect();
                        let unfit = unplaced.shortlist.unfit.iter();
                        why.extend(unfit.map(|(node, why)| format!("{}: {why}", node.short())));
                        return Err(match why.is_empty() {
                            true => "none of its nodes is alive".to_owned(),
                            false => why.join("; "),
                        });
                    }
                    SearchOutput::Ask(node) => {
                        let body = ToNode::Offer { request: request.0 };
                        Arc::clone(&self).carry(node, request, body, answers_in.clone());
                    }
                    SearchOutput::Take(node) => {
                        let body = ToNode::Take { request: request.0 };
                        Arc::clone(&self).carry(node, request, body, answers_in.clone());
                    }
                    SearchOutput::Release(node) => {
                        let body = ToNode::Release { request: request.0 };
                        Arc::clone(&self).carry(node, request, body, answers_in.clone());
                    }
                }
            }
            let left = wake.saturating_sub(self.now());
            let input = match tokio::time::timeout(left, answers.recv()).await {
                Ok(Some(input)) => input,
                Ok(None) | Err(_) => SearchInput::Timer,
            };
            outputs = search.handle(self.now(), input, || &self.known, &mut rng);
        }
    }

    fn carry(
        self: Arc<Self>,
        node: NodeId,
        request: RequestId,
        body: ToNode,
        answers: mpsc::Sender<SearchInput>,
    ) {
        // Each is bounded by its own time limit; a search that is over hears no more.
        tokio::spawn(async move {
            let taking = matches!(body, ToNode::Take { .. });
            let input = match self.ask(node, body).await.map(|answer| answer.body) {
                Ok(FromNode::Offered {
                    ttl_ms,
                    memory,
                    machines,
                    price_micros,
                }) => SearchInput::Offered(Offer {
                    node,
                    request,
                    ttl: Duration::from_millis(ttl_ms),
                    free: Stock {
                        memory: Bytes(memory),
                        machines,
                    },
                    price_micros,
                }),
                Ok(FromNode::Nothing) if taking => SearchInput::Taken(node),
                Ok(FromNode::Refused(why)) | Err(why) => SearchInput::Refused(node, why),
                Ok(_) => SearchInput::Refused(node, "it does not know the service".to_owned()),
            };
            let _ = answers.send(input).await;
        });
    }
}

impl Task {
    /// A slot wants a node.
    pub(super) fn want_place(
        &mut self,
        slot: Slot,
        generation: Generation,
        apart_from: BTreeSet<NodeId>,
    ) {
        let Some(known) = self.known.get_mut(&slot.service) else {
            return;
        };
        let wish = Wish {
            slot,
            generation,
            apart_from,
        };
        known.care.wishes.retain(|other| other.slot != slot);
        known.care.wishes.push_back(wish);
    }

    /// Looks for the next one, one after the other: each knows where those before it went.
    pub(super) fn place_next(&mut self, service: ServiceId, now: Duration) {
        let (Some(own), Some(known)) = (self.own(), self.known.get_mut(&service)) else {
            return;
        };
        let keepers = known.keeper.as_ref().filter(|keeper| keeper.is_active());
        let Some(keepers) = keepers.map(|keeper| keeper.keepers().clone()) else {
            known.care.wishes.clear();
            return;
        };
        if known.care.searching {
            return;
        }
        let Some(mut wish) = known.care.wishes.pop_front() else {
            return;
        };
        known.care.searching = true;
        known.care.placed.retain(|_, (_, until)| now < *until);
        known.care.avoided.retain(|_, until| now < *until);
        let placed = known.care.placed.iter();
        let elsewhere = placed.filter(|(number, _)| **number != wish.slot.number);
        wish.apart_from
            .extend(elsewhere.map(|(_, (node, _))| *node));
        let looking = Looking {
            events: self.events.clone(),
            mesh: Arc::clone(&self.mesh),
            own,
            known: Vec::new(),
            document: known.document().clone(),
            bytes: Arc::clone(&known.bytes),
            avoided: known.care.avoided.keys().copied().collect(),
            keepers,
            wish,
            start: now,
        };
        let placing = Arc::clone(&self.placing);
        tokio::spawn(async move {
            let mut looking = looking;
            let named: Vec<NodeId> = (looking.document.nodes.iter())
                .map(|one| one.node)
                .collect();
            let others = named.iter().filter(|node| **node != own);
            looking.known = others
                .filter_map(|node| {
                    let member = looking.mesh.member(node)?;
                    let heard = placing.heard(node)?;
                    (member.life != Life::Dead).then(|| Candidate {
                        facts: heard.facts,
                        seen: Seen {
                            granted: true,
                            doubtful: member.life != Life::Alive,
                            rtt: heard.rtt,
                            ..Seen::default()
                        },
                    })
                })
                .collect();
            if named.contains(&own)
                && let Ok(Ok(facts)) = blocking(move || placing.own(own)).await
            {
                let seen = Seen {
                    granted: true,
                    rtt: Some(Duration::ZERO),
                    ..Seen::default()
                };
                looking.known.push(Candidate { facts, seen });
            }
            Arc::new(looking).run().await;
        });
    }

    pub(super) fn placed(
        &mut self,
        slot: Slot,
        generation: Generation,
        outcome: Result<NodeId, Unplaced>,
    ) {
        let now = boottime();
        let Some(known) = self.known.get_mut(&slot.service) else {
            return;
        };
        let care = &mut known.care;
        care.searching = false;
        match outcome {
            Ok(node) => {
                tracing::info!(
                    service = super::id_text(slot.service),
                    slot = slot.number,
                    generation = generation.0,
                    node = node.short(),
                    "a copy is placed"
                );
                care.placed.insert(slot.number, (node, now + PLACED_COUNTS));
                care.troubles.remove(&slot.number);
            }
            Err(Unplaced { why, by }) => {
                tracing::info!(
                    service = super::id_text(slot.service),
                    slot = slot.number,
                    why,
                    "a copy has no place"
                );
                care.troubles.insert(slot.number, why);
                care.avoided.extend(by.map(|node| (node, now + AVOIDED)));
            }
        }
        self.place_next(slot.service, now);
    }

    pub(super) fn giving(&mut self, slot: Slot, generation: Generation, to: NodeId) {
        if let Some(known) = self.known.get_mut(&slot.service) {
            known.care.given.insert(slot.number, (to, generation));
        }
    }

    /// A node that was given a slot does not hold it.
    pub(super) fn not_run(
        &mut self,
        from: NodeId,
        slot: Slot,
        generation: Generation,
        largest: Generation,
        why: String,
    ) {
        let now = boottime();
        let Some(known) = self.known.get_mut(&slot.service) else {
            return;
        };
        if known.care.given.get(&slot.number) != Some(&(from, generation)) {
            return;
        }
        known.care.given.remove(&slot.number);
        if let Some(overseer) = &mut known.overseer {
            overseer.failed(slot, largest);
        }
        tracing::info!(
            service = super::id_text(slot.service),
            slot = slot.number,
            generation = generation.0,
            node = from.short(),
            why,
            "a copy does not run"
        );
        let care = &mut known.care;
        care.placed.remove(&slot.number);
        care.avoided.insert(from, now + AVOIDED);
        (care.troubles).insert(slot.number, format!("{}: {why}", from.short()));
    }

    /// In whose name, and for how much, this node makes an offer.
    fn account(&self, service: ServiceId) -> Option<(NodeId, Asker, Bytes)> {
        let (own, known) = (self.own()?, self.known.get(&service)?);
        let asker = known.role.as_ref().ok()?.clone();
        Some((asker.node().unwrap_or(own), asker, known.document().memory))
    }

    pub(super) async fn offer(&self, service: ServiceId, request: u128) -> FromNode {
        let (Some(own), Some((_, asker, memory))) = (self.own(), self.account(service)) else {
            return FromNode::Unknown;
        };
        let image = self
            .known
            .get(&service)
            .map(|known| known.document().image.clone());
        let lacks = image.is_some_and(|image| self.node.image(image.as_ref()).is_err());
        if lacks {
            return FromNode::Refused("it does not have the image".to_owned());
        }
        let placing = Arc::clone(&self.placing);
        let offered = blocking(move || placing.offer(own, &asker, RequestId(request), memory));
        match offered.await.flatten() {
            Ok(offer) => FromNode::Offered {
                ttl_ms: u64::try_from(offer.ttl.as_millis()).unwrap_or(u64::MAX),
                memory: offer.free.memory.0,
                machines: offer.free.machines,
                price_micros: offer.price_micros,
            },
            Err(fault) => FromNode::Refused(wire::words(&fault.0.message)),
        }
    }

    pub(super) fn take(&self, service: ServiceId, request: u128) -> FromNode {
        let Some((from, ..)) = self.account(service) else {
            return FromNode::Unknown;
        };
        match self.placing.take(from, RequestId(request)) {
            Ok(()) => FromNode::Nothing,
            Err(fault) => FromNode::Refused(wire::words(&fault.0.message)),
        }
    }

    pub(super) fn release(&self, service: ServiceId, request: u128) {
        if let Some((from, ..)) = self.account(service) {
            self.placing.decline(from, RequestId(request));
        }
    }

    /// Tells who gave this node a slot that it is not held here.
    pub(super) fn tell_not_run(
        &mut self,
        to: Option<NodeId>,
        slot: Slot,
        generation: Generation,
        largest: Generation,
        why: &str,
    ) {
        if let Some(to) = to {
            let body = ToNode::NotRun {
                slot,
                generation,
                largest,
                why: wire::words(why),
            };
            self.send(slot.service, to, About::Other, body);
        }
    }
}

/// Whether these may give a slot to this node, as far as it knows of keepers.
pub(super) fn may_give(known: &Known, from: NodeId, keepers: &Keepers) -> Result<(), String> {
    if !keepers.nodes.contains(&from) || !super::keeping::may_keep(known.document(), keepers) {
        return Err("who gives the slot is no keeper of the service".to_owned());
    }
    match &known.keepers {
        Some(present) if keepers.epoch < present.epoch => {
            Err("others look after the service now".to_owned())
        }
        Some(present) if keepers.epoch == present.epoch && keepers.nodes != present.nodes => {
            Err("these are not the keepers of this epoch".to_owned())
        }
        Some(_) | None => Ok(()),
    }
}
