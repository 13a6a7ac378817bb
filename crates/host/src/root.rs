//! A root directory in which a launched program finds what it is shown and nothing else.
//!
//! It is made once and held as a mount namespace; each program enters it and gets a copy of its own. That costs less than a
//! copy of the host's mounts, and there is nothing to unmount: the copy goes with the program, the original with the last
//! descriptor of it. The host's own mounts never change.

// A namespace for a thread that is made for it.
#![allow(unsafe_code)]

use crate::mounts::set_read_only;
use rustix::fs::{CWD, Mode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Bytes that files of the root itself may take; what is shown takes none.
const ROOM: &str = "1M";

/// What a root directory shows.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// Directories of the host, at their own places, with all that is mounted below them; read-only, without devices and set-id
    /// programs. One that is a link on the host is the same link there.
    pub dirs: Vec<PathBuf>,
    /// Files and devices of the host, at their own places; read-only, which binds no device.
    pub files: Vec<PathBuf>,
    /// Empty directories, at which a launch can show something of its program's own.
    pub places: Vec<PathBuf>,
    /// Empty files, for the same.
    pub file_places: Vec<PathBuf>,
    /// Links, and where they lead.
    pub links: Vec<(PathBuf, PathBuf)>,
}

/// A prepared root directory.
#[derive(Debug)]
pub struct Root(File);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct RootError {
    /// What was being done.
    pub step: String,
    /// The system's answer.
    pub source: io::Error,
}

fn at<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> RootError {
    let step = step.into();
    move |error| RootError {
        step,
        source: error.into(),
    }
}

/// A copy of a mount of the host's, that belongs nowhere yet.
struct Copied {
    tree: OwnedFd,
    target: PathBuf,
    is_dir: bool,
}

impl Root {
    /// Prepares one. Takes the right to mount, and Linux 5.12.
    ///
    /// # Errors
    /// [`RootError`]; nothing is left then.
    pub fn prepare(shown: &Shown) -> Result<Root, RootError> {
        // A thread's namespaces are its own, and end with it but for the one that is held.
        std::thread::scope(|scope| scope.spawn(|| prepare(shown)).join())
            .unwrap_or_else(|_| {
                Err(at("preparing a root directory")(io::Error::other(
                    "the thread panicked",
                )))
            })
            .map(Root)
    }

    pub(crate) fn namespace(&self) -> &File {
        &self.0
    }
}

fn prepare(shown: &Shown) -> Result<File, RootError> {
    let mut copies = Vec::new();
    let mut links = shown.links.clone();
    for dir in &shown.dirs {
        let data = std::fs::symlink_metadata(dir).map_err(at(named("looking at", dir)))?;
        if data.is_symlink() {
            let to = std::fs::read_link(dir).map_err(at(named("reading", dir)))?;
            links.push((dir.clone(), to));
        } else {
            copies.push(copied(dir, true)?);
        }
    }
    for file in &shown.files {
        copies.push(copied(file, false)?);
    }
    // SAFETY: without CLONE_FILES this changes no descriptor table; the thread's directories become its own by it.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(at("a mount namespace of its own"))?;
    let namespace =
        File::open("/proc/thread-self/ns/mnt").map_err(at("opening the mount namespace"))?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    mount_change(c"/", private).map_err(at("parting from the host's mounts"))?;
    let root = empty()?;
    enter(&root)?;
    // From here on `/` is the new root, and the host's files are reached by what was copied only.
    for (link, to) in &links {
        parents(link)?;
        std::os::unix::fs::symlink(to, link).map_err(at(named("linking", link)))?;
    }
    for copy in &copies {
        let target = &copy.target;
        if copy.is_dir {
            directories(target)?;
        } else {
            parents(target)?;
            File::create(target).map_err(at(named("making", target)))?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&copy.tree, c"", CWD, target, flags).map_err(at(named("showing", target)))?;
    }
    for place in &shown.places {
        directories(place)?;
    }
    for place in &shown.file_places {
        parents(place)?;
        File::create(place).map_err(at(named("making", place)))?;
    }
    set_read_only(&root, false).map_err(at("making the new root read-only"))?;
    Ok(namespace)
}

fn named(what: &str, path: &Path) -> String {
    format!("{what} {}", path.display())
}

fn copied(source: &Path, is_dir: bool) -> Result<Copied, RootError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if is_dir {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).map_err(at(named("copying the mount of", source)))?;
    set_read_only(&tree, is_dir).map_err(at(named("making read-only", source)))?;
    Ok(Copied {
        tree,
        target: source.to_owned(),
        is_dir,
    })
}

/// An empty file system that belongs nowhere yet.
fn empty() -> Result<OwnedFd, RootError> {
    let make = || {
        let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), c"size", ROOM)?;
        fsconfig_set_string(context.as_fd(), c"mode", c"755")?;
        fsconfig_create(context.as_fd())?;
        // What is shown is mounted on it and has flags of its own.
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(at("making an empty file system"))
}

/// Makes this file system the root of the thread's mount namespace, and gives up all others.
fn enter(root: &OwnedFd) -> Result<(), RootError> {
    // Any directory that is there will do for the moment: only this thread sees it.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root, c"", CWD, c"/proc", flags).map_err(at("attaching the new root"))?;
    fchdir(root).map_err(at("entering the new root"))?;
    // The old root lies over the new one for a moment, and is taken off.
    pivot_root(c".", c".").map_err(at("changing the root directory"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(at("giving up the host's mounts"))?;
    chdir(c"/").map_err(at("entering the new root"))
}

/// Makes the directories above.
fn parents(path: &Path) -> Result<(), RootError> {
    directories(path.parent().unwrap_or(Path::new("/")))
}

/// Makes a directory and those above, so that others may enter them whatever this process's mask is.
fn directories(path: &Path) -> Result<(), RootError> {
    let mut dir = PathBuf::from("/");
    for part in path.components() {
        let Component::Normal(part) = part else {
            continue;
        };
        dir.push(part);
        if std::fs::symlink_metadata(&dir).is_ok() {
            continue;
        }
        std::fs::create_dir(&dir).map_err(at(named("making", &dir)))?;
        let mode = Mode::from_raw_mode(0o755);
        rustix::fs::chmod(&dir, mode).map_err(at(named("opening", &dir)))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
