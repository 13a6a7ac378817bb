//! Virtual time and the network: when each packet arrives, if it does.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

/// What may happen to packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// Share that is lost.
    pub loss: f64,
    /// Share that arrives a second time.
    pub repeated: f64,
    /// Share that takes up to a second more.
    pub late: f64,
    /// Shortest way.
    pub delay_min: Duration,
    /// Longest way, of those that are not late.
    pub delay_max: Duration,
}

impl Default for Weather {
    fn default() -> Weather {
        Weather {
            loss: 0.01,
            repeated: 0.005,
            late: 0.01,
            delay_min: Duration::from_millis(2),
            delay_max: Duration::from_millis(80),
        }
    }
}

/// Who cannot reach whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// Nothing is cut.
    None,
    /// Nodes below the number and those from it on do not reach each other.
    Halves(usize),
    /// Those below do not reach those from it on, but hear them.
    OneWay(usize),
}

impl Cut {
    fn blocks(&self, from: usize, to: usize) -> bool {
        match self {
            Cut::None => false,
            Cut::Halves(border) => (from < *border) != (to < *border),
            Cut::OneWay(border) => from < *border && to >= *border,
        }
    }
}

struct Entry<E> {
    at: Duration,
    order: u64,
    event: E,
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Entry<E>) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<E> Eq for Entry<E> {}
impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Entry<E>) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<E> Ord for Entry<E> {
    /// The earliest is the greatest, and of two at one time the one that was put in first.
    fn cmp(&self, other: &Entry<E>) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// What is to happen, in order.
pub(crate) struct Queue<E> {
    heap: BinaryHeap<Entry<E>>,
    order: u64,
    now: Duration,
}

impl<E> Default for Queue<E> {
    fn default() -> Queue<E> {
        Queue {
            heap: BinaryHeap::new(),
            order: 0,
            now: Duration::ZERO,
        }
    }
}

impl<E> Queue<E> {
    /// The time.
    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    /// Puts something in; what should have happened before happens now.
    pub(crate) fn at(&mut self, at: Duration, event: E) {
        self.order += 1;
        self.heap.push(Entry {
            at: at.max(self.now),
            order: self.order,
            event,
        });
    }

    /// The next, if it happens before `end`. Time goes on to it.
    pub(crate) fn next(&mut self, end: Duration) -> Option<E> {
        if self.heap.peek().is_none_or(|entry| entry.at > end) {
            self.now = end;
            return None;
        }
        let entry = self.heap.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

/// The network.
pub(crate) struct Network {
    rng: SmallRng,
    /// What may happen to packets.
    pub(crate) weather: Weather,
    /// Who cannot reach whom.
    pub(crate) cut: Cut,
}

impl Network {
    /// A network whose chances come from this seed.
    pub(crate) fn new(weather: Weather, seed: u64) -> Network {
        Network {
            rng: SmallRng::seed_from_u64(seed),
            weather,
            cut: Cut::None,
        }
    }

    /// How long a packet takes each time that it arrives: no time at all, once, or twice.
    pub(crate) fn arrivals(&mut self, from: usize, to: usize) -> [Option<Duration>; 2] {
        let weather = self.weather;
        if self.cut.blocks(from, to) || self.rng.random_bool(weather.loss) {
            return [None, None];
        }
        let repeated = self.rng.random_bool(weather.repeated);
        [Some(self.delay()), repeated.then(|| self.delay())]
    }

    fn delay(&mut self) -> Duration {
        let Weather {
            delay_min,
            delay_max,
            late,
            ..
        } = self.weather;
        let share = self.rng.random::<f64>();
        let delay = delay_min + (delay_max - delay_min).mul_f64(share);
        if self.rng.random_bool(late) {
            delay + Duration::from_secs(1).mul_f64(self.rng.random())
        } else {
            delay
        }
    }
}
