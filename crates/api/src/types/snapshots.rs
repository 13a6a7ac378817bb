//! Snapshots and forks on the wire.

use super::Machine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/machines/{machine}/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CreateSnapshotRequest {
    /// Its name; none where absent.
    pub name: Option<String>,
    /// A snapshot of this node, by id, name or beginning of its id: only what differs from it is kept, and it stays as long as
    /// this one does. Everything is kept where absent.
    #[serde(default)]
    pub base: Option<String>,
}

/// A machine at one moment, kept on the node's disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// The machine's name.
    pub machine: Option<String>,
    /// The machine's id.
    pub machine_id: Option<String>,
    /// The image's name.
    pub image: Option<String>,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// When it was taken.
    pub created_at: Option<String>,
    /// The snapshot that has what is not kept with this one, by its id; absent where this one is whole.
    #[serde(default)]
    pub base: Option<String>,
    /// How long the machine was held still for it, in milliseconds.
    pub pause_ms: f64,
    /// What it takes on the node's disk.
    pub stored_bytes: u64,
    /// Why it cannot be used; absent where nothing is known against it. Its memory and disk are checked when it is restored.
    pub problem: Option<String>,
}

/// A snapshot as one file, for another node: answer of `POST /v1/snapshots/{snapshot}/pack`, and what another node is offered.
/// Its bytes are got by `GET /v1/blobs/{digest}` and given by `PUT /v1/blobs/{digest}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PackedSnapshot {
    /// The snapshot's id, the same on each node.
    pub id: String,
    /// Its name there, or that which it is to have here.
    pub name: Option<String>,
    /// The image's id: a machine goes on from it only where that image is.
    pub image_id: String,
    /// SHA-256 of the file: `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Its length.
    pub bytes: u64,
}

/// Answer of `POST /v1/snapshots/offer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WantedSnapshot {
    /// Whether the snapshot is there already.
    pub is_here: bool,
    /// How many bytes of the file are.
    pub have_bytes: u64,
}

/// `POST /v1/snapshots/{snapshot}/restore`: what of the machine is not as it was. Its id never is, nor are its host name, its
/// hardware address and its randomness.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreRequest {
    /// Name of the machine; made up where absent.
    pub name: Option<String>,
    /// Host name; from its id where absent.
    pub hostname: Option<String>,
    /// `[ADDRESS:]HOST:GUEST[/udp]`; none are published where empty.
    pub ports: Vec<String>,
    /// Remove the machine when it ends.
    pub auto_remove: bool,
}

/// `POST /v1/machines/{machine}/fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ForkRequest {
    /// How many.
    pub count: u32,
    /// Name, where it is one; made up where absent.
    pub name: Option<String>,
    /// `[ADDRESS:]HOST:GUEST[/udp]` in each; none are published where empty.
    pub ports: Vec<String>,
    /// Remove the machines when they end.
    pub auto_remove: bool,
}

impl Default for ForkRequest {
    fn default() -> Self {
        ForkRequest {
            count: 1,
            name: None,
            ports: Vec::new(),
            auto_remove: false,
        }
    }
}

/// The answer to `POST /v1/machines/{machine}/fork`, once every fork runs or has failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forked {
    /// The forks.
    pub machines: Vec<Machine>,
    /// How long the machine was held still, in milliseconds.
    pub pause_ms: f64,
    /// How long it took until others could go on from it, in milliseconds.
    pub captured_ms: f64,
    /// How long it took until all of them ran, in milliseconds.
    pub took_ms: f64,
}
