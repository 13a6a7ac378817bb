//! The node's guest kernels: one directory each, made whole or not at all.

use super::BootError;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What is recorded of a kernel, in `record.json` beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// Version of this record's form.
    pub format: u32,
    /// The name it is kept under.
    pub name: String,
    /// The kernel's own release, as `uname -r` will say.
    pub release: String,
    /// Where it came from: a file's name, or a package's.
    pub source: String,
    /// SHA-256 of the `vmlinux`, in hexadecimal.
    pub vmlinux_sha256: String,
    /// Size of the `vmlinux` in bytes.
    pub vmlinux_bytes: u64,
    /// Names of the modules kept beside it.
    pub modules: Vec<String>,
    /// Names of the modules that are built into it, as far as its package says.
    pub builtin: Vec<String>,
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
        std::fs::create_dir_all(root).map_err(BootError::io("make directory", root))?;
        Ok(KernelStore {
            root: root.to_owned(),
        })
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
        let _ = (source, modules, name);
        Err(BootError::NoKernel)
    }

    /// Downloads Debian's current cloud kernel with the host's apt and adds it. Nothing is installed on the host.
    ///
    /// # Errors
    /// [`BootError`], with what to do where apt or its lists are missing.
    pub fn fetch_debian(&self, name: Option<&str>) -> Result<Kernel, BootError> {
        let _ = name;
        Err(BootError::NoKernel)
    }

    /// All kernels, by name.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn list(&self) -> Result<Vec<Kernel>, BootError> {
        let _ = &self.root;
        Ok(Vec::new())
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`] with those that exist.
    pub fn get(&self, name: &str) -> Result<Kernel, BootError> {
        Err(BootError::UnknownKernel {
            name: name.to_owned(),
            known: Vec::new(),
        })
    }

    /// The kernel that machines get when none is named, if there is one.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn default_kernel(&self) -> Result<Option<Kernel>, BootError> {
        Ok(None)
    }

    /// Makes a kernel the default.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn set_default(&self, name: &str) -> Result<(), BootError> {
        self.get(name).map(drop)
    }

    /// Removes a kernel. Running machines keep theirs: a monitor has read it by then.
    ///
    /// # Errors
    /// [`BootError::UnknownKernel`].
    pub fn remove(&self, name: &str) -> Result<(), BootError> {
        self.get(name).map(drop)
    }
}
