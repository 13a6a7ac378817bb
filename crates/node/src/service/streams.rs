//! Attaching to a machine's program, and executing others: standard streams over a WebSocket.

use super::App;
use crate::fault::{Answer, Fault};
use crate::logbook::{Entry, Start, Stream as Output};
use crate::machine::{Command, Handle, HeldInput, Record, STOP_GRACE, exit_status};
use crate::receipts;
use crate::view;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::stream::{ClientSignal, MESSAGE_BYTES_MAX, STDERR, STDOUT, StreamEvent};
use vistara_api::{AttachRequest, ErrorKind, ExecRequest};
use vistara_guest_client::{
    AgentError, Input, OutputStream, Process, ProcessHandle, ProcessId, ProcessSpec, SpawnError,
    TtySize,
};
use vistara_model::{EndReason, MachineState, Signal};

/// How long a client may take to say what it wants.
const FIRST_WORD_BOUND: Duration = Duration::from_secs(10);
/// How often a machine is looked at for troubles that its user should hear of.
const TROUBLE_EVERY: Duration = Duration::from_secs(1);
/// Messages of input that may wait for a program to read them: 1 MiB as our client sends them.
const INPUT_QUEUE: usize = 16;
/// Bytes of output in one message to a client.
const PIECE_BYTES: usize = 64 << 10;

type Sink = SplitSink<WebSocket, Message>;

/// The client is gone.
struct Gone;

async fn say(sink: &mut Sink, event: &StreamEvent) -> Result<(), Gone> {
    let text = serde_json::to_string(event).map_err(|_| Gone)?;
    sink.send(Message::text(text)).await.map_err(|_| Gone)
}

async fn send(sink: &mut Sink, stream: u8, bytes: &[u8]) -> Result<(), Gone> {
    for piece in bytes.chunks(PIECE_BYTES) {
        let mut message = BytesMut::with_capacity(piece.len() + 1);
        message.put_u8(stream);
        message.put_slice(piece);
        sink.send(Message::Binary(message.freeze()))
            .await
            .map_err(|_| Gone)?;
    }
    Ok(())
}

async fn first_word<T: serde::de::DeserializeOwned>(
    stream: &mut SplitStream<WebSocket>,
) -> Answer<T> {
    let word = tokio::time::timeout(FIRST_WORD_BOUND, stream.next()).await;
    match word {
        Ok(Some(Ok(Message::Text(text)))) => serde_json::from_str(&text).map_err(|error| {
            Fault::user(format!(
                "the first message of the stream is not understood: {error}"
            ))
        }),
        _ => Err(Fault::user(
            "the stream must begin with a text message that says what is wanted",
        )),
    }
}

/// What a client sent after its first word.
enum FromClient {
    Input(Bytes),
    Signal(ClientSignal),
    Closed,
}

async fn from_client(stream: &mut SplitStream<WebSocket>) -> FromClient {
    loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => return FromClient::Input(bytes),
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(signal) => return FromClient::Signal(signal),
                Err(error) => {
                    tracing::debug!(%error, "a client said something that is not understood")
                }
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return FromClient::Closed,
        }
    }
}

/// Attaches to a machine's program: a WebSocket whose first message is an `AttachRequest`.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/attach",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 101, description = "A WebSocket; see the schemas ClientSignal and StreamEvent"))
)]
pub(super) async fn attach(
    State(app): State<App>,
    Path(machine): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let handle = app.node.find(&machine)?;
    Ok(upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .on_upgrade(move |socket| async move {
            let (mut sink, mut stream) = socket.split();
            match first_word::<AttachRequest>(&mut stream).await {
                // Whatever ends it, the client is gone or has heard the end.
                Ok(request) => drop(attached(&handle, request, &mut sink, stream).await),
                Err(fault) => drop(say(&mut sink, &StreamEvent::Failed { error: fault.0 }).await),
            }
            let _ = sink.close().await;
        }))
}

async fn attached(
    handle: &Arc<Handle>,
    request: AttachRequest,
    sink: &mut Sink,
    stream: SplitStream<WebSocket>,
) -> Result<(), Gone> {
    let start = if request.from_start {
        Start::Oldest
    } else {
        Start::Now
    };
    let mut reader = handle.log.reader(start, true);
    let has_input = request.stdin && handle.record().spec.stdin;
    let input = tokio::spawn(attached_input(Arc::clone(handle), stream, has_input));
    let _stop_input = AbortOnDrop(input.abort_handle());
    let mut input = input;
    let mut snapshot = handle.snapshot.clone();
    let mut started = false;
    let mut told: Option<String> = None;
    let mut ticker = tokio::time::interval(TROUBLE_EVERY);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let now = snapshot.borrow_and_update().clone();
        if !started && now.record.started_ns.is_some() {
            started = true;
            say(
                sink,
                &StreamEvent::Started {
                    machine: Box::new(view::machine(&now)),
                },
            )
            .await?;
        }
        let vm_trouble = handle
            .shared
            .vm
            .borrow()
            .as_ref()
            .and_then(|vm| vm.trouble());
        let trouble = now.trouble.clone().or(vm_trouble);
        if trouble != told {
            if let Some(message) = &trouble {
                say(
                    sink,
                    &StreamEvent::Notice {
                        message: message.clone(),
                    },
                )
                .await?;
            }
            told = trouble;
        }
        tokio::select! {
            entry = reader.next(true) => match entry {
                Ok(Some(Entry::Output { stream, bytes, .. })) => {
                    let stream = match stream {
                        Output::Stdout => STDOUT,
                        Output::Stderr => STDERR,
                    };
                    send(sink, stream, &bytes).await?;
                }
                Ok(Some(Entry::Gap { bytes, reason })) => {
                    let message = format!("{bytes} bytes of output are missing: {reason}");
                    say(sink, &StreamEvent::Notice { message }).await?;
                }
                Ok(None) => break,
                Err(error) => {
                    let fault = Fault::new(ErrorKind::Host, format!("the log cannot be read: {error}"));
                    return say(sink, &StreamEvent::Failed { error: fault.0 }).await;
                }
            },
            _ = snapshot.changed() => {}
            _ = ticker.tick() => {}
            // The client has detached; an error can only be our own abort.
            _ = &mut input => return Ok(()),
        }
    }
    let end = handle.wait_end().await;
    if let Some(message) = end.record.undone.clone() {
        say(sink, &StreamEvent::Notice { message }).await?;
    }
    if request.receipt {
        say(sink, &receipt(&end.record)).await?;
    }
    // A machine is not removed while somebody reads what it printed.
    drop(reader);
    if end.record.spec.auto_remove {
        // The next machine may want its name.
        handle.wait_until(|snapshot| snapshot.removed).await;
    }
    say(sink, &ended(end.record.end.as_ref())).await
}

fn receipt(record: &Record) -> StreamEvent {
    match receipts::of(record) {
        Ok(text) => StreamEvent::Receipt {
            receipt: Some(text.to_owned()),
            missing: None,
        },
        Err(fault) => StreamEvent::Receipt {
            receipt: None,
            missing: Some(fault.0.message),
        },
    }
}

fn ended(end: Option<&EndReason>) -> StreamEvent {
    match end {
        Some(EndReason::StartFailed { code, message }) => StreamEvent::Failed {
            error: vistara_api::ErrorBody {
                kind: ErrorKind::StartFailed,
                message: message.clone(),
                hint: None,
                exit_code: Some(*code),
            },
        },
        Some(end) => StreamEvent::Exited {
            exit_code: end.exit_code(),
            message: end.message(),
        },
        None => StreamEvent::Exited {
            exit_code: 125,
            message: Some("its end is not known".to_owned()),
        },
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Carries a client's input and signals to the program; returns when the client closes.
async fn attached_input(handle: Arc<Handle>, mut stream: SplitStream<WebSocket>, has_input: bool) {
    let mut input: Option<HeldInput> = None;
    let mut ended = !has_input;
    loop {
        match from_client(&mut stream).await {
            FromClient::Input(bytes) => {
                if ended {
                    continue;
                }
                if input.is_none() {
                    input = take_input(&handle).await;
                }
                let taken = match &mut input {
                    Some(to) => to.input.write(&bytes).await,
                    // Another client is writing to it.
                    None => Ok(false),
                };
                // Where the program reads no more, or is gone, the rest is thrown away.
                ended = !matches!(taken, Ok(true));
            }
            FromClient::Signal(ClientSignal::CloseStdin) => {
                if !ended && input.is_none() {
                    input = take_input(&handle).await;
                }
                ended = true;
                if let Some(held) = input.take() {
                    held.input.close().await;
                }
            }
            FromClient::Signal(ClientSignal::Resize { size }) => {
                let program = handle.shared.process.borrow().clone();
                if let Some(program) = program {
                    let size = TtySize {
                        rows: size.rows,
                        columns: size.columns,
                    };
                    // A program without a terminal has no size to change.
                    let _ = program.resize(size).await;
                }
            }
            FromClient::Signal(ClientSignal::Signal { signal }) => forward(&handle, &signal).await,
            FromClient::Closed => break,
        }
    }
    if let Some(held) = input {
        // The next client may go on where this one stopped.
        handle.shared.return_input(held).await;
    }
}

/// A signal for the program, which before it runs is a wish to end it.
async fn forward(handle: &Handle, signal: &str) {
    let Ok(signal) = signal.parse::<Signal>() else {
        return;
    };
    match handle.state() {
        MachineState::Preparing | MachineState::Booting => {
            handle
                .send(Command::Stop {
                    signal: Some(signal),
                    grace: STOP_GRACE,
                })
                .await;
        }
        MachineState::Running | MachineState::Paused | MachineState::Stopping => {
            if let Ok(agent) = handle.agent().await {
                // A program that has just ended needs no signal.
                let _ = agent.signal(ProcessId::MAIN, i32::from(signal.0)).await;
            }
        }
        MachineState::Ended => {}
    }
}

/// The program's input, as soon as it runs; nothing where another client holds it.
async fn take_input(handle: &Handle) -> Option<HeldInput> {
    handle
        .wait_until(|snapshot| {
            !matches!(
                snapshot.record.state,
                MachineState::Preparing | MachineState::Booting
            )
        })
        .await;
    // The session hands the input over right after it has told that the program runs.
    for _ in 0..50 {
        if let Some(input) = handle.shared.take_input().await {
            return Some(input);
        }
        if handle.state() == MachineState::Ended {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}

/// Runs another program in a running machine: a WebSocket whose first message is an `ExecRequest`.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/exec",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 101, description = "A WebSocket; see the schemas ClientSignal and StreamEvent"))
)]
pub(super) async fn exec(
    State(app): State<App>,
    Path(machine): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let handle = app.node.find(&machine)?;
    Ok(upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .on_upgrade(move |socket| async move {
            let (mut sink, mut stream) = socket.split();
            let begun = match first_word::<ExecRequest>(&mut stream).await {
                Ok(request) => begin(&handle, &request)
                    .await
                    .map(|process| (process, request.tty.is_some())),
                Err(fault) => Err(fault),
            };
            match begun {
                // Whatever ends it, the client is gone or has heard the end.
                Ok((process, tty)) => {
                    drop(executed(&handle, process, tty, &mut sink, stream).await)
                }
                Err(fault) => drop(say(&mut sink, &StreamEvent::Failed { error: fault.0 }).await),
            }
            let _ = sink.close().await;
        }))
}

async fn begin(handle: &Handle, request: &ExecRequest) -> Answer<Process> {
    if request.command.first().is_none_or(String::is_empty) {
        return Err(
            Fault::user("there is no command to execute").hint("vistara exec MACHINE COMMAND…")
        );
    }
    let agent = handle.agent().await?;
    let record = handle.record();
    let mut env: Vec<(String, String)> = record
        .env
        .iter()
        .map(|v| (v.name.clone(), v.value.clone()))
        .collect();
    for text in &request.env {
        let variable: vistara_model::EnvVar = text
            .parse()
            .map_err(|error: vistara_model::SpecError| Fault::user(error.to_string()))?;
        env.retain(|(name, _)| *name != variable.name);
        env.push((variable.name, variable.value));
    }
    let spec = ProcessSpec {
        argv: request.command.clone(),
        env,
        cwd: request
            .working_dir
            .clone()
            .unwrap_or_else(|| record.working_dir.clone()),
        user: request.user.clone().unwrap_or_else(|| record.user.clone()),
        tty: request.tty.map(|size| TtySize {
            rows: size.rows,
            columns: size.columns,
        }),
        stdin: request.stdin,
    };
    match agent.spawn(handle.shared.process_id(), spec).await {
        Ok(process) => Ok(process),
        Err(SpawnError::Failed(failed)) => {
            let mut fault = Fault::new(ErrorKind::StartFailed, failed.message);
            fault.0.exit_code = Some(failed.code);
            Err(fault)
        }
        Err(SpawnError::Agent(error)) => Err(error.into()),
    }
}

async fn executed(
    handle: &Arc<Handle>,
    process: Process,
    tty: bool,
    sink: &mut Sink,
    stream: SplitStream<WebSocket>,
) -> Result<(), Gone> {
    let Process {
        handle: process,
        mut output,
        input,
    } = process;
    let started = StreamEvent::Started {
        machine: Box::new(view::machine(&handle.snapshot())),
    };
    let heard = say(sink, &started).await;
    let mut client = tokio::spawn(executed_input(process.clone(), input, stream));
    let _stop_client = AbortOnDrop(client.abort_handle());
    let result = loop {
        if heard.is_err() {
            break Err(Gone);
        }
        tokio::select! {
            chunk = output.next() => match chunk {
                Some(chunk) => {
                    let stream = match chunk.stream {
                        OutputStream::Stdout => STDOUT,
                        OutputStream::Stderr => STDERR,
                    };
                    if send(sink, stream, &chunk.bytes).await.is_err() {
                        break Err(Gone);
                    }
                    output.ack(chunk.stream, chunk.offset.saturating_add(chunk.bytes.len() as u64));
                }
                None => break Ok(()),
            },
            _ = &mut client => break Err(Gone),
        }
    };
    if result.is_err() {
        if tty {
            // As when a terminal is closed. A process that has ended needs no signal.
            let _ = process.signal(i32::from(Signal::HUP.0)).await;
        }
        tokio::spawn(async move {
            while let Some(chunk) = output.next().await {
                output.ack(
                    chunk.stream,
                    chunk.offset.saturating_add(chunk.bytes.len() as u64),
                );
            }
            finish(&process).await;
        });
        return Err(Gone);
    }
    let event = match process.exited().await {
        Ok(exit) => {
            let status = exit_status(exit.status);
            finish(&process).await;
            StreamEvent::Exited {
                exit_code: status.shell_code(),
                message: None,
            }
        }
        Err(error) => StreamEvent::Failed {
            error: lost(handle, error).0,
        },
    };
    say(sink, &event).await
}

fn lost(handle: &Handle, error: AgentError) -> Fault {
    if handle.state() == MachineState::Running {
        return error.into();
    }
    Fault::conflict(format!("machine {} ended meanwhile", handle.record().name))
}

async fn finish(process: &ProcessHandle) {
    if process.exited().await.is_ok() {
        // A refusal only means that the guest is about to end.
        let _ = process.forget().await;
    }
}

/// Carries a client's input and signals to an executed program; returns when the client closes. Input goes through a
/// short queue, so that a program that does not read leaves the client's signals their way.
async fn executed_input(process: ProcessHandle, input: Input, mut stream: SplitStream<WebSocket>) {
    let (queue, waiting) = mpsc::channel(INPUT_QUEUE);
    let writer = tokio::spawn(write_input(input, waiting));
    let _stop_writer = AbortOnDrop(writer.abort_handle());
    let mut queue = Some(queue);
    loop {
        match from_client(&mut stream).await {
            FromClient::Input(bytes) => {
                if let Some(queue) = &queue {
                    // The writer is gone only when the program takes no more input.
                    let _ = queue.send(bytes).await;
                }
            }
            FromClient::Signal(ClientSignal::CloseStdin) => queue = None,
            FromClient::Signal(ClientSignal::Resize { size }) => {
                let size = TtySize {
                    rows: size.rows,
                    columns: size.columns,
                };
                // A process without a terminal has no size to change.
                let _ = process.resize(size).await;
            }
            FromClient::Signal(ClientSignal::Signal { signal }) => {
                if let Ok(signal) = signal.parse::<Signal>() {
                    // A process that has just ended needs no signal.
                    let _ = process.signal(i32::from(signal.0)).await;
                }
            }
            FromClient::Closed => return,
        }
    }
}

async fn write_input(mut input: Input, mut waiting: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = waiting.recv().await {
        if !matches!(input.write(&bytes).await, Ok(true)) {
            return;
        }
    }
    input.close().await;
}
