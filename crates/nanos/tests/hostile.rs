//! File systems that are damaged or made to do harm: refused or read, but never a panic, and never without a bound.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use proptest::prelude::*;
use std::io::{Cursor, Read};
use vistara_nanos::disk::{self, BootDisk, DiskOptions};
use vistara_nanos::tfs::{Label, Limits, Node, ReadError, Reader, VolumeId, Writer};
use vistara_nanos::{Manifest, klog};

const ID: VolumeId = VolumeId([3; 16]);

fn limits() -> Limits {
    Limits {
        log_bytes_max: 4 << 20,
        entries_max: 20_000,
        ..Limits::default()
    }
}

/// A small boot disk, and where its file system begins.
fn sample() -> (Vec<u8>, usize) {
    let options = DiskOptions {
        id: ID,
        label: Label::new("sample").unwrap(),
        free_bytes: 0,
    };
    let manifest = Manifest {
        program: b"/bin/program".to_vec(),
        arguments: vec![b"a".to_vec(), b"b".to_vec()],
        environment: vec![(b"HOME".to_vec(), b"/".to_vec())],
        ..Manifest::default()
    };
    let mut disk = BootDisk::create(Cursor::new(Vec::new()), &options, &manifest).unwrap();
    let tree = disk.tree();
    let root = tree.root();
    let bin = tree.directory(root, b"bin").unwrap();
    let program = tree
        .file(bin, b"program", 5000, &mut &[7; 5000][..])
        .unwrap();
    tree.hard_link(root, b"same", program).unwrap();
    tree.symlink(root, b"link", b"bin/program").unwrap();
    tree.file(root, b"empty", 0, &mut &b""[..]).unwrap();
    let (disk, geometry) = disk.finish().unwrap();
    let mut disk = disk.into_inner();
    // What is free need not be carried about.
    disk.truncate(disk.len() - disk::FREE_BYTES_MIN as usize);
    (disk, geometry.root.offset as usize)
}

/// Does all that a reader can do; content is read up to a bound, as any caller must.
fn exercise(bytes: &[u8]) {
    let mut input = Cursor::new(bytes);
    let _ = klog::read(&mut input);
    let Ok(mut reader) = disk::open(input, &limits()) else {
        return;
    };
    let _ = reader.keys();
    let mut files = Vec::new();
    let _ = reader.walk(|_, node| {
        if let Node::File(handle) = node {
            files.push(*handle);
        }
        Ok(())
    });
    for handle in files.into_iter().take(100) {
        if let Ok(content) = reader.content(handle) {
            let _ = content.take(1 << 16).read_to_end(&mut Vec::new());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_damaged_disk_never_panics(
        log in prop::collection::vec((0usize..700, any::<u8>()), 0..6),
        anywhere in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(), whole in 0..4,
    ) {
        let (mut disk, base) = sample();
        for (at, byte) in anywhere {
            let at = at.index(disk.len());
            disk[at] = byte;
        }
        for (at, byte) in log {
            // The first sector's header, then the first piece.
            let at = if at < 64 { base + at } else { base + 4096 + at - 64 };
            disk[at] = byte;
        }
        if whole == 0 {
            disk.truncate(cut.index(disk.len()));
        }
        exercise(&disk);
    }

    #[test]
    fn any_frames_at_all_never_panic(frames in prop::collection::vec(any::<u8>(), 0..400)) {
        exercise(&volume(&frames));
    }

    #[test]
    fn any_record_at_all_never_panics(record in prop::collection::vec(any::<u8>(), 0..100)) {
        exercise(&volume(&in_frame(&record)));
    }
}

/// A volume whose log is `frames`.
fn volume(frames: &[u8]) -> Vec<u8> {
    let out = Cursor::new(Vec::new());
    let writer = Writer::create(out, 0, ID, &Label::none(), &[]).unwrap();
    let mut bytes = writer.finish(0).unwrap().0.into_inner();
    // Behind the piece's header.
    let at = 4096 + 9;
    bytes[at..at + frames.len()].copy_from_slice(frames);
    bytes
}

/// A record of at most 16,383 bytes as one frame, and the log's end.
fn in_frame(record: &[u8]) -> Vec<u8> {
    let length = [
        0x80 | (record.len() >> 7) as u8,
        (record.len() & 0x7f) as u8,
    ];
    [&[2][..], &length, &length, record, &[1]].concat()
}

fn open(record: &[u8]) -> Result<Reader<Cursor<Vec<u8>>>, ReadError> {
    Reader::open(Cursor::new(volume(&in_frame(record))), 0, &limits())
}

/// The root, its `children` as tuple 3.
const ROOT: &[u8] = b"\x91\x88\x08children";

#[test]
fn a_directory_inside_itself_ends_the_walk() {
    // children: (a: (children: reference to 3))
    let record = [ROOT, b"\x91\x81a\x91\x02\x10\x03"].concat();
    let reader = open(&record).unwrap();
    let walked = reader.walk(|_, _| Ok(()));
    assert!(matches!(
        walked,
        Err(ReadError::Limit(_) | ReadError::Tree(_))
    ));
}

#[test]
fn directories_that_share_their_entries_do_not_multiply() {
    // children: (a: (children: (x: ())), b: (children: the same, further entry: reference to a))
    let record = [ROOT, b"\x92\x81a\x91\x02\x91\x81x\x91\x02\x90\x81b\x10\x05"].concat();
    let walked = open(&record).unwrap().walk(|_, _| Ok(()));
    assert!(matches!(walked, Err(ReadError::Tree(_))));
}

#[test]
fn a_value_that_holds_itself_ends_the_reading_of_the_manifest() {
    // (children: (), k: tuple 5 = (x: reference to 5))
    let record = b"\x92\x88\x08children\x90\x81k\x91\x81x\x10\x05".to_vec();
    let keys = open(&record).unwrap().keys();
    assert!(matches!(keys, Err(ReadError::Limit(_))));
}

#[test]
fn a_log_that_leads_back_to_itself_is_refused() {
    let bytes = volume(b"\x05\x08\x88\x00\x01");
    let read = Reader::open(Cursor::new(bytes), 0, &limits());
    assert!(matches!(read, Err(ReadError::Damaged { sector: 8, .. })));
}

#[test]
fn a_log_of_more_bytes_than_allowed_is_refused() {
    let limits = Limits {
        log_bytes_max: 1 << 18,
        ..limits()
    };
    let bytes = volume(&in_frame(&[ROOT, b"\x90"].concat()));
    let read = Reader::open(Cursor::new(bytes), 0, &limits);
    assert!(matches!(read, Err(ReadError::Limit("bytes of log"))));
}

#[test]
fn a_vector_that_claims_to_be_endless_takes_no_memory() {
    let record = [
        &b"\x92\x88\x08children\x90\x81v"[..],
        b"\xaf\xff\xff\xff\x7f",
    ]
    .concat();
    assert!(matches!(open(&record), Err(ReadError::Damaged { .. })));
}

#[test]
fn another_version_is_named() {
    let mut bytes = volume(b"\x01");
    bytes[6] = 4;
    let read = Reader::open(Cursor::new(bytes), 0, &limits());
    assert!(matches!(read, Err(ReadError::Version(4))));
}

#[test]
fn later_records_change_and_remove_what_earlier_ones_said() {
    let root = [ROOT, b"\x90"].concat();
    let parts: [&[u8]; 5] = [
        &root,
        // children gets a = (linktarget: "one"), b = (linktarget: "two")
        b"\x12\x03\x81a\x91\x88\x0alinktarget\xc3one\x81b\x91\x06\xc3two",
        // a's target (tuple 5) becomes "new"
        b"\x11\x05\x06\xc3new",
        // b (symbol 7) is removed
        b"\x11\x03\x07\x80",
        // a key of the root, in two parts below
        b"\x11\x01\x81k\xc5value",
    ];
    let mut frames = Vec::new();
    for part in &parts[..4] {
        let frame = in_frame(part);
        frames.extend(&frame[..frame.len() - 1]);
        // The kernel leaves this where a log ended once.
        frames.push(4);
    }
    let (first, second) = parts[4].split_at(3);
    frames.extend([2, parts[4].len() as u8, first.len() as u8]);
    frames.extend(first);
    frames.extend([3, second.len() as u8]);
    frames.extend(second);
    frames.push(1);
    let reader = Reader::open(Cursor::new(volume(&frames)), 0, &limits()).unwrap();
    let entries = reader.entries(reader.root()).unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].name, b"a");
    assert_eq!(entries[0].node, Node::Symlink(b"new".to_vec()));
    assert_eq!(reader.keys().unwrap().len(), 1);
}
