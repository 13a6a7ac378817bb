//! Peers that have granted something and lie: about what they have, in what they offer, and in what they send for an answer. Who
//! has joined them is served by others, in time.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::{TestNode, can_make_disks, fake};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_api::{GrantRequest, JoinRequest, ListenRequest, NodeTerms, PlaceRequest};
use vistara_mesh::{Accepted, Authority, Identity, Link, LinkOptions, MeshStream, Ticket, facts};
use vistara_model::{
    Architecture, Bytes, GrantId, GrantLimits, GrantTerms, Hypervisor, NodeFacts, NodeId,
    OwnerTerms, Right, Stock,
};

/// Longest that a choice among liars may take on a busy machine: each of them may keep it waiting for two seconds.
const CHOICE_MAX: Duration = Duration::from_secs(30);

/// What a liar does when it is asked for an offer.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// Offers all there is, and never says that it is taken.
    Silence,
    /// Offers all there is, and then has nothing.
    Nothing,
    /// Sends an answer that never ends.
    Endless,
    /// Sends something else.
    Garbage,
    /// Says of itself what nobody has signed.
    Unsigned,
    /// Says what another node has said.
    Others,
}

fn facts_of(node: NodeId) -> NodeFacts {
    let all = Stock {
        memory: Bytes(1 << 60),
        machines: u32::MAX,
    };
    NodeFacts {
        node,
        version: u64::MAX,
        arch: Architecture::host(),
        cpus: u32::MAX,
        capacity: all,
        free: all,
        queue_depth: 0,
        hypervisors: [Hypervisor::Qemu, Hypervisor::Firecracker].into(),
        kvm: true,
        images: BTreeSet::new(),
        templates: BTreeSet::new(),
        ready_ms: Some(0),
        region: Some("eu".to_owned()),
        price_micros: 0,
        labels: BTreeSet::new(),
        terms: OwnerTerms::default(),
    }
}

struct Liar {
    _dir: tempfile::TempDir,
    ticket: String,
    token: String,
    asked: Arc<AtomicUsize>,
}

impl Liar {
    async fn start(lie: Lie, holder: NodeId, other: &[u8]) -> Liar {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let terms = GrantTerms {
            id: GrantId::from_random([1; 8]),
            node: identity.id(),
            holder,
            rights: [Right::Run].into(),
            until_s: (jiff::Timestamp::now().as_second() + 3600) as u64,
            limits: GrantLimits::default(),
        };
        let token = Authority::new(&identity).unwrap().give(&terms).unwrap();
        let statement = match lie {
            Lie::Others => other.to_vec(),
            Lie::Unsigned => vec![0; 200],
            _ => facts::state(&identity, &facts_of(identity.id())).unwrap(),
        };
        let (link, mut accepted) = Link::open(LinkOptions {
            identity,
            listen: ([127, 0, 0, 1], 0).into(),
            knows: Arc::new(|_| true),
            relays: Vec::new(),
        })
        .await
        .unwrap();
        let ticket = Ticket {
            node: link.id(),
            addresses: link.addresses(),
            relays: Vec::new(),
        };
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            // The link lives as long as it is asked.
            let _link = link;
            while let Some(Accepted { stream, .. }) = accepted.recv().await {
                tokio::spawn(answer(stream, lie, statement.clone(), Arc::clone(&count)));
            }
        });
        Liar {
            _dir: dir,
            ticket: ticket.to_string(),
            token: token.to_string(),
            asked,
        }
    }
}

async fn answer(mut stream: MeshStream, lie: Lie, statement: Vec<u8>, asked: Arc<AtomicUsize>) {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => head.extend_from_slice(&buffer[..count]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let line = head.lines().next().unwrap_or_default();
    let offer = r#"{"ttl_ms":8000,"memory_free_bytes":1152921504606846976,"machines_free":4294967295,"price_micros":0}"#;
    let statement = format!(r#"{{"statement":"{}"}}"#, STANDARD.encode(statement));
    let good = |body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let refusal = "HTTP/1.1 409 Conflict\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let said = match (line, lie) {
        (line, _) if line.contains("/v1/facts") => good(&statement),
        (line, Lie::Silence) if line.contains("/take") => return std::future::pending().await,
        (line, _) if line.contains("/take") => refusal.to_owned(),
        (line, lie) if line.starts_with("POST /v1/offers") => {
            asked.fetch_add(1, Ordering::Relaxed);
            match lie {
                Lie::Garbage => "\0\x7f not http at all \r\n\r\n{{{{".repeat(10_000),
                Lie::Endless => {
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
                    let _ = stream.write_all(head.as_bytes()).await;
                    let chunk = format!("10000\r\n{}\r\n", "[".repeat(1 << 16));
                    while stream.write_all(chunk.as_bytes()).await.is_ok() {}
                    return;
                }
                _ => good(offer),
            }
        }
        _ => refusal.to_owned(),
    };
    let _ = stream.write_all(said.as_bytes()).await;
    let _ = stream.shutdown().await;
    // What was said goes out before the stream is dropped.
    let _ = stream.read(&mut buffer).await;
}

#[tokio::test]
async fn who_lies_about_what_it_has_delays_a_choice_and_does_not_decide_it() {
    if !can_make_disks() {
        return;
    }
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let far = TestNode::start(dirs[0].path(), fake()).await;
    let near = TestNode::start(dirs[1].path(), fake()).await;
    let loopback = ListenRequest {
        listen: Some("127.0.0.1:0".to_owned()),
    };
    let near_id = near.client.mesh_listen(&loopback).await.unwrap().id;
    let status = far.client.mesh_listen(&loopback).await.unwrap();
    let terms = NodeTerms {
        region: Some("eu".to_owned()),
        price_micros: 9,
        ..NodeTerms::default()
    };
    far.client.set_terms(&terms).await.unwrap();
    let grant = GrantRequest {
        to: near_id.clone(),
        rights: vec!["run".to_owned()],
        until: (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string(),
        ..GrantRequest::default()
    };
    let token = far.client.grant(&grant).await.unwrap().token;
    let join = |name: &str, ticket: &str, token: &str| JoinRequest {
        ticket: ticket.to_owned(),
        name: Some(name.to_owned()),
        grant: Some(token.to_owned()),
    };
    let ticket = status.ticket.unwrap();
    near.client
        .join(&join("far", &ticket, &token))
        .await
        .unwrap();
    let there = near.client.on("far").facts().await.unwrap();
    let others = STANDARD.decode(&there.statement).unwrap();
    let mut liars = Vec::new();
    for (number, lie) in [
        Lie::Silence,
        Lie::Nothing,
        Lie::Endless,
        Lie::Garbage,
        Lie::Unsigned,
        Lie::Others,
    ]
    .into_iter()
    .enumerate()
    {
        let liar = Liar::start(lie, near_id.parse().unwrap(), &others).await;
        let join = join(&format!("liar{number}"), &liar.ticket, &liar.token);
        near.client.join(&join).await.unwrap();
        liars.push(liar);
    }
    // Here is not where it is wanted, and each liar promises more, for less.
    for place in ["spread", "cheapest"] {
        let wish = PlaceRequest {
            memory: Some("64m".to_owned()),
            regions: vec!["eu".to_owned()],
            policy: Some(place.to_owned()),
            ..PlaceRequest::default()
        };
        let begin = Instant::now();
        let placed = tokio::time::timeout(CHOICE_MAX, near.client.place(&wish))
            .await
            .expect("a choice in time")
            .unwrap();
        println!("{place}: after {:?}: {:?}", begin.elapsed(), placed.reasons);
        assert_eq!(placed.name, "far", "{:?}", placed.reasons);
        far.client.release_offer(&placed.offer).await.ok();
    }
    for (liar, asked) in liars.iter().zip([true, true, true, true, false, false]) {
        assert_eq!(liar.asked.load(Ordering::Relaxed) > 0, asked);
    }
    // Who lies is answered no less than others, and the node goes on.
    assert!(near.client.machines(true).await.unwrap().is_empty());
}
