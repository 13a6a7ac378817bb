//! The bodies of requests and answers about other nodes: who this node is, which it has joined, and what it has granted.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The header by which a client asks that its connection becomes a stream to another node
/// (`GET /v1/nodes/{node}/stream` with `Connection: upgrade`). What follows the answer 101 is HTTP/1.1 with that node.
pub const NODE_STREAM: &str = "vistara-node-stream";

/// `GET /v1/mesh`: this node among others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeshStatus {
    /// Its id: its public key, 64 hexadecimal digits.
    pub id: String,
    /// How many times it has started with this key.
    pub generation: u64,
    /// Whether it listens for others and keeps those connected that it has joined.
    pub on: bool,
    /// Where it may be reached, as far as its host knows.
    pub addresses: Vec<String>,
    /// What others type to join it; absent while it does not listen.
    pub ticket: Option<String>,
    /// Relays through which it may be reached: those that its owner named, else the one of a ticket to which it is connected.
    #[serde(default)]
    pub relays: Vec<String>,
    /// The relay to which it is connected now.
    #[serde(default)]
    pub relay: Option<String>,
    /// Why it is connected to none, where it has tried.
    #[serde(default)]
    pub relay_trouble: Option<String>,
    /// Whether it tells the local network where it is.
    #[serde(default)]
    pub local_discovery: bool,
}

/// `GET /v1/status`: the node on one page. Nothing is made by asking, a key least of all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// What runs.
    #[serde(flatten)]
    pub version: crate::types::Version,
    /// Machines that have ended and are kept.
    pub machines_ended: u64,
    /// This node among others; nothing where it has no key yet.
    pub mesh: Option<MeshStatus>,
    /// Nodes that were joined.
    pub joined: u64,
    /// Of those, how many are connected.
    pub connected: u64,
    /// Of those, to how many packets go through a relay.
    pub relayed: u64,
    /// The network's members by what is believed of them: `alive`, `suspect`, `dead`, `left`. Nothing where the node takes no part.
    pub members: std::collections::BTreeMap<String, u64>,
    /// Grants that it has given and that count.
    pub grants_live: u64,
    /// What its owner has it say.
    pub terms: crate::types::NodeTerms,
}

/// `POST /v1/mesh`: listen for others.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ListenRequest {
    /// `ADDRESS:PORT`; port 0 takes any, once. All interfaces and any port where absent and never said before.
    pub listen: Option<String>,
}

/// `POST /v1/nodes`: join a node, or say more of one that was joined.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JoinRequest {
    /// `ID@ADDRESS:PORT[,ADDRESS:PORT…][,relay:KEY@ADDRESS:PORT…]`; or the id alone of a node that was heard of, or is in the local
    /// network.
    pub ticket: String,
    /// What to call it here.
    pub name: Option<String>,
    /// The token by which it lets this node in.
    pub grant: Option<String>,
}

/// A node that was joined, or that this one has heard of in the network that it has joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerNode {
    /// Its id.
    pub id: String,
    /// What it is called here.
    pub name: Option<String>,
    /// Where it is dialled.
    pub addresses: Vec<String>,
    /// How it stands between this node and that one: `connected`, `connecting` or `away`; `idle` where it was only heard of and
    /// nothing is being said.
    pub state: String,
    /// What the network believes of it: `alive`, `suspect`, `dead`, or `left` where it said goodbye; nothing where it takes no
    /// part, or this node does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<String>,
    /// By which way packets go to it, while there is a connection: `direct`, or `relayed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// Through which relays it is reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relays: Vec<String>,
    /// How it is known: `joined`, or `heard`; `near` where it is neither, and speaks in the local network.
    #[serde(default)]
    pub known: String,
    /// Which of its starts this is, while it is connected.
    pub generation: Option<u64>,
    /// Why it is away.
    pub reason: Option<String>,
    /// What this node has been granted there, as the token says; that node may have revoked it.
    pub grant: Option<Grant>,
    /// What it states about itself: to the network while it lives there, or to this node within the last half minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<crate::types::StatedFacts>,
}

/// `POST /v1/grants`: let somebody in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrantRequest {
    /// To whom: a node's id.
    pub to: String,
    /// For what: `run`, `network`, `images`, `admin`.
    pub rights: Vec<String>,
    /// Until when, in RFC 3339.
    pub until: String,
    /// Guest memory of all its machines together, such as `"4g"`; no limit where absent.
    pub memory: Option<String>,
    /// Machines at a time; no limit where absent.
    pub machines: Option<u64>,
    /// Bytes of images' layers brought in under it, such as `"10g"`; no limit where absent.
    pub disk: Option<String>,
}

/// A grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Grant {
    /// 16 hexadecimal digits.
    pub id: String,
    /// The node on which it counts.
    pub node: String,
    /// Whom it was given to.
    pub holder: String,
    /// For what.
    pub rights: Vec<String>,
    /// Until when.
    pub until: String,
    /// Limit of guest memory in bytes.
    pub memory_max_bytes: Option<u64>,
    /// Limit of machines, ended ones that are kept included.
    pub machines_max: Option<u64>,
    /// Limit of images' layers brought in under it, in bytes.
    #[serde(default)]
    pub disk_max_bytes: Option<u64>,
    /// `live`, `expired` or `revoked`.
    pub state: String,
    /// Guest memory in use under it, where this node gave it.
    pub memory_used_bytes: Option<u64>,
    /// Machines under it, ended ones that are kept included, where this node gave it.
    pub machines_used: Option<u64>,
    /// Bytes of images' layers that were brought in under it and are there, where this node gave it.
    #[serde(default)]
    pub disk_used_bytes: Option<u64>,
}

/// The answer to `POST /v1/grants`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GivenGrant {
    /// What was given.
    pub grant: Grant,
    /// What its holder shows. It is no secret: it counts for its holder's key only.
    pub token: String,
}

/// `POST /v1/grants/keep`: remember a token that another node gave to this one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KeepGrantRequest {
    /// The token.
    pub token: String,
}

/// `POST /v1/grants/narrow`: a token that allows less. No other node is asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NarrowRequest {
    /// The token.
    pub token: String,
    /// For these only.
    pub rights: Option<Vec<String>>,
    /// Not after this, in RFC 3339.
    pub until: Option<String>,
    /// At most this much guest memory.
    pub memory: Option<String>,
    /// At most so many machines.
    pub machines: Option<u64>,
    /// At most so many bytes of images.
    pub disk: Option<String>,
    /// For this node instead of its holder, which must be the node that is asked.
    pub to: Option<String>,
}

/// The answer to `POST /v1/grants/narrow`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NarrowedGrant {
    /// The narrower token.
    pub token: String,
}
