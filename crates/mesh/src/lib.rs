//! Nodes that speak with each other: identity, dialling by key, streams; and the tokens by which one lets another in.
//!
//! The only crate that names the p2p library (iroh) and the tokens' (biscuit). It moves bytes and proves who is at the
//! other end; **whether** a caller may do what it asks is decided elsewhere (`vistara-control`), and what is asked is HTTP
//! that this crate never looks into.
//!
//! - No packet goes to anybody but the addresses and relays that the user named or that a member of the joined network
//!   states, and, where the owner wants that, to the local network: no relays of anybody else's, no name services, no port
//!   mapping, no 0-RTT (whose first bytes could be replayed).
//! - What a peer sends is bounded, in size, number and time, before it is looked at ([`frame`]), and makes nothing panic.

pub mod card;
mod crowd;
pub mod facts;
mod files;
pub mod frame;
mod identity;
mod link;
mod nonces;
mod peers;
pub mod receipt;
mod relay;
pub mod service;
mod ticket;
mod token;
mod whereabouts;

pub use crowd::{Crowd, InCrowd};
pub use identity::{Identity, IdentityError};
pub use link::{
    Accepted, Heard, Link, LinkError, LinkOptions, MeshStream, PAGE_BYTES_MAX, PeerState, Way,
};
pub use nonces::{NonceError, Nonces, timely};
pub use peers::{Peer, Peers, PeersError};
pub use relay::{NoRelay, RELAYS_MAX, Relay, RelayCounts, RelayError, RelayOptions, RelayServer};
pub use ticket::{Ticket, TicketError};
pub use token::{Ambient, Authority, Narrowing, Token, TokenError, Verified};
pub use whereabouts::Whereabouts;
