//! Hostile executables: whatever an image holds in the place of a program, it is read without a panic and within bounds.

use super::elf;
use proptest::prelude::*;
use std::sync::OnceLock;

/// A small real program of this host; nothing where there is none.
fn real() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| std::fs::read("/bin/true").unwrap_or_default())
}

#[test]
fn the_real_one_is_read() {
    if !elf::is_elf(real()) {
        eprintln!("skipped: /bin/true is no ELF file here");
        return;
    }
    let summary = elf::read(real(), true).unwrap();
    assert!(summary.wide);
    assert!(summary.has_symbols, "{summary:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn flipped_bits_make_nothing_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..32),
        headers in prop::collection::vec((0usize..1024, any::<u8>()), 0..32),
        own in any::<bool>(),
    ) {
        let mut bytes = real().to_vec();
        prop_assume!(!bytes.is_empty());
        for (index, bit) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        // Most of what is parsed lies in the headers.
        for (at, byte) in headers {
            if at >= 4 && at < bytes.len() {
                bytes[at] = byte;
            }
        }
        if let Ok(summary) = elf::read(&bytes, own) {
            prop_assert!(summary.needed.len() <= 512);
        }
    }

    #[test]
    fn a_cut_file_makes_nothing_panic(length in any::<prop::sample::Index>(), own in any::<bool>()) {
        let bytes = real();
        prop_assume!(!bytes.is_empty());
        let _ = elf::read(&bytes[..length.index(bytes.len())], own);
    }

    #[test]
    fn random_bytes_make_nothing_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let start = b"\x7fELF\x02\x01\x01";
        let shared = start.len().min(bytes.len());
        bytes[..shared].copy_from_slice(&start[..shared]);
        let _ = elf::read(&bytes, true);
    }
}
