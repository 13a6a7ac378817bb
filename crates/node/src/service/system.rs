//! The node itself: version, health, kernels, leaving.

use super::App;
use crate::doctor;
use crate::fault::{Answer, Fault, blocking};
use crate::node::Mechanisms;
use crate::view;
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;
use vistara_api::{API_VERSION, AddKernelRequest, DoctorReport, ErrorBody, Kernel, Version};
use vistara_machine::boot::BootError;
use vistara_model::Payload;

/// Version and state of the node.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = Version)))]
pub(super) async fn version(State(app): State<App>) -> Json<Version> {
    Json(own_version(&app))
}

pub(super) fn own_version(app: &App) -> Version {
    let node = &app.node;
    Version {
        version: node.options.version.clone(),
        api: API_VERSION.to_owned(),
        pid: std::process::id(),
        started_at: view::time(node.started_ns),
        state_dir: node.options.state_dir.display().to_string(),
        machines_active: node.active() as u64,
    }
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
        app.node.clear_left().await;
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
    let mechanisms = app.node.mechanisms();
    let (linux, nanos) =
        blocking(move || Ok::<_, Fault>((mechanisms.kernels.list()?, mechanisms.nanos.list()?)))
            .await??;
    let linux = linux.iter().map(view::kernel);
    Ok(Json(
        linux.chain(nanos.iter().map(view::nanos_kernel)).collect(),
    ))
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
    let mechanisms = app.node.mechanisms();
    let kernel = blocking(move || match request.payload.as_deref() {
        None | Some("linux") => add_linux_kernel(&mechanisms, &request),
        Some("nanos") => add_nanos_kernel(&mechanisms, &request),
        Some(other) => Err(Fault::user(format!(
            "{other:?} is no payload: write linux or nanos"
        ))),
    })
    .await??;
    Ok(Json(kernel))
}

fn absolute(path: &str) -> Answer<&std::path::Path> {
    let path = std::path::Path::new(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Fault::user(format!("{path:?} is not an absolute path")))
}

/// One name means one kernel, whatever its payload.
fn taken(name: &str, payload: Payload) -> Fault {
    Fault::conflict(format!("there is a {payload} kernel named {name:?}")).hint(format!(
        "choose another --name, or vistara kernel rm {name}"
    ))
}

fn add_linux_kernel(mechanisms: &Mechanisms, request: &AddKernelRequest) -> Answer<Kernel> {
    let (store, name) = (&mechanisms.kernels, request.name.as_deref());
    if request.klibs_dir.is_some() {
        return Err(
            Fault::user("klibs are modules of Nanos, and this is a Linux kernel")
                .hint("vistara kernel add nanos FILE --klibs DIR"),
        );
    }
    if let Some(name) = name
        && mechanisms.nanos.get(name).is_ok()
    {
        return Err(taken(name, Payload::Nanos));
    }
    let kernel = if request.source == "debian" {
        store.fetch_debian(name)?
    } else {
        let modules = request.modules_dir.as_deref().map(std::path::Path::new);
        store.add(absolute(&request.source)?, modules, name)?
    };
    if request.default {
        store.set_default(&kernel.record.name)?;
    }
    Ok(view::kernel(&store.get(&kernel.record.name)?))
}

fn add_nanos_kernel(mechanisms: &Mechanisms, request: &AddKernelRequest) -> Answer<Kernel> {
    let (store, name) = (&mechanisms.nanos, request.name.as_deref());
    if request.modules_dir.is_some() {
        return Err(Fault::user("--modules is for Linux kernels")
            .hint("vistara kernel add nanos FILE --klibs DIR"));
    }
    if let Some(name) = name
        && mechanisms.kernels.get(name).is_ok()
    {
        return Err(taken(name, Payload::Linux));
    }
    let klibs = request.klibs_dir.as_deref().map(absolute).transpose()?;
    let kernel = store.add(absolute(&request.source)?, klibs, name)?;
    if request.default {
        store.set_default(&kernel.record.name)?;
    }
    Ok(view::nanos_kernel(&store.get(&kernel.record.name)?))
}

/// What the kernel of this name is the kernel of.
fn payload_of(mechanisms: &Mechanisms, name: &str) -> Answer<Payload> {
    let unknown = match mechanisms.kernels.get(name) {
        Err(BootError::UnknownKernel { known, .. }) => known,
        // One whose record is damaged is there, too.
        Ok(_) | Err(_) => return Ok(Payload::Linux),
    };
    match mechanisms.nanos.get(name) {
        Err(BootError::UnknownKernel { name, known }) => Err(BootError::UnknownKernel {
            name,
            known: unknown.into_iter().chain(known).collect(),
        }
        .into()),
        Ok(_) | Err(_) => Ok(Payload::Nanos),
    }
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
    let mechanisms = app.node.mechanisms();
    blocking(move || match payload_of(&mechanisms, &name)? {
        Payload::Linux => Ok::<_, Fault>(mechanisms.kernels.remove(&name)?),
        Payload::Nanos => Ok(mechanisms.nanos.remove(&name)?),
    })
    .await??;
    Ok(Json(()))
}

/// Makes a guest kernel the default among those of its payload.
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
    let mechanisms = app.node.mechanisms();
    let kernel = blocking(move || match payload_of(&mechanisms, &name)? {
        Payload::Linux => {
            mechanisms.kernels.set_default(&name)?;
            Ok::<_, Fault>(view::kernel(&mechanisms.kernels.get(&name)?))
        }
        Payload::Nanos => {
            mechanisms.nanos.set_default(&name)?;
            Ok(view::nanos_kernel(&mechanisms.nanos.get(&name)?))
        }
    })
    .await??;
    Ok(Json(kernel))
}
