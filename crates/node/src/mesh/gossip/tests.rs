//! What is remembered over a start, on real files and a real link.

#![allow(clippy::unwrap_used)]

use super::*;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use vistara_mesh::{Identity, LinkOptions, Peer};
use vistara_model::Architecture;

/// A card of a node of its own.
fn card(leaves: bool) -> (NodeId, Arc<[u8]>) {
    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::open(dir.path()).unwrap();
    let facts = nothing(NodeFacts {
        node: identity.id(),
        version: 7,
        ..blank(identity.id())
    });
    let card = Card {
        facts,
        addresses: Vec::new(),
        relay: None,
        leaves,
    };
    (identity.id(), Arc::from(card.sign(&identity).unwrap()))
}

fn blank(node: NodeId) -> NodeFacts {
    NodeFacts {
        node,
        version: 1,
        arch: Architecture::host(),
        cpus: 1,
        capacity: Stock::default(),
        free: Stock::default(),
        queue_depth: 0,
        hypervisors: BTreeSet::new(),
        kvm: false,
        images: BTreeSet::new(),
        templates: BTreeSet::new(),
        ready_ms: None,
        region: None,
        price_micros: 0,
        labels: BTreeSet::new(),
        terms: OwnerTerms::default(),
    }
}

/// A link that lets everybody in, or nobody. Whoever asks something of it is not heard.
async fn link_of(open: &Open, lets_in: bool) -> Link {
    let options = LinkOptions {
        identity: open.identity.clone(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        knows: Arc::new(move |_| lets_in),
        relays: Vec::new(),
    };
    let (link, _accepted) = Link::open(options).await.unwrap();
    link
}

#[tokio::test]
async fn who_is_remembered_is_pinned_where_it_was_joined_and_is_remembered_though_all_are_dead() {
    let dir = tempfile::tempdir().unwrap();
    let open = Arc::new(Open::read(dir.path()).ok().unwrap());
    let ((joined, one), (heard, other), (left, third)) = (card(false), card(false), card(true));
    let peer = Peer {
        id: joined,
        name: None,
        addresses: Vec::new(),
        relays: Vec::new(),
        grant: None,
    };
    lock(&open.peers).put(peer).unwrap();
    let memory = dir.path().join("members.json");
    memory::write(&memory, &[other, one, third]).unwrap();
    let mode = std::fs::metadata(&memory).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let link = link_of(&open, false).await;
    let gossip = Gossip::begin(Arc::clone(&open), link.clone(), memory.clone()).unwrap();
    let ties = |node: &NodeId| lock(&gossip.state).machine.tie(*node);
    assert_eq!(ties(&joined), Some(Tie::Pinned));
    assert_eq!((ties(&heard), ties(&left)), (Some(Tie::Heard), None));
    // One that was joined since is pinned soon, however it came into the table.
    let peer = Peer {
        id: heard,
        name: None,
        addresses: Vec::new(),
        relays: Vec::new(),
        grant: None,
    };
    lock(&open.peers).put(peer).unwrap();
    gossip.tick();
    assert_eq!(ties(&heard), Some(Tie::Pinned));
    // Nobody answers, and this node was not cut off for good.
    while gossip.members().iter().any(|one| one.life != Life::Dead) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    gossip.end(true).await;
    let kept = memory::read(&memory);
    let kept: BTreeSet<NodeId> = kept.iter().map(|(card, _)| card.facts.node).collect();
    assert_eq!(kept, BTreeSet::from([joined, heard]));
    link.close().await;
}

/// A node that takes part and looks after a service with others; it lets all in.
async fn partner() -> (tempfile::TempDir, Arc<Open>, Link, Arc<Gossip>) {
    let dir = tempfile::tempdir().unwrap();
    let open = Arc::new(Open::read(dir.path()).ok().unwrap());
    let link = link_of(&open, true).await;
    let memory = dir.path().join("members.json");
    let gossip = Gossip::begin(Arc::clone(&open), link.clone(), memory).unwrap();
    (dir, open, link, gossip)
}

#[tokio::test]
async fn nodes_that_look_after_a_service_together_become_members_that_stay_though_neither_has_joined()
 {
    let (_dir, open, link, gossip) = partner().await;
    let (_other_dir, other_open, other_link, other_gossip) = partner().await;
    let (id, other) = (open.identity.id(), other_open.identity.id());
    lock(&open.partners).insert(other);
    lock(&other_open.partners).insert(id);
    link.keep(other, other_link.addresses()).unwrap();
    let tie = |gossip: &Gossip, of: &NodeId| lock(&gossip.state).machine.tie(*of);
    let pinned = Some(Tie::Pinned);
    while tie(&gossip, &other) != pinned || tie(&other_gossip, &id) != pinned {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    gossip.end(false).await;
    other_gossip.end(false).await;
    link.close().await;
    other_link.close().await;
}
