//! Nodes that hear of each other: real nodes on loopback, of which one dies, comes back, leaves, or keeps to itself.
//!
//! Times are the product's own; what is waited for is a state, within a bound that a busy machine keeps.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};
use support::{BOUND, TestNode, fake};
use vistara_api::*;

async fn start(dir: &Path) -> TestNode {
    TestNode::start(dir, fake()).await
}

/// Listens on loopback and gives the ticket.
async fn ticket(node: &TestNode) -> String {
    let listen = ListenRequest {
        listen: Some("127.0.0.1:0".to_owned()),
    };
    let status = node.client.mesh_listen(&listen).await.unwrap();
    status.ticket.unwrap()
}

async fn id(node: &TestNode) -> String {
    node.client.mesh().await.unwrap().id
}

async fn join(node: &TestNode, ticket: &str) {
    self::ticket(node).await;
    let join = JoinRequest {
        ticket: ticket.to_owned(),
        ..JoinRequest::default()
    };
    node.client.join(&join).await.unwrap();
}

async fn seen(node: &TestNode, id: &str) -> Option<PeerNode> {
    let nodes = node.client.nodes().await.unwrap();
    nodes.into_iter().find(|node| node.id == id)
}

/// Waits until a node takes another for this; gives how it lists it and how long that took.
async fn until(node: &TestNode, id: &str, life: &str) -> (PeerNode, Duration) {
    let begin = Instant::now();
    let mut last = None;
    while begin.elapsed() < BOUND {
        last = seen(node, id).await;
        if let Some(peer) = last
            .clone()
            .filter(|peer| peer.life.as_deref() == Some(life))
        {
            return (peer, begin.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it is not {life}: {last:?}");
}

/// Waits until a node lists another with what it says of itself.
async fn until_stated(node: &TestNode, id: &str) -> PeerNode {
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        if let Some(peer) = seen(node, id).await.filter(|peer| peer.facts.is_some()) {
            return peer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it says nothing of itself");
}

#[tokio::test]
async fn who_joined_one_node_hears_of_the_others_and_of_their_death_return_and_leave() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let (a, b) = (start(dirs[0].path()).await, start(dirs[1].path()).await);
    let c = start(dirs[2].path()).await;
    let terms = NodeTerms {
        region: Some("moon".to_owned()),
        ..NodeTerms::default()
    };
    c.client.set_terms(&terms).await.unwrap();
    let way = ticket(&b).await;
    join(&a, &way).await;
    join(&c, &way).await;
    let (a_id, b_id, c_id) = (id(&a).await, id(&b).await, id(&c).await);

    let heard = until_stated(&a, &c_id).await;
    assert_eq!(heard.known, "heard");
    until(&a, &c_id, "alive").await;
    assert_eq!(heard.facts.unwrap().region.as_deref(), Some("moon"));
    assert!(heard.grant.is_none());
    assert_eq!(until_stated(&a, &b_id).await.known, "joined");
    // Who has joined nobody knows who joined it.
    for node in [&a_id, &c_id] {
        assert_eq!(until_stated(&b, node).await.known, "heard");
    }

    // Being a member gives nothing.
    let refused = a.client.on(c_id.clone()).machines(true).await.unwrap_err();
    let ClientError::Refused(body) = refused else {
        panic!("{refused}");
    };
    assert_eq!(body.kind, ErrorKind::NotFound);
    assert!(body.message.contains("heard of"), "{}", body.message);
    assert!(body.hint.unwrap().contains(&a_id), "what to type is told");

    // A grant by key is enough to use it; no ticket is passed on by hand.
    let grant = GrantRequest {
        to: a_id.clone(),
        rights: vec!["run".to_owned()],
        until: (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string(),
        ..GrantRequest::default()
    };
    let token = c.client.grant(&grant).await.unwrap().token;
    a.client
        .keep_grant(&KeepGrantRequest { token })
        .await
        .unwrap();
    let there = a.client.on(c_id.clone());
    assert!(there.machines(true).await.unwrap().is_empty());
    let wish = PlaceRequest {
        memory: Some("64m".to_owned()),
        regions: vec!["moon".to_owned()],
        ..PlaceRequest::default()
    };
    assert_eq!(a.client.place(&wish).await.unwrap().node, c_id);

    let dir = c.dir.clone();
    c.vanish();
    let (_, took) = until(&a, &c_id, "dead").await;
    let (_, more) = until(&b, &c_id, "dead").await;
    println!(
        "dead to one after {took:?}, to the other after {:?}",
        took + more
    );

    let c = start(&dir).await;
    for node in [&a, &b] {
        until(node, &c_id, "alive").await;
    }
    until(&c, &a_id, "alive").await;
    assert!(there.machines(true).await.unwrap().is_empty());

    c.client.mesh_leave().await.unwrap();
    for node in [&a, &b] {
        until(node, &c_id, "left").await;
    }
    assert!(c.client.nodes().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_node_finds_the_others_again_though_the_one_that_it_joined_is_gone() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let (a, b) = (start(dirs[0].path()).await, start(dirs[1].path()).await);
    let c = start(dirs[2].path()).await;
    let way = ticket(&b).await;
    join(&a, &way).await;
    join(&c, &way).await;
    let (a_id, c_id) = (id(&a).await, id(&c).await);
    until_stated(&a, &c_id).await;
    until_stated(&c, &a_id).await;
    // An orderly end, at which members are written down.
    let dir = a.dir.clone();
    a.client.shutdown().await.unwrap();
    until(&c, &a_id, "left").await;
    a.vanish();
    b.vanish();
    let a = start(&dir).await;
    until(&c, &a_id, "alive").await;
    until_stated(&a, &c_id).await;
}

#[tokio::test]
async fn who_keeps_to_itself_is_told_of_to_nobody_and_hears_of_nobody() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let (a, b) = (start(dirs[0].path()).await, start(dirs[1].path()).await);
    let quiet = start(dirs[2].path()).await;
    let private = |private| NodeTerms {
        private,
        ..NodeTerms::default()
    };
    quiet.client.set_terms(&private(true)).await.unwrap();
    let way = ticket(&b).await;
    // Both ways: who was joined by somebody is not told of by that one either.
    join(&quiet, &way).await;
    let quiet_way = ticket(&quiet).await;
    join(&b, &quiet_way).await;
    join(&a, &way).await;
    let (a_id, b_id, quiet_id) = (id(&a).await, id(&b).await, id(&quiet).await);
    until_stated(&b, &a_id).await;
    until_stated(&a, &b_id).await;
    // Rumours would have come by now: some rounds of pings, and a greeting each five seconds.
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(seen(&a, &quiet_id).await, None);
    assert_eq!(seen(&quiet, &a_id).await, None);
    for (node, other) in [(&quiet, &b_id), (&b, &quiet_id)] {
        let peer = seen(node, other).await.unwrap();
        assert_eq!((peer.life, peer.state.as_str()), (None, "connected"));
    }
    // Until its owner thinks otherwise, and back.
    quiet.client.set_terms(&private(false)).await.unwrap();
    until(&a, &quiet_id, "alive").await;
    until(&quiet, &a_id, "alive").await;
    quiet.client.set_terms(&private(true)).await.unwrap();
    let (left, _) = until(&a, &quiet_id, "left").await;
    assert!(left.addresses.is_empty() && left.facts.is_none());
    assert_eq!(seen(&quiet, &a_id).await, None);
    // Who has joined it, and is answered by it, does not take it for one that is gone.
    let begin = Instant::now();
    loop {
        let peer = seen(&b, &quiet_id).await.unwrap();
        if peer.life.is_none() {
            assert_eq!(peer.state, "connected");
            break;
        }
        assert!(begin.elapsed() < BOUND, "{peer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What many nodes cost that do nothing but know each other: processor time of this process, which has them all.
#[tokio::test]
#[ignore = "a measurement, by hand: VISTARA_GOSSIP_NODES=20 … --run-ignored only"]
async fn what_it_costs_to_know_many() {
    let count: usize = std::env::var("VISTARA_GOSSIP_NODES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(20);
    let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut nodes = Vec::new();
    for dir in &dirs {
        nodes.push(start(dir.path()).await);
    }
    let before = cost(Duration::from_secs(20)).await;
    let way = ticket(&nodes[0]).await;
    let begin = Instant::now();
    for node in &nodes[1..] {
        join(node, &way).await;
    }
    let joined = begin.elapsed();
    for node in &nodes {
        while node.client.nodes().await.unwrap().len() < count - 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    println!(
        "{count} nodes joined in {joined:?}, all known to all after {:?}",
        begin.elapsed()
    );
    tokio::time::sleep(Duration::from_secs(60)).await;
    let after = cost(Duration::from_secs(60)).await;
    let each = |share: f64| 100.0 * share / count as f64;
    println!(
        "each of {count} nodes: {:.2} % of a core alone, {:.2} % knowing the others",
        each(before),
        each(after)
    );
}

/// Which part of a core this process uses, over a while.
async fn cost(span: Duration) -> f64 {
    let begin = cpu_seconds();
    tokio::time::sleep(span).await;
    (cpu_seconds() - begin) / span.as_secs_f64()
}

fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
