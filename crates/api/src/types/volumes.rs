//! Named volumes on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A volume that the node keeps under a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What it can hold.
    pub size_bytes: u64,
    /// What it takes on the node's disk.
    pub stored_bytes: u64,
    /// When something was written to it last.
    pub changed_at: String,
    /// The machine that has it now, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
}

/// A volume to be made, empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolumeRequest {
    /// Its name: up to 31 letters, digits, `.`, `-` and `_`, the first a letter or a digit.
    pub name: String,
}
