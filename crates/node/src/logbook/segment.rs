//! One file of a log book. The format is described in `docs/formats/logbook.md`.
//!
//! ```text
//! header:  "VSTLOG01"  u64 stdout offset  u64 stderr offset          (little-endian, offsets at the segment's start)
//! record:  u8 kind  u64 time (ns since 1970)  u32 length  u32 crc32(kind, time, length, payload)  payload
//! ```
//! Kinds: 1 stdout, 2 stderr, 3 and 4 a gap in stdout and stderr whose payload is its length as u64.

use super::Offsets;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"VSTLOG01";
/// Bytes before the first record.
pub(super) const HEADER_LEN: usize = 24;
/// Bytes of a record before its payload.
const RECORD_LEN: usize = 17;
/// Most payload bytes in one record: twice what the agent sends at once.
const PAYLOAD_MAX: usize = 64 << 10;

/// Which of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The program printed this.
    Output {
        stream: Stream,
        time_ns: u64,
        bytes: Vec<u8>,
    },
    /// So many bytes are not here.
    Gap { bytes: u64, reason: &'static str },
}

/// Segments in `dir` by number.
pub(super) fn list(dir: &Path) -> io::Result<BTreeMap<u64, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".log"))
            .and_then(|stem| stem.parse().ok());
        if let Some(number) = number {
            found.insert(number, path);
        }
    }
    Ok(found)
}

/// A record's bytes taken apart; what follows it is left in `rest`.
pub(super) enum Parsed {
    /// A whole record of this many bytes.
    Record(Entry, Option<(Stream, u64)>, usize),
    /// More bytes are needed.
    Incomplete,
    /// These bytes are no record.
    Damaged,
}

/// Reads the record at the beginning of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let Some((head, body)) = bytes.split_first_chunk::<RECORD_LEN>() else {
        return Parsed::Incomplete;
    };
    let [
        kind,
        t0,
        t1,
        t2,
        t3,
        t4,
        t5,
        t6,
        t7,
        l0,
        l1,
        l2,
        l3,
        c0,
        c1,
        c2,
        c3,
    ] = *head;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > PAYLOAD_MAX || !(1..=4).contains(&kind) {
        return Parsed::Damaged;
    }
    let Some(payload) = body.get(..length) else {
        return Parsed::Incomplete;
    };
    if checksum(&head[..13], payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Parsed::Damaged;
    }
    let time_ns = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
    let stream = if kind % 2 == 1 {
        Stream::Stdout
    } else {
        Stream::Stderr
    };
    let size = RECORD_LEN + length;
    if kind <= 2 {
        let entry = Entry::Output {
            stream,
            time_ns,
            bytes: payload.to_vec(),
        };
        return Parsed::Record(entry, Some((stream, length as u64)), size);
    }
    match payload.try_into().map(u64::from_le_bytes) {
        Ok(missing) => {
            let entry = Entry::Gap {
                bytes: missing,
                reason: "the output was lost on its way",
            };
            Parsed::Record(entry, Some((stream, missing)), size)
        }
        Err(_) => Parsed::Damaged,
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

/// The offsets in a segment's header; an error where it is no segment.
pub(super) fn read_header(file: &mut File) -> io::Result<Offsets> {
    let mut header = [0; HEADER_LEN];
    file.read_exact(&mut header)?;
    let (magic, rest) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a log segment of this version",
        ));
    }
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
    Ok(Offsets {
        stdout: number(&rest[..8]),
        stderr: number(&rest[8..]),
    })
}

/// The segment that is being written.
pub(super) struct SegmentWriter {
    file: File,
    number: u64,
    len: u64,
}

impl SegmentWriter {
    pub(super) fn create(dir: &Path, number: u64, offsets: Offsets) -> io::Result<SegmentWriter> {
        // Nobody sees a segment before its header is whole: it gets its name last.
        let fresh = dir.join("segment.new");
        let mut header = Vec::with_capacity(HEADER_LEN);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&offsets.stdout.to_le_bytes());
        header.extend_from_slice(&offsets.stderr.to_le_bytes());
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&header)?;
        std::fs::rename(&fresh, dir.join(format!("{number:08}.log")))?;
        Ok(SegmentWriter {
            file,
            number,
            len: HEADER_LEN as u64,
        })
    }

    /// Takes up a segment that an earlier process wrote, cutting off a torn last record. `seen` is told of each whole one.
    pub(super) fn recover(
        number: u64,
        path: &Path,
        mut seen: impl FnMut(&Entry, Option<(Stream, u64)>),
    ) -> io::Result<(SegmentWriter, Offsets)> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut offsets = read_header(&mut file)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut at = 0;
        while let Parsed::Record(entry, counted, size) = parse(&bytes[at..]) {
            seen(&entry, counted);
            if let Some((stream, length)) = counted {
                *offsets.of(stream) += length;
            }
            at += size;
        }
        let len = (HEADER_LEN + at) as u64;
        file.set_len(len)?;
        file.seek(SeekFrom::Start(len))?;
        Ok((SegmentWriter { file, number, len }, offsets))
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn append(&mut self, stream: Stream, time_ns: u64, bytes: &[u8]) -> io::Result<()> {
        let kind = match stream {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        };
        let mut records =
            Vec::with_capacity(bytes.len() + RECORD_LEN * (bytes.len() / PAYLOAD_MAX + 1));
        for piece in bytes.chunks(PAYLOAD_MAX) {
            write_record(&mut records, kind, time_ns, piece);
        }
        self.write_whole(&records)
    }

    pub(super) fn append_gap(
        &mut self,
        stream: Stream,
        time_ns: u64,
        missing: u64,
    ) -> io::Result<()> {
        let kind = match stream {
            Stream::Stdout => 3,
            Stream::Stderr => 4,
        };
        let mut record = Vec::new();
        write_record(&mut record, kind, time_ns, &missing.to_le_bytes());
        self.write_whole(&record)
    }

    /// All of these bytes or none of them: a write cut short by a full disk is taken back.
    fn write_whole(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.file.write_all(bytes) {
            Ok(()) => {
                self.len += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.file.set_len(self.len)?;
                self.file.seek(SeekFrom::Start(self.len))?;
                Err(error)
            }
        }
    }
}

fn write_record(out: &mut Vec<u8>, kind: u8, time_ns: u64, payload: &[u8]) {
    let start = out.len();
    out.push(kind);
    out.extend_from_slice(&time_ns.to_le_bytes());
    out.extend_from_slice(
        &u32::try_from(payload.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    let crc = checksum(&out[start..], payload);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(payload);
}
