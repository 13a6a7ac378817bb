//! A program's streams, as a client has them.

use super::ClientError;
use crate::stream::{ClientSignal, STDERR, STDOUT, StreamEvent};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

pub(super) type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// A program's streams: what goes in and what comes out.
#[derive(Debug)]
pub struct Streams {
    /// Towards the program.
    pub input: StreamsInput,
    /// From the program.
    pub output: StreamsOutput,
}

/// Towards the program.
#[derive(Debug)]
pub struct StreamsInput {
    pub(super) sink: futures_util::stream::SplitSink<Socket, Message>,
}

impl StreamsInput {
    /// Sends bytes to standard input; waits while the program does not read.
    ///
    /// # Errors
    /// [`ClientError::Broken`] once the stream is gone.
    pub async fn write(&mut self, data: Bytes) -> Result<(), ClientError> {
        self.sink
            .send(Message::Binary(data))
            .await
            .map_err(|error| ClientError::broken("sending input", error))
    }

    /// Sends a signal, a size or the end of input.
    ///
    /// # Errors
    /// [`ClientError::Broken`] once the stream is gone.
    pub async fn signal(&mut self, signal: &ClientSignal) -> Result<(), ClientError> {
        let text = serde_json::to_string(signal)
            .map_err(|error| ClientError::broken("sending a signal", error))?;
        self.sink
            .send(Message::text(text))
            .await
            .map_err(|error| ClientError::broken("sending a signal", error))
    }
}

/// From the program.
#[derive(Debug)]
pub struct StreamsOutput {
    pub(super) stream: futures_util::stream::SplitStream<Socket>,
}

/// One thing that came from a program or its node.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamItem {
    /// Standard output.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// Anything else.
    Event(StreamEvent),
}

impl StreamsOutput {
    /// The next item; `None` when the node has closed the stream.
    ///
    /// # Errors
    /// [`ClientError::Broken`] when the connection is lost or the node talks nonsense.
    pub async fn next(&mut self) -> Result<Option<StreamItem>, ClientError> {
        loop {
            match self.stream.next().await {
                None | Some(Ok(Message::Close(_))) => return Ok(None),
                Some(Err(error)) => return Err(ClientError::broken("reading output", error)),
                Some(Ok(Message::Binary(data))) => match data.first() {
                    Some(&STDOUT) => return Ok(Some(StreamItem::Stdout(data.slice(1..)))),
                    Some(&STDERR) => return Ok(Some(StreamItem::Stderr(data.slice(1..)))),
                    _ => return Err(ClientError::broken("reading output", "unknown stream")),
                },
                Some(Ok(Message::Text(text))) => {
                    return serde_json::from_str(&text)
                        .map(|event| Some(StreamItem::Event(event)))
                        .map_err(|error| ClientError::broken("reading an event", error));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
            }
        }
    }
}
