//! Nanos kernels and the choice of hypervisor through the interface: real programs in small images, a kernel that only
//! looks like one, and machines that are never started.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use futures_util::StreamExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{TestNode, can_make_disks, fake};
use vistara_api::{AddKernelRequest, ClientError, Explanation, ImageEvent, RunRequest};

const PLAIN: &str = "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n";
const FORKS: &str = "#include <unistd.h>\n#include <sys/wait.h>\nint main(void) { if (fork() == 0) execl(\"/bin/x\", \"x\", (char *)0); wait(0); return 0; }\n";

/// A file that is taken for a Nanos kernel: one loaded segment and the note with its entry.
fn kernel() -> Vec<u8> {
    let body = b"\x000.1.99\0NVMTFS\0KLOG\0";
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0\x23\x01\x20\0");
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    for (at, value) in [(18, 62_u16), (32, 64), (54, 56), (56, 2)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let mut offset = 64 + 2 * 56;
    for (kind, length) in [(1_u8, body.len()), (4, note.len())] {
        let mut header = vec![0; 56];
        header[0] = kind;
        header[8] = offset as u8;
        header[32] = length as u8;
        header[40] = length as u8;
        file.extend(header);
        offset += length;
    }
    file.extend(body);
    file.extend(note);
    file
}

/// A tar of these files, all executable.
fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, path.trim_start_matches('/'), &content[..])
            .unwrap();
    }
    tar.into_inner().unwrap()
}

/// The program made of this source, linked statically; nothing, said aloud, without a compiler.
fn compiled(dir: &Path, name: &str, source: &str) -> Option<Vec<u8>> {
    let (from, to) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&from, source).unwrap();
    let built = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .args([&to, &from])
        .output();
    match built {
        Ok(output) if output.status.success() => Some(std::fs::read(to).unwrap()),
        _ => {
            println!("SKIP: no C compiler that links statically (apt-get install gcc libc6-dev)");
            None
        }
    }
}

/// This host's program with all that it loads; nothing where it is not here.
fn with_libraries(program: &str) -> Option<Vec<(String, Vec<u8>)>> {
    let real = std::fs::canonicalize(program).ok()?;
    let listed = Command::new("ldd").arg(&real).output().ok()?;
    let listed = String::from_utf8(listed.stdout).ok()?;
    let mut files = vec![(program.to_owned(), std::fs::read(&real).ok()?)];
    for word in listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        files.push((word.to_owned(), std::fs::read(word).ok()?));
    }
    Some(files)
}

struct Bench {
    node: TestNode,
    dir: tempfile::TempDir,
}

impl Bench {
    /// A node with an image `test` of these files.
    async fn new(files: &[(&str, Vec<u8>)]) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let node = TestNode::start(dir.path(), fake()).await;
        let bench = Bench { node, dir };
        bench.import(files).await;
        bench
    }

    async fn import(&self, files: &[(&str, Vec<u8>)]) {
        let bytes = std::io::Cursor::new(tar(files));
        let events = self.node.client.import(Some("test"), bytes).await.unwrap();
        let events: Vec<_> = events.collect().await;
        let last = events.into_iter().last().unwrap().unwrap();
        assert!(matches!(last, ImageEvent::Done { .. }), "{last:?}");
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn request(&self, name: Option<&str>) -> AddKernelRequest {
        AddKernelRequest {
            source: self.file("kernel.img", &kernel()).display().to_string(),
            payload: Some("nanos".to_owned()),
            name: name.map(str::to_owned),
            ..AddKernelRequest::default()
        }
    }

    async fn add_kernel(&self) {
        let kernel = self.node.client.add_kernel(&self.request(None)).await;
        let kernel = kernel.unwrap();
        assert_eq!(
            (&kernel.name[..], &kernel.payload[..]),
            ("nanos-0.1.99", "nanos")
        );
        assert_eq!((&kernel.version[..], kernel.default), ("0.1.99", true));
    }

    async fn explain(&self, command: &[&str]) -> Explanation {
        self.explain_with(command, |_| {}).await.unwrap()
    }

    async fn explain_with(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut RunRequest),
    ) -> Result<Explanation, ClientError> {
        let mut request = RunRequest {
            image: "test".to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            ..RunRequest::default()
        };
        change(&mut request);
        self.node.client.explain(&request).await
    }
}

fn chosen(explanation: &Explanation) -> (&str, &str) {
    let choice = &explanation.choice;
    (&choice.hypervisor, &choice.payload)
}

#[tokio::test]
async fn a_program_of_its_own_gets_a_unikernel_where_there_is_a_kernel_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(plain) = compiled(dir.path(), "plain", PLAIN) else {
        return;
    };
    if !can_make_disks() {
        return;
    }
    let bench = Bench::new(&[("bin/plain", plain)]).await;
    let without = bench.explain(&["/bin/plain"]).await;
    assert_eq!(chosen(&without), ("qemu", "linux"));
    let reasons = without.choice.reasons.join("\n");
    assert!(reasons.contains("no Nanos kernel"), "{reasons}");
    let facts = without.program.unwrap();
    assert_eq!((&facts.kind[..], &facts.file[..]), ("elf", "/bin/plain"));
    assert_eq!(facts.linkage.as_deref(), Some("static"));
    assert_eq!(facts.may_create, "no");
    let refused = bench.explain_with(&["/bin/plain"], |request| {
        request.hypervisor = Some("nanovms".to_owned());
    });
    let refused = refused.await.unwrap_err();
    let hint = refused.body().unwrap().hint.clone().unwrap();
    assert!(hint.contains("vistara kernel add nanos FILE"), "{hint}");

    bench.add_kernel().await;
    let with = bench.explain(&["/bin/plain"]).await;
    assert_eq!(chosen(&with), ("nanovms", "nanos"));
    assert_eq!(with.memory_bytes, 128 << 20);
    assert_eq!(with.start, "boots (unikernels have no templates)");
    let lonely = bench.explain_with(&["/bin/plain"], |request| {
        request.network = Some("none".to_owned());
    });
    assert_eq!(lonely.await.unwrap().memory_bytes, 64 << 20);
    let small = bench.explain_with(&["/bin/plain"], |request| {
        request.memory = Some("96m".to_owned());
    });
    let small = small.await.unwrap();
    assert_eq!(chosen(&small), ("qemu", "linux"));
    assert_eq!(small.memory_bytes, 96 << 20);
    let terminal = bench.explain_with(&["/bin/plain"], |request| request.stdin = true);
    assert_eq!(chosen(&terminal.await.unwrap()), ("qemu", "linux"));
}

#[tokio::test]
async fn scripts_interpreters_and_programs_that_fork_get_linux() {
    let dir = tempfile::tempdir().unwrap();
    let Some(forks) = compiled(dir.path(), "forks", FORKS) else {
        return;
    };
    if !can_make_disks() {
        return;
    }
    let mut files = vec![
        ("/bin/forks".to_owned(), forks.clone()),
        ("/bin/sh".to_owned(), forks),
        (
            "/bin/script".to_owned(),
            b"#!/bin/sh\necho hello\n".to_vec(),
        ),
    ];
    let python = with_libraries("/usr/bin/python3");
    if python.is_none() {
        println!(
            "SKIP: no /usr/bin/python3 (apt-get install python3); the other programs are tried"
        );
    }
    files.extend(python.clone().unwrap_or_default());
    let files: Vec<(&str, Vec<u8>)> = files
        .iter()
        .map(|(path, content)| (&path[..], content.clone()))
        .collect();
    let bench = Bench::new(&files).await;
    bench.add_kernel().await;
    let expect = async |program: &str, kind: &str, because: &str| {
        let explanation = bench.explain(&[program]).await;
        assert_eq!(chosen(&explanation), ("qemu", "linux"), "{program}");
        let reasons = explanation.choice.reasons.join("\n");
        assert!(reasons.contains(because), "{program}: {reasons}");
        let facts = explanation.program.unwrap();
        assert_eq!(facts.kind, kind, "{program}");
        facts
    };
    let forks = expect("/bin/forks", "elf", "may make processes").await;
    assert_eq!(forks.may_create, "yes");
    assert!(!forks.evidence.is_empty());
    let script = expect("/bin/script", "script", "is a script for /bin/sh").await;
    assert_eq!(script.executable, "/bin/sh");
    expect("/bin/nothing", "missing", "the image has no").await;
    if python.is_some() {
        let python = expect("/usr/bin/python3", "elf", "process").await;
        assert!(python.runtimes.contains(&"Python".to_owned()), "{python:?}");
        assert!(python.libraries > 0);
    }
    let refused = bench.explain_with(&["/bin/script"], |request| {
        request.hypervisor = Some("nanovms".to_owned());
    });
    let refused = refused.await.unwrap_err().to_string();
    assert!(refused.contains("is a script"), "{refused}");
}

#[tokio::test]
async fn kernels_of_both_kinds_share_their_names_and_have_a_default_each() {
    if !can_make_disks() {
        return;
    }
    let bench = Bench::new(&[("bin/x", Vec::new())]).await;
    let client = &bench.node.client;
    bench.add_kernel().await;
    let second = client.add_kernel(&bench.request(Some("second"))).await;
    assert!(!second.unwrap().default);
    client.default_kernel("second").await.unwrap();
    let defaults = async || {
        let kernels = client.kernels().await.unwrap();
        let defaults = kernels.into_iter().filter(|kernel| kernel.default);
        defaults.map(|kernel| kernel.name).collect::<Vec<_>>()
    };
    assert_eq!(defaults().await, ["second"]);
    let need = async || {
        let report = client.doctor(false).await.unwrap();
        let mut needs = report.needs.into_iter();
        needs.find(|need| need.name == "nanos-kernel").unwrap()
    };
    let there = need().await;
    assert_eq!((&there.state[..], there.mend), ("works", None));
    client.remove_kernel("second").await.unwrap();
    assert_eq!(defaults().await, ["nanos-0.1.99"]);
    client.remove_kernel("nanos-0.1.99").await.unwrap();
    let absent = need().await;
    assert_eq!(absent.state, "absent");
    assert_eq!(
        absent.mend.as_deref(),
        Some("vistara kernel add nanos FILE")
    );
    let unknown = client
        .remove_kernel("second")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        unknown.contains("there is no kernel \"second\""),
        "{unknown}"
    );
}

#[tokio::test]
async fn what_is_no_nanos_kernel_is_refused_with_the_reason() {
    if !can_make_disks() {
        return;
    }
    let bench = Bench::new(&[("bin/x", Vec::new())]).await;
    let refused = async |change: &dyn Fn(&mut AddKernelRequest)| {
        let mut request = bench.request(None);
        change(&mut request);
        let error = bench.node.client.add_kernel(&request).await.unwrap_err();
        error.body().unwrap().message.clone()
    };
    let text = bench.file("text", b"hello").display().to_string();
    let text = refused(&|request| request.source.clone_from(&text)).await;
    assert!(text.contains("no usable Nanos kernel"), "{text}");
    let relative = refused(&|request| request.source = "kernel.img".to_owned()).await;
    assert!(relative.contains("not an absolute path"), "{relative}");
    let payload = refused(&|request| request.payload = Some("hurd".to_owned())).await;
    assert!(payload.contains("write linux or nanos"), "{payload}");
    let modules = refused(&|request| request.modules_dir = Some("/lib".to_owned())).await;
    assert!(modules.contains("for Linux kernels"), "{modules}");
    assert!(bench.node.client.kernels().await.unwrap().is_empty());
}
