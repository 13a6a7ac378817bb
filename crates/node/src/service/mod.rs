//! The node's interface: HTTP and JSON over a Unix socket, trusted by file permission.

mod foreign;
mod images;
mod listener;
mod machines;
mod mesh;
mod metrics;
mod parts;
mod placing;
mod ports;
mod receipts;
mod services;
mod snapshots;
mod streams;
mod system;
mod tasks;
mod templates;
mod volumes;

use crate::fault::{Answer, NodeError};
use crate::machine::now_ns;
use crate::mesh::{Asker, Caller, Forwards, Mesh, Placing};
use crate::node::Node;
use crate::options::NodeOptions;
use crate::services::Services;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
pub(crate) use foreign::tame;
use listener::{Connections, CountingListener};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vistara_api::SERVER_VERSION_HEADER;
use vistara_control::{IdlePolicy, Presence};

/// How often a node looks whether it may leave.
const IDLE_CHECK: Duration = Duration::from_millis(500);
/// How long open requests may take to end once the node was asked to leave.
const LEAVE_BOUND: Duration = Duration::from_secs(2);

/// What every request sees.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) node: Arc<Node>,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) forwards: Arc<Forwards>,
    pub(crate) placing: Arc<Placing>,
    pub(crate) services: Services,
    pub(crate) leave: CancellationToken,
}

impl App {
    /// For whom a caller has machines made.
    fn asker(&self, caller: &Caller) -> Answer<Asker> {
        match caller {
            Caller::Owner => Ok(Asker::Owner),
            Caller::Foreign(foreign) => {
                Ok(Asker::Foreign(Arc::clone(foreign), Arc::clone(&self.mesh)))
            }
            Caller::Refused(fault) => Err(fault.clone()),
        }
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Vistara node",
        version = "1",
        description = "One node's machines, images and kernels. Served on a Unix socket; who may open it may do all of this."
    ),
    components(schemas(
        vistara_api::LogEvent,
        vistara_api::ImageEvent,
        vistara_api::AttachRequest,
        vistara_api::ExecRequest,
        vistara_api::stream::ClientSignal,
        vistara_api::stream::StreamEvent
    ))
)]
struct Document;

fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(system::version))
        .routes(routes!(system::doctor))
        .routes(routes!(system::shutdown))
        .routes(routes!(metrics::metrics))
        .routes(routes!(machines::create, machines::list))
        .routes(routes!(machines::explain))
        .routes(routes!(machines::inspect, machines::remove))
        .routes(routes!(machines::stop))
        .routes(routes!(machines::kill))
        .routes(routes!(machines::pause))
        .routes(routes!(machines::resume))
        .routes(routes!(snapshots::create))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::remove))
        .routes(routes!(snapshots::restore))
        .routes(routes!(snapshots::fork))
        .routes(routes!(snapshots::pack))
        .routes(routes!(snapshots::offer))
        .routes(routes!(snapshots::import))
        .routes(routes!(machines::wait))
        .routes(routes!(receipts::show))
        .routes(routes!(receipts::verify))
        .routes(routes!(machines::logs))
        .routes(routes!(machines::console))
        .routes(routes!(machines::stats))
        .routes(routes!(machines::stat))
        .routes(routes!(machines::archive_out, machines::archive_in))
        .routes(routes!(streams::attach))
        .routes(routes!(streams::exec))
        .routes(routes!(images::list))
        .routes(routes!(images::inspect, images::remove))
        .routes(routes!(images::pull))
        .routes(routes!(images::import))
        .routes(routes!(images::tag))
        .routes(routes!(images::prune))
        .routes(routes!(parts::show))
        .routes(routes!(parts::offer))
        .routes(routes!(parts::assemble))
        .routes(routes!(parts::piece, parts::receive))
        .routes(routes!(system::kernels, system::add_kernel))
        .routes(routes!(system::remove_kernel))
        .routes(routes!(system::default_kernel))
        .routes(routes!(templates::list, templates::create))
        .routes(routes!(templates::remove))
        .routes(routes!(templates::prune))
        .routes(routes!(mesh::page))
        .routes(routes!(mesh::show, mesh::listen, mesh::leave))
        .routes(routes!(mesh::nodes, mesh::join))
        .routes(routes!(mesh::forget))
        .routes(routes!(mesh::stream))
        .routes(routes!(mesh::grants, mesh::give))
        .routes(routes!(mesh::revoke))
        .routes(routes!(mesh::keep))
        .routes(routes!(mesh::narrow))
        .routes(routes!(ports::connect))
        .routes(routes!(placing::facts))
        .routes(routes!(placing::terms, placing::set_terms))
        .routes(routes!(placing::offer))
        .routes(routes!(placing::take))
        .routes(routes!(placing::release))
        .routes(routes!(placing::place))
        .routes(routes!(ports::list, ports::add))
        .routes(routes!(ports::remove))
        .routes(routes!(services::list, services::create))
        .routes(routes!(services::inspect, services::remove))
        .routes(routes!(services::scale))
        .routes(routes!(services::message))
        .routes(routes!(tasks::list, tasks::create))
        .routes(routes!(tasks::inspect, tasks::remove))
        .routes(routes!(volumes::list, volumes::create))
        .routes(routes!(volumes::remove))
}

/// The interface's OpenAPI document, as it is checked in.
pub fn openapi() -> utoipa::openapi::OpenApi {
    routes().into_openapi()
}

async fn stamp(request: Request, next: Next, version: HeaderValue) -> Response {
    let mut response = next.run(request).await;
    response
        .headers_mut()
        .insert(SERVER_VERSION_HEADER, version);
    response
}

/// Serves until idle for too long, asked to leave, or told to by SIGTERM or SIGINT. Machines run on.
///
/// # Errors
/// [`NodeError`] where it cannot begin; [`NodeError::AlreadyServed`] where another node is at work.
pub async fn run(options: NodeOptions) -> Result<(), NodeError> {
    let socket = options.socket.clone();
    let idle = IdlePolicy {
        leave_after: options.idle_exit,
    };
    let version =
        HeaderValue::from_str(&options.version).unwrap_or(HeaderValue::from_static("unknown"));
    raise_file_limit();
    let state_dir = options.state_dir.clone();
    let (mesh, visits) = Mesh::new(&state_dir);
    let node = Node::open(options, Arc::clone(&mesh)).await?;
    mesh.resume().await;
    let listener = bind(&socket)?;
    let forwards = Forwards::new(
        mesh.dir().to_owned(),
        vistara_api::Client::new(socket.clone()),
    );
    // They speak with this node's socket, which takes connections from here on.
    forwards.resume();
    let own = vistara_api::Client::new(socket.clone());
    let placing = Placing::new(Arc::clone(&mesh), Arc::clone(&node), own);
    placing.listen_to_others();
    let connections = Connections::default();
    let leave = CancellationToken::new();
    let app = App {
        node: Arc::clone(&node),
        mesh: Arc::clone(&mesh),
        forwards: Arc::clone(&forwards),
        services: Services::begin(&state_dir, &mesh, &node, &placing),
        placing,
        leave: leave.clone(),
    };
    let (router, document) = routes().split_for_parts();
    let document = Arc::new(document);
    let router = router
        .route(
            "/openapi.json",
            axum::routing::get(move || {
                let document = Arc::clone(&document);
                async move { axum::Json(document.as_ref().clone()) }
            }),
        )
        .fallback(|| async {
            crate::fault::Fault::new(
                vistara_api::ErrorKind::NotFound,
                "there is nothing at this path",
            )
        })
        .layer(axum::middleware::from_fn(move |request, next| {
            stamp(request, next, version.clone())
        }))
        .with_state(app);
    let gate = foreign::Gate {
        node: Arc::clone(&node),
        mesh: Arc::clone(&mesh),
    };
    let for_others = router
        .clone()
        .layer(axum::middleware::from_fn_with_state(gate, foreign::gate))
        .into_make_service_with_connect_info::<Caller>();
    let others = axum::serve(foreign::Visits::new(visits), for_others)
        .with_graceful_shutdown(leave.clone().cancelled_owned())
        .into_future();
    let router = router.layer(axum::Extension(Caller::Owner));
    tracing::info!(socket = %socket.display(), "the node serves");
    let served = axum::serve(CountingListener::new(listener, connections.clone()), router)
        .with_graceful_shutdown(leave.clone().cancelled_owned())
        .into_future();
    tokio::pin!(served);
    tokio::pin!(others);
    let mut over = false;
    tokio::select! {
        result = &mut served => {
            over = true;
            report(result);
        }
        result = &mut others => report(result),
        () = until_idle(idle, &node, &connections, &mesh) => tracing::info!("nothing to do for a while: the node leaves"),
        () = terminated() => tracing::info!("the node was told to leave"),
        () = leave.cancelled() => tracing::info!("the node was asked to leave"),
    }
    // From here on nobody can connect: who tries starts the next node, which waits for the lock.
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, "the socket was gone already");
    }
    leave.cancel();
    // Streams to clients end with the process; their machines do not.
    if !over {
        let _ = tokio::time::timeout(LEAVE_BOUND, served).await;
    }
    mesh.close().await;
    node.close_stock().await;
    Ok(())
}

/// Each machine takes a few descriptors; what a shell allows a program by default is enough for some hundred only.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

fn report(result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(%error, "serving failed");
    }
}

/// Waits for SIGTERM or SIGINT.
pub(crate) async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        // Without handlers the signals end the process at once, which the machines survive too.
        _ => std::future::pending().await,
    }
}

async fn until_idle(policy: IdlePolicy, node: &Node, connections: &Connections, mesh: &Mesh) {
    let mut quiet_since = Instant::now();
    loop {
        tokio::time::sleep(IDLE_CHECK).await;
        let presence = Presence {
            machines_active: node.active(),
            requests_open: connections.open(),
            quiet_for: quiet_since.elapsed(),
        };
        // A node that others may ask something at any time stays.
        let wanted = connections.take_any() || mesh.link().is_some();
        if presence.machines_active > 0 || presence.requests_open > 0 || wanted {
            quiet_since = Instant::now();
        } else if policy.leaves(presence) {
            return;
        }
    }
}

fn bind(socket: &Path) -> Result<UnixListener, NodeError> {
    let io = |operation: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source: std::io::Error| NodeError::Io {
            operation,
            path,
            source,
        }
    };
    if let Some(dir) = socket.parent() {
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(io("make directory", dir))?;
    }
    // The lock is ours, so a socket that is still there belongs to nobody.
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("remove", socket)(error)),
    }
    let listener = UnixListener::bind(socket).map_err(io("listen on", socket))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .map_err(io("protect", socket))?;
    Ok(listener)
}

/// Nanoseconds since `ns`, for durations shown to people.
pub(super) fn since(ns: u64) -> Duration {
    Duration::from_nanos(now_ns().saturating_sub(ns))
}
