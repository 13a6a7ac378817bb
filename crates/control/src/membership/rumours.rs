//! News under way: how often each was told, which is told next, and which are remembered so that they are not taken for new.

use super::News;
use super::table::Hashing;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;
use vistara_model::NodeId;

/// How long news that were passed on are remembered, so that they are not taken for new ones.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Tickets that are not valid any more are thrown out when there are this many times more than news can be: seldom, and never
/// many.
const TICKETS_PER_NEWS_MAX: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Rumour {
    news: News,
    /// As the how-manieth it came.
    came: u64,
    /// Whether it is still sent.
    sent_on: bool,
}

/// Whose turn it is. Valid while the rumour in its place is the one that came then.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    place: usize,
    came: u64,
}

/// News under way.
#[derive(Debug, Clone)]
pub(super) struct Rumours {
    most: usize,
    /// Where each node's news are in `all`.
    places: HashMap<NodeId, usize, Hashing>,
    /// Places of nobody are in `free`, and their rumours are nobody's turn.
    all: Vec<Rumour>,
    free: Vec<usize>,
    /// Those that are still sent, by how often they were; of those that were sent equally often the one that came first is
    /// first, so that nobody's choice of ids goes before others' news.
    queues: Vec<VecDeque<Ticket>>,
    /// Those that are not any more, the oldest first.
    spent: VecDeque<(Duration, Ticket)>,
    /// How many in `queues` are valid.
    waiting: usize,
    /// How many there have been.
    count: u64,
}

impl Rumours {
    pub(super) fn new(most: usize, hashing: Hashing) -> Rumours {
        Rumours {
            most,
            places: HashMap::with_hasher(hashing),
            all: Vec::new(),
            free: Vec::new(),
            queues: Vec::new(),
            spent: VecDeque::new(),
            waiting: 0,
            count: 0,
        }
    }

    /// How many are told or remembered.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is something to tell.
    pub(super) fn waiting(&self) -> bool {
        self.waiting > 0
    }

    /// What is told, or was not long ago, of a node.
    pub(super) fn of(&self, node: NodeId) -> Option<&News> {
        let place = self.places.get(&node)?;
        self.all.get(*place).map(|one| &one.news)
    }

    fn is_valid(&self, ticket: Ticket) -> bool {
        (self.all.get(ticket.place)).is_some_and(|one| one.came == ticket.came)
    }

    /// Takes one out of the tables, and so makes its ticket void.
    fn remove(&mut self, place: usize) {
        if let Some(one) = self.all.get_mut(place) {
            one.came = u64::MAX;
            self.waiting -= usize::from(one.sent_on);
            self.places.remove(&one.news.node);
            self.free.push(place);
        }
    }

    /// Has news told from now on, instead of what was told of its node before.
    pub(super) fn put(&mut self, news: News) {
        if let Some(place) = self.places.get(&news.node).copied() {
            self.remove(place);
        }
        while self.places.len() >= self.most {
            // What was told goes first; then what was told most.
            let oldest = self.spent.pop_front().map(|(_, ticket)| ticket);
            let most = || self.queues.iter_mut().rev().find_map(VecDeque::pop_back);
            match oldest.or_else(most) {
                Some(ticket) if self.is_valid(ticket) => self.remove(ticket.place),
                Some(_) => {}
                None => return,
            }
        }
        self.tidy();
        let came = self.count;
        self.count += 1;
        let rumour = Rumour {
            news,
            came,
            sent_on: true,
        };
        let place = self.free.pop().unwrap_or(self.all.len());
        match self.all.get_mut(place) {
            Some(one) => *one = rumour,
            None => self.all.push(rumour),
        }
        self.places.insert(news.node, place);
        self.waiting += 1;
        self.queue(0, Ticket { place, came });
    }

    fn queue(&mut self, sent: usize, ticket: Ticket) {
        if self.queues.len() <= sent {
            self.queues.resize(sent + 1, VecDeque::new());
        }
        if let Some(queue) = self.queues.get_mut(sent) {
            queue.push_back(ticket);
        }
    }

    /// Up to this many, each counted as sent; what has been sent `limit` times is not sent again.
    pub(super) fn take(&mut self, most: usize, limit: usize, now: Duration, into: &mut Vec<News>) {
        // Who is told again waits behind those that were told as often, and is in one packet once.
        let mut again = Vec::with_capacity(most.min(self.waiting));
        let mut left = most.min(self.waiting);
        for sent in 0..self.queues.len() {
            while left > 0
                && let Some(ticket) = self.queues.get_mut(sent).and_then(VecDeque::pop_front)
            {
                let one = self.all.get_mut(ticket.place);
                if let Some(one) = one.filter(|one| one.came == ticket.came) {
                    into.push(one.news);
                    left -= 1;
                    if sent + 1 < limit {
                        again.push((sent + 1, ticket));
                    } else {
                        one.sent_on = false;
                        self.waiting -= 1;
                        self.spent.push_back((now, ticket));
                    }
                }
            }
        }
        for (sent, ticket) in again {
            self.queue(sent, ticket);
        }
    }

    /// Forgets what was told long ago.
    pub(super) fn forget(&mut self, now: Duration) {
        while let Some((at, ticket)) = self.spent.front().copied() {
            if at + REMEMBERED > now {
                break;
            }
            self.spent.pop_front();
            if self.is_valid(ticket) {
                self.remove(ticket.place);
            }
        }
    }

    /// Throws out void tickets, once there are many.
    fn tidy(&mut self) {
        let tickets = self.queues.iter().map(VecDeque::len).sum::<usize>() + self.spent.len();
        if tickets <= TICKETS_PER_NEWS_MAX.saturating_mul(self.most) {
            return;
        }
        let all = &self.all;
        let is_valid =
            |ticket: &Ticket| (all.get(ticket.place)).is_some_and(|one| one.came == ticket.came);
        for queue in &mut self.queues {
            queue.retain(is_valid);
        }
        self.spent.retain(|(_, ticket)| is_valid(ticket));
    }
}

#[cfg(test)]
mod tests {
    //! The rules that the queues keep, against a plain list.

    #![allow(clippy::unwrap_used)]

    use super::super::Life;
    use super::super::table::Keys;
    use super::*;
    use proptest::prelude::*;

    fn about(number: u8, incarnation: u64) -> News {
        News {
            node: NodeId::from_bytes([number; 32]),
            incarnation,
            life: Life::Alive,
        }
    }

    proptest! {
        #[test]
        fn the_least_told_come_first_and_of_those_the_first_that_came(
            steps in prop::collection::vec((0u8..12, any::<bool>(), 1usize..6), 1..200)
        ) {
            const LIMIT: usize = 5;
            let mut rumours = Rumours::new(100, Keys::new(1).hashing());
            // How often it was told, as the how-manieth it came, and what.
            let mut plain: Vec<(usize, usize, News)> = Vec::new();
            for (count, (number, put, most)) in steps.into_iter().enumerate() {
                if put {
                    let news = about(number, count as u64);
                    rumours.put(news);
                    plain.retain(|(.., one)| one.node != news.node);
                    plain.push((0, count, news));
                    continue;
                }
                plain.sort_by_key(|(sent, came, _)| (*sent, *came));
                let due = plain.iter_mut().filter(|(sent, ..)| *sent < LIMIT).take(most);
                let due: Vec<News> = due.map(|one| { one.0 += 1; one.2 }).collect();
                let mut taken = Vec::new();
                rumours.take(most, LIMIT, Duration::ZERO, &mut taken);
                prop_assert_eq!(taken, due);
                let waiting = plain.iter().any(|(sent, ..)| *sent < LIMIT);
                prop_assert_eq!(rumours.waiting(), waiting);
                prop_assert_eq!(rumours.len(), plain.len());
            }
            rumours.forget(REMEMBERED);
            prop_assert_eq!(rumours.len(), plain.iter().filter(|(sent, ..)| *sent < LIMIT).count());
        }
    }

    #[test]
    fn tickets_do_not_grow_however_often_news_of_one_node_are_replaced() {
        let mut rumours = Rumours::new(8, Keys::new(1).hashing());
        for count in 0..10_000u64 {
            rumours.put(about((count % 3) as u8, count));
            let mut taken = Vec::new();
            rumours.take(2, 16, Duration::ZERO, &mut taken);
        }
        let tickets = rumours.queues.iter().map(VecDeque::len).sum::<usize>() + rumours.spent.len();
        assert!(tickets <= 8 * TICKETS_PER_NEWS_MAX + 1, "{tickets}");
        assert_eq!(rumours.len(), 3);
    }
}
