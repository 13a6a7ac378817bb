//! Tasks among real nodes on loopback, with fake machines whose programs are processes of this host: run to their end, found
//! again by their key, run again or lost when their node is killed, and known to be over by nodes that start again.
//!
//! Times are the product's own (a lease is 10 s); what is waited for is a state, within a bound that a busy machine keeps. How
//! often a program ran is what it wrote down itself.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[path = "support/network.rs"]
mod network;

use network::{Network, refused, until, until_some};
use std::path::Path;
use support::request;
use vistara_api::*;

/// A program that writes down which task and attempt it is, waits for a file `go`, and ends with this code.
fn patient(dir: &Path, code: u8) -> [String; 3] {
    let dir = dir.display();
    let line = format!(
        "echo $VISTARA_TASK_KEY $VISTARA_TASK_ATTEMPT >> {dir}/begun; \
         until [ -e {dir}/go ]; do sleep 0.1; done; exit {code}"
    );
    ["sh".to_owned(), "-c".to_owned(), line]
}

/// What it wrote down: key and attempt of each run.
fn begun(dir: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(dir.join("begun")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(key, attempt)| (key.to_owned(), attempt.parse().unwrap()))
        .collect()
}

fn wish(network: &Network, semantics: TaskSemantics, dir: &Path, code: u8) -> CreateTaskRequest {
    let command = patient(dir, code);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    CreateTaskRequest {
        semantics,
        machine: request(&command),
        nodes: network.ids.clone(),
        ..CreateTaskRequest::default()
    }
}

fn go(dir: &Path) {
    std::fs::write(dir.join("go"), "").unwrap();
}

async fn until_state(client: &Client, task: &str, state: TaskState) -> Task {
    until_some(&format!("the task is {state:?}"), async || {
        let task = client.task(task).await.ok()?;
        (task.state == state).then_some(task)
    })
    .await
}

/// The node that runs a task whose program has begun.
async fn until_begun(network: &Network, client: &Client, task: &str, dir: &Path) -> usize {
    let task = until_state(client, task, TaskState::Running).await;
    until("its program begins", async || !begun(dir).is_empty()).await;
    network.index(&task.node.unwrap().id)
}

#[tokio::test]
async fn a_task_is_run_once_to_its_exit_code_however_often_it_is_asked_for_by_its_key() {
    let Some(mut network) = Network::of(3).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    let mut wish = wish(&network, TaskSemantics::AtMostOnce, marks.path(), 7);
    wish.key = Some("order-7".to_owned());
    let client = network.node(0).client.clone();
    let made = client.create_task(&wish).await.unwrap();
    assert!(made.own && made.name.starts_with("test-"), "{made:?}");
    // While it runs, and once it is over.
    let again = client.create_task(&wish).await.unwrap();
    assert_eq!(again.id, made.id);
    go(marks.path());
    let done = until_state(&client, &made.name, TaskState::Done).await;
    assert_eq!((done.exit_code, done.key.as_str()), (Some(7), "order-7"));
    let again = client.create_task(&wish).await.unwrap();
    assert_eq!((again.id, again.state), (done.id.clone(), TaskState::Done));
    assert_eq!(begun(marks.path()), [("order-7".to_owned(), done.attempt)]);
    // Everybody who looks after it knows, and its machine is there with what it printed.
    for node in network.nodes.iter().flatten() {
        let other = until_state(&node.client, &done.id, TaskState::Done).await;
        assert_eq!(other.exit_code, Some(7));
    }
    let machine = done.machine.unwrap();
    let index = network.index(&done.node.unwrap().id);
    let on = match index {
        0 => client.clone(),
        index => client.on(&network.ids[index]),
    };
    assert_eq!(
        on.machine(&machine).await.unwrap().machine.exit_code,
        Some(7)
    );

    // The same key for something else, and the same name for another key.
    let mut other = wish.clone();
    other.semantics = TaskSemantics::AtLeastOnce;
    let body = refused(client.create_task(&other).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Conflict, "{body:?}");
    assert!(body.message.contains("order-7"), "{body:?}");
    other.key = None;
    other.name = Some(done.name.clone());
    let body = refused(client.create_task(&other).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Conflict, "{body:?}");
    // It is no service, and nobody scales or removes it as one.
    assert_eq!(client.services().await.unwrap(), []);
    let body = refused(client.remove_service(&done.name).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::NotFound, "{body:?}");

    // All nodes are killed at once: that it is over is on their disks.
    for index in 0..3 {
        network.kill(index);
    }
    for index in 0..3 {
        network.rise(index).await;
    }
    let client = network.node(0).client.clone();
    for node in network.nodes.iter().flatten() {
        let after = until_some("a keeper answers", async || {
            let task = node.client.task(&done.id).await.ok()?;
            (!task.unattended).then_some(task)
        })
        .await;
        assert_eq!((after.state, after.exit_code), (TaskState::Done, Some(7)));
    }
    assert_eq!(client.create_task(&wish).await.unwrap().id, done.id);
    assert_eq!(begun(marks.path()).len(), 1);

    // Whoever removes it has its key free again, and nothing is left of it.
    until("it is removed", async || {
        client.remove_task(&done.name).await.is_ok()
    })
    .await;
    until("its machine is gone", async || {
        network.machines().await.values().all(Vec::is_empty)
    })
    .await;
    let anew = client.create_task(&wish).await.unwrap();
    assert_ne!(anew.id, done.id);
    until_state(&client, &anew.id, TaskState::Done).await;
    assert_eq!(begun(marks.path()).len(), 2);
}

#[tokio::test]
async fn an_at_least_once_task_whose_node_is_killed_is_run_again_and_is_told_its_attempt() {
    let Some(mut network) = Network::of(3).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    let mut wish = wish(&network, TaskSemantics::AtLeastOnce, marks.path(), 3);
    wish.key = Some("again".to_owned());
    // On one that is not the owner's: that one is asked all the time.
    wish.nodes.remove(0);
    wish.nodes.push(network.ids[0].clone());
    let client = network.node(0).client.clone();
    let made = client.create_task(&wish).await.unwrap();
    let index = until_begun(&network, &client, &made.id, marks.path()).await;
    network.kill(index);
    let witness = network.node((index + 1) % 3).client.clone();
    until("it is run again", async || begun(marks.path()).len() == 2).await;
    go(marks.path());
    let done = until_state(&witness, &made.id, TaskState::Done).await;
    assert_eq!(done.exit_code, Some(3));
    let runs = begun(marks.path());
    assert!(runs.iter().all(|(key, _)| key == "again"), "{runs:?}");
    assert!(runs[0].1 < runs[1].1, "{runs:?}");
    assert_eq!(done.attempt, runs[1].1);
    assert_ne!(done.node.unwrap().id, network.ids[index]);
    // The node that was killed comes back, and neither runs it nor says anything else of it.
    network.rise(index).await;
    until("nothing runs there", async || {
        let machines = network.node(index).client.machines(false).await.unwrap();
        machines.is_empty()
    })
    .await;
    let after = until_state(&network.node(index).client, &made.id, TaskState::Done).await;
    assert_eq!((after.exit_code, after.attempt), (Some(3), done.attempt));
    assert_eq!(begun(marks.path()).len(), 2);
}

#[tokio::test]
async fn an_at_most_once_task_whose_node_is_killed_is_lost_and_is_not_run_again() {
    let Some(mut network) = Network::of(3).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    let mut wish = wish(&network, TaskSemantics::AtMostOnce, marks.path(), 3);
    wish.key = Some("once".to_owned());
    let client = network.node(0).client.clone();
    let made = client.create_task(&wish).await.unwrap();
    let index = until_begun(&network, &client, &made.id, marks.path()).await;
    network.kill(index);
    let witness = network.node((index + 1) % 3).client.clone();
    let lost = until_state(&witness, &made.id, TaskState::Lost).await;
    assert_eq!((lost.exit_code, lost.node.is_none()), (None, true));
    // Not by the node that comes back either, which ends what it finds.
    network.rise(index).await;
    until("nothing runs there", async || {
        let machines = network.node(index).client.machines(false).await.unwrap();
        machines.is_empty()
    })
    .await;
    // Its key gives it back as it is.
    let client = network.node(0).client.clone();
    let again = until_some("its owner's node knows", async || {
        let task = client.create_task(&wish).await.ok()?;
        (task.state == TaskState::Lost).then_some(task)
    })
    .await;
    assert_eq!(again.id, made.id);
    assert_eq!(begun(marks.path()).len(), 1);
}

#[tokio::test]
async fn a_task_that_ends_while_its_node_is_away_is_done_with_its_own_exit_code() {
    let Some(mut network) = Network::of(3).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    let wish = wish(&network, TaskSemantics::AtMostOnce, marks.path(), 9);
    let client = network.node(0).client.clone();
    let made = client.create_task(&wish).await.unwrap();
    let index = until_begun(&network, &client, &made.id, marks.path()).await;
    network.kill(index);
    // Its machine lives, ends, and waits to tell; the node is back within the lease.
    go(marks.path());
    network.rise(index).await;
    let client = network.node(0).client.clone();
    let done = until_state(&client, &made.id, TaskState::Done).await;
    assert_eq!(done.exit_code, Some(9));
    assert_eq!(done.node.unwrap().id, network.ids[index]);
    assert_eq!(begun(marks.path()), [(made.key, done.attempt)]);
}

#[tokio::test]
async fn a_task_that_cannot_be_made_waits_and_what_nodes_do_not_give_it_does_not_get() {
    let Some(network) = Network::of(2).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    go(marks.path());
    let client = network.node(0).client.clone();
    let wish = wish(&network, TaskSemantics::AtMostOnce, marks.path(), 0);
    // All nodes are drained: nobody takes it, and it is not lost for that.
    let terms = |draining| NodeTerms {
        draining,
        ..NodeTerms::default()
    };
    for node in network.nodes.iter().flatten() {
        node.client.set_terms(&terms(true)).await.unwrap();
    }
    let made = client.create_task(&wish).await.unwrap();
    until("it is waiting, with the reason", async || {
        let task = client.task(&made.id).await.unwrap();
        assert_eq!(task.state, TaskState::Waiting, "{task:?}");
        task.message.is_some()
    })
    .await;
    for node in network.nodes.iter().flatten() {
        node.client.set_terms(&terms(false)).await.unwrap();
    }
    let done = until_state(&client, &made.id, TaskState::Done).await;
    assert_eq!(done.exit_code, Some(0));

    let mut bad = wish.clone();
    bad.machine.stdin = true;
    let body = refused(client.create_task(&bad).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::User, "{body:?}");
    let mut bad = wish.clone();
    bad.key = Some("with spaces".to_owned());
    let body = refused(client.create_task(&bad).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::User, "{body:?}");
    assert!(body.message.contains("key"), "{body:?}");

    // A program that is not there has ended, too.
    let missing = CreateTaskRequest {
        machine: request(&["/nowhere/to/be/found"]),
        ..wish
    };
    let made = client.create_task(&missing).await.unwrap();
    let done = until_state(&client, &made.id, TaskState::Done).await;
    assert_eq!(done.exit_code, Some(127));
}
