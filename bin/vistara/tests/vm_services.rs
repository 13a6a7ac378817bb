//! A service among three real nodes with real machines: the node that runs a copy is killed, its monitor goes by the guard's
//! hand, and only then does the copy run elsewhere.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::path::Path;
use std::time::{Duration, Instant};
use vm::{IMAGE, System, text};

/// A lease, a search, and a boot under emulation on a busy machine.
const BOUND: Duration = Duration::from_secs(180);

fn said(system: &System, words: &[&str]) -> String {
    let output = system.vistara(words);
    assert!(
        output.status.success(),
        "{words:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout).trim().to_owned()
}

fn service(system: &System) -> Option<serde_json::Value> {
    let output = system.vistara(&["service", "inspect", "--json", "beat"]);
    serde_json::from_slice(&output.stdout).ok()
}

fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        if let Some(found) = found() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("it does not come to be: {what}");
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

struct Three(Vec<System>);

impl Drop for Three {
    fn drop(&mut self) {
        self.0[0].vistara(&["service", "rm", "beat"]);
        for system in &self.0 {
            for machine in text(&system.vistara(&["ps", "-aq"]).stdout).split_whitespace() {
                system.vistara(&["rm", "-f", machine]);
            }
            system.vistara(&["node", "leave"]);
            system.vistara(&["node", "stop"]);
        }
    }
}

#[test]
fn a_copy_whose_node_is_killed_is_gone_before_it_runs_elsewhere() {
    let mut systems = Vec::new();
    for name in ["services-a", "services-b", "services-c"] {
        let Some(system) = System::ready_as(name) else {
            return;
        };
        systems.push(system);
    }
    let three = Three(systems);
    let [a, b, c] = &three.0[..] else { panic!() };
    let listen = ["node", "ticket", "--listen", "127.0.0.1:0"];
    let ids: Vec<String> = (three.0.iter())
        .map(|system| said(system, &["id"]))
        .collect();
    for other in [b, c] {
        let ticket = said(other, &listen);
        let grant = ["grant", "--to", &ids[0], "--for", "run", "--until", "1h"];
        let token = said(other, &grant);
        said(a, &["node", "join", &ticket, "--grant", &token]);
    }
    // The joined two hear of each other by the first.
    for system in &three.0 {
        until("everybody knows everybody", || {
            let nodes: serde_json::Value =
                serde_json::from_str(&said(system, &["nodes", "--json"])).unwrap();
            let alive = nodes
                .as_array()?
                .iter()
                .filter(|node| node["life"] == "alive");
            (alive.count() == 2).then_some(())
        });
    }
    let beat = "n=0; while :; do n=$((n+1)); echo beat $n; sleep 1; done";
    let words = [
        "service", "create", "--name", "beat", "-m", "128m", "-q", IMAGE, "sh", "-c", beat,
    ];
    assert_eq!(said(a, &words), "beat");
    let (node, machine, generation) = until("it runs", || runs_on(a));
    println!("{}", said(a, &["service", "ls"]));
    let holder = ids.iter().position(|id| *id == node).unwrap();
    println!("{}", said(&three.0[holder], &["ps"]));
    let state = &three.0[holder].state;
    let record = state.join("machines").join(&machine).join("record.json");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let monitor = record["vm"]["pid"].as_u64().unwrap();
    assert!(is_there(monitor) && guards(state) == 1);

    // A node that is killed and is back within the lease goes on with its copy.
    three.0[holder].kill_node();
    said(&three.0[holder], &["ps"]);
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!(
        until("it still runs", || runs_on(a)),
        (node.clone(), machine, generation)
    );
    assert!(is_there(monitor) && guards(state) == 1);

    // One that stays away loses it.
    let witness = &three.0[(holder + 1) % 3];
    three.0[holder].kill_node();
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
    said(&three.0[holder], &["node", "ticket"]);
    until("it can be removed", || {
        let done = a.vistara(&["service", "rm", "beat"]);
        done.status.success().then_some(())
    });
    for system in &three.0 {
        until("nothing is left", || {
            let none = said(system, &["ps", "-aq"]).is_empty();
            (none && guards(&system.state) == 0).then_some(())
        });
        assert_eq!(said(system, &["service", "ls", "-q"]), "");
    }
}
