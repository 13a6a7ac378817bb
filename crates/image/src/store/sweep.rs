//! Removing: names, images, and the blobs and disks that nothing needs any more.

use super::files::Files;
use super::records::{Index, Record};
use super::unikernel_disk;
use crate::{ImageError, Pruned, Removed};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use vistara_model::Digest;

/// Removes a file. Gives the bytes freed; none where it was not there.
fn unlink(path: &Path) -> Result<u64, ImageError> {
    let bytes = fs::metadata(path).map_or(0, |meta| meta.len());
    match fs::remove_file(path) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(ImageError::io("remove", path, error)),
    }
}

/// Removes those of these blobs and disks that no image needs; `None` when somebody is adding to the store just now.
pub(super) fn drop_unneeded(
    files: &Files,
    blobs: &[Digest],
    disks: &[String],
) -> Result<Option<u64>, ImageError> {
    let Some(_alone) = files.try_alone()? else {
        return Ok(None);
    };
    let index = Index::read(files)?;
    let needed: BTreeSet<&Digest> = index.records.values().flat_map(Record::blobs).collect();
    let mut bytes = 0;
    for digest in blobs.iter().filter(|digest| !needed.contains(digest)) {
        bytes += unlink(&files.blob(digest))?;
        bytes += unlink(&files.partial(digest))?;
    }
    let mut others = index.records.values();
    for key in disks {
        if !others.any(|record| record.disk == *key) {
            bytes += unlink(&files.disk(key))?;
        }
    }
    bytes += unikernel_disk::drop_unneeded(files, &index)?;
    Ok(Some(bytes))
}

/// See [`crate::ImageStore::remove`].
pub(super) fn remove(
    files: &Files,
    name_or_id: &str,
    in_use: &dyn Fn(&Digest) -> bool,
    force: bool,
) -> Result<Removed, ImageError> {
    let guard = files.index()?;
    let mut index = Index::read(files)?;
    let Some((name, record)) = index.find(name_or_id)? else {
        return Err(ImageError::NotFound(name_or_id.to_owned()));
    };
    let record = record.clone();
    let all_names = index.names_of(&record.id);
    let names = match name {
        Some(name) => vec![name],
        None if all_names.len() > 1 && !force => {
            return Err(ImageError::SeveralNames(name_or_id.to_owned()));
        }
        None => all_names.clone(),
    };
    let last = names.len() == all_names.len();
    let used = in_use(&record.id);
    if last && used && !force {
        return Err(ImageError::InUse(name_or_id.to_owned()));
    }
    index.names.retain(|known, _| !names.contains(known));
    index.write_names(files, &guard)?;
    let mut removed = Removed {
        names,
        ..Removed::default()
    };
    if last && !used {
        unlink(&files.record(&record.id))?;
        unlink(&files.facts(&record.id))?;
        drop(guard);
        let blobs: Vec<Digest> = record.blobs().cloned().collect();
        match drop_unneeded(files, &blobs, std::slice::from_ref(&record.disk))? {
            Some(bytes) => removed.bytes = bytes,
            None => removed.deferred = true,
        }
        removed.image = Some(record.id);
    }
    Ok(removed)
}

/// See [`crate::ImageStore::prune`].
pub(super) fn prune(
    files: &Files,
    in_use: &dyn Fn(&Digest) -> bool,
    all: bool,
) -> Result<Pruned, ImageError> {
    let mut pruned = Pruned::default();
    {
        let guard = files.index()?;
        let mut index = Index::read(files)?;
        for id in index.records.keys() {
            if (all || index.names_of(id).is_empty()) && !in_use(id) {
                pruned.images.push(id.clone());
            }
        }
        index.names.retain(|_, id| !pruned.images.contains(id));
        index.write_names(files, &guard)?;
        for id in &pruned.images {
            pruned.bytes += unlink(&files.record(id))?;
            pruned.bytes += unlink(&files.facts(id))?;
        }
    }
    let Some(_alone) = files.try_alone()? else {
        pruned.deferred = true;
        return Ok(pruned);
    };
    let index = Index::read(files)?;
    let mut needed: BTreeSet<_> = index
        .records
        .values()
        .flat_map(Record::blobs)
        .map(|digest| files.blob(digest))
        .collect();
    needed.extend(
        index
            .records
            .values()
            .map(|record| files.disk(&record.disk)),
    );
    for part in ["blobs/sha256", "disks", "partial", "tmp"] {
        for path in files.entries(part)? {
            if !needed.contains(&path) {
                pruned.bytes += unlink(&path)?;
            }
        }
    }
    pruned.bytes += unikernel_disk::drop_unneeded(files, &index)?;
    Ok(pruned)
}
