//! Base disks of unikernels: made once, read back as the image's tree, gone with the image.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use support::{Tar, has_packer, image, noise, plain};
use vistara_image::{
    Asked, ErrorKind, Image, ImageError, ImageStore, Limits, Selection, UnikernelDisk, Wishes,
};
use vistara_nanos::tfs::{self, Node};

const LINES: &str = "#!/bin/sh\n";

fn tree() -> Tar {
    Tar::new()
        .dir("dev/")
        .device("dev/null", (1, 3))
        .dir("bin/")
        .file("bin/prog", &noise(1, 300_000))
        .hard_link("bin/again", "bin/prog")
        .symlink("sbin", "bin")
        .file("etc/empty", b"")
        .file("etc/lines", LINES.as_bytes())
}

/// A store with an image of this tree in one layer.
async fn store(tar: Tar) -> Option<(tempfile::TempDir, ImageStore, Image)> {
    if !has_packer() {
        return None;
    }
    let layout = tempfile::tempdir().unwrap();
    let source = image(&[plain(tar.end())]).layout(layout.path());
    Some(
        support::import(&source, Limits::default())
            .await
            .map_err(|error| support::chain(&error))
            .unwrap(),
    )
}

fn ask(store: &ImageStore, image: &Image, argv: &[&str]) -> Result<UnikernelDisk, ImageError> {
    let argv: Vec<String> = argv.iter().map(|word| (*word).to_owned()).collect();
    let asked = Asked::new(&argv, &[], "/");
    let facts = store.program_facts(image, &asked).unwrap().program;
    let wishes = Wishes {
        argv: &argv,
        env: &[],
        working_dir: "/",
    };
    store.unikernel_disk(image, &facts, &wishes)
}

/// Every path of a disk in words.
fn shown(path: &Path) -> BTreeMap<String, String> {
    let disk = fs::File::open(path).unwrap();
    let mut reader = vistara_nanos::disk::open(disk, &tfs::Limits::default()).unwrap();
    let mut found = Vec::new();
    reader
        .walk(|path, node| {
            found.push((String::from_utf8(path.to_vec()).unwrap(), node.clone()));
            Ok(())
        })
        .unwrap();
    let mut words = BTreeMap::new();
    for (path, node) in found {
        let text = match node {
            Node::Directory(_) => "directory".to_owned(),
            Node::Symlink(target) => format!("link to {}", String::from_utf8(target).unwrap()),
            Node::Other => panic!("{path} is none of these"),
            Node::File(file) => {
                let mut content = Vec::new();
                let mut input = reader.content(file).unwrap();
                input.read_to_end(&mut content).unwrap();
                format!("file {}", support::sha(&content))
            }
        };
        words.insert(path, text);
    }
    words
}

/// What lies in the store's directories for disks and for work under way.
fn left(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for part in ["unikernels", "tmp"] {
        for entry in fs::read_dir(root.join(part)).unwrap() {
            let path = entry.unwrap().path();
            match fs::read_dir(&path) {
                Ok(entries) => found.extend(entries.map(|entry| entry.unwrap().path())),
                Err(_) => found.push(path),
            }
        }
    }
    found
}

#[tokio::test]
async fn a_disk_has_the_images_tree_without_its_devices_and_is_made_once() {
    let Some((_root, store, image)) = store(tree()).await else {
        return;
    };
    let disk = ask(&store, &image, &["/bin/prog"]).unwrap();
    assert_eq!(disk.selection, Selection::Whole);
    let length = fs::metadata(&disk.path).unwrap().len();
    assert_eq!(disk.bytes, length);
    let found = shown(&disk.path);
    assert_eq!(found.len() as u64, disk.entries);
    let program = format!("file {}", support::sha(&noise(1, 300_000)));
    for (path, wanted) in [
        ("dev", "directory"),
        ("proc", "directory"),
        ("bin/prog", &program),
        ("bin/again", &program),
        ("sbin", "link to bin"),
        ("etc/empty", &format!("file {}", support::sha(b""))),
        (
            "etc/lines",
            &format!("file {}", support::sha(LINES.as_bytes())),
        ),
    ] {
        assert_eq!(found.get(path).map(String::as_str), Some(wanted), "{path}");
    }
    assert_eq!(found.get("dev/null"), None);
    let made = |disk: &UnikernelDisk| fs::metadata(&disk.path).unwrap().ino();
    let before = made(&disk);
    let other = ask(&store, &image, &["/etc/lines", "--config=/srv/x"]).unwrap();
    assert_eq!(other, disk);
    assert_eq!(made(&other), before);
    // What was cut short by a crash of the host is made anew.
    let file = fs::File::options().write(true).open(&disk.path).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(ask(&store, &image, &["/bin/prog"]).unwrap(), disk);
    assert_eq!(shown(&disk.path), found);
}

#[tokio::test]
async fn a_disk_counts_with_its_image_and_goes_with_it() {
    let Some((root, store, image)) = store(tree()).await else {
        return;
    };
    let before = store.list().unwrap()[0].disk_bytes;
    ask(&store, &image, &["/bin/prog"]).unwrap();
    let with = store.list().unwrap()[0].disk_bytes;
    assert!(with > before + 300_000, "{before} {with}");
    store
        .remove(image.id.as_ref(), &|_| false, true)
        .map_err(|error| support::chain(&error))
        .unwrap();
    assert_eq!(left(root.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_clean_up_takes_disks_whose_image_is_gone_and_leaves_the_others() {
    let Some((root, store, image)) = store(tree()).await else {
        return;
    };
    let disk = ask(&store, &image, &["/bin/prog"]).unwrap();
    let orphan = root.path().join("unikernels").join("0".repeat(64));
    fs::create_dir(&orphan).unwrap();
    fs::write(orphan.join("whole.img"), vec![1; 8192]).unwrap();
    let pruned = store.prune(&|_| true, false).unwrap();
    assert!(pruned.bytes >= 8192, "{pruned:?}");
    assert!(!orphan.exists());
    assert!(disk.path.exists());
}

#[tokio::test]
async fn two_who_want_the_same_at_once_get_the_same() {
    let Some((root, store, image)) = store(tree()).await else {
        return;
    };
    // Two stores over one directory, as two processes have.
    let again = ImageStore::open(root.path(), Limits::default()).unwrap();
    let disks: Vec<UnikernelDisk> = std::thread::scope(|scope| {
        let tasks: Vec<_> = (0..4)
            .map(|number| {
                let store = if number % 2 == 0 { &store } else { &again };
                let image = &image;
                scope.spawn(move || ask(store, image, &["/bin/prog"]).unwrap())
            })
            .collect();
        tasks.into_iter().map(|task| task.join().unwrap()).collect()
    });
    assert!(disks.iter().all(|disk| *disk == disks[0]));
    assert!(shown(&disks[0].path).contains_key("bin/prog"));
    // The disk and the list.
    assert_eq!(left(root.path()).len(), 2);
}

#[tokio::test]
async fn a_tree_that_the_disk_cannot_hold_is_refused_and_leaves_nothing() {
    let deep: String = (0..140).map(|number| format!("{number}/")).collect();
    let tar = tree().pax(&[("path", deep.as_bytes())]).dir("deep/");
    let Some((root, store, image)) = store(tar).await else {
        return;
    };
    let error = ask(&store, &image, &["/bin/prog"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User);
    let text = support::chain(&error);
    assert!(text.contains("deeper than 128"), "{text}");
    assert!(error.hint().unwrap().contains("Linux guest"));
    assert_eq!(left(root.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn selections_of_a_large_image_have_disks_of_their_own_up_to_a_bound() {
    let mut tar = tree();
    for number in 0..5 {
        tar = tar.file(&format!("srv/{number}/data"), &[b'0' + number]);
    }
    for number in 0..17_000 {
        tar = tar.file(&format!("usr/share/many/{number}"), b"");
    }
    let Some((root, store, image)) = store(tar).await else {
        return;
    };
    let of = |number: u8| {
        let data = format!("--data=/srv/{number}");
        ask(&store, &image, &["/bin/prog", &data]).unwrap()
    };
    let first = of(0);
    assert!(matches!(first.selection, Selection::Part { .. }));
    assert!(shown(&first.path).contains_key("srv/0/data"));
    assert!(!shown(&first.path).contains_key("srv/1/data"));
    // A path that is not in the image changes nothing.
    let same = ask(
        &store,
        &image,
        &["/bin/prog", "--data=/srv/0", "/nothing/here"],
    );
    assert_eq!(same.unwrap(), first);
    for number in 1..5 {
        of(number);
    }
    assert!(!first.path.exists());
    // Four disks and the list.
    assert_eq!(left(root.path()).len(), 5);
}
