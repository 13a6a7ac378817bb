//! The node's guest kernels: one directory each, made whole or not at all.
//!
//! ```text
//! <root>/.default              the default kernel's name
//! <root>/<name>/record.json    what is recorded of it
//! <root>/<name>/vmlinux        uncompressed, without what no loader reads
//! <root>/<name>/modules/*.ko   the few modules that guests load, ready to load
//! <root>/.new-*                being made; removed when a day old
//! ```
//! A kernel appears by one rename, and replaces one of the same name by exchanging the two directories, so a reader sees
//! the old or the new one. Two processes may add at once.

use super::modules::{ModuleIndex, StagedModule};
use super::unpack::{self, KERNEL_BYTES_MAX, bzimage_payload, decompress, read_bounded};
use super::{BootError, debian, elf};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of [`KernelRecord`] that this program writes and reads.
const RECORD_FORMAT: u32 = 1;
const DEFAULT_FILE: &str = ".default";
const SCRATCH_PREFIX: &str = ".new-";
/// Scratch this old was left by a process that died; adding a kernel takes seconds.
const SCRATCH_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest record that is read: the module list is some kilobytes.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// What is recorded of a kernel, in `record.json` beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// Version of this record's form.
    pub format: u32,
    /// The name it is kept under.
    pub name: String,
    /// The kernel's own release, as `uname -r` will say.
    pub release: String,
    /// Where it came from: the file's name.
    pub source: String,
    /// SHA-256 of the `vmlinux`, in hexadecimal.
    pub vmlinux_sha256: String,
    /// Size of the `vmlinux` in bytes.
    pub vmlinux_bytes: u64,
    /// The modules kept beside it, in load order.
    pub modules: Vec<StagedModule>,
    /// Modules that some machines would want (network, shares, …) and that this kernel does not have.
    pub missing: Vec<String>,
    /// When it was added, in seconds since 1970.
    pub added_unix_s: u64,
}

/// A kernel in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// What is recorded of it.
    pub record: KernelRecord,
    /// Its directory.
    pub dir: PathBuf,
    /// Whether machines get it when none is named.
    pub is_default: bool,
}

impl Kernel {
    /// The uncompressed kernel.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }
    /// The directory of its modules, each `<name>.ko`.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }
}

/// The guest kernels of a node. Methods block on files: call them off the runtime's threads.
#[derive(Debug, Clone)]
pub struct KernelStore {
    root: PathBuf,
}

impl KernelStore {
    /// Opens the store in `root`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(root: &Path) -> Result<KernelStore, BootError> {
        fs::create_dir_all(root).map_err(BootError::io("make directory", root))?;
        let store = KernelStore {
            root: root.to_owned(),
        };
        store.clear_old_scratch();
        Ok(store)
    }

    /// Adds the kernel in `source`: a Debian `linux-image-*.deb`, a bzImage (`vmlinuz`) or a `vmlinux`; for the last two
    /// `modules` may name a directory of modules. Its name is `name`, or the kernel's release. The first kernel becomes
    /// the default. One of the same name is replaced, also while machines that were started from it run.
    ///
    /// # Errors
    /// [`BootError`]; the store is as it was then.
    pub fn add(
        &self,
        source: &Path,
        modules: Option<&Path>,
        name: Option<&str>,
    ) -> Result<Kernel, BootError> {
        name.map(check_name).transpose()?;
        let scratch = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempdir_in(&self.root)
            .map_err(BootError::io("make directory in", &self.root))?;
        let unpacked = scratch.path().join("unpacked");
        let is_deb = unpack::is_deb(&read_head(source)?);
        let (image, package_modules) = if is_deb {
            let package = unpack::deb(source, &unpacked)?;
            (package.bzimage, Some(package.modules))
        } else {
            (source.to_owned(), None)
        };
        let (vmlinux, release) = read_kernel(&image)?;
        let name = match name {
            Some(name) => name.to_owned(),
            None => release.clone(),
        };
        check_name(&name)?;
        let index = match modules.or(package_modules.as_deref()) {
            Some(dir) => ModuleIndex::scan(dir)?,
            None => ModuleIndex::default(),
        };
        let resolved = index.resolve(&name)?;

        let fresh = scratch.path().join("kernel");
        let module_dir = fresh.join("modules");
        fs::create_dir_all(&module_dir).map_err(BootError::io("make directory", &module_dir))?;
        write_synced(&fresh.join("vmlinux"), &vmlinux)?;
        for (module, data) in &resolved.modules {
            write_synced(&module_dir.join(format!("{}.ko", module.name)), data)?;
        }
        let source_name = source.file_name().unwrap_or(source.as_os_str());
        let record = KernelRecord {
            format: RECORD_FORMAT,
            name: name.clone(),
            release,
            source: source_name.to_string_lossy().into_owned(),
            vmlinux_sha256: hex::encode(Sha256::digest(&vmlinux)),
            vmlinux_bytes: vmlinux.len() as u64,
            modules: resolved.modules.into_iter().map(|(m, _)| m).collect(),
            missing: resolved.missing,
            added_unix_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        };
        let record_path = fresh.join("record.json");
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|error| BootError::malformed(&record_path, "record", error.to_string()))?;
        write_synced(&record_path, &text)?;
        self.put_in_place(&fresh, &name)?;
        if self
            .default_name()
            .is_none_or(|default| !self.root.join(default).exists())
        {
            self.set_default(&name)?;
        }
        self.get(&name)
    }

    /// Downloads Debian's current cloud kernel with the host's apt and adds it. Nothing is installed on the host.
    ///
    /// # Errors
    /// [`BootError`], with what to do where apt or its lists are missing.
    pub fn fetch_debian(&self, name: Option<&str>) -> Result<Kernel, BootError> {
        let scratch = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempdir_in(&self.root)
            .map_err(BootError::io("make directory in", &self.root))?;
        let package = debian::download(scratch.path())?;
        self.add(&package, None, name)
    }

    /// All kernels, by name.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn list(&self) -> Result<Vec<Kernel>, BootError> {
        self.names()?.iter().map(|name| self.get(name)).collect()
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`] with those that exist.
    pub fn get(&self, name: &str) -> Result<Kernel, BootError> {
        check_name(name)?;
        let dir = self.root.join(name);
        let path = dir.join("record.json");
        if !path.exists() {
            return Err(BootError::UnknownKernel {
                name: name.to_owned(),
                known: self.names()?,
            });
        }
        let damaged = |reason: String| BootError::malformed(&path, "kernel record", reason);
        let text = read_bounded(&path, RECORD_BYTES_MAX)?;
        let record: KernelRecord =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if record.format != RECORD_FORMAT {
            return Err(damaged(format!(
                "its format is {}, this program reads {RECORD_FORMAT}; add the kernel again",
                record.format
            )));
        }
        Ok(Kernel {
            is_default: self.default_name().as_deref() == Some(name),
            record,
            dir,
        })
    }

    /// The kernel that machines get when none is named, if there is one.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn default_kernel(&self) -> Result<Option<Kernel>, BootError> {
        match self.default_name() {
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
        self.get(name)?;
        let path = self.root.join(DEFAULT_FILE);
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

    /// Removes a kernel. Running machines keep theirs: a monitor has read it by then. If it was the default, the one
    /// added last of those that are left becomes it.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn remove(&self, name: &str) -> Result<(), BootError> {
        let kernel = self.get(name)?;
        let scratch = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempdir_in(&self.root)
            .map_err(BootError::io("make directory in", &self.root))?;
        // Out of sight in one step; the scratch directory takes its files with it.
        let gone = scratch.path().join("removed");
        fs::rename(&kernel.dir, &gone).map_err(BootError::io("remove", &kernel.dir))?;
        if kernel.is_default {
            let left = self.list()?;
            match left.iter().max_by_key(|kernel| kernel.record.added_unix_s) {
                Some(next) => self.set_default(&next.record.name)?,
                None => {
                    let path = self.root.join(DEFAULT_FILE);
                    fs::remove_file(&path).map_err(BootError::io("remove", &path))?;
                }
            }
        }
        Ok(())
    }

    fn default_name(&self) -> Option<String> {
        let name = fs::read_to_string(self.root.join(DEFAULT_FILE)).ok()?;
        check_name(&name).is_ok().then_some(name)
    }

    fn names(&self) -> Result<Vec<String>, BootError> {
        let error = || BootError::io("read directory", &self.root);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(error())? {
            let entry = entry.map_err(error())?;
            if let Ok(name) = entry.file_name().into_string()
                && check_name(&name).is_ok()
                && entry.path().join("record.json").exists()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn put_in_place(&self, fresh: &Path, name: &str) -> Result<(), BootError> {
        let dir = self.root.join(name);
        let moved = match renameat_with(CWD, fresh, CWD, &dir, RenameFlags::NOREPLACE) {
            // The old one is now in the scratch directory and goes with it.
            Err(rustix::io::Errno::EXIST) => {
                renameat_with(CWD, fresh, CWD, &dir, RenameFlags::EXCHANGE)
            }
            other => other,
        };
        moved.map_err(|error| BootError::io("put in place", &dir)(error.into()))
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
fn check_name(name: &str) -> Result<(), BootError> {
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

fn read_head(path: &Path) -> Result<Vec<u8>, BootError> {
    use std::io::Read as _;
    let file = fs::File::open(path).map_err(BootError::io("open", path))?;
    let mut head = Vec::new();
    file.take(16)
        .read_to_end(&mut head)
        .map_err(BootError::io("read", path))?;
    Ok(head)
}

/// The kernel in a bzImage or `vmlinux`, compacted, and its release.
fn read_kernel(path: &Path) -> Result<(Vec<u8>, String), BootError> {
    let data = read_bounded(path, KERNEL_BYTES_MAX)?;
    let unpacked;
    let vmlinux = match bzimage_payload(&data) {
        Some(Ok(payload)) => {
            unpacked = decompress(payload, KERNEL_BYTES_MAX)
                .map_err(|error| BootError::malformed(path, "bzImage", error.to_string()))?;
            &unpacked
        }
        Some(Err(reason)) => return Err(BootError::malformed(path, "bzImage", reason)),
        None => &data,
    };
    let damaged = |error: elf::ElfError| {
        BootError::malformed(
            path,
            "kernel",
            format!("{error}; give a Debian package (.deb), a bzImage (vmlinuz) or a vmlinux"),
        )
    };
    let parsed = elf::Elf::parse(vmlinux).map_err(damaged)?;
    if !parsed.has_pvh_entry().map_err(damaged)? {
        return Err(BootError::NoPvhEntry(path.to_owned()));
    }
    let release = release(vmlinux)
        .ok_or_else(|| BootError::malformed(path, "kernel", "no Linux version is written in it"))?;
    Ok((elf::compact_kernel(vmlinux).map_err(damaged)?, release))
}

/// The release in the kernel's banner, `Linux version <release> (…`.
fn release(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = vmlinux;
    loop {
        let at = rest
            .windows(BANNER.len())
            .position(|window| window == BANNER)?;
        rest = &rest[at + BANNER.len()..];
        let word = rest.split(|byte| *byte == b' ' || *byte == 0).next()?;
        let word = std::str::from_utf8(word.get(..word.len().min(100))?).ok();
        if let Some(word) = word
            && word.starts_with(|c: char| c.is_ascii_digit())
            && check_name(word).is_ok()
        {
            return Some(word.to_owned());
        }
    }
}

fn write_synced(path: &Path, data: &[u8]) -> Result<(), BootError> {
    let mut file = fs::File::create(path).map_err(BootError::io("create", path))?;
    file.write_all(data).map_err(BootError::io("write", path))?;
    file.sync_all().map_err(BootError::io("write", path))
}

#[cfg(test)]
mod tests;
