//! How others reach this node beside its addresses: relays, and the local network. Both as the owner said in the node's terms.

use super::{LISTEN_AGAIN, Mesh, placing};
use crate::fault::{Answer, Fault, blocking};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_api::NodeTerms;
use vistara_mesh::{Link, RELAYS_MAX, Relay, Ticket};
use vistara_model::NodeId;

/// How long a node whose id alone is known is looked for in the local network.
const FIND_BOUND: Duration = Duration::from_secs(3);
/// How long a relay is waited for before a ticket is printed.
const RELAY_BOUND: Duration = Duration::from_secs(6);
const RELAY_LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long the port may be taken by the link that was closed.
const PORT_BOUND: Duration = Duration::from_secs(3);
const PORT_AGAIN: Duration = Duration::from_millis(50);

/// What the owner said.
#[derive(Debug, Default)]
pub(super) struct Reach {
    pub(super) relays: Vec<Relay>,
    pub(super) local_discovery: bool,
}

/// Reads the relays of a node's terms.
pub(crate) fn relays_of(terms: &NodeTerms) -> Answer<Vec<Relay>> {
    if terms.relays.len() > RELAYS_MAX {
        return Err(Fault::user(format!(
            "a node uses at most {RELAYS_MAX} relays"
        )));
    }
    let read = terms.relays.iter().map(|text| text.parse());
    let read: Result<Vec<Relay>, vistara_mesh::NoRelay> = read.collect();
    read.map_err(|error| {
        Fault::user(error.to_string())
            .hint("`vistara relay` on a host that both sides reach prints one")
    })
}

impl Mesh {
    /// What the owner said of reaching this node. Where that cannot be read, nothing is told to anybody.
    pub(super) async fn reach(&self) -> Reach {
        let path = self.dir.join("terms.json");
        let read = blocking(move || {
            let terms = placing::read_terms(&path)?;
            Ok::<_, Fault>(Reach {
                relays: relays_of(&terms)?,
                local_discovery: terms.local_discovery,
            })
        });
        match read.await.flatten() {
            Ok(reach) => reach,
            Err(fault) => {
                let error = fault.0.message;
                tracing::error!(error, "this node uses neither relays nor local discovery");
                Reach::default()
            }
        }
    }

    /// The owner has said something else.
    pub(super) async fn reach_changed(self: &Arc<Self>) -> Answer<()> {
        let Some(link) = self.link() else {
            return Ok(());
        };
        let reach = self.reach().await;
        if link.named_relays() == reach.relays {
            link.discover(reach.local_discovery);
            return Ok(());
        }
        self.open_anew(link).await
    }

    /// Is rid of a relay that came with a ticket of a node that was forgotten.
    pub(super) async fn drop_unwanted_relay(self: &Arc<Self>) -> Answer<()> {
        let _turn = self.turning.lock().await;
        match self.link() {
            Some(link) if link.keeps_unwanted_relay() => self.open_anew(link).await,
            Some(_) | None => Ok(()),
        }
    }

    /// Closes the link and opens another at the same port: what is under way breaks off, and peers are dialled again.
    async fn open_anew(self: &Arc<Self>, link: Link) -> Answer<()> {
        self.end_gossip(true).await;
        *super::lock(&self.link) = None;
        link.close().await;
        drop(link);
        let begin = Instant::now();
        loop {
            // Others may hold the old one for a moment yet.
            match self.listen_in_turn(None).await {
                Ok(_) => return Ok(()),
                Err(_) if begin.elapsed() < PORT_BOUND => tokio::time::sleep(PORT_AGAIN).await,
                Err(fault) => {
                    let again = LISTEN_AGAIN.as_secs();
                    tracing::error!(error = fault.0.message, again, "this node does not listen");
                    self.listen_soon();
                    return Err(fault);
                }
            }
        }
    }

    /// Waits until this node can be reached through a relay, if it has been told of one; not for long.
    pub(crate) async fn settle_relays(&self) {
        let begin = Instant::now();
        while let Some(link) = self.link()
            && !link.named_relays().is_empty()
            && link.home().is_none()
            && link.relay_trouble().is_none()
            && begin.elapsed() < RELAY_BOUND
        {
            tokio::time::sleep(RELAY_LOOK_EVERY).await;
        }
    }

    /// Looks for a node in the local network, by its whole id.
    pub(super) async fn ticket_from_near(self: &Arc<Self>, node: NodeId) -> Answer<Ticket> {
        if !self.reach().await.local_discovery {
            return Err(Fault::user(format!(
                "the node {} was not heard of, and an id alone does not say where it is",
                node.short()
            ))
            .hint("give what `vistara node ticket` prints there; or, in one local network, type on both: vistara node terms --local-discovery"));
        }
        let link = self.listen(None).await?;
        let addresses = link.find_near(&node, FIND_BOUND).await;
        if addresses.is_empty() {
            return Err(Fault::new(
                vistara_api::ErrorKind::Peer,
                format!("no node {} is heard in the local network", node.short()),
            )
            .hint("does it listen (vistara node ticket), with local discovery (vistara node terms --local-discovery)? else give its ticket"));
        }
        Ok(Ticket {
            node,
            addresses,
            relays: Vec::new(),
        })
    }
}
