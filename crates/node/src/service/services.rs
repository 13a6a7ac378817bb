//! Services over the interface: the owner's orders, what is known of them, and what nodes that look after them say to each other.

use super::App;
use crate::fault::{Answer, Fault};
use crate::mesh::{Caller, lock};
use crate::request;
use crate::services::{Draft, DraftTask, Kind, Made, Shown, id_text};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use futures_util::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use vistara_api::{
    CreateServiceRequest, ErrorBody, ErrorKind, ScaleServiceRequest, Service, ServiceCopy,
    ServiceNode,
};
use vistara_control::placement::{Policy, read_policy};
use vistara_control::services::wire::{self, FromNode, Keeping};
use vistara_control::services::{End, Keepers, ServiceId};
use vistara_mesh::service::Placement;
use vistara_model::{MachineState, NodeId};

/// How long a new service's keepers are waited for, and how long those that are to forget one.
const KEEPERS_BOUND: Duration = Duration::from_secs(10);
const FORGOTTEN_BOUND: Duration = Duration::from_secs(12);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What stands where a service's name does, and is none.
const RESERVED: &str = "message";
/// How a slot is that nobody has, and one whose node does not say.
pub(super) const EMPTY: &str = "empty";
const AWAY: &str = "away";
/// Nodes asked at a time.
const ASKED_AT_ONCE: usize = 32;

fn nodes(texts: &[String]) -> Answer<Vec<NodeId>> {
    let parsed = texts.iter().map(|text| text.parse::<NodeId>());
    Ok(parsed.collect::<Result<_, _>>()?)
}

/// What of a machine's request a copy or a task cannot have, in words.
fn refused(machine: &vistara_api::RunRequest) -> Option<&'static str> {
    [
        (!machine.volumes.is_empty(), "directories and volumes"),
        (!machine.ports.is_empty(), "published ports"),
        (machine.huge_pages, "huge pages"),
        (machine.stdin, "standard input"),
        (machine.tty.is_some(), "a terminal"),
        (machine.auto_remove, "being removed at its end"),
        (machine.timeout_ms.is_some(), "a time limit"),
        (machine.name.is_some(), "a machine's name"),
        (machine.kernel.is_some(), "a kernel by name"),
    ]
    .into_iter()
    .find_map(|(asked, what)| asked.then_some(what))
}

/// Has copies of a machine run among nodes, whoever of them dies. Answers once most of those that look after it know of it.
#[utoipa::path(
    post,
    path = "/v1/services",
    request_body = CreateServiceRequest,
    responses((status = 200, body = Service), (status = "4XX", body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Json(wish): Json<CreateServiceRequest>,
) -> Answer<Json<Service>> {
    let draft = draft(&app, wish, None).await?;
    let made = app.services.create(draft).await?;
    let (shown, heard) = begun(&app, made, Kind::Service).await?;
    Ok(Json(view(&app, &shown, heard).await?))
}

/// What is asked for, as far as this node can tell that it makes sense.
pub(super) async fn draft(
    app: &App,
    mut wish: CreateServiceRequest,
    task: Option<DraftTask>,
) -> Answer<Draft> {
    if let Some(what) = refused(&wish.machine) {
        let (whose, why) = match task {
            None => (
                "a service's copies do",
                "it is started again when it ends, on whichever node: leave that out",
            ),
            Some(_) => ("a task does", "it runs on whichever node: leave that out"),
        };
        return Err(Fault::user(format!("{whose} not get {what}")).hint(why));
    }
    if wish.name == RESERVED && task.is_none() {
        return Err(Fault::user(format!("no service is called {RESERVED:?}")));
    }
    if let Some(rules) = &wish.rules {
        read_policy(rules.as_bytes()).map_err(|error| Fault::user(error.to_string()))?;
    }
    if let Some(name) = &wish.policy
        && Policy::named(name).is_none()
    {
        return Err(Fault::user(format!("there is no policy {name:?}")).hint(
            "spread, pack, nearest, cheapest, image-local, or a file with hypercore's policy",
        ));
    }
    let image = app.node.image(&wish.machine.image)?;
    let called = called(&wish.machine.image, image.id.as_ref());
    wish.machine.image = image.id.to_string();
    // What no node would take is told now.
    let mut asked = wish.machine.clone();
    asked.name = None;
    app.node
        .decide(&asked, crate::node::Look::IfItMatters)
        .await?;
    let request = serde_json::to_vec(&wish.machine).map_err(|error| Fault::internal(&error))?;
    Ok(Draft {
        replicas: wish.replicas,
        image: image.id,
        memory: request::memory(wish.machine.memory.as_ref())?,
        cpus: request::cpus(wish.machine.cpus.as_ref())?,
        hypervisor: request::hypervisor(wish.machine.hypervisor.as_ref())?,
        request,
        placement: Placement {
            policy: wish.policy,
            rules: wish.rules,
            regions: wish.regions,
            capabilities: wish.capabilities,
            price_micros_max: wish.price_micros_max,
            apart: wish.apart,
        },
        nodes: nodes(&wish.nodes)?,
        name: (!wish.name.is_empty() || task.is_none()).then_some(wish.name),
        called,
        task,
    })
}

/// A name from an image's: what comes after the last slash, without tag and digest; nothing of a digest alone.
fn called(image: &str, id: &str) -> String {
    let digits = id.rsplit(':').next().unwrap_or(id);
    if id.starts_with(image) || digits.starts_with(image) {
        return String::new();
    }
    let last = image.rsplit('/').next().unwrap_or_default();
    let bare = last.split(['@', ':']).next().unwrap_or_default();
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    (bare.to_ascii_lowercase().chars())
        .map(|letter| if plain(letter) { letter } else { '-' })
        .collect()
}

/// Waits until most of those that look after it know of it; where they do not, a service is taken back. A task stays: what was
/// said to them may have arrived, and its program may run, though nobody could answer; its key is to find it then.
pub(super) async fn begun(app: &App, made: Made, kind: Kind) -> Answer<(Shown, Heard)> {
    if made.known {
        let heard = gather(app, &made.shown).await;
        return Ok((made.shown, heard));
    }
    let id = id_text(ServiceId(made.shown.sealed.document().service));
    let majority = (made.shown.keepers.as_ref()).map_or(1, |keepers| keepers.majority());
    let deadline = Instant::now() + KEEPERS_BOUND;
    loop {
        let shown = one(app, kind, &id).await?;
        let heard = gather(app, &shown).await;
        if heard.keeping >= majority {
            return Ok((shown, heard));
        }
        if Instant::now() >= deadline {
            let few = format!(
                "of the nodes that are to look after it {} took it on, and {majority} are needed",
                heard.keeping
            );
            let fault = Fault::new(ErrorKind::Peer, few);
            return Err(match kind {
                Kind::Service => {
                    app.services.remove(kind, &id).await?;
                    fault.hint("`vistara nodes` shows which answer; does each grant the right to run?")
                }
                Kind::Task => fault.hint(format!(
                    "it may have begun all the same: `vistara task wait {id}` tells, `vistara task rm {id}` ends it"
                )),
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub(super) async fn one(app: &App, kind: Kind, typed: &str) -> Answer<Shown> {
    let mut found = app.services.show(kind, Some(typed)).await?;
    found.pop().ok_or_else(|| Fault::conflict("it is gone"))
}

/// What all nodes of a service say.
pub(super) struct Heard {
    /// The newest of what keepers know, and how many they are.
    pub(super) newest: Option<Keeping>,
    keeping: usize,
    pub(super) copies: BTreeMap<(u32, NodeId), wire::Copy>,
    /// What each of those keepers has noted as over.
    pub(super) ends: Vec<BTreeMap<u32, End>>,
}

pub(super) async fn gather(app: &App, shown: &Shown) -> Heard {
    let own = app.mesh.open().await.map(|open| open.identity.id());
    let ask = |node: NodeId| {
        let (services, sealed) = (app.services.clone(), Arc::clone(&shown.sealed));
        async move {
            let answer = services.status_of(node, &sealed).await?;
            match answer.body {
                FromNode::Status(status) => Some((node, status, BTreeMap::new())),
                FromNode::Task { status, ends } => Some((node, status, ends)),
                FromNode::Keeper(_)
                | FromNode::Nothing
                | FromNode::Unknown
                | FromNode::Refused(_)
                | FromNode::Offered { .. } => None,
            }
        }
    };
    let asked: Vec<_> = shown.others.iter().copied().map(ask).collect();
    let mut all: Vec<(NodeId, wire::Status, BTreeMap<u32, End>)> =
        futures_util::stream::iter(asked)
            .buffer_unordered(ASKED_AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
    if let Ok(own) = own {
        all.push((own, shown.status.clone(), shown.ends.clone()));
    }
    let mut heard = Heard {
        newest: None,
        keeping: 0,
        copies: BTreeMap::new(),
        ends: Vec::new(),
    };
    let keepers = believed(shown.keepers.as_ref(), &all);
    for (node, status, ends) in all {
        for copy in status.copies {
            heard.copies.insert((copy.number, node), copy);
        }
        let Some(keeping) = status.keeping.filter(|_| keepers.contains(&node)) else {
            continue;
        };
        let epoch = |keeping: &Keeping| keeping.keepers.epoch;
        // Of one epoch the first keeper's word counts most; any will do.
        match heard.newest.as_ref().map(epoch).cmp(&Some(epoch(&keeping))) {
            std::cmp::Ordering::Less => {
                heard.keeping = 1;
                heard.ends = vec![ends];
                heard.newest = Some(keeping);
            }
            std::cmp::Ordering::Equal => {
                heard.keeping += 1;
                heard.ends.push(ends);
                let held = |keeping: &Keeping| {
                    keeping
                        .slots
                        .iter()
                        .filter(|slot| slot.holder.is_some())
                        .count()
                };
                if heard
                    .newest
                    .as_ref()
                    .is_some_and(|newest| held(newest) < held(&keeping))
                {
                    let before = heard.newest.replace(keeping);
                    keep_troubles(&mut heard.newest, before);
                } else {
                    keep_troubles(&mut heard.newest, Some(keeping));
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    heard
}

/// Those that are known to keep it, and those that they say keep it by now. What others say of its slots and ends, which the document
/// merely names, counts for nothing.
fn believed(
    known: Option<&Keepers>,
    all: &[(NodeId, wire::Status, BTreeMap<u32, End>)],
) -> BTreeSet<NodeId> {
    let known = known.into_iter().flat_map(|keepers| &keepers.nodes);
    let mut believed: BTreeSet<NodeId> = known.copied().collect();
    loop {
        let before = believed.len();
        for (node, status, _) in all {
            if let Some(keeping) = status.keeping.as_ref().filter(|_| believed.contains(node)) {
                believed.extend(&keeping.keepers.nodes);
            }
        }
        if believed.len() == before {
            return believed;
        }
    }
}

/// Only who oversees knows what is in the way of a slot.
fn keep_troubles(newest: &mut Option<Keeping>, other: Option<Keeping>) {
    let (Some(newest), Some(other)) = (newest, other) else {
        return;
    };
    for slot in &mut newest.slots {
        if slot.trouble.is_none() {
            let same = other.slots.iter().find(|one| one.number == slot.number);
            slot.trouble = same.and_then(|one| one.trouble.clone());
        }
    }
}

pub(super) async fn named(app: &App, node: NodeId) -> Answer<ServiceNode> {
    let own = app.mesh.open().await?.identity.id() == node;
    let member = app.mesh.member(&node);
    let life = match member {
        _ if own => "here",
        Some(member) => member.word(),
        None => "unknown",
    };
    let known = {
        let open = app.mesh.open().await?;
        let peers = lock(&open.peers);
        peers.get(&node).and_then(|peer| peer.name.clone())
    };
    Ok(ServiceNode {
        id: node.to_string(),
        name: match own {
            true => "here".to_owned(),
            false => known.unwrap_or_else(|| node.short()),
        },
        life: life.to_owned(),
    })
}

pub(super) async fn all_named(
    app: &App,
    nodes: impl Iterator<Item = NodeId>,
) -> Answer<Vec<ServiceNode>> {
    let mut all = Vec::new();
    for node in nodes {
        all.push(named(app, node).await?);
    }
    Ok(all)
}

/// One slot, by what keepers and holders say.
pub(super) async fn copy(app: &App, heard: &Heard, number: u32) -> Answer<ServiceCopy> {
    let slots = heard.newest.iter().flat_map(|keeping| &keeping.slots);
    let slot = slots.into_iter().find(|slot| slot.number == number);
    let of_it = heard.copies.range((number, NodeId::from_bytes([0; 32]))..);
    let of_it: Vec<_> = of_it.take_while(|((slot, _), _)| *slot == number).collect();
    let newest = of_it.iter().max_by_key(|(_, copy)| copy.generation);
    let holder = slot.and_then(|slot| slot.holder);
    // What the holder says; what anybody says who has it; that somebody has it who says nothing.
    let copy = holder.map_or(newest, |holder| {
        of_it.iter().find(|((_, node), _)| *node == holder)
    });
    let node = copy.map(|((_, node), _)| *node).or(holder);
    let copy = copy.map(|(_, copy)| *copy);
    let generation = slot.map_or(0, |slot| slot.generation.0);
    Ok(ServiceCopy {
        slot: number,
        generation: copy.map_or(generation, |copy| copy.generation.0),
        node: match node {
            Some(node) => Some(named(app, node).await?),
            None => None,
        },
        machine: copy.and_then(|copy| copy.machine.clone()),
        state: match (copy, holder) {
            (Some(copy), _) => copy.state.clone(),
            (None, Some(_)) => AWAY.to_owned(),
            (None, None) => EMPTY.to_owned(),
        },
        restarts: copy.map_or(0, |copy| copy.restarts),
        message: (copy.and_then(|copy| copy.trouble.clone()))
            .or_else(|| slot.filter(|_| copy.is_none())?.trouble.clone()),
    })
}

async fn view(app: &App, shown: &Shown, heard: Heard) -> Answer<Service> {
    let document = shown.sealed.document();
    let own = app.mesh.open().await?.identity.id();
    let keepers = heard.newest.as_ref().map(|keeping| keeping.keepers.clone());
    let keepers = keepers.or_else(|| shown.keepers.clone());
    let mut copies = Vec::new();
    for number in 0..document.replicas {
        copies.push(copy(app, &heard, number).await?);
    }
    let runs = MachineState::Running.to_string();
    let running = copies.iter().filter(|copy| copy.state == runs).count();
    Ok(Service {
        id: id_text(ServiceId(document.service)),
        name: document.name.clone(),
        owner: document.owner.to_string(),
        own: document.owner == own,
        image_id: document.image.to_string(),
        version: document.version,
        wanted: document.replicas,
        running: u32::try_from(running).unwrap_or(u32::MAX),
        epoch: keepers.as_ref().map_or(0, |keepers| keepers.epoch),
        keepers: all_named(app, keepers.into_iter().flat_map(|keepers| keepers.nodes)).await?,
        nodes: all_named(app, document.nodes.iter().map(|one| one.node)).await?,
        copies,
        unattended: heard.newest.is_none(),
    })
}

/// The services that this node knows: its owner's, and those that it looks after or runs copies of.
#[utoipa::path(get, path = "/v1/services", responses((status = 200, body = Vec<Service>)))]
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Service>>> {
    let mut all = Vec::new();
    for shown in app.services.show(Kind::Service, None).await? {
        let heard = gather(&app, &shown).await;
        all.push(view(&app, &shown, heard).await?);
    }
    all.sort_by(|one, other| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
    Ok(Json(all))
}

/// Everything known of one service.
#[utoipa::path(
    get,
    path = "/v1/services/{service}",
    params(("service" = String, Path, description = "Name, id, or unambiguous beginning of an id")),
    responses((status = 200, body = Service), (status = 404, body = ErrorBody))
)]
pub(super) async fn inspect(
    State(app): State<App>,
    Path(service): Path<String>,
) -> Answer<Json<Service>> {
    let shown = one(&app, Kind::Service, &service).await?;
    let heard = gather(&app, &shown).await;
    Ok(Json(view(&app, &shown, heard).await?))
}

/// Wants another number of copies.
#[utoipa::path(
    post,
    path = "/v1/services/{service}/scale",
    params(("service" = String, Path, description = "Name, id, or unambiguous beginning of an id")),
    request_body = ScaleServiceRequest,
    responses((status = 200, body = Service), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn scale(
    State(app): State<App>,
    Path(service): Path<String>,
    Json(wish): Json<ScaleServiceRequest>,
) -> Answer<Json<Service>> {
    let on = wish.nodes.as_deref().map(nodes).transpose()?;
    let shown = app.services.scale(&service, wish.replicas, on).await?;
    let heard = gather(&app, &shown).await;
    Ok(Json(view(&app, &shown, heard).await?))
}

/// Removes a service with all its copies. Answers with the nodes that have not said so: what runs there ends with its lease,
/// and they are told when they are back.
#[utoipa::path(
    delete,
    path = "/v1/services/{service}",
    params(("service" = String, Path, description = "Name, id, or unambiguous beginning of an id")),
    responses((status = 200, body = Vec<ServiceNode>), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(service): Path<String>,
) -> Answer<Json<Vec<ServiceNode>>> {
    Ok(Json(removed(&app, Kind::Service, &service).await?))
}

/// Removes it, and waits a while for those that are to forget it.
pub(super) async fn removed(app: &App, kind: Kind, typed: &str) -> Answer<Vec<ServiceNode>> {
    let shown = app.services.remove(kind, typed).await?;
    let own = app.mesh.open().await?.identity.id();
    let deadline = Instant::now() + FORGOTTEN_BOUND;
    let id = id_text(ServiceId(shown.sealed.document().service));
    loop {
        let here = app.node.all().iter().any(|handle| {
            let record = handle.record();
            record
                .copy_of
                .as_ref()
                .is_some_and(|copy| copy.service == id)
        });
        let mut late = app.services.late(&id).await?;
        if here {
            late.insert(own);
        }
        let patient = late
            .iter()
            .any(|node| shown.others.contains(node) || *node == own);
        if !patient || Instant::now() >= deadline {
            return all_named(app, late.into_iter()).await;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What a node that looks after a service, or runs copies of it, says to another. See `docs/formats/services.md`.
#[utoipa::path(
    post,
    path = "/v1/services/message",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn message(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer<impl IntoResponse> {
    let Some(from) = app.asker(&caller)?.node() else {
        return Err(Fault::user(
            "this is for other nodes; see `vistara service` and `vistara task`",
        ));
    };
    let _seat = app.services.admit(from).await?;
    let body = axum::body::to_bytes(body, wire::MESSAGE_BYTES_MAX);
    let body = tokio::time::timeout(crate::services::ARRIVAL_BOUND, body).await;
    let body = body.map_err(|_| Fault::user("the message does not arrive in time"))?;
    let body = body.map_err(|error| Fault::user(error.to_string()))?;
    let read = wire::Request::decode(&body).map_err(|error| Fault::user(error.to_string()))?;
    let answer = app.services.hear(from, read).await?;
    let bytes = answer.encode().map_err(|error| Fault::internal(&error))?;
    let kind = axum::http::header::CONTENT_TYPE;
    Ok(([(kind, "application/octet-stream")], bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepers_and_those_that_they_name_are_believed_and_nobody_else_is() {
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let keepers = |epoch, nodes: &[u8]| Keepers {
            epoch,
            nodes: nodes.iter().copied().map(node).collect(),
        };
        let says = |number: u8, keepers| {
            let keeping = Some(Keeping {
                keepers,
                slots: Vec::new(),
            });
            let status = wire::Status {
                keeping,
                copies: Vec::new(),
            };
            (node(number), status, BTreeMap::new())
        };
        // The fourth keeps since a change that the second tells of; the ninth is merely named, and names itself.
        let all = [
            says(9, keepers(1 << 40, &[9])),
            says(4, keepers(2, &[2, 3, 4, 5])),
            says(2, keepers(2, &[2, 3, 4])),
        ];
        let found = believed(Some(&keepers(1, &[1, 2, 3])), &all);
        assert_eq!(found, (1..=5).map(node).collect::<BTreeSet<_>>());
        assert_eq!(believed(None, &all), BTreeSet::new());
    }
}
