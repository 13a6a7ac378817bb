//! Machines: creating, listing, ending, looking into them.

use super::App;
use super::foreign::tame;
use super::images::sse;
use super::placing;
use super::receipts::AsSent;
use crate::fault::{Answer, Fault, blocking};
use crate::logbook::{Entry, Start, Stream as Output};
use crate::machine::{Command, Handle, KERNEL_LOG, STOP_GRACE};
use crate::mesh::Caller;
use crate::node::Look;
use crate::view;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response, Sse};
use axum::{Extension, Json};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::io::{ReaderStream, StreamReader};
use utoipa::IntoParams;
use vistara_api::{
    ErrorBody, Explanation, KillRequest, LogEvent, Machine, MachineDetail, PathStat, RunRequest,
    Stats, StopRequest, WaitAnswer,
};
use vistara_guest_client::{GuestStats, ProcessId, UnpackOptions};
use vistara_machine::VmUsage;
use vistara_model::{MachineState, Payload, Signal};

/// Time between two samples of a stream of statistics.
const STATS_EVERY: Duration = Duration::from_secs(1);
/// Most of a console that is shown.
const CONSOLE_BYTES_MAX: usize = 64 << 10;

fn signal(text: Option<&String>) -> Answer<Option<Signal>> {
    text.map(|text| text.parse())
        .transpose()
        .map_err(|error: vistara_model::SignalError| Fault::user(error.to_string()))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct OfferQuery {
    /// An offer that was taken: its place is the machine's.
    offer: Option<String>,
}

/// Creates and starts a machine. Answers as soon as it is accepted.
#[utoipa::path(
    post,
    path = "/v1/machines",
    params(OfferQuery),
    request_body = RunRequest,
    responses((status = 200, body = Machine), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<OfferQuery>,
    AsSent(mut request, digest): AsSent<RunRequest>,
) -> Answer<Json<Machine>> {
    let zero = Instant::now();
    let asker = app.asker(&caller)?;
    tame(&caller, &mut request)?;
    let memory = request.memory.clone();
    let begun = placing::admit(&app, &caller, query.offer.as_ref(), memory.as_ref()).await?;
    let promised = Arc::clone(&app.placing);
    // A task of its own: a client that goes away in the middle must not leave half a machine.
    let created = tokio::spawn(async move {
        let created = app.node.create(&request, Some(digest), &asker, zero).await;
        if let Some((from, offer)) = begun {
            // Its record counts from here on; or there is none.
            promised.counted(from, offer);
        }
        created
    });
    let handle = created.await.map_err(|error| Fault::internal(&error))??;
    Ok(Json(view::machine(&handle.snapshot())))
}

/// Which hypervisor a request would get, and why, without running it.
#[utoipa::path(
    post,
    path = "/v1/explain",
    request_body = RunRequest,
    responses((status = 200, body = Explanation), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn explain(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Json(mut request): Json<RunRequest>,
) -> Answer<Json<Explanation>> {
    tame(&caller, &mut request)?;
    let decision = app.node.decide(&request, Look::Always).await?;
    Ok(Json(Explanation {
        start: app.node.outlook(&decision).await?,
        choice: view::choice(&decision.choice),
        memory_bytes: decision.spec.memory.0,
        program: decision.facts.as_ref().map(view::program),
        command: decision.program.argv,
    }))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct ListQuery {
    /// Also machines that have ended.
    #[serde(default)]
    all: bool,
}

/// Machines, newest first.
#[utoipa::path(get, path = "/v1/machines", params(ListQuery), responses((status = 200, body = Vec<Machine>)))]
pub(super) async fn list(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ListQuery>,
) -> Json<Vec<Machine>> {
    let shown = |handle: &Arc<Handle>| {
        (query.all || handle.state() != MachineState::Ended) && caller.sees(&handle.record())
    };
    Json(
        app.node
            .all()
            .iter()
            .filter(|handle| shown(handle))
            .map(|h| view::machine(&h.snapshot()))
            .collect(),
    )
}

/// Everything known of one machine.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = MachineDetail), (status = 404, body = ErrorBody))
)]
pub(super) async fn inspect(
    State(app): State<App>,
    Path(machine): Path<String>,
) -> Answer<Json<MachineDetail>> {
    let handle = app.node.find(&machine)?;
    Ok(Json(view::detail(&handle.snapshot(), &handle.dir)))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct RemoveQuery {
    /// Also where it has not ended.
    #[serde(default)]
    force: bool,
}

/// Removes an ended machine with its record and log.
#[utoipa::path(
    delete,
    path = "/v1/machines/{machine}",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), RemoveQuery),
    responses((status = 200), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Answer<Json<()>> {
    let handle = app.node.find(&machine)?;
    app.node.remove(&handle, query.force).await?;
    Ok(Json(()))
}

/// Asks a program to end, ends it after the grace, and answers when its machine is gone.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/stop",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    request_body = StopRequest,
    responses((status = 200, body = Machine), (status = 404, body = ErrorBody))
)]
pub(super) async fn stop(
    State(app): State<App>,
    Path(machine): Path<String>,
    Json(request): Json<StopRequest>,
) -> Answer<Json<Machine>> {
    let handle = app.node.find(&machine)?;
    let grace = request.grace_ms.map_or(STOP_GRACE, Duration::from_millis);
    handle
        .send(Command::Stop {
            signal: signal(request.signal.as_ref())?,
            grace,
        })
        .await;
    Ok(Json(view::machine(&handle.wait_end().await)))
}

/// Holds a machine still. Its program, clock and connections stand; it keeps its memory.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/pause",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = Machine), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(super) async fn pause(
    State(app): State<App>,
    Path(machine): Path<String>,
) -> Answer<Json<Machine>> {
    let handle = app.node.find(&machine)?;
    handle.pause().await?;
    Ok(Json(view::machine(&handle.snapshot())))
}

/// Lets a paused machine go on.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/resume",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = Machine), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(super) async fn resume(
    State(app): State<App>,
    Path(machine): Path<String>,
) -> Answer<Json<Machine>> {
    let handle = app.node.find(&machine)?;
    handle.ask(Command::Resume).await?;
    Ok(Json(view::machine(&handle.snapshot())))
}

/// Sends a signal to a program. KILL, or no signal, takes the whole machine down and answers when it is gone.
#[utoipa::path(
    post,
    path = "/v1/machines/{machine}/kill",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    request_body = KillRequest,
    responses((status = 200, body = Machine), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(super) async fn kill(
    State(app): State<App>,
    Path(machine): Path<String>,
    Json(request): Json<KillRequest>,
) -> Answer<Json<Machine>> {
    let handle = app.node.find(&machine)?;
    match signal(request.signal.as_ref())? {
        None | Some(Signal::KILL) => {
            if handle.state() == MachineState::Ended {
                let name = &handle.record().name;
                return Err(Fault::conflict(format!("machine {name} has ended already")));
            }
            handle.send(Command::Kill).await;
            Ok(Json(view::machine(&handle.wait_end().await)))
        }
        // All that a unikernel can be told, by its power button.
        Some(Signal::TERM) if handle.record().backend.payload == Payload::Nanos => {
            if handle.state() != MachineState::Running {
                let name = &handle.record().name;
                return Err(Fault::conflict(format!("machine {name} is not running")));
            }
            handle.send(Command::Signal(Signal::TERM)).await;
            Ok(Json(view::machine(&handle.snapshot())))
        }
        Some(signal) => {
            let agent = handle.agent().await?;
            agent.signal(ProcessId::MAIN, i32::from(signal.0)).await?;
            Ok(Json(view::machine(&handle.snapshot())))
        }
    }
}

/// Waits for a machine's end.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/wait",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, body = WaitAnswer), (status = 404, body = ErrorBody))
)]
pub(super) async fn wait(
    State(app): State<App>,
    Path(machine): Path<String>,
) -> Answer<Json<WaitAnswer>> {
    let handle = app.node.find(&machine)?;
    let end = handle.wait_end().await;
    let end = end.record.end.as_ref();
    Ok(Json(WaitAnswer {
        exit_code: end.map_or(125, vistara_model::EndReason::exit_code),
        message: end.and_then(vistara_model::EndReason::message),
    }))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct LogsQuery {
    /// Go on with what is printed later, until the machine ends.
    #[serde(default)]
    follow: bool,
    /// Only what was printed at this time (RFC 3339) or later.
    since: Option<String>,
    /// Only the last so many lines of what is there.
    tail: Option<u64>,
}

/// What a program printed. Answers with events.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/logs",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), LogsQuery),
    responses((status = 200, content_type = "text/event-stream", body = LogEvent), (status = 404, body = ErrorBody))
)]
pub(super) async fn logs(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Answer<Sse<impl Stream<Item = Result<axum::response::sse::Event, Infallible>> + Send>> {
    let handle = app.node.find(&machine)?;
    let since_ns = match &query.since {
        None => 0,
        Some(text) => {
            let time: jiff::Timestamp = text.parse().map_err(|_| {
                Fault::user(format!(
                    "{text:?} is not a time: write it as 2026-01-31T12:00:00Z"
                ))
            })?;
            u64::try_from(time.as_nanosecond()).unwrap_or(0)
        }
    };
    let start = query.tail.map_or(Start::Oldest, Start::Tail);
    let reader = handle.log.reader(start, false);
    let follow = query.follow;
    let entries = futures_util::stream::unfold(Some(reader), move |reader| async move {
        let mut reader = reader?;
        match reader.next(follow).await {
            Ok(Some(entry)) => Some((entry, Some(reader))),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "a log cannot be read");
                let entry = Entry::Gap {
                    bytes: 0,
                    reason: "the log cannot be read",
                };
                Some((entry, None))
            }
        }
    });
    Ok(sse(entries.filter_map(move |entry| async move {
        log_event(entry, since_ns)
    })))
}

fn log_event(entry: Entry, since_ns: u64) -> Option<LogEvent> {
    match entry {
        Entry::Output { time_ns, .. } if time_ns < since_ns => None,
        Entry::Output {
            stream,
            time_ns,
            bytes,
        } => Some(LogEvent::Output {
            stream: match stream {
                Output::Stdout => "stdout",
                Output::Stderr => "stderr",
            }
            .to_owned(),
            time: view::time(time_ns),
            data: STANDARD.encode(bytes),
        }),
        Entry::Gap { bytes, reason } => Some(LogEvent::Gap {
            bytes,
            reason: reason.to_owned(),
        }),
    }
}

/// The end of the guest's console: the kernel's own messages.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/console",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id")),
    responses((status = 200, content_type = "text/plain", body = Vec<u8>), (status = 409, body = ErrorBody))
)]
pub(super) async fn console(
    State(app): State<App>,
    Path(machine): Path<String>,
) -> Answer<Response> {
    let handle = app.node.find(&machine)?;
    let vm = handle.shared.vm.borrow().clone();
    let text = match vm {
        _ if handle.record().backend.payload == Payload::Nanos => {
            let path = handle.dir.join(KERNEL_LOG);
            // There is none before the kernel has said something.
            let text = blocking(move || std::fs::read(path).unwrap_or_default()).await?;
            text[text.len().saturating_sub(CONSOLE_BYTES_MAX)..].to_vec()
        }
        Some(vm) => vm.console(CONSOLE_BYTES_MAX).await,
        None => {
            let (dir, kind) = (handle.dir.clone(), handle.record().backend.vmm);
            match app.node.mechanisms().vmm(kind) {
                Some(vmm) => blocking(move || vmm.kept_console(&dir, CONSOLE_BYTES_MAX)).await?,
                None => Vec::new(),
            }
        }
    };
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct StatsQuery {
    /// Go on, once a second, until the machine ends.
    #[serde(default)]
    stream: bool,
}

/// What a machine uses. Answers with events.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/stats",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), StatsQuery),
    responses((status = 200, content_type = "text/event-stream", body = Stats), (status = 409, body = ErrorBody))
)]
pub(super) async fn stats(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<StatsQuery>,
) -> Answer<Sse<impl Stream<Item = Result<axum::response::sse::Event, Infallible>> + Send>> {
    let handle = app.node.find(&machine)?;
    let first = sample(&handle, None).await?;
    let state = Some((handle, first, true));
    let samples = futures_util::stream::unfold(state, move |state| async move {
        let (handle, last, is_first) = state?;
        if is_first {
            return Some((
                last.0.clone(),
                query.stream.then_some((handle, last, false)),
            ));
        }
        tokio::time::sleep(STATS_EVERY).await;
        let next = sample(&handle, Some(&last)).await.ok()?;
        Some((next.0.clone(), Some((handle, next, false))))
    });
    Ok(sse(samples))
}

type Sample = (Stats, Instant);

/// What a machine uses: by its guest's word, or, where nobody in the guest can say, by what its monitor takes on the host.
async fn guest_stats(handle: &Handle, usage: &VmUsage) -> Answer<GuestStats> {
    let record = handle.record();
    if record.backend.payload == Payload::Linux {
        return Ok(handle.agent().await?.stats().await?);
    }
    if handle.state() == MachineState::Ended {
        return Err(Fault::conflict(format!(
            "machine {} is not running",
            record.name
        )));
    }
    Ok(GuestStats {
        memory_total: record.spec.memory.0,
        memory_available: record.spec.memory.0.saturating_sub(usage.resident_bytes),
        cpu_busy_us: u64::try_from(usage.cpu_time.as_micros()).unwrap_or(u64::MAX),
        processes: 1,
        ..GuestStats::default()
    })
}

async fn sample(handle: &Handle, before: Option<&Sample>) -> Answer<Sample> {
    let vm = handle.shared.vm.borrow().clone();
    let usage = vm.as_ref().map(|vm| vm.usage()).unwrap_or_default();
    let guest = guest_stats(handle, &usage).await?;
    let balloon = match &vm {
        Some(vm) => vm.balloon().await,
        None => None,
    };
    let now = Instant::now();
    let cpu_ms = guest.cpu_busy_us / 1000;
    let cpu_percent = before.map(|(last, at)| {
        let passed = now.duration_since(*at).as_secs_f64().max(0.001);
        cpu_ms.saturating_sub(last.cpu_ms) as f64 / 10.0 / passed
    });
    let stats = Stats {
        id: handle.id.to_string(),
        name: handle.record().name.to_string(),
        cpu_ms,
        cpu_percent,
        memory_used_bytes: guest.memory_used(),
        memory_total_bytes: guest.memory_total,
        host_resident_bytes: usage.resident_bytes,
        processes: u64::from(guest.processes),
        disk_used_bytes: guest.disk_used,
        net_rx_bytes: guest.net_received,
        net_tx_bytes: guest.net_sent,
        balloon: balloon.map(view::balloon),
    };
    Ok((stats, now))
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct PathQuery {
    /// Absolute path in the guest.
    path: String,
    /// Whether a symbolic link at its end is followed.
    #[serde(default)]
    follow_link: bool,
}

/// What a path in a guest is.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/stat",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), PathQuery),
    responses((status = 200, body = PathStat), (status = 409, body = ErrorBody))
)]
pub(super) async fn stat(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<PathQuery>,
) -> Answer<Json<PathStat>> {
    let handle = app.node.find(&machine)?;
    let agent = handle.agent().await?;
    let own = agent.stat(&query.path, false).await?;
    let followed = agent.stat(&query.path, true).await?;
    let is_dir = followed
        .as_ref()
        .is_some_and(vistara_guest_client::FileStat::is_dir);
    Ok(Json(match own {
        None => PathStat {
            exists: false,
            is_dir: false,
            mode: 0,
            size: 0,
            link_target: None,
        },
        Some(own) => PathStat {
            exists: true,
            is_dir,
            mode: own.mode & 0o7777,
            size: own.size,
            link_target: own.link_target,
        },
    }))
}

/// A file or tree of a guest as a tar stream. A failure midway cuts the connection.
#[utoipa::path(
    get,
    path = "/v1/machines/{machine}/archive",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), PathQuery),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>), (status = 404, body = ErrorBody))
)]
pub(super) async fn archive_out(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<PathQuery>,
) -> Answer<Response> {
    let handle = app.node.find(&machine)?;
    let agent = handle.agent().await?;
    if agent.stat(&query.path, query.follow_link).await?.is_none() {
        let name = &handle.record().name;
        return Err(Fault::new(
            vistara_api::ErrorKind::NotFound,
            format!("there is no {:?} in machine {name}", query.path),
        ));
    }
    let reader = agent.archive_out(&query.path, query.follow_link).await?;
    let body = Body::from_stream(ReaderStream::with_capacity(reader, 64 << 10));
    Ok(([(CONTENT_TYPE, "application/x-tar")], body).into_response())
}

/// Unpacks a tar stream, the request's body, in a directory of a guest.
#[utoipa::path(
    put,
    path = "/v1/machines/{machine}/archive",
    params(("machine" = String, Path, description = "Id, name, or unambiguous beginning of an id"), PathQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn archive_in(
    State(app): State<App>,
    Path(machine): Path<String>,
    Query(query): Query<PathQuery>,
    body: Body,
) -> Answer<Json<()>> {
    let handle = app.node.find(&machine)?;
    let agent = handle.agent().await?;
    let reader = StreamReader::new(
        body.into_data_stream()
            .map(|item| item.map_err(std::io::Error::other)),
    );
    let options = UnpackOptions {
        keep_owners: true,
        refuse_kind_change: true,
    };
    agent
        .archive_in(&query.path, Box::pin(reader), options)
        .await?;
    Ok(Json(()))
}
