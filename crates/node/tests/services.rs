//! Services among real nodes on loopback, with fake machines whose programs are processes of this host: created, scaled,
//! removed; and nodes that are killed in the middle.
//!
//! Times are the product's own (a lease is 10 s); what is waited for is a state, within a bound that a busy machine keeps.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[path = "support/network.rs"]
mod network;

use network::{BOUND, Network, refused, until, until_some};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};
use support::request;
use vistara_api::*;

impl Network {
    async fn create(&self, name: &str, replicas: u32, command: &[&str]) -> Service {
        let create = CreateServiceRequest {
            nodes: self.ids.clone(),
            ..wish(name, replicas, command)
        };
        self.node(0).client.create_service(&create).await.unwrap()
    }

    async fn until_running(&self, from: usize, name: &str, wanted: u32) -> Service {
        let client = &self.node(from).client;
        let begin = Instant::now();
        let mut last = None;
        while begin.elapsed() < BOUND {
            let asked = client.service(name).await;
            if let Ok(service) = &asked
                && (service.running, service.wanted) == (wanted, wanted)
                && !service.unattended
            {
                return service.clone();
            }
            last = Some(asked);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not all copies run: {last:#?}")
    }
}

fn wish(name: &str, replicas: u32, command: &[&str]) -> CreateServiceRequest {
    CreateServiceRequest {
        name: name.to_owned(),
        replicas,
        machine: request(command),
        ..CreateServiceRequest::default()
    }
}

fn holders(service: &Service) -> BTreeMap<u32, (String, u64)> {
    let held = service.copies.iter().filter_map(|copy| {
        let node = copy.node.as_ref()?;
        Some((copy.slot, (node.id.clone(), copy.generation)))
    });
    held.collect()
}

/// A program that writes down when it lives: its process, and the time.
fn beating(dir: &Path) -> [String; 3] {
    let line = format!(
        "while :; do echo $$ $(date +%s%N) >> {}/beats; sleep 0.1; done",
        dir.display()
    );
    ["sh".to_owned(), "-c".to_owned(), line]
}

/// First and last beat of each process, in the order of the first.
fn beats(dir: &Path) -> Vec<(u64, u64, u64)> {
    let text = std::fs::read_to_string(dir.join("beats")).unwrap_or_default();
    let mut lives: Vec<(u64, u64, u64)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ').filter_map(|word| word.parse::<u64>().ok());
        let (Some(pid), Some(time)) = (words.next(), words.next()) else {
            continue;
        };
        match lives.iter_mut().find(|life| life.0 == pid) {
            Some(life) => life.2 = time,
            None => lives.push((pid, time, time)),
        }
    }
    lives
}

#[tokio::test]
async fn copies_run_apart_and_follow_their_number_and_nothing_is_left() {
    let Some(network) = Network::of(4).await else {
        return;
    };
    let created = network.create("web", 3, &["sleep", "1000"]).await;
    assert_eq!((created.epoch, created.keepers.len()), (1, 3));
    let service = network.until_running(0, "web", 3).await;
    let on: BTreeSet<String> = holders(&service)
        .into_values()
        .map(|(node, _)| node)
        .collect();
    assert_eq!(on.len(), 3, "each on a node of its own: {service:?}");
    for copy in &service.copies {
        let index = network.index(&copy.node.as_ref().unwrap().id);
        let machine = copy.machine.as_ref().unwrap();
        let client = match index {
            0 => network.node(0).client.clone(),
            index => network.node(0).client.on(&network.ids[index]),
        };
        // It is the owner's, like any of its machines.
        let machine = client.machine(machine).await.unwrap().machine;
        let mark = machine.service.unwrap();
        assert_eq!((mark.name.as_str(), mark.slot), ("web", copy.slot));
        assert_eq!(machine.name, format!("web-{}", copy.slot));
        assert_eq!(machine.owner.is_some(), index != 0);
    }
    // Everybody who looks after it can show it, and only its owner changes it.
    let elsewhere = network.until_running(2, "web", 3).await;
    assert!(!elsewhere.own);
    assert_eq!(holders(&elsewhere), holders(&service));
    let scale = ScaleServiceRequest {
        replicas: 9,
        nodes: None,
    };
    let body = refused(
        network
            .node(2)
            .client
            .scale_service("web", &scale)
            .await
            .unwrap_err(),
    );
    assert_eq!(body.kind, ErrorKind::Denied);
    let again = CreateServiceRequest {
        nodes: network.ids.clone(),
        ..wish("web", 1, &["true"])
    };
    let body = refused(
        network
            .node(0)
            .client
            .create_service(&again)
            .await
            .unwrap_err(),
    );
    assert_eq!(body.kind, ErrorKind::Conflict);

    let replicas = |replicas| ScaleServiceRequest {
        replicas,
        nodes: None,
    };
    network
        .node(0)
        .client
        .scale_service("web", &replicas(5))
        .await
        .unwrap();
    let more = network.until_running(0, "web", 5).await;
    for (slot, held) in holders(&service) {
        assert_eq!(
            holders(&more)[&slot],
            held,
            "the others stay where they are"
        );
    }
    network
        .node(0)
        .client
        .scale_service("web", &replicas(1))
        .await
        .unwrap();
    until("the others are gone", async || {
        let all = network.machines().await;
        all.values().map(Vec::len).sum::<usize>() == 1
    })
    .await;
    assert_eq!(
        network.node(0).client.remove_service("web").await.unwrap(),
        []
    );
    let all = network.machines().await;
    assert!(all.values().all(Vec::is_empty), "{all:?}");
    for node in network.nodes.iter().flatten() {
        assert_eq!(node.client.services().await.unwrap(), []);
    }
    let left = std::fs::read_dir(network.dirs[0].path().join("state/services")).unwrap();
    assert_eq!(left.count(), 0, "the owner has nothing more to tell");
}

#[tokio::test]
async fn a_copy_whose_node_is_killed_is_gone_before_it_runs_elsewhere_though_the_owner_is_dead_too()
{
    let Some(mut network) = Network::of(4).await else {
        return;
    };
    let marks = tempfile::tempdir().unwrap();
    let command = beating(marks.path());
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    // On one that is not the owner's.
    let create = CreateServiceRequest {
        nodes: network.ids[1..].to_vec(),
        ..wish("beat", 1, &command)
    };
    network
        .node(0)
        .client
        .create_service(&create)
        .await
        .unwrap();
    let service = network.until_running(0, "beat", 1).await;
    let (node, generation) = holders(&service)[&0].clone();
    let index = network.index(&node);
    until("it beats", async || !beats(marks.path()).is_empty()).await;
    // Who made it, and who runs it: two of four keepers' nodes, of which one is none.
    network.kill(0);
    let killed = Instant::now();
    network.kill(index);
    let witness = (1..4).find(|other| *other != index).unwrap();
    let client = network.node(witness).client.clone();
    let after = until_some("it runs elsewhere", async || {
        let service = client.service("beat").await.ok()?;
        let (holder, now) = holders(&service).get(&0)?.clone();
        (service.running == 1 && holder != node).then_some((now, service))
    })
    .await;
    println!("elsewhere after {:?}", killed.elapsed());
    assert!(after.0 > generation, "{after:?}");
    until("it beats again", async || beats(marks.path()).len() > 1).await;
    let lives = beats(marks.path());
    for pair in lives.windows(2) {
        assert!(pair[0].2 < pair[1].1, "two lived at once: {lives:?}");
    }
    // The node that was killed comes back, and has nothing of it.
    network.rise(index).await;
    until("what was left there is ended", async || {
        let machines = network.node(index).client.machines(false).await.unwrap();
        machines.is_empty()
    })
    .await;
    assert_eq!(client.service("beat").await.unwrap().running, 1);
    // Its owner comes back, and can end it.
    network.rise(0).await;
    until("its owner ends it", async || {
        network.node(0).client.remove_service("beat").await.is_ok()
    })
    .await;
    until("nothing is left", async || {
        let all = network.machines().await;
        all.values().all(Vec::is_empty)
    })
    .await;
}

#[tokio::test]
async fn keepers_are_replaced_when_one_dies() {
    let Some(mut network) = Network::of(4).await else {
        return;
    };
    let service = network.create("kept", 1, &["sleep", "1000"]).await;
    assert_eq!(service.epoch, 1);
    let service = network.until_running(0, "kept", 1).await;
    assert_eq!(service.keepers.len(), 3, "{service:?}");
    let holder = network.index(&holders(&service)[&0].0);
    let keepers = service.keepers.iter();
    let mut keepers = keepers.map(|node| network.index(&node.id));
    let other = keepers
        .find(|index| *index != holder && *index != 0)
        .unwrap();
    network.kill(other);
    let dead = network.ids[other].clone();
    let client = network.node(0).client.clone();
    let later = until_some("others keep", async || {
        let service = client.service("kept").await.ok()?;
        (service.epoch > 1 && service.running == 1).then_some(service)
    })
    .await;
    assert!(
        later.keepers.iter().all(|node| node.id != dead),
        "{later:?}"
    );
    assert_eq!(later.keepers.len(), 3, "the fourth has its place");
    assert_eq!(holders(&later), holders(&service), "the copy has not moved");
    // Who is back hears of the others, and takes the place of the next that dies.
    network.rise(other).await;
    let next = later.keepers.iter().map(|node| network.index(&node.id));
    let next = { next }.find(|index| *index != holder && *index != 0);
    let next = next.unwrap();
    network.kill(next);
    let gone = network.ids[next].clone();
    until("it keeps again", async || {
        let service = client.service("kept").await.unwrap();
        let keeps = |id: &str| service.keepers.iter().any(|node| node.id == id);
        keeps(&dead) && !keeps(&gone) && service.keepers.len() == 3 && service.running == 1
    })
    .await;
    network.node(0).client.remove_service("kept").await.unwrap();
}

#[tokio::test]
async fn all_nodes_start_again_and_the_service_goes_on() {
    let Some(mut network) = Network::of(3).await else {
        return;
    };
    network.create("back", 2, &["sleep", "1000"]).await;
    let before = network.until_running(0, "back", 2).await;
    for index in 0..3 {
        network.kill(index);
    }
    for index in 0..3 {
        network.rise(index).await;
    }
    let after = network.until_running(1, "back", 2).await;
    for (slot, (_, generation)) in holders(&before) {
        assert!(holders(&after)[&slot].1 >= generation);
    }
    until("nothing runs twice", async || {
        let all = network.machines().await;
        let running = all
            .values()
            .flatten()
            .filter(|machine| machine.state == "running");
        running.count() == 2
    })
    .await;
    network.node(0).client.remove_service("back").await.unwrap();
}

#[tokio::test]
async fn a_program_that_ends_is_started_again_and_what_ails_it_is_shown() {
    let Some(network) = Network::of(2).await else {
        return;
    };
    network.create("short", 1, &["sh", "-c", "exit 3"]).await;
    let client = network.node(0).client.clone();
    let service = until_some("it was started again", async || {
        let service = client.service("short").await.ok()?;
        (service.copies[0].restarts >= 2).then_some(service)
    })
    .await;
    let copy = &service.copies[0];
    assert!(
        copy.message.as_ref().unwrap().contains("ended with 3"),
        "{copy:?}"
    );
    let all = network.machines().await;
    assert!(
        all.values().map(Vec::len).sum::<usize>() <= 1,
        "one machine of it is kept: {all:?}"
    );
    assert_eq!(client.remove_service("short").await.unwrap(), []);
    let all = network.machines().await;
    assert!(all.values().all(Vec::is_empty), "{all:?}");
}

#[tokio::test]
async fn what_nodes_do_not_give_no_service_gets() {
    let Some(network) = Network::of(4).await else {
        return;
    };
    let client = network.node(0).client.clone();
    let terms = NodeTerms {
        draining: true,
        ..NodeTerms::default()
    };
    for index in [1, 3] {
        network.node(index).client.set_terms(&terms).await.unwrap();
    }
    let create = |nodes: &[String]| CreateServiceRequest {
        nodes: nodes.to_vec(),
        ..wish("one", 2, &["sleep", "1000"])
    };
    client
        .create_service(&create(&network.ids[1..]))
        .await
        .unwrap();
    let service = network.until_running(0, "one", 2).await;
    for (node, _) in holders(&service).into_values() {
        assert_eq!(node, network.ids[2], "the others are being drained");
    }
    // The grant is taken back: its copies end, and the drained one, that takes nothing, does not get them.
    let grants = network.node(2).client.grants().await.unwrap();
    for grant in grants {
        network.node(2).client.revoke(&grant.id).await.unwrap();
    }
    until("the copies are gone", async || {
        let machines = network.node(2).client.machines(false).await.unwrap();
        machines.is_empty()
    })
    .await;
    network
        .node(1)
        .client
        .set_terms(&NodeTerms::default())
        .await
        .unwrap();
    until("it runs on the other", async || {
        let machines = network.node(1).client.machines(false).await.unwrap();
        machines.len() == 2
    })
    .await;
    assert!(client.remove_service("one").await.is_ok());

    // What a copy cannot have is refused with the reason, and so is a node that has granted nothing.
    for change in [
        (|request: &mut RunRequest| request.ports = vec!["80:80".to_owned()])
            as fn(&mut RunRequest),
        |request| request.volumes = vec!["/tmp:/tmp".to_owned()],
        |request| request.stdin = true,
    ] {
        let mut bad = create(&network.ids[..1]);
        change(&mut bad.machine);
        let body = refused(client.create_service(&bad).await.unwrap_err());
        assert_eq!(body.kind, ErrorKind::User, "{body:?}");
    }
    let unknown = create(&["ab".repeat(32)]);
    let body = refused(client.create_service(&unknown).await.unwrap_err());
    assert!(body.message.contains("has given no grant"), "{body:?}");
    let mut bad = create(&network.ids[..1]);
    bad.name = "Not a name".to_owned();
    assert_eq!(
        refused(client.create_service(&bad).await.unwrap_err()).kind,
        ErrorKind::User
    );
}
