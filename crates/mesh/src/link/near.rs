//! The local network: nodes there say where they are, to whoever listens there, where their owner wants that.
//!
//! ```text
//! a question ("who is there?")  ─┐
//! announcements, signed          ├─► multicast, one hop ─► where a kept or sought node may be dialled
//! ```
//! An announcement names a key and the address of the interface over which it goes, and nothing else. It is signed by that
//! key, so that nobody says where somebody else is, and carries the time, so that an old one does not undo a new one. Hearing of
//! a node has no effect but that it is dialled there, if the user joined it or is about to. Off unless it is asked for.

use super::{Inner, Link, lock};
use crate::card::is_dialled;
use crate::facts::{seal, split, verify};
use crate::identity::Identity;
use iroh::Watcher;
use rustix::net::sockopt::{set_ip_multicast_if, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use vistara_model::NodeId;

/// Where it is spoken: a group of addresses for a site's own use (RFC 2365).
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 118, 105);
const PORT: u16 = 8618;
/// What each packet begins with: whose it is, and its version.
const HEAD: &[u8; 8] = b"vistara\x01";
const QUESTION: u8 = 0;
const HERE: u8 = 1;
const CONTEXT: &[u8] = b"vistara 2026-12 a node in its local network\0";
/// Longest packet: a signature, a key, a time and four addresses.
const PACKET_BYTES_MAX: usize = 256;
/// Addresses in one announcement that are taken.
const ADDRESSES_MAX: usize = 4;
/// How often a node says where it is, and for how long that is believed: three of them may be lost.
const SAY_EVERY: Duration = Duration::from_secs(20);
const BELIEVED: Duration = Duration::from_secs(75);
/// Shortest time between two announcements, and between two questions: who asks has the whole network answer.
const SAY_PAUSE: Duration = Duration::from_secs(1);
const ASK_PAUSE: Duration = Duration::from_secs(5);
/// An answer waits up to so long, by chance, so that not all come at once.
const ANSWER_SPREAD_MS: u64 = 250;
/// Nodes that were heard and that nobody asked for. More are not remembered; those that are kept or sought always are.
const HEARD_MAX: usize = 256;
/// Checks of signatures, each second and at once: a network of some hundred that answer a question.
const CHECKS_PER_S: f64 = 32.0;
const CHECKS_BURST: f64 = 256.0;
/// Of those, what one host may cause.
const HOST_PER_S: f64 = 4.0;
const HOST_BURST: f64 = 16.0;
/// Hosts that are counted; beyond them all are taken for one.
const HOSTS_MAX: usize = 512;
/// Pause after the sockets could not be had.
const AGAIN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Here {
    node: [u8; 32],
    stamp_ms: u64,
    addresses: Vec<SocketAddr>,
}

/// Where a node said that it is.
#[derive(Debug, Clone)]
struct Sighting {
    addresses: Vec<SocketAddr>,
    stamp_ms: u64,
    at: Instant,
}

/// What the link has for the local network.
pub(super) struct Near {
    heard: Mutex<HashMap<NodeId, Sighting>>,
    /// Counts what was heard, for those who wait.
    news: watch::Sender<u64>,
    sought: Mutex<Vec<NodeId>>,
    ask: Notify,
    /// Ends the task that listens, where one does.
    on: Mutex<Option<CancellationToken>>,
}

impl Default for Near {
    fn default() -> Near {
        Near {
            heard: Mutex::default(),
            news: watch::Sender::new(0),
            sought: Mutex::default(),
            ask: Notify::new(),
            on: Mutex::default(),
        }
    }
}

/// What may still be checked.
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn spend(&mut self, per_s: f64, burst: f64) -> bool {
        let since = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        self.left = (self.left + since * per_s).min(burst);
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }

    fn new(burst: f64) -> Budget {
        let at = Instant::now();
        Budget { left: burst, at }
    }
}

struct Budgets {
    all: Budget,
    hosts: HashMap<IpAddr, Budget>,
}

impl Budgets {
    fn spend(&mut self, from: IpAddr) -> bool {
        if self.hosts.len() >= HOSTS_MAX {
            let whole = Duration::from_secs_f64(HOST_BURST / HOST_PER_S);
            self.hosts.retain(|_, budget| budget.at.elapsed() < whole);
        }
        let crowd = self.hosts.len() >= HOSTS_MAX && !self.hosts.contains_key(&from);
        let from = if crowd {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        } else {
            from
        };
        let own = self.hosts.entry(from);
        let own = own.or_insert_with(|| Budget::new(HOST_BURST));
        own.spend(HOST_PER_S, HOST_BURST) && self.all.spend(CHECKS_PER_S, CHECKS_BURST)
    }
}

impl Near {
    /// Where a node was heard lately.
    pub(super) fn addresses(&self, node: &NodeId) -> Vec<SocketAddr> {
        let heard = lock(&self.heard);
        let fresh = heard.get(node);
        let fresh = fresh.filter(|sighting| sighting.at.elapsed() < BELIEVED);
        fresh
            .map(|sighting| sighting.addresses.clone())
            .unwrap_or_default()
    }

    /// Has everybody near say where it is, before long.
    pub(super) fn ask(&self) {
        if lock(&self.on).is_some() {
            self.ask.notify_one();
        }
    }

    /// The time of the last announcement of a node that was heard and still counts: a clock that was set back hides nobody for longer.
    fn stamp(&self, node: &NodeId) -> Option<u64> {
        let heard = lock(&self.heard);
        let fresh = heard.get(node);
        fresh
            .filter(|sighting| sighting.at.elapsed() < BELIEVED)
            .map(|sighting| sighting.stamp_ms)
    }

    fn enter(&self, node: NodeId, sighting: Sighting, kept: impl Fn(&NodeId) -> bool) {
        let mut heard = lock(&self.heard);
        heard.retain(|_, sighting| sighting.at.elapsed() < BELIEVED);
        if heard.len() >= HEARD_MAX && !heard.contains_key(&node) {
            if !kept(&node) {
                return;
            }
            // In place of one that nobody asked for, if there is any: there are no more kept ones than the user has joined.
            let other = heard.keys().find(|other| !kept(other)).copied();
            if let Some(other) = other {
                heard.remove(&other);
            }
        }
        heard.insert(node, sighting);
        drop(heard);
        self.news.send_modify(|count| *count += 1);
    }
}

fn announcement(identity: &Identity, stamp_ms: u64, addresses: Vec<SocketAddr>) -> Option<Vec<u8>> {
    let here = Here {
        node: *identity.id().as_bytes(),
        stamp_ms,
        addresses,
    };
    let body = postcard::to_stdvec(&here).ok()?;
    let sealed = seal(identity, CONTEXT, &body);
    Some([&HEAD[..], &[HERE], &sealed].concat())
}

fn question() -> Vec<u8> {
    [&HEAD[..], &[QUESTION]].concat()
}

/// What a packet says, before its signature was looked at.
enum Said<'a> {
    Question,
    Here(Here, &'a [u8]),
}

fn read(bytes: &[u8]) -> Option<Said<'_>> {
    if bytes.len() > PACKET_BYTES_MAX {
        return None;
    }
    match bytes.strip_prefix(HEAD)?.split_first()? {
        (&QUESTION, []) => Some(Said::Question),
        (&HERE, sealed) => {
            let (_, body) = split(sealed).ok()?;
            let (here, rest): (Here, &[u8]) = postcard::take_from_bytes(body).ok()?;
            let good = rest.is_empty() && (1..=ADDRESSES_MAX).contains(&here.addresses.len());
            good.then_some(Said::Here(here, sealed))
        }
        _ => None,
    }
}

fn bind(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // Several nodes of one host listen.
    set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    UdpSocket::from_std(std::net::UdpSocket::from(socket))
}

/// The sockets of one who takes part. What is sent to the host's own addresses does not reach the first.
struct Sockets {
    ears: UdpSocket,
    mouth: UdpSocket,
}

impl Sockets {
    fn open() -> io::Result<Sockets> {
        let ears = bind(SocketAddrV4::new(GROUP, PORT))?;
        let mouth = bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))?;
        // Not beyond the next router.
        mouth.set_multicast_ttl_v4(1)?;
        // Others on this host are near, too.
        mouth.set_multicast_loop_v4(true)?;
        Ok(Sockets { ears, mouth })
    }

    /// Listens on these interfaces, too. One on which it does is not counted twice by the kernel.
    fn join(&self, interfaces: &BTreeSet<Ipv4Addr>) {
        for interface in interfaces {
            let _ = self.ears.join_multicast_v4(GROUP, *interface);
        }
    }

    async fn send(&self, interface: Ipv4Addr, packet: &[u8]) {
        let sent = match set_ip_multicast_if(&self.mouth, &interface) {
            Ok(()) => self.mouth.send_to(packet, (GROUP, PORT)).await.map(drop),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, %interface, "nothing is said on an interface");
        }
    }
}

impl Inner {
    /// The interfaces over which this node can be reached, by their addresses.
    fn interfaces(&self) -> BTreeSet<Ipv4Addr> {
        let v4 = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        };
        let bound = self.endpoint.bound_sockets();
        if bound.iter().any(|address| address.ip().is_unspecified()) {
            let found = netwatch::ip::LocalAddresses::new();
            found.regular.into_iter().filter_map(v4).collect()
        } else {
            let bound = bound.into_iter().map(|address| address.ip());
            bound.filter_map(v4).collect()
        }
    }

    fn announcement(&self, interface: Ipv4Addr) -> Option<Vec<u8>> {
        let sockets = self.endpoint.bound_sockets();
        let port = sockets.iter().find(|address| address.is_ipv4())?.port();
        let address = SocketAddr::from((interface, port));
        announcement(&self.identity, super::now_ms(), vec![address])
    }

    fn is_kept(&self, node: &NodeId) -> bool {
        lock(&self.slots).contains_key(node) || lock(&self.near.sought).contains(node)
    }

    /// Takes an announcement, if it is newer than what is known, and its node's own word.
    fn hear(&self, here: Here, sealed: &[u8], from: IpAddr, budgets: &mut Budgets) {
        let node = NodeId::from_bytes(here.node);
        let own = node == self.identity.id();
        if own || self.near.stamp(&node) >= Some(here.stamp_ms) || !budgets.spend(from) {
            return;
        }
        let good = split(sealed).and_then(|parts| verify(&node, CONTEXT, parts));
        if good.is_err() {
            tracing::debug!(%from, "an announcement is thrown away");
            return;
        }
        let bound = self.endpoint.bound_sockets();
        let loopback = (bound.iter()).all(|address| address.ip().is_loopback());
        let mut addresses = here.addresses;
        addresses.retain(|address| is_dialled(address, loopback));
        if addresses.is_empty() {
            return;
        }
        let moved = self.near.addresses(&node) != addresses;
        let sighting = Sighting {
            addresses,
            stamp_ms: here.stamp_ms,
            at: Instant::now(),
        };
        self.near.enter(node, sighting, |node| self.is_kept(node));
        if moved && let Some(slot) = lock(&self.slots).get(&node) {
            // It is dialled there at once, if it is away.
            slot.wanted.notify_one();
        }
    }
}

/// Takes part as long as it is not stopped.
async fn take_part(inner: Arc<Inner>) {
    loop {
        match Sockets::open() {
            Ok(sockets) => {
                if let Err(error) = listen(&inner, &sockets).await {
                    tracing::warn!(%error, "the local network is not heard");
                }
            }
            Err(error) => tracing::warn!(%error, "the local network cannot be listened to"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// When to say something next.
struct Turn {
    last: Option<Instant>,
    next: Instant,
    pause: Duration,
}

impl Turn {
    fn new(pause: Duration) -> Turn {
        Turn {
            last: None,
            next: Instant::now(),
            pause,
        }
    }

    /// Not later than after this, and not too soon after the last time.
    fn within(&mut self, wait: Duration) {
        let mut at = Instant::now() + wait;
        if let Some(last) = self.last {
            at = at.max(last + self.pause);
        }
        self.next = self.next.min(at);
    }

    fn done(&mut self, wait: Duration) {
        let now = Instant::now();
        self.last = Some(now);
        self.next = now + wait;
    }
}

fn chance(most_ms: u64) -> Duration {
    let mut random = [0; 8];
    // Without chance all answer at once.
    let _ = getrandom::fill(&mut random);
    Duration::from_millis(u64::from_le_bytes(random) % most_ms)
}

async fn listen(inner: &Inner, sockets: &Sockets) -> io::Result<()> {
    let mut budgets = Budgets {
        all: Budget::new(CHECKS_BURST),
        hosts: HashMap::new(),
    };
    let mut moves = inner.endpoint.watch_addr();
    let (mut say, mut ask) = (Turn::new(SAY_PAUSE), Turn::new(ASK_PAUSE));
    let mut bytes = [0; PACKET_BYTES_MAX + 1];
    sockets.join(&inner.interfaces());
    loop {
        tokio::select! {
            received = sockets.ears.recv_from(&mut bytes) => {
                let (length, from) = received?;
                match read(&bytes[..length]) {
                    Some(Said::Question) => say.within(chance(ANSWER_SPREAD_MS)),
                    Some(Said::Here(here, sealed)) => {
                        inner.hear(here, sealed, from.ip(), &mut budgets);
                    }
                    None => {}
                }
            }
            () = inner.near.ask.notified() => ask.within(Duration::ZERO),
            Ok(_) = moves.updated() => say.within(chance(ANSWER_SPREAD_MS)),
            () = tokio::time::sleep_until(say.next.min(ask.next).into()) => {
                let interfaces = inner.interfaces();
                sockets.join(&interfaces);
                let now = Instant::now();
                if ask.next <= now {
                    for interface in &interfaces {
                        sockets.send(*interface, &question()).await;
                    }
                    // Nobody is asked without a reason.
                    ask.done(Duration::from_secs(24 * 3600));
                }
                if say.next <= now {
                    for interface in &interfaces {
                        if let Some(packet) = inner.announcement(*interface) {
                            sockets.send(*interface, &packet).await;
                        }
                    }
                    say.done(SAY_EVERY - chance(SAY_EVERY.as_millis() as u64 / 4));
                }
            }
        }
    }
}

impl Link {
    /// Tells the local network where this node is, and hears who else is there, from now on; or no longer.
    pub fn discover(&self, on: bool) {
        let mut now = lock(&self.0.near.on);
        match (now.as_ref(), on) {
            (None, true) => {
                let stop = self.0.stop.child_token();
                let task = take_part(Arc::clone(&self.0));
                let task = stop.clone().run_until_cancelled_owned(task);
                self.0.tasks.spawn(task);
                *now = Some(stop);
            }
            (Some(stop), false) => {
                stop.cancel();
                *now = None;
                lock(&self.0.near.heard).clear();
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    /// Whether it takes part in that.
    pub fn discovers(&self) -> bool {
        lock(&self.0.near.on).is_some()
    }

    /// Nodes that were heard in the local network lately, and where they are.
    pub fn near(&self) -> Vec<(NodeId, Vec<SocketAddr>)> {
        let heard = lock(&self.0.near.heard);
        let fresh = heard.iter().filter(|(_, one)| one.at.elapsed() < BELIEVED);
        let mut found: Vec<_> = fresh
            .map(|(node, one)| (*node, one.addresses.clone()))
            .collect();
        found.sort();
        found
    }

    /// Looks for a node in the local network for so long; nothing where it was not heard, or this node does not take part.
    pub async fn find_near(&self, node: &NodeId, bound: Duration) -> Vec<SocketAddr> {
        let near = &self.0.near;
        if !self.discovers() {
            return Vec::new();
        }
        lock(&near.sought).push(*node);
        let mut news = near.news.subscribe();
        near.ask();
        let found = async {
            loop {
                let addresses = near.addresses(node);
                if !addresses.is_empty() || news.changed().await.is_err() {
                    return addresses;
                }
            }
        };
        let found = tokio::time::timeout(bound, found).await.unwrap_or_default();
        let mut sought = lock(&near.sought);
        if let Some(place) = sought.iter().position(|one| one == node) {
            sought.swap_remove(place);
        }
        found
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn here(byte: u8, stamp_ms: u64) -> (NodeId, Sighting) {
        let sighting = Sighting {
            addresses: vec![SocketAddr::from(([192, 0, 2, byte], 1))],
            stamp_ms,
            at: Instant::now(),
        };
        (NodeId::from_bytes([byte; 32]), sighting)
    }

    #[test]
    fn a_packet_is_read_as_it_was_made_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        assert!(matches!(read(&question()), Some(Said::Question)));
        let address: SocketAddr = "192.0.2.1:4".parse().unwrap();
        let bytes = announcement(&identity, 7, vec![address]).unwrap();
        let Some(Said::Here(here, sealed)) = read(&bytes) else {
            panic!("it is not read");
        };
        assert_eq!((here.stamp_ms, here.addresses), (7, vec![address]));
        let parts = split(sealed).unwrap();
        assert_eq!(verify(&identity.id(), CONTEXT, parts), Ok(()));
        for end in 0..bytes.len() {
            assert!(!matches!(read(&bytes[..end]), Some(Said::Here(..))));
        }
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            if let Some(Said::Here(here, sealed)) = read(&changed) {
                let node = NodeId::from_bytes(here.node);
                let parts = split(sealed).unwrap();
                assert!(verify(&node, CONTEXT, parts).is_err(), "{place}");
            }
        }
        let most = announcement(
            &identity,
            u64::MAX,
            vec!["[2001:db8::1]:65535".parse().unwrap(); 4],
        );
        assert!(matches!(read(&most.unwrap()), Some(Said::Here(..))));
        let none = announcement(&identity, 7, Vec::new()).unwrap();
        let many = announcement(&identity, 7, vec![address; 5]).unwrap();
        assert!(read(&none).is_none() && read(&many).is_none());
        assert!(read(&[&question()[..], &[0]].concat()).is_none());
    }

    #[test]
    fn a_crowd_that_nobody_asked_for_does_not_displace_who_was_joined() {
        let near = Near::default();
        let (joined, sighting) = here(0, 1);
        let kept = |node: &NodeId| *node == joined;
        for number in 1..=HEARD_MAX as u64 + 9 {
            let mut key = [1; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            near.enter(NodeId::from_bytes(key), here(1, 1).1, kept);
        }
        assert_eq!(lock(&near.heard).len(), HEARD_MAX);
        near.enter(joined, sighting, kept);
        assert_eq!(lock(&near.heard).len(), HEARD_MAX);
        assert_eq!(near.addresses(&joined).len(), 1);
    }

    #[test]
    fn what_one_host_says_is_checked_so_often_and_no_more() {
        let mut budgets = Budgets {
            all: Budget::new(CHECKS_BURST),
            hosts: HashMap::new(),
        };
        let one = IpAddr::from([192, 0, 2, 1]);
        let taken = (0..1000).filter(|_| budgets.spend(one)).count();
        assert!((16..24).contains(&taken), "{taken}");
        assert!(budgets.spend(IpAddr::from([192, 0, 2, 2])));
        for number in 0..2000_u32 {
            budgets.spend(IpAddr::from(number.to_be_bytes()));
        }
        assert!(budgets.hosts.len() <= HOSTS_MAX + 1);
    }
}
