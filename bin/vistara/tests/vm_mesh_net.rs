//! Nodes in network namespaces of their own: a network that parts and heals, and a node behind an address translator. No
//! machines are started.
//!
//! Needs root, `ip` and `nft`; skipped with the reason where they are missing. The namespaces are the test's own, and go with
//! it.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used)]

mod netns;
mod vm;

use netns::{Node, Space, skipped, three_on_a_switch, two_that_joined_b};
use std::time::{Duration, Instant};
use vm::{text, until};

/// What the switch drops until the table `cut` is deleted, a rule each.
fn drops(switch: &Space, rules: &[&str]) {
    let table = ["nft", "add", "table", "bridge", "cut"];
    switch.run(&table);
    let hook = "{ type filter hook forward priority 0 ; }";
    switch.run(&["nft", "add", "chain", "bridge", "cut", "f", hook]);
    for rule in rules {
        let add = ["nft", "add", "rule", "bridge", "cut", "f"];
        let rule: Vec<&str> = rule.split(' ').chain(["drop"]).collect();
        switch.run(&[&add[..], &rule].concat());
    }
}

/// Cuts the way from one address to another, and not back.
fn cut_from(switch: &Space, from: &str, to: &str) {
    drops(switch, &[&format!("ip saddr {from} ip daddr {to}")]);
}

/// Cuts the way between two addresses, both ways.
fn cut_between(switch: &Space, one: &str, other: &str) {
    let way = |from: &str, to: &str| format!("ip saddr {from} ip daddr {to}");
    drops(switch, &[&way(one, other), &way(other, one)]);
}

/// Lets through again whatever was dropped.
fn heal(switch: &Space) {
    switch.run(&["nft", "delete", "table", "bridge", "cut"]);
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

    heal(&switch);
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
    let [a, b, c] = two_that_joined_b(&spaces, "g", "10.79.0.2");
    let [a_id, c_id] = [&a, &c].map(|node| node.said(&["id"]));

    // Two that cannot speak with each other have a third to say that both live.
    cut_between(&switch, "10.79.0.1", "10.79.0.3");
    let cut = Instant::now();
    while cut.elapsed() < Duration::from_secs(12) {
        assert_ne!(a.life_of(&c_id), "dead");
        assert_ne!(c.life_of(&a_id), "dead");
        std::thread::sleep(Duration::from_millis(500));
    }
    heal(&switch);

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
fn a_way_that_is_cut_in_one_direction_is_noticed_at_both_ends_and_heals() {
    if skipped() {
        return;
    }
    let (switch, spaces) = three_on_a_switch("o", "10.76.0");
    let [a, b, c] = two_that_joined_b(&spaces, "o", "10.76.0.2");
    let a_id = a.said(&["id"]);
    assert_eq!(b.state_of(&a_id), "connected");
    // What b says reaches nobody at a; what a says arrives.
    cut_from(&switch, "10.76.0.2", "10.76.0.1");
    let cut = Instant::now();
    until("that the loss is noticed", || {
        a.state_of("b") != "connected" && b.state_of(&a_id) != "connected"
    });
    let took = cut.elapsed();
    println!("noticed after {took:?}");
    assert!(took < Duration::from_secs(10), "noticed after {took:?}");
    let refused = a.vistara(&["--on", "b", "ps"]);
    assert!(!refused.status.success(), "an answer that cannot have come");
    // A third hears both: nobody is dead.
    while cut.elapsed() < Duration::from_secs(15) {
        assert_ne!(c.life_of("b"), "dead");
        assert_ne!(c.life_of(&a_id), "dead");
        std::thread::sleep(Duration::from_millis(500));
    }
    heal(&switch);
    let healed = Instant::now();
    until("an answer after it healed", || {
        a.vistara(&["--on", "b", "ps"]).status.success() && b.state_of(&a_id) == "connected"
    });
    println!("healed after {:?}", healed.elapsed());
}

#[test]
fn a_slow_network_that_loses_packets_carries_everything_and_nobody_is_dead() {
    if skipped() {
        return;
    }
    let (switch, spaces) = three_on_a_switch("l", "10.75.0");
    let [a, b, c] = two_that_joined_b(&spaces, "l", "10.75.0.2");
    let [a_id, b_id, c_id] = [&a, &b, &c].map(|node| node.said(&["id"]));
    for (number, space) in spaces.iter().enumerate() {
        let cable = format!("v{number}0");
        let rate = ["rate", "2mbit", "burst", "16kb", "latency", "100ms"];
        let add = ["tc", "qdisc", "add", "dev", &cable, "root", "tbf"];
        space.run(&[&add[..], &rate].concat());
    }
    // Each eighth packet, at random.
    drops(&switch, &["numgen random mod 8 0"]);
    let begin = Instant::now();
    let (mut asked, mut worst) = (0, Duration::ZERO);
    while begin.elapsed() < Duration::from_secs(20) {
        let at = Instant::now();
        a.said(&["--on", "b", "ps"]);
        (asked, worst) = (asked + 1, worst.max(at.elapsed()));
        for (node, others) in [
            (&a, [&b_id, &c_id]),
            (&b, [&a_id, &c_id]),
            (&c, [&a_id, &b_id]),
        ] {
            for other in others {
                assert_ne!(node.life_of(other), "dead");
            }
        }
    }
    println!("{asked} questions answered, the slowest after {worst:?}");
    heal(&switch);
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
