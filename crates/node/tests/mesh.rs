//! Nodes among each other, on loopback and with fake machines: who is let in, what it may do, and what is left when one is
//! killed.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use futures_util::StreamExt;
use std::path::Path;
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, fake, request};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::*;

const LOOPBACK: &str = "127.0.0.1:0";

fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(body) => body,
        other => panic!("{other}"),
    }
}

async fn ticket(node: &TestNode) -> String {
    let listen = ListenRequest {
        listen: Some(LOOPBACK.to_owned()),
    };
    node.client
        .mesh_listen(&listen)
        .await
        .unwrap()
        .ticket
        .unwrap()
}

fn in_an_hour() -> String {
    (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string()
}

/// A node that serves and one that wants to be served, which has joined it as `far` and holds this grant, if any.
struct Two {
    _dirs: [tempfile::TempDir; 2],
    far: TestNode,
    near: TestNode,
    grant: Option<GivenGrant>,
}

async fn two(grant: Option<GrantRequest>) -> Option<Two> {
    if !can_make_disks() {
        return None;
    }
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let far = TestNode::start(dirs[0].path(), fake()).await;
    let near = TestNode::start(dirs[1].path(), fake()).await;
    far.image("test").await;
    let ticket = ticket(&far).await;
    let to = ticket_of(&near).await;
    let grant = match grant {
        Some(grant) => Some(
            far.client
                .grant(&GrantRequest { to, ..grant })
                .await
                .unwrap(),
        ),
        None => None,
    };
    let join = JoinRequest {
        ticket,
        name: Some("far".to_owned()),
        grant: grant.as_ref().map(|given| given.token.clone()),
    };
    near.client.join(&join).await.unwrap();
    Some(Two {
        _dirs: dirs,
        far,
        near,
        grant,
    })
}

/// Listens on loopback and gives the id.
async fn ticket_of(node: &TestNode) -> String {
    let ticket = ticket(node).await;
    ticket.split_once('@').unwrap().0.to_owned()
}

fn grant(rights: &[&str]) -> GrantRequest {
    GrantRequest {
        rights: rights.iter().map(|right| (*right).to_owned()).collect(),
        until: in_an_hour(),
        ..GrantRequest::default()
    }
}

async fn follow(client: &Client, machine: &str) -> (Vec<u8>, StreamEvent) {
    let attach = AttachRequest {
        from_start: true,
        stdin: false,
        ..Default::default()
    };
    let mut streams = client.attach(machine, &attach).await.unwrap();
    let mut out = Vec::new();
    let read = async {
        loop {
            match streams.output.next().await.unwrap() {
                Some(StreamItem::Stdout(bytes)) => out.extend_from_slice(&bytes),
                Some(StreamItem::Event(
                    event @ (StreamEvent::Exited { .. } | StreamEvent::Failed { .. }),
                )) => return event,
                Some(_) => {}
                None => panic!("the stream ended without saying how the program did"),
            }
        }
    };
    let event = tokio::time::timeout(BOUND, read)
        .await
        .expect("the program ends");
    (out, event)
}

#[tokio::test]
async fn a_program_runs_on_another_node_and_everything_of_it_comes_back() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let machine = far
        .run(&request(&["sh", "-c", "echo over there; exit 7"]))
        .await
        .unwrap();
    let (out, event) = follow(&far, &machine.name).await;
    assert_eq!(out, b"over there\n");
    assert!(
        matches!(event, StreamEvent::Exited { exit_code: 7, .. }),
        "{event:?}"
    );
    assert_eq!(far.wait(&machine.id).await.unwrap().exit_code, 7);
    let mut logs = far.logs(&machine.id[..8], true, None, None).await.unwrap();
    let mut lines = 0;
    while let Some(event) = logs.next().await {
        assert!(matches!(event.unwrap(), LogEvent::Output { .. }));
        lines += 1;
    }
    assert_eq!(lines, 1);
    let near_id = two.near.client.mesh().await.unwrap().id;
    assert_eq!(
        far.machine(&machine.id).await.unwrap().machine.owner,
        Some(near_id)
    );
    assert!(
        two.near.client.machines(true).await.unwrap().is_empty(),
        "it is not here"
    );
    far.remove_machine(&machine.id, false).await.unwrap();
    assert!(two.far.client.machines(true).await.unwrap().is_empty());
}

#[tokio::test]
async fn exec_copying_and_stopping_work_on_another_node() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let machine = far.run(&request(&["sleep", "1000"])).await.unwrap();
    let exec = ExecRequest {
        command: ["sh", "-c", "read line; echo got $line"]
            .map(str::to_owned)
            .to_vec(),
        stdin: true,
        ..ExecRequest::default()
    };
    let mut streams = loop {
        // It may not run yet.
        match far.exec(&machine.id, &exec).await {
            Ok(streams) => break streams,
            Err(ClientError::Refused(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    streams.input.write("word\n".into()).await.unwrap();
    let mut out = Vec::new();
    let ended = async {
        loop {
            match streams.output.next().await.unwrap() {
                Some(StreamItem::Stdout(bytes)) => out.extend_from_slice(&bytes),
                Some(StreamItem::Event(StreamEvent::Exited { exit_code, .. })) => break exit_code,
                Some(StreamItem::Event(StreamEvent::Failed { error })) => panic!("{error:?}"),
                Some(_) => {}
                None => panic!("it ended without saying how"),
            }
        }
    };
    assert_eq!(tokio::time::timeout(BOUND, ended).await.unwrap(), 0);
    assert_eq!(out, b"got word\n");
    let kept = tempfile::tempdir().unwrap();
    let path = kept.path().to_str().unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let content = vec![7_u8; 3 << 20];
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    tar.append_data(&mut header, "big", content.as_slice())
        .unwrap();
    let bytes = std::io::Cursor::new(tar.into_inner().unwrap());
    far.archive_in(&machine.id, path, bytes).await.unwrap();
    assert_eq!(std::fs::read(kept.path().join("big")).unwrap(), content);
    let mut archive = far
        .archive_out(&machine.id, &format!("{path}/big"), false)
        .await
        .unwrap();
    let mut length = 0;
    while let Some(bytes) = archive.next().await {
        length += bytes.unwrap().len();
    }
    assert!(length > content.len(), "{length}");
    let stop = StopRequest {
        grace_ms: Some(100),
        signal: None,
    };
    assert_eq!(far.stop(&machine.name, &stop).await.unwrap().state, "ended");
}

#[tokio::test]
async fn without_a_grant_nothing_is_served_and_the_owner_needs_none() {
    let Some(two) = two(None).await else { return };
    let far = two.near.client.on("far");
    let body = refused(far.run(&request(&["true"])).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Denied);
    assert!(
        body.hint.unwrap().contains("vistara grant"),
        "what to do is told"
    );
    for error in [
        far.machines(true).await.unwrap_err(),
        far.version().await.unwrap_err(),
        far.images().await.unwrap_err(),
        far.nodes().await.unwrap_err(),
        far.shutdown().await.unwrap_err(),
    ] {
        assert_eq!(refused(error).kind, ErrorKind::Denied);
    }
    assert!(two.far.client.machines(true).await.unwrap().is_empty());
    let machine = two.far.run(&["true"]).await;
    assert_eq!(two.far.client.wait(&machine.id).await.unwrap().exit_code, 0);
}

#[tokio::test]
async fn a_grant_gives_what_it_says_and_nothing_of_the_owners() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let owners = two.far.run(&["sleep", "1000"]).await;
    assert!(far.machines(true).await.unwrap().is_empty());
    for typed in [owners.id.as_str(), owners.name.as_str(), &owners.id[..6]] {
        let body = refused(far.machine(typed).await.unwrap_err());
        assert_eq!(body.kind, ErrorKind::NotFound, "{typed}");
        let body = refused(far.remove_machine(typed, true).await.unwrap_err());
        assert_eq!(body.kind, ErrorKind::NotFound);
    }
    for error in [
        far.shutdown().await.unwrap_err(),
        far.grants().await.unwrap_err(),
        far.nodes().await.unwrap_err(),
        far.mesh_leave().await.unwrap_err(),
        far.prune_images(true).await.unwrap_err(),
        far.kernels().await.unwrap_err(),
    ] {
        assert_eq!(refused(error).kind, ErrorKind::Denied);
    }
    for bad in [
        RunRequest {
            volumes: vec!["/etc:/etc".to_owned()],
            ..request(&["true"])
        },
        RunRequest {
            ports: vec!["0:80".to_owned()],
            ..request(&["true"])
        },
        RunRequest {
            network: Some("user".to_owned()),
            ..request(&["true"])
        },
    ] {
        assert_eq!(
            refused(far.run(&bad).await.unwrap_err()).kind,
            ErrorKind::Denied,
            "{bad:?}"
        );
    }
    assert_eq!(two.far.client.machines(true).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_quota_holds_over_a_restart_and_against_many_at_once() {
    let quota = GrantRequest {
        machines: Some(2),
        memory: Some("1g".to_owned()),
        ..grant(&["run"])
    };
    let Some(two) = two(Some(quota)).await else {
        return;
    };
    let far = two.near.client.on("far");
    let sleep = request(&["sleep", "1000"]);
    let asked = (0..6).map(|_| far.run(&sleep));
    let made = futures_util::future::join_all(asked).await;
    let (good, bad): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
    assert_eq!(good.len(), 2);
    for error in bad {
        assert_eq!(refused(error.unwrap_err()).kind, ErrorKind::Denied);
    }
    // One that has ended still has its disk.
    let ended = &good[0].as_ref().unwrap().id;
    far.kill(ended, &KillRequest::default()).await.unwrap();
    far.wait(ended).await.unwrap();
    let body = refused(far.run(&sleep).await.unwrap_err());
    assert!(body.message.contains("not removed"), "{}", body.message);
    far.remove_machine(ended, false).await.unwrap();
    far.run(&sleep).await.unwrap();
    let dir = two.far.dir.clone();
    two.far.vanish();
    let again = TestNode::start(&dir, fake()).await;
    // Fake machines end with their node, and count until they are removed.
    let grants = again.client.grants().await.unwrap();
    assert_eq!(grants[0].machines_used, Some(2));
    assert_eq!(grants[0].state, "live");
}

#[tokio::test]
async fn a_node_is_chosen_by_what_it_says_and_holds_a_place_for_its_asker() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let terms = NodeTerms {
        region: Some("eu".to_owned()),
        price_micros: 7,
        ..NodeTerms::default()
    };
    two.far.client.set_terms(&terms).await.unwrap();
    let body = refused(far.set_terms(&terms).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Denied);
    let wish = PlaceRequest {
        memory: Some("64m".to_owned()),
        regions: vec!["eu".to_owned()],
        ..PlaceRequest::default()
    };
    let placed = two.near.client.place(&wish).await.unwrap();
    assert_eq!((placed.name.as_str(), placed.here), ("far", false));
    assert!(
        (placed.reasons.iter()).any(|line| line.starts_with("here not asked: its region")),
        "{:?}",
        placed.reasons
    );
    let known = two.near.client.nodes().await.unwrap();
    let facts = known[0].facts.clone().unwrap();
    assert_eq!(
        (facts.region.as_deref(), facts.price_micros),
        (Some("eu"), 7)
    );

    // Only its asker has it, and once.
    let taken = two.far.client.take_offer(&placed.offer).await;
    assert_eq!(refused(taken.unwrap_err()).kind, ErrorKind::Conflict);
    let machine = far
        .clone()
        .under(&placed.offer)
        .run(&request(&["true"]))
        .await
        .unwrap();
    let (_, end) = follow(&far, &machine.id).await;
    assert!(
        matches!(end, StreamEvent::Exited { exit_code: 0, .. }),
        "{end:?}"
    );
    let taken = far.take_offer(&placed.offer).await;
    assert_eq!(refused(taken.unwrap_err()).kind, ErrorKind::Conflict);

    // What is promised is nobody else's until it is given back.
    let free = facts.memory_free_bytes;
    let most = |memory_bytes| OfferRequest {
        request: format!("{memory_bytes:032x}"),
        memory_bytes,
    };
    let all = most(free - free / 8);
    far.ask_offer(&all).await.unwrap();
    let second = far.ask_offer(&most(free / 2)).await.unwrap_err();
    assert_eq!(refused(second).kind, ErrorKind::Conflict);
    let large = RunRequest {
        memory: Some((free / 2).to_string()),
        ..request(&["true"])
    };
    let body = refused(two.far.client.run(&large).await.unwrap_err());
    assert!(body.message.contains("promised to others"), "{body:?}");
    far.release_offer(&all.request).await.unwrap();
    far.ask_offer(&most(free / 2)).await.unwrap();
    far.release_offer(&most(free / 2).request).await.unwrap();

    // Nobody who is drained takes anything, and the reason is told.
    let drained = NodeTerms {
        draining: true,
        ..terms
    };
    two.far.client.set_terms(&drained).await.unwrap();
    let body = refused(two.near.client.place(&wish).await.unwrap_err());
    assert!(
        body.message.contains("far: it is being drained"),
        "{body:?}"
    );
}

#[tokio::test]
async fn a_grant_that_was_revoked_ends_what_goes_on_under_it() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let machine = far.run(&request(&["sleep", "1000"])).await.unwrap();
    let mut logs = far.logs(&machine.id, true, None, None).await.unwrap();
    let id = two.grant.unwrap().grant.id;
    assert_eq!(two.far.client.revoke(&id).await.unwrap().state, "revoked");
    let cut = async { while logs.next().await.is_some_and(|event| event.is_ok()) {} };
    tokio::time::timeout(BOUND, cut)
        .await
        .expect("the stream is cut off");
    let body = refused(far.machines(true).await.unwrap_err());
    assert!(body.message.contains("revoked"), "{}", body.message);
    // Its machines are the owner's to end.
    let kept = two.far.client.machines(false).await.unwrap();
    assert_eq!(kept.len(), 1);
}

#[tokio::test]
async fn a_grant_that_has_expired_is_void() {
    let soon = GrantRequest {
        until: (jiff::Timestamp::now() + Duration::from_secs(3)).to_string(),
        ..grant(&["run"])
    };
    let Some(two) = two(Some(soon)).await else {
        return;
    };
    let far = two.near.client.on("far");
    let over = async {
        loop {
            match far.machines(true).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => return refused(error),
            }
        }
    };
    let body = tokio::time::timeout(BOUND, over).await.expect("it expires");
    assert!(body.message.contains("expired"), "{}", body.message);
}

#[tokio::test]
async fn a_token_is_worth_nothing_to_another_node_and_can_be_narrowed_and_passed_on() {
    let Some(two) = two(Some(grant(&["run", "images"]))).await else {
        return;
    };
    let token = two.grant.as_ref().unwrap().token.clone();
    let dir = tempfile::tempdir().unwrap();
    let third = TestNode::start(dir.path(), fake()).await;
    let third_id = ticket_of(&third).await;
    let far_ticket = two.far.client.mesh().await.unwrap().ticket.unwrap();
    // Its own node refuses to keep what is not its own.
    let join = |grant: Option<String>| JoinRequest {
        ticket: far_ticket.clone(),
        name: Some("far".to_owned()),
        grant,
    };
    let body = refused(
        third
            .client
            .join(&join(Some(token.clone())))
            .await
            .unwrap_err(),
    );
    assert_eq!(body.kind, ErrorKind::User, "{body:?}");
    let passed = NarrowRequest {
        token,
        rights: Some(vec!["run".to_owned()]),
        machines: Some(0),
        to: Some(third_id),
        ..NarrowRequest::default()
    };
    assert!(
        third.client.narrow(&passed).await.is_err(),
        "only its holder passes it on"
    );
    let passed = two.near.client.narrow(&passed).await.unwrap().token;
    third.client.join(&join(Some(passed))).await.unwrap();
    let far = third.client.on("far");
    assert!(far.machines(true).await.unwrap().is_empty());
    let body = refused(far.run(&request(&["true"])).await.unwrap_err());
    assert_eq!(
        body.kind,
        ErrorKind::Denied,
        "narrowed to no machine: {body:?}"
    );
}

#[tokio::test]
async fn a_node_that_was_killed_is_found_again_with_its_machines_books_and_peers() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    let far = two.near.client.on("far");
    let machine = far
        .run(&request(&["sh", "-c", "echo before; exit 3"]))
        .await
        .unwrap();
    assert_eq!(far.wait(&machine.id).await.unwrap().exit_code, 3);
    let before = two.far.client.mesh().await.unwrap();
    let dir = two.far.dir.clone();
    two.far.vanish();
    let body = tokio::time::timeout(BOUND, far.machines(true))
        .await
        .expect("it is not waited for ever");
    assert!(body.is_err(), "nobody is there");
    let again = TestNode::start(&dir, fake()).await;
    let after = again.client.mesh().await.unwrap();
    assert_eq!(
        (&before.id, before.generation + 1),
        (&after.id, after.generation)
    );
    assert_eq!(before.ticket, after.ticket, "the same address");
    let found = async {
        loop {
            match far.machines(true).await {
                Ok(machines) => return machines,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    let machines = tokio::time::timeout(BOUND, found)
        .await
        .expect("it is dialled again");
    assert_eq!((machines.len(), machines[0].exit_code), (1, Some(3)));
    // And the other way round: the one that has joined is killed.
    let dir = two.near.dir.clone();
    two.near.vanish();
    let near = TestNode::start(&dir, fake()).await;
    assert_eq!(
        near.client.nodes().await.unwrap()[0].name.as_deref(),
        Some("far")
    );
    assert_eq!(near.client.on("far").machines(true).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_node_that_was_left_is_unknown_and_nothing_listens_before_it_is_asked_to() {
    let Some(two) = two(Some(grant(&["run"]))).await else {
        return;
    };
    two.near.client.forget_node("far").await.unwrap();
    let body = refused(two.near.client.on("far").machines(true).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::NotFound);
    two.near.client.mesh_leave().await.unwrap();
    let status = two.near.client.mesh().await.unwrap();
    assert!(!status.on && status.ticket.is_none());
    let dir = tempfile::tempdir().unwrap();
    let quiet = TestNode::start(dir.path(), fake()).await;
    quiet.client.machines(true).await.unwrap();
    assert!(
        !Path::new(&quiet.dir.join("state/mesh")).exists(),
        "no key, no socket"
    );
    let join = JoinRequest {
        // A documentation address: nobody answers there.
        ticket: format!("{}@192.0.2.1:9", status.id),
        ..JoinRequest::default()
    };
    let body = refused(quiet.client.join(&join).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::Peer, "{body:?}");
    assert!(
        quiet.client.nodes().await.unwrap().is_empty(),
        "it is not remembered"
    );
}

/// Has a node import an image of one file that does not compress; gives its parts and its one layer.
async fn noise_image(client: &Client, name: &str, seed: u64) -> (ImageParts, bytes::Bytes) {
    let mut state = seed;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    })
    .take(300_000)
    .collect();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(noise.len() as u64);
    header.set_mode(0o644);
    // The disk has what is in both but once: it is half as large as the layer.
    for name in ["noise", "same"] {
        tar.append_data(&mut header, name, &noise[..]).unwrap();
    }
    let archive = tar.into_inner().unwrap();
    assert!(imported(client, name, archive).await.is_ok());
    let parts = client.image_parts(name).await.unwrap();
    let layer = &parts.layers[0];
    let blob = client.blob(&layer.digest, 0, layer.bytes).await.unwrap();
    assert_eq!(blob.len() as u64, layer.bytes);
    (parts, blob)
}

async fn imported(client: &Client, name: &str, archive: Vec<u8>) -> Result<Image, ErrorBody> {
    let archive = std::io::Cursor::new(archive);
    ended(client.import(Some(name), archive).await).await
}

async fn ended(
    events: Result<vistara_api::client::Events<ImageEvent>, ClientError>,
) -> Result<Image, ErrorBody> {
    let mut events = events.map_err(refused)?;
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ImageEvent::Done { image } => return Ok(image),
            ImageEvent::Failed { error } => return Err(error),
            _ => {}
        }
    }
    panic!("the stream ended without saying how it went")
}

async fn push(
    to: &Client,
    layer: &LayerPart,
    bytes: u64,
    from: u64,
    data: bytes::Bytes,
) -> Result<u64, ErrorBody> {
    let pieces = futures_util::stream::iter([Ok(data)]);
    let sent = to.send_blob(&layer.digest, bytes, from, pieces).await;
    sent.map(|received| received.have_bytes).map_err(refused)
}

#[tokio::test]
async fn what_others_brought_never_counts_less_than_it_is_and_many_at_once_get_no_more() {
    let quota = GrantRequest {
        disk: Some("1m".to_owned()),
        ..grant(&["run", "images"])
    };
    let Some(two) = two(Some(quota)).await else {
        return;
    };
    let far = two.near.client.on("far");
    let (first, first_blob) = noise_image(&two.near.client, "first", 1).await;
    let (second, second_blob) = noise_image(&two.near.client, "second", 2).await;
    let (layer, whole) = (&first.layers[0], first.layers[0].bytes);
    // A beginning of it, then the same blob with another length: it counts as before.
    let half = first_blob.slice(..300_000);
    assert_eq!(push(&far, layer, whole, 0, half).await.unwrap(), 300_000);
    let _ = push(&far, layer, 1, 0, bytes::Bytes::new()).await;
    let other = &second.layers[0];
    let denied = push(&far, other, other.bytes, 0, second_blob.clone()).await;
    assert_eq!(denied.unwrap_err().kind, ErrorKind::Denied);
    // And when it is whole, too.
    let rest = first_blob.slice(300_000..);
    assert_eq!(
        push(&far, layer, whole, 300_000, rest).await.unwrap(),
        whole
    );
    assert_eq!(
        push(&far, layer, 1, 0, bytes::Bytes::new()).await.unwrap(),
        whole
    );
    let denied = push(&far, other, other.bytes, 0, second_blob).await;
    assert_eq!(denied.unwrap_err().kind, ErrorKind::Denied);
    let image = ended(far.assemble_image(&first).await).await.unwrap();
    assert_eq!(image.id, first.id);
    let grants = two.far.client.grants().await.unwrap();
    // The layer, and the disk that was made of it.
    let used = grants[0].disk_used_bytes;
    assert!(used >= Some(whole + whole / 2), "{grants:?}");

    // Archives are asked for before they come, all of them together.
    two.far.client.remove_image(&image.id, true).await.unwrap();
    let archives = (3..6_u8).map(|seed| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(600_000);
        header.set_mode(0o644);
        let content = std::io::Read::take(std::io::repeat(seed), 600_000);
        tar.append_data(&mut header, "file", content).unwrap();
        let archive = tar.into_inner().unwrap();
        let far = far.clone();
        async move { imported(&far, &format!("many:{seed}"), archive).await }
    });
    let all = futures_util::future::join_all(archives).await;
    assert!(all.iter().filter(|one| one.is_ok()).count() <= 1, "{all:?}");
}

#[tokio::test]
async fn an_archive_of_somebody_elses_takes_no_name_of_the_owners() {
    let Some(two) = two(Some(grant(&["run", "images"]))).await else {
        return;
    };
    let owners = two.far.client.image("test").await.unwrap();
    let far = two.near.client.on("far");
    let (parts, _) = noise_image(&far, "own", 7).await;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    tar.append_data(&mut header, "x", &b"x"[..]).unwrap();
    let archive = tar.into_inner().unwrap();
    let image = imported(&far, "test", archive).await.unwrap();
    assert_ne!(image.id, owners.id);
    assert_eq!(two.far.client.image("test").await.unwrap().id, owners.id);
    let named = ImageParts {
        names: vec!["docker.io/library/test:latest".to_owned()],
        ..parts
    };
    ended(far.assemble_image(&named).await).await.unwrap();
    assert_eq!(two.far.client.image("test").await.unwrap().id, owners.id);
}
