//! The gateway's connections: one request each, with bounds on all that a stranger can make last or grow.

use super::calls::Calls;
use super::tokens::{self, Tokens};
use super::wire::{self, BODY_BYTES_MAX, Call, NoCall};
use crate::failure::{Failure, eprint_line};
use crate::text::{shorten, visible};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use vistara_node::{Crowd, InCrowd};

/// Most connections at a time: each may hold a body, an answer and a machine's start.
const CONNECTIONS_MAX: usize = 64;
/// Most of them from one address, so that one client does not take all.
const CONNECTIONS_OF_ONE_MAX: usize = 16;
/// How long a client has for its request's head, and again for its body.
const READ_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a call may take: an image is pulled and a machine boots, without KVM on a busy host.
const CALL_TIME_MAX: Duration = Duration::from_secs(600);
/// How long a client has to take the answer.
const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
/// Largest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// Pause after a failed accept: usually too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest path that is told in a line of the log, in characters.
const PATH_SHOWN_MAX: usize = 40;

/// Serves until this ends.
pub(crate) async fn serve(listener: TcpListener, calls: Arc<Calls>, tokens: Tokens) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let crowd = Crowd::default();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                eprint_line(&format!(
                    "vistara: a connection could not be accepted: {error}"
                ));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Those that are too many are closed at once: a queue of them would only fill up, too.
        let Some(place) = crowd.enter(peer.ip(), CONNECTIONS_OF_ONE_MAX) else {
            continue;
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            continue;
        };
        let (calls, tokens) = (calls.clone(), tokens.clone());
        let place = Arc::new(Place {
            _room: permit,
            _in_crowd: place,
        });
        tokio::spawn(connection(stream, peer.ip(), calls, tokens, place));
    }
}

/// One of the bounded connections: taken until it has ended, and so has what it asked for.
struct Place {
    _room: OwnedSemaphorePermit,
    _in_crowd: InCrowd<IpAddr>,
}

async fn connection(
    stream: TcpStream,
    peer: IpAddr,
    calls: Arc<Calls>,
    tokens: Tokens,
    place: Arc<Place>,
) {
    let reached_at = stream.local_addr().ok().map(|address| address.ip());
    // Taken by the one request that the connection has.
    let (answered, answer) = oneshot::channel::<()>();
    let answered = Mutex::new(Some(answered));
    let service = service_fn(|request: Request<Incoming>| {
        let answered = answered.lock().ok().and_then(|mut sender| sender.take());
        let (calls, tokens, place) = (calls.clone(), tokens.clone(), place.clone());
        async move {
            let response = handle(request, peer, reached_at, calls, tokens, place).await;
            drop(answered);
            Ok::<_, Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // How a connection breaks off is its client's business.
        _ = served => {}
        () = async {
            let _ = answer.await;
            tokio::time::sleep(WRITE_TIME_MAX).await;
        } => {}
    }
}

/// One request, told in one line: of what it holds only the method and the path, since the rest may be secret.
async fn handle(
    request: Request<Incoming>,
    peer: IpAddr,
    reached_at: Option<IpAddr>,
    calls: Arc<Calls>,
    tokens: Tokens,
    place: Arc<Place>,
) -> Response<Full<Bytes>> {
    let begin = Instant::now();
    let method = request.method().to_string();
    let path = request.uri().path().to_owned();
    let (name, status, body) = answer(request, reached_at, calls, tokens, place).await;
    eprint_line(&format!(
        "{peer} {} {} {} {} {} ms",
        name.map_or_else(|| "-".to_owned(), |name| visible(&name, false)),
        shorten(&visible(&method, false), PATH_SHOWN_MAX),
        shorten(&visible(&path, false), PATH_SHOWN_MAX),
        status.as_u16(),
        begin.elapsed().as_millis()
    ));
    let mut response = Response::new(Full::new(Bytes::from(body.to_string() + "\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONNECTION, "close"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// The name of the token that was shown, and the answer.
async fn answer(
    request: Request<Incoming>,
    reached_at: Option<IpAddr>,
    calls: Arc<Calls>,
    tokens: Tokens,
    place: Arc<Place>,
) -> (Option<String>, StatusCode, Value) {
    let no = |status, message: &str| (status, wire::error(message));
    // First of all: a stranger is told nothing, not even what there is.
    let shown = request.headers().get(header::AUTHORIZATION);
    let token = match tokens.all() {
        Ok(all) => shown.and_then(|shown| tokens::find(&all, shown.as_bytes())),
        Err(failure) => {
            failure.print();
            None
        }
    };
    let Some(token) = token else {
        let (status, body) = no(
            StatusCode::UNAUTHORIZED,
            "no token that counts here: send the header Authorization: Bearer TOKEN, which `vistara gateway token create NAME` makes",
        );
        return (None, status, body);
    };
    let name = Some(token.name.clone());
    let uri = request.uri();
    let call = match wire::call(request.method().as_str(), uri.path(), uri.query()) {
        Ok(call) => call,
        Err(none) => {
            let (status, body) = match none {
                NoCall::Path => no(
                    StatusCode::NOT_FOUND,
                    "there are POST /spawn, GET /stop?id=ID, GET /list and GET /logs?id=ID",
                ),
                NoCall::Method(method) => no(
                    StatusCode::METHOD_NOT_ALLOWED,
                    &format!("this is asked with {method}"),
                ),
                NoCall::Id => no(
                    StatusCode::BAD_REQUEST,
                    "give the machine's whole id, once, as ?id=ID",
                ),
            };
            return (name, status, body);
        }
    };
    let body = match call {
        Call::Spawn => match body(request).await {
            Ok(body) => body,
            Err((status, message)) => {
                let (status, body) = no(status, message);
                return (name, status, body);
            }
        },
        Call::Stop(_) | Call::List | Call::Logs(_) => Bytes::new(),
    };
    // A task of its own: a client that goes away leaves nothing half done, and makes no room for more.
    let done = tokio::spawn(async move {
        let work = calls.answer(&call, &body, &token, reached_at);
        let done = tokio::time::timeout(CALL_TIME_MAX, work).await;
        drop(place);
        done
    });
    let (status, body) = match done.await {
        Ok(Ok(Ok(body))) => (StatusCode::OK, body),
        Ok(Ok(Err(refused))) => no(StatusCode::BAD_REQUEST, &refused.0),
        Ok(Err(_)) => no(
            StatusCode::GATEWAY_TIMEOUT,
            "it takes too long; /list says what has come of it",
        ),
        Err(error) => {
            Failure::because("a call failed", error).print();
            no(StatusCode::INTERNAL_SERVER_ERROR, "the gateway failed")
        }
    };
    (name, status, body)
}

async fn body(request: Request<Incoming>) -> Result<Bytes, (StatusCode, &'static str)> {
    let too_large = (
        StatusCode::PAYLOAD_TOO_LARGE,
        "the body has more than 65536 bytes",
    );
    let body = request.into_body();
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large);
    }
    let whole = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(READ_TIME_MAX, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large),
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => Err((
            StatusCode::REQUEST_TIMEOUT,
            "the body did not come in 10 seconds",
        )),
    }
}
