//! What a node has sent for membership: how many packets of which kind, and what filled them.

use std::fmt;
use std::ops::AddAssign;
use vistara_control::membership::{Body, NEWS_BYTES, Packet};

/// The kinds of packets, in the order in which they are counted.
const KINDS: [&str; 7] = [
    "ping",
    "answer",
    "ping-for",
    "answer-for",
    "news",
    "pull",
    "page",
];

/// How many, and how large.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Packets.
    pub packets: u64,
    /// Bytes, of everything in them.
    pub bytes: u64,
    /// Pieces of news.
    pub news: u64,
    /// Facts.
    pub facts: u64,
    /// Bytes of facts.
    pub facts_bytes: u64,
}

impl AddAssign for Sent {
    fn add_assign(&mut self, other: Sent) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.news += other.news;
        self.facts += other.facts;
        self.facts_bytes += other.facts_bytes;
    }
}

/// Counts by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic([Sent; KINDS.len()]);

impl Traffic {
    /// One more packet was sent.
    pub(crate) fn count(&mut self, packet: &Packet) {
        let kind = match packet.body {
            Body::Ping { .. } => 0,
            Body::Ack { .. } => 1,
            Body::PingFor { .. } => 2,
            Body::AckFor { .. } => 3,
            Body::Gossip => 4,
            Body::Pull { .. } => 5,
            Body::Page { .. } => 6,
        };
        let bytes = packet.bytes() as u64;
        let news = packet.news.len() as u64;
        let head = vistara_control::membership::HEAD_BYTES as u64;
        self.0[kind] += Sent {
            packets: 1,
            bytes,
            news,
            facts: packet.facts.len() as u64,
            facts_bytes: bytes - head - news * NEWS_BYTES as u64,
        };
    }

    /// All of it.
    pub fn all(&self) -> Sent {
        let mut all = Sent::default();
        for one in self.0 {
            all += one;
        }
        all
    }
}

impl AddAssign<&Traffic> for Traffic {
    fn add_assign(&mut self, other: &Traffic) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}

/// Totals, one line for each kind.
impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, sent) in KINDS.iter().zip(self.0) {
            writeln!(
                f,
                "  {kind:<10} {:>11} packets {:>14} bytes, of these {:>12} pieces of news, {:>10} facts of {:>12} bytes",
                sent.packets, sent.bytes, sent.news, sent.facts, sent.facts_bytes
            )?;
        }
        Ok(())
    }
}
