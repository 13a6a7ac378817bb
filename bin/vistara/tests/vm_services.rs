//! A service among three real nodes with real machines: the node that runs a copy is killed, its monitor goes by the guard's
//! hand, and only then does the copy run elsewhere.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::path::Path;
use std::time::{Duration, Instant};
use vm::three::{Three, until};
use vm::two::said;
use vm::{IMAGE, System, text};

fn service(system: &System) -> Option<serde_json::Value> {
    let output = system.vistara(&["service", "inspect", "--json", "beat"]);
    serde_json::from_slice(&output.stdout).ok()
}

/// The slot's node, where its copy runs.
fn runs_on(system: &System) -> Option<(String, String, u64)> {
    let service = service(system)?;
    let copy = &service["copies"][0];
    let node = copy["node"]["id"].as_str()?.to_owned();
    let machine = copy["machine"].as_str()?.to_owned();
    (copy["state"] == "running").then_some((node, machine, copy["generation"].as_u64()?))
}

/// Whether a process that is not a zombie has this number.
fn is_there(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().map(str::trim_start);
    state.is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// Guards of machines below a state directory.
fn guards(state: &Path) -> usize {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let state = state.to_str().unwrap();
    lines
        .map(|line| text(&line))
        .filter(|line| line.contains("guard-of-a-lease") && line.contains(state))
        .count()
}

#[test]
fn a_copy_whose_node_is_killed_is_gone_before_it_runs_elsewhere() {
    let Some(three) = Three::joined("services") else {
        return;
    };
    let [a, _, _] = &three.systems[..] else {
        panic!()
    };
    let beat = "n=0; while :; do n=$((n+1)); echo beat $n; sleep 1; done";
    let words = [
        "service", "create", "--name", "beat", "-m", "128m", "-q", IMAGE, "sh", "-c", beat,
    ];
    assert_eq!(said(a, &words), "beat");
    let (node, machine, generation) = until("it runs", || runs_on(a));
    println!("{}", said(a, &["service", "ls"]));
    let holder = three.index(&node);
    println!("{}", said(&three.systems[holder], &["ps"]));
    let state = &three.systems[holder].state;
    let record = state.join("machines").join(&machine).join("record.json");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let monitor = record["vm"]["pid"].as_u64().unwrap();
    assert!(is_there(monitor) && guards(state) == 1);

    // A node that is killed and is back within the lease goes on with its copy.
    three.systems[holder].kill_node();
    said(&three.systems[holder], &["ps"]);
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!(
        until("it still runs", || runs_on(a)),
        (node.clone(), machine, generation)
    );
    assert!(is_there(monitor) && guards(state) == 1);

    // One that stays away loses it.
    let witness = &three.systems[(holder + 1) % 3];
    three.systems[holder].kill_node();
    let killed = Instant::now();
    assert!(is_there(monitor), "machines outlive their node");
    let gone = until("its monitor is gone", || {
        let there = is_there(monitor);
        let elsewhere = runs_on(witness).filter(|(other, ..)| *other != node);
        assert!(!(there && elsewhere.is_some()), "two run at once");
        (!there).then(|| killed.elapsed())
    });
    assert!(gone < Duration::from_secs(11), "{gone:?}");
    let (_, _, later) = until("it runs elsewhere", || {
        runs_on(witness).filter(|(other, ..)| *other != node)
    });
    println!(
        "gone after {gone:?}, elsewhere after {:?}",
        killed.elapsed()
    );
    assert!(later > generation);
    // It was the owner's node, or another; both are back with the next command.
    said(&three.systems[holder], &["node", "ticket"]);
    until("it can be removed", || {
        let done = a.vistara(&["service", "rm", "beat"]);
        done.status.success().then_some(())
    });
    for system in &three.systems {
        until("nothing is left", || {
            let none = said(system, &["ps", "-aq"]).is_empty();
            (none && guards(&system.state) == 0).then_some(())
        });
        assert_eq!(said(system, &["service", "ls", "-q"]), "");
    }
}
