//! A disk from another one: the same tree with some files changed, and another manifest.
//!
//! An image's files are put on a disk once; each machine then gets a disk of its own from that one, which costs one copy of
//! the contents, read and written mostly in order. Nothing of the old log is taken over, so that the new one is as short as
//! the tree allows.
//!
//! The old disk is read with bounds and not trusted: names that no file system of ours has, more content than the disk has
//! bytes, and directories that are reached twice are refused.

mod ahead;

use crate::disk::{self, BootDisk, DiskError, DiskOptions, Geometry};
use crate::manifest::Manifest;
use crate::tfs::{self, FileHandle, Limits, Node, NodeId, ReadError, Reader, WriteError, Writer};
use ahead::Ahead;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom, Write};

/// Symbolic links that are followed on the way to one path, as on Linux.
const LINKS_MAX: u32 = 40;

/// What is different on the new disk. Paths are those of the tree's root, with or without a slash in front; symbolic links
/// on the way to them are followed, and directories on the way made where they are missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Files with their whole contents: new ones, or in the place of files or links that are there.
    pub files: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directories that are to be there, such as those that volumes are mounted on. What is in them stays.
    pub directories: Vec<Vec<u8>>,
    /// When those files were last changed, in seconds since 1970.
    pub modified: Option<u32>,
    /// What the boot file system is to have; without it there is none.
    pub boot: Option<BootFiles>,
}

/// What a boot file system has for a kernel that loads modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel's own file, for its symbols.
    pub kernel: Vec<u8>,
    /// Modules, by name.
    pub klibs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl BootFiles {
    fn write<W: Write + Seek>(&self, writer: &mut Writer<W>) -> Result<(), WriteError> {
        let root = writer.root();
        let file = |writer: &mut Writer<W>, directory, name: &[u8], mut content: &[u8]| {
            writer
                .file(directory, name, content.len() as u64, &mut content)
                .map(|_| ())
        };
        file(writer, root, b"kernel", &self.kernel)?;
        let modules = writer.directory(root, b"klib")?;
        for (name, content) in &self.klibs {
            file(writer, modules, name, content)?;
        }
        Ok(())
    }
}

/// Why no disk could be made from another.
#[derive(Debug, thiserror::Error)]
pub enum RemasterError {
    /// The old disk could not be read.
    #[error("the disk that it is made from cannot be read")]
    Base(#[source] DiskError),
    /// The old disk has something that none of ours has.
    #[error("the disk that it is made from is refused: {0}")]
    Refused(&'static str),
    /// The new disk could not be written.
    #[error("the disk cannot be written")]
    New(#[source] DiskError),
    /// A change that the tree does not allow.
    #[error("{path:?} cannot be put on the disk: {why}")]
    Change {
        /// The path.
        path: String,
        /// Why not.
        why: &'static str,
    },
}

/// Makes the boot disk `out`, which must be empty, from `base`: its root's tree with `changes`, under `manifest`. The boot
/// file system of `base`, if it has one, is not taken over. Gives `out` back, flushed.
///
/// # Errors
/// [`RemasterError`]; `out` is then of no use.
pub fn remaster<R: Read + Seek, W: Write + Seek>(
    base: R,
    out: W,
    options: &DiskOptions,
    manifest: &Manifest,
    changes: &Changes,
) -> Result<(W, Geometry), RemasterError> {
    let limits = Limits::default();
    let mut base = Ahead::new(base);
    let bytes = base
        .seek(SeekFrom::End(0))
        .map_err(|error| RemasterError::Base(DiskError::Io(error)))?;
    let mut reader = disk::open(base, &limits).map_err(RemasterError::Base)?;
    let mut tree = Tree::read(&reader, bytes, &limits)?;
    for (path, content) in &changes.files {
        tree.put(path, content)?;
    }
    for path in &changes.directories {
        tree.enter(path, path)?;
    }
    let mut disk = match &changes.boot {
        None => BootDisk::create(out, options, manifest),
        Some(files) => {
            BootDisk::with_boot_files(out, options, manifest, |writer| files.write(writer))
        }
    }
    .map_err(RemasterError::New)?;
    tree.write(&mut reader, changes, disk.tree())?;
    disk.finish().map_err(RemasterError::New)
}

/// What a name leads to; directories by their place in [`Tree::directories`].
#[derive(Debug, Clone, Copy)]
enum Item<'a> {
    Directory(usize),
    File(FileHandle),
    Symlink(usize),
    New(&'a [u8]),
}

/// A tree in memory, without its contents.
#[derive(Debug)]
struct Tree<'a> {
    /// The root first; each behind the one that it lies in.
    directories: Vec<BTreeMap<Vec<u8>, Item<'a>>>,
    targets: Vec<Vec<u8>>,
}

impl<'a> Tree<'a> {
    /// Reads the tree of a disk that has so many bytes.
    fn read<R: Read + Seek>(
        reader: &Reader<R>,
        bytes: u64,
        limits: &Limits,
    ) -> Result<Tree<'a>, RemasterError> {
        let damaged = |error| RemasterError::Base(DiskError::Read(error));
        let mut tree = Tree {
            directories: vec![BTreeMap::new()],
            targets: Vec::new(),
        };
        let mut reached = HashSet::from([reader.root()]);
        let mut files = HashSet::new();
        // Contents of ours are all on the disk; a hostile one may speak of more bytes than any disk has.
        let mut bytes_left = bytes;
        // Directories may share their entries, so that there are more paths than the log has names.
        let mut entries_left = limits.entries_max;
        let mut todo: Vec<(NodeId, usize)> = vec![(reader.root(), 0)];
        while let Some((id, index)) = todo.pop() {
            for entry in reader.entries(id).map_err(damaged)? {
                entries_left = entries_left
                    .checked_sub(1)
                    .ok_or_else(|| damaged(ReadError::Limit("paths")))?;
                let item = match entry.node {
                    Node::Directory(below) => {
                        if !reached.insert(below) {
                            return Err(RemasterError::Refused("a directory has two names"));
                        }
                        tree.directories.push(BTreeMap::new());
                        let index = tree.directories.len() - 1;
                        todo.push((below, index));
                        Item::Directory(index)
                    }
                    Node::File(file) => {
                        if files.insert(file.id) {
                            bytes_left = bytes_left.checked_sub(file.length).ok_or(
                                RemasterError::Refused("its files are longer than the disk"),
                            )?;
                        }
                        Item::File(file)
                    }
                    Node::Symlink(target) => {
                        tree.targets.push(target);
                        Item::Symlink(tree.targets.len() - 1)
                    }
                    Node::Other => {
                        return Err(RemasterError::Refused(
                            "it has something that is neither a file nor a directory nor a link",
                        ));
                    }
                };
                tree.directories[index].insert(entry.name, item);
            }
        }
        Ok(tree)
    }

    /// Puts a file at a path.
    fn put(&mut self, path: &[u8], content: &'a [u8]) -> Result<(), RemasterError> {
        let end = path.iter().rposition(|byte| *byte != b'/');
        let plain = end.map_or(&[][..], |end| &path[..=end]);
        let start = plain.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = plain.split_at(start.map_or(0, |slash| slash + 1));
        if name.is_empty() || name == b"." || name == b".." {
            return Err(refused(path, "it names no file"));
        }
        let directory = self.enter(parent, path)?;
        let known = &mut self.directories[directory];
        if let Some(Item::Directory(_)) = known.get(name) {
            return Err(refused(path, "there is a directory"));
        }
        known.insert(name.to_vec(), Item::New(content));
        Ok(())
    }

    /// The directory at `path`, made where it is missing. `whole` is the path that is asked for in the end.
    fn enter(&mut self, path: &[u8], whole: &[u8]) -> Result<usize, RemasterError> {
        let mut links_left = LINKS_MAX;
        // The way down, so that `..` leads back.
        let mut way = vec![0];
        // Names that are still to go, the next one last.
        let mut names: Vec<Vec<u8>> = reversed(path);
        while let Some(name) = names.pop() {
            let here = way.last().copied().unwrap_or(0);
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            match self.directories[here].get(&name) {
                Some(Item::Directory(below)) => way.push(*below),
                Some(Item::Symlink(target)) => {
                    links_left = links_left
                        .checked_sub(1)
                        .ok_or_else(|| refused(whole, "too many links lead there"))?;
                    let target = &self.targets[*target];
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    names.extend(reversed(target));
                }
                Some(Item::File(_) | Item::New(_)) => {
                    return Err(refused(whole, "there is a file in its way"));
                }
                None => {
                    self.directories.push(BTreeMap::new());
                    let below = self.directories.len() - 1;
                    self.directories[here].insert(name, Item::Directory(below));
                    way.push(below);
                }
            }
        }
        Ok(way.last().copied().unwrap_or(0))
    }

    /// Writes all of it: directories and links, then the old files in the order in which the old disk has them, then the
    /// new ones.
    fn write<R: Read + Seek, W: Write + Seek>(
        &self,
        reader: &mut Reader<R>,
        changes: &Changes,
        writer: &mut Writer<W>,
    ) -> Result<(), RemasterError> {
        let failed = |error: WriteError| RemasterError::New(DiskError::Write(error));
        let mut old: Vec<(FileHandle, tfs::Directory, &[u8])> = Vec::new();
        let mut new: Vec<(&[u8], tfs::Directory, &[u8])> = Vec::new();
        let mut todo = vec![(0, writer.root())];
        while let Some((index, directory)) = todo.pop() {
            for (name, item) in &self.directories[index] {
                match item {
                    Item::Directory(below) => {
                        let made = writer.directory(directory, name).map_err(failed)?;
                        todo.push((*below, made));
                    }
                    Item::Symlink(target) => writer
                        .symlink(directory, name, &self.targets[*target])
                        .map_err(failed)?,
                    Item::File(file) => old.push((*file, directory, name)),
                    Item::New(content) => new.push((content, directory, name)),
                }
            }
        }
        // Files are numbered as their records stand in the log, and their contents lie in that order too.
        old.sort_by_key(|(file, ..)| file.id);
        let mut first_names: HashMap<NodeId, tfs::File> = HashMap::new();
        for (file, directory, name) in old {
            if let Some(first) = first_names.get(&file.id) {
                writer.hard_link(directory, name, *first).map_err(failed)?;
                continue;
            }
            let modified = reader.modified(file);
            let mut content = reader
                .content(file)
                .map_err(|error| RemasterError::Base(DiskError::Read(error)))?;
            let written = writer
                .file(directory, name, file.length, &mut content)
                .map_err(|error| match error {
                    WriteError::Source { source, .. } => RemasterError::Base(DiskError::Io(source)),
                    other => failed(other),
                })?;
            if let Some(modified) = modified {
                writer.set_modified(written, modified).map_err(failed)?;
            }
            first_names.insert(file.id, written);
        }
        for (mut content, directory, name) in new {
            let written = writer
                .file(directory, name, content.len() as u64, &mut content)
                .map_err(failed)?;
            if let Some(modified) = changes.modified {
                writer.set_modified(written, modified).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// A path's names, the last one first.
fn reversed(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

fn refused(path: &[u8], why: &'static str) -> RemasterError {
    RemasterError::Change {
        path: String::from_utf8_lossy(path).into_owned(),
        why,
    }
}

#[cfg(test)]
mod tests;
