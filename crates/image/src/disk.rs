//! From layers to a root disk: index every layer, merge, and stream one clean tar into `sqfstar`.
//!
//! Everything here blocks and runs on a blocking thread. Layers are read twice, once for their headers (and their digests)
//! and once for the data of the files that won; nothing is spooled, and no path of an image is ever a path of the host.

use crate::compress::{Hashing, Unpacked, refusal_in};
use crate::merge::{Content, Tree};
use crate::squashfs::set_root;
use crate::tar::{Entry, Fields, TarError, TarReader, TarWriter};
use crate::{ImageError, Limits, Progress, ProgressSink, Refusal};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vistara_model::Digest;

const TOOL: &str = "sqfstar";
/// Part of every root disk's key: raise it when the same layers give another disk.
pub(crate) const FORMAT: u32 = 1;
/// Of what the packer says, the end is kept.
const MESSAGE_BYTES_MAX: usize = 2048;
/// Entries between two progress reports.
const REPORT_EVERY: u64 = 256;

/// Set when nobody waits for the work any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub(crate) fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), ImageError> {
        if self.0.load(Ordering::Relaxed) {
            return Err(ImageError::Internal(
                "nobody waits for it any more".to_owned(),
            ));
        }
        Ok(())
    }
}

/// One layer to read.
#[derive(Debug, Clone)]
pub(crate) struct LayerFile {
    pub(crate) path: PathBuf,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// What its tar must hash to; unknown for a plain root file-system tar.
    pub(crate) diff_id: Option<Digest>,
}

impl LayerFile {
    fn subject(&self) -> String {
        format!("layer {}", self.digest.short())
    }

    pub(crate) fn open(&self, left: u64, limits: &Limits) -> Result<Unpacked, ImageError> {
        let io = |error| ImageError::io("read the layer", &self.path, error);
        let file = File::open(&self.path).map_err(io)?;
        Unpacked::new(file, self.size, left, limits).map_err(io)
    }

    pub(crate) fn failed(&self, error: TarError) -> ImageError {
        match error {
            TarError::Refused(why) => ImageError::refused(self.subject(), why),
            TarError::Io(error) => match refusal_in(&error) {
                Some(why) => ImageError::refused(self.subject(), why.clone()),
                None => ImageError::io("read the layer", &self.path, error),
            },
        }
    }
}

/// What all layers of one image may still take.
struct Left {
    bytes: u64,
    entries: u64,
    names: u64,
}

impl Left {
    fn all(limits: &Limits) -> Left {
        Left {
            bytes: limits.image_bytes_max.0,
            entries: limits.entries_max,
            names: limits.names_bytes_max.0,
        }
    }
}

/// Reads the headers of one layer.
fn headers<R: Read>(
    layer: &LayerFile,
    reader: &mut TarReader<R>,
    left: &mut Left,
    limits: &Limits,
    cancel: &Cancel,
) -> Result<Vec<Entry>, ImageError> {
    let mut entries = Vec::new();
    while let Some(entry) = reader.next().map_err(|error| layer.failed(error))? {
        cancel.check()?;
        if left.entries == 0 {
            let why = Refusal::Limit {
                what: "files and directories",
                limit: limits.entries_max,
            };
            return Err(ImageError::refused(layer.subject(), why));
        }
        left.entries -= 1;
        // All entries of a layer are held until it is applied: what they hold is bounded here, before the next is read.
        let Some(names) = left.names.checked_sub(entry.names_bytes()) else {
            let why = Refusal::Limit {
                what: "bytes of paths, link targets and extended attributes",
                limit: limits.names_bytes_max.0,
            };
            return Err(ImageError::refused(layer.subject(), why));
        };
        left.names = names;
        entries.push(entry);
    }
    Ok(entries)
}

/// Reads and checks all layers. Gives the merged tree, and each layer's digest when unpacked.
pub(crate) fn index(
    layers: &[LayerFile],
    limits: &Limits,
    cancel: &Cancel,
) -> Result<(Tree, Vec<Digest>), ImageError> {
    let mut tree = Tree::new(limits);
    let mut diff_ids = Vec::new();
    let mut left = Left::all(limits);
    for layer in layers {
        let mut hashing = Hashing::new(layer.open(left.bytes, limits)?);
        let mut reader = TarReader::new(&mut hashing, limits);
        let entries = headers(layer, &mut reader, &mut left, limits, cancel)?;
        // A layer's end is vouched for by its digest; a plain tar has only its own end marker.
        if layer.diff_id.is_none() && !reader.saw_end_marker() {
            let why = Refusal::Tar {
                offset: 0,
                why: "it has no end marker, so that it may be cut short",
            };
            return Err(ImageError::refused(layer.subject(), why));
        }
        reader.drain().map_err(|error| layer.failed(error))?;
        let (found, bytes) = hashing.finish();
        if let Some(wanted) = &layer.diff_id
            && *wanted != found
        {
            let wanted = wanted.clone();
            let why = Refusal::Digest { wanted, found };
            return Err(ImageError::refused(
                format!("the unpacked {}", layer.subject()),
                why,
            ));
        }
        diff_ids.push(found);
        left.bytes = left.bytes.saturating_sub(bytes);
        tree.apply_layer(entries)
            .map_err(|why| ImageError::refused(layer.subject(), why))?;
    }
    tree.add_mount_points()
        .map_err(|why| ImageError::refused("the image", why))?;
    if tree.xattrs_dropped() > 0 {
        tracing::warn!(
            count = tree.xattrs_dropped(),
            "extended attributes that a root disk cannot hold were left out"
        );
    }
    Ok((tree, diff_ids))
}

/// The merged tree of layers that [`index`] has accepted before: the same, without the digests, which cost most of it.
pub(crate) fn tree(layers: &[LayerFile], limits: &Limits) -> Result<Tree, ImageError> {
    let mut tree = Tree::new(limits);
    let mut left = Left::all(limits);
    for layer in layers {
        let mut reader = TarReader::new(layer.open(left.bytes, limits)?, limits);
        let entries = headers(layer, &mut reader, &mut left, limits, &Cancel::default())?;
        tree.apply_layer(entries)
            .map_err(|why| ImageError::refused(layer.subject(), why))?;
    }
    tree.add_mount_points()
        .map_err(|why| ImageError::refused("the image", why))?;
    Ok(tree)
}

/// The packer, killed when dropped before its end.
struct Packer(Child);

impl Drop for Packer {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Packs the tree into a new file. On an error the file may be there half made: the caller removes it.
pub(crate) fn write(
    tree: &Tree,
    layers: &[LayerFile],
    out: &Path,
    limits: &Limits,
    cancel: &Cancel,
    progress: &ProgressSink,
) -> Result<(), ImageError> {
    let root = tree.root();
    let mut command = Command::new(TOOL);
    command
        .args(["-comp", "lz4", "-b", "128K", "-mkfs-time", "0"])
        .args(["-no-progress", "-quiet", "-exit-on-error"])
        .args(["-root-mode", &format!("{:o}", root.mode)])
        // The root's inode is mended afterwards: see `squashfs`.
        .arg("-noI")
        .args(["-mem", &format!("{}M", limits.disk_memory.to_mib_ceil())]);
    if limits.disk_processors > 0 {
        command.args(["-processors", &limits.disk_processors.to_string()]);
    }
    command
        .arg(out)
        // It refuses to run with this beside -mkfs-time, and the disk must not depend on the environment.
        .env_remove("SOURCE_DATE_EPOCH")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ImageError::ToolMissing { tool: TOOL },
        _ => ImageError::io("start", Path::new(TOOL), error),
    })?;
    let mut packer = Packer(child);
    let (Some(stdin), Some(stderr)) = (packer.0.stdin.take(), packer.0.stderr.take()) else {
        return Err(ImageError::Internal("the packer has no pipes".to_owned()));
    };
    let messages = std::thread::Builder::new()
        .name("sqfstar-stderr".to_owned())
        .spawn(move || last_words(stderr))
        .map_err(|error| ImageError::io("start a thread for", Path::new(TOOL), error))?;
    let streamed = stream(tree, layers, stdin, limits, cancel, progress);
    if let Err(error) = &streamed
        && !matches!(error, ImageError::Io { path, .. } if path == Path::new(TOOL))
    {
        return streamed;
    }
    // All was written, or the packer closed its end early: either way its own words tell how it went.
    let status = packer
        .0
        .wait()
        .map_err(|error| ImageError::io("wait for", Path::new(TOOL), error))?;
    let message = messages.join().unwrap_or_default();
    if status.success() {
        streamed?;
        return File::options()
            .read(true)
            .write(true)
            .open(out)
            .and_then(|file| set_root(&file, root.uid, root.gid, root.mtime))
            .map_err(|error| ImageError::io("finish", out, error));
    }
    if message.contains("No space left") {
        return Err(ImageError::NoSpace {
            path: out.to_owned(),
            needed: None,
        });
    }
    Err(ImageError::ToolFailed {
        tool: TOOL,
        status: status.to_string(),
        message,
    })
}

fn last_words(mut stream: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = [0; 1024];
    while let Ok(got) = stream.read(&mut chunk) {
        if got == 0 {
            break;
        }
        kept.extend_from_slice(&chunk[..got]);
        let excess = kept.len().saturating_sub(MESSAGE_BYTES_MAX);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

/// Writes the tree as one tar: directories, links and devices first, then files in the order of their layers, then further
/// names of what has several. The same layers always give the same bytes.
pub(crate) fn stream(
    tree: &Tree,
    layers: &[LayerFile],
    out: impl Write,
    limits: &Limits,
    cancel: &Cancel,
    progress: &ProgressSink,
) -> Result<(), ImageError> {
    let tool = |error| ImageError::io("write to", Path::new(TOOL), error);
    let mut writer = TarWriter::new(BufWriter::with_capacity(256 << 10, out));
    let mut wanted: Vec<HashMap<u32, (u32, u32)>> = vec![HashMap::new(); layers.len()];
    let mut first_names: HashMap<u32, u32> = HashMap::new();
    let mut hard_links = Vec::new();
    let total_entries = tree.walk().count() as u64;
    let mut done_entries = 0;
    let mut step = || {
        done_entries += 1;
        if done_entries % REPORT_EVERY == 0 || done_entries == total_entries {
            progress.report(Progress::BuildingDisk {
                done_entries,
                total_entries,
            });
        }
    };
    for visit in tree.walk() {
        cancel.check()?;
        let directory = visit.inode.content == Content::Directory;
        if !directory && let Some(first) = first_names.get(&visit.inode_number) {
            hard_links.push((visit.node, *first));
            continue;
        }
        if !directory {
            first_names.insert(visit.inode_number, visit.node);
        }
        if let Content::File {
            size,
            layer,
            ordinal,
        } = visit.inode.content
            && size > 0
        {
            let layer = wanted
                .get_mut(layer as usize)
                .ok_or_else(|| ImageError::Internal("a file is of no layer".to_owned()))?;
            layer.insert(ordinal, (visit.node, visit.inode_number));
            continue;
        }
        let path = tree.path(visit.node);
        writer
            .header(&fields(&path, visit.inode, b""))
            .map_err(tool)?;
        step();
    }
    let mut chunk = vec![0; 128 << 10];
    for (layer, mut wanted) in layers.iter().zip(wanted) {
        if wanted.is_empty() {
            continue;
        }
        // The sum over all layers was held to its bound by the indexing.
        let unpacked = layer.open(limits.image_bytes_max.0, limits)?;
        let mut reader = TarReader::new(unpacked, limits);
        let mut ordinal = 0;
        while !wanted.is_empty() {
            let Some(entry) = reader.next().map_err(|error| layer.failed(error))? else {
                return Err(ImageError::Internal("a layer has changed".to_owned()));
            };
            cancel.check()?;
            if let Some((node, inode_number)) = wanted.remove(&ordinal) {
                let inode = tree.inode(inode_number);
                let path = tree.path(node);
                let header = fields(&path, inode, b"");
                if header.size != entry.size {
                    return Err(ImageError::Internal("a layer has changed".to_owned()));
                }
                writer.header(&header).map_err(tool)?;
                loop {
                    let got = reader
                        .read_data(&mut chunk)
                        .map_err(|error| layer.failed(error))?;
                    if got == 0 {
                        break;
                    }
                    writer.data(&chunk[..got]).map_err(tool)?;
                    cancel.check()?;
                }
                writer.pad(header.size).map_err(tool)?;
                step();
            }
            ordinal += 1;
        }
    }
    for (node, first) in hard_links {
        let (path, target) = (tree.path(node), tree.path(first));
        let inode = tree.inode(tree.inode_number(node));
        let header = Fields {
            type_flag: b'1',
            link: &target,
            size: 0,
            device: (0, 0),
            xattrs: &[],
            ..fields(&path, inode, b"")
        };
        writer.header(&header).map_err(tool)?;
        step();
    }
    let mut buffered = writer.finish().map_err(tool)?;
    buffered.flush().map_err(tool)
}

fn fields<'a>(path: &'a [u8], inode: &'a crate::merge::Inode, none: &'a [u8]) -> Fields<'a> {
    let (type_flag, link, size, device) = match &inode.content {
        Content::Directory => (b'5', none, 0, (0, 0)),
        Content::File { size, .. } => (b'0', none, *size, (0, 0)),
        Content::Symlink(target) => (b'2', &target[..], 0, (0, 0)),
        Content::CharDevice(major, minor) => (b'3', none, 0, (*major, *minor)),
        Content::BlockDevice(major, minor) => (b'4', none, 0, (*major, *minor)),
        Content::Fifo => (b'6', none, 0, (0, 0)),
    };
    Fields {
        path,
        type_flag,
        link,
        mode: inode.mode,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        size,
        device,
        xattrs: &inode.xattrs,
    }
}
