//! The store's directory: where things lie, how they are written whole or not at all, and who may touch them.
//!
//! ```text
//! blobs/sha256/HEX   verified blobs            partial/HEX   downloads to be taken up again
//! disks/KEY.sqfs     root disks                tmp/          work under way
//! images/HEX.json    one record an image       names.json    which name is which image
//! facts/HEX.json     what is known of its programs
//! unikernels/HEX/    its disks for unikernels
//! locks/             advisory locks (flock)
//! ```
//!
//! Whoever adds blobs or disks holds `locks/work` shared from before the first look until the record is written; whoever
//! removes them holds it alone. `locks/index` is held for every change of records and names.

use crate::disk::Cancel;
use crate::{ImageError, Refusal};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use vistara_model::Digest;

/// How often a lock that another process holds is tried again. Within this process nobody polls.
const LOCK_POLL: Duration = Duration::from_millis(25);

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// The directory.
#[derive(Debug)]
pub(crate) struct Files {
    root: PathBuf,
    keyed: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// Held while something is worked on; others that want the same wait for it.
#[derive(Debug)]
pub(crate) struct Guard {
    // The file first: its lock must be gone before the next one of this process is let in.
    _file: File,
    _inner: Option<tokio::sync::OwnedMutexGuard<()>>,
}

/// A file in `tmp/` that is removed unless it is moved to its place.
#[derive(Debug)]
pub(crate) struct Temp {
    pub(crate) path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        // Most often it has been moved to its place; a leftover goes when the store is next opened.
        let _ = fs::remove_file(&self.path);
    }
}

impl Files {
    pub(crate) fn open(root: &Path) -> Result<Files, ImageError> {
        for part in [
            "blobs/sha256",
            "partial",
            "disks",
            "images",
            "facts",
            "unikernels",
            "tmp",
            "locks",
        ] {
            let path = root.join(part);
            fs::create_dir_all(&path)
                .map_err(|error| ImageError::io("make the directory", &path, error))?;
        }
        let files = Files {
            root: root.to_owned(),
            keyed: Mutex::default(),
        };
        // Alone in the store: then what lies in tmp is left from a crash.
        if let Some(_guard) = files.try_alone()? {
            for path in files.entries("tmp")? {
                fs::remove_file(&path).map_err(|error| ImageError::io("remove", &path, error))?;
            }
        }
        Ok(files)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn partial(&self, digest: &Digest) -> PathBuf {
        self.root.join("partial").join(digest.hex())
    }

    pub(crate) fn disk(&self, key: &str) -> PathBuf {
        self.root.join("disks").join(format!("{key}.sqfs"))
    }

    pub(crate) fn record(&self, id: &Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.json", id.hex()))
    }

    pub(crate) fn facts(&self, id: &Digest) -> PathBuf {
        self.root.join("facts").join(format!("{}.json", id.hex()))
    }

    pub(crate) fn unikernels(&self, id: &Digest) -> PathBuf {
        self.root.join("unikernels").join(id.hex())
    }

    pub(crate) fn names(&self) -> PathBuf {
        self.root.join("names.json")
    }

    /// What lies in one of the store's directories.
    pub(crate) fn entries(&self, part: &str) -> Result<Vec<PathBuf>, ImageError> {
        self.entries_of(&self.root.join(part))
    }

    /// What lies in a directory.
    pub(crate) fn entries_of(&self, path: &Path) -> Result<Vec<PathBuf>, ImageError> {
        let failed = |error| ImageError::io("list", path, error);
        let mut found = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            found.push(entry.map_err(failed)?.path());
        }
        found.sort();
        Ok(found)
    }

    /// A new name in `tmp/`.
    pub(crate) fn temp(&self) -> Temp {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        Temp {
            path: self.root.join("tmp").join(name),
        }
    }

    /// Bytes that may still be written to the store's file system.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.root).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Moves a finished temporary file to its place, so that it is there whole even after a crash.
    pub(crate) fn publish(&self, temp: &Temp, place: &Path) -> Result<(), ImageError> {
        publish_path(&temp.path, place)
    }

    /// Replaces a small file.
    pub(crate) fn replace(&self, place: &Path, content: &[u8]) -> Result<(), ImageError> {
        let temp = self.temp();
        let failed = |error| ImageError::io("write", &temp.path, error);
        let mut file = File::create_new(&temp.path).map_err(failed)?;
        file.write_all(content).map_err(failed)?;
        drop(file);
        self.publish(&temp, place)
    }

    /// Copies a stream into a new temporary file. Stops one byte beyond `bytes_max`.
    pub(crate) fn spool(
        &self,
        mut reader: impl Read,
        bytes_max: u64,
        cancel: &Cancel,
        read_failed: impl Fn(std::io::Error) -> ImageError,
    ) -> Result<(Temp, Digest, u64), ImageError> {
        let temp = self.temp();
        let failed = |error| ImageError::io("write", &temp.path, error);
        let mut file = File::create_new(&temp.path).map_err(failed)?;
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let mut chunk = vec![0; 256 << 10];
        loop {
            cancel.check()?;
            let got = match reader.read(&mut chunk) {
                Ok(got) => got,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(read_failed(error)),
            };
            if got == 0 || bytes > bytes_max {
                break;
            }
            hash.update(&chunk[..got]);
            bytes += got as u64;
            file.write_all(&chunk[..got]).map_err(failed)?;
        }
        Ok((temp, Digest::from_sha256(hash.finalize().into()), bytes))
    }

    /// Puts these bytes among the blobs. Gives their digest, and whether they are new here.
    pub(crate) fn put_blob(&self, content: &[u8]) -> Result<(Digest, bool), ImageError> {
        let digest = crate::compress::digest_of(content);
        let place = self.blob(&digest);
        if place.exists() {
            return Ok((digest, false));
        }
        self.replace(&place, content)?;
        Ok((digest, true))
    }

    /// A blob's length, where it is here whole.
    pub(crate) fn blob_bytes(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.blob(digest)).ok().map(|meta| meta.len())
    }

    /// A small blob's content.
    pub(crate) fn read_blob(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>, ImageError> {
        let path = self.blob(digest);
        let failed = |error| ImageError::io("read", &path, error);
        let mut content = Vec::new();
        File::open(&path)
            .map_err(failed)?
            .take(bytes_max.saturating_add(1))
            .read_to_end(&mut content)
            .map_err(failed)?;
        if content.len() as u64 > bytes_max {
            let why = Refusal::Limit {
                what: "bytes in one document",
                limit: bytes_max,
            };
            return Err(ImageError::refused(format!("blob {}", digest.short()), why));
        }
        Ok(content)
    }

    fn lock_file(&self, name: &str) -> Result<File, ImageError> {
        let path = self.root.join("locks").join(name);
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| ImageError::io("open", &path, error))
    }

    /// Joins those who add to the store.
    pub(crate) async fn work(&self) -> Result<Guard, ImageError> {
        let file = self.lock_file("work")?;
        loop {
            match file.try_lock_shared() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
                Err(TryLockError::Error(error)) => return Err(self.lock_failed(error)),
            }
        }
        Ok(Guard {
            _file: file,
            _inner: None,
        })
    }

    /// As [`Files::work`], for those who only read blobs and may block: it waits while somebody removes.
    pub(crate) fn work_blocking(&self) -> Result<Guard, ImageError> {
        let file = self.lock_file("work")?;
        file.lock_shared()
            .map_err(|error| self.lock_failed(error))?;
        Ok(Guard {
            _file: file,
            _inner: None,
        })
    }

    /// The right to remove from the store, unless somebody adds to it.
    pub(crate) fn try_alone(&self) -> Result<Option<Guard>, ImageError> {
        let file = self.lock_file("work")?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Guard {
                _file: file,
                _inner: None,
            })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(self.lock_failed(error)),
        }
    }

    /// The right to change records and names. Held for moments only, so that waiting for it may block.
    pub(crate) fn index(&self) -> Result<Guard, ImageError> {
        let file = self.lock_file("index")?;
        file.lock().map_err(|error| self.lock_failed(error))?;
        Ok(Guard {
            _file: file,
            _inner: None,
        })
    }

    /// The right to work on the thing of this key, in this process and among processes.
    pub(crate) async fn keyed(&self, key: &str) -> Result<Guard, ImageError> {
        let mutex = {
            let mut keyed = self.keyed.lock().unwrap_or_else(PoisonError::into_inner);
            keyed.retain(|_, mutex| mutex.strong_count() > 0);
            match keyed.get(key).and_then(Weak::upgrade) {
                Some(mutex) => mutex,
                None => {
                    let mutex = Arc::new(tokio::sync::Mutex::new(()));
                    keyed.insert(key.to_owned(), Arc::downgrade(&mutex));
                    mutex
                }
            }
        };
        let inner = mutex.lock_owned().await;
        let file = self.lock_file(&lock_name(key))?;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
                Err(TryLockError::Error(error)) => return Err(self.lock_failed(error)),
            }
        }
        Ok(Guard {
            _file: file,
            _inner: Some(inner),
        })
    }

    /// As [`Files::keyed`], for those who may block. One key is locked either so or so, never by both.
    pub(crate) fn keyed_blocking(&self, key: &str) -> Result<Guard, ImageError> {
        let file = self.lock_file(&lock_name(key))?;
        file.lock().map_err(|error| self.lock_failed(error))?;
        Ok(Guard {
            _file: file,
            _inner: None,
        })
    }

    fn lock_failed(&self, error: std::io::Error) -> ImageError {
        ImageError::io("lock", &self.root.join("locks"), error)
    }
}

/// The lock file of a key. Lock files are never removed by those who use them, so that a name always means one lock. To have
/// few of them, keys share 256: two that meet by chance only wait for each other, and nobody holds two of one kind.
fn lock_name(key: &str) -> String {
    let kind = key.split(':').next().unwrap_or("key");
    let hash = Sha256::digest(key);
    format!("{kind}-{:02x}", hash[0])
}

/// Makes a file durable, then moves it to its place, durably.
pub(crate) fn publish_path(from: &Path, place: &Path) -> Result<(), ImageError> {
    let failed = |error| ImageError::io("publish", place, error);
    File::open(from)
        .and_then(|file| file.sync_all())
        .map_err(failed)?;
    fs::rename(from, place).map_err(failed)?;
    if let Some(directory) = place.parent() {
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed)?;
    }
    Ok(())
}
