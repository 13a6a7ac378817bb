//! Nodes behind address translators that meet through a relay, and nodes of one network that find each other without one.
//!
//! Needs root, `ip` and `nft`, and one of them what `vm_system.rs` needs; skipped with the reason where that is missing. The
//! namespaces are the test's own, and go with it.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::panic)]

mod netns;
mod vm;

use netns::{Node, Space, skipped, three_on_a_switch};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vm::{IMAGE, state_dir, target, text, until};

/// A network with room for translators and a relay, as the Internet is.
fn internet(name: &str) -> Space {
    let net = Space::new(name);
    net.run(&["ip", "link", "add", "sw0", "type", "bridge"]);
    net.run(&["ip", "link", "set", "sw0", "up"]);
    net
}

/// A host behind a translator that lets nothing in which was not asked for, as routers at home do.
struct Home {
    router: Space,
    host: Space,
}

impl Home {
    /// The `number`th, at 10.81.0.number of `net`; where it is `symmetric`, it uses another port for each other end.
    fn new(net: &Space, name: &str, number: u8, symmetric: bool) -> Home {
        let router = Space::new(&format!("{name}r{number}"));
        let host = Space::new(&format!("{name}h{number}"));
        let (wan, lan) = (format!("w{number}"), format!("l{number}"));
        router.cable(&format!("10.81.0.{number}/24"), net, None, &wan);
        let (outer, inner) = (format!("{wan}0"), format!("{lan}1"));
        let at = |last: u8| format!("192.168.{number}.{last}/24");
        host.cable(&at(2), &router, Some(&at(1)), &lan);
        let gate = format!("192.168.{number}.1");
        host.run(&["ip", "route", "add", "default", "via", &gate]);
        router.run(&["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]);
        let port = if symmetric { "fully-random" } else { "" };
        let rules = format!(
            "table ip home {{
                chain nat {{ type nat hook postrouting priority 100; oifname {outer} masquerade {port}; }}
                chain own {{ type filter hook input priority 0; iifname {outer} drop; }}
                chain through {{ type filter hook forward priority 0;
                    iifname {outer} ct state new drop; }}
                chain elsewhere {{ type filter hook prerouting priority 0;
                    iifname {inner} ip daddr != {{ 10.81.0.0/24, 192.168.0.0/16 }} counter; }}
            }}"
        );
        router.run(&["nft", &rules]);
        Home { router, host }
    }

    /// Packets to anybody but the hosts of this test.
    fn packets_elsewhere(&self) -> u64 {
        let list = ["netns", "exec", &self.router.0, "nft", "list", "chain"];
        let listed = Command::new("ip")
            .args(list)
            .args(["ip", "home", "elsewhere"])
            .output()
            .unwrap();
        let listed = text(&listed.stdout);
        let count = listed.split("counter packets ").nth(1).unwrap();
        count.split_whitespace().next().unwrap().parse().unwrap()
    }
}

/// A relay in a namespace; killed when dropped.
struct Relay<'a> {
    space: &'a Space,
    name: String,
    child: Child,
    address: String,
}

impl<'a> Relay<'a> {
    fn start(space: &'a Space, name: &str, listen: &str, more: &[&str]) -> Relay<'a> {
        let state = state_dir(name);
        std::fs::create_dir_all(&state).unwrap();
        let mut child = Command::new("ip")
            .args(["netns", "exec", &space.0])
            .arg(env!("CARGO_BIN_EXE_vistara"))
            .args(["relay", "--listen", listen])
            .args(more)
            .env("VISTARA_STATE_DIR", &state)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut address = String::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_line(&mut address).unwrap();
        let address = address.trim().to_owned();
        assert!(address.ends_with(&format!("@{listen}")), "{address}");
        Relay {
            space,
            name: name.to_owned(),
            child,
            address,
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Another process with the same key, at the same place.
    fn again(&self) -> Relay<'a> {
        let (_, listen) = self.address.split_once('@').unwrap();
        let again = Relay::start(self.space, &self.name, listen, &[]);
        assert_eq!(again.address, self.address);
        again
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answers(node: &Node<'_>, other: &str) -> bool {
    node.vistara(&["--on", other, "ps"]).status.success()
}

fn grant(from: &Node<'_>, to: &Node<'_>) -> String {
    let id = to.said(&["id"]);
    from.said(&["grant", "--to", &id, "--for", "run", "--until", "1h"])
}

#[test]
fn two_nodes_behind_translators_meet_through_a_relay_and_go_on_straight() {
    if skipped() {
        return;
    }
    let net = internet("rn");
    let host = Space::new("rr");
    host.cable("10.81.0.9/24", &net, None, "r");
    let homes = [1, 2].map(|number| Home::new(&net, "r", number, false));
    let mut relay = Relay::start(&host, "net-rr", "10.81.0.9:7443", &[]);
    let a = Node::new(&homes[0].host, "net-r1");
    let b = Node::new(&homes[1].host, "net-r2");

    // Without a relay there is no way.
    let ticket = b.said(&["node", "ticket"]);
    assert!(ticket.contains("@192.168.2.2:") && !ticket.contains("relay:"));
    let refused = a.vistara(&["node", "join", &ticket]);
    assert!(!refused.status.success());

    b.said(&["node", "terms", "--relay", &relay.address]);
    let ticket = b.said(&["node", "ticket"]);
    assert!(
        ticket.contains(&format!(",relay:{}", relay.address)),
        "{ticket}"
    );
    let token = grant(&b, &a);
    let begin = Instant::now();
    a.said(&["node", "join", &ticket, "--name", "b", "--grant", &token]);
    println!("joined after {:?}", begin.elapsed());
    a.said(&["--on", "b", "ps"]);
    until("that packets go straight", || a.of("b", "way") == "direct");
    println!("straight after {:?}", begin.elapsed());

    // Then the relay is not needed for what goes on.
    relay.kill();
    let end = Instant::now() + Duration::from_secs(12);
    while Instant::now() < end {
        assert_eq!(a.state_of("b"), "connected");
        a.said(&["--on", "b", "ps"]);
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(a.of("b", "way"), "direct");
    for home in &homes {
        assert_eq!(home.packets_elsewhere(), 0, "packets to nobody's address");
    }
    // It is counted where there are any.
    let stray = "echo x >/dev/udp/203.0.113.1/53";
    homes[0].host.run(&["bash", "-c", stray]);
    assert_eq!(homes[0].packets_elsewhere(), 1);
}

#[test]
fn where_translators_do_not_let_packets_go_straight_the_relay_carries_them_and_may_be_away() {
    if skipped() {
        return;
    }
    let net = internet("sn");
    let host = Space::new("sr");
    host.cable("10.81.0.9/24", &net, None, "r");
    let homes = [1, 2, 3].map(|number| Home::new(&net, "s", number, true));
    let mut relay = Relay::start(&host, "net-sr", "10.81.0.9:7443", &[]);
    let [a, b, c] =
        [0, 1, 2].map(|index: usize| Node::new(&homes[index].host, &format!("net-s{}", index + 1)));
    b.said(&["node", "terms", "--relay", &relay.address]);
    let ticket = b.said(&["node", "ticket"]);
    for node in [&a, &c] {
        let token = grant(&b, node);
        node.said(&["node", "join", &ticket, "--name", "b", "--grant", &token]);
        node.said(&["--on", "b", "ps"]);
    }
    // The third was only heard of, with its card's relay.
    let c_id = c.said(&["id"]);
    until("that one hears of the other", || {
        a.life_of(&c_id) == "alive"
    });
    let token = grant(&c, &a);
    until("that its card names the relay", || {
        a.vistara(&["node", "join", &c_id, "--name", "c"])
            .status
            .success()
    });
    a.said(&["grant", "keep", &token]);
    a.said(&["--on", "c", "ps"]);
    // There was time to find a straight way.
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        assert_eq!(
            (a.of("b", "way"), a.of("c", "way")),
            ("relayed".into(), "relayed".into())
        );
        std::thread::sleep(Duration::from_millis(250));
    }

    relay.kill();
    until("that the loss is noticed", || {
        a.state_of("b") != "connected" && a.state_of("c") != "connected"
    });
    let _relay = relay.again();
    let back = Instant::now();
    until("that all are connected again", || {
        a.state_of("b") == "connected" && a.state_of("c") == "connected" && answers(&a, "b")
    });
    println!("connected again after {:?}", back.elapsed());
    a.said(&["--on", "c", "ps"]);
    for home in &homes {
        assert_eq!(home.packets_elsewhere(), 0, "packets to nobody's address");
    }
}

#[test]
fn an_image_that_only_the_client_has_runs_through_a_relay_and_gives_a_receipt() {
    if skipped() {
        return;
    }
    let archive = target().join("demo/python3.oci.tar");
    let Some(kernels) = std::env::var_os("VISTARA_TEST_KERNELS").filter(|_| archive.exists())
    else {
        println!("SKIP: no guest kernel or no demonstration image (`cargo xtask test` has both)");
        return;
    };
    let net = internet("mn");
    let host = Space::new("mr");
    host.cable("10.81.0.9/24", &net, None, "r");
    let homes = [1, 2].map(|number| Home::new(&net, "m", number, true));
    let relay = Relay::start(&host, "net-mr", "10.81.0.9:7443", &[]);
    let a = Node::new(&homes[0].host, "net-m1");
    let b = Node::new(&homes[1].host, "net-m2");
    let link = b.system.state.join("kernels");
    if !link.exists() {
        std::os::unix::fs::symlink(kernels, link).unwrap();
    }
    // All that the client has of the other is a ticket and a grant.
    b.said(&["node", "terms", "--relay", &relay.address]);
    let ticket = b.said(&["node", "ticket"]);
    let own = a.said(&["id"]);
    let rights = ["--for", "run,images", "--until", "1h"];
    let token = b.said(&[&["grant", "--to", &own], &rights[..]].concat());
    a.said(&["node", "join", &ticket, "--name", "b", "--grant", &token]);
    let archive = archive.to_str().unwrap();
    let id = a.said(&["images", "import", "-q", archive, "--name", IMAGE]);
    assert_eq!(b.said(&["images", "-q"]), "");

    let receipt = a.system.state.join("receipt.txt");
    let receipt = receipt.to_str().unwrap();
    let begin = Instant::now();
    let run = [
        "--on",
        "b",
        "run",
        "-q",
        "--rm",
        "-m",
        "128m",
        "--network",
        "none",
    ];
    let program = [
        "--receipt",
        receipt,
        IMAGE,
        "sh",
        "-c",
        "echo through; exit 7",
    ];
    let ran = a.vistara(&[&run[..], &program].concat());
    println!("sent and run after {:?}", begin.elapsed());
    assert_eq!(ran.status.code(), Some(7), "{}", text(&ran.stderr));
    assert_eq!(text(&ran.stdout), "through\n");
    assert_eq!(a.of("b", "way"), "relayed");
    let expected = ["--node", "b", "--image", &id, "--exit", "7"];
    a.said(&[&["receipt", "verify", receipt], &expected[..]].concat());
    let other = a.vistara(&["receipt", "verify", receipt, "--exit", "0"]);
    assert!(!other.status.success(), "{}", text(&other.stdout));

    // And what is done with a machine that is there.
    let on = |words: &[&str]| a.said(&[&["--on", "b"], words].concat());
    let detached = ["run", "-d", "-m", "128m", "--network", "none", IMAGE];
    let machine = on(&[&detached[..], &["sh", "-c", "echo here; sleep 1000"]].concat());
    until("its output", || on(&["logs", &machine]) == "here");
    let file = a.system.state.join("file");
    std::fs::write(&file, "taken along").unwrap();
    let inside = format!("{machine}:/tmp/file");
    on(&["cp", "-q", file.to_str().unwrap(), &inside]);
    let told = on(&["exec", &machine, "cat", "/tmp/file"]);
    assert_eq!(told, "taken along");
    on(&["rm", "-f", &machine]);
    assert_eq!(on(&["ps", "-aq"]), "");
    for home in &homes {
        assert_eq!(home.packets_elsewhere(), 0, "packets to nobody's address");
    }
}

#[test]
fn a_relay_that_does_not_let_a_node_in_is_told_of_when_its_ticket_is_made() {
    if skipped() {
        return;
    }
    let (host, space) = (Space::new("ar"), Space::new("ah"));
    host.cable("10.82.0.9/24", &space, Some("10.82.0.1/24"), "r");
    let a = Node::new(&space, "net-a1");
    let other = "ab".repeat(32);
    let relay = Relay::start(&host, "net-ar", "10.82.0.9:7443", &["--allow", &other]);
    a.said(&["node", "terms", "--relay", &relay.address]);
    let printed = a.vistara(&["node", "ticket"]);
    let complaint = text(&printed.stderr);
    assert!(
        complaint.contains("not connected to its relay"),
        "{complaint}"
    );
    assert!(complaint.contains("--allow"), "{complaint}");
    let status = a.said(&["node", "status"]);
    assert!(status.contains("does not serve you"), "{status}");
    // One that the owner does not want any more is not used.
    a.said(&["node", "terms", "--relay", ""]);
    assert!(!a.said(&["node", "ticket"]).contains("relay:"));
}

#[test]
fn nodes_of_one_network_are_found_by_their_ids_where_their_owners_want_that() {
    if skipped() {
        return;
    }
    let (_switch, spaces) = three_on_a_switch("d", "10.83.0");
    let [a, b, c] =
        [0, 1, 2].map(|index: usize| Node::new(&spaces[index], &format!("net-d{index}")));
    let [b_id, c_id] = [&b, &c].map(|node| node.said(&["id"]));
    let refused = a.vistara(&["node", "join", &b_id]);
    let complaint = text(&refused.stderr);
    assert!(complaint.contains("--local-discovery"), "{complaint}");
    for node in [&a, &b] {
        node.said(&["node", "terms", "--local-discovery"]);
    }
    for node in [&a, &b, &c] {
        node.said(&["node", "ticket"]);
    }
    until("that it is heard", || a.of(&b_id, "known") == "near");
    let token = grant(&b, &a);
    a.said(&["node", "join", &b_id, "--name", "b", "--grant", &token]);
    a.said(&["--on", "b", "ps"]);
    // The third keeps still.
    let refused = a.vistara(&["node", "join", &c_id]);
    let complaint = text(&refused.stderr);
    assert!(complaint.contains("no node"), "{complaint}");
    assert_eq!(a.of(&c_id, "known"), "");

    // It moves, and is found again where it is now.
    spaces[1].run(&["ip", "address", "flush", "dev", "v10"]);
    until("that the loss is noticed", || {
        a.state_of("b") != "connected"
    });
    let moved = Instant::now();
    spaces[1].run(&["ip", "address", "add", "10.83.0.77/24", "dev", "v10"]);
    until("that it is found again", || a.state_of("b") == "connected");
    println!("found again after {:?}", moved.elapsed());
    a.said(&["--on", "b", "ps"]);
}
