//! What must always hold, in networks in which much goes wrong; and that the checks see it where it does not.
//!
//! A seed that was once broken stays here with what it showed.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;
use vistara_sim::{Fault, GOSSIP_BYTES_MAX, Report, Scenario, Weather, World};

fn run(scenario: Scenario) -> Report {
    let report = World::new(scenario).run();
    println!("{report}");
    report
}

#[test]
fn small_networks_keep_every_promise_whatever_the_seed() {
    for seed in 0..10 {
        let report = run(Scenario::new(10 + seed as usize * 2, seed));
        assert!(report.violations.is_empty(), "seed {seed}: {report}");
        assert!(!report.gaps.is_empty(), "seed {seed}: nothing was placed");
    }
}

#[test]
fn small_networks_in_which_half_of_the_nodes_die_and_much_is_lost_keep_every_promise() {
    for seed in 100..104 {
        let report = run(Scenario {
            deaths: 15,
            services: 4,
            tasks: 12,
            weather: Weather {
                loss: 0.05,
                repeated: 0.02,
                late: 0.05,
                ..Weather::default()
            },
            ..Scenario::new(30, seed)
        });
        assert!(report.violations.is_empty(), "seed {seed}: {report}");
    }
}

/// Once with this seed, nodes gossiped up to 33 kB a second at 30 s, and one node still believed at 41.6 s, 10 s after its death,
/// that node 188 is alive.
#[test]
fn a_thousand_nodes_keep_every_promise() {
    let report = run(Scenario {
        time: Duration::from_secs(100),
        members_max: 128,
        cuts: 0,
        ..Scenario::new(1000, 1)
    });
    assert!(report.violations.is_empty(), "{report}");
    assert!(report.gaps.len() > 100, "{report}");
    let (_, most) = report.gossip_median_and_most();
    assert!(most < GOSSIP_BYTES_MAX / 2, "{report}");
}

/// A cut of a network that is much larger than its tables. With this seed a slot stood empty for more than 60 s, before
/// keepers knew each other; with the one before two did after that, as long as members that were cut off made room for others.
#[test]
fn a_cut_of_a_network_of_small_tables_leaves_no_slot_empty() {
    let report = run(Scenario {
        time: Duration::from_secs(125),
        deaths: 200,
        cuts: 1,
        members_max: 48,
        ..Scenario::new(1200, 3)
    });
    assert!(report.violations.is_empty(), "{report}");
}

/// With this seed one node believed at 94.8 s, 10 s after its death, that node 199 is alive, while news that a cut had left were told in
/// the order in which they came; and two, at 96.6 s, that node 1491 is, once that was mended, while those that were cut off made room
/// for others.
#[test]
#[ignore = "takes half a minute; parts of it are among the tests of membership"]
fn deaths_are_noticed_soon_after_two_cuts() {
    let report = run(Scenario {
        time: Duration::from_secs(150),
        deaths: 330,
        members_max: 48,
        ..Scenario::new(1500, 2)
    });
    assert!(report.violations.is_empty(), "{report}");
}

/// A cut kept an at-most-once task's withdrawn grants with a majority of its keepers, its overseer knew of none, and tried
/// for ever to place it: seen with these two.
#[test]
fn a_task_whose_grants_were_not_withdrawn_everywhere_is_settled_all_the_same() {
    let much = Scenario {
        deaths: 15,
        services: 4,
        tasks: 12,
        weather: Weather {
            loss: 0.05,
            repeated: 0.02,
            late: 0.05,
            ..Weather::default()
        },
        ..Scenario::new(30, 104)
    };
    for scenario in [Scenario::new(46, 18), much] {
        let report = run(scenario);
        assert!(report.violations.is_empty(), "{report}");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let one = World::new(Scenario::new(20, 5)).run();
    let other = World::new(Scenario::new(20, 5)).run();
    assert_eq!((one.steps, one.gaps), (other.steps, other.gaps));
}

/// Whether any of some runs in which a rule is broken is caught, and by these words.
fn is_caught(fault: Fault, words: &str) {
    for seed in 0..20 {
        let scenario = Scenario {
            fault: Some(fault),
            services: 6,
            tasks: 10,
            deaths: 12,
            cuts: 3,
            machines_per_node: 2,
            ..Scenario::new(24, seed)
        };
        let report = World::new(scenario).run();
        if let Some(broken) = report.violations.iter().find(|one| one.contains(words)) {
            println!("seed {seed}: {broken}");
            return;
        }
    }
    panic!("{fault:?} was not caught in 20 runs");
}

#[test]
fn a_copy_that_goes_on_when_its_lease_is_over_is_caught() {
    is_caught(Fault::LeaseIgnored, "two live copies");
}

#[test]
fn a_node_that_promises_what_it_has_promised_is_caught() {
    is_caught(Fault::OffersForgotten, "promised");
}

#[test]
fn a_node_that_looks_at_no_grants_is_caught() {
    is_caught(Fault::AuthorityIgnored, "never granted");
}
