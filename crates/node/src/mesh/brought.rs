//! What others brought in of images, by grant: one file that is replaced as a whole, so that a restart forgets nothing.
//!
//! An entry stands before the first byte is taken, and counts as long as the blob, or a part of it, is in the store.

use super::Mesh;
use crate::fault::{Answer, Fault};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vistara_api::ErrorKind;
use vistara_model::{Bytes, Digest, GrantId};

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Blobs that are remembered: thousands of images. Each is a file of the store, too.
const BLOBS_MAX: usize = 20_000;
/// A file takes a block, however small it is.
const BLOB_BYTES_MIN: u64 = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    grant: GrantId,
    bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    blobs: BTreeMap<String, Entry>,
}

/// What others brought in.
#[derive(Debug)]
pub(crate) struct Brought {
    path: PathBuf,
    blobs: BTreeMap<String, Entry>,
    /// On their way: they count though nothing of them may be there yet.
    coming: BTreeSet<String>,
}

/// A blob on its way; over when dropped.
pub(crate) struct Coming(Arc<Mesh>, String);

impl Drop for Coming {
    fn drop(&mut self) {
        super::lock(&self.0.brought).coming.remove(&self.1);
    }
}

impl Coming {
    pub(crate) fn new(mesh: &Arc<Mesh>, digest: &Digest) -> Coming {
        Coming(Arc::clone(mesh), digest.to_string())
    }
}

impl Brought {
    /// Nothing is read before somebody brings something.
    pub(crate) fn at(dir: &Path) -> Brought {
        Brought {
            path: dir.join("brought.json"),
            blobs: BTreeMap::new(),
            coming: BTreeSet::new(),
        }
    }

    /// Reads the file. A damaged one stops all bringing: without it nobody's limit could be kept. Blocks.
    pub(crate) fn read(&mut self) -> Answer<()> {
        let damaged = |why: String| {
            let path = &self.path;
            Fault::new(
                ErrorKind::Host,
                format!("{path:?} does not say who brought which images: {why}"),
            )
            .hint("put a copy back, or remove it: what was brought counts against nobody then")
        };
        self.blobs = match std::fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(damaged(error.to_string())),
            Ok(bytes) => match serde_json::from_slice::<Kept>(&bytes) {
                Ok(kept) if kept.format == FORMAT => kept.blobs,
                Ok(kept) => return Err(damaged(format!("its format is {}", kept.format))),
                Err(error) => return Err(damaged(error.to_string())),
            },
        };
        Ok(())
    }

    /// Bytes under a grant, without this blob; `here` says whether something of a blob is in the store.
    pub(crate) fn used(
        &self,
        grant: &GrantId,
        except: Option<&Digest>,
        here: impl Fn(&Digest) -> bool,
    ) -> Bytes {
        let except = except.map(ToString::to_string);
        let counts = |digest: &String| {
            self.coming.contains(digest) || digest.parse().is_ok_and(|digest| here(&digest))
        };
        Bytes(
            (self.blobs.iter())
                .filter(|(digest, entry)| entry.grant == *grant && except.as_ref() != Some(digest))
                .filter(|(digest, _)| counts(digest))
                .fold(0, |sum, (_, entry)| sum.saturating_add(entry.bytes)),
        )
    }

    /// What a blob of this length counts.
    pub(crate) fn weight(bytes: u64) -> Bytes {
        Bytes(bytes.max(BLOB_BYTES_MIN))
    }

    /// Whether somebody has brought it, or brings it.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.blobs.contains_key(&digest.to_string())
    }

    /// Enters blobs under a grant; those on their way are held until a [`Coming`] is dropped. Blocks.
    pub(crate) fn enter(
        &mut self,
        grant: &GrantId,
        blobs: &[(Digest, u64)],
        coming: bool,
        here: impl Fn(&Digest) -> bool,
    ) -> Answer<()> {
        let mut entries = self.blobs.clone();
        entries.retain(|digest, _| {
            self.coming.contains(digest) || digest.parse().is_ok_and(|digest| here(&digest))
        });
        for (digest, bytes) in blobs {
            let entry = Entry {
                grant: grant.clone(),
                bytes: Brought::weight(*bytes).0,
            };
            entries.insert(digest.to_string(), entry);
        }
        if entries.len() > BLOBS_MAX {
            return Err(Fault::conflict(
                "this node keeps no more layers of others' images",
            ));
        }
        if entries != self.blobs {
            let kept = Kept {
                format: FORMAT,
                blobs: entries,
            };
            let fresh = self.path.with_extension("new");
            serde_json::to_vec(&kept)
                .map_err(std::io::Error::other)
                .and_then(|bytes| std::fs::write(&fresh, bytes))
                .and_then(|()| std::fs::rename(&fresh, &self.path))
                .map_err(|error| {
                    Fault::new(
                        ErrorKind::Host,
                        format!("cannot write {:?}: {error}", self.path),
                    )
                })?;
            self.blobs = kept.blobs;
        }
        if coming {
            self.coming
                .extend(blobs.iter().map(|(digest, _)| digest.to_string()));
        }
        Ok(())
    }
}
