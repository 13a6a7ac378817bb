//! Named volumes: listing, making, removing.

use super::App;
use crate::fault::{Answer, blocking};
use crate::node::Node;
use crate::view;
use crate::volumes::Kept;
use axum::Json;
use axum::extract::{Path, State};
use std::sync::Arc;
use vistara_api::{CreateVolumeRequest, ErrorBody, Volume};

fn shown(node: &Node, kept: Kept) -> Volume {
    Volume {
        machine: node.user_of_volume(&kept.name),
        name: kept.name,
        size_bytes: kept.size.0,
        stored_bytes: kept.stored.0,
        changed_at: view::time(kept.changed_ns),
    }
}

/// All named volumes, by name.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = Vec<Volume>), (status = "5XX", body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Volume>>> {
    let volumes = app.node.volumes();
    let all = blocking(move || volumes.list()).await??;
    let shown = all.into_iter().map(|kept| shown(&app.node, kept));
    Ok(Json(shown.collect()))
}

/// Makes a volume, unless there is one of this name.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    request_body = CreateVolumeRequest,
    responses((status = 200, body = Volume), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Json(request): Json<CreateVolumeRequest>,
) -> Answer<Json<Volume>> {
    let volumes = app.node.volumes();
    let name = request.name;
    let made = blocking(move || {
        volumes.get_or_make(&name)?;
        volumes.find(&name)
    })
    .await??;
    Ok(Json(shown(&app.node, made)))
}

/// Removes a volume and all that is on it.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    params(("name" = String, Path, description = "The volume's name")),
    responses((status = 200, body = String), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<String>> {
    let volumes = app.node.volumes();
    let held = Arc::clone(&app.node).hold_volume(&name)?;
    let removed = name.clone();
    blocking(move || {
        let done = volumes.remove(&removed);
        drop(held);
        done
    })
    .await??;
    Ok(Json(name))
}
