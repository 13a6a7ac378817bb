//! Relays: hosts that forward packets between nodes that cannot reach each other. Anybody can run one ([`RelayServer`]).
//!
//! A relay *is* its key, as a node is: `KEY@ADDRESS:PORT` says whom to expect and where. It proves that key in the TLS
//! handshake (a raw public key; there are no certificates), and what it forwards is sealed between the nodes. A relay's
//! address is a number, never a name: nobody is asked where it is.
//!
//! The library knows relays by URLs. Ours hold all of it in a name that is nobody's (`….relay.invalid`), so that the
//! library's resolver and its check of certificates need nothing but the name: see [`trust`].

mod serve;
pub(crate) mod trust;

pub use serve::{RelayCounts, RelayError, RelayOptions, RelayServer};

use iroh::RelayUrl;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use vistara_model::NodeId;

/// Most relays of one node: a home and some to fall back to.
pub const RELAYS_MAX: usize = 4;

/// The end of each relay's name in URLs. Nothing under `invalid` exists in the names of the Internet (RFC 6761).
const NAME_END: &str = ".relay.invalid";

/// Why a text is not a relay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no relay: write it as KEY@ADDRESS:PORT, as `vistara relay` prints it")]
pub struct NoRelay(pub String);

/// A relay: its key, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Relay {
    /// Whom to expect there.
    pub key: NodeId,
    /// Where: one host, and a port that is the same for TCP and UDP.
    pub address: SocketAddr,
}

impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.key, self.address)
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Relay({}@{})", self.key.short(), self.address)
    }
}

impl FromStr for Relay {
    type Err = NoRelay;
    fn from_str(text: &str) -> Result<Relay, NoRelay> {
        let read = || {
            let (key, address) = text.trim().split_once('@')?;
            let address: SocketAddr = address.parse().ok()?;
            let good = address.port() != 0 && !address.ip().is_unspecified();
            good.then_some(Relay {
                key: key.parse().ok()?,
                address,
            })
        };
        read().ok_or_else(|| NoRelay(text.chars().take(160).collect()))
    }
}

impl TryFrom<String> for Relay {
    type Error = NoRelay;
    fn try_from(text: String) -> Result<Relay, NoRelay> {
        text.parse()
    }
}

impl From<Relay> for String {
    fn from(relay: Relay) -> String {
        relay.to_string()
    }
}

impl Relay {
    /// Its name in URLs: the key's digits in two halves (a part of a name has at most 63 letters), and the address's.
    fn name(&self) -> String {
        let key = self.key.to_string();
        let (one, two) = key.split_at(32);
        let address = match self.address.ip() {
            IpAddr::V4(ip) => format!("{:08x}", u32::from(ip)),
            IpAddr::V6(ip) => format!("{:032x}", u128::from(ip)),
        };
        format!("{one}.{two}.{address}{NAME_END}")
    }

    /// The key and the address that a name in a URL holds.
    fn of_name(name: &str) -> Option<(NodeId, IpAddr)> {
        let mut parts = name.strip_suffix(NAME_END)?.split('.');
        let (one, two, address) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || one.len() != 32 {
            return None;
        }
        let key = format!("{one}{two}").parse().ok()?;
        if !address.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let address = match address.len() {
            8 => IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?)),
            32 => IpAddr::V6(Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?)),
            _ => return None,
        };
        Some((key, address))
    }

    /// As the library knows it. Nothing only where the library's idea of a URL has changed.
    pub(crate) fn url(&self) -> Option<RelayUrl> {
        format!("https://{}:{}", self.name(), self.address.port())
            .parse()
            .ok()
    }

    /// The relay that the library knows by this URL; nothing where it is none of ours.
    pub(crate) fn of_url(url: &RelayUrl) -> Option<Relay> {
        let (key, ip) = Relay::of_name(url.host_str()?)?;
        let address = SocketAddr::new(ip, url.port_or_known_default()?);
        Some(Relay { key, address })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_is_read_as_it_is_written_also_in_the_librarys_form() {
        for address in ["192.0.2.1:443", "[2001:db8::7]:7443", "255.1.0.9:1"] {
            let relay = Relay {
                key: NodeId::from_bytes([0xa7; 32]),
                address: address.parse().unwrap(),
            };
            assert_eq!(relay.to_string().parse(), Ok(relay));
            assert_eq!(Relay::of_url(&relay.url().unwrap()), Some(relay));
        }
    }

    #[test]
    fn what_is_no_relay_is_told_apart() {
        let key = "07".repeat(32);
        for text in [
            "",
            &key,
            &format!("{key}@relay.example:443"),
            &format!("{key}@192.0.2.1"),
            &format!("{key}@192.0.2.1:0"),
            &format!("{key}@0.0.0.0:443"),
            "xy@192.0.2.1:443",
        ] {
            assert!(text.parse::<Relay>().is_err(), "{text}");
        }
        for name in [
            "relay.example",
            "a.b.c.relay.invalid",
            ".relay.invalid",
            &format!("{key}.c0000201.relay.invalid"),
            &format!("{}.{}.c00002011.relay.invalid", &key[..32], &key[32..]),
            &format!("{}.{}.+0000201.relay.invalid", &key[..32], &key[32..]),
            &format!("{}.{}.c0000201.x.relay.invalid", &key[..32], &key[32..]),
        ] {
            assert_eq!(Relay::of_name(name), None, "{name}");
        }
    }
}
