//! How old news are, by all clocks that they went past: there is none that all share, so each node adds how long it had them, as
//! routers do with the age of link states (OSPF, RFC 2328).
//!
//! A cut leaves more news than a network can carry. What is older than [`NEWS_LAST`] nobody passes on, so they are gone soon
//! after it, instead of going round in front of what happens then. Who says that old news are young says no more than who makes
//! up new ones.

use super::News;
use std::time::Duration;

/// How long news are passed on after somebody has said them first: a suspicion reaches ten thousand nodes in 3 to 4 s, and after
/// three seconds more it is told once more, as a death.
pub(super) const NEWS_LAST: Duration = Duration::from_secs(10);

/// An age in tenths of a second, rounded up: that makes good for the way between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age(pub u8);

impl Age {
    /// What was said just now.
    pub const NEW: Age = Age(0);
    /// What is not passed on any more, however old it is.
    pub const OLD: Age = Age(u8::MAX);

    /// Of news that are passed on until then; nothing where they are not any more.
    pub(super) fn of(now: Duration, until: Duration) -> Option<Age> {
        let left = until.checked_sub(now).filter(|left| !left.is_zero())?;
        let age = NEWS_LAST.saturating_sub(left).as_millis().div_ceil(100);
        Some(Age(u8::try_from(age).unwrap_or(u8::MAX)))
    }

    /// Until when news of this age are passed on; nothing where they are not any more.
    pub(super) fn until(self, now: Duration) -> Option<Duration> {
        let age = Duration::from_millis(100) * u32::from(self.0);
        let left = NEWS_LAST.checked_sub(age).filter(|left| !left.is_zero())?;
        Some(now + left)
    }
}

/// A piece of news on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// What is said.
    pub news: News,
    /// How long ago it was said first.
    pub age: Age,
}

/// What its sender says first.
impl From<News> for Told {
    fn from(news: News) -> Told {
        let age = Age::NEW;
        Told { news, age }
    }
}
