//! Connections to published ports over the interface, and forwards: ports of this host that lead to those of other nodes'
//! machines.

use super::App;
use crate::fault::{Answer, Fault};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use utoipa::IntoParams;
use vistara_api::{ErrorBody, Forward, ForwardRequest, PORT_STREAM};
use vistara_model::{MachineState, Protocol};

/// Bytes that are copied at a time, each way: as many as a layer of an image is read and sent in. What is less costs a call of
/// the kernel and a turn of two tasks oftener.
const COPY_BYTES: usize = 64 << 10;

/// The connection that a request asks to have for something else than HTTP.
pub(super) fn take_upgrade(request: &mut Request, protocol: &'static str) -> Answer<OnUpgrade> {
    let asked = request.headers().get(UPGRADE) == Some(&HeaderValue::from_static(protocol));
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    match (asked, upgrade) {
        (true, Some(upgrade)) => Ok(upgrade),
        _ => Err(Fault::user(format!(
            "this path is for connections with `Upgrade: {protocol}`"
        ))),
    }
}

/// Answers that the connection is something else from here on, and copies bytes until either side ends.
pub(super) fn switch(
    upgrade: OnUpgrade,
    protocol: &'static str,
    mut other: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Response {
    // It ends with either side's connection.
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => {
                let mut client = TokioIo::new(client);
                let copied = tokio::io::copy_bidirectional_with_sizes(
                    &mut client,
                    &mut other,
                    COPY_BYTES,
                    COPY_BYTES,
                );
                let copied = copied.await;
                if let Err(error) = copied {
                    tracing::debug!(%error, protocol, "a stream broke");
                }
            }
            Err(error) => tracing::debug!(%error, protocol, "a client went away"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    response
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PortQuery {
    /// The port in the guest.
    guest: u16,
}

/// Turns the connection into one to a port that the machine publishes (TCP). Asks for `Upgrade: vistara-port`.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/port",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), PortQuery),
    responses((status = 101), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn connect(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<PortQuery>,
    mut request: Request,
) -> Answer<Response> {
    let upgrade = take_upgrade(&mut request, PORT_STREAM)?;
    let record = app.node.find(&machine)?.record();
    if record.state == MachineState::Ended {
        return Err(Fault::conflict(format!(
            "machine {} has ended",
            record.name
        )));
    }
    let published = (record.spec.ports.iter())
        .find(|port| port.guest_port == query.guest && port.protocol == Protocol::Tcp)
        .ok_or_else(|| {
            Fault::user(format!(
                "machine {} does not publish its TCP port {}",
                record.name, query.guest
            ))
            .hint("vistara run -p HOST:GUEST …")
        })?;
    let address = match published.host_address {
        Ipv4Addr::UNSPECIFIED => Ipv4Addr::LOCALHOST,
        address => address,
    };
    let stream = TcpStream::connect((address, published.host_port))
        .await
        .map_err(|error| {
            Fault::conflict(format!(
                "machine {} does not answer on its port {}: {error}",
                record.name, query.guest
            ))
        })?;
    Ok(switch(upgrade, PORT_STREAM, stream))
}

/// Ports of this host that lead into machines on other nodes.
#[utoipa::path(get, path = "/v1/forwards", responses((status = 200, body = Vec<Forward>)))]
pub(super) async fn list(State(app): State<App>) -> Json<Vec<Forward>> {
    Json(app.forwards.all())
}

/// Has a port of this host lead into a machine on another node, until that one ends.
#[utoipa::path(
    post,
    path = "/v1/forwards",
    request_body = ForwardRequest,
    responses((status = 200, body = Forward), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn add(
    State(app): State<App>,
    Json(request): Json<ForwardRequest>,
) -> Answer<Json<Forward>> {
    let listen: SocketAddr = request.listen.parse().map_err(|_| {
        Fault::user(format!(
            "{:?} is no address to listen on: write it as 127.0.0.1:8080",
            request.listen
        ))
    })?;
    let node = app.mesh.peer_id(&request.node).await?;
    app.forwards
        .add(node, request.machine, listen, request.guest_port)
        .await
        .map(Json)
}

/// Ends a forward.
#[utoipa::path(
    delete,
    path = "/v1/forwards/{forward}",
    params(("forward" = String, Path, description = "The forward's id")),
    responses((status = 200), (status = 404, body = ErrorBody))
)]
pub(super) async fn remove(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<()>> {
    app.forwards.remove(&id).await?;
    Ok(Json(()))
}
