//! What can go wrong, said once for each operation and subject.
//!
//! `Display` says this layer only; the cause is in `source()`. Errors can be cloned, because several callers may wait for
//! one pull.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vistara_model::{Architecture, Bytes, Digest};

/// Whose matter an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// There is no such image, here or in the registry.
    NotFound,
    /// The request cannot be met as it was made.
    User,
    /// The registry wants other credentials, or none of these will do; or the store's owner does not allow it.
    Denied,
    /// The registry, or the way to it, failed.
    Peer,
    /// This host failed: its disk, its tools.
    Host,
    /// The disk is full.
    NoSpace,
    /// The image is not made for this processor.
    Architecture,
    /// The image is malformed or malicious, and was refused.
    Refused,
}

/// Why an image was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The content does not have the digest that it was announced with.
    #[error("its digest is {found}, not {wanted}")]
    Digest {
        /// Announced.
        wanted: Digest,
        /// Computed.
        found: Digest,
    },
    /// The content is shorter or longer than announced.
    #[error("it has {found} bytes, not the {wanted} announced")]
    Size {
        /// Announced.
        wanted: u64,
        /// Counted; for a longer one, where the reading stopped.
        found: u64,
    },
    /// A media type that is not supported here.
    #[error("its media type {0:?} is not supported")]
    MediaType(String),
    /// A layer that is to be fetched from elsewhere ("foreign", "non-distributable").
    #[error(
        "its content is kept outside the registry (a foreign layer), and is not fetched from there"
    )]
    ForeignLayer,
    /// A manifest of docker's first schema.
    #[error("its manifest is of docker's schema 1, which has no digests for its configuration")]
    SchemaOne,
    /// Not the JSON that it should be.
    #[error("it is not the JSON document that it should be: {0}")]
    Json(String),
    /// The manifest and the configuration disagree.
    #[error("its manifest lists {manifest} layers and its configuration {config}")]
    LayerCount {
        /// In the manifest.
        manifest: usize,
        /// In the configuration.
        config: usize,
    },
    /// A bound of [`crate::Limits`].
    #[error("it has more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// A layer that unpacks to far more than it is.
    #[error("it unpacks to more than {ratio} times its size, as a decompression bomb does")]
    Bomb {
        /// The bound.
        ratio: u64,
    },
    /// The compressed stream is broken or ends early.
    #[error("its compression is broken: {0}")]
    Compression(String),
    /// The tar is broken.
    #[error("its tar is malformed at byte {offset}: {why}")]
    Tar {
        /// Where, in the uncompressed tar.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An entry of the tar is not acceptable.
    #[error("its entry {path:?} {why}")]
    Entry {
        /// The entry's path, made printable.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A file of the archive or layout that is named but not there.
    #[error("it names {0:?}, which is not in it")]
    Missing(String),
}

/// An error of this crate.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No such image here.
    #[error("there is no image {0:?} here")]
    NotFound(String),
    /// The registry does not have it.
    #[error("{registry} has no {name:?}")]
    NotInRegistry {
        /// The registry.
        registry: String,
        /// The repository and tag, or the blob.
        name: String,
    },
    /// A short id fits several images.
    #[error("{prefix:?} fits {count} images")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many it fits.
        count: usize,
    },
    /// The image may not go while machines use it.
    #[error("image {0:?} is in use; nothing was removed")]
    InUse(String),
    /// An id stands for several names.
    #[error("image {0:?} has several names; nothing was removed")]
    SeveralNames(String),
    /// The source of an import is none of the known kinds.
    #[error("{path:?} cannot be imported: {why}")]
    Source {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The image is made for other processors.
    #[error(
        "{subject} is not made for linux/{wanted}, only for {}",
        if available.is_empty() { "nothing that runs here".to_owned() } else { available.join(", ") }
    )]
    Architecture {
        /// The image.
        subject: String,
        /// Asked for.
        wanted: Architecture,
        /// On offer, as `os/architecture`.
        available: Vec<String>,
    },
    /// The registry refused these credentials, or the lack of any.
    #[error("{registry} denies access to {name:?}{}", if *anonymous { " without credentials" } else { " with the credentials of docker's config.json" })]
    Denied {
        /// The registry.
        registry: String,
        /// The repository.
        name: String,
        /// No credentials were given.
        anonymous: bool,
    },
    /// The store's owner does not allow it.
    #[error("{why}")]
    NotAdmitted {
        /// Why not.
        why: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Credentials could not be read.
    #[error("the credentials for {registry} cannot be read: {why}")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why not.
        why: String,
    },
    /// The registry, or the way to it, failed.
    #[error("cannot {doing} from {registry}: {why}")]
    Registry {
        /// The registry.
        registry: String,
        /// What was being done.
        doing: &'static str,
        /// What came back instead.
        why: String,
        /// The cause, where one is known.
        #[source]
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// The image is malformed or malicious.
    #[error("{subject} is refused; nothing of it was kept")]
    Refused {
        /// The image, layer or file.
        subject: String,
        /// Why.
        #[source]
        why: Refusal,
    },
    /// The disk is full.
    #[error("no space is left at {path:?}{}; nothing half made was kept", needed_text(.needed))]
    NoSpace {
        /// The store.
        path: PathBuf,
        /// How much more was wanted, where it is known.
        needed: Option<Bytes>,
    },
    /// The operating system failed.
    #[error("cannot {doing} {path:?}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A program that is needed is not installed.
    #[error("root disks are packed by {tool}, which is not installed")]
    ToolMissing {
        /// The program.
        tool: &'static str,
    },
    /// A program that is needed failed.
    #[error("{tool} failed ({status}): {message}")]
    ToolFailed {
        /// The program.
        tool: &'static str,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        message: String,
    },
    /// An image's files are not what a unikernel's disk can hold.
    #[error("image {image} cannot be put on a unikernel's disk")]
    Unikernel {
        /// The image's id.
        image: String,
        /// What cannot be.
        #[source]
        why: Arc<vistara_nanos::DiskError>,
    },
    /// A record of the store cannot be understood.
    #[error("the store's record {path:?} is damaged or of a newer version: {why}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Our own invariant is broken.
    #[error("internal error: {0}")]
    Internal(String),
}

fn needed_text(needed: &Option<Bytes>) -> String {
    let mut text = String::new();
    if let Some(needed) = needed {
        // Writing to a String cannot fail.
        let _ = write!(text, " ({needed} needed)");
    }
    text
}

impl ImageError {
    /// Whose matter this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ImageError::NotFound(_) | ImageError::NotInRegistry { .. } => ErrorKind::NotFound,
            ImageError::Ambiguous { .. }
            | ImageError::InUse(_)
            | ImageError::SeveralNames(_)
            | ImageError::Source { .. }
            | ImageError::Unikernel { .. } => ErrorKind::User,
            ImageError::Denied { .. }
            | ImageError::NotAdmitted { .. }
            | ImageError::Credentials { .. } => ErrorKind::Denied,
            ImageError::Registry { .. } => ErrorKind::Peer,
            ImageError::Io { .. }
            | ImageError::ToolMissing { .. }
            | ImageError::ToolFailed { .. }
            | ImageError::Record { .. }
            | ImageError::Internal(_) => ErrorKind::Host,
            ImageError::NoSpace { .. } => ErrorKind::NoSpace,
            ImageError::Architecture { .. } => ErrorKind::Architecture,
            ImageError::Refused { .. } => ErrorKind::Refused,
        }
    }

    /// The next command to type, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            ImageError::NotFound(name) => Some(format!("vistara images pull {name}")),
            ImageError::Ambiguous { .. } => Some("vistara images".to_owned()),
            ImageError::InUse(_) => Some("vistara ps --all".to_owned()),
            ImageError::SeveralNames(name) => Some(format!("vistara images rm --force {name}")),
            ImageError::Denied { registry, .. } => Some(format!("docker login {registry}")),
            ImageError::NotAdmitted { hint, .. } => hint.clone(),
            ImageError::NoSpace { .. } => Some("vistara images prune --all".to_owned()),
            ImageError::ToolMissing { .. } => Some("apt-get install squashfs-tools".to_owned()),
            ImageError::Unikernel { .. } => {
                Some("leave --hypervisor out to run it in a Linux guest".to_owned())
            }
            ImageError::NotInRegistry { .. }
            | ImageError::Source { .. }
            | ImageError::Credentials { .. }
            | ImageError::Registry { .. }
            | ImageError::Io { .. }
            | ImageError::ToolFailed { .. }
            | ImageError::Record { .. }
            | ImageError::Internal(_)
            | ImageError::Architecture { .. }
            | ImageError::Refused { .. } => None,
        }
    }

    /// An operating system's error; a full disk is told apart.
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> ImageError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImageError::NoSpace {
                path: path.to_owned(),
                needed: None,
            },
            _ => ImageError::Io {
                doing,
                path: path.to_owned(),
                source: Arc::new(source),
            },
        }
    }

    /// A refusal of this subject.
    pub(crate) fn refused(subject: impl Into<String>, why: Refusal) -> ImageError {
        ImageError::Refused {
            subject: subject.into(),
            why,
        }
    }
}
