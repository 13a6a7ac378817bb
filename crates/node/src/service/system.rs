//! The node itself: version, health, kernels, leaving.

use super::App;
use crate::doctor;
use crate::fault::{Answer, Fault};
use crate::view;
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use std::path::PathBuf;
use utoipa::IntoParams;
use vistara_api::{API_VERSION, AddKernelRequest, DoctorReport, ErrorBody, Kernel, Version};

/// Runs work that blocks, off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Answer<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Fault::internal(&error))
}

/// Version and state of the node.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = Version)))]
pub(super) async fn version(State(app): State<App>) -> Json<Version> {
    let node = &app.node;
    Json(Version {
        version: node.options.version.clone(),
        api: API_VERSION.to_owned(),
        pid: std::process::id(),
        started_at: view::time(node.started_ns),
        state_dir: node.options.state_dir.display().to_string(),
        machines_active: node.active() as u64,
    })
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct DoctorQuery {
    /// Probe again instead of telling what was found before.
    #[serde(default)]
    fresh: bool,
}

/// What the node has, lacks, and what mends it.
#[utoipa::path(get, path = "/v1/doctor", params(DoctorQuery), responses((status = 200, body = DoctorReport)))]
pub(super) async fn doctor(
    State(app): State<App>,
    Query(query): Query<DoctorQuery>,
) -> Answer<Json<DoctorReport>> {
    if query.fresh {
        app.node.detect(true).await;
    }
    let node = app.node;
    let needs = blocking(move || doctor::examine(&node)).await?;
    Ok(Json(DoctorReport {
        ready: view::ready(&needs),
        needs: needs.iter().map(view::need).collect(),
    }))
}

/// Asks the node to leave. Machines run on, and the next node takes them over.
#[utoipa::path(post, path = "/v1/shutdown", responses((status = 200)))]
pub(super) async fn shutdown(State(app): State<App>) -> Json<()> {
    // The answer goes out first: cancelling only stops the taking of new connections.
    app.leave.cancel();
    Json(())
}

/// Guest kernels.
#[utoipa::path(get, path = "/v1/kernels", responses((status = 200, body = Vec<Kernel>)))]
pub(super) async fn kernels(State(app): State<App>) -> Answer<Json<Vec<Kernel>>> {
    let store = app.node.mechanisms().kernels;
    let kernels = blocking(move || store.list()).await??;
    Ok(Json(kernels.iter().map(view::kernel).collect()))
}

/// Adds a guest kernel; answers when it is unpacked.
#[utoipa::path(
    post,
    path = "/v1/kernels",
    request_body = AddKernelRequest,
    responses((status = 200, body = Kernel), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn add_kernel(
    State(app): State<App>,
    Json(request): Json<AddKernelRequest>,
) -> Answer<Json<Kernel>> {
    let store = app.node.mechanisms().kernels;
    let kernel = blocking(move || {
        let name = request.name.as_deref();
        let kernel = if request.source == "debian" {
            store.fetch_debian(name)?
        } else {
            let source = PathBuf::from(&request.source);
            if !source.is_absolute() {
                return Err(Fault::user(format!(
                    "{:?} is not an absolute path",
                    request.source
                )));
            }
            store.add(
                &source,
                request.modules_dir.as_deref().map(std::path::Path::new),
                name,
            )?
        };
        if request.default {
            store.set_default(&kernel.record.name)?;
        }
        Ok::<_, Fault>(store.get(&kernel.record.name)?)
    })
    .await??;
    Ok(Json(view::kernel(&kernel)))
}

/// Removes a guest kernel.
#[utoipa::path(
    delete,
    path = "/v1/kernels/{name}",
    params(("name" = String, Path, description = "Name of the kernel")),
    responses((status = 200), (status = 404, body = ErrorBody))
)]
pub(super) async fn remove_kernel(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<()>> {
    let store = app.node.mechanisms().kernels;
    blocking(move || store.remove(&name)).await??;
    Ok(Json(()))
}

/// Makes a guest kernel the default.
#[utoipa::path(
    post,
    path = "/v1/kernels/{name}/default",
    params(("name" = String, Path, description = "Name of the kernel")),
    responses((status = 200, body = Kernel), (status = 404, body = ErrorBody))
)]
pub(super) async fn default_kernel(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Kernel>> {
    let store = app.node.mechanisms().kernels;
    let kernel = blocking(move || {
        store.set_default(&name)?;
        store.get(&name)
    })
    .await??;
    Ok(Json(view::kernel(&kernel)))
}
