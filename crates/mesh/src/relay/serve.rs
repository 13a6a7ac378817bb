//! A relay of one's own: it forwards packets between nodes that are connected to it, and tells a node from which address it
//! comes.
//!
//! What it forwards is sealed between the nodes; it sees who speaks with whom, when and how much. Everything is bounded:
//! connections that have not proven a key yet, those that have, of each key and of each host, and what each may send a second.
//! What is too much is refused or slowed, never queued without end.
//!
//! The library's own server bounds neither connections nor the time in which a key must be proven, so that only its service
//! is used: accepting, TLS, and the answers over QUIC are ours.

use super::{Relay, trust};
use crate::Crowd;
use crate::identity::Identity;
use http_body_util::Full;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use iroh::PublicKey;
use iroh_relay::KeyCache;
use iroh_relay::http::RELAY_PROBE_PATH;
use iroh_relay::quic::ALPN_QUIC_ADDR_DISC;
use iroh_relay::server::http_server::{BytesBody, RelayServiceWithNotify};
use iroh_relay::server::streams::MaybeTlsStream;
use iroh_relay::server::{
    Access, AccessControl, ClientRateLimit, ClientRequest, ConnectionId, Handlers, Metrics,
    RelayService,
};
use noq::crypto::rustls::QuicServerConfig;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vistara_model::NodeId;

/// Connections that have not proven a key yet.
const ARRIVING_MAX: usize = 256;
/// The same from one host.
const ARRIVING_OF_HOST_MAX: usize = 16;
/// How long one may take to prove its key.
const ARRIVING_TIME_MAX: Duration = Duration::from_secs(10);
/// Connections of one key: a new one while an old one is timing out, and a few more.
const OF_KEY_MAX: usize = 4;
/// Nodes of one host, behind one address of a translator: an office.
const OF_HOST_MAX: usize = 64;
/// Connections that ask from which address they come: each node has one or two.
const ASKING_OF_HOST_MAX: usize = 2 * OF_HOST_MAX;
/// How long the other end of such a connection may say nothing. Nodes say something each 25 s.
const ASKING_SILENCE_MAX: Duration = Duration::from_secs(40);
/// What may be sent at once, beyond the rate: a datagram's worth of several packets must fit.
const BURST_BYTES_MIN: u32 = 256 << 10;
/// Keys whose curve points are remembered.
const KEYS_REMEMBERED: usize = 4096;
/// Pause after the host had no descriptor left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How often a free port is looked for that is free for TCP and UDP, in both families.
const PORT_TRIES: usize = 16;
/// How long nodes are waited for at the end.
const CLOSE_BOUND: Duration = Duration::from_secs(2);
/// By which the service is told from where a request comes. What a client says in its place is overwritten.
const FROM: &str = "x-vistara-from";

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A socket could not be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key could not be used.
    #[error("cannot use the relay's key: {0}")]
    Key(String),
}

/// How a relay is opened.
#[derive(Debug)]
pub struct RelayOptions {
    /// Its key.
    pub identity: Identity,
    /// Where to listen, TCP and UDP. Port 0 takes any; the unspecified IPv4 address takes all interfaces, and IPv6 with them.
    pub listen: SocketAddr,
    /// Whom it serves; anybody where empty.
    pub allow: BTreeSet<NodeId>,
    /// Most nodes at a time.
    pub clients_max: usize,
    /// What one node may send, in bytes a second.
    pub rate_bytes_per_s: NonZeroU32,
}

/// What a relay does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayCounts {
    /// Nodes that are connected.
    pub clients: usize,
    /// Bytes forwarded since it began.
    pub forwarded_bytes: u64,
    /// Connections refused since it began: not allowed, or too many.
    pub refused: u64,
}

/// Who is connected, and whether one more may be.
#[derive(Debug)]
struct Gate {
    allow: BTreeSet<NodeId>,
    clients_max: usize,
    present: Mutex<HashMap<ConnectionId, (PublicKey, IpAddr)>>,
    refused: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Why a node is not let in.
    fn refusal(
        &self,
        present: &HashMap<ConnectionId, (PublicKey, IpAddr)>,
        key: &PublicKey,
        from: IpAddr,
    ) -> Option<&'static str> {
        if !self.allow.is_empty() && !self.allow.contains(&NodeId::from_bytes(*key.as_bytes())) {
            return Some("this relay does not serve you: ask its owner for --allow");
        }
        let of_key = present.values().filter(|(one, _)| one == key).count();
        let of_host = present.values().filter(|(_, ip)| *ip == from).count();
        if present.len() >= self.clients_max {
            return Some("this relay is full");
        }
        (of_key >= OF_KEY_MAX || of_host >= OF_HOST_MAX).then_some("too many connections")
    }
}

impl AccessControl for Gate {
    async fn on_connect(&self, request: &ClientRequest) -> Access {
        let from = request.headers().get(FROM);
        let from = from.and_then(|value| value.to_str().ok()?.parse().ok());
        let from = from.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let key = request.endpoint_id();
        let mut present = lock(&self.present);
        if let Some(reason) = self.refusal(&present, &key, from) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let reason = Some(reason.to_owned());
            return Access::Deny { reason };
        }
        present.insert(request.connection_id(), (key, from));
        Access::Allow
    }

    fn on_disconnect(&self, _key: PublicKey, connection: ConnectionId) {
        lock(&self.present).remove(&connection);
    }
}

/// An IPv6 host has a whole network of addresses.
fn host(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        ip @ IpAddr::V4(_) => ip,
    }
}

struct Inner {
    gate: Arc<Gate>,
    service: RelayService,
    metrics: Arc<Metrics>,
    tls: TlsAcceptor,
    arriving: Arc<Semaphore>,
    arriving_of: Crowd<IpAddr>,
    asking: Arc<Semaphore>,
    asking_of: Crowd<IpAddr>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// A relay that runs.
pub struct RelayServer {
    inner: Arc<Inner>,
    id: NodeId,
    listen: SocketAddr,
}

impl std::fmt::Debug for RelayServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RelayServer({}@{})", self.id.short(), self.listen)
    }
}

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn bind(address: SocketAddr, kind: SocketType) -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family(&address), kind, flags, None)?;
    if kind == SocketType::STREAM {
        set_socket_reuseaddr(&socket, true)?;
    }
    if address.is_ipv6() {
        // Each family has a socket of its own, so that addresses are told as they are.
        set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

type Sockets = (Vec<TcpListener>, Vec<UdpSocket>, SocketAddr);

/// The sockets of both kinds at one port, of both families where all interfaces are meant and the host has both.
fn sockets(listen: SocketAddr) -> io::Result<Sockets> {
    let open = |address| -> io::Result<(TcpListener, UdpSocket)> {
        let stream = bind(address, SocketType::STREAM)?;
        rustix::net::listen(&stream, 128)?;
        let stream = TcpListener::from(stream);
        let address = stream.local_addr()?;
        Ok((stream, UdpSocket::from(bind(address, SocketType::DGRAM)?)))
    };
    let mut tries = 0;
    let (stream, datagram) = loop {
        tries += 1;
        match open(listen) {
            Ok(both) => break both,
            // The port that was free for one kind may not be for the other.
            Err(_) if listen.port() == 0 && tries < PORT_TRIES => {}
            Err(error) => return Err(error),
        }
    };
    let bound = stream.local_addr()?;
    let (mut streams, mut datagrams) = (vec![stream], vec![datagram]);
    if bound.ip() == IpAddr::from([0, 0, 0, 0]) {
        match open(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), bound.port())) {
            Ok((stream, datagram)) => {
                streams.push(stream);
                datagrams.push(datagram);
            }
            Err(error) => tracing::info!(%error, "this relay does not listen on IPv6"),
        }
    }
    Ok((streams, datagrams, bound))
}

/// TLS 1.3 with the relay's key alone.
fn tls(identity: &Identity) -> Result<rustls::ServerConfig, RelayError> {
    let failed = |error: rustls::Error| RelayError::Key(error.to_string());
    // PKCS #8 of an Ed25519 key is these bytes and the key's (RFC 8410).
    let mut der = vec![
        0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04,
        0x20,
    ];
    der.extend_from_slice(&identity.secret().to_bytes());
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = provider
        .key_provider
        .load_private_key(der)
        .map_err(failed)?;
    let public = CertificateDer::from(trust::spki(&identity.id()).to_vec());
    let certified = Arc::new(CertifiedKey::new(vec![public], key));
    Ok(rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified))))
}

/// QUIC whose only use is that it tells the other end's address.
fn quic(mut tls: rustls::ServerConfig) -> Result<noq::ServerConfig, RelayError> {
    tls.alpn_protocols = vec![ALPN_QUIC_ADDR_DISC.to_vec()];
    let crypto =
        QuicServerConfig::try_from(tls).map_err(|error| RelayError::Key(error.to_string()))?;
    let mut config = noq::ServerConfig::with_crypto(Arc::new(crypto));
    let mut transport = noq::TransportConfig::default();
    transport
        .max_concurrent_uni_streams(0_u8.into())
        .max_concurrent_bidi_streams(0_u8.into())
        .max_idle_timeout(ASKING_SILENCE_MAX.try_into().ok())
        .send_observed_address_reports(true);
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// What is served beside packets: an empty answer, by which nodes measure how far the relay is.
fn handlers() -> Handlers {
    let mut handlers = Handlers::default();
    handlers.insert(
        (hyper::Method::GET, RELAY_PROBE_PATH),
        Box::new(|_request, response| {
            let body: BytesBody = Box::new(Full::new(bytes::Bytes::new()));
            Ok(response.status(hyper::StatusCode::OK).body(body)?)
        }),
    );
    handlers
}

impl RelayServer {
    /// Opens it.
    ///
    /// # Errors
    /// [`RelayError`]; nothing listens then.
    pub fn open(options: RelayOptions) -> Result<RelayServer, RelayError> {
        let failed = |source| RelayError::Bind {
            address: options.listen,
            source,
        };
        let tls = tls(&options.identity)?;
        let quic = quic(tls.clone())?;
        let (streams, datagrams, listen) = sockets(options.listen).map_err(failed)?;
        let gate = Arc::new(Gate {
            allow: options.allow,
            clients_max: options.clients_max,
            present: Mutex::default(),
            refused: AtomicU64::new(0),
        });
        let mut limit = ClientRateLimit::new(options.rate_bytes_per_s);
        let burst = (options.rate_bytes_per_s.get() / 4).max(BURST_BYTES_MIN);
        limit.max_burst_bytes = NonZeroU32::new(burst);
        let metrics = Arc::new(Metrics::default());
        let service = RelayService::new(
            handlers(),
            hyper::HeaderMap::new(),
            Some(limit),
            KeyCache::new(KEYS_REMEMBERED),
            Arc::clone(&gate) as Arc<dyn iroh_relay::server::DynAccessControl>,
            Arc::clone(&metrics),
        );
        let inner = Arc::new(Inner {
            service,
            metrics,
            tls: TlsAcceptor::from(Arc::new(tls)),
            arriving: Arc::new(Semaphore::new(ARRIVING_MAX)),
            arriving_of: Crowd::default(),
            asking: Arc::new(Semaphore::new(2 * gate.clients_max)),
            asking_of: Crowd::default(),
            gate,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        for stream in streams {
            let listener = tokio::net::TcpListener::from_std(stream).map_err(failed)?;
            inner.spawn(accept(Arc::clone(&inner), listener));
        }
        for datagram in datagrams {
            let runtime = noq::default_runtime()
                .ok_or_else(|| failed(io::Error::other("there is no runtime")))?;
            let config = noq::EndpointConfig::default();
            let endpoint = noq::Endpoint::new(config, Some(quic.clone()), datagram, runtime)
                .map_err(failed)?;
            let (own, stop) = (Arc::clone(&inner), inner.stop.clone());
            inner.tasks.spawn(async move {
                let answering = answer(own, &endpoint);
                let _ = stop.run_until_cancelled_owned(answering).await;
                // The port is free when the last of them has gone.
                endpoint.close(0_u32.into(), b"leaving");
                endpoint.wait_idle().await;
            });
        }
        Ok(RelayServer {
            inner,
            id: options.identity.id(),
            listen,
        })
    }

    /// Its key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Where it listens.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// What nodes are told to use it, for each of the host's addresses at which it listens; loopback only where that is all.
    pub fn relays(&self) -> Vec<Relay> {
        let here = |ip| Relay {
            key: self.id,
            address: SocketAddr::new(ip, self.listen.port()),
        };
        if !self.listen.ip().is_unspecified() {
            return vec![here(self.listen.ip())];
        }
        let found = netwatch::ip::LocalAddresses::new();
        let (mut outer, mut inner) = (found.regular, found.loopback);
        let fits = |ip: &IpAddr| self.listen.is_ipv4() || ip.is_ipv6();
        let single = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        };
        outer.retain(|ip| fits(ip) && single(ip));
        inner.retain(fits);
        let all = if outer.is_empty() { inner } else { outer };
        all.into_iter().map(here).collect()
    }

    /// What it does.
    pub fn counts(&self) -> RelayCounts {
        RelayCounts {
            clients: lock(&self.inner.gate.present).len(),
            forwarded_bytes: self.inner.metrics.bytes_sent.get(),
            refused: self.inner.gate.refused.load(Ordering::Relaxed),
        }
    }

    /// Ends it: nodes are disconnected.
    pub async fn close(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        let close = async {
            self.inner.service.shutdown().await;
            self.inner.tasks.wait().await;
        };
        if tokio::time::timeout(CLOSE_BOUND, close).await.is_err() {
            tracing::debug!("nodes were not waited for any longer");
        }
    }
}

impl Drop for RelayServer {
    fn drop(&mut self) {
        self.inner.stop.cancel();
    }
}

impl Inner {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        let task = async move {
            // What it was doing ends here.
            let _ = stop.run_until_cancelled_owned(task).await;
        };
        self.tasks.spawn(task);
    }
}

async fn accept(inner: Arc<Inner>, listener: tokio::net::TcpListener) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let place = (inner.arriving_of).enter(host(from.ip()), ARRIVING_OF_HOST_MAX);
        let permit = Arc::clone(&inner.arriving).try_acquire_owned().ok();
        let (Some(place), Some(permit)) = (place, permit) else {
            inner.gate.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let task = serve(Arc::clone(&inner), stream, host(from.ip()));
        inner.spawn(async move {
            task.await;
            drop((place, permit));
        });
    }
}

/// The service, told from where its requests come.
struct Labelled {
    relayed: RelayServiceWithNotify,
    from: HeaderValue,
}

impl Service<Request<Incoming>> for Labelled {
    type Response = <RelayServiceWithNotify as Service<Request<Incoming>>>::Response;
    type Error = <RelayServiceWithNotify as Service<Request<Incoming>>>::Error;
    type Future = <RelayServiceWithNotify as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        // In place of what the client may have said.
        request.headers_mut().insert(FROM, self.from.clone());
        self.relayed.call(request)
    }
}

/// Serves a connection until it has proven a key, from where on the service has it; or closes it.
async fn serve(inner: Arc<Inner>, stream: TcpStream, from: IpAddr) {
    // By this it can be closed though the service holds it.
    let Ok(hold) = stream.as_fd().try_clone_to_owned() else {
        return;
    };
    let _ = stream.set_nodelay(true);
    let proven = Arc::new(Notify::new());
    let wait = proven.notified();
    tokio::pin!(wait);
    // Who is not waiting yet would not be told.
    wait.as_mut().enable();
    let Ok(from) = HeaderValue::from_str(&from.to_string()) else {
        return;
    };
    let relayed = RelayServiceWithNotify::new(inner.service.clone(), Arc::clone(&proven));
    let until_proven = async {
        let Ok(stream) = inner.tls.accept(stream).await else {
            return;
        };
        let service = Labelled { relayed, from };
        let served = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(MaybeTlsStream::Tls(stream)), service)
            .with_upgrades()
            .await;
        // Whoever goes on to prove a key holds the other end of it.
        if served.is_ok() && Arc::strong_count(&proven) > 1 {
            wait.await;
        }
    };
    let in_time = tokio::time::timeout(ARRIVING_TIME_MAX, until_proven).await;
    if in_time.is_err() {
        inner.gate.refused.fetch_add(1, Ordering::Relaxed);
        // It may be closed by the other end already.
        let _ = rustix::net::shutdown(&hold, Shutdown::Both);
    }
}

/// Tells whoever asks from which address it comes.
async fn answer(inner: Arc<Inner>, endpoint: &noq::Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let from = incoming.remote_address().ip();
        let free = inner.asking.available_permits();
        let loaded = free < inner.gate.clients_max;
        if loaded && !incoming.remote_address_validated() {
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "a connection was not retried");
            }
            continue;
        }
        let place = inner.asking_of.enter(host(from), ASKING_OF_HOST_MAX);
        let permit = Arc::clone(&inner.asking).try_acquire_owned().ok();
        let (Some(place), Some(permit)) = (place, permit) else {
            incoming.refuse();
            continue;
        };
        inner.spawn(async move {
            let arrived = tokio::time::timeout(ARRIVING_TIME_MAX, async { incoming.await }).await;
            if let Ok(Ok(connection)) = arrived {
                connection.closed().await;
            }
            drop((place, permit));
        });
    }
}
