//! The snapshots that are there.

use super::files::{self, About, Parts, Unusable, Words};
use super::packed::{self, Packed};
use crate::machine::{Record, now_ns};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vistara_machine::Capture;
use vistara_model::Digest;

/// A snapshot as it is listed.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) id: String,
    /// What it is of; or why that cannot be told.
    pub(crate) about: Result<About, Unusable>,
    /// What its directory takes.
    pub(crate) stored_bytes: u64,
}

impl Listed {
    pub(crate) fn name(&self) -> Option<&str> {
        self.about.as_ref().ok()?.name.as_deref()
    }
}

/// All snapshots of a node.
#[derive(Debug, Clone)]
pub(crate) struct Snapshots {
    dir: PathBuf,
    names: Names,
    /// One is packed at a time: it takes a processor.
    packing: Arc<Mutex<()>>,
    /// Held while one is made that rests on another, and while one is removed.
    resting: Arc<Mutex<()>>,
}

/// Why a snapshot is not removed.
#[derive(Debug)]
pub(crate) enum Stays {
    /// These rest on it.
    Needed(Vec<String>),
    /// The disk does not let it go.
    Io(io::Error),
}

/// Names of snapshots that are being made.
#[derive(Debug, Clone, Default)]
struct Names(Arc<Mutex<BTreeSet<String>>>);

impl Names {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that no other snapshot gets while this lives.
#[derive(Debug)]
pub(crate) struct Reserved {
    name: String,
    names: Names,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.names.lock().remove(&self.name);
    }
}

/// A snapshot that is being made. Its directory goes with it unless it was finished.
pub(crate) struct Fresh {
    id: String,
    dir: PathBuf,
    finished: bool,
    resting: Arc<Mutex<()>>,
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = files::remove(&self.dir)
        {
            tracing::warn!(path = %self.dir.display(), %error, "half a snapshot stays until the next node starts");
        }
    }
}

impl Fresh {
    /// Where the writable disk is to lie.
    pub(crate) fn overlay(&self) -> PathBuf {
        files::overlay_in(&self.dir)
    }

    /// Writes the rest; with a base, only what differs from that. Blocks on files for as long as some 100 MB take.
    pub(crate) fn finish(
        mut self,
        capture: &Capture,
        root: &Path,
        (name, base): (Option<String>, Option<String>),
        pause: Duration,
        record: Record,
    ) -> Result<Listed, String> {
        // The base is not removed meanwhile.
        let _resting = base
            .is_some()
            .then(|| self.resting.lock().unwrap_or_else(PoisonError::into_inner));
        let words = Words {
            id: self.id.clone(),
            name,
            created_ns: now_ns(),
            pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
            record,
            base,
        };
        let about = files::write(&self.dir, capture, root, words)?;
        self.finished = true;
        Ok(Listed {
            id: self.id.clone(),
            about: Ok(about),
            stored_bytes: files::size_on_disk(&self.dir),
        })
    }
}

impl Fresh {
    /// Makes it what another node has packed. Blocks on files for as long as some 100 MB take.
    pub(crate) fn arrive(
        mut self,
        packed: impl io::Read,
        name: Option<String>,
    ) -> Result<Listed, Unusable> {
        packed::unpack(packed, &self.dir)?;
        let about = files::adopt(&self.dir, name)?;
        self.finished = true;
        Ok(Listed {
            id: self.id.clone(),
            about: Ok(about),
            stored_bytes: files::size_on_disk(&self.dir),
        })
    }
}

impl Snapshots {
    pub(crate) fn new(dir: PathBuf) -> Snapshots {
        Snapshots {
            dir,
            names: Names::default(),
            packing: Arc::default(),
            resting: Arc::default(),
        }
    }

    /// Keeps a name for a snapshot that is to be made; nothing where there is one of it, or another is being made. Blocks on
    /// files.
    pub(crate) fn reserve(&self, name: &str) -> Option<Reserved> {
        if !self.names.lock().insert(name.to_owned()) {
            return None;
        }
        let reserved = Reserved {
            name: name.to_owned(),
            names: self.names.clone(),
        };
        // After it was kept: what was finished before that is listed.
        let same = |listed: &Listed| listed.name() == Some(name) || listed.id == name;
        (!self.list().iter().any(same)).then_some(reserved)
    }

    /// Removes what an earlier node had not finished.
    pub(crate) async fn sweep(&self) {
        let dir = self.dir.clone();
        let swept = tokio::task::spawn_blocking(move || {
            for entry in std::fs::read_dir(dir)?.flatten() {
                if files::is_finished(&entry.path()) {
                    continue;
                }
                tracing::info!(path = %entry.path().display(), "a snapshot that was never finished is removed");
                if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                    tracing::warn!(path = %entry.path().display(), %error, "half a snapshot stays");
                }
            }
            io::Result::Ok(())
        });
        if let Ok(Err(error)) = swept.await {
            tracing::error!(%error, "snapshots cannot be listed");
        }
    }

    /// Begins a snapshot. Blocks on files.
    pub(crate) fn begin(&self, id: String) -> io::Result<Fresh> {
        let dir = self.dir.join(&id);
        files::begin(&dir)?;
        Ok(Fresh {
            id,
            dir,
            finished: false,
            resting: Arc::clone(&self.resting),
        })
    }

    /// All finished snapshots, newest first, damaged ones at the end. Blocks on files.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut all: Vec<Listed> = entries
            .flatten()
            .filter(|entry| files::is_finished(&entry.path()))
            .filter_map(|entry| {
                Some(Listed {
                    id: entry.file_name().into_string().ok()?,
                    about: files::read_about(&entry.path()),
                    stored_bytes: files::size_on_disk(&entry.path()),
                })
            })
            .collect();
        let age = |listed: &Listed| listed.about.as_ref().map_or(0, |about| about.created_ns);
        all.sort_by_key(|listed| std::cmp::Reverse(age(listed)));
        all
    }

    /// Everything of a snapshot, every byte checked. Blocks on files for as long as some 100 MB take.
    pub(crate) fn read(&self, id: &str, root: &Path) -> Result<Parts, Unusable> {
        files::read(&self.dir.join(id), root)
    }

    /// Packs a snapshot for another node, once. Blocks on files for as long as some 100 MB take.
    pub(crate) fn pack(&self, id: &str) -> io::Result<Packed> {
        let _turn = self.packing.lock().unwrap_or_else(PoisonError::into_inner);
        packed::pack(&self.dir.join(id))
    }

    /// The packed snapshot with this digest. Blocks on files.
    pub(crate) fn packed(&self, digest: &Digest) -> Option<Packed> {
        let entries = std::fs::read_dir(&self.dir).ok()?;
        let mut all = entries
            .flatten()
            .filter_map(|entry| packed::packed(&entry.path()));
        all.find(|packed| packed.digest == *digest)
    }

    /// Removes a snapshot on which none rests. Machines restored from it go on. Blocks on files.
    pub(crate) fn remove(&self, id: &str) -> Result<(), Stays> {
        let _resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        let rests = |listed: &Listed| {
            let about = listed.about.as_ref();
            about.is_ok_and(|about| about.base.as_deref() == Some(id))
        };
        let all = self.list().into_iter().filter(rests);
        let needed: Vec<String> = all
            .map(|listed| listed.name().unwrap_or(&listed.id).to_owned())
            .collect();
        if !needed.is_empty() {
            return Err(Stays::Needed(needed));
        }
        files::remove(&self.dir.join(id)).map_err(Stays::Io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_for_one_snapshot_at_a_time_and_free_again_where_none_came_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(dir.path().to_owned());
        let first = snapshots.reserve("one").unwrap();
        assert!(snapshots.clone().reserve("one").is_none());
        assert!(snapshots.reserve("two").is_some());
        drop(first);
        assert!(snapshots.reserve("one").is_some());
    }
}
