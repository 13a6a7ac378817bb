//! A client of QEMU's machine protocol (QMP): one connection, requests one after another, and a bell that rings when the
//! machine's state may have changed.
//!
//! Events are not queued: a guest could fill any queue. Those that tell of a change ring the bell, and whoever hears it
//! asks for the state. Lines are bounded, every request has a time limit, and a late answer is told by its id and dropped.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::JoinHandle;

/// Longest line taken from QEMU: four times the largest answer we ask for, a full console ring in base64.
const LINE_MAX: u64 = 512 << 10;

/// How long an answer may take. QEMU answers in less than a millisecond; under heavy load its main loop starves.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// QEMU's name for the file from which, or to which, state is transferred.
pub(super) const STATE_NAME: &str = "state";

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
    migrated: Arc<Notify>,
    /// Whether the last transfer of state is over and went well.
    migration_is_complete: Arc<AtomicBool>,
    reader: JoinHandle<()>,
}

struct Requests {
    writer: OwnedWriteHalf,
    answers: mpsc::Receiver<Value>,
    last_id: u64,
}

impl Requests {
    /// A request as it is sent, with its id.
    fn line(&mut self, command: &str, arguments: &Value) -> (u64, String) {
        self.last_id += 1;
        let id = self.last_id;
        let line = match arguments {
            Value::Null => json!({"execute": command, "id": id}),
            arguments => json!({"execute": command, "arguments": arguments, "id": id}),
        };
        (id, format!("{line}\n"))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), QmpError> {
        let written = self.writer.write_all(bytes).await;
        written.map_err(|_| QmpError::Closed)
    }

    /// Waits for the answer to the request of this id; those to earlier ones, for which nobody waits any more, are dropped.
    async fn answer(&mut self, id: u64) -> Result<Value, QmpError> {
        loop {
            let mut answer = self.answers.recv().await.ok_or(QmpError::Closed)?;
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
}

/// What both ends of a transfer of state must have agreed on: memory that is shared with a file is left out, and its end is told.
fn capabilities() -> (&'static str, Value) {
    let on = |capability: &str| json!({"capability": capability, "state": true});
    let all = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
    ("migrate-set-capabilities", all)
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
        let migrated = Arc::new(Notify::new());
        let migration_is_complete = Arc::new(AtomicBool::new(false));
        let (sender, answers) = mpsc::channel(4);
        let bells = Bells {
            changed: changed.clone(),
            migrated: migrated.clone(),
            migration_is_complete: migration_is_complete.clone(),
        };
        let reader = tokio::spawn(read_lines(reader, sender, bells));
        let qmp = Qmp {
            requests: Mutex::new(Requests {
                writer,
                answers,
                last_id: 0,
            }),
            changed,
            migrated,
            migration_is_complete,
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
        tokio::time::timeout(REPLY_LIMIT, self.request(command, arguments, None))
            .await
            .map_err(|_| QmpError::Late)?
    }

    /// A request without a time limit, and a descriptor that goes with it.
    async fn request(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let mut requests = self.requests.lock().await;
        let (id, line) = requests.line(command, &arguments);
        let mut line = line.as_bytes();
        if let Some(descriptor) = descriptor {
            let sent = send_with(requests.writer.as_ref(), line, descriptor).await;
            line = &line[sent.map_err(|_| QmpError::Closed)?..];
        }
        requests.write(line).await?;
        requests.answer(id).await
    }

    /// Requests without a time limit that are sent in one piece and carried out one after another. The first that is refused
    /// is told, and those after it are carried out all the same.
    async fn request_all(&self, asked: &[(&str, Value)]) -> Result<(), QmpError> {
        let mut requests = self.requests.lock().await;
        let (ids, lines): (Vec<u64>, Vec<String>) = (asked.iter())
            .map(|(command, arguments)| requests.line(command, arguments))
            .unzip();
        requests.write(lines.concat().as_bytes()).await?;
        for id in ids {
            requests.answer(id).await?;
        }
        Ok(())
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

    /// Writes the state of the stopped machine to `file`, without memory that is shared with a file.
    pub(super) async fn save_state(&self, file: &File) -> Result<(), QmpError> {
        self.migration_is_complete.store(false, Ordering::Relaxed);
        let (command, arguments) = capabilities();
        self.execute(command, arguments).await?;
        let hand_over = self.request("getfd", json!({"fdname": STATE_NAME}), Some(file.as_fd()));
        tokio::time::timeout(REPLY_LIMIT, hand_over)
            .await
            .map_err(|_| QmpError::Late)??;
        self.execute("migrate", json!({"uri": format!("fd:{STATE_NAME}")}))
            .await?;
        self.transferred().await
    }

    /// Reads the state that [`Qmp::save_state`] has written from the descriptor of this number in QEMU, which was started to
    /// wait for it, and lets the guest go on.
    ///
    /// This is in the way of every fork, so it is said in as few words and as few turns as there can be: QEMU 7.2 takes a byte
    /// of a request in 7 µs.
    pub(super) async fn load_state_and_cont(&self, descriptor: i32) -> Result<(), QmpError> {
        let load = json!({"uri": format!("fd:{descriptor}")});
        let requests = [capabilities(), ("migrate-incoming", load)];
        let begun = self.request_all(&requests);
        tokio::time::timeout(REPLY_LIMIT, begun)
            .await
            .map_err(|_| QmpError::Late)??;
        self.transferred().await?;
        self.cont().await
    }

    /// Waits until the transfer of state that has been begun is over.
    async fn transferred(&self) -> Result<(), QmpError> {
        let done = async {
            loop {
                self.migrated.notified().await;
                if self.migration_is_complete.swap(false, Ordering::Relaxed) {
                    return Ok(());
                }
                let answer = self.execute("query-migrate", Value::Null).await?;
                match answer["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed" | "cancelled") => {
                        let reason = answer["error-desc"].as_str();
                        return Err(QmpError::Refused(
                            reason.unwrap_or("its state does not fit").to_owned(),
                        ));
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(REPLY_LIMIT, done)
            .await
            .map_err(|_| QmpError::Late)?
    }

    /// Writes the state of the stopped machine's devices and processors to `file`, and nothing of its memory.
    pub(super) async fn save_devices(&self, file: &File) -> Result<(), QmpError> {
        // Its number among QEMU's sets of descriptors: those of disks count from 0.
        const SET: u32 = 1_000_000;
        let hand_over = self.request("add-fd", json!({"fdset-id": SET}), Some(file.as_fd()));
        tokio::time::timeout(REPLY_LIMIT, hand_over)
            .await
            .map_err(|_| QmpError::Late)??;
        // The name is history: nothing of it needs Xen, and no other command leaves the memory out that no file shares.
        let arguments = json!({"filename": format!("/dev/fdset/{SET}"), "live": false});
        let saved = self.execute("xen-save-devices-state", arguments).await;
        // It stays open for nobody, which harms nothing.
        let _ = self.execute("remove-fd", json!({"fdset-id": SET})).await;
        saved.map(drop)
    }

    /// Where in QEMU's own address space the guest's memory begins.
    pub(super) async fn memory_address(&self) -> Result<u64, QmpError> {
        let arguments = json!({"command-line": "gpa2hva 0"});
        let answer = self.execute("human-monitor-command", arguments).await?;
        let text = answer.as_str().unwrap_or_default().trim();
        let address = text.rsplit_once(" is 0x").map(|(_, digits)| digits);
        address
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| QmpError::Malformed(text.to_owned()))
    }

    /// Presses the machine's power button.
    pub(super) async fn power_down(&self) -> Result<(), QmpError> {
        self.execute("system_powerdown", Value::Null)
            .await
            .map(drop)
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

/// Sends the beginning of `bytes`, and a descriptor with it. Gives how many bytes went.
async fn send_with(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> std::io::Result<usize> {
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let descriptors = [descriptor];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            let parts = [IoSlice::new(bytes)];
            Ok(sendmsg(
                stream,
                &parts,
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?)
        });
        match sent {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => return other,
        }
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

/// What rings when something has happened.
struct Bells {
    changed: Arc<Notify>,
    migrated: Arc<Notify>,
    migration_is_complete: Arc<AtomicBool>,
}

impl Bells {
    /// A transfer of state is in another phase: rings where it is over.
    fn migration(&self, status: Option<&str>) {
        match status {
            Some("completed") => self.migration_is_complete.store(true, Ordering::Relaxed),
            Some("failed" | "cancelled") | None => {}
            Some(_) => return,
        }
        self.migrated.notify_one();
    }
}

/// Sorts what QEMU says until it stops: answers to the requester, changes to the bell.
async fn read_lines(
    mut reader: BufReader<OwnedReadHalf>,
    answers: mpsc::Sender<Value>,
    bells: Bells,
) {
    loop {
        match next_line(&mut reader).await {
            Ok(line) => match line.get("event").and_then(Value::as_str) {
                Some(event) if EVENTS_OF_CHANGE.contains(&event) => bells.changed.notify_one(),
                Some("MIGRATION") => bells.migration(line["data"]["status"].as_str()),
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
    bells.changed.notify_one();
    bells.migrated.notify_one();
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
