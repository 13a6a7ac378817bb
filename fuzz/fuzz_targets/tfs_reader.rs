//! The input is a log's frames, behind sound headers: otherwise a fuzzer spends its time on finding those.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::{Cursor, Read};
use vistara_nanos::tfs::{Limits, Node, Reader};

const SECTOR: usize = 512;
/// A piece of eight sectors keeps each run short; real ones have 1,024.
const SECTORS: usize = 9;
/// Version 5, one sector, an identity, no label, a link to sector 1 of eight sectors, the end.
const FIRST: &[u8] = b"NVMTFS\x05\x01sixteen bytes id\0\x05\x01\x08\x01";
const PIECE: &[u8] = b"NVMTFS\x05\x08";
const CONTENT_BYTES_MAX: u64 = 1 << 16;

fuzz_target!(|frames: &[u8]| {
    let mut disk = vec![0; SECTORS * SECTOR];
    disk[..FIRST.len()].copy_from_slice(FIRST);
    let piece = &mut disk[SECTOR..];
    piece[..PIECE.len()].copy_from_slice(PIECE);
    let room = &mut piece[PIECE.len()..];
    let length = frames.len().min(room.len());
    room[..length].copy_from_slice(&frames[..length]);
    let limits = Limits {
        log_bytes_max: 1 << 20,
        entries_max: 100_000,
        ..Limits::default()
    };
    let Ok(mut reader) = Reader::open(Cursor::new(disk), 0, &limits) else {
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
    for handle in files.into_iter().take(20) {
        if let Ok(content) = reader.content(handle) {
            let _ = content.take(CONTENT_BYTES_MAX).read_to_end(&mut Vec::new());
        }
    }
});
