//! Unikernels as users have them: the built binary, a node that it starts by itself, QEMU and a real Nanos kernel, with
//! small programs that are compiled here. One node serves these tests, save those that kill or change it.
//!
//! Needs a Nanos kernel (`VISTARA_NANOS_KERNEL`, or `/opt/vistara/nanos/kernel.img`), QEMU and gcc; each test is skipped
//! with the reason where one is missing. What is run again on Linux needs a Linux kernel too (`VISTARA_TEST_KERNELS`).

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use vm::{System, text, until};

const IMAGE: &str = "local/unikernel-tests:1";

/// Runs no command, and has nothing to.
const PLAIN: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  setvbuf(stdout, 0, _IOLBF, 0);
  if (!strcmp(what, "exit")) { printf("out\n"); fprintf(stderr, "err\n"); return atoi(argv[2]); }
  if (!strcmp(what, "abort")) abort();
  if (!strcmp(what, "show")) {
    char dir[256];
    printf("%s|%s|%s|", getenv("A"), getcwd(dir, sizeof dir), getenv("HOSTNAME"));
    for (int i = 2; i < argc; i++) printf("<%s>", argv[i]);
    puts("");
    return 0;
  }
  if (!strcmp(what, "append")) {
    FILE *file = fopen(argv[2], "a+");
    char line[256];
    if (!file) { perror(argv[2]); return 4; }
    fprintf(file, "%s\n", argv[3]);
    fflush(file);
    rewind(file);
    while (fgets(line, sizeof line, file)) fputs(line, stdout);
    return fclose(file) ? 5 : 0;
  }
  if (!strcmp(what, "count")) for (int i = 0;; i++) { printf("line %d\n", i); usleep(20000); }
  if (!strcmp(what, "wait")) { puts("up"); for (;;) pause(); }
  return 2;
}
"#;
/// Runs a command through the shell, and tells by its code whether that went well.
const SHELL: &str = r#"
#include <stdio.h>
#include <stdlib.h>
int main(void) { puts("trying"); fflush(stdout); return system("true") ? 1 : 9; }
"#;
/// Stands in for `/bin/sh`.
const SH: &str = r#"
#include <stdio.h>
int main(void) { puts("from the shell"); return 0; }
"#;
const SERVER: &str = r#"
use std::io::{Read, Write};
fn main() {
    let listener = std::net::TcpListener::bind("0.0.0.0:8080").unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        std::thread::spawn(move || {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nserved");
        });
    }
}
"#;

fn skip<T>(reason: &str) -> Option<T> {
    println!("SKIP: {reason}");
    None
}

fn kernel() -> Option<PathBuf> {
    let kernel = std::env::var_os("VISTARA_NANOS_KERNEL")
        .map_or_else(|| "/opt/vistara/nanos/kernel.img".into(), PathBuf::from);
    match kernel.exists() {
        true => Some(kernel),
        false => skip(&format!("no Nanos kernel at {}", kernel.display())),
    }
}

/// Whether a compiler made this program.
fn compiled(compiler: &str, arguments: &[&OsStr]) -> bool {
    let output = Command::new(compiler).args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

/// The tree of the image as a tar.
fn image(scratch: &Path) -> Option<PathBuf> {
    let root = scratch.join("root");
    for dir in ["bin", "etc", "srv", "data", "tmp"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let compile = |name: &str, source: &str, option: &str| {
        let from = scratch.join(format!("{name}.c"));
        fs::write(&from, source).unwrap();
        let to = root.join("bin").join(name);
        let words = [
            option.as_ref(),
            "-O1".as_ref(),
            "-o".as_ref(),
            to.as_os_str(),
            from.as_os_str(),
        ];
        compiled("gcc", &words)
    };
    if !compile("plain", PLAIN, "-static") || !compile("sh", SH, "-static") {
        return skip("no gcc that links statically");
    }
    assert!(compile("shell", SHELL, "-no-pie"));
    // The loader and the C library of this host.
    let listed = Command::new("ldd")
        .arg(root.join("bin/shell"))
        .output()
        .unwrap();
    let listed = text(&listed.stdout);
    for path in listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(path, to).unwrap();
    }
    // Where there is none, its test says so.
    let server = scratch.join("server.rs");
    fs::write(&server, SERVER).unwrap();
    let to = root.join("bin/server");
    compiled(
        "rustc",
        &["-O", "-C", "target-feature=+crt-static", "-o"]
            .map(OsStr::new)
            .iter()
            .copied()
            .chain([to.as_os_str(), server.as_os_str()])
            .collect::<Vec<_>>(),
    );
    let tar = scratch.join("image.tar");
    let made = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&tar)
        .arg(".")
        .status();
    assert!(made.unwrap().success());
    Some(tar)
}

/// A node of this name with the Nanos kernel and the image. No name may begin with another and a dash: the older node of a
/// name is cleared away by its beginning.
fn ready(name: &str) -> Option<System> {
    let kernel = kernel()?;
    let state = vm::state_dir(name);
    fs::create_dir_all(&state).unwrap();
    let system = System { state };
    let lock = File::create(system.state.join("test.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let link = system.state.join("kernels");
    if let (Some(kernels), false) = (std::env::var_os("VISTARA_TEST_KERNELS"), link.exists()) {
        symlink(kernels, link).unwrap();
    }
    let doctor: serde_json::Value =
        serde_json::from_slice(&system.vistara(&["doctor", "--json"]).stdout).unwrap();
    let needs = doctor["needs"].as_array().expect("needs are listed");
    if !needs
        .iter()
        .any(|need| need["name"] == "qemu" && need["state"] == "works")
    {
        return skip("QEMU is not usable");
    }
    if !system
        .vistara(&["images", "inspect", IMAGE])
        .status
        .success()
    {
        let scratch = tempfile::tempdir().unwrap();
        let tar = image(scratch.path())?;
        done(
            &system,
            &["images", "import", tar.to_str().unwrap(), "--name", IMAGE],
        );
    }
    // Without its modules, so that nothing is tried provisionally: that is `vm_provisional`'s.
    done(
        &system,
        &["kernel", "add", "nanos", kernel.to_str().unwrap()],
    );
    Some(system)
}

fn done(system: &System, arguments: &[&str]) -> String {
    let output = system.vistara(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout).trim().to_owned()
}

/// Runs a program as a unikernel. Gives its exit code, output and errors.
fn run(system: &System, options: &[&str], command: &[&str]) -> (Option<i32>, String, String) {
    let always = ["run", "--rm", "-q", "--hypervisor", "nanovms"];
    let output = system.vistara(&[&always, options, &[IMAGE], command].concat());
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

struct Machine<'a> {
    system: &'a System,
    id: String,
}

impl Machine<'_> {
    fn start<'a>(system: &'a System, options: &[&str], command: &[&str]) -> Machine<'a> {
        let always = ["run", "-d", "-q", "--hypervisor", "nanovms"];
        let id = done(system, &[&always, options, &[IMAGE], command].concat());
        Machine { system, id }
    }

    fn logs(&self) -> String {
        text(&self.system.vistara(&["logs", &self.id]).stdout)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.system.vistara(&["rm", "-f", &self.id]);
    }
}

fn explained(system: &System, options: &[&str], command: &[&str]) -> serde_json::Value {
    let words = [&["explain", "--json"], options, &[IMAGE], command].concat();
    serde_json::from_str(&done(system, &words)).unwrap()
}

#[test]
fn exit_codes_and_output_are_exact_and_a_signal_is_told_as_one() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    for code in [0, 3, 255] {
        let (found, out, err) = run(&system, &[], &["/bin/plain", "exit", &code.to_string()]);
        assert_eq!((found, out.as_str()), (Some(code), "out\nerr\n"), "{err}");
    }
    let (found, out, _) = run(&system, &[], &["/bin/plain", "abort"]);
    assert_eq!((found, out.trim()), (Some(134), ""));
}

#[test]
fn arguments_environment_and_directory_are_the_users() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    let options = ["-e", "A=b c", "--workdir", "/srv", "--hostname", "uni7"];
    let (code, out, err) = run(&system, &options, &["/bin/plain", "show", "x y", ""]);
    assert_eq!(
        (code, out.as_str()),
        (Some(0), "b c|/srv|uni7|<x y><>\n"),
        "{err}"
    );
}

#[test]
fn a_static_rust_server_is_reached_by_its_published_port() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    if explained(&system, &["--hypervisor", "qemu"], &["/bin/server"])["program"]["kind"] != "elf" {
        return skip("no rustc that links statically").unwrap_or_default();
    }
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let _server = Machine::start(&system, &["-p", &format!("{port}:8080")], &["/bin/server"]);
    until("an answer", || {
        let mut answer = String::new();
        let asked = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).and_then(|mut stream| {
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut answer)
        });
        asked.is_ok() && answer.ends_with("served")
    });
}

#[test]
fn what_a_unikernel_cannot_do_is_refused_with_the_way_that_can() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    let machine = Machine::start(&system, &[], &["/bin/plain", "wait"]);
    until("its first line", || machine.logs().contains("up"));
    let id = machine.id.as_str();
    let from = format!("{id}:/etc");
    for words in [
        &["exec", id, "true"][..],
        &["exec", "-it", id, "sh"],
        &["cp", &from, "/tmp/never-made"],
        &[
            "run",
            "--rm",
            "-t",
            "--hypervisor",
            "nanovms",
            IMAGE,
            "/bin/plain",
        ],
        &[
            "run",
            "--rm",
            "-v",
            "/tmp:/d",
            "--hypervisor",
            "nanovms",
            IMAGE,
            "/bin/plain",
        ],
        &[
            "run",
            "--rm",
            "-v",
            "d:/d",
            "--hypervisor",
            "qemu",
            IMAGE,
            "/bin/plain",
        ],
    ] {
        let output = system.vistara(words);
        let err = text(&output.stderr);
        assert!(!output.status.success(), "{words:?}");
        assert!(
            err.contains("unikernel") || err.contains("terminal"),
            "{words:?}: {err}"
        );
        assert!(err.contains("hint: "), "{words:?}: {err}");
    }
}

#[test]
fn a_unikernel_that_is_stopped_ends_by_its_signal() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    let machine = Machine::start(&system, &[], &["/bin/plain", "wait"]);
    until("its first line", || machine.logs().contains("up"));
    done(&system, &["stop", "-t", "20", &machine.id]);
    assert_eq!(done(&system, &["wait", &machine.id]), "143");
}

#[test]
fn a_named_volume_outlives_machines_and_has_one_at_a_time() {
    let Some(system) = ready("unikernel") else {
        return;
    };
    let name = format!("v{}", std::process::id());
    let (at, at_ro) = (format!("{name}:/data"), format!("{name}:/new/place:ro"));
    let append = |line: &str| {
        run(
            &system,
            &["-v", &at],
            &["/bin/plain", "append", "/data/f", line],
        )
    };
    assert_eq!(append("one").1, "one\n");
    assert_eq!(append("two").1, "one\ntwo\n");
    let (code, out, _) = run(
        &system,
        &["-v", &at_ro],
        &["/bin/plain", "append", "/new/place/f", "x"],
    );
    assert_eq!(code, Some(4), "{out}");
    let user = Machine::start(&system, &["-v", &at], &["/bin/plain", "wait"]);
    let (code, _, err) = append("three");
    assert_eq!(code, Some(125));
    assert!(err.contains("one machine at a time"), "{err}");
    drop(user);
    assert_eq!(append("three").1, "one\ntwo\nthree\n");
    fs::remove_file(system.state.join("volumes").join(format!("{name}.img"))).unwrap();
}

#[test]
fn no_line_is_lost_when_the_node_dies_while_a_unikernel_prints() {
    let Some(system) = ready("nanos-killed") else {
        return;
    };
    let machine = Machine::start(&system, &[], &["/bin/plain", "count"]);
    until("ten lines", || machine.logs().lines().count() > 10);
    system.kill_node();
    let before = machine.logs().lines().count();
    until("further lines", || {
        machine.logs().lines().count() > before + 10
    });
    let logs = machine.logs();
    let wanted: String = (0..logs.lines().count())
        .map(|index| format!("line {index}\n"))
        .collect();
    assert_eq!(logs, wanted, "no line is lost or doubled");
}

#[test]
fn auto_takes_what_fits_and_says_why_it_does_not_take_the_rest() {
    let Some(system) = ready("nanos-auto") else {
        return;
    };
    let payload = |options: &[&str], command: &[&str]| {
        let said = explained(&system, options, command);
        (
            said["choice"]["payload"].as_str().unwrap().to_owned(),
            said["choice"]["reasons"][0].to_string(),
        )
    };
    let (fits, why) = payload(&[], &["/bin/plain"]);
    assert_eq!(fits, "nanos", "{why}");
    let (tty, why) = payload(&["-t"], &["/bin/plain"]);
    assert_eq!(tty, "linux");
    assert!(why.contains("terminal"), "{why}");
    let (commands, why) = payload(&[], &["/bin/shell"]);
    assert_eq!(commands, "linux");
    assert!(why.contains("system in /bin/shell"), "{why}");
    assert_eq!(payload(&["--retry-safe"], &["/bin/shell"]).0, "nanos");
    let kernels = done(&system, &["kernel", "ls"]);
    let name = kernels
        .lines()
        .find(|line| line.contains(" nanos "))
        .unwrap();
    done(
        &system,
        &["kernel", "rm", name.split_whitespace().next().unwrap()],
    );
    let (without, why) = payload(&[], &["/bin/plain"]);
    assert_eq!(without, "linux");
    assert!(why.contains("no Nanos kernel"), "{why}");
}

#[test]
fn a_program_that_needed_a_process_is_run_again_on_linux_once_and_remembered() {
    let Some(system) = ready("nanos-retry") else {
        return;
    };
    if std::env::var_os("VISTARA_TEST_KERNELS").is_none() {
        return skip("no guest kernel (VISTARA_TEST_KERNELS is not set)").unwrap_or_default();
    }
    // A fresh image, since what is learned is kept with it.
    let scratch = tempfile::tempdir().unwrap();
    let Some(tar) = image(scratch.path()) else {
        return;
    };
    // Its bytes are other ones each time, so that nothing is known of it.
    fs::write(
        scratch.path().join("root/etc/made"),
        std::process::id().to_string(),
    )
    .unwrap();
    let made = Command::new("tar")
        .arg("-C")
        .arg(scratch.path().join("root"))
        .arg("-cf")
        .arg(&tar)
        .arg(".")
        .status();
    assert!(made.unwrap().success());
    let name = format!("local/retry:{}", std::process::id());
    done(
        &system,
        &["images", "import", tar.to_str().unwrap(), "--name", &name],
    );
    let machine = format!("retry-{}", std::process::id());
    let output = system.vistara(&[
        "run",
        "--name",
        &machine,
        "-q",
        "--retry-safe",
        &name,
        "/bin/shell",
    ]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(9), "{out}{err}");
    assert_eq!(out, "trying\ntrying\nfrom the shell\n", "{err}");
    assert_eq!(err.matches("run again on Linux").count(), 1, "{err}");
    let inspected = system.inspect(&machine);
    assert_eq!(inspected["generation"], 2);
    assert_eq!(inspected["exit_code"], 9);
    assert_eq!(inspected["choice"]["payload"], "linux");
    let said = done(&system, &["explain", "--retry-safe", &name, "/bin/shell"]);
    assert!(
        said.contains("it was tried as a unikernel before"),
        "{said}"
    );
    done(&system, &["rm", &machine]);
    done(&system, &["images", "rm", &name]);
}
