//! Files and trees of this host as a tar stream.
//!
//! Packing runs on a blocking thread and is read through a socket pair. Where it fails, the reader ends in that error and
//! not in an early end, so that nobody takes half a tree for a whole one; what failed is kept for the message.

use super::rules::Top;
use indicatif::ProgressBar;
use std::collections::HashMap;
use std::fs::Metadata;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use tar::{Builder, EntryType, Header};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::task::JoinHandle;

/// What is packed, and how.
#[derive(Debug)]
pub(crate) struct Source {
    /// File or tree.
    pub(crate) path: PathBuf,
    /// Name of its top in the archive.
    pub(crate) top: Top,
    /// Follow a link at the top (never further down).
    pub(crate) follow: bool,
    /// Keep user and group ids; root's otherwise.
    pub(crate) keep_ids: bool,
    /// Counts the bytes.
    pub(crate) counter: ProgressBar,
}

/// What went wrong in packing, if anything did.
#[derive(Debug, Clone, Default)]
pub(crate) struct Packing(Arc<Mutex<Option<io::Error>>>);

impl Packing {
    /// The error, where packing failed of itself.
    pub(crate) fn finish(&self) -> io::Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// A directory's contents, with its ids: an image to import.
pub(crate) fn directory(path: PathBuf) -> io::Result<(Packed, Packing)> {
    start(Source {
        path,
        top: Top::Contents,
        follow: true,
        keep_ids: true,
        counter: ProgressBar::hidden(),
    })
}

/// Begins to pack.
pub(crate) fn start(source: Source) -> io::Result<(Packed, Packing)> {
    let (writer, reader) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    let packing = Packing::default();
    let kept = packing.clone();
    let job = tokio::task::spawn_blocking(move || {
        let result = pack(&source, io::BufWriter::with_capacity(64 << 10, &writer));
        source.counter.finish_and_clear();
        match result {
            Ok(()) => true,
            // The reader has gone and says why itself; the second, where it left something unread.
            Err(error)
                if [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset]
                    .contains(&error.kind()) =>
            {
                false
            }
            Err(error) => {
                *kept.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                false
            }
        }
    });
    let reader = tokio::net::UnixStream::from_std(reader)?;
    Ok((Packed { reader, job }, packing))
}

/// The tar stream.
#[derive(Debug)]
pub(crate) struct Packed {
    reader: tokio::net::UnixStream,
    job: JoinHandle<bool>,
}

impl AsyncRead for Packed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.reader).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            return Poll::Ready(Ok(()));
        }
        // The end, for better or worse. Polled once: a reader stops at either.
        match ready!(Pin::new(&mut self.job).poll(context)) {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) | Err(_) => Poll::Ready(Err(io::Error::other("packing failed"))),
        }
    }
}

fn pack(source: &Source, out: impl Write) -> io::Result<()> {
    let mut packer = Packer {
        tar: Builder::new(out),
        source,
        links: HashMap::new(),
    };
    let path = &source.path;
    let meta = if source.follow {
        std::fs::metadata(path)
    } else {
        std::fs::symlink_metadata(path)
    };
    let meta = meta.map_err(|error| named(path, error))?;
    let top = match &source.top {
        Top::Named(name) => PathBuf::from(name),
        Top::Contents => PathBuf::new(),
    };
    packer.tree(path, &top, &meta)?;
    packer.tar.into_inner()?.flush()
}

fn named(path: &Path, error: io::Error) -> io::Error {
    // The reader's going away is recognized by its kind.
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Packer<'a, W: Write> {
    tar: Builder<W>,
    source: &'a Source,
    /// First names of files that have several, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Packer<'_, W> {
    /// Depth first, without recursion: trees may be deeper than a stack.
    fn tree(&mut self, path: &Path, top: &Path, meta: &Metadata) -> io::Result<()> {
        self.one(path, top, meta)?;
        if !meta.is_dir() {
            return Ok(());
        }
        let list = |dir: &Path| std::fs::read_dir(dir).map_err(|error| named(dir, error));
        let mut open = vec![(list(path)?, top.to_owned())];
        while let Some((entries, name)) = open.last_mut() {
            let Some(entry) = entries.next() else {
                open.pop();
                continue;
            };
            let entry = entry.map_err(|error| named(path, error))?;
            let (path, name) = (entry.path(), name.join(entry.file_name()));
            let meta = match std::fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                // Removed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(named(&path, error)),
            };
            self.one(&path, &name, &meta)?;
            if meta.is_dir() {
                open.push((list(&path)?, name));
            }
        }
        Ok(())
    }

    fn one(&mut self, path: &Path, name: &Path, meta: &Metadata) -> io::Result<()> {
        if name.as_os_str().is_empty() {
            return if meta.is_dir() {
                Ok(())
            } else {
                Err(named(path, io::ErrorKind::NotADirectory.into()))
            };
        }
        let mut header = Header::new_gnu();
        header.set_metadata(meta);
        header.set_mode(meta.mode() & 0o7777);
        if !self.source.keep_ids {
            header.set_uid(0);
            header.set_gid(0);
        }
        header.set_size(0);
        let kind = meta.file_type();
        if kind.is_dir() {
            self.tar.append_data(&mut header, name, io::empty())
        } else if kind.is_symlink() {
            let target = std::fs::read_link(path).map_err(|error| named(path, error))?;
            self.tar.append_link(&mut header, name, target)
        } else if kind.is_file() {
            if meta.nlink() > 1 {
                let key = (meta.dev(), meta.ino());
                if let Some(first) = self.links.get(&key) {
                    header.set_entry_type(EntryType::Link);
                    return self.tar.append_link(&mut header, name, first);
                }
                self.links.insert(key, name.to_owned());
            }
            let file = std::fs::File::open(path).map_err(|error| named(path, error))?;
            header.set_size(meta.len());
            let data = Exactly {
                left: meta.len(),
                file,
                counter: &self.source.counter,
            };
            self.tar
                .append_data(&mut header, name, data)
                .map_err(|error| named(path, error))
        } else if kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
            self.tar.append_data(&mut header, name, io::empty())
        } else {
            // A socket means nothing without the program that made it; docker leaves it out, too.
            Ok(())
        }
    }
}

/// So many bytes of a file and no more or fewer, whatever happens to it meanwhile: the header has promised them.
struct Exactly<'a> {
    left: u64,
    file: std::fs::File,
    counter: &'a ProgressBar,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let count = (&self.file).take(self.left).read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            return Err(io::Error::other("it became shorter while it was read"));
        }
        self.left -= count as u64;
        self.counter.inc(count as u64);
        Ok(count)
    }
}
