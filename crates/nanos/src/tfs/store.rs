//! Where a new file system's sectors go: a counter that only grows, and positioned writes.

use super::SECTOR_BYTES;
use super::error::WriteError;
use std::io::{Read, Seek, SeekFrom, Write};

/// Sectors of a page: where large files begin, so that holes of the host's file system match holes in files.
const PAGE_SECTORS: u64 = 8;
/// Bytes copied at once.
const COPY_BYTES: usize = 256 * 1024;
/// Bytes that are left out of the output when all are zero: what host file systems keep as one block.
const HOLE_BYTES: usize = 4096;

/// The sectors of one new file system.
#[derive(Debug)]
pub(crate) struct Store<W> {
    out: W,
    /// Byte of `out` at which sector 0 lies.
    base: u64,
    next_sector: u64,
    /// Where `out` stands, where that is known. Seeking costs a buffered writer its buffer, even to where it stands.
    stands_at: Option<u64>,
    copy: Vec<u8>,
}

/// Less than a page of zeros.
const ZEROS: [u8; HOLE_BYTES - 1] = [0; HOLE_BYTES - 1];

/// What went wrong between a source and the output.
pub(crate) enum CopyError {
    Source(std::io::Error),
    Short { found: u64 },
    Out(WriteError),
}

impl<W: Write + Seek> Store<W> {
    /// Sectors from `base` bytes on; the first `reserved` are spoken for.
    pub(crate) fn new(out: W, base: u64, reserved: u64) -> Store<W> {
        Store {
            out,
            base,
            next_sector: reserved,
            stands_at: None,
            copy: Vec::new(),
        }
    }

    /// Takes `sectors` that nothing else has.
    pub(crate) fn allocate(&mut self, sectors: u64) -> Result<u64, WriteError> {
        let aligned = if sectors >= PAGE_SECTORS {
            self.next_sector
                .checked_next_multiple_of(PAGE_SECTORS)
                .ok_or(WriteError::TooLarge)?
        } else {
            self.next_sector
        };
        let end = aligned.checked_add(sectors).ok_or(WriteError::TooLarge)?;
        self.byte_of(end)?;
        self.next_sector = end;
        Ok(aligned)
    }

    fn byte_of(&self, sector: u64) -> Result<u64, WriteError> {
        sector
            .checked_mul(SECTOR_BYTES)
            .and_then(|bytes| bytes.checked_add(self.base))
            // Offsets of files are signed on the host.
            .filter(|byte| i64::try_from(*byte).is_ok())
            .ok_or(WriteError::TooLarge)
    }

    /// Writes `bytes` from the start of `sector` on.
    pub(crate) fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let at = self.byte_of(sector)?;
        write_at(&mut self.out, &mut self.stands_at, at, bytes).map_err(WriteError::Io)
    }

    /// Copies exactly `length` bytes of `source` to `sector` on. Pages of zeros are left as holes.
    pub(crate) fn copy(
        &mut self,
        sector: u64,
        length: u64,
        source: &mut dyn Read,
    ) -> Result<(), CopyError> {
        let start = self.byte_of(sector).map_err(CopyError::Out)?;
        self.copy.resize(COPY_BYTES, 0);
        let mut done = 0;
        while done < length {
            let wanted = (length - done).min(COPY_BYTES as u64) as usize;
            let found = fill(source, &mut self.copy[..wanted]).map_err(CopyError::Source)?;
            if found < wanted {
                let found = done + found as u64;
                return Err(CopyError::Short { found });
            }
            let mut page = 0;
            while page < wanted {
                let run = run_of_data(&self.copy[page..wanted]);
                if run > 0 {
                    let at = start + done + page as u64;
                    let bytes = &self.copy[page..page + run];
                    write_at(&mut self.out, &mut self.stands_at, at, bytes)
                        .map_err(|error| CopyError::Out(WriteError::Io(error)))?;
                }
                // Either the end, or a page of zeros.
                page += run + HOLE_BYTES;
            }
            done += wanted as u64;
        }
        Ok(())
    }

    /// Ends the file system with `free_bytes` beyond what is used, and makes the output that long. Returns the output and the
    /// file system's bytes, a multiple of 4,096.
    pub(crate) fn finish(mut self, free_bytes: u64) -> Result<(W, u64), WriteError> {
        let free = free_bytes.div_ceil(SECTOR_BYTES);
        let sectors = self
            .next_sector
            .checked_add(free)
            .and_then(|end| end.checked_next_multiple_of(PAGE_SECTORS))
            .ok_or(WriteError::TooLarge)?;
        let end = self.byte_of(sectors)?;
        let length = self.out.seek(SeekFrom::End(0)).map_err(WriteError::Io)?;
        if length < end {
            self.out
                .seek(SeekFrom::Start(end - 1))
                .and_then(|_| self.out.write_all(&[0]))
                .map_err(WriteError::Io)?;
        }
        self.out.flush().map_err(WriteError::Io)?;
        Ok((self.out, end - self.base))
    }
}

/// Bytes of the pages before the first that is all zeros.
fn run_of_data(bytes: &[u8]) -> usize {
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let pages = bytes.chunks(HOLE_BYTES).take_while(|page| !zero(page));
    pages.map(<[u8]>::len).sum()
}

/// Writes at a byte of `out`, which stands where `stands_at` says.
fn write_at<W: Write + Seek>(
    out: &mut W,
    stands_at: &mut Option<u64>,
    at: u64,
    bytes: &[u8],
) -> std::io::Result<()> {
    // After a failure nobody knows where it stands.
    let gap = stands_at.take().and_then(|stands| at.checked_sub(stands));
    match gap.and_then(|gap| ZEROS.get(..usize::try_from(gap).ok()?)) {
        // What is left of a page costs less to write than to leave out.
        Some(zeros) => out.write_all(zeros)?,
        None => _ = out.seek(SeekFrom::Start(at))?,
    }
    out.write_all(bytes)?;
    *stands_at = Some(at + bytes.len() as u64);
    Ok(())
}

/// Reads until `buffer` is full or the source ends; returns the bytes read.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
