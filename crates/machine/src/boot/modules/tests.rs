//! Which modules are found, in which order, and what is said of those that are not.

use super::*;
use crate::boot::fixtures;
use std::fs;

fn tree(except: &[&str], builtin: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, data) in fixtures::modules("6.1", except) {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
    if let Some(text) = builtin {
        fs::write(dir.path().join("modules.builtin"), text).unwrap();
    }
    dir
}

const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\nkernel/drivers/char/hw_random/rng-core.ko\n";

fn resolve(dir: &tempfile::TempDir) -> Result<Resolved, BootError> {
    ModuleIndex::scan(dir.path())?.resolve("test")
}

#[test]
fn a_module_comes_after_all_that_it_depends_on() {
    let resolved = resolve(&tree(&[], Some(BUILTIN))).unwrap();
    let names: Vec<&str> = resolved
        .modules
        .iter()
        .map(|(m, _)| m.name.as_str())
        .collect();
    for (index, (_, data)) in resolved.modules.iter().enumerate() {
        for depended in elf::module_depends(data).unwrap() {
            let found = names[..index].contains(&depended.as_str());
            assert!(
                found || depended == "rng_core",
                "{depended} before {}",
                names[index]
            );
        }
    }
    assert!(!names.contains(&"unneeded"));
    assert!(resolved.missing.is_empty());
    let modules: Vec<StagedModule> = resolved.modules.into_iter().map(|(m, _)| m).collect();
    let order = order_file(&modules);
    assert!(
        order.starts_with("boot virtio_ring.ko\nboot virtio.ko\n"),
        "{order}"
    );
    assert!(order.contains("\nrng virtio_rng.ko\n"), "{order}");
}

#[test]
fn what_the_boot_needs_must_be_there_and_the_rest_is_reported() {
    let error = resolve(&tree(&["overlay"], Some(BUILTIN))).unwrap_err();
    assert!(error.to_string().contains("overlay"), "{error}");
    let resolved = resolve(&tree(&["net_failover", "fuse/fuse"], Some(BUILTIN))).unwrap();
    assert_eq!(resolved.missing, ["fuse", "net_failover"]);
    let names: Vec<&str> = resolved
        .modules
        .iter()
        .map(|(m, _)| m.name.as_str())
        .collect();
    assert!(
        names.contains(&"failover") && !names.contains(&"virtio_net"),
        "{names:?}"
    );
}

#[test]
fn without_a_list_of_what_is_built_in_absent_modules_are_taken_to_be() {
    let resolved = resolve(&tree(&["overlay"], None)).unwrap();
    assert!(resolved.modules.iter().all(|(m, _)| m.name != "overlay"));
    let none = ModuleIndex::default().resolve("test").unwrap();
    assert_eq!(none, Resolved::default());
}

#[test]
fn compressed_modules_and_circles_are_no_trouble() {
    let dir = tree(&["squashfs", "overlay"], Some(BUILTIN));
    let write = |name: &str, data: &[u8]| fs::write(dir.path().join(name), data).unwrap();
    write(
        "squashfs.ko.zst",
        &zstd::encode_all(&fixtures::module("overlay")[..], 1).unwrap(),
    );
    write("overlay.ko", &fixtures::module("squashfs"));
    let resolved = resolve(&dir).unwrap();
    let names: Vec<&str> = resolved
        .modules
        .iter()
        .map(|(m, _)| m.name.as_str())
        .collect();
    assert_eq!(names.iter().filter(|name| **name == "overlay").count(), 1);
    assert_eq!(names.iter().filter(|name| **name == "squashfs").count(), 1);
}

#[test]
fn a_module_that_is_no_elf_file_is_named() {
    let dir = tree(&["squashfs"], Some(BUILTIN));
    fs::write(dir.path().join("squashfs.ko"), "not a module").unwrap();
    let error = resolve(&dir).unwrap_err();
    assert!(error.to_string().contains("squashfs.ko"), "{error}");
}

#[test]
fn a_long_chain_of_dependencies_ends_in_an_error() {
    let dir = tree(&["squashfs"], Some(BUILTIN));
    let write = |name: &str, depends: &str| {
        fs::write(
            dir.path().join(format!("{name}.ko")),
            fixtures::module(depends),
        )
        .unwrap();
    };
    write("squashfs", "m0");
    for index in 0..1000 {
        write(&format!("m{index}"), &format!("m{}", index + 1));
    }
    let error = resolve(&dir).unwrap_err();
    assert!(error.to_string().contains("dependencies"), "{error}");
}
