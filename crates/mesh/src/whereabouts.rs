//! Where a node may be reached: addresses at which it can be dialled, and relays that lead to it.

use crate::relay::Relay;
use std::net::SocketAddr;

/// Where a node may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Whereabouts {
    /// Where it may be dialled.
    pub addresses: Vec<SocketAddr>,
    /// Through which relays.
    pub relays: Vec<Relay>,
}

impl Whereabouts {
    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.relays.is_empty()
    }
}

impl From<Vec<SocketAddr>> for Whereabouts {
    fn from(addresses: Vec<SocketAddr>) -> Whereabouts {
        Whereabouts {
            addresses,
            relays: Vec::new(),
        }
    }
}
