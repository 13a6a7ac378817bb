//! Packets: what nodes say to each other beside requests, over whatever connection there is between them.
//!
//! A short one is a datagram and may be lost; a long one is a stream of its own, one way. Where there is no connection, a
//! node is dialled that has stated where it may be ([`Link::know`]); what is dialled so is closed when it was not used for a
//! while, or others need its place. Nothing of what comes is judged here, only bounded.

use super::{
    CODE_LEAVING, Inner, Link, Live, STEP_BOUND, STRANGER_WINDOW, dial, endpoint_addr, lock, pause,
};
use crate::card::{CARD_ADDRESSES_MAX, is_dialled};
use crate::relay::Relay;
use crate::whereabouts::Whereabouts;
use bytes::Bytes;
use iroh::endpoint::Connection;
use iroh::{EndpointAddr, PublicKey};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use vistara_model::NodeId;

/// Longest long one: a page of a table.
pub const PAGE_BYTES_MAX: usize = 16 << 10;
/// Packets that wait to be looked at: a second of more than a network of thousands sends. Later ones are lost.
const HEARD_MAX: usize = 1024;
/// What one connection may bring each second, and at once; a member sends its peers a few.
const EACH_PER_S: f64 = 32.0;
const EACH_BURST: f64 = 128.0;
/// Connections dialled for packets: a network of so many is kept connected wholly.
const CALLED_MAX: usize = 128;
/// Dials for packets at a time.
const DIALS_MAX: usize = 16;
/// Dials of one host at a time.
const OF_HOST_MAX: usize = 2;
/// Packets that wait for one dial.
const WAITING_MAX: usize = 4;
/// A connection that was dialled for packets is closed when none went over it for so long: members ping each other now and
/// then, in networks of a hundred once in 50 s.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Failed dials that are remembered.
const FAILED_MAX: usize = 4096;
/// Long ones being sent at a time.
const PAGES_MAX: usize = 32;

/// What there is to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// There is a connection to a node now, whoever made it.
    Connected(NodeId),
    /// A node said something. Its connection proves that it has this key.
    Packet(NodeId, Bytes),
}

type IsMember = Arc<dyn Fn(&NodeId) -> bool + Send + Sync>;

struct Hearing {
    sender: mpsc::Sender<Heard>,
    is_member: IsMember,
}

/// A connection over which packets go.
pub(super) struct Line {
    connection: Connection,
    used: Mutex<Instant>,
    /// Dialled for packets alone.
    called: bool,
}

impl Line {
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    fn touch(&self) {
        *lock(&self.used) = Instant::now();
    }

    fn idle(&self) -> Duration {
        lock(&self.used).elapsed()
    }

    fn send(&self, bytes: Bytes) {
        self.touch();
        if let Err(error) = self.connection.send_datagram(bytes) {
            tracing::debug!(%error, "a packet is lost");
        }
    }
}

enum Call {
    Dialling {
        waiting: Vec<Bytes>,
        failures: u32,
        to: Vec<IpAddr>,
        /// Whether there was a connection with it before.
        met: bool,
    },
    Failed {
        until: Instant,
        failures: u32,
    },
}

impl Call {
    fn dials(&self, ip: &IpAddr) -> bool {
        matches!(self, Call::Dialling { to, .. } if to.contains(ip))
    }
}

/// Dials of hosts, whoever is said to be there: cards of many keys may all name one.
#[derive(Default)]
struct Hosts(HashMap<IpAddr, (Instant, u32)>);

impl Hosts {
    fn rests(&self, ip: &IpAddr) -> bool {
        let failed = self.0.get(ip);
        failed.is_some_and(|(until, _)| *until > Instant::now())
    }

    /// Nobody who was to be there answered, or somebody did.
    fn enter(&mut self, ip: IpAddr, answered: bool) {
        if answered {
            self.0.remove(&ip);
            return;
        }
        if self.0.len() >= FAILED_MAX {
            let now = Instant::now();
            self.0.retain(|_, (until, _)| *until > now);
        }
        let failures = self.0.get(&ip).map_or(0, |(_, failures)| *failures);
        if self.0.len() < FAILED_MAX {
            let failures = failures.saturating_add(1);
            self.0
                .insert(ip, (Instant::now() + pause(failures, 0), failures));
        }
    }
}

/// Where of all a node may be dialled now. `met` is whether there was a connection with the node before: then others' failures
/// at its host do not count. A relay of the owner's own is nobody's host to be spared; any other is.
fn now_dialled(
    calls: &HashMap<NodeId, Call>,
    hosts: &Hosts,
    met: bool,
    mut whereabouts: Whereabouts,
    is_own: impl Fn(&Relay) -> bool,
) -> Whereabouts {
    let dialling = |met: bool| {
        let alike =
            move |call: &&Call| matches!(call, Call::Dialling { met: one, .. } if *one == met);
        calls.values().filter(alike).count()
    };
    // Half of all dials are for those that were there once.
    if dialling(true) + dialling(false) >= DIALS_MAX || (!met && dialling(false) >= DIALS_MAX / 2) {
        return Whereabouts::default();
    }
    let free = |address: &SocketAddr| {
        let ip = address.ip().to_canonical();
        let busy = calls.values().filter(|call| call.dials(&ip)).count() >= OF_HOST_MAX;
        // Of this very host nobody is to be spared.
        ip.is_loopback() || !(busy || (!met && hosts.rests(&ip)))
    };
    whereabouts.addresses.retain(free);
    let relay = |relay: &Relay| is_own(relay) || free(&relay.address);
    whereabouts.relays.retain(relay);
    whereabouts
}

/// What the link has for packets.
pub(super) struct Packets {
    hearing: Mutex<Option<Hearing>>,
    lines: Mutex<HashMap<NodeId, Vec<Arc<Line>>>>,
    /// Where nodes say that they may be dialled: as they say it, to be looked at when it is used.
    stated: Mutex<HashMap<NodeId, Whereabouts>>,
    calls: Mutex<HashMap<NodeId, Call>>,
    hosts: Mutex<Hosts>,
    /// With whom there was a connection.
    met: Mutex<HashSet<NodeId>>,
    pages: Arc<Semaphore>,
}

impl Default for Packets {
    fn default() -> Packets {
        Packets {
            hearing: Mutex::default(),
            lines: Mutex::default(),
            stated: Mutex::default(),
            calls: Mutex::default(),
            hosts: Mutex::default(),
            met: Mutex::default(),
            pages: Arc::new(Semaphore::new(PAGES_MAX)),
        }
    }
}

impl Packets {
    /// Whether whoever hears packets takes the node for a member.
    pub(super) fn is_member(&self, node: &NodeId) -> bool {
        let is_member = lock(&self.hearing)
            .as_ref()
            .map(|hearing| Arc::clone(&hearing.is_member));
        is_member.is_some_and(|is_member| is_member(node))
    }

    fn tell(&self, heard: Heard) {
        if let Some(hearing) = lock(&self.hearing).as_ref() {
            // Where too much waits, this is lost, as datagrams may be.
            let _ = hearing.sender.try_send(heard);
        }
    }

    pub(super) fn line(&self, node: &NodeId) -> Option<Arc<Line>> {
        let lines = lock(&self.lines);
        let open = |line: &&Arc<Line>| line.connection.close_reason().is_none();
        lines.get(node)?.iter().find(open).cloned()
    }

    /// Enters how a dial went: where it did well, with what waits to be sent.
    fn dialled(&self, node: NodeId, live: Option<Live>) -> Option<(Live, Vec<Bytes>)> {
        let mut calls = lock(&self.calls);
        let (waiting, failures, to) = match calls.remove(&node) {
            Some(Call::Dialling {
                waiting,
                failures,
                to,
                ..
            }) => (waiting, failures, to),
            Some(Call::Failed { .. }) | None => (Vec::new(), 0, Vec::new()),
        };
        let mut hosts = lock(&self.hosts);
        for ip in to {
            hosts.enter(ip, live.is_some());
        }
        drop(hosts);
        if let Some(live) = live {
            return Some((live, waiting));
        }
        if calls.len() >= FAILED_MAX {
            let now = Instant::now();
            calls.retain(|_, call| !matches!(call, Call::Failed { until, .. } if *until < now));
        }
        if calls.len() < FAILED_MAX {
            let failures = failures.saturating_add(1);
            let until = Instant::now() + pause(failures, 0);
            calls.insert(node, Call::Failed { until, failures });
        }
        None
    }

    /// There is a connection with a node.
    fn meet(&self, node: NodeId) {
        let mut met = lock(&self.met);
        if met.len() >= FAILED_MAX {
            let stated = lock(&self.stated);
            met.retain(|node| stated.contains_key(node));
        }
        if met.len() < FAILED_MAX {
            met.insert(node);
        }
    }

    /// Closes the connection dialled for packets that was idle for longest, where there are too many.
    fn make_room(&self) {
        let lines = lock(&self.lines);
        let called = || lines.values().flatten().filter(|line| line.called);
        if called().count() > CALLED_MAX
            && let Some(line) = called().max_by_key(|line| line.idle())
        {
            line.connection.close(CODE_LEAVING.into(), b"idle");
        }
    }
}

/// How much one connection may still bring.
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new() -> Bucket {
        Bucket {
            left: EACH_BURST,
            at: Instant::now(),
        }
    }

    fn take(&mut self) -> bool {
        let since = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        self.left = (self.left + since * EACH_PER_S).min(EACH_BURST) - 1.0;
        let enough = self.left >= 0.0;
        self.left = self.left.max(0.0);
        enough
    }
}

/// A connection among those over which packets go, while this is there.
struct Entered<'a> {
    packets: &'a Packets,
    peer: NodeId,
    line: Arc<Line>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut lines = lock(&self.packets.lines);
        if let Some(own) = lines.get_mut(&self.peer) {
            own.retain(|line| !Arc::ptr_eq(line, &self.line));
            if own.is_empty() {
                lines.remove(&self.peer);
            }
        }
    }
}

impl<'a> Entered<'a> {
    fn new(
        packets: &'a Packets,
        peer: NodeId,
        connection: &Connection,
        called: bool,
    ) -> Entered<'a> {
        let line = Arc::new(Line {
            connection: connection.clone(),
            used: Mutex::new(Instant::now()),
            called,
        });
        let mut lines = lock(&packets.lines);
        lines.entry(peer).or_default().push(Arc::clone(&line));
        drop(lines);
        packets.meet(peer);
        packets.tell(Heard::Connected(peer));
        Entered {
            packets,
            peer,
            line,
        }
    }

    /// Hears what comes until the connection is closed.
    async fn listen(&self) {
        let connection = &self.line.connection;
        let bucket = Mutex::new(Bucket::new());
        let tell = |bytes: Bytes| {
            if lock(&bucket).take() {
                self.line.touch();
                self.packets.tell(Heard::Packet(self.peer, bytes));
            }
        };
        let short = async {
            while let Ok(bytes) = connection.read_datagram().await {
                tell(bytes);
            }
        };
        let long = async {
            while let Ok(mut stream) = connection.accept_uni().await {
                let read = tokio::time::timeout(STEP_BOUND, stream.read_to_end(PAGE_BYTES_MAX));
                if let Ok(Ok(bytes)) = read.await {
                    tell(Bytes::from(bytes));
                }
            }
        };
        tokio::join!(short, long);
    }

    async fn until_idle(&self) {
        loop {
            let left = IDLE_MAX.saturating_sub(self.line.idle());
            if left.is_zero() {
                self.line
                    .connection
                    .close(CODE_LEAVING.into(), b"nothing was said");
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

/// Where a node states that it may be dialled, as far as that is used. Loopback counts where the own socket is bound to
/// nothing else, which does not change as interfaces come and go.
pub(super) fn stated(inner: &Inner, node: &NodeId) -> Whereabouts {
    let bound = inner.endpoint.bound_sockets();
    let loopback = (bound.iter()).all(|address| address.ip().to_canonical().is_loopback());
    let mut stated = (lock(&inner.packets.stated).get(node).cloned()).unwrap_or_default();
    let addresses = &mut stated.addresses;
    addresses.retain(|address| is_dialled(address, loopback));
    let dialled = |relay: &Relay| is_dialled(&relay.address, loopback);
    (stated.relays).retain(|relay| inner.relays.is_own(relay) || dialled(relay));
    stated
}

/// Hears what comes over a connection that was made for requests, until it is closed.
pub(super) async fn listen(inner: &Inner, peer: NodeId, connection: &Connection) {
    Entered::new(&inner.packets, peer, connection, false)
        .listen()
        .await;
}

/// Dials a node for packets, sends what waits, and keeps the connection while it is used.
async fn call(inner: Arc<Inner>, node: NodeId, address: EndpointAddr) {
    let generation = inner.identity.generation();
    let dial = dial(&inner.endpoint, &address, generation, STRANGER_WINDOW);
    let dialled = tokio::time::timeout(STEP_BOUND, dial).await;
    let Some((live, waiting)) = inner
        .packets
        .dialled(node, dialled.ok().and_then(Result::ok))
    else {
        return;
    };
    let entered = Entered::new(&inner.packets, node, &live.connection, true);
    inner.packets.make_room();
    for bytes in waiting {
        entered.line.send(bytes);
    }
    tokio::select! {
        () = entered.listen() => {}
        () = entered.until_idle() => {}
    }
}

impl Link {
    /// Hears packets from now on, in place of whoever did before. Who is said to be a member keeps its place among the
    /// connections without asking anything, and gets nothing else by that.
    pub fn hear(
        &self,
        is_member: Arc<dyn Fn(&NodeId) -> bool + Send + Sync>,
    ) -> mpsc::Receiver<Heard> {
        let (sender, receiver) = mpsc::channel(HEARD_MAX);
        for node in lock(&self.0.packets.lines).keys() {
            let _ = sender.try_send(Heard::Connected(*node));
        }
        *lock(&self.0.packets.hearing) = Some(Hearing { sender, is_member });
        receiver
    }

    /// Hears packets no longer: what comes is thrown away.
    pub fn deafen(&self) {
        *lock(&self.0.packets.hearing) = None;
    }

    /// Where a node states that it may be dialled. What of it is used is decided when it is.
    pub fn know(&self, node: NodeId, mut whereabouts: Whereabouts) {
        whereabouts.addresses.truncate(CARD_ADDRESSES_MAX);
        whereabouts.relays.truncate(1);
        let mut stated = lock(&self.0.packets.stated);
        if whereabouts.is_empty() {
            stated.remove(&node);
        } else {
            // How often it is dialled does not begin anew: whoever says something else each second has nobody knock there as often.
            stated.insert(node, whereabouts);
        }
    }

    /// Where a node states that it may be dialled, as far as that is used: those of no single host, and loopback from
    /// elsewhere, are left out.
    pub fn stated(&self, node: &NodeId) -> Whereabouts {
        stated(&self.0, node)
    }

    /// Whether there is a connection with a node, whoever made it.
    pub fn is_connected(&self, node: &NodeId) -> bool {
        self.0.packets.line(node).is_some()
    }

    /// How long a word to a node and its answer take, as measured by the connection there is.
    pub fn round_trip(&self, node: &NodeId) -> Option<Duration> {
        let line = self.0.packets.line(node)?;
        let paths = line.connection.paths();
        paths
            .iter()
            .find(iroh::endpoint::Path::is_selected)
            .map(|path| path.rtt())
    }

    /// Says something to a node, in a datagram, which may be lost. Where there is no connection, the node is dialled, if it
    /// has stated where it is and the bounds allow; nobody hears how that went.
    pub fn say(&self, node: NodeId, bytes: Vec<u8>) {
        let (inner, packets) = (&self.0, &self.0.packets);
        let bytes = Bytes::from(bytes);
        if let Some(line) = packets.line(&node) {
            line.send(bytes);
            return;
        }
        if let Some(slot) = lock(&inner.slots).get(&node) {
            // It is dialled sooner; what is lost until then is said again by whoever speaks so.
            slot.wanted.notify_one();
            return;
        }
        let mut whereabouts = stated(inner, &node);
        whereabouts.addresses.extend(inner.near.addresses(&node));
        let Ok(key) = PublicKey::from_bytes(node.as_bytes()) else {
            return;
        };
        let mut calls = lock(&packets.calls);
        let failures = match calls.get_mut(&node) {
            Some(Call::Dialling { waiting, .. }) => {
                if waiting.len() < WAITING_MAX {
                    waiting.push(bytes);
                }
                return;
            }
            Some(Call::Failed { until, .. }) if *until > Instant::now() => return,
            Some(Call::Failed { failures, .. }) => *failures,
            None => 0,
        };
        let met = lock(&packets.met).contains(&node);
        let is_own = |relay: &Relay| inner.relays.is_own(relay);
        let whereabouts = now_dialled(&calls, &lock(&packets.hosts), met, whereabouts, is_own);
        if whereabouts.is_empty() {
            return;
        }
        let foreign = (whereabouts.relays.iter()).filter(|relay| !is_own(relay));
        let hosts = foreign.map(|relay| &relay.address);
        let dialling = Call::Dialling {
            waiting: vec![bytes],
            failures,
            to: (whereabouts.addresses.iter())
                .chain(hosts)
                .map(|address| address.ip().to_canonical())
                .collect(),
            met,
        };
        calls.insert(node, dialling);
        drop(calls);
        let address = endpoint_addr(key, &whereabouts);
        let task = call(Arc::clone(inner), node, address);
        inner
            .tasks
            .spawn(inner.stop.clone().run_until_cancelled_owned(task));
    }

    /// Sends a node something long over the connection that there is; nothing where there is none or too much is being sent.
    pub fn say_long(&self, node: &NodeId, bytes: Vec<u8>) {
        let inner = &self.0;
        let Some(line) = inner.packets.line(node) else {
            return;
        };
        let Ok(permit) = Arc::clone(&inner.packets.pages).try_acquire_owned() else {
            return;
        };
        let task = async move {
            let send = async {
                line.touch();
                let mut stream = line.connection.open_uni().await.ok()?;
                stream.write_all(&bytes).await.ok()?;
                stream.finish().ok()
            };
            if !matches!(tokio::time::timeout(STEP_BOUND, send).await, Ok(Some(()))) {
                tracing::debug!("a page is lost");
            }
            drop(permit);
        };
        inner
            .tasks
            .spawn(inner.stop.clone().run_until_cancelled_owned(task));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn dialling(to: &str, met: bool) -> Call {
        Call::Dialling {
            waiting: Vec::new(),
            failures: 0,
            to: vec![to.parse().unwrap()],
            met,
        }
    }

    #[test]
    fn many_keys_that_name_one_host_have_it_dialled_no_oftener_than_few() {
        let at = |text: &str| Whereabouts::from(vec![text.parse::<SocketAddr>().unwrap()]);
        let (mut calls, mut hosts) = (HashMap::new(), Hosts::default());
        let relay = |text: &str| Relay {
            key: NodeId::from_bytes([9; 32]),
            address: text.parse().unwrap(),
        };
        let own = relay("192.0.2.1:9");
        let is_own = |relay: &Relay| *relay == own;
        let now_dialled = |calls: &HashMap<NodeId, Call>, hosts: &Hosts, met, whereabouts| {
            now_dialled(calls, hosts, met, whereabouts, is_own)
        };
        let through = |relay| Whereabouts {
            addresses: Vec::new(),
            relays: vec![relay],
        };
        for number in 0..2 {
            let to = now_dialled(&calls, &hosts, false, at("192.0.2.1:4"));
            assert_eq!(to.addresses.len(), 1);
            calls.insert(
                NodeId::from_bytes([number; 32]),
                dialling("192.0.2.1", false),
            );
        }
        // In IPv6 clothes it is the same host; others are not kept waiting.
        for busy in ["192.0.2.1:5", "[::ffff:192.0.2.1]:6"] {
            assert!(now_dialled(&calls, &hosts, true, at(busy)).is_empty());
        }
        // Somebody's relay is a host, too; the owner's own is spared nothing.
        let some = through(relay("192.0.2.1:8"));
        assert!(now_dialled(&calls, &hosts, true, some).is_empty());
        assert!(!now_dialled(&calls, &hosts, false, through(own)).is_empty());
        assert_eq!(
            now_dialled(&calls, &hosts, false, at("192.0.2.2:4"))
                .addresses
                .len(),
            1
        );
        calls.clear();
        hosts.enter("192.0.2.1".parse().unwrap(), false);
        assert!(now_dialled(&calls, &hosts, false, at("192.0.2.1:7")).is_empty());
        assert_eq!(
            now_dialled(&calls, &hosts, true, at("192.0.2.1:7"))
                .addresses
                .len(),
            1
        );
        hosts.enter("192.0.2.1".parse().unwrap(), true);
        assert_eq!(
            now_dialled(&calls, &hosts, false, at("192.0.2.1:7"))
                .addresses
                .len(),
            1
        );
    }

    #[test]
    fn half_of_the_dials_are_for_those_that_were_there_once() {
        let to = Whereabouts::from(vec!["192.0.2.200:4".parse().unwrap()]);
        let now_dialled = |calls: &HashMap<NodeId, Call>, hosts: &Hosts, met, whereabouts| {
            now_dialled(calls, hosts, met, whereabouts, |_| false)
        };
        let (mut calls, hosts) = (HashMap::new(), Hosts::default());
        for number in 0..u8::try_from(DIALS_MAX).unwrap() {
            let met = usize::from(number) >= DIALS_MAX / 2;
            assert!(!now_dialled(&calls, &hosts, met, to.clone()).is_empty());
            let host = format!("192.0.2.{number}");
            calls.insert(NodeId::from_bytes([number; 32]), dialling(&host, met));
            let enough = usize::from(number) + 1 >= DIALS_MAX / 2;
            assert_eq!(
                now_dialled(&calls, &hosts, false, to.clone()).is_empty(),
                enough
            );
        }
        assert!(now_dialled(&calls, &hosts, true, to).is_empty());
    }
}
