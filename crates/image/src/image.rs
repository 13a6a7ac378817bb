//! What the store knows of an image, and what its operations give back.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use vistara_model::{Architecture, Digest, ImageConfig, ImageRef};

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The blob as it was fetched, usually compressed.
    pub digest: Digest,
    /// The tar inside it.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub size_bytes: u64,
}

/// An image that is in the store, ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The digest of its configuration: the image's id.
    pub id: Digest,
    /// The digest of its manifest, where it came with one.
    pub manifest: Option<Digest>,
    /// Its names, sorted; none after they were all taken by other images.
    pub names: Vec<ImageRef>,
    /// What it was built for.
    pub architecture: Architecture,
    /// How it wants to be run.
    pub config: ImageConfig,
    /// When it was built, as it says itself (RFC 3339).
    pub created: Option<String>,
    /// Its layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes of its layers' blobs.
    pub size_bytes: u64,
    /// Bytes of its root disk, 0 while that is not built, and of its disks for unikernels.
    pub disk_bytes: u64,
}

/// An image's root disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk {
    /// A squashfs file, never written again.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// How to pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// The architecture wanted; the host's where absent.
    pub architecture: Option<Architecture>,
    /// Registries (`host` or `host:port`) that are spoken to without TLS. `localhost` and loopback addresses always are.
    pub insecure_registries: Vec<String>,
    /// The directory of docker's `config.json`; where absent, `$DOCKER_CONFIG` or `~/.docker`.
    pub docker_config: Option<PathBuf>,
    /// Never look for credentials.
    pub anonymous: bool,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Names that are gone.
    pub names: Vec<ImageRef>,
    /// The image, where its last name went and with it the image.
    pub image: Option<Digest>,
    /// Bytes freed on the disk.
    pub bytes: u64,
    /// A pull, an import or a build was under way, so that the image's blobs were left for the next clean-up.
    pub deferred: bool,
}

/// What a clean-up did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// Bytes freed on the disk.
    pub bytes: u64,
    /// A pull, an import or a build was under way, so that blobs without an image were left for the next time.
    pub deferred: bool,
}
