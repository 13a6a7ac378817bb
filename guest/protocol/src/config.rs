//! What a guest is told once, before it runs anything.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Everything a guest learns from its host before it runs anything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Host name, at most 64 bytes.
    pub hostname: String,
    /// The time, in nanoseconds since 1970; 0 leaves the guest's clock alone.
    pub wall_clock_ns: u64,
    /// Random bytes for the guest's generator, at most 512; a fork of a template must have its own.
    pub entropy: Vec<u8>,
    /// Whether the root file system is read-only for the guest's programs.
    pub root_read_only: bool,
    /// The network interface, where there is one.
    pub network: Option<NetworkConfig>,
    /// Host directories to mount, in this order.
    pub volumes: Vec<VolumeMount>,
    /// More lines for `/etc/hosts`.
    pub hosts: Vec<HostEntry>,
    /// Resource limits of every process.
    pub rlimits: Vec<Rlimit>,
}

/// The guest's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Hardware address to take on; absent to keep the device's own.
    pub mac: Option<[u8; 6]>,
    /// Addresses, each with the length of its network's prefix.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways.
    pub gateways: Vec<IpAddr>,
    /// Name servers for `/etc/resolv.conf`.
    pub dns: Vec<IpAddr>,
    /// Search domains for `/etc/resolv.conf`.
    pub search: Vec<String>,
    /// Most bytes of a packet; absent for the device's own.
    pub mtu: Option<u32>,
}

/// A host directory and where it appears.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// The share's tag.
    pub tag: String,
    /// Absolute path in the guest; made where it is missing.
    pub path: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A line of `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEntry {
    /// Address.
    pub address: IpAddr,
    /// Names.
    pub names: Vec<String>,
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// In lower case and without prefix: `nofile`, `nproc`, `core`, …
    pub name: String,
    /// Soft limit; absent for none.
    pub soft: Option<u64>,
    /// Hard limit; absent for none.
    pub hard: Option<u64>,
}
