//! What others brought in of images, by grant: one file that is replaced as a whole, so that a restart forgets nothing.
//!
//! An entry stands before the first byte is taken, and counts as long as the blob, or a part of it, is in the store. While
//! it counts it never gets less: whoever brings more of the same takes all of it over.

use super::Mesh;
use crate::fault::{Answer, Fault};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vistara_api::ErrorKind;
use vistara_model::{Bytes, Digest, GrantId};

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Blobs that are remembered: thousands of images. Each is a file of the store, too.
const BLOBS_MAX: usize = 20_000;
/// Of them, under one grant: some hundred images, so that one holder leaves room for others.
const BLOBS_OF_GRANT_MAX: usize = 4_000;
/// Blobs that come at a time under one grant: each holds a thread and a lock of the store.
const COMING_MAX: usize = 8;
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
    read: bool,
    blobs: BTreeMap<String, Entry>,
    /// On their way, and how often: they count though nothing of them may be there yet.
    coming: BTreeMap<String, usize>,
    /// Streams of bytes that come under a grant.
    streams: BTreeMap<GrantId, usize>,
    /// Bytes of archives that are not unpacked yet.
    spooled: BTreeMap<GrantId, u64>,
}

/// Something on its way; over when dropped.
pub(crate) struct Coming {
    mesh: Arc<Mesh>,
    grant: GrantId,
    blobs: Vec<String>,
    stream: bool,
    spooled: u64,
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut brought = super::lock(&self.mesh.brought);
        for blob in &self.blobs {
            less(&mut brought.coming, blob, 1);
        }
        if self.stream {
            less(&mut brought.streams, &self.grant, 1);
        }
        less(&mut brought.spooled, &self.grant, self.spooled);
    }
}

impl Coming {
    /// Nothing yet.
    pub(crate) fn under(mesh: &Arc<Mesh>, grant: &GrantId) -> Coming {
        Coming {
            mesh: Arc::clone(mesh),
            grant: grant.clone(),
            blobs: Vec::new(),
            stream: false,
            spooled: 0,
        }
    }

    /// One more stream of bytes.
    pub(super) fn stream(&mut self, brought: &mut Brought) -> Answer<()> {
        let streams = brought.streams.entry(self.grant.clone()).or_default();
        if *streams >= COMING_MAX {
            return Err(Fault::conflict(format!(
                "{COMING_MAX} layers and archives come under this grant already"
            ))
            .hint("try again when one of them is there"));
        }
        *streams += 1;
        self.stream = true;
        Ok(())
    }

    /// So many bytes more of an archive.
    pub(super) fn spool(&mut self, brought: &mut Brought, bytes: u64) {
        *brought.spooled.entry(self.grant.clone()).or_default() += bytes;
        self.spooled += bytes;
    }

    /// The archive is unpacked: what was in it counts in its place.
    pub(super) fn unspool(&mut self, brought: &mut Brought) {
        less(&mut brought.spooled, &self.grant, self.spooled);
        self.spooled = 0;
    }

    /// These blobs too.
    pub(super) fn blobs(&mut self, brought: &mut Brought, blobs: &[(Digest, u64)]) {
        for (digest, _) in blobs {
            *brought.coming.entry(digest.to_string()).or_default() += 1;
            self.blobs.push(digest.to_string());
        }
    }
}

/// Counts down; what is at nothing is gone.
fn less<K: Ord, N: Copy + PartialOrd + std::ops::Sub<Output = N> + Default>(
    counts: &mut BTreeMap<K, N>,
    key: &K,
    by: N,
) {
    if let Some(count) = counts.get_mut(key) {
        if *count > by {
            *count = *count - by;
        } else {
            counts.remove(key);
        }
    }
}

impl Brought {
    /// Nothing is read before somebody brings something.
    pub(crate) fn at(dir: &Path) -> Brought {
        Brought {
            path: dir.join("brought.json"),
            read: false,
            blobs: BTreeMap::new(),
            coming: BTreeMap::new(),
            streams: BTreeMap::new(),
            spooled: BTreeMap::new(),
        }
    }

    /// Reads the file, once. A damaged one stops all bringing: without it nobody's limit could be kept. Blocks.
    pub(crate) fn read(&mut self) -> Answer<()> {
        if self.read {
            return Ok(());
        }
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
        self.read = true;
        Ok(())
    }

    /// Whether an entry counts; `here` says whether something of a blob is in the store.
    fn counts(&self, digest: &str, here: impl Fn(&Digest) -> bool) -> bool {
        self.coming.contains_key(digest) || digest.parse().is_ok_and(|digest| here(&digest))
    }

    /// Bytes under a grant, without these blobs, with what comes of archives.
    pub(crate) fn used(
        &self,
        grant: &GrantId,
        except: &[(Digest, u64)],
        here: impl Fn(&Digest) -> bool,
    ) -> Bytes {
        let except: Vec<String> = except.iter().map(|one| one.0.to_string()).collect();
        let spooled = self.spooled.get(grant).copied().unwrap_or(0);
        Bytes(
            (self.blobs.iter())
                .filter(|(digest, entry)| entry.grant == *grant && !except.contains(digest))
                .filter(|(digest, _)| self.counts(digest, &here))
                .fold(spooled, |sum, (_, entry)| sum.saturating_add(entry.bytes)),
        )
    }

    /// What a blob of this length counts.
    pub(crate) fn weight(bytes: u64) -> Bytes {
        Bytes(bytes.max(BLOB_BYTES_MIN))
    }

    /// What a blob counts for whoever brings it, or more of it: never less than it does already.
    pub(crate) fn cost(&self, digest: &Digest, bytes: u64, here: impl Fn(&Digest) -> bool) -> u64 {
        let digest = digest.to_string();
        let known = (self.blobs.get(&digest)).filter(|_| self.counts(&digest, here));
        Brought::weight(bytes)
            .0
            .max(known.map_or(0, |entry| entry.bytes))
    }

    /// Whether it was brought under this grant.
    pub(crate) fn is_of(&self, digest: &Digest, grant: &GrantId) -> bool {
        (self.blobs.get(&digest.to_string())).is_some_and(|entry| entry.grant == *grant)
    }

    /// Whether it is in the books.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.blobs.contains_key(&digest.to_string())
    }

    /// Enters blobs under a grant, with what they cost. Blocks.
    pub(crate) fn enter(
        &mut self,
        grant: &GrantId,
        blobs: &[(Digest, u64)],
        here: impl Fn(&Digest) -> bool,
    ) -> Answer<()> {
        let mut entries = self.blobs.clone();
        entries.retain(|digest, _| self.counts(digest, &here));
        for (digest, bytes) in blobs {
            let entry = Entry {
                grant: grant.clone(),
                bytes: *bytes,
            };
            entries.insert(digest.to_string(), entry);
        }
        let own = entries.values().filter(|entry| entry.grant == *grant);
        if own.count() > BLOBS_OF_GRANT_MAX || entries.len() > BLOBS_MAX {
            return Err(Fault::conflict(
                "this node keeps no more layers and documents of others' images",
            ));
        }
        if entries == self.blobs {
            return Ok(());
        }
        let kept = Kept {
            format: FORMAT,
            blobs: entries,
        };
        self.write(&kept).map_err(|error| {
            let why = format!("cannot write {:?}: {error}", self.path);
            Fault::new(ErrorKind::Host, why)
        })?;
        self.blobs = kept.blobs;
        Ok(())
    }

    /// Replaces the file, durably.
    fn write(&self, kept: &Kept) -> std::io::Result<()> {
        let fresh = self.path.with_extension("new");
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(kept)?)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &self.path)?;
        match self.path.parent() {
            Some(dir) => std::fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}
