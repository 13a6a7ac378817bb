//! Links of real endpoints on loopback that meet through a real relay, or in the local network.

use super::*;
use crate::relay::{RelayOptions, RelayServer};
use std::collections::BTreeSet;
use std::num::NonZeroU32;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BOUND: Duration = Duration::from_secs(60);
const LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, future).await.unwrap()
}

async fn until(mut holds: impl FnMut() -> bool) {
    within(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn relay_at(
    dir: &tempfile::TempDir,
    listen: impl Into<SocketAddr>,
    allow: &[NodeId],
    clients_max: usize,
) -> RelayServer {
    RelayServer::open(options(dir, listen, allow, clients_max)).unwrap()
}

fn options(
    dir: &tempfile::TempDir,
    listen: impl Into<SocketAddr>,
    allow: &[NodeId],
    clients_max: usize,
) -> RelayOptions {
    RelayOptions {
        identity: Identity::open(dir.path()).unwrap(),
        listen: listen.into(),
        allow: allow.iter().copied().collect::<BTreeSet<_>>(),
        clients_max,
        rate_bytes_per_s: NonZeroU32::new(8 << 20).unwrap(),
    }
}

/// A relay that was closed just now, at its place again: on a busy host that is free a moment after the close was waited for.
async fn relay_again(dir: &tempfile::TempDir, listen: SocketAddr) -> RelayServer {
    within(async {
        loop {
            match RelayServer::open(options(dir, listen, &[], 16)) {
                Ok(server) => return server,
                Err(error) => println!("not yet: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

struct End {
    dir: tempfile::TempDir,
    link: Link,
    accepted: mpsc::Receiver<Accepted>,
}

async fn end(relays: &[Relay]) -> End {
    end_in(tempfile::tempdir().unwrap(), relays).await
}

async fn end_in(dir: tempfile::TempDir, relays: &[Relay]) -> End {
    let (link, accepted) = Link::open(LinkOptions {
        identity: Identity::open(dir.path()).unwrap(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        knows: Arc::new(|_| true),
        relays: relays.to_vec(),
    })
    .await
    .unwrap();
    End {
        dir,
        link,
        accepted,
    }
}

fn through(relay: Relay) -> Whereabouts {
    Whereabouts {
        addresses: Vec::new(),
        relays: vec![relay],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_that_know_only_a_relay_meet_through_it_and_again_after_it_was_away() {
    let dir = tempfile::tempdir().unwrap();
    // Where no other test binds: its port is to be free when it comes back.
    let listen = [127, 0, 0, 2];
    let server = relay_at(&dir, (listen, 0), &[], 16);
    let [relay] = server.relays()[..] else {
        panic!("it is at one address");
    };
    let mut b = end(&[relay]).await;
    until(|| b.link.home() == Some(relay)).await;
    assert_eq!(server.counts().clients, 1);
    let a = end(&[]).await;
    assert_eq!(a.link.home(), None);
    a.link.keep(b.link.id(), through(relay)).unwrap();
    within(a.link.reach(&b.link.id())).await.unwrap();
    let mut stream = within(a.link.stream(&b.link.id(), None)).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut accepted = within(b.accepted.recv()).await.unwrap();
    let mut bytes = [0; 5];
    within(accepted.stream.read_exact(&mut bytes))
        .await
        .unwrap();
    assert_eq!(&bytes, b"hello");
    assert!(server.counts().forwarded_bytes > 0);
    // The ticket's relay is this node's too, since its owner named none: others may join it through it.
    until(|| a.link.home() == Some(relay)).await;
    assert_eq!(a.link.relays(), [relay]);
    assert!(!a.link.keeps_unwanted_relay());
    // On one host, packets find the straight way.
    until(|| a.link.way(&b.link.id()) == Some(Way::Direct)).await;

    // Nobody needs the relay now; it is away, and back under its key.
    server.close().await;
    drop(server);
    until(|| b.link.home().is_none()).await;
    within(a.link.reach(&b.link.id())).await.unwrap();
    let server = relay_again(&dir, relay.address).await;
    until(|| b.link.home() == Some(relay)).await;
    let c = end(&[]).await;
    c.link.keep(b.link.id(), through(relay)).unwrap();
    within(c.link.reach(&b.link.id())).await.unwrap();
    a.link.forget(&b.link.id());
    assert!(a.link.keeps_unwanted_relay());
    for end in [&a, &b, &c] {
        end.link.close().await;
    }
    server.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_serves_only_whom_its_owner_lets_in_and_no_more_than_so_many() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let allowed = Identity::open(a.path()).unwrap().id();
    let server = relay_at(&dir, LISTEN, &[allowed], 16);
    let relay = server.relays()[0];
    let (a, b) = (end_in(a, &[relay]).await, end_in(b, &[relay]).await);
    until(|| a.link.home() == Some(relay)).await;
    until(|| server.counts().refused > 0).await;
    assert_eq!((b.link.home(), server.counts().clients), (None, 1));

    let full = tempfile::tempdir().unwrap();
    let small = relay_at(&full, LISTEN, &[], 1);
    let relay = small.relays()[0];
    let c = end(&[relay]).await;
    until(|| c.link.home() == Some(relay)).await;
    let d = end(&[relay]).await;
    until(|| small.counts().refused > 0).await;
    assert_eq!((d.link.home(), small.counts().clients), (None, 1));
    // A place that is given back is another's.
    c.link.close().await;
    until(|| d.link.home() == Some(relay)).await;
    for end in [&a, &b, &d] {
        end.link.close().await;
    }
    server.close().await;
    small.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_another_key_than_was_named_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let server = relay_at(&dir, LISTEN, &[], 16);
    let good = server.relays()[0];
    let other = tempfile::tempdir().unwrap();
    let bad = Relay {
        key: Identity::open(other.path()).unwrap().id(),
        ..good
    };
    let b = end(&[good]).await;
    until(|| b.link.home() == Some(good)).await;
    let a = end(&[bad]).await;
    a.link.keep(b.link.id(), through(bad)).unwrap();
    let refused = within(a.link.reach(&b.link.id())).await;
    assert!(
        matches!(refused, Err(LinkError::Away { .. })),
        "{refused:?}"
    );
    assert_eq!((a.link.home(), server.counts().clients), (None, 1));
    for end in [&a, &b] {
        end.link.close().await;
    }
    server.close().await;
}

#[tokio::test]
async fn who_proves_no_key_to_a_relay_is_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let server = relay_at(&dir, LISTEN, &[], 16);
    let address = server.relays()[0].address;
    let mut silent = within(tokio::net::TcpStream::connect(address))
        .await
        .unwrap();
    let mut garbage = within(tokio::net::TcpStream::connect(address))
        .await
        .unwrap();
    garbage.write_all(&[b'x'; 512]).await.unwrap();
    let mut bytes = Vec::new();
    // An alert of TLS, and the end.
    let _ = within(garbage.read_to_end(&mut bytes)).await;
    assert!(bytes.len() < 64);
    let begin = std::time::Instant::now();
    let _ = within(silent.read_to_end(&mut Vec::new())).await;
    assert!(begin.elapsed() > Duration::from_secs(5));
    assert_eq!(server.counts().clients, 0);
    // A crowd from one host gets so many, and no more.
    let mut crowd = Vec::new();
    for _ in 0..40 {
        crowd.push(
            within(tokio::net::TcpStream::connect(address))
                .await
                .unwrap(),
        );
    }
    until(|| server.counts().refused >= 20).await;
    drop(crowd);
    server.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_found_by_its_id_in_the_local_network_and_again_where_it_has_moved() {
    let (a, b) = (end(&[]).await, end(&[]).await);
    let id = b.link.id();
    assert!(
        a.link
            .find_near(&id, Duration::from_millis(1))
            .await
            .is_empty()
    );
    a.link.discover(true);
    // It is not told of there where its owner has not said so.
    assert!(
        a.link
            .find_near(&id, Duration::from_millis(500))
            .await
            .is_empty()
    );
    b.link.discover(true);
    let found = a.link.find_near(&id, BOUND).await;
    assert_eq!(found, b.link.addresses());
    a.link.keep(id, found).unwrap();
    within(a.link.reach(&id)).await.unwrap();
    b.link.close().await;
    // Its port is another now.
    let b = end_in(b.dir, &[]).await;
    b.link.discover(true);
    until(|| {
        a.link
            .near()
            .iter()
            .any(|(node, at)| *node == id && *at == b.link.addresses())
    })
    .await;
    within(async {
        while a.link.reach(&id).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    a.link.discover(false);
    assert!(a.link.near().is_empty() && !a.link.discovers());
    a.link.close().await;
    b.link.close().await;
}
