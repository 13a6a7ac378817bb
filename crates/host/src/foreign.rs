//! The memory of another process, read through `/proc`: a part of its address space that is its own (anonymous), or a
//! private mapping of one file.
//!
//! The kernel lets root, and mostly the same user, read it; whoever may not gets `PermissionDenied`.

use crate::files;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Bytes of a page, as `pagemap` counts them on the architectures of our hosts.
const PAGE: u64 = 4096;
/// Pages that are looked at, and at most copied, at once.
const PAGES: usize = 1024;
/// In an entry of `pagemap` (the kernel's admin-guide/mm/pagemap): the page is in memory, it is swapped out, it is a file's.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// A part of another process's address space.
#[derive(Debug)]
pub struct ForeignMemory {
    memory: File,
    pagemap: File,
    address: u64,
    len: u64,
    /// The file that is mapped there, and where in it the part begins.
    shared: Option<(File, u64)>,
}

/// A line of `/proc/PID/maps`.
struct Mapping {
    start: u64,
    end: u64,
    private: bool,
    offset: u64,
    device: u64,
    inode: u64,
}

fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let private = words.next()?.ends_with('p');
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = rustix::fs::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        private,
        offset,
        device,
        inode: words.next()?.parse().ok()?,
    })
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

impl ForeignMemory {
    /// `len` bytes from `address` on, both of whole pages, in the address space of process `pid`. Blocks on files.
    ///
    /// # Errors
    /// The system's; `InvalidData` where that is not all private, or not of one file.
    pub fn open(pid: u32, address: u64, len: u64) -> io::Result<ForeignMemory> {
        if !address.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || len == 0 {
            return Err(invalid("no whole pages"));
        }
        let end = address
            .checked_add(len)
            .ok_or_else(|| invalid("too long"))?;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let mut at = address;
        let mut of_file = None;
        for mapping in maps.lines().filter_map(mapping) {
            if mapping.end <= at || mapping.start >= end {
                continue;
            }
            if mapping.start > at || !mapping.private {
                return Err(invalid("it is not all there, or not the process's own"));
            }
            let from = mapping.offset.wrapping_add(at - mapping.start);
            let is = (mapping.inode != 0).then_some((mapping.device, mapping.inode));
            let begins = is.map(|is| (is, from.wrapping_sub(at - address)));
            if at == address {
                of_file = begins;
            } else if of_file != begins {
                return Err(invalid("it is not of one kind"));
            }
            at = mapping.end;
        }
        if at < end {
            return Err(invalid("it is not all there"));
        }
        let shared = match of_file {
            Some(((device, inode), offset)) => Some((find_file(pid, device, inode)?, offset)),
            None => None,
        };
        Ok(ForeignMemory {
            memory: File::open(format!("/proc/{pid}/mem"))?,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            address,
            len,
            shared,
        })
    }

    /// Copies what lies in the mapped file to the empty file `to`, which has the same length. What the process has changed of
    /// it is not seen. Holes stay holes. Blocks.
    ///
    /// # Errors
    /// The system's.
    pub fn copy_shared(&self, to: &File) -> io::Result<()> {
        let Some((file, offset)) = &self.shared else {
            return Ok(());
        };
        let mut buffer = vec![0; PAGES * PAGE as usize];
        let end = offset.saturating_add(self.len);
        let mut at = *offset;
        while let Some((start, stop)) = files::next_data(file, at, end)? {
            at = start;
            while at < stop {
                let want = usize::try_from(stop - at).unwrap_or(buffer.len());
                let part = want.min(buffer.len());
                file.read_exact_at(&mut buffer[..part], at)?;
                to.write_all_at(&buffer[..part], at - offset)?;
                at += part as u64;
            }
        }
        Ok(())
    }

    /// Copies over it the pages that are the process's own: all that it has written. Gives their bytes. The process should be
    /// still. Blocks.
    ///
    /// # Errors
    /// The system's.
    pub fn copy_own(&self, to: &File) -> io::Result<u64> {
        let mut entries = vec![0; PAGES * 8];
        let mut buffer = vec![0; PAGES * PAGE as usize];
        let (first, all) = (self.address / PAGE, self.len / PAGE);
        let mut copied = 0;
        let mut page = 0;
        while page < all {
            let count = usize::try_from(all - page).unwrap_or(PAGES).min(PAGES);
            let entries = &mut entries[..count * 8];
            self.pagemap.read_exact_at(entries, (first + page) * 8)?;
            let own: Vec<bool> = entries
                .chunks_exact(8)
                .map(|bytes| {
                    let entry = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
                    entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
                })
                .collect();
            let mut at = 0;
            for run in own.chunk_by(|one, other| one == other) {
                if run[0] {
                    let place = (page + at as u64) * PAGE;
                    let part = &mut buffer[..run.len() * PAGE as usize];
                    self.memory.read_exact_at(part, self.address + place)?;
                    to.write_all_at(part, place)?;
                    copied += part.len() as u64;
                }
                at += run.len();
            }
            page += count as u64;
        }
        Ok(copied)
    }
}

/// The file by a descriptor that the process has of it.
fn find_file(pid: u32, device: u64, inode: u64) -> io::Result<File> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_it = std::fs::metadata(entry.path())
            .is_ok_and(|data| data.ino() == inode && data.dev() == device && data.is_file());
        if is_it {
            return File::open(entry.path());
        }
    }
    Err(invalid("the process has closed the file that it maps"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    /// A process that maps a file privately, has changed a page of it, and tells where; in Python, as this needs `mmap`.
    const OTHER: &str = "import mmap, ctypes, os, sys\n\
        f = os.open(sys.argv[1], os.O_RDWR)\n\
        m = mmap.mmap(f, 64 * 4096, flags=mmap.MAP_PRIVATE)\n\
        m[5 * 4096] = 7\n\
        x = m[9 * 4096]\n\
        a = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n\
        a[3 * 4096] = 9\n\
        at = lambda m: ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
        print(at(m), at(a), flush=True)\n\
        sys.stdin.read()\n";

    #[test]
    fn what_a_process_wrote_over_a_file_is_seen_and_so_is_the_rest_of_the_file() {
        let len = 64 * PAGE;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file.as_file().write_all_at(b"below", 9 * PAGE).unwrap();
        file.as_file()
            .write_all_at(b"never looked at", 20 * PAGE)
            .unwrap();
        file.flush().unwrap();
        let other = Command::new("python3")
            .args(["-c", OTHER])
            .arg(file.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut other) = other else {
            println!("SKIP: python3 is not installed");
            return;
        };
        let mut line = String::new();
        BufReader::new(other.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let places: Vec<u64> = line
            .split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect();
        let read = |address| {
            let foreign = ForeignMemory::open(other.id(), address, len)?;
            let copy = files::sealable_memory_file(len)?;
            foreign.copy_shared(&copy)?;
            let own = foreign.copy_own(&copy)?;
            let mut bytes = vec![0; len as usize];
            copy.read_exact_at(&mut bytes, 0)?;
            io::Result::Ok((bytes, own))
        };
        let mapped = read(places[0]);
        let anonymous = read(places[1]);
        let beyond = ForeignMemory::open(other.id(), 0, len);
        drop(other.stdin.take());
        other.wait().unwrap();
        let (bytes, own) = mapped.unwrap();
        let at = |page: usize| page * PAGE as usize;
        assert_eq!(bytes[at(5)], 7);
        assert_eq!(&bytes[at(9)..at(9) + 5], b"below");
        assert_eq!(&bytes[at(20)..at(20) + 5], b"never");
        assert_eq!(
            own, PAGE,
            "of the mapping only one page is the process's own"
        );
        let (bytes, _) = anonymous.unwrap();
        assert_eq!(bytes[at(3)], 9);
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 1);
        assert!(beyond.is_err());
    }
}
