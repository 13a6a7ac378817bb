//! A node's own side: what it has promised to whom, and what is left.
//!
//! Invariant: what is offered, taken and used together never exceeds the stock. It holds because everything that counts
//! is counted here, under one owner: an offer holds its stock from the moment it is made until it is declined, or over by
//! this node's own clock. What a machine uses is given back by this node alone, when the machine is gone: no word of an
//! asker's frees it.
//!
//! ```text
//! offered ── take ──► taken ── begin ──► used ── ended ──► over
//!    │ declined, or        │ declined, or after 30 s: its asker is gone, or
//!    ▼ after 8 s           ▼ did not hear that it was taken
//!   over                  over
//! ```
//! A request that is over stays so: it is remembered for [`Book::REMEMBERED`], and nothing is offered for it again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vistara_model::{Bytes, NodeId, Stock};

/// Most offers open at a time. Each holds memory for [`Book::OFFER_TTL`]; more open offers than machines that can begin in
/// that time serve nobody.
pub const OFFERS_MAX: usize = 256;
/// Most offers open for one asker, taken ones included: who asks often gets no more of the node than this by asking alone.
/// Beyond the first, they hold half of what machines have left at most.
pub const ASKER_OFFERS_MAX: usize = 16;
/// Most requests of one asker that are remembered as over; the oldest are forgotten. Two a second for as long as they are
/// remembered.
pub const ASKER_OVER_MAX: usize = 256;
/// Most requests remembered as over in all; the oldest are forgotten.
pub const OVER_MAX: usize = 4096;

/// A request's number: 128 random bits of the asker's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u128);

/// A promise that a machine of some size can begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Who offers.
    pub node: NodeId,
    /// For what.
    pub request: RequestId,
    /// How long it holds, from when it was made. A time span, since clocks differ.
    pub ttl: Duration,
    /// What is left on the node, this offer not counted as used.
    pub free: Stock,
    /// What a GiB of memory costs for an hour, in millionths.
    pub price_micros: u64,
}

/// Why nothing is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OfferRefused {
    /// Too little left.
    #[error("only {0} are left")]
    Room(Stock),
    /// Too many are open.
    #[error("too many offers are open")]
    Busy,
    /// The asker has too many open.
    #[error("the asker has too many offers open")]
    AskerBusy,
    /// The request was answered already, for another size.
    #[error("the request was answered for another size")]
    Changed,
    /// The request was answered already, and that is over, or its machine has begun.
    #[error("the request is over: ask under another number")]
    Over,
}

/// Why an offer cannot be taken, or its machine not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TakeRefused {
    /// It is over, or there never was one.
    #[error("the offer is over: ask again")]
    Over,
    /// Its machine has begun, and begins once only.
    #[error("the machine of this request has begun before")]
    Begun,
}

/// How firmly something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Offered, until then by the node's clock.
    Offered(Duration),
    /// Taken, and its machine is to begin until then.
    Taken(Duration),
    /// Its machine is there.
    Used,
}

/// What is held for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// How much.
    pub size: Stock,
    /// How firmly.
    pub hold: Hold,
}

/// A request that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Over {
    since: Duration,
    /// Whether its machine had begun.
    begun: bool,
}

/// What a node has promised. Times are monotonic, since an origin of the node's choice.
#[derive(Debug, Clone, Default)]
pub struct Book {
    stock: Stock,
    held: BTreeMap<(NodeId, RequestId), Held>,
    over: BTreeMap<(NodeId, RequestId), Over>,
    /// The same, the oldest first.
    over_order: BTreeSet<(Duration, NodeId, RequestId)>,
    /// The latest time heard of: [`Book::decline`] and [`Book::ended`] are told none.
    now: Duration,
}

impl Book {
    /// How long an offer holds: time for a round of answers, a decision, and a second try with the next best.
    pub const OFFER_TTL: Duration = Duration::from_secs(8);

    /// How long its machine may take to begin once an offer is taken: the asker has only to hear of it and say so.
    pub const TAKEN_TTL: Duration = Duration::from_secs(30);

    /// How long a request that is over is remembered: longer than any message is on its way.
    pub const REMEMBERED: Duration = Duration::from_secs(120);

    /// A book over this much.
    pub fn new(stock: Stock) -> Book {
        Book {
            stock,
            ..Book::default()
        }
    }

    /// The node has another amount to give: its owner started or ended machines that are not in this book. What was
    /// promised stays promised, even where it is more than there is now.
    pub fn set_stock(&mut self, stock: Stock) {
        self.stock = stock;
    }

    /// What is offered and taken.
    pub fn promised(&self) -> Stock {
        let sizes = self.held.values().map(|held| held.size);
        sizes.fold(Stock::default(), Stock::plus)
    }

    /// What is left.
    pub fn free(&self) -> Stock {
        self.stock.minus(self.promised())
    }

    /// Everything that is held, by asker and request.
    pub fn entries(&self) -> impl Iterator<Item = (&(NodeId, RequestId), &Held)> {
        self.held.iter()
    }

    /// How many requests are remembered as over.
    pub fn remembered(&self) -> usize {
        self.over.len()
    }

    /// Ends offers whose time is up, and forgets those that were over long ago.
    pub fn expire(&mut self, now: Duration) {
        self.now = self.now.max(now);
        let is_up = |held: &Held| match held.hold {
            Hold::Offered(until) | Hold::Taken(until) => now >= until,
            Hold::Used => false,
        };
        let up = self.held.iter().filter(|(_, held)| is_up(held));
        let up: Vec<_> = up.map(|(key, _)| *key).collect();
        for key in up {
            self.close(key);
        }
        while let Some((since, asker, request)) = self.over_order.first().copied() {
            if since + Self::REMEMBERED > now {
                break;
            }
            self.forget((asker, request));
        }
    }

    /// Ends what is held for a request, and remembers that.
    fn close(&mut self, key: (NodeId, RequestId)) {
        let Some(held) = self.held.remove(&key) else {
            return;
        };
        let since = self.now;
        let begun = held.hold == Hold::Used;
        self.over.insert(key, Over { since, begun });
        self.over_order.insert((since, key.0, key.1));
        let own = (key.0, RequestId(0))..=(key.0, RequestId(u128::MAX));
        if self.over.range(own.clone()).count() > ASKER_OVER_MAX {
            let oldest = self.over.range(own).min_by_key(|(_, over)| over.since);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.forget(oldest);
            }
        }
        if self.over.len() > OVER_MAX
            && let Some((_, asker, request)) = self.over_order.first().copied()
        {
            self.forget((asker, request));
        }
    }

    fn forget(&mut self, key: (NodeId, RequestId)) {
        if let Some(over) = self.over.remove(&key) {
            self.over_order.remove(&(over.since, key.0, key.1));
        }
    }

    /// Why nothing is held for a request.
    fn why_not(&self, key: (NodeId, RequestId)) -> TakeRefused {
        match self.over.get(&key) {
            Some(over) if over.begun => TakeRefused::Begun,
            Some(_) | None => TakeRefused::Over,
        }
    }

    /// Offers, and holds what is offered. Whether the asker may ask at all was decided before
    /// ([`crate::authorize`], [`crate::within_quota`]). The same request again gets the same offer, for what is left of
    /// its time: asking again holds nothing longer. The node itself may hold all of its own.
    ///
    /// # Errors
    /// [`OfferRefused`]; nothing is held then that was not before.
    pub fn offer(
        &mut self,
        now: Duration,
        node: NodeId,
        (asker, request): (NodeId, RequestId),
        size: Stock,
        price_micros: u64,
    ) -> Result<Offer, OfferRefused> {
        self.expire(now);
        let key = (asker, request);
        let until = match self.held.get(&key) {
            Some(held) if held.size != size => return Err(OfferRefused::Changed),
            Some(held) => match held.hold {
                Hold::Offered(until) | Hold::Taken(until) => until,
                Hold::Used => return Err(OfferRefused::Over),
            },
            None if self.over.contains_key(&key) => return Err(OfferRefused::Over),
            None => {
                self.has_room(node, asker, size)?;
                let until = now + Self::OFFER_TTL;
                let hold = Hold::Offered(until);
                self.held.insert(key, Held { size, hold });
                until
            }
        };
        Ok(Offer {
            node,
            request,
            ttl: until.saturating_sub(now),
            free: self.free().plus(size),
            price_micros,
        })
    }

    fn has_room(&self, node: NodeId, asker: NodeId, size: Stock) -> Result<(), OfferRefused> {
        let is_open = |held: &Held| held.hold != Hold::Used;
        if self.held.values().filter(|held| is_open(held)).count() >= OFFERS_MAX {
            return Err(OfferRefused::Busy);
        }
        let own = (asker, RequestId(0))..=(asker, RequestId(u128::MAX));
        let own = self.held.range(own).map(|(_, held)| held);
        let own: Vec<Stock> = own
            .filter(|held| is_open(held))
            .map(|held| held.size)
            .collect();
        if own.len() >= ASKER_OFFERS_MAX {
            return Err(OfferRefused::AskerBusy);
        }
        if !self.free().holds(size) {
            return Err(OfferRefused::Room(self.free()));
        }
        // One may be as large as there is room; more of them leave room for others.
        if asker != node && !own.is_empty() {
            let used = self.held.values().filter(|held| !is_open(held));
            let left = (self.stock).minus(
                used.map(|held| held.size)
                    .fold(Stock::default(), Stock::plus),
            );
            let half = Stock {
                memory: Bytes(left.memory.0 / 2),
                machines: left.machines / 2,
            };
            if !half.holds(own.into_iter().fold(size, Stock::plus)) {
                return Err(OfferRefused::AskerBusy);
            }
        }
        Ok(())
    }

    /// What is held under this key and not over yet.
    fn held_now(
        &mut self,
        now: Duration,
        key: (NodeId, RequestId),
    ) -> Result<&mut Held, TakeRefused> {
        self.expire(now);
        let why_not = self.why_not(key);
        self.held.get_mut(&key).ok_or(why_not)
    }

    /// Takes an offer: what it held is the asker's. Taking twice is taking once.
    ///
    /// # Errors
    /// [`TakeRefused`].
    pub fn take(
        &mut self,
        now: Duration,
        asker: NodeId,
        request: RequestId,
    ) -> Result<Stock, TakeRefused> {
        let held = self.held_now(now, (asker, request))?;
        match held.hold {
            Hold::Offered(_) => held.hold = Hold::Taken(now + Self::TAKEN_TTL),
            Hold::Taken(_) => {}
            Hold::Used => return Err(TakeRefused::Begun),
        }
        Ok(held.size)
    }

    /// Its machine begins, and uses what was taken until it has [ended](Book::ended). Once only, however often it is
    /// said, and said again after its end: of two who say it, one starts the machine.
    ///
    /// # Errors
    /// [`TakeRefused`].
    pub fn begin(
        &mut self,
        now: Duration,
        asker: NodeId,
        request: RequestId,
    ) -> Result<Stock, TakeRefused> {
        let held = self.held_now(now, (asker, request))?;
        match held.hold {
            Hold::Taken(_) => held.hold = Hold::Used,
            Hold::Used => return Err(TakeRefused::Begun),
            // Nobody began what nobody took: it is as good as over.
            Hold::Offered(_) => return Err(TakeRefused::Over),
        }
        Ok(held.size)
    }

    /// The asker does not want the offer, taken or not. What a machine uses stays used. Returns whether something was
    /// given back.
    pub fn decline(&mut self, asker: NodeId, request: RequestId) -> bool {
        let key = (asker, request);
        let open = (self.held.get(&key)).is_some_and(|held| held.hold != Hold::Used);
        if open {
            self.close(key);
        }
        open
    }

    /// The machine that began under this request is gone, or is counted elsewhere from now on. For this node to say, never
    /// for an asker. Returns whether there was one.
    pub fn ended(&mut self, asker: NodeId, request: RequestId) -> bool {
        let key = (asker, request);
        let used = self.held.get(&key).map(|held| held.hold) == Some(Hold::Used);
        if used {
            self.close(key);
        }
        used
    }
}
