//! Receipts of machines that ended on real nodes with fake machines: what is in one, who can check it, and what a node that
//! dies leaves of it.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use sha2::{Digest as _, Sha256};
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, fake, request};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::*;
use vistara_model::{Digest, Receipt, ReceiptHow};

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(body) => body,
        other => panic!("{other}"),
    }
}

async fn verify(node: &TestNode, text: &str) -> Result<(Receipt, VerifiedReceipt), ErrorBody> {
    let request = VerifyReceiptRequest {
        receipt: text.to_owned(),
        node: None,
    };
    let answer = node.client.verify_receipt(&request).await;
    let verified = answer.map_err(refused)?;
    let receipt = serde_json::from_value(verified.receipt.clone()).unwrap();
    Ok((receipt, verified))
}

async fn ended(client: &Client, machine: &str) -> WaitAnswer {
    tokio::time::timeout(BOUND, client.wait(machine))
        .await
        .expect("the program ends")
        .unwrap()
}

/// Waits until a machine's program runs.
async fn runs(node: &TestNode, machine: &str) {
    while node.client.machine(machine).await.unwrap().machine.state != "running" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_ended_machine_has_a_receipt_that_says_what_it_did_and_stays_the_same() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let wish = RunRequest {
        nonce: Some("0123456789abcdef".repeat(2)),
        ..request(&["sh", "-c", "echo told; echo bad >&2; read x; exit 3"])
    };
    let wish = RunRequest {
        stdin: true,
        ..wish
    };
    let machine = node.client.run(&wish).await.unwrap();
    let early = refused(node.client.receipt(&machine.id).await.unwrap_err());
    assert_eq!(early.kind, ErrorKind::Conflict);
    assert!(early.message.contains("has not ended"), "{}", early.message);

    let attach = AttachRequest {
        from_start: true,
        stdin: true,
        receipt: true,
    };
    let mut streams = node.client.attach(&machine.id, &attach).await.unwrap();
    streams.input.write("x\n".into()).await.unwrap();
    let mut told = None;
    let followed = async {
        loop {
            match streams.output.next().await.unwrap().expect("an end") {
                StreamItem::Event(StreamEvent::Receipt { receipt, missing }) => {
                    assert_eq!(missing, None);
                    told = receipt;
                }
                StreamItem::Event(StreamEvent::Exited { exit_code, .. }) => return exit_code,
                _ => {}
            }
        }
    };
    let code = tokio::time::timeout(BOUND, followed).await.expect("an end");
    assert_eq!(code, 3);
    let text = node.client.receipt(&machine.name).await.unwrap();
    assert_eq!(told.as_ref(), Some(&text), "the same by either way");

    let (receipt, verified) = verify(&node, &text).await.unwrap();
    assert_eq!(verified.known_as.as_deref(), Some("this node"));
    assert_eq!(verified.node, node.client.mesh().await.unwrap().id);
    assert_eq!(receipt.machine.to_string(), machine.id);
    let asked = &receipt.request;
    let body = serde_json::to_vec(&wish).unwrap();
    assert_eq!(asked.digest, Some(sha256(&body)));
    assert_eq!(asked.nonce, wish.nonce);
    assert_eq!((&asked.caller, &asked.grant), (&None, &None));
    assert_eq!(asked.image_id.to_string(), machine.image_id);
    assert_eq!(asked.command.as_ref(), Some(&wish.command));
    assert_eq!(
        asked.command_digest,
        sha256(b"sh\0-c\0echo told; echo bad >&2; read x; exit 3\0")
    );
    assert_eq!(asked.memory_bytes, 128 << 20);
    assert!(asked.stdin);
    assert_eq!(receipt.end.how, ReceiptHow::Exited);
    assert_eq!(receipt.end.exit_code, 3);
    let output = &receipt.output;
    assert_eq!(output.stdout.digest, Some(sha256(b"told\n")));
    assert_eq!(output.stderr.digest, Some(sha256(b"bad\n")));
    assert_eq!((output.stdout.bytes, output.stderr.bytes), (5, 4));
    assert!(output.complete && !output.terminal && !output.merged);
    assert!(receipt.usage.memory_bytes.is_some(), "{:?}", receipt.usage);
    assert!(receipt.ran.vmm_version.is_some());
    assert!(receipt.times.began_ms.unwrap() <= receipt.times.ended_ms);

    let changed = text.replace("\"exit_code\":3", "\"exit_code\":0");
    let body = verify(&node, &changed).await.unwrap_err();
    assert_eq!(body.kind, ErrorKind::User);
    assert!(body.message.contains("signature"), "{}", body.message);

    node.vanish();
    let node = TestNode::start(dir.path(), vmm).await;
    assert_eq!(node.client.receipt(&machine.id).await.unwrap(), text);
    node.client
        .remove_machine(&machine.id, false)
        .await
        .unwrap();
    let gone = refused(node.client.receipt(&machine.id).await.unwrap_err());
    assert_eq!(gone.kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn a_node_that_vanishes_in_the_middle_makes_no_hole_in_the_receipt() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let gate = dir.path().join("gate");
    let script = format!(
        "seq 1 2000; while [ ! -e {} ]; do sleep 0.02; done; seq 2001 4000; exit 5",
        gate.display()
    );
    let machine = node.run(&["sh", "-c", &script]).await;
    loop {
        let detail = node.client.machine(&machine.id).await.unwrap();
        let printed = |timing: &Timing| timing.step == "first output";
        if detail.machine.state == "running" && detail.timings.iter().any(printed) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.vanish();
    std::fs::write(&gate, "").unwrap();
    let node = TestNode::start(dir.path(), vmm).await;
    assert_eq!(ended(&node.client, &machine.id).await.exit_code, 5);
    let text = node.client.receipt(&machine.id).await.unwrap();
    let (receipt, _) = verify(&node, &text).await.unwrap();
    let all: String = (1..=4000).map(|number| format!("{number}\n")).collect();
    assert_eq!(receipt.output.stdout.digest, Some(sha256(all.as_bytes())));
    assert!(receipt.output.complete);
    assert_eq!(receipt.end.exit_code, 5);
}

#[tokio::test]
async fn a_machine_whose_end_nobody_saw_has_no_receipt_and_a_reason() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let machine = node.run(&["sleep", "600"]).await;
    runs(&node, &machine.id).await;
    node.vanish();
    // A machine that is not there any more.
    let path = (dir.path().join("state/machines").join(&machine.id)).join("record.json");
    let text = std::fs::read(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    record["vm"]["pid_start_ticks"] = 1.into();
    std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    ended(&node.client, &machine.id).await;
    let body = refused(node.client.receipt(&machine.id).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Conflict);
    assert!(body.message.contains("nobody saw"), "{}", body.message);
}

#[tokio::test]
async fn a_program_that_is_not_there_and_one_that_is_killed_have_receipts_too() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let machine = node.run(&["/no/such/program"]).await;
    assert_eq!(ended(&node.client, &machine.id).await.exit_code, 127);
    let text = node.client.receipt(&machine.id).await.unwrap();
    let (receipt, _) = verify(&node, &text).await.unwrap();
    assert_eq!(receipt.end.how, ReceiptHow::StartFailed);
    assert_eq!(receipt.end.exit_code, 127);
    assert_eq!(receipt.times.began_ms, None);

    let machine = node.run(&["sleep", "600"]).await;
    runs(&node, &machine.id).await;
    let kill = KillRequest::default();
    node.client.kill(&machine.id, &kill).await.unwrap();
    let text = node.client.receipt(&machine.id).await.unwrap();
    let (receipt, _) = verify(&node, &text).await.unwrap();
    assert_eq!(receipt.end.how, ReceiptHow::Stopped);
    assert_eq!(receipt.end.exit_code, 137);
    assert!(
        !receipt.output.complete,
        "who was killed may have had more to say"
    );
}

#[tokio::test]
async fn a_nonce_that_is_none_is_refused() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let wish = RunRequest {
        nonce: Some("short".to_owned()),
        ..request(&["true"])
    };
    let body = refused(node.client.run(&wish).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::User);
}

async fn ticket(node: &TestNode) -> String {
    let listen = ListenRequest {
        listen: Some("127.0.0.1:0".to_owned()),
    };
    let status = node.client.mesh_listen(&listen).await.unwrap();
    status.ticket.unwrap()
}

#[tokio::test]
async fn a_receipt_from_another_node_names_who_asked_and_strangers_say_that_they_do_not_know_it() {
    if !can_make_disks() {
        return;
    }
    let dirs = [0, 1, 2].map(|_| tempfile::tempdir().unwrap());
    let far = TestNode::start(dirs[0].path(), fake()).await;
    let near = TestNode::start(dirs[1].path(), fake()).await;
    far.image("test").await;
    let ticket_far = ticket(&far).await;
    let own = ticket(&near).await.split_once('@').unwrap().0.to_owned();
    let grant = GrantRequest {
        to: own.clone(),
        rights: vec!["run".to_owned()],
        until: (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string(),
        ..GrantRequest::default()
    };
    let given = far.client.grant(&grant).await.unwrap();
    let join = JoinRequest {
        ticket: ticket_far,
        name: Some("far".to_owned()),
        grant: Some(given.token.clone()),
    };
    near.client.join(&join).await.unwrap();

    let on = near.client.on("far");
    let wish = request(&["echo", "there"]);
    let machine = on.run(&wish).await.unwrap();
    ended(&on, &machine.id).await;
    let text = on.receipt(&machine.name).await.unwrap();
    let (receipt, verified) = verify(&near, &text).await.unwrap();
    assert_eq!(verified.known_as.as_deref(), Some("far"));
    let caller = receipt.request.caller.map(|caller| caller.to_string());
    assert_eq!(caller.as_ref(), Some(&own));
    assert_eq!(
        receipt.request.grant.map(|grant| grant.to_string()),
        Some(given.grant.id.clone())
    );
    // As it was sent, not as the gate made it.
    let body = serde_json::to_vec(&wish).unwrap();
    assert_eq!(receipt.request.digest, Some(sha256(&body)));
    assert!(!receipt.request.network);

    let asked = |node: &str| VerifyReceiptRequest {
        receipt: text.clone(),
        node: Some(node.to_owned()),
    };
    for (node, is) in [("far", true), (verified.node.as_str(), true), (&own, false)] {
        let answer = near.client.verify_receipt(&asked(node)).await.unwrap();
        assert_eq!(answer.is_node, Some(is), "{node}");
    }
    let nobody = near.client.verify_receipt(&asked("elsewhere")).await;
    assert_eq!(refused(nobody.unwrap_err()).kind, ErrorKind::NotFound);

    let stranger = TestNode::start(dirs[2].path(), fake()).await;
    let (_, verified) = verify(&stranger, &text).await.unwrap();
    assert_eq!(verified.known_as, None);

    // Who may run machines there sees the receipts of its own, and has no others' checked by that node.
    let others = far.run(&["true"]).await;
    ended(&far.client, &others.id).await;
    let hidden = refused(on.receipt(&others.id).await.unwrap_err());
    assert_eq!(hidden.kind, ErrorKind::NotFound);
    let denied = on.verify_receipt(&asked("far")).await;
    assert_eq!(refused(denied.unwrap_err()).kind, ErrorKind::Denied);
}
