//! The node's end of the mesh: one endpoint, a task for each remembered peer that keeps it connected, and what others open.
//!
//! ```text
//! a peer's task:   Connecting ──hello──▶ Connected ──lost──▶ Away ──after a while, or when wanted──▶ Connecting
//! ```
//! A request waits for its peer to be connected, within a bound. Each side sends its requests over the connection that it
//! has made itself. Who was named is dialled at the addresses that were named, through the relays that were, where it states
//! to be, and where it was heard in the [local network](near); for [packets] also who was only heard of, where its card says.
//! No name is resolved, and no third party asked.

mod accept;
mod near;
mod packets;
mod relays;

pub use self::packets::{Heard, PAGE_BYTES_MAX};
pub use self::relays::Way;

use self::accept::{Place, Taken};
use self::near::Near;
use self::packets::Packets;
use self::relays::{Relays, endpoint_addr};
use crate::frame::{self, ALPN, FrameError, Hello, Open};
use crate::identity::Identity;
use crate::relay::{Relay, trust};
use crate::ticket::ADDRESSES_MAX;
use crate::token::Token;
use crate::whereabouts::Whereabouts;
use iroh::endpoint::{
    BindOpts, ConnectOptions, Connection, PortmapperConfig, QuicTransportConfig,
    QuicTransportConfigBuilder, RecvStream, SendStream, VarInt, presets,
};
use iroh::{Endpoint, EndpointAddr, NetReportConfig, PublicKey, RelayMap, RelayMode};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vistara_model::NodeId;

/// A peer that says nothing for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How often whoever dialled asks for a sign of life: the answer is the other side's. What is left until [`SILENCE_MAX`] is for
/// asking again, which QUIC does by itself after a few round trips.
const KEEP_ALIVE: Duration = Duration::from_millis(2250);
/// Longest that a dial, a greeting or the first frame of a stream may take.
const STEP_BOUND: Duration = Duration::from_secs(5);
/// What one stream may have under way unread. From 3 MB on transfers of the library die ("too many gaps").
const STREAM_WINDOW: u32 = 1 << 20;
/// The same for all streams of one connection.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Requests of one connection at a time: each may be somebody's `logs -f`.
const STREAMS_MAX: u32 = 256;
/// Connections that others have made to us, all together.
const ACCEPTED_MAX: usize = 512;
/// Connections of others whose handshake or greeting is not over, each for two steps at most. From a quarter on only who
/// receives what is sent to its address gets further: the rest cannot be used up from forged ones.
const HANDSHAKES_MAX: usize = 128;
/// Connections of nodes that have no business here: they can only be told so.
const STRANGERS_MAX: usize = 64;
/// Connections of nodes that have no business here beyond being members of the same network: half of all, so that who
/// makes many keys leaves the other half to those that were named.
const MEMBERS_MAX: usize = 256;
/// Connections of one of those: a second one while the first is timing out.
const OF_MEMBER_MAX: usize = 2;
/// Streams one way at a time: each is one long packet.
const PAGE_STREAMS_MAX: u32 = 2;
/// Datagrams that have come and not been read; they are read at once.
const DATAGRAMS_BYTES_MAX: usize = 64 << 10;
/// What a stranger may have under way unread, on all its streams: a token and a request are a tenth of it.
const STRANGER_WINDOW: u32 = 64 << 10;
/// Streams of a stranger at a time.
const STRANGER_STREAMS_MAX: u32 = 4;
/// Connections of a stranger.
const OF_STRANGER_MAX: usize = 1;
/// Connections of one node: a second one while the first is timing out, and some more.
const OF_ONE_MAX: usize = 4;
/// How long a stranger may stay without asking anything.
const STRANGER_IDLE: Duration = Duration::from_secs(20);
/// Streams that have been accepted and not been taken.
const ACCEPTED_QUEUE: usize = 64;
/// First and longest pause between two dials of a peer that does not answer.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long a request of ours is valid: longer than a dial, and than two clocks are usually apart.
const REQUEST_VALID: Duration = Duration::from_secs(30);
/// How long peers are waited for when the node leaves.
const CLOSE_BOUND: Duration = Duration::from_secs(1);

/// Codes with which connections and streams are closed.
const CODE_LEAVING: u32 = 0;
const CODE_GARBAGE: u32 = 1;
const CODE_TOO_MANY: u32 = 2;

/// Why the mesh failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The socket could not be bound.
    #[error("cannot listen on {address}: {message}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        message: String,
    },
    /// The id is not a key.
    #[error("{0} is not a node's key")]
    Key(NodeId),
    /// The node was not joined.
    #[error("the node {0} was not joined")]
    Unknown(NodeId),
    /// It does not answer.
    #[error("the node {node} does not answer: {message}")]
    Away {
        /// Which.
        node: String,
        /// The last failure.
        message: String,
    },
    /// The endpoint is closed.
    #[error("the mesh is closed")]
    Closed,
}

/// How an endpoint is opened.
pub struct LinkOptions {
    /// Who we are.
    pub identity: Identity,
    /// Where to listen. Port 0 takes any; the unspecified address takes all interfaces.
    pub listen: SocketAddr,
    /// Whether a node has business here (a grant, say): others get few connections.
    pub knows: Arc<dyn Fn(&NodeId) -> bool + Send + Sync>,
    /// Relays that the owner named; those of tickets are used where there are none.
    pub relays: Vec<Relay>,
}

/// How it stands with a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerState {
    /// It is being dialled.
    Connecting,
    /// It answers.
    Connected {
        /// Which of its starts.
        generation: u64,
    },
    /// It does not answer.
    Away {
        /// Why.
        reason: String,
        /// Dials that failed since it last answered.
        failures: u32,
    },
}

/// A stream that another node opened, with what it said first. Nothing of it has been judged.
#[derive(Debug)]
pub struct Accepted {
    /// Who opened it: its connection proves that it has this key.
    pub peer: NodeId,
    /// Its first word.
    pub open: Open,
    /// The stream.
    pub stream: MeshStream,
    place: Weak<Place>,
}

impl Accepted {
    /// Says that the one who opened it has shown that it has business here, though the link did not know it: its connection
    /// is no stranger's any more, as long as it lasts.
    pub fn vouch(&self) {
        if let Some(place) = self.place.upgrade() {
            place.raise();
        }
    }
}

/// A stream of bytes between two nodes.
#[derive(Debug)]
pub struct MeshStream {
    send: SendStream,
    receive: RecvStream,
    /// Shared by all streams of one accepted connection: how many there are keeps a stranger's open.
    _counted: Option<Arc<()>>,
}

impl MeshStream {
    fn new((send, receive): (SendStream, RecvStream)) -> MeshStream {
        MeshStream {
            send,
            receive,
            _counted: None,
        }
    }
}

#[derive(Clone)]
struct Live {
    connection: Connection,
    generation: u64,
}

struct Published {
    state: PeerState,
    live: Option<Live>,
    /// Dials that failed, and why the last one did: a waiter sees a failure that came after it began to wait, though the next
    /// dial may have begun before it looks.
    failed: u64,
    failure: String,
}

struct Slot {
    named: Whereabouts,
    wanted: Arc<Notify>,
    published: watch::Receiver<Published>,
    stop: CancellationToken,
}

struct Inner {
    endpoint: Endpoint,
    identity: Identity,
    knows: Arc<dyn Fn(&NodeId) -> bool + Send + Sync>,
    slots: Mutex<HashMap<NodeId, Slot>>,
    accepted: Mutex<HashMap<NodeId, Taken>>,
    handshakes: Arc<Semaphore>,
    packets: Packets,
    relays: Relays,
    near: Near,
    stranger_idle: Duration,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The node's end of the mesh. Clones are the same one.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Link({})", self.id().short())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// With what the other end may have under way unread, and how many streams it may have open.
fn transport(window: u32, streams: u32) -> QuicTransportConfigBuilder {
    QuicTransportConfig::builder()
        .max_idle_timeout(SILENCE_MAX.try_into().ok())
        .default_path_max_idle_timeout(SILENCE_MAX)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(window))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(PAGE_STREAMS_MAX))
        .datagram_receive_buffer_size(Some(DATAGRAMS_BYTES_MAX))
}

/// What the library may ask of relays beside having packets forwarded.
fn asked_of_relays() -> NetReportConfig {
    let mut asked = NetReportConfig::minimal();
    // How far each is, where only TCP gets through.
    asked.https_probes = true;
    asked
}

impl Link {
    /// Opens the endpoint. What others open comes out of the channel.
    ///
    /// # Errors
    /// [`LinkError::Bind`].
    pub async fn open(options: LinkOptions) -> Result<(Link, mpsc::Receiver<Accepted>), LinkError> {
        Link::open_for(options, STRANGER_IDLE).await
    }

    async fn open_for(
        options: LinkOptions,
        stranger_idle: Duration,
    ) -> Result<(Link, mpsc::Receiver<Accepted>), LinkError> {
        let listen = options.listen;
        let failed = |message: String| LinkError::Bind {
            address: listen,
            message,
        };
        let mut builder = Endpoint::builder(presets::Minimal)
            .secret_key(options.identity.secret().clone())
            .alpns(vec![ALPN.to_vec()])
            // Nobody but whom the user named: no relays but those that come in by `use_relays` and `keep`, no name services, no
            // gateways, and nothing from a relay but packets, its distance, and the address that it sees.
            .relay_mode(RelayMode::Custom(RelayMap::empty()))
            .ca_tls_config(trust::by_name())
            .dns_resolver(trust::names())
            .net_report_config(asked_of_relays())
            .clear_address_lookup()
            .portmapper_config(PortmapperConfig::Disabled)
            // As a stranger's until it is known who dials.
            .transport_config(transport(STRANGER_WINDOW, STRANGER_STREAMS_MAX).build())
            .clear_ip_transports()
            .bind_addr(listen)
            .map_err(|error| failed(error.to_string()))?;
        if listen.ip() == IpAddr::from([0, 0, 0, 0]) {
            // The other family where the host has it.
            let other = SocketAddr::from(([0_u16; 8], listen.port()));
            builder = builder
                .bind_addr_with_opts(other, BindOpts::default().set_is_required(false))
                .map_err(|error| failed(error.to_string()))?;
        }
        let endpoint = builder
            .bind()
            .await
            .map_err(|error| failed(format!("{error:#}")))?;
        let inner = Arc::new(Inner {
            endpoint,
            identity: options.identity,
            knows: options.knows,
            slots: Mutex::default(),
            accepted: Mutex::default(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            packets: Packets::default(),
            relays: Relays::new(options.relays),
            near: Near::default(),
            stranger_idle,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let (sender, receiver) = mpsc::channel(ACCEPTED_QUEUE);
        inner
            .tasks
            .spawn(accept::accept_all(Arc::clone(&inner), sender));
        inner.tasks.spawn(relays::heed(Arc::clone(&inner)));
        relays::settle(Arc::clone(&inner)).await;
        Ok((Link(inner), receiver))
    }

    /// Who we are.
    pub fn id(&self) -> NodeId {
        self.0.identity.id()
    }

    /// The port on which we listen.
    pub fn port(&self) -> Option<u16> {
        self.0
            .endpoint
            .bound_sockets()
            .first()
            .map(SocketAddr::port)
    }

    /// Where we may be reached, as far as this host knows; loopback only where that is all there is.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let mut found: Vec<SocketAddr> = self.0.endpoint.addr().ip_addrs().copied().collect();
        found.extend(
            self.0
                .endpoint
                .bound_sockets()
                .into_iter()
                .filter(|address| !address.ip().is_unspecified()),
        );
        found.sort();
        found.dedup();
        let (mut outer, inner): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|address| !address.ip().is_loopback());
        if outer.is_empty() {
            outer = inner;
        }
        outer.truncate(ADDRESSES_MAX);
        outer
    }

    /// Keeps a node connected from now on, in place of what was known of it.
    ///
    /// # Errors
    /// [`LinkError::Key`], or [`LinkError::Closed`].
    pub fn keep(&self, node: NodeId, named: impl Into<Whereabouts>) -> Result<(), LinkError> {
        let named = named.into();
        let key = PublicKey::from_bytes(node.as_bytes()).map_err(|_| LinkError::Key(node))?;
        if self.0.stop.is_cancelled() {
            return Err(LinkError::Closed);
        }
        let mut slots = lock(&self.0.slots);
        if slots.get(&node).is_some_and(|slot| slot.named == named) {
            return Ok(());
        }
        let (publish, published) = watch::channel(Published {
            state: PeerState::Connecting,
            live: None,
            failed: 0,
            failure: String::new(),
        });
        let wanted = Arc::new(Notify::new());
        let stop = self.0.stop.child_token();
        let task = keep_connected(
            Arc::clone(&self.0),
            key,
            named.clone(),
            publish,
            Arc::clone(&wanted),
        );
        self.0
            .tasks
            .spawn(stop.clone().run_until_cancelled_owned(task));
        let slot = Slot {
            named,
            wanted,
            published,
            stop,
        };
        if let Some(old) = slots.insert(node, slot) {
            old.stop.cancel();
        }
        drop(slots);
        self.settle_relays();
        Ok(())
    }

    /// Keeps a node connected no longer.
    pub fn forget(&self, node: &NodeId) {
        if let Some(slot) = lock(&self.0.slots).remove(node) {
            slot.stop.cancel();
            self.settle_relays();
        }
    }

    /// How it stands with a node that is kept connected.
    pub fn state(&self, node: &NodeId) -> Option<PeerState> {
        let slots = lock(&self.0.slots);
        slots
            .get(node)
            .map(|slot| slot.published.borrow().state.clone())
    }

    /// Waits until a node is connected, or a dial has failed that began after this call; gives which of its starts.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn reach(&self, node: &NodeId) -> Result<u64, LinkError> {
        self.live(node).await.map(|live| live.generation)
    }

    async fn live(&self, node: &NodeId) -> Result<Live, LinkError> {
        let (wanted, mut published) = {
            let slots = lock(&self.0.slots);
            let slot = slots.get(node).ok_or(LinkError::Unknown(*node))?;
            (Arc::clone(&slot.wanted), slot.published.clone())
        };
        let away = |message: String| LinkError::Away {
            node: node.short(),
            message,
        };
        let seen = published.borrow().failed;
        let wait = async {
            loop {
                {
                    let now = published.borrow_and_update();
                    let usable = |live: &&Live| live.connection.close_reason().is_none();
                    if let Some(live) = now.live.as_ref().filter(usable) {
                        return Ok(live.clone());
                    }
                    if now.failed > seen {
                        return Err(away(now.failure.clone()));
                    }
                }
                wanted.notify_one();
                published.changed().await.map_err(|_| LinkError::Closed)?;
            }
        };
        // Its task bounds each dial; one that was under way may fail before ours begins.
        tokio::time::timeout(STEP_BOUND * 3, wait)
            .await
            .unwrap_or_else(|_| Err(away("it takes too long".to_owned())))
    }

    /// Opens a stream to a node, on which HTTP is to be spoken. What the other end thinks of it comes as HTTP, too, so that
    /// nothing is waited for here once the node is connected.
    ///
    /// # Errors
    /// [`LinkError`]; nothing has been asked of the other node then.
    pub async fn stream(
        &self,
        node: &NodeId,
        token: Option<&Token>,
    ) -> Result<MeshStream, LinkError> {
        let away = |message: String| LinkError::Away {
            node: node.short(),
            message,
        };
        let live = self.live(node).await?;
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|error| away(error.to_string()))?;
        let open = Open {
            target: *node.as_bytes(),
            generation: live.generation,
            nonce,
            deadline_ms: now_ms().saturating_add(REQUEST_VALID.as_millis() as u64),
            token: token.map(|token| token.as_bytes().to_vec()),
        };
        self.begin(node, &open).await
    }

    /// Opens a stream whose first word is the caller's own, whatever it says: what a peer does that is not well-meaning, for
    /// tests of those that are asked.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn begin(&self, node: &NodeId, open: &Open) -> Result<MeshStream, LinkError> {
        let away = |message: String| LinkError::Away {
            node: node.short(),
            message,
        };
        let live = self.live(node).await?;
        let begin = async {
            let pair = live.connection.open_bi().await.map_err(io::Error::other)?;
            let mut stream = MeshStream::new(pair);
            frame::write(&mut stream, open).await?;
            Ok::<_, FrameError>(stream)
        };
        match tokio::time::timeout(STEP_BOUND, begin).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(away(chain(&error))),
            Err(_) => Err(away("too many requests are under way".to_owned())),
        }
    }

    /// Says goodbye to everybody, and ends every task.
    pub async fn close(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        let close = async {
            self.0.endpoint.close().await;
            self.0.tasks.wait().await;
        };
        if tokio::time::timeout(CLOSE_BOUND, close).await.is_err() {
            tracing::debug!("peers were not waited for any longer");
        }
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let layer = error.to_string();
        if !text.contains(&layer) {
            text.push_str(": ");
            text.push_str(&layer);
        }
        cause = error.source();
    }
    text
}

/// How long to wait after so many failures: twice as long each time, less up to a quarter by chance, so that a network that
/// comes back is not dialled by everybody in one moment.
fn pause(failures: u32, random: u8) -> Duration {
    let doubled = PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let whole = doubled.min(PAUSE_MAX);
    whole - whole / 4 * u32::from(random) / 256
}

async fn keep_connected(
    inner: Arc<Inner>,
    key: PublicKey,
    named: Whereabouts,
    publish: watch::Sender<Published>,
    wanted: Arc<Notify>,
) {
    let node = NodeId::from_bytes(*key.as_bytes());
    let generation = inner.identity.generation();
    let mut failures = 0;
    loop {
        publish.send_modify(|now| now.state = PeerState::Connecting);
        // It may say by now that it is elsewhere.
        let mut everywhere = named.clone();
        let stated = packets::stated(&inner, &node);
        everywhere.addresses.extend(stated.addresses);
        everywhere.relays.extend(stated.relays);
        everywhere.addresses.extend(inner.near.addresses(&node));
        let address = endpoint_addr(key, &everywhere);
        let dial = dial(&inner.endpoint, &address, generation, CONNECTION_WINDOW);
        let dialled = tokio::time::timeout(STEP_BOUND, dial).await;
        let reason = match dialled {
            Ok(Ok(live)) => {
                failures = 0;
                let connection = live.connection.clone();
                tracing::info!(peer = %key.fmt_short(), "a node is connected");
                publish.send_modify(|now| {
                    now.state = PeerState::Connected {
                        generation: live.generation,
                    };
                    now.live = Some(live);
                });
                packets::listen(&inner, node, &connection).await;
                let reason = connection.closed().await;
                tracing::info!(peer = %key.fmt_short(), %reason, "a node is lost");
                Ok(reason.to_string())
            }
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(format!("no answer within {} s", STEP_BOUND.as_secs())),
        };
        failures += 1;
        publish.send_modify(|now| {
            now.live = None;
            let reason = reason.unwrap_or_else(|reason| {
                // Not where a connection was lost: whoever waits then waits for the next dial.
                now.failed += 1;
                now.failure.clone_from(&reason);
                reason
            });
            now.state = PeerState::Away { reason, failures };
        });
        let mut random = [0];
        // Without chance the pause is merely longer.
        let _ = getrandom::fill(&mut random);
        let _ = tokio::time::timeout(pause(failures, random[0]), wanted.notified()).await;
    }
}

async fn dial(
    endpoint: &Endpoint,
    address: &EndpointAddr,
    generation: u64,
    window: u32,
) -> Result<Live, String> {
    // The node that was dialled opens no streams for requests: it dials for its own.
    let transport = transport(window, 0)
        .keep_alive_interval(KEEP_ALIVE)
        .default_path_keep_alive_interval(KEEP_ALIVE)
        .build();
    let options = ConnectOptions::new().with_transport_config(transport);
    let connection = endpoint
        .connect_with_opts(address.clone(), ALPN, options)
        .await
        .map_err(|error| format!("{error:#}"))?
        .await
        .map_err(|error| format!("{error:#}"))?;
    let greet = async {
        let pair = connection.open_bi().await.map_err(io::Error::other)?;
        let mut stream = MeshStream::new(pair);
        let hello = Hello {
            version: frame::VERSION,
            generation,
        };
        frame::write(&mut stream, &hello).await?;
        frame::decode_hello(&frame::read(&mut stream).await?)
    };
    match greet.await {
        Ok(hello) => Ok(Live {
            connection,
            generation: hello.generation,
        }),
        Err(error) => {
            let why = connection
                .close_reason()
                .map_or_else(|| chain(&error), |reason| reason.to_string());
            connection.close(CODE_GARBAGE.into(), b"no greeting");
            Err(format!("it did not greet: {why}"))
        }
    }
}

impl AsyncRead for MeshStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.receive), cx, buf)
    }
}

impl AsyncWrite for MeshStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.send), cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(&mut self.send), cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod relay_tests;
