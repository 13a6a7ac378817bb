//! Membership: small networks in virtual time. Large and hostile ones are the simulation's.

#![allow(clippy::unwrap_used)]

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn id(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

/// Nodes whose packets take 10 ms, and those that hear nothing.
struct Net {
    now: Duration,
    nodes: BTreeMap<NodeId, Membership>,
    deaf: BTreeSet<NodeId>,
    cut: BTreeSet<(NodeId, NodeId)>,
    flying: Vec<(Duration, NodeId, NodeId, Packet)>,
    changes: Vec<(Duration, NodeId, NodeId, Life)>,
}

impl Net {
    fn new(count: u8) -> Net {
        Net::with(count, &Config::default())
    }

    fn with(count: u8, config: &Config) -> Net {
        let mut net = Net {
            now: SECOND,
            nodes: BTreeMap::new(),
            deaf: BTreeSet::new(),
            cut: BTreeSet::new(),
            flying: Vec::new(),
            changes: Vec::new(),
        };
        for number in 1..=count {
            let seed = u64::from(number);
            let node = Membership::new(config.clone(), id(number), 1, seed, net.now);
            net.nodes.insert(id(number), node);
        }
        for number in 2..=count {
            let outputs = net.nodes.get_mut(&id(number)).unwrap().join(id(1));
            net.carry(id(number), outputs);
        }
        net
    }

    fn carry(&mut self, from: NodeId, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send(to, packet) => {
                    let page = matches!(packet.body, Body::Page { .. });
                    let most = if page { 16 << 10 } else { 1100 };
                    assert!(packet.bytes() <= most, "{} bytes", packet.bytes());
                    self.flying.push((self.now + 10 * MS, from, to, packet));
                }
                Output::Changed(node, life) => self.changes.push((self.now, from, node, life)),
                Output::Facts(_) => {}
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += 10 * MS;
            let (due, later) = std::mem::take(&mut self.flying)
                .into_iter()
                .partition(|(at, ..)| *at <= self.now);
            self.flying = later;
            let due: Vec<_> = due;
            for (_, from, to, packet) in due {
                let lost = self.deaf.contains(&to)
                    || self.deaf.contains(&from)
                    || self.cut.contains(&(from, to));
                let now = self.now;
                if let Some(node) = self.nodes.get_mut(&to).filter(|_| !lost) {
                    let outputs = node.handle(now, from, packet);
                    self.carry(to, outputs);
                }
            }
            let ids: Vec<_> = self.nodes.keys().copied().collect();
            for node in ids {
                let now = self.now;
                let one = self.nodes.get_mut(&node).unwrap();
                if one.wake_at() <= now && !self.deaf.contains(&node) {
                    let outputs = one.poll(now);
                    self.carry(node, outputs);
                }
            }
        }
    }

    fn all_believe(&self, of: NodeId, life: Life) -> bool {
        let others = self.nodes.values().filter(|one| one.node() != of);
        let mut others = others.filter(|one| !self.deaf.contains(&one.node()));
        others.all(|one| one.life(of) == Some(life))
    }
}

#[test]
fn who_knows_one_node_soon_knows_all() {
    let mut net = Net::new(20);
    net.run(5 * SECOND);
    for node in net.nodes.values() {
        assert_eq!(node.alive(), 19, "{:?}", node.node());
    }
}

#[test]
fn a_node_that_vanishes_is_dead_to_all_within_ten_seconds() {
    let mut net = Net::new(20);
    net.run(10 * SECOND);
    net.deaf.insert(id(7));
    net.run(10 * SECOND);
    assert!(net.all_believe(id(7), Life::Dead));
    let others = net
        .changes
        .iter()
        .filter(|(_, _, of, life)| *of != id(7) && *life == Life::Dead);
    assert_eq!(others.count(), 0, "somebody else was taken for dead");
}

#[test]
fn a_node_that_some_cannot_reach_stays_alive_through_helpers() {
    let mut net = Net::new(8);
    net.run(5 * SECOND);
    // Half of the network cannot speak with node 7, nor it with them.
    for number in 1..=4 {
        net.cut.extend([(id(number), id(7)), (id(7), id(number))]);
    }
    net.run(60 * SECOND);
    assert!(net.changes.iter().all(|(.., life)| *life != Life::Dead));
}

#[test]
fn a_node_that_comes_back_is_taken_up_again_by_all() {
    let mut net = Net::new(12);
    net.run(5 * SECOND);
    net.deaf.insert(id(3));
    net.run(30 * SECOND);
    assert!(net.all_believe(id(3), Life::Dead));
    net.deaf.clear();
    net.run(20 * SECOND);
    assert!(net.all_believe(id(3), Life::Alive));
    assert_eq!(net.nodes[&id(3)].alive(), 11);
}

#[test]
fn two_halves_that_took_each_other_for_dead_find_together() {
    let mut net = Net::new(16);
    net.run(5 * SECOND);
    for left in 1..=8 {
        for right in 9..=16 {
            net.cut
                .extend([(id(left), id(right)), (id(right), id(left))]);
        }
    }
    net.run(60 * SECOND);
    assert_eq!(net.nodes[&id(1)].alive(), 7);
    net.cut.clear();
    net.run(40 * SECOND);
    for node in net.nodes.values() {
        assert_eq!(node.alive(), 15, "{:?}", node.node());
    }
}

#[test]
fn who_takes_leave_is_dead_to_all_without_a_probe() {
    let mut net = Net::new(10);
    net.run(5 * SECOND);
    let outputs = net.nodes.get_mut(&id(4)).unwrap().leave();
    net.carry(id(4), outputs);
    net.run(20 * MS);
    net.deaf.insert(id(4));
    net.run(6 * SECOND);
    assert!(net.all_believe(id(4), Life::Dead));
}

#[test]
fn one_liar_cannot_kill_and_its_incarnations_do_not_last() {
    let mut net = Net::new(10);
    net.run(5 * SECOND);
    for number in 2..=10u8 {
        let packet = Packet {
            body: Body::Gossip,
            news: vec![News {
                node: id(5),
                incarnation: u64::MAX - 1,
                life: Life::Dead,
            }],
            facts: Vec::new(),
        };
        net.flying.push((net.now, id(1), id(number), packet));
    }
    net.run(60 * SECOND);
    assert!(net.all_believe(id(5), Life::Alive));
}

#[test]
fn facts_reach_everybody_and_older_ones_do_not_come_back() {
    let mut net = Net::new(20);
    net.run(3 * SECOND);
    for version in 1..=2u64 {
        let bytes: Arc<[u8]> = vec![u8::try_from(version).unwrap(); 300].into();
        net.nodes.get_mut(&id(2)).unwrap().state(version, bytes);
        net.run(10 * SECOND);
        for node in net.nodes.values().filter(|one| one.node() != id(2)) {
            let facts = node.members().find(|(of, ..)| *of == id(2)).unwrap().2;
            assert_eq!(facts.map(|facts| facts.version), Some(version));
        }
    }
}

#[test]
fn a_full_table_stays_full_and_no_fuller() {
    let config = Config {
        members_max: 6,
        rumours_max: 8,
        ..Config::default()
    };
    let mut net = Net::with(30, &config);
    net.run(20 * SECOND);
    for node in net.nodes.values() {
        assert_eq!(node.members().count(), 6);
        assert!(node.rumours_held() <= 8);
    }
    // Everybody is pinged by somebody, so a death is noticed wherever it is known.
    net.deaf.insert(id(9));
    net.run(20 * SECOND);
    let fooled = net
        .nodes
        .values()
        .filter(|one| one.life(id(9)) == Some(Life::Alive));
    assert!(fooled.filter(|one| one.node() != id(9)).count() == 0);
}

#[test]
fn a_packet_that_is_too_large_is_thrown_away() {
    let mut node = Membership::new(Config::default(), id(1), 1, 1, SECOND);
    let news = (2..60).map(|number| News {
        node: id(number),
        incarnation: 0,
        life: Life::Alive,
    });
    let packet = Packet {
        body: Body::Gossip,
        news: news.collect(),
        facts: Vec::new(),
    };
    assert!(node.handle(SECOND, id(99), packet).is_empty());
    assert_eq!(node.members().count(), 0);
}
