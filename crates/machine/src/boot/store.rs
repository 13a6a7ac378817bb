//! The node's Linux guest kernels, on a shelf of their own ([`super::shelf`]).
//!
//! ```text
//! <root>/<name>/vmlinux        uncompressed, without what no loader reads
//! <root>/<name>/modules/*.ko   the few modules that guests load, ready to load
//! <root>/<name>/record.json    what is recorded of it
//! ```

use super::modules::{ModuleIndex, StagedModule, stages};
use super::shelf::{Shelf, check_name, now_unix_s, write_synced};
use super::unpack::{self, KERNEL_BYTES_MAX, bzimage_payload, decompress, read_bounded};
use super::{BootError, debian, elf, own};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Version of [`KernelRecord`] that this program writes and reads.
const RECORD_FORMAT: u32 = 1;
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
    /// The stages whose modules were looked for when it was added; none are recorded of kernels added before this field.
    #[serde(default)]
    pub stages: Vec<String>,
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
    /// The stages that this version loads modules for and that were not looked for when the kernel was added. To add it again
    /// mends that.
    pub fn stages_not_looked_for(&self) -> Vec<&'static str> {
        let known = |stage: &&str| self.record.stages.iter().any(|known| known == stage);
        stages().filter(|stage| !known(stage)).collect()
    }
}

/// The guest kernels of a node. Methods block on files: call them off the runtime's threads.
#[derive(Debug, Clone)]
pub struct KernelStore {
    shelf: Shelf,
}

impl KernelStore {
    /// Opens the store in `root`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(root: &Path) -> Result<KernelStore, BootError> {
        Ok(KernelStore {
            shelf: Shelf::open(root)?,
        })
    }

    /// Adds the kernel in `source`: a Debian `linux-image-*.deb`, a bzImage (`vmlinuz`) or a `vmlinux`; for the last two
    /// `modules` may name a directory of modules. Its name is `name`, or the kernel's release. The first kernel becomes
    /// the default; one that [`own::build`] made becomes it too, unless it lacks something that some machines want or the
    /// default was chosen by [`KernelStore::set_default`]. One of the same name is replaced, also while machines that were started from it run.
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
        let scratch = self.shelf.scratch()?;
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
            stages: stages().map(str::to_owned).collect(),
            added_unix_s: now_unix_s(),
        };
        self.shelf.put(&fresh, &name, &record)?;
        if is_good_own(&record) && !self.shelf.is_chosen() {
            self.shelf.set_default(&name)?;
        }
        self.get(&name)
    }

    /// Downloads Debian's current cloud kernel with the host's apt and adds it. Nothing is installed on the host.
    ///
    /// # Errors
    /// [`BootError`], with what to do where apt or its lists are missing.
    pub fn fetch_debian(&self, name: Option<&str>) -> Result<Kernel, BootError> {
        let scratch = self.shelf.scratch()?;
        let package = debian::download(scratch.path())?;
        self.add(&package, None, name)
    }

    /// All kernels, by name.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn list(&self) -> Result<Vec<Kernel>, BootError> {
        let names = self.shelf.names()?;
        names.iter().map(|name| self.get(name)).collect()
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`] with those that exist.
    pub fn get(&self, name: &str) -> Result<Kernel, BootError> {
        let record: KernelRecord = self.shelf.record(name, "kernel record", RECORD_FORMAT)?;
        Ok(Kernel {
            is_default: self.shelf.default_name().as_deref() == Some(name),
            dir: self.shelf.dir(name),
            record,
        })
    }

    /// The kernel that machines get when none is named, if there is one.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn default_kernel(&self) -> Result<Option<Kernel>, BootError> {
        match self.shelf.default_name() {
            None => Ok(None),
            Some(name) => match self.get(&name) {
                Err(BootError::UnknownKernel { .. }) => Ok(None),
                other => other.map(Some),
            },
        }
    }

    /// Makes a kernel the default by its owner's word: none that is added takes its place.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn set_default(&self, name: &str) -> Result<(), BootError> {
        self.shelf.choose(name)
    }

    /// Removes a kernel. Running machines keep theirs: a monitor has read it by then. If it was the default, the one
    /// added last of those that are left becomes it, and one of our own before all others.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn remove(&self, name: &str) -> Result<(), BootError> {
        self.shelf.remove(name, || {
            let left = self.list()?;
            let next = left
                .into_iter()
                .max_by_key(|kernel| (is_good_own(&kernel.record), kernel.record.added_unix_s));
            Ok(next.map(|kernel| kernel.record.name))
        })
    }
}

/// Whether a kernel is one of our own that lacks nothing: it may become the default by itself.
fn is_good_own(record: &KernelRecord) -> bool {
    own::is_own(&record.release) && record.missing.is_empty()
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

#[cfg(test)]
mod tests;
