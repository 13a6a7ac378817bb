//! A node's own side: what it has promised to whom, and what is left.
//!
//! Invariant: what is offered, taken and used together never exceeds the stock. It holds because everything that counts
//! is counted here, under one owner: an offer holds its stock from the moment it is made until it is released, or over by
//! this node's own clock.
//!
//! ```text
//! offered ── take ──► taken ── begin ──► used ── release ──► gone
//!    └─ over after 8 s   └─ over after 30 s: its asker is gone, or did not hear that it was taken
//! ```

use std::collections::BTreeMap;
use std::time::Duration;
use vistara_model::{NodeId, Stock};

/// Most offers open at a time. Each holds memory for [`Book::OFFER_TTL`]; more open offers than machines that can begin in
/// that time serve nobody.
pub const OFFERS_MAX: usize = 256;
/// Most offers open for one asker: who asks often gets no more of the node than this by asking alone.
pub const ASKER_OFFERS_MAX: usize = 16;

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

/// What a node has promised. Times are monotonic, since an origin of the node's choice.
#[derive(Debug, Clone, Default)]
pub struct Book {
    stock: Stock,
    held: BTreeMap<(NodeId, RequestId), Held>,
}

impl Book {
    /// How long an offer holds: time for a round of answers, a decision, and a second try with the next best.
    pub const OFFER_TTL: Duration = Duration::from_secs(8);

    /// How long its machine may take to begin once an offer is taken: the asker has only to hear of it and say so.
    pub const TAKEN_TTL: Duration = Duration::from_secs(30);

    /// A book over this much.
    pub fn new(stock: Stock) -> Book {
        Book {
            stock,
            held: BTreeMap::new(),
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

    /// Forgets offers that are over.
    pub fn expire(&mut self, now: Duration) {
        self.held.retain(|_, held| match held.hold {
            Hold::Offered(until) | Hold::Taken(until) => now < until,
            Hold::Used => true,
        });
    }

    /// Offers, and holds what is offered. Whether the asker may ask at all was decided before
    /// ([`crate::authorize`], [`crate::within_quota`]). The same request again gets the same offer, once more in full.
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
        match self.held.get_mut(&key) {
            Some(held) if held.size != size => return Err(OfferRefused::Changed),
            Some(held) => match &mut held.hold {
                Hold::Offered(until) => *until = now + Self::OFFER_TTL,
                Hold::Taken(_) | Hold::Used => {}
            },
            None => {
                let open = |held: &&Held| matches!(held.hold, Hold::Offered(_));
                if self.held.values().filter(open).count() >= OFFERS_MAX {
                    return Err(OfferRefused::Busy);
                }
                let own = self
                    .held
                    .range((asker, RequestId(0))..=(asker, RequestId(u128::MAX)));
                if own.filter(|(_, held)| open(held)).count() >= ASKER_OFFERS_MAX {
                    return Err(OfferRefused::AskerBusy);
                }
                if !self.free().holds(size) {
                    return Err(OfferRefused::Room(self.free()));
                }
                let hold = Hold::Offered(now + Self::OFFER_TTL);
                self.held.insert(key, Held { size, hold });
            }
        }
        Ok(Offer {
            node,
            request,
            ttl: Self::OFFER_TTL,
            free: self.free().plus(size),
            price_micros,
        })
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
        self.expire(now);
        let held = self.held.get_mut(&(asker, request));
        let held = held.ok_or(TakeRefused::Over)?;
        match held.hold {
            Hold::Offered(_) => held.hold = Hold::Taken(now + Self::TAKEN_TTL),
            Hold::Taken(_) => {}
            Hold::Used => return Err(TakeRefused::Begun),
        }
        Ok(held.size)
    }

    /// Its machine begins, and uses what was taken until it is [released](Book::release). Once only, however often it is
    /// said: of two who say it, one starts the machine.
    ///
    /// # Errors
    /// [`TakeRefused`].
    pub fn begin(
        &mut self,
        now: Duration,
        asker: NodeId,
        request: RequestId,
    ) -> Result<Stock, TakeRefused> {
        self.expire(now);
        let held = self.held.get_mut(&(asker, request));
        let held = held.ok_or(TakeRefused::Over)?;
        match held.hold {
            Hold::Taken(_) => held.hold = Hold::Used,
            Hold::Used => return Err(TakeRefused::Begun),
            // Nobody began what nobody took: it is as good as over.
            Hold::Offered(_) => return Err(TakeRefused::Over),
        }
        Ok(held.size)
    }

    /// Gives back what was held: the offer is not wanted, or its machine is gone. Returns whether something was.
    pub fn release(&mut self, asker: NodeId, request: RequestId) -> bool {
        self.held.remove(&(asker, request)).is_some()
    }
}
