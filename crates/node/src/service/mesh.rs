//! Other nodes: who this one is, which it has joined, what it has granted, and streams to them. For the owner only.

use super::App;
use super::ports::{switch, take_upgrade};
use crate::fault::{Answer, Fault, blocking};
use crate::mesh::{Given, Member, Open, lock, now_s, used};
use crate::view;
use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use vistara_api::{
    ErrorBody, GivenGrant, Grant, GrantRequest, JoinRequest, KeepGrantRequest, ListenRequest,
    MeshStatus, NODE_STREAM, NarrowRequest, NarrowedGrant, NodeStatus, PeerNode,
};
use vistara_control::{Standing, Usage};
use vistara_mesh::{Link, Narrowing, Peer, PeerState, Ticket, Token, Way};
use vistara_model::{Bytes, GrantId, GrantLimits, GrantTerms, MachineState, NodeId, Right};

/// Longest name of a node, in bytes: it stands in listings.
const NAME_MAX: usize = 63;

fn instant(seconds: u64) -> String {
    view::time(seconds.saturating_mul(1_000_000_000))
}

fn moment(text: &str) -> Answer<u64> {
    let time: jiff::Timestamp = text.parse().map_err(|_| {
        Fault::user(format!(
            "{text:?} is not a time: write it as 2026-12-31T12:00:00Z"
        ))
    })?;
    u64::try_from(time.as_second()).map_err(|_| Fault::user(format!("{text:?} lies before 1970")))
}

fn rights(words: &[String]) -> Answer<BTreeSet<Right>> {
    words
        .iter()
        .map(|word| Ok(word.parse::<Right>()?))
        .collect()
}

fn limits(
    memory: Option<&String>,
    machines: Option<u64>,
    disk: Option<&String>,
) -> Answer<GrantLimits> {
    let bytes = |text: Option<&String>| {
        text.map(|text| text.parse::<Bytes>())
            .transpose()
            .map_err(|error| Fault::user(error.to_string()))
    };
    Ok(GrantLimits {
        memory_max: bytes(memory)?,
        machines_max: machines,
        disk_max: bytes(disk)?,
    })
}

fn grant(terms: &GrantTerms, standing: Standing, usage: Option<(Usage, Bytes)>) -> Grant {
    let (usage, disk) = (usage.map(|(usage, _)| usage), usage.map(|(_, disk)| disk));
    let state = match standing {
        Standing::Revoked => "revoked",
        Standing::Unknown => "unknown",
        Standing::Live if now_s() > terms.until_s => "expired",
        Standing::Live => "live",
    };
    Grant {
        id: terms.id.to_string(),
        node: terms.node.to_string(),
        holder: terms.holder.to_string(),
        rights: terms.rights.iter().map(ToString::to_string).collect(),
        until: instant(terms.until_s),
        memory_max_bytes: terms.limits.memory_max.map(|bytes| bytes.0),
        machines_max: terms.limits.machines_max,
        disk_max_bytes: terms.limits.disk_max.map(|bytes| bytes.0),
        state: state.to_owned(),
        memory_used_bytes: usage.map(|usage| usage.memory.0),
        machines_used: usage.map(|usage| usage.machines),
        disk_used_bytes: disk.map(|bytes| bytes.0),
    }
}

async fn given(app: &App, given: &Given) -> Answer<Grant> {
    let records: Vec<_> = app
        .node
        .all()
        .iter()
        .map(|handle| handle.record())
        .collect();
    let standing = match given.revoked_s {
        Some(_) => Standing::Revoked,
        None => Standing::Live,
    };
    let usage = used(&given.terms.id, &records);
    let disk = app.mesh.brought_under(&app.node, &given.terms.id).await?;
    Ok(grant(&given.terms, standing, Some((usage, disk))))
}

fn peer(app: &App, peer: &Peer) -> PeerNode {
    let (state, generation, reason) = match app.mesh.state(&peer.id) {
        Some(PeerState::Connected { generation }) => ("connected", Some(generation), None),
        Some(PeerState::Connecting) => ("connecting", None, None),
        Some(PeerState::Away { reason, .. }) => ("away", None, Some(reason)),
        None => ("away", None, Some("this node does not listen".to_owned())),
    };
    let member = app.mesh.member(&peer.id);
    let link = app.mesh.link();
    let terms = peer
        .grant
        .as_ref()
        .and_then(|text| text.parse::<Token>().ok())
        .and_then(|token| token.unchecked_terms().ok());
    PeerNode {
        id: peer.id.to_string(),
        name: peer.name.clone(),
        addresses: peer.addresses.iter().map(ToString::to_string).collect(),
        state: state.to_owned(),
        life: member.map(|member| member.word().to_owned()),
        way: link.and_then(|link| link.way(&peer.id)).map(way),
        relays: peer.relays.iter().map(ToString::to_string).collect(),
        known: "joined".to_owned(),
        generation,
        reason,
        grant: terms.map(|terms| grant(&terms, Standing::Live, None)),
        facts: app
            .placing
            .heard(&peer.id)
            .as_ref()
            .map(super::placing::shown),
    }
}

/// A member of the network that was only heard of.
fn heard_of(app: &App, member: &Member) -> PeerNode {
    let link = app.mesh.link();
    let connected = (link.as_ref()).is_some_and(|link| link.is_connected(&member.id));
    let way = (link.as_ref())
        .and_then(|link| link.way(&member.id))
        .map(way);
    let stated = link.map(|link| link.stated(&member.id)).unwrap_or_default();
    let facts = app.placing.heard(&member.id);
    PeerNode {
        id: member.id.to_string(),
        name: None,
        addresses: stated.addresses.iter().map(ToString::to_string).collect(),
        relays: stated.relays.iter().map(ToString::to_string).collect(),
        way,
        state: if connected { "connected" } else { "idle" }.to_owned(),
        life: Some(member.word().to_owned()),
        known: "heard".to_owned(),
        generation: None,
        reason: None,
        grant: None,
        facts: facts.as_ref().map(super::placing::shown),
    }
}

fn way(way: Way) -> String {
    match way {
        Way::Direct => "direct".to_owned(),
        Way::Relayed => "relayed".to_owned(),
    }
}

/// A node that is neither joined nor heard of in the network, and speaks in the local one.
fn near(id: NodeId, addresses: &[SocketAddr]) -> PeerNode {
    PeerNode {
        id: id.to_string(),
        name: None,
        addresses: addresses.iter().map(ToString::to_string).collect(),
        state: "idle".to_owned(),
        life: None,
        way: None,
        relays: Vec::new(),
        known: "near".to_owned(),
        generation: None,
        reason: None,
        grant: None,
        facts: None,
    }
}

fn status(app: &App, open: &Open) -> MeshStatus {
    let id = open.identity.id();
    let link = app.mesh.link();
    let addresses = link
        .as_ref()
        .map(|link| link.addresses())
        .unwrap_or_default();
    let relays = link.as_ref().map(Link::relays).unwrap_or_default();
    let reachable = !addresses.is_empty() || !relays.is_empty();
    let ticket = reachable.then(|| Ticket {
        node: id,
        addresses: addresses.clone(),
        relays: relays.clone(),
    });
    MeshStatus {
        id: id.to_string(),
        generation: open.identity.generation(),
        on: link.is_some(),
        addresses: addresses.iter().map(ToString::to_string).collect(),
        ticket: ticket.map(|ticket| ticket.to_string()),
        relays: relays.iter().map(ToString::to_string).collect(),
        relay: (link.as_ref().and_then(Link::home)).map(|relay| relay.to_string()),
        relay_trouble: link.as_ref().and_then(Link::relay_trouble),
        local_discovery: link.is_some_and(|link| link.discovers()),
    }
}

/// The node on one page. Makes nothing.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = NodeStatus), (status = 503, body = ErrorBody)))]
pub(super) async fn page(State(app): State<App>) -> Answer<Json<NodeStatus>> {
    let version = super::system::own_version(&app);
    let placing = Arc::clone(&app.placing);
    let terms = blocking(move || placing.terms()).await??;
    let ended = (app.node.all().iter())
        .filter(|handle| handle.record().state == MachineState::Ended)
        .count();
    let mut page = NodeStatus {
        version,
        machines_ended: ended as u64,
        mesh: None,
        joined: 0,
        connected: 0,
        relayed: 0,
        members: BTreeMap::new(),
        grants_live: 0,
        terms,
    };
    if !app.mesh.has_key() {
        return Ok(Json(page));
    }
    let open = app.mesh.open().await?;
    let peers = lock(&open.peers).all().to_vec();
    page.joined = peers.len() as u64;
    if let Some(link) = app.mesh.link() {
        let state =
            |peer: &&Peer| matches!(link.state(&peer.id), Some(PeerState::Connected { .. }));
        let connected = peers.iter().filter(state);
        let ways: Vec<_> = connected.map(|peer| link.way(&peer.id)).collect();
        page.connected = ways.len() as u64;
        let relayed = ways.iter().filter(|way| **way == Some(Way::Relayed));
        page.relayed = relayed.count() as u64;
    }
    for member in app.mesh.members() {
        *page.members.entry(member.word().to_owned()).or_default() += 1;
    }
    let live = |given: &&Given| given.revoked_s.is_none() && given.terms.until_s >= now_s();
    page.grants_live = lock(&open.ledger).all().iter().filter(live).count() as u64;
    page.mesh = Some(status(&app, &open));
    Ok(Json(page))
}

/// This node among others. Makes its key where it has none.
#[utoipa::path(get, path = "/v1/mesh", responses((status = 200, body = MeshStatus), (status = 503, body = ErrorBody)))]
pub(super) async fn show(State(app): State<App>) -> Answer<Json<MeshStatus>> {
    let open = app.mesh.open().await?;
    Ok(Json(status(&app, &open)))
}

/// Listens for others from now on, also after a restart. Nobody is let in by it.
#[utoipa::path(
    post,
    path = "/v1/mesh",
    request_body = ListenRequest,
    responses((status = 200, body = MeshStatus), (status = "4XX", body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub(super) async fn listen(
    State(app): State<App>,
    Json(request): Json<ListenRequest>,
) -> Answer<Json<MeshStatus>> {
    let wish = match &request.listen {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            Fault::user(format!(
                "{text:?} is no address to listen on: write it as 0.0.0.0:4433 or [::]:4433"
            ))
        })?),
    };
    app.mesh.listen(wish).await?;
    app.mesh.settle_relays().await;
    let open = app.mesh.open().await?;
    Ok(Json(status(&app, &open)))
}

/// Listens no longer, and forgets every node that was joined.
#[utoipa::path(delete, path = "/v1/mesh", responses((status = 200), (status = 503, body = ErrorBody)))]
pub(super) async fn leave(State(app): State<App>) -> Answer<Json<()>> {
    app.mesh.leave().await?;
    Ok(Json(()))
}

/// The nodes that were joined, then those that were only heard of in their network, then those in the local network.
#[utoipa::path(get, path = "/v1/nodes", responses((status = 200, body = Vec<PeerNode>), (status = 503, body = ErrorBody)))]
pub(super) async fn nodes(State(app): State<App>) -> Answer<Json<Vec<PeerNode>>> {
    let open = app.mesh.open().await?;
    let peers = lock(&open.peers).all().to_vec();
    let joined: BTreeSet<NodeId> = peers.iter().map(|peer| peer.id).collect();
    let mut heard = app.mesh.members();
    heard.retain(|member| !joined.contains(&member.id));
    heard.sort_by_key(|member| member.id);
    let joined = peers.iter().map(|known| peer(&app, known));
    let known: BTreeSet<NodeId> = (peers.iter().map(|peer| peer.id))
        .chain(heard.iter().map(|member| member.id))
        .collect();
    let heard = heard.iter().map(|member| heard_of(&app, member));
    let mut around = app.mesh.link().map(|link| link.near()).unwrap_or_default();
    around.retain(|(node, _)| !known.contains(node));
    let around = around
        .iter()
        .map(|(node, addresses)| near(*node, addresses));
    Ok(Json(joined.chain(heard).chain(around).collect()))
}

/// Joins a node: dials it, and remembers it once it has answered.
#[utoipa::path(
    post,
    path = "/v1/nodes",
    request_body = JoinRequest,
    responses((status = 200, body = PeerNode), (status = "4XX", body = ErrorBody), (status = 502, body = ErrorBody))
)]
pub(super) async fn join(
    State(app): State<App>,
    Json(request): Json<JoinRequest>,
) -> Answer<Json<PeerNode>> {
    let ticket = app.mesh.ticket_of(&request.ticket).await?;
    let token = request
        .grant
        .as_deref()
        .map(str::parse::<Token>)
        .transpose()?;
    if let Some(name) = &request.name {
        let good = !name.is_empty()
            && name.len() <= NAME_MAX
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if !good {
            return Err(Fault::user(format!(
                "{name:?} is not a node's name: it takes 1 to {NAME_MAX} of a-z A-Z 0-9 _ . -"
            )));
        }
    }
    let (_, joined) = app.mesh.join(ticket, request.name, token).await?;
    Ok(Json(peer(&app, &joined)))
}

/// Forgets a node that was joined.
#[utoipa::path(
    delete,
    path = "/v1/nodes/{node}",
    params(("node" = String, Path, description = "Id, name here, or unambiguous beginning of an id")),
    responses((status = 200), (status = 404, body = ErrorBody))
)]
pub(super) async fn forget(State(app): State<App>, Path(node): Path<String>) -> Answer<Json<()>> {
    app.mesh.forget(&node).await?;
    Ok(Json(()))
}

/// Turns the connection into a stream to another node, on which the client speaks HTTP/1.1 with that node's interface.
/// Asks for `Upgrade: vistara-node-stream`.
#[utoipa::path(
    get,
    path = "/v1/nodes/{node}/stream",
    params(("node" = String, Path, description = "Id, name here, or unambiguous beginning of an id")),
    responses((status = 101), (status = "4XX", body = ErrorBody), (status = 502, body = ErrorBody))
)]
pub(super) async fn stream(
    State(app): State<App>,
    Path(node): Path<String>,
    mut request: Request,
) -> Answer<Response> {
    let upgrade = take_upgrade(&mut request, NODE_STREAM)?;
    let stream = app.mesh.stream_to(&node).await?;
    Ok(switch(upgrade, NODE_STREAM, stream))
}

/// What this node has granted, in the order in which it was.
#[utoipa::path(get, path = "/v1/grants", responses((status = 200, body = Vec<Grant>), (status = 503, body = ErrorBody)))]
pub(super) async fn grants(State(app): State<App>) -> Answer<Json<Vec<Grant>>> {
    let open = app.mesh.open().await?;
    let all = lock(&open.ledger).all().to_vec();
    let mut listed = Vec::with_capacity(all.len());
    for one in &all {
        listed.push(given(&app, one).await?);
    }
    Ok(Json(listed))
}

/// Lets somebody in.
#[utoipa::path(
    post,
    path = "/v1/grants",
    request_body = GrantRequest,
    responses((status = 200, body = GivenGrant), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn give(
    State(app): State<App>,
    Json(request): Json<GrantRequest>,
) -> Answer<Json<GivenGrant>> {
    let open = app.mesh.open().await?;
    let holder: NodeId = request.to.parse()?;
    if holder == open.identity.id() {
        return Err(Fault::user("a node's own key needs no grant on it"));
    }
    let rights = rights(&request.rights)?;
    if rights.is_empty() {
        return Err(Fault::user(
            "a grant is for something: run, network, images, admin",
        ));
    }
    let until_s = moment(&request.until)?;
    if until_s <= now_s() {
        return Err(Fault::user(format!("{} is over already", request.until)));
    }
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
    let terms = GrantTerms {
        id: GrantId::from_random(random),
        node: open.identity.id(),
        holder,
        rights,
        until_s,
        limits: limits(
            request.memory.as_ref(),
            request.machines,
            request.disk.as_ref(),
        )?,
    };
    let token = open.authority.give(&terms)?;
    let books = Arc::clone(&open);
    let entered = blocking(move || lock(&books.ledger).give(terms)).await??;
    Ok(Json(GivenGrant {
        grant: given(&app, &entered).await?,
        token: token.to_string(),
    }))
}

/// Takes a grant back. What is going on under it is cut off; its machines go on, and are the owner's to end.
#[utoipa::path(
    delete,
    path = "/v1/grants/{grant}",
    params(("grant" = String, Path, description = "The grant's id")),
    responses((status = 200, body = Grant), (status = 404, body = ErrorBody))
)]
pub(super) async fn revoke(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<Grant>> {
    let (_, revoked) = app.mesh.revoke(id.parse()?).await?;
    Ok(Json(given(&app, &revoked).await?))
}

/// Remembers a token that another node gave to this one.
#[utoipa::path(
    post,
    path = "/v1/grants/keep",
    request_body = KeepGrantRequest,
    responses((status = 200, body = PeerNode), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn keep(
    State(app): State<App>,
    Json(request): Json<KeepGrantRequest>,
) -> Answer<Json<PeerNode>> {
    let (_, known) = app.mesh.keep_grant(request.token.parse()?).await?;
    Ok(Json(peer(&app, &known)))
}

/// A token that allows less, or is for somebody else. No other node is asked.
#[utoipa::path(
    post,
    path = "/v1/grants/narrow",
    request_body = NarrowRequest,
    responses((status = 200, body = NarrowedGrant), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn narrow(
    State(app): State<App>,
    Json(request): Json<NarrowRequest>,
) -> Answer<Json<NarrowedGrant>> {
    let open = app.mesh.open().await?;
    let token: Token = request.token.parse()?;
    let narrowing = Narrowing {
        rights: request.rights.as_deref().map(rights).transpose()?,
        until_s: request.until.as_deref().map(moment).transpose()?,
        limits: limits(
            request.memory.as_ref(),
            request.machines,
            request.disk.as_ref(),
        )?,
        to: request.to.as_deref().map(str::parse).transpose()?,
    };
    let narrowed = token.narrow(&narrowing, &open.identity)?;
    Ok(Json(NarrowedGrant {
        token: narrowed.to_string(),
    }))
}
