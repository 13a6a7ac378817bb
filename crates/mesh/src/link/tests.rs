//! Links of real endpoints on loopback.

use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BOUND: Duration = Duration::from_secs(60);

struct End {
    _dir: tempfile::TempDir,
    link: Link,
    accepted: mpsc::Receiver<Accepted>,
}

async fn end_at(dir: tempfile::TempDir, listen: SocketAddr) -> End {
    let options = LinkOptions {
        identity: Identity::open(dir.path()).unwrap(),
        listen,
        knows: Arc::new(|_| true),
    };
    let (link, accepted) = Link::open(options).await.unwrap();
    End {
        _dir: dir,
        link,
        accepted,
    }
}

async fn end() -> End {
    end_at(
        tempfile::tempdir().unwrap(),
        SocketAddr::from(([127, 0, 0, 1], 0)),
    )
    .await
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, future).await.unwrap()
}

#[tokio::test]
async fn a_stream_reaches_the_node_that_was_dialled_with_its_token() {
    let (a, mut b) = (end().await, end().await);
    a.link.keep(b.link.id(), b.link.addresses()).unwrap();
    assert_eq!(within(a.link.reach(&b.link.id())).await.unwrap(), 1);
    let token = Token::from_bytes(vec![1, 2, 3]).unwrap();
    let mut stream = a.link.stream(&b.link.id(), Some(&token)).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut accepted = within(b.accepted.recv()).await.unwrap();
    assert_eq!(accepted.peer, a.link.id());
    assert_eq!(accepted.open.target(), b.link.id());
    assert_eq!(accepted.open.token.as_deref(), Some(&[1, 2, 3][..]));
    let mut text = String::new();
    within(accepted.stream.read_to_string(&mut text))
        .await
        .unwrap();
    assert_eq!(text, "hello");
    accepted.stream.write_all(b"back").await.unwrap();
    drop(accepted);
    let mut text = String::new();
    within(stream.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "back");
}

#[tokio::test]
async fn another_key_at_the_address_is_not_spoken_to() {
    let (a, b, c) = (end().await, end().await, end().await);
    a.link.keep(c.link.id(), b.link.addresses()).unwrap();
    let error = within(a.link.stream(&c.link.id(), None)).await.unwrap_err();
    assert!(matches!(error, LinkError::Away { .. }), "{error}");
    assert!(matches!(
        a.link.state(&c.link.id()),
        Some(PeerState::Away { .. } | PeerState::Connecting)
    ));
}

#[tokio::test]
async fn a_node_that_comes_back_is_connected_again_under_its_next_generation() {
    let a = end().await;
    let b = end().await;
    let (id, addresses) = (b.link.id(), b.link.addresses());
    a.link.keep(id, addresses.clone()).unwrap();
    assert_eq!(within(a.link.reach(&id)).await.unwrap(), 1);
    let End {
        _dir,
        link,
        accepted,
    } = b;
    link.close().await;
    // The socket goes with the last who has the link.
    drop((link, accepted));
    let b = end_at(_dir, addresses[0]).await;
    let again = async {
        loop {
            match a.link.reach(&id).await {
                Ok(2) => return,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    within(again).await;
    drop(b);
}

#[tokio::test]
async fn a_node_that_was_not_joined_is_not_dialled() {
    let (a, b) = (end().await, end().await);
    assert!(matches!(
        a.link.stream(&b.link.id(), None).await,
        Err(LinkError::Unknown(_))
    ));
    a.link.keep(b.link.id(), b.link.addresses()).unwrap();
    a.link.forget(&b.link.id());
    assert!(matches!(
        a.link.stream(&b.link.id(), None).await,
        Err(LinkError::Unknown(_))
    ));
}

/// An endpoint without our protocol's manners.
async fn rude(to: &End) -> (Endpoint, Connection) {
    let endpoint = Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_address_lookup()
        .bind()
        .await
        .unwrap();
    let key = PublicKey::from_bytes(to.link.id().as_bytes()).unwrap();
    let address =
        EndpointAddr::from_parts(key, to.link.addresses().into_iter().map(TransportAddr::Ip));
    let connection = within(endpoint.connect(address, ALPN)).await.unwrap();
    (endpoint, connection)
}

#[tokio::test]
async fn who_speaks_garbage_is_shown_the_door_and_others_are_served() {
    let mut b = end().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[4, 0, 0, 0, 1],
    ] {
        let (_endpoint, connection) = rude(&b).await;
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(garbage).await.unwrap();
        send.finish().unwrap();
        within(connection.closed()).await;
    }
    // Well greeted, and garbage after it.
    let (_endpoint, connection) = rude(&b).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let hello = Hello {
        version: 1,
        generation: 1,
    };
    send.write_all(&frame::encode(&hello).unwrap())
        .await
        .unwrap();
    frame::decode_hello(&within(frame::read(&mut receive)).await.unwrap()).unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(&[1, 0, 0, 0, 200]).await.unwrap();
    within(connection.closed()).await;
    let a = end().await;
    a.link.keep(b.link.id(), b.link.addresses()).unwrap();
    let _stream = within(a.link.stream(&b.link.id(), None)).await.unwrap();
    assert_eq!(within(b.accepted.recv()).await.unwrap().peer, a.link.id());
}

#[tokio::test]
async fn one_node_gets_a_few_connections_only() {
    let b = end().await;
    let (endpoint, first) = rude(&b).await;
    let key = PublicKey::from_bytes(b.link.id().as_bytes()).unwrap();
    let address =
        EndpointAddr::from_parts(key, b.link.addresses().into_iter().map(TransportAddr::Ip));
    let hello = frame::encode(&Hello {
        version: 1,
        generation: 1,
    })
    .unwrap();
    let greet = async |connection: &Connection| {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&hello).await.unwrap();
        frame::read(&mut receive).await.is_ok()
    };
    assert!(within(greet(&first)).await);
    let mut kept = vec![first];
    for _ in 1..OF_ONE_MAX {
        let connection = within(endpoint.connect(address.clone(), ALPN))
            .await
            .unwrap();
        assert!(within(greet(&connection)).await);
        kept.push(connection);
    }
    let over = within(endpoint.connect(address.clone(), ALPN))
        .await
        .unwrap();
    within(over.closed()).await;
    assert!(
        kept.iter()
            .all(|connection| connection.close_reason().is_none())
    );
}

#[test]
fn pauses_grow_to_a_bound_and_are_not_all_alike() {
    assert_eq!(pause(1, 0), PAUSE_MIN);
    assert_eq!(pause(3, 0), PAUSE_MIN * 4);
    for failures in [20, 100, u32::MAX] {
        assert_eq!(pause(failures, 0), PAUSE_MAX);
        assert!(pause(failures, 255) >= PAUSE_MAX * 3 / 4 && pause(failures, 255) < PAUSE_MAX);
    }
}
