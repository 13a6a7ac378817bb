//! Reading a file system that anyone may have written: this crate, `mkfs`, the Nanos kernel, or someone hostile.
//!
//! The whole log is read first, since the kernel changes entries by writing further records; after that the tree is there,
//! and contents are read on demand.

use super::SECTOR_BYTES;
use super::content::{Content, arrange};
use super::encoding::{Cursor, MAGIC, VERSION};
use super::error::{Damage, ReadError};
use super::graph::{Cell, Graph, Id, Objects, decimal};
use super::label::{Label, VolumeId};
use super::log::{END_OF_LOG, END_OF_SEGMENT, LINK, TUPLE_AVAILABLE, TUPLE_EXTENDED};
use super::value::Value;
use super::writer::FRACTION_BITS;
use std::collections::HashSet;
use std::io::{Read, Seek, SeekFrom};

/// How much a file system may ask of its reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all pieces of the log. A tree of two million files needs some 200 MB.
    pub log_bytes_max: u64,
    /// Bytes of one piece. The kernel makes them of 512 KiB.
    pub piece_bytes_max: u64,
    /// Keys, symbols, tuples and vectors that the log may name, later removed ones included; a file needs about twelve.
    /// Each takes up to 60 bytes of memory.
    pub entries_max: u64,
    /// Directories below one another in [`Reader::walk`].
    pub depth_max: u32,
    /// Values inside one another in [`Reader::keys`].
    pub value_depth_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            log_bytes_max: 256 << 20,
            piece_bytes_max: 4 << 20,
            entries_max: 8_000_000,
            depth_max: 512,
            value_depth_max: 16,
        }
    }
}

/// A directory or file within one [`Reader`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(Id);

/// A file within one [`Reader`]: give it to [`Reader::content`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHandle {
    /// The same for every name of the file.
    pub id: NodeId,
    /// Bytes of the content, as the file system says; a hostile one may say anything.
    pub length: u64,
}

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory: give it to [`Reader::entries`].
    Directory(NodeId),
    /// A file.
    File(FileHandle),
    /// A symbolic link, with its target.
    Symlink(Vec<u8>),
    /// Something else: sockets and the like that the kernel keeps.
    Other,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Any bytes but none: a hostile file system may have slashes here.
    pub name: Vec<u8>,
    /// What it leads to.
    pub node: Node,
}

/// A file system that was read from `R`.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    base: u64,
    sectors: u64,
    id: VolumeId,
    label: Label,
    objects: Objects,
    limits: Limits,
    log_bytes: u64,
}

impl<R: Read + Seek> Reader<R> {
    /// Reads the log of the file system that begins at byte `base` of `input` and reaches to the input's end.
    pub fn open(mut input: R, base: u64, limits: &Limits) -> Result<Reader<R>, ReadError> {
        let end = input.seek(SeekFrom::End(0)).map_err(ReadError::Io)?;
        let sectors = end.saturating_sub(base) / SECTOR_BYTES;
        let mut log = LogReader {
            input: &mut input,
            base,
            sectors,
            limits,
            graph: Graph::new(limits.entries_max),
            bytes: 0,
            seen: HashSet::new(),
            begun: None,
        };
        let (id, label) = log.read()?;
        let (objects, log_bytes) = (log.graph.finish(), log.bytes);
        if !objects.is_tuple(0) {
            return Err(ReadError::Tree("there is no root"));
        }
        Ok(Reader {
            input,
            base,
            sectors,
            id,
            label,
            objects,
            limits: limits.clone(),
            log_bytes,
        })
    }

    /// The file system's identity.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// The file system's label.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Bytes of all pieces of the log.
    pub fn log_bytes(&self) -> u64 {
        self.log_bytes
    }

    /// The input.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// What stands in the root beside the tree: the manifest. Ordered by key.
    pub fn keys(&self) -> Result<Vec<(Vec<u8>, Value)>, ReadError> {
        let mut keys = Vec::new();
        let mut budget = self.limits.entries_max;
        for (symbol, cell) in self.objects.cells(0) {
            let name = self.objects.name(symbol);
            if name != b"children" {
                let value = self.value(cell, self.limits.value_depth_max, &mut budget)?;
                keys.push((name.to_vec(), value));
            }
        }
        keys.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(keys)
    }

    /// `budget` bounds what a value that holds another many times over can grow to.
    fn value(&self, cell: Cell, depth_left: u32, budget: &mut u64) -> Result<Value, ReadError> {
        let bytes = match cell {
            Cell::Text { length, .. } => u64::from(length),
            Cell::Object(_) | Cell::Integer { .. } | Cell::Null => 0,
        };
        *budget = budget
            .checked_sub(1 + bytes)
            .ok_or(ReadError::Limit("values in its root"))?;
        Ok(match cell {
            Cell::Null => Value::Null,
            Cell::Text { start, length } => Value::text(self.objects.text(start, length)),
            Cell::Integer {
                negative,
                magnitude,
            } => match negative {
                true => Value::Integer(-i128::from(magnitude)),
                false => Value::Integer(i128::from(magnitude)),
            },
            Cell::Object(id) => {
                let depth_left = depth_left
                    .checked_sub(1)
                    .ok_or(ReadError::Limit("values inside one another"))?;
                let tuple = self.objects.is_tuple(id);
                let mut entries = Vec::new();
                for (key, cell) in self.objects.cells(id) {
                    let value = self.value(cell, depth_left, budget)?;
                    let name = if tuple { self.objects.name(key) } else { &[] };
                    *budget = budget.saturating_sub(name.len() as u64);
                    entries.push((name.to_vec(), value));
                }
                match tuple {
                    true => Value::Tuple(entries),
                    false => Value::Vector(entries.into_iter().map(|(_, value)| value).collect()),
                }
            }
        })
    }

    /// The names in a directory, in order of their bytes. What is no directory has none.
    pub fn entries(&self, directory: NodeId) -> Result<Vec<Entry>, ReadError> {
        let Some(Cell::Object(children)) = self.objects.get(directory.0, b"children") else {
            return Ok(Vec::new());
        };
        let mut entries = Vec::new();
        for (symbol, cell) in self.objects.cells(children) {
            let name = self.objects.name(symbol);
            // The kernel keeps the way up under this name in memory.
            if name == b".." || name == b"." {
                continue;
            }
            let Cell::Object(id) = cell else {
                return Err(ReadError::Tree("a name leads to what is no entry"));
            };
            entries.push(Entry {
                name: name.to_vec(),
                node: self.node(id)?,
            });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn node(&self, id: Id) -> Result<Node, ReadError> {
        if let Some(Cell::Object(_)) = self.objects.get(id, b"children") {
            return Ok(Node::Directory(NodeId(id)));
        }
        if let Some(Cell::Text { start, length }) = self.objects.get(id, b"linktarget") {
            return Ok(Node::Symlink(self.objects.text(start, length).to_vec()));
        }
        if let Some(Cell::Object(_)) = self.objects.get(id, b"extents") {
            let length = match self.objects.get(id, b"filelength") {
                None => 0,
                Some(cell) => self
                    .objects
                    .number(cell)
                    .ok_or(ReadError::Tree("a file's length is no number"))?,
            };
            return Ok(Node::File(FileHandle {
                id: NodeId(id),
                length,
            }));
        }
        Ok(Node::Other)
    }

    /// When a file was last changed, in seconds since 1970, where the file system says so. A later time than its 32 bits
    /// hold is told as the last of them.
    pub fn modified(&self, file: FileHandle) -> Option<u32> {
        let time = self.objects.get(file.id.0, b"mtime")?;
        let seconds = self.objects.number(time)? >> FRACTION_BITS;
        Some(u32::try_from(seconds).unwrap_or(u32::MAX))
    }

    /// What a path leads to; symbolic links are not followed, `.` and `..` not known.
    pub fn lookup(&self, path: &[u8]) -> Result<Option<Node>, ReadError> {
        let mut node = Node::Directory(self.root());
        for name in path.split(|byte| *byte == b'/') {
            if name.is_empty() {
                continue;
            }
            let Node::Directory(NodeId(directory)) = node else {
                return Ok(None);
            };
            let found = match self.objects.get(directory, b"children") {
                Some(Cell::Object(children)) => self.objects.get(children, name),
                _ => None,
            };
            let Some(Cell::Object(id)) = found else {
                return Ok(None);
            };
            node = self.node(id)?;
        }
        Ok(Some(node))
    }

    /// Visits every entry below the root with its path (names joined by slashes, none in front), each directory before what
    /// is in it. Refuses a directory that is reached twice.
    pub fn walk(
        &self,
        mut visit: impl FnMut(&[u8], &Node) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let mut reached = HashSet::from([self.root()]);
        let mut left = self.limits.entries_max;
        let mut path = Vec::new();
        // Directories that are being walked: what is left in each, last name first, and the length of its path.
        let mut open = vec![(self.reversed(self.root())?, 0)];
        while let Some((entries, length)) = open.last_mut() {
            let Some(entry) = entries.pop() else {
                open.pop();
                continue;
            };
            path.truncate(*length);
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&entry.name);
            // Directories may share their entries, so that there are more paths than the log has names.
            left = left.checked_sub(1).ok_or(ReadError::Limit("paths"))?;
            visit(&path, &entry.node)?;
            if let Node::Directory(id) = entry.node {
                if !reached.insert(id) {
                    return Err(ReadError::Tree("a directory has two names"));
                }
                if open.len() as u64 > u64::from(self.limits.depth_max) {
                    return Err(ReadError::Limit("directories below one another"));
                }
                open.push((self.reversed(id)?, path.len()));
            }
        }
        Ok(())
    }

    fn reversed(&self, directory: NodeId) -> Result<Vec<Entry>, ReadError> {
        let mut entries = self.entries(directory)?;
        entries.reverse();
        Ok(entries)
    }

    /// The content of a file, to be read from front to end.
    pub fn content(&mut self, file: FileHandle) -> Result<Content<'_, R>, ReadError> {
        let mut runs = Vec::new();
        if let Some(Cell::Object(extents)) = self.objects.get(file.id.0, b"extents") {
            for (symbol, cell) in self.objects.cells(extents) {
                let number = |id, key| {
                    self.objects
                        .get(id, key)
                        .and_then(|cell| self.objects.number(cell))
                        .ok_or(ReadError::Tree("an extent lacks a number"))
                };
                let block = decimal(self.objects.name(symbol))
                    .ok_or(ReadError::Tree("an extent's key is no number"))?;
                let Cell::Object(extent) = cell else {
                    return Err(ReadError::Tree("an extent is no tuple"));
                };
                let written = self.objects.get(extent, b"uninited").is_none();
                let (sector, length) = (number(extent, b"offset")?, number(extent, b"length")?);
                runs.push((block, sector, length, written));
            }
        }
        let extents = arrange(runs, self.base, self.sectors).map_err(ReadError::Tree)?;
        Ok(Content::new(&mut self.input, extents, file.length))
    }
}

/// Follows a log from piece to piece.
struct LogReader<'a, R> {
    input: &'a mut R,
    base: u64,
    sectors: u64,
    limits: &'a Limits,
    graph: Graph,
    bytes: u64,
    seen: HashSet<u64>,
    /// A record of which parts are still to come: its length, and what is there.
    begun: Option<(u64, Vec<u8>)>,
}

impl<R: Read + Seek> LogReader<'_, R> {
    fn read(&mut self) -> Result<(VolumeId, Label), ReadError> {
        let first = self.piece(0, 1)?;
        let mut cursor = Cursor::new(&first);
        if cursor.take(MAGIC.len() as u64) != Ok(&MAGIC[..]) {
            return Err(ReadError::NotTfs);
        }
        let at = |cursor: &Cursor<'_>, damage| damaged(0, cursor.position(), damage);
        let version = cursor.varint().map_err(|damage| at(&cursor, damage))?;
        if version != VERSION {
            return Err(ReadError::Version(version));
        }
        let (id, label) = first_header(&mut cursor).map_err(|damage| at(&cursor, damage))?;
        let mut next = self
            .frames(&mut cursor)
            .map_err(|damage| at(&cursor, damage))?;
        while let Some((sector, length)) = next {
            let piece = self.piece(sector, length)?;
            let mut cursor = Cursor::new(&piece);
            next = piece_header(&mut cursor, length)
                .and_then(|()| self.frames(&mut cursor))
                .map_err(|damage| damaged(sector, cursor.position(), damage))?;
        }
        if self.begun.is_some() {
            return Err(damaged(0, 0, Damage::CutShort));
        }
        Ok((id, label))
    }

    fn piece(&mut self, sector: u64, length: u64) -> Result<Vec<u8>, ReadError> {
        let outside = ReadError::Outside {
            what: "a piece of the log",
        };
        let inside = sector
            .checked_add(length)
            .is_some_and(|end| end <= self.sectors);
        if !inside {
            return Err(match sector {
                0 => ReadError::NotTfs,
                _ => outside,
            });
        }
        if !self.seen.insert(sector) {
            return Err(damaged(sector, 0, Damage::Loop));
        }
        if length == 0 || length > self.limits.piece_bytes_max / SECTOR_BYTES {
            return Err(damaged(sector, 0, Damage::PieceLength(length)));
        }
        let bytes = length * SECTOR_BYTES;
        self.bytes += bytes;
        if self.bytes > self.limits.log_bytes_max {
            return Err(ReadError::Limit("bytes of log"));
        }
        let mut piece = vec![0; bytes as usize];
        self.input
            .seek(SeekFrom::Start(self.base + sector * SECTOR_BYTES))
            .and_then(|_| self.input.read_exact(&mut piece))
            .map_err(ReadError::Io)?;
        Ok(piece)
    }

    /// Reads frames up to the end of the log, or to a link, which it returns.
    fn frames(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<(u64, u64)>, Damage> {
        loop {
            match cursor.byte()? {
                END_OF_LOG => return Ok(None),
                END_OF_SEGMENT => {}
                LINK => return Ok(Some((cursor.varint()?, cursor.varint()?))),
                TUPLE_AVAILABLE => {
                    if self.begun.is_some() {
                        return Err(Damage::Length);
                    }
                    let (total, part) = (cursor.varint()?, cursor.varint()?);
                    let part = cursor.take(part)?;
                    self.part(total, Vec::new(), part)?;
                }
                TUPLE_EXTENDED => {
                    let part = cursor.varint()?;
                    let part = cursor.take(part)?;
                    let (total, begun) = self.begun.take().ok_or(Damage::Length)?;
                    self.part(total, begun, part)?;
                }
                other => return Err(Damage::Frame(other)),
            }
        }
    }

    fn part(&mut self, total: u64, mut begun: Vec<u8>, part: &[u8]) -> Result<(), Damage> {
        let length = (begun.len() + part.len()) as u64;
        if length > total {
            return Err(Damage::Length);
        }
        let complete = length == total;
        if complete && begun.is_empty() {
            return self.graph.record(part).map_err(|(_, damage)| damage);
        }
        begun.extend_from_slice(part);
        if complete {
            return self.graph.record(&begun).map_err(|(_, damage)| damage);
        }
        self.begun = Some((total, begun));
        Ok(())
    }
}

fn damaged(sector: u64, offset: usize, damage: Damage) -> ReadError {
    ReadError::Damaged {
        sector,
        offset: offset as u64,
        damage,
    }
}

/// The first sector's header after the version: its length, the identity, the label.
fn first_header(cursor: &mut Cursor<'_>) -> Result<(VolumeId, Label), Damage> {
    let _sectors = cursor.varint()?;
    let id = cursor.take(16)?;
    let id = <[u8; 16]>::try_from(id).map_err(|_| Damage::CutShort)?;
    Ok((VolumeId(id), Label::read(cursor)?))
}

fn piece_header(cursor: &mut Cursor<'_>, length: u64) -> Result<(), Damage> {
    let magic = cursor.take(MAGIC.len() as u64)?;
    if magic != MAGIC || cursor.varint()? != VERSION {
        return Err(Damage::PieceHeader);
    }
    match cursor.varint()? {
        same if same == length => Ok(()),
        other => Err(Damage::PieceLength(other)),
    }
}
