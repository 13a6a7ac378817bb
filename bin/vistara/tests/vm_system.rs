//! The whole system with real machines: the built binary, a node that it starts by itself, QEMU, Debian's kernel, and an
//! image of Debian's packages. One node serves the tests of this file, save the one that kills it; each test is a process
//! of its own.
//!
//! Needs a kernel store (`VISTARA_TEST_KERNELS`, which `cargo xtask test` fills) and the demonstration image (made once by
//! `cargo xtask demo-image`); skipped with the reason where either is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use vm::{IMAGE, System, finish, text, until, wait};

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
    system.kill_node();
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
        let mut answer = [0; 12];
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok()
            && std::io::Read::read_exact(&mut stream, &mut answer).is_ok()
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
