//! Network namespaces, and nodes in them.
//!
//! Needs root, `ip` and `nft`; [`skipped`] says so where they are missing. The namespaces are the test's own, and go with it.

// Helpers outside a test function: a failure is the test's. Each file of tests uses a part of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use crate::vm::{System, finish, state_dir, text, until};
use std::process::{Command, Output, Stdio};

/// Runs a command of the host, which must go well.
pub(crate) fn host(words: &[&str]) {
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

pub(crate) fn skipped() -> bool {
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
pub(crate) struct Space(pub(crate) String);

impl Space {
    pub(crate) fn new(name: &str) -> Space {
        let name = format!("vistara-{}-{name}", std::process::id());
        host(&["ip", "netns", "add", &name]);
        let space = Space(name);
        space.run(&["ip", "link", "set", "lo", "up"]);
        space
    }

    pub(crate) fn run(&self, words: &[&str]) {
        host(&[&["ip", "netns", "exec", &self.0], words].concat());
    }

    /// A cable to another namespace, with these addresses (`ADDRESS/PREFIX`) at its ends; an end without one is a
    /// port of the bridge `sw0` there.
    pub(crate) fn cable(&self, own: &str, other: &Space, far: Option<&str>, name: &str) {
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
pub(crate) struct Node<'a> {
    pub(crate) space: &'a Space,
    pub(crate) system: System,
}

impl<'a> Node<'a> {
    pub(crate) fn new(space: &'a Space, name: &str) -> Node<'a> {
        let state = state_dir(name);
        std::fs::create_dir_all(&state).unwrap();
        let system = System { state };
        Node { space, system }
    }

    pub(crate) fn vistara(&self, words: &[&str]) -> Output {
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

    pub(crate) fn said(&self, words: &[&str]) -> String {
        let output = self.vistara(words);
        let complaint = text(&output.stderr);
        assert!(output.status.success(), "{words:?}: {complaint}");
        text(&output.stdout).trim().to_owned()
    }

    /// Joins another under a name, with a grant for running.
    pub(crate) fn join(&self, other: &Node<'_>, name: &str, address: &str) {
        let listen = format!("{address}:0");
        let ticket = other.said(&["node", "ticket", "--listen", &listen]);
        let id = self.said(&["id"]);
        let grant = ["grant", "--to", &id, "--for", "run", "--until", "1h"];
        let token = other.said(&grant);
        self.said(&["node", "join", &ticket, "--name", name, "--grant", &token]);
    }

    /// How it stands with a node that it has joined.
    pub(crate) fn state_of(&self, name: &str) -> String {
        self.of(name, "state")
    }

    /// What the network believes of a node, by its name here or its id; nothing where it is not known.
    pub(crate) fn life_of(&self, node: &str) -> String {
        self.of(node, "life")
    }

    pub(crate) fn of(&self, node: &str, what: &str) -> String {
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
pub(crate) fn three_on_a_switch(name: &str, network: &str) -> (Space, Vec<Space>) {
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

/// A node in each of these spaces, of which the first and the third have joined the second, as `b`, and hear of each other by it.
pub(crate) fn two_that_joined_b<'a>(
    spaces: &'a [Space],
    name: &str,
    address: &str,
) -> [Node<'a>; 3] {
    let nodes =
        [0, 1, 2].map(|index: usize| Node::new(&spaces[index], &format!("net-{name}{index}")));
    let [a, b, c] = &nodes;
    a.join(b, "b", address);
    c.join(b, "b", address);
    let [a_id, c_id] = [a, c].map(|node| node.said(&["id"]));
    until("that who joined one hears of the other", || {
        a.life_of(&c_id) == "alive" && c.life_of(&a_id) == "alive"
    });
    nodes
}
