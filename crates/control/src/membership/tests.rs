//! Membership: small networks in virtual time. Large and hostile ones are the simulation's.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use std::collections::BTreeMap;

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
    polls: usize,
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
            polls: 0,
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
                Output::Evicted(_) | Output::Facts(_) => {}
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
                if self.deaf.contains(&node) {
                    continue;
                }
                if one.wake_at() <= now {
                    let outputs = one.poll(now);
                    self.polls += 1;
                    self.carry(node, outputs);
                } else {
                    let outputs = one.clone().poll(now);
                    assert_eq!(outputs, [], "before {:?}", one.wake_at());
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
            news: vec![Told::from(News {
                node: id(5),
                incarnation: u64::MAX - 1,
                life: Life::Dead,
            })],
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
    let packet = packet(Body::Gossip, news.collect());
    assert!(node.handle(SECOND, id(99), packet).is_empty());
    assert_eq!(node.members().count(), 0);
}

fn rumour(node: NodeId, incarnation: u64, life: Life) -> Packet {
    let news = News {
        node,
        incarnation,
        life,
    };
    packet(Body::Gossip, vec![news])
}

fn packet(body: Body, news: Vec<News>) -> Packet {
    let facts = Vec::new();
    let news = news.into_iter().map(Told::from).collect();
    Packet { body, news, facts }
}

fn alone(config: Config) -> Membership {
    Membership::new(config, id(1), 1, 1, SECOND)
}

/// Polls until then, with nobody answering; what was sent.
fn poll_until(node: &mut Membership, from: Duration, until: Duration) -> Vec<Output> {
    let mut outputs = Vec::new();
    let mut now = from;
    while now < until {
        now = node.wake_at().clamp(now + MS, until);
        outputs.extend(node.poll(now));
    }
    outputs
}

#[test]
fn strangers_fill_half_of_the_table_and_push_nobody_out_who_was_joined_or_heard() {
    let mut node = alone(Config {
        members_max: 16,
        ..Config::default()
    });
    let mut shown = BTreeSet::new();
    let mut outputs = node.join(id(2));
    for number in 3..=6 {
        outputs.extend(node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new())));
    }
    for number in 0..5000u64 {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let stranger = NodeId::from_bytes(bytes);
        outputs.extend(node.handle(SECOND, id(3), rumour(stranger, 1, Life::Alive)));
    }
    for output in outputs {
        match output {
            Output::Changed(node, Life::Alive) => assert!(shown.insert(node)),
            Output::Evicted(node) => assert!(shown.remove(&node)),
            Output::Changed(..) | Output::Facts(_) | Output::Send(..) => {}
        }
    }
    for number in 2..=6 {
        assert_eq!(node.life(id(number)), Some(Life::Alive), "{number}");
    }
    assert_eq!(node.members().count(), 5 + 8);
    let members: BTreeSet<NodeId> = node.members().map(|(node, ..)| node).collect();
    assert_eq!(shown, members, "each eviction is told");
    // Crowds that do speak push others out, but not who was joined.
    for number in 0..5000u64 {
        let mut bytes = [8; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let stranger = NodeId::from_bytes(bytes);
        node.handle(SECOND, stranger, packet(Body::Gossip, Vec::new()));
    }
    assert_eq!(node.members().count(), 16);
    assert!(node.life(id(2)).is_some());
}

#[test]
fn a_place_in_the_table_is_told_by_nothing_that_peers_see() {
    let node = alone(Config::default());
    let twin = |last: u8| {
        let mut bytes = [9; 32];
        bytes[31] = last;
        NodeId::from_bytes(bytes)
    };
    assert_ne!(node.keys.place(twin(1)).0, node.keys.place(twin(2)).0);
    // Pages go by places, and who stays goes by something else.
    let mut by_place: Vec<NodeId> = (0..=255).map(id).collect();
    let mut by_rank = by_place.clone();
    by_place.sort_by_key(|one| node.keys.place(*one));
    by_rank.sort_by_key(|one| node.keys.rank(*one));
    let alike = by_place
        .iter()
        .zip(&by_rank)
        .filter(|(one, other)| one == other);
    assert!(alike.count() < 20);
}

#[test]
fn one_peers_word_does_not_keep_the_dead_alive() {
    let mut net = Net::new(10);
    net.run(5 * SECOND);
    net.deaf.insert(id(7));
    for _ in 0..60 {
        for number in 2..=10u8 {
            let known = net.nodes[&id(number)]
                .members
                .values()
                .find(|one| one.news.node == id(7))
                .map_or(0, |one| one.news.incarnation);
            let packet = rumour(id(7), known + 1, Life::Alive);
            net.flying.push((net.now, id(1), id(number), packet));
        }
        net.run(500 * MS);
    }
    let others = net
        .nodes
        .values()
        .filter(|one| ![id(1), id(7)].contains(&one.node()));
    for node in others {
        assert_eq!(node.life(id(7)), Some(Life::Dead), "{:?}", node.node());
    }
}

#[test]
fn suspecting_again_gives_no_more_time() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    node.handle(SECOND, id(3), packet(Body::Gossip, Vec::new()));
    let mut outputs = Vec::new();
    for step in 0..4u32 {
        let now = SECOND + SECOND * step;
        let news = rumour(id(3), u64::from(step), Life::Suspect);
        outputs.extend(node.handle(now, id(2), news));
        outputs.extend(poll_until(&mut node, now, now + SECOND));
    }
    assert!(outputs.contains(&Output::Changed(id(3), Life::Dead)));
}

#[test]
fn denials_stay_behind_the_next_start_however_far_ahead_the_suspicions_are() {
    let mut node = alone(Config::default());
    for _ in 0..5000 {
        let ahead = node.news().incarnation + (1 << 20) - 1;
        let before = node.news().incarnation;
        node.handle(SECOND, id(2), rumour(id(1), ahead, Life::Suspect));
        node.handle(SECOND, id(2), rumour(id(1), before, Life::Suspect));
    }
    let next = Membership::new(Config::default(), id(1), 2, 1, SECOND);
    assert!(next.news().incarnation > node.news().incarnation);
    // What it cannot deny any more nobody believes on others' word.
    let mut other = Membership::new(Config::default(), id(5), 1, 1, SECOND);
    let last = (2 << DENIAL_BITS) - 1;
    other.handle(SECOND, id(1), rumour(id(1), last, Life::Alive));
    other.handle(SECOND, id(2), rumour(id(1), last, Life::Suspect));
    assert_eq!(other.life(id(1)), Some(Life::Alive));
}

#[test]
fn pings_in_others_stead_take_nothing_from_ones_own() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    node.handle(SECOND, id(3), packet(Body::Gossip, Vec::new()));
    let (mut sent, mut changes) = (0, Vec::new());
    for step in 0..100u32 {
        let now = SECOND + 100 * MS * step;
        let mut outputs = Vec::new();
        for number in 0..20 {
            let target = id(3);
            let body = Body::PingFor { number, target };
            outputs.extend(node.handle(now, id(2), packet(body, Vec::new())));
        }
        let pings = |output: &&Output| {
            let Output::Send(_, packet) = output else {
                return false;
            };
            matches!(packet.body, Body::Ping { .. })
        };
        sent += outputs.iter().filter(pings).count();
        outputs.extend(poll_until(&mut node, now, now + 100 * MS));
        changes.extend(
            outputs
                .into_iter()
                .filter(|one| matches!(one, Output::Changed(..))),
        );
    }
    assert!(changes.contains(&Output::Changed(id(3), Life::Dead)));
    // Eight at a time, each for a second.
    assert!((8..=96).contains(&sent), "{sent}");
}

#[test]
fn an_answer_through_a_helper_that_was_not_asked_is_none() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(3), packet(Body::Gossip, Vec::new()));
    let mut now = SECOND;
    let mut numbers = Vec::new();
    let mut dead = false;
    while now < 20 * SECOND && !dead {
        now += 10 * MS;
        for output in node.poll(now) {
            match output {
                Output::Send(target, packet) => {
                    if let Body::Ping { number, .. } = packet.body {
                        // A ping that is sent again has the number that it had, and helpers are asked by then.
                        if numbers.contains(&number) {
                            continue;
                        }
                        numbers.push(number);
                        // Somebody who was not asked says that it answered.
                        let body = Body::AckFor { number, target };
                        let packet = self::packet(body, Vec::new());
                        node.handle(now, id(3), packet.clone());
                        node.handle(now, id(9), packet);
                    }
                }
                Output::Changed(node, life) => dead |= node == id(9) && life == Life::Dead,
                Output::Evicted(_) | Output::Facts(_) => {}
            }
        }
        if numbers.len() > 40 {
            break;
        }
    }
    let near = numbers
        .windows(2)
        .filter(|pair| pair[0].abs_diff(pair[1]) < 1 << 32);
    assert!(near.count() <= 1, "numbers can be foreseen: {numbers:?}");
    assert!(node.probes.len() > 1, "the answers counted");
}

#[test]
fn a_page_that_was_not_asked_for_is_neither_taken_nor_answered() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    let stranger = |of| News {
        node: id(of),
        incarnation: 1,
        life: Life::Alive,
    };
    let page_of = |number, of| {
        let next = Some(5);
        packet(Body::Page { number, next }, vec![stranger(of)])
    };
    let page = |number| page_of(number, 77);
    let later = 30 * SECOND;
    assert!(node.handle(later, id(2), page(0)).is_empty());
    assert_eq!(node.life(id(77)), None);
    // One that was asked for is taken once, and is followed by so many more while they say something new.
    let mut outputs = node.join(id(2));
    let mut asked = 0;
    while let Some(Output::Send(_, sent)) = outputs.pop() {
        if let Body::Pull { number, .. } = sent.body {
            asked += 1;
            outputs = node.handle(later, id(2), page_of(number, 76 + asked));
            assert!(node.handle(later, id(2), page(number)).is_empty());
        }
    }
    assert_eq!(asked, 64);
    assert_eq!(node.life(id(77)), Some(Life::Alive));
    // Where a page says nothing new, the next one is not asked for.
    let outputs = node.join(id(2));
    let Some(Output::Send(_, sent)) = outputs.last() else {
        panic!("nothing was asked");
    };
    let Body::Pull { number, .. } = sent.body else {
        panic!("no page was asked for");
    };
    assert!(node.handle(later, id(2), page(number)).is_empty());
}

#[test]
fn pages_are_given_at_a_bounded_rate() {
    let mut node = alone(Config::default());
    let mut given = 0;
    for step in 0..5000u32 {
        let body = Body::Pull { number: 1, from: 0 };
        let now = 10 * SECOND + 2 * MS * step;
        let outputs = node.handle(now, id(2), packet(body, Vec::new()));
        let is_page = |one: &&Output| matches!(one, Output::Send(_, one) if matches!(one.body, Body::Page { .. }));
        given += outputs.iter().filter(is_page).count();
    }
    assert!((64..=75).contains(&given), "{given}");
}

#[test]
fn who_leaves_is_dead_to_all_with_its_last_facts_and_can_be_forgotten() {
    let mut net = Net::new(12);
    net.run(5 * SECOND);
    let one = net.nodes.get_mut(&id(4)).unwrap();
    one.state(9, Arc::from(&b"goodbye"[..]));
    let outputs = one.leave();
    net.carry(id(4), outputs);
    net.run(SECOND / 2);
    net.deaf.insert(id(4));
    net.run(9 * SECOND);
    assert!(net.all_believe(id(4), Life::Dead));
    for node in net.nodes.values().filter(|one| one.node() != id(4)) {
        let mut of = node.members().filter(|(node, ..)| *node == id(4));
        let (_, _, facts) = of.next().unwrap();
        assert_eq!(facts.map(|facts| facts.version), Some(9));
    }
    let first = net.nodes.get_mut(&id(1)).unwrap();
    assert!(!first.forget(id(5)), "it lives");
    assert!(first.forget(id(4)));
    assert_eq!(first.life(id(4)), None);
    let joiner = net.nodes.get_mut(&id(2)).unwrap();
    joiner.pin(id(4), true);
    assert!(!joiner.forget(id(4)), "the user named it");
}

#[test]
fn a_greeting_makes_members_of_both_and_says_nothing_of_others() {
    let mut net = Net::new(3);
    net.run(5 * SECOND);
    let fourth = Membership::new(Config::default(), id(4), 1, 4, net.now);
    net.nodes.insert(id(4), fourth);
    let greeting = net.nodes.get_mut(&id(1)).unwrap().greeting();
    assert_eq!(greeting.news.len(), 1);
    assert!(greeting.facts.is_empty());
    net.carry(id(1), vec![Output::Send(id(4), greeting)]);
    net.run(5 * SECOND);
    assert!(net.all_believe(id(4), Life::Alive));
    assert_eq!(net.nodes[&id(4)].alive(), 3);
}

/// An id that somebody has made up.
fn invented(number: u64) -> NodeId {
    let mut bytes = [0; 32];
    bytes[24..].copy_from_slice(&number.to_le_bytes());
    NodeId::from_bytes(bytes)
}

#[test]
fn one_peers_word_of_strangers_counts_at_a_bounded_rate_and_beyond_that_where_they_have_signed() {
    let mut node = alone(Config::default());
    let alive = |node| News {
        node,
        incarnation: 1,
        life: Life::Alive,
    };
    for number in 0..1000 {
        let life = if number % 2 == 0 {
            Life::Alive
        } else {
            Life::Dead
        };
        node.handle(SECOND, id(2), rumour(invented(number), 1, life));
    }
    // The peer's own, and of the strangers what it may tell at once.
    assert!(
        (256..=257).contains(&node.rumours_held()),
        "{}",
        node.rumours_held()
    );
    assert_eq!(node.members().count(), 1 + 128);
    let mut signed = packet(Body::Gossip, vec![alive(invented(5000))]);
    signed.facts.push(Stated {
        node: invented(5000),
        version: 1,
        bytes: Arc::from(&b"signed"[..]),
    });
    node.handle(SECOND, id(2), signed);
    assert_eq!(node.life(invented(5000)), Some(Life::Alive));
    // Others' words, and what happens to members, go on to be heard.
    node.handle(SECOND, id(3), rumour(id(4), 1, Life::Alive));
    assert_eq!(node.life(id(4)), Some(Life::Alive));
    node.handle(SECOND, id(2), rumour(id(3), 1, Life::Suspect));
    assert_eq!(node.life(id(3)), Some(Life::Suspect));
    // A second later it may tell of some more.
    let before = node.rumours_held();
    for number in 1000..1100 {
        node.handle(2 * SECOND, id(2), rumour(invented(number), 1, Life::Dead));
    }
    assert_eq!(node.rumours_held(), before + 16);
}

#[test]
fn news_go_on_in_the_order_in_which_they_came_whatever_the_ids_are() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    // Ids that are smaller than any come after it, more than one packet holds.
    node.handle(SECOND, id(2), rumour(id(0xee), 1, Life::Dead));
    for number in 0..100 {
        node.handle(SECOND, id(2), rumour(invented(number), 1, Life::Dead));
    }
    let sent = node.packet(Body::Gossip, id(2), None);
    assert!(sent.news.iter().any(|told| told.news.node == id(0xee)));
}

#[test]
fn who_was_only_heard_of_gets_every_other_ping_at_most() {
    let mut node = alone(Config::default());
    for number in 2..=5 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    for number in 0..200 {
        node.handle(SECOND, id(2), rumour(invented(number), 1, Life::Alive));
    }
    let mut pinged = [0, 0];
    for step in 1..=40u32 {
        let now = SECOND + 500 * MS * step;
        for output in node.poll(now) {
            if let Output::Send(
                to,
                Packet {
                    body: Body::Ping { number, .. },
                    ..
                },
            ) = output
            {
                let known = node.tie(to) == Some(Tie::Heard);
                pinged[usize::from(known)] += 1;
                if known {
                    node.handle(now, to, packet(Body::Ack { number }, Vec::new()));
                }
            }
        }
    }
    // Beside those, one that is dead is tried now and then.
    assert!(pinged[1] >= 18 && pinged[0] >= 10, "{pinged:?}");
}

#[test]
fn a_ping_that_is_lost_is_sent_again_before_anybody_is_suspected() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    let mut now = SECOND;
    let mut tries: Vec<(u64, u32)> = Vec::new();
    while now < 60 * SECOND {
        now += 10 * MS;
        for output in node.poll(now) {
            match output {
                Output::Send(
                    to,
                    Packet {
                        body: Body::Ping { number, .. },
                        ..
                    },
                ) => {
                    match tries.iter_mut().find(|(one, _)| *one == number) {
                        Some((_, count)) => *count += 1,
                        None => tries.push((number, 1)),
                    }
                    // Only the third try of each is answered; nobody else is there to help.
                    if tries.contains(&(number, 3)) {
                        node.handle(now, to, packet(Body::Ack { number }, Vec::new()));
                    }
                }
                Output::Changed(_, life) => assert_eq!(life, Life::Alive),
                Output::Send(..) | Output::Evicted(_) | Output::Facts(_) => {}
            }
        }
    }
    assert!(tries.len() > 100 && tries.iter().all(|(_, count)| *count <= 3));
}

#[test]
fn answers_carry_news_at_a_bounded_rate_and_say_what_they_have_to_beyond_it() {
    let mut node = alone(Config::default());
    node.state(7, Arc::from(&[7; 300][..]));
    for number in 0..200 {
        node.handle(SECOND, id(3), rumour(invented(number), 1, Life::Dead));
    }
    let (mut bytes, mut answers) = (0, 0);
    for step in 0..1000u32 {
        let (number, version) = (u64::from(step), 7);
        let body = Body::Ping { number, version };
        let now = SECOND + 10 * MS * step;
        // Something new each time, so that there is always something to tell.
        node.handle(now, id(3), rumour(invented(number), 2 + number, Life::Dead));
        for output in node.handle(now, id(2), packet(body, Vec::new())) {
            if let Output::Send(_, packet) = output {
                assert_eq!(packet.body, Body::Ack { number });
                bytes += packet.bytes();
                answers += 1;
            }
        }
    }
    // Ten seconds: 16 large ones at once and 40 after that, of at most 1,100 bytes; the others say who speaks.
    assert_eq!(answers, 1000);
    assert!(
        bytes <= 57 * 1100 + 943 * (HEAD_BYTES + NEWS_BYTES),
        "{bytes}"
    );
    // Who has old facts gets the new ones all the same.
    let body = Body::Ping {
        number: 1,
        version: 6,
    };
    let outputs = node.handle(11 * SECOND, id(2), packet(body, Vec::new()));
    let Some(Output::Send(_, answer)) = outputs.last() else {
        panic!("no answer");
    };
    assert_eq!(answer.facts.first().map(|facts| facts.version), Some(7));
}

#[test]
fn who_knows_a_part_of_a_network_tells_of_no_strangers_that_live_but_of_those_that_were_said_to_be_gone()
 {
    let mut node = alone(Config {
        members_max: 4,
        ..Config::default()
    });
    for number in 2..=5 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    let before = node.rumours_held();
    // Nobody of these gets a place: those that are there have spoken.
    for number in 0..10 {
        node.handle(SECOND, id(2), rumour(invented(number), 1, Life::Alive));
    }
    assert_eq!(node.rumours_held(), before);
    node.handle(SECOND, id(2), rumour(invented(20), 1, Life::Suspect));
    assert_eq!(node.life(invented(20)), None, "a suspect is not taken up");
    node.handle(SECOND, id(2), rumour(invented(20), 2, Life::Alive));
    let sent = node.packet(Body::Gossip, id(2), None);
    let told: Vec<_> = (sent.news.iter())
        .map(|told| told.news)
        .filter(|news| news.node == invented(20))
        .collect();
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].incarnation, told[0].life), (2, Life::Alive));
}

#[test]
fn news_are_as_old_as_all_together_had_them_and_in_the_end_nobody_passes_them_on() {
    let mut node = alone(Config::default());
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    let tell = |node: &mut Membership, about: NodeId, age: Age| {
        let mut told = rumour(about, 1, Life::Suspect);
        told.news[0].age = age;
        node.handle(SECOND, id(2), told);
    };
    tell(&mut node, invented(1), Age(25));
    tell(&mut node, invented(2), Age(90));
    tell(&mut node, invented(3), Age(100));
    let sent = |node: &mut Membership, now: Duration| {
        node.now = now;
        let packet = node.packet(Body::Gossip, id(2), None);
        let ages = (packet.news.iter()).map(|told| (told.news.node, told.age));
        ages.collect::<BTreeMap<_, _>>()
    };
    let first = sent(&mut node, SECOND + 10 * MS);
    assert_eq!(first[&invented(1)], Age(26), "rounded up");
    assert_eq!(first[&invented(2)], Age(91));
    assert!(!first.contains_key(&invented(3)));
    let later = sent(&mut node, SECOND * 3);
    assert_eq!(later[&invented(1)], Age(45));
    assert!(!later.contains_key(&invented(2)));
}

#[test]
fn a_death_is_no_younger_news_than_its_suspicion() {
    let mut node = alone(Config::default());
    for number in 2..=4 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    for (number, age) in [(3, Age(20)), (4, Age(48))] {
        let mut told = rumour(id(number), 0, Life::Suspect);
        told.news[0].age = age;
        node.handle(SECOND, id(2), told);
    }
    poll_until(&mut node, SECOND, SECOND * 4 + 100 * MS);
    assert_eq!(node.life(id(3)), Some(Life::Dead));
    assert_eq!(node.life(id(4)), Some(Life::Dead));
    let packet = node.packet(Body::Gossip, id(2), None);
    let told = |of: NodeId| packet.news.iter().find(|told| told.news.node == of);
    for (number, age) in [(3, Age(50)), (4, Age(78))] {
        let death = told(id(number)).unwrap();
        assert_eq!(death.news.life, Life::Dead);
        assert!(
            (age..=Age(age.0 + 2)).contains(&death.age),
            "{:?}",
            death.age
        );
    }
}

#[test]
fn old_ill_words_of_others_are_asked_about_since_nobody_would_hear_them_to_deny_them() {
    let mut node = alone(Config::default());
    for number in 2..=4 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    for (number, life) in [(3, Life::Suspect), (4, Life::Dead)] {
        for age in [Age(51), Age(99), Age::OLD] {
            let mut told = rumour(id(number), 0, life);
            told.news[0].age = age;
            node.handle(SECOND, id(2), told);
        }
        assert_eq!(node.life(id(number)), Some(Life::Alive));
        assert_eq!(node.doubts.pop(true, |_| Some(false)), Some(id(number)));
    }
}

/// Pages say what their senders believe, since nobody knows when: after a cut they are full of deaths that never were. Once
/// whoever read one suspected them all, told nobody, so that none could deny it, and had them dead three seconds later.
#[test]
fn who_is_dead_in_a_page_is_asked_before_anything_is_believed() {
    let mut node = alone(Config::default());
    for number in 2..=3 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    let mut outputs = Vec::new();
    node.pull_anew(id(2), 0, &mut outputs);
    let number = (outputs.iter())
        .find_map(|output| match output {
            Output::Send(_, packet) => match packet.body {
                Body::Pull { number, .. } => Some(number),
                _ => None,
            },
            _ => None,
        })
        .unwrap();
    let dead = News {
        node: id(3),
        incarnation: 0,
        life: Life::Dead,
    };
    let page = packet(Body::Page { number, next: None }, vec![dead]);
    let outputs = node.handle(SECOND, id(2), page);
    assert!(!outputs.iter().any(|one| matches!(one, Output::Changed(..))));
    let pinged = |outputs: &[Output]| {
        (outputs.iter()).any(|one| match one {
            Output::Send(to, packet) => *to == id(3) && matches!(packet.body, Body::Ping { .. }),
            _ => false,
        })
    };
    let outputs = poll_until(&mut node, SECOND, SECOND + 600 * MS);
    assert!(pinged(&outputs), "it is asked at the next turn");
    // And who does not answer is suspected by this node itself.
    let outputs = poll_until(&mut node, SECOND + 600 * MS, SECOND * 3);
    assert!(outputs.contains(&Output::Changed(id(3), Life::Suspect)));
}

#[test]
fn doubts_about_the_living_do_not_wait_behind_those_about_the_dead() {
    let mut node = alone(Config::default());
    for number in 2..=40 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    // As after a cut: many are dead, and others say that they live.
    for number in 4..=40 {
        node.handle(SECOND, id(number), rumour(id(number), 0, Life::Dead));
        node.handle(SECOND, id(2), rumour(id(number), 1, Life::Alive));
    }
    node.doubt(id(3), id(2));
    let pinged = |outputs: Vec<Output>| {
        let targets = outputs.into_iter().filter_map(|one| match one {
            Output::Send(to, packet) if matches!(packet.body, Body::Ping { .. }) => Some(to),
            _ => None,
        });
        targets.collect::<Vec<_>>()
    };
    node.next_probe = SECOND + 500 * MS;
    let first = pinged(node.poll(SECOND + 500 * MS));
    assert!(first.contains(&id(3)), "{first:?}");
    assert!(first.contains(&id(4)), "and one of the dead: {first:?}");
}

/// Nodes of a higher rank than any of 2 to 9: a full table of these has no place for them.
fn of_higher_ranks(node: &Membership) -> impl Iterator<Item = NodeId> + use<> {
    let last = (2..=9).map(|number| node.keys.rank(id(number))).max();
    let all = (100..10_000).map(invented);
    let higher = all.filter(|one| Some(node.keys.rank(*one)) > last);
    higher.collect::<Vec<_>>().into_iter()
}

/// A cut once had each half fill its tables with its own: afterwards a node of the smaller one was in 9 tables instead of 48, was
/// pinged every 3 s, and its death missed for 10 s.
#[test]
fn who_was_cut_off_for_a_while_has_kept_its_place_and_who_is_dead_for_long_makes_room() {
    let mut node = alone(Config {
        members_max: 8,
        ..Config::default()
    });
    for number in 2..=9 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    let dead = id(9);
    node.handle(SECOND, id(2), rumour(dead, 0, Life::Suspect));
    node.handle(SECOND, id(2), rumour(dead, 0, Life::Dead));
    assert_eq!(node.life(dead), Some(Life::Dead));
    node.pin(dead, true);
    node.pin(dead, false);
    // Newcomers of a higher rank than all that are there.
    let mut newcomers = of_higher_ranks(&node);
    let mut speak = |node: &mut Membership, now: Duration| {
        let newcomer = newcomers.next().unwrap();
        node.handle(now, newcomer, packet(Body::Gossip, Vec::new()));
        node.life(newcomer).is_some()
    };
    assert!(!speak(&mut node, SECOND * 60));
    assert_eq!(node.life(dead), Some(Life::Dead));
    assert!(speak(&mut node, SECOND * 302));
    assert_eq!(node.life(dead), None);
}

/// After a cut many dead ones are asked, once each, and speak by themselves: one packet that was lost made a suspect of each, of which
/// all were told, and pinged it. Three such waves within half a minute had one node of 10,000 send 28 kB a second.
#[test]
fn who_was_dead_when_it_was_asked_and_has_spoken_is_not_suspected_for_one_lost_packet() {
    let mut node = alone(Config::default());
    for number in 2..=3 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    node.handle(SECOND, id(2), rumour(id(3), 0, Life::Suspect));
    node.handle(SECOND, id(2), rumour(id(3), 0, Life::Dead));
    let mut outputs = Vec::new();
    node.ping(SECOND, id(3), None, true, &mut outputs);
    assert_eq!(outputs.len(), 1);
    let own = News {
        node: id(3),
        incarnation: 1,
        life: Life::Alive,
    };
    node.handle(SECOND + 10 * MS, id(3), packet(Body::Gossip, vec![own]));
    node.next_probe = SECOND * 60;
    let outputs = poll_until(&mut node, SECOND + 10 * MS, SECOND * 3);
    assert!(!outputs.contains(&Output::Changed(id(3), Life::Suspect)));
    assert_eq!(node.life(id(3)), Some(Life::Alive));
}

#[test]
fn many_that_ask_for_facts_get_them_at_a_bounded_rate() {
    let mut node = alone(Config::default());
    node.state(7, Arc::from(&[7; 300][..]));
    let mut facts = 0;
    for step in 0..1000u32 {
        let (number, version) = (u64::from(step), 0);
        let ping = packet(Body::Ping { number, version }, Vec::new());
        for output in node.handle(SECOND + 10 * MS * step, invented(number), ping) {
            if let Output::Send(_, answer) = output {
                facts += (answer.facts.iter())
                    .filter(|stated| stated.node == id(1))
                    .count();
            }
        }
    }
    // Ten seconds: 64 at once and eight a second, and six times along with news.
    assert!((64..=64 + 80 + 7).contains(&facts), "{facts}");
}

#[test]
fn a_return_of_which_others_have_told_is_not_told_anew_by_each_that_sees_it() {
    for told in [true, false] {
        let mut node = alone(Config::default());
        for number in 2..=3 {
            node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
        }
        node.handle(SECOND, id(2), rumour(id(3), 0, Life::Suspect));
        node.handle(SECOND, id(2), rumour(id(3), 0, Life::Dead));
        let back = News {
            node: id(3),
            incarnation: 1,
            life: Life::Alive,
        };
        if told {
            node.handle(SECOND, id(2), packet(Body::Gossip, vec![back]));
            assert_eq!(node.life(id(3)), Some(Life::Dead), "others raise nobody");
        }
        node.handle(SECOND, id(3), packet(Body::Gossip, vec![back]));
        assert_eq!(node.life(id(3)), Some(Life::Alive));
        let sent = node.packet(Body::Gossip, id(2), None);
        assert_eq!(sent.news.contains(&back.into()), !told);
    }
}

#[test]
fn the_more_are_dead_the_more_often_one_is_tried_and_the_pinned_every_other_time() {
    let tried = |many: u8, pinned: bool| {
        let mut node = alone(Config::default());
        for number in 2..=many + 2 {
            node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
        }
        for number in 3..=many + 2 {
            node.handle(SECOND, id(2), rumour(id(number), 0, Life::Suspect));
            node.handle(SECOND, id(2), rumour(id(number), 0, Life::Dead));
        }
        node.pin(id(3), pinned);
        let (mut all, mut first, mut now) = (0, 0, SECOND);
        while now < 61 * SECOND {
            now += 50 * MS;
            for output in node.poll(now) {
                if let Output::Send(to, Packet { body, .. }) = output
                    && let Body::Ping { number, .. } = body
                {
                    if to == id(2) {
                        node.handle(now, to, packet(Body::Ack { number }, Vec::new()));
                    } else {
                        all += 1;
                        first += u32::from(to == id(3));
                    }
                }
            }
        }
        (all, first)
    };
    assert!((10..=14).contains(&tried(3, false).0), "at least");
    let (all, first) = tried(120, true);
    assert!((200..=245).contains(&all), "{all}");
    assert!((80..=140).contains(&first), "{first} of {all}");
}

#[test]
fn who_is_to_be_known_is_suspected_until_it_answers_and_gets_a_place_in_a_full_table() {
    let mut node = alone(Config {
        members_max: 8,
        ..Config::default()
    });
    for number in 2..=9 {
        node.handle(SECOND, id(number), packet(Body::Gossip, Vec::new()));
    }
    // Two who would get no place by their ranks.
    let mut late = of_higher_ranks(&node);
    let (there, gone) = (late.next().unwrap(), late.next().unwrap());
    for one in [there, gone] {
        node.handle(SECOND, one, packet(Body::Gossip, Vec::new()));
        assert_eq!(node.life(one), None);
        node.keep(SECOND, one);
        assert_eq!(node.life(one), Some(Life::Suspect));
        assert_eq!(node.tie(one), Some(Tie::Pinned));
    }
    assert_eq!(node.members().count(), 8);
    let sent = node.packet(Body::Gossip, id(2), None);
    let told = |one| {
        sent.news
            .iter()
            .any(|told| told.news.node == one && told.news.life == Life::Suspect)
    };
    assert!(!told(there) && !told(gone), "nobody is told of a suspicion");
    let mut now = SECOND;
    while now < 5 * SECOND {
        now += 50 * MS;
        for output in node.poll(now) {
            if let Output::Send(
                to,
                Packet {
                    body: Body::Ping { number, .. },
                    ..
                },
            ) = output
                && to == there
            {
                node.handle(now, to, packet(Body::Ack { number }, Vec::new()));
            }
        }
    }
    assert_eq!(node.life(there), Some(Life::Alive));
    assert_eq!(node.life(gone), Some(Life::Dead));
    // At most half of the table.
    for one in late.take(20) {
        node.keep(now, one);
    }
    let pinned = (node.members.values()).filter(|one| one.pinned).count();
    assert_eq!((pinned, node.members().count()), (4, 8));
}

#[test]
fn who_knows_nobody_is_not_woken_and_who_hears_somebody_pings_within_a_period() {
    let mut node = alone(Config::default());
    node.state(1, Arc::from([1]));
    assert_eq!(node.wake_at(), Duration::MAX);
    node.handle(SECOND, id(2), packet(Body::Gossip, Vec::new()));
    let period = Config::default().probe_period;
    assert!(node.wake_at() <= SECOND + period, "{:?}", node.wake_at());
    // It does not answer, and is tried each five seconds from when it is dead.
    let mut woken = Vec::new();
    let mut now = SECOND;
    while now < 100 * SECOND {
        now = now.max(node.wake_at());
        node.poll(now);
        woken.push(now);
    }
    assert_eq!(node.life(id(2)), Some(Life::Dead));
    // A try, and the end of waiting for its answer.
    let late = woken.iter().filter(|at| **at > 50 * SECOND).count();
    assert!((18..=22).contains(&late), "{late} times in 50 s");
    assert!(node.rumours.waiting(), "there is nobody to tell");
    assert!(node.forget(id(2)));
    node.poll(now + SECOND);
    assert_eq!(node.wake_at(), Duration::MAX);
}

#[test]
fn members_of_an_idle_network_are_woken_for_their_pings_and_a_page_each_half_minute() {
    let mut net = Net::new(20);
    // Until all know all, and have told each other so.
    net.run(30 * SECOND);
    net.polls = 0;
    net.run(60 * SECOND);
    let each = net.polls / 20;
    assert!(each <= 60 * 2 + 2, "{each} times in 60 s");
}
