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
    let options = OwnKernel {
        cache: dir.path().join("with space"),
        jobs: 1,
    };
    let error = build(&options, &mut |_| {}).unwrap_err();
    assert!(matches!(&error, BuildError::Place(_)), "{error}");
    assert!(error.hint().unwrap().contains("--cache"), "{error}");
    assert!(!options.cache.exists());
}

#[test]
fn missing_packages_are_told_with_the_command_that_installs_them() {
    let error = BuildError::Packages(vec!["flex", "bison"]);
    assert_eq!(
        error.hint().unwrap(),
        "sudo apt-get install --no-install-recommends flex bison"
    );
}
