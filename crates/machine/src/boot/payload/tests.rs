//! What a guest is booted with, made of a made-up kernel.

use super::*;
use crate::boot::{KernelStore, cpio, fixtures};

fn bench() -> (tempfile::TempDir, Kernel, LinuxPayload) {
    let dir = tempfile::tempdir().unwrap();
    let deb = dir.path().join("k.deb");
    fixtures::kernel_deb(&deb, "6.1.0-test", &[]);
    let store = KernelStore::open(&dir.path().join("kernels")).unwrap();
    let kernel = store.add(&deb, None, None).unwrap();
    let payload = LinuxPayload::open(&dir.path().join("cache"), b"agent").unwrap();
    (dir, kernel, payload)
}

#[test]
fn the_initramfs_holds_the_agent_the_console_and_the_modules_in_order() {
    let (_dir, kernel, payload) = bench();
    let boot = payload.prepare(&kernel, UpperLayer::Disk).unwrap();
    let entries = cpio::tests::read(&fs::read(&boot.initramfs).unwrap());
    let find = |name: &str| entries.iter().find(|(n, _, _)| n == name).unwrap();
    assert_eq!(find("init").1, 0o100_755);
    assert_eq!(find("init").2, b"agent");
    assert_eq!(find("dev/console").1, 0o020_600);
    let order = String::from_utf8(find("modules/order").2.clone()).unwrap();
    assert_eq!(order.lines().count(), 17);
    for line in order.lines() {
        let (_, file) = line.split_once(' ').unwrap();
        assert!(!find(&format!("modules/{file}")).2.is_empty());
    }
    assert_eq!(boot.kernel, kernel.vmlinux());
}

#[test]
fn what_is_planned_is_what_is_prepared_and_writes_nothing() {
    let (dir, kernel, payload) = bench();
    let planned = payload.planned(&kernel, UpperLayer::Disk);
    let written = fs::read_dir(dir.path().join("cache")).unwrap().count();
    assert_eq!(written, 0);
    let prepared = payload.prepare(&kernel, UpperLayer::Disk);
    assert_eq!(planned, prepared.unwrap());
}

#[test]
fn the_command_line_tells_the_agent_where_things_are() {
    let (_dir, kernel, payload) = bench();
    for (upper, word) in [
        (UpperLayer::Disk, "vistara.overlay=/dev/vdb"),
        (UpperLayer::Memory, "vistara.overlay=tmpfs"),
    ] {
        let boot = payload.prepare(&kernel, upper).unwrap();
        let words: Vec<&str> = boot.cmdline.split(' ').collect();
        for expected in [
            word,
            "vistara.root=/dev/vda",
            "vistara.channel=virtio-serial",
            "panic=-1",
        ] {
            assert!(words.contains(&expected), "{expected} in {}", boot.cmdline);
        }
    }
}

#[test]
fn one_initramfs_serves_all_machines_until_agent_or_kernel_change() {
    let (dir, mut kernel, payload) = bench();
    let path = |kernel: &Kernel| payload.prepare(kernel, UpperLayer::Disk).unwrap().initramfs;
    let first = path(&kernel);
    let made = fs::metadata(&first).unwrap();
    assert_eq!(path(&kernel), first);
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(fs::metadata(&first).unwrap().ino(), made.ino());
    // Whoever runs a monitor as a user of its own shows it this very file.
    assert_eq!(made.mode() & 0o777, 0o644);
    // Earlier versions kept theirs from others.
    fs::set_permissions(&first, Permissions::from_mode(0o600)).unwrap();
    path(&kernel);
    assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o644);
    let newer = LinuxPayload::open(&dir.path().join("cache"), b"agent 2").unwrap();
    let other = newer.prepare(&kernel, UpperLayer::Disk).unwrap();
    assert_ne!(other.initramfs, first);
    kernel.record.vmlinux_sha256 = "other".into();
    assert_ne!(path(&kernel), first);
    assert_eq!(fs::read_dir(dir.path().join("cache")).unwrap().count(), 3);
}

#[test]
fn images_used_long_ago_are_removed_beyond_the_number_kept() {
    let (dir, kernel, payload) = bench();
    let cache = dir.path().join("cache");
    let long_ago = SystemTime::now() - 2 * INITRAMFS_FRESH;
    for index in 0..INITRAMFS_KEPT + 3 {
        let file = fs::File::create(cache.join(format!("old{index}.cpio"))).unwrap();
        file.set_modified(long_ago).unwrap();
    }
    let boot = payload.prepare(&kernel, UpperLayer::Disk).unwrap();
    assert_eq!(fs::read_dir(&cache).unwrap().count(), INITRAMFS_KEPT);
    assert!(boot.initramfs.exists());
}
