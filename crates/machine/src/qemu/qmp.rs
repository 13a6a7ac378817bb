//! A client of QEMU's machine protocol (QMP): one connection, requests one after another, and a bell that rings when the
//! machine's state may have changed.
//!
//! Events are not queued: a guest could fill any queue. Those that tell of a change ring the bell, and whoever hears it
//! asks for the state. Lines are bounded, every request has a time limit, and a late answer is told by its id and dropped.

use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::JoinHandle;

/// Longest line taken from QEMU: four times the largest answer we ask for, a full console ring in base64.
const LINE_MAX: u64 = 512 << 10;

/// How long an answer may take. QEMU answers in less than a millisecond; under heavy load its main loop starves.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Events after which the machine's state may be another.
const EVENTS_OF_CHANGE: [&str; 7] = [
    "SHUTDOWN",
    "STOP",
    "RESUME",
    "RESET",
    "BLOCK_IO_ERROR",
    "GUEST_PANICKED",
    "GUEST_CRASHLOADED",
];

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// QEMU refused; its words.
    #[error("{0}")]
    Refused(String),
    /// The connection ended: QEMU is gone, or going.
    #[error("the connection to QEMU ended")]
    Closed,
    /// No answer in time.
    #[error("QEMU did not answer within {REPLY_LIMIT:?}")]
    Late,
    /// Not what the protocol says.
    #[error("QEMU answered with something that is not its protocol: {0}")]
    Malformed(String),
}

/// The state of a machine, as `query-status` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunState {
    /// The guest runs.
    Running,
    /// Somebody stopped it.
    Paused,
    /// A disk request failed on the host, and the guest waits for it to be tried again.
    IoError,
    /// The guest has ended, by power-off, reset or panic; the machine is kept for its console.
    Ended,
    /// The accelerator cannot go on.
    InternalError,
}

/// What a state is called; states in between (a snapshot being taken) pass for paused, and are never ours.
fn run_state(name: &str) -> RunState {
    match name {
        "running" => RunState::Running,
        "io-error" => RunState::IoError,
        "shutdown" | "guest-panicked" => RunState::Ended,
        "internal-error" => RunState::InternalError,
        _ => RunState::Paused,
    }
}

/// A connection that has been greeted.
pub(super) struct Qmp {
    requests: Mutex<Requests>,
    changed: Arc<Notify>,
    reader: JoinHandle<()>,
}

struct Requests {
    writer: OwnedWriteHalf,
    answers: mpsc::Receiver<Value>,
    last_id: u64,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Waits for QEMU's greeting, which comes once its machine has been built and its main loop runs, and answers it.
    ///
    /// The bell rings once at the beginning: what happened before is to be asked for.
    pub(super) async fn handshake(stream: UnixStream) -> Result<Qmp, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = next_line(&mut reader).await?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed("no greeting".to_owned()));
        }
        let changed = Arc::new(Notify::new());
        let (sender, answers) = mpsc::channel(4);
        let reader = tokio::spawn(read_lines(reader, sender, changed.clone()));
        let qmp = Qmp {
            requests: Mutex::new(Requests {
                writer,
                answers,
                last_id: 0,
            }),
            changed,
            reader,
        };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        qmp.changed.notify_one();
        Ok(qmp)
    }

    /// Waits until the machine's state may have changed, or the connection has ended. One waiter at a time.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether the connection has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.reader.is_finished()
    }

    async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        tokio::time::timeout(REPLY_LIMIT, self.execute_unbounded(command, arguments))
            .await
            .map_err(|_| QmpError::Late)?
    }

    async fn execute_unbounded(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut requests = self.requests.lock().await;
        requests.last_id += 1;
        let id = requests.last_id;
        let mut line = match arguments {
            Value::Null => json!({"execute": command, "id": id}),
            arguments => json!({"execute": command, "arguments": arguments, "id": id}),
        }
        .to_string();
        line.push('\n');
        let written = requests.writer.write_all(line.as_bytes()).await;
        written.map_err(|_| QmpError::Closed)?;
        loop {
            let mut answer = requests.answers.recv().await.ok_or(QmpError::Closed)?;
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            let text = answer["error"]["desc"].as_str().unwrap_or("no reason");
            return Err(QmpError::Refused(text.to_owned()));
        }
    }

    /// The machine's state.
    pub(super) async fn status(&self) -> Result<RunState, QmpError> {
        let answer = self.execute("query-status", Value::Null).await?;
        answer["status"]
            .as_str()
            .map(run_state)
            .ok_or_else(|| QmpError::Malformed(answer.to_string()))
    }

    /// Stops the guest; nothing happens where it is stopped already.
    pub(super) async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).await.map(drop)
    }

    /// Lets the guest go on; nothing happens where it runs.
    pub(super) async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).await.map(drop)
    }

    /// Ends QEMU. It may be gone before it has answered.
    pub(super) async fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null).await {
            Ok(_) | Err(QmpError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes what is in the ring of console output.
    pub(super) async fn read_ring(&self, device: &str, size: usize) -> Result<Vec<u8>, QmpError> {
        let arguments = json!({"device": device, "size": size, "format": "base64"});
        let answer = self.execute("ringbuf-read", arguments).await?;
        let text = answer.as_str().unwrap_or_default();
        from_base64(text).ok_or_else(|| QmpError::Malformed("not base64".to_owned()))
    }

    /// Whether a disk waits because the host's file system is full.
    pub(super) async fn disk_is_full(&self) -> Result<bool, QmpError> {
        let answer = self.execute("query-block", Value::Null).await?;
        Ok(answer
            .as_array()
            .is_some_and(|disks| disks.iter().any(|disk| disk["io-status"] == "nospace")))
    }
}

async fn next_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Value, QmpError> {
    let mut line = Vec::new();
    let got = reader.take(LINE_MAX).read_until(b'\n', &mut line).await;
    match got {
        Ok(0) | Err(_) => Err(QmpError::Closed),
        Ok(_) if !line.ends_with(b"\n") => {
            Err(QmpError::Malformed("a line without end".to_owned()))
        }
        Ok(_) => {
            serde_json::from_slice(&line).map_err(|error| QmpError::Malformed(error.to_string()))
        }
    }
}

/// Sorts what QEMU says until it stops: answers to the requester, changes to the bell.
async fn read_lines(
    mut reader: BufReader<OwnedReadHalf>,
    answers: mpsc::Sender<Value>,
    changed: Arc<Notify>,
) {
    loop {
        match next_line(&mut reader).await {
            Ok(line) => match line.get("event").and_then(Value::as_str) {
                Some(event) if EVENTS_OF_CHANGE.contains(&event) => changed.notify_one(),
                Some(_) => {}
                None => {
                    // At most a few late answers can lie here: each has had its request.
                    if answers.send(line).await.is_err() {
                        break;
                    }
                }
            },
            Err(error) => {
                tracing::debug!(%error, "the QMP connection is over");
                break;
            }
        }
    }
    drop(answers);
    changed.notify_one();
}

/// Decodes standard base64 with padding (RFC 4648, section 4); `None` where the text is none.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.as_bytes().chunks(4) {
        let mut bits: u32 = 0;
        for byte in group {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        let bytes = bits.to_be_bytes();
        match group.len() {
            4 => out.extend_from_slice(&bytes[1..4]),
            3 => out.extend_from_slice(&bytes[1..3]),
            2 => out.push(bytes[1]),
            _ => return None,
        }
    }
    Some(out)
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
