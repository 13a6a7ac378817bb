//! Nodes in network namespaces of their own: a network that parts and heals, and a node behind an address translator. No
//! machines are started.
//!
//! Needs root, `ip` and `nft`; skipped with the reason where they are missing. The namespaces are the test's own, and go with
//! it.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use vm::{System, finish, state_dir, text, until};

/// Runs a command of the host, which must go well.
fn host(words: &[&str]) {
    let output = finish(
        Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    assert!(
        output.status.success(),
        "{words:?}: {}",
        text(&output.stderr)
    );
}

fn skipped() -> bool {
    let root = rustix::process::geteuid().is_root();
    let there = |tool: &str| {
        let found = Command::new(tool).arg("-V").output();
        found.is_ok_and(|output| output.status.success())
    };
    let nft = Command::new("nft").arg("--version").output();
    if root && there("ip") && nft.is_ok_and(|output| output.status.success()) {
        return false;
    }
    println!("SKIP: this takes root, `ip` (iproute2) and `nft` (nftables)");
    true
}

/// A namespace, gone when dropped.
struct Space(String);

impl Space {
    fn new(name: &str) -> Space {
        let name = format!("vistara-{}-{name}", std::process::id());
        host(&["ip", "netns", "add", &name]);
        let space = Space(name);
        space.run(&["ip", "link", "set", "lo", "up"]);
        space
    }

    fn run(&self, words: &[&str]) {
        host(&[&["ip", "netns", "exec", &self.0], words].concat());
    }

    /// A cable to another namespace, with these addresses (`ADDRESS/PREFIX`) at its ends; an end without one is a
    /// port of the bridge `sw0` there.
    fn cable(&self, own: &str, other: &Space, far: Option<&str>, name: &str) {
        let (one, two) = (format!("{name}0"), format!("{name}1"));
        let link = ["ip", "link", "add", &one, "netns", &self.0, "type", "veth"];
        host(&[&link[..], &["peer", "name", &two, "netns", &other.0]].concat());
        self.run(&["ip", "address", "add", own, "dev", &one]);
        match far {
            Some(far) => other.run(&["ip", "address", "add", far, "dev", &two]),
            None => other.run(&["ip", "link", "set", &two, "master", "sw0"]),
        }
        self.run(&["ip", "link", "set", &one, "up"]);
        other.run(&["ip", "link", "set", &two, "up"]);
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .output();
    }
}

/// A node in a namespace; it leaves when dropped.
struct Node<'a> {
    space: &'a Space,
    system: System,
}

impl<'a> Node<'a> {
    fn new(space: &'a Space, name: &str) -> Node<'a> {
        let state = state_dir(name);
        std::fs::create_dir_all(&state).unwrap();
        let system = System { state };
        Node { space, system }
    }

    fn vistara(&self, words: &[&str]) -> Output {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.space.0])
            .arg(env!("CARGO_BIN_EXE_vistara"))
            .env("VISTARA_STATE_DIR", &self.system.state)
            .env_remove("VISTARA_SOCKET")
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(&mut command)
    }

    fn said(&self, words: &[&str]) -> String {
        let output = self.vistara(words);
        let complaint = text(&output.stderr);
        assert!(output.status.success(), "{words:?}: {complaint}");
        text(&output.stdout).trim().to_owned()
    }

    /// Joins another under a name, with a grant for running.
    fn join(&self, other: &Node<'_>, name: &str, address: &str) {
        let listen = format!("{address}:0");
        let ticket = other.said(&["node", "ticket", "--listen", &listen]);
        let id = self.said(&["id"]);
        let grant = ["grant", "--to", &id, "--for", "run", "--until", "1h"];
        let token = other.said(&grant);
        self.said(&["node", "join", &ticket, "--name", name, "--grant", &token]);
    }

    /// How it stands with a node that it has joined.
    fn state_of(&self, name: &str) -> String {
        self.of(name, "state")
    }

    /// What the network believes of a node, by its name here or its id; nothing where it is not known.
    fn life_of(&self, node: &str) -> String {
        self.of(node, "life")
    }

    fn of(&self, node: &str, what: &str) -> String {
        let nodes: serde_json::Value =
            serde_json::from_str(&self.said(&["nodes", "--json"])).unwrap();
        let found = nodes.as_array().unwrap().iter();
        let mut found = found.filter(|one| one["name"] == node || one["id"] == node);
        let found = found.next().and_then(|one| one[what].as_str());
        found.unwrap_or_default().to_owned()
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.vistara(&["node", "leave"]);
        self.vistara(&["node", "stop"]);
    }
}

/// A switch, and three hosts at it: the network's addresses 1 to 3.
fn three_on_a_switch(name: &str, network: &str) -> (Space, Vec<Space>) {
    let switch = Space::new(&format!("{name}s"));
    switch.run(&["ip", "link", "add", "sw0", "type", "bridge"]);
    switch.run(&["ip", "link", "set", "sw0", "up"]);
    let spaces: Vec<Space> = (0..3)
        .map(|index| Space::new(&format!("{name}{index}")))
        .collect();
    for (index, space) in spaces.iter().enumerate() {
        let own = format!("{network}.{}/24", index + 1);
        space.cable(&own, &switch, None, &format!("v{index}"));
    }
    (switch, spaces)
}

/// Cuts the way between two addresses, both ways, until the table `cut` is deleted.
fn cut_between(switch: &Space, one: &str, other: &str) {
    let table = ["nft", "add", "table", "bridge", "cut"];
    switch.run(&table);
    let hook = "{ type filter hook forward priority 0 ; }";
    switch.run(&["nft", "add", "chain", "bridge", "cut", "f", hook]);
    for (from, to) in [(one, other), (other, one)] {
        let rule = ["nft", "add", "rule", "bridge", "cut", "f"];
        switch.run(&[&rule[..], &["ip", "saddr", from, "ip", "daddr", to, "drop"]].concat());
    }
}

#[test]
fn a_network_that_parts_is_noticed_within_ten_seconds_and_healed_by_the_next_request() {
    if skipped() {
        return;
    }
    let (switch, spaces) = three_on_a_switch("p", "10.77.0");
    let [a, b, c] =
        [0, 1, 2].map(|index: usize| Node::new(&spaces[index], &format!("net-p{index}")));
    a.join(&b, "b", "10.77.0.2");
    a.join(&c, "c", "10.77.0.3");
    a.said(&["--on", "b", "ps"]);
    a.said(&["--on", "c", "ps"]);

    // The cable between two is cut, both ways; the third hears both.
    cut_between(&switch, "10.77.0.1", "10.77.0.2");
    let cut = Instant::now();
    until("that the loss is noticed", || {
        a.state_of("b") != "connected"
    });
    let took = cut.elapsed();
    assert!(took < Duration::from_secs(10), "noticed after {took:?}");
    assert_eq!(a.state_of("c"), "connected");
    let refused = a.vistara(&["--on", "b", "ps"]);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("does not answer"));
    a.said(&["--on", "c", "ps"]);

    switch.run(&["nft", "delete", "table", "bridge", "cut"]);
    until("an answer after it healed", || {
        a.vistara(&["--on", "b", "ps"]).status.success()
    });
    assert_eq!(a.state_of("b"), "connected");
}

#[test]
fn a_part_of_the_network_that_is_cut_off_is_dead_to_the_other_until_it_heals_by_itself() {
    if skipped() {
        return;
    }
    let (switch, spaces) = three_on_a_switch("g", "10.79.0");
    let [a, b, c] =
        [0, 1, 2].map(|index: usize| Node::new(&spaces[index], &format!("net-g{index}")));
    a.join(&b, "b", "10.79.0.2");
    c.join(&b, "b", "10.79.0.2");
    let [a_id, c_id] = [&a, &c].map(|node| node.said(&["id"]));
    until("that who joined one hears of the other", || {
        a.life_of(&c_id) == "alive" && c.life_of(&a_id) == "alive"
    });

    // Two that cannot speak with each other have a third to say that both live.
    cut_between(&switch, "10.79.0.1", "10.79.0.3");
    let cut = Instant::now();
    while cut.elapsed() < Duration::from_secs(12) {
        assert_ne!(a.life_of(&c_id), "dead");
        assert_ne!(c.life_of(&a_id), "dead");
        std::thread::sleep(Duration::from_millis(500));
    }
    switch.run(&["nft", "delete", "table", "bridge", "cut"]);

    // Nobody reaches the third.
    spaces[2].run(&["ip", "link", "set", "v20", "down"]);
    let cut = Instant::now();
    until("that all take it for dead", || {
        a.life_of(&c_id) == "dead" && b.life_of(&c_id) == "dead"
    });
    let took = cut.elapsed();
    println!("dead to both others after {took:?}");
    assert!(took < Duration::from_secs(10), "noticed after {took:?}");
    until("that it takes them for dead, too", || {
        c.life_of("b") == "dead" && c.life_of(&a_id) == "dead"
    });
    spaces[2].run(&["ip", "link", "set", "v20", "up"]);
    let healed = Instant::now();
    until("that all are alive to all", || {
        a.life_of(&c_id) == "alive"
            && b.life_of(&c_id) == "alive"
            && c.life_of(&a_id) == "alive"
            && c.life_of("b") == "alive"
    });
    println!("healed after {:?}", healed.elapsed());
}

#[test]
fn a_node_behind_an_address_translator_reaches_one_outside_and_is_reached_by_it() {
    if skipped() {
        return;
    }
    let (inside, router, outside) = (Space::new("in"), Space::new("nat"), Space::new("out"));
    inside.cable("192.168.7.2/24", &router, Some("192.168.7.1/24"), "i");
    outside.cable("10.78.0.2/24", &router, Some("10.78.0.1/24"), "o");
    inside.run(&["ip", "route", "add", "default", "via", "192.168.7.1"]);
    router.run(&["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]);
    for rule in [
        &["nft", "add", "table", "ip", "nat"][..],
        &[
            "nft",
            "add",
            "chain",
            "ip",
            "nat",
            "post",
            "{ type nat hook postrouting priority 100 ; }",
        ],
        &[
            "nft",
            "add",
            "rule",
            "ip",
            "nat",
            "post",
            "oifname",
            "o1",
            "masquerade",
        ],
    ] {
        router.run(rule);
    }
    let near = Node::new(&inside, "net-in");
    let far = Node::new(&outside, "net-out");
    near.join(&far, "far", "10.78.0.2");
    near.said(&["--on", "far", "ps"]);
    // Nobody outside has a way to the address inside; but whom it has dialled reaches it by the way that this has opened.
    let ticket = near.said(&["node", "ticket"]);
    assert!(ticket.contains("@192.168.7.2:"), "{ticket}");
    let id = far.said(&["id"]);
    let grant = ["grant", "--to", &id, "--for", "run", "--until", "1h"];
    let token = near.said(&grant);
    far.said(&["node", "join", &ticket, "--name", "near", "--grant", &token]);
    far.said(&["--on", "near", "ps"]);
}
