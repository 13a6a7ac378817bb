//! A directory of named things, each a directory that is made whole or not at all, and one of them the default.
//!
//! ```text
//! <root>/.default              the default's name
//! <root>/.chosen               the same, where its owner chose it
//! <root>/<name>/record.json    what is recorded of it
//! <root>/.new-*                being made; removed when a day old
//! ```
//! A thing appears by one rename, and replaces one of the same name by exchanging the two directories, so a reader sees
//! the old or the new one. Two processes may add at once. What a thing is made of and what its record says is its maker's.

use super::BootError;
use super::unpack::read_bounded;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DEFAULT_FILE: &str = ".default";
const CHOSEN_FILE: &str = ".chosen";
const RECORD_FILE: &str = "record.json";
const SCRATCH_PREFIX: &str = ".new-";
/// Scratch this old was left by a process that died; adding a kernel takes seconds.
const SCRATCH_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest record that is read: a list of modules is some kilobytes.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// The directory.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    root: PathBuf,
}

impl Shelf {
    /// Opens the one in `root`, which is made if absent.
    pub(super) fn open(root: &Path) -> Result<Shelf, BootError> {
        fs::create_dir_all(root).map_err(BootError::io("make directory", root))?;
        let shelf = Shelf {
            root: root.to_owned(),
        };
        shelf.clear_old_scratch();
        Ok(shelf)
    }

    pub(super) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A directory to make things in, gone when it is dropped.
    pub(super) fn scratch(&self) -> Result<tempfile::TempDir, BootError> {
        tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempdir_in(&self.root)
            .map_err(BootError::io("make directory in", &self.root))
    }

    /// Puts what was made in `fresh`, in a scratch directory, in its place, with its record. The first becomes the default.
    pub(super) fn put<R: Serialize>(
        &self,
        fresh: &Path,
        name: &str,
        record: &R,
    ) -> Result<(), BootError> {
        let path = fresh.join(RECORD_FILE);
        let text = serde_json::to_vec_pretty(record)
            .map_err(|error| BootError::malformed(&path, "record", error.to_string()))?;
        write_synced(&path, &text)?;
        let dir = self.dir(name);
        let moved = match renameat_with(CWD, fresh, CWD, &dir, RenameFlags::NOREPLACE) {
            // The old one is now in the scratch directory and goes with it.
            Err(rustix::io::Errno::EXIST) => {
                renameat_with(CWD, fresh, CWD, &dir, RenameFlags::EXCHANGE)
            }
            other => other,
        };
        moved.map_err(|error| BootError::io("put in place", &dir)(error.into()))?;
        if self
            .default_name()
            .is_none_or(|default| !self.dir(&default).exists())
        {
            self.set_default(name)?;
        }
        Ok(())
    }

    /// The record of this name, whose form has the version `format`; `what` names it in messages.
    pub(super) fn record<R: DeserializeOwned>(
        &self,
        name: &str,
        what: &'static str,
        format: u32,
    ) -> Result<R, BootError> {
        #[derive(serde::Deserialize)]
        struct Format {
            format: u32,
        }
        let path = self.existing(name)?.join(RECORD_FILE);
        let damaged = |reason: String| BootError::malformed(&path, what, reason);
        let text = read_bounded(&path, RECORD_BYTES_MAX)?;
        let found: Format =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if found.format != format {
            return Err(damaged(format!(
                "its format is {}, this program reads {format}; add the kernel again",
                found.format
            )));
        }
        serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))
    }

    fn exists(&self, name: &str) -> bool {
        self.dir(name).join(RECORD_FILE).exists()
    }

    fn existing(&self, name: &str) -> Result<PathBuf, BootError> {
        check_name(name)?;
        if self.exists(name) {
            return Ok(self.dir(name));
        }
        Err(BootError::UnknownKernel {
            name: name.to_owned(),
            known: self.names()?,
        })
    }

    pub(super) fn set_default(&self, name: &str) -> Result<(), BootError> {
        self.write_name(DEFAULT_FILE, name)
    }

    /// Makes this the default by its owner's word, which holds until the owner says another or removes it.
    pub(super) fn choose(&self, name: &str) -> Result<(), BootError> {
        // In this order a choice that was cut short has not been made; in the other it would be taken for none of the owner's.
        self.write_name(CHOSEN_FILE, name)?;
        self.write_name(DEFAULT_FILE, name)
    }

    /// Whether the default is its owner's choice.
    pub(super) fn is_chosen(&self) -> bool {
        let default = self.default_name();
        default.is_some_and(|name| self.exists(&name) && self.name_in(CHOSEN_FILE) == Some(name))
    }

    fn write_name(&self, file: &str, name: &str) -> Result<(), BootError> {
        self.existing(name)?;
        let path = self.root.join(file);
        let error = || BootError::io("write", &path);
        let mut file = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempfile_in(&self.root)
            .map_err(error())?;
        file.write_all(name.as_bytes()).map_err(error())?;
        file.as_file().sync_all().map_err(error())?;
        file.persist(&path).map_err(|e| error()(e.error))?;
        Ok(())
    }

    /// Removes the thing of this name. If it was the default, `next` names the one that becomes it.
    pub(super) fn remove(
        &self,
        name: &str,
        next: impl FnOnce() -> Result<Option<String>, BootError>,
    ) -> Result<(), BootError> {
        let dir = self.existing(name)?;
        let was_default = self.default_name().as_deref() == Some(name);
        let scratch = self.scratch()?;
        // Out of sight in one step; the scratch directory takes its files with it.
        let gone = scratch.path().join("removed");
        fs::rename(&dir, &gone).map_err(BootError::io("remove", &dir))?;
        if self.name_in(CHOSEN_FILE).as_deref() == Some(name) {
            // Another of this name that comes later is not what was chosen.
            let path = self.root.join(CHOSEN_FILE);
            fs::remove_file(&path).map_err(BootError::io("remove", &path))?;
        }
        if was_default {
            match next()? {
                Some(next) => self.set_default(&next)?,
                None => {
                    let path = self.root.join(DEFAULT_FILE);
                    fs::remove_file(&path).map_err(BootError::io("remove", &path))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn default_name(&self) -> Option<String> {
        self.name_in(DEFAULT_FILE)
    }

    fn name_in(&self, file: &str) -> Option<String> {
        let name = fs::read_to_string(self.root.join(file)).ok()?;
        check_name(&name).is_ok().then_some(name)
    }

    /// All names, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, BootError> {
        let error = || BootError::io("read directory", &self.root);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(error())? {
            let entry = entry.map_err(error())?;
            if let Ok(name) = entry.file_name().into_string()
                && check_name(&name).is_ok()
                && entry.path().join(RECORD_FILE).exists()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn clear_old_scratch(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            let old = entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > SCRATCH_AGE_MAX));
            if old
                && entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with(SCRATCH_PREFIX)
            {
                // What cannot be removed now is tried again at the next start.
                let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
            }
        }
    }
}

/// A name that is one plain path component.
pub(super) fn check_name(name: &str) -> Result<(), BootError> {
    let head = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let body = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b));
    if head && body && name.len() <= 100 {
        Ok(())
    } else {
        Err(BootError::Name(name.to_owned()))
    }
}

pub(super) fn write_synced(path: &Path, data: &[u8]) -> Result<(), BootError> {
    let mut file = fs::File::create(path).map_err(BootError::io("create", path))?;
    file.write_all(data).map_err(BootError::io("write", path))?;
    file.sync_all().map_err(BootError::io("write", path))
}

/// Seconds since 1970.
pub(super) fn now_unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
