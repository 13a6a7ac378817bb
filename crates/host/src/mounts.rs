//! Files and directories shown at another place to one launched program alone, or shown so that it cannot write there.
//!
//! A [`Bind`] is a copy of a mount that belongs to nobody yet. It is made here, from an open file, so that no name is looked
//! up twice, and attached in the program's own mount namespace between fork and exec: the host's mounts never change, and it
//! is gone with the program.

// One call that no crate wraps.
#![allow(unsafe_code)]

use crate::launch::errno;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_bind_recursive, mount_remount, move_mount, open_tree, unmount,
};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A file that a program sees at another place.
#[derive(Debug)]
pub struct Bind {
    tree: OwnedFd,
    target: CString,
    read_only: bool,
    device: bool,
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
            device: false,
        })
    }

    /// Shows the device at `source` as it is now at `target`: one that goes and comes is another, and the kernel takes everybody's
    /// rights to the one that went. Needs the right to mount.
    ///
    /// # Errors
    /// The system's; a kernel before 5.2 cannot do this.
    pub fn of_device(source: &Path, target: &Path) -> io::Result<Bind> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(Bind {
            tree: open_tree(CWD, source, flags)?,
            target: CString::new(target.as_os_str().as_bytes())?,
            read_only: false,
            device: true,
        })
    }

    /// Attaches it in this mount namespace. System calls only: it runs between fork and exec.
    pub(crate) fn attach(&self) -> rustix::io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.tree, c"", CWD, &self.target, flags)?;
        let mut flags = MountFlags::BIND | MountFlags::NOSUID;
        if !self.device {
            flags |= MountFlags::NODEV;
        }
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

/// Makes `dir` read-only in this mount namespace, with all that is mounted below it. A kernel that can only do so for one
/// mount (before 5.12) does not show what is mounted below: it could be written there.
///
/// `set_below` is [`set_read_only_below`], or what a test puts in its place. System calls only, as it runs between fork and exec.
pub(crate) fn make_read_only(
    dir: &CStr,
    set_below: impl Fn(&CStr) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    mount_bind_recursive(dir, dir)?;
    match set_below(dir) {
        Err(Errno::NOSYS) => {}
        other => return other,
    }
    unmount(dir, UnmountFlags::DETACH)?;
    mount_bind(dir, dir)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(dir, flags, c"")
}

/// Makes the mount at `dir` and all mounts below it read-only, without devices and set-id programs; all or none.
pub(crate) fn set_read_only_below(dir: &CStr) -> rustix::io::Result<()> {
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    set_attributes(libc::AT_FDCWD, dir, libc::AT_RECURSIVE, attributes, 0)
}

/// Makes a mount read-only and without set-id programs; `below` it all is, and without devices. What the host mounts there later
/// is not shown.
pub(crate) fn set_read_only(tree: &OwnedFd, below: bool) -> rustix::io::Result<()> {
    let mut attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    let mut flags = libc::AT_EMPTY_PATH;
    if below {
        attributes |= libc::MOUNT_ATTR_NODEV;
        flags |= libc::AT_RECURSIVE;
    }
    let private = libc::MS_PRIVATE;
    set_attributes(tree.as_raw_fd(), c"", flags, attributes, private)
}

/// `mount_setattr` (Linux 5.12), which no crate wraps.
fn set_attributes(
    dir: i32,
    path: &CStr,
    flags: i32,
    set: u64,
    propagation: u64,
) -> rustix::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path ends with NUL and the attributes are a live structure of the size that is told; the kernel reads
    // both and keeps neither.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(errno()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::OutputBox;
    use crate::launch::Launch;

    #[tokio::test]
    async fn a_program_alone_sees_its_files_its_processes_and_an_empty_network() {
        if !crate::facts::is_root() {
            return println!("SKIP: mounts and namespaces take root");
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        std::fs::write(&source, "shown").unwrap();
        std::fs::write(&target, "").unwrap();
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        let output = OutputBox::new(4096).unwrap();
        let mut launch = Launch::new("/bin/sh");
        let script = "cat target; echo; echo x 2>&1 >>target; echo $$; cd proc; echo [0-9]*; test -e version && echo kernel; cat self/net/dev | grep -c :";
        launch.args = vec!["-c".into(), script.into()];
        launch.working_dir = dir.path().to_owned();
        launch.output = Some(output.writer().unwrap());
        launch.binds = vec![Bind::new(&File::open(&source).unwrap(), &target, true).unwrap()];
        launch.proc_at = Some(dir.path().join("proc"));
        (launch.own_processes, launch.own_network) = (true, true);
        let launched = launch.start().unwrap();
        launched.process.wait().await.unwrap();
        let text = output.tail(4096);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "shown", "{text}");
        assert!(lines[1].contains("Read-only"), "{text}");
        assert_eq!(lines[2], "1", "the first of its processes: {text}");
        assert!(lines[3].starts_with('1'), "{text}");
        assert!(!text.contains("kernel"), "{text}");
        assert_eq!(std::fs::read(&target).unwrap(), b"", "nobody else sees it");
        assert_eq!(std::fs::read(&source).unwrap(), b"shown");
        assert!(!std::fs::exists(dir.path().join("proc/1")).unwrap());
    }
}
