//! A file's content: its extents, and reading them in order.

use super::SECTOR_BYTES;
use std::io::{self, Read, Seek, SeekFrom};

/// A run of sectors that holds a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First byte of the file that lies here.
    pub(crate) at: u64,
    /// Bytes of the file that lie here.
    pub(crate) length: u64,
    /// Where they lie, in bytes of the input; none if the kernel has set the room aside but written nothing.
    pub(crate) on_disk: Option<u64>,
}

/// Reads a file's content from its first byte to its last; what no extent holds is zeros.
#[derive(Debug)]
pub struct Content<'a, R> {
    input: &'a mut R,
    /// In the file's order, none overlapping another.
    extents: std::vec::IntoIter<Extent>,
    current: Option<Extent>,
    position: u64,
    length: u64,
}

impl<'a, R: Read + Seek> Content<'a, R> {
    pub(crate) fn new(input: &'a mut R, extents: Vec<Extent>, length: u64) -> Content<'a, R> {
        let mut extents = extents.into_iter();
        Content {
            input,
            current: extents.next(),
            extents,
            position: 0,
            length,
        }
    }

    /// The file's bytes, read or not.
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl<R: Read + Seek> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(extent) = self.current
            && extent.at + extent.length <= self.position
        {
            self.current = self.extents.next();
        }
        let left = self.length - self.position;
        let (until, source) = match self.current {
            Some(extent) if extent.at <= self.position => {
                let inside = self.position - extent.at;
                let source = extent.on_disk.map(|start| start + inside);
                (extent.length - inside, source)
            }
            Some(extent) => (extent.at - self.position, None),
            None => (left, None),
        };
        let wanted = until.min(left).min(buffer.len() as u64) as usize;
        if wanted == 0 {
            return Ok(0);
        }
        let buffer = &mut buffer[..wanted];
        let read = match source {
            None => {
                buffer.fill(0);
                wanted
            }
            Some(at) => {
                self.input.seek(SeekFrom::Start(at))?;
                match self.input.read(buffer)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    read => read,
                }
            }
        };
        self.position += read as u64;
        Ok(read)
    }
}

/// Puts extents in order and checks them against one another and against the file system, which has `sectors` from byte
/// `base` of the input on. Each is given as the file's block, the sector, the sectors used and whether they hold data.
pub(crate) fn arrange(
    mut runs: Vec<(u64, u64, u64, bool)>,
    base: u64,
    sectors: u64,
) -> Result<Vec<Extent>, &'static str> {
    runs.sort_unstable();
    let mut extents = Vec::with_capacity(runs.len());
    let mut free_from = 0;
    for (block, sector, length, written) in runs {
        if length == 0 {
            continue;
        }
        let end = block
            .checked_add(length)
            .filter(|end| *end <= u64::MAX / SECTOR_BYTES)
            .ok_or("an extent ends beyond any file")?;
        if block < free_from {
            return Err("two extents of one file overlap");
        }
        free_from = end;
        let inside = sector
            .checked_add(length)
            .is_some_and(|last| last <= sectors);
        if !inside {
            return Err("an extent lies outside the file system");
        }
        extents.push(Extent {
            at: block * SECTOR_BYTES,
            length: length * SECTOR_BYTES,
            on_disk: written.then(|| base + sector * SECTOR_BYTES),
        });
    }
    Ok(extents)
}
