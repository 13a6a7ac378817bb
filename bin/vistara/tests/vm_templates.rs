//! Templates with real machines: the second run is a fork, forks share nothing that tells them apart, and a fork is a machine
//! like any other. A node of their own serves these tests.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::{Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vm::{IMAGE, System, text, until, wait};

/// Forks at once: as many as start in half a minute on two cores without KVM.
const FORKS: usize = 12;
/// How far a fork's clock may be from the host's.
const CLOCK_MAX: f64 = 2.0;

/// What must differ between any two machines, a line each.
const UNIQUE: &str = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
    head -c16 /dev/urandom | od -An -tx1; python3 -c 'import secrets; print(secrets.token_hex(16))'; \
    hostname; cat /sys/class/net/eth0/address";

/// The summary that `--json` leaves as the last line of standard error.
fn summary(output: &Output) -> serde_json::Value {
    let err = text(&output.stderr);
    let last = err.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {err}"))
}

fn run(system: &System, options: &[&str], script: &str) -> Output {
    let arguments = [
        &["run", "--rm", "-q", "--json"],
        options,
        &[IMAGE, "sh", "-c", script],
    ]
    .concat();
    let output = system.vistara(&arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    output
}

fn templates(system: &System) -> Vec<serde_json::Value> {
    let output = system.vistara(&["template", "ls", "--json"]);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs_f64()
}

#[test]
fn forks_differ_in_everything_that_tells_machines_apart() {
    let Some(system) = System::ready_as("forks") else {
        return;
    };
    let first = run(&system, &["-m", "128m"], "cat /etc/machine-id || true");
    let key = summary(&first)["template"].clone();
    assert!(key.is_string(), "the first run is a fork of what it made");
    // An image that names its machine does so in every container, too: that file is the image's.
    let machine_id = first.stdout;
    let script = format!("{UNIQUE}; date +%s.%N; cat /etc/machine-id || true");
    let begin = now();
    let children: Vec<_> = (0..FORKS)
        .map(|_| {
            let mut command = system.command(&[
                "run", "--rm", "-q", "--json", "-m", "128m", IMAGE, "sh", "-c", &script,
            ]);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let outputs: Vec<Output> = children.into_iter().map(wait).collect();
    let end = now();
    let mut seen = BTreeSet::new();
    for output in &outputs {
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(summary(output)["template"], key);
        let out = text(&output.stdout);
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines.len() >= 7, "{out}");
        for line in &lines[..6] {
            assert!(seen.insert((*line).to_owned()), "{line} is seen twice");
        }
        let clock: f64 = lines[6].parse().unwrap();
        assert!(
            (begin - CLOCK_MAX..end + CLOCK_MAX).contains(&clock),
            "{clock} is not between {begin} and {end}"
        );
        let rest: String = lines[7..].iter().map(|line| format!("{line}\n")).collect();
        assert_eq!(rest.as_bytes(), machine_id);
    }
}

#[test]
fn the_node_after_a_killed_one_forks_from_the_template_on_disk() {
    let Some(system) = System::ready_as("forks-disk") else {
        return;
    };
    let options = ["-m", "192m", "--network", "none"];
    let first = summary(&run(&system, &options, "true"));
    until("the template is on disk", || {
        templates(&system)
            .iter()
            .any(|known| known["key"] == first["template"] && known["stored_bytes"] != 0)
    });
    let before = templates(&system);
    system.kill_node();
    let second = run(&system, &options, "ls /sys/class/net");
    assert_eq!(summary(&second)["template"], first["template"]);
    assert_eq!(text(&second.stdout), "lo\n");
    let after = templates(&system);
    let created = |all: &[serde_json::Value]| {
        let found = all.iter().find(|known| known["key"] == first["template"]);
        found.map(|known| known["created_at"].clone())
    };
    assert_eq!(created(&after), created(&before), "it was made again");
}

#[test]
fn a_fork_is_a_machine_like_any_other() {
    let Some(system) = System::ready_as("forks-life") else {
        return;
    };
    let made = system.vistara(&["template", "create", "--json", "-m", "160m", IMAGE]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let script = "echo up; cd /etc; exec python3 -m http.server 8000";
    let machine = system.machine(&["-m", "160m", "-p", "0:8000"], &["sh", "-c", script]);
    let known = system.inspect(&machine.id);
    assert_eq!(known["template"], made["template"]["key"]);
    let ports = known["ports"].clone();
    let address = ports[0].as_str().unwrap().split("->").next().unwrap();
    let answers = || {
        let Ok(mut stream) = std::net::TcpStream::connect(address) else {
            return false;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut answer = String::new();
        // The port is forwarded before the program listens.
        let _ = stream
            .write_all(b"GET /hostname HTTP/1.0\r\n\r\n")
            .and_then(|()| stream.read_to_string(&mut answer));
        answer.ends_with(&format!("{}\n", &machine.id[..12]))
    };
    until("the fork's own name on the published port", answers);
    system.kill_node();
    let exec = system.vistara(&["exec", &machine.id, "hostname"]);
    assert_eq!(
        text(&exec.stdout).trim(),
        &machine.id[..12],
        "{}",
        text(&exec.stderr)
    );
    until("the same after the node was killed", answers);
    let logs = text(&system.vistara(&["logs", &machine.id]).stdout);
    assert!(logs.starts_with("up\n"), "{logs}");
    let stopped = system.vistara(&["stop", "-t", "1", &machine.id]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    assert_eq!(system.inspect(&machine.id)["state"], "ended");
}
