//! Images' parts, for nodes that get images from one another: documents whole, layers in pieces, by digest.

use super::App;
use crate::fault::{Answer, Fault, blocking};
use crate::images;
use crate::mesh::Caller;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response, Sse};
use axum::{Extension, Json};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;
use std::convert::Infallible;
use std::io::{Seek, SeekFrom};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;
use vistara_api::{
    ErrorBody, ErrorKind, ImageEvent, ImageParts, LayerPart, ReceivedBlob, WantedLayer, WantedParts,
};
use vistara_image::Parts;
use vistara_model::{Digest, ImageRef, Right};

/// Longest piece that is given at a time.
const PIECE_BYTES_MAX: u64 = 16 << 20;
/// So much of a piece is in memory: others may have a thousand of them asked for, and read none.
const CHUNK_BYTES: usize = 64 << 10;
/// In so long a sender must have sent so much, some 16 KiB a second: nobody else can bring the same blob meanwhile.
const STALL_MAX: Duration = Duration::from_secs(20);
const STALL_BYTES_MIN: u64 = 320 << 10;
/// And after so long it is another's turn. Who is cut off goes on from where it was.
const TURN_MAX: Duration = Duration::from_secs(15 * 60);
/// Chunks between the line and the disk.
const CHUNKS_QUEUED: usize = 16;

pub(super) fn digest(text: &str) -> Answer<Digest> {
    text.parse()
        .map_err(|_| Fault::user(format!("{text:?} is no digest")))
}

fn parts(wire: &ImageParts) -> Answer<Parts> {
    let decode = |text: &String| {
        STANDARD
            .decode(text)
            .map_err(|_| Fault::user("a document of the image is not in base64"))
    };
    let layers = (wire.layers.iter())
        .map(|layer| Ok((digest(&layer.digest)?, layer.bytes)))
        .collect::<Answer<Vec<_>>>()?;
    let parts = Parts {
        config: decode(&wire.config)?,
        manifest: wire.manifest.as_ref().map(decode).transpose()?,
        layers,
    };
    if parts.id() != digest(&wire.id)? {
        return Err(Fault::user("the image's configuration has another digest"));
    }
    Ok(parts)
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PartsQuery {
    /// Name, id, or unambiguous beginning of an id.
    image: String,
}

/// What an image is made of.
#[utoipa::path(
    get,
    path = "/v1/image/parts",
    params(PartsQuery),
    responses((status = 200, body = ImageParts), (status = 404, body = ErrorBody))
)]
pub(super) async fn show(
    State(app): State<App>,
    Query(query): Query<PartsQuery>,
) -> Answer<Json<ImageParts>> {
    let image = app.node.image(&query.image)?;
    let store = app.node.mechanisms().images;
    let parts = blocking(move || store.parts(&image).map(|parts| (image, parts))).await?;
    let (image, parts) = parts?;
    Ok(Json(ImageParts {
        id: image.id.to_string(),
        names: image.names.iter().map(ToString::to_string).collect(),
        config: STANDARD.encode(parts.config),
        manifest: parts.manifest.map(|bytes| STANDARD.encode(bytes)),
        layers: (parts.layers.iter())
            .map(|(digest, bytes)| LayerPart {
                digest: digest.to_string(),
                bytes: *bytes,
            })
            .collect(),
    }))
}

/// Says which layers of an image are wanted.
#[utoipa::path(
    post,
    path = "/v1/images/offer",
    request_body = ImageParts,
    responses((status = 200, body = WantedParts), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn offer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(wire): Json<ImageParts>,
) -> Answer<Json<WantedParts>> {
    let parts = parts(&wire)?;
    let store = app.node.mechanisms().images;
    let missing = blocking(move || store.missing(&parts)).await??;
    // Refused before a gigabyte is on its way.
    let blobs: Vec<_> = (missing.iter())
        .map(|one| (one.digest.clone(), one.bytes))
        .collect();
    app.mesh.may_bring(&app.node, &caller, blobs).await?;
    Ok(Json(WantedParts {
        layers: (missing.into_iter())
            .map(|one| WantedLayer {
                digest: one.digest.to_string(),
                bytes: one.bytes,
                have_bytes: one.have_bytes,
            })
            .collect(),
    }))
}

/// Puts an image together whose layers are all here. Answers with events; the last is `done` or `failed`.
#[utoipa::path(
    post,
    path = "/v1/images/assemble",
    request_body = ImageParts,
    responses((status = 200, content_type = "text/event-stream", body = ImageEvent), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn assemble(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(wire): Json<ImageParts>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>> + Send>> {
    let parts = parts(&wire)?;
    let mut names = Vec::new();
    for text in &wire.names {
        let name: ImageRef = text
            .parse()
            .map_err(|error: vistara_model::ImageRefError| Fault::user(error.to_string()))?;
        names.push(name);
    }
    let store = super::images::store_for(&app, app.mesh.bringing(&app.node, &caller, false)?);
    Ok(super::images::sse(images::events(
        app.node,
        move |_, sink| async move { store.assemble(parts, names, &sink).await },
    )))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PieceQuery {
    /// Where it begins.
    from: u64,
    /// How long it is; at most 16 MiB.
    length: u64,
}

/// A piece of a blob, or of a packed snapshot; shorter than asked for only where that ends.
#[utoipa::path(
    get,
    path = "/v1/blobs/{digest}",
    params(("digest" = String, Path, description = "The blob's digest"), PieceQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 404, body = ErrorBody))
)]
pub(super) async fn piece(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(typed): Path<String>,
    Query(query): Query<PieceQuery>,
) -> Answer<Response> {
    let wanted = digest(&typed)?;
    let store = app.node.mechanisms().images;
    let snapshots = app.node.snapshots();
    // A snapshot has somebody's memory in it: for who runs images here it is not there.
    let administers = match &caller {
        Caller::Owner => true,
        Caller::Foreign(foreign) => foreign.may(Right::Admin),
        Caller::Refused(_) => false,
    };
    let file = blocking(move || {
        let blob = store.open_blob(&wanted)?.map(|(file, _)| file);
        let packed = || {
            let packed = administers.then(|| snapshots.packed(&wanted)).flatten()?;
            std::fs::File::open(packed.path).ok()
        };
        let Some(mut file) = blob.or_else(packed) else {
            let none = format!("the blob {wanted} is not here");
            return Err(Fault::new(ErrorKind::NotFound, none));
        };
        file.seek(SeekFrom::Start(query.from))
            .map_err(|error| Fault::internal(&error))?;
        Ok(file)
    })
    .await??;
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(CHUNK_BYTES);
    let piece = file.take(query.length.min(PIECE_BYTES_MAX));
    let chunks = stream::try_unfold(piece, |mut piece| async move {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        // The room that there is, is filled at most.
        piece.read_buf(&mut chunk).await?;
        let more = (!chunk.is_empty()).then(|| (Bytes::from(chunk), piece));
        Ok::<_, std::io::Error>(more)
    });
    Ok(Body::from_stream(chunks).into_response())
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct BlobQuery {
    /// Its whole length.
    bytes: u64,
    /// From where on the body has it: what the node said that it has.
    from: u64,
}

/// Takes a blob's bytes. What came before a cut stays, and the answer says how much there is.
#[utoipa::path(
    put,
    path = "/v1/blobs/{digest}",
    params(("digest" = String, Path, description = "The blob's digest"), BlobQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = ReceivedBlob), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn receive(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(typed): Path<String>,
    Query(query): Query<BlobQuery>,
    body: Body,
) -> Answer<Json<ReceivedBlob>> {
    let digest = digest(&typed)?;
    let store = app.node.mechanisms().images;
    let (looked, wanted) = (store.clone(), digest.clone());
    // Of what is here whole the books need not know.
    if let Some((_, have_bytes)) = blocking(move || looked.open_blob(&wanted)).await?? {
        return Ok(Json(ReceivedBlob { have_bytes }));
    }
    let _coming = (app.mesh)
        .bring(&app.node, &caller, &digest, query.bytes)
        .await?;
    let (sender, receiver) = mpsc::channel(CHUNKS_QUEUED);
    let mut chunks = body.into_data_stream();
    let feed = async move {
        let began = Instant::now();
        let (mut turn_ends, mut stalls, mut bytes) = (began + TURN_MAX, began + STALL_MAX, 0);
        // It ends with the body, with a sender that says too little, or with a store that takes no more.
        while let Ok(Some(Ok(chunk))) = timeout_at(stalls.min(turn_ends), chunks.next()).await {
            let arrived = Instant::now();
            if arrived >= turn_ends {
                return;
            }
            bytes += chunk.len() as u64;
            if bytes >= STALL_BYTES_MIN {
                (stalls, bytes) = (arrived + STALL_MAX, 0);
            }
            if sender.send(chunk).await.is_err() {
                return;
            }
            // Waiting for its turn, and for the disk, is not the sender's fault.
            turn_ends += arrived.elapsed();
            stalls += arrived.elapsed();
        }
    };
    let store = store.receive(&digest, query.bytes, query.from, receiver);
    tokio::pin!(store, feed);
    let here = tokio::select! {
        here = &mut store => here,
        () = &mut feed => store.await,
    };
    Ok(Json(ReceivedBlob { have_bytes: here? }))
}
