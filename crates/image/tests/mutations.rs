//! Layers and documents of images, changed here and there: nothing of it makes reading or merging panic. The fuzz targets do the
//! same for longer (`fuzz/`); this runs with the ordinary tests, and prints the case that failed.

// Helpers of tests: a failure here is the test's.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::Index;
use std::sync::OnceLock;
use vistara_image::Limits;
use vistara_image::manifest::{self, Document};
use vistara_image::merge::Tree;
use vistara_image::tar::TarReader;

const BLOCK: usize = 512;
const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size":7},
"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size":9}]}"#;
const INDEX: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json",
"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc","size":7,"platform":{"architecture":"amd64","os":"linux"}}]}"#;
const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","config":{"Env":["A=b"],"Cmd":["/x"],"Entrypoint":null,"User":"1:2","WorkingDir":"/w"},
"rootfs":{"type":"layers","diff_ids":["sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"]}}"#;

/// A layer with one of each kind of entry.
fn layer() -> &'static [u8] {
    static LAYER: OnceLock<Vec<u8>> = OnceLock::new();
    LAYER.get_or_init(|| {
        let mut tar = tar::Builder::new(Vec::new());
        let header = |kind, size| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(size);
            header.set_mode(0o644);
            header
        };
        let attribute = ("SCHILY.xattr.user.a", &b"b"[..]);
        tar.append_pax_extensions([attribute, ("mtime", b"1.5")])
            .unwrap();
        let mut dir = header(tar::EntryType::Directory, 0);
        tar.append_data(&mut dir, "dir/", std::io::empty()).unwrap();
        let mut file = header(tar::EntryType::Regular, 3);
        tar.append_data(&mut file, "dir/file", &b"abc"[..]).unwrap();
        let long = format!("dir/{}", "x".repeat(200));
        tar.append_data(&mut file, long, &b"def"[..]).unwrap();
        for (kind, target) in [
            (tar::EntryType::Link, "dir/file"),
            (tar::EntryType::Symlink, "../file"),
        ] {
            let mut link = header(kind, 0);
            let name = format!("dir/{}", target.len());
            tar.append_link(&mut link, name, target).unwrap();
        }
        let mut gone = header(tar::EntryType::Regular, 0);
        tar.append_data(&mut gone, "dir/.wh.file", std::io::empty())
            .unwrap();
        tar.append_data(&mut gone, "dir/.wh..wh..opq", std::io::empty())
            .unwrap();
        let mut device = header(tar::EntryType::Char, 0);
        device.set_device_major(1).unwrap();
        device.set_device_minor(3).unwrap();
        tar.append_data(&mut device, "null", std::io::empty())
            .unwrap();
        tar.into_inner().unwrap()
    })
}

/// The check sum of a header, which is in octal digits at 148 and counts as eight blanks itself.
fn put_sums_right(layer: &mut [u8]) {
    for block in layer.chunks_exact_mut(BLOCK) {
        // Data has none.
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<(Index, u8)>> {
    prop::collection::vec((any::<Index>(), any::<u8>()), 0..8)
}

fn changed(seed: &[u8], changes: &[(Index, u8)]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for (at, byte) in changes {
        bytes[at.index(seed.len())] = *byte;
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_layer_that_was_changed_is_merged_or_refused(
        first in changes(),
        second in changes(),
        cut in prop::option::weighted(0.1, any::<Index>()),
        right in prop::bool::weighted(0.9),
    ) {
        let limits = Limits { entries_max: 1000, ..Limits::default() };
        let mut tree = Tree::new(&limits);
        for changes in [first, second] {
            let mut bytes = changed(layer(), &changes);
            if right {
                put_sums_right(&mut bytes);
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let mut reader = TarReader::new(bytes.as_slice(), &limits);
            let mut entries = Vec::new();
            while let Ok(Some(entry)) = reader.next_entry() {
                entries.push(entry);
            }
            if tree.apply_layer(entries).is_err() {
                return Ok(());
            }
        }
        let _ = tree.add_mount_points();
        prop_assert!(tree.walk().count() <= 1000);
    }

    #[test]
    fn a_document_that_was_changed_is_read_or_refused(changes in changes()) {
        for seed in [MANIFEST, INDEX] {
            let bytes = changed(seed.as_bytes(), &changes);
            if let Ok(Document::Manifest(manifest)) = manifest::parse_document(&bytes, None) {
                let _ = manifest::check_media_types(&manifest);
            }
        }
        let _ = manifest::parse_config(&changed(CONFIG.as_bytes(), &changes));
    }
}

#[test]
fn what_is_changed_is_read_as_long_as_it_is_not() {
    let limits = Limits::default();
    let mut bytes = layer().to_vec();
    put_sums_right(&mut bytes);
    let mut reader = TarReader::new(bytes.as_slice(), &limits);
    let mut count = 0;
    while reader.next_entry().unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, 8);
    for document in [MANIFEST, INDEX] {
        manifest::parse_document(document.as_bytes(), None).unwrap();
    }
    manifest::parse_config(CONFIG.as_bytes()).unwrap();
}
