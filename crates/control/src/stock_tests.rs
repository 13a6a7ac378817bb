//! Arrivals in virtual time, and a small simulation of bursts against a stock that takes its time to be filled.

use super::*;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn after(times: &[Duration]) -> Arrivals {
    let mut arrivals = Arrivals::default();
    for at in times {
        arrivals.arrived(*at);
    }
    arrivals
}

#[test]
fn the_stock_begins_after_the_second_request() {
    assert_eq!(Arrivals::default().wanted(s(0)), 0);
    assert_eq!(after(&[s(5)]).wanted(s(6)), 0);
    assert_eq!(after(&[s(5), s(30)]).wanted(s(31)), 1);
}

#[test]
fn a_burst_is_remembered_until_as_many_smaller_ones_have_followed() {
    let mut arrivals = after(&[s(0); 16]);
    assert_eq!(arrivals.wanted(s(1)), 16);
    for minute in 1..BURSTS as u64 {
        arrivals.arrived(s(60 * minute));
        assert_eq!(arrivals.wanted(s(60 * minute)), 16);
    }
    arrivals.arrived(s(600));
    assert_eq!(arrivals.wanted(s(600)), 1);
}

#[test]
fn what_is_not_asked_for_any_more_is_not_kept() {
    // Once a second: a pause of two minutes is long.
    let often: Vec<Duration> = (0..100).map(s).collect();
    assert!(after(&often).wanted(s(99 + 120)) > 0);
    assert_eq!(after(&often).wanted(s(99 + 121)), 0);
    // Every five minutes: so is one of twenty.
    let seldom: Vec<Duration> = (0..10).map(|n| s(300 * n)).collect();
    assert_eq!(after(&seldom).wanted(s(2700 + 1200)), 1);
    assert_eq!(after(&seldom).wanted(s(2700 + 1201)), 0);
    // Once a day: nothing is kept for the next time.
    let rarely: Vec<Duration> = (0..5).map(|n| s(86_400 * n)).collect();
    assert_eq!(after(&rarely).wanted(s(4 * 86_400 + 1801)), 0);
}

#[test]
fn a_clock_that_goes_back_changes_nothing() {
    let mut arrivals = after(&[s(100), s(101)]);
    arrivals.arrived(s(3));
    assert_eq!(arrivals.last(), s(101));
    assert_eq!(arrivals.wanted(s(0)), 3);
}

fn want(key: &str, count: u32, last: u64, each: u64) -> Want {
    Want {
        key: key.to_owned(),
        count,
        last: s(last),
        each: Bytes(each),
    }
}

#[test]
fn a_small_budget_gives_everybody_one_before_anybody_gets_two() {
    let wants = || vec![want("old", 5, 1, 10), want("new", 2, 9, 10)];
    let shares = |budget| allot(wants(), Bytes(budget));
    let some = |pairs: &[(&str, u32)]| -> Vec<(String, u32)> {
        (pairs.iter().map(|(key, count)| ((*key).to_owned(), *count))).collect()
    };
    assert_eq!(shares(9), []);
    assert_eq!(shares(10), some(&[("new", 1)]));
    assert_eq!(shares(20), some(&[("new", 1), ("old", 1)]));
    assert_eq!(shares(50), some(&[("new", 2), ("old", 3)]));
    assert_eq!(shares(1000), some(&[("new", 2), ("old", 5)]));
    assert_eq!(shares(0), [], "a budget of nothing is no stock");
}

#[test]
fn a_machine_that_takes_nothing_is_still_made_only_as_often_as_wanted() {
    assert_eq!(
        allot(vec![want("a", 3, 0, 0)], Bytes(0)),
        [("a".to_owned(), 3)]
    );
    assert_eq!(
        allot(vec![want("a", 3, 0, u64::MAX)], Bytes(u64::MAX)),
        [("a".to_owned(), 1)]
    );
}

#[test]
fn want_of_memory_empties_the_stock_and_only_plenty_fills_it() {
    let memory = |available, stalled| Memory {
        available: Bytes(available),
        total: Bytes(1000),
        stalled,
    };
    assert_eq!(memory(200, None).room(), Room::Fill);
    assert_eq!(memory(199, None).room(), Room::Keep);
    assert_eq!(memory(100, Some(0.0)).room(), Room::Keep);
    assert_eq!(memory(99, Some(0.0)).room(), Room::Empty);
    assert_eq!(memory(900, Some(0.9)).room(), Room::Fill);
    assert_eq!(memory(900, Some(1.0)).room(), Room::Keep);
    assert_eq!(memory(900, Some(10.0)).room(), Room::Empty);
}

#[test]
fn nothing_is_made_in_front_of_a_user() {
    let bustle = |starting, quiet_for| Bustle {
        starting,
        quiet_for,
        missing_for: Duration::ZERO,
    };
    let starved = |starting| Bustle {
        missing_for: MISSING_MAX,
        ..bustle(starting, Duration::ZERO)
    };
    assert!(
        may_fill(starved(0)),
        "where it is never quiet there is some"
    );
    assert!(!may_fill(starved(1)));
    assert!(may_fill(bustle(0, QUIET)));
    assert!(!may_fill(bustle(1, s(60))));
    assert!(!may_fill(bustle(0, QUIET - Duration::from_millis(1))));
}

/// A node in virtual time: one machine for the stock takes `MAKING`, and is made only when nobody has asked for `QUIET`.
struct Simulation {
    arrivals: Arrivals,
    now: Duration,
    ready: u32,
    budget: u32,
    making_until: Option<Duration>,
    made: u32,
    served_warm: u32,
    ended_unused: u32,
    /// Machine-seconds in stock.
    held_s: f64,
}

const STEP: Duration = Duration::from_millis(50);
const MAKING: Duration = Duration::from_millis(500);

impl Simulation {
    fn new(budget: u32) -> Simulation {
        Simulation {
            arrivals: Arrivals::default(),
            now: s(0),
            ready: 0,
            budget,
            making_until: None,
            made: 0,
            served_warm: 0,
            ended_unused: 0,
            held_s: 0.0,
        }
    }

    fn until(&mut self, end: Duration) {
        while self.now < end {
            self.now += STEP;
            self.held_s += f64::from(self.ready) * STEP.as_secs_f64();
            if self.making_until.is_some_and(|until| until <= self.now) {
                self.making_until = None;
                self.ready += 1;
                self.made += 1;
            }
            let want = Want {
                key: "t".to_owned(),
                count: self.arrivals.wanted(self.now),
                last: self.arrivals.last(),
                each: Bytes(1),
            };
            let shares = allot(vec![want], Bytes(u64::from(self.budget)));
            let target = shares.first().map_or(0, |(_, count)| *count);
            let surplus = self.ready.saturating_sub(target);
            self.ready -= surplus;
            self.ended_unused += surplus;
            let bustle = Bustle {
                starting: 0,
                quiet_for: self.now.saturating_sub(self.arrivals.last()),
                missing_for: Duration::ZERO,
            };
            if self.ready < target && self.making_until.is_none() && may_fill(bustle) {
                self.making_until = Some(self.now + MAKING);
            }
        }
    }

    /// So many requests at once; how many of them were met from the stock.
    fn burst(&mut self, count: u32) -> u32 {
        for _ in 0..count {
            self.arrivals.arrived(self.now);
        }
        let warm = count.min(self.ready);
        self.ready -= warm;
        self.served_warm += warm;
        warm
    }
}

#[test]
fn a_burst_like_the_one_before_is_met_whole_from_the_stock() {
    let mut sim = Simulation::new(100);
    assert_eq!(sim.burst(10), 0);
    sim.until(s(60));
    for round in 2..=10 {
        assert_eq!(sim.burst(10), 10, "burst {round}");
        sim.until(s(60 * round));
    }
    // Nothing comes any more: all goes, and not before the pace of the bursts says so.
    sim.until(s(540 + 200));
    assert!(sim.ready > 0);
    sim.until(s(540 + 300));
    assert_eq!(sim.ready, 0);
    assert_eq!(sim.made, sim.served_warm + sim.ended_unused);
    assert!(sim.ended_unused <= 10, "{}", sim.ended_unused);
}

#[test]
fn one_run_after_another_is_met_from_a_stock_of_a_few() {
    let mut sim = Simulation::new(100);
    let mut warm = 0;
    let mut most = 0;
    for second in 1..=300 {
        warm += sim.burst(1);
        sim.until(s(second));
        most = most.max(sim.ready);
    }
    assert!(warm >= 298, "{warm}");
    assert!(most <= 3, "{most} are kept for one request a second");
}

#[test]
fn a_budget_bounds_what_is_kept_whatever_comes() {
    let mut sim = Simulation::new(7);
    for round in 1..=20 {
        sim.burst(50);
        sim.until(s(30 * round));
        assert!(sim.ready <= 7);
    }
    assert_eq!(sim.served_warm, 19 * 7);
}

#[test]
fn a_laptop_on_which_something_is_run_now_and_then_keeps_little() {
    let mut sim = Simulation::new(100);
    // Three runs in five minutes, four times a day, two hours apart.
    for visit in 0..4 {
        for run in 0..3 {
            sim.until(s(7200 * visit + 100 * run));
            sim.burst(1);
        }
    }
    sim.until(s(4 * 7200));
    let mean = sim.held_s / sim.now.as_secs_f64();
    assert!(mean < 0.3, "{mean} machines are kept on average");
    assert_eq!(sim.ready, 0);
}
