//! The node as its clients see it, with fake machines: lifecycle, streams, errors, and being killed in the middle.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use futures_util::StreamExt;
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, fake, request};
use vistara_api::client::StreamItem;
use vistara_api::stream::{ClientSignal, StreamEvent};
use vistara_api::{
    AttachRequest, ClientError, ErrorBody, ErrorKind, ExecRequest, KillRequest, LogEvent,
    RunRequest, StopRequest,
};
use vistara_machine::fake::{FakeEnd, Faults};

fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(body) => body,
        other => panic!("{other}"),
    }
}

fn exit_code(event: &StreamEvent) -> Option<u8> {
    match event {
        StreamEvent::Exited { exit_code, .. } => Some(*exit_code),
        StreamEvent::Failed { error } => error.exit_code,
        StreamEvent::Started { .. } | StreamEvent::Notice { .. } | StreamEvent::Receipt { .. } => {
            None
        }
    }
}

async fn node() -> Option<(tempfile::TempDir, TestNode)> {
    if !can_make_disks() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    Some((dir, node))
}

#[tokio::test]
async fn output_comes_back_apart_with_the_programs_own_exit_code() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let machine = node
        .run(&["sh", "-c", "echo out; echo err >&2; exit 7"])
        .await;
    let (out, err, event) = node.follow(&machine.id).await;
    assert_eq!(
        (out.as_slice(), err.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(exit_code(&event), Some(7));
    let ended = node.client.machine(&machine.name).await.unwrap();
    assert_eq!(
        (ended.machine.state.as_str(), ended.machine.exit_code),
        ("ended", Some(7))
    );
}

#[tokio::test]
async fn a_missing_program_is_127_and_one_that_cannot_run_126() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    for (command, code) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let machine = node.run(&[command]).await;
        let (_, _, event) = node.follow(&machine.id).await;
        assert_eq!(exit_code(&event), Some(code), "{event:?}");
        let StreamEvent::Failed { error } = event else {
            panic!("{event:?}")
        };
        assert!(error.message.contains(command), "{}", error.message);
    }
}

#[tokio::test]
async fn a_stopped_program_may_say_goodbye_and_a_deaf_one_is_killed() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let polite = node
        .run(&[
            "sh",
            "-c",
            "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done",
        ])
        .await;
    until_output(&node, &polite.id).await;
    let stopped = node
        .client
        .stop(&polite.id, &StopRequest::default())
        .await
        .unwrap();
    assert_eq!(stopped.exit_code, Some(3));
    let (out, ..) = node.follow(&polite.id).await;
    assert_eq!(out, b"up\nbye\n");

    let deaf = node
        .run(&[
            "sh",
            "-c",
            "trap '' TERM; echo up; while :; do sleep 0.05; done",
        ])
        .await;
    until_output(&node, &deaf.id).await;
    let stop = StopRequest {
        grace_ms: Some(100),
        signal: None,
    };
    assert_eq!(
        node.client.stop(&deaf.id, &stop).await.unwrap().exit_code,
        Some(137)
    );
}

async fn until_output(node: &TestNode, machine: &str) {
    let mut logs = node.client.logs(machine, true, None, None).await.unwrap();
    let first = tokio::time::timeout(BOUND, logs.next())
        .await
        .expect("the program prints something");
    assert!(
        matches!(first, Some(Ok(LogEvent::Output { .. }))),
        "{first:?}"
    );
}

#[tokio::test]
async fn a_signal_reaches_the_program_and_kill_ends_the_machine() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let machine = node
        .run(&[
            "sh",
            "-c",
            "trap 'exit 5' USR1; echo up; while :; do sleep 0.05; done",
        ])
        .await;
    until_output(&node, &machine.id).await;
    node.client
        .kill(
            &machine.id,
            &KillRequest {
                signal: Some("USR1".to_owned()),
            },
        )
        .await
        .unwrap();
    assert_eq!(node.client.wait(&machine.id).await.unwrap().exit_code, 5);

    let machine = node.run(&["sleep", "1000"]).await;
    assert_eq!(
        node.client
            .kill(&machine.id, &KillRequest::default())
            .await
            .unwrap()
            .exit_code,
        Some(137)
    );
    let again = node
        .client
        .kill(&machine.id, &KillRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused(again).kind, ErrorKind::Conflict);
}

#[tokio::test]
async fn a_time_limit_ends_the_program_with_124() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let request = RunRequest {
        timeout_ms: Some(200),
        ..request(&["sleep", "1000"])
    };
    let machine = node.client.run(&request).await.unwrap();
    let answer = node.client.wait(&machine.id).await.unwrap();
    assert_eq!(answer.exit_code, 124);
    assert!(answer.message.unwrap().contains("--timeout"));
}

#[tokio::test]
async fn machines_are_found_by_name_and_prefix_and_a_name_is_taken_once() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let named = RunRequest {
        name: Some("web".to_owned()),
        ..request(&["sleep", "1000"])
    };
    let machine = node.client.run(&named).await.unwrap();
    assert_eq!(
        node.client.machine("web").await.unwrap().machine.id,
        machine.id
    );
    assert_eq!(
        node.client
            .machine(&machine.id[..6])
            .await
            .unwrap()
            .machine
            .name,
        "web"
    );
    let taken = refused(node.client.run(&named).await.unwrap_err());
    assert!(taken.hint.unwrap().contains("vistara rm web"));
    let unknown = refused(node.client.machine("nothing").await.unwrap_err());
    assert_eq!(unknown.kind, ErrorKind::NotFound);

    let running = refused(node.client.remove_machine("web", false).await.unwrap_err());
    assert_eq!(running.kind, ErrorKind::Conflict);
    node.client.remove_machine("web", true).await.unwrap();
    assert!(node.client.machines(true).await.unwrap().is_empty());
    assert!(!node.dir.join("state/machines").join(&machine.id).exists());
    node.client.run(&named).await.unwrap();
}

#[tokio::test]
async fn a_machine_that_removes_itself_is_gone_when_its_end_is_told() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let once = RunRequest {
        auto_remove: true,
        ..request(&["true"])
    };
    let machine = node.client.run(&once).await.unwrap();
    let (.., event) = node.follow(&machine.id).await;
    assert_eq!(exit_code(&event), Some(0));
    assert!(node.client.machines(true).await.unwrap().is_empty());
}

#[tokio::test]
async fn standard_input_arrives_whole_and_its_end_too() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let wants = RunRequest {
        stdin: true,
        ..request(&["sha256sum"])
    };
    let machine = node.client.run(&wants).await.unwrap();
    let attach = AttachRequest {
        from_start: true,
        stdin: true,
        ..Default::default()
    };
    let mut streams = node.client.attach(&machine.id, &attach).await.unwrap();
    for _ in 0..64 {
        streams
            .input
            .write(vec![b'a'; 16 << 10].into())
            .await
            .unwrap();
    }
    streams
        .input
        .signal(&ClientSignal::CloseStdin)
        .await
        .unwrap();
    let (out, ..) = node.follow(&machine.id).await;
    // printf 'a%.0s' $(seq 1048576) | sha256sum
    assert!(
        out.starts_with(b"9bc1b2a288b26af7257a36277ae3816a7d4f16e89c1e7e77d0a5c48bad62b360"),
        "{out:?}"
    );
}

#[tokio::test]
async fn another_program_runs_beside_with_its_own_streams_and_code() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let machine = node.run(&["sleep", "1000"]).await;
    let exec = ExecRequest {
        command: ["sh", "-c", "cat; echo $EXTRA >&2; exit 9"]
            .map(str::to_owned)
            .to_vec(),
        env: vec!["EXTRA=more".to_owned()],
        stdin: true,
        ..ExecRequest::default()
    };
    let mut streams = node.client.exec(&machine.id, &exec).await.unwrap();
    streams.input.write("in".into()).await.unwrap();
    streams
        .input
        .signal(&ClientSignal::CloseStdin)
        .await
        .unwrap();
    let mut seen = Vec::new();
    while let Some(item) = streams.output.next().await.unwrap() {
        seen.push(item);
    }
    assert!(seen.contains(&StreamItem::Stdout("in".into())), "{seen:?}");
    assert!(
        seen.contains(&StreamItem::Stderr("more\n".into())),
        "{seen:?}"
    );
    assert!(
        matches!(
            seen.last(),
            Some(StreamItem::Event(StreamEvent::Exited { exit_code: 9, .. }))
        ),
        "{seen:?}"
    );

    let missing = ExecRequest {
        command: vec!["no-such-program".to_owned()],
        ..ExecRequest::default()
    };
    let mut streams = node.client.exec(&machine.id, &missing).await.unwrap();
    let Some(StreamItem::Event(StreamEvent::Failed { error })) =
        streams.output.next().await.unwrap()
    else {
        panic!("it must fail");
    };
    assert_eq!(
        (error.kind, error.exit_code),
        (ErrorKind::StartFailed, Some(127))
    );
}

#[tokio::test]
async fn logs_are_cut_by_lines_and_by_time() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let machine = node
        .run(&["sh", "-c", "for i in 1 2 3 4 5; do echo $i; done"])
        .await;
    node.client.wait(&machine.id).await.unwrap();
    let read = async |since: Option<&str>, tail| {
        let mut logs = node
            .client
            .logs(&machine.id, false, since, tail)
            .await
            .unwrap();
        let mut events = 0;
        let mut bytes = 0;
        while let Some(event) = logs.next().await {
            if let LogEvent::Output { data, .. } = event.unwrap() {
                events += 1;
                bytes += data.trim_end_matches('=').len() * 3 / 4;
            }
        }
        (events, bytes)
    };
    assert_eq!(read(None, None).await.1, 10);
    assert_eq!(read(None, Some(2)).await.1, 4);
    assert_eq!(read(Some("2099-01-01T00:00:00Z"), None).await, (0, 0));
    assert!(
        node.client
            .logs(&machine.id, false, Some("yesterday"), None)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_panic_a_dead_monitor_and_a_silent_guest_are_told_apart() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start_with(dir.path(), vmm.clone(), |options| {
        options.boot_bound = Duration::from_millis(300)
    })
    .await;
    node.image("test").await;
    for (end, words) in [
        (FakeEnd::Panic("no init".to_owned()), "kernel panicked"),
        (FakeEnd::MonitorCrash("signal 11".to_owned()), "signal 11"),
    ] {
        vmm.set_faults(Faults {
            end_at_once: Some(end),
            ..Faults::default()
        });
        let machine = node.run(&["true"]).await;
        let answer = node.client.wait(&machine.id).await.unwrap();
        assert_eq!(answer.exit_code, 125);
        assert!(
            answer.message.as_ref().unwrap().contains(words),
            "{answer:?}"
        );
    }
    vmm.set_faults(Faults {
        boot_delay: Some(Duration::from_secs(20)),
        ..Faults::default()
    });
    let machine = node.run(&["true"]).await;
    let answer = node.client.wait(&machine.id).await.unwrap();
    assert!(
        answer.message.as_ref().unwrap().contains("did not answer"),
        "{answer:?}"
    );

    vmm.set_faults(Faults {
        channel_failure: Some("nobody listens".to_owned()),
        ..Faults::default()
    });
    let machine = node.run(&["true"]).await;
    let waited = tokio::time::timeout(BOUND, node.client.wait(&machine.id));
    let answer = waited.await.expect("it ends in a bounded time").unwrap();
    assert!(
        answer.message.as_ref().unwrap().contains("did not answer"),
        "{answer:?}"
    );

    vmm.set_faults(Faults {
        launch_failure: Some("no memory".to_owned()),
        ..Faults::default()
    });
    let machine = node.run(&["true"]).await;
    let answer = node.client.wait(&machine.id).await.unwrap();
    assert!(
        answer.message.as_ref().unwrap().contains("no memory"),
        "{answer:?}"
    );
}

#[tokio::test]
async fn a_node_that_vanishes_loses_no_byte_no_exit_code_and_no_machine() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let count = 200_000;
    let chatty = node.run(&["seq", &count.to_string()]).await;
    let quiet = node.run(&["sh", "-c", "echo up; sleep 1; exit 42"]).await;
    let long = node.run(&["sleep", "1000"]).await;
    until_output(&node, &chatty.id).await;
    until_output(&node, &quiet.id).await;
    node.vanish();

    let node = TestNode::start(dir.path(), vmm).await;
    let (out, _, event) = node.follow(&chatty.id).await;
    let expected: Vec<u8> = (1..=count)
        .flat_map(|number| format!("{number}\n").into_bytes())
        .collect();
    assert_eq!(exit_code(&event), Some(0));
    assert!(out == expected, "{} bytes of {}", out.len(), expected.len());
    assert_eq!(node.client.wait(&quiet.id).await.unwrap().exit_code, 42);
    assert_eq!(node.client.machines(false).await.unwrap().len(), 1);
    let exec = ExecRequest {
        command: vec!["true".to_owned()],
        ..ExecRequest::default()
    };
    let mut streams = node.client.exec(&long.id, &exec).await.unwrap();
    while let Some(item) = streams.output.next().await.unwrap() {
        assert!(
            !matches!(item, StreamItem::Event(StreamEvent::Failed { .. })),
            "{item:?}"
        );
    }
    assert_eq!(
        node.client
            .stop(&long.id, &StopRequest::default())
            .await
            .unwrap()
            .exit_code,
        Some(143)
    );
}

#[tokio::test]
async fn a_machine_that_fails_at_once_waits_to_tell_the_client_that_will_attach() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    vmm.set_faults(Faults {
        launch_failure: Some("the port is taken".to_owned()),
        ..Faults::default()
    });
    let once = RunRequest {
        auto_remove: true,
        attach: true,
        ..request(&["true"])
    };
    let machine = node.client.run(&once).await.unwrap();
    node.client.wait(&machine.id).await.unwrap();
    let (_, _, event) = node.follow(&machine.id).await;
    let StreamEvent::Exited {
        exit_code: 125,
        message: Some(message),
    } = event
    else {
        panic!("{event:?}");
    };
    assert!(message.contains("the port is taken"), "{message}");
    assert!(node.client.machines(true).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_slow_reader_gets_every_byte_of_a_machine_that_removes_itself() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let once = RunRequest {
        auto_remove: true,
        ..request(&["seq", "300000"])
    };
    let machine = node.client.run(&once).await.unwrap();
    let attach = AttachRequest {
        from_start: true,
        stdin: false,
        ..Default::default()
    };
    let mut streams = node.client.attach(&machine.id, &attach).await.unwrap();
    // The program and its machine are long over when reading begins: sockets hold less than this output.
    node.client.wait(&machine.id).await.unwrap();
    let mut bytes = 0;
    loop {
        match streams.output.next().await.unwrap() {
            Some(StreamItem::Stdout(piece)) => bytes += piece.len(),
            Some(StreamItem::Event(StreamEvent::Exited { exit_code: 0, .. })) => break,
            Some(StreamItem::Event(StreamEvent::Started { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        bytes,
        (1..=300_000)
            .map(|number: u32| number.to_string().len() + 1)
            .sum::<usize>()
    );
    assert!(node.client.machines(true).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_stop_that_a_dead_node_had_begun_is_carried_on_by_the_next() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let script = "trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done";
    let machine = node.run(&["sh", "-c", script]).await;
    // Until everything about the start is on disk: what is still being written when a runtime is shut down is written.
    loop {
        let detail = node.client.machine(&machine.id).await.unwrap();
        let told = detail
            .timings
            .iter()
            .any(|timing| timing.step == "first output");
        if told && detail.machine.state == "running" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.vanish();
    // As the record is when the node dies between a stop and the program's end. (A node in the middle of one cannot vanish
    // inside this process: a runtime that is shut down lets its timers expire, the grace among them.)
    let record = dir
        .path()
        .join("state/machines")
        .join(&machine.id)
        .join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains(r#""state":"running""#), "{text}");
    std::fs::write(
        &record,
        text.replace(r#""state":"running""#, r#""state":"stopping""#),
    )
    .unwrap();

    let node = TestNode::start(dir.path(), vmm).await;
    let answer = tokio::time::timeout(BOUND, node.client.wait(&machine.id)).await;
    assert_eq!(answer.expect("the stop goes on").unwrap().exit_code, 4);
}

#[tokio::test]
async fn a_damaged_record_is_left_alone_and_harms_no_other_machine() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = fake();
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    node.image("test").await;
    let [bad, good] = [node.run(&["true"]).await, node.run(&["true"]).await];
    node.client.wait(&bad.id).await.unwrap();
    node.client.wait(&good.id).await.unwrap();
    node.vanish();
    let record = dir
        .path()
        .join("state/machines")
        .join(&bad.id)
        .join("record.json");
    std::fs::write(&record, "{\"format\":1,\"id\":").unwrap();

    let node = TestNode::start(dir.path(), vmm).await;
    let kept = node.client.machines(true).await.unwrap();
    assert_eq!(
        kept.iter().map(|machine| &machine.id).collect::<Vec<_>>(),
        [&good.id]
    );
    assert!(record.exists());
}

#[tokio::test]
async fn thirty_machines_at_once_each_give_their_own_answer() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let runs = (0..30u8).map(|index| {
        let node = &node;
        async move {
            let machine = node
                .run(&["sh", "-c", &format!("echo {index}; exit {index}")])
                .await;
            let (out, _, event) = node.follow(&machine.id).await;
            assert_eq!(
                (out, exit_code(&event)),
                (format!("{index}\n").into_bytes(), Some(index))
            );
        }
    });
    futures_util::future::join_all(runs).await;
    assert_eq!(node.client.machines(true).await.unwrap().len(), 30);
}

#[tokio::test]
async fn an_unknown_image_and_a_bad_request_say_what_to_type() {
    let Some((_dir, node)) = node().await else {
        return;
    };
    let unknown = RunRequest {
        image: "nothing:1".to_owned(),
        ..request(&["true"])
    };
    let body = refused(node.client.run(&unknown).await.unwrap_err());
    assert_eq!(body.kind, ErrorKind::ImageNotFound);
    assert!(body.hint.unwrap().contains("images pull nothing:1"));
    let bare = refused(node.client.run(&request(&[])).await.unwrap_err());
    assert!(
        bare.message.contains("names no command"),
        "{}",
        bare.message
    );
    let huge = RunRequest {
        memory: Some("100t".to_owned()),
        ..request(&["true"])
    };
    assert!(
        refused(node.client.run(&huge).await.unwrap_err())
            .message
            .contains("--memory")
    );
    let nanos = RunRequest {
        hypervisor: Some("nanovms".to_owned()),
        ..request(&["true"])
    };
    assert!(
        refused(node.client.run(&nanos).await.unwrap_err())
            .message
            .contains("Nanos")
    );
}

#[tokio::test]
async fn an_image_in_use_stays_and_a_second_node_leaves_the_first_alone() {
    let Some((dir, node)) = node().await else {
        return;
    };
    let machine = node.run(&["sleep", "1000"]).await;
    assert!(
        node.client.remove_image("test", true).await.is_err()
            || node.client.image(&machine.image_id).await.is_ok()
    );
    let second = vistara_node::run(vistara_node::NodeOptions {
        state_dir: dir.path().join("state"),
        socket: dir.path().join("node.sock"),
        idle_exit: None,
        version: "second".to_owned(),
        vmms: vistara_node::Vmms::Given(fake()),
        qemu: None,
        virtiofsd: None,
        firecracker: None,
        jailer: None,
        slirp4netns: None,
        cpu_template: None,
        boot_bound: Duration::from_secs(1),
        template_limits: None,
        guard: None,
        warm_memory: None,
    })
    .await;
    assert!(
        matches!(second, Err(vistara_node::NodeError::AlreadyServed(_))),
        "{second:?}"
    );
    assert_eq!(node.client.version().await.unwrap().machines_active, 1);
}

#[tokio::test]
async fn a_machine_that_cannot_be_taken_over_can_be_ended_and_one_that_can_again_goes_on() {
    if !can_make_disks() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), fake()).await;
    node.image("test").await;
    let killed = node.run(&["sh", "-c", "echo up; exec sleep 1000"]).await;
    let stopped = node.run(&["sh", "-c", "echo up; exec sleep 1000"]).await;
    let kept = node.run(&["sh", "-c", "echo up; exec sleep 1000"]).await;
    for machine in [&killed, &stopped, &kept] {
        until_output(&node, &machine.id).await;
    }
    node.vanish();
    let vmm = fake();
    vmm.set_faults(Faults {
        adoption_failure: Some("it stands still".to_owned()),
        ..Faults::default()
    });
    let node = TestNode::start(dir.path(), vmm.clone()).await;
    let unreachable = message_of(&node, &kept.id, |words| words.is_some());
    let words = tokio::time::timeout(BOUND, unreachable).await.unwrap();
    assert!(words.unwrap().contains("it stands still"));
    let stop = StopRequest {
        grace_ms: Some(100),
        signal: None,
    };
    let ends = async {
        let kill = KillRequest::default();
        node.client.kill(&killed.id, &kill).await.unwrap();
        node.client.stop(&stopped.id, &stop).await.unwrap();
    };
    tokio::time::timeout(BOUND, ends).await.expect("they end");
    for machine in [&killed, &stopped] {
        let answer = node.client.wait(&machine.id).await.unwrap();
        assert_eq!(answer.exit_code, 137, "{answer:?}");
    }
    // What nobody asked anything of is taken over as soon as that can be done, and its program has not noticed.
    vmm.set_faults(Faults::default());
    let again = message_of(&node, &kept.id, |words| words.is_none());
    let waited = tokio::time::timeout(BOUND, again).await;
    waited.expect("it is taken over");
    let kept = node.client.machine(&kept.id).await.unwrap().machine;
    assert_eq!((kept.state.as_str(), kept.exit_code), ("running", None));
    let kill = KillRequest::default();
    node.client.kill(&kept.id, &kill).await.unwrap();
}

/// What is told of a machine, once it is as it should be.
async fn message_of(
    node: &TestNode,
    machine: &str,
    as_wanted: impl Fn(&Option<String>) -> bool,
) -> Option<String> {
    loop {
        let message = node.client.machine(machine).await.unwrap().machine.message;
        if as_wanted(&message) {
            return message;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_node_without_work_leaves_and_takes_its_socket_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = vistara_node::NodeOptions {
        state_dir: dir.path().join("state"),
        socket: dir.path().join("node.sock"),
        idle_exit: Some(Duration::from_millis(100)),
        version: "test".to_owned(),
        vmms: vistara_node::Vmms::Given(fake()),
        qemu: None,
        virtiofsd: None,
        firecracker: None,
        jailer: None,
        slirp4netns: None,
        cpu_template: None,
        boot_bound: Duration::from_secs(1),
        template_limits: None,
        guard: None,
        warm_memory: None,
    };
    let socket = options.socket.clone();
    tokio::time::timeout(BOUND, vistara_node::run(options))
        .await
        .expect("it leaves")
        .unwrap();
    assert!(!socket.exists());
}

#[test]
fn the_checked_in_interface_document_is_the_one_that_is_served() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
    let fresh = format!("{}\n", vistara_node::openapi().to_pretty_json().unwrap());
    if std::env::var_os("VISTARA_UPDATE_OPENAPI").is_some() {
        std::fs::write(path, &fresh).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == fresh,
        "the interface changed: VISTARA_UPDATE_OPENAPI=1 cargo nextest run -p vistara-node interface"
    );
}
