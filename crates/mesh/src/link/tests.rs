//! Links of real endpoints on loopback.

use super::*;
use iroh::TransportAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BOUND: Duration = Duration::from_secs(60);

struct End {
    _dir: tempfile::TempDir,
    link: Link,
    accepted: mpsc::Receiver<Accepted>,
}

async fn end_at(dir: tempfile::TempDir, listen: SocketAddr) -> End {
    end_of(dir, listen, Arc::new(|_| true), STRANGER_IDLE).await
}

/// One to which others are strangers unless they are known.
async fn end_among_strangers(
    knows: impl Fn(&NodeId) -> bool + Send + Sync + 'static,
    stranger_idle: Duration,
) -> End {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let dir = tempfile::tempdir().unwrap();
    end_of(dir, listen, Arc::new(knows), stranger_idle).await
}

async fn end_of(
    dir: tempfile::TempDir,
    listen: SocketAddr,
    knows: Arc<dyn Fn(&NodeId) -> bool + Send + Sync>,
    stranger_idle: Duration,
) -> End {
    let options = LinkOptions {
        identity: Identity::open(dir.path()).unwrap(),
        listen,
        knows,
        relays: Vec::new(),
    };
    let (link, accepted) = Link::open_for(options, stranger_idle).await.unwrap();
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

async fn greet(connection: &Connection) -> bool {
    let hello = Hello {
        version: 1,
        generation: 1,
    };
    let greet = async {
        let (mut send, mut receive) = connection.open_bi().await.ok()?;
        send.write_all(&frame::encode(&hello).ok()?).await.ok()?;
        frame::read(&mut receive).await.ok()
    };
    within(greet).await.is_some()
}

/// Opens a stream with a first frame, as somebody without a token does.
async fn ask(connection: &Connection, to: &End) -> SendStream {
    let open = Open {
        target: *to.link.id().as_bytes(),
        generation: 1,
        nonce: [0; 16],
        deadline_ms: now_ms(),
        token: None,
    };
    let (mut send, receive) = within(connection.open_bi()).await.unwrap();
    send.write_all(&frame::encode(&open).unwrap())
        .await
        .unwrap();
    // Its other half lives as long as the connection.
    std::mem::forget(receive);
    send
}

/// How much goes into a stream that nobody reads, until it does not go on.
async fn written(send: &mut SendStream, most: usize) -> usize {
    let mut total = 0;
    while total < most {
        let write = send.write(&[0; 4096]);
        match tokio::time::timeout(Duration::from_millis(500), write).await {
            Ok(count) => total += count.unwrap(),
            Err(_) => break,
        }
    }
    total
}

#[tokio::test]
async fn a_stranger_gets_one_connection_and_little_of_it_until_somebody_vouches_for_it() {
    let mut b = end_among_strangers(|_| false, STRANGER_IDLE).await;
    let (endpoint, connection) = rude(&b).await;
    assert!(greet(&connection).await);
    let key = PublicKey::from_bytes(b.link.id().as_bytes()).unwrap();
    let address =
        EndpointAddr::from_parts(key, b.link.addresses().into_iter().map(TransportAddr::Ip));
    let second = within(endpoint.connect(address.clone(), ALPN))
        .await
        .unwrap();
    within(second.closed()).await;
    let mut streams = Vec::new();
    let mut accepted = Vec::new();
    for _ in 0..STRANGER_STREAMS_MAX {
        streams.push(ask(&connection, &b).await);
        accepted.push(within(b.accepted.recv()).await.unwrap());
    }
    let over = tokio::time::timeout(Duration::from_millis(500), connection.open_bi()).await;
    assert!(over.is_err(), "a stranger has one stream too many");
    let most = STRANGER_WINDOW as usize;
    let mut unread = 0;
    for stream in &mut streams {
        unread += written(stream, 2 * most).await;
    }
    assert!(unread > 0 && unread <= most, "{unread} unread");

    accepted[0].vouch();
    streams.push(ask(&connection, &b).await);
    assert_eq!(written(&mut streams[0], 2 * most).await, 2 * most);
    let third = within(endpoint.connect(address, ALPN)).await.unwrap();
    assert!(greet(&third).await);
}

#[tokio::test]
async fn a_stranger_to_whom_a_grant_is_given_is_none_from_its_next_stream_on() {
    let granted = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let knows = Arc::clone(&granted);
    let load = move |_: &NodeId| knows.load(std::sync::atomic::Ordering::Acquire);
    let mut b = end_among_strangers(load, STRANGER_IDLE).await;
    let (_endpoint, connection) = rude(&b).await;
    assert!(greet(&connection).await);
    granted.store(true, std::sync::atomic::Ordering::Release);
    let mut streams = Vec::new();
    for _ in 0..2 * STRANGER_STREAMS_MAX {
        streams.push((
            ask(&connection, &b).await,
            within(b.accepted.recv()).await.unwrap(),
        ));
    }
    let most = 2 * STRANGER_WINDOW as usize;
    assert_eq!(written(&mut streams[0].0, most).await, most);
}

#[tokio::test]
async fn a_stranger_that_asks_nothing_is_sent_away() {
    let mut b = end_among_strangers(|_| false, Duration::from_millis(200)).await;
    let (_endpoint, idle) = rude(&b).await;
    assert!(greet(&idle).await);
    within(idle.closed()).await;
    let (_endpoint, asking) = rude(&b).await;
    assert!(greet(&asking).await);
    let stream = ask(&asking, &b).await;
    let accepted = within(b.accepted.recv()).await.unwrap();
    let stays = tokio::time::timeout(Duration::from_secs(1), asking.closed()).await;
    assert!(stays.is_err(), "one whose request is being served stays");
    drop((stream, accepted));
    within(asking.closed()).await;
}

#[tokio::test]
async fn strangers_are_so_many_at_most_and_keep_nobody_out_who_is_known() {
    let a = end().await;
    let known = a.link.id();
    // None of them is to go for being idle while a busy machine makes the others.
    let mut b = end_among_strangers(move |node| *node == known, 10 * BOUND).await;
    let mut kept = Vec::new();
    for _ in 0..STRANGERS_MAX {
        let (endpoint, connection) = rude(&b).await;
        assert!(greet(&connection).await);
        kept.push((endpoint, connection));
    }
    let (_endpoint, over) = rude(&b).await;
    within(over.closed()).await;
    a.link.keep(b.link.id(), b.link.addresses()).unwrap();
    let _stream = within(a.link.stream(&b.link.id(), None)).await.unwrap();
    assert_eq!(within(b.accepted.recv()).await.unwrap().peer, known);
    let closed = |(_, connection): &(Endpoint, Connection)| connection.close_reason().is_some();
    assert!(!kept.iter().any(closed));
    let (endpoint, first) = kept.remove(0);
    first.close(VarInt::from_u32(0), b"");
    endpoint.close().await;
    // Its place is free again once that was heard of.
    let again = async {
        loop {
            let (endpoint, connection) = rude(&b).await;
            if greet(&connection).await {
                return (endpoint, connection);
            }
        }
    };
    within(again).await;
}

/// The connection id to which a first packet is sent: the attempt that it belongs to.
fn attempt(packet: &[u8]) -> Vec<u8> {
    let length = usize::from(packet[5]);
    packet[6..6 + length].to_vec()
}

#[tokio::test]
async fn connections_that_do_not_get_on_are_few_and_others_are_asked_for_their_address() {
    // What clients send first is caught, and sent on from addresses at which nobody answers.
    let caught = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let b = end().await;
    let to = b.link.addresses()[0];
    let key = PublicKey::from_bytes(b.link.id().as_bytes()).unwrap();
    let address = EndpointAddr::from_parts(
        key,
        [TransportAddr::Ip(caught.local_addr().unwrap())].into_iter(),
    );
    let client = Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_address_lookup()
        .bind()
        .await
        .unwrap();
    let bound = HANDSHAKES_MAX / 4;
    let dials: Vec<_> = (0..2 * bound)
        .map(|_| {
            let (client, address) = (client.clone(), address.clone());
            tokio::spawn(async move { client.connect(address, ALPN).await.is_ok() })
        })
        .collect();
    let mut attempts = HashMap::new();
    let (mut retried, mut packet) = (0, [0; 2048]);
    while attempts.len() < 2 * bound {
        let (length, _) = within(caught.recv_from(&mut packet)).await.unwrap();
        // A long header with four bytes of version, and of it the first packets only.
        if packet[0] & 0xf0 != 0xc0 {
            continue;
        }
        let of = attempt(&packet[..length]);
        if attempts.contains_key(&of) {
            continue;
        }
        let forged = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        forged.send_to(&packet[..length], to).await.unwrap();
        // Whatever comes back, it was looked at. A retry has a type of its own.
        let mut answer = [0; 2048];
        within(forged.recv(&mut answer)).await.unwrap();
        retried += usize::from(answer[0] & 0xf0 == 0xf0);
        let under_way = HANDSHAKES_MAX - b.link.0.handshakes.available_permits();
        assert!(under_way <= bound, "{under_way} under way");
        attempts.insert(of, forged);
    }
    // Not a certain number: the first have their time, and it may be over on a busy host.
    assert!(retried > 0);
    // Somebody real is asked for its address, too, and gets in.
    let (_endpoint, connection) = rude(&b).await;
    assert!(greet(&connection).await);
    for dial in dials {
        dial.abort();
    }
    // Those that came to nothing have given back what they had.
    let all = async {
        while b.link.0.handshakes.available_permits() < HANDSHAKES_MAX {
            tokio::task::yield_now().await;
        }
    };
    within(all).await;
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

/// What the next packet says, and from whom.
async fn next_packet(heard: &mut mpsc::Receiver<Heard>) -> (NodeId, Vec<u8>) {
    loop {
        if let Heard::Packet(from, bytes) = within(heard.recv()).await.unwrap() {
            return (from, bytes.to_vec());
        }
    }
}

#[tokio::test]
async fn packets_go_both_ways_over_one_connection_that_is_dialled_when_there_is_none() {
    let (a, b) = (end().await, end().await);
    let mut to_b = b.link.hear(Arc::new(|_| true));
    let mut to_a = a.link.hear(Arc::new(|_| true));
    // Nobody has said where it is: nothing happens.
    a.link.say(b.link.id(), b"lost".to_vec());
    assert!(!a.link.is_connected(&b.link.id()));
    a.link.know(b.link.id(), b.link.addresses().into());
    a.link.say(b.link.id(), b"one".to_vec());
    a.link.say(b.link.id(), b"two".to_vec());
    assert_eq!(
        within(to_b.recv()).await,
        Some(Heard::Connected(a.link.id()))
    );
    for word in [&b"one"[..], b"two"] {
        assert_eq!(next_packet(&mut to_b).await, (a.link.id(), word.to_vec()));
    }
    // The other has no address of this one, and needs none. A page is longer than any datagram.
    b.link.say(a.link.id(), b"three".to_vec());
    assert_eq!(next_packet(&mut to_a).await.1, b"three");
    b.link.say_long(&a.link.id(), vec![7; PAGE_BYTES_MAX]);
    assert_eq!(next_packet(&mut to_a).await.1, vec![7; PAGE_BYTES_MAX]);
    assert!(a.link.round_trip(&b.link.id()).is_some());
    // More than a page is not taken.
    b.link.say_long(&a.link.id(), vec![7; PAGE_BYTES_MAX + 1]);
    b.link.say(a.link.id(), b"four".to_vec());
    assert_eq!(next_packet(&mut to_a).await.1, b"four");
}

#[tokio::test]
async fn who_is_not_heard_says_nothing_and_who_says_too_much_is_heard_in_part() {
    let (a, b) = (end().await, end().await);
    a.link.know(b.link.id(), b.link.addresses().into());
    a.link.say(b.link.id(), b"nobody hears".to_vec());
    while !a.link.is_connected(&b.link.id()) {
        tokio::task::yield_now().await;
    }
    let mut to_b = b.link.hear(Arc::new(|_| true));
    for number in 0..2000_u32 {
        a.link.say(b.link.id(), number.to_le_bytes().to_vec());
        if number % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let mut count = 0;
    while let Ok(Some(heard)) = tokio::time::timeout(Duration::from_millis(300), to_b.recv()).await
    {
        count += u32::from(matches!(heard, Heard::Packet(..)));
    }
    assert!((1..1000).contains(&count), "{count} of 2000 were heard");
}

#[tokio::test]
async fn a_member_keeps_its_place_without_asking_anything_and_a_stranger_does_not() {
    for member in [true, false] {
        let b = end_among_strangers(|_| false, Duration::from_millis(100)).await;
        let mut to_b = b.link.hear(Arc::new(move |_| member));
        let a = end().await;
        a.link.know(b.link.id(), b.link.addresses().into());
        a.link.say(b.link.id(), b"here".to_vec());
        assert_eq!(next_packet(&mut to_b).await.1, b"here");
        let gone = async {
            while b.link.is_connected(&a.link.id()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let stayed = tokio::time::timeout(Duration::from_secs(2), gone).await;
        assert_eq!(stayed.is_err(), member);
    }
}
