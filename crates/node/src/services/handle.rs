//! How the rest of the node reaches the task that owns its services.

use super::admission::{Admission, Seat, busy};
use super::store::{self, Store};
use super::{Draft, EVENTS_MAX, Event, Kind, Made, Services, Shown, Task, documents, post};
use crate::fault::{Answer, Fault};
use crate::mesh::{Mesh, Placing};
use crate::node::Node;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use vistara_api::ErrorKind;
use vistara_control::services::Terms;
use vistara_control::services::wire::{self, ToNode};
use vistara_mesh::service::SealedDocument;
use vistara_model::NodeId;

impl Services {
    /// Begins where an earlier start has left off.
    pub(crate) fn begin(
        state_dir: &Path,
        mesh: &Arc<Mesh>,
        node: &Arc<Node>,
        placing: &Arc<Placing>,
    ) -> Services {
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        let task = Task {
            events: events.clone(),
            mesh: Arc::clone(mesh),
            node: Arc::clone(node),
            placing: Arc::clone(placing),
            store: Store::new(state_dir),
            open: None,
            terms: Terms::default(),
            known: BTreeMap::new(),
            damaged: BTreeSet::new(),
            inner: VecDeque::new(),
            partners: BTreeMap::new(),
            partners_due: Duration::ZERO,
            forget_due: Duration::ZERO,
            rounds: 0,
        };
        // It ends with the runtime: copies outlive it as long as their leases.
        tokio::spawn(task.run(heard));
        let mesh = Arc::clone(mesh);
        Services {
            events,
            mesh,
            admission: Admission::default(),
        }
    }

    async fn order<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<Answer<T>>) -> documents::Order,
    ) -> Answer<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || Fault::new(ErrorKind::Internal, "the task of the services is gone");
        let sent = self.events.send(Event::Ordered(order(reply))).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Room for a node's message before it is read, where that is a stranger.
    pub(crate) async fn admit(&self, from: NodeId) -> Answer<Option<Seat>> {
        let open = self.mesh.open().await?;
        if open.knows(&from) {
            return Ok(None);
        }
        self.admission.admit(from).map(Some)
    }

    /// What another node asks.
    pub(crate) async fn hear(&self, from: NodeId, request: wire::Request) -> Answer<wire::Answer> {
        let (reply, answer) = oneshot::channel();
        let asked = Event::Asked {
            from,
            request,
            reply,
        };
        self.events.try_send(asked).map_err(|_| busy())?;
        answer.await.map_err(|_| busy())?
    }

    /// Makes a service or a task known to itself and its first keepers, unless there is a task of its key.
    pub(crate) async fn create(&self, draft: Draft) -> Answer<Made> {
        self.order(|reply| documents::Order::Create(Box::new(draft), reply))
            .await
    }

    /// Wants another number of copies, on these nodes from now on where any are given.
    pub(crate) async fn scale(
        &self,
        typed: &str,
        replicas: u32,
        nodes: Option<Vec<NodeId>>,
    ) -> Answer<Shown> {
        let typed = typed.to_owned();
        self.order(|reply| documents::Order::Scale(typed, replicas, nodes, reply))
            .await
    }

    /// Wants it no more.
    pub(crate) async fn remove(&self, kind: Kind, typed: &str) -> Answer<Shown> {
        let typed = typed.to_owned();
        self.order(|reply| documents::Order::Remove(kind, typed, reply))
            .await
    }

    /// All of a kind that are known here, or the one that was typed.
    pub(crate) async fn show(&self, kind: Kind, typed: Option<&str>) -> Answer<Vec<Shown>> {
        let typed = typed.map(str::to_owned);
        self.order(|reply| documents::Order::Show(kind, typed, reply))
            .await
    }

    /// Who has not said that it has forgotten a removed service.
    pub(crate) async fn late(&self, id: &str) -> Answer<BTreeSet<NodeId>> {
        let id = id.to_owned();
        self.order(|reply| documents::Order::Late(id, reply)).await
    }

    /// Asks a node how it stands with a service; nothing where it does not say.
    pub(crate) async fn status_of(
        &self,
        node: NodeId,
        sealed: &SealedDocument,
    ) -> Option<wire::Answer> {
        let request = wire::Request {
            service: store::id(sealed),
            version: sealed.document().version,
            document: None,
            body: ToNode::Status,
        };
        let bytes: Arc<[u8]> = sealed.bytes().into();
        post::ask(&self.mesh, node, request, &bytes).await.ok()
    }
}
