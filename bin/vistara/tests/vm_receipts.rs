//! Receipts of real machines: on another node, of an image that only the client has; and of several nodes that agree or not.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::io::Write;
use std::process::Output;
use vm::two::said;
use vm::{IMAGE, System, state_dir, target, text};

/// Nodes that leave when the test ends.
struct Nodes(Vec<System>);

impl Drop for Nodes {
    fn drop(&mut self) {
        for system in &self.0 {
            for machine in text(&system.vistara(&["ps", "-aq"]).stdout).split_whitespace() {
                system.vistara(&["rm", "-f", machine]);
            }
            system.vistara(&["node", "leave"]);
            system.vistara(&["node", "stop"]);
        }
    }
}

/// A node that asks, with nothing of its own, and `count` that serve it with these rights, joined as `far0`, `far1`, ….
fn nodes(name: &str, count: usize, rights: &str) -> Option<Nodes> {
    let state = state_dir(&format!("receipts-{name}-near"));
    std::fs::create_dir_all(&state).unwrap();
    let mut all = Nodes(vec![System { state }]);
    let own = said(&all.0[0], &["id"]);
    for number in 0..count {
        let far = System::ready_as(&format!("receipts-{name}-far{number}"))?;
        let ticket = said(&far, &["node", "ticket", "--listen", "127.0.0.1:0"]);
        let give = ["grant", "--to", &own, "--for", rights, "--until", "1h"];
        let token = said(&far, &give);
        let called = format!("far{number}");
        let join = [
            "node", "join", &ticket, "--name", &called, "--grant", &token,
        ];
        said(&all.0[0], &join);
        all.0.push(far);
    }
    Some(all)
}

fn checked(system: &System, words: &[&str]) -> (Option<i32>, String) {
    let output = system.vistara(&[&["receipt", "verify"], words].concat());
    let told = text(&output.stdout) + &text(&output.stderr);
    (output.status.code(), told)
}

#[test]
fn an_image_that_only_the_client_has_runs_elsewhere_and_its_receipt_verifies() {
    let Some(nodes) = nodes("one", 1, "run,images") else {
        return;
    };
    let [near, far] = &nodes.0[..] else {
        panic!("two nodes");
    };
    said(far, &["images", "rm", "-f", IMAGE]);
    let archive = format!(
        "oci-archive:{}",
        target().join("demo/python3.oci.tar").display()
    );
    let receipt = near.state.join("r.txt");
    let receipt = receipt.to_str().unwrap();
    let program = "import sys; print('x' * 100000); sys.exit(3)";
    let run = [
        "--on",
        "far0",
        "run",
        "--rm",
        "-q",
        "-m",
        "128m",
        "--receipt",
        receipt,
        &archive,
        "python3",
        "-c",
        program,
    ];
    let output = near.vistara(&run);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    let printed = near.state.join("out.txt");
    std::fs::write(&printed, &output.stdout).unwrap();
    let printed = printed.to_str().unwrap();

    let id = said(near, &["--on", "far0", "images", "-q", "--no-trunc"]);
    let words = [
        receipt, "--node", "far0", "--image", &id, "--stdout", printed, "--exit", "3",
    ];
    let (code, told) = checked(near, &words);
    println!("{told}");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("of the node far0"), "{told}");
    let json = said(near, &["receipt", "verify", receipt, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["valid"], true);
    let ran = &json["receipt"]["ran"];
    assert!(ran["kernel_digest"].is_string() && ran["vmm_version"].is_string());
    let usage = &json["receipt"]["usage"];
    assert!(usage["cpu_ms"].as_u64().unwrap() > 0, "{usage}");
    assert!(usage["memory_peak_bytes"].as_u64().unwrap() > 10 << 20);
    assert_eq!(json["receipt"]["output"]["complete"], true);
    let own = said(near, &["id"]);
    assert_eq!(json["receipt"]["request"]["caller"], own.as_str());

    // Each thing that does not hold is told, and the code says so.
    let (code, told) = checked(near, &[receipt, "--exit", "0"]);
    assert_eq!(code, Some(1));
    assert!(told.contains("3, and not 0"), "{told}");
    let (code, told) = checked(near, &[receipt, "--stdout", receipt]);
    assert_eq!(code, Some(1));
    assert!(told.contains("something else"), "{told}");
    let (code, _) = checked(near, &[receipt, "--node", &own]);
    assert_eq!(code, Some(1));
    let changed = near.state.join("changed.txt");
    let good = std::fs::read_to_string(receipt).unwrap();
    std::fs::write(&changed, good.replace("\"exit_code\":3", "\"exit_code\":0")).unwrap();
    let (code, told) = checked(near, &[changed.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(told.contains("signature"), "{told}");

    // Of a machine that is kept, from here; and by somebody who knows the node no more.
    let kept = [
        "--on", "far0", "run", "-q", "-m", "128m", "--name", "kept", &archive, "true",
    ];
    assert!(near.vistara(&kept).status.success());
    let text = said(near, &["--on", "far0", "receipt", "kept"]);
    assert!(text.starts_with("vistara-receipt-1\n"), "{text}");
    said(near, &["node", "leave", "far0"]);
    let (code, told) = checked(near, &[receipt]);
    assert_eq!(code, Some(1));
    assert!(told.contains("nobody here knows the key"), "{told}");
    let key = json["receipt"]["node"].as_str().unwrap();
    assert_eq!(checked(near, &[receipt, "--node", key]).0, Some(0));
}

/// Answers the first who asks with one word and all others with another.
fn oracle() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let word = if number == 0 { "odd" } else { "even" };
            let _ = writeln!(stream.unwrap(), "{word}");
        }
    });
    port
}

fn replicas(near: &System, quorum: &str, more: &[&str], program: &str) -> Output {
    let options = ["run", "-q", "-m", "128m", "--replicas-agree", quorum];
    near.vistara(&[&options, more, &[IMAGE, "python3", "-c", program]].concat())
}

#[test]
fn the_answer_that_two_of_three_nodes_give_counts_and_who_differs_is_named() {
    let Some(nodes) = nodes("three", 3, "run,network") else {
        return;
    };
    let near = &nodes.0[0];
    let dir = near.state.join("receipts");
    let dir_text = dir.to_str().unwrap();
    let program = format!(
        "import socket, sys; s = socket.create_connection(('10.0.2.2', {})); print(s.makefile().read(), end=''); sys.exit(5)",
        oracle()
    );
    let options = ["--network", "user", "--receipt", dir_text];
    let output = replicas(near, "2/3", &options, &program);
    let told = text(&output.stderr);
    println!("{told}");
    assert_eq!(output.status.code(), Some(5), "{told}");
    assert_eq!(text(&output.stdout), "even\n");
    assert!(told.contains("2 of 3 nodes agree"), "{told}");
    assert!(
        told.contains("differs: other output (4 bytes instead of 5)"),
        "{told}"
    );
    // Who differed has signed that it did.
    let mut keys = std::collections::BTreeSet::new();
    let mut outputs = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let words = [
            "receipt",
            "verify",
            path.to_str().unwrap(),
            "--exit",
            "5",
            "--json",
        ];
        let json: serde_json::Value = serde_json::from_str(&said(near, &words)).unwrap();
        let told = |pointer: &str| json.pointer(pointer).unwrap().as_str().unwrap().to_owned();
        keys.insert(told("/receipt/node"));
        outputs.insert(told("/receipt/output/stdout/digest"));
    }
    assert_eq!((keys.len(), outputs.len()), (3, 2));
}

#[test]
fn no_answer_counts_where_too_few_agree_or_are_at_hand() {
    let Some(nodes) = nodes("few", 2, "run") else {
        return;
    };
    let near = &nodes.0[0];
    let output = replicas(near, "2/2", &[], "import os; print(os.urandom(8).hex())");
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{told}");
    assert_eq!(text(&output.stdout), "");
    assert!(told.contains("no answer counts"), "{told}");

    let output = replicas(near, "2/3", &[], "print(1)");
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{told}");
    assert!(told.contains("only 2 take it"), "{told}");

    let output = replicas(near, "2/2", &[], "import sys; print(6 * 7); sys.exit(3)");
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{told}");
    assert_eq!(text(&output.stdout), "42\n");
}
