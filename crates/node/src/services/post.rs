//! Carrying messages between nodes that look after a service: one HTTP request each, over a stream to the other node.

use crate::mesh::Mesh;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request as HttpRequest;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::time::Duration;
use vistara_control::services::wire::{Answer, FromNode, MESSAGE_BYTES_MAX, Request};
use vistara_model::NodeId;

/// How long an answer is waited for: longer than a dial and a write to a busy disk, shorter than a lease.
const BOUND: Duration = Duration::from_secs(4);

async fn exchange(mesh: &Mesh, to: NodeId, request: &Request) -> Result<Answer, String> {
    let link = mesh.link().ok_or("this node does not listen for others")?;
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let stream = link
        .stream(&to, None)
        .await
        .map_err(|error| words(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|error| words(&error))?;
    // It ends with the exchange.
    tokio::spawn(connection);
    let body = request.encode().map_err(|error| words(&error))?;
    let http = HttpRequest::post("/v1/services/message")
        .header("host", "vistara")
        .header("content-type", "application/octet-stream")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| words(&error))?;
    let response = sender
        .send_request(http)
        .await
        .map_err(|error| words(&error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MESSAGE_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| words(&error))?
        .to_bytes();
    if !status.is_success() {
        let told = serde_json::from_slice::<vistara_api::ErrorBody>(&body);
        return Err(told.map_or_else(|_| format!("status {status}"), |body| body.message));
    }
    Answer::decode(&body).map_err(|error| words(&error))
}

/// Asks another node, and gives it the document where it lacks that.
pub(super) async fn ask(
    mesh: &Mesh,
    to: NodeId,
    mut request: Request,
    document: &Arc<[u8]>,
) -> Result<Answer, String> {
    let asked = async {
        let answer = exchange(mesh, to, &request).await?;
        let lacks = answer.body == FromNode::Unknown || answer.version < request.version;
        if !lacks || request.document.is_some() {
            return Ok(answer);
        }
        request.document = Some(document.to_vec());
        exchange(mesh, to, &request).await
    };
    match tokio::time::timeout(BOUND, asked).await {
        Ok(answer) => answer,
        Err(_) => Err("it does not answer in time".to_owned()),
    }
}
