//! What is known of the host: its accelerator, its VMMs, and the state of each thing a node needs.

use crate::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualization through `/dev/kvm`.
    Kvm,
    /// QEMU's translation, slower and available anywhere.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

/// A virtual machine monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmmKind {
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// The in-process stand-in of the tests: same contract, no virtual machine.
    Fake,
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VmmKind::Qemu => "qemu",
            VmmKind::Firecracker => "firecracker",
            VmmKind::Fake => "fake",
        })
    }
}

/// What the KVM probe found by running a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict", content = "detail")]
pub enum KvmVerdict {
    /// A guest ran at hardware speed.
    Works,
    /// There is no `/dev/kvm`, or no permission to open it; the text says which.
    Absent(String),
    /// It opens but cannot run an ordinary guest; the text says how that showed.
    Broken(String),
}

/// What the choice of hypervisor needs to know about this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The KVM probe's verdict.
    pub kvm: KvmVerdict,
    /// QEMU's version, where it is installed.
    pub qemu: Option<String>,
    /// Firecracker's version, where it is installed.
    pub firecracker: Option<String>,
    /// Why Firecracker's machines have no network here; nothing where they have one.
    pub firecracker_no_network: Option<String>,
    /// The name of the Nanos kernel in use, where there is one.
    pub nanos_kernel: Option<String>,
    /// Whether that kernel has the module by which it tells of its program's calls.
    pub nanos_tells_calls: bool,
    /// The name of the Linux guest kernel in use, where there is one.
    pub linux_kernel: Option<String>,
    /// Processors online.
    pub cpus: u32,
    /// Memory that could be given away now, in bytes.
    pub memory_available: Bytes,
}

/// One thing a node needs, as `vistara doctor` reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    /// A stable short name: `qemu`, `kvm`, `linux-kernel`, `cgroups`, …
    pub name: String,
    /// Whether it works.
    pub state: NeedState,
    /// What was found, in words: a version, a path, a reason.
    pub detail: String,
    /// The command that mends it, where one does.
    pub mend: Option<String>,
    /// Whether machines cannot run at all without it.
    pub required: bool,
}

/// A probe's three honest answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NeedState {
    /// Present, and seen to work.
    Works,
    /// Not there.
    Absent,
    /// There, and not working; the detail says why.
    Broken,
}
