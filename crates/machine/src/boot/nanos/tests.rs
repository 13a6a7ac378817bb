//! Nanos kernels in the store, made up ones and, where it is there, a real one.

use super::*;
use crate::boot::fixtures;

struct Bench {
    dir: tempfile::TempDir,
    store: NanosKernels,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let store = NanosKernels::open(&dir.path().join("nanos")).unwrap();
    Bench { dir, store }
}

impl Bench {
    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, data).unwrap();
        path
    }
    fn kernel(&self, text: &str) -> PathBuf {
        self.file(text, &fixtures::nanos_kernel(text))
    }
    fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("nanos")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn a_kernel_is_kept_with_a_copy_for_firecracker_and_the_first_is_the_default() {
    let bench = bench();
    assert_eq!(bench.store.default_kernel().unwrap(), None);
    let file = bench.kernel("0.1.55");
    let kernel = bench.store.add(&file, None, None).unwrap();
    assert_eq!(kernel.record.name, "nanos-0.1.55");
    assert_eq!(kernel.record.version, "0.1.55");
    assert_eq!(kernel.record.source, "0.1.55");
    assert_eq!(kernel.klibs, None);
    let given = fs::read(file).unwrap();
    assert_eq!(fs::read(&kernel.path).unwrap(), given);
    assert_eq!(
        hex::encode(Sha256::digest(&given)),
        kernel.record.kernel_sha256
    );
    let copy = fs::read(&kernel.firecracker_path).unwrap();
    assert!(KernelFacts::read(&given).unwrap().pvh_entry.is_some());
    assert_eq!(KernelFacts::read(&copy).unwrap().pvh_entry, None);
    for path in [&kernel.path, &kernel.firecracker_path] {
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }
    assert_eq!(bench.store.default_kernel().unwrap(), Some(kernel.clone()));
    assert_eq!(bench.store.list().unwrap(), [kernel]);
    assert_eq!(bench.entries(), [".default", "nanos-0.1.55"]);
}

#[test]
fn without_a_version_in_the_file_its_digest_stands_for_it() {
    let bench = bench();
    let kernel = bench.store.add(&bench.kernel("other"), None, None).unwrap();
    let version = &kernel.record.kernel_sha256[..12];
    assert_eq!(kernel.record.version, version);
    assert_eq!(kernel.record.name, format!("nanos-{version}"));
}

#[test]
fn modules_come_along_and_what_lies_deeper_does_not() {
    let bench = bench();
    bench.file("klibs/tls", b"\x7fELF tls");
    bench.file("klibs/ntp", b"\x7fELF ntp");
    let dir = bench.file("klibs/test/mock", b"text");
    let dir = dir.parent().unwrap().parent().unwrap();
    let file = bench.kernel("k");
    let kernel = bench.store.add(&file, Some(dir), Some("k")).unwrap();
    assert_eq!(kernel.record.klibs, ["ntp", "tls"]);
    let klibs = kernel.klibs.unwrap();
    assert_eq!(fs::read(klibs.join("tls")).unwrap(), b"\x7fELF tls");
    let empty = bench.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let refused = bench.store.add(&file, Some(&empty), Some("l")).unwrap_err();
    assert!(refused.to_string().contains("has no files"), "{refused}");
    let text = bench.file("text/README", b"hello");
    let refused = bench.store.add(&file, text.parent(), Some("l"));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("not an ELF file"), "{refused}");
    assert_eq!(bench.store.list().unwrap().len(), 1);
}

#[test]
fn what_is_no_nanos_kernel_is_refused_and_leaves_nothing() {
    let bench = bench();
    let add = |name: &str, data: &[u8]| {
        let file = bench.file(name, data);
        let refused = bench.store.add(&file, None, None).unwrap_err();
        refused.to_string()
    };
    let linux = add("vmlinux", &fixtures::vmlinux("6.1", true));
    assert!(linux.contains("no usable Nanos kernel"), "{linux}");
    let text = add("README", b"hello");
    assert!(text.contains("not a 64-bit little-endian ELF"), "{text}");
    let whole = fixtures::nanos_kernel("k");
    let cut = add("cut", &whole[..whole.len() - 1]);
    assert!(cut.contains("cut short or damaged"), "{cut}");
    let for_firecracker = add("copy", &neutralise_pvh_note(&whole).unwrap());
    assert!(for_firecracker.contains("PVH"), "{for_firecracker}");
    let huge = bench.dir.path().join("huge");
    let file = fs::File::create(&huge).unwrap();
    file.set_len(KERNEL_BYTES_MAX as u64 + 1).unwrap();
    assert!(bench.store.add(&huge, None, None).is_err());
    assert!(bench.store.add(Path::new("/nowhere"), None, None).is_err());
    assert!(
        bench
            .store
            .add(&bench.kernel("k"), None, Some("../k"))
            .is_err()
    );
    assert!(bench.entries().is_empty());
}

#[test]
fn the_default_is_what_was_set_or_the_last_one_added() {
    let bench = bench();
    for name in ["a", "b", "c"] {
        bench
            .store
            .add(&bench.kernel(name), None, Some(name))
            .unwrap();
    }
    let default = || {
        let kernel = bench.store.default_kernel().unwrap();
        kernel.map(|kernel| kernel.record.name)
    };
    assert_eq!(default().as_deref(), Some("a"));
    bench.store.set_default("b").unwrap();
    assert_eq!(default().as_deref(), Some("b"));
    bench.store.remove("b").unwrap();
    assert!(default().is_some());
    bench.store.remove("a").unwrap();
    assert_eq!(default().as_deref(), Some("c"));
    bench.store.remove("c").unwrap();
    assert_eq!(default(), None);
    let error = bench.store.remove("c").unwrap_err().to_string();
    assert_eq!(error, "there is no kernel \"c\"; known: none");
    assert!(bench.entries().is_empty());
}

#[test]
fn a_record_of_another_format_says_what_to_do() {
    let bench = bench();
    let kernel = bench
        .store
        .add(&bench.kernel("k"), None, Some("k"))
        .unwrap();
    let path = kernel.path.with_file_name("record.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let error = bench.store.get("k").unwrap_err().to_string();
    assert!(error.contains("add the kernel again"), "{error}");
}

#[test]
fn a_real_kernel_with_its_modules_is_taken() {
    let dir = Path::new("/opt/vistara/nanos");
    let kernel = dir.join("kernel.img");
    if !kernel.exists() {
        println!("SKIP: no Nanos kernel at {}", kernel.display());
        return;
    }
    let bench = bench();
    let klibs = dir.join("klibs");
    let klibs = klibs.exists().then_some(klibs);
    let kernel = bench.store.add(&kernel, klibs.as_deref(), None).unwrap();
    assert!(kernel.record.loaded_bytes > 1 << 20);
    assert_eq!(kernel.klibs.is_some(), klibs.is_some());
}
