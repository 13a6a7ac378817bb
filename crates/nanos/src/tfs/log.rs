//! The log's frames, and writing them: pieces of 512 KiB, each linked from the one before.

use super::SECTOR_BYTES;
use super::encoding::{MAGIC, VERSION, put_varint};
use super::error::WriteError;
use super::label::{Label, VolumeId};
use super::store::Store;
use std::io::{Seek, Write};

/// The log ends here.
pub(crate) const END_OF_LOG: u8 = 1;
/// A record begins: its length, the length of the part that follows, the part.
pub(crate) const TUPLE_AVAILABLE: u8 = 2;
/// A record goes on: the length of the part that follows, the part.
pub(crate) const TUPLE_EXTENDED: u8 = 3;
/// Where a log ended once, before the kernel took it up again.
pub(crate) const END_OF_SEGMENT: u8 = 4;
/// The log goes on in another piece: its first sector and its sectors.
pub(crate) const LINK: u8 = 5;

/// Sectors of every piece but the first, which is one sector.
pub(crate) const PIECE_SECTORS: u64 = 1024;
const PIECE_BYTES: usize = (PIECE_SECTORS * SECTOR_BYTES) as usize;
/// Bytes kept free at a piece's end: the kernel, too, keeps room for a record's frame and a link, each of which is one byte
/// and two numbers of at most ten.
const SPARE_BYTES: usize = 42;
/// A record's first part is at least this long, or goes to the next piece as a whole (the kernel's rule).
const PART_BYTES_MIN: usize = 32;

/// The log's end, in memory until its piece is full.
#[derive(Debug)]
pub(crate) struct LogWriter {
    sector: u64,
    piece: Vec<u8>,
}

impl LogWriter {
    /// Writes the first sector, which links to the first piece, and begins that piece. `store` must have only sector 0 taken.
    pub(crate) fn create<W: Write + Seek>(
        store: &mut Store<W>,
        id: VolumeId,
        label: &Label,
    ) -> Result<LogWriter, WriteError> {
        let mut first = piece_header(1);
        first.extend_from_slice(&id.0);
        first.extend_from_slice(label.as_bytes());
        first.push(0);
        let sector = store.allocate(PIECE_SECTORS)?;
        put_link(&mut first, sector);
        first.push(END_OF_LOG);
        first.resize(SECTOR_BYTES as usize, 0);
        store.write(0, &first)?;
        Ok(LogWriter {
            sector,
            piece: piece_header(PIECE_SECTORS),
        })
    }

    /// Appends one record, in as many parts as its length and the pieces' ends ask for.
    pub(crate) fn append<W: Write + Seek>(
        &mut self,
        store: &mut Store<W>,
        record: &[u8],
    ) -> Result<(), WriteError> {
        let mut rest = record;
        while !rest.is_empty() {
            let mut room = PIECE_BYTES.saturating_sub(self.piece.len() + SPARE_BYTES);
            if room < PART_BYTES_MIN.min(rest.len()) {
                self.next_piece(store)?;
                room = PIECE_BYTES.saturating_sub(self.piece.len() + SPARE_BYTES);
            }
            let (part, after) = rest.split_at(room.min(rest.len()));
            if rest.len() == record.len() {
                self.piece.push(TUPLE_AVAILABLE);
                put_varint(&mut self.piece, record.len() as u64);
            } else {
                self.piece.push(TUPLE_EXTENDED);
            }
            put_varint(&mut self.piece, part.len() as u64);
            self.piece.extend_from_slice(part);
            rest = after;
        }
        Ok(())
    }

    fn next_piece<W: Write + Seek>(&mut self, store: &mut Store<W>) -> Result<(), WriteError> {
        let sector = store.allocate(PIECE_SECTORS)?;
        put_link(&mut self.piece, sector);
        self.write_piece(store)?;
        self.sector = sector;
        self.piece = piece_header(PIECE_SECTORS);
        Ok(())
    }

    /// Writes what is still in memory.
    pub(crate) fn finish<W: Write + Seek>(
        mut self,
        store: &mut Store<W>,
    ) -> Result<(), WriteError> {
        self.write_piece(store)
    }

    fn write_piece<W: Write + Seek>(&mut self, store: &mut Store<W>) -> Result<(), WriteError> {
        self.piece.push(END_OF_LOG);
        store.write(self.sector, &self.piece)
    }
}

fn piece_header(sectors: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    put_varint(&mut header, VERSION);
    put_varint(&mut header, sectors);
    header
}

fn put_link(out: &mut Vec<u8>, sector: u64) {
    out.push(LINK);
    put_varint(out, sector);
    put_varint(out, PIECE_SECTORS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn the_first_sector_is_the_one_that_was_measured() {
        let mut store = Store::new(Cursor::new(Vec::new()), 0, 1);
        let label = Label::new("data").unwrap();
        let log = LogWriter::create(&mut store, VolumeId([7; 16]), &label).unwrap();
        log.finish(&mut store).unwrap();
        let (out, _) = store.finish(0).unwrap();
        let bytes = out.into_inner();
        let mut wanted = b"NVMTFS\x05\x01".to_vec();
        wanted.extend([7; 16]);
        wanted.extend(b"data\0\x05\x08\x88\x00\x01");
        assert_eq!(bytes[..wanted.len()], wanted);
        assert_eq!(&bytes[8 * 512..8 * 512 + 10], b"NVMTFS\x05\x88\x00\x01");
    }
}
