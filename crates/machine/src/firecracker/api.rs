//! Requests to a running Firecracker, over the Unix socket in its directory.
//!
//! Each request has a connection of its own: there are some ten in a machine's life, and a connection that is kept would be
//! one of the ten that Firecracker allows. What comes back is bounded in size and in time.

use super::types::{Action, BalloonStatistics, Fault, VmState};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vistara_host::sockets;

/// Name of the socket in Firecracker's directory.
pub(super) const API_SOCKET: &str = "api.sock";

/// Bytes of the largest answer that is read: a fault's message has some hundreds.
const ANSWER_MAX: usize = 64 << 10;
/// Characters of a fault that are told.
const FAULT_TOLD: usize = 1_000;
/// How long a request may take that changes or asks a setting.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a look at the balloon may take: somebody waits for a line of statistics, and a held machine never answers.
const BALLOON_LIMIT: Duration = Duration::from_millis(500);
/// How long a guest's start may take: the kernel is loaded, and memory is made, meanwhile.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);
/// How long writing or reading a snapshot may take: all of the guest's memory goes to a file.
pub(super) const SNAPSHOT_LIMIT: Duration = Duration::from_secs(120);

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// Nobody answers at the socket.
    #[error("its API does not answer: {0}")]
    Gone(String),
    /// It has answered, and refused.
    #[error("{0}")]
    Refused(String),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Slow(Duration),
    /// What came is no answer of Firecracker's.
    #[error("its answer makes no sense: {0}")]
    Odd(String),
}

/// The API of one Firecracker.
#[derive(Debug, Clone)]
pub(super) struct Api {
    dir: PathBuf,
}

impl Api {
    /// The API of the Firecracker that works in `dir`.
    pub(super) fn new(dir: &Path) -> Api {
        Api {
            dir: dir.to_owned(),
        }
    }

    /// Whether its socket is listened at.
    pub(super) fn listens(&self) -> bool {
        sockets::connect_in_foreign(&self.dir, API_SOCKET).is_ok()
    }

    /// Makes a setting.
    pub(super) async fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.request(Method::PUT, path, Some(body), limit)
            .await
            .map(drop)
    }

    /// Starts the guest.
    pub(super) async fn start_instance(&self) -> Result<(), ApiError> {
        let action = Action {
            action_type: "InstanceStart",
        };
        self.put("/actions", &action, START_LIMIT).await
    }

    /// Holds the guest, for a snapshot.
    pub(super) async fn pause(&self) -> Result<(), ApiError> {
        self.patch("/vm", &VmState { state: "Paused" }).await
    }

    /// Lets a guest go on that was loaded and has not run yet.
    pub(super) async fn resume(&self) -> Result<(), ApiError> {
        self.patch("/vm", &VmState { state: "Resumed" }).await
    }

    /// Changes a setting.
    pub(super) async fn patch(&self, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        self.request(Method::PATCH, path, Some(body), ANSWER_LIMIT)
            .await
            .map(drop)
    }

    /// All settings, as the machine has them.
    pub(super) async fn settings(&self) -> Result<serde_json::Value, ApiError> {
        let answer = self
            .request(Method::GET, "/vm/config", None::<&()>, ANSWER_LIMIT)
            .await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Odd(error.to_string()))
    }

    /// What the guest's balloon tells.
    pub(super) async fn balloon(&self) -> Result<BalloonStatistics, ApiError> {
        let path = "/balloon/statistics";
        let answer = self
            .request(Method::GET, path, None::<&()>, BALLOON_LIMIT)
            .await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Odd(error.to_string()))
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        limit: Duration,
    ) -> Result<Bytes, ApiError> {
        let body = match body {
            Some(body) => {
                serde_json::to_vec(body).map_err(|error| ApiError::Odd(error.to_string()))?
            }
            None => Vec::new(),
        };
        match tokio::time::timeout(limit, self.exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(ApiError::Slow(limit)),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes, ApiError> {
        let gone = |error: std::io::Error| ApiError::Gone(error.to_string());
        let odd = |error: &dyn std::fmt::Display| ApiError::Odd(error.to_string());
        let stream = sockets::connect_in_foreign(&self.dir, API_SOCKET).map_err(gone)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(gone)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| odd(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| odd(&error))?;
        // The connection ends once its sender is dropped, which is when the answer is complete.
        let answer = async move {
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| ApiError::Gone(error.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_MAX)
                .collect()
                .await
                .map_err(|error| odd(&error))?;
            Ok::<_, ApiError>((status, body.to_bytes()))
        };
        let (answer, _) = tokio::join!(answer, connection);
        let (status, bytes) = answer?;
        if status.is_success() {
            Ok(bytes)
        } else {
            Err(refusal(status, &bytes))
        }
    }
}

fn refusal(status: StatusCode, body: &[u8]) -> ApiError {
    let message = match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => format!("{status}: {}", String::from_utf8_lossy(body)),
    };
    ApiError::Refused(message.trim().chars().take(FAULT_TOLD).collect())
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
