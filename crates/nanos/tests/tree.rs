//! What is written is read back as the same tree, whatever its names, sizes and depth.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use vistara_nanos::tfs::{
    DEPTH_MAX, Directory, Label, Limits, Node, Reader, Value, VolumeId, WriteError, Writer,
};

const ID: VolumeId = VolumeId([3; 16]);

#[derive(Debug, Clone, PartialEq)]
enum Tree {
    Directory(BTreeMap<Vec<u8>, Tree>),
    File(Vec<u8>),
    Symlink(Vec<u8>),
}

fn begin(keys: &[(Vec<u8>, Value)]) -> Writer<Cursor<Vec<u8>>> {
    let label = Label::new("tree").unwrap();
    Writer::create(Cursor::new(Vec::new()), 0, ID, &label, keys).unwrap()
}

fn write<W: Write + Seek>(
    writer: &mut Writer<W>,
    directory: Directory,
    entries: &BTreeMap<Vec<u8>, Tree>,
) {
    for (name, tree) in entries {
        match tree {
            Tree::Directory(entries) => {
                let inner = writer.directory(directory, name).unwrap();
                write(writer, inner, entries);
            }
            Tree::File(content) => {
                let length = content.len() as u64;
                let mut content = &content[..];
                writer.file(directory, name, length, &mut content).unwrap();
            }
            Tree::Symlink(target) => writer.symlink(directory, name, target).unwrap(),
        }
    }
}

fn read<R: Read + Seek>(reader: &mut Reader<R>, node: &Node) -> Tree {
    match node {
        Node::Directory(id) => Tree::Directory(
            reader
                .entries(*id)
                .unwrap()
                .into_iter()
                .map(|entry| (entry.name, read(reader, &entry.node)))
                .collect(),
        ),
        Node::File(handle) => {
            let mut content = Vec::new();
            let mut source = reader.content(*handle).unwrap();
            source.read_to_end(&mut content).unwrap();
            assert_eq!(content.len() as u64, handle.length);
            Tree::File(content)
        }
        Node::Symlink(target) => Tree::Symlink(target.clone()),
        Node::Other => panic!("something else"),
    }
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let odd = prop::collection::vec(1u8..=255, 1..12);
    let ordinary = "[a-c]{1,2}".prop_map(String::into_bytes);
    // Names that mean something to the format elsewhere.
    let special = prop::sample::select(vec!["children", "extents", "0", "offset", "program"]);
    let special = special.prop_map(|name| name.as_bytes().to_vec());
    let long = (1u8..=255, 200usize..=255).prop_map(|(byte, length)| vec![byte; length]);
    prop_oneof![4 => ordinary, 2 => odd, 2 => special, 1 => long]
        .prop_filter("no name", |name: &Vec<u8>| {
            !name.contains(&b'/') && name != b"." && name != b".."
        })
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    let lengths = prop::sample::select(vec![
        0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 70_000, 262_144, 262_145,
    ]);
    (lengths, any::<u8>(), any::<bool>()).prop_map(|(length, seed, sparse)| {
        (0..length)
            .map(|at: usize| match sparse && at / 4096 % 3 != 1 {
                true => 0,
                false => (at as u8).wrapping_mul(31).wrapping_add(seed),
            })
            .collect()
    })
}

fn tree() -> impl Strategy<Value = BTreeMap<Vec<u8>, Tree>> {
    let target = prop::collection::vec(1u8..=255, 1..300);
    let leaf = prop_oneof![
        3 => content().prop_map(Tree::File),
        1 => target.prop_map(Tree::Symlink),
        1 => Just(Tree::Directory(BTreeMap::new())),
    ];
    let inner = leaf.prop_recursive(5, 40, 8, |inner| {
        prop::collection::btree_map(name(), inner, 0..8).prop_map(Tree::Directory)
    });
    prop::collection::btree_map(name(), inner, 0..8)
}

fn value() -> impl Strategy<Value = Value> {
    let text = prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Text);
    let number = any::<u64>().prop_map(|number| Value::Integer(number.into()));
    let negative = (1..=u64::MAX).prop_map(|number| Value::Integer(-i128::from(number)));
    let leaf = prop_oneof![text, number, negative, Just(Value::Null)];
    leaf.prop_recursive(3, 20, 6, |inner| {
        let tuple = prop::collection::btree_map(name(), inner.clone(), 0..6);
        let vector = prop::collection::vec(inner, 0..6);
        prop_oneof![
            tuple.prop_map(|entries| Value::Tuple(entries.into_iter().collect())),
            vector.prop_map(Value::Vector),
        ]
    })
}

/// Tuples have no order of their own.
fn ordered(value: Value) -> Value {
    match value {
        Value::Tuple(entries) => {
            let mut entries: Vec<_> = entries
                .into_iter()
                .map(|(key, value)| (key, ordered(value)))
                .collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Value::Tuple(entries)
        }
        Value::Vector(values) => Value::Vector(values.into_iter().map(ordered).collect()),
        other => other,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_tree_is_read_back_as_it_was_written(tree in tree()) {
        let mut writer = begin(&[]);
        let root = writer.root();
        write(&mut writer, root, &tree);
        let (disk, written) = writer.finish(0).unwrap();
        prop_assert_eq!(written.bytes, disk.get_ref().len() as u64);
        let mut reader = Reader::open(disk, 0, &Limits::default()).unwrap();
        let node = Node::Directory(reader.root());
        prop_assert!(read(&mut reader, &node) == Tree::Directory(tree));
        let mut walked = 0;
        reader.walk(|_, _| { walked += 1; Ok(()) }).unwrap();
        prop_assert_eq!(walked, written.entries);
    }

    #[test]
    fn a_manifest_is_read_back_as_it_was_written(
        keys in prop::collection::btree_map(name(), value(), 0..8),
    ) {
        let mut keys = keys;
        keys.remove(&b"children"[..]);
        let keys: Vec<_> = keys.into_iter().collect();
        let (disk, _) = begin(&keys).finish(0).unwrap();
        let reader = Reader::open(disk, 0, &Limits::default()).unwrap();
        let read = Value::Tuple(reader.keys().unwrap());
        prop_assert_eq!(ordered(read), ordered(Value::Tuple(keys)));
    }
}

#[test]
fn twenty_thousand_files_are_written_and_read_back() {
    let mut writer = begin(&[]);
    let root = writer.root();
    for number in 0..200 {
        let name = format!("directory-{number}");
        let directory = writer.directory(root, name.as_bytes()).unwrap();
        for file in 0..100 {
            let name = format!("file-{number}-{file}");
            let content = name.clone().into_bytes();
            let length = content.len() as u64;
            writer
                .file(directory, name.as_bytes(), length, &mut &content[..])
                .unwrap();
        }
    }
    let (disk, written) = writer.finish(0).unwrap();
    assert_eq!(written.entries, 20_200);
    let mut reader = Reader::open(disk, 0, &Limits::default()).unwrap();
    assert!(reader.log_bytes() > 1 << 20, "several pieces");
    let mut files = Vec::new();
    reader
        .walk(|path, node| {
            if let Node::File(handle) = node {
                files.push((path.to_vec(), *handle));
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(files.len(), 20_000);
    for (path, handle) in files {
        let mut content = Vec::new();
        reader
            .content(handle)
            .unwrap()
            .read_to_end(&mut content)
            .unwrap();
        assert!(path.ends_with(&content));
    }
}

#[test]
fn a_file_of_eighty_megabytes_takes_no_room_where_it_is_zero() {
    const LENGTH: u64 = (80 << 20) + 3;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let out = BufWriter::new(File::create_new(&path).unwrap());
    let mut writer = Writer::create(out, 0, ID, &Label::none(), &[]).unwrap();
    let root = writer.root();
    let mut content = b"begin"
        .chain(std::io::repeat(0).take(LENGTH - 8))
        .chain(&b"end"[..]);
    writer.file(root, b"large", LENGTH, &mut content).unwrap();
    writer.file(root, b"after", 5, &mut &b"after"[..]).unwrap();
    writer.finish(0).unwrap();
    let taken = std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
    assert!(taken < 2 << 20, "{taken} bytes");
    let mut reader = Reader::open(File::open(&path).unwrap(), 0, &Limits::default()).unwrap();
    let Some(Node::File(large)) = reader.lookup(b"large").unwrap() else {
        panic!("no file");
    };
    assert_eq!(large.length, LENGTH);
    let mut content = Vec::new();
    reader
        .content(large)
        .unwrap()
        .read_to_end(&mut content)
        .unwrap();
    assert!(content.starts_with(b"begin\0") && content.ends_with(b"\0end"));
    assert_eq!(content.len() as u64, LENGTH);
}

#[test]
fn a_record_that_crosses_the_end_of_a_piece_is_read_in_parts() {
    // Values of these lengths put the end of a record at every distance from the end of a piece of 512 KiB.
    for short_by in 0..120 {
        let long = Value::Text(vec![b'x'; (512 << 10) - 60 - short_by]);
        let keys = [(b"long".to_vec(), long.clone())];
        let mut writer = begin(&keys);
        let root = writer.root();
        writer.symlink(root, b"a", b"target").unwrap();
        writer.directory(root, b"b").unwrap();
        let (disk, _) = writer.finish(0).unwrap();
        let reader = Reader::open(disk, 0, &Limits::default()).unwrap();
        assert!(reader.keys().unwrap() == keys);
        assert_eq!(reader.entries(reader.root()).unwrap().len(), 2);
    }
    // And one that needs several pieces for itself.
    let keys = [(b"long".to_vec(), Value::Text(vec![b'y'; 3 << 20]))];
    let (disk, _) = begin(&keys).finish(0).unwrap();
    let reader = Reader::open(disk, 0, &Limits::default()).unwrap();
    assert!(reader.keys().unwrap() == keys);
}

#[test]
fn what_the_format_cannot_hold_is_refused_and_the_rest_stays() {
    let mut writer = begin(&[]);
    let root = writer.root();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        let refused = writer.directory(root, name);
        assert!(matches!(refused, Err(WriteError::Name { .. })));
    }
    writer.directory(root, b"once").unwrap();
    let twice = writer.symlink(root, b"once", b"x");
    assert!(matches!(twice, Err(WriteError::Duplicate { .. })));
    let target = writer.symlink(root, b"link", b"");
    assert!(matches!(target, Err(WriteError::Target { .. })));
    let short = writer.file(root, b"short", 600, &mut &[1; 599][..]);
    assert!(matches!(
        short,
        Err(WriteError::ShortContent { found: 599, .. })
    ));
    writer.file(root, b"short", 3, &mut &b"yes"[..]).unwrap();
    let mut deep = root;
    for _ in 0..DEPTH_MAX {
        deep = writer.directory(deep, b"d").unwrap();
    }
    let deeper = writer.directory(deep, b"d");
    assert!(matches!(deeper, Err(WriteError::TooDeep { .. })));
    let (disk, written) = writer.finish(0).unwrap();
    assert_eq!(written.entries, 2 + u64::from(DEPTH_MAX));
    let mut reader = Reader::open(disk, 0, &Limits::default()).unwrap();
    let node = reader.lookup(b"short").unwrap().unwrap();
    assert_eq!(read(&mut reader, &node), Tree::File(b"yes".to_vec()));
}

#[test]
fn names_of_one_file_lead_to_one_content() {
    let mut writer = begin(&[]);
    let root = writer.root();
    let file = writer.file(root, b"one", 4, &mut &b"same"[..]).unwrap();
    writer.hard_link(root, b"two", file).unwrap();
    writer.hard_link(root, b"three", file).unwrap();
    let (disk, _) = writer.finish(0).unwrap();
    let reader = Reader::open(disk, 0, &Limits::default()).unwrap();
    let one = reader.lookup(b"one").unwrap();
    assert!(one.is_some());
    assert_eq!(one, reader.lookup(b"two").unwrap());
    assert_eq!(one, reader.lookup(b"three").unwrap());
}

#[test]
fn a_file_system_may_begin_anywhere_on_a_disk() {
    let out = Cursor::new(Vec::new());
    let mut writer = Writer::create(out, 12_800, ID, &Label::none(), &[]).unwrap();
    let root = writer.root();
    writer.file(root, b"file", 4, &mut &b"data"[..]).unwrap();
    let (mut disk, written) = writer.finish(2 << 20).unwrap();
    let end = disk.seek(SeekFrom::End(0)).unwrap();
    assert_eq!(end, 12_800 + written.bytes);
    assert!(written.bytes >= 2 << 20);
    let mut reader = Reader::open(disk, 12_800, &Limits::default()).unwrap();
    let node = reader.lookup(b"/file").unwrap().unwrap();
    assert_eq!(read(&mut reader, &node), Tree::File(b"data".to_vec()));
}
