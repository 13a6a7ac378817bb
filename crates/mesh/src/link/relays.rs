//! Relays of this endpoint: those that the owner named; where there are none, those that tickets of joined nodes named.
//!
//! The library connects to one of them, the nearest, and stays connected; others reach this node through that one. A node
//! that is to be reached through another relay is dialled through it without that it becomes one of ours.

use super::{Inner, Link, lock};
use crate::relay::{RELAYS_MAX, Relay};
use crate::whereabouts::Whereabouts;
use iroh::endpoint::RelayStatus;
use iroh::{EndpointAddr, PublicKey, RelayConfig, RelayUrl, TransportAddr, Watcher};
use iroh_relay::RelayQuicConfig;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use vistara_model::NodeId;

/// By which way packets go to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Straight.
    Direct,
    /// Through a relay.
    Relayed,
}

/// What the link has for relays.
#[derive(Default)]
pub(super) struct Relays {
    /// Those that the owner named.
    own: Vec<Relay>,
    /// Those that the library knows. Held while that is changed.
    used: tokio::sync::Mutex<BTreeSet<Relay>>,
    /// Why the nearest one does not have this node.
    trouble: Mutex<Option<Trouble>>,
}

/// Why a relay does not have this node.
struct Trouble {
    relay: RelayUrl,
    why: String,
}

impl Relays {
    pub(super) fn new(own: Vec<Relay>) -> Relays {
        let own = own.into_iter().take(RELAYS_MAX).collect();
        Relays {
            own,
            used: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
        }
    }

    /// Takes in what became of the tries to connect.
    fn learn(&self, status: &[RelayStatus]) {
        let mut trouble = lock(&self.trouble);
        let still = |was: &Trouble| {
            let it = |status: &RelayStatus| *status.url() == was.relay && !status.is_connected();
            status.iter().any(it)
        };
        let new = status.iter().find_map(failure);
        *trouble = new.or_else(|| trouble.take().filter(still));
    }

    /// Whether the owner named it.
    pub(super) fn is_own(&self, relay: &Relay) -> bool {
        self.own.contains(relay)
    }
}

/// Where the library is to look for a node.
pub(super) fn endpoint_addr(key: PublicKey, whereabouts: &Whereabouts) -> EndpointAddr {
    let addresses = whereabouts.addresses.iter().copied().map(TransportAddr::Ip);
    let relays = whereabouts.relays.iter().filter_map(Relay::url);
    EndpointAddr::from_parts(key, addresses.chain(relays.map(TransportAddr::Relay)))
}

fn wanted(inner: &Inner) -> BTreeSet<Relay> {
    if !inner.relays.own.is_empty() {
        return inner.relays.own.iter().copied().collect();
    }
    let slots = lock(&inner.slots);
    let named = slots.values().flat_map(|slot| &slot.named.relays);
    // In an order that does not change while they do not.
    let named: BTreeSet<Relay> = named.copied().collect();
    named.into_iter().take(RELAYS_MAX).collect()
}

/// Has the library know the relays that are to be used, and no others.
pub(super) async fn settle(inner: Arc<Inner>) {
    let mut used = inner.relays.used.lock().await;
    let wanted = wanted(&inner);
    let urls = |relays: Vec<&Relay>| -> Vec<_> {
        let both = |relay: &Relay| Some((relay.address.port(), relay.url()?));
        relays.into_iter().filter_map(both).collect()
    };
    // New ones first: the library chooses another than one that goes only where there is another.
    for (port, url) in urls(wanted.difference(&used).collect()) {
        let quic = Some(RelayQuicConfig::new(port));
        let config = Arc::new(RelayConfig::new(url.clone(), quic));
        inner.endpoint.insert_relay(url, config).await;
    }
    for (_, url) in urls(used.difference(&wanted).collect()) {
        inner.endpoint.remove_relay(&url).await;
    }
    *used = wanted;
}

/// Keeps why the nearest relay does not have this node until it does: the library forgets it with each attempt that it makes.
pub(super) async fn heed(inner: Arc<Inner>) {
    let mut statuses = inner.endpoint.home_relay_status();
    let mut status = statuses.get();
    loop {
        inner.relays.learn(&status);
        let updated = inner.stop.run_until_cancelled(statuses.updated()).await;
        let Some(Ok(updated)) = updated else { return };
        status = updated;
    }
}

fn failure(status: &RelayStatus) -> Option<Trouble> {
    let denied = status.auth_denied_reason().map(str::to_owned);
    let why = denied.or_else(|| status.last_error().map(|error| format!("{error:#}")))?;
    Some(Trouble {
        relay: status.url().clone(),
        why,
    })
}

impl Link {
    pub(super) fn settle_relays(&self) {
        self.0.tasks.spawn(settle(Arc::clone(&self.0)));
    }

    /// Those that the owner named.
    pub fn named_relays(&self) -> &[Relay] {
        &self.0.relays.own
    }

    /// Why this node is not connected to a relay, where it has tried.
    pub fn relay_trouble(&self) -> Option<String> {
        let trouble = lock(&self.0.relays.trouble);
        trouble.as_ref().map(|trouble| trouble.why.clone())
    }

    /// Through which relays this node is to be reached: those that the owner named, or the one to which it is connected.
    pub fn relays(&self) -> Vec<Relay> {
        let own = &self.0.relays.own;
        if own.is_empty() {
            self.home().into_iter().collect()
        } else {
            own.clone()
        }
    }

    /// The relay by which others reach this node now: it is the nearest, and connected.
    pub fn home(&self) -> Option<Relay> {
        let status = self.0.endpoint.home_relay_status().get();
        let mut connected = status.iter().filter(|status| status.is_connected());
        connected.find_map(|status| Relay::of_url(status.url()))
    }

    /// Whether it stays connected to a relay that nobody wants any more: the library leaves one for another only, and it takes
    /// a new link to be rid of the last.
    pub fn keeps_unwanted_relay(&self) -> bool {
        wanted(&self.0).is_empty() && !self.0.endpoint.home_relay_status().get().is_empty()
    }

    /// By which way packets go to a node, while there is a connection.
    pub fn way(&self, node: &NodeId) -> Option<Way> {
        let line = self.0.packets.line(node)?;
        let paths = line.connection().paths();
        let selected = paths.iter().find(iroh::endpoint::Path::is_selected)?;
        Some(if selected.is_relay() {
            Way::Relayed
        } else {
            Way::Direct
        })
    }
}
