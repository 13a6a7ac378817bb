//! The lab for real: what it promises inside, and that nothing of it is left outside. Skipped, with the reason, where its
//! packages are missing.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A boot takes seconds; a busy machine makes minutes of them.
const LIMIT_S: &str = "240";
const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// The lab with these arguments, or `None` where it cannot be had.
fn lab(arguments: &[&str]) -> Option<Command> {
    let prepared = Command::new(XTASK).args(["lab", "--prepare"]).output();
    let prepared = prepared.unwrap();
    if !prepared.status.success() {
        println!("SKIP: {}", String::from_utf8_lossy(&prepared.stderr).trim());
        return None;
    }
    let mut command = Command::new(XTASK);
    command
        .args(["lab", "--timeout", LIMIT_S])
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Some(command)
}

fn told(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// The processes that a process has started and that run.
fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let text = std::fs::read_to_string(path).unwrap();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

/// Waits until none of them runs. A zombie is gone but for its number.
fn gone(processes: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let runs = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    while processes.iter().any(runs) {
        assert!(Instant::now() < deadline, "{processes:?} still run");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the command's first line.
fn first_line(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    out
}

fn signal(name: &str, child: &Child) {
    let sent = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

#[test]
fn output_comes_apart_and_complete_and_the_status_is_the_commands() {
    let script = "seq 200000; echo \"$WORD\" >&2; pwd >&2; exit 7";
    let arguments = ["--env", "WORD=it's", "--", "sh", "-c", script];
    let Some(mut command) = lab(&arguments) else {
        return;
    };
    let output = command.output().unwrap();
    let (out, err) = told(&output);
    assert_eq!(output.status.code(), Some(7), "{err}");
    let numbers: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(out == numbers, "{} bytes of {}", out.len(), numbers.len());
    let here = command.get_current_dir().unwrap().display();
    assert_eq!(err, format!("it's\n{here}\n"));
}

#[test]
fn inside_is_what_is_promised_and_outside_nothing_changes() {
    let name = std::fs::read("/etc/hostname").ok();
    for version in ["v2", "v1"] {
        let arguments = ["--cgroup", version, "--", "tests/lab/check", version];
        let Some(mut command) = lab(&arguments) else {
            return;
        };
        let output = command.output().unwrap();
        assert_eq!(told(&output), (String::new(), String::new()), "{version}");
        assert_eq!(output.status.code(), Some(0), "{version}");
    }
    assert_eq!(std::fs::read("/etc/hostname").ok(), name);
}

#[test]
fn doctor_tells_kvm_that_works_from_kvm_that_is_gone() {
    let program = Path::new(XTASK).with_file_name("vistara");
    if !program.exists() {
        println!("SKIP: {} is not built", program.display());
        return;
    }
    let program = program.display();
    let script = format!(
        "export VISTARA_STATE_DIR=/tmp/doctor; for state in with without; do \
         {program} doctor --json | grep -A1 '\"name\": \"kvm\"'; {program} node stop >&2; \
         rmmod kvm_amd 2>/dev/null || :; done"
    );
    let Some(mut command) = lab(&["--", "sh", "-c", &script]) else {
        return;
    };
    let output = command.output().unwrap();
    let (out, err) = told(&output);
    let states: Vec<&str> = out
        .lines()
        .filter(|line| line.contains("\"state\""))
        .map(|line| line.trim().trim_end_matches(','))
        .collect();
    let expected = [r#""state": "works""#, r#""state": "absent""#];
    assert_eq!(states, expected, "{out}{err}");
}

#[test]
fn a_shared_directory_keeps_what_is_written_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let file = format!("{path}/result");
    let Some(mut command) = lab(&[
        "--share",
        path,
        "--",
        "sh",
        "-c",
        "echo kept >\"$0\"",
        &file,
    ]) else {
        return;
    };
    let output = command.output().unwrap();
    assert!(output.status.success(), "{:?}", told(&output));
    assert_eq!(std::fs::read_to_string(file).unwrap(), "kept\n");
}

#[test]
fn a_command_whose_time_is_over_is_ended_and_so_is_all_else() {
    let Some(mut command) = lab(&["--timeout", "2", "--", "sleep", "1000"]) else {
        return;
    };
    let mut child = command.spawn().unwrap();
    let mut all = vec![];
    // A server and QEMU, or their common ancestor.
    while all.len() < 2 && child.try_wait().unwrap().is_none() {
        all = children(child.id());
    }
    assert!(!all.is_empty());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(124));
    let (_, err) = told(&output);
    assert!(err.contains("the time of 2 s is over"), "{err}");
    gone(&all);
}

#[test]
fn an_interrupt_is_the_commands_own_business() {
    let script = "trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 1; done";
    let Some(mut command) = lab(&["--", "sh", "-c", script]) else {
        return;
    };
    let mut child = command.spawn().unwrap();
    let mut out = first_line(&mut child);
    signal("-INT", &child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "interrupted\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn nothing_is_left_when_it_is_killed() {
    let Some(mut command) = lab(&["--", "sh", "-c", "echo up; sleep 1000"]) else {
        return;
    };
    let mut child = command.spawn().unwrap();
    let _out = first_line(&mut child);
    let all = children(child.id());
    assert!(all.len() >= 2, "{all:?}");
    signal("-KILL", &child);
    child.wait().unwrap();
    gone(&all);
}
