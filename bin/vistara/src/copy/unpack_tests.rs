//! What a hostile guest may send, and what becomes of it.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tar::{Builder, Header};

/// An archive of entries whose names and links are written as they are, however bad.
struct Evil(Builder<Vec<u8>>);

impl Evil {
    fn new() -> Evil {
        Evil(Builder::new(Vec::new()))
    }

    fn add(mut self, kind: EntryType, name: &str, link: &str, mode: u32, data: &[u8]) -> Evil {
        let mut header = Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn dir(self, name: &str) -> Evil {
        self.add(EntryType::Directory, name, "", 0o755, b"")
    }

    fn file(self, name: &str, data: &str) -> Evil {
        self.add(EntryType::Regular, name, "", 0o644, data.as_bytes())
    }

    fn link(self, name: &str, target: &str) -> Evil {
        self.add(EntryType::Symlink, name, target, 0o777, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn run(archive: &[u8], into: &Path, top: Top) -> io::Result<Unpacked> {
    let dir = std::fs::File::open(into).unwrap();
    let rules = Rules {
        top,
        keep_ids: false,
        counter: ProgressBar::hidden(),
    };
    unpack(archive, dir.as_fd(), &rules)
}

/// A destination beside which there is something to lose.
fn scene() -> (tempfile::TempDir, std::path::PathBuf) {
    let scene = tempfile::tempdir().unwrap();
    std::fs::create_dir(scene.path().join("outside")).unwrap();
    std::fs::write(scene.path().join("outside/secret"), "kept").unwrap();
    let into = scene.path().join("into");
    std::fs::create_dir(&into).unwrap();
    (scene, into)
}

fn outside_is_untouched(scene: &Path) {
    let names: Vec<_> = std::fs::read_dir(scene.join("outside"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["secret"]);
    assert_eq!(
        std::fs::read_to_string(scene.join("outside/secret")).unwrap(),
        "kept"
    );
    let names = std::fs::read_dir(scene).unwrap().count();
    assert_eq!(names, 2);
}

#[test]
fn a_tree_arrives_with_its_modes_links_and_times() {
    let (_scene, into) = scene();
    let archive = Evil::new()
        .add(EntryType::Directory, "t", "", 0o555, b"")
        .file("t/f", "data")
        .link("t/l", "f")
        .add(EntryType::Link, "t/h", "t/f", 0o644, b"")
        .bytes();
    run(&archive, &into, Top::Named("new".to_owned())).unwrap();
    let top = into.join("new");
    assert_eq!(std::fs::metadata(&top).unwrap().mode() & 0o7777, 0o555);
    assert_eq!(std::fs::read_to_string(top.join("l")).unwrap(), "data");
    let file = std::fs::metadata(top.join("f")).unwrap();
    assert_eq!((file.nlink(), file.mtime()), (2, 1_000_000_000));
    std::fs::set_permissions(&top, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn contents_arrive_without_their_top() {
    let (_scene, into) = scene();
    let archive = Evil::new().dir("t").file("t/a/b", "x").bytes();
    run(&archive, &into, Top::Contents).unwrap();
    assert_eq!(std::fs::read_to_string(into.join("a/b")).unwrap(), "x");
    let root = Evil::new().dir("./").file("./c", "y").bytes();
    run(&root, &into, Top::Contents).unwrap();
    assert_eq!(std::fs::read_to_string(into.join("c")).unwrap(), "y");
}

#[test]
fn names_that_lead_outside_are_refused() {
    for name in [
        "t/../../outside/secret",
        "../outside/secret",
        "/etc/vistara-test",
        "t/a/../../../outside/x",
        "u/other",
    ] {
        let (scene, into) = scene();
        let archive = Evil::new().dir("t").file(name, "evil").bytes();
        let error = run(&archive, &into, Top::Named("t".to_owned())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}: {error}");
        outside_is_untouched(scene.path());
    }
}

#[test]
fn nothing_is_written_through_a_link_of_the_guests_making() {
    for target in ["../../outside", "/tmp"] {
        let (scene, into) = scene();
        let archive = Evil::new()
            .dir("t")
            .link("t/l", target)
            .file("t/l/secret", "evil")
            .bytes();
        let error = run(&archive, &into, Top::Named("t".to_owned())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory, "{error}");
        outside_is_untouched(scene.path());
    }
    // The same name first as a link and then as a file: the link goes, what it led to stays.
    let (scene, into) = scene();
    let archive = Evil::new()
        .dir("t")
        .link("t/f", "../../outside/secret")
        .file("t/f", "evil")
        .bytes();
    run(&archive, &into, Top::Named("t".to_owned())).unwrap();
    assert_eq!(std::fs::read_to_string(into.join("t/f")).unwrap(), "evil");
    outside_is_untouched(scene.path());
}

#[test]
fn a_directory_does_not_take_a_links_place_either() {
    let (scene, into) = scene();
    let archive = Evil::new()
        .dir("t")
        .link("t/l", "../../outside")
        .dir("t/l")
        .bytes();
    assert!(run(&archive, &into, Top::Named("t".to_owned())).is_err());
    outside_is_untouched(scene.path());
}

#[test]
fn hard_links_stay_inside() {
    for target in ["../outside/secret", "/etc/passwd", "t/../../outside/secret"] {
        let (scene, into) = scene();
        let archive = Evil::new()
            .dir("t")
            .add(EntryType::Link, "t/h", target, 0o644, b"")
            .bytes();
        assert!(run(&archive, &into, Top::Named("t".to_owned())).is_err());
        outside_is_untouched(scene.path());
    }
    // Through a link of the guest's making.
    let (scene, into) = scene();
    let archive = Evil::new()
        .dir("t")
        .link("t/l", "../../outside")
        .add(EntryType::Link, "t/h", "t/l/secret", 0o644, b"")
        .bytes();
    assert!(run(&archive, &into, Top::Named("t".to_owned())).is_err());
    outside_is_untouched(scene.path());
}

#[test]
fn a_link_that_was_there_before_is_not_followed() {
    let (scene, into) = scene();
    std::os::unix::fs::symlink(scene.path().join("outside"), into.join("sub")).unwrap();
    let archive = Evil::new().dir("t").file("t/sub/secret", "evil").bytes();
    assert!(run(&archive, &into, Top::Contents).is_err());
    outside_is_untouched(scene.path());
}

#[test]
fn set_id_bits_are_dropped_and_devices_left_out() {
    let (_scene, into) = scene();
    let archive = Evil::new()
        .dir("t")
        .add(EntryType::Regular, "t/su", "", 0o6755, b"x")
        .add(EntryType::Block, "t/sda", "", 0o666, b"")
        .add(EntryType::Fifo, "t/pipe", "", 0o666, b"")
        .bytes();
    let unpacked = run(&archive, &into, Top::Named("t".to_owned())).unwrap();
    assert_eq!(unpacked.left_out, 2);
    assert_eq!(
        std::fs::metadata(into.join("t/su")).unwrap().mode() & 0o7777,
        0o755
    );
    assert!(!into.join("t/sda").exists() && !into.join("t/pipe").exists());
}

#[test]
fn an_extension_record_that_is_too_long_is_not_read() {
    let (_scene, into) = scene();
    let long = vec![b'a'; (EXTENSION_BYTES_MAX + 1) as usize];
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
    ] {
        let archive = Evil::new().add(kind, "x", "", 0o644, &long).bytes();
        let error = run(&archive, &into, Top::Contents).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }
}

#[test]
fn long_names_work_and_overlong_ones_are_refused() {
    let (_scene, into) = scene();
    let long = format!("t/{}", "d/".repeat(100)) + "f";
    let archive = Evil::new()
        .dir("t")
        .add(
            EntryType::GNULongName,
            "././@LongLink",
            "",
            0o644,
            long.as_bytes(),
        )
        .file("cut off", "deep")
        .bytes();
    run(&archive, &into, Top::Named("t".to_owned())).unwrap();
    assert_eq!(std::fs::read_to_string(into.join(&long)).unwrap(), "deep");
    let deep = format!("t/{}", "d/".repeat(600)) + "f";
    let archive = Evil::new()
        .dir("t")
        .add(EntryType::GNULongName, "x", "", 0o644, deep.as_bytes())
        .file("x", "")
        .bytes();
    assert!(run(&archive, &into, Top::Named("t".to_owned())).is_err());
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    let (_scene, into) = scene();
    let mut archive = Evil::new().file("f", &"x".repeat(5000)).bytes();
    archive.truncate(2000);
    assert!(run(&archive, &into, Top::Named("f".to_owned())).is_err());
}

#[test]
fn a_file_may_replace_a_file_and_never_a_directory_or_a_pipe() {
    let (_scene, into) = scene();
    std::fs::write(into.join("f"), "old").unwrap();
    let archive = Evil::new().file("f", "new").bytes();
    run(&archive, &into, Top::Named("f".to_owned())).unwrap();
    assert_eq!(std::fs::read_to_string(into.join("f")).unwrap(), "new");
    std::fs::create_dir(into.join("d")).unwrap();
    assert!(run(&archive, &into, Top::Named("d".to_owned())).is_err());
}
