//! What is looked after now and then: those that this node has to know, those that are dead for long, and the file of members.

use super::{
    CHECKS_BURST, CHECKS_PER_S, DEAD_MAX, Gossip, Known, LEFT_MAX, SENDERS_MAX, State, WRITE_EVERY,
    write,
};
use crate::mesh::lock;
use std::time::{Duration, Instant};
use vistara_mesh::Whereabouts;
use vistara_model::NodeId;

impl Gossip {
    pub(super) fn forgotten(&self, state: &mut State, node: NodeId) {
        state.known.remove(&node);
        state.dead.remove(&node);
        self.link.know(node, Whereabouts::default());
    }

    pub(super) fn tick(&self) {
        let joined: Vec<NodeId> = (lock(&self.open.peers).all().iter())
            .map(|peer| peer.id)
            .collect();
        for node in joined {
            // However it came into the table: the user named it.
            let met = lock(&self.state).machine.pin(node, true);
            let met = met || lock(&self.state).machine.life(node).is_some();
            if !met && self.link.is_connected(&node) {
                self.greet(node);
            }
        }
        // Of a network that is larger than the table, who looks after a service with this node may be no member yet.
        let partners: Vec<NodeId> = lock(&self.open.partners).iter().copied().collect();
        for node in partners {
            let met = lock(&self.state).machine.life(node).is_some();
            if !met && self.link.is_connected(&node) {
                self.greet(node);
            }
        }
        let mut state = lock(&self.state);
        let leaves = |state: &State, node| {
            let known = state.known.get(node);
            known.is_some_and(|known: &Known| known.card.leaves)
        };
        let over: Vec<NodeId> = (state.dead.iter())
            .filter(|(node, since)| {
                let most = if leaves(&state, node) {
                    LEFT_MAX
                } else {
                    DEAD_MAX
                };
                since.elapsed() >= most
            })
            .map(|(node, _)| *node)
            .collect();
        for node in over {
            if state.machine.forget(node) {
                self.forgotten(&mut state, node);
            }
        }
        if state.checks.len() > SENDERS_MAX {
            // Who has said nothing for so long has its whole budget again.
            let whole = Duration::from_secs_f64(CHECKS_BURST / CHECKS_PER_S);
            state.checks.retain(|_, budget| budget.at.elapsed() < whole);
        }
        if state.written.elapsed() >= WRITE_EVERY {
            state.written = Instant::now();
            let (path, cards) = (self.memory.clone(), state.to_remember());
            drop(state);
            tokio::task::spawn_blocking(move || write(&path, &cards));
        }
    }
}
