//! A ticket: a node's key and where it may be reached, in a form to be copied by hand:
//! `ID@ADDRESS:PORT[,ADDRESS:PORT…][,relay:KEY@ADDRESS:PORT…]`. It gives no right; it only says where to knock, and who must
//! open.

use crate::relay::{RELAYS_MAX, Relay};
use crate::whereabouts::Whereabouts;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use vistara_model::{AuthorityError, NodeId};

/// Most addresses of one node: hosts have several interfaces, not dozens that matter.
pub(crate) const ADDRESSES_MAX: usize = 16;

/// Why a text is not a ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It has no `@`.
    #[error("a ticket is ID@ADDRESS:PORT, as `vistara node ticket` prints it")]
    Form,
    /// The id is none.
    #[error("the ticket's id is wrong")]
    Id(#[from] AuthorityError),
    /// An address is none.
    #[error("{0:?} in the ticket is no address: write it as 192.0.2.1:4433 or [2001:db8::1]:4433")]
    Address(String),
    /// A relay is none.
    #[error("{0:?} in the ticket is no relay: write it as relay:KEY@192.0.2.1:7443")]
    Relay(String),
    /// Too many addresses.
    #[error("a ticket has at most {ADDRESSES_MAX} addresses and {RELAYS_MAX} relays")]
    TooMany,
}

/// What stands before a relay.
const RELAY: &str = "relay:";

/// A node and where it may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Whom to expect there.
    pub node: NodeId,
    /// Where: at most 16.
    pub addresses: Vec<SocketAddr>,
    /// Through which relays: at most 4. There is an address or a relay.
    pub relays: Vec<Relay>,
}

impl Ticket {
    /// Where the node may be reached.
    pub fn whereabouts(&self) -> Whereabouts {
        Whereabouts {
            addresses: self.addresses.clone(),
            relays: self.relays.clone(),
        }
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.node)?;
        let mut comma = "";
        for address in &self.addresses {
            write!(f, "{comma}{address}")?;
            comma = ",";
        }
        for relay in &self.relays {
            write!(f, "{comma}{RELAY}{relay}")?;
            comma = ",";
        }
        Ok(())
    }
}

impl FromStr for Ticket {
    type Err = TicketError;
    fn from_str(text: &str) -> Result<Ticket, TicketError> {
        let (node, rest) = text.trim().split_once('@').ok_or(TicketError::Form)?;
        let node = node.parse()?;
        let (mut addresses, mut relays) = (Vec::new(), Vec::new());
        for word in rest.split(',') {
            if let Some(relay) = word.strip_prefix(RELAY) {
                if relays.len() == RELAYS_MAX {
                    return Err(TicketError::TooMany);
                }
                let read = relay.parse();
                relays
                    .push(read.map_err(|_| TicketError::Relay(word.chars().take(160).collect()))?);
                continue;
            }
            if addresses.len() == ADDRESSES_MAX {
                return Err(TicketError::TooMany);
            }
            let address: SocketAddr = word
                .parse()
                .ok()
                .filter(|address: &SocketAddr| {
                    address.port() != 0 && !address.ip().is_unspecified()
                })
                .ok_or_else(|| TicketError::Address(word.chars().take(64).collect()))?;
            addresses.push(address);
        }
        Ok(Ticket {
            node,
            addresses,
            relays,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_read_as_it_is_written() {
        let mut ticket = Ticket {
            node: NodeId::from_bytes([7; 32]),
            addresses: vec![
                "127.0.0.1:1".parse().unwrap(),
                "[::1]:65535".parse().unwrap(),
            ],
            relays: Vec::new(),
        };
        assert_eq!(ticket.to_string().parse(), Ok(ticket.clone()));
        let relay = |address: &str| Relay {
            key: NodeId::from_bytes([8; 32]),
            address: address.parse().unwrap(),
        };
        ticket.relays = vec![relay("192.0.2.1:7443"), relay("[2001:db8::1]:1")];
        assert_eq!(ticket.to_string().parse(), Ok(ticket.clone()));
        ticket.addresses.clear();
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
    }

    #[test]
    fn what_is_no_ticket_is_told_apart() {
        let id = "07".repeat(32);
        let many = vec!["127.0.0.1:1"; ADDRESSES_MAX + 1].join(",");
        for (text, error) in [
            ("", TicketError::Form),
            (&format!("{id}@"), TicketError::Address(String::new())),
            (&format!("{id}@h:1"), TicketError::Address("h:1".into())),
            (
                &format!("{id}@0.0.0.0:1"),
                TicketError::Address("0.0.0.0:1".into()),
            ),
            (&format!("{id}@{many}"), TicketError::TooMany),
            (
                &format!(
                    "{id}@{}",
                    vec![format!("relay:{id}@127.0.0.1:1"); RELAYS_MAX + 1].join(",")
                ),
                TicketError::TooMany,
            ),
            (
                &format!("{id}@127.0.0.1:1,relay:127.0.0.1:1"),
                TicketError::Relay("relay:127.0.0.1:1".into()),
            ),
        ] {
            assert_eq!(text.parse::<Ticket>(), Err(error), "{text}");
        }
        assert!(matches!(
            "x@127.0.0.1:1".parse::<Ticket>(),
            Err(TicketError::Id(_))
        ));
    }
}
