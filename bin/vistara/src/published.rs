//! Published ports as addresses that somebody can connect to.

use std::net::{IpAddr, SocketAddr};

/// A port of a host and the guest's port behind it; TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// Where to connect.
    pub(crate) host: SocketAddr,
    /// What answers there.
    pub(crate) guest_port: u16,
}

/// The addresses of a machine's ports (`127.0.0.1:8080->80/tcp`), in their order. Those of other protocols and those that do not
/// listen are left out.
pub(crate) fn addresses(ports: &[String]) -> Vec<Address> {
    ports
        .iter()
        .filter_map(|port| {
            let (host, guest) = port.split_once("->")?;
            Some(Address {
                host: host.parse().ok()?,
                guest_port: guest.strip_suffix("/tcp")?.parse().ok()?,
            })
        })
        .collect()
}

/// The address as somebody reaches it who came to us at `reached_at`: one that means all of this host's is the one that led here.
pub(crate) fn seen_from(address: SocketAddr, reached_at: Option<IpAddr>) -> SocketAddr {
    match (address.ip(), reached_at) {
        (IpAddr::V4(ip), Some(IpAddr::V4(at))) if ip.is_unspecified() => {
            SocketAddr::new(at.into(), address.port())
        }
        (IpAddr::V4(ip), _) if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::from([127, 0, 0, 1]), address.port())
        }
        _ => address,
    }
}

/// What to type into a browser: the first of the addresses.
pub(crate) fn url(addresses: &[Address], reached_at: Option<IpAddr>) -> Option<String> {
    let first = addresses.first()?;
    // What listens on 443 in a guest speaks TLS itself: nothing here ends it.
    let scheme = if first.guest_port == 443 {
        "https"
    } else {
        "http"
    };
    Some(format!("{scheme}://{}", seen_from(first.host, reached_at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_those_of_ports_that_answer() {
        let url_of = |ports: &[&str], at: Option<[u8; 4]>| {
            let ports: Vec<String> = ports.iter().map(|port| (*port).to_owned()).collect();
            url(&addresses(&ports), at.map(IpAddr::from))
        };
        for (ports, at, want) in [
            (
                vec!["127.0.0.1:8080->80/tcp"],
                None,
                Some("http://127.0.0.1:8080"),
            ),
            (
                vec!["127.0.0.1:8443->443/tcp"],
                None,
                Some("https://127.0.0.1:8443"),
            ),
            (
                vec!["0.0.0.0:81->80/tcp"],
                None,
                Some("http://127.0.0.1:81"),
            ),
            (
                vec!["0.0.0.0:81->80/tcp"],
                Some([192, 0, 2, 7]),
                Some("http://192.0.2.7:81"),
            ),
            (
                vec!["10.0.0.1:81->80/tcp"],
                Some([192, 0, 2, 7]),
                Some("http://10.0.0.1:81"),
            ),
            (
                vec!["127.0.0.1:53->53/udp", "127.0.0.1:1->2/tcp"],
                None,
                Some("http://127.0.0.1:1"),
            ),
            (vec!["127.0.0.1:1->2/tcp (the port is taken)"], None, None),
            (vec![], None, None),
        ] {
            assert_eq!(url_of(&ports, at).as_deref(), want, "{ports:?}");
        }
    }
}
