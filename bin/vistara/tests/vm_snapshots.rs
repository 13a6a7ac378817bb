//! Machines that are paused, captured while they run, restored and forked, with real ones. A node of their own serves these
//! tests.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::collections::BTreeSet;
use std::time::Duration;
use vm::{System, text, until};

/// How far a guest's clock may be from the host's, in seconds, beside what a busy host takes between the sending of the time
/// and its setting.
const CLOCK_MAX: f64 = 2.0;

fn ok(system: &System, arguments: &[&str]) -> String {
    let output = system.vistara(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs_f64()
}

/// Age of a capture, in seconds, at which a clock that nobody has set shows: more than restoring and asking take together.
const CAPTURE_AGE: f64 = 20.0;

/// By how many seconds a guest's clock is late, at least: as told by the host's before and after it was asked.
fn late_by(system: &System, id: &str) -> f64 {
    let before = now();
    let clock = ok(system, &["exec", id, "date", "+%s.%N"]);
    let clock: f64 = clock.trim().parse().unwrap();
    assert!(clock < now() + CLOCK_MAX, "{clock} is yet to come");
    before - clock
}

#[test]
fn a_paused_machine_stands_still_and_goes_on_with_the_right_time() {
    let Some(system) = System::ready_as("snap-pause") else {
        return;
    };
    let count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let machine = system.machine(&["-m", "128m"], &["sh", "-c", count]);
    let id = machine.id.as_str();
    let lines = || ok(&system, &["logs", id]).lines().count();
    until("the first lines", || lines() > 2);
    ok(&system, &["pause", id]);
    assert_eq!(system.inspect(id)["state"], "paused");
    system.kill_node();
    assert_eq!(system.inspect(id)["state"], "paused");
    let before = lines();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(lines(), before, "it printed while it was paused");
    let exec = system.vistara(&["exec", id, "true"]);
    assert!(text(&exec.stderr).contains("vistara resume"), "{exec:?}");
    ok(&system, &["resume", id]);
    assert_eq!(system.inspect(id)["state"], "running");
    until("it goes on", || lines() > before);
    // The clock is set right after, and nobody waits for that.
    until("the right time", || late_by(&system, id) < CLOCK_MAX);
    ok(&system, &["pause", id]);
    let stopped = system.vistara(&["stop", "-t", "20", id]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    // The shell was asked, and not killed: a program that is held hears nothing.
    assert_eq!(system.inspect(id)["exit_code"], 143);
}

/// Lines that must differ between any two machines, again and again.
/// By the shell alone: many guests that start processes all the time would take the host from each other.
const UNIQUE: &str = "while :; do read u < /proc/sys/kernel/random/uuid; echo $u; sleep 2; done";
/// Forks at once: as many as go on in half a minute on two busy cores without KVM.
const FORKS: usize = 12;

/// What else must differ, a line each.
const IDENTITY: &str = "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address; \
    od -An -N16 -tx1 /dev/urandom";

#[test]
fn forks_of_a_running_machine_share_nothing_that_tells_machines_apart() {
    let Some(system) = System::ready_as("snap-forks") else {
        return;
    };
    let machine = system.machine(&["-m", "128m"], &["sh", "-c", UNIQUE]);
    let id = machine.id.as_str();
    ok(
        &system,
        &[
            "exec",
            id,
            "sh",
            "-c",
            "cat /proc/sys/kernel/random/boot_id > /root/boot; \
            tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id; echo kept > /root/file",
        ],
    );
    let count = FORKS.to_string();
    let begun = now();
    let forked = system.vistara(&["fork", "-n", &count, "--json", id]);
    let took = now() - begun;
    assert!(forked.status.success(), "{}", text(&forked.stderr));
    let forked: serde_json::Value = serde_json::from_slice(&forked.stdout).unwrap();
    let machines: Vec<String> = forked["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|machine| machine["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(machines.len(), FORKS);
    println!(
        "{FORKS} forks in {} ms, captured in {} ms, held {} ms",
        forked["took_ms"], forked["captured_ms"], forked["pause_ms"]
    );
    let copies: Vec<vm::Machine<'_>> = machines.iter().map(|id| system.adopt(id)).collect();
    let mut seen = BTreeSet::new();
    let mut add = |line: &str| {
        let line = line.trim();
        assert!(seen.insert(line.to_owned()), "{line} is seen twice");
    };
    let all = std::iter::once(id).chain(copies.iter().map(|copy| copy.id.as_str()));
    for (index, id) in all.clone().enumerate() {
        until("its program goes on", || {
            ok(&system, &["logs", id]).lines().count() >= 3
        });
        let logs = ok(&system, &["logs", id]);
        // What was printed in the moment of the capture may be in all logs: it is the same output. What was drawn after
        // it may not.
        let skip = if index == 0 { usize::MAX } else { 1 };
        logs.lines().skip(skip).for_each(&mut add);
        let script = format!("{IDENTITY}; cat /root/file; date +%s.%N");
        let begin = now();
        let told = ok(&system, &["exec", id, "sh", "-c", &script]);
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines.len(), 8, "{told}");
        assert_eq!(lines[0], &id[..12]);
        assert_eq!(lines[1], &id[..12]);
        lines[2..6].iter().for_each(|line| add(line));
        assert_eq!(lines[6], "kept");
        let clock: f64 = lines[7].parse().unwrap();
        // It is set within the fork. That it is set is seen where it would be late by more: in a snapshot that was restored.
        assert!(
            (begin - took - CLOCK_MAX..now() + CLOCK_MAX).contains(&clock),
            "{clock} is not between {begin} and {}",
            now()
        );
    }
    // Each has a disk of its own.
    ok(
        &system,
        &["exec", &copies[0].id, "sh", "-c", "echo mine > /root/file"],
    );
    assert_eq!(
        ok(&system, &["exec", &copies[1].id, "cat", "/root/file"]),
        "kept\n"
    );
    assert_eq!(ok(&system, &["exec", id, "cat", "/root/file"]), "kept\n");
    // A fork is a machine like any other: it survives its node, can be forked, and ends with its program's code.
    system.kill_node();
    let again = ok(&system, &["fork", "-q", "--rm", &copies[0].id]);
    assert_eq!(
        ok(&system, &["exec", again.trim(), "cat", "/root/file"]),
        "mine\n"
    );
    ok(&system, &["rm", "-f", again.trim()]);
    ok(&system, &["stop", "-t", "20", &copies[0].id]);
    assert_eq!(system.inspect(&copies[0].id)["exit_code"], 143);
}

#[test]
fn a_snapshot_is_restored_as_it_was_and_a_damaged_one_is_not() {
    let Some(system) = System::ready_as("snap-restore") else {
        return;
    };
    let count = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /root/count; sleep 0.2; done";
    let machine = system.machine(&["-m", "128m"], &["sh", "-c", count]);
    let id = machine.id.as_str();
    let last = |id: &str| -> u64 {
        let logs = ok(&system, &["logs", id]);
        logs.lines().last().map_or(0, |line| line.parse().unwrap())
    };
    until("it counts", || last(id) > 3);
    let before = last(id);
    let made: serde_json::Value = serde_json::from_str(&ok(
        &system,
        &["snapshot", "create", "--json", "--name", "kept", id],
    ))
    .unwrap();
    println!("held {} ms", made["pause_ms"]);
    let captured = now();
    let after = last(id);
    until("it goes on", || last(id) > after);
    let dir = system
        .state
        .join("snapshots")
        .join(made["id"].as_str().unwrap());
    for name in [
        "memory",
        "state",
        "overlay.img",
        "capture.json",
        "snapshot.json",
    ] {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let path = dir.join(name);
        assert_eq!(
            std::fs::metadata(&path).unwrap().mode() & 0o077,
            0,
            "{name}"
        );
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let len = file.metadata().unwrap().len();
        let refused = |what: &str| {
            let output = system.vistara(&["snapshot", "restore", "kept"]);
            let output = match text(&output.stderr).contains("there is no snapshot") {
                // Whose name cannot be read has its id.
                true => system.vistara(&["snapshot", "restore", made["id"].as_str().unwrap()]),
                false => output,
            };
            let told = text(&output.stderr);
            assert!(!output.status.success(), "{name} {what}");
            assert!(told.contains("cannot be used"), "{name} {what}: {told}");
            println!("{name} {what}: {}", told.lines().next().unwrap_or_default());
        };
        let mut byte = [0];
        let at = if name == "overlay.img" {
            1024 + 56
        } else {
            len / 2
        };
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        refused("with another bit");
        file.write_all_at(&byte, at).unwrap();
        let mut end = [0; 1];
        file.read_exact_at(&mut end, len - 1).unwrap();
        file.set_len(len - 1).unwrap();
        refused("cut");
        file.write_all_at(&end, len - 1).unwrap();
    }
    ok(&system, &["rm", "-f", id]);
    system.kill_node();
    until("the capture is old", || now() - captured > CAPTURE_AGE);
    let begun = now();
    let restored = ok(&system, &["snapshot", "restore", "--name", "back", "kept"]);
    let took = now() - begun;
    // Load alone makes it late by no more than the restoring took; a clock that nobody set is late by the capture's age.
    let late = late_by(&system, restored.trim());
    assert!(late < took + CLOCK_MAX, "late by {late} s after {took} s");
    let copy = system.adopt(restored.trim());
    until("it goes on counting", || last(&copy.id) > after + 2);
    let logs = ok(&system, &["logs", &copy.id]);
    let first: u64 = logs.lines().next().unwrap().parse().unwrap();
    assert!(
        first > before && first <= after + 2,
        "{before} {first} {after}"
    );
    let numbers: Vec<u64> = logs.lines().map(|line| line.parse().unwrap()).collect();
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
    assert_eq!(
        ok(&system, &["exec", "back", "hostname"]).trim(),
        &copy.id[..12]
    );
    ok(&system, &["snapshot", "rm", "kept"]);
    assert!(!dir.exists());
}

#[test]
fn a_node_killed_in_a_snapshot_leaves_a_machine_that_goes_on_and_no_half_snapshot() {
    let Some(system) = System::ready_as("snap-kill") else {
        return;
    };
    let count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let machine = system.machine(&["-m", "128m"], &["sh", "-c", count]);
    let id = machine.id.as_str();
    let lines = || ok(&system, &["logs", id]).lines().count();
    until("it counts", || lines() > 2);
    for round in 0..6u64 {
        for arguments in [
            &["snapshot", "create", id][..],
            &["fork", "-n", "2", "--rm", id][..],
        ] {
            let mut child = system
                .command(arguments)
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // Each time a little later in it: no condition tells of every moment inside.
            std::thread::sleep(Duration::from_millis(20 + round * 90));
            system.kill_node();
            // It may have been done before.
            let _ = child.wait();
            let now = lines();
            until("the machine goes on", || lines() > now);
            ok(&system, &["exec", id, "true"]);
            for entry in std::fs::read_dir(system.state.join("snapshots")).unwrap() {
                let path = entry.unwrap().path();
                assert!(path.join("snapshot.json").exists(), "{path:?} is half made");
            }
            let left = std::fs::read_dir(system.state.join("tmp")).unwrap().count();
            assert_eq!(left, 0, "copies of disks are left");
        }
    }
    for snapshot in ok(&system, &["snapshot", "ls", "-q"]).lines() {
        let restored = ok(&system, &["snapshot", "restore", "--rm", snapshot]);
        ok(&system, &["exec", restored.trim(), "true"]);
        ok(&system, &["rm", "-f", restored.trim()]);
        ok(&system, &["snapshot", "rm", snapshot]);
    }
    // Forks that were cut short have ended; those that were not run.
    let all = ok(&system, &["ps", "-a", "-q"]);
    for other in all.lines().filter(|other| !id.starts_with(*other)) {
        ok(&system, &["rm", "-f", other]);
    }
}

#[test]
fn an_incremental_snapshot_takes_little_and_is_restored_with_its_base() {
    let Some(system) = System::ready_as("snap-incremental") else {
        return;
    };
    let machine = system.machine(&["-m", "128m", "--network", "none"], &["sleep", "1000"]);
    let id = machine.id.as_str();
    let made = |more: &[&str]| -> serde_json::Value {
        let words = [&["snapshot", "create", "--json"], more, &[id]].concat();
        serde_json::from_str(&ok(&system, &words)).unwrap()
    };
    let whole = made(&["--name", "whole"]);
    ok(
        &system,
        &["exec", id, "sh", "-c", "echo later > /root/file"],
    );
    let less = made(&["--name", "less", "--base", "whole"]);
    println!(
        "{} bytes on a base of {}",
        less["stored_bytes"], whole["stored_bytes"]
    );
    assert_eq!(less["base"], whole["id"]);
    let bytes = |made: &serde_json::Value| made["stored_bytes"].as_u64().unwrap();
    assert!(bytes(&less) < bytes(&whole) / 2, "{less} {whole}");

    let removed = system.vistara(&["snapshot", "rm", "whole"]);
    let told = text(&removed.stderr);
    assert!(
        !removed.status.success() && told.contains("rest on whole: less"),
        "{told}"
    );
    let refused = system.vistara(&["snapshot", "create", "--base", "nothing", id]);
    assert!(text(&refused.stderr).contains("nothing"), "{refused:?}");

    let restored = ok(&system, &["snapshot", "restore", "less"]);
    let copy = system.adopt(restored.trim());
    assert_eq!(
        ok(&system, &["exec", &copy.id, "cat", "/root/file"]),
        "later\n"
    );
    ok(&system, &["snapshot", "rm", "less"]);
    ok(&system, &["snapshot", "rm", "whole"]);
}
