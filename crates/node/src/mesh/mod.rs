//! This node among others: its key, the nodes it has joined, what it has granted, and whom it lets in.
//!
//! Nothing of this exists until it is needed: no socket until the owner asks for one, no key until then or until the first
//! machine is prepared, whose receipt it will sign. Everything lies in `mesh/` of the state
//! directory. What is decided about a caller is decided by `vistara_control`; here its facts are gathered.
//!
//! ```text
//! a stream of another node → judge (meant for this start of this node? new? whose token?) → Visit → the interface,
//!   where each request is authorized → the same handlers that the owner's requests reach
//! ```

mod bring;
mod brought;
mod caller;
mod faults;
mod forwards;
mod gossip;
mod ledger;
mod members;
mod place;
mod placing;
mod reach;

pub(crate) use bring::Bringing;
pub(crate) use caller::{Asker, Caller, Foreign, Guarded, Owner, Visit, used};
pub(crate) use forwards::Forwards;
pub(crate) use gossip::Member;
pub(crate) use ledger::{Given, Ledger};
pub(crate) use place::number as place_number;
pub(crate) use placing::{Heard, Placing};
pub(crate) use reach::relays_of;

use crate::fault::{Answer, Fault, blocking};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use vistara_api::ErrorKind;
use vistara_control::{Requirement, Standing, Usage};
use vistara_mesh::frame::Open as FirstFrame;
use vistara_mesh::{
    Accepted, Authority, Identity, Link, LinkOptions, MeshStream, NonceError, Nonces, Peer,
    PeerState, Peers, Ticket, Token, timely,
};
use vistara_model::{GrantId, NodeId};

/// Version of `listen.json`.
const FORMAT: u32 = 1;
/// Visits that wait for the interface to take them.
const VISITS_QUEUE: usize = 64;
/// Pause between two tries to listen where the first failed.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);
/// How often a long visit looks whether its grant has expired, besides being told of a revocation: clocks may be set.
const EXPIRY_CHECK: Duration = Duration::from_secs(60);

/// What is on disk, read once.
pub(crate) struct Open {
    pub(crate) identity: Identity,
    pub(crate) authority: Authority,
    pub(crate) peers: Mutex<Peers>,
    pub(crate) ledger: Mutex<Ledger>,
    /// Those with whom this node looks after services, or runs copies of them.
    pub(crate) partners: Mutex<HashSet<NodeId>>,
}

/// This node among others.
pub(crate) struct Mesh {
    dir: PathBuf,
    open: Mutex<Option<Arc<Open>>>,
    link: Mutex<Option<Link>>,
    /// This node's part in the network, while it listens and is not private.
    gossip: Mutex<Option<Arc<gossip::Gossip>>>,
    /// What this node says of itself may have changed.
    restate: tokio::sync::Notify,
    /// Held while the link is made or closed.
    turning: tokio::sync::Mutex<()>,
    nonces: Mutex<Nonces>,
    /// What machines that are being made will take, by grant.
    held: Mutex<HashMap<GrantId, Usage>>,
    /// Images that others brought in.
    brought: Mutex<brought::Brought>,
    /// Counts revocations, for visits that are under way.
    revocations: watch::Sender<u64>,
    visits: mpsc::Sender<Visit>,
}

#[derive(Serialize, Deserialize)]
struct Listen {
    format: u32,
    listen: SocketAddr,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    crate::machine::now_ns() / 1_000_000_000
}

/// Does something to its end, on a task of its own: whoever waits for it may be gone before.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    tokio::spawn(work)
        .await
        .map_err(|error| Fault::internal(&error))
        .flatten()
}

impl Open {
    fn read(dir: &Path) -> Answer<Open> {
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(|error| {
                Fault::new(ErrorKind::Host, format!("cannot make {dir:?}: {error}"))
            })?;
        let (peers, ledger) = (Peers::open(dir)?, Ledger::open(dir)?);
        // Last: it counts this start.
        let identity = Identity::open(dir)?;
        Ok(Open {
            authority: Authority::new(&identity)?,
            identity,
            peers: Mutex::new(peers),
            ledger: Mutex::new(ledger),
            partners: Mutex::default(),
        })
    }

    /// Whether a node has a live grant, is a peer, or looks after a service with this one.
    pub(crate) fn knows(&self, node: &NodeId) -> bool {
        lock(&self.ledger).has_live_grant(node, now_s())
            || lock(&self.peers).get(node).is_some()
            || lock(&self.partners).contains(node)
    }
}

impl Mesh {
    /// Nothing is made or opened yet. The node holds the lock of its state directory before anything is. Visits come out of the channel.
    pub(crate) fn new(state_dir: &Path) -> (Arc<Mesh>, mpsc::Receiver<Visit>) {
        let (visits, receiver) = mpsc::channel(VISITS_QUEUE);
        let mesh = Mesh {
            dir: state_dir.join("mesh"),
            open: Mutex::default(),
            link: Mutex::default(),
            gossip: Mutex::default(),
            restate: tokio::sync::Notify::new(),
            turning: tokio::sync::Mutex::default(),
            nonces: Mutex::default(),
            held: Mutex::default(),
            brought: Mutex::new(brought::Brought::at(&state_dir.join("mesh"))),
            revocations: watch::Sender::new(0),
            visits,
        };
        (Arc::new(mesh), receiver)
    }

    /// Where it keeps everything.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is a key, or was one.
    pub(crate) fn has_key(&self) -> bool {
        lock(&self.open).is_some() || self.dir.join("generation").exists()
    }

    /// The key, the peers and the grants; makes the key at the first use.
    pub(crate) async fn open(&self) -> Answer<Arc<Open>> {
        if let Some(open) = lock(&self.open).as_ref() {
            return Ok(Arc::clone(open));
        }
        let _turn = self.turning.lock().await;
        self.open_in_turn().await
    }

    async fn open_in_turn(&self) -> Answer<Arc<Open>> {
        if let Some(open) = lock(&self.open).as_ref() {
            return Ok(Arc::clone(open));
        }
        let dir = self.dir.clone();
        let open = Arc::new(blocking(move || Open::read(&dir)).await??);
        *lock(&self.open) = Some(Arc::clone(&open));
        Ok(open)
    }

    /// The link to others, while this node listens.
    pub(crate) fn link(&self) -> Option<Link> {
        lock(&self.link).clone()
    }

    /// Takes up what an earlier start left: listens again where it did. A failure is logged; the owner's machines do not
    /// depend on it.
    pub(crate) async fn resume(self: &Arc<Self>) {
        if !self.dir.join("listen.json").exists() {
            return;
        }
        let Err(fault) = self.listen(None).await else {
            return;
        };
        tracing::error!(
            error = fault.0.message,
            "this node does not listen for others yet"
        );
        self.listen_soon();
    }

    /// Tries to listen until it does, or is not to any more.
    fn listen_soon(self: &Arc<Self>) {
        let mesh = Arc::downgrade(self);
        // It ends when it listens, or with the node: whoever has the port may give it back.
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LISTEN_AGAIN).await;
                let Some(mesh) = mesh.upgrade() else { return };
                let gone = !mesh.dir.join("listen.json").exists();
                if gone || mesh.listen(None).await.is_ok() {
                    return;
                }
            }
        });
    }

    /// Listens for others from now on, also after a restart.
    pub(crate) async fn listen(self: &Arc<Self>, wish: Option<SocketAddr>) -> Answer<Link> {
        let mesh = Arc::clone(self);
        whole(async move { mesh.begin_to_listen(wish).await }).await
    }

    async fn begin_to_listen(self: Arc<Self>, wish: Option<SocketAddr>) -> Answer<Link> {
        let _turn = self.turning.lock().await;
        self.listen_in_turn(wish).await
    }

    async fn listen_in_turn(self: &Arc<Self>, wish: Option<SocketAddr>) -> Answer<Link> {
        let open = self.open_in_turn().await?;
        if let Some(link) = self.link() {
            if wish.is_none_or(|wish| wish.port() == 0 || link.port() == Some(wish.port())) {
                return Ok(link);
            }
            self.end_gossip(true).await;
            *lock(&self.link) = None;
            link.close().await;
        }
        let path = self.dir.join("listen.json");
        let listen = match wish {
            Some(wish) => wish,
            None => {
                let path = path.clone();
                blocking(move || read_listen(&path)).await??
            }
        };
        let knows = Arc::clone(&open);
        let reach = self.reach().await;
        let (link, accepted) = Link::open(LinkOptions {
            identity: open.identity.clone(),
            listen,
            knows: Arc::new(move |node| knows.knows(node)),
            relays: reach.relays,
        })
        .await?;
        // The same port after a restart: tickets go on to be right.
        let listen = SocketAddr::new(listen.ip(), link.port().unwrap_or(listen.port()));
        let kept = blocking(move || write_listen(&path, listen))
            .await
            .flatten();
        if let Err(fault) = kept {
            link.close().await;
            return Err(fault);
        }
        for peer in lock(&open.peers).all() {
            if let Err(error) = link.keep(peer.id, peer.whereabouts()) {
                tracing::warn!(peer = %peer.id, %error, "a remembered node cannot be dialled");
            }
        }
        link.discover(reach.local_discovery);
        *lock(&self.link) = Some(link.clone());
        // It ends with the link, which closes the channel.
        tokio::spawn(Arc::clone(self).receive(Arc::clone(&open), accepted));
        self.begin_gossip(&open, &link).await;
        tracing::info!(%listen, "this node listens for others");
        Ok(link)
    }

    /// Listens no longer, and forgets every node. What was granted stays in the books.
    pub(crate) async fn leave(self: &Arc<Self>) -> Answer<()> {
        let mesh = Arc::clone(self);
        whole(async move { mesh.leave_in_turn().await }).await
    }

    async fn leave_in_turn(&self) -> Answer<()> {
        let _turn = self.turning.lock().await;
        let open = self.open_in_turn().await?;
        self.end_gossip(false).await;
        let path = self.dir.join("listen.json");
        blocking(move || {
            lock(&open.peers).clear()?;
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Fault::new(
                    ErrorKind::Host,
                    format!("cannot remove {path:?}: {error}"),
                )),
                _ => Ok(()),
            }
        })
        .await??;
        let link = lock(&self.link).take();
        if let Some(link) = link {
            link.close().await;
        }
        Ok(())
    }

    /// Says goodbye to others: the node leaves.
    pub(crate) async fn close(&self) {
        self.end_gossip(true).await;
        let link = lock(&self.link).take();
        if let Some(link) = link {
            link.close().await;
        }
    }

    async fn receive(self: Arc<Self>, open: Arc<Open>, mut accepted: mpsc::Receiver<Accepted>) {
        while let Some(accepted) = accepted.recv().await {
            let caller = match self.judge(&open, accepted.peer, &accepted.open) {
                Ok(foreign) => {
                    if foreign.is_granted() {
                        accepted.vouch();
                    }
                    Caller::Foreign(Arc::new(foreign))
                }
                // As an answer to whatever it asks, so that its user reads why.
                Err(fault) => Caller::Refused(fault),
            };
            let end = until_void(
                Arc::clone(&open),
                caller.grant(),
                self.revocations.subscribe(),
            );
            let visit = Visit {
                stream: Guarded::new(accepted.stream, end),
                caller,
            };
            if self.visits.send(visit).await.is_err() {
                return;
            }
        }
    }

    /// Whether a stream is meant for this start of this node, whose token it shows if any, and whether it comes for the first
    /// time.
    fn judge(&self, open: &Open, peer: NodeId, first: &FirstFrame) -> Answer<Foreign> {
        let denied = |message: &str| Fault::new(ErrorKind::Denied, message);
        if first.target() != open.identity.id() {
            return Err(denied("the request is meant for another node"));
        }
        if first.generation != open.identity.generation() {
            return Err(denied(
                "the request is meant for an earlier start of this node",
            ));
        }
        let now_ms = crate::machine::now_ns() / 1_000_000;
        let untimely = |error: NonceError| denied(&error.to_string());
        timely(first.deadline_ms, now_ms).map_err(untimely)?;
        let Some(bytes) = &first.token else {
            // Nothing will be done for it, so that nothing need be remembered.
            return Ok(Foreign::new(peer, None));
        };
        let token = Token::from_bytes(bytes.clone())?;
        let verified = open.authority.verify(&token)?;
        let holder = verified.terms().holder;
        let foreign = Foreign::new(peer, Some(verified));
        // Before anything is remembered of it: a grant that stands, and is this caller's. Each request is looked at again.
        foreign.authorize(self, open.identity.id(), Requirement::Any)?;
        lock(&self.nonces)
            .admit(holder, first.nonce, first.deadline_ms, now_ms)
            .map_err(untimely)?;
        Ok(foreign)
    }

    /// A stream to a node that was joined, under its id, an unambiguous beginning of it, or its name here.
    pub(crate) async fn stream_to(&self, typed: &str) -> Answer<MeshStream> {
        let open = self.open().await?;
        let peer = find(&open, typed).map_err(|fault| self.only_heard_of(&open, typed, fault))?;
        let link = self.link().ok_or_else(|| {
            Fault::conflict("this node is not in the mesh")
                .hint("vistara node join TICKET, or vistara node ticket")
        })?;
        let token = peer.grant.as_deref().map(str::parse::<Token>).transpose()?;
        Ok(link.stream(&peer.id, token.as_ref()).await?)
    }

    /// What this node calls the one with this key; none where it does not know it.
    pub(crate) async fn known_as(&self, node: &NodeId) -> Answer<Option<String>> {
        let open = self.open().await?;
        if open.identity.id() == *node {
            return Ok(Some("this node".to_owned()));
        }
        let peers = lock(&open.peers);
        let peer = peers.get(node);
        Ok(peer.map(|peer| peer.name.clone().unwrap_or_else(|| peer.id.short())))
    }

    /// The id of a node that was joined.
    pub(crate) async fn peer_id(&self, typed: &str) -> Answer<NodeId> {
        Ok(find(&*self.open().await?, typed)?.id)
    }

    /// Joins a node: it answers, and is remembered from now on.
    pub(crate) async fn join(
        self: &Arc<Self>,
        ticket: Ticket,
        name: Option<String>,
        grant: Option<Token>,
    ) -> Answer<(Arc<Open>, Peer)> {
        let open = self.open().await?;
        if name.as_deref() == Some("any") {
            return Err(Fault::user(
                "no node is called \"any\": `--on any` has one chosen",
            ));
        }
        if ticket.node == open.identity.id() {
            return Err(Fault::user("the ticket is this node's own")
                .hint("type it on the other node: vistara node join TICKET"));
        }
        if let Some(grant) = &grant {
            check_is_for(&open, grant, &ticket.node)?;
        }
        let before = lock(&open.peers).get(&ticket.node).cloned();
        let peer = Peer {
            id: ticket.node,
            name: name.or_else(|| before.as_ref().and_then(|peer| peer.name.clone())),
            addresses: ticket.addresses,
            relays: ticket.relays,
            grant: grant
                .map(|token| token.to_string())
                .or_else(|| before.as_ref().and_then(|peer| peer.grant.clone())),
        };
        let link = self.listen(None).await?;
        link.keep(peer.id, peer.whereabouts())?;
        let undo = || match &before {
            Some(before) => drop(link.keep(before.id, before.whereabouts())),
            None => link.forget(&peer.id),
        };
        if let Err(error) = link.reach(&peer.id).await {
            undo();
            return Err(Fault::from(error));
        }
        let (books, put) = (Arc::clone(&open), peer.clone());
        let kept = blocking(move || Ok(lock(&books.peers).put(put)?))
            .await
            .flatten();
        if let Err(fault) = kept {
            undo();
            return Err(fault);
        }
        if let Some(gossip) = self.gossip() {
            gossip.joined(peer.id);
        }
        Ok((open, peer))
    }

    /// Forgets a node that was joined.
    pub(crate) async fn forget(self: &Arc<Self>, typed: &str) -> Answer<()> {
        let open = self.open().await?;
        let id = find(&open, typed)?.id;
        blocking(move || lock(&open.peers).remove(&id)).await??;
        if let Some(link) = self.link() {
            link.forget(&id);
        }
        if let Some(gossip) = self.gossip() {
            gossip.unjoined(id);
        }
        let mesh = Arc::clone(self);
        whole(async move { mesh.drop_unwanted_relay().await }).await
    }

    /// Remembers a token that a node gave to this one.
    pub(crate) async fn keep_grant(&self, token: Token) -> Answer<(Arc<Open>, Peer)> {
        let open = self.open().await?;
        let node = token.unchecked_terms()?.node;
        check_is_for(&open, &token, &node)?;
        let joined = lock(&open.peers).get(&node).cloned();
        // Who was only heard of is remembered and kept connected from now on, where it states to be.
        let Some(mut peer) = joined.or_else(|| self.as_peer(&node)) else {
            return Err(Fault::new(
                ErrorKind::NotFound,
                format!(
                    "the grant is for the node {}, which was not joined, nor heard of",
                    node.short()
                ),
            )
            .hint("vistara node join TICKET --grant TOKEN"));
        };
        peer.grant = Some(token.to_string());
        let (books, put) = (Arc::clone(&open), peer.clone());
        blocking(move || lock(&books.peers).put(put)).await??;
        if let Some(link) = self.link() {
            link.keep(peer.id, peer.whereabouts())?;
        }
        if let Some(gossip) = self.gossip() {
            gossip.joined(peer.id);
        }
        Ok((open, peer))
    }

    /// Takes a grant back; what goes on under it is cut off.
    pub(crate) async fn revoke(&self, id: GrantId) -> Answer<(Arc<Open>, Given)> {
        let open = self.open().await?;
        let books = Arc::clone(&open);
        let given = blocking(move || lock(&books.ledger).revoke(&id, now_s())).await??;
        self.revocations.send_modify(|count| *count += 1);
        Ok((open, given))
    }

    /// How it stands with a node that was joined.
    pub(crate) fn state(&self, node: &NodeId) -> Option<PeerState> {
        self.link().and_then(|link| link.state(node))
    }

    /// How it stands with a grant in the books.
    /// How many grants were taken back since this start: what was found out before is asked again where it has grown.
    pub(crate) fn revocations(&self) -> u64 {
        *self.revocations.borrow()
    }

    pub(crate) fn standing(&self, id: &GrantId) -> Standing {
        match lock(&self.open).as_ref() {
            Some(open) => lock(&open.ledger).standing(id),
            None => Standing::Unknown,
        }
    }
}

/// A token that somebody else gave must at least say that it is for that node and for this one.
fn check_is_for(open: &Open, token: &Token, node: &NodeId) -> Answer<()> {
    let terms = token.unchecked_terms()?;
    if terms.node != *node {
        return Err(Fault::user(format!(
            "the grant is for the node {}, not for {}",
            terms.node.short(),
            node.short()
        )));
    }
    if terms.until_s < now_s() {
        return Err(Fault::user("the grant has expired").hint("ask for a new one"));
    }
    if terms.holder != open.identity.id() && !token.is_passed_on() {
        return Err(Fault::user(format!(
            "the grant was given to {}, not to this node, {}",
            terms.holder.short(),
            open.identity.id().short()
        ))
        .hint("`vistara id` prints the key that it must be given to"));
    }
    Ok(())
}

/// The joined node that a user typed.
fn find(open: &Open, typed: &str) -> Answer<Peer> {
    let peers = lock(&open.peers);
    let all = peers.all();
    let exact = all
        .iter()
        .find(|peer| peer.id.to_string() == typed || peer.name.as_deref() == Some(typed));
    if let Some(peer) = exact {
        return Ok(peer.clone());
    }
    let mut begin = all
        .iter()
        .filter(|peer| !typed.is_empty() && peer.id.to_string().starts_with(typed));
    match (begin.next(), begin.count()) {
        (Some(peer), 0) => Ok(peer.clone()),
        (Some(_), more) => Err(Fault::user(format!(
            "{typed:?} is the beginning of {} nodes' ids; type more of it",
            more + 1
        ))
        .hint("see `vistara nodes`")),
        (None, _) => Err(Fault::new(
            ErrorKind::NotFound,
            format!("there is no node {typed:?} among those that were joined"),
        )
        .hint("`vistara nodes` lists them; `vistara node join TICKET` joins one")),
    }
}

/// Resolves when what was granted is void; never where nothing was.
async fn until_void(
    open: Arc<Open>,
    grant: Option<(GrantId, u64)>,
    mut revocations: watch::Receiver<u64>,
) {
    let Some((id, until_s)) = grant else {
        return std::future::pending().await;
    };
    let is_void = |now| now > until_s || lock(&open.ledger).standing(&id) != Standing::Live;
    if is_void(now_s()) {
        // What it asks is refused, with the reason; an answer needs a stream.
        return std::future::pending().await;
    }
    loop {
        let now = now_s();
        if is_void(now) {
            return;
        }
        let left = Duration::from_secs(until_s - now + 1).min(EXPIRY_CHECK);
        if let Ok(Err(_)) = tokio::time::timeout(left, revocations.changed()).await {
            // The node leaves.
            return;
        }
    }
}

fn read_listen(path: &Path) -> Answer<SocketAddr> {
    let host = |why: String| {
        Fault::new(ErrorKind::Host, format!("{path:?} cannot be used: {why}"))
            .hint("vistara node ticket --listen ADDRESS:PORT")
    };
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(SocketAddr::from(([0, 0, 0, 0], 0)))
        }
        Err(error) => Err(host(error.to_string())),
        Ok(bytes) => match serde_json::from_slice::<Listen>(&bytes) {
            Ok(listen) if listen.format == FORMAT => Ok(listen.listen),
            Ok(listen) => Err(host(format!("its format is {}", listen.format))),
            Err(error) => Err(host(error.to_string())),
        },
    }
}

fn write_listen(path: &Path, listen: SocketAddr) -> Answer<()> {
    let fresh = path.with_extension("new");
    let kept = Listen {
        format: FORMAT,
        listen,
    };
    serde_json::to_vec(&kept)
        .map_err(std::io::Error::other)
        .and_then(|bytes| std::fs::write(&fresh, bytes))
        .and_then(|()| std::fs::rename(&fresh, path))
        .map_err(|error| Fault::new(ErrorKind::Host, format!("cannot write {path:?}: {error}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
