//! Snapshots and forks: taking, listing, removing, going on from them.

use super::App;
use super::foreign::tame;
use super::parts::digest;
use crate::fault::{Answer, Fault, blocking};
use crate::machine::Handle;
use crate::mesh::Caller;
use crate::snapshots::Stays;
use crate::view;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_api::{
    CreateSnapshotRequest, ErrorBody, ErrorKind, ForkRequest, Forked, Machine, PackedSnapshot,
    RestoreRequest, RunRequest, Snapshot, WantedSnapshot,
};
use vistara_model::MachineState;

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A machine that runs; what became of it where it does not.
async fn started(handle: &Handle) -> Answer<Machine> {
    let snapshot = handle.wait_started().await;
    let machine = view::machine(&snapshot);
    if snapshot.record.state == MachineState::Ended && snapshot.record.started_ns.is_none() {
        let name = &machine.name;
        let message = machine.message.as_deref().unwrap_or("nobody knows why");
        let message = format!("machine {name} did not go on: {message}");
        return Err(Fault::new(ErrorKind::Host, message)
            .hint(format!("see its console: vistara logs --console {name}")));
    }
    Ok(machine)
}

/// Keeps a machine that runs as it is at this moment, and lets it go on.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/snapshots",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    request_body = CreateSnapshotRequest,
    responses((status = 200, body = Snapshot), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Path(machine): Path<String>,
    Json(request): Json<CreateSnapshotRequest>,
) -> Answer<Json<Snapshot>> {
    let handle = app.node.find(&machine)?;
    // A task of its own: it is finished even if nobody waits any more.
    let created = tokio::spawn(async move {
        let node = &app.node;
        node.create_snapshot(&handle, request.name, request.base)
            .await
    });
    let listed = created.await.map_err(|error| Fault::internal(&error))??;
    Ok(Json(view::snapshot(&listed)))
}

/// Snapshots, newest first.
#[utoipa::path(get, path = "/v1/snapshots", responses((status = 200, body = Vec<Snapshot>)))]
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Snapshot>>> {
    let snapshots = app.node.snapshots();
    let all = blocking(move || snapshots.list()).await?;
    Ok(Json(all.iter().map(view::snapshot).collect()))
}

/// Removes a snapshot. Machines restored from it go on.
#[utoipa::path(
    delete,
    path = "/v1/snapshots/{snapshot}",
    params(("snapshot" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = String), (status = 404, body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(snapshot): Path<String>,
) -> Answer<Json<String>> {
    let removed = blocking(move || {
        let listed = app.node.find_snapshot(&snapshot)?;
        match app.node.snapshots().remove(&listed.id) {
            Ok(()) => Ok(listed.id),
            Err(Stays::Needed(by)) => {
                let shown = listed.name().unwrap_or(&listed.id);
                let by = by.join(", ");
                Err(Fault::conflict(format!("snapshots rest on {shown}: {by}"))
                    .hint(format!("remove those first: vistara snapshot rm {by}")))
            }
            Err(Stays::Io(error)) => {
                let message = format!("snapshot {} could not be removed: {error}", listed.id);
                Err(Fault::new(ErrorKind::Host, message))
            }
        }
    });
    Ok(Json(removed.await??))
}

/// Makes a new machine that goes on from a snapshot; answers when it runs. Every byte is checked before.
#[utoipa::path(
    post,
    path = "/v1/snapshots/{snapshot}/restore",
    params(("snapshot" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    request_body = RestoreRequest,
    responses((status = 200, body = Machine), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn restore(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(snapshot): Path<String>,
    Json(mut request): Json<RestoreRequest>,
) -> Answer<Json<Machine>> {
    let zero = Instant::now();
    let asker = app.asker(&caller)?;
    let mut like = RunRequest {
        ports: std::mem::take(&mut request.ports),
        ..RunRequest::default()
    };
    tame(&caller, &mut like)?;
    request.ports = like.ports;
    let restored =
        tokio::spawn(async move { app.node.restore(&snapshot, &request, &asker, zero).await });
    let handle = restored.await.map_err(|error| Fault::internal(&error))??;
    Ok(Json(started(&handle).await?))
}

/// Makes one file of a snapshot, for another node. It stays as long as the snapshot.
#[utoipa::path(
    post,
    path = "/v1/snapshots/{snapshot}/pack",
    params(("snapshot" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = PackedSnapshot), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn pack(
    State(app): State<App>,
    Path(snapshot): Path<String>,
) -> Answer<Json<PackedSnapshot>> {
    let packed = blocking(move || app.node.pack_snapshot(&snapshot));
    Ok(Json(packed.await??))
}

/// Says how much of a packed snapshot is wanted.
#[utoipa::path(
    post,
    path = "/v1/snapshots/offer",
    request_body = PackedSnapshot,
    responses((status = 200, body = WantedSnapshot), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn offer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(packed): Json<PackedSnapshot>,
) -> Answer<Json<WantedSnapshot>> {
    let file = digest(&packed.digest)?;
    let (node, offered) = (Arc::clone(&app.node), packed.clone());
    if blocking(move || node.offered_snapshot(&offered.id, offered.name.as_deref())).await?? {
        return Ok(Json(WantedSnapshot {
            is_here: true,
            have_bytes: packed.bytes,
        }));
    }
    // Refused before a gigabyte is on its way.
    let blobs = vec![(file.clone(), packed.bytes)];
    app.mesh.may_bring(&app.node, &caller, blobs).await?;
    let images = app.node.mechanisms().images;
    let have_bytes = blocking(move || images.blob_bytes(&file)).await?;
    Ok(Json(WantedSnapshot {
        is_here: false,
        // A beginning that is longer than the whole is another's mistake.
        have_bytes: Some(have_bytes)
            .filter(|have| *have <= packed.bytes)
            .unwrap_or(0),
    }))
}

/// Puts a snapshot in place whose file has come as a blob; the file goes.
#[utoipa::path(
    post,
    path = "/v1/snapshots/import",
    request_body = PackedSnapshot,
    responses((status = 200, body = Snapshot), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn import(
    State(app): State<App>,
    Json(packed): Json<PackedSnapshot>,
) -> Answer<Json<Snapshot>> {
    let file = digest(&packed.digest)?;
    // A task of its own: it is finished even if nobody waits any more.
    let imported = tokio::spawn(async move {
        let (id, name) = (packed.id, packed.name);
        app.node.import_snapshot(&id, name, file).await
    });
    let listed = imported.await.map_err(|error| Fault::internal(&error))??;
    Ok(Json(view::snapshot(&listed)))
}

/// Makes copies of a machine that runs; answers when each runs or has failed.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/fork",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    request_body = ForkRequest,
    responses((status = 200, body = Forked), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn fork(
    State(app): State<App>,
    Path(machine): Path<String>,
    Json(request): Json<ForkRequest>,
) -> Answer<Json<Forked>> {
    let zero = Instant::now();
    let handle = app.node.find(&machine)?;
    let forked = tokio::spawn(async move { app.node.fork(&handle, &request, zero).await });
    let forks = forked.await.map_err(|error| Fault::internal(&error))??;
    if let [one] = forks.machines.as_slice() {
        started(one).await?;
    }
    let shown = forks.machines.iter();
    Ok(Json(Forked {
        machines: shown
            .map(|handle| view::machine(&handle.snapshot()))
            .collect(),
        pause_ms: millis(forks.pause),
        captured_ms: millis(forks.captured),
        took_ms: millis(zero.elapsed()),
    }))
}
