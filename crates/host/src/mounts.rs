//! Files and directories shown at another place to one launched program alone.
//!
//! A [`Bind`] is a copy of a mount that belongs to nobody yet. It is made here, from an open file, so that no name is looked
//! up twice, and attached in the program's own mount namespace between fork and exec: the host's mounts never change, and it
//! is gone with the program.

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_remount, move_mount, open_tree,
};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A file that a program sees at another place.
#[derive(Debug)]
pub struct Bind {
    tree: OwnedFd,
    target: CString,
    read_only: bool,
}

impl Bind {
    /// Shows the open `source` at `target`, which must exist by the launch: a file for a file. Needs the right to mount.
    ///
    /// # Errors
    /// The system's; a kernel before 5.2 cannot do this.
    pub fn new(source: &File, target: &Path, read_only: bool) -> io::Result<Bind> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(Bind {
            tree: open_tree(source.as_fd(), c"", flags)?,
            target: CString::new(target.as_os_str().as_bytes())?,
            read_only,
        })
    }

    /// Attaches it in this mount namespace. System calls only: it runs between fork and exec.
    pub(crate) fn attach(&self) -> rustix::io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.tree, c"", CWD, &self.target, flags)?;
        let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
        if self.read_only {
            flags |= MountFlags::RDONLY;
        }
        mount_remount(&self.target, flags, c"")
    }
}

/// Mounts at `target` what a program in its own process namespace may know of processes: those of that namespace, and
/// nothing of the kernel. System calls only: it runs between fork and exec.
pub(crate) fn own_processes(target: &CString) -> rustix::io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount(c"proc", target, c"proc", flags, c"subset=pid")
}
