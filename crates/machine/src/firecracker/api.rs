//! Requests to a running Firecracker, over the Unix socket in its directory.
//!
//! The settings of a machine that starts go over one connection ([`Session`]); later requests, of which there are a few in its
//! life, each have their own, as one that is kept would be one of the ten that Firecracker allows. What comes back is bounded
//! in size and in time.

use super::types::{Action, BalloonStatistics, Fault, VmState};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinHandle;
use vistara_host::sockets::{self, NewNames};

/// Name of the socket in Firecracker's directory.
pub(super) const API_SOCKET: &str = "api.sock";

/// Bytes of the largest answer that is read: a fault's message has some hundreds.
const ANSWER_MAX: usize = 64 << 10;
/// Characters of a fault that are told.
const FAULT_TOLD: usize = 1_000;
/// How often the socket is looked for where nothing has told of it, and once it has its name.
const LOOK_UNTOLD: Duration = Duration::from_millis(100);
const LOOK_NAMED: Duration = Duration::from_millis(1);
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

    /// Waits until its socket is listened at: a connection to it. Looking for it all the time would take the processor time that
    /// Firecracker has need of to come so far.
    pub(super) async fn listening(&self) -> Result<Session, ApiError> {
        // A host may refuse the watch: then it is looked for now and then.
        let names = NewNames::watch(&self.dir).ok();
        loop {
            let refused = match sockets::connect_in_foreign(&self.dir, API_SOCKET) {
                Ok(stream) => return Session::over(stream).await,
                Err(error) => error.kind(),
            };
            match &names {
                Some(names) if refused == io::ErrorKind::NotFound => {
                    // Told or not, the next look says.
                    let _ = tokio::time::timeout(LOOK_UNTOLD, names.next()).await;
                }
                // It has its name, and is listened at in a moment; or nothing tells of it.
                Some(_) => tokio::time::sleep(LOOK_NAMED).await,
                None => tokio::time::sleep(LOOK_UNTOLD).await,
            }
        }
    }

    /// A connection of its own.
    async fn connect(&self) -> Result<Session, ApiError> {
        let stream = sockets::connect_in_foreign(&self.dir, API_SOCKET);
        Session::over(stream.map_err(gone)?).await
    }

    /// Makes a setting.
    pub(super) async fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.connect().await?.put(path, body, limit).await
    }

    /// Holds the guest, for a snapshot.
    pub(super) async fn pause(&self) -> Result<(), ApiError> {
        let held = VmState { state: "Paused" };
        self.connect().await?.patch("/vm", &held).await
    }

    /// Lets a guest go on that was held so.
    pub(super) async fn resume(&self) -> Result<(), ApiError> {
        self.connect().await?.resume().await
    }

    /// All settings, as the machine has them.
    pub(super) async fn settings(&self) -> Result<serde_json::Value, ApiError> {
        self.get("/vm/config", ANSWER_LIMIT).await
    }

    /// What the guest's balloon tells.
    pub(super) async fn balloon(&self) -> Result<BalloonStatistics, ApiError> {
        self.get("/balloon/statistics", BALLOON_LIMIT).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ApiError> {
        let mut session = self.connect().await?;
        let answer = session.request(Method::GET, path, None::<&()>, limit);
        serde_json::from_slice(&answer.await?).map_err(odd)
    }
}

/// A connection to a Firecracker's API, closed with this.
pub(super) struct Session {
    sender: http1::SendRequest<Full<Bytes>>,
    carrier: JoinHandle<()>,
}

impl Session {
    async fn over(stream: UnixStream) -> Result<Session, ApiError> {
        let stream = tokio::net::UnixStream::from_std(stream).map_err(gone)?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(odd)?;
        // Its fault is told to whoever waits for an answer.
        let carrier = tokio::spawn(async move { drop(connection.await) });
        Ok(Session { sender, carrier })
    }

    /// Makes a setting.
    pub(super) async fn put(
        &mut self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        let asked = self.request(Method::PUT, path, Some(body), limit);
        asked.await.map(drop)
    }

    /// Changes a setting.
    pub(super) async fn patch(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), ApiError> {
        let asked = self.request(Method::PATCH, path, Some(body), ANSWER_LIMIT);
        asked.await.map(drop)
    }

    /// Lets a guest go on that was held, or was loaded and has not run yet.
    pub(super) async fn resume(&mut self) -> Result<(), ApiError> {
        self.patch("/vm", &VmState { state: "Resumed" }).await
    }

    /// Starts the guest.
    pub(super) async fn start_instance(&mut self) -> Result<(), ApiError> {
        let action = Action {
            action_type: "InstanceStart",
        };
        self.put("/actions", &action, START_LIMIT).await
    }

    async fn request(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        limit: Duration,
    ) -> Result<Bytes, ApiError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(odd)?;
        let asked = self.exchange(method, path, body.unwrap_or_default());
        let answer = tokio::time::timeout(limit, asked).await;
        answer.unwrap_or(Err(ApiError::Slow(limit)))
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Bytes, ApiError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(odd)?;
        self.sender.ready().await.map_err(gone)?;
        let response = self.sender.send_request(request).await.map_err(gone)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(odd)?;
        let bytes = body.to_bytes();
        if status.is_success() {
            Ok(bytes)
        } else {
            Err(refusal(status, &bytes))
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.carrier.abort();
    }
}

fn gone(error: impl std::fmt::Display) -> ApiError {
    ApiError::Gone(error.to_string())
}

fn odd(error: impl std::fmt::Display) -> ApiError {
    ApiError::Odd(error.to_string())
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
