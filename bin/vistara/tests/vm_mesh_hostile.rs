//! Real daemons on loopback whose peers mean no good, or are killed in the middle of what they do: requests that are replayed,
//! floods, garbage, and cuts in images on their way. No machines are started.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_mesh::frame::Open;
use vistara_mesh::{Identity, Link, LinkOptions, Ticket, Token};
use vm::two::{Two, archive, bare, complained, said};
use vm::{BOUND, System, text, until, wait};

/// What a daemon's memory may grow by whatever its peers do: the windows of their connections, and some.
const GROWTH_BYTES_MAX: u64 = 96 << 20;
/// Longest that the owner waits meanwhile, on a busy machine and with a build that is not optimized.
const OWNER_WAITS_MAX: Duration = Duration::from_secs(10);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// A peer that is the test's own, and a token by which a node lets it run things.
struct Peer {
    _dir: tempfile::TempDir,
    link: Link,
    token: Token,
    good: Open,
    /// What others would open; it is not looked at.
    _accepted: tokio::sync::mpsc::Receiver<vistara_mesh::Accepted>,
}

impl Peer {
    async fn of(far: &System, ticket: &Ticket) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let to = identity.id().to_string();
        let words = ["grant", "--to", &to, "--for", "run", "--until", "1h"];
        let token: Token = said(far, &words).parse().unwrap();
        let (link, accepted) = Link::open(LinkOptions {
            identity,
            listen: ([127, 0, 0, 1], 0).into(),
            knows: std::sync::Arc::new(|_| false),
            relays: Vec::new(),
        })
        .await
        .unwrap();
        link.keep(ticket.node, ticket.addresses.clone()).unwrap();
        let generation = link.reach(&ticket.node).await.unwrap();
        let good = Open {
            target: *ticket.node.as_bytes(),
            generation,
            nonce: [7; 16],
            deadline_ms: in_half_a_minute(),
            token: Some(token.as_bytes().to_vec()),
        };
        Peer {
            _dir: dir,
            link,
            token,
            good,
            _accepted: accepted,
        }
    }

    /// The same with another nonce, and whatever else is changed.
    fn with(&self, nonce: [u8; 16], change: impl FnOnce(&mut Open)) -> Open {
        let mut open = Open {
            nonce,
            deadline_ms: in_half_a_minute(),
            ..self.good.clone()
        };
        change(&mut open);
        open
    }
}

/// Memory of a node's daemon.
fn resident_bytes(system: &System) -> u64 {
    let status: serde_json::Value =
        serde_json::from_str(&said(system, &["node", "status", "--json"])).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", status["pid"])).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().strip_suffix("kB").unwrap().trim();
    kib.parse::<u64>().unwrap() << 10
}

/// Numbers that look like chance, and are the same in each run.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 as u8
        })
        .take(length)
        .collect()
    }
}

fn in_half_a_minute() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    (now + Duration::from_secs(30)).as_millis() as u64
}

/// What a node answers on a stream that begins like this.
async fn answer(link: &Link, ticket: &Ticket, open: &Open) -> String {
    let mut stream = link.begin(&ticket.node, open).await.unwrap();
    let request =
        b"GET /v1/machines?all=true HTTP/1.1\r\nhost: vistara\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // A peer may end the connection in place of an answer.
    let _ = tokio::time::timeout(BOUND, stream.read_to_end(&mut answer))
        .await
        .expect("an answer or an end");
    text(&answer)
}

#[test]
fn who_replays_floods_or_sends_garbage_is_refused_and_others_are_served() {
    let two = Two::without_machines("hostile");
    let ticket: Ticket = two.ticket.parse().unwrap();
    runtime().block_on(async {
        let peer = Peer::of(&two.far, &ticket).await;
        let (link, good) = (&peer.link, &peer.good);
        let first = answer(link, &ticket, good).await;
        assert!(first.starts_with("HTTP/1.1 200"), "{first}");
        let replayed = answer(link, &ticket, good).await;
        assert!(replayed.contains("has been made already"), "{replayed}");
        let with = |nonce: u8, change: &dyn Fn(&mut Open)| peer.with([nonce; 16], change);
        for (bad, why) in [
            (with(1, &|open| open.target = [9; 32]), "another node"),
            (with(2, &|open| open.generation += 1), "start of this node"),
            (with(3, &|open| open.deadline_ms = 1), "deadline has passed"),
            (
                with(4, &|open| open.deadline_ms = u64::MAX),
                "more than ten minutes",
            ),
            (with(5, &|open| open.token = None), "has given a grant"),
            (
                with(6, &|open| open.token = Some(vec![0xff; 300])),
                "not a grant",
            ),
        ] {
            let refused = answer(link, &ticket, &bad).await;
            assert!(
                refused.contains("403") || refused.contains("400"),
                "{refused}"
            );
            assert!(refused.contains(why), "{why}: {refused}");
        }

        // Many streams at once, none of which says anything; and packets that are none.
        let mut silent = Vec::new();
        for number in 0_u32..200 {
            let mut nonce = [8; 16];
            nonce[..4].copy_from_slice(&number.to_le_bytes());
            let open = peer.with(nonce, |_| {});
            silent.push(link.begin(&ticket.node, &open).await.unwrap());
        }
        let garbage = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut packet = [0; 1200];
        for number in 0_u32..20_000 {
            packet[..4].copy_from_slice(&number.wrapping_mul(2_654_435_761).to_le_bytes());
            packet[4] = 0xc0;
            // A full queue is as good a flood as any.
            let _ = garbage.send_to(&packet, ticket.addresses[0]);
        }
        two.grant("run", &[]);
        let begin = Instant::now();
        said(&two.near, &["--on", "far", "ps"]);
        assert!(begin.elapsed() < Duration::from_secs(10));
        drop(silent);
        link.close().await;
    });
    let status = said(&two.far, &["node", "status", "--json"]);
    assert!(status.contains("pid"), "{status}");
}

#[test]
fn what_was_said_to_one_node_is_worth_nothing_to_another() {
    let two = Two::without_machines("moved");
    let ticket: Ticket = two.ticket.parse().unwrap();
    let third = bare("mesh-moved-third");
    let words = ["node", "ticket", "--listen", "127.0.0.1:0"];
    let third_ticket: Ticket = said(&third, &words).parse().unwrap();
    runtime().block_on(async {
        let peer = Peer::of(&two.far, &ticket).await;
        let first = answer(&peer.link, &ticket, &peer.good).await;
        assert!(first.starts_with("HTTP/1.1 200"), "{first}");
        peer.link
            .keep(third_ticket.node, third_ticket.addresses.clone())
            .unwrap();
        let generation = peer.link.reach(&third_ticket.node).await.unwrap();
        // The very same word; and the same but for its target, of which the token knows.
        for change in [&(|_: &mut Open| {}) as &dyn Fn(&mut Open), &|open| {
            open.target = *third_ticket.node.as_bytes()
        }] {
            let moved = peer.with([7; 16], |open| {
                open.generation = generation;
                change(open);
            });
            let refused = answer(&peer.link, &third_ticket, &moved).await;
            assert!(
                refused.starts_with("HTTP/1.1 400") || refused.starts_with("HTTP/1.1 403"),
                "{refused}"
            );
        }
        peer.link.close().await;
    });
    for leave in ["leave", "stop"] {
        said(&third, &["node", leave]);
    }
}

/// Has a peer do this again and again, while the owner asks its node; gives what the daemon's memory grew by.
fn besieged<F: Future<Output = ()>>(
    two: &Two,
    rounds: usize,
    mut once: impl FnMut(usize) -> F + Send,
) -> u64 {
    // What one of everything takes stays: it is no growth.
    said(&two.far, &["ps"]);
    let before = resident_bytes(&two.far);
    let far = &two.far;
    std::thread::scope(|scope| {
        let owner = scope.spawn(move || {
            let mut longest = Duration::ZERO;
            for _ in 0..5 {
                let begin = Instant::now();
                said(far, &["ps"]);
                longest = longest.max(begin.elapsed());
                std::thread::sleep(Duration::from_millis(300));
            }
            longest
        });
        runtime().block_on(async {
            for round in 0..rounds {
                once(round).await;
            }
        });
        let longest = owner.join().unwrap();
        println!("the owner waited {longest:?} at most");
        assert!(longest < OWNER_WAITS_MAX, "{longest:?}");
    });
    let grown = resident_bytes(&two.far).saturating_sub(before);
    println!("grown by {} KiB", grown >> 10);
    grown
}

#[test]
fn garbage_in_packets_pages_and_requests_is_thrown_away_in_bounded_memory() {
    let two = Two::without_machines("garbage");
    two.grant("run", &[]);
    let ticket: Ticket = two.ticket.parse().unwrap();
    // One whose requests are listened to, which is the worse.
    let setup = runtime();
    let peer = setup.block_on(Peer::of(&two.far, &ticket));
    let (peer, ticket) = (&peer, &ticket);
    let noise = std::sync::Mutex::new(Noise(7));
    let noise = &noise;
    let grown = besieged(&two, 300, |round| async move {
        let bytes = |length| noise.lock().unwrap().bytes(length);
        // As datagrams: any bytes, and such as begin well.
        for _ in 0..20 {
            peer.link.say(ticket.node, bytes(1 + round % 1100));
            let mut packet = bytes(600);
            packet[0] = 1;
            packet[1] = (round % 8) as u8;
            peer.link.say(ticket.node, packet);
        }
        // As pages: as long as they may be, and longer.
        peer.link.say_long(&ticket.node, bytes(16 << 10));
        peer.link.say_long(&ticket.node, bytes(256 << 10));
        // As a request: noise, a head without an end, a body without one, another protocol, a length beyond all.
        let mut nonce = [9; 16];
        nonce[..8].copy_from_slice(&(round as u64).to_le_bytes());
        let Ok(mut stream) = peer
            .link
            .begin(&ticket.node, &peer.with(nonce, |_| {}))
            .await
        else {
            return;
        };
        let said = match round % 6 {
            0 => bytes(32 << 10),
            1 => [b"GET /v1/machines HTTP/1.1\r\nx: ".to_vec(), vec![b'a'; 200_000]].concat(),
            2 => b"POST /v1/machines HTTP/1.1\r\nhost: v\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n".to_vec(),
            3 => b"POST /v1/machines HTTP/1.1\r\nhost: v\r\ncontent-type: application/json\r\ncontent-length: 18446744073709551615\r\n\r\n{".to_vec(),
            4 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04".to_vec(),
            _ => {
                let deep = "[".repeat(100_000);
                let head = "POST /v1/machines HTTP/1.1\r\nhost: v\r\ncontent-type: application/json";
                format!("{head}\r\ncontent-length: {}\r\n\r\n{deep}", deep.len()).into_bytes()
            }
        };
        // Who is not listened to any more cannot write.
        let all = async {
            let _ = stream.write_all(&said).await;
            let _ = stream.read(&mut [0; 512]).await;
        };
        let _ = tokio::time::timeout(Duration::from_millis(50), all).await;
    });
    assert!(grown < GROWTH_BYTES_MAX, "grown by {grown} bytes");
    said(&two.near, &["--on", "far", "ps"]);
    setup.block_on(peer.link.close());
}

#[test]
fn a_flood_of_requests_leaves_room_for_the_owner_in_bounded_memory() {
    let two = Two::without_machines("flood");
    two.grant("run", &[]);
    let ticket: Ticket = two.ticket.parse().unwrap();
    let setup = runtime();
    let peer = setup.block_on(Peer::of(&two.far, &ticket));
    let (peer, ticket) = (&peer, &ticket);
    let grown = besieged(&two, 40, |round| async move {
        // As many at once as there are streams, none of whose answers is read; half of them without a right to anything.
        let request = b"GET /v1/images HTTP/1.1\r\nhost: v\r\n\r\n".repeat(20);
        let asked = (0..100_u64).map(|number| {
            let mut nonce = [3; 16];
            nonce[..8].copy_from_slice(&(number << 32 | round as u64).to_le_bytes());
            let open = peer.with(nonce, |open| {
                if number % 2 == 0 {
                    open.token = None;
                }
            });
            let request = request.clone();
            async move {
                let stream = peer.link.begin(&ticket.node, &open).await;
                if let Ok(mut stream) = stream {
                    let write = stream.write_all(&request);
                    let _ = tokio::time::timeout(Duration::from_millis(100), write).await;
                }
            }
        });
        futures_util::future::join_all(asked).await;
    });
    assert!(grown < GROWTH_BYTES_MAX, "grown by {grown} bytes");
    until("an answer to others", || {
        let ps = two.near.vistara(&["--on", "far", "ps"]);
        ps.status.success()
    });
    // Its token still counts: a flood is no crime, only in vain.
    assert!(peer.token.unchecked_terms().is_ok());
    setup.block_on(peer.link.close());
}

/// An image at the near node that takes a while on its way.
fn slow_image(two: &Two, megabytes: usize) -> String {
    two.grant("run,images", &[]);
    let file = two.near.state.join("noise.tar");
    archive(&file, megabytes << 20);
    let words = [
        "images",
        "import",
        "-q",
        file.to_str().unwrap(),
        "--name",
        "noise",
    ];
    let id = said(&two.near, &words);
    std::fs::remove_file(&file).unwrap();
    id
}

/// Begins to send it, and waits until so much of it is over there.
fn sending(two: &Two, bytes: u64) -> Child {
    let child = two
        .near
        .command(&["--on", "far", "images", "fetch", "noise"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("that some of it is over there", || {
        arrived(&two.far) >= bytes
    });
    child
}

/// How much of a blob is at a node that is not all there.
fn arrived(system: &System) -> u64 {
    let Ok(entries) = std::fs::read_dir(system.state.join("images/partial")) else {
        return 0;
    };
    let lengths = entries
        .flatten()
        .map(|entry| entry.metadata().map_or(0, |meta| meta.len()));
    lengths.max().unwrap_or(0)
}

#[test]
fn an_image_on_its_way_outlives_each_of_the_three_that_have_to_do_with_it() {
    let two = Two::without_machines("cuts");
    let id = slow_image(&two, 96);
    let listed = || said(&two.far, &["images", "-q", "--no-trunc"]);

    // Its sender's terminal: nothing is half there, and the next one goes on from where it was.
    let mut client = sending(&two, 4 << 20);
    client.kill().unwrap();
    wait(client);
    assert_eq!(listed(), "");
    let begun = arrived(&two.far);
    assert!(begun >= 4 << 20, "{begun}");

    // Then the node that serves: whoever sends waits for it and goes on by itself.
    let child = sending(&two, begun + (8 << 20));
    two.far.kill_node();
    let kept = arrived(&two.far);
    assert!(kept > begun, "{kept}");
    assert_eq!(listed(), "");
    // Then the one that asks, while it does so.
    until("that more of it came", || {
        arrived(&two.far) > kept || !listed().is_empty()
    });
    if listed().is_empty() {
        two.near.kill_node();
        said(&two.near, &["ps"]);
    }
    let sent = wait(child);
    assert!(sent.status.success(), "{}", text(&sent.stderr));
    assert_eq!(listed(), id);
    // What was put together is what was sent: every layer of it can be read there.
    let back = two.near.vistara(&["images", "rm", "-f", "noise"]);
    assert!(back.status.success(), "{}", text(&back.stderr));
    assert_eq!(said(&two.near, &["images", "fetch", "-q", "noise"]), id);
}

/// A small file system under a node's images; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, megabytes: u32) -> Option<Small> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "small"])
            .arg(at)
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Small(at.to_owned()));
        }
        println!("SKIP: a tmpfs cannot be mounted here");
        None
    }

    fn resize(&self, megabytes: u32) {
        let size = format!("remount,size={megabytes}m");
        let status = Command::new("mount")
            .args(["-o", &size])
            .arg(&self.0)
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_over_there_is_told_and_the_image_arrives_when_there_is_room() {
    let far = bare("mesh-full-far");
    let Some(small) = Small::mount(&far.state.join("images"), 64) else {
        return;
    };
    let two = Two::of(far, "full");
    let id = slow_image(&two, 96);
    let send = ["--on", "far", "images", "fetch", "-q", "noise"];

    // Known before a byte is sent.
    let refused = complained(&two.near, &send);
    assert!(
        refused.contains("space") && refused.contains("images"),
        "{refused}"
    );
    assert_eq!(arrived(&two.far), 0);

    // And found out on the way: somebody else fills the disk.
    small.resize(1024);
    let child = sending(&two, 4 << 20);
    let used = arrived(&two.far) >> 20;
    small.resize(u32::try_from(used).unwrap() + 8);
    let cut = wait(child);
    let complaint = text(&cut.stderr);
    assert!(!cut.status.success(), "{complaint}");
    assert!(complaint.contains("space"), "{complaint}");
    assert_eq!(said(&two.far, &["images", "-q"]), "");
    said(&two.near, &["--on", "far", "ps"]);

    small.resize(1024);
    assert_eq!(said(&two.near, &send), id);
    assert_eq!(said(&two.far, &["images", "-q", "--no-trunc"]), id);
    drop(two);
    drop(small);
}
