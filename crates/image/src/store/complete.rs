//! The last steps that a pull and an import share: check the layers, build the root disk, write the record.

use super::Admission;
use super::files::{Files, Guard};
use super::records::{Index, Record};
use super::sweep;
use crate::disk::{self, Cancel, LayerFile};
use crate::manifest::{self, ConfigFile};
use crate::{ErrorKind, Image, ImageError, Layer, Limits, Progress, ProgressSink, RootDisk};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use vistara_model::{Architecture, Digest, ImageConfig, ImageRef};

/// An image all of whose blobs are in the store.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// Its names, which other images lose unless they are to be left alone.
    pub(crate) names: Vec<ImageRef>,
    pub(crate) manifest: Option<Digest>,
    pub(crate) index: Option<Digest>,
    pub(crate) source: ArrivedConfig,
    pub(crate) layers: Vec<LayerFile>,
}

/// Where its configuration comes from.
#[derive(Debug)]
pub(crate) enum ArrivedConfig {
    /// It came with one.
    Own(Digest, Box<ConfigFile>),
    /// A plain root file system: it is made here.
    Made(Architecture, Box<ImageConfig>),
}

/// Blobs and disks that one operation has added, to be removed if it fails.
#[derive(Debug, Clone, Default)]
pub(crate) struct Added(Arc<Mutex<(Vec<Digest>, Vec<String>)>>);

impl Added {
    pub(crate) fn blob(&self, digest: &Digest) {
        let mut added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        added.0.push(digest.clone());
    }

    /// The blobs, with their lengths.
    pub(crate) fn blobs(&self, files: &Files) -> Vec<(Digest, u64)> {
        let added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = |digest: &Digest| Some((digest.clone(), files.blob_bytes(digest)?));
        added.0.iter().filter_map(whole).collect()
    }

    fn disk(&self, key: &str) {
        let mut added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        added.1.push(key.to_owned());
    }

    /// Removes what was added, if this error calls for it. Call without holding the store's work lock.
    ///
    /// When the peer failed, what is verified or half fetched stays, so that the next pull goes on from there.
    pub(crate) fn undo(&self, files: &Files, error: &ImageError) {
        if error.kind() == ErrorKind::Peer {
            return;
        }
        let (blobs, disks) = {
            let mut added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *added)
        };
        match sweep::drop_unneeded(files, &blobs, &disks) {
            Ok(Some(_)) => {}
            // Somebody else is at work, perhaps with the same blobs; the next clean-up takes what nobody needs then.
            Ok(None) => tracing::debug!("what a refused image left will be pruned later"),
            Err(failure) => {
                tracing::warn!(error = %failure, "what a refused image left could not be removed");
            }
        }
    }
}

/// The key of the root disk of these layers.
pub(crate) fn disk_key(diff_ids: &[Digest]) -> String {
    disk_digest(diff_ids).hex().to_owned()
}

/// What a root disk goes by in the books of who brought what: a digest that no blob has.
fn disk_digest(diff_ids: &[Digest]) -> Digest {
    let mut hash = Sha256::new();
    hash.update(format!("vistara root disk {}\n", disk::FORMAT));
    for diff_id in diff_ids {
        hash.update(format!("{diff_id}\n"));
    }
    Digest::from_sha256(hash.finalize().into())
}

/// Runs blocking work that is told when nobody waits for it any more.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Cancel) -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    struct OnDrop(Cancel);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.cancel();
        }
    }
    let cancel = Cancel::default();
    let _on_drop = OnDrop(cancel.clone());
    tokio::task::spawn_blocking(move || work(&cancel))
        .await
        .map_err(|error| ImageError::Internal(error.to_string()))?
}

/// Checks, builds and records; for a guest, no other image loses a name, and the disk that is built is admitted like a blob. `work` stays held until the record is written, even if nobody waits any more.
pub(crate) async fn complete(
    files: &Arc<Files>,
    limits: &Limits,
    arrived: Arrived,
    work: Arc<Guard>,
    added: &Added,
    guest: Option<&Arc<dyn Admission>>,
    progress: &ProgressSink,
) -> Result<Image, ImageError> {
    // One at a time for one list of layers; the second finds all done.
    let mut key = String::from("image:");
    for layer in &arrived.layers {
        key.push_str(layer.digest.hex());
    }
    let guard = files.keyed(&key).await?;
    let (files, limits) = (Arc::clone(files), limits.clone());
    let (added, guest, progress) = (added.clone(), guest.cloned(), progress.clone());
    blocking(move |cancel| {
        let _held = (work, guard);
        let image = finish(
            &files,
            &limits,
            arrived,
            &added,
            guest.as_deref(),
            cancel,
            &progress,
        )?;
        progress.report(Progress::Done);
        Ok(image)
    })
    .await
}

fn finish(
    files: &Files,
    limits: &Limits,
    arrived: Arrived,
    added: &Added,
    guest: Option<&dyn Admission>,
    cancel: &Cancel,
    progress: &ProgressSink,
) -> Result<Image, ImageError> {
    let known = verified_before(files, &arrived)?;
    let diff_ids = match known {
        Some(diff_ids) => diff_ids,
        None => {
            progress.report(Progress::Verifying);
            let (tree, diff_ids) = disk::index(&arrived.layers, limits, cancel)?;
            let key = disk_key(&diff_ids);
            if !files.disk(&key).exists() {
                let built = build(
                    files,
                    limits,
                    &tree,
                    &arrived.layers,
                    &key,
                    cancel,
                    progress,
                )?;
                added.disk(&key);
                if let Some(guest) = guest {
                    guest.admit(&[(disk_digest(&diff_ids), built.bytes)], true)?;
                }
            }
            diff_ids
        }
    };
    let (id, file) = match arrived.source {
        ArrivedConfig::Own(id, file) => (id, *file),
        ArrivedConfig::Made(architecture, config) => {
            let diff_id = diff_ids
                .first()
                .ok_or_else(|| ImageError::Internal("a root file system of no layer".into()))?;
            let bytes = manifest::write_config(&architecture, &config, diff_id);
            let (id, new) = files.put_blob(&bytes)?;
            if new {
                added.blob(&id);
            }
            let file = ConfigFile {
                architecture,
                os: "linux".to_owned(),
                created: None,
                config: *config,
                diff_ids: diff_ids.clone(),
            };
            (id, file)
        }
    };
    let layers = arrived
        .layers
        .iter()
        .zip(&diff_ids)
        .map(|(layer, diff_id)| Layer {
            digest: layer.digest.clone(),
            diff_id: diff_id.clone(),
            size_bytes: layer.size,
        })
        .collect();
    let record = Record::new(
        id,
        arrived.manifest,
        arrived.index,
        file.architecture,
        file.created,
        file.config,
        layers,
        disk_key(&diff_ids),
    );
    cancel.check()?;
    let guard = files.index()?;
    Index::write_record(files, &record, &guard)?;
    let mut index = Index::read(files)?;
    for name in arrived.names {
        if !(guest.is_some() && index.names.contains_key(&name)) {
            index.names.insert(name, record.id.clone());
        }
    }
    index.write_names(files, &guard)?;
    Ok(index.image(files, &record))
}

/// The layers' diff ids, where the same blobs were checked against the same diff ids before and their disk is still here.
fn verified_before(files: &Files, arrived: &Arrived) -> Result<Option<Vec<Digest>>, ImageError> {
    let index = Index::read(files)?;
    let same = |record: &&Record| {
        record.layers.len() == arrived.layers.len()
            && record
                .layers
                .iter()
                .zip(&arrived.layers)
                .all(|(known, layer)| {
                    known.digest == layer.digest
                        && layer.diff_id.as_ref().is_none_or(|id| *id == known.diff_id)
                })
    };
    Ok(index
        .records
        .values()
        .find(same)
        .filter(|record| files.disk(&record.disk).exists())
        .map(|record| record.layers.iter().map(|it| it.diff_id.clone()).collect()))
}

/// Builds a disk aside and moves it to its place.
pub(crate) fn build(
    files: &Files,
    limits: &Limits,
    tree: &crate::merge::Tree,
    layers: &[LayerFile],
    key: &str,
    cancel: &Cancel,
    progress: &ProgressSink,
) -> Result<RootDisk, ImageError> {
    let temp = files.temp();
    disk::write(tree, layers, &temp.path, limits, cancel, progress)?;
    let place = files.disk(key);
    files.publish(&temp, &place)?;
    let bytes = fs::metadata(&place)
        .map_err(|error| ImageError::io("look at", &place, error))?
        .len();
    Ok(RootDisk { path: place, bytes })
}
