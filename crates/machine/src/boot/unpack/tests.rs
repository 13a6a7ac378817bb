//! Unpacking made-up packages and images, whole, cut short and damaged.

use super::*;
use crate::boot::fixtures;
use proptest::prelude::*;
use std::io::Write as _;

#[test]
fn every_compression_gives_back_what_went_in_and_keeps_its_bound() {
    let data = b"a kernel, say".repeat(1000);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&data).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&data).unwrap();
    let size = (data.len() as u32).to_le_bytes();
    let packed = [
        gzip.finish().unwrap(),
        [xz.finish().unwrap(), size.to_vec()].concat(),
        [zstd::encode_all(&data[..], 1).unwrap(), size.to_vec()].concat(),
        fixtures::lz4_legacy(&data),
        data.clone(),
    ];
    for packed in packed {
        assert_eq!(decompress(&packed, 1 << 20).unwrap(), data);
        assert!(decompress(&packed, data.len() as u64 - 1).is_err());
    }
}

#[test]
fn a_cut_stream_is_an_error_not_a_shorter_kernel() {
    let data: Vec<u8> = (0..100_000u32)
        .flat_map(|n| n.wrapping_mul(n).to_le_bytes())
        .collect();
    let xz = {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&data).unwrap();
        encoder.finish().unwrap()
    };
    for packed in [
        fixtures::lz4_legacy(&data),
        xz,
        zstd::encode_all(&data[..], 1).unwrap(),
    ] {
        assert!(decompress(&packed[..packed.len() / 2], 1 << 20).is_err());
    }
}

#[test]
fn a_package_gives_its_kernel_and_modules_whatever_its_compression() {
    for compression in ["xz", "zst"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.deb");
        let mut files = fixtures::modules("6.1", &[]);
        files.push(("boot/vmlinuz-6.1".into(), b"image".to_vec()));
        files.push(("usr/share/doc/README".into(), b"words".to_vec()));
        fixtures::deb(&path, &files, compression);
        let package = deb(&path, &dir.path().join("out")).unwrap();
        assert_eq!(std::fs::read(package.bzimage).unwrap(), b"image");
        assert_eq!(std::fs::read_dir(package.modules).unwrap().count(), 18);
    }
}

#[test]
fn a_package_cut_short_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k.deb");
    fixtures::kernel_deb(&path, "6.1", &[]);
    let whole = std::fs::read(&path).unwrap();
    for length in [4, 30, 100, whole.len() / 2, whole.len() - 10] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = deb(&path, &dir.path().join(length.to_string())).unwrap_err();
        assert!(
            error.to_string().contains("Debian kernel package"),
            "{error}"
        );
    }
}

#[test]
fn a_meta_package_says_that_it_only_names_the_real_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k.deb");
    fixtures::deb(&path, &[("usr/share/doc/x".into(), vec![])], "xz");
    let error = deb(&path, &dir.path().join("out")).unwrap_err();
    assert!(error.to_string().contains("meta-package"), "{error}");
}

#[test]
fn a_bzimage_gives_its_payload_and_a_cut_one_an_error() {
    let image = fixtures::bzimage(b"payload");
    assert_eq!(bzimage_payload(&image), Some(Ok(&b"payload"[..])));
    assert!(bzimage_payload(&image[..image.len() - 8]).unwrap().is_err());
    assert_eq!(bzimage_payload(b"\x7fELF"), None);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        magic in proptest::sample::select(vec![
            &b""[..], b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x5d\0\0",
        ]),
        data in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let data = [magic, &data].concat();
        let _ = decompress(&data, 1 << 16);
        let mut image = data;
        image.resize(0x300, 7);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        let _ = bzimage_payload(&image);
    }
}
