//! The client and the agent together, over socket pairs, with real processes of this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test fails by panicking, in its helpers too.

use sha2::{Digest, Sha256};
use std::future::Future;
use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vistara_guest_agent::{Channel, Connector, Options, serve};
use vistara_guest_client::*;
use vistara_guest_protocol::{FrameKind, Sequence, encode_data};

/// An agent in a thread of this process.
struct Guest {
    connector: Option<Connector>,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

impl Guest {
    fn start() -> Self {
        let (connector, channel) = Channel::in_process().unwrap();
        let options = Options {
            hostname: "guest".into(),
        };
        let thread = std::thread::spawn(move || serve(channel, options));
        Self {
            connector: Some(connector),
            thread: Some(thread),
        }
    }

    fn stream(&self) -> StdStream {
        let stream = self.connector.as_ref().unwrap().connect().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    async fn connect(&self) -> (Agent, Welcome) {
        let stream = UnixStream::from_std(self.stream()).unwrap();
        connect(stream, ConnectOptions::default()).await.unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.connector.take());
        let result = self.thread.take().unwrap().join().unwrap();
        if !std::thread::panicking() {
            result.unwrap();
        }
    }
}

/// Runs a test within a time that no healthy run needs.
fn run<F: Future<Output = ()>>(test: impl FnOnce(Guest) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test(Guest::start()))
            .await
            .expect("the test hangs");
    });
}

fn sh(script: &str) -> ProcessSpec {
    ProcessSpec {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        ..ProcessSpec::default()
    }
}

/// Everything a process prints, acknowledged as it comes.
async fn collect(process: &mut Process) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(chunk) = process.output.next().await {
        let to = if chunk.stream == OutputStream::Stdout {
            &mut out
        } else {
            &mut err
        };
        assert_eq!(chunk.offset, to.len() as u64);
        to.extend_from_slice(&chunk.bytes);
        process.output.ack(chunk.stream, chunk.end());
    }
    (out, err)
}

async fn run_to_end(agent: &Agent, id: u32, spec: ProcessSpec) -> (Exit, String, String) {
    let mut process = agent.spawn(ProcessId(id), spec).await.unwrap();
    let (out, err) = collect(&mut process).await;
    let exit = process.handle.exited().await.unwrap();
    process.handle.forget().await.unwrap();
    (
        exit,
        String::from_utf8(out).unwrap(),
        String::from_utf8(err).unwrap(),
    )
}

async fn failure(agent: &Agent, spec: ProcessSpec) -> SpawnFailed {
    match agent.spawn(ProcessId(9), spec).await {
        Err(SpawnError::Failed(failed)) => failed,
        other => panic!("it should have failed: {other:?}"),
    }
}

#[test]
fn a_process_runs_with_its_environment_and_tells_its_exit() {
    run(|guest| async move {
        let (agent, welcome) = guest.connect().await;
        assert!(welcome.processes.is_empty() && !welcome.configured);
        let mut spec = sh("echo $A-$HOSTNAME-$HOME; pwd; echo oops >&2; exit 7");
        spec.env = vec![("A".into(), "b c".into()), ("HOME".into(), "/h".into())];
        spec.cwd = "/usr".into();
        let (exit, out, err) = run_to_end(&agent, 0, spec).await;
        assert_eq!((exit.code(), exit.oom), (7, false));
        assert_eq!(out, "b c-guest-/h\n/usr\n");
        assert_eq!(err, "oops\n");
    });
}

#[test]
fn what_cannot_be_run_has_the_code_that_container_users_know_and_says_why() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let spec = |argv: &str| ProcessSpec {
            argv: vec![argv.into()],
            ..ProcessSpec::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str, mode: u32| {
            use std::os::unix::fs::OpenOptionsExt;
            let path = dir.path().join(name);
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(mode)
                .open(&path)
                .unwrap();
            file.write_all(text.as_bytes()).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let cases = [
            (
                spec("no-such-program"),
                127,
                "not found in the guest's PATH (/usr/local/sbin",
            ),
            (spec("/no/such/file"), 127, "no such file"),
            (spec("/usr"), 126, "is a directory"),
            (
                spec(&file("plain", "text", 0o644)),
                126,
                "permission denied",
            ),
            (
                spec(&file("script", "#!/no/such/interpreter -x\n", 0o755)),
                127,
                "/no/such/interpreter",
            ),
            (
                spec(&file("strange", "\u{1}\u{2}\u{3}\u{4}", 0o755)),
                126,
                "exec format error",
            ),
            (
                ProcessSpec {
                    user: "nobody-has-this-name".into(),
                    ..spec("/bin/true")
                },
                125,
                "nobody-has",
            ),
            (
                ProcessSpec {
                    cwd: "/etc/passwd".into(),
                    ..spec("/bin/true")
                },
                125,
                "not a directory",
            ),
            (ProcessSpec::default(), 127, "no command"),
        ];
        for (spec, code, words) in cases {
            let failed = failure(&agent, spec.clone()).await;
            assert_eq!(failed.code, code, "{spec:?}: {}", failed.message);
            assert!(failed.message.contains(words), "{}", failed.message);
        }
        let made = dir.path().join("made/here");
        let spec = ProcessSpec {
            cwd: made.to_str().unwrap().into(),
            ..sh("pwd")
        };
        assert_eq!(
            run_to_end(&agent, 1, spec).await.1.trim(),
            made.to_str().unwrap()
        );
    });
}

#[test]
fn signals_reach_a_process_and_are_told_as_its_end() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let process = agent
            .spawn(ProcessId::MAIN, sh("exec sleep 100"))
            .await
            .unwrap();
        process.handle.signal(15).await.unwrap();
        let exit = process.handle.exited().await.unwrap();
        assert_eq!(exit.status, ExitStatus::Signal(15));
        assert_eq!(exit.code(), 143);
        assert!(matches!(
            process.handle.signal(15).await,
            Err(AgentError::Refused(_))
        ));
        assert!(matches!(
            agent.signal(ProcessId(5), 15).await,
            Err(AgentError::Refused(_))
        ));
    });
}

#[test]
fn a_terminal_has_a_size_that_changes_and_an_interrupt_character() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let script = "stty size; echo $TERM; trap 'stty size; exit 3' INT; echo ready; while :; do sleep 0.05; done";
        let mut spec = sh(script);
        spec.tty = Some(TtySize {
            rows: 30,
            columns: 90,
        });
        spec.stdin = true;
        let mut process = agent.spawn(ProcessId(4), spec).await.unwrap();
        let mut text = String::new();
        while !text.contains("ready") {
            let chunk = process.output.next().await.unwrap();
            text.push_str(&String::from_utf8(chunk.bytes).unwrap());
        }
        assert!(text.starts_with("30 90\r\nxterm\r\n"), "{text:?}");
        process
            .handle
            .resize(TtySize {
                rows: 50,
                columns: 120,
            })
            .await
            .unwrap();
        process.input.write(b"\x03").await.unwrap();
        let (mut rest, exit) = (String::new(), process.handle.exited().await.unwrap());
        while let Some(chunk) = process.output.next().await {
            rest.push_str(&String::from_utf8(chunk.bytes).unwrap());
        }
        assert!(rest.contains("50 120"), "{rest:?}");
        assert_eq!(exit.code(), 3);
    });
}

#[test]
fn closing_the_input_of_a_terminal_is_an_end_of_file() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let mut spec = sh("stty -echo; cat; echo done");
        spec.tty = Some(TtySize {
            rows: 24,
            columns: 80,
        });
        spec.stdin = true;
        let mut process = agent.spawn(ProcessId(4), spec).await.unwrap();
        process.input.write(b"hello\n").await.unwrap();
        process.input.close().await;
        let mut text = Vec::new();
        while let Some(chunk) = process.output.next().await {
            text.extend(chunk.bytes);
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("hello\r\ndone\r\n"), "{text:?}");
    });
}

#[test]
fn a_flood_on_both_streams_arrives_as_it_was() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        // What a build without optimisation hashes in seconds.
        let length: usize = if cfg!(debug_assertions) {
            20_000_000
        } else {
            100_000_000
        };
        let script = format!(
            "(seq 1 13000000 | head -c {length} >&2) & seq 5 13000000 | head -c {length}; wait"
        );
        let mut process = agent.spawn(ProcessId::MAIN, sh(&script)).await.unwrap();
        let started = Instant::now();
        let (mut out, mut err) = (Sha256::new(), Sha256::new());
        let (mut out_len, mut err_len) = (0, 0);
        while let Some(chunk) = process.output.next().await {
            let (hash, length) = match chunk.stream {
                OutputStream::Stdout => (&mut out, &mut out_len),
                OutputStream::Stderr => (&mut err, &mut err_len),
            };
            assert_eq!(chunk.offset, *length);
            *length += chunk.bytes.len() as u64;
            hash.update(&chunk.bytes);
            process.output.ack(chunk.stream, chunk.end());
        }
        println!("{} bytes in {:?}", 2 * length, started.elapsed());
        assert_eq!((out_len, err_len), (length as u64, length as u64));
        let expected = |from: u32| {
            let mut text = String::with_capacity(length + 20);
            let mut number = from;
            while text.len() < length {
                use std::fmt::Write;
                writeln!(text, "{number}").unwrap();
                number += 1;
            }
            Sha256::digest(&text.as_bytes()[..length])
        };
        assert_eq!(out.finalize(), expected(5));
        assert_eq!(err.finalize(), expected(1));
        assert_eq!(process.handle.exited().await.unwrap().code(), 0);
    });
}

#[test]
fn ten_megabytes_through_cat_come_back() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let spec = ProcessSpec {
            argv: vec!["cat".into()],
            stdin: true,
            ..ProcessSpec::default()
        };
        let Process {
            handle,
            mut output,
            mut input,
        } = agent.spawn(ProcessId(3), spec).await.unwrap();
        let data: Vec<u8> = (0..10_000_000_u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let sent = data.clone();
        let writer = tokio::spawn(async move {
            assert!(input.write(&sent).await.unwrap());
            assert_eq!(input.offset(), sent.len() as u64);
            input.close().await;
        });
        let mut back = Vec::new();
        while let Some(chunk) = output.next().await {
            back.extend_from_slice(&chunk.bytes);
            output.ack(chunk.stream, chunk.end());
        }
        writer.await.unwrap();
        assert!(back == data);
        assert_eq!(handle.exited().await.unwrap().code(), 0);
    });
}

#[test]
fn input_for_a_process_that_does_not_read_is_taken_and_said_to_be_lost() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let mut spec = sh("exec <&-; echo closed; sleep 100");
        spec.stdin = true;
        let mut process = agent.spawn(ProcessId(3), spec).await.unwrap();
        process.output.next().await.unwrap();
        while process.input.write(&[0; 100_000]).await.unwrap() {}
        process.handle.signal(9).await.unwrap();
    });
}

#[test]
fn a_host_that_comes_and_goes_loses_and_doubles_nothing() {
    run(|guest| async move {
        let mut text = Vec::new();
        let mut sessions = 0;
        let mut ended = None;
        while ended.is_none() {
            let (agent, welcome) = guest.connect().await;
            sessions += 1;
            let mut process = if sessions == 1 {
                agent
                    .spawn(ProcessId::MAIN, sh("seq 1 600000; exit 5"))
                    .await
                    .unwrap()
            } else {
                assert_eq!(welcome.processes.len(), 1);
                let from = Offsets {
                    stdout: text.len() as u64,
                    stderr: 0,
                };
                agent.resume(ProcessId::MAIN, from).await.unwrap()
            };
            // Each host dies after another amount, with output under way that it has not stored.
            let dies_after = text.len() + 250_000 + sessions * 12_345;
            loop {
                let Some(chunk) = process.output.next().await else {
                    ended = Some(process.handle.exited().await.unwrap());
                    break;
                };
                assert_eq!(chunk.offset, text.len() as u64);
                if text.len() > dies_after {
                    break;
                }
                text.extend_from_slice(&chunk.bytes);
                process.output.ack(chunk.stream, chunk.end());
            }
        }
        let mut expected = Vec::new();
        (1..=600_000).for_each(|n| writeln!(expected, "{n}").unwrap());
        assert!(text == expected);
        assert_eq!(ended.unwrap().code(), 5);
        assert!(sessions > 5, "{sessions} sessions");
        // The end is kept until it is forgotten, for whoever comes next.
        let (agent, welcome) = guest.connect().await;
        assert_eq!(welcome.processes[0].exit.unwrap().code(), 5);
        let end = Offsets {
            stdout: text.len() as u64,
            stderr: 0,
        };
        let mut process = agent.resume(ProcessId::MAIN, end).await.unwrap();
        assert_eq!(process.output.next().await, None);
        process.handle.forget().await.unwrap();
        drop((process, agent));
        assert!(guest.connect().await.1.processes.is_empty());
    });
}

#[test]
fn a_program_waits_while_its_host_is_away() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("printed");
        let script = format!("head -c 3000000 /dev/zero; touch {}", mark.display());
        let process = agent.spawn(ProcessId::MAIN, sh(&script)).await.unwrap();
        drop((process, agent));
        // The next host sees a window's worth, and not the program's end.
        let (agent, _) = guest.connect().await;
        let mut process = agent
            .resume(ProcessId::MAIN, Offsets::default())
            .await
            .unwrap();
        let mut seen = 0;
        while seen < 262_144 {
            seen += process.output.next().await.unwrap().bytes.len();
        }
        assert_eq!(seen, 262_144);
        assert!(!mark.exists());
        process.output.ack(OutputStream::Stdout, seen as u64);
        while let Some(chunk) = process.output.next().await {
            seen += chunk.bytes.len();
            process.output.ack(OutputStream::Stdout, seen as u64);
        }
        assert_eq!(seen, 3_000_000);
        assert!(mark.exists());
    });
}

#[test]
fn the_input_goes_on_in_the_next_session() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let spec = ProcessSpec {
            argv: vec!["cat".into()],
            stdin: true,
            ..ProcessSpec::default()
        };
        let mut process = agent.spawn(ProcessId::MAIN, spec).await.unwrap();
        process.input.write(b"one ").await.unwrap();
        assert_eq!(process.output.next().await.unwrap().bytes, b"one ");
        drop((process, agent));
        let (agent, _) = guest.connect().await;
        let mut process = agent
            .resume(
                ProcessId::MAIN,
                Offsets {
                    stdout: 4,
                    stderr: 0,
                },
            )
            .await
            .unwrap();
        assert_eq!(process.input.offset(), 4);
        process.input.write(b"two").await.unwrap();
        process.input.close().await;
        assert_eq!(process.output.next().await.unwrap().bytes, b"two");
        assert_eq!(process.handle.exited().await.unwrap().code(), 0);
    });
}

#[test]
fn a_half_frame_of_a_dead_host_and_garbage_do_not_keep_the_next_one_out() {
    run(|guest| async move {
        let stream = guest.stream();
        // The start of a frame that promises 60,000 bytes more, from somebody who then says nothing.
        let mut half = vec![0xF5, 0x56, 0x41, 0x9B, 1, 2, 0, 0];
        half.extend_from_slice(&[0; 16]);
        half.extend_from_slice(&60_000_u32.to_le_bytes());
        half.extend_from_slice(b"crc?and a little");
        (&stream).write_all(b"login: \xff\xf5\x56\x00").unwrap();
        (&stream).write_all(&half).unwrap();
        let stream = UnixStream::from_std(stream).unwrap();
        let (agent, _) = connect(stream, ConnectOptions::default()).await.unwrap();
        assert_eq!(run_to_end(&agent, 0, sh("echo here")).await.1, "here\n");
    });
}

#[test]
fn garbage_between_frames_is_skipped_in_both_directions() {
    run(|guest| async move {
        let agent_side = UnixStream::from_std(guest.stream()).unwrap();
        let (ours, middle) = UnixStream::pair().unwrap();
        // A proxy that says something strange before everything that it passes on in one piece.
        tokio::spawn(async move {
            let (mut from_us, mut to_us) = middle.into_split();
            let (mut from_agent, mut to_agent) = agent_side.into_split();
            let there = tokio::spawn(async move {
                let mut buffer = vec![0; 64];
                to_agent.write_all(b"\xf5\x56\x41garbage").await.unwrap();
                while let Ok(count @ 1..) = from_us.read(&mut buffer).await {
                    to_agent.write_all(&buffer[..count]).await.unwrap();
                }
            });
            to_us
                .write_all(b"[    0.000000] Linux version\n\xf5\xf5\x56\x41\x9b")
                .await
                .unwrap();
            let mut buffer = vec![0; 7];
            while let Ok(count @ 1..) = from_agent.read(&mut buffer).await {
                if to_us.write_all(&buffer[..count]).await.is_err() {
                    break;
                }
            }
            there.abort();
        });
        let (agent, _) = connect(ours, ConnectOptions::default()).await.unwrap();
        assert_eq!(run_to_end(&agent, 0, sh("echo here")).await.1, "here\n");
    });
}

#[test]
fn a_guest_that_breaks_the_protocol_is_found_out_and_processes_go_on() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let process = agent
            .spawn(ProcessId::MAIN, sh("sleep 0.3; echo later"))
            .await
            .unwrap();
        drop((process, agent));
        let (ours, mut middle) = UnixStream::pair().unwrap();
        let (agent, _) = guest.connect().await;
        // A guest that answers with the host's own words and is gone.
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            let count = middle.read(&mut buffer).await.unwrap();
            middle.write_all(&buffer[..count]).await.unwrap();
        });
        let ended = connect(ours, ConnectOptions::default()).await.unwrap_err();
        assert!(matches!(ended, AgentError::Broken(_)), "{ended:?}");
        let mut process = agent
            .resume(ProcessId::MAIN, Offsets::default())
            .await
            .unwrap();
        assert_eq!(collect(&mut process).await.0, b"later\n");
    });
}

#[test]
fn fifty_processes_at_once_all_end_well() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let started = Instant::now();
        let tasks = (0..50).map(|id| {
            let agent = agent.clone();
            tokio::spawn(async move {
                run_to_end(&agent, id, sh(&format!("echo {id}; exit {id}"))).await
            })
        });
        for (id, task) in tasks.collect::<Vec<_>>().into_iter().enumerate() {
            let (exit, out, _) = task.await.unwrap();
            assert_eq!((exit.code(), out), (id as i32, format!("{id}\n")));
        }
        println!("50 processes in {:?}", started.elapsed());
    });
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody_else() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let _unread = agent
            .spawn(ProcessId(1), sh("cat /dev/zero"))
            .await
            .unwrap();
        let _unread_too = agent
            .spawn(ProcessId(2), sh("cat /dev/zero >&2"))
            .await
            .unwrap();
        for id in 3..10 {
            assert_eq!(
                run_to_end(&agent, id, sh("seq 1 100000 | tail -n1"))
                    .await
                    .1,
                "100000\n"
            );
        }
    });
}

#[test]
fn a_grandchild_that_keeps_the_output_open_delays_the_exit_only_shortly() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let started = Instant::now();
        let (exit, out, _) = run_to_end(&agent, 1, sh("sleep 30 & echo $!; exit 4")).await;
        assert_eq!(exit.code(), 4);
        assert!(started.elapsed() < Duration::from_secs(5));
        // One that prints without end, too.
        let (exit, _, _) = run_to_end(&agent, 2, sh("yes & echo $! >&2; exit 4")).await;
        assert_eq!(exit.code(), 4);
        std::process::Command::new("kill")
            .arg(out.trim())
            .status()
            .unwrap();
    });
}

#[test]
fn a_tree_goes_out_and_comes_back_in_as_it_was() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let dir = tempfile::tempdir().unwrap();
        let make = "mkdir -p tree/sub/deep && cd tree && head -c 3000000 /dev/urandom > big && echo x > sub/small && \
                    ln -s ../big sub/link && chmod 751 sub && chmod 400 sub/small && touch -d @1000000000 sub/small && \
                    mkfifo pipe && mkdir empty";
        let made = std::process::Command::new("sh")
            .arg("-c")
            .arg(make)
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(made.success());
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::create_dir(path("copy")).unwrap();

        let stat = agent
            .stat(&path("tree/sub/link"), false)
            .await
            .unwrap()
            .unwrap();
        assert!(stat.is_symlink() && stat.link_target.unwrap().ends_with("tree/big"));
        assert!(
            agent
                .stat(&path("tree"), true)
                .await
                .unwrap()
                .unwrap()
                .is_dir()
        );
        assert_eq!(agent.stat(&path("none"), true).await.unwrap(), None);

        let reader = agent.archive_out(&path("tree"), false).await.unwrap();
        let options = UnpackOptions {
            keep_owners: false,
            refuse_kind_change: true,
        };
        agent
            .archive_in(&path("copy"), reader, options)
            .await
            .unwrap();
        let script = "cd \"$0\" && for d in tree copy/tree; do (cd $d && find . -printf '%p %y %m %l %s\\n' | sort && \
                      find . -type f -printf '%p %T@\\n' | cut -d. -f1-2 | sort && sha256sum big sub/small); done";
        let listed = std::process::Command::new("sh")
            .args(["-c", script, dir.path().to_str().unwrap()])
            .output()
            .unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let lines: Vec<&str> = listed.lines().collect();
        let (left, right) = lines.split_at(lines.len() / 2);
        assert!(left.len() > 10, "{listed}");
        assert_eq!(left, right);

        let missing = agent.archive_out(&path("none"), false).await.unwrap_err();
        assert!(
            matches!(&missing, AgentError::Refused(refusal) if refusal.kind == RefusalKind::NotFound),
            "{missing:?}"
        );
        let nowhere = agent
            .archive_in(&path("none"), tokio::io::repeat(0), options_default())
            .await
            .unwrap_err();
        assert!(matches!(nowhere, AgentError::Refused(_)), "{nowhere:?}");
        // One that is dropped half read does not hold its place.
        for _ in 0..40 {
            let mut reader = agent.archive_out(&path("tree"), false).await.unwrap();
            reader.read_exact(&mut [0; 1000]).await.unwrap();
        }
        agent.ping().await.unwrap();
    });
}

fn options_default() -> UnpackOptions {
    UnpackOptions::default()
}

#[test]
fn a_guest_is_configured_once_and_its_limits_hold() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let mut config = GuestConfig {
            hostname: "named".into(),
            ..GuestConfig::default()
        };
        config.rlimits = vec![Rlimit {
            name: "nofile".into(),
            soft: Some(123),
            hard: Some(200),
        }];
        agent.configure(config.clone()).await.unwrap();
        assert!(matches!(
            agent.configure(config).await,
            Err(AgentError::Refused(_))
        ));
        let (_, out, _) = run_to_end(&agent, 0, sh("ulimit -n; echo $HOSTNAME")).await;
        assert_eq!(out, "123\nnamed\n");
        assert!(guest.connect().await.1.configured);
        let stats = guest.connect().await.0.stats().await.unwrap();
        assert!(
            stats.memory_total > stats.memory_available
                && stats.cpu_total_us > 0
                && stats.processes > 0
        );
    });
}

#[test]
fn a_shutdown_asks_the_main_program_then_kills_and_loses_no_last_words() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let script = "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.02; done";
        let mut main = agent.spawn(ProcessId::MAIN, sh(script)).await.unwrap();
        let other = agent
            .spawn(ProcessId(1), sh("trap '' TERM; sleep 1000"))
            .await
            .unwrap();
        assert_eq!(main.output.next().await.unwrap().bytes, b"up\n");
        main.output.ack(OutputStream::Stdout, 3);
        let asked = agent.clone();
        let shutdown =
            tokio::spawn(async move { asked.shutdown(Duration::from_secs(20), 15).await });
        assert_eq!(collect_rest(&mut main).await, b"bye\n");
        assert_eq!(main.handle.exited().await.unwrap().code(), 9);
        assert_eq!(
            other.handle.exited().await.unwrap().status,
            ExitStatus::Signal(9)
        );
        shutdown.await.unwrap().unwrap();
        assert_eq!(agent.closed().await, AgentError::Off);
    });
}

async fn collect_rest(process: &mut Process) -> Vec<u8> {
    let mut rest = Vec::new();
    while let Some(chunk) = process.output.next().await {
        rest.extend_from_slice(&chunk.bytes);
        process.output.ack(chunk.stream, chunk.end());
    }
    rest
}

#[test]
fn a_grace_of_nothing_kills_at_once() {
    run(|guest| async move {
        let (agent, _) = guest.connect().await;
        let mut main = agent
            .spawn(ProcessId::MAIN, sh("trap '' TERM; echo up; sleep 1000"))
            .await
            .unwrap();
        let chunk = main.output.next().await.unwrap();
        main.output.ack(chunk.stream, chunk.end());
        let started = Instant::now();
        agent.shutdown(Duration::ZERO, 15).await.unwrap();
        assert_eq!(
            main.handle.exited().await.unwrap().status,
            ExitStatus::Signal(9)
        );
        assert!(started.elapsed() < Duration::from_millis(900));
    });
}

#[test]
fn a_silent_guest_is_waited_for_no_longer_than_asked() {
    run(|_guest| async move {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let options = ConnectOptions {
            hello_timeout: Duration::from_millis(700),
        };
        let silent = connect(ours, options).await.unwrap_err();
        assert!(matches!(silent, AgentError::Silent(_)));
    });
}

#[test]
fn a_guest_that_sends_headers_without_their_payloads_is_found_out() {
    run(|_guest| async move {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut frame = Vec::new();
        encode_data(
            &mut frame,
            FrameKind::Stdout,
            &mut Sequence::new(1),
            0,
            0,
            (&[7; 32 * 1024], &[]),
        );
        let headers = frame[..32].repeat(4096);
        let hostile = tokio::spawn(async move {
            // Until the other end closes.
            while theirs.write_all(&headers).await.is_ok() {}
        });
        let broken = connect(ours, ConnectOptions::default()).await.unwrap_err();
        assert!(matches!(broken, AgentError::Broken(_)), "{broken:?}");
        hostile.await.unwrap();
    });
}
