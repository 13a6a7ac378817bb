//! What goes from one node to another.

use super::{FACTS_HEAD_BYTES, HEAD_BYTES, Life, NEWS_BYTES, Told};
use std::sync::Arc;
use vistara_model::NodeId;

/// One piece of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct News {
    /// About whom.
    pub node: NodeId,
    /// Which of its lives and denials: only the node itself makes it larger.
    pub incarnation: u64,
    /// What is said.
    pub life: Life,
}

impl News {
    /// Whether this replaces the other, both about one node.
    pub(super) fn outweighs(&self, other: &News) -> bool {
        (self.incarnation, self.life) > (other.incarnation, other.life)
    }
}

/// What a node states about itself, signed by it; opaque here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stated {
    /// Who.
    pub node: NodeId,
    /// Grows with each statement. It stands within what is signed, and the caller has compared them.
    pub version: u64,
    /// What, with its signature.
    pub bytes: Arc<[u8]>,
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Answer this. Says which version of the receiver's facts the sender has.
    Ping {
        /// Comes back in the answer.
        number: u64,
        /// The newest version of the receiver's facts that the sender has.
        version: u64,
    },
    /// An answer.
    Ack {
        /// The ping's number.
        number: u64,
    },
    /// Ping this one in my stead.
    PingFor {
        /// Comes back in the answer.
        number: u64,
        /// Whom.
        target: NodeId,
    },
    /// It answered you.
    AckFor {
        /// The number of the `PingFor`.
        number: u64,
        /// Who answered.
        target: NodeId,
    },
    /// News only.
    Gossip,
    /// Send a page of your table, from here on.
    Pull {
        /// Comes back with the page.
        number: u64,
        /// A place in the table: a number that only its owner understands.
        from: u64,
    },
    /// A page.
    Page {
        /// The number of the `Pull`.
        number: u64,
        /// Where the next one begins, if there is one.
        next: Option<u64>,
    },
}

/// What goes from one node to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it is for.
    pub body: Body,
    /// What happened to others, and first of all to the sender.
    pub news: Vec<Told>,
    /// What others state.
    pub facts: Vec<Stated>,
}

impl Packet {
    /// Bytes on the wire, at most.
    pub fn bytes(&self) -> usize {
        let facts = self
            .facts
            .iter()
            .map(|one| one.bytes.len() + FACTS_HEAD_BYTES);
        HEAD_BYTES + self.news.len() * NEWS_BYTES + facts.sum::<usize>()
    }
}
