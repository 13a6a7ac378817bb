//! A client of a node's interface over its Unix socket.

mod forwards;
mod kernels;
mod mesh;
mod parts;
mod placing;
mod receipts;
mod services;
mod snapshots;
mod streams;
mod tasks;
mod templates;
mod volumes;

pub use streams::{StreamItem, Streams, StreamsInput, StreamsOutput};

use crate::stream::MESSAGE_BYTES_MAX;
use crate::types::*;
use bytes::Bytes;
use futures_util::{SinkExt, Stream, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokio::io::AsyncRead;
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Largest JSON answer that is read whole, in bytes: a listing of many thousand machines fits, a broken server does not
/// fill our memory.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What a request was at whose answer never began.
const SENDING: &str = "sending the request";
/// Largest single server-sent event, in bytes: a log event carries at most 64 KiB of output, in base64.
const EVENT_BYTES_MAX: usize = 1 << 20;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A stream of a node's answers, as they come.
pub type Events<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, ClientError>> + Send>>;

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("no node answers at {path}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke or the answer made no sense.
    #[error("the connection to the node failed at {operation}: {message}")]
    Broken {
        /// What was being done.
        operation: &'static str,
        /// What happened.
        message: String,
    },
    /// The node refused, and said why.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
}

impl ClientError {
    fn broken(operation: &'static str, source: impl std::fmt::Display) -> ClientError {
        ClientError::Broken {
            operation,
            message: source.to_string(),
        }
    }

    /// The node's own error, where it gave one.
    pub fn body(&self) -> Option<&ErrorBody> {
        match self {
            ClientError::Refused(body) => Some(body),
            ClientError::Unreachable { .. } | ClientError::Broken { .. } => None,
        }
    }
}

/// A node's client. Each request opens its own connection: over a Unix socket that takes some microseconds.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    server_version: Arc<OnceLock<String>>,
    /// The node that requests go to through the local one; the local one itself where absent.
    on: Option<String>,
    /// Under which machines are made.
    offer: Option<String>,
}

/// Percent-encodes one path segment or query value.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

impl Client {
    /// A client of the node that listens on this socket. Nothing is sent yet.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client {
            socket: socket.into(),
            server_version: Arc::default(),
            on: None,
            offer: None,
        }
    }

    /// The version of the program that serves the node, once it has answered anything.
    pub fn server_version(&self) -> Option<&str> {
        self.server_version.get().map(String::as_str)
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable {
                path: self.socket.clone(),
                source,
            })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
        match &self.on {
            None => {
                let stream = self.connect().await?;
                self.exchange(TokioIo::new(stream), request).await
            }
            Some(node) => {
                let stream = self.node_stream(node).await?;
                self.exchange(stream, request).await
            }
        }
    }

    /// One request over a connection of its own.
    async fn exchange<T>(
        &self,
        stream: T,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, ClientError>
    where
        T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(|error| ClientError::broken("connecting", error))?;
        // The connection's own task ends with the connection; the sender and the body hold it open.
        tokio::spawn(connection.with_upgrades());
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| ClientError::broken(SENDING, error))?;
        if let Some(version) = response.headers().get(crate::SERVER_VERSION_HEADER)
            && let Ok(version) = version.to_str()
        {
            // Later answers come from the same program or from one that replaced it; the first is what the user is told.
            let _ = self.server_version.set(version.to_owned());
        }
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let body = Self::whole(response).await?;
        Err(match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => ClientError::Refused(body),
            Err(_) => ClientError::Broken {
                operation: "reading the answer",
                message: format!("status {status}: {}", String::from_utf8_lossy(&body)),
            },
        })
    }

    async fn whole(response: Response<Incoming>) -> Result<Bytes, ClientError> {
        http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| ClientError::broken("reading the answer", error))
    }

    fn request(
        method: Method,
        path: &str,
        body: Body,
        kind: &str,
    ) -> Result<Request<Body>, ClientError> {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vistara")
            .header("content-type", kind)
            .body(body)
            .map_err(|error| ClientError::broken("making the request", error))
    }

    fn json_request<T: Serialize>(
        method: Method,
        path: &str,
        body: &T,
    ) -> Result<Request<Body>, ClientError> {
        let text = serde_json::to_vec(body)
            .map_err(|error| ClientError::broken("making the request", error))?;
        let body = Full::new(Bytes::from(text))
            .map_err(|never| match never {})
            .boxed_unsync();
        Self::request(method, path, body, "application/json")
    }

    async fn call<T: DeserializeOwned>(&self, request: Request<Body>) -> Result<T, ClientError> {
        let body = Self::whole(self.send(request).await?).await?;
        serde_json::from_slice(&body)
            .map_err(|error| ClientError::broken("reading the answer", error))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let question = || Self::request(Method::GET, path, empty(), "application/json");
        match self.call(question()?).await {
            // Another node that has just come back may be asked over the connection with what it was before, which closes.
            // Nothing was done then, and a question may be asked twice.
            Err(ClientError::Broken { operation, .. })
                if operation == SENDING && self.on.is_some() =>
            {
                self.call(question()?).await
            }
            answer => answer,
        }
    }

    async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Self::request(
            Method::DELETE,
            path,
            empty(),
            "application/json",
        )?)
        .await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.call(Self::json_request(Method::POST, path, body)?)
            .await
    }

    async fn events<T: DeserializeOwned + Send + 'static>(
        &self,
        request: Request<Body>,
    ) -> Result<Events<T>, ClientError> {
        let response = self.send(request).await?;
        let body = response.into_body().into_data_stream();
        Ok(Box::pin(futures_util::stream::unfold(
            (body, Vec::<u8>::new()),
            |(mut body, mut buffer)| async move {
                loop {
                    while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                        let event: Vec<u8> = buffer.drain(..end + 2).collect();
                        if let Some(data) = event.strip_prefix(b"data: ") {
                            let item = serde_json::from_slice(data.trim_ascii_end())
                                .map_err(|error| ClientError::broken("reading an event", error));
                            return Some((item, (body, buffer)));
                        }
                    }
                    if buffer.len() > EVENT_BYTES_MAX {
                        let error = ClientError::broken("reading an event", "it is too long");
                        return Some((Err(error), (body, Vec::new())));
                    }
                    match body.next().await {
                        Some(Ok(data)) => buffer.extend_from_slice(&data),
                        Some(Err(error)) => {
                            let error = ClientError::broken("reading an event", error);
                            return Some((Err(error), (body, Vec::new())));
                        }
                        None => return None,
                    }
                }
            },
        )))
    }

    /// Version and state of the node.
    ///
    /// # Errors
    /// [`ClientError`], as every method here.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/v1/version").await
    }

    /// What the node has and lacks. Probes again where `fresh`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn doctor(&self, fresh: bool) -> Result<DoctorReport, ClientError> {
        self.get(&format!("/v1/doctor?fresh={fresh}")).await
    }

    /// Asks the node to leave. Machines go on running and are found again by the next node.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        self.post("/v1/shutdown", &()).await
    }

    /// Creates and starts a machine. Answers once it is accepted; attach to follow it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] of kind [`ErrorKind::ImageNotFound`] where the image must be pulled first.
    pub async fn run(&self, request: &RunRequest) -> Result<Machine, ClientError> {
        match &self.offer {
            Some(offer) => {
                let path = format!("/v1/machines?offer={}", encode(offer));
                self.post(&path, request).await
            }
            None => self.post("/v1/machines", request).await,
        }
    }

    /// Which hypervisor this request would get.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn explain(&self, request: &RunRequest) -> Result<Explanation, ClientError> {
        self.post("/v1/explain", request).await
    }

    /// Machines: those that are not ended, or all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn machines(&self, all: bool) -> Result<Vec<Machine>, ClientError> {
        self.get(&format!("/v1/machines?all={all}")).await
    }

    /// One machine by id, name or unambiguous id prefix.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn machine(&self, machine: &str) -> Result<MachineDetail, ClientError> {
        self.get(&format!("/v1/machines/{}", encode(machine))).await
    }

    /// Removes an ended machine, or with `force` any.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_machine(&self, machine: &str, force: bool) -> Result<(), ClientError> {
        let path = format!("/v1/machines/{}?force={force}", encode(machine));
        self.delete(&path).await
    }

    /// Asks a program to end, and takes its machine down; answers when it is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stop(&self, machine: &str, request: &StopRequest) -> Result<Machine, ClientError> {
        self.post(&format!("/v1/machines/{}/stop", encode(machine)), request)
            .await
    }

    /// Sends a signal to a machine's program.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn kill(&self, machine: &str, request: &KillRequest) -> Result<Machine, ClientError> {
        self.post(&format!("/v1/machines/{}/kill", encode(machine)), request)
            .await
    }

    /// Waits for a machine's end.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn wait(&self, machine: &str) -> Result<WaitAnswer, ClientError> {
        self.get(&format!("/v1/machines/{}/wait", encode(machine)))
            .await
    }

    /// What a machine printed. `since` is RFC 3339; `tail` counts lines from the end.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn logs(
        &self,
        machine: &str,
        follow: bool,
        since: Option<&str>,
        tail: Option<u64>,
    ) -> Result<Events<LogEvent>, ClientError> {
        let mut path = format!("/v1/machines/{}/logs?follow={follow}", encode(machine));
        if let Some(since) = since {
            path.push_str(&format!("&since={}", encode(since)));
        }
        if let Some(tail) = tail {
            path.push_str(&format!("&tail={tail}"));
        }
        self.events(Self::request(
            Method::GET,
            &path,
            empty(),
            "text/event-stream",
        )?)
        .await
    }

    /// The end of the guest's console.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn console(&self, machine: &str) -> Result<Bytes, ClientError> {
        let path = format!("/v1/machines/{}/console", encode(machine));
        Self::whole(
            self.send(Self::request(
                Method::GET,
                &path,
                empty(),
                "application/json",
            )?)
            .await?,
        )
        .await
    }

    /// What a machine uses, once a second until dropped, or once.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stats(&self, machine: &str, stream: bool) -> Result<Events<Stats>, ClientError> {
        let path = format!("/v1/machines/{}/stats?stream={stream}", encode(machine));
        self.events(Self::request(
            Method::GET,
            &path,
            empty(),
            "text/event-stream",
        )?)
        .await
    }

    /// What a path in a guest is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stat(&self, machine: &str, path: &str) -> Result<PathStat, ClientError> {
        self.get(&format!(
            "/v1/machines/{}/stat?path={}",
            encode(machine),
            encode(path)
        ))
        .await
    }

    /// A file or tree of a guest as a tar stream; its one top entry has the path's last name. A failure midway is an
    /// error of the stream.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn archive_out(
        &self,
        machine: &str,
        path: &str,
        follow_link: bool,
    ) -> Result<Events<Bytes>, ClientError> {
        let path = format!(
            "/v1/machines/{}/archive?path={}&follow_link={follow_link}",
            encode(machine),
            encode(path)
        );
        let response = self
            .send(Self::request(
                Method::GET,
                &path,
                empty(),
                "application/x-tar",
            )?)
            .await?;
        let stream = response.into_body().into_data_stream();
        Ok(Box::pin(stream.map(|item| {
            item.map_err(|error| ClientError::broken("reading the archive", error))
        })))
    }

    /// Unpacks a tar stream in a directory of a guest.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn archive_in(
        &self,
        machine: &str,
        directory: &str,
        tar: impl AsyncRead + Send + 'static,
    ) -> Result<(), ClientError> {
        let path = format!(
            "/v1/machines/{}/archive?path={}",
            encode(machine),
            encode(directory)
        );
        self.call(Self::request(
            Method::PUT,
            &path,
            reader_body(tar),
            "application/x-tar",
        )?)
        .await
    }

    /// Images of the node.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.get("/v1/images").await
    }

    /// One image by name, id or unambiguous id prefix.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn image(&self, image: &str) -> Result<Image, ClientError> {
        self.get(&format!("/v1/image?image={}", encode(image)))
            .await
    }

    /// Pulls an image; the last event is `done` or `failed`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pull(&self, request: &PullRequest) -> Result<Events<ImageEvent>, ClientError> {
        self.events(Self::json_request(
            Method::POST,
            "/v1/images/pull",
            request,
        )?)
        .await
    }

    /// Imports an image archive (OCI layout tar, `docker save` tar, root file-system tar, each plain or compressed).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn import(
        &self,
        name: Option<&str>,
        archive: impl AsyncRead + Send + 'static,
    ) -> Result<Events<ImageEvent>, ClientError> {
        let path = match name {
            Some(name) => format!("/v1/images/import?name={}", encode(name)),
            None => "/v1/images/import".to_owned(),
        };
        self.events(Self::request(
            Method::POST,
            &path,
            reader_body(archive),
            "application/x-tar",
        )?)
        .await
    }

    /// Removes a name, or an image by id.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_image(
        &self,
        image: &str,
        force: bool,
    ) -> Result<RemovedImage, ClientError> {
        let path = format!("/v1/image?image={}&force={force}", encode(image));
        self.delete(&path).await
    }

    /// Gives an image another name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn tag_image(&self, image: &str, name: &str) -> Result<Image, ClientError> {
        let path = format!(
            "/v1/images/tag?image={}&name={}",
            encode(image),
            encode(name)
        );
        self.post(&path, &()).await
    }

    /// Removes images that no machine uses: those without a name, or `all`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn prune_images(&self, all: bool) -> Result<Pruned, ClientError> {
        self.post(&format!("/v1/images/prune?all={all}"), &()).await
    }

    /// Attaches to a machine's program.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn attach(
        &self,
        machine: &str,
        request: &AttachRequest,
    ) -> Result<Streams, ClientError> {
        self.streams(&format!("/v1/machines/{}/attach", encode(machine)), request)
            .await
    }

    /// Runs another program in a running machine.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn exec(&self, machine: &str, request: &ExecRequest) -> Result<Streams, ClientError> {
        self.streams(&format!("/v1/machines/{}/exec", encode(machine)), request)
            .await
    }

    async fn streams<T: Serialize>(&self, path: &str, first: &T) -> Result<Streams, ClientError> {
        let request = Request::builder()
            .uri(path)
            .header("host", "vistara")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            // The key only proves that the other side speaks WebSocket; on a Unix socket there is no cache to fool.
            .header("sec-websocket-key", "dmlzdGFyYS12aXN0YXJhIQ==")
            .body(empty())
            .map_err(|error| ClientError::broken("making the request", error))?;
        let response = self.send(request).await?;
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| ClientError::broken("attaching", error))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let mut socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config))
                .await;
        let text = serde_json::to_string(first)
            .map_err(|error| ClientError::broken("attaching", error))?;
        socket
            .send(Message::text(text))
            .await
            .map_err(|error| ClientError::broken("attaching", error))?;
        let (sink, stream) = socket.split();
        Ok(Streams {
            input: StreamsInput { sink },
            output: StreamsOutput { stream },
        })
    }
}

fn reader_body(reader: impl AsyncRead + Send + 'static) -> Body {
    let stream = futures_util::stream::unfold(Box::pin(reader), |mut reader| async move {
        use tokio::io::AsyncReadExt;
        let mut buffer = vec![0; 64 << 10];
        match reader.read(&mut buffer).await {
            Ok(0) => None,
            Ok(count) => {
                buffer.truncate(count);
                Some((Ok(Frame::data(Bytes::from(buffer))), reader))
            }
            Err(error) => Some((Err(error), reader)),
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(stream))
}
