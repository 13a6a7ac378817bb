//! Whole disks: one that Nanos boots from, and volumes.
//!
//! A boot disk is: sector 0 with the partition table; the kernel's log record of 4,096 bytes just before the first partition;
//! the boot file system, empty where the monitor is given the kernel directly; the root file system up to the disk's end.
//! A volume is one file system from the first byte on, without a partition table: that is how the kernel tells them apart.

use crate::klog;
use crate::manifest::{Manifest, ManifestError};
use crate::tfs::{self, Label, Limits, ReadError, Reader, Value, VolumeId, Writer, Written};
use std::io::{self, Read, Seek, SeekFrom, Write};

const SECTOR: usize = tfs::SECTOR_BYTES as usize;
const TABLE_AT: usize = 446;
const TABLE_ENTRY_BYTES: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
const TYPE_LINUX: u8 = 0x83;
const TYPE_EFI: u8 = 0xef;
const ACTIVE: u8 = 0x80;
/// Where the first partition of a boot disk begins: behind a page with the partition table and one with the log record.
const FIRST_PARTITION_BYTES: u64 = 2 * klog::RECORD_BYTES as u64;

/// Bytes that must be free for the kernel to write at all: it sets room aside for its log (two pieces of 512 KiB) and takes
/// up to 1 MiB for a file before it writes one byte.
pub const FREE_BYTES_MIN: u64 = 2 << 20;

/// Why a disk could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The disk failed.
    #[error("the disk cannot be read or written")]
    Io(#[source] io::Error),
    /// The manifest.
    #[error("the manifest cannot be written")]
    Manifest(#[source] ManifestError),
    /// A file system could not be written.
    #[error("the file system cannot be written")]
    Write(#[source] tfs::WriteError),
    /// A file system could not be read.
    #[error("the file system cannot be read")]
    Read(#[source] ReadError),
    /// There is no partition table, or none of Nanos.
    #[error("it is no boot disk of Nanos")]
    NotBootDisk,
    /// A partition table counts 2³² sectors.
    #[error("a boot disk has less than 2 TiB")]
    TooLarge,
}

/// What a new file system is to be, beside its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// Its identity; must differ from that of every other disk of the machine.
    pub id: VolumeId,
    /// Its label.
    pub label: Label,
    /// Bytes beyond the tree that the guest may fill; at least [`FREE_BYTES_MIN`] are always there.
    pub free_bytes: u64,
}

/// A part of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Bytes from the disk's start.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Where everything is on a finished boot disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk.
    pub bytes: u64,
    /// The boot file system; its length may be 0.
    pub boot: Part,
    /// The root file system.
    pub root: Part,
    /// The tree in the root file system.
    pub written: Written,
}

/// A boot disk that is being written. Give the tree to [`BootDisk::tree`], then call [`BootDisk::finish`].
#[derive(Debug)]
pub struct BootDisk<W> {
    writer: Writer<W>,
    boot: Part,
    free_bytes: u64,
}

impl<W: Write + Seek> BootDisk<W> {
    /// Begins a disk without a boot file system, for a monitor that is given the kernel. `out` must be empty.
    pub fn create(
        out: W,
        options: &DiskOptions,
        manifest: &Manifest,
    ) -> Result<BootDisk<W>, DiskError> {
        let keys = manifest.keys().map_err(DiskError::Manifest)?;
        BootDisk::begin(out, options, &keys, 0)
    }

    /// Begins a disk with a boot file system that `fill` fills: the kernel as `kernel`, and its modules in `klib` if the
    /// manifest wants them from there.
    pub fn with_boot_files(
        out: W,
        options: &DiskOptions,
        manifest: &Manifest,
        fill: impl FnOnce(&mut Writer<W>) -> Result<(), tfs::WriteError>,
    ) -> Result<BootDisk<W>, DiskError> {
        let keys = manifest.keys().map_err(DiskError::Manifest)?;
        let no_label = Label::none();
        let mut boot = Writer::create(out, FIRST_PARTITION_BYTES, options.id, &no_label, &[])
            .map_err(DiskError::Write)?;
        fill(&mut boot).map_err(DiskError::Write)?;
        let (out, written) = boot.finish(0).map_err(DiskError::Write)?;
        BootDisk::begin(out, options, &keys, written.bytes)
    }

    fn begin(
        out: W,
        options: &DiskOptions,
        keys: &[(Vec<u8>, Value)],
        boot_bytes: u64,
    ) -> Result<BootDisk<W>, DiskError> {
        let boot = Part {
            offset: FIRST_PARTITION_BYTES,
            length: boot_bytes,
        };
        let root = boot.offset + boot.length;
        let writer = Writer::create(out, root, options.id, &options.label, keys)
            .map_err(DiskError::Write)?;
        Ok(BootDisk {
            writer,
            boot,
            free_bytes: options.free_bytes.max(FREE_BYTES_MIN),
        })
    }

    /// The root's tree.
    pub fn tree(&mut self) -> &mut Writer<W> {
        &mut self.writer
    }

    /// Ends the disk; `out` is now as long as the disk.
    pub fn finish(self) -> Result<(W, Geometry), DiskError> {
        let (mut out, written) = self
            .writer
            .finish(self.free_bytes)
            .map_err(DiskError::Write)?;
        let root = Part {
            offset: self.boot.offset + self.boot.length,
            length: written.bytes,
        };
        let table = [entry(self.boot)?, entry(root)?].concat();
        let mut sector = [0; SECTOR];
        sector[TABLE_AT..TABLE_AT + table.len()].copy_from_slice(&table);
        sector[SECTOR - 2..].copy_from_slice(&SIGNATURE);
        out.seek(SeekFrom::Start(0))
            .and_then(|_| out.write_all(&sector))
            .and_then(|()| out.flush())
            .map_err(DiskError::Io)?;
        let geometry = Geometry {
            bytes: root.offset + root.length,
            boot: self.boot,
            root,
            written,
        };
        Ok((out, geometry))
    }
}

/// A volume that is being written: a disk that a manifest mounts by its label or identity.
#[derive(Debug)]
pub struct Volume<W> {
    writer: Writer<W>,
    free_bytes: u64,
}

impl<W: Write + Seek> Volume<W> {
    /// Begins a volume. `out` must be empty.
    pub fn create(out: W, options: &DiskOptions) -> Result<Volume<W>, DiskError> {
        let writer =
            Writer::create(out, 0, options.id, &options.label, &[]).map_err(DiskError::Write)?;
        Ok(Volume {
            writer,
            free_bytes: options.free_bytes.max(FREE_BYTES_MIN),
        })
    }

    /// The volume's tree; may be left empty.
    pub fn tree(&mut self) -> &mut Writer<W> {
        &mut self.writer
    }

    /// Ends the volume; `out` is now as long as it is.
    pub fn finish(self) -> Result<(W, Written), DiskError> {
        self.writer
            .finish(self.free_bytes)
            .map_err(DiskError::Write)
    }
}

/// The partitions of a boot disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionTable {
    /// The kernel's log record.
    pub klog_offset: u64,
    /// The boot file system; its length may be 0.
    pub boot: Part,
    /// The root file system. The kernel takes all up to the disk's end, whatever is said here.
    pub root: Part,
}

impl PartitionTable {
    /// Reads the table of `disk`; none if there is none, as on a volume.
    pub fn read<R: Read + Seek>(disk: &mut R) -> Result<Option<PartitionTable>, DiskError> {
        let mut sector = [0; SECTOR];
        disk.seek(SeekFrom::Start(0)).map_err(DiskError::Io)?;
        match disk.read_exact(&mut sector) {
            Ok(()) => PartitionTable::parse(&sector),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(DiskError::Io(error)),
        }
    }

    fn parse(sector: &[u8; SECTOR]) -> Result<Option<PartitionTable>, DiskError> {
        if sector[SECTOR - 2..] != SIGNATURE {
            return Ok(None);
        }
        let entry = |index: usize| {
            let at = TABLE_AT + index * TABLE_ENTRY_BYTES;
            let number = |at: usize| {
                let bytes = [sector[at], sector[at + 1], sector[at + 2], sector[at + 3]];
                u64::from(u32::from_le_bytes(bytes)) * tfs::SECTOR_BYTES
            };
            let part = Part {
                offset: number(at + 8),
                length: number(at + 12),
            };
            (sector[at + 4], part)
        };
        let (kind, first) = entry(0);
        // A disk that firmware can start from has the loader's partition in front.
        let skipped = usize::from(kind == TYPE_EFI);
        let ((_, boot), (root_kind, root)) = (entry(skipped), entry(skipped + 1));
        let klog_offset = first.offset.checked_sub(klog::RECORD_BYTES as u64);
        match klog_offset {
            Some(klog_offset)
                if klog_offset >= tfs::SECTOR_BYTES
                    && root_kind == TYPE_LINUX
                    && root.offset >= first.offset =>
            {
                Ok(Some(PartitionTable {
                    klog_offset,
                    boot,
                    root,
                }))
            }
            Some(_) | None => Err(DiskError::NotBootDisk),
        }
    }
}

/// Reads the file system of a volume, or the root file system of a boot disk.
pub fn open<R: Read + Seek>(mut disk: R, limits: &Limits) -> Result<Reader<R>, DiskError> {
    let base = PartitionTable::read(&mut disk)?.map_or(0, |table| table.root.offset);
    Reader::open(disk, base, limits).map_err(DiskError::Read)
}

fn entry(part: Part) -> Result<[u8; TABLE_ENTRY_BYTES], DiskError> {
    let sectors = |bytes: u64| {
        u32::try_from(bytes / tfs::SECTOR_BYTES)
            .map(u32::to_le_bytes)
            .map_err(|_| DiskError::TooLarge)
    };
    let mut entry = [0; TABLE_ENTRY_BYTES];
    entry[0] = ACTIVE;
    entry[4] = TYPE_LINUX;
    entry[8..12].copy_from_slice(&sectors(part.offset)?);
    entry[12..16].copy_from_slice(&sectors(part.length)?);
    Ok(entry)
}

#[cfg(test)]
mod tests;
