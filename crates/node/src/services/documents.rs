//! Documents: what the owner of this node orders, what others have signed, who is told, and what is forgotten.

use super::keeping::spec;
use super::last_words::{self, LastWord};
use super::store::{self, Stored, text};
use super::tasks;
use super::{
    About, Event, Kind, Known, SERVICES_MAX, SERVICES_OF_ONE_MAX, Shown, Task, VERDICT_KEPT,
    VERDICT_SHARE, Verdict,
};
use crate::fault::{Answer, Fault, blocking, chain};
use crate::fence::boottime;
use crate::mesh::{Asker, Foreign, Mesh, Open, lock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use vistara_api::ErrorKind;
use vistara_control::services::wire::ToNode;
use vistara_control::services::{Keeper, Keepers, Overseer, ServiceId, ToKeeper, keepers_of};
use vistara_control::{LookupError, Requirement, lookup};
use vistara_mesh::Token;
use vistara_mesh::service::{
    self, Eligible, Placement, SealedDocument, ServiceDocument, TaskSemantics,
};
use vistara_model::{Bytes, Cpus, Digest, Hypervisor, NodeId, Right};

/// How often nodes are given a document that they do not have.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How often it is looked what can be forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// A task that is to be.
pub(crate) struct DraftTask {
    pub(crate) semantics: TaskSemantics,
    /// Its number where there is none.
    pub(crate) key: Option<String>,
}

/// A service or a task that was asked for.
pub(crate) struct Made {
    pub(crate) shown: Shown,
    /// Whether there was a task of this key already.
    pub(crate) known: bool,
}

/// A service or a task that is to be.
pub(crate) struct Draft {
    /// One is made up for a task that has none.
    pub(crate) name: Option<String>,
    /// What a name that is made up begins with.
    pub(crate) called: String,
    pub(crate) replicas: u32,
    pub(crate) image: Digest,
    pub(crate) memory: Bytes,
    pub(crate) cpus: Cpus,
    pub(crate) hypervisor: Hypervisor,
    pub(crate) request: Vec<u8>,
    pub(crate) placement: Placement,
    /// Where copies may run; this node may be among them.
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) task: Option<DraftTask>,
}

/// What the owner of this node wants.
pub(super) enum Order {
    Create(Box<Draft>, oneshot::Sender<Answer<Made>>),
    Scale(
        String,
        u32,
        Option<Vec<NodeId>>,
        oneshot::Sender<Answer<Shown>>,
    ),
    Remove(Kind, String, oneshot::Sender<Answer<Shown>>),
    /// Who has not said that it has forgotten a service, by its number.
    Late(String, oneshot::Sender<Answer<BTreeSet<NodeId>>>),
    Show(Kind, Option<String>, oneshot::Sender<Answer<Vec<Shown>>>),
}

/// For whom a node acts on a document: for itself, or for the owner under the grant that stands in it. Whether that grant
/// counts now is asked each time ([`Task::stands`]).
fn role(mesh: &Arc<Mesh>, open: &Open, document: &ServiceDocument) -> Answer<Asker> {
    let own = open.identity.id();
    if document.owner == own {
        return Ok(Asker::Owner);
    }
    let denied = |message: &str| Fault::new(ErrorKind::Denied, message);
    let named = document.nodes.iter().find(|one| one.node == own);
    let token = named
        .ok_or_else(|| denied("this node is not named in the service's document"))?
        .token
        .clone()
        .ok_or_else(|| denied("the service's document holds no grant of this node"))?;
    let verified = open.authority.verify(&Token::from_bytes(token)?)?;
    let foreign = Foreign::new(document.owner, Some(verified));
    Ok(Asker::Foreign(Arc::new(foreign), Arc::clone(mesh)))
}

impl Task {
    pub(super) async fn ordered(&mut self, order: Order) {
        // Whoever ordered may have gone.
        match order {
            Order::Create(draft, reply) => drop(reply.send(self.create(*draft).await)),
            Order::Scale(typed, replicas, nodes, reply) => {
                drop(reply.send(self.scale(&typed, replicas, nodes).await));
            }
            Order::Remove(kind, typed, reply) => {
                drop(reply.send(self.remove(kind, &typed).await));
            }
            Order::Late(id, reply) => drop(reply.send(Ok(self.late(&id)))),
            Order::Show(kind, typed, reply) => {
                drop(reply.send(self.show(kind, typed.as_deref())));
            }
        }
    }

    /// With each node's grant to this one.
    fn eligible(&self, open: &Open, nodes: Vec<NodeId>) -> Answer<Vec<Eligible>> {
        let own = open.identity.id();
        let mut all: Vec<Eligible> = Vec::new();
        for node in nodes {
            if all.iter().any(|one| one.node == node) {
                continue;
            }
            let token = if node == own {
                None
            } else {
                let peers = lock(&open.peers);
                let token = peers.get(&node).and_then(|peer| peer.grant.clone());
                let token = token.ok_or_else(|| {
                    Fault::user(format!("the node {} has given no grant", node.short())).hint(
                        "ask its owner for `vistara grant --to KEY --for run …`, and keep it: vistara grant keep TOKEN",
                    )
                })?;
                Some(token.parse::<Token>()?.as_bytes().to_vec())
            };
            all.push(Eligible { node, token });
        }
        match all.is_empty() {
            true => Err(Fault::user("no node is there for the service")
                .hint("`vistara nodes` lists those that have given a grant")),
            false => Ok(all),
        }
    }

    fn seal(&self, open: &Open, document: ServiceDocument) -> Answer<SealedDocument> {
        (document.seal(&open.identity)).map_err(|error| Fault::user(chain(&error)))
    }

    async fn create(&mut self, draft: Draft) -> Answer<Made> {
        let open = self.opened().await?;
        let own = open.identity.id();
        if let Some(service) = self.known_by_key(own, &draft)? {
            return Ok(Made {
                shown: self.shown_one(service)?,
                known: true,
            });
        }
        let wanted = self
            .known
            .values()
            .filter(|known| !known.document().removed && known.document().owner == own);
        if wanted.count() >= SERVICES_MAX {
            return Err(Fault::conflict(format!(
                "this node has {SERVICES_MAX} services and tasks and takes no more"
            ))
            .hint("`vistara service ls` and `vistara task ls` list them; remove some"));
        }
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
        let service = ServiceId(u128::from_le_bytes(random));
        let (kind, id) = match draft.task {
            None => (Kind::Service, text(service)),
            Some(_) => (Kind::Task, text(service)),
        };
        let name = match draft.name {
            Some(name) => name,
            None => tasks::made_up(&draft.called, &id),
        };
        let same = |known: &Known| {
            let document = known.document();
            document.owner == own
                && document.name == name
                && Kind::of(document) == kind
                && !document.removed
        };
        if self.known.values().any(same) {
            let kind = kind.word();
            return Err(
                Fault::conflict(format!("there is a {kind} named {name} already"))
                    .hint(format!("vistara {kind} rm {name}")),
            );
        }
        let document = ServiceDocument {
            service: service.0,
            version: 1,
            owner: own,
            name,
            replicas: draft.replicas,
            removed: false,
            image: draft.image,
            memory: draft.memory,
            cpus: draft.cpus,
            hypervisor: draft.hypervisor,
            request: draft.request,
            placement: draft.placement,
            nodes: self.eligible(&open, draft.nodes)?,
            task: draft.task.map(|task| service::Task {
                semantics: task.semantics,
                key: task.key.unwrap_or(id),
            }),
        };
        let named: Vec<NodeId> = document.nodes.iter().map(|one| one.node).collect();
        let sealed = self.seal(&open, document)?;
        // Those that are there now: one that is away would be missed from the beginning.
        let keepers = Keepers {
            epoch: 1,
            nodes: keepers_of(service, named.into_iter().filter(|node| self.lives(*node))),
        };
        if keepers.nodes.is_empty() {
            return Err(
                Fault::new(ErrorKind::Peer, "none of the service's nodes is alive")
                    .hint("see `vistara nodes`"),
            );
        }
        // The first keepers are chosen once, whatever becomes of this node.
        let (store, kept, written) = (self.store.clone(), sealed.clone(), keepers.clone());
        blocking(move || {
            store.put_document(&kept)?;
            store.put_keepers(service, &written)
        })
        .await?
        .map_err(|error| cannot_keep(&error))?;
        self.take_in(Stored {
            document: sealed,
            keepers: Some(keepers),
            keeper: None,
            late: Vec::new(),
            settled: None,
        });
        // Before they are told anything.
        self.settle_partners(boottime());
        self.begin_keepers(service);
        Ok(Made {
            shown: self.shown_one(service)?,
            known: false,
        })
    }

    /// Tells the first keepers what they are.
    fn begin_keepers(&mut self, service: ServiceId) {
        let Some(known) = self.known.get(&service) else {
            return;
        };
        let Some(keepers) = known.keepers.clone().filter(|keepers| keepers.epoch == 1) else {
            return;
        };
        let begin = ToKeeper::Begin {
            keepers,
            spec: spec(known.document()),
            records: BTreeMap::new(),
        };
        for node in known.to_begin.clone() {
            self.send(service, node, About::Begin, ToNode::Keeper(begin.clone()));
        }
    }

    /// What was typed: by its name, its number, or a beginning of that.
    fn find(&self, kind: Kind, typed: &str) -> Answer<ServiceId> {
        let of_kind = |known: &&Known| Kind::of(known.document()) == kind;
        let known: Vec<(String, String, ServiceId)> = (self.known.values())
            .filter(of_kind)
            .filter(|known| !known.document().removed)
            .map(|known| (text(known.id()), known.document().name.clone(), known.id()))
            .collect();
        let pairs = known
            .iter()
            .map(|(id, name, _)| (id.as_str(), name.as_str()));
        let found = lookup(typed, pairs).map_err(|error| match error {
            LookupError::NotFound(typed) => Fault::new(
                ErrorKind::NotFound,
                format!("there is no {} {typed:?}", kind.word()),
            )
            .hint(format!("`vistara {} ls` lists them", kind.word())),
            error @ LookupError::Ambiguous { .. } => Fault::lookup(error, kind.word(), "its name"),
        })?;
        let same = known.iter().find(|(id, ..)| id == found);
        same.map(|(_, _, service)| *service)
            .ok_or_else(|| Fault::internal(&std::fmt::Error))
    }

    /// One that this node's owner may change.
    fn find_own(&self, open: &Open, kind: Kind, typed: &str) -> Answer<ServiceId> {
        let service = self.find(kind, typed)?;
        let document = self.known.get(&service).map(Known::document);
        match document {
            Some(document) if document.owner == open.identity.id() => Ok(service),
            Some(document) => Err(Fault::new(
                ErrorKind::Denied,
                format!(
                    "the {} {} belongs to the node {}: only there it can be changed",
                    kind.word(),
                    document.name,
                    document.owner.short()
                ),
            )
            .hint("to have it run here no more, take the grant back: vistara grant revoke GRANT")),
            None => Err(Fault::internal(&std::fmt::Error)),
        }
    }

    async fn scale(
        &mut self,
        typed: &str,
        replicas: u32,
        nodes: Option<Vec<NodeId>>,
    ) -> Answer<Shown> {
        let open = self.opened().await?;
        let service = self.find_own(&open, Kind::Service, typed)?;
        let mut document = self.document_of(service)?;
        document.version += 1;
        document.replicas = replicas;
        if let Some(nodes) = nodes {
            document.nodes = self.eligible(&open, nodes)?;
        }
        let sealed = self.seal(&open, document)?;
        self.replace(sealed).await?;
        self.shown_one(service)
    }

    async fn remove(&mut self, kind: Kind, typed: &str) -> Answer<Shown> {
        let open = self.opened().await?;
        let service = self.find_own(&open, kind, typed)?;
        self.remove_one(service).await
    }

    pub(super) async fn remove_one(&mut self, service: ServiceId) -> Answer<Shown> {
        let open = self.opened().await?;
        let mut document = self.document_of(service)?;
        let before = self.shown_one(service)?;
        let nodes: Vec<NodeId> = document.nodes.iter().map(|one| one.node).collect();
        document.version += 1;
        document.replicas = 0;
        document.removed = true;
        document.nodes = Vec::new();
        document.request = Vec::new();
        let sealed = self.seal(&open, document)?;
        let (store, late) = (self.store.clone(), nodes.clone());
        blocking(move || store.put_late(service, &late))
            .await?
            .map_err(|error| cannot_keep(&error))?;
        // Who is to be told, and has not been: the last document names nobody.
        if let Some(known) = self.known.get_mut(&service) {
            known.told.retain(|node, _| nodes.contains(node));
            for node in nodes {
                known.told.entry(node).or_insert(0);
            }
        }
        self.replace(sealed).await?;
        let sealed = self
            .known
            .get(&service)
            .map(|known| Arc::clone(&known.sealed));
        Ok(Shown {
            sealed: sealed.unwrap_or_else(|| Arc::clone(&before.sealed)),
            ..before
        })
    }

    fn late(&self, id: &str) -> BTreeSet<NodeId> {
        let known = self.known.values().find(|known| text(known.id()) == id);
        let Some(known) = known else {
            return BTreeSet::new();
        };
        let version = known.document().version;
        let own = self.own();
        (known.told.iter())
            .filter(|(node, told)| **told < version && Some(**node) != own)
            .map(|(node, _)| *node)
            .collect()
    }

    fn document_of(&self, service: ServiceId) -> Answer<ServiceDocument> {
        let known = self.known.get(&service);
        known
            .map(|known| known.document().clone())
            .ok_or_else(|| Fault::internal(&std::fmt::Error))
    }

    fn show(&self, kind: Kind, typed: Option<&str>) -> Answer<Vec<Shown>> {
        match typed {
            Some(typed) => Ok(vec![self.shown_one(self.find(kind, typed)?)?]),
            None => (self.known.values())
                .filter(|known| Kind::of(known.document()) == kind)
                .filter(|known| !known.document().removed)
                .map(|known| self.shown_one(known.id()))
                .collect(),
        }
    }

    fn shown_one(&self, service: ServiceId) -> Answer<Shown> {
        let known = self.known.get(&service);
        let known = known.ok_or_else(|| Fault::internal(&std::fmt::Error))?;
        let named = known.document().nodes.iter().map(|one| one.node);
        let named: BTreeSet<NodeId> = named.chain([known.document().owner]).collect();
        let own = self.own();
        Ok(Shown {
            sealed: Arc::clone(&known.sealed),
            keepers: known.keepers.clone(),
            status: self.status(service),
            ends: self.ends(known),
            settled: known.settled,
            others: (named.into_iter())
                .filter(|node| Some(*node) != own && self.lives(*node))
                .collect(),
        })
    }

    /// Enters what is kept on disk. Copies that still run are taken over later.
    pub(super) fn take_in(&mut self, stored: Stored) {
        let Some(open) = self.open.clone() else {
            return;
        };
        let service = store::id(&stored.document);
        let document = stored.document.document();
        let now = boottime();
        let own = open.identity.id();
        self.partners_due = Duration::ZERO;
        let mut keeper = (stored.keeper)
            .filter(|state| state.node == own && state.spec.service == service)
            .map(|state| Keeper::restored(state, self.terms, now));
        if let Some(keeper) = &mut keeper {
            keeper.update(spec(document));
        }
        let first = stored.keepers.as_ref().filter(|keepers| keepers.epoch == 1);
        let to_begin = first.filter(|_| document.owner == own && !document.removed);
        let known = Known {
            bytes: stored.document.bytes().into(),
            heard: self.store.written(service).unwrap_or_else(SystemTime::now),
            role: role(&self.mesh, &open, document),
            to_begin: to_begin.map_or_else(BTreeSet::new, |keepers| {
                keepers.nodes.iter().copied().collect()
            }),
            told: stored.late.into_iter().map(|node| (node, 0)).collect(),
            next_telling: now,
            refusing: BTreeSet::new(),
            next_asking: now,
            next_who: now,
            keepers: stored.keepers,
            overseer: keeper.as_ref().map(|_| Overseer::new(own, now)),
            keeper,
            change: None,
            care: Default::default(),
            jobs: BTreeMap::new(),
            verdict: Mutex::default(),
            noted: BTreeMap::new(),
            next_end: now,
            settled: stored.settled,
            sealed: Arc::new(stored.document),
        };
        self.known.insert(service, known);
    }

    /// Somebody has a document. What is older than what is known, or not this node's affair, is left alone.
    pub(super) async fn hear_document(&mut self, open: &Open, bytes: &[u8]) -> Answer<()> {
        let denied = |error: &dyn std::error::Error| Fault::new(ErrorKind::Denied, chain(error));
        let sealed = SealedDocument::read(bytes).map_err(|error| denied(&error))?;
        let document = sealed.document();
        match self.known.get(&store::id(&sealed)) {
            Some(known) if known.document().owner != document.owner => {
                return Err(Fault::new(
                    ErrorKind::Denied,
                    "the service's document is another owner's",
                ));
            }
            Some(known) if known.document().version >= document.version => return Ok(()),
            Some(known) if known.document().task != document.task => {
                return Err(Fault::new(
                    ErrorKind::Denied,
                    "what was asked for as a service or a task does not become another",
                ));
            }
            Some(_) => {}
            None if self.damaged.contains(&store::id(&sealed)) => {
                return Err(Fault::conflict(
                    "what this node kept of the service is damaged, and it may have promised something there",
                ));
            }
            // Nobody has this node remember anything but who holds its own, live grant.
            None if document.removed => return Ok(()),
            None => {
                let own = open.identity.id();
                let owners = (self.known.values().map(Known::document))
                    .filter(|known| !known.removed && known.owner != own)
                    .map(|known| known.owner);
                let of_it = owners.clone().filter(|owner| *owner == document.owner);
                if owners.count() >= SERVICES_MAX || of_it.count() >= SERVICES_OF_ONE_MAX {
                    return Err(Fault::conflict("this node knows enough services"));
                }
                let asker = role(&self.mesh, open, document)?;
                counts(&self.mesh, open, &asker)?;
            }
        }
        self.replace(sealed).await
    }

    /// A newer document, or a first one: it is on disk before anything is done about it.
    async fn replace(&mut self, sealed: SealedDocument) -> Answer<()> {
        let open = self.opened().await?;
        let service = store::id(&sealed);
        let (store, kept) = (self.store.clone(), sealed.clone());
        let removed = sealed.document().removed;
        blocking(move || {
            store.put_document(&kept)?;
            if removed {
                store.strip(service)
            } else {
                Ok(())
            }
        })
        .await?
        .map_err(|error| cannot_keep(&error))?;
        tracing::info!(
            service = text(service),
            name = sealed.document().name,
            version = sealed.document().version,
            removed,
            "a service's document"
        );
        let Some(known) = self.known.get_mut(&service) else {
            self.take_in(Stored {
                document: sealed,
                keepers: None,
                keeper: None,
                late: Vec::new(),
                settled: None,
            });
            self.settle_partners(boottime());
            return Ok(());
        };
        let document = sealed.document().clone();
        known.bytes = sealed.bytes().into();
        known.sealed = Arc::new(sealed);
        known.heard = SystemTime::now();
        known.next_telling = Duration::ZERO;
        known.verdict = Mutex::default();
        if removed {
            (known.keeper, known.overseer, known.change) = (None, None, None);
            known.to_begin.clear();
            known.care = Default::default();
        } else {
            known.role = role(&self.mesh, &open, &document);
            if let Some(keeper) = &mut known.keeper {
                keeper.update(spec(&document));
            }
        }
        self.let_go_of(service, document.replicas);
        if removed {
            self.clear_copies(service);
        }
        self.settle_partners(boottime());
        Ok(())
    }

    /// Whether the owner's grant counts now.
    pub(super) fn stands(&self, service: ServiceId) -> Answer<()> {
        let (Some(open), Some(known)) = (&self.open, self.known.get(&service)) else {
            return Err(Fault::conflict("the service is not known here"));
        };
        let asker = known.role.as_ref().map_err(Clone::clone)?;
        let (begin, revocations) = (boottime(), self.mesh.revocations());
        let mut verdict = lock(&known.verdict);
        if let Some(found) = verdict.as_ref()
            && (begin < found.until && revocations == found.revocations)
        {
            return found.stands.clone();
        }
        let stands = counts(&self.mesh, open, asker);
        let now = boottime();
        let dear = now.saturating_sub(begin) * VERDICT_SHARE;
        *verdict = Some(Verdict {
            until: now + VERDICT_KEPT.max(dear),
            revocations,
            stands: stands.clone(),
        });
        stands
    }

    /// Gives the document to those that may not have it: the owner to all, a keeper to all that were never heard of it.
    pub(super) fn tell(&mut self, service: ServiceId, now: Duration) {
        let Some(own) = self.own() else { return };
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let is_owner = known.document().owner == own;
        if now < known.next_telling || !(is_owner || known.document().removed) {
            return;
        }
        known.next_telling = now + TELL_EVERY;
        let version = known.document().version;
        let named: BTreeSet<NodeId> = (known.document().nodes.iter())
            .map(|one| one.node)
            .chain(known.told.keys().copied())
            .collect();
        let mut late: Vec<NodeId> = (named.into_iter())
            .filter(|node| known.told.get(node).is_none_or(|told| *told < version))
            .collect();
        let removed = known.document().removed;
        late.retain(|node| self.lives(*node));
        for node in late {
            if node == own {
                continue;
            }
            self.send(service, node, About::Document, ToNode::Describe);
        }
        if !removed {
            self.begin_keepers(service);
        }
    }

    /// Forgets services that were removed long ago, or of which everybody has heard.
    pub(super) async fn forget_old(&mut self, now: Duration) {
        self.forget_due = now + FORGET_EVERY;
        self.forget_tasks().await;
        let own = self.own();
        let removed =
            (self.known.values()).filter(|known| known.document().removed && known.jobs.is_empty());
        let (over, kept): (Vec<&Known>, Vec<&Known>) = removed.partition(|known| {
            let version = known.document().version;
            let all_told = Some(known.document().owner) == own
                && !known.told.is_empty()
                && (known.told.iter()).all(|(node, told)| *told >= version || Some(*node) == own);
            // A clock that was set back makes none old.
            let late = known
                .heard
                .elapsed()
                .is_ok_and(|age| age > last_words::KEPT);
            all_told || late
        });
        let words = (kept.into_iter())
            .filter(|known| Some(known.document().owner) != own)
            .map(|known| LastWord {
                service: known.id(),
                owner: known.document().owner,
                bytes: known.bytes.len(),
                heard: known.heard,
            });
        let beyond = last_words::beyond(words.collect(), last_words::BYTES_MAX);
        let over: Vec<ServiceId> = over.into_iter().map(Known::id).collect();
        for service in over.into_iter().chain(beyond) {
            self.known.remove(&service);
            self.partners_due = Duration::ZERO;
            let store = self.store.clone();
            let removed = blocking(move || store.remove(service)).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(%error, "a removed service's directory stays");
            }
        }
    }

    /// Has the events' sender, for tasks of its own.
    pub(super) fn sender(&self) -> tokio::sync::mpsc::Sender<Event> {
        self.events.clone()
    }
}

/// Whether whoever acts here may do so now.
fn counts(mesh: &Mesh, open: &Open, asker: &Asker) -> Answer<()> {
    match asker {
        Asker::Owner => Ok(()),
        Asker::Foreign(foreign, _) => {
            foreign.authorize(mesh, open.identity.id(), Requirement::Right(Right::Run))
        }
    }
}

pub(super) fn cannot_keep(error: &std::io::Error) -> Fault {
    Fault::new(
        ErrorKind::Host,
        format!("what is known of the service cannot be written down: {error}"),
    )
    .hint("free some disk space, or see `vistara doctor`")
}
