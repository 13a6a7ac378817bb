//! What nodes may have a node do in the name of a service: hand-made peers that are strangers, forge, move and widen.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, fake, request};
use vistara_api::*;
use vistara_control::services::wire::{Answer, FromNode, Request, ToNode};
use vistara_control::services::{
    FromKeeper, Keepers, Outcome, Semantics, ServiceId, Slot, Spec, ToKeeper,
};
use vistara_mesh::service::{
    Eligible, Placement, SealedDocument, ServiceDocument, Task, TaskSemantics,
};
use vistara_mesh::{Identity, Link, LinkOptions, Ticket, Token};
use vistara_model::{Bytes, Cpus, Generation, Hypervisor, NodeId};

const SERVICE: u128 = 7;

/// A peer that says what a test has it say.
struct Peer {
    identity: Identity,
    link: Link,
    _dir: tempfile::TempDir,
}

impl Peer {
    async fn new() -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let (link, _accepted) = Link::open(LinkOptions {
            identity: identity.clone(),
            listen: "127.0.0.1:0".parse().unwrap(),
            knows: Arc::new(|_| false),
            relays: Vec::new(),
        })
        .await
        .unwrap();
        Peer {
            identity,
            link,
            _dir: dir,
        }
    }

    fn id(&self) -> NodeId {
        self.identity.id()
    }

    /// The answer, or the words with which it was refused.
    async fn say(&self, to: &Target, body: Vec<u8>) -> Result<Answer, String> {
        self.link.keep(to.id, to.ticket.addresses.clone()).unwrap();
        let asked = async {
            let stream = self.link.stream(&to.id, None).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .unwrap();
            tokio::spawn(connection);
            let body: Full<bytes::Bytes> = Full::new(body.into());
            let request = hyper::Request::post("/v1/services/message")
                .header("host", "vistara")
                .body(body)
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            let good = response.status().is_success();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            match good {
                true => Ok(Answer::decode(&body).unwrap()),
                false => Err(serde_json::from_slice::<ErrorBody>(&body).unwrap().message),
            }
        };
        tokio::time::timeout(BOUND, asked).await.unwrap()
    }

    async fn ask(
        &self,
        to: &Target,
        document: Option<&SealedDocument>,
        body: ToNode,
    ) -> Result<Answer, String> {
        let request = Request {
            service: ServiceId(SERVICE),
            version: document.map_or(0, |sealed| sealed.document().version),
            document: document.map(|sealed| sealed.bytes().to_vec()),
            body,
        };
        self.say(to, request.encode().unwrap()).await
    }
}

struct Target {
    node: TestNode,
    id: NodeId,
    ticket: Ticket,
    image: vistara_model::Digest,
    _dir: tempfile::TempDir,
}

impl Target {
    async fn new() -> Target {
        let dir = tempfile::tempdir().unwrap();
        let node = TestNode::start(dir.path(), fake()).await;
        node.image("test").await;
        let listen = ListenRequest {
            listen: Some("127.0.0.1:0".to_owned()),
        };
        let status = node.client.mesh_listen(&listen).await.unwrap();
        let ticket: Ticket = status.ticket.unwrap().parse().unwrap();
        let image = node.client.image("test").await.unwrap().id.parse().unwrap();
        Target {
            id: ticket.node,
            ticket,
            image,
            node,
            _dir: dir,
        }
    }

    async fn grant(&self, to: NodeId, right: &str) -> GivenGrant {
        let grant = GrantRequest {
            to: to.to_string(),
            rights: vec![right.to_owned()],
            until: (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string(),
            ..GrantRequest::default()
        };
        self.node.client.grant(&grant).await.unwrap()
    }

    fn document(&self, owner: &Peer, more: &[NodeId], token: &GivenGrant) -> ServiceDocument {
        let token: Token = token.token.parse().unwrap();
        let own = Eligible {
            node: self.id,
            token: Some(token.as_bytes().to_vec()),
        };
        let others = more.iter().map(|node| Eligible {
            node: *node,
            token: None,
        });
        ServiceDocument {
            service: SERVICE,
            version: 1,
            owner: owner.id(),
            name: "web".to_owned(),
            replicas: 1,
            removed: false,
            image: self.image.clone(),
            memory: Bytes(128 << 20),
            cpus: Cpus::ONE,
            hypervisor: Hypervisor::Auto,
            request: serde_json::to_vec(&request(&["sleep", "1000"])).unwrap(),
            placement: Placement::default(),
            nodes: [own].into_iter().chain(others).collect(),
            task: None,
        }
    }

    async fn services(&self) -> usize {
        self.node.client.services().await.unwrap().len()
    }

    async fn machines(&self) -> Vec<Machine> {
        self.node.client.machines(true).await.unwrap()
    }
}

fn begin(epoch: u64, nodes: &[NodeId], replicas: u32) -> ToNode {
    let spec = Spec {
        service: ServiceId(SERVICE),
        version: 1,
        replicas,
        semantics: Semantics::Service,
    };
    ToNode::Keeper(ToKeeper::Begin {
        keepers: Keepers {
            epoch,
            nodes: nodes.to_vec(),
        },
        spec,
        records: BTreeMap::new(),
    })
}

fn run(epoch: u64, nodes: &[NodeId], request: u128) -> ToNode {
    ToNode::Run {
        request,
        slot: Slot {
            service: ServiceId(SERVICE),
            number: 0,
        },
        generation: Generation(1),
        keepers: Keepers {
            epoch,
            nodes: nodes.to_vec(),
        },
    }
}

fn is_refused(answer: Result<Answer, String>, words: &str) {
    let told = match answer {
        Err(told) => told,
        Ok(Answer {
            body: FromNode::Refused(told),
            ..
        }) => told,
        Ok(other) => panic!("{other:?}"),
    };
    assert!(told.contains(words), "{told:?} and not {words:?}");
}

#[tokio::test]
async fn nobody_has_a_node_keep_or_run_what_its_grant_does_not_cover() {
    if !can_make_disks() {
        return;
    }
    let (target, owner, stranger) = (Target::new().await, Peer::new().await, Peer::new().await);
    let given = target.grant(owner.id(), "run").await;

    // Nothing, garbage, and a service that nobody knows.
    is_refused(
        stranger.say(&target, b"garbage".to_vec()).await,
        "its form is",
    );
    let unknown = stranger.ask(&target, None, ToNode::Status).await.unwrap();
    assert_eq!(unknown.body, FromNode::Unknown);

    // Somebody else's grant in a document of one's own.
    let forged = target
        .document(&stranger, &[], &given)
        .seal(&stranger.identity)
        .unwrap();
    let said = stranger
        .ask(&target, Some(&forged), begin(1, &[target.id], 1))
        .await;
    is_refused(said, "does not allow this to this caller");
    // The owner's document with another's signature cannot even be made; one that is bent is thrown away.
    let good = target
        .document(&owner, &[stranger.id()], &given)
        .seal(&owner.identity)
        .unwrap();
    let mut bent = good.bytes().to_vec();
    *bent.last_mut().unwrap() ^= 1;
    let bent = Request {
        service: ServiceId(SERVICE),
        version: 1,
        document: Some(bent),
        body: begin(1, &[target.id], 1),
    };
    let said = owner.say(&target, bent.encode().unwrap()).await;
    is_refused(said, "document is no good");
    // A grant for something else.
    let images = target.grant(owner.id(), "images").await;
    let without = target
        .document(&owner, &[], &images)
        .seal(&owner.identity)
        .unwrap();
    let said = owner
        .ask(&target, Some(&without), begin(1, &[target.id], 1))
        .await;
    is_refused(said, "right to run");
    // One that is good, at a node that did not give the grant.
    let other = Target::new().await;
    let said = owner
        .ask(&other, Some(&good), begin(1, &[other.id], 1))
        .await;
    is_refused(said, "is not named");
    let mut moved = target.document(&owner, &[], &given);
    moved.nodes[0].node = other.id;
    let moved = moved.seal(&owner.identity).unwrap();
    let said = owner
        .ask(&other, Some(&moved), begin(1, &[other.id], 1))
        .await;
    is_refused(said, "was not given by this node");
    assert_eq!((target.services().await, other.services().await), (0, 0));
}

#[tokio::test]
async fn only_who_is_named_asks_and_only_keepers_give_slots() {
    if !can_make_disks() {
        return;
    }
    let (target, owner) = (Target::new().await, Peer::new().await);
    let (helper, stranger) = (Peer::new().await, Peer::new().await);
    let given = target.grant(owner.id(), "run").await;
    let document = target.document(&owner, &[helper.id()], &given);
    let good = document.clone().seal(&owner.identity).unwrap();
    // The first keepers are the owner's choice, and are named.
    let said = helper
        .ask(&target, Some(&good), begin(1, &[target.id], 1))
        .await;
    is_refused(said, "only the service's owner chooses");
    let said = owner
        .ask(
            &target,
            Some(&good),
            begin(1, &[target.id, stranger.id()], 1),
        )
        .await;
    is_refused(said, "is not named");
    // More copies than the owner has signed are not kept.
    let said = owner
        .ask(&target, Some(&good), begin(1, &[target.id], 9))
        .await;
    assert_eq!(said.unwrap().body, FromNode::Nothing);
    let shown = target.node.client.service("web").await.unwrap();
    assert_eq!((shown.wanted, shown.epoch, shown.copies.len()), (1, 1, 1));

    is_refused(
        stranger.ask(&target, None, ToNode::Status).await,
        "does not name this node",
    );
    let keepers = [target.id];
    is_refused(
        helper.ask(&target, Some(&good), run(1, &keepers, 1)).await,
        "is no keeper",
    );
    // Others than those of this epoch, or of an earlier one.
    let false_keepers = [target.id, helper.id()];
    let said = helper
        .ask(&target, Some(&good), run(1, &false_keepers, 1))
        .await;
    is_refused(said, "not the keepers of this epoch");
    let said = helper
        .ask(&target, Some(&good), run(0, &[helper.id()], 1))
        .await;
    is_refused(said, "others look after the service");
    let strange = [stranger.id(), target.id];
    is_refused(
        stranger
            .ask(&target, Some(&good), run(2, &strange, 1))
            .await,
        "does not name",
    );

    // Nobody but a keeper says who keeps next, and nobody is heard about a slot that was not given to him.
    let said = helper
        .ask(&target, Some(&good), begin(2, &[helper.id()], 1))
        .await;
    is_refused(said, "only a keeper says");
    let not_run = ToNode::NotRun {
        slot: Slot {
            service: ServiceId(SERVICE),
            number: 0,
        },
        generation: Generation(1),
        largest: Generation(1 << 40),
        why: "made up".to_owned(),
    };
    helper.ask(&target, Some(&good), not_run).await.unwrap();
    let said = helper.ask(&target, Some(&good), ToNode::Status).await;
    let FromNode::Status(status) = said.unwrap().body else {
        panic!("no status");
    };
    let slot = &status.keeping.unwrap().slots[0];
    assert!(!slot.trouble.iter().any(|why| why.contains("made up")));

    // Meanwhile the target, a keeper, has given itself the slot. The machine is the owner's.
    let begun = std::time::Instant::now();
    while target
        .machines()
        .await
        .iter()
        .all(|machine| machine.state != "running")
    {
        assert!(begun.elapsed() < BOUND);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let machines = target.machines().await;
    assert_eq!(machines.len(), 1);
    assert_eq!(machines[0].owner, Some(owner.id().to_string()));

    // An older document changes nothing; a newer one of another owner neither.
    let mut newer = document.clone();
    (newer.version, newer.owner) = (5, helper.id());
    let newer = newer.seal(&helper.identity).unwrap();
    is_refused(
        helper.ask(&target, Some(&newer), ToNode::Describe).await,
        "another owner's",
    );
    let mut last = document.clone();
    (last.version, last.removed, last.replicas) = (3, true, 0);
    (last.nodes, last.request) = (Vec::new(), Vec::new());
    let last = last.seal(&owner.identity).unwrap();
    owner
        .ask(&target, Some(&last), ToNode::Describe)
        .await
        .unwrap();
    let begun = std::time::Instant::now();
    while !target.machines().await.is_empty() {
        assert!(begun.elapsed() < BOUND);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(target.services().await, 0);
    // What is removed is not brought back by whoever has an old document.
    let said = owner
        .ask(&target, Some(&good), begin(1, &[target.id], 1))
        .await
        .unwrap();
    assert_eq!((said.version, said.body), (3, FromNode::Nothing));
    assert_eq!(target.services().await, 0);
}

#[tokio::test]
async fn nobody_but_who_runs_a_task_or_keeps_it_says_that_it_has_ended() {
    if !can_make_disks() {
        return;
    }
    let (target, owner, helper) = (Target::new().await, Peer::new().await, Peer::new().await);
    let given = target.grant(owner.id(), "run").await;
    let task = ServiceDocument {
        task: Some(Task {
            semantics: TaskSemantics::AtMostOnce,
            key: "once".to_owned(),
        }),
        ..target.document(&owner, &[helper.id()], &given)
    };
    let good = task.clone().seal(&owner.identity).unwrap();
    // What is said of its semantics is what the owner has signed.
    let said = owner
        .ask(&target, Some(&good), begin(1, &[target.id], 1))
        .await;
    assert_eq!(said.unwrap().body, FromNode::Nothing);
    let begun = std::time::Instant::now();
    while target.node.client.task("web").await.unwrap().state != TaskState::Running {
        assert!(begun.elapsed() < BOUND);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let slot = Slot {
        service: ServiceId(SERVICE),
        number: 0,
    };
    let done = |node, generation| {
        let outcome = Outcome {
            node,
            generation: Generation(generation),
            exit_code: 0,
        };
        ToNode::Keeper(ToKeeper::Done { slot, outcome })
    };
    for bad in [
        done(helper.id(), 1 << 40),
        done(target.id, 1),
        done(target.id, 1 << 40),
    ] {
        let said = helper.ask(&target, Some(&good), bad).await.unwrap().body;
        assert_eq!(said, FromNode::Nothing);
    }
    let lose = ToKeeper::Lose {
        slot,
        generation: Generation(1 << 40),
    };
    let said = helper
        .ask(&target, Some(&good), ToNode::Keeper(lose))
        .await
        .unwrap();
    assert!(
        !matches!(said.body, FromNode::Keeper(FromKeeper::LostNoted(..))),
        "{said:?}"
    );
    let shown = target.node.client.task("web").await.unwrap();
    assert_eq!((shown.state, shown.exit_code), (TaskState::Running, None));
    // A newer version of it is no service, and of other semantics neither.
    let mut other = task;
    other.version = 2;
    other.task = None;
    let other = other.seal(&owner.identity).unwrap();
    is_refused(
        owner.ask(&target, Some(&other), ToNode::Describe).await,
        "does not become another",
    );
}
