//! Placement on the wire: what nodes state about themselves, what is asked of them, and who is chosen.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/facts`: what the node states about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatement {
    /// Signature and facts, in base64.
    pub statement: String,
}

/// What another node states about itself, checked to be its own word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatedFacts {
    /// When it was heard.
    pub heard_at: String,
    /// How long the answer took, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u64>,
    /// Processors.
    pub cpus: u32,
    /// What its processors execute.
    pub arch: String,
    /// Memory for machines in all.
    pub memory_bytes: u64,
    /// Memory that is neither used nor promised.
    pub memory_free_bytes: u64,
    /// Machines that may still be made.
    pub machines_free: u32,
    /// Hypervisors that work there.
    pub hypervisors: Vec<String>,
    /// Whether guests run on hardware.
    pub kvm: bool,
    /// Where it is, in its owner's words.
    pub region: Option<String>,
    /// What a GiB of memory costs for an hour, in millionths.
    pub price_micros: u64,
    /// What its owner calls it.
    pub labels: Vec<String>,
    /// Whether it takes nothing new.
    pub draining: bool,
}

/// `GET` and `PUT /v1/mesh/terms`: what the owner has this node say of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NodeTerms {
    /// Where it is; up to 32 letters.
    pub region: Option<String>,
    /// What a GiB of memory costs for an hour, in millionths of the currency that its users and owner agreed on.
    pub price_micros: u64,
    /// What it is called: `ssd`, `gpu`, …; at most 8.
    pub labels: Vec<String>,
    /// It takes nothing new.
    pub draining: bool,
    /// Largest machine taken, in bytes of memory.
    pub memory_max_bytes: Option<u64>,
    /// It speaks with the nodes that were joined and says nothing of itself to the rest of their network, nor hears of it.
    pub private: bool,
    /// Relays through which others reach it, as `vistara relay` prints them (`KEY@ADDRESS:PORT`): at most 4. Those of joined
    /// nodes' tickets are used where there are none.
    pub relays: Vec<String>,
    /// It tells the local network where it is, and hears who else is there.
    pub local_discovery: bool,
}

/// `POST /v1/offers`: would the node take this?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OfferRequest {
    /// 32 random hexadecimal digits of the asker's.
    pub request: String,
    /// Memory of the machine.
    pub memory_bytes: u64,
}

/// The node would, and holds it for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OfferAnswer {
    /// For how long.
    pub ttl_ms: u64,
    /// What is left there, this offer not counted.
    pub memory_free_bytes: u64,
    /// How many machines may still be made.
    pub machines_free: u32,
    /// What a GiB of memory costs for an hour, in millionths.
    pub price_micros: u64,
}

/// `POST /v1/place`: which of the nodes that have given a grant is to run a machine?
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PlaceRequest {
    /// Its image, as this node knows it.
    pub image: Option<String>,
    /// Memory, such as `"512m"`.
    pub memory: Option<String>,
    /// CPUs.
    pub cpus: Option<String>,
    /// What is to run it.
    pub hypervisor: Option<String>,
    /// `spread`, `pack`, `nearest`, `cheapest` or `image-local`.
    pub policy: Option<String>,
    /// A policy by weights and rules, as hypercore writes them, in place of a name.
    pub rules: Option<String>,
    /// Any of these regions.
    pub regions: Vec<String>,
    /// What the node must be capable of.
    pub capabilities: Vec<String>,
    /// Most that a GiB of memory may cost for an hour, in millionths.
    pub price_micros_max: Option<u64>,
    /// None of these nodes, by their whole ids.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub apart_from: Vec<String>,
}

/// Who takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Placed {
    /// The node.
    pub node: String,
    /// What it is called here.
    pub name: String,
    /// Whether it is this node.
    pub here: bool,
    /// Under which offer the machine is to be made there.
    pub offer: String,
    /// Candidates and reasons, a line each.
    pub reasons: Vec<String>,
    /// What of the rules was not understood, and so has no effect.
    pub ignored: Vec<String>,
}
