//! What members of a network say of themselves to all of it: their facts, where they may be reached, and whether they take
//! leave. Signed as [facts](crate::facts) are, in words of its own.
//!
//! A card is short enough to ride along in a datagram: where there is more to tell, images are left out, and labels last.
//!
//! There are two forms. The first has no relay. The second is the first with a relay behind it, signed in words of its own;
//! who knows the first alone throws it away, as anything that it does not know.

use crate::facts::{self, StatementError};
use crate::identity::Identity;
use crate::relay::Relay;
use crate::whereabouts::Whereabouts;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use vistara_model::{NodeFacts, NodeId};

const CONTEXT: &[u8] = b"vistara 2026-11 card of a member\0";
const CONTEXT_RELAYED: &[u8] = b"vistara 2026-12 card of a member behind a relay\0";
/// Longest card. What passes cards on takes no longer ones.
pub const CARD_BYTES_MAX: usize = 640;
/// Most addresses on a card: each may cost every member a dial.
pub const CARD_ADDRESSES_MAX: usize = 4;

/// What a member says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Who, which version, and what there is.
    pub facts: NodeFacts,
    /// Where it may be dialled: at most [`CARD_ADDRESSES_MAX`].
    pub addresses: Vec<SocketAddr>,
    /// The relay to which it is connected, if it uses any.
    pub relay: Option<Relay>,
    /// It takes leave, and is not to be dialled any more.
    pub leaves: bool,
}

/// What both forms begin with.
#[derive(Serialize, Deserialize)]
struct Front {
    facts: NodeFacts,
    addresses: Vec<SocketAddr>,
    leaves: bool,
}

/// What the second form ends with: the relay's key and address.
type Back = ([u8; 32], SocketAddr);

/// Whether somebody else's address may be dialled: one of a single host, where that is told apart by the address alone.
/// Loopback is this very host, and counts only among nodes that listen nowhere else. An IPv4 address in IPv6 clothes is what it
/// is dialled as.
pub(crate) fn is_dialled(address: &SocketAddr, loopback: bool) -> bool {
    let ip = address.ip().to_canonical();
    let single = match ip {
        // "This network" and what is reserved, broadcast among it, are nobody's.
        IpAddr::V4(ip) => {
            let first = ip.octets()[0];
            !(first == 0 || first >= 240 || ip.is_multicast() || ip.is_link_local())
        }
        // Without the interface, a link-local address says nothing.
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_multicast() || ip.is_unicast_link_local()),
    };
    address.port() != 0 && single && ip.is_loopback() == loopback
}

impl Card {
    /// Signs it. Images, templates and then labels are left out until it is short enough.
    ///
    /// # Errors
    /// [`StatementError`] where the facts are another node's, or are too many.
    pub fn sign(&self, identity: &Identity) -> Result<Vec<u8>, StatementError> {
        if self.facts.node != identity.id() {
            return Err(StatementError::Signature);
        }
        self.facts.check()?;
        let mut front = Front {
            facts: self.facts.clone(),
            addresses: self.addresses.clone(),
            leaves: self.leaves,
        };
        front.addresses.truncate(CARD_ADDRESSES_MAX);
        let back: Option<Back> = (self.relay).map(|relay| (*relay.key.as_bytes(), relay.address));
        let context = back.map_or(CONTEXT, |_| CONTEXT_RELAYED);
        let back = back.map(|back| postcard::to_stdvec(&back)).transpose();
        let back = back
            .map_err(|_| StatementError::Malformed)?
            .unwrap_or_default();
        loop {
            let mut body = postcard::to_stdvec(&front).map_err(|_| StatementError::Malformed)?;
            body.extend_from_slice(&back);
            let bytes = facts::seal(identity, context, &body);
            if bytes.len() <= CARD_BYTES_MAX {
                return Ok(bytes);
            }
            let facts = &mut front.facts;
            let less = facts.templates.pop_last().is_some()
                || facts.images.pop_last().is_some()
                || facts.labels.pop_last().is_some();
            if !less {
                return Err(StatementError::Length(bytes.len()));
            }
        }
    }

    /// Reads a card, whoever it came from.
    ///
    /// # Errors
    /// [`StatementError`].
    pub fn read(bytes: &[u8]) -> Result<Card, StatementError> {
        if bytes.len() > CARD_BYTES_MAX {
            return Err(StatementError::Length(bytes.len()));
        }
        let (signature, body) = facts::split(bytes)?;
        let malformed = |_| StatementError::Malformed;
        let (front, rest): (Front, &[u8]) = postcard::take_from_bytes(body).map_err(malformed)?;
        let (context, relay) = if rest.is_empty() {
            (CONTEXT, None)
        } else {
            let ((key, address), rest): (Back, &[u8]) =
                postcard::take_from_bytes(rest).map_err(malformed)?;
            if !rest.is_empty() {
                return Err(StatementError::Malformed);
            }
            let key = NodeId::from_bytes(key);
            (CONTEXT_RELAYED, Some(Relay { key, address }))
        };
        if front.addresses.len() > CARD_ADDRESSES_MAX {
            return Err(StatementError::Malformed);
        }
        facts::verify(&front.facts.node, context, (signature, body))?;
        front.facts.check()?;
        Ok(Card {
            facts: front.facts,
            addresses: front.addresses,
            relay,
            leaves: front.leaves,
        })
    }

    /// Where it may be reached: nowhere where it takes leave.
    pub fn whereabouts(&self) -> Whereabouts {
        if self.leaves {
            return Whereabouts::default();
        }
        Whereabouts {
            addresses: self.addresses.clone(),
            relays: self.relay.into_iter().collect(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_read_as_it_was_signed_and_what_does_not_fit_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let address: SocketAddr = "[2001:db8::1]:65535".parse().unwrap();
        let most = Card {
            facts: facts::tests::facts(identity.id()),
            addresses: vec![address; 9],
            relay: None,
            leaves: true,
        };
        let bytes = most.sign(&identity).unwrap();
        assert!(bytes.len() <= CARD_BYTES_MAX);
        let read = Card::read(&bytes).unwrap();
        assert_eq!(read.addresses.len(), CARD_ADDRESSES_MAX);
        assert!(read.leaves && read.facts.templates.is_empty());
        assert_eq!(read.facts.region, most.facts.region);
        let mut small = most.clone();
        small.addresses.truncate(1);
        small.facts.templates.clear();
        small.facts.labels.clear();
        let read = Card::read(&small.sign(&identity).unwrap()).unwrap();
        assert_eq!(read, small);
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            assert!(Card::read(&changed).is_err(), "{place}");
            assert!(Card::read(&bytes[..place]).is_err(), "{place}");
        }
    }

    #[test]
    fn a_card_with_a_relay_is_as_short_and_as_well_signed() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let relay = Relay {
            key: NodeId::from_bytes([9; 32]),
            address: "[2001:db8::7]:65535".parse().unwrap(),
        };
        let most = Card {
            facts: facts::tests::facts(identity.id()),
            addresses: vec!["[2001:db8::1]:65535".parse().unwrap(); CARD_ADDRESSES_MAX],
            relay: Some(relay),
            leaves: false,
        };
        let bytes = most.sign(&identity).unwrap();
        assert!(bytes.len() <= CARD_BYTES_MAX);
        let read = Card::read(&bytes).unwrap();
        assert_eq!((read.relay, read.addresses.len()), (Some(relay), 4));
        assert_eq!(read.whereabouts().relays, [relay]);
        let left = Card {
            leaves: true,
            ..read
        };
        assert!(left.whereabouts().is_empty());
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            assert!(Card::read(&changed).is_err(), "{place}");
            // Without its relay it is no card, either.
            assert!(Card::read(&bytes[..place]).is_err(), "{place}");
        }
        let more = [&bytes[..], &[0]].concat();
        assert!(Card::read(&more).is_err());
    }

    #[test]
    fn a_card_is_nobody_elses_and_no_statement_of_facts() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, other] = [0, 1].map(|index: usize| Identity::open(dirs[index].path()).unwrap());
        let card = Card {
            facts: facts::tests::facts(one.id()),
            addresses: Vec::new(),
            relay: None,
            leaves: false,
        };
        assert_eq!(card.sign(&other), Err(StatementError::Signature));
        let statement = facts::state(&one, &card.facts).unwrap();
        assert!(Card::read(&statement).is_err());
        assert!(facts::read(&card.sign(&one).unwrap()).is_err());
    }

    #[test]
    fn only_addresses_of_single_hosts_are_dialled_and_loopback_only_from_loopback() {
        for (text, outside, inside) in [
            ("192.0.2.1:4", true, false),
            ("10.0.0.1:4", true, false),
            ("127.0.0.1:4", false, true),
            ("[::1]:4", false, true),
            ("192.0.2.1:0", false, false),
            ("0.0.0.0:4", false, false),
            ("224.0.0.1:4", false, false),
            ("255.255.255.255:4", false, false),
            ("169.254.169.254:4", false, false),
            ("[fe80::1]:4", false, false),
            ("[ff02::1]:4", false, false),
            ("[2001:db8::1]:4", true, false),
            ("0.1.2.3:4", false, false),
            ("240.0.0.1:4", false, false),
            ("[::ffff:192.0.2.1]:4", true, false),
            ("[::ffff:127.0.0.1]:4", false, true),
            ("[::ffff:169.254.169.254]:4", false, false),
            ("[::ffff:224.0.0.1]:4", false, false),
            ("[::ffff:255.255.255.255]:4", false, false),
        ] {
            let address = text.parse().unwrap();
            let both = (is_dialled(&address, false), is_dialled(&address, true));
            assert_eq!(both, (outside, inside), "{text}");
        }
    }
}
