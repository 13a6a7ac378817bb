//! `vistara relay`: forwarding between nodes that cannot reach each other. It needs no node on this host.

use crate::failure::{Failure, eprint_line};
use crate::output::print;
use crate::places::Places;
use clap::Args;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use vistara_model::{Bytes, NodeId};
use vistara_node::{RelayFault, RelayPlan};

/// Least that one node may send a second: below it, connections would not hold.
const RATE_MIN: u32 = 64 << 10;

/// `relay`.
#[derive(Debug, Args)]
pub(crate) struct RelayCommand {
    /// Where, TCP and UDP; port 0 takes any
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7443")]
    listen: SocketAddr,
    /// Under which address nodes reach it, where that is none of this host's own; may be given several times
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = named)]
    address: Vec<SocketAddr>,
    /// Serve these nodes only, by their keys (`vistara id`); may be given several times
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    allow: Vec<NodeId>,
    /// Most nodes at a time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=16384))]
    max_nodes: u32,
    /// What one node may send a second
    #[arg(long, value_name = "SIZE", default_value = "8m", value_parser = rate)]
    rate: NonZeroU32,
}

fn named(text: &str) -> Result<SocketAddr, String> {
    let read = text.parse::<SocketAddr>().ok();
    let read = read.or_else(|| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0)));
    read.filter(|address| !address.ip().is_unspecified())
        .ok_or_else(|| {
            "write an address such as 192.0.2.1, 192.0.2.1:7443 or [2001:db8::1]:7443".to_owned()
        })
}

fn rate(text: &str) -> Result<NonZeroU32, String> {
    let bytes: Bytes = text.parse().map_err(|error| format!("{error}"))?;
    let bytes = u32::try_from(bytes.0)
        .ok()
        .filter(|bytes| *bytes >= RATE_MIN);
    bytes
        .and_then(NonZeroU32::new)
        .ok_or_else(|| "it is at least 64k and less than 4g".to_owned())
}

/// Relays until it is told to leave.
pub(crate) fn relay(options: RelayCommand, places: &Places) -> Result<u8, Failure> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env(crate::environment::LOG).unwrap_or_else(
                // What strangers can bring about is the library's to complain of, and nobody's to read.
                |_| tracing_subscriber::EnvFilter::new("info,iroh_relay=off"),
            ),
        )
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    places.prepare()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start the relay's threads", error))?;
    let plan = RelayPlan {
        dir: places.state_dir.join("relay"),
        listen: options.listen,
        named: options.address,
        allow: options.allow.into_iter().collect(),
        nodes_max: options.max_nodes as usize,
        rate_bytes_per_s: options.rate,
    };
    let whom = match plan.allow.len() {
        0 => "anybody".to_owned(),
        1 => "one node".to_owned(),
        count => format!("{count} nodes"),
    };
    let (most, rate) = (plan.nodes_max, Bytes(plan.rate_bytes_per_s.get().into()));
    let began = |relays: Vec<String>| {
        let lines: String = relays.iter().map(|relay| format!("{relay}\n")).collect();
        // Whoever reads it may have gone; the relay goes on.
        let _ = print(&lines);
        eprint_line(&format!(
            "serves {whom}: at most {most} nodes at a time, {rate} a second from each; what it forwards is sealed between them"
        ));
        match relays.first() {
            Some(relay) => eprint_line(&format!(
                "hint: on the nodes: vistara node terms --relay {relay}"
            )),
            None => eprint_line(
                "hint: this host has no address; say under which nodes reach it: --address ADDRESS",
            ),
        }
    };
    let ran = runtime.block_on(vistara_node::run_relay(plan, began));
    runtime.shutdown_background();
    ran.map(|()| 0).map_err(|fault| {
        let hint = match &fault {
            RelayFault::Begin(_) => Some("choose another port: --listen 0.0.0.0:PORT"),
            RelayFault::Taken(_) => Some("stop it first, or give another --state-dir"),
            RelayFault::Io { .. } | RelayFault::Key(_) => None,
        };
        let failure = Failure::new(format!("{:#}", anyhow::Error::from(fault)));
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_rates_are_taken_as_they_are_meant() {
        assert_eq!(named("192.0.2.1"), Ok("192.0.2.1:0".parse().unwrap()));
        assert_eq!(
            named("[2001:db8::1]:9"),
            Ok("[2001:db8::1]:9".parse().unwrap())
        );
        assert!(named("0.0.0.0").is_err() && named("relay.example").is_err());
        assert_eq!(rate("1m").unwrap().get(), 1 << 20);
        assert!(rate("1k").is_err() && rate("4g").is_err() && rate("fast").is_err());
    }
}
