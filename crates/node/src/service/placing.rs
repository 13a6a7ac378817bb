//! Placement over the interface: statements, offers, and the choice of a node.

use super::App;
use crate::fault::{Answer, Fault, blocking};
use crate::mesh::{Caller, Heard, place_number as number, relays_of};
use crate::{request, view};
use axum::extract::{Path, State};
use axum::{Extension, Json};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::sync::Arc;
use vistara_api::{
    ErrorBody, NodeStatement, NodeTerms, OfferAnswer, OfferRequest, PlaceRequest, Placed,
    StatedFacts,
};
use vistara_control::placement::{Policy, RequestId, read_policy};
use vistara_model::{
    Architecture, Bytes, Constraints, ImageMark, LABEL_BYTES_MAX, LABELS_MAX, NodeId, Wanted,
};

/// What was heard of a node, as it is shown.
pub(super) fn shown(heard: &Heard) -> StatedFacts {
    let facts = &heard.facts;
    StatedFacts {
        heard_at: view::time(heard.at_ns),
        rtt_us: (heard.rtt).map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
        cpus: facts.cpus,
        arch: facts.arch.to_string(),
        memory_bytes: facts.capacity.memory.0,
        memory_free_bytes: facts.free.memory.0,
        machines_free: facts.free.machines,
        hypervisors: facts.hypervisors.iter().map(ToString::to_string).collect(),
        kvm: facts.kvm,
        region: facts.region.clone(),
        price_micros: facts.price_micros,
        labels: facts.labels.iter().cloned().collect(),
        draining: facts.terms.draining,
    }
}

/// What this node states about itself, signed.
#[utoipa::path(get, path = "/v1/facts", responses((status = 200, body = NodeStatement), (status = 503, body = ErrorBody)))]
pub(super) async fn facts(State(app): State<App>) -> Answer<Json<NodeStatement>> {
    let statement = app.placing.statement().await?;
    Ok(Json(NodeStatement {
        statement: STANDARD.encode(statement),
    }))
}

/// What the owner has this node say of itself.
#[utoipa::path(get, path = "/v1/mesh/terms", responses((status = 200, body = NodeTerms)))]
pub(super) async fn terms(State(app): State<App>) -> Answer<Json<NodeTerms>> {
    let placing = Arc::clone(&app.placing);
    Ok(Json(blocking(move || placing.terms()).await??))
}

/// Has this node say something else of itself.
#[utoipa::path(
    post,
    path = "/v1/mesh/terms",
    request_body = NodeTerms,
    responses((status = 200, body = NodeTerms), (status = 400, body = ErrorBody))
)]
pub(super) async fn set_terms(
    State(app): State<App>,
    Json(terms): Json<NodeTerms>,
) -> Answer<Json<NodeTerms>> {
    let plain = |text: &String| {
        (1..=LABEL_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if terms.labels.len() > LABELS_MAX || !terms.labels.iter().chain(&terms.region).all(plain) {
        return Err(Fault::user(format!(
            "a region and at most {LABELS_MAX} labels have 1 to {LABEL_BYTES_MAX} printable letters each, without spaces"
        )));
    }
    relays_of(&terms)?;
    // Its directory and key are made where there are none.
    app.mesh.open().await?;
    let (placing, private) = (Arc::clone(&app.placing), terms.private);
    let kept = blocking(move || placing.set_terms(&terms).map(|()| terms)).await??;
    app.mesh.terms_changed(private).await?;
    Ok(Json(kept))
}

async fn own(app: &App) -> Answer<NodeId> {
    Ok(app.mesh.open().await?.identity.id())
}

/// Who asks, as a key.
async fn from(app: &App, caller: &Caller) -> Answer<NodeId> {
    match app.asker(caller)?.node() {
        Some(node) => Ok(node),
        None => own(app).await,
    }
}

/// Offers a place for a machine, and holds it for a while.
#[utoipa::path(
    post,
    path = "/v1/offers",
    request_body = OfferRequest,
    responses((status = 200, body = OfferAnswer), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn offer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(wish): Json<OfferRequest>,
) -> Answer<Json<OfferAnswer>> {
    let request = number(&wish.request)?;
    let (own, asker) = (own(&app).await?, app.asker(&caller)?);
    let placing = Arc::clone(&app.placing);
    let offer =
        blocking(move || placing.offer(own, &asker, request, Bytes(wish.memory_bytes))).await??;
    Ok(Json(OfferAnswer {
        ttl_ms: u64::try_from(offer.ttl.as_millis()).unwrap_or(u64::MAX),
        memory_free_bytes: offer.free.memory.0,
        machines_free: offer.free.machines,
        price_micros: offer.price_micros,
    }))
}

/// Takes an offer.
#[utoipa::path(
    post,
    path = "/v1/offers/{offer}/take",
    params(("offer" = String, Path, description = "The request's number")),
    responses((status = 200), (status = 409, body = ErrorBody))
)]
pub(super) async fn take(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(offer): Path<String>,
) -> Answer<Json<()>> {
    let from = from(&app, &caller).await?;
    app.placing.take(from, number(&offer)?)?;
    Ok(Json(()))
}

/// Gives an offer back.
#[utoipa::path(
    delete,
    path = "/v1/offers/{offer}",
    params(("offer" = String, Path, description = "The request's number")),
    responses((status = 200), (status = 400, body = ErrorBody))
)]
pub(super) async fn release(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(offer): Path<String>,
) -> Answer<Json<()>> {
    let from = from(&app, &caller).await?;
    app.placing.decline(from, number(&offer)?);
    Ok(Json(()))
}

/// Which node is to run a machine: this one, or one that has given a grant. The place is held there for half a minute.
#[utoipa::path(
    post,
    path = "/v1/place",
    request_body = PlaceRequest,
    responses((status = 200, body = Placed), (status = "4XX", body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub(super) async fn place(
    State(app): State<App>,
    Json(wish): Json<PlaceRequest>,
) -> Answer<Json<Placed>> {
    let mut ignored = Vec::new();
    let policy = match (&wish.rules, &wish.policy) {
        (Some(rules), _) => {
            let (rules, unknown) =
                read_policy(rules.as_bytes()).map_err(|error| Fault::user(error.to_string()))?;
            ignored = unknown;
            Policy::Weighted(rules)
        }
        (None, Some(name)) => Policy::named(name).ok_or_else(|| {
            Fault::user(format!("there is no policy {name:?}")).hint(
                "spread, pack, nearest, cheapest, image-local, or a file with hypercore's policy",
            )
        })?,
        (None, None) => Policy::default(),
    };
    let apart_from = wish.apart_from.iter().map(|node| node.parse());
    let apart_from = apart_from
        .collect::<Result<_, vistara_model::AuthorityError>>()
        .map_err(|error| Fault::user(error.to_string()))?;
    let image = wish.image.as_deref();
    let image = image.and_then(|image| app.node.image(image).ok());
    let wanted = Wanted {
        memory: request::memory(wish.memory.as_ref())?,
        cpus: request::cpus(wish.cpus.as_ref())?,
        arch: Architecture::host(),
        hypervisor: request::hypervisor(wish.hypervisor.as_ref())?,
        image: image.map(|image| ImageMark::of(&image.id)),
        constraints: Constraints {
            regions: wish.regions.into_iter().collect(),
            capabilities: wish.capabilities.into_iter().collect(),
            price_micros_max: wish.price_micros_max,
            apart_from,
            ..Constraints::default()
        },
    };
    let own = own(&app).await?;
    let mut placed = app.placing.place(own, wanted, policy).await?;
    placed.ignored = ignored;
    Ok(Json(placed))
}

/// Whether a machine may be made, under an offer or beside what others were promised; and what to give back afterwards.
pub(super) async fn admit(
    app: &App,
    caller: &Caller,
    offer: Option<&String>,
    memory: Option<&String>,
) -> Answer<Option<(NodeId, RequestId)>> {
    let offer = offer.map(|offer| number(offer)).transpose()?;
    if offer.is_none() && app.placing.promises_nothing() {
        // The usual case, which does not even need a key.
        return Ok(None);
    }
    let from = from(app, caller).await?;
    app.placing.admits(from, offer, request::memory(memory)?)?;
    Ok(offer.map(|offer| (from, offer)))
}
