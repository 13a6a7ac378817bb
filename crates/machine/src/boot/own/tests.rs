//! What of a build can be seen without the minutes that it takes; the rest is in `tests/vm_own_kernel.rs`.

use super::*;

#[test]
fn everything_that_goes_into_a_kernel_is_in_its_key() {
    let one = key("linux-source-6.1 6.1.1-1", "gcc 12\nmore");
    assert_eq!(one, key("linux-source-6.1 6.1.1-1", "gcc 12\nother words"));
    assert_ne!(one, key("linux-source-6.1 6.1.2-1", "gcc 12"));
    assert_ne!(one, key("linux-source-6.1 6.1.1-1", "gcc 13"));
}

#[test]
fn how_far_a_build_is_stays_below_its_end() {
    assert_eq!(percent(0), 0);
    assert_eq!(percent(FILES_EXPECTED / 2), 50);
    assert_eq!(percent(u32::MAX), 99);
}

#[test]
fn lines_are_counted_as_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut count = LineCount::default();
    assert_eq!(count.of(&path), 0);
    fs::write(&path, "one\ntw").unwrap();
    assert_eq!(count.of(&path), 1);
    fs::write(&path, "one\ntwo\nthree\n").unwrap();
    assert_eq!(count.of(&path), 3);
}

#[test]
fn a_directory_that_make_cannot_use_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    if !needs::missing().is_empty() || std::env::consts::ARCH != "x86_64" {
        println!("SKIP: this host cannot build kernels at all");
        return;
    }
    for name in ["with space", "it's", "a$b", "a#b", "a%b", "a:b", "a\nb"] {
        let options = OwnKernel {
            cache: dir.path().join(name),
            jobs: 1,
        };
        let error = build(&options, &mut |_| {}).unwrap_err();
        assert!(matches!(&error, BuildError::Place(_)), "{error}");
        assert!(error.hint().unwrap().contains("--cache"), "{error}");
        assert!(!options.cache.exists());
    }
}

#[test]
fn names_of_directories_are_letters_of_any_language_and_nothing_that_make_reads() {
    use std::os::unix::ffi::OsStrExt as _;
    let broken = std::ffi::OsStr::from_bytes(b"/a/\xff");
    assert!(check_place(Path::new(broken)).is_err());
    assert!(check_place(Path::new("/home/jürgen/x-1.2_+")).is_ok());
}

#[test]
fn a_result_of_which_a_file_is_missing_or_empty_has_not_been_built() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::hold(&dir.path().join("cache"), &mut || {}).unwrap();
    let place = cache.result("k");
    let found = || finished(&cache, "k", "source").unwrap();
    assert!(found().is_none());
    let files = [
        "vmlinux",
        "modules/modules.builtin",
        "config",
        "release",
        "unknown-options",
    ];
    let whole = || {
        fs::create_dir_all(place.join("modules")).unwrap();
        for name in files {
            fs::write(place.join(name), "6.1.9-vistara\n").unwrap();
        }
    };
    whole();
    assert_eq!(found().unwrap().release, "6.1.9-vistara");
    fs::write(place.join("unknown-options"), "").unwrap();
    assert!(found().is_some(), "every option may be known");
    for name in files {
        whole();
        fs::remove_file(place.join(name)).unwrap();
        assert!(found().is_none(), "without {name}");
        if name != "unknown-options" {
            fs::write(place.join(name), "").unwrap();
            assert!(found().is_none(), "with an empty {name}");
        }
    }
    cache.clear_results("k").unwrap();
    assert!(!place.exists(), "another can be put there");
}

#[test]
fn a_step_that_failed_for_want_of_room_says_so_with_what_failed() {
    let failed = || step("cannot compile the kernel")(BootError::Size("x".to_owned()));
    let dir = tempfile::tempdir().unwrap();
    if vistara_host::facts::disk_free(dir.path()).unwrap() < ROOM_MIN {
        println!("SKIP: this disk is full");
        return;
    }
    assert!(matches!(
        blame_room(dir.path(), failed()),
        BuildError::Step { .. }
    ));
    // A file system without any room.
    let full = blame_room(Path::new("/proc"), failed());
    assert!(full.to_string().contains("is full: 0 MiB"), "{full}");
    assert!(full.hint().unwrap().contains("--cache"), "{full}");
    let cause = std::error::Error::source(&full).unwrap().to_string();
    assert_eq!(cause, "cannot compile the kernel");
}

#[test]
fn missing_packages_are_told_with_the_command_that_installs_them() {
    let error = BuildError::Packages(vec!["flex", "bison"]);
    assert_eq!(
        error.hint().unwrap(),
        "sudo apt-get install --no-install-recommends flex bison"
    );
}
