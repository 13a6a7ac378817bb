//! Receipts of machines that have ended, and whether something is one.

use super::App;
use crate::fault::{Answer, Fault, chain};
use crate::receipts;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use vistara_api::{ErrorBody, VerifiedReceipt, VerifyReceiptRequest};
use vistara_model::{Digest, NodeId};

/// A JSON body, and the digest of its bytes as they were sent.
pub(super) struct AsSent<T>(pub(super) T, pub(super) Digest);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for AsSent<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let (parts, body) = request.into_parts();
        let whole = Request::from_parts(parts.clone(), body);
        let bytes = Bytes::from_request(whole, state)
            .await
            .map_err(IntoResponse::into_response)?;
        let digest = receipts::body_digest(&bytes);
        let again = Request::from_parts(parts, Body::from(bytes));
        let Json(value) = Json::<T>::from_request(again, state)
            .await
            .map_err(IntoResponse::into_response)?;
        Ok(AsSent(value, digest))
    }
}

/// The receipt of a machine that has ended, as this node signed it then.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/receipt",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses(
        (status = 200, content_type = "text/plain", body = String),
        (status = 404, body = ErrorBody),
        (status = 409, description = "It has not ended, or there is none; the message says why", body = ErrorBody)
    )
)]
pub(super) async fn show(State(app): State<App>, Path(machine): Path<String>) -> Answer<Response> {
    let handle = app.node.find(&machine)?;
    let record = handle.record();
    let text = receipts::of(&record)?.to_owned();
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

/// Whether something is a receipt: in form, and signed by the node that it names; and whether this node knows that one.
#[utoipa::path(
    post,
    path = "/v1/receipts/verify",
    request_body = VerifyReceiptRequest,
    responses(
        (status = 200, body = VerifiedReceipt),
        (status = 400, description = "It is none, or a changed one; the message says which", body = ErrorBody)
    )
)]
pub(super) async fn verify(
    State(app): State<App>,
    Json(request): Json<VerifyReceiptRequest>,
) -> Answer<Json<VerifiedReceipt>> {
    let receipt = vistara_mesh::receipt::read(request.receipt.as_bytes())
        .map_err(|error| Fault::user(chain(&error)))?;
    let is_node = match &request.node {
        None => None,
        Some(typed) => Some(match typed.parse::<NodeId>() {
            Ok(key) => key == receipt.node,
            Err(_) => app.mesh.peer_id(typed).await? == receipt.node,
        }),
    };
    Ok(Json(VerifiedReceipt {
        known_as: app.mesh.known_as(&receipt.node).await?,
        node: receipt.node.to_string(),
        is_node,
        receipt: serde_json::to_value(&receipt).map_err(|error| Fault::internal(&error))?,
    }))
}
