//! Base disks of unikernels: an image's files on a disk that Nanos boots from, made once and kept beside the root disk.
//!
//! ```text
//! unikernels/HEX/disks.json   the disks of one image, and for which programs each was made
//! unikernels/HEX/KEY.img      one of them, never written again
//! ```
//! An image that travels whole has one disk, for all its programs; of a large one each selection of files has its own. The
//! manifest on them is a placeholder: each machine's own disk is made from the base with another (`vistara_nanos::remaster`).
//!
//! A disk is listed after it is there whole. All changes of one image's disks are made under its lock, by processes that
//! have joined those who add to the store; who removes takes the image's whole directory.
//!
//! All of it blocks and belongs on a blocking thread.

use super::ImageStore;
use super::files::Files;
use super::records::Index;
use crate::unikernel::{self, NanosKind, NanosTree, Selection, Wishes};
use crate::{Image, ImageError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vistara_model::{Bytes, Digest, ProgramFacts};
use vistara_nanos::disk::{BootDisk, DiskError, DiskOptions, FREE_BYTES_MIN};
use vistara_nanos::manifest::Manifest;
use vistara_nanos::tfs::{Label, VolumeId, WriteError};

/// Raise it when the same image would give other disks, or the list another form: older disks are then made anew.
const VERSION: u32 = 2;
const LIST: &str = "disks.json";
/// Disks of one image that are kept; the one made longest ago goes first. Only large images have more than one, of up to
/// 512 MiB each.
const DISKS_MAX: usize = 4;
/// Programs that are remembered of one disk. One that was forgotten costs a look at the layers, not a new disk.
const ASKED_MAX: usize = 64;
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of the log and of rounding that each entry takes at most, beside its content.
const ENTRY_BYTES: u64 = 4096 + 512;

/// A disk with an image's files, from which machines' disks are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnikernelDisk {
    /// A file with holes, never written again.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Files, directories and links on it.
    pub entries: u64,
    /// Whether it is all of the image.
    pub selection: Selection,
}

/// The list of one image's disks.
#[derive(Debug, Serialize, Deserialize)]
struct Disks {
    version: u32,
    /// The one made last comes last.
    disks: Vec<Made>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Made {
    key: String,
    bytes: u64,
    entries: u64,
    selection: Selection,
    /// For which programs, each as a digest; the one asked for last comes last.
    asked: Vec<String>,
}

impl Disks {
    /// What is listed in this directory. A list that cannot be understood is as good as none: disks can be made again.
    fn read(dir: &Path) -> Disks {
        let parse = |content: Vec<u8>| {
            // Another version may have another form.
            #[derive(Deserialize)]
            struct Version {
                version: u32,
            }
            let version: Version = serde_json::from_slice(&content).ok()?;
            (version.version == VERSION)
                .then(|| serde_json::from_slice(&content).ok())
                .flatten()
        };
        fs::read(dir.join(LIST))
            .ok()
            .and_then(parse)
            .unwrap_or(Disks {
                version: VERSION,
                disks: Vec::new(),
            })
    }

    /// The disk for this program, if it is there.
    fn get(&self, dir: &Path, asked: &str) -> Option<UnikernelDisk> {
        let fits = |made: &&Made| {
            made.selection == Selection::Whole || made.asked.iter().any(|known| known == asked)
        };
        self.disks.iter().find(fits)?.there(dir)
    }

    fn write(&self, files: &Files, dir: &Path) -> Result<(), ImageError> {
        let content = serde_json::to_vec(self).map_err(|error| {
            ImageError::Internal(format!("a list of disks cannot be written: {error}"))
        })?;
        files.replace(&dir.join(LIST), &content)
    }
}

impl Made {
    fn path(&self, dir: &Path) -> PathBuf {
        image_path(dir, &self.key)
    }

    fn there(&self, dir: &Path) -> Option<UnikernelDisk> {
        let path = self.path(dir);
        let length = fs::metadata(&path).ok()?.len();
        (length == self.bytes).then(|| UnikernelDisk {
            path,
            bytes: self.bytes,
            entries: self.entries,
            selection: self.selection.clone(),
        })
    }
}

fn image_path(dir: &Path, key: &str) -> PathBuf {
    dir.join(format!("{key}.img"))
}

impl ImageStore {
    /// The disk with the files that this program needs as a unikernel, made if it is missing; see
    /// [`ImageStore::nanos_tree`] for which these are. `vistara_nanos::disk::open` reads it.
    ///
    /// Blocks. When it is there: one small file is read. Else the image's layers are unpacked twice, at some hundreds of MB a
    /// second, and the disk is written and made durable. Two callers who want the same share the work, also among processes.
    ///
    /// # Errors
    /// Where the store cannot be read or written, an image's layer is damaged, or the image has what no such disk can hold.
    /// Nothing half made is left.
    pub fn unikernel_disk(
        &self,
        image: &Image,
        facts: &ProgramFacts,
        wishes: &Wishes<'_>,
    ) -> Result<UnikernelDisk, ImageError> {
        let dir = self.files.unikernels(&image.id);
        let asked = asked(facts, wishes);
        if let Some(disk) = Disks::read(&dir).get(&dir, &asked) {
            return Ok(disk);
        }
        let _work = self.files.work_blocking()?;
        let key = format!("unikernel:{}", image.id.hex());
        let _alone = self.files.keyed_blocking(&key)?;
        let mut disks = Disks::read(&dir);
        if let Some(disk) = disks.get(&dir, &asked) {
            return Ok(disk);
        }
        let tree = self.nanos_tree(image, facts, wishes)?;
        let key = key_of(&tree);
        let mut made = match disks.disks.iter().position(|made| made.key == key) {
            // Another program's files, and the same; or its disk was lost.
            Some(at) => disks.disks.remove(at),
            None => Made {
                key,
                bytes: 0,
                entries: tree.entries().len() as u64,
                selection: tree.selection().clone(),
                asked: Vec::new(),
            },
        };
        if made.there(&dir).is_none() {
            self.make_disk(image, &tree, &dir, &mut made)?;
        }
        let excess = (made.asked.len() + 1).saturating_sub(ASKED_MAX);
        made.asked.drain(..excess);
        made.asked.push(asked);
        let disk = made
            .there(&dir)
            .ok_or_else(|| ImageError::Internal("a disk was lost on the way".to_owned()))?;
        disks.disks.push(made);
        let excess = disks.disks.len().saturating_sub(DISKS_MAX);
        disks.disks.drain(..excess);
        disks.write(&self.files, &dir).inspect_err(|_| {
            // A disk that nobody knows of would only take room. That it cannot be removed changes nothing of the error.
            let _ = fs::remove_file(&disk.path);
        })?;
        remove_unlisted(&dir, &disks);
        Ok(disk)
    }

    fn make_disk(
        &self,
        image: &Image,
        tree: &NanosTree,
        dir: &Path,
        made: &mut Made,
    ) -> Result<(), ImageError> {
        let needed = tree
            .bytes()
            .0
            .saturating_add(made.entries.saturating_mul(ENTRY_BYTES))
            .saturating_add(FREE_BYTES_MIN);
        if self.files.free_bytes().is_some_and(|free| free < needed) {
            return Err(ImageError::NoSpace {
                path: self.files.root().to_owned(),
                needed: Some(Bytes(needed)),
            });
        }
        let temp = self.files.temp();
        made.bytes = write(image, tree, &temp.path)?;
        // An image that was removed in the meantime leaves no disk behind.
        if !self.files.record(&image.id).exists() {
            return Err(ImageError::NotFound(image.id.to_string()));
        }
        fs::create_dir_all(dir)
            .map_err(|error| ImageError::io("make the directory", dir, error))?;
        self.files.publish(&temp, &made.path(dir))
    }
}

/// What decides which files a program gets of a large image, as a digest.
fn asked(facts: &ProgramFacts, wishes: &Wishes<'_>) -> String {
    let mut hash = Sha256::new();
    let libraries = facts.libraries.iter().map(|library| &library.path);
    let own = [&facts.path, &facts.file, &facts.executable];
    let texts = own.into_iter().chain(&facts.loader).chain(libraries);
    for text in texts.map(String::as_str) {
        hash.update(text);
        hash.update([0]);
    }
    hash.update([0]);
    for path in unikernel::named(facts, wishes) {
        hash.update(path);
        hash.update([0]);
    }
    Digest::from_sha256(hash.finalize().into()).hex().to_owned()
}

/// One selection's name: the same for all programs that get the same files.
fn key_of(tree: &NanosTree) -> String {
    let mut hash = Sha256::new();
    match tree.selection() {
        Selection::Whole => return "whole".to_owned(),
        Selection::Part { .. } => {}
    }
    for entry in tree.entries() {
        hash.update(&entry.path);
        hash.update([0]);
    }
    Digest::from_sha256(hash.finalize().into()).hex().to_owned()
}

/// Writes the disk to a new file. Gives its length.
fn write(image: &Image, tree: &NanosTree, path: &Path) -> Result<u64, ImageError> {
    let io = |error| ImageError::io("write", path, error);
    let failed = |error: DiskError| match error {
        DiskError::Io(source) | DiskError::Write(WriteError::Io(source)) => io(source),
        other => ImageError::Unikernel {
            image: image.id.to_string(),
            why: Arc::new(other),
        },
    };
    let file = File::create_new(path).map_err(io)?;
    let mut id = [0; 16];
    let digest = Sha256::digest(image.id.hex());
    id.copy_from_slice(&digest[..16]);
    let options = DiskOptions {
        id: VolumeId(id),
        label: Label::none(),
        free_bytes: 0,
    };
    let placeholder = Manifest {
        program: b"/".to_vec(),
        ..Manifest::default()
    };
    let out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut disk = BootDisk::create(out, &options, &placeholder).map_err(failed)?;
    let writer = disk.tree();
    let lost = || ImageError::Internal("an entry lies in no directory".to_owned());
    let mut directories = HashMap::from([(&b""[..], writer.root())]);
    for entry in tree.entries() {
        let (parent, name) = split(&entry.path);
        match &entry.kind {
            NanosKind::File { .. } => {}
            NanosKind::Directory => {
                let parent = *directories.get(parent).ok_or_else(lost)?;
                let made = writer
                    .directory(parent, name)
                    .map_err(|error| failed(DiskError::Write(error)))?;
                directories.insert(&entry.path, made);
            }
            NanosKind::Symlink { target } => {
                let parent = *directories.get(parent).ok_or_else(lost)?;
                writer
                    .symlink(parent, name, target)
                    .map_err(|error| failed(DiskError::Write(error)))?;
            }
        }
    }
    // An I/O error is all that the visitor may give, so what failed is kept beside it.
    let mut failure = None;
    let visited = tree.read(&mut |names, content| {
        let mut first = None;
        for index in names {
            let Some(entry) = tree.entries().get(*index) else {
                continue;
            };
            let (parent, name) = split(&entry.path);
            let (Some(parent), NanosKind::File { size }) = (directories.get(parent), &entry.kind)
            else {
                return Err(io::Error::other("an entry lies in no directory"));
            };
            let written = match first {
                None => writer.file(*parent, name, *size, content).and_then(|file| {
                    first = Some(file);
                    writer.set_modified(file, entry.modified)
                }),
                Some(first) => writer.hard_link(*parent, name, first),
            };
            written.map_err(|error| {
                failure = Some(error);
                io::Error::other("the disk cannot be written")
            })?;
        }
        Ok(())
    });
    match (visited, failure) {
        // A layer's own fault says more than that its content was short.
        (Err(error @ ImageError::Refused { .. }), _)
        | (Err(error), Some(WriteError::Source { .. }) | None) => return Err(error),
        (_, Some(error)) => return Err(failed(DiskError::Write(error))),
        (Ok(()), None) => {}
    }
    let (_, geometry) = disk.finish().map_err(failed)?;
    Ok(geometry.bytes)
}

/// A path's directory and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Removes disks that the list does not name: those of an older version, and those that were too many.
fn remove_unlisted(dir: &Path, disks: &Disks) {
    let listed = |path: &Path| {
        path == dir.join(LIST) || disks.disks.iter().any(|made| made.path(dir) == path)
    };
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if !listed(&path)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "an old disk of a unikernel stays");
        }
    }
}

/// Bytes that an image's disks take.
pub(super) fn bytes_of(files: &Files, image: &Digest) -> u64 {
    let Ok(entries) = fs::read_dir(files.unikernels(image)) else {
        return 0;
    };
    let metadata = entries.flatten().filter_map(|entry| entry.metadata().ok());
    metadata.map(|meta| meta.blocks().saturating_mul(512)).sum()
}

/// Removes the disks of images that are not there. The caller is alone in the store. Gives the bytes freed.
pub(super) fn drop_unneeded(files: &Files, index: &Index) -> Result<u64, ImageError> {
    let mut bytes = 0;
    let needed: Vec<PathBuf> = index
        .records
        .keys()
        .map(|id| files.unikernels(id))
        .collect();
    for dir in files.entries("unikernels")? {
        if needed.contains(&dir) {
            continue;
        }
        for path in files.entries_of(&dir)? {
            bytes += fs::metadata(&path).map_or(0, |meta| meta.blocks().saturating_mul(512));
            fs::remove_file(&path).map_err(|error| ImageError::io("remove", &path, error))?;
        }
        fs::remove_dir(&dir).map_err(|error| ImageError::io("remove", &dir, error))?;
    }
    Ok(bytes)
}
