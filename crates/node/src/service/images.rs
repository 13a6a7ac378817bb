//! Images: listing, pulling, importing, naming, removing.

use super::App;
use super::templates;
use crate::fault::{Answer, Fault, blocking};
use crate::mesh::{Bringing, Caller};
use crate::{images, view};
use axum::body::Body;
use axum::extract::{Query, State};
use axum::response::Sse;
use axum::response::sse::Event;
use axum::{Extension, Json};
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use utoipa::IntoParams;
use vistara_api::{ErrorBody, ErrorKind, Image, ImageEvent, Pruned, PullRequest, RemovedImage};
use vistara_image::{ImageStore, PullOptions};
use vistara_model::ImageRef;

/// How much more of a refused archive is read, and for how long, so that its sender hears why.
const DISCARDED_MAX: u64 = 1 << 30;
const DISCARD_TIME_MAX: Duration = Duration::from_secs(30);

pub(super) fn sse<T: serde::Serialize>(
    events: impl Stream<Item = T> + Send + 'static,
) -> Sse<impl Stream<Item = Result<Event, Infallible>> + Send> {
    Sse::new(events.map(|event| {
        let text = serde_json::to_string(&event)
            .unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
        Ok(Event::default().data(text))
    }))
}

fn name(text: &str) -> Answer<ImageRef> {
    text.parse()
        .map_err(|error: vistara_model::ImageRefError| Fault::user(error.to_string()))
}

/// The store, for the owner or for somebody who brings something under a grant.
pub(super) fn store_for(app: &App, bringing: Option<Arc<Bringing>>) -> ImageStore {
    let store = app.node.mechanisms().images;
    match bringing {
        Some(bringing) => store.for_guest(bringing),
        None => store,
    }
}

/// All images.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<Image>)))]
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Image>>> {
    let store = app.node.mechanisms().images;
    let images = blocking(move || store.list()).await??;
    Ok(Json(
        images
            .iter()
            .map(|image| view::image(image, app.node.users_of(&image.id)))
            .collect(),
    ))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct ImageQuery {
    /// Name, id, or unambiguous beginning of an id.
    image: String,
    /// Also where several names or an ended machine refer to it.
    #[serde(default)]
    force: bool,
}

/// One image.
#[utoipa::path(
    get,
    path = "/v1/image",
    params(ImageQuery),
    responses((status = 200, body = Image), (status = 404, body = ErrorBody))
)]
pub(super) async fn inspect(
    State(app): State<App>,
    Query(query): Query<ImageQuery>,
) -> Answer<Json<Image>> {
    let image = app.node.image(&query.image)?;
    Ok(Json(view::image(&image, app.node.users_of(&image.id))))
}

/// Removes a name, or an image by its id.
#[utoipa::path(
    delete,
    path = "/v1/image",
    params(ImageQuery),
    responses((status = 200, body = RemovedImage), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Query(query): Query<ImageQuery>,
) -> Answer<Json<RemovedImage>> {
    let node = Arc::clone(&app.node);
    let removed = blocking(move || {
        let in_use = |id: &vistara_model::Digest| node.needs(id);
        node.mechanisms()
            .images
            .remove(&query.image, &in_use, query.force)
    })
    .await??;
    templates::forget_images(&app.node, removed.image.as_slice()).await;
    Ok(Json(RemovedImage {
        untagged: removed.names.iter().map(ImageRef::familiar).collect(),
        deleted: removed.image.map(|id| id.to_string()),
    }))
}

/// Pulls an image from its registry. Answers with events; the last is `done` or `failed`.
#[utoipa::path(
    post,
    path = "/v1/images/pull",
    request_body = PullRequest,
    responses((status = 200, content_type = "text/event-stream", body = ImageEvent), (status = 400, body = ErrorBody))
)]
pub(super) async fn pull(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(request): Json<PullRequest>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>> + Send>> {
    let image = name(&request.image)?;
    let store = store_for(&app, app.mesh.bringing(&app.node, &caller, true)?);
    let options = PullOptions {
        insecure_registries: if request.insecure {
            vec![image.registry.clone()]
        } else {
            Vec::new()
        },
        docker_config: match &caller {
            Caller::Owner => request.docker_config_dir.map(Into::into),
            // The directory is one of the caller's host; and the owner's own credentials are the owner's. There is nothing
            // of the kind in the mesh's.
            Caller::Foreign(_) | Caller::Refused(_) => Some(app.mesh.dir().to_owned()),
        },
        ..PullOptions::default()
    };
    Ok(sse(images::events(app.node, move |_, sink| async move {
        store.pull(&image, &options, &sink).await
    })))
}

/// Reads what else comes, within bounds: who still sends does not hear an answer that comes before the end.
async fn discard(chunks: &mut axum::body::BodyDataStream) {
    let mut left = DISCARDED_MAX;
    let read = async {
        while let Some(Ok(chunk)) = chunks.next().await {
            left = left.saturating_sub(chunk.len() as u64);
            if left == 0 {
                return;
            }
        }
    };
    // Whoever sends for longer is cut off.
    let _ = tokio::time::timeout(DISCARD_TIME_MAX, read).await;
}

/// Bytes of an archive that are asked for at once, before they come; more of a longer one.
const SPOOL_STEP: u64 = 256 << 10;

/// What of an archive may come, of somebody who has a limit.
struct Allowance {
    bringing: Option<Arc<Bringing>>,
    bytes: u64,
    allowed: u64,
}

impl Allowance {
    async fn take(&mut self, bytes: u64) -> Answer<()> {
        let Some(bringing) = &self.bringing else {
            return Ok(());
        };
        self.bytes += bytes;
        let lacking = self.bytes.saturating_sub(self.allowed);
        if lacking == 0 {
            return Ok(());
        }
        // Near the limit, only what is needed.
        let ahead = lacking.max(SPOOL_STEP).max(self.allowed / 8);
        let taken = match bringing.spool(ahead).await {
            Ok(()) => ahead,
            Err(_) => bringing.spool(lacking).await.map(|()| lacking)?,
        };
        self.allowed += taken;
        Ok(())
    }
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct ImportQuery {
    /// Name for the image; those in the archive where absent.
    name: Option<String>,
}

/// Imports an image archive, which is the request's body: an OCI layout, what `docker save` writes, or a root file
/// system, each as a tar, plain or compressed. Answers with events; the last is `done` or `failed`.
#[utoipa::path(
    post,
    path = "/v1/images/import",
    params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200, content_type = "text/event-stream", body = ImageEvent), (status = 400, body = ErrorBody))
)]
pub(super) async fn import(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>> + Send>> {
    let image_name = query.name.as_deref().map(name).transpose()?;
    let bringing = app.mesh.bringing(&app.node, &caller, true)?;
    let mut allowance = Allowance {
        bringing: bringing.clone(),
        bytes: 0,
        allowed: 0,
    };
    let store = store_for(&app, bringing);
    let spool = images::spool(&app.node)?;
    let mut file =
        tokio::fs::File::from_std(spool.reopen().map_err(|error| Fault::internal(&error))?);
    let mut chunks = body.into_data_stream();
    let no_room = |error: std::io::Error| {
        Fault::new(
            ErrorKind::Host,
            format!("the archive could not be stored: {error}"),
        )
        .hint("free some disk space: vistara images prune --all")
    };
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk
            .map_err(|error| Fault::user(format!("the archive did not arrive whole: {error}")))?;
        if let Err(fault) = allowance.take(chunk.len() as u64).await {
            discard(&mut chunks).await;
            return Err(
                fault.hint("ask the node's owner for a larger grant: vistara grant --max-disk …")
            );
        }
        file.write_all(&chunk).await.map_err(no_room)?;
    }
    file.flush().await.map_err(no_room)?;
    Ok(sse(images::events(app.node, move |_, sink| async move {
        // While it is unpacked it counts.
        let _allowance = allowance;
        let name = image_name.as_ref();
        store.import(spool.path(), name, None, &sink).await
    })))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct TagQuery {
    /// Name, id, or unambiguous beginning of an id.
    image: String,
    /// The further name.
    name: String,
}

/// Gives an image one more name.
#[utoipa::path(
    post,
    path = "/v1/images/tag",
    params(TagQuery),
    responses((status = 200, body = Image), (status = 404, body = ErrorBody))
)]
pub(super) async fn tag(
    State(app): State<App>,
    Query(query): Query<TagQuery>,
) -> Answer<Json<Image>> {
    let new = name(&query.name)?;
    let store = app.node.mechanisms().images;
    let image = blocking(move || store.tag(&query.image, &new)).await??;
    Ok(Json(view::image(&image, app.node.users_of(&image.id))))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PruneQuery {
    /// Also images that have a name.
    #[serde(default)]
    all: bool,
}

/// Removes images that no machine uses, and everything that belongs to no image.
#[utoipa::path(post, path = "/v1/images/prune", params(PruneQuery), responses((status = 200, body = Pruned)))]
pub(super) async fn prune(
    State(app): State<App>,
    Query(query): Query<PruneQuery>,
) -> Answer<Json<Pruned>> {
    let node = Arc::clone(&app.node);
    let pruned = blocking(move || {
        let in_use = |id: &vistara_model::Digest| node.users_of(id) > 0;
        node.mechanisms().images.prune(&in_use, query.all)
    })
    .await??;
    templates::forget_images(&app.node, &pruned.images).await;
    Ok(Json(Pruned {
        deleted: pruned.images.iter().map(ToString::to_string).collect(),
        freed_bytes: pruned.bytes,
    }))
}
