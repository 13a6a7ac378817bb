//! A stand-in for a node: the real interface over a real socket, with programs that are a few lines each.
//!
//! The first word of a request's command says what its program does; see [`play`].

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use vistara_api::RunRequest;

/// What the node knows.
#[derive(Debug, Default)]
pub struct Seen {
    /// Requests to run, by the machine's id.
    pub runs: BTreeMap<String, RunRequest>,
    /// Images that have been pulled.
    pub pulled: BTreeSet<String>,
    /// Signals and stops, as `kill INT` and `stop TERM`.
    pub signals: Vec<String>,
    /// What clients said over streams beside bytes.
    pub said: Vec<String>,
}

/// The node.
#[derive(Clone)]
pub struct Fake {
    /// What it knows.
    pub seen: Arc<Mutex<Seen>>,
    signal: Arc<watch::Sender<String>>,
}

impl Fake {
    /// Serves on a socket in this directory, from a thread of its own.
    pub fn serve(dir: &std::path::Path) -> Fake {
        let fake = Fake {
            seen: Arc::default(),
            signal: Arc::new(watch::channel(String::new()).0),
        };
        let listener = std::os::unix::net::UnixListener::bind(dir.join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let router = router(fake.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        fake
    }
}

fn router(fake: Fake) -> Router {
    Router::new()
        .route("/v1/machines", post(run).get(list))
        .route("/v1/machines/{m}", get(machine_detail))
        .route("/v1/machines/{m}/attach", get(attach))
        .route("/v1/machines/{m}/exec", get(exec))
        .route("/v1/machines/{m}/kill", post(kill))
        .route("/v1/machines/{m}/stop", post(stop))
        .route("/v1/machines/{m}/logs", get(logs))
        .route("/v1/machines/{m}/wait", get(wait))
        .route("/v1/machines/{m}/stat", get(stat))
        .route("/v1/machines/{m}/archive", get(archive_out).put(archive_in))
        .route("/v1/images/pull", post(pull))
        .route("/v1/images", get(images))
        .layer(axum::middleware::map_response(
            |mut response: Response| async move {
                response.headers_mut().insert(
                    "vistara-version",
                    axum::http::HeaderValue::from_static(env!("CARGO_PKG_VERSION")),
                );
                response
            },
        ))
        .with_state(fake)
}

fn error(status: StatusCode, kind: &str, message: &str) -> Response {
    let body = json!({"kind": kind, "message": message});
    (status, Json(body)).into_response()
}

fn machine(id: &str, state: &str) -> Value {
    json!({
        "id": id, "name": "swift-otter", "image": "debian:latest", "image_id": "sha256:aa",
        "command": ["sh"], "state": state, "generation": 0, "created_at": "2026-01-01T00:00:00Z",
        "started_at": null, "ended_at": null, "exit_code": null, "message": null, "ports": [],
        "choice": null, "labels": {}
    })
}

async fn run(State(fake): State<Fake>, Json(request): Json<RunRequest>) -> Response {
    let mut seen = fake.seen.lock().unwrap();
    if request.image == "missing" && !seen.pulled.contains("missing") {
        return error(
            StatusCode::NOT_FOUND,
            "image_not_found",
            "no image is called missing",
        );
    }
    let id = format!("{:032x}", seen.runs.len() + 1);
    seen.runs.insert(id.clone(), request);
    Json(machine(&id, "preparing")).into_response()
}

async fn list() -> Json<Value> {
    Json(json!([machine(
        "00112233445566778899aabbccddeeff",
        "running"
    )]))
}

async fn images() -> Json<Value> {
    Json(json!([]))
}

async fn machine_detail(Path(id): Path<String>) -> Response {
    if id == "nobody" {
        return error(
            StatusCode::NOT_FOUND,
            "not_found",
            "no machine is called nobody",
        );
    }
    let mut detail = machine(&id, "running");
    let more = json!({
        "cpus": 1.0, "memory_bytes": 1, "disk_bytes": 1, "env_names": [], "user": "root",
        "working_dir": "/", "hostname": "h", "read_only": false, "volumes": [], "network": "user",
        "tty": false, "auto_remove": false, "kernel": null, "vmm_pid": null, "fences": [],
        "timings": [{"step": "boot", "begin_ms": 1.0, "took_ms": 2.5}], "dir": "/d"
    });
    detail
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    Json(detail).into_response()
}

async fn pull(State(fake): State<Fake>, Json(request): Json<Value>) -> Response {
    let name = request["image"].as_str().unwrap().to_owned();
    if name == "broken" {
        let event = json!({"event": "failed", "error": {"kind": "peer", "message": "the registry said 500"}});
        return format!("data: {event}\n\n").into_response();
    }
    fake.seen.lock().unwrap().pulled.insert(name);
    let image = json!({
        "id": "sha256:bb", "names": [], "architecture": "amd64", "created": null, "size_bytes": 1,
        "disk_bytes": 1, "entrypoint": [], "cmd": [], "env": [], "user": "", "working_dir": "",
        "machines": 0
    });
    let events = [
        json!({"event": "step", "step": "resolving"}),
        json!({"event": "layer", "digest": "sha256:cc", "done_bytes": 2048, "total_bytes": 2048}),
        json!({"event": "done", "image": image}),
    ];
    events
        .map(|event| format!("data: {event}\n\n"))
        .concat()
        .into_response()
}

async fn kill(
    State(fake): State<Fake>,
    Path(id): Path<String>,
    Json(request): Json<Value>,
) -> Json<Value> {
    let signal = request["signal"].as_str().unwrap_or("KILL").to_owned();
    fake.seen
        .lock()
        .unwrap()
        .signals
        .push(format!("kill {signal}"));
    fake.signal.send_replace(signal);
    Json(machine(&id, "running"))
}

async fn stop(
    State(fake): State<Fake>,
    Path(id): Path<String>,
    Json(request): Json<Value>,
) -> Json<Value> {
    let signal = request["signal"].as_str().unwrap_or("").to_owned();
    fake.seen
        .lock()
        .unwrap()
        .signals
        .push(format!("stop {signal}"));
    fake.signal.send_replace(format!("stop {signal}"));
    Json(machine(&id, "ended"))
}

async fn wait() -> Json<Value> {
    Json(json!({"exit_code": 7, "message": null}))
}

async fn logs() -> String {
    // "out\n" and "err\n" in base64.
    [("stdout", "b3V0Cg=="), ("stderr", "ZXJyCg==")]
        .map(|(stream, data)| {
            let event = json!({"event": "output", "stream": stream, "time": "2026-01-01T00:00:00Z", "data": data});
            format!("data: {event}\n\n")
        })
        .concat()
}

async fn stat(Query(query): Query<BTreeMap<String, String>>) -> Json<Value> {
    let path = query["path"].as_str();
    let is_dir = path.ends_with("dir") || path == "/";
    let exists = is_dir || path.ends_with("file") || path.ends_with("evil");
    Json(json!({"exists": exists, "is_dir": is_dir, "mode": 0o644, "size": 5, "link_target": null}))
}

async fn archive_out(Query(query): Query<BTreeMap<String, String>>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o640);
    header.set_size(5);
    if query["path"].ends_with("evil") {
        header.as_gnu_mut().unwrap().name[..11].copy_from_slice(b"../escapee!");
        header.set_cksum();
        tar.append(&header, &b"hello"[..]).unwrap();
    } else {
        tar.append_data(&mut header, "file", &b"hello"[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

async fn archive_in(
    State(fake): State<Fake>,
    Query(query): Query<BTreeMap<String, String>>,
    body: axum::body::Bytes,
) -> Json<()> {
    let mut said = vec![format!("into {}", query["path"])];
    for entry in tar::Archive::new(&body[..]).entries().unwrap() {
        let entry = entry.unwrap();
        said.push(format!(
            "{} {} {}",
            entry.path().unwrap().display(),
            entry.size(),
            entry.header().uid().unwrap()
        ));
    }
    fake.seen.lock().unwrap().said.extend(said);
    Json(())
}

async fn attach(
    State(fake): State<Fake>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let command = fake
        .seen
        .lock()
        .unwrap()
        .runs
        .get(&id)
        .map(|request| request.command.clone())
        .unwrap_or_default();
    upgrade.on_upgrade(move |mut socket| async move {
        let _ = socket.recv().await;
        play(&fake, &id, &command, &mut socket).await;
    })
}

async fn exec(
    State(fake): State<Fake>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade.on_upgrade(move |mut socket| async move {
        let Some(Ok(Message::Text(text))) = socket.recv().await else {
            return;
        };
        let request: Value = serde_json::from_str(&text).unwrap();
        let command: Vec<String> = serde_json::from_value(request["command"].clone()).unwrap();
        play(&fake, &id, &command, &mut socket).await;
    })
}

async fn event(socket: &mut WebSocket, event: Value) {
    let _ = socket.send(Message::Text(event.to_string().into())).await;
}

async fn output(socket: &mut WebSocket, stream: u8, data: &[u8]) -> bool {
    let mut message = vec![stream];
    message.extend_from_slice(data);
    socket.send(Message::Binary(message.into())).await.is_ok()
}

/// The programs.
async fn play(fake: &Fake, id: &str, command: &[String], socket: &mut WebSocket) {
    let word = |index: usize| command.get(index).map_or("", String::as_str);
    if word(0) == "start-fails" {
        let error = json!({"kind": "start_failed", "message": "no such program in the image", "exit_code": 127});
        return event(socket, json!({"event": "failed", "error": error})).await;
    }
    event(
        socket,
        json!({"event": "started", "machine": machine(id, "running")}),
    )
    .await;
    let mut signals = fake.signal.subscribe();
    let mut code = 0;
    match word(0) {
        "exit" => code = word(1).parse().unwrap(),
        "both" => {
            let all: Vec<u8> = (0..=255).collect();
            output(socket, 1, &all).await;
            output(socket, 2, b"err\n").await;
        }
        "much" => {
            for _ in 0..256 {
                output(socket, 1, &[b'x'; 65536]).await;
            }
        }
        "cat" => loop {
            match socket.recv().await {
                Some(Ok(Message::Binary(data))) => {
                    output(socket, 1, &data).await;
                }
                Some(Ok(Message::Text(text))) => {
                    fake.seen.lock().unwrap().said.push(text.to_string());
                    if text.contains("close_stdin") {
                        break;
                    }
                }
                _ => return,
            }
        },
        "until-signal" => {
            output(socket, 1, b"ready\n").await;
            loop {
                tokio::select! {
                    changed = signals.changed() => {
                        changed.unwrap();
                        let signal = signals.borrow_and_update().clone();
                        if signal == word(1) {
                            code = 42;
                            break;
                        }
                    }
                    said = socket.recv() => match said {
                        Some(Ok(Message::Text(text))) => {
                            fake.seen.lock().unwrap().said.push(text.to_string());
                        }
                        Some(Ok(_)) => {}
                        _ => return,
                    },
                }
            }
        }
        "endless" => {
            while !signals.has_changed().unwrap() {
                if !output(socket, 1, &[b'y'; 4096]).await {
                    return;
                }
            }
            code = 141;
        }
        "lost" => return,
        _ => {}
    }
    event(
        socket,
        json!({"event": "exited", "exit_code": code, "message": null}),
    )
    .await;
    let _ = socket.send(Message::Close(None)).await;
}
