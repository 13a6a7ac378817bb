use super::ahead::Ahead;
use super::*;
use crate::disk::FREE_BYTES_MIN;
use crate::tfs::{Label, Value, VolumeId};
use proptest::prelude::*;
use std::io::Cursor;

fn options(id: u8) -> DiskOptions {
    DiskOptions {
        id: VolumeId([id; 16]),
        label: Label::none(),
        free_bytes: 0,
    }
}

fn manifest(program: &str) -> Manifest {
    Manifest {
        program: program.as_bytes().to_vec(),
        ..Manifest::default()
    }
}

type Disk = Cursor<Vec<u8>>;

/// `/bin/prog` with a second name, a link `/sbin` to it, empty and holed files, and directories.
fn base() -> Disk {
    let disk = BootDisk::create(Cursor::new(Vec::new()), &options(1), &manifest("/old"));
    let mut disk = disk.unwrap();
    let tree = disk.tree();
    let root = tree.root();
    let bin = tree.directory(root, b"bin").unwrap();
    let etc = tree.directory(root, b"etc").unwrap();
    tree.directory(root, b"run").unwrap();
    let var = tree.directory(root, b"var").unwrap();
    tree.symlink(root, b"sbin", b"bin").unwrap();
    tree.symlink(var, b"run", b"/run").unwrap();
    tree.symlink(etc, b"resolv.conf", b"../run/resolv.conf")
        .unwrap();
    tree.symlink(root, b"loop", b"loop").unwrap();
    let program = b"program".repeat(100_000);
    let file = tree.file(bin, b"prog", 700_000, &mut &program[..]).unwrap();
    tree.file(etc, b"hosts", 3, &mut &b"old"[..]).unwrap();
    tree.file(etc, b"empty", 0, &mut &b""[..]).unwrap();
    let holed = [vec![1; 5000], vec![0; 100_000], vec![2; 10]].concat();
    tree.file(var, b"holed", holed.len() as u64, &mut &holed[..])
        .unwrap();
    tree.hard_link(bin, b"other", file).unwrap();
    disk.finish().unwrap().0
}

/// Every path with its content, in words.
fn shown(disk: &Disk) -> BTreeMap<String, String> {
    let mut reader = disk::open(disk.clone(), &Limits::default()).unwrap();
    let mut found = Vec::new();
    reader
        .walk(|path, node| {
            found.push((String::from_utf8(path.to_vec()).unwrap(), node.clone()));
            Ok(())
        })
        .unwrap();
    let mut content_of = |file: FileHandle| {
        let mut content = Vec::new();
        let mut input = reader.content(file).unwrap();
        input.read_to_end(&mut content).unwrap();
        match content.len() {
            0..50 => format!("file {:?}", String::from_utf8_lossy(&content)),
            length => format!(
                "file of {length}, {}",
                content
                    .iter()
                    .enumerate()
                    .map(|(at, byte)| at as u64 * u64::from(*byte))
                    .sum::<u64>()
            ),
        }
    };
    let words = |node| match node {
        Node::Directory(_) => "directory".to_owned(),
        Node::File(file) => content_of(file),
        Node::Symlink(target) => format!("link to {}", String::from_utf8(target).unwrap()),
        Node::Other => "other".to_owned(),
    };
    let (paths, nodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    paths
        .into_iter()
        .zip(nodes.into_iter().map(words))
        .collect()
}

fn again(base: Disk, changes: &Changes) -> Result<(Disk, Geometry), RemasterError> {
    let out = Cursor::new(Vec::new());
    remaster(base, out, &options(2), &manifest("/bin/prog"), changes)
}

#[test]
fn without_changes_the_tree_is_the_same_under_another_manifest() {
    let base = base();
    let (new, geometry) = again(base.clone(), &Changes::default()).unwrap();
    assert_eq!(shown(&new), shown(&base));
    assert_eq!(geometry.bytes, new.get_ref().len() as u64);
    let reader = disk::open(new, &Limits::default()).unwrap();
    assert_eq!(reader.id(), VolumeId([2; 16]));
    let keys = Value::Tuple(reader.keys().unwrap());
    assert_eq!(keys.get(b"program"), Some(&Value::text("/bin/prog")));
    let id = |path: &[u8]| match reader.lookup(path) {
        Ok(Some(Node::File(file))) => file.id,
        other => panic!("{other:?}"),
    };
    assert_eq!(id(b"/bin/prog"), id(b"/bin/other"));
}

#[test]
fn files_and_directories_come_in_the_place_of_what_was_there() {
    let changes = Changes {
        files: vec![
            (b"/etc/hosts".to_vec(), b"new".to_vec()),
            (b"etc/resolv.conf".to_vec(), b"name".to_vec()),
            (b"/srv/deep/file".to_vec(), Vec::new()),
            (b"/var/run/pid".to_vec(), b"1".to_vec()),
            (b"/sbin/tool".to_vec(), b"tool".to_vec()),
        ],
        directories: vec![
            b"/data".to_vec(),
            b"/var/run/lock/x/".to_vec(),
            b"/etc".to_vec(),
            b"/sbin".to_vec(),
        ],
        modified: Some(7),
        boot: None,
    };
    let base = base();
    let mut wanted = shown(&base);
    for (path, words) in [
        ("etc/hosts", "file \"new\""),
        ("etc/resolv.conf", "file \"name\""),
        ("srv", "directory"),
        ("srv/deep", "directory"),
        ("srv/deep/file", "file \"\""),
        ("run/pid", "file \"1\""),
        ("bin/tool", "file \"tool\""),
        ("data", "directory"),
        ("run/lock", "directory"),
        ("run/lock/x", "directory"),
    ] {
        wanted.insert(path.to_owned(), words.to_owned());
    }
    let (new, _) = again(base, &changes).unwrap();
    assert_eq!(shown(&new), wanted);
}

#[test]
fn when_a_file_was_changed_stays_and_a_new_one_has_its_own_time() {
    let mut base =
        BootDisk::create(Cursor::new(Vec::new()), &options(1), &manifest("/old")).unwrap();
    let tree = base.tree();
    let root = tree.root();
    let file = tree.file(root, b"old", 3, &mut &b"old"[..]).unwrap();
    tree.set_modified(file, 1_700_000_000).unwrap();
    tree.file(root, b"timeless", 0, &mut &b""[..]).unwrap();
    let (base, _) = base.finish().unwrap();
    let changes = Changes {
        files: vec![(b"new".to_vec(), b"new".to_vec())],
        modified: Some(u32::MAX),
        ..Changes::default()
    };
    let (new, _) = again(base, &changes).unwrap();
    let reader = disk::open(new, &Limits::default()).unwrap();
    let time = |path: &[u8]| match reader.lookup(path) {
        Ok(Some(Node::File(file))) => reader.modified(file),
        other => panic!("{other:?}"),
    };
    assert_eq!(time(b"old"), Some(1_700_000_000));
    assert_eq!(time(b"timeless"), None);
    assert_eq!(time(b"new"), Some(u32::MAX));
}

#[test]
fn what_the_tree_does_not_allow_is_refused_by_its_path() {
    let file = |path: &str| {
        let changes = Changes {
            files: vec![(path.as_bytes().to_vec(), Vec::new())],
            ..Changes::default()
        };
        again(base(), &changes).unwrap_err().to_string()
    };
    assert_eq!(
        file("/etc"),
        "\"/etc\" cannot be put on the disk: there is a directory"
    );
    assert!(file("/").contains("names no file"));
    assert!(file("/etc/..").contains("names no file"));
    assert!(file("/etc/hosts/x").contains("a file in its way"));
    assert!(file("/loop/x").contains("too many links"));
    let changes = Changes {
        directories: vec![b"/etc/hosts".to_vec()],
        ..Changes::default()
    };
    let refused = again(base(), &changes).unwrap_err().to_string();
    assert!(refused.contains("a file in its way"), "{refused}");
}

#[test]
fn what_is_written_later_has_the_room_that_was_asked_for() {
    let mut options = options(3);
    options.free_bytes = 10 * FREE_BYTES_MIN;
    let out = Cursor::new(Vec::new());
    let (new, geometry) = remaster(
        base(),
        out,
        &options,
        &manifest("/bin/prog"),
        &Changes::default(),
    )
    .unwrap();
    assert!(geometry.root.length > options.free_bytes);
    assert_eq!(geometry.bytes, new.get_ref().len() as u64);
}

/// A disk with one file of four million bytes, whose name and length are then changed in the log.
fn hostile(name: &[u8], length: u64) -> Disk {
    let disk = BootDisk::create(Cursor::new(Vec::new()), &options(1), &manifest("/p"));
    let mut disk = disk.unwrap();
    let root = disk.tree().root();
    let name_in_place = vec![b'x'; name.len()];
    disk.tree()
        .file(root, &name_in_place, 4_000_000, &mut std::io::repeat(7))
        .unwrap();
    let mut disk = disk.finish().unwrap().0;
    // 4,000,000 as a number of four groups of seven bits.
    for (from, to) in [
        (name_in_place, name.to_vec()),
        (varint(4_000_000), varint(length)),
    ] {
        let bytes = disk.get_mut();
        let at = bytes.windows(from.len()).position(|part| part == from);
        let at = at.unwrap();
        bytes[at..at + to.len()].copy_from_slice(&to);
    }
    disk
}

/// A number in four groups.
fn varint(number: u64) -> Vec<u8> {
    (0..4)
        .rev()
        .map(|group| {
            let bits = (number >> (7 * group)) as u8 & 0x7f;
            if group == 0 { bits } else { bits | 0x80 }
        })
        .collect()
}

#[test]
fn a_hostile_disk_is_refused() {
    assert!(again(hostile(b"fine", 4_000_000), &Changes::default()).is_ok());
    let name = again(hostile(b"a/bc", 4_000_000), &Changes::default());
    assert!(matches!(name, Err(RemasterError::New(_))), "{name:?}");
    let long = again(hostile(b"fine", 200_000_000), &Changes::default());
    assert!(matches!(long, Err(RemasterError::Refused(_))), "{long:?}");
    let none = again(Cursor::new(vec![0; 100_000]), &Changes::default());
    assert!(matches!(none, Err(RemasterError::Base(_))), "{none:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_disk_is_refused_or_copied_but_never_panics(
        flips in prop::collection::vec((8192_usize..9800, any::<u8>()), 1..6),
    ) {
        let mut disk = base();
        for (at, byte) in flips {
            // The second piece of the log begins at its eighth sector.
            let at = if at < 8704 { at } else { at + 7 * 512 };
            disk.get_mut()[at] = byte;
        }
        let _ = again(disk, &Changes::default());
    }

    #[test]
    fn reading_ahead_reads_what_is_there(
        seeks in prop::collection::vec((0_u64..3_000_000, 0_usize..700_000), 1..12),
    ) {
        let bytes = (0..=250).collect::<Vec<u8>>().repeat(10_000);
        let mut ahead = Ahead::new(Cursor::new(&bytes));
        for (at, length) in seeks {
            ahead.seek(SeekFrom::Start(at)).unwrap();
            let mut found = vec![0; length];
            let mut count = 0;
            while let more @ 1.. = ahead.read(&mut found[count..]).unwrap() {
                count += more;
            }
            found.truncate(count);
            let start = (at as usize).min(bytes.len());
            prop_assert_eq!(&found[..], &bytes[start..(start + length).min(bytes.len())]);
        }
    }
}

/// Run it with `cargo test --release -p vistara-nanos -- --ignored --nocapture large`.
#[test]
#[ignore = "it measures; with the dev profile it says nothing"]
fn a_large_tree_is_copied_fast() {
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str| {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join(name));
        std::io::BufWriter::with_capacity(1 << 20, file.unwrap())
    };
    let mut disk = BootDisk::create(create("base"), &options(1), &manifest("/p")).unwrap();
    for top in 0..100 {
        let root = disk.tree().root();
        let name = format!("directory{top}");
        let directory = disk.tree().directory(root, name.as_bytes()).unwrap();
        for file in 0..80 {
            let name = format!("a-file-with-a-name-{file}");
            let mut content = std::io::repeat(file + 1);
            disk.tree()
                .file(directory, name.as_bytes(), 13_000, &mut content)
                .unwrap();
        }
    }
    disk.finish().unwrap();
    for round in 0..3 {
        let base = std::fs::File::open(dir.path().join("base")).unwrap();
        let begin = std::time::Instant::now();
        let out = create(&format!("new{round}"));
        let (_, geometry) =
            remaster(base, out, &options(2), &manifest("/p"), &Changes::default()).unwrap();
        println!("{geometry:?} in {:?}", begin.elapsed());
    }
}
