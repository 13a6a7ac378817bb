//! Services and tasks: copies that run somewhere among nodes that trust one owner, whoever dies. What is decided is
//! `vistara_control::services`'; here one task carries it between nodes, disks and machines.
//!
//! ```text
//! the interface, other nodes, timers, machines' ends ─► Event ─► Task ─► keepers, overseers, holders (control)
//!                                                                  │
//!              files (before an answer), messages, searches, machines, guards of leases
//! ```
//! - **Authority.** Nobody acts on anything but a document that its owner has signed and that holds this node's own, live
//!   grant to that owner. Machines are the owner's, within that grant. Who asks must be named in the document.
//! - **Order.** One task owns all of it; what it promises is on disk before it answers. Leases are counted by
//!   `CLOCK_BOOTTIME`.
//! - **Nobody is missed.** Each document is at all nodes that it names; where the owner's node is away, the keepers go on.

mod admission;
mod bodies;
mod copies;
mod documents;
mod endings;
#[cfg(test)]
mod fixtures;
mod handle;
mod hearing;
mod keeping;
mod last_words;
mod messages;
mod partners;
mod placing;
mod post;
mod store;
mod tasks;

pub(crate) use admission::ARRIVAL_BOUND;
pub(crate) use copies::ASKING;
pub(crate) use documents::{Draft, DraftTask, Made};
pub(crate) use store::text as id_text;
pub(crate) use tasks::Settled;

use crate::fault::{Answer, blocking};
use crate::fence::boottime;
use crate::machine::Handle;
use crate::mesh::{Asker, Mesh, Open, Placing};
use crate::node::Node;
use admission::Admission;
use copies::Job;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use store::Store;
use tokio::sync::{mpsc, oneshot};
use vistara_control::membership::Life;
use vistara_control::services::wire::{self, Status, ToNode};
use vistara_control::services::{Change, End, Keeper, Keepers, Overseer, ServiceId, Slot, Terms};
use vistara_mesh::service::{SealedDocument, ServiceDocument};
use vistara_model::{Generation, MachineId, NodeId};

/// Events that wait for the task.
const EVENTS_MAX: usize = 1024;
/// How often it looks for what is due and was not foreseen.
const TICK: Duration = Duration::from_millis(500);
/// Services that one node keeps, copies or owns.
const SERVICES_MAX: usize = 256;
/// Of these, services of one owner who is not this node's: one grantee does not keep others from having any.
const SERVICES_OF_ONE_MAX: usize = 64;
/// Nodes that are let in and kept connected on account of services: each costs a connection, and more than so many look
/// after services of one node only where a grantee makes them up. Services of this node's owner come first.
const PARTNERS_MAX: usize = 512;
/// How often it is looked who is one, besides at each change of a document.
const PARTNERS_EVERY: Duration = Duration::from_secs(5);
/// How long one that is named no more stays connected: last words are said, and answers are on their way.
const PARTNER_KEPT: Duration = Duration::from_secs(30);
/// How long it is taken for granted that an owner's grant counts, or not, where none is taken back.
const VERDICT_KEPT: Duration = Duration::from_secs(1);
/// And at least so many times as long as it took to find out: tokens that are dear to read never take up the task, however
/// many services show them.
const VERDICT_SHARE: u32 = 256;

/// What the task hears.
enum Event {
    /// Another node asks something.
    Asked {
        from: NodeId,
        request: wire::Request,
        reply: oneshot::Sender<Answer<wire::Answer>>,
    },
    /// Another node has answered.
    Answered {
        from: NodeId,
        service: ServiceId,
        about: About,
        answer: Result<wire::Answer, String>,
    },
    /// The owner of this node wants something.
    Ordered(documents::Order),
    /// A copy's machine is there, or cannot be.
    Made {
        slot: Slot,
        generation: Generation,
        made: Answer<Arc<Handle>>,
    },
    /// A copy's machine has ended.
    Ended {
        slot: Slot,
        generation: Generation,
        machine: MachineId,
    },
    /// A copy that was told to stop is gone.
    Gone { slot: Slot, generation: Generation },
    /// A node is about to be given a slot.
    Giving {
        slot: Slot,
        generation: Generation,
        to: NodeId,
    },
    /// A search is over.
    Placed {
        slot: Slot,
        generation: Generation,
        outcome: Result<NodeId, placing::Unplaced>,
    },
}

/// What a message was about, where its answer is not a keeper's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    /// Anything.
    Other,
    /// It was told to begin to keep.
    Begin,
    /// It was given the document.
    Document,
    /// It was asked whether it still keeps.
    Keeper,
    /// It was asked who keeps now.
    Who,
    /// It was asked how a task has ended.
    End,
}

/// What is looked up by name: each has names of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Copies that are to run.
    Service,
    /// A program that is run to its end.
    Task,
}

impl Kind {
    fn of(document: &ServiceDocument) -> Kind {
        match document.task {
            None => Kind::Service,
            Some(_) => Kind::Task,
        }
    }

    /// As it is said, and as the commands about it begin.
    fn word(self) -> &'static str {
        match self {
            Kind::Service => "service",
            Kind::Task => "task",
        }
    }
}

/// A service, as it is known here.
struct Known {
    sealed: Arc<SealedDocument>,
    bytes: Arc<[u8]>,
    /// When this version came.
    heard: SystemTime,
    /// For whom copies are made here; or why they are not, and why this node does not keep.
    role: Answer<Asker>,
    keepers: Option<Keepers>,
    keeper: Option<Keeper>,
    overseer: Option<Overseer>,
    change: Option<Change>,
    /// Keepers of the first epoch that have not said that they began. The owner's.
    to_begin: BTreeSet<NodeId>,
    /// Which version each node is known to have.
    told: BTreeMap<NodeId, u64>,
    next_telling: Duration,
    /// Keepers that live and have said that they do not keep: their grant counts no more.
    refusing: BTreeSet<NodeId>,
    next_asking: Duration,
    /// When the keepers that are known may be asked again who looks after the service now.
    next_who: Duration,
    care: placing::Care,
    jobs: BTreeMap<u32, Job>,
    verdict: Mutex<Option<Verdict>>,
    /// Of a task: what other keepers have noted of its end, and when they are asked again. The owner's.
    noted: BTreeMap<NodeId, End>,
    next_end: Duration,
    /// How it has ended. The owner's.
    settled: Option<Settled>,
}

/// Whether the owner's grant counts, as it was found.
struct Verdict {
    until: Duration,
    revocations: u64,
    stands: Answer<()>,
}

impl Known {
    fn document(&self) -> &ServiceDocument {
        self.sealed.document()
    }

    fn id(&self) -> ServiceId {
        store::id(&self.sealed)
    }
}

/// How the rest of the node reaches the task.
#[derive(Clone)]
pub(crate) struct Services {
    events: mpsc::Sender<Event>,
    mesh: Arc<Mesh>,
    admission: Admission,
}

/// A service, for whoever shows it.
pub(crate) struct Shown {
    pub(crate) sealed: Arc<SealedDocument>,
    pub(crate) keepers: Option<Keepers>,
    /// What this node itself knows.
    pub(crate) status: Status,
    /// What this node, as a keeper, has noted as over.
    pub(crate) ends: BTreeMap<u32, End>,
    /// Of a task of this owner: how it has ended.
    pub(crate) settled: Option<Settled>,
    /// The other nodes that are named in it, and live.
    pub(crate) others: Vec<NodeId>,
}

struct Task {
    events: mpsc::Sender<Event>,
    mesh: Arc<Mesh>,
    node: Arc<Node>,
    placing: Arc<Placing>,
    store: Store,
    /// The key, once it is needed.
    open: Option<Arc<Open>>,
    terms: Terms,
    known: BTreeMap<ServiceId, Known>,
    /// Of which this node has forgotten what it has promised, if anything: it takes no part in them.
    damaged: BTreeSet<ServiceId>,
    /// What this node says to itself.
    inner: VecDeque<(ServiceId, About, ToNode)>,
    /// With whom this node looks after services, and when each was last named.
    partners: BTreeMap<NodeId, Duration>,
    partners_due: Duration,
    forget_due: Duration,
    rounds: u64,
}

impl Task {
    async fn run(mut self, mut heard: mpsc::Receiver<Event>) {
        if let Err(fault) = self.resume().await {
            tracing::error!(error = fault.0.message, "services cannot be looked after");
        }
        loop {
            let due = match self.is_idle() {
                true => Duration::MAX,
                false => self.wake_at().saturating_sub(boottime()).min(TICK),
            };
            match tokio::time::timeout(due, heard.recv()).await {
                Ok(Some(event)) => self.happen(event).await,
                // Its own sender keeps it open.
                Ok(None) => return,
                Err(_) => {}
            }
            self.act().await;
            self.say_to_itself().await;
        }
    }

    /// Whether nothing comes due by itself: a node without services is not to be woken for them.
    fn is_idle(&self) -> bool {
        self.known.is_empty() && self.partners.is_empty() && self.inner.is_empty()
    }

    /// The key, and all that is kept.
    async fn resume(&mut self) -> Answer<()> {
        let store = self.store.clone();
        let stored = blocking(move || (!store.is_empty()).then(|| store.all())).await?;
        let Some(kept) = stored else {
            // Copies of services of which nothing is left are ended all the same.
            self.take_over_copies();
            return Ok(());
        };
        self.opened().await?;
        self.damaged = kept.damaged;
        for one in kept.services {
            self.take_in(one);
        }
        self.take_over_copies();
        Ok(())
    }

    async fn opened(&mut self) -> Answer<Arc<Open>> {
        if let Some(open) = &self.open {
            return Ok(Arc::clone(open));
        }
        let open = self.mesh.open().await?;
        self.open = Some(Arc::clone(&open));
        Ok(open)
    }

    /// This node's own id; there is none before anything is known.
    fn own(&self) -> Option<NodeId> {
        self.open.as_ref().map(|open| open.identity.id())
    }

    fn lives(&self, node: NodeId) -> bool {
        let alive = |member: crate::mesh::Member| member.life == Life::Alive;
        self.own() == Some(node) || self.mesh.member(&node).is_some_and(alive)
    }

    fn wake_at(&self) -> Duration {
        let mut at = Duration::MAX;
        for known in self.known.values() {
            let jobs = known.jobs.values();
            at = jobs.fold(at, |at, job| at.min(job.wake_at()));
            at = (known.overseer.as_ref()).map_or(at, |one| at.min(one.wake_at()));
            at = (known.change.as_ref()).map_or(at, |one| at.min(one.wake_at()));
        }
        at
    }

    async fn happen(&mut self, event: Event) {
        match event {
            Event::Asked {
                from,
                request,
                reply,
            } => {
                let answer = self.asked(from, request).await;
                // Who asked may have gone.
                let _ = reply.send(answer);
            }
            Event::Answered {
                from,
                service,
                about,
                answer,
            } => self.answered(from, service, about, answer).await,
            Event::Ordered(order) => self.ordered(order).await,
            Event::Made {
                slot,
                generation,
                made,
            } => self.made(slot, generation, made),
            Event::Ended {
                slot,
                generation,
                machine,
            } => self.ended(slot, generation, &machine),
            Event::Gone { slot, generation } => self.gone(slot, generation),
            Event::Giving {
                slot,
                generation,
                to,
            } => self.giving(slot, generation, to),
            Event::Placed {
                slot,
                generation,
                outcome,
            } => self.placed(slot, generation, outcome),
        }
    }

    /// Does what is due.
    async fn act(&mut self) {
        let now = boottime();
        if now >= self.partners_due {
            self.settle_partners(now);
        }
        let services: Vec<ServiceId> = self.known.keys().copied().collect();
        for service in services {
            self.tell(service, now);
            self.keep_on(service, now);
            self.hold_on(service, now);
            self.wait_for_end(service, now).await;
        }
        if now >= self.forget_due {
            self.forget_old(now).await;
        }
    }
}
