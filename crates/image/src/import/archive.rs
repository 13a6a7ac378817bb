//! The members of an archive or layout, found by name and read in place.

use crate::disk::Cancel;
use crate::tar::{EntryKind, TarError, TarReader};
use crate::{ImageError, Limits, Refusal};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `docker save` of old has a link where two images share a layer; a link to a link was never seen.
const LINKS_MAX: usize = 4;

/// Where members are.
pub(super) enum Members {
    /// Files in a directory.
    Directory(PathBuf),
    /// Entries of an uncompressed tar.
    Tar {
        file: File,
        members: HashMap<String, Member>,
    },
}

/// What a name stands for.
pub(super) enum Member {
    File { offset: u64, bytes: u64 },
    Link(String),
    Other,
}

/// An open member.
pub(super) struct Opened {
    pub(super) reader: Box<dyn Read>,
    pub(super) bytes: u64,
}

/// A part of a file, read without moving the file's own position.
struct Window {
    file: File,
    offset: u64,
    left: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read_at(&mut buffer[..want], self.offset)?;
        if got == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

/// A member's name without `./` and slashes at the end; none where it leaves the archive.
fn normal(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn refused(error: TarError) -> ImageError {
    match error {
        TarError::Refused(why) => ImageError::refused("the archive", why),
        TarError::Io(error) => match crate::compress::refusal_in(&error) {
            Some(why) => ImageError::refused("the archive", why.clone()),
            None => ImageError::io("read", Path::new("the archive"), error),
        },
    }
}

/// Names at the top of a root file system, and never of an image archive.
const ROOT_NAMES: [&str; 16] = [
    "bin", "boot", "dev", "etc", "home", "lib", "lib64", "mnt", "opt", "proc", "root", "run",
    "sbin", "tmp", "usr", "var",
];

/// Whether a tar has the members of an image archive. Stops at the first name that settles it.
pub(super) fn looks_like_one(
    reader: impl Read,
    limits: &Limits,
    cancel: &Cancel,
) -> Result<bool, ImageError> {
    let mut reader = TarReader::new(reader, limits);
    while let Some(entry) = reader.next().map_err(refused)? {
        cancel.check()?;
        let Some(name) = String::from_utf8(entry.path)
            .ok()
            .and_then(|path| normal(&path))
        else {
            continue;
        };
        if matches!(name.as_str(), "oci-layout" | "manifest.json") {
            return Ok(true);
        }
        if ROOT_NAMES.contains(&name.split('/').next().unwrap_or("")) {
            return Ok(false);
        }
    }
    Ok(false)
}

impl Members {
    pub(super) fn directory(path: &Path) -> Members {
        Members::Directory(path.to_owned())
    }

    /// Lists an uncompressed tar, which may also be a whole root file system.
    pub(super) fn tar(mut file: File, limits: &Limits) -> Result<Members, ImageError> {
        let failed = |error| ImageError::io("read", Path::new("the archive"), error);
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let clone = file.try_clone().map_err(failed)?;
        let mut reader = TarReader::new(io::BufReader::with_capacity(256 << 10, clone), limits);
        let mut members = HashMap::new();
        while let Some(entry) = reader.next().map_err(refused)? {
            if members.len() as u64 >= limits.entries_max {
                let why = Refusal::Limit {
                    what: "files and directories",
                    limit: limits.entries_max,
                };
                return Err(ImageError::refused("the archive", why));
            }
            let Some(name) = String::from_utf8(entry.path)
                .ok()
                .and_then(|path| normal(&path))
            else {
                continue;
            };
            let link = || String::from_utf8(entry.link.clone()).ok();
            let member = match entry.kind {
                EntryKind::File => Some(Member::File {
                    offset: entry.data_offset,
                    bytes: entry.size,
                }),
                EntryKind::HardLink => link().and_then(|to| normal(&to)).map(Member::Link),
                EntryKind::Symlink => {
                    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                    link()
                        .and_then(|to| normal(&format!("{directory}/{to}")))
                        .map(Member::Link)
                }
                _ => Some(Member::Other),
            };
            if let Some((top, _)) = name.split_once('/') {
                members.entry(top.to_owned()).or_insert(Member::Other);
            }
            members.insert(name, member.unwrap_or(Member::Other));
        }
        Ok(Members::Tar { file, members })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Members::Directory(path) => path.join(name).is_file(),
            Members::Tar { members, .. } => members.contains_key(name),
        }
    }

    /// Opens a member; none where it is not there or no file. In a directory, `name` must be one of the layout's own, which
    /// never leave it; links are not followed.
    pub(super) fn open(&self, name: &str) -> io::Result<Option<Opened>> {
        match self {
            Members::Directory(path) => {
                let opened = OpenOptions::new()
                    .read(true)
                    // Neither a link to somewhere else nor a pipe that never answers.
                    .custom_flags(
                        (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32,
                    )
                    .open(path.join(name));
                let file = match opened {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                };
                let meta = file.metadata()?;
                Ok(meta.is_file().then(|| Opened {
                    bytes: meta.len(),
                    reader: Box::new(file),
                }))
            }
            Members::Tar { file, members } => {
                let Some(mut name) = normal(name) else {
                    return Ok(None);
                };
                for _ in 0..LINKS_MAX {
                    match members.get(&name) {
                        Some(Member::File { offset, bytes }) => {
                            return Ok(Some(Opened {
                                bytes: *bytes,
                                reader: Box::new(Window {
                                    file: file.try_clone()?,
                                    offset: *offset,
                                    left: *bytes,
                                }),
                            }));
                        }
                        Some(Member::Link(target)) => name = target.clone(),
                        Some(Member::Other) | None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }
}
