//! Pausing, snapshots and forks of machines that run, with fake machines: what is refused, what is kept, and a node that dies
//! in the middle.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;
use support::{TestNode, can_make_disks, fake, request};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{
    ClientError, CreateSnapshotRequest, ErrorBody, ErrorKind, ExecRequest, ForkRequest,
    RestoreRequest, RunRequest, StopRequest,
};
use vistara_machine::fake::Faults;

fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(body) => body,
        other => panic!("{other}"),
    }
}

/// How an executed `true` fares.
async fn exec_true(node: &TestNode, machine: &str) -> Result<u8, ErrorBody> {
    let exec = ExecRequest {
        command: vec!["true".to_owned()],
        ..ExecRequest::default()
    };
    let mut streams = match node.client.exec(machine, &exec).await {
        Ok(streams) => streams,
        Err(error) => return Err(refused(error)),
    };
    while let Some(item) = streams.output.next().await.unwrap() {
        match item {
            StreamItem::Event(StreamEvent::Exited { exit_code, .. }) => return Ok(exit_code),
            StreamItem::Event(StreamEvent::Failed { error }) => return Err(error),
            _ => {}
        }
    }
    panic!("the stream ended without saying how the program did")
}

#[tokio::test]
async fn a_paused_machine_stays_so_over_a_nodes_death_and_says_what_to_type() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "1000"]).await;
    assert_eq!(
        node.client.pause(&machine.id).await.unwrap().state,
        "paused"
    );
    // Asked again, nothing happens.
    assert_eq!(
        node.client.pause(&machine.id).await.unwrap().state,
        "paused"
    );
    let error = exec_true(&node, &machine.id).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict, "{error:?}");
    assert!(error.hint.unwrap().contains("vistara resume"));
    node.vanish();

    let node = TestNode::start(dir.path(), vmm).await;
    let found = node.client.machine(&machine.id).await.unwrap();
    assert_eq!(found.machine.state, "paused");
    let resumed = node.client.resume(&machine.id).await.unwrap();
    assert_eq!(resumed.state, "running");
    assert_eq!(exec_true(&node, &machine.id).await.unwrap(), 0);
    node.client.pause(&machine.id).await.unwrap();
    let stopped = node
        .client
        .stop(&machine.id, &StopRequest::default())
        .await
        .unwrap();
    assert_eq!(stopped.exit_code, Some(143), "it went on to be asked");
    let error = refused(node.client.pause(&machine.id).await.unwrap_err());
    assert_eq!(error.kind, ErrorKind::Conflict, "{error:?}");
    let error = refused(node.client.resume(&machine.id).await.unwrap_err());
    assert_eq!(error.kind, ErrorKind::Conflict, "{error:?}");
}

fn named(name: &str) -> CreateSnapshotRequest {
    CreateSnapshotRequest {
        name: Some(name.to_owned()),
        base: None,
    }
}

#[tokio::test]
async fn a_snapshot_outlives_its_node_and_its_machine_and_becomes_other_machines() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "1000"]).await;
    let made = node
        .client
        .create_snapshot(&machine.id, &named("one"))
        .await
        .unwrap();
    assert_eq!(made.name.as_deref(), Some("one"));
    assert_eq!(made.problem, None);
    let again = node
        .client
        .create_snapshot(&machine.id, &named("one"))
        .await;
    assert_eq!(refused(again.unwrap_err()).kind, ErrorKind::Conflict);
    // It went on.
    assert_eq!(exec_true(&node, &machine.id).await.unwrap(), 0);
    // What a node that dies had not finished is nobody's.
    let half = dir
        .path()
        .join("state/snapshots/00000000000000000000000000000000");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("memory"), b"half").unwrap();
    assert_eq!(node.client.snapshots().await.unwrap().len(), 1);
    node.client.remove_machine(&machine.id, true).await.unwrap();
    node.vanish();

    let node = TestNode::start(dir.path(), vmm).await;
    assert!(!half.exists());
    let restored = node
        .client
        .restore("one", &RestoreRequest::default())
        .await
        .unwrap();
    assert_eq!(restored.state, "running");
    assert!(restored.id != machine.id && restored.name != machine.name);
    assert_eq!(restored.command, machine.command);
    let detail = node.client.machine(&restored.id).await.unwrap();
    assert_eq!(detail.parent.as_deref(), Some("snapshot one"));
    assert_eq!(detail.hostname, &restored.id[..12]);
    assert_eq!(exec_true(&node, &restored.id).await.unwrap(), 0);
    let id = node.client.remove_snapshot("one").await.unwrap();
    assert_eq!(id, made.id);
    assert!(node.client.snapshots().await.unwrap().is_empty());
    let gone = node.client.restore("one", &RestoreRequest::default()).await;
    assert_eq!(refused(gone.unwrap_err()).kind, ErrorKind::NotFound);
    assert_eq!(exec_true(&node, &restored.id).await.unwrap(), 0);
}

#[tokio::test]
async fn a_damaged_snapshot_stays_and_makes_no_machine() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "1000"]).await;
    let made = node
        .client
        .create_snapshot(&machine.id, &CreateSnapshotRequest::default())
        .await
        .unwrap();
    let memory = dir
        .path()
        .join("state/snapshots")
        .join(&made.id)
        .join("memory");
    let mut bytes = std::fs::read(&memory).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&memory, bytes).unwrap();
    let error = node
        .client
        .restore(&made.id, &RestoreRequest::default())
        .await;
    let error = refused(error.unwrap_err());
    assert!(
        error.message.contains("its memory is not what was written"),
        "{error:?}"
    );
    assert!(error.hint.unwrap().contains("vistara snapshot rm"));
    assert_eq!(node.client.machines(true).await.unwrap().len(), 1);
    assert!(memory.exists(), "it is somebody's");
    let about = memory.with_file_name("snapshot.json");
    std::fs::write(&about, b"{}").unwrap();
    let listed = node.client.snapshots().await.unwrap();
    assert!(listed[0].problem.as_ref().unwrap().contains("damaged"));
    node.client.remove_snapshot(&made.id).await.unwrap();
}

#[tokio::test]
async fn forks_are_machines_of_their_own_and_what_cannot_be_is_refused() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "1000"]).await;
    let three = ForkRequest {
        count: 3,
        ..ForkRequest::default()
    };
    let forked = node.client.fork(&machine.id, &three).await.unwrap();
    assert_eq!(forked.machines.len(), 3);
    let mut ids: Vec<&str> = forked.machines.iter().map(|one| one.id.as_str()).collect();
    for id in &ids {
        assert_eq!(exec_true(&node, id).await.unwrap(), 0);
    }
    ids.push(&machine.id);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    // Nothing of the copy of its disk stays under a name.
    let left = std::fs::read_dir(dir.path().join("state/tmp")).unwrap();
    assert_eq!(left.count(), 0);

    for request in [
        ForkRequest {
            count: 0,
            ..ForkRequest::default()
        },
        ForkRequest {
            count: 2,
            name: Some("x".to_owned()),
            ..ForkRequest::default()
        },
    ] {
        let error = node.client.fork(&machine.id, &request).await.unwrap_err();
        assert_eq!(refused(error).kind, ErrorKind::User);
    }
    node.client.pause(&machine.id).await.unwrap();
    let error = refused(node.client.fork(&machine.id, &three).await.unwrap_err());
    assert!(error.message.contains("paused"), "{error:?}");
    node.client.resume(&machine.id).await.unwrap();
    let shared = tempfile::tempdir().unwrap();
    let with_volume = RunRequest {
        volumes: vec![format!("{}:/data", shared.path().display())],
        ..request(&["sleep", "1000"])
    };
    let with_volume = node.client.run(&with_volume).await.unwrap();
    let error = node.client.fork(&with_volume.id, &three).await.unwrap_err();
    assert!(refused(error).message.contains("volumes"));
    // A capture that fails leaves the machine as it was, and nothing half made.
    vmm.set_faults(Faults {
        capture_failure: Some("on purpose".to_owned()),
        ..Faults::default()
    });
    let error = node
        .client
        .create_snapshot(&machine.id, &CreateSnapshotRequest::default())
        .await;
    assert!(refused(error.unwrap_err()).message.contains("on purpose"));
    let left = std::fs::read_dir(dir.path().join("state/snapshots")).unwrap();
    assert_eq!(left.count(), 0);
    tokio::time::timeout(Duration::from_secs(10), exec_true(&node, &machine.id))
        .await
        .expect("it goes on")
        .unwrap();
}

#[tokio::test]
async fn what_cannot_be_noted_beforehand_is_not_done() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "1000"]).await;
    // A directory in the place of the file that is written first: root may write to any directory.
    let in_the_way = dir
        .path()
        .join("state/machines")
        .join(&machine.id)
        .join("record.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let create = || async {
        let request = CreateSnapshotRequest::default();
        node.client.create_snapshot(&machine.id, &request).await
    };
    let error = refused(create().await.unwrap_err());
    assert_eq!(error.kind, ErrorKind::Host, "{error:?}");
    assert!(error.message.contains("record"), "{error:?}");
    std::fs::remove_dir(&in_the_way).unwrap();
    // Nothing is held, and nothing half made stays.
    assert_eq!(exec_true(&node, &machine.id).await.unwrap(), 0);
    create().await.unwrap();
    assert_eq!(node.client.snapshots().await.unwrap().len(), 1);
}

#[tokio::test]
async fn two_snapshots_of_one_name_at_once_are_one_and_a_refusal() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let (one, two) = tokio::join!(node.run(&["sleep", "1000"]), node.run(&["sleep", "1000"]));
    let name = named("same");
    let (first, second) = tokio::join!(
        node.client.create_snapshot(&one.id, &name),
        node.client.create_snapshot(&two.id, &name)
    );
    let refusals: Vec<ErrorBody> = [first, second]
        .into_iter()
        .filter_map(|made| made.err().map(refused))
        .collect();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert_eq!(refusals[0].kind, ErrorKind::Conflict);
    assert_eq!(node.client.snapshots().await.unwrap().len(), 1);
}
