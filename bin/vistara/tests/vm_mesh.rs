//! Two real nodes on loopback, each with its own state and daemon: one asks, the other runs real machines.
//!
//! Needs what `vm_system.rs` needs; skipped with the reason where that is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use vm::two::{Two, archive, bare, complained, said};
use vm::{BOUND, IMAGE, System, target, text, until, wait};

#[test]
fn a_program_runs_on_another_node_as_if_it_were_here() {
    let Some(two) = Two::with_machines("run") else {
        return;
    };
    let near = &two.near;
    let run = ["--on", "far", "run", "--rm", "-q", "-m", "128m"];
    let refused = near.vistara(&[&run[..], &[IMAGE, "true"]].concat());
    assert_eq!(
        refused.status.code(),
        Some(125),
        "{}",
        text(&refused.stderr)
    );
    assert!(
        text(&refused.stderr).contains("vistara grant --to"),
        "{}",
        text(&refused.stderr)
    );
    two.grant("run", &["--max-machines", "2"]);
    let words = [
        &run[..],
        &[IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7"],
    ]
    .concat();
    let output = near.vistara(&words);
    assert_eq!(
        (
            output.status.code(),
            text(&output.stdout).as_str(),
            text(&output.stderr).as_str()
        ),
        (Some(7), "out\n", "err\n")
    );

    let machine = said(
        near,
        &[
            "--on",
            "far",
            "run",
            "-d",
            "-m",
            "128m",
            IMAGE,
            "sh",
            "-c",
            "n=0; while :; do n=$((n+1)); echo line $n; sleep 1; done",
        ],
    );
    let fed = near.feed(
        &["--on", "far", "exec", "-i", &machine, "cat"],
        b"through\n",
    );
    assert_eq!(text(&fed.stdout), "through\n", "{}", text(&fed.stderr));
    let file = near.state.join("sent");
    std::fs::write(&file, vec![b'x'; 1 << 20]).unwrap();
    let inside = format!("{machine}:/tmp/sent");
    said(
        near,
        &["--on", "far", "cp", "-q", file.to_str().unwrap(), &inside],
    );
    let back = near.state.join("back");
    said(
        near,
        &["--on", "far", "cp", "-q", &inside, back.to_str().unwrap()],
    );
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&file).unwrap());
    assert_eq!(
        said(near, &["--on", "far", "ps", "-q", "--no-trunc"]),
        machine
    );
    assert_eq!(said(near, &["ps", "-q"]), "", "it is not here");

    let mut logs = near
        .command(&["--on", "far", "logs", "-f", &machine])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(logs.stdout.take().unwrap()).lines();
    for count in 1..=3 {
        assert_eq!(lines.next().unwrap().unwrap(), format!("line {count}"));
    }
    logs.kill().unwrap();
    wait(logs);
    said(near, &["--on", "far", "rm", "-f", &machine]);
}

#[test]
fn an_image_that_only_this_side_has_travels_and_is_run() {
    let Some(two) = Two::with_machines("travel") else {
        return;
    };
    let (far, near) = (&two.far, &two.near);
    let run = ["--on", "far", "run", "--rm", "-q", "-m", "128m"];
    two.grant("run,images", &[]);
    // An archive that only this side has: it travels, and is run.
    said(far, &["images", "rm", "-f", IMAGE]);
    let archive = format!(
        "oci-archive:{}",
        target().join("demo/python3.oci.tar").display()
    );
    let words = [&run[..], &[&archive, "python3", "-c", "print(6*7)"]].concat();
    assert_eq!(said(near, &words), "42");
    let id = said(far, &["images", "-q", "--no-trunc"]);
    assert_eq!(said(near, &["images", "fetch", "-q", &id]), id);
    said(far, &["images", "rm", "-f", &id]);
    said(near, &["images", "tag", &id, "only/here"]);
    // An image that only this side has goes by itself, in pieces and checked.
    let words = [&run[..], &["only/here", "python3", "-c", "print(7*7)"]].concat();
    assert_eq!(said(near, &words), "49");
    assert!(said(far, &["images"]).contains("only/here"));
}

#[test]
fn a_port_of_this_host_leads_into_a_machine_on_another_node() {
    let Some(two) = Two::with_machines("port") else {
        return;
    };
    let (far, near) = (&two.far, &two.near);
    let serve = ["python3", "-m", "http.server", "8000"];
    let run = [
        "--on", "far", "run", "-d", "-q", "-m", "128m", "-p", "0:8000", IMAGE,
    ];
    two.grant("run", &[]);
    let refused = complained(near, &[&run[..], &serve].concat());
    assert!(
        refused.contains("right to use the node's network"),
        "{refused}"
    );
    two.grant("run,network", &[]);
    let machine = said(near, &[&run[..], &serve].concat());
    let detail = |system: &System, words: &[&str]| -> String {
        let found: serde_json::Value = serde_json::from_str(&said(system, words)).unwrap();
        found[0]["ports"][0].as_str().unwrap().to_owned()
    };
    let here = detail(near, &["--on", "far", "inspect", &machine]);
    let there = detail(far, &["inspect", &machine]);
    assert_ne!(here, there, "each shows its own host's port");
    assert!(said(near, &["--on", "far", "ps"]).contains(&here));
    let address = here.split_once("->").unwrap().0.to_owned();
    let get = || -> Option<String> {
        let mut stream = std::net::TcpStream::connect(&address).ok()?;
        stream.set_read_timeout(Some(BOUND)).ok()?;
        std::io::Write::write_all(&mut stream, b"GET /etc/hostname HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.contains("200 OK").then_some(answer)
    };
    until("an answer of the server", || get().is_some());
    // The node here comes back with what it forwards.
    near.kill_node();
    said(near, &["ps"]);
    until("an answer after the restart", || get().is_some());
    said(near, &["--on", "far", "rm", "-f", &machine]);
    until("the end of the forward", || {
        std::net::TcpStream::connect(&address).is_err()
    });
}

#[test]
fn a_node_that_is_killed_is_named_and_its_machines_are_there_when_it_is_back() {
    let Some(two) = Two::with_machines("kill") else {
        return;
    };
    let (far, near) = (&two.far, &two.near);
    two.grant("run", &[]);
    let run = ["--on", "far", "run", "-q", "-m", "128m", IMAGE];
    let loops = ["sh", "-c", "echo begun; exec sleep 1000"];
    let mut running = near
        .command(&[&run[..], &loops].concat())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut begun = [0; 6];
    let mut out = running.stdout.take().unwrap();
    out.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"begun\n");
    let machine = said(near, &["--on", "far", "ps", "-q", "--no-trunc"]);

    far.kill_node();
    let killed_at = Instant::now();
    let lost = wait(running);
    let took = killed_at.elapsed();
    let complaint = text(&lost.stderr);
    assert_eq!(lost.status.code(), Some(125), "{complaint}");
    assert!(complaint.contains("the node far is lost"), "{complaint}");
    assert!(complaint.contains("--on far ps"), "{complaint}");
    assert!(!complaint.contains("node.log"), "{complaint}");
    assert!(took < Duration::from_secs(10), "noticed after {took:?}");
    until("that it is listed as dead", || {
        said(near, &["nodes"]).contains("dead")
    });
    let away = complained(near, &["--on", "far", "ps"]);
    assert!(away.contains("does not answer"), "{away}");

    // The next command there starts the next node, which listens again.
    assert_eq!(said(far, &["ps", "-q", "--no-trunc"]), machine);
    until("an answer of the machine", || {
        let again = near.vistara(&["--on", "far", "exec", &machine, "echo", "still here"]);
        text(&again.stdout) == "still here\n"
    });
}

#[test]
fn an_image_comes_from_all_that_have_it_and_no_more_of_it_than_a_grant_allows() {
    let two = Two::without_machines("images");
    let (far, near) = (&two.far, &two.near);
    let third = Two {
        ticket: said(
            &bare("mesh-images-third"),
            &["node", "ticket", "--listen", "127.0.0.1:0"],
        ),
        far: bare("mesh-images-third"),
        near: bare("mesh-images-near"),
        id: two.id.clone(),
    };
    said(near, &["node", "join", &third.ticket]);
    let file = near.state.join("noise.tar");
    archive(&file, 12 << 20);
    let file = file.to_str().unwrap();
    for node in [far, &third.far] {
        said(node, &["images", "import", "-q", file, "--name", "noise"]);
    }
    let id = |ticket: &str| ticket.split_once('@').unwrap().0.to_owned();
    let refused = complained(near, &["images", "fetch", "noise"]);
    assert!(refused.contains("no node that was joined"), "{refused}");
    two.grant("run,images", &["--max-disk", "13m"]);
    third.grant("run", &[]);
    let fetched = near.vistara(&["images", "fetch", "noise"]);
    let words = text(&fetched.stderr);
    assert!(fetched.status.success(), "{words}");
    assert!(
        words.contains("MiB from ") && words.contains(", "),
        "{words}"
    );
    let image = text(&fetched.stdout).trim().to_owned();
    assert_eq!(said(far, &["images", "-q", "--no-trunc"]), image);

    // Nobody takes what the grant does not say, or more than it says.
    let on = |ticket: &str| ["--on".to_owned(), id(ticket)];
    archive(near.state.join("more.tar").as_path(), 12 << 20);
    let more = near.state.join("more.tar");
    said(
        near,
        &[
            "images",
            "import",
            "-q",
            more.to_str().unwrap(),
            "--name",
            "more",
        ],
    );
    let [option, target] = on(&third.ticket);
    let refused = complained(near, &[&option, &target, "images", "fetch", "more"]);
    assert!(refused.contains("right to images"), "{refused}");
    let [option, target] = on(&two.ticket);
    said(near, &[&option, &target, "images", "fetch", "-q", "more"]);
    archive(&more, 2 << 20);
    said(
        near,
        &[
            "images",
            "import",
            "-q",
            more.to_str().unwrap(),
            "--name",
            "again",
        ],
    );
    let refused = complained(near, &[&option, &target, "images", "fetch", "again"]);
    assert!(
        refused.contains("the grant allows 13.0 MiB of images"),
        "{refused}"
    );
    let words = ["import", more.to_str().unwrap(), "--name", "again"];
    let refused = complained(
        near,
        &[&[option.as_str(), &target, "images"], &words[..]].concat(),
    );
    assert!(
        refused.contains("the grant allows 13.0 MiB of images"),
        "{refused}"
    );
}

#[test]
fn a_grant_counts_for_whom_what_and_how_long_it_says() {
    let two = Two::without_machines("grant");
    let (far, near) = (&two.far, &two.near);
    let ps = ["--on", "far", "ps"];
    assert!(
        complained(near, &ps).contains("whose owner") || complained(near, &ps).contains("grant")
    );
    let token = two.grant("run", &["--max-machines", "1"]);
    said(near, &ps);

    // Not for what it does not say: pulling, the owner's affairs.
    let pull = ["--on", "far", "pull", "localhost:1/nothing"];
    let refused = complained(near, &pull);
    assert!(refused.contains("right to images"), "{refused}");
    let refused = complained(near, &["--on", "far", "doctor"]);
    assert!(refused.contains("right to admin"), "{refused}");
    // What is made of it is smaller, never larger.
    let narrow = ["grant", "narrow", "--for", "run,images,admin", &token];
    let wider = said(near, &narrow);
    said(near, &["grant", "keep", &wider]);
    let refused = complained(near, &pull);
    assert!(refused.contains("right to images"), "{refused}");
    let nothing = said(near, &["grant", "narrow", "--for", "images", &token]);
    said(near, &["grant", "keep", &nothing]);
    let refused = complained(near, &ps);
    assert!(refused.contains("does not allow this"), "{refused}");

    // Not for somebody else, who has read it.
    let third = bare("mesh-grant-third");
    said(&third, &["id"]);
    let join = ["node", "join", &two.ticket, "--name", "far"];
    said(&third, &join);
    let refused = complained(&third, &["grant", "keep", &token]);
    assert!(refused.contains("was given to"), "{refused}");
    assert!(complained(&third, &ps).contains("grant"));
    for leave in ["leave", "stop"] {
        said(&third, &["node", leave]);
    }

    // Not for longer.
    let words = ["grant", "--to", &two.id, "--for", "run", "--until", "3s"];
    let short = said(far, &words);
    said(near, &["grant", "keep", &short]);
    said(near, &ps);
    until("its end", || !near.vistara(&ps).status.success());
    let refused = complained(near, &ps);
    assert!(refused.contains("expired"), "{refused}");

    // Nor once it was taken back.
    said(near, &["grant", "keep", &token]);
    said(near, &ps);
    let grants: serde_json::Value =
        serde_json::from_str(&said(far, &["grant", "ls", "--json"])).unwrap();
    for grant in grants.as_array().unwrap() {
        said(far, &["grant", "revoke", grant["id"].as_str().unwrap()]);
    }
    let refused = complained(near, &ps);
    assert!(refused.contains("revoked"), "{refused}");
}

/// Begins a copy of this file into a machine, waits until some of it is there, cuts it off as is told, and gives what the copy
/// complained.
fn cut_copy(
    two: &Two,
    machine: &str,
    file: &str,
    to: &str,
    cut: impl FnOnce(&mut Child),
) -> String {
    let inside = format!("{machine}:{to}");
    let mut copy = two
        .near
        .command(&["--on", "far", "cp", "-q", file, &inside])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the file's beginning", || {
        let look = ["exec", machine, "test", "-s", to];
        two.far.vistara(&look).status.success()
    });
    cut(&mut copy);
    let cut = wait(copy);
    assert!(!cut.status.success(), "it was over before it was cut off");
    text(&cut.stderr)
}

#[test]
fn whoever_asks_may_be_killed_and_what_runs_over_there_goes_on_and_loses_nothing() {
    let Some(two) = Two::with_machines("cut") else {
        return;
    };
    two.grant("run", &[]);
    let (far, near) = (&two.far, &two.near);
    let exec = |machine: &str, words: &[&str]| {
        text(
            &near
                .vistara(&[&["--on", "far", "exec", machine], words].concat())
                .stdout,
        )
    };

    // The client of a run, in the middle of its output.
    let script =
        "n=0; while [ $n -lt 60 ]; do n=$((n+1)); echo line $n; sleep 0.1; done; exec sleep 1000";
    let run = [
        "--on", "far", "run", "-q", "-m", "128m", IMAGE, "sh", "-c", script,
    ];
    let mut running = near
        .command(&run)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "line 1");
    running.kill().unwrap();
    wait(running);
    let machine = said(near, &["--on", "far", "ps", "-q", "--no-trunc"]);

    // The node here, in the middle of a command there, which goes on.
    let script = "echo begun; sleep 3; echo done >/tmp/mark";
    let mut asking = near
        .command(&["--on", "far", "exec", &machine, "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(asking.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "begun");
    near.kill_node();
    let lost = wait(asking);
    assert!(!lost.status.success(), "{}", text(&lost.stderr));
    until("the command's end", || {
        exec(&machine, &["cat", "/tmp/mark"]) == "done\n"
    });
    let all: String = (1..=60).map(|number| format!("line {number}\n")).collect();
    until("all of its output", || {
        let logs = near.vistara(&["--on", "far", "logs", &machine]);
        text(&logs.stdout) == all
    });

    // Each of the three in the middle of a copy. It fails, and says so; another one makes it whole.
    let file = near.state.join("sent");
    std::fs::write(&file, vec![b'x'; 96 << 20]).unwrap();
    let file = file.to_str().unwrap();
    cut_copy(&two, &machine, file, "/tmp/one", |copy| {
        copy.kill().unwrap()
    });
    let said_so = cut_copy(&two, &machine, file, "/tmp/two", |_| near.kill_node());
    assert!(!said_so.is_empty());
    said(near, &["ps"]);
    let said_so = cut_copy(&two, &machine, file, "/tmp/three", |_| far.kill_node());
    assert!(said_so.contains("far"), "{said_so}");
    assert_eq!(said(far, &["ps", "-q", "--no-trunc"]), machine);
    let inside = format!("{machine}:/tmp/three");
    until("a copy after the cut", || {
        let copy = near.vistara(&["--on", "far", "cp", "-q", file, &inside]);
        copy.status.success()
    });
    let bytes = exec(
        &machine,
        &["sh", "-c", "tr -d x </tmp/three | wc -c; wc -c </tmp/three"],
    );
    assert_eq!(bytes, format!("0\n{}\n", 96 << 20));
}

#[test]
fn a_snapshot_goes_to_another_node_and_its_machine_goes_on_there() {
    let (Some(near), Some(far)) = (
        System::ready_as("mesh-snapshot-near"),
        System::without_image("mesh-snapshot-far"),
    ) else {
        return;
    };
    let two = Two::of(far, "snapshot");
    let machine = near.machine(
        &["-m", "128m", "--name", "walker"],
        &[
            "sh",
            "-c",
            "echo mine > /root/file; while :; do sleep 0.2; done",
        ],
    );
    until("its file is there", || {
        near.vistara(&["exec", &machine.id, "cat", "/root/file"])
            .stdout
            == b"mine\n"
    });
    let made = said(
        &near,
        &["snapshot", "create", "-q", "--name", "kept", &machine.id],
    );

    // Who may run machines there may not hand a monitor its state.
    two.grant("run,images", &[]);
    let fetch = ["--on", "far", "snapshot", "fetch", "-q", "kept"];
    let refused = complained(&near, &fetch);
    assert!(refused.contains("admin"), "{refused}");
    two.grant("run,images,admin", &[]);
    assert_eq!(said(&near, &fetch), made);
    assert_eq!(said(&near, &["--on", "far", "snapshot", "ls", "-q"]), made);
    assert_eq!(said(&near, &fetch), made, "it is there already");

    let there = said(
        &near,
        &[
            "--on", "far", "snapshot", "restore", "--name", "runner", "kept",
        ],
    );
    let file = ["--on", "far", "exec", "runner", "cat", "/root/file"];
    assert_eq!(said(&near, &file), "mine");
    assert_eq!(
        said(&near, &["--on", "far", "ps", "-q", "--no-trunc"]),
        there
    );
    said(&near, &["rm", "-f", &machine.id]);

    // And back, under another name.
    said(&near, &["snapshot", "rm", "kept"]);
    let back = [
        "snapshot", "fetch", "-q", "--from", "far", "--name", "again", "kept",
    ];
    assert_eq!(said(&near, &back), made);
    let here = said(&near, &["snapshot", "restore", "again"]);
    assert_eq!(said(&near, &["exec", &here, "cat", "/root/file"]), "mine");
    let missing = complained(&near, &["snapshot", "fetch", "kept"]);
    assert!(missing.contains("from which node"), "{missing}");
}
