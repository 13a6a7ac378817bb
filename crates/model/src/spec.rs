//! What a user asks for: one machine that runs one program.

use crate::{Accelerator, Bytes, Cpus, ImageRef, MachineName, Signal, VmmKind};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a part of a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not `[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|udp]`.
    #[error(
        "{0:?} is not a port mapping: write HOST:GUEST, ADDRESS:HOST:GUEST or HOST:GUEST/udp, ports 1 to 65535 (HOST may be 0 for any)"
    )]
    Port(String),
    /// Not `HOSTDIR:GUESTDIR[:ro]`.
    #[error(
        "{0:?} is not a volume: write HOSTDIR:GUESTDIR or HOSTDIR:GUESTDIR:ro, both beginning with /"
    )]
    Volume(String),
    /// Not `NAME:GUESTDIR[:ro]`.
    #[error(
        "{0:?} is not a named volume: write NAME:GUESTDIR or NAME:GUESTDIR:ro; a name takes 1 to 31 of a-z A-Z 0-9 . - _ and begins with a letter or digit"
    )]
    NamedVolume(String),
    /// Not `NAME=value`.
    #[error("{0:?} is not an environment variable: write NAME=value, without NUL")]
    Env(String),
    /// Not a hypervisor.
    #[error("{0:?} is not a hypervisor: write auto, firecracker, nanovms or qemu")]
    Hypervisor(String),
}

/// The hypervisor as users name it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// The system chooses.
    #[default]
    Auto,
    /// A Firecracker microVM with Linux inside.
    Firecracker,
    /// A NanoVMs (Nanos) unikernel.
    Nanovms,
    /// A QEMU microVM with Linux inside.
    Qemu,
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hypervisor::Auto => "auto",
            Hypervisor::Firecracker => "firecracker",
            Hypervisor::Nanovms => "nanovms",
            Hypervisor::Qemu => "qemu",
        })
    }
}

impl FromStr for Hypervisor {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text {
            "auto" => Ok(Hypervisor::Auto),
            "firecracker" => Ok(Hypervisor::Firecracker),
            "nanovms" => Ok(Hypervisor::Nanovms),
            "qemu" => Ok(Hypervisor::Qemu),
            other => Err(SpecError::Hypervisor(other.to_owned())),
        }
    }
}

/// What is booted in a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// A Linux kernel with our agent as PID 1.
    Linux,
    /// A Nanos unikernel.
    Nanos,
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Payload::Linux => "linux",
            Payload::Nanos => "nanos",
        })
    }
}

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One published port: connections to the host's port reach the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address on the host; loopback unless the user says otherwise.
    pub host_address: std::net::Ipv4Addr,
    /// Port on the host; 0 asks for any free one.
    pub host_port: u16,
    /// Port in the guest.
    pub guest_port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(
            f,
            "{}:{}->{}/{protocol}",
            self.host_address, self.host_port, self.guest_port
        )
    }
}

impl FromStr for PortMapping {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::Port(text.to_owned());
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(error()),
            None => (text, Protocol::Tcp),
        };
        let parts: Vec<&str> = rest.split(':').collect();
        let (address, host, guest) = match parts[..] {
            [host, guest] => ("127.0.0.1", host, guest),
            [address, host, guest] => (address, host, guest),
            _ => return Err(error()),
        };
        let guest_port: u16 = guest.parse().map_err(|_| error())?;
        if guest_port == 0 {
            return Err(error());
        }
        Ok(PortMapping {
            host_address: address.parse().map_err(|_| error())?,
            host_port: host.parse().map_err(|_| error())?,
            guest_port,
            protocol,
        })
    }
}

/// A host directory seen in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Absolute path on the host.
    pub host_path: String,
    /// Absolute path in the guest.
    pub guest_path: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

impl FromStr for VolumeMount {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::Volume(text.to_owned());
        let parts: Vec<&str> = text.split(':').collect();
        let (host, guest, read_only) = match parts[..] {
            [host, guest] | [host, guest, "rw"] => (host, guest, false),
            [host, guest, "ro"] => (host, guest, true),
            _ => return Err(error()),
        };
        if !host.starts_with('/') || !guest.starts_with('/') || guest == "/" || text.contains('\0')
        {
            return Err(error());
        }
        Ok(VolumeMount {
            host_path: host.to_owned(),
            guest_path: guest.to_owned(),
            read_only,
        })
    }
}

/// A volume that the node keeps under a name, seen in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamedVolume {
    /// Its name: a file's name without a path, and a file system's label.
    pub name: String,
    /// Absolute path in the guest.
    pub guest_path: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

impl NamedVolume {
    /// Bytes of a name: as many as a label of the unikernel's file system has.
    pub const NAME_BYTES_MAX: usize = 31;

    /// Whether a volume may have this name.
    pub fn is_name(name: &str) -> bool {
        let first = name.bytes().next();
        first.is_some_and(|byte| byte.is_ascii_alphanumeric())
            && name.len() <= NamedVolume::NAME_BYTES_MAX
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
    }
}

impl fmt::Display for NamedVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.read_only { ":ro" } else { "" };
        write!(f, "{}:{}{mode}", self.name, self.guest_path)
    }
}

impl FromStr for NamedVolume {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::NamedVolume(text.to_owned());
        let parts: Vec<&str> = text.split(':').collect();
        let (name, guest, read_only) = match parts[..] {
            [name, guest] | [name, guest, "rw"] => (name, guest, false),
            [name, guest, "ro"] => (name, guest, true),
            _ => return Err(error()),
        };
        let covers_root = guest.bytes().all(|byte| byte == b'/');
        if !NamedVolume::is_name(name)
            || !guest.starts_with('/')
            || covers_root
            || text.contains('\0')
        {
            return Err(error());
        }
        Ok(NamedVolume {
            name: name.to_owned(),
            guest_path: guest.to_owned(),
            read_only,
        })
    }
}

/// One environment variable, `NAME=value`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EnvVar {
    /// Its name: not empty, without `=`.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl FromStr for EnvVar {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() && !text.contains('\0') => Ok(EnvVar {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(SpecError::Env(text.to_owned())),
        }
    }
}

/// How a machine is attached to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Outbound through the host, inbound by published ports; no privilege needed.
    #[default]
    User,
    /// Loopback only.
    None,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TtySize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// One machine that runs one program, validated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The image, complete.
    pub image: ImageRef,
    /// The user's command; empty means the image's own.
    pub command: Vec<String>,
    /// Replaces the image's entry point; `Some(empty)` clears it.
    pub entrypoint: Option<Vec<String>>,
    /// Its name; made up where absent.
    pub name: Option<MachineName>,
    /// Share of CPU.
    pub cpus: Cpus,
    /// Guest memory.
    pub memory: Bytes,
    /// Size of the writable layer.
    pub disk: Bytes,
    /// Added to, or replacing, the image's environment.
    pub env: Vec<EnvVar>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working directory.
    pub working_dir: Option<String>,
    /// Host name in the guest; the short id where absent.
    pub hostname: Option<String>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Host directories.
    pub volumes: Vec<VolumeMount>,
    /// Volumes that the node keeps under names.
    #[serde(default)]
    pub named_volumes: Vec<NamedVolume>,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Attachment to the network.
    pub network: Network,
    /// Whether the program gets a terminal, and its first size.
    pub tty: Option<TtySize>,
    /// Whether standard input is kept open for a client.
    pub stdin: bool,
    /// Removed by the node when it ends.
    pub auto_remove: bool,
    /// Longest run, after which the machine is stopped.
    pub timeout: Option<Duration>,
    /// Which hypervisor the user asked for.
    pub hypervisor: Hypervisor,
    /// Replaces the image's stop signal.
    pub stop_signal: Option<Signal>,
    /// Guest kernel by name; the node's default where absent.
    pub kernel: Option<String>,
    /// Whether it must boot, rather than be forked from a template.
    #[serde(default)]
    pub no_template: bool,
    /// Whether the program may be run a second time, from its beginning, without harm.
    #[serde(default)]
    pub retry_safe: bool,
    /// Bounds on what it moves.
    #[serde(default)]
    pub rates: Rates,
    /// Whether its memory is of the huge pages that the host has set aside.
    #[serde(default)]
    pub huge_pages: bool,
    /// Whether its kernel tells on the console what it does; such a machine boots.
    #[serde(default)]
    pub console: bool,
    /// Free labels.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// Bounds on what a machine may move. Where one is absent there is none but the host's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes in a second through each disk, both ways together.
    pub disk_per_s: Option<Bytes>,
    /// Reads and writes in a second of each disk.
    pub disk_ops_per_s: Option<u32>,
    /// Bytes in a second through the network, each way.
    pub network_per_s: Option<Bytes>,
}

impl Rates {
    /// The least that a guest still boots with within a minute or two.
    pub const DISK_PER_S_MIN: Bytes = Bytes::mib(1);
    /// The same of reads and writes.
    pub const DISK_OPS_PER_S_MIN: u32 = 50;
    /// A packet or two in each tenth of a second.
    pub const NETWORK_PER_S_MIN: Bytes = Bytes(32 << 10);

    /// The most of bytes, far above what any disk or network does, and well within what monitors count with.
    pub const PER_S_MAX: Bytes = Bytes(1 << 40);

    /// Whether a disk has a bound.
    pub fn of_disks(&self) -> bool {
        self.disk_per_s.is_some() || self.disk_ops_per_s.is_some()
    }
}

/// The VMM, payload and accelerator that were chosen for a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// The monitor.
    pub vmm: VmmKind,
    /// What it boots.
    pub payload: Payload,
    /// How it executes.
    pub accelerator: Accelerator,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_on_loopback_unless_an_address_is_given() {
        let port: PortMapping = "8080:80".parse().unwrap();
        assert_eq!(port.to_string(), "127.0.0.1:8080->80/tcp");
        let port: PortMapping = "0.0.0.0:5353:53/udp".parse().unwrap();
        assert_eq!(port.to_string(), "0.0.0.0:5353->53/udp");
        for bad in ["80", "a:b", "1:0", "70000:1", "1:2/icmp", "1:2:3:4"] {
            assert!(bad.parse::<PortMapping>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_named_volume_has_a_name_without_a_path() {
        let volume: NamedVolume = "data-1:/srv/d:ro".parse().unwrap();
        assert_eq!(volume.to_string(), "data-1:/srv/d:ro");
        let long = format!("{}:/d", "x".repeat(32));
        for bad in [
            "/a:/b", "../a:/b", ".a:/b", "a:b", "a:/", "a://", "a", ":/b", "a b:/c", &long,
        ] {
            assert!(bad.parse::<NamedVolume>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_volume_needs_two_absolute_paths_and_never_covers_the_root() {
        assert!("/a:/b:ro".parse::<VolumeMount>().unwrap().read_only);
        for bad in ["a:/b", "/a:b", "/a", "/a:/", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(bad.parse::<VolumeMount>().is_err(), "{bad:?}");
        }
    }
}
