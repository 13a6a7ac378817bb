//! An image's parts on the wire, as nodes give them to one another.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an image is made of: `GET /v1/image/parts`, `POST /v1/images/offer`, `POST /v1/images/assemble`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageParts {
    /// Its id: the digest of its configuration.
    pub id: String,
    /// Names that it has, or is to have. Somebody else's image gets only those that no image has yet.
    #[serde(default)]
    pub names: Vec<String>,
    /// Its configuration, in base64.
    pub config: String,
    /// Its manifest, in base64, where it came with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Its layers, lowest first.
    pub layers: Vec<LayerPart>,
}

/// One layer's blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerPart {
    /// Its digest.
    pub digest: String,
    /// Its length.
    pub bytes: u64,
}

/// The answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WantedParts {
    /// What is not there, or not whole.
    pub layers: Vec<WantedLayer>,
}

/// A layer that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WantedLayer {
    /// Its digest.
    pub digest: String,
    /// Its length.
    pub bytes: u64,
    /// How much of it is there: it is wanted from here on.
    pub have_bytes: u64,
}

/// The answer to a piece of a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReceivedBlob {
    /// How much of it is there now. All of it: it is checked, and in its place.
    pub have_bytes: u64,
}
