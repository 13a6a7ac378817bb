//! Nodes of one network on loopback, with fake machines whose programs are processes of this host.

use super::support::{TestNode, can_make_disks, fake};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use vistara_api::*;

/// A death is noticed, a lease ends, a copy is placed and starts, on a machine with much else to do.
pub(crate) const BOUND: Duration = Duration::from_secs(90);

fn in_an_hour() -> String {
    (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string()
}

async fn ticket(node: &TestNode) -> String {
    let listen = ListenRequest {
        listen: Some("127.0.0.1:0".to_owned()),
    };
    let status = node.client.mesh_listen(&listen).await.unwrap();
    status.ticket.unwrap()
}

/// Nodes of one network, all of which have granted the first one that it may run machines.
pub(crate) struct Network {
    pub(crate) dirs: Vec<tempfile::TempDir>,
    pub(crate) nodes: Vec<Option<TestNode>>,
    pub(crate) ids: Vec<String>,
}

impl Network {
    pub(crate) async fn of(count: usize) -> Option<Network> {
        if !can_make_disks() {
            return None;
        }
        let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
        let mut network = Network {
            nodes: Vec::new(),
            ids: Vec::new(),
            dirs,
        };
        for dir in &network.dirs {
            let node = TestNode::start(dir.path(), fake()).await;
            node.image("test").await;
            ticket(&node).await;
            network.ids.push(node.client.mesh().await.unwrap().id);
            network.nodes.push(Some(node));
        }
        let way = ticket(network.node(0)).await;
        for index in 1..count {
            let join = JoinRequest {
                ticket: way.clone(),
                ..JoinRequest::default()
            };
            network.node(index).client.join(&join).await.unwrap();
            network.grant(index).await;
        }
        for index in 0..count {
            until("everybody knows everybody", async || {
                let nodes = network.node(index).client.nodes().await.unwrap();
                let alive = |node: &&PeerNode| {
                    node.life.as_deref() == Some("alive") && node.facts.is_some()
                };
                nodes.iter().filter(alive).count() == count - 1
            })
            .await;
        }
        Some(network)
    }

    pub(crate) fn node(&self, index: usize) -> &TestNode {
        self.nodes[index].as_ref().unwrap()
    }

    /// Has a node let the first one in.
    pub(crate) async fn grant(&self, index: usize) -> GivenGrant {
        let grant = GrantRequest {
            to: self.ids[0].clone(),
            rights: vec!["run".to_owned()],
            until: in_an_hour(),
            ..GrantRequest::default()
        };
        let given = self.node(index).client.grant(&grant).await.unwrap();
        let keep = KeepGrantRequest {
            token: given.token.clone(),
        };
        until("a grant is kept", async || {
            // It may not have heard of the node yet.
            self.node(0).client.keep_grant(&keep).await.is_ok()
        })
        .await;
        given
    }

    /// Machines, everywhere.
    pub(crate) async fn machines(&self) -> BTreeMap<usize, Vec<Machine>> {
        let mut all = BTreeMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            if let Some(node) = node {
                all.insert(index, node.client.machines(true).await.unwrap());
            }
        }
        all
    }

    pub(crate) fn index(&self, node: &str) -> usize {
        self.ids.iter().position(|id| id == node).unwrap()
    }

    pub(crate) fn kill(&mut self, index: usize) {
        self.nodes[index].take().unwrap().vanish();
    }

    pub(crate) async fn rise(&mut self, index: usize) {
        let node = TestNode::start(self.dirs[index].path(), fake()).await;
        self.nodes[index] = Some(node);
    }
}

pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    until_some(what, async || holds().await.then_some(())).await;
}

pub(crate) async fn until_some<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        if let Some(found) = found().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("it does not come to be: {what}");
}

pub(crate) fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(body) => body,
        other => panic!("{other}"),
    }
}
