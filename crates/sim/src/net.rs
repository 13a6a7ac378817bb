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

impl<E> Entry<E> {
    fn slot(&self) -> u128 {
        self.at.as_millis()
    }
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

/// Slots of a millisecond for what happens soon: longer than most packets take, and than nodes sleep.
const SLOTS: usize = 2048;

/// What is to happen, in order. What happens soon lies in slots, unsorted until its millisecond has come: nearly everything does,
/// and a heap of all of it would be walked through for each packet.
pub(crate) struct Queue<E> {
    /// Of the present millisecond, and what comes later than the slots reach.
    present: BinaryHeap<Entry<E>>,
    later: BinaryHeap<Entry<E>>,
    /// The millisecond that `present` is of; that of each slot has the same remainder.
    slot: u128,
    slots: Vec<Vec<Entry<E>>>,
    /// How many are in slots.
    soon: usize,
    order: u64,
    now: Duration,
}

impl<E> Default for Queue<E> {
    fn default() -> Queue<E> {
        Queue {
            present: BinaryHeap::new(),
            later: BinaryHeap::new(),
            slot: 0,
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            soon: 0,
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
        let at = at.max(self.now);
        let order = self.order;
        self.put(Entry { at, order, event });
    }

    fn put(&mut self, entry: Entry<E>) {
        let slot = entry.slot();
        if slot <= self.slot {
            self.present.push(entry);
        } else if slot < self.slot + SLOTS as u128 {
            self.slots[(slot % SLOTS as u128) as usize].push(entry);
            self.soon += 1;
        } else {
            self.later.push(entry);
        }
    }

    /// The next, if it happens before `end`. Time goes on to it.
    pub(crate) fn next(&mut self, end: Duration) -> Option<E> {
        while self.present.is_empty() && self.turn() {}
        if self.present.peek().is_none_or(|entry| entry.at > end) {
            self.now = end;
            return None;
        }
        let entry = self.present.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }

    /// Goes on to the next millisecond, or to the next in which something happens; says whether there is one.
    fn turn(&mut self) -> bool {
        match (self.soon, self.later.peek()) {
            (0, None) => return false,
            (0, Some(next)) => self.slot = next.slot(),
            (_, _) => self.slot += 1,
        }
        let mut due = std::mem::take(&mut self.slots[(self.slot % SLOTS as u128) as usize]);
        self.soon -= due.len();
        self.present.extend(due.drain(..));
        self.slots[(self.slot % SLOTS as u128) as usize] = due;
        // What has come within reach of the slots.
        let reach = self.slot + SLOTS as u128;
        while self.later.peek().is_some_and(|next| next.slot() < reach) {
            if let Some(entry) = self.later.pop() {
                self.put(entry);
            }
        }
        true
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

#[cfg(test)]
mod tests {
    //! The queue against a sorted list.

    use super::*;

    #[test]
    fn events_happen_by_their_times_and_those_of_one_time_in_the_order_in_which_they_were_put_in() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut queue = Queue::default();
        let mut plain: Vec<(Duration, usize)> = Vec::new();
        let mut put = 0;
        for step in 0..20_000 {
            // Now and then many, now and then none for long.
            let many = if step % 1000 < 500 { 2 } else { 0 };
            for _ in 0..rng.random_range(0..=many) {
                let ahead = match rng.random_range(0..10) {
                    0 => Duration::ZERO,
                    1 => Duration::from_secs(rng.random_range(0..100)),
                    _ => Duration::from_micros(rng.random_range(0..200_000)),
                };
                queue.at(queue.now() + ahead, put);
                plain.push((queue.now() + ahead, put));
                put += 1;
            }
            plain.sort_unstable();
            let next = queue.next(Duration::MAX);
            if plain.is_empty() {
                assert_eq!(next, None);
                return;
            }
            let (at, event) = plain.remove(0);
            assert_eq!((queue.now(), next), (at, Some(event)));
        }
        assert!(put > 1000);
    }

    #[test]
    fn what_happens_after_the_end_waits() {
        let mut queue = Queue::default();
        queue.at(Duration::from_secs(10), 1);
        assert_eq!(queue.next(Duration::from_secs(5)), None);
        assert_eq!(queue.now(), Duration::from_secs(5));
        queue.at(Duration::from_secs(6), 2);
        assert_eq!(queue.next(Duration::from_secs(20)), Some(2));
        assert_eq!(queue.next(Duration::from_secs(20)), Some(1));
    }
}
