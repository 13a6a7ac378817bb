//! A tar stream from a guest as files of this host.
//!
//! The guest is hostile. Whatever the stream says, nothing is made or changed outside the destination: every name is
//! walked from the destination's descriptor one directory at a time without following links; files are made anew and
//! never written through; ids are not taken over unless asked for, set-id bits never; devices, pipes and sockets are left
//! out. Extension records, names, depth and the number of entries are bounded. What happens on a full disk is the
//! system's error.

use super::rules::Top;
use indicatif::ProgressBar;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use tar::{Archive, EntryType};

/// Entries at most: many times a large Linux root file system, and still countable on the list of directories below.
const ENTRIES_MAX: u64 = 5_000_000;
/// Longest name, in bytes: the kernel's own bound (`PATH_MAX`).
const NAME_BYTES_MAX: usize = 4096;
/// Deepest directory: deeper ones cannot be named within `PATH_MAX` with names of a usual length.
const DEPTH_MAX: usize = 512;
/// Largest extension record (long names, times, attributes), in bytes.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// How to unpack.
#[derive(Debug)]
pub(crate) struct Rules {
    /// Under which name the archive's top arrives.
    pub(crate) top: Top,
    /// Take over user and group ids.
    pub(crate) keep_ids: bool,
    /// Counts the bytes.
    pub(crate) counter: ProgressBar,
}

/// What was left out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Devices, pipes and others, not made.
    pub(crate) left_out: u64,
}

/// Unpacks in a directory.
///
/// # Errors
/// The system's, or of kind `InvalidData` where the stream is malformed or wants what it may not. What was unpacked
/// before stays.
pub(crate) fn unpack(
    reader: impl Read,
    into: BorrowedFd<'_>,
    rules: &Rules,
) -> io::Result<Unpacked> {
    let mut archive = Archive::new(reader);
    let mut job = Job {
        into,
        rules,
        first: None,
        dirs: Vec::new(),
        unpacked: Unpacked::default(),
    };
    let mut next = Extensions::default();
    let mut count = 0;
    // Raw: the crate would read extension records of any size into memory.
    for entry in archive.entries()?.raw(true) {
        count += 1;
        if count > ENTRIES_MAX {
            return Err(bad("it has too many entries"));
        }
        let mut entry = entry?;
        match entry.header().entry_type() {
            EntryType::GNULongName => next.name = Some(text(extension(&mut entry)?)),
            EntryType::GNULongLink => next.link = Some(text(extension(&mut entry)?)),
            EntryType::XHeader => {
                next.read(&extension(&mut entry)?)?;
            }
            EntryType::XGlobalHeader => {
                extension(&mut entry)?;
            }
            kind => {
                let known = std::mem::take(&mut next);
                let name = known
                    .name
                    .unwrap_or_else(|| entry.path_bytes().into_owned());
                let link = known
                    .link
                    .or_else(|| entry.link_name_bytes().map(|link| link.into_owned()));
                if known
                    .size
                    .is_some_and(|size| Some(size) != entry.header().entry_size().ok())
                {
                    return Err(bad("it gives two sizes for one file"));
                }
                job.entry(&mut entry, kind, &name, link.as_deref())?;
            }
        }
    }
    job.finish()
}

fn bad(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("refused what the machine sent: {why}"),
    )
}

fn refused(name: &[u8], why: &str) -> io::Error {
    bad(&format!("{:?}: {why}", String::from_utf8_lossy(name)))
}

fn at(name: &[OsString], error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    let path: std::path::PathBuf = name.iter().collect();
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// What extension records say of the entry that follows them.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Extensions {
    fn read(&mut self, data: &[u8]) -> io::Result<()> {
        for record in tar::PaxExtensions::new(data) {
            let record = record?;
            match record.key_bytes() {
                b"path" => self.name = Some(record.value_bytes().to_vec()),
                b"linkpath" => self.link = Some(record.value_bytes().to_vec()),
                b"size" => {
                    self.size = record.value().ok().and_then(|text| text.parse().ok());
                    if self.size.is_none() {
                        return Err(bad("a size is no number"));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn extension<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<Vec<u8>> {
    if entry.header().entry_size()? > EXTENSION_BYTES_MAX {
        return Err(bad("an extension record is too long"));
    }
    let mut data = Vec::new();
    entry.take(EXTENSION_BYTES_MAX).read_to_end(&mut data)?;
    Ok(data)
}

/// A long name without its final NULs.
fn text(mut data: Vec<u8>) -> Vec<u8> {
    while data.last() == Some(&0) {
        data.pop();
    }
    data
}

/// A directory made by us, whose mode and time are set in the end: it may not be writable then, and its time changes with
/// what is put in it.
struct MadeDir {
    name: Vec<OsString>,
    mode: Mode,
    times: Timestamps,
}

struct Job<'a> {
    into: BorrowedFd<'a>,
    rules: &'a Rules,
    /// The first component that every name of the archive has; empty where the first name was `.` or `/`.
    first: Option<Vec<OsString>>,
    dirs: Vec<MadeDir>,
    unpacked: Unpacked,
}

impl Job<'_> {
    /// The name under the destination; empty for the destination itself.
    fn place(&mut self, name: &[u8]) -> io::Result<Vec<OsString>> {
        if name.len() > NAME_BYTES_MAX || name.contains(&0) {
            return Err(bad("a name is too long or has a NUL"));
        }
        if name.starts_with(b"/") && name != b"/" {
            return Err(refused(name, "the name is absolute"));
        }
        let mut parts = Vec::new();
        for part in name.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(refused(name, "the name leads outside")),
                part => parts.push(OsStr::from_bytes(part).to_owned()),
            }
        }
        if parts.len() > DEPTH_MAX {
            return Err(bad("a directory is too deep"));
        }
        let first = self
            .first
            .get_or_insert_with(|| parts.iter().take(1).cloned().collect());
        if !parts.starts_with(first) {
            return Err(refused(
                name,
                "the name is not in the tree that was asked for",
            ));
        }
        let rest = parts.split_off(first.len());
        Ok(match &self.rules.top {
            Top::Contents => rest,
            Top::Named(top) => std::iter::once(OsString::from(top)).chain(rest).collect(),
        })
    }

    /// The directory that holds the name, made where it is missing.
    fn parent(&self, name: &[OsString]) -> io::Result<OwnedFd> {
        let mut dir = self.into.try_clone_to_owned()?;
        let above = name.split_last().map_or(&[][..], |(_, above)| above);
        for (index, part) in above.iter().enumerate() {
            let here = || name.get(..=index).unwrap_or_default();
            dir = match open_dir(dir.as_fd(), part) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(&dir, part, Mode::RWXU).map_err(|e| at(here(), e))?;
                    open_dir(dir.as_fd(), part).map_err(|e| at(here(), e))?
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    return Err(at(
                        here(),
                        io::Error::new(
                            io::ErrorKind::NotADirectory,
                            "it is in the way: a link or a file where a directory should be",
                        ),
                    ));
                }
                result => result.map_err(|e| at(here(), e))?,
            };
        }
        Ok(dir)
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        kind: EntryType,
        name: &[u8],
        link: Option<&[u8]>,
    ) -> io::Result<()> {
        let place = self.place(name)?;
        let Some(last) = place.last() else {
            // The destination itself, which the user has made.
            return if kind.is_dir() {
                Ok(())
            } else {
                Err(refused(name, "it is not a directory"))
            };
        };
        // Neither set-id nor sticky bits: a guest does not decide what runs as whom here.
        let mode = Mode::from_raw_mode(entry.header().mode()? & 0o777);
        let times = times(entry.header().mtime().unwrap_or(0));
        match kind {
            EntryType::Directory => {
                let parent = self.parent(&place)?;
                match rustix::fs::mkdirat(&parent, last, Mode::RWXU) {
                    Ok(()) => {
                        self.own(entry, parent.as_fd(), last)?;
                        self.dirs.push(MadeDir {
                            name: place,
                            mode,
                            times,
                        });
                    }
                    Err(Errno::EXIST) => {
                        open_dir(parent.as_fd(), last).map_err(|_| {
                            at(
                                &place,
                                io::Error::new(
                                    io::ErrorKind::NotADirectory,
                                    "it is in the way: a link or a file where a directory should be",
                                ),
                            )
                        })?;
                    }
                    Err(error) => return Err(at(&place, error)),
                }
            }
            EntryType::Regular | EntryType::Continuous => {
                let parent = self.parent(&place)?;
                clear_way(parent.as_fd(), last).map_err(|e| at(&place, e))?;
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, last, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(|e| at(&place, e))?;
                let mut file = std::fs::File::from(file);
                io::copy(&mut self.rules.counter.wrap_read(entry.by_ref()), &mut file)
                    .map_err(|e| at(&place, e))?;
                if entry.header().entry_size()? != file.metadata()?.len() {
                    return Err(refused(name, "it ends early"));
                }
                self.own(entry, parent.as_fd(), last)?;
                rustix::fs::fchmod(&file, mode).map_err(|e| at(&place, e))?;
                rustix::fs::futimens(&file, &times).map_err(|e| at(&place, e))?;
            }
            EntryType::Symlink => {
                let target = link.ok_or_else(|| refused(name, "a link without a target"))?;
                let parent = self.parent(&place)?;
                clear_way(parent.as_fd(), last).map_err(|e| at(&place, e))?;
                // Where it leads is the link's own matter: nothing here ever follows it.
                rustix::fs::symlinkat(OsStr::from_bytes(target), &parent, last)
                    .map_err(|e| at(&place, e))?;
                self.own(entry, parent.as_fd(), last)?;
            }
            EntryType::Link => {
                let target = link.ok_or_else(|| refused(name, "a link without a target"))?;
                let target = self.place(target)?;
                let Some(target_last) = target.last() else {
                    return Err(refused(name, "a link to a directory"));
                };
                let from = self.parent(&target)?;
                let parent = self.parent(&place)?;
                if target == place {
                    return Err(refused(name, "a link to itself"));
                }
                clear_way(parent.as_fd(), last).map_err(|e| at(&place, e))?;
                rustix::fs::linkat(&from, target_last, &parent, last, AtFlags::empty())
                    .map_err(|e| at(&place, e))?;
            }
            _ => self.unpacked.left_out += 1,
        }
        Ok(())
    }

    /// Takes over the ids, where that was asked for.
    fn own<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        parent: BorrowedFd<'_>,
        name: &OsStr,
    ) -> io::Result<()> {
        if !self.rules.keep_ids {
            return Ok(());
        }
        let id = |value: u64| {
            // The highest number means "leave it" to the system.
            u32::try_from(value)
                .ok()
                .filter(|&id| id != u32::MAX)
                .ok_or_else(|| bad("an id is out of range"))
        };
        let (uid, gid) = (id(entry.header().uid()?)?, id(entry.header().gid()?)?);
        rustix::fs::chownat(
            parent,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|error| at(&[name.to_owned()], error))
    }

    /// Sets the directories' modes and times, the deepest first.
    fn finish(mut self) -> io::Result<Unpacked> {
        while let Some(made) = self.dirs.pop() {
            let parent = self.parent(&made.name)?;
            let Some(last) = made.name.last() else {
                continue;
            };
            // Replaced by the stream itself since it was made: then it is none of our directories any more.
            let Ok(dir) = open_dir(parent.as_fd(), last) else {
                continue;
            };
            rustix::fs::futimens(&dir, &made.times).map_err(|e| at(&made.name, e))?;
            rustix::fs::fchmod(&dir, made.mode).map_err(|e| at(&made.name, e))?;
        }
        Ok(self.unpacked)
    }
}

fn open_dir(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Removes a file or a link that has the name; anything else stays and is an error.
fn clear_way(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    if !kind.is_file() && !kind.is_symlink() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "it is in the way: only files and links are replaced",
        ));
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?)
}

fn times(mtime: u64) -> Timestamps {
    let time = Timespec {
        tv_sec: i64::try_from(mtime).unwrap_or(0),
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
