//! The whole system with real machines: the built binary, a node that it starts by itself, QEMU, Debian's kernel, and an
//! image of Debian's packages. One node serves the tests of this file, save the one that kills it; each test is a process
//! of its own.
//!
//! Needs a kernel store (`VISTARA_TEST_KERNELS`, which `cargo xtask test` fills) and the demonstration image (made once by
//! `cargo xtask demo-image`); skipped with the reason where either is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const IMAGE: &str = "vistara-demo/python3";
/// Longest that anything here may take on a busy machine without KVM.
const BOUND: Duration = Duration::from_secs(150);

struct System {
    state: PathBuf,
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vistara"))
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned()
}

fn hash(value: impl std::hash::Hash) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    value.hash(&mut hasher);
    std::hash::Hasher::finish(&hasher)
}

/// A state directory for this build of the program, outside the target directory since paths of sockets are short. What
/// earlier builds of the same checkout left is cleared away, machines and all.
fn state_dir(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_vistara"));
    let prefix = format!("vistara-system-{:08x}-{name}-", hash(program) as u32);
    let built = std::fs::metadata(program).unwrap().modified().unwrap();
    let own = format!("{prefix}{:08x}", hash(built) as u32);
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        if other.starts_with(&prefix) && other != own {
            let old = System {
                state: entry.path(),
            };
            let machines = text(&old.vistara(&["ps", "-q"]).stdout);
            for machine in machines.split_whitespace() {
                old.vistara(&["rm", "-f", machine]);
            }
            old.vistara(&["node", "stop"]);
            // Another test may be clearing the same away.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    std::env::temp_dir().join(own)
}

impl System {
    /// The shared node with a kernel and the image in it, or nothing and the reason.
    fn ready() -> Option<System> {
        System::ready_as("shared")
    }

    /// A node of this name, for tests that others must not suffer from.
    fn ready_as(name: &str) -> Option<System> {
        let skip = |reason: &str| {
            println!("SKIP: {reason}");
            None
        };
        let Some(kernels) = std::env::var_os("VISTARA_TEST_KERNELS") else {
            return skip(
                "no guest kernel (VISTARA_TEST_KERNELS is not set; `cargo xtask test` sets it)",
            );
        };
        let archive = target().join("demo/python3.oci.tar");
        if !archive.exists() {
            return skip("no demonstration image (cargo xtask demo-image)");
        }
        // Not below the target directory: paths of sockets are short.
        let state = state_dir(name);
        std::fs::create_dir_all(&state).unwrap();
        let system = System { state };
        let lock = File::create(system.state.join("test.lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let link = system.state.join("kernels");
        if !link.exists() {
            std::os::unix::fs::symlink(kernels, &link).unwrap();
        }
        let doctor: serde_json::Value =
            serde_json::from_slice(&system.vistara(&["doctor", "--json"]).stdout).unwrap();
        if doctor["ready"] != true {
            return skip(&format!("this host cannot run machines: {doctor}"));
        }
        if !system
            .vistara(&["images", "inspect", IMAGE])
            .status
            .success()
        {
            let done = system.vistara(&[
                "images",
                "import",
                archive.to_str().unwrap(),
                "--name",
                IMAGE,
            ]);
            assert!(done.status.success(), "{}", text(&done.stderr));
        }
        Some(system)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vistara"));
        command
            .env("VISTARA_STATE_DIR", &self.state)
            .env_remove("VISTARA_SOCKET")
            .args(arguments);
        command
    }

    fn vistara(&self, arguments: &[&str]) -> Output {
        finish(
            self.command(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )
    }

    fn feed(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = wait(child);
        writer.join().unwrap().unwrap();
        output
    }

    /// A machine in the background, removed when the test ends, however it does.
    fn machine(&self, options: &[&str], command: &[&str]) -> Machine<'_> {
        let arguments = [&["run", "-d"], options, &[IMAGE], command].concat();
        let output = self.vistara(&arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        Machine {
            system: self,
            id: text(&output.stdout).trim().to_owned(),
        }
    }

    fn inspect(&self, machine: &str) -> serde_json::Value {
        let output = self.vistara(&["inspect", machine]);
        let list: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("inspect prints JSON");
        list[0].clone()
    }
}

fn finish(command: &mut Command) -> Output {
    wait(command.spawn().unwrap())
}

/// Waits with a bound, so that a hang is a failure with a name.
fn wait(child: Child) -> Output {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if finished.recv_timeout(BOUND).is_err() {
            // It is our own child and has not been waited for: the number is still its own.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    // The guard may have given up already.
    let _ = done.send(());
    guard.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(50));
    }
}

struct Machine<'a> {
    system: &'a System,
    id: String,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.system.vistara(&["rm", "-f", &self.id]);
    }
}

#[test]
fn a_program_runs_on_the_guests_kernel_and_its_exit_code_comes_back() {
    let Some(system) = System::ready() else {
        return;
    };
    let output = system.vistara(&[
        "run",
        "--rm",
        "-q",
        IMAGE,
        "--",
        "sh",
        "-c",
        "uname -r; echo bad >&2; exit 7",
    ]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(text(&output.stdout).trim(), host.trim());
    assert!(
        text(&output.stdout).contains("cloud"),
        "{}",
        text(&output.stdout)
    );
    assert_eq!(text(&output.stderr), "bad\n");
}

#[test]
fn the_images_and_the_users_words_shape_the_program() {
    let Some(system) = System::ready() else {
        return;
    };
    let script = "import os,sys; print(os.environ['A'], os.getcwd(), os.getuid(), os.uname().nodename, sys.argv[1:])";
    let arguments = [
        "run",
        "--rm",
        "-q",
        "-e",
        "A=b c",
        "--workdir",
        "/new/dir",
        "--user",
        "nobody",
        "--hostname",
        "guest7",
        IMAGE,
        "python3",
        "-c",
        script,
        "x y",
    ];
    let output = system.vistara(&arguments);
    assert_eq!(
        text(&output.stdout),
        "b c /new/dir 65534 guest7 ['x y']\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_megabyte_goes_in_and_comes_out_unchanged() {
    let Some(system) = System::ready() else {
        return;
    };
    let bytes: Vec<u8> = (0..1 << 20)
        .map(|index: u32| (index.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let output = system.feed(&["run", "--rm", "-q", "-i", IMAGE, "cat"], &bytes);
    assert!(
        output.stdout == bytes,
        "{} bytes; {}",
        output.stdout.len(),
        text(&output.stderr)
    );
}

#[test]
fn missing_and_unrunnable_programs_have_dockers_exit_codes() {
    let Some(system) = System::ready() else {
        return;
    };
    for (program, code) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let output = system.vistara(&["run", "--rm", IMAGE, program]);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert!(
            text(&output.stderr).contains(program),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_machine_survives_the_nodes_violent_death() {
    let Some(system) = System::ready_as("killed") else {
        return;
    };
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.2; done";
    let machine = system.machine(&[], &["sh", "-c", script]);
    let monitor = system.inspect(&machine.id)["vmm_pid"].clone();
    let status: serde_json::Value =
        serde_json::from_slice(&system.vistara(&["node", "status", "--json"]).stdout).unwrap();
    let node = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(node).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let exec = system.vistara(&["exec", &machine.id, "echo", "still here"]);
    assert_eq!(text(&exec.stdout), "still here\n", "{}", text(&exec.stderr));
    assert_eq!(
        system.inspect(&machine.id)["vmm_pid"],
        monitor,
        "it is the same machine"
    );
    let logs = text(&system.vistara(&["logs", &machine.id]).stdout);
    let numbers: Vec<usize> = logs
        .lines()
        .map(|line| line["line ".len()..].parse().unwrap())
        .collect();
    assert_eq!(
        numbers,
        (0..numbers.len()).collect::<Vec<_>>(),
        "no line is lost or doubled"
    );
    let stopped = system.vistara(&["stop", "-t", "1", &machine.id]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    assert_eq!(system.inspect(&machine.id)["state"], "ended");
}

#[test]
fn files_travel_both_ways_with_modes_and_links() {
    let Some(system) = System::ready() else {
        return;
    };
    let machine = system.machine(&[], &["sleep", "1000"]);
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("tool"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(
        tree.join("tool"),
        std::os::unix::fs::PermissionsExt::from_mode(0o750),
    )
    .unwrap();
    std::os::unix::fs::symlink("tool", tree.join("link")).unwrap();
    let copied = system.vistara(&[
        "cp",
        tree.to_str().unwrap(),
        &format!("{}:/opt", machine.id),
    ]);
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    let exec = system.vistara(&[
        "exec",
        &machine.id,
        "sh",
        "-c",
        "/opt/tree/link; stat -c %a /opt/tree/tool",
    ]);
    assert_eq!(text(&exec.stdout), "ran\n750\n", "{}", text(&exec.stderr));
    let back = dir.path().join("back");
    let copied = system.vistara(&[
        "cp",
        &format!("{}:/opt/tree", machine.id),
        back.to_str().unwrap(),
    ]);
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    assert_eq!(
        std::fs::read_link(back.join("link")).unwrap(),
        Path::new("tool")
    );
    assert_eq!(
        std::fs::read(back.join("tool")).unwrap(),
        std::fs::read(tree.join("tool")).unwrap()
    );
}

#[test]
fn a_published_port_leads_to_the_program() {
    let Some(system) = System::ready() else {
        return;
    };
    let machine = system.machine(&["-p", "0:8000"], &["python3", "-m", "http.server", "8000"]);
    let ports = system.inspect(&machine.id)["ports"].clone();
    let address = ports[0]
        .as_str()
        .unwrap()
        .split("->")
        .next()
        .unwrap()
        .to_owned();
    until("an answer on the published port", || {
        let Ok(mut stream) = std::net::TcpStream::connect(&address) else {
            return false;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut answer).is_ok()
            && answer.starts_with(b"HTTP/1.0 200")
    });
}

#[test]
fn a_host_directory_is_seen_and_a_read_only_one_cannot_be_written() {
    let Some(system) = System::ready() else {
        return;
    };
    let doctor: serde_json::Value =
        serde_json::from_slice(&system.vistara(&["doctor", "--json"]).stdout).unwrap();
    let needs = doctor["needs"].as_array().unwrap();
    if !needs
        .iter()
        .any(|need| need["name"] == "volumes" && need["state"] == "works")
    {
        println!("SKIP: no virtiofsd that is usable here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("in"), "from the host").unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let output = system.vistara(&[
        "run",
        "--rm",
        "-q",
        "-v",
        &volume,
        IMAGE,
        "sh",
        "-c",
        "cat /data/in; echo back > /data/out",
    ]);
    assert_eq!(
        text(&output.stdout),
        "from the host",
        "{}",
        text(&output.stderr)
    );
    assert_eq!(
        std::fs::read_to_string(dir.path().join("out")).unwrap(),
        "back\n"
    );
    let output = system.vistara(&[
        "run",
        "--rm",
        "-q",
        "-v",
        &format!("{volume}:ro"),
        IMAGE,
        "touch",
        "/data/no",
    ]);
    assert_ne!(output.status.code(), Some(0));
    assert!(!dir.path().join("no").exists());
}

#[test]
fn a_guest_without_memory_a_panic_and_a_time_limit_each_say_so() {
    let Some(system) = System::ready() else {
        return;
    };
    // In small pieces: a single great one is refused by the guest's kernel before any of it is used.
    let eat = "held = []\nwhile True: held.append(b'x' * (1 << 20))";
    let output = system.vistara(&["run", "--rm", "-m", "160m", IMAGE, "python3", "-c", eat]);
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("--memory"),
        "{}",
        text(&output.stderr)
    );

    let output = system.vistara(&[
        "run",
        "--rm",
        IMAGE,
        "sh",
        "-c",
        "sleep 0.5; echo c > /proc/sysrq-trigger; sleep 60",
    ]);
    assert_eq!(output.status.code(), Some(125), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("panic"),
        "{}",
        text(&output.stderr)
    );

    let output = system.vistara(&["run", "--rm", "--timeout", "1s", IMAGE, "sleep", "1000"]);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
}

#[test]
fn a_read_only_root_and_no_network_hold() {
    let Some(system) = System::ready() else {
        return;
    };
    let script = "touch /x 2>/dev/null || echo no; ls /sys/class/net";
    let output = system.vistara(&[
        "run",
        "--rm",
        "-q",
        "--read-only",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(text(&output.stdout), "no\nlo\n", "{}", text(&output.stderr));
}

#[test]
fn ten_machines_at_once_each_give_their_own_answer() {
    let Some(system) = System::ready() else {
        return;
    };
    let runs: Vec<(usize, Child)> = (0..10)
        .map(|index| {
            let script = format!("echo {index}; exit {index}");
            let child = system
                .command(&[
                    "run", "--rm", "-q", "-m", "128m", IMAGE, "sh", "-c", &script,
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            (index, child)
        })
        .collect();
    for (index, child) in runs {
        let output = wait(child);
        assert_eq!(
            text(&output.stdout),
            format!("{index}\n"),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(output.status.code(), Some(index as i32));
    }
}

#[test]
fn the_tour_in_the_readme_works_as_it_stands() {
    let Some(system) = System::ready() else {
        return;
    };
    let readme = include_str!("../../../README.md");
    let tour = readme
        .split("```sh tour\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let bin = Path::new(env!("CARGO_BIN_EXE_vistara")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command
        .args(["-eu", "-c", tour])
        .env("PATH", path)
        .env("VISTARA_STATE_DIR", &system.state)
        .env("TMPDIR", dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(&mut command);
    // A tour cut short must not leave its machine to the next.
    system.vistara(&["rm", "-f", "web"]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    for words in ["exit code 7", "42", "hello from"] {
        assert!(out.contains(words), "{words:?} is not in:\n{out}\n{err}");
    }
}
