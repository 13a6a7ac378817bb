//! The kernel store, with made-up kernels. Debian's own is in `tests/vm_kernel.rs`.

use super::*;
use crate::boot::fixtures;

struct Bench {
    dir: tempfile::TempDir,
    store: KernelStore,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(&dir.path().join("kernels")).unwrap();
    Bench { dir, store }
}

impl Bench {
    fn deb(&self, release: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{release}.deb"));
        fixtures::kernel_deb(&path, release, &[]);
        path
    }
    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, data).unwrap();
        path
    }
    /// Nothing but kernels and the pointer: no scratch is left.
    fn assert_tidy(&self) {
        for entry in fs::read_dir(self.dir.path().join("kernels")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".new-"), "{name} is left");
        }
    }
}

#[test]
fn a_debian_package_becomes_a_kernel_and_the_first_is_the_default() {
    let bench = bench();
    assert_eq!(bench.store.default_kernel().unwrap(), None);
    let kernel = bench
        .store
        .add(&bench.deb("6.1.0-9-cloud"), None, None)
        .unwrap();
    assert_eq!(kernel.record.name, "6.1.0-9-cloud");
    assert_eq!(kernel.record.release, "6.1.0-9-cloud");
    assert_eq!(kernel.record.source, "6.1.0-9-cloud.deb");
    assert_eq!(kernel.record.modules.len(), 17);
    assert!(kernel.modules().join("virtio_rng.ko").exists());
    assert!(kernel.is_default);
    let vmlinux = fs::read(kernel.vmlinux()).unwrap();
    assert_eq!(
        hex::encode(Sha256::digest(&vmlinux)),
        kernel.record.vmlinux_sha256
    );
    assert_eq!(bench.store.default_kernel().unwrap(), Some(kernel.clone()));
    assert_eq!(bench.store.list().unwrap(), [kernel]);
    bench.assert_tidy();
}

#[test]
fn a_kernel_of_an_older_version_tells_what_was_not_looked_for() {
    let bench = bench();
    let deb = bench.deb("6.1.0-9-cloud");
    let kernel = bench.store.add(&deb, None, None).unwrap();
    assert_eq!(kernel.stages_not_looked_for(), [] as [&str; 0]);
    // A record as it was written before there was the stage, and one from before stages were recorded at all.
    let path = kernel.dir.join("record.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    let stages = record["stages"].as_array_mut().unwrap();
    stages.retain(|stage| stage != "vsock");
    fs::write(&path, record.to_string()).unwrap();
    let kernel = bench.store.get("6.1.0-9-cloud").unwrap();
    assert_eq!(kernel.stages_not_looked_for(), ["vsock"]);
    record.as_object_mut().unwrap().remove("stages");
    fs::write(&path, record.to_string()).unwrap();
    let kernel = bench.store.get("6.1.0-9-cloud").unwrap();
    assert!(kernel.stages_not_looked_for().contains(&"boot"));
    let kernel = bench.store.add(&deb, None, None).unwrap();
    assert_eq!(kernel.stages_not_looked_for(), [] as [&str; 0]);
}

#[test]
fn a_bzimage_and_a_vmlinux_of_ones_own_need_no_modules() {
    let bench = bench();
    let vmlinux = fixtures::vmlinux("6.12.1", true);
    let image = bench.file(
        "bzImage",
        &fixtures::bzimage(&fixtures::lz4_legacy(&vmlinux)),
    );
    let one = bench.store.add(&image, None, Some("mine")).unwrap();
    let plain = bench.file("vmlinux", &vmlinux);
    let two = bench.store.add(&plain, None, None).unwrap();
    assert_eq!(one.record.vmlinux_sha256, two.record.vmlinux_sha256);
    assert_eq!(
        (two.record.name.as_str(), two.is_default),
        ("6.12.1", false)
    );
    assert!(one.record.modules.is_empty());
}

#[test]
fn a_kernel_of_the_same_name_is_replaced_as_a_whole() {
    let bench = bench();
    bench
        .store
        .add(&bench.deb("6.1.0-9"), None, Some("k"))
        .unwrap();
    let image = bench.file("vmlinux", &fixtures::vmlinux("6.2", true));
    let new = bench.store.add(&image, None, Some("k")).unwrap();
    assert_eq!(new.record.release, "6.2");
    assert!(!new.modules().join("virtio.ko").exists());
    assert_eq!(bench.store.list().unwrap().len(), 1);
    bench.assert_tidy();
}

#[test]
fn removing_the_default_makes_the_last_one_added_the_default() {
    let bench = bench();
    bench
        .store
        .add(&bench.deb("6.1.0-1"), None, Some("a"))
        .unwrap();
    bench
        .store
        .add(&bench.deb("6.1.0-2"), None, Some("b"))
        .unwrap();
    bench.store.remove("a").unwrap();
    assert_eq!(
        bench.store.default_kernel().unwrap().unwrap().record.name,
        "b"
    );
    bench.store.remove("b").unwrap();
    assert_eq!(bench.store.default_kernel().unwrap(), None);
    let error = bench.store.remove("b").unwrap_err();
    assert_eq!(error.to_string(), "there is no kernel \"b\"; known: none");
    bench.assert_tidy();
}

#[test]
fn the_default_is_what_was_set() {
    let bench = bench();
    bench
        .store
        .add(&bench.deb("6.1.0-1"), None, Some("a"))
        .unwrap();
    bench
        .store
        .add(&bench.deb("6.1.0-2"), None, Some("b"))
        .unwrap();
    bench.store.set_default("b").unwrap();
    assert!(bench.store.get("b").unwrap().is_default);
    let error = bench.store.set_default("c").unwrap_err();
    assert!(error.to_string().contains("known: a, b"), "{error}");
}

#[test]
fn our_own_kernel_becomes_the_default_unless_its_owner_chose_another() {
    let bench = bench();
    let own = bench.file("vmlinux", &fixtures::vmlinux("6.1.9-vistara", true));
    let default = || bench.store.default_kernel().unwrap().unwrap().record.name;
    let debian = bench.deb("6.1.0-1");
    bench.store.add(&debian, None, Some("debian")).unwrap();
    assert!(bench.store.add(&own, None, Some("own")).unwrap().is_default);
    // It stays so when others come.
    bench.store.add(&debian, None, Some("later")).unwrap();
    assert_eq!(default(), "own");
    bench.store.set_default("debian").unwrap();
    let newer = bench.store.add(&own, None, Some("newer")).unwrap();
    assert!(!newer.is_default, "another was chosen");
    assert_eq!(default(), "debian");
    // What was chosen is gone, and the choice with it.
    bench.store.remove("debian").unwrap();
    assert_ne!(default(), "later", "our own come first");
    bench.store.set_default("later").unwrap();
    bench.store.remove("later").unwrap();
    bench.store.add(&debian, None, Some("later")).unwrap();
    assert!(bench.store.add(&own, None, Some("own")).unwrap().is_default);
    bench.assert_tidy();
}

#[test]
fn what_was_chosen_and_removed_is_not_chosen_when_it_comes_back() {
    let bench = bench();
    let own = bench.file("vmlinux", &fixtures::vmlinux("6.1.9-vistara", true));
    let debian = bench.deb("6.1.0-1");
    bench.store.add(&debian, None, Some("debian")).unwrap();
    bench.store.set_default("debian").unwrap();
    bench.store.remove("debian").unwrap();
    let again = bench.store.add(&debian, None, Some("debian")).unwrap();
    assert!(again.is_default);
    assert!(bench.store.add(&own, None, Some("own")).unwrap().is_default);
    bench.assert_tidy();
}

#[test]
fn what_is_built_in_is_looked_for_in_the_list_of_it() {
    let bench = bench();
    let image = bench.file("vmlinux", &fixtures::vmlinux("6.1.9-vistara", true));
    let modules = bench.dir.path().join("list");
    fs::create_dir(&modules).unwrap();
    let list = |names: &[&str]| {
        let lines: String = names
            .iter()
            .map(|name| format!("kernel/x/{name}.ko\n"))
            .collect();
        fs::write(modules.join("modules.builtin"), lines).unwrap();
        bench.store.add(&image, Some(&modules), Some("own"))
    };
    let debian = bench.deb("6.1.0-1");
    bench.store.add(&debian, None, Some("debian")).unwrap();
    let boot = [
        "virtio_ring",
        "virtio",
        "virtio_mmio",
        "virtio_console",
        "virtio_blk",
        "squashfs",
        "ext4",
        "overlay",
    ];
    let some = list(&boot).unwrap();
    assert!(!some.is_default, "some machines would not do with it");
    let some = some.record;
    assert!(some.modules.is_empty(), "{some:?}");
    assert!(some.missing.contains(&"virtiofs".to_owned()), "{some:?}");
    let error = list(&boot[1..]).unwrap_err().to_string();
    assert!(error.contains("lacks virtio_ring"), "{error}");
}

#[test]
fn what_cannot_be_booted_is_refused_and_leaves_nothing() {
    let bench = bench();
    let add = |name: &str, data: &[u8]| {
        let path = bench.file(name, data);
        bench
            .store
            .add(&path, None, Some("x"))
            .unwrap_err()
            .to_string()
    };
    let plain = add("vmlinux", &fixtures::vmlinux("6.1", false));
    assert!(plain.contains("CONFIG_PVH"), "{plain}");
    let text = add("README", b"hello");
    assert!(text.contains("give a Debian package"), "{text}");
    let image = fixtures::bzimage(&fixtures::lz4_legacy(&fixtures::vmlinux("6.1", true)));
    let cut = add("bzImage", &image[..image.len() - 100]);
    assert!(cut.contains("cut short"), "{cut}");
    let missing = bench.dir.path().join("missing.deb");
    fixtures::kernel_deb(&missing, "6.1", &["virtio_blk"]);
    let error = bench
        .store
        .add(&missing, None, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("lacks virtio_blk"), "{error}");
    assert!(bench.store.list().unwrap().is_empty());
    bench.assert_tidy();
}

#[test]
fn names_that_would_be_paths_are_refused() {
    let bench = bench();
    let deb = bench.deb("6.1");
    for bad in ["", ".default", "../x", "a/b", "a b", &"x".repeat(101)] {
        assert!(bench.store.add(&deb, None, Some(bad)).is_err(), "{bad:?}");
        assert!(bench.store.get(bad).is_err(), "{bad:?}");
        assert!(bench.store.remove(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_record_of_another_format_says_what_to_do() {
    let bench = bench();
    let kernel = bench.store.add(&bench.deb("6.1"), None, Some("k")).unwrap();
    let path = kernel.dir.join("record.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let error = bench.store.get("k").unwrap_err().to_string();
    assert!(error.contains("add the kernel again"), "{error}");
}
