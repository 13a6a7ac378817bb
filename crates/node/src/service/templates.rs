//! Templates: listing, making, removing.

use super::App;
use crate::fault::{Answer, Fault};
use crate::machine::now_ns;
use crate::node::Node;
use crate::templates::Listed;
use crate::view;
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Instant;
use utoipa::IntoParams;
use vistara_api::{CreateTemplateRequest, CreatedTemplate, ErrorBody, Pruned, Template};
use vistara_control::{Held, lookup, unused_since};

fn shown(node: &Node, listed: &Listed) -> Template {
    let key = &listed.kept.key;
    view::template(listed, node.forks_of(key), node.stock().count_of(key))
}

/// All templates, newest first.
#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = Vec<Template>)))]
pub(super) async fn list(State(app): State<App>) -> Json<Vec<Template>> {
    let all = app.node.templates().list().await;
    Json(all.iter().map(|listed| shown(&app.node, listed)).collect())
}

/// Makes a template, unless it is there; answers when it is ready.
#[utoipa::path(
    post,
    path = "/v1/templates",
    request_body = CreateTemplateRequest,
    responses((status = 200, body = CreatedTemplate), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Json(request): Json<CreateTemplateRequest>,
) -> Answer<Json<CreatedTemplate>> {
    let begin = Instant::now();
    let (template, created) = app.node.make_template(&request).await?;
    let listed = Listed {
        disk_bytes: 0,
        resident_bytes: template.capture.resident_bytes(),
        used_ns: now_ns(),
        kept: template.kept.clone(),
    };
    // What its directory takes is known where it was written before.
    let all = app.node.templates().list().await;
    let listed = all
        .into_iter()
        .find(|known| known.kept.key == listed.kept.key)
        .unwrap_or(listed);
    Ok(Json(CreatedTemplate {
        template: shown(&app.node, &listed),
        created,
        took_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
    }))
}

/// Removes a template. Machines forked from it go on.
#[utoipa::path(
    delete,
    path = "/v1/templates/{key}",
    params(("key" = String, Path, description = "Key, or an unambiguous beginning of it")),
    responses((status = 200, body = String), (status = 404, body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(typed): Path<String>,
) -> Answer<Json<String>> {
    let templates = app.node.templates();
    let all = templates.list().await;
    let keys = all
        .iter()
        .map(|listed| (listed.kept.key.as_str(), listed.kept.key.as_str()));
    let key = lookup(&typed, keys).map_err(|error| {
        Fault::lookup(error, "template", "keys").hint("see `vistara template ls`")
    })?;
    templates.remove(key).await;
    Ok(Json(key.to_owned()))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PruneQuery {
    /// Only those that were not used for so many milliseconds.
    #[serde(default)]
    unused_ms: u64,
    /// Also those from which a machine was forked that has not ended.
    #[serde(default)]
    all: bool,
}

/// Removes templates.
#[utoipa::path(post, path = "/v1/templates/prune", params(PruneQuery), responses((status = 200, body = Pruned)))]
pub(super) async fn prune(
    State(app): State<App>,
    Query(query): Query<PruneQuery>,
) -> Answer<Json<Pruned>> {
    let templates = app.node.templates();
    let all = templates.list().await;
    let candidates: Vec<Held> = all
        .iter()
        .filter(|listed| query.all || app.node.forks_of(&listed.kept.key) == 0)
        .map(|listed| Held {
            key: listed.kept.key.clone(),
            bytes: listed.disk_bytes,
            used_ns: listed.used_ns,
        })
        .collect();
    let before = now_ns().saturating_sub(query.unused_ms.saturating_mul(1_000_000));
    let mut pruned = Pruned {
        deleted: Vec::new(),
        freed_bytes: 0,
    };
    for key in unused_since(&candidates, before) {
        if templates.remove(&key).await {
            let bytes = candidates.iter().find(|held| held.key == key);
            pruned.freed_bytes += bytes.map_or(0, |held| held.bytes);
            pruned.deleted.push(key);
        }
    }
    Ok(Json(pruned))
}

/// Forgets the templates of images that were removed.
pub(super) async fn forget_images(node: &Arc<Node>, images: &[vistara_model::Digest]) {
    for image in images {
        node.templates().remove_of_image(image).await;
    }
}
