//! Files for the host: what a path leads to, and tar streams out of and into the guest.
//!
//! Tar streams are packed and unpacked by threads of their own, connected to the loop by pipes. Unpacking stays below
//! the directory that the host names, whatever the stream says; everything is below the guest's own root anyway.

use rustix::fs::{FileType, Mode, OFlags};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use vistara_guest_protocol::{FileStat, Refusal, RefusalKind, UnpackOptions};

/// Deepest tree that is packed: paths longer than the kernel takes cannot be opened anyway.
const DEPTH_MAX: usize = 512;

/// Says in a refusal's words what the system said.
pub(crate) fn refusal(what: &str, error: &io::Error) -> Refusal {
    use io::ErrorKind as K;
    let kind = match error.kind() {
        K::NotFound => RefusalKind::NotFound,
        K::PermissionDenied | K::ReadOnlyFilesystem => RefusalKind::Denied,
        K::NotADirectory
        | K::IsADirectory
        | K::InvalidInput
        | K::InvalidData
        | K::AlreadyExists => RefusalKind::Invalid,
        K::Unsupported => RefusalKind::Unsupported,
        K::TimedOut | K::ResourceBusy => RefusalKind::Busy,
        _ => RefusalKind::Failed,
    };
    let message = if what.is_empty() {
        error.to_string()
    } else {
        format!("{what}: {error}")
    };
    Refusal { kind, message }
}

fn metadata(path: &Path, follow: bool) -> io::Result<Metadata> {
    if follow {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    }
}

/// What a path leads to; nothing where it leads nowhere.
pub(crate) fn stat(path: &str, follow: bool) -> Result<Option<FileStat>, Refusal> {
    let path = Path::new(path);
    let found = match metadata(path, follow) {
        Ok(found) => found,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(refusal(&path.display().to_string(), &error)),
    };
    let link_target = if found.is_symlink() {
        fs::canonicalize(path)
            .or_else(|_| fs::read_link(path))
            .ok()
            .map(|target| target.to_string_lossy().into_owned())
    } else {
        None
    };
    Ok(Some(FileStat {
        name: top_name(path).to_string_lossy().into_owned(),
        mode: found.mode(),
        size: found.size(),
        mtime: found.mtime(),
        uid: found.uid(),
        gid: found.gid(),
        link_target,
    }))
}

/// The name that a tree has in its tar stream.
fn top_name(path: &Path) -> PathBuf {
    path.file_name()
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// Writes a file or a tree as a tar stream.
pub(crate) fn pack(path: &Path, follow: bool, to: impl Write) -> io::Result<()> {
    let found = metadata(path, follow)?;
    let path = if follow {
        fs::canonicalize(path)?
    } else {
        path.to_owned()
    };
    // Made only now: even an empty one writes an end of archive when it is dropped.
    let mut tar = tar::Builder::new(io::BufWriter::with_capacity(64 * 1024, to));
    append(&mut tar, &path, &top_name(&path), &found, 0)?;
    tar.into_inner()?.flush()
}

fn append(
    tar: &mut tar::Builder<impl Write>,
    path: &Path,
    name: &Path,
    found: &Metadata,
    depth: usize,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_metadata(found);
    let kind = found.file_type();
    if kind.is_symlink() {
        header.set_size(0);
        return tar.append_link(&mut header, name, fs::read_link(path)?);
    }
    if kind.is_file() {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        // A file that grows or shrinks meanwhile must not shift what follows it in the stream.
        let body = file
            .take(found.size())
            .chain(io::repeat(0))
            .take(found.size());
        return tar.append_data(&mut header, name, body);
    }
    if kind.is_dir() {
        header.set_size(0);
        tar.append_data(&mut header, name, io::empty())?;
        if depth >= DEPTH_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the tree is too deep",
            ));
        }
        for entry in fs::read_dir(path)? {
            let child = entry?.path();
            let Some(child_name) = child.file_name() else {
                continue;
            };
            // What vanished since the directory was read is left out.
            let Ok(found) = fs::symlink_metadata(&child) else {
                continue;
            };
            append(tar, &child, &name.join(child_name), &found, depth + 1)?;
        }
        return Ok(());
    }
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(rustix::fs::major(found.rdev()))?;
        header.set_device_minor(rustix::fs::minor(found.rdev()))?;
    } else if !kind.is_fifo() {
        // Sockets mean nothing elsewhere.
        return Ok(());
    }
    header.set_size(0);
    tar.append_data(&mut header, name, io::empty())
}

/// Unpacks a tar stream into a directory. All of the stream is read.
pub(crate) fn unpack(path: &Path, options: &UnpackOptions, from: impl Read) -> io::Result<()> {
    let path = fs::canonicalize(path)?;
    if !path.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let mut from = io::BufReader::with_capacity(64 * 1024, from);
    let mut tar = tar::Archive::new(&mut from);
    tar.set_preserve_permissions(true);
    tar.set_preserve_ownerships(options.keep_owners);
    tar.set_unpack_xattrs(true);
    // A directory's mode and time are set last: it may be read-only, and files put into it change its time.
    let mut directories = Vec::new();
    for entry in tar.entries()? {
        let mut entry = entry?;
        let is_dir = entry.header().entry_type().is_dir();
        let target = path.join(entry.path()?.strip_prefix("/").unwrap_or(&entry.path()?));
        if options.refuse_kind_change
            && let Ok(there) = fs::symlink_metadata(&target)
            && there.is_dir() != is_dir
        {
            let (old, new) = if is_dir {
                ("a file", "a directory")
            } else {
                ("a directory", "a file")
            };
            let message = format!("cannot replace {old} with {new}: {}", target.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if is_dir {
            // Made now, so that what is inside finds it; its attributes come later.
            directories.push(entry);
        } else if let Some(kind) = special(entry.header().entry_type()) {
            make_special(&path, &target, kind, entry.header(), options)?;
        } else if !entry.unpack_in(&path)? {
            return Err(outside(&target));
        }
    }
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut directory in directories {
        if !directory.unpack_in(&path)? {
            let target = directory.path()?.into_owned();
            return Err(outside(&target));
        }
    }
    // Padding after the end of the archive.
    io::copy(&mut from, &mut io::sink()).map(drop)
}

/// The kind of a file that is neither data nor link nor directory.
fn special(kind: tar::EntryType) -> Option<FileType> {
    match kind {
        tar::EntryType::Fifo => Some(FileType::Fifo),
        tar::EntryType::Char => Some(FileType::CharacterDevice),
        tar::EntryType::Block => Some(FileType::BlockDevice),
        _ => None,
    }
}

/// Makes a pipe or a device below `top`.
fn make_special(
    top: &Path,
    target: &Path,
    kind: FileType,
    header: &tar::Header,
    options: &UnpackOptions,
) -> io::Result<()> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(outside(target));
    };
    if target
        .components()
        .any(|part| part == std::path::Component::ParentDir)
    {
        return Err(outside(target));
    }
    fs::create_dir_all(parent)?;
    let parent = fs::canonicalize(parent)?;
    if !parent.starts_with(top) {
        return Err(outside(target));
    }
    let target = parent.join(name);
    match fs::remove_file(&target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let number = |found: Option<u32>| found.unwrap_or(0);
    let device = rustix::fs::makedev(
        number(header.device_major()?),
        number(header.device_minor()?),
    );
    let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
    rustix::fs::mknodat(rustix::fs::CWD, &target, kind, mode, device)?;
    if options.keep_owners {
        let id = |found: u64| u32::try_from(found).ok();
        std::os::unix::fs::lchown(&target, id(header.uid()?), id(header.gid()?))?;
    }
    // The mask of this process may have taken bits away.
    Ok(rustix::fs::chmod(&target, mode)?)
}

fn outside(path: &Path) -> io::Error {
    let message = format!("{} leads out of the directory", path.display());
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_cannot_write_outside_its_directory() {
        let top = std::env::temp_dir().join(format!("vistara-agent-files-{}", std::process::id()));
        let dir = top.join("in");
        fs::create_dir_all(&dir).unwrap();
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        header.as_gnu_mut().unwrap().name[..9].copy_from_slice(b"../escape");
        header.set_cksum();
        tar.append(&header, &b"evil"[..]).unwrap();
        let bytes = tar.into_inner().unwrap();
        assert!(unpack(&dir, &UnpackOptions::default(), &bytes[..]).is_err());
        assert!(!top.join("escape").exists());
        fs::remove_dir_all(&top).unwrap();
    }
}
