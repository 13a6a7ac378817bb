//! Firecracker's own directory: the files that it may open, under names of ours, and nothing else.
//!
//! ```text
//! <machine>/jail/firecracker/<id>/root/      jailed: its root directory, made by us, taken over by the jailer
//! <machine>/jail/root/                       not jailed: where it works
//!     kernel initramfs disk0 disk1 …         the machine's files
//!     api.sock agent.sock log                its own
//! ```
//! As root, a file that everybody may read, and one that belongs to the machine alone, is shown here by a mount in
//! Firecracker's own mount namespace ([`Bind`]): the host sees an empty file in its place. A file that others use and that
//! Firecracker's user may not read is copied: neither its owner nor its mode is changed. An ordinary user's Firecracker sees
//! symbolic links.
//!
//! Firecracker may write to this directory: what lies in it is not trusted by those who read it.

use super::io_error;
use crate::VmmError;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown, symlink};
use std::path::{Path, PathBuf};
use vistara_host::files;
use vistara_host::mounts::Bind;

/// The part of a machine's directory that is Firecracker's.
const JAIL: &str = "jail";

/// How Firecracker is set apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Apart {
    /// By its jailer: its own root directory, user, mounts, processes and network.
    Jailed(u32, u32),
    /// The same without a root directory of its own: there is no jailer.
    Fenced(u32, u32),
    /// Hardly: we are an ordinary user, or root that was told to stay so.
    Same,
}

impl Apart {
    /// As whom it runs, where that is not as we do.
    pub(super) fn user(self) -> Option<(u32, u32)> {
        match self {
            Apart::Jailed(uid, gid) | Apart::Fenced(uid, gid) => Some((uid, gid)),
            Apart::Same => None,
        }
    }
}

/// To whom a file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Belongs {
    /// To many machines.
    ToMany,
    /// To this machine, which writes to it.
    ToMachine,
}

/// The directory of one Firecracker.
#[derive(Debug)]
pub(super) struct Stage {
    apart: Apart,
    base: PathBuf,
    root: PathBuf,
    binds: Vec<Bind>,
}

impl Stage {
    /// Makes it, empty. `program` is Firecracker's file name, which the jailer puts into the path.
    pub(super) fn make(
        dir: &Path,
        apart: Apart,
        program: &str,
        id: &str,
    ) -> Result<Stage, VmmError> {
        remove(dir);
        let base = dir.join(JAIL);
        let root = match apart {
            Apart::Jailed(..) => base.join(program).join(id).join("root"),
            Apart::Fenced(..) | Apart::Same => base.join("root"),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(io_error("making the directory", &root))?;
        if let Some((uid, gid)) = apart.user() {
            std::os::unix::fs::chown(&root, Some(uid), Some(gid))
                .map_err(io_error("making the directory", &root))?;
        }
        Ok(Stage {
            apart,
            base,
            root,
            binds: Vec::new(),
        })
    }

    /// The jailer's `--chroot-base-dir`.
    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    /// Firecracker's directory.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// What its launch must mount.
    pub(super) fn take_binds(&mut self) -> Vec<Bind> {
        std::mem::take(&mut self.binds)
    }

    /// Shows the file `source` as `name`.
    pub(super) fn show(
        &mut self,
        name: &str,
        source: &Path,
        belongs: Belongs,
    ) -> Result<(), VmmError> {
        let error = io_error("opening", source);
        let file = OpenOptions::new()
            .read(true)
            .write(belongs == Belongs::ToMachine)
            .open(source)
            .map_err(&error)?;
        let target = self.root.join(name);
        let Some((uid, gid)) = self.apart.user() else {
            let absolute = fs::canonicalize(source).map_err(&error)?;
            return symlink(absolute, &target).map_err(io_error("linking", &target));
        };
        let data = file.metadata().map_err(&error)?;
        let for_all = data.mode() & 0o4 != 0;
        if belongs == Belongs::ToMany && !for_all {
            return self.copy(name, &file);
        }
        if belongs == Belongs::ToMachine && (data.uid(), data.gid()) != (uid, gid) {
            fchown(&file, Some(uid), Some(gid)).map_err(io_error("handing over", source))?;
        }
        let placed = File::create_new(&target)
            .and_then(|_| Bind::new(&file, &target, belongs == Belongs::ToMany));
        self.binds
            .push(placed.map_err(io_error("showing", &target))?);
        Ok(())
    }

    /// Puts a copy of an open file there, as `name`.
    fn copy(&self, name: &str, file: &File) -> Result<(), VmmError> {
        let target = self.root.join(name);
        files::clone_sparse_file(file, &target)
            .and_then(|()| File::open(&target))
            .and_then(|copy| self.hand_over(&copy))
            .map_err(io_error("copying to", &target))
    }

    /// Writes a file there that Firecracker may read.
    pub(super) fn write(&self, name: &str, content: &mut dyn io::Read) -> Result<(), VmmError> {
        let target = self.root.join(name);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let written = options.open(&target).and_then(|mut file| {
            io::copy(content, &mut file)?;
            file.flush()?;
            self.hand_over(&file)
        });
        written.map_err(io_error("writing", &target))
    }

    fn hand_over(&self, file: &File) -> io::Result<()> {
        match self.apart.user() {
            Some((uid, gid)) => fchown(file, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// A place at which Firecracker finds its own descriptors; the directory to mount there, where one is.
    pub(super) fn show_own_descriptors(&self) -> Result<Option<PathBuf>, VmmError> {
        let target = self.root.join("proc");
        match self.apart {
            Apart::Jailed(..) | Apart::Fenced(..) => fs::create_dir(&target)
                .map(|()| Some(target.clone()))
                .map_err(io_error("making the directory", &target)),
            Apart::Same => symlink("/proc", &target)
                .map(|()| None)
                .map_err(io_error("linking", &target)),
        }
    }
}

/// Removes it, whatever Firecracker has left in it. No symbolic link is followed.
pub(super) fn remove(dir: &Path) {
    let base = dir.join(JAIL);
    match fs::remove_dir_all(&base) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, dir = %base.display(), "a monitor's directory stays");
        }
        _ => {}
    }
}
