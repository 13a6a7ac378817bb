//! Tasks among three real nodes with real machines: run to their exit code and found again by their key; and with the node that
//! runs them killed, run again elsewhere or reported lost, as they were declared.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::process::Stdio;
use std::time::Instant;
use vm::three::{Three, until};
use vm::two::said;
use vm::{IMAGE, System, finish, text};

/// What a task's command line ends with that is lost.
const LOST: i32 = 123;

fn task(system: &System, name: &str) -> Option<serde_json::Value> {
    let output = system.vistara(&["task", "inspect", name]);
    serde_json::from_slice(&output.stdout).ok()
}

/// Where a task's program runs, by the node's id, and under which attempt.
fn runs_on(system: &System, name: &str) -> Option<(String, u64)> {
    let task = task(system, name)?;
    let runs = task["state"] == "running" && task["machine_state"] == "running";
    let node = task["node"]["id"].as_str()?.to_owned();
    runs.then_some((node, task["attempt"].as_u64()?))
}

/// Exit code, standard output and standard error.
fn run(system: &System, words: &[&str]) -> (i32, String, String) {
    let usual = ["task", "run", "-m", "128m"];
    let words: Vec<&str> = usual.into_iter().chain(words.iter().copied()).collect();
    let output = finish(
        (system.command(&words).stdin(Stdio::null()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

#[test]
fn tasks_end_once_are_run_again_or_are_lost_as_they_were_declared() {
    let Some(three) = Three::joined("tasks") else {
        return;
    };
    let a = &three.systems[0];
    // All three look after each task; the first, at which somebody waits, runs none that is to be killed.
    for other in &three.systems[1..] {
        said(other, &["node", "terms", "--label", "expendable"]);
    }

    // To its exit code, once, whoever asks again.
    let program = "echo key $VISTARA_TASK_KEY attempt $VISTARA_TASK_ATTEMPT; exit 7";
    let words = ["--key", "order-1", IMAGE, "sh", "-c", program];
    let begin = Instant::now();
    let (code, out, err) = run(a, &words);
    println!("{out}{err}after {:?}", begin.elapsed());
    assert_eq!(code, 7, "{err}");
    assert!(out.starts_with("key order-1 attempt "), "{out}");
    let again = Instant::now();
    let (code, found, err) = run(a, &words);
    println!("found again after {:?}", again.elapsed());
    assert_eq!((code, &found), (7, &out), "{err}");
    let (code, _, err) = run(a, &["--key", "order-1", IMAGE, "true"]);
    assert_eq!(code, 125);
    assert!(err.contains("the key \"order-1\""), "{err}");
    println!("{}", said(a, &["task", "ls"]));
    let name = said(a, &["task", "ls", "-q"]);
    assert_eq!(name.lines().count(), 1, "{name}");
    let waited = a.vistara(&["task", "wait", &name]);
    assert_eq!(waited.status.code(), Some(7));

    // A node that is killed and is back within the lease goes on with it.
    let program = "sleep 8; echo attempt $VISTARA_TASK_ATTEMPT; exit 9";
    let short = [
        "--name",
        "short",
        "--capable",
        "expendable",
        IMAGE,
        "sh",
        "-c",
        program,
    ];
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| run(a, &short));
        let (node, attempt) = until("it runs", || runs_on(a, "short"));
        let holder = &three.systems[three.index(&node)];
        holder.kill_node();
        said(holder, &["ps"]);
        let (code, out, err) = ran.join().unwrap();
        assert_eq!((code, out), (9, format!("attempt {attempt}\n")), "{err}");
        assert_eq!(task(a, "short").unwrap()["node"]["id"], *node);
    });

    // At least once: elsewhere, and told that it is another attempt.
    let program = "echo attempt $VISTARA_TASK_ATTEMPT; sleep 25; exit 5";
    let least = [
        "--at-least-once",
        "--key",
        "order-2",
        "--name",
        "least",
        "--capable",
        "expendable",
        IMAGE,
        "sh",
        "-c",
        program,
    ];
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| run(a, &least));
        let (node, attempt) = until("it runs", || runs_on(a, "least"));
        let killed = Instant::now();
        three.systems[three.index(&node)].kill_node();
        let (other, later) = until("it runs elsewhere", || {
            runs_on(a, "least").filter(|(other, _)| *other != node)
        });
        println!("elsewhere after {:?}", killed.elapsed());
        assert!(later > attempt, "{later} after {attempt}");
        let (code, out, err) = ran.join().unwrap();
        println!("{err}");
        assert_eq!((code, out), (5, format!("attempt {later}\n")), "{err}");
        let done = task(a, "least").unwrap();
        assert_eq!(
            (&done["state"], &done["exit_code"]),
            (&"done".into(), &5.into())
        );
        assert_eq!(done["node"]["id"], *other);
        // The one that was killed is back with the next command, has nothing that runs, and says nothing else.
        let holder = &three.systems[three.index(&node)];
        until("nothing runs there", || {
            said(holder, &["ps", "-q"]).is_empty().then_some(())
        });
        until("it knows", || {
            let known = task(holder, "least")?;
            (known["state"] == "done" && known["attempt"] == later).then_some(())
        });
    });

    // At most once: lost, with a code of its own, and not run again by anybody.
    let program = "echo attempt $VISTARA_TASK_ATTEMPT; sleep 1000";
    let most = [
        "--name",
        "most",
        "--capable",
        "expendable",
        IMAGE,
        "sh",
        "-c",
        program,
    ];
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| run(a, &most));
        let (node, attempt) = until("it runs", || runs_on(a, "most"));
        let killed = Instant::now();
        let holder = &three.systems[three.index(&node)];
        holder.kill_node();
        let (code, out, err) = ran.join().unwrap();
        println!("lost after {:?}: {err}", killed.elapsed());
        assert_eq!((code, out.as_str()), (LOST, ""), "{err}");
        assert!(err.contains("the task most is lost"), "{err}");
        until("nothing runs there", || {
            said(holder, &["ps", "-q"]).is_empty().then_some(())
        });
        for system in &three.systems {
            // The one that was killed takes what it granted for fresh until it hears the others.
            let lost = until("it knows", || {
                task(system, "most").filter(|task| task["state"] == "lost")
            });
            assert_eq!(lost["attempt"], attempt, "{lost}");
            assert_eq!(said(system, &["ps", "-q"]), "");
        }
    });
    println!("{}", said(a, &["task", "ls"]));

    for name in said(a, &["task", "ls", "-q"]).lines() {
        until("it can be removed", || {
            let removed = a.vistara(&["task", "rm", name]);
            removed.status.success().then_some(())
        });
    }
    for system in &three.systems {
        until("nothing is left", || {
            let machines = said(system, &["ps", "-aq"]);
            (machines.is_empty() && said(system, &["task", "ls", "-q"]).is_empty()).then_some(())
        });
    }
}
