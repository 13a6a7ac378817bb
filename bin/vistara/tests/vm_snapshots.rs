//! Machines that are paused, captured while they run, restored and forked, with real ones. A node of their own serves these
//! tests.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::time::Duration;
use vm::{System, text, until};

/// How far a guest's clock may be from the host's, in seconds.
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
    until("the right time", || {
        let clock: f64 = ok(&system, &["exec", id, "date", "+%s.%N"])
            .trim()
            .parse()
            .unwrap();
        (clock - now()).abs() < CLOCK_MAX
    });
    ok(&system, &["pause", id]);
    let stopped = system.vistara(&["stop", "-t", "20", id]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    // The shell was asked, and not killed: a program that is held hears nothing.
    assert_eq!(system.inspect(id)["exit_code"], 143);
}
