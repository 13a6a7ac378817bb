//! Debian's own kernel: fetched with apt, unpacked, complete. Needs apt's lists and its mirror.

use vistara_machine::boot::{BootError, KernelStore, LinuxPayload, UpperLayer};

#[test]
fn debians_own_kernel_is_fetched_and_complete() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(&dir.path().join("kernels")).unwrap();
    let kernel = match store.fetch_debian(None) {
        Ok(kernel) => kernel,
        Err(error @ (BootError::Absent { .. } | BootError::Command { .. })) => {
            println!("SKIP: Debian's kernel cannot be had here: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let record = &kernel.record;
    assert!(record.release.ends_with("-cloud-amd64"), "{record:?}");
    assert!(record.missing.is_empty(), "{record:?}");
    let names: Vec<&str> = record.modules.iter().map(|m| m.name.as_str()).collect();
    for name in [
        "virtio_mmio",
        "virtio_blk",
        "overlay",
        "virtio_net",
        "virtiofs",
        "virtio_rng",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert!(record.vmlinux_bytes > 10 << 20, "{record:?}");
    let payload = LinuxPayload::open(&dir.path().join("initramfs"), b"agent").unwrap();
    let boot = payload.prepare(&kernel, UpperLayer::Disk).unwrap();
    assert!(boot.initramfs.metadata().unwrap().len() > 100_000);
}
