//! The merge of random layers against a model that is too simple to be wrong; and readers against arbitrary bytes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use proptest::prelude::*;
use std::collections::BTreeMap;
use vistara_image::Limits;
use vistara_image::manifest::{choose, parse_config, parse_document};
use vistara_image::merge::{Content, Tree};
use vistara_image::tar::{Entry, EntryKind, TarReader};
use vistara_model::Architecture;

#[derive(Debug, Clone)]
enum Step {
    File(String),
    Directory(String),
    Whiteout(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => path().prop_map(Step::File),
        3 => path().prop_map(Step::Directory),
        2 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
    ]
}

fn entry(path: &str, kind: EntryKind, size: u64) -> Entry {
    Entry {
        path: path.as_bytes().to_vec(),
        kind,
        link: Vec::new(),
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        size,
        device: (0, 0),
        xattrs: Vec::new(),
        data_offset: 0,
    }
}

/// The model: a map of whole paths, `None` for a directory and a number for a file.
type Model = BTreeMap<String, Option<u64>>;

fn below(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent)
        .is_some_and(|rest| rest.starts_with('/'))
}

/// Applies a layer to the model; `false` where a path lies below a file, which is refused.
fn apply(model: &mut Model, layer: &[(Step, u64)]) -> bool {
    for (step, _) in layer {
        match step {
            Step::Whiteout(path) => model.retain(|known, _| known != path && !below(known, path)),
            Step::Opaque(path) => model.retain(|known, _| !below(known, path)),
            Step::File(_) | Step::Directory(_) => {}
        }
    }
    for (step, number) in layer {
        let (path, value) = match step {
            Step::File(path) => (path, Some(*number)),
            Step::Directory(path) => (path, None),
            Step::Whiteout(_) | Step::Opaque(_) => continue,
        };
        for (at, _) in path.match_indices('/') {
            match model.get(&path[..at]) {
                Some(Some(_)) => return false,
                Some(None) => {}
                None => {
                    model.insert(path[..at].to_owned(), None);
                }
            }
        }
        if value.is_some() {
            model.retain(|known, _| !below(known, path));
        }
        model.insert(path.clone(), value);
    }
    true
}

fn entries(layer: &[(Step, u64)]) -> Vec<Entry> {
    let whiteout = |path: &str| match path.rsplit_once('/') {
        Some((parent, name)) => format!("{parent}/.wh.{name}"),
        None => format!(".wh.{path}"),
    };
    layer
        .iter()
        .map(|(step, number)| match step {
            Step::File(path) => entry(path, EntryKind::File, *number),
            Step::Directory(path) => entry(path, EntryKind::Directory, 0),
            Step::Whiteout(path) => entry(&whiteout(path), EntryKind::File, 0),
            Step::Opaque(path) => entry(&format!("{path}/.wh..wh..opq"), EntryKind::File, 0),
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_layers_merge_as_the_model_says(
        layers in proptest::collection::vec(proptest::collection::vec(step(), 0..8), 1..5)
    ) {
        let mut number = 0;
        let mut model = Model::new();
        let mut tree = Tree::new(&Limits::default());
        for layer in layers {
            let layer: Vec<(Step, u64)> = layer.into_iter().map(|step| { number += 1; (step, number) }).collect();
            let fine = apply(&mut model, &layer);
            let applied = tree.apply_layer(entries(&layer));
            prop_assert_eq!(fine, applied.is_ok(), "{:?}", applied);
            if !fine {
                return Ok(());
            }
        }
        let found: Model = tree.walk().map(|visit| {
            let path = String::from_utf8(tree.path(visit.node)).unwrap();
            let value = match visit.inode.content {
                Content::File { size, .. } => Some(size),
                _ => None,
            };
            (path, value)
        }).collect();
        prop_assert_eq!(found, model);
    }

    #[test]
    fn no_bytes_make_the_tar_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = TarReader::new(&bytes[..], &Limits::default());
        while let Ok(Some(_)) = reader.next_entry() {}
    }

    #[test]
    fn no_damage_to_a_tar_makes_reader_or_merge_panic(
        changes in proptest::collection::vec((0usize..512, any::<u8>()), 0..6),
        kind in any::<u8>(),
        pax in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut tar = Vec::new();
        for (flag, body) in [(b'x', &pax[..]), (kind, &b"data"[..]), (b'0', &b""[..])] {
            let mut block = [0u8; 512];
            block[..3].copy_from_slice(b"a/b");
            block[100..107].copy_from_slice(b"0000644");
            block[124..135].copy_from_slice(format!("{:011o}", body.len()).as_bytes());
            block[156] = flag;
            block[157] = b'a';
            for (at, byte) in &changes {
                if flag != b'x' {
                    block[*at] = *byte;
                }
            }
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            tar.extend_from_slice(&block);
            tar.extend_from_slice(body);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        let mut reader = TarReader::new(&tar[..], &Limits::default());
        let mut entries = Vec::new();
        while let Ok(Some(entry)) = reader.next_entry() {
            entries.push(entry);
        }
        let mut tree = Tree::new(&Limits::default());
        if tree.apply_layer(entries.clone()).is_ok() {
            let _ = tree.apply_layer(entries);
            let _ = tree.walk().count();
        }
    }

    #[test]
    fn no_text_makes_the_manifest_readers_panic(text in ".{0,200}") {
        let _ = parse_document(text.as_bytes(), Some(&text));
        let _ = parse_config(text.as_bytes());
    }
}

#[test]
fn the_plain_variant_is_preferred_and_notes_are_not_on_offer() {
    let digest = |byte: char| format!("sha256:{}", byte.to_string().repeat(64));
    let text = format!(
        r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"{}","size":1,"platform":{{"os":"linux","architecture":"amd64","variant":"v3"}}}},
            {{"digest":"{}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}},
            {{"digest":"{}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}}}}]}}"#,
        digest('a'),
        digest('b'),
        digest('c')
    );
    let document = parse_document(text.as_bytes(), None).unwrap();
    let vistara_image::manifest::Document::Index(entries) = document else {
        panic!("no index");
    };
    let best = choose(&entries, &Architecture("amd64".into())).unwrap();
    assert_eq!(best[0].digest.to_string(), digest('b'));
    let available = choose(&entries, &Architecture("arm64".into())).unwrap_err();
    assert_eq!(available, ["linux/amd64", "linux/amd64/v3"]);
}
