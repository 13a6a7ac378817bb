//! Facts of real programs: those of this host and some that are compiled here, in root file systems made at test time.
//!
//! A program or compiler that is not here is skipped, and the test says so.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Tar, has_packer};
use vistara_image::{Asked, Image, ImageStore, Limits, NanosKind, ProgressSink, Selection, Wishes};
use vistara_model::{
    Confidence, Correction, EnvVar, ImageConfig, ImageFacts, Linkage, MayCreate, ProgramKind,
    Runtime,
};

/// A root file system that is made of this host's files.
#[derive(Default)]
struct Rootfs {
    done: BTreeSet<String>,
    tar: Tar,
}

impl Rootfs {
    /// Adds a path of the host with all links that lead to it, at the same place.
    fn host(&mut self, path: &str) {
        let mut at = String::new();
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        for (index, part) in parts.iter().enumerate() {
            at = format!("{at}/{part}");
            let Ok(meta) = fs::symlink_metadata(&at) else {
                return;
            };
            if meta.is_symlink() {
                let target = fs::read_link(&at).unwrap();
                let target = target.to_str().unwrap();
                if self.done.insert(at.clone()) {
                    self.tar = std::mem::take(&mut self.tar).symlink(&at[1..], target);
                }
                let rest = parts[index + 1..].join("/");
                let base = Path::new(&at).parent().unwrap();
                let next = base.join(target).join(rest);
                return self.host(&clean(&next));
            }
        }
        self.add(path, &fs::read(path).unwrap());
    }

    /// Adds an executable file.
    fn add(&mut self, path: &str, content: &[u8]) {
        if self.done.insert(path.to_owned()) {
            let size = format!("{:011o}", content.len());
            let head = support::Head {
                name: &path[1..],
                flag: b'0',
                link: "",
                size: size.as_bytes(),
                mode: 0o755,
                owner: (0, 0),
                device: (0, 0),
            };
            self.tar = std::mem::take(&mut self.tar).raw(&head, content);
        }
    }

    /// Adds a program of the host and what its loader says it needs. False, with a word, where it is not here.
    fn program(&mut self, path: &str) -> bool {
        if !Path::new(path).exists() {
            eprintln!("skipped: {path} is not on this host");
            return false;
        }
        self.host(path);
        let output = Command::new("ldd").arg(path).output().unwrap();
        for word in String::from_utf8_lossy(&output.stdout).split_whitespace() {
            if word.starts_with('/') && !word.ends_with(':') {
                self.host(word);
            }
        }
        true
    }

    async fn import(self) -> Option<(tempfile::TempDir, ImageStore, Image)> {
        if !has_packer() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("root.tar");
        fs::write(&source, self.tar.end()).unwrap();
        let store = ImageStore::open(&directory.path().join("store"), Limits::default()).unwrap();
        let name = "local/facts:1".parse().unwrap();
        let image = store
            .import(
                &source,
                Some(&name),
                Some(ImageConfig::default()),
                &ProgressSink::default(),
            )
            .await
            .map_err(|error| support::chain(&error))
            .unwrap();
        Some((directory, store, image))
    }
}

fn clean(path: &Path) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.to_str().unwrap().split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn look(store: &ImageStore, image: &Image, argv0: &str) -> ImageFacts {
    let argv = [argv0.to_owned()];
    store
        .program_facts(image, &Asked::new(&argv, &[], "/"))
        .map_err(|error| support::chain(&error))
        .unwrap()
}

/// One line of the table of verdicts.
fn verdict(facts: &ImageFacts) -> String {
    let program = &facts.program;
    let seen: Vec<String> = program
        .processes
        .evidence
        .iter()
        .take(4)
        .map(ToString::to_string)
        .collect();
    format!(
        "{:<28} {:<11} {:<12} {:<8} libs {:<3} {:?} {} {}",
        program.path,
        program.linkage.map(|it| it.to_string()).unwrap_or_default(),
        format!("{:?}", program.processes.may_create),
        program.processes.confidence.to_string(),
        program.libraries.len(),
        program.runtimes,
        seen.join(", "),
        program.processes.doubt.as_deref().unwrap_or_default(),
    )
}

/// Programs of this host and what is true of them: whether they themselves fork or execute, run commands through the shell
/// when told to, or do none of this, by their sources.
#[tokio::test]
async fn programs_of_this_host_are_told_by_what_they_can_do() {
    use MayCreate::{InLibraries, No, OnDemand, Yes};
    let table: &[(&str, &[MayCreate], Option<Runtime>)] = &[
        ("/bin/true", &[No], None),
        ("/bin/cat", &[No], None),
        ("/bin/ls", &[No], None),
        ("/usr/bin/sort", &[Yes], None),
        ("/usr/bin/sha256sum", &[No], None),
        ("/bin/gzip", &[No], None),
        ("/bin/grep", &[No], None),
        ("/bin/sed", &[Yes, OnDemand], None),
        ("/usr/bin/mawk", &[Yes, OnDemand], None),
        ("/usr/bin/find", &[Yes], None),
        ("/usr/bin/xargs", &[Yes], None),
        ("/usr/bin/env", &[Yes], None),
        ("/usr/bin/timeout", &[Yes], None),
        ("/usr/bin/jq", &[No], None),
        ("/usr/bin/sqlite3", &[OnDemand], None),
        ("/usr/bin/curl", &[InLibraries, No], None),
        ("/usr/bin/openssl", &[Yes, No], None),
        ("/usr/bin/xz", &[No], None),
        ("/usr/bin/zstd", &[No, OnDemand, Yes], None),
        ("/usr/bin/busybox", &[Yes], Some(Runtime::Busybox)),
        ("/bin/busybox", &[Yes], Some(Runtime::Busybox)),
        ("/bin/sh", &[Yes], Some(Runtime::Shell)),
        ("/bin/bash", &[Yes], Some(Runtime::Shell)),
        ("/usr/bin/python3", &[Yes], Some(Runtime::Python)),
        ("/usr/bin/perl", &[Yes], Some(Runtime::Perl)),
        ("/usr/bin/make", &[Yes], None),
        ("/bin/tar", &[Yes], None),
        ("/usr/bin/ssh", &[Yes], None),
        ("/usr/lib/cni/static", &[No], Some(Runtime::Go)),
        ("/usr/lib/cni/loopback", &[No], Some(Runtime::Go)),
        ("/usr/lib/cni/vlan", &[Yes], Some(Runtime::Go)),
        ("/usr/lib/cni/ptp", &[Yes], Some(Runtime::Go)),
    ];
    let mut root = Rootfs::default();
    let present: Vec<_> = table
        .iter()
        .filter(|(path, ..)| root.program(path))
        .collect();
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    for (path, expected, runtime) in present {
        let started = std::time::Instant::now();
        let facts = look(&store, &image, path);
        eprintln!("{} [{} ms]", verdict(&facts), started.elapsed().as_millis());
        let program = &facts.program;
        if program.kind != ProgramKind::Elf {
            eprintln!(
                "skipped: {path} is not an executable here but {:?}",
                program.kind
            );
            continue;
        }
        assert_eq!(program.missing, Vec::<String>::new(), "{path}");
        assert!(
            expected.contains(&program.processes.may_create),
            "{path}: {:?}",
            program.processes
        );
        if let Some(runtime) = runtime {
            assert!(
                program.runtimes.contains(runtime),
                "{path}: {:?}",
                program.runtimes
            );
        }
    }
}

/// What the loader of this host loads for a program is what the facts say.
#[tokio::test]
async fn libraries_are_those_that_the_hosts_loader_finds() {
    for path in ["/usr/bin/curl", "/usr/bin/sqlite3", "/bin/ls"] {
        let mut root = Rootfs::default();
        if !root.program(path) {
            continue;
        }
        let output = Command::new("ldd").arg(path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let wanted: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.split_once(" => "))
            .map(|(name, _)| name.trim())
            .collect();
        let Some((_directory, store, image)) = root.import().await else {
            return;
        };
        let facts = look(&store, &image, path);
        let found: BTreeSet<&str> = facts
            .program
            .libraries
            .iter()
            .map(|library| library.name.as_str())
            .filter(|name| !name.starts_with("ld-linux"))
            .collect();
        assert_eq!(found, wanted, "{path}");
    }
}

#[tokio::test]
async fn scripts_lead_to_their_interpreters_and_what_is_missing_is_named() {
    let mut root = Rootfs::default();
    if !root.program("/bin/sh") || !root.program("/usr/bin/env") {
        return;
    }
    root.add("/usr/local/bin/plain", b"#!/bin/sh -e\necho\n");
    root.add("/usr/local/bin/by-env", b"#! /usr/bin/env -S sh -e\necho\n");
    root.add("/usr/local/bin/of-script", b"#!/usr/local/bin/plain\n");
    root.add("/usr/local/bin/lost", b"#!/usr/bin/nowhere\n");
    root.add("/usr/local/bin/text", b"hello\n");
    root.add("/usr/local/bin/cut", b"\x7fELF\x02\x01\x01");
    let tar = std::mem::take(&mut root.tar);
    root.tar = tar
        .symlink("usr/local/bin/linked", "/usr/local/bin/../bin/plain")
        .symlink("usr/local/bin/round", "round")
        .file("usr/local/bin/no-mode", b"#!/bin/sh\n");
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    for name in ["plain", "by-env", "of-script", "linked"] {
        let facts = look(&store, &image, name).program;
        assert!(
            matches!(facts.kind, ProgramKind::Script { .. }),
            "{facts:?}"
        );
        assert_eq!(facts.path, format!("/usr/local/bin/{name}"));
        assert!(facts.executable.ends_with("/sh"), "{facts:?}");
        assert!(facts.runtimes.contains(&Runtime::Shell));
        assert_eq!(facts.processes.may_create, MayCreate::Yes);
    }
    assert_eq!(
        look(&store, &image, "linked").program.file,
        "/usr/local/bin/plain"
    );
    let lost = look(&store, &image, "lost").program;
    assert_eq!(lost.missing, ["/usr/bin/nowhere"]);
    for name in ["nothing", "round", "/etc/../nothing"] {
        assert_eq!(
            look(&store, &image, name).program.kind,
            ProgramKind::Missing,
            "{name}"
        );
    }
    for name in ["text", "cut", "no-mode", "/usr"] {
        let kind = look(&store, &image, name).program.kind;
        assert!(
            matches!(kind, ProgramKind::Other { .. }),
            "{name}: {kind:?}"
        );
    }
}

#[tokio::test]
async fn a_correction_of_one_command_is_about_that_one_until_there_are_three() {
    let mut root = Rootfs::default();
    if !root.program("/bin/true") {
        return;
    }
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    let seen = |words: &[&str]| {
        let argv: Vec<String> = words.iter().map(ToString::to_string).collect();
        let facts = store.program_facts(&image, &Asked::new(&argv, &[], "/"));
        facts.unwrap().correction.map(|it| it.seen)
    };
    let correct = |words: &[&str], seen: &str| {
        let argv: Vec<String> = words.iter().map(ToString::to_string).collect();
        let asked = Asked::new(&argv, &[], "/");
        let file = store.program_facts(&image, &asked).unwrap().program.file;
        let seen = seen.to_owned();
        let correction = Correction { seen };
        store
            .correct(&image.id, &file, Some(&asked), &correction)
            .unwrap();
    };
    correct(&["true", "a"], "one");
    correct(&["true", "a"], "again");
    correct(&["true", "ab"], "two");
    assert_eq!(seen(&["true", "a"]).unwrap(), "again");
    assert_eq!(seen(&["true", "a", "b"]), None);
    correct(&["true", "c"], "three");
    let all = seen(&["true", "a", "b"]).unwrap();
    assert!(all.contains("three"), "{all}");
}

#[tokio::test]
async fn facts_are_kept_with_the_image_and_corrections_outlive_them() {
    let mut root = Rootfs::default();
    if !root.program("/bin/true") {
        return;
    }
    let Some((directory, store, image)) = root.import().await else {
        return;
    };
    let first = look(&store, &image, "true");
    assert_eq!(first.correction, None);
    let correction = Correction {
        seen: "it tried to make a process".to_owned(),
    };
    store
        .correct(&image.id, &first.program.file, None, &correction)
        .unwrap();
    // Without its layers the image can be looked at no more: what comes now is what was kept.
    let blob = directory.path().join("store/blobs/sha256");
    let aside = directory.path().join("aside");
    fs::rename(&blob, &aside).unwrap();
    let second = look(&store, &image, "true");
    assert_eq!(second.program, first.program);
    assert_eq!(second.correction, Some(correction.clone()));
    fs::rename(&aside, &blob).unwrap();
    // Facts of an older analyser are gathered anew; a correction is from practice, and stays.
    let kept = directory
        .path()
        .join(format!("store/facts/{}.json", image.id.hex()));
    let text = fs::read_to_string(&kept).unwrap();
    fs::write(&kept, text.replace("\"analyser\":", "\"analyser\":99")).unwrap();
    let third = look(&store, &image, "true");
    assert_eq!(third, second);
    fs::write(&kept, "{").unwrap();
    assert_eq!(look(&store, &image, "true"), first);
    store.remove("local/facts:1", &|_| false, false).unwrap();
    assert!(!kept.exists());
}

/// Compiles a C program; nothing, with a word, where that cannot be done here.
fn compiled(directory: &Path, name: &str, code: &str, flags: &[&str]) -> Option<PathBuf> {
    let source = directory.join(format!("{name}.c"));
    let out = directory.join(name);
    fs::write(&source, code).unwrap();
    let made = Command::new("gcc")
        .args(["-O1", "-w"])
        .args(flags)
        .arg(&source)
        .arg("-o")
        .arg(&out)
        .output();
    match made {
        Ok(output) if output.status.success() => Some(out),
        _ => {
            eprintln!("skipped: gcc cannot compile {name} with {flags:?} here");
            None
        }
    }
}

const HELLO: &str = "#include <stdio.h>\nint main(){puts(\"hi\");return 0;}";
const NET: &str =
    "#include <netdb.h>\n#include <pwd.h>\n#include <pthread.h>\nvoid*t(void*p){return p;}
int main(int c,char**v){struct addrinfo*a;pthread_t i;pthread_create(&i,0,t,0);
return getaddrinfo(v[1],0,0,&a)+(getpwnam(v[1])!=0);}";
const FORK: &str = "#include <unistd.h>\nint main(){return fork();}";
const EXEC: &str = "#include <unistd.h>\nint main(){return execlp(\"ls\",\"ls\",0);}";
const SYSTEM: &str = "#include <stdlib.h>\nint main(){return system(\"ls\");}";

#[tokio::test]
async fn static_programs_are_told_by_symbols_and_stripped_ones_by_their_code() {
    let directory = tempfile::tempdir().unwrap();
    let mut root = Rootfs::default();
    let mut cases = Vec::new();
    for (name, code, creates) in [
        ("hello", HELLO, false),
        ("net", NET, false),
        ("fork", FORK, true),
        ("exec", EXEC, true),
        ("system", SYSTEM, true),
    ] {
        for (kind, flags, linkage) in [
            ("static", &["-static"][..], Linkage::Static),
            ("stripped", &["-static", "-s"], Linkage::Static),
            ("pie", &["-static-pie", "-s"], Linkage::StaticPie),
        ] {
            let name = format!("{name}-{kind}");
            let Some(path) = compiled(directory.path(), &name, code, flags) else {
                continue;
            };
            root.add(&format!("/bin/{name}"), &fs::read(path).unwrap());
            cases.push((name, creates, linkage));
        }
    }
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    for (name, creates, linkage) in cases {
        let facts = look(&store, &image, &name);
        eprintln!("{}", verdict(&facts));
        assert_eq!(facts.program.linkage, Some(linkage), "{name}");
        let processes = &facts.program.processes;
        assert_eq!(
            processes.may_create == MayCreate::Yes,
            creates,
            "{name}: {processes:?}"
        );
        assert!(
            processes.confidence >= Confidence::Likely,
            "{name}: {processes:?}"
        );
    }
}

#[tokio::test]
async fn rust_programs_are_told_by_whether_they_use_command() {
    let directory = tempfile::tempdir().unwrap();
    let mut root = Rootfs::default();
    let mut cases = Vec::new();
    for (name, code, creates) in [
        (
            "threads",
            "fn main(){std::thread::spawn(||1).join().unwrap();println!(\"{:?}\",std::net::TcpListener::bind(\"0:1\"));}",
            MayCreate::No,
        ),
        (
            "command",
            "fn main(){println!(\"{:?}\",std::process::Command::new(\"ls\").status());}",
            MayCreate::Yes,
        ),
    ] {
        for (kind, flags) in [
            ("dynamic", &["-O"][..]),
            ("static", &["-O", "-Ctarget-feature=+crt-static"]),
            (
                "stripped",
                &["-O", "-Ctarget-feature=+crt-static", "-Cstrip=symbols"],
            ),
        ] {
            let source = directory.path().join("main.rs");
            let out = directory.path().join("main");
            fs::write(&source, code).unwrap();
            let made = Command::new("rustc")
                .args(flags)
                .arg(&source)
                .arg("-o")
                .arg(&out)
                .output();
            if !made.is_ok_and(|output| output.status.success()) {
                eprintln!("skipped: rustc cannot compile a {kind} program here");
                continue;
            }
            let name = format!("{name}-{kind}");
            root.program(out.to_str().unwrap());
            root.add(&format!("/bin/{name}"), &fs::read(&out).unwrap());
            root.done.remove(out.to_str().unwrap());
            cases.push((name, creates));
        }
    }
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    for (name, creates) in cases {
        let facts = look(&store, &image, &name);
        eprintln!("{}", verdict(&facts));
        assert_eq!(
            facts.program.processes.may_create, creates,
            "{:?}",
            facts.program
        );
        assert!(facts.program.runtimes.contains(&Runtime::Rust), "{name}");
    }
}

#[tokio::test]
async fn libraries_are_found_by_run_path_by_configuration_and_by_environment() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let library = "int three(){return 3;}";
    let Some(lib) = compiled(
        directory.path(),
        "libthree.so",
        library,
        &["-shared", "-fPIC"],
    ) else {
        return;
    };
    let user = "int three();int main(){return three();}";
    let dir = format!("-L{}", directory.path().display());
    let link = |name: &str, extra: &[&str]| {
        let source = at(&format!("{name}.c"));
        fs::write(&source, user).unwrap();
        let made = Command::new("gcc")
            .arg("-w")
            .arg(&source)
            .args([&dir, "-lthree"])
            .args(extra)
            .arg("-o")
            .arg(at(name))
            .status();
        assert!(made.is_ok_and(|status| status.success()));
        fs::read(at(name)).unwrap()
    };
    let lib = fs::read(lib).unwrap();
    // Where the library lies, how the program was linked, what the loader's configuration and the environment say.
    let table: [(&str, &str, &[&str], &str, &str); 5] = [
        (
            "runpath",
            "/opt/a/lib/libthree.so",
            &["-Wl,-rpath,$ORIGIN/../lib"],
            "",
            "",
        ),
        (
            "rpath",
            "/opt/a/lib/libthree.so",
            &["-Wl,-rpath,$ORIGIN/../lib,--disable-new-dtags"],
            "",
            "",
        ),
        ("conf", "/srv/odd/libthree.so", &[], "# odd\n/srv/odd\n", ""),
        ("env", "/srv/odd/libthree.so", &[], "", "/nowhere:/srv/odd"),
        ("lost", "/srv/odd/libthree.so", &[], "", ""),
    ];
    for (name, place, flags, conf, env) in table {
        let mut root = Rootfs::default();
        root.program("/bin/true");
        root.add("/opt/a/bin/prog", &link(name, flags));
        root.add(place, &lib);
        root.add("/etc/ld.so.conf.d/x.conf", conf.as_bytes());
        let Some((_directory, store, image)) = root.import().await else {
            return;
        };
        let argv = ["/opt/a/bin/prog".to_owned()];
        let env: Vec<EnvVar> = vec![format!("LD_LIBRARY_PATH={env}").parse().unwrap()];
        let facts = store
            .program_facts(&image, &Asked::new(&argv, &env, "/"))
            .unwrap()
            .program;
        let found = facts.libraries.iter().find(|it| it.name == "libthree.so");
        assert_eq!(found.is_some(), name != "lost", "{name}: {facts:?}");
        assert_eq!(
            facts.missing.is_empty(),
            name != "lost",
            "{name}: {facts:?}"
        );
        if name == "lost" {
            assert_eq!(facts.processes.confidence, Confidence::Guess);
        }
    }
}

#[tokio::test]
async fn a_small_image_travels_whole_and_its_files_are_read_once() {
    let mut root = Rootfs::default();
    if !root.program("/bin/true") {
        return;
    }
    root.add("/srv/data", b"data");
    let tar = std::mem::take(&mut root.tar);
    root.tar = tar
        .hard_link("srv/same", "srv/data")
        .symlink("srv/link", "data")
        .file("srv/empty", b"")
        .device("dev/null", (1, 3));
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    let facts = look(&store, &image, "true");
    let tree = store
        .nanos_tree(&image, &facts.program, &Wishes::default())
        .unwrap();
    assert_eq!(tree.selection(), &Selection::Whole);
    let entries = tree.entries();
    let position = |path: &str| entries.iter().position(|it| it.path == path.as_bytes());
    assert_eq!(position("dev/null"), None);
    assert!(tree.bytes() > facts.program.size);
    assert!(position("tmp").is_some());
    let link = &entries[position("srv/link").unwrap()];
    assert_eq!(
        link.kind,
        NanosKind::Symlink {
            target: b"data".to_vec()
        }
    );
    let mut names = Vec::new();
    tree.read(&mut |indexes, reader| {
        let mut content = Vec::new();
        reader.read_to_end(&mut content)?;
        for index in indexes {
            let size = content.len() as u64;
            assert_eq!(entries[*index].kind, NanosKind::File { size });
        }
        if content == b"data" {
            names = indexes.to_vec();
        }
        Ok(())
    })
    .unwrap();
    let both = [position("srv/data").unwrap(), position("srv/same").unwrap()];
    assert_eq!(names, both);
}

#[tokio::test]
async fn a_large_image_gives_what_the_program_needs() {
    let mut root = Rootfs::default();
    if !root.program("/usr/bin/jq") {
        return;
    }
    root.add("/srv/app/data/one", b"1");
    root.add("/etc/app.conf", b"x");
    root.add("/etc/passwd", b"root:x:0:0::/:/bin/sh\n");
    for number in 0..17_000 {
        root.add(&format!("/usr/share/many/{number}"), b"");
    }
    let Some((_directory, store, image)) = root.import().await else {
        return;
    };
    let argv: Vec<String> = ["jq", "--conf=/etc/app.conf", "/usr/share/many"]
        .map(str::to_owned)
        .to_vec();
    let facts = store
        .program_facts(&image, &Asked::new(&argv, &[], "/srv/app"))
        .unwrap();
    let wishes = Wishes {
        argv: &argv,
        env: &[],
        working_dir: "/srv/app",
    };
    let tree = store.nanos_tree(&image, &facts.program, &wishes).unwrap();
    let left_out = vec!["/usr/share/many".to_owned()];
    assert_eq!(tree.selection(), &Selection::Part { left_out });
    let has = |path: &str| tree.entries().iter().any(|it| it.path == path.as_bytes());
    for path in [
        "usr/bin/jq",
        "srv/app/data/one",
        "etc/app.conf",
        "etc/passwd",
        "tmp",
    ] {
        assert!(has(path), "{path}");
    }
    let loader = facts.program.loader.unwrap();
    assert!(
        has(loader.trim_start_matches('/')) || has("lib64"),
        "{loader}"
    );
    assert!(!has("usr/share/many/1"));
    assert!(tree.entries().len() < 200, "{}", tree.entries().len());
}
