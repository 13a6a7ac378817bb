//! Pausing, snapshots and forks of machines that run, with fake machines: what is refused, what is kept, and a node that dies
//! in the middle.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::{TestNode, can_make_disks, fake};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{ClientError, ErrorBody, ErrorKind, ExecRequest, StopRequest};

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
