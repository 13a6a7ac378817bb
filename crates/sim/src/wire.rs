//! What nodes of the simulation send each other, and how they are numbered.

use std::sync::Arc;
use std::time::Duration;
use vistara_control::membership::Packet;
use vistara_control::placement::{Candidate, Offer, RequestId, Seen};
use vistara_control::services::{FromKeeper, Keepers, Slot, Spec, ToKeeper};
use vistara_model::{
    Architecture, Bytes, Generation, Hypervisor, NodeFacts, NodeId, OwnerTerms, Stock,
};

/// Guest memory of each machine.
pub(crate) const MACHINE: Bytes = Bytes::gib(1);

/// What one node sends another.
#[derive(Debug, Clone)]
pub(crate) enum Wire {
    /// Membership.
    Member(Packet),
    /// Offer me room for a machine.
    Ask(RequestId),
    /// Here is some.
    Offered(Offer),
    /// No.
    Refused(RequestId, String),
    /// I take it.
    Take(RequestId),
    /// It is yours.
    Taken(RequestId),
    /// I do not want it.
    Release(RequestId),
    /// Hold this slot in the room that I took.
    Run {
        /// The room.
        request: RequestId,
        /// What.
        spec: Spec,
        /// Which copy.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
        /// Who grants it.
        keepers: Keepers,
    },
    /// The slot was not to be had.
    NotRun(Slot, Generation),
    /// To a keeper.
    ToKeeper(ToKeeper),
    /// From one.
    FromKeeper(FromKeeper),
}

/// The id of the node with this number.
pub(crate) fn id(number: usize) -> NodeId {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    NodeId::from_bytes(bytes)
}

/// The number of a node.
pub(crate) fn number(id: NodeId) -> usize {
    let mut head = [0; 8];
    head.copy_from_slice(&id.as_bytes()[..8]);
    u64::from_be_bytes(head) as usize
}

/// Bytes of signed facts, as they are in reality: the simulation's own are shorter.
const FACTS_BYTES: usize = 300;

/// What a node states, as bytes.
pub(crate) fn facts(free: Stock) -> Arc<[u8]> {
    let mut bytes = vec![0; FACTS_BYTES];
    bytes[..8].copy_from_slice(&free.memory.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&free.machines.to_le_bytes());
    bytes.into()
}

/// A node as whoever has its facts sees it.
pub(crate) fn candidate(
    node: NodeId,
    capacity: Stock,
    bytes: &[u8],
    rtt: Duration,
    doubtful: bool,
) -> Candidate {
    let word = |range: std::ops::Range<usize>| {
        let mut word = [0; 8];
        word[..range.len()].copy_from_slice(&bytes[range]);
        u64::from_le_bytes(word)
    };
    let free = Stock {
        memory: Bytes(word(0..8)),
        machines: word(8..12) as u32,
    };
    Candidate {
        facts: NodeFacts {
            node,
            version: 0,
            arch: Architecture("amd64".to_owned()),
            cpus: 8,
            capacity,
            free,
            queue_depth: 0,
            hypervisors: [Hypervisor::Qemu].into(),
            kvm: false,
            images: Default::default(),
            templates: Default::default(),
            ready_ms: None,
            region: None,
            price_micros: 1,
            labels: Default::default(),
            terms: OwnerTerms::default(),
        },
        seen: Seen {
            granted: true,
            doubtful,
            rtt: Some(rtt),
            ..Seen::default()
        },
    }
}
