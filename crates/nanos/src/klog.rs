//! The record that the kernel leaves on its boot disk when it ends: the program's exit code and the last of its console.
//!
//! The kernel writes none when the program ends with 0, and leaves an old one where it is: [`clear`] it before each run.

use crate::disk::{DiskError, PartitionTable};
use std::io::{Read, Seek, SeekFrom, Write};

/// Bytes of the record on the disk.
pub const RECORD_BYTES: usize = 4096;
const MAGIC: &[u8] = b"KLOG";
const CONSOLE_AT: usize = 16;

/// Why the record could not be read or cleared.
#[derive(Debug, thiserror::Error)]
pub enum KlogError {
    /// The disk has no place for one.
    #[error("the disk has no place for the kernel's log record")]
    Disk(#[source] DiskError),
    /// The disk has no partition table, and so no record.
    #[error("only a boot disk has a log record of the kernel")]
    NotBootDisk,
    /// The disk failed.
    #[error("the kernel's log record cannot be read or written")]
    Io(#[source] std::io::Error),
}

/// How a Nanos machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The kernel's random number for that boot.
    pub boot_id: u64,
    /// The program's exit code; the signal's number for a program that a signal ended; negative when the kernel gave up.
    pub exit_code: i32,
    /// The last of the console, at most 4,079 bytes, program output and kernel messages alike. Any bytes but NUL.
    pub console: Vec<u8>,
}

impl Record {
    /// Reads a record from its bytes on the disk; none if there is none.
    pub fn parse(bytes: &[u8]) -> Option<Record> {
        let bytes = bytes.get(..RECORD_BYTES)?;
        let rest = bytes.strip_prefix(MAGIC)?;
        let (boot_id, rest) = rest.split_first_chunk()?;
        let (exit_code, _) = rest.split_first_chunk()?;
        let console = bytes.get(CONSOLE_AT..)?;
        let console = console.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Record {
            boot_id: u64::from_le_bytes(*boot_id),
            exit_code: i32::from_le_bytes(*exit_code),
            console: console.to_vec(),
        })
    }
}

/// Reads the record of a boot disk; none if the kernel has written none.
pub fn read<R: Read + Seek>(disk: &mut R) -> Result<Option<Record>, KlogError> {
    let at = locate(disk)?;
    let mut bytes = [0; RECORD_BYTES];
    disk.seek(SeekFrom::Start(at))
        .and_then(|_| disk.read_exact(&mut bytes))
        .map_err(KlogError::Io)?;
    Ok(Record::parse(&bytes))
}

/// Overwrites the record of a boot disk with zeros, so that what [`read`] finds later is of this run.
pub fn clear<D: Read + Write + Seek>(disk: &mut D) -> Result<(), KlogError> {
    let at = locate(disk)?;
    disk.seek(SeekFrom::Start(at))
        .and_then(|_| disk.write_all(&[0; RECORD_BYTES]))
        .and_then(|()| disk.flush())
        .map_err(KlogError::Io)
}

fn locate<R: Read + Seek>(disk: &mut R) -> Result<u64, KlogError> {
    match PartitionTable::read(disk) {
        Ok(Some(table)) => Ok(table.klog_offset),
        Ok(None) => Err(KlogError::NotBootDisk),
        Err(error) => Err(KlogError::Disk(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(exit_code: i32, console: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(0x1122_3344_5566_7788_u64.to_le_bytes());
        bytes.extend(exit_code.to_le_bytes());
        bytes.extend(console);
        bytes.resize(RECORD_BYTES, 0);
        bytes
    }

    #[test]
    fn the_exit_code_and_the_console_are_read() {
        let read = Record::parse(&record(200, b"boom\n")).unwrap();
        assert_eq!(read.exit_code, 200);
        assert_eq!(read.boot_id, 0x1122_3344_5566_7788);
        assert_eq!(read.console, b"boom\n");
        assert_eq!(Record::parse(&record(-1, b"")).unwrap().exit_code, -1);
    }

    #[test]
    fn a_console_without_an_end_stops_at_the_record() {
        let read = Record::parse(&record(1, &[b'x'; 4080])).unwrap();
        assert_eq!(read.console.len(), 4080);
    }

    #[test]
    fn zeros_and_other_bytes_are_no_record() {
        assert_eq!(Record::parse(&[0; RECORD_BYTES]), None);
        assert_eq!(Record::parse(b"KLOG"), None);
        let mut wrong = record(1, b"");
        wrong[0] = b'k';
        assert_eq!(Record::parse(&wrong), None);
    }
}
