//! This node's part in the network: when it begins and ends, and nodes of which it has only heard.

use super::gossip::{Gossip, Member};
use super::{Mesh, Open, lock, placing, whole};
use crate::fault::{Answer, Fault, blocking};
use std::sync::Arc;
use vistara_api::ErrorKind;
use vistara_mesh::{Link, Peer, PeerState, Ticket};
use vistara_model::NodeId;

impl Mesh {
    /// This node's part in the network, while it takes one.
    pub(crate) fn gossip(&self) -> Option<Arc<Gossip>> {
        lock(&self.gossip).clone()
    }

    /// Takes part in the network over this link, unless the owner has made the node private.
    pub(super) async fn begin_gossip(&self, open: &Arc<Open>, link: &Link) {
        let (dir, open, link) = (self.dir.clone(), Arc::clone(open), link.clone());
        let runtime = tokio::runtime::Handle::current();
        let begun = blocking(move || {
            let _in = runtime.enter();
            match placing::read_terms(&dir.join("terms.json")) {
                Ok(terms) if terms.private => None,
                Ok(_) => Gossip::begin(open, link, dir.join("members.json")),
                Err(fault) => {
                    // What the owner said is not known: it may have been this.
                    tracing::error!(
                        error = fault.0.message,
                        "this node takes no part in the network"
                    );
                    None
                }
            }
        })
        .await;
        *lock(&self.gossip) = begun.ok().flatten();
        self.restate();
    }

    /// Takes leave of the network, if it takes part.
    pub(super) async fn end_gossip(&self, remember: bool) {
        let gossip = lock(&self.gossip).take();
        if let Some(gossip) = gossip {
            gossip.end(remember).await;
        }
    }

    /// What the owner has this node say has changed, or whether it says anything.
    pub(crate) async fn terms_changed(self: &Arc<Self>, private: bool) -> Answer<()> {
        let mesh = Arc::clone(self);
        whole(async move { mesh.join_or_leave(private).await }).await
    }

    async fn join_or_leave(self: &Arc<Self>, private: bool) -> Answer<()> {
        let _turn = self.turning.lock().await;
        self.reach_changed().await?;
        match (self.link(), self.gossip()) {
            (Some(_), Some(_)) if private => self.end_gossip(true).await,
            (Some(link), None) if !private => {
                let open = self.open_in_turn().await?;
                self.begin_gossip(&open, &link).await;
            }
            _ => {}
        }
        self.restate();
        Ok(())
    }

    /// Has what this node says of itself looked at soon.
    pub(super) fn restate(&self) {
        self.restate.notify_one();
    }

    /// What the network believes of a node. One that has left the network, and goes on answering this node, which has joined it,
    /// keeps to itself: it is no member.
    pub(crate) fn member(&self, node: &NodeId) -> Option<Member> {
        let member = self.gossip()?.member(node)?;
        let private = member.word() == "left"
            && matches!(self.state(node), Some(PeerState::Connected { .. }));
        (!private).then_some(member)
    }

    /// All of whom this node has heard.
    pub(crate) fn members(&self) -> Vec<Member> {
        self.gossip()
            .map(|gossip| gossip.members())
            .unwrap_or_default()
    }

    /// A member that was only heard of, as one to be remembered; nothing where it does not state where it is.
    pub(super) fn as_peer(&self, node: &NodeId) -> Option<Peer> {
        self.member(node)?;
        let stated = self.link()?.stated(node);
        (!stated.is_empty()).then_some(Peer {
            id: *node,
            name: None,
            addresses: stated.addresses,
            relays: stated.relays,
            grant: None,
        })
    }

    /// The member that was only heard of and whose id is, or begins with, what was typed.
    fn heard_of(&self, typed: &str) -> Option<NodeId> {
        let all = self.members();
        let mut found = (all.iter())
            .map(|member| member.id)
            .filter(|id| typed.len() >= 4 && id.to_string().starts_with(typed));
        let one = found.next()?;
        found.next().is_none().then_some(one)
    }

    /// Why nothing goes to a node that was not joined: where it was heard of, something can be done.
    pub(super) fn only_heard_of(&self, open: &Open, typed: &str, fault: Fault) -> Fault {
        if fault.0.kind != ErrorKind::NotFound {
            return fault;
        }
        let Some(node) = self.heard_of(typed) else {
            return fault;
        };
        Fault::new(
            ErrorKind::NotFound,
            format!(
                "the node {} was heard of, and nothing of a grant by it is known here",
                node.short()
            ),
        )
        .hint(format!(
            "ask its owner for one (vistara grant --to {}), and keep it here: vistara grant keep TOKEN",
            open.identity.id()
        ))
    }

    /// What was typed to join a node: a ticket, or the whole id of one that was heard of, or is in the local network. A beginning
    /// is not enough: anybody can make a key whose id begins as another's does.
    pub(crate) async fn ticket_of(self: &Arc<Self>, typed: &str) -> Answer<Ticket> {
        let typed = typed.trim();
        let heard = self.heard_of(typed);
        if heard.is_some_and(|node| node.to_string() != typed) {
            return Err(Fault::user(format!(
                "{typed:?} is the beginning of an id that was only heard of; joining takes the whole id, or a ticket"
            ))
            .hint("`vistara nodes --json` shows whole ids; compare it with what its owner says"));
        }
        if let Some(peer) = heard.and_then(|node| self.as_peer(&node)) {
            return Ok(Ticket {
                node: peer.id,
                addresses: peer.addresses,
                relays: peer.relays,
            });
        }
        match typed.parse() {
            Ok(node) => self.ticket_from_near(node).await,
            Err(_) => Ok(typed.parse()?),
        }
    }
}
