//! A new file system in one pass: directories, files whose content is streamed, symbolic and hard links.
//!
//! Every entry is a log record of its own that adds one name to its directory, so that memory is bounded by the names
//! (which the dictionary must remember) and never by contents. A symbol is written out once only: the kernel counts what is
//! in its dictionary to number what comes next, and a repeated symbol would number two things alike.

use super::encoding::{Header, Kind, put_header, put_varint};
use super::error::WriteError;
use super::label::{Label, VolumeId};
use super::log::LogWriter;
use super::store::{CopyError, Store};
use super::value::Value;
use super::{DEPTH_MAX, NAME_BYTES_MAX, SECTOR_BYTES, TARGET_BYTES_MAX};
use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek, Write};

/// The kernel counts time in parts of a second; so many bits of a number are behind the point.
pub(super) const FRACTION_BITS: u32 = 32;

/// A directory in a file system that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Directory {
    /// The number of the tuple that holds its entries.
    children: u64,
    depth: u32,
}

/// A file in a file system that is being written, for further names of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct File(u64);

/// What a finished file system came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the whole file system, the free ones included; a multiple of 4,096.
    pub bytes: u64,
    /// Files, directories and links; the root is not counted.
    pub entries: u64,
    /// Bytes of all files' contents.
    pub content_bytes: u64,
}

/// Writes a new file system into `W`, which must be empty (or all zeros) from its start on: zeros are not written.
///
/// Give a `W` with a buffer, such as `BufWriter<File>`; writes are mostly in order.
#[derive(Debug)]
pub struct Writer<W> {
    store: Store<W>,
    log: LogWriter,
    symbols: HashMap<Box<[u8]>, u64>,
    /// The number of the last entry in the dictionary.
    last_id: u64,
    names: HashSet<(u64, u64)>,
    /// Names of each file that has more than one.
    names_of: HashMap<File, u64>,
    record: Vec<u8>,
    root: Directory,
    content_bytes: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// Begins a file system whose first sector is at byte `base` of `out`. `keys` stand in its root beside the tree: a boot
    /// disk's manifest, or nothing.
    pub fn create(
        out: W,
        base: u64,
        id: VolumeId,
        label: &Label,
        keys: &[(Vec<u8>, Value)],
    ) -> Result<Writer<W>, WriteError> {
        let mut store = Store::new(out, base, 1);
        let log = LogWriter::create(&mut store, id, label)?;
        let mut writer = Writer {
            store,
            log,
            symbols: HashMap::new(),
            last_id: 0,
            names: HashSet::new(),
            names_of: HashMap::new(),
            record: Vec::new(),
            root: Directory {
                children: 0,
                depth: 0,
            },
            content_bytes: 0,
        };
        writer.open_tuple(1 + keys.len() as u64);
        writer.put_symbol(b"children");
        writer.root.children = writer.open_tuple(0);
        for (key, value) in keys {
            writer.put_symbol(key);
            writer.put_value(value);
        }
        writer.commit()?;
        Ok(writer)
    }

    /// The root directory.
    pub fn root(&self) -> Directory {
        self.root
    }

    /// Adds a directory.
    pub fn directory(&mut self, parent: Directory, name: &[u8]) -> Result<Directory, WriteError> {
        if parent.depth >= DEPTH_MAX {
            return Err(WriteError::TooDeep { name: shown(name) });
        }
        self.begin_entry(parent, name)?;
        self.open_tuple(1);
        self.put_symbol(b"children");
        let children = self.open_tuple(0);
        self.commit()?;
        Ok(Directory {
            children,
            depth: parent.depth + 1,
        })
    }

    /// Adds a file of exactly `length` bytes, which are read from `content`; what may follow there is left unread.
    pub fn file(
        &mut self,
        parent: Directory,
        name: &[u8],
        length: u64,
        content: &mut dyn Read,
    ) -> Result<File, WriteError> {
        self.check_name(parent, name)?;
        let sectors = length.div_ceil(SECTOR_BYTES);
        let mut start = 0;
        if sectors > 0 {
            start = self.store.allocate(sectors)?;
            self.store
                .copy(start, length, content)
                .map_err(|error| match error {
                    CopyError::Out(error) => error,
                    CopyError::Source(source) => WriteError::Source {
                        name: shown(name),
                        source,
                    },
                    CopyError::Short { found } => WriteError::ShortContent {
                        name: shown(name),
                        wanted: length,
                        found,
                    },
                })?;
        }
        self.begin_entry(parent, name)?;
        let file = File(self.open_tuple(2));
        self.put_symbol(b"filelength");
        self.put_integer(false, length);
        self.put_symbol(b"extents");
        if sectors == 0 {
            self.open_tuple(0);
        } else {
            self.open_tuple(1);
            self.put_symbol(b"0");
            self.open_tuple(3);
            for (key, value) in [
                (&b"offset"[..], start),
                (b"length", sectors),
                (b"allocated", sectors),
            ] {
                self.put_symbol(key);
                self.put_integer(false, value);
            }
        }
        self.commit()?;
        self.content_bytes += length;
        Ok(file)
    }

    /// Says when a file was last changed, in seconds since 1970. Programs are told 1970 of a file without it.
    pub fn set_modified(&mut self, file: File, seconds: u32) -> Result<(), WriteError> {
        self.refer_to_tuple(file.0, 1);
        self.put_symbol(b"mtime");
        self.put_integer(false, u64::from(seconds) << FRACTION_BITS);
        self.commit()
    }

    /// Adds a symbolic link.
    pub fn symlink(
        &mut self,
        parent: Directory,
        name: &[u8],
        target: &[u8],
    ) -> Result<(), WriteError> {
        if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
            return Err(WriteError::Target { name: shown(name) });
        }
        self.begin_entry(parent, name)?;
        self.open_tuple(1);
        self.put_symbol(b"linktarget");
        self.put_text(target);
        self.commit()
    }

    /// Adds one more name for a file that has one.
    pub fn hard_link(
        &mut self,
        parent: Directory,
        name: &[u8],
        file: File,
    ) -> Result<(), WriteError> {
        self.begin_entry(parent, name)?;
        self.refer_to_tuple(file.0, 0);
        self.commit()?;
        // Without the count, the kernel frees the content when the first of the names is removed.
        let names = self.names_of.entry(file).or_insert(1);
        *names += 1;
        let names = *names;
        self.refer_to_tuple(file.0, 1);
        self.put_symbol(b"nlink");
        self.put_integer(false, names);
        self.commit()
    }

    /// Ends the file system, with `free_bytes` beyond what is used for what the guest will write. Returns the output, which
    /// is now at least as long as the file system.
    pub fn finish(mut self, free_bytes: u64) -> Result<(W, Written), WriteError> {
        self.log.finish(&mut self.store)?;
        let (out, bytes) = self.store.finish(free_bytes)?;
        let written = Written {
            bytes,
            entries: self.names.len() as u64,
            content_bytes: self.content_bytes,
        };
        Ok((out, written))
    }

    fn check_name(&self, parent: Directory, name: &[u8]) -> Result<(), WriteError> {
        let refuse = |reason| {
            Err(WriteError::Name {
                name: shown(name),
                reason,
            })
        };
        match name {
            b"" => return refuse("it is empty"),
            b"." | b".." => return refuse("it means a directory itself"),
            _ if name.len() > NAME_BYTES_MAX => return refuse("it has more than 255 bytes"),
            _ if name.contains(&b'/') => return refuse("it has a slash"),
            _ if name.contains(&0) => return refuse("it has a NUL"),
            _ => {}
        }
        let taken = self
            .symbols
            .get(name)
            .is_some_and(|symbol| self.names.contains(&(parent.children, *symbol)));
        if taken {
            return Err(WriteError::Duplicate { name: shown(name) });
        }
        Ok(())
    }

    /// Begins the record that adds `name` to `parent`; the entry's value must follow.
    fn begin_entry(&mut self, parent: Directory, name: &[u8]) -> Result<(), WriteError> {
        self.check_name(parent, name)?;
        self.refer_to_tuple(parent.children, 1);
        let symbol = self.put_symbol(name);
        self.names.insert((parent.children, symbol));
        Ok(())
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        self.log.append(&mut self.store, &self.record)?;
        self.record.clear();
        Ok(())
    }

    fn header(&mut self, immediate: bool, kind: Kind, length: u64) {
        put_header(
            &mut self.record,
            Header {
                immediate,
                kind,
                length,
            },
        );
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// A new tuple of `entries`, which must follow; returns its number.
    fn open_tuple(&mut self, entries: u64) -> u64 {
        self.header(true, Kind::Tuple, entries);
        self.next_id()
    }

    /// Further entries of a tuple that is there; they must follow.
    fn refer_to_tuple(&mut self, id: u64, entries: u64) {
        self.header(false, Kind::Tuple, entries);
        put_varint(&mut self.record, id);
    }

    /// Returns the symbol's number.
    fn put_symbol(&mut self, name: &[u8]) -> u64 {
        if let Some(id) = self.symbols.get(name).copied() {
            self.header(false, Kind::Symbol, id);
            return id;
        }
        self.header(true, Kind::Symbol, name.len() as u64);
        self.record.extend_from_slice(name);
        let id = self.next_id();
        self.symbols.insert(name.into(), id);
        id
    }

    fn put_text(&mut self, text: &[u8]) {
        self.header(true, Kind::Text, text.len() as u64);
        self.record.extend_from_slice(text);
    }

    fn put_integer(&mut self, negative: bool, magnitude: u64) {
        self.header(true, Kind::Integer, u64::from(negative));
        put_varint(&mut self.record, magnitude);
    }

    fn put_value(&mut self, value: &Value) {
        match value {
            Value::Text(text) => self.put_text(text),
            Value::Integer(number) => {
                // The disk has 64 bits for the magnitude; what is beyond is kept at that bound.
                let magnitude = u64::try_from(number.unsigned_abs()).unwrap_or(u64::MAX);
                self.put_integer(*number < 0, magnitude);
            }
            Value::Tuple(entries) => {
                self.open_tuple(entries.len() as u64);
                for (key, value) in entries {
                    self.put_symbol(key);
                    self.put_value(value);
                }
            }
            Value::Vector(values) => {
                self.header(true, Kind::Vector, values.len() as u64);
                self.next_id();
                for value in values {
                    self.put_value(value);
                }
            }
            Value::Null => {
                self.header(true, Kind::Symbol, 1);
                self.record.push(0);
            }
        }
    }
}

/// A name as a message shows it.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
