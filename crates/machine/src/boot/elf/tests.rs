//! ELF reading and rewriting, on made-up files and on arbitrary bytes.

use super::*;
use crate::boot::fixtures;
use proptest::prelude::*;

#[test]
fn a_compacted_kernel_keeps_what_is_loaded_and_its_pvh_note() {
    let fat = fixtures::vmlinux("6.1.0-test", true);
    let thin = compact_kernel(&fat).unwrap();
    assert!(thin.len() < 10_000, "{}", thin.len());
    assert!(Elf::parse(&thin).unwrap().has_pvh_entry().unwrap());
    let memory = |data: &[u8]| {
        let segments = Elf::parse(data).unwrap().segments().unwrap();
        let load = segments.iter().find(|s| s.kind == PT_LOAD).unwrap();
        let size = u64_at(load.header, 40).unwrap() as usize;
        let mut bytes = load.data.to_vec();
        bytes.resize(size, 0);
        (bytes, load.header[16..32].to_vec(), size)
    };
    assert_eq!(memory(&thin), memory(&fat));
    assert_eq!(compact_kernel(&thin).unwrap(), thin);
}

#[test]
fn a_kernel_without_the_note_is_told_apart() {
    let plain = fixtures::vmlinux("6.1.0-test", false);
    assert!(!Elf::parse(&plain).unwrap().has_pvh_entry().unwrap());
}

#[test]
fn a_slim_module_loses_signature_and_debug_information_only() {
    let fat = fixtures::module("a,b-c");
    let slim = slim_module(&fat).unwrap();
    assert!(slim.len() < 800, "{}", slim.len());
    let elf = Elf::parse(&slim).unwrap();
    assert_eq!(elf.section(".text").unwrap(), Some(&b"code"[..]));
    assert_eq!(elf.section(".debug_info").unwrap(), Some(&b""[..]));
    assert_eq!(module_depends(&slim).unwrap(), ["a", "b_c"]);
    assert_eq!(module_depends(&fat).unwrap(), ["a", "b_c"]);
}

#[test]
fn a_signature_longer_than_the_file_is_left_alone() {
    let mut data = b"short".to_vec();
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    data.extend_from_slice(b"~Module signature appended~\n");
    assert_eq!(without_signature(&data), data);
}

#[test]
fn segments_that_would_multiply_the_output_are_refused() {
    let mut data = fixtures::vmlinux("6.1.0-test", true);
    data[56..58].copy_from_slice(&60u16.to_le_bytes());
    assert_eq!(compact_kernel(&data), Err(ElfError::TooMany));
}

fn every_reader(data: &[u8]) {
    let _ = compact_kernel(data);
    let _ = slim_module(data);
    let _ = module_depends(data);
    let _ = Elf::parse(data).and_then(|elf| elf.has_pvh_entry());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(mut data in proptest::collection::vec(any::<u8>(), 0..400)) {
        every_reader(&data);
        if data.len() > 6 {
            data[..6].copy_from_slice(b"\x7fELF\x02\x01");
            every_reader(&data);
        }
    }

    #[test]
    fn a_damaged_file_never_panics(
        kernel in any::<bool>(),
        hits in proptest::collection::vec((0..4300usize, any::<u8>()), 1..6),
        cut in 0..9000usize,
    ) {
        let mut data = if kernel {
            fixtures::vmlinux("6.1.0-test", true)[..8000].to_vec()
        } else {
            fixtures::module("a,b")
        };
        for (at, value) in hits {
            // Half of the damage goes where the tables are.
            let at = if value % 2 == 0 { at % 200 } else { at };
            if let Some(byte) = data.get_mut(at) {
                *byte = value;
            }
        }
        data.truncate(cut);
        every_reader(&data);
    }
}
