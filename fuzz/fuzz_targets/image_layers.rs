//! The layers of an image, one above the other: tars, cut by the input's first bytes, each of which is read and merged. Check sums
//! of headers are put right, since a fuzzer would find none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_image::Limits;
use vistara_image::merge::Tree;
use vistara_image::tar::TarReader;

const BLOCK: usize = 512;
const LAYERS_MAX: usize = 3;

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, bytes)) = bytes.split_first() else {
        return;
    };
    let limits = Limits {
        entries_max: 10_000,
        tar_header_bytes_max: 64 << 10,
        ..Limits::default()
    };
    let blocks = (usize::from(*cut) + 1) * BLOCK;
    let mut tree = Tree::new(&limits);
    for layer in bytes.chunks(blocks).take(LAYERS_MAX) {
        let mut layer = layer.to_vec();
        for block in layer.chunks_exact_mut(BLOCK) {
            put_sum_right(block);
        }
        let mut reader = TarReader::new(layer.as_slice(), &limits);
        let mut entries = Vec::new();
        while let Ok(Some(entry)) = reader.next_entry() {
            entries.push(entry);
        }
        if tree.apply_layer(entries).is_err() {
            return;
        }
    }
    let _ = tree.add_mount_points();
    for _ in tree.walk() {}
});

/// The check sum of a header, which is in octal digits at 148 and counts as eight blanks itself.
fn put_sum_right(block: &mut [u8]) {
    // Data, and the end, have none.
    if block[257..262] != *b"ustar" {
        return;
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
