//! How many ready machines are kept in stock for each template, and when more may be made.
//!
//! A stock answers bursts: what matters is how many requests come within the time in which nothing can be made anew, and
//! whether more will follow. So the wanted size is the largest of the last few bursts, as long as the next one is to be
//! expected by the pace of those before. Who ran a template once gets none: most images are run once.
//!
//! All times are durations since any fixed moment that is the same for one [`Arrivals`].

use std::collections::VecDeque;
use std::time::Duration;
use vistara_model::Bytes;

/// Requests that come within so long are one burst: some machines can be made in it, but not a burst's worth.
const BURST: Duration = Duration::from_secs(2);
/// So many bursts are remembered: who ran 16 at once and then one at a time is believed after so many times.
const BURSTS: usize = 8;
/// The next burst is waited for this many times as long as bursts were apart of late.
const PATIENCE: u32 = 4;
/// And at least so long: a person who tries something again thinks in between.
const PATIENCE_MIN: Duration = Duration::from_secs(120);
/// And at most so long: what comes twice a day is not worth the memory in between.
const PATIENCE_MAX: Duration = Duration::from_secs(1800);
/// Weight of the newest distance between two bursts against all before it.
const NEWEST: f64 = 0.3;
/// No machine is made for the stock until nobody has asked the node for one for so long.
pub const QUIET: Duration = Duration::from_millis(250);
/// Unless one has been missing for so long: where somebody always asks, it is never quiet.
const MISSING_MAX: Duration = Duration::from_secs(5);

/// When machines of one template were asked for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Arrivals {
    last: Duration,
    /// When the newest burst began.
    began: Duration,
    /// Sizes of the last bursts, at most [`BURSTS`], the newest last.
    bursts: VecDeque<u32>,
    /// Seconds from one burst to the next; absent until there were two.
    apart_s: Option<f64>,
}

impl Arrivals {
    /// One was asked for. A time before an earlier one counts as that.
    pub fn arrived(&mut self, now: Duration) {
        let now = now.max(self.last);
        self.last = now;
        if let Some(burst) = self.bursts.back_mut() {
            if now - self.began <= BURST {
                *burst = burst.saturating_add(1);
                return;
            }
            let apart = (now - self.began).as_secs_f64();
            let mean = |before: f64| before + NEWEST * (apart - before);
            self.apart_s = Some(self.apart_s.map_or(apart, mean));
        }
        self.began = now;
        if self.bursts.len() == BURSTS {
            self.bursts.pop_front();
        }
        self.bursts.push_back(1);
    }

    /// When one was asked for last.
    pub fn last(&self) -> Duration {
        self.last
    }

    /// How many should be in stock now.
    pub fn wanted(&self, now: Duration) -> u32 {
        let largest = self.bursts.iter().copied().max().unwrap_or(0);
        if self.bursts.len() < 2 && largest < 2 {
            return 0;
        }
        // A distance between bursts is finite and not negative: it is a difference of times in order.
        let apart = Duration::from_secs_f64(self.apart_s.unwrap_or(0.0));
        let patience = apart
            .saturating_mul(PATIENCE)
            .clamp(PATIENCE_MIN, PATIENCE_MAX);
        if now.saturating_sub(self.last) > patience {
            return 0;
        }
        largest
    }
}

/// What one template's stock should be, before it is known what there is room for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// The template's key.
    pub key: String,
    /// How many are wanted.
    pub count: u32,
    /// When one was asked for last.
    pub last: Duration,
    /// What one of them takes of the host's memory.
    pub each: Bytes,
}

/// How much memory is left for others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// What could be given away now.
    pub available: Bytes,
    /// All there is.
    pub total: Bytes,
    /// Percentage of the last ten seconds in which something waited for memory; absent where the kernel does not tell.
    pub stalled: Option<f64>,
}

/// What memory allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// More may be made.
    Fill,
    /// What is there may stay.
    Keep,
    /// All of it must go, before anything else does.
    Empty,
}

impl Memory {
    /// What it allows. Between filling and emptying lies a reach in which nothing changes, so that a stock is not made of
    /// the very memory that emptying it gave back.
    pub fn room(&self) -> Room {
        const STALLED_EMPTY: f64 = 10.0;
        const STALLED_FILL: f64 = 1.0;
        let stalled = self.stalled.unwrap_or(0.0);
        let share = |part: u64| self.total.0 / part;
        if self.available.0 < share(10) || stalled >= STALLED_EMPTY {
            Room::Empty
        } else if self.available.0 < share(5) || stalled >= STALLED_FILL {
            Room::Keep
        } else {
            Room::Fill
        }
    }
}

/// How many each template gets of a budget, in the order of the answer's making: everybody one, the last asked for first,
/// then everybody another, as far as it goes. A template of which none fits is left out.
pub fn allot(mut wants: Vec<Want>, budget: Bytes) -> Vec<(String, u32)> {
    wants.sort_by(|one, other| (other.last, &one.key).cmp(&(one.last, &other.key)));
    let mut given = vec![0; wants.len()];
    let mut left = budget.0;
    loop {
        let mut any = false;
        for (want, given) in wants.iter().zip(&mut given) {
            // What takes nothing is bounded by what is wanted.
            if *given < want.count && want.each.0 <= left {
                left -= want.each.0;
                *given += 1;
                any = true;
            }
        }
        if !any {
            break;
        }
    }
    let all = wants.into_iter().zip(given);
    all.filter(|(_, given)| *given > 0)
        .map(|(want, given)| (want.key, given))
        .collect()
}

/// What goes on in the node, as far as users wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bustle {
    /// Machines of users that are being prepared or boot.
    pub starting: usize,
    /// Time since somebody asked for a machine last.
    pub quiet_for: Duration,
    /// Time for which a machine has been missing from the stock, and none was made.
    pub missing_for: Duration,
}

/// Whether a machine may be made for the stock now: never in front of a user's that is starting.
pub fn may_fill(bustle: Bustle) -> bool {
    bustle.starting == 0 && (bustle.quiet_for >= QUIET || bustle.missing_for >= MISSING_MAX)
}

#[cfg(test)]
#[path = "stock_tests.rs"]
mod tests;
