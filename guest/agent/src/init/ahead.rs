//! Reading what a program will need before it is known which machine runs it: the program, its interpreter and its
//! libraries, so that they are in the guest's memory when it is captured.
//!
//! Nothing is executed and nothing depends on the result: a file that is not understood is read and that is all. Search
//! paths that a program names itself are not followed.

use rustix::fs::OFlags;
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Most bytes that are read: they take memory in the capture.
const BYTES_MAX: u64 = 32 << 20;
/// Most files; a program with more libraries gains little from the rest.
const FILES_MAX: usize = 64;
/// Most bytes of a path, its end included (`PATH_MAX`).
const TEXT_MAX: usize = 4096;
/// Most entries of a table of what a file is linked to: real ones have some forty, and one for each library.
const ENTRIES_MAX: usize = 4096;
/// Where loaders look for libraries when nothing else is said: Debian's and Fedora's places, then everybody's.
const LIBRARIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// What every dynamic loader opens first.
const LOADERS_CACHE: &str = "/etc/ld.so.cache";

const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const NEEDED: u64 = 1;
const STRINGS: u64 = 5;

/// Reads these files and what they say they need.
pub(super) fn read(paths: &[String]) {
    let mut wanted: Vec<String> = paths.to_vec();
    let mut seen = HashSet::new();
    let mut left = BYTES_MAX;
    while let Some(path) = wanted.pop() {
        if seen.len() >= FILES_MAX || left == 0 || !seen.insert(path.clone()) {
            continue;
        }
        // What cannot be read is missed by nobody.
        let bytes = content(&path, left).unwrap_or_default();
        left = left.saturating_sub(bytes.len() as u64);
        let needs = needs(&bytes);
        if !needs.is_empty() {
            wanted.push(LOADERS_CACHE.to_owned());
        }
        // Beyond as many as are read nothing is gained by remembering more.
        let room = FILES_MAX.saturating_sub(wanted.len());
        wanted.extend(needs.iter().filter_map(|name| found(name)).take(room));
    }
}

/// The beginning of a regular file. Anything else may have no end, or nobody who writes to it.
fn content(path: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Where a library lies, or an interpreter.
fn found(name: &str) -> Option<String> {
    if name.starts_with('/') {
        return Some(name.to_owned());
    }
    let places = LIBRARIES.iter().map(|dir| format!("{dir}/{name}"));
    places.into_iter().find(|path| Path::new(path).exists())
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let end = at.checked_add(8)?;
    Some(u64::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    let end = at.checked_add(2)?;
    Some(u16::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// `count` bytes from `at` on.
fn part(bytes: &[u8], at: u64, count: u64) -> Option<&[u8]> {
    let end = usize::try_from(at.checked_add(count)?).ok()?;
    bytes.get(usize::try_from(at).ok()?..end)
}

/// The text from `at` to the next zero; nothing where that is too far away for a path.
fn text(bytes: &[u8], at: u64) -> Option<String> {
    let rest = bytes.get(usize::try_from(at).ok()?..)?;
    let end = rest.iter().take(TEXT_MAX).position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

/// The interpreter and the libraries that a program or a library names: absolute paths and plain names.
fn needs(bytes: &[u8]) -> Vec<String> {
    if let Some(line) = bytes.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(&line[..line.len().min(256)]).into_owned();
        let words = line.split_whitespace().take(1);
        return words.map(str::to_owned).collect();
    }
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        return Vec::new();
    }
    linked(bytes).unwrap_or_default()
}

/// What a 64-bit little-endian ELF file is linked to.
fn linked(bytes: &[u8]) -> Option<Vec<String>> {
    /// `e_phoff`, `e_phentsize` and `e_phnum` (System V ABI, "ELF header").
    const TABLE: (usize, usize, usize) = (32, 54, 56);
    let (table, size, count) = (
        long(bytes, TABLE.0)?,
        u64::from(short(bytes, TABLE.1)?),
        u64::from(short(bytes, TABLE.2)?),
    );
    let headers: Vec<&[u8]> = (0..count.min(64))
        .filter_map(|index| part(bytes, table.checked_add(index * size)?, 56))
        .collect();
    let kind = |header: &[u8]| header.first_chunk().map(|kind| u32::from_le_bytes(*kind));
    let of = |wanted: u32| {
        headers
            .iter()
            .filter(move |header| kind(header) == Some(wanted))
    };
    let mut needs = Vec::new();
    for header in of(INTERPRETER) {
        needs.extend(text(bytes, long(header, 8)?));
    }
    for header in of(DYNAMIC) {
        let entries = part(bytes, long(header, 8)?, long(header, 32)?)?;
        let entries: Vec<(u64, u64)> = entries
            .chunks_exact(16)
            .filter_map(|entry| Some((long(entry, 0)?, long(entry, 8)?)))
            .take(ENTRIES_MAX)
            .take_while(|(tag, _)| *tag != 0)
            .collect();
        let address = entries.iter().find(|(tag, _)| *tag == STRINGS)?.1;
        // An address in memory; the segment that holds it says where it is in the file.
        let strings = of(LOAD).find_map(|header| {
            let inside = address.checked_sub(long(header, 16)?)?;
            (inside < long(header, 32)?).then_some(long(header, 8)?.checked_add(inside))?
        })?;
        let names = entries.iter().filter(|(tag, _)| *tag == NEEDED);
        let names = names.filter_map(|(_, at)| text(bytes, strings.checked_add(*at)?));
        let room = FILES_MAX.saturating_sub(needs.len());
        needs.extend(names.take(room));
    }
    Some(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_its_loader_and_the_c_library() {
        let program = std::fs::read("/bin/sh").unwrap();
        let needs = needs(&program);
        assert!(
            needs.iter().any(|name| name.starts_with("/lib")),
            "{needs:?}"
        );
        assert!(
            needs.iter().any(|name| name.starts_with("libc.")),
            "{needs:?}"
        );
    }

    #[test]
    fn a_script_names_its_interpreter() {
        assert_eq!(needs(b"#! /usr/bin/env python3\nx"), ["/usr/bin/env"]);
        assert_eq!(needs(b"#!"), [] as [&str; 0]);
    }

    /// A program whose table of needs has these places in `texts`.
    fn program(texts: &[u8], places: impl Iterator<Item = u64>) -> Vec<u8> {
        const TABLES: u64 = 64;
        const NAMES: u64 = TABLES + 2 * 56;
        let entries = std::iter::once((STRINGS, NAMES)).chain(places.map(|at| (NEEDED, at)));
        let entries: Vec<u8> = entries
            .flat_map(|(tag, value)| [tag.to_le_bytes(), value.to_le_bytes()].concat())
            .collect();
        let (at, len) = (NAMES + texts.len() as u64, entries.len() as u64);
        let header = |kind: u32, offset: u64, len: u64| {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            for field in [offset, offset, offset, len, len, 0] {
                header.extend(field.to_le_bytes());
            }
            header
        };
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(TABLES as usize, 0);
        file[32..40].copy_from_slice(&TABLES.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        file[56..58].copy_from_slice(&2_u16.to_le_bytes());
        file.extend(header(LOAD, 0, at + len));
        file.extend(header(DYNAMIC, at, len));
        file.extend(texts);
        file.extend(entries);
        file
    }

    #[test]
    fn what_a_program_claims_to_need_is_bounded_in_count_and_length() {
        assert_eq!(needs(&program(b"libx.so\0", [0].into_iter())), ["libx.so"]);
        let many = program(b"libx.so\0", std::iter::repeat_n(0, 100_000));
        assert_eq!(needs(&many).len(), FILES_MAX);
        let mut texts = vec![b'x'; TEXT_MAX];
        texts.push(0);
        // One byte too long, then as long as may be.
        let names = needs(&program(&texts, [0, 1].into_iter()));
        assert_eq!(
            names,
            [String::from_utf8(vec![b'x'; TEXT_MAX - 1]).unwrap()]
        );
    }

    #[test]
    fn only_regular_files_are_read_and_a_pipe_without_a_writer_holds_nobody_up() {
        let dir = std::env::temp_dir().join(format!("vistara-agent-ahead-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        std::fs::write(path("file"), "content").unwrap();
        assert_eq!(content(&path("file"), 4).unwrap(), b"cont");
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), rustix::fs::Mode::RWXU).unwrap();
        let paths = [path("pipe"), "/dev/zero".to_owned(), path(".")];
        let (done, waiting) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let found = paths.iter().filter(|path| content(path, 4096).is_ok());
            done.send(found.count())
        });
        let bound = std::time::Duration::from_secs(10);
        assert_eq!(waiting.recv_timeout(bound), Ok(0));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_program_that_is_cut_or_damaged_anywhere_is_no_danger() {
        let program = std::fs::read("/bin/sh").unwrap();
        for len in 0..1024.min(program.len()) {
            needs(&program[..len]);
        }
        let mut damaged = program;
        for at in 0..1024.min(damaged.len()) {
            let byte = std::mem::replace(&mut damaged[at], 0xff);
            needs(&damaged);
            damaged[at] = byte;
        }
    }
}
