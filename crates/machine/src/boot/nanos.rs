//! The node's Nanos kernels: one directory each, made whole or not at all.
//!
//! ```text
//! <root>/<name>/kernel.img        the file as it was given
//! <root>/<name>/firecracker.img   a copy that Firecracker can start
//! <root>/<name>/klibs/*           its modules, where they were given
//! <root>/<name>/record.json       what is recorded of it
//! ```
//! The kernel files are readable for all, so that a monitor's own user may open them. Nanos kernels cannot be told from
//! their file which version they are, unless whoever built one wrote it there; else their digest stands for it.

use super::BootError;
use super::shelf::{Shelf, check_name, now_unix_s, write_synced};
use super::unpack::read_bounded;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use vistara_nanos::kernel::{KERNEL_BYTES_MAX, neutralise_pvh_note};
use vistara_nanos::{KernelError, KernelFacts};

/// Version of [`NanosKernelRecord`] that this program writes and reads.
const RECORD_FORMAT: u32 = 1;
const WHAT: &str = "Nanos kernel";
const KERNEL: &str = "kernel.img";
const FIRECRACKER: &str = "firecracker.img";
const KLIBS: &str = "klibs";
/// Modules that are taken, and bytes of one: Nanos has about twenty, the largest of 650 KB.
const KLIBS_MAX: usize = 128;
const KLIB_BYTES_MAX: u64 = 16 << 20;
/// Hexadecimal digits of the digest that stand for a version.
const DIGEST_DIGITS: usize = 12;

/// What is recorded of a Nanos kernel, in `record.json` beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NanosKernelRecord {
    /// Version of this record's form.
    pub format: u32,
    /// The name it is kept under.
    pub name: String,
    /// Its version, where it is written in the file; else the beginning of its digest.
    pub version: String,
    /// Where it came from: the file's name.
    pub source: String,
    /// SHA-256 of the kernel, in hexadecimal.
    pub kernel_sha256: String,
    /// Size of the kernel in bytes.
    pub kernel_bytes: u64,
    /// Bytes that it takes in a guest's memory when it is loaded.
    pub loaded_bytes: u64,
    /// Names of the modules kept beside it, sorted.
    pub klibs: Vec<String>,
    /// When it was added, in seconds since 1970.
    pub added_unix_s: u64,
}

/// A Nanos kernel in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NanosKernel {
    /// What is recorded of it.
    pub record: NanosKernelRecord,
    /// The kernel as it was given, for QEMU.
    pub path: PathBuf,
    /// A copy without the note that makes Firecracker start it in a way that it does not survive.
    pub firecracker_path: PathBuf,
    /// The directory of its modules, where it has any.
    pub klibs: Option<PathBuf>,
    /// Whether unikernels get it.
    pub is_default: bool,
}

/// The Nanos kernels of a node. Methods block on files: call them off the runtime's threads.
#[derive(Debug, Clone)]
pub struct NanosKernels {
    shelf: Shelf,
}

impl NanosKernels {
    /// Opens the store in `root`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(root: &Path) -> Result<NanosKernels, BootError> {
        Ok(NanosKernels {
            shelf: Shelf::open(root)?,
        })
    }

    /// Adds the kernel in the file `source`, and the modules in the directory `klibs`. Its name is `name`, or made of its
    /// version. The first kernel becomes the default. One of the same name is replaced, also while machines that were started
    /// from it run.
    ///
    /// # Errors
    /// [`BootError::Malformed`] for what is no Nanos kernel that can be started, and others; the store is as it was then.
    pub fn add(
        &self,
        source: &Path,
        klibs: Option<&Path>,
        name: Option<&str>,
    ) -> Result<NanosKernel, BootError> {
        name.map(check_name).transpose()?;
        let kernel = read_bounded(source, KERNEL_BYTES_MAX as u64)?;
        let damaged = |error: KernelError| {
            BootError::malformed(
                source,
                WHAT,
                format!("{error}; give the kernel.img of a Nanos release or build"),
            )
        };
        let facts = KernelFacts::read(&kernel).map_err(damaged)?;
        if facts.pvh_entry.is_none() {
            return Err(BootError::malformed(
                source,
                WHAT,
                "it has no PVH entry note, by which QEMU starts it; give the file as it was built",
            ));
        }
        let digest = hex::encode(Sha256::digest(&kernel));
        let version = version(&kernel).unwrap_or_else(|| digest[..DIGEST_DIGITS].to_owned());
        let name = name.map_or_else(|| format!("nanos-{version}"), str::to_owned);
        check_name(&name)?;

        let scratch = self.shelf.scratch()?;
        let fresh = scratch.path().join("kernel");
        fs::create_dir(&fresh).map_err(BootError::io("make directory", &fresh))?;
        write_for_all(&fresh.join(KERNEL), &kernel)?;
        let copy = neutralise_pvh_note(&kernel).map_err(damaged)?;
        write_for_all(&fresh.join(FIRECRACKER), &copy)?;
        let klibs = match klibs {
            Some(from) => copy_klibs(from, &fresh.join(KLIBS))?,
            None => Vec::new(),
        };
        let source_name = source.file_name().unwrap_or(source.as_os_str());
        let record = NanosKernelRecord {
            format: RECORD_FORMAT,
            name: name.clone(),
            version,
            source: source_name.to_string_lossy().into_owned(),
            kernel_sha256: digest,
            kernel_bytes: kernel.len() as u64,
            loaded_bytes: facts.loaded_bytes,
            klibs,
            added_unix_s: now_unix_s(),
        };
        self.shelf.put(&fresh, &name, &record)?;
        self.get(&name)
    }

    /// All kernels, by name.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn list(&self) -> Result<Vec<NanosKernel>, BootError> {
        let names = self.shelf.names()?;
        names.iter().map(|name| self.get(name)).collect()
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`] with those that exist.
    pub fn get(&self, name: &str) -> Result<NanosKernel, BootError> {
        let record: NanosKernelRecord = self.shelf.record(name, "kernel record", RECORD_FORMAT)?;
        let dir = self.shelf.dir(name);
        Ok(NanosKernel {
            path: dir.join(KERNEL),
            firecracker_path: dir.join(FIRECRACKER),
            klibs: (!record.klibs.is_empty()).then(|| dir.join(KLIBS)),
            is_default: self.shelf.default_name().as_deref() == Some(name),
            record,
        })
    }

    /// The kernel that unikernels get, if there is one.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn default_kernel(&self) -> Result<Option<NanosKernel>, BootError> {
        match self.shelf.default_name() {
            None => Ok(None),
            Some(name) => match self.get(&name) {
                Err(BootError::UnknownKernel { .. }) => Ok(None),
                other => other.map(Some),
            },
        }
    }

    /// Makes a kernel the default.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn set_default(&self, name: &str) -> Result<(), BootError> {
        self.shelf.set_default(name)
    }

    /// Removes a kernel. Running machines keep theirs: a monitor has read it by then. If it was the default, the one added
    /// last of those that are left becomes it.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn remove(&self, name: &str) -> Result<(), BootError> {
        self.shelf.remove(name, || {
            let left = self.list()?;
            let next = left
                .into_iter()
                .max_by_key(|kernel| kernel.record.added_unix_s);
            Ok(next.map(|kernel| kernel.record.name))
        })
    }
}

/// Writes a file that any user of the host may read, whatever this process' mask.
fn write_for_all(path: &Path, data: &[u8]) -> Result<(), BootError> {
    write_synced(path, data)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
        .map_err(BootError::io("set the mode of", path))
}

/// Copies all plain files of a directory. Gives their names, sorted.
fn copy_klibs(from: &Path, to: &Path) -> Result<Vec<String>, BootError> {
    let listing = || BootError::io("read directory", from);
    fs::create_dir(to).map_err(BootError::io("make directory", to))?;
    let mut names = Vec::new();
    for entry in fs::read_dir(from).map_err(listing())? {
        let entry = entry.map_err(listing())?;
        // Builds keep tests of theirs in a directory beside them.
        if !entry.file_type().map_err(listing())?.is_file() {
            continue;
        }
        let refuse = |reason: &str| Err(BootError::malformed(&entry.path(), "module", reason));
        let Ok(name) = entry.file_name().into_string() else {
            return refuse("its name is not UTF-8");
        };
        if check_name(&name).is_err() {
            return refuse("its name is none of a module");
        }
        if names.len() == KLIBS_MAX {
            return refuse("there are more of them than any Nanos has");
        }
        let data = read_bounded(&entry.path(), KLIB_BYTES_MAX)?;
        if !data.starts_with(b"\x7fELF") {
            return refuse("it is not an ELF file");
        }
        write_for_all(&to.join(&name), &data)?;
        names.push(name);
    }
    if names.is_empty() {
        return Err(BootError::malformed(
            from,
            "directory of modules",
            "it has no files; it is called klibs, or klib, beside the kernel",
        ));
    }
    names.sort();
    Ok(names)
}

/// A version such as `0.1.55`, where it stands by itself in the file.
fn version(kernel: &[u8]) -> Option<String> {
    // Three numbers of at most five digits each.
    const BYTES_MAX: usize = 17;
    let numbers = |text: &str| {
        let parts: Vec<&str> = text.split('.').collect();
        let number = |part: &&str| {
            (1..=5).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
        };
        parts.len() == 3 && parts.iter().all(number)
    };
    kernel
        .split(|byte| *byte == 0)
        .filter(|text| text.starts_with(b"0.") && text.len() <= BYTES_MAX)
        .filter_map(|text| std::str::from_utf8(text).ok())
        .find(|text| numbers(text))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests;
