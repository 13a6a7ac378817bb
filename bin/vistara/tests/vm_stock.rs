//! The stock with real machines: what is taken from it is a machine of its own like any other, and none is left over. A node of
//! its own serves these tests.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::collections::BTreeSet;
use std::process::{Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vm::{IMAGE, System, text, until, wait};

/// How far a clock may be from the host's.
const CLOCK_MAX: f64 = 2.0;
/// What must differ between any two machines, a line each, and the time.
const UNIQUE: &str = "cat /proc/sys/kernel/random/uuid; head -c16 /dev/urandom | od -An -tx1; \
    python3 -c 'import secrets; print(secrets.token_hex(16))'; hostname; cat /sys/class/net/eth0/address; \
    tail -n1 /etc/hosts; date +%s.%N";
const OPTIONS: [&str; 7] = ["run", "--rm", "-q", "--json", "-m", "144m", IMAGE];

fn summary(output: &Output) -> serde_json::Value {
    let err = text(&output.stderr);
    let last = err.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {err}"))
}

/// So many runs at once.
fn runs(system: &System, count: usize) -> Vec<Output> {
    let arguments = [&OPTIONS[..], &["sh", "-c", UNIQUE]].concat();
    let children: Vec<_> = (0..count)
        .map(|_| {
            let mut command = system.command(&arguments);
            command.stdin(Stdio::null());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let outputs: Vec<Output> = children.into_iter().map(wait).collect();
    for output in &outputs {
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    outputs
}

fn in_stock(system: &System) -> u64 {
    let output = system.vistara(&["template", "ls", "--json"]);
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let templates = all.as_array().unwrap().iter();
    templates
        .map(|template| template["warm"].as_u64().unwrap())
        .sum()
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs_f64()
}

/// Monitors of this node's machines, by their directories below its own.
fn directories(system: &System) -> usize {
    std::fs::read_dir(system.state.join("machines"))
        .unwrap()
        .count()
}

#[test]
fn machines_of_the_stock_are_machines_of_their_own_and_none_outlives_its_node() {
    let Some(system) = System::ready_as("stock") else {
        return;
    };
    runs(&system, 1);
    runs(&system, 3);
    until("a stock of three", || in_stock(&system) >= 3);
    // Its clocks have stood still since.
    std::thread::sleep(Duration::from_secs(3));
    let begin = now();
    let outputs = runs(&system, 3);
    let end = now();
    let mut seen = BTreeSet::new();
    let mut warm = 0;
    for output in &outputs {
        let summary = summary(output);
        warm += usize::from(summary["warm"] == true);
        let out = text(&output.stdout);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 7, "{out}");
        for line in &lines[..6] {
            assert!(seen.insert((*line).to_owned()), "{line} is seen twice");
        }
        let id = summary["id"].as_str().unwrap();
        assert_eq!(lines[3], &id[..12]);
        let address = &id[..10];
        assert_eq!(lines[4].replace(':', ""), format!("02{address}"));
        assert_eq!(lines[5], format!("10.0.2.15\t{}", lines[3]));
        let clock: f64 = lines[6].parse().unwrap();
        assert!(
            (begin - CLOCK_MAX..end + CLOCK_MAX).contains(&clock),
            "{clock} is not between {begin} and {end}"
        );
    }
    assert_eq!(warm, 3);
    until("another stock", || in_stock(&system) > 0);
    system.kill_node();
    assert!(directories(&system) > 0);
    // The next node.
    assert_eq!(in_stock(&system), 0);
    assert_eq!(directories(&system), 0);
    runs(&system, 2);
    until("a stock again", || in_stock(&system) > 0);
    let stopped = system.vistara(&["node", "stop"]);
    assert!(stopped.status.success(), "{stopped:?}");
    until("its end", || directories(&system) == 0);
}
