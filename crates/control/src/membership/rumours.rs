//! News under way: how often each was told, which is told next, and which are remembered so that they are not taken for new.
//!
//! Suspicions go first, since they are what a death is noticed by: where more happens than can be told, as after a cut, nobody is
//! believed to be alive for long who is not. A part of each packet is for the rest all the same. Told deaths come last: who has
//! heard of a suspicion counts to three seconds alone.

use super::age::{Age, Told};
use super::table::Hashing;
use super::{Life, News};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;
use vistara_model::NodeId;

/// How long news that were passed on are remembered, so that they are not taken for new ones.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Tickets that are not valid any more are thrown out when there are this many times more than news can be: seldom, and never
/// many.
const TICKETS_PER_NEWS_MAX: usize = 2;
/// How much room an empty queue keeps: after a cut a wave of news goes through all of them, one after the other.
const QUEUE_KEEPS: usize = 64;

/// How often a piece of news is sent on. Where each of n nodes tells `ln n + c` others by chance, nobody is missed with a
/// probability of about `e^(-e^-c)` (Kermarrec, Massoulié, Ganesh 2003): this is c = 6, 99.75 %, for 2^14 nodes, and a death is told twice, as
/// a suspicion and as a death. In smaller networks chance is less even, and it costs little there.
const SENDS_MAX: usize = 16;
/// A death is sent less often: it is for the few that the suspicion has missed.
const SENDS_OF_DEATHS: usize = 8;
/// One of this many places in a packet is not for suspicions, while there is other news.
const OTHERS_SHARE: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Rumour {
    news: News,
    /// Until when it is told.
    until: Duration,
    /// As the how-manieth it came. Only equality counts, with tickets that are thrown out long before it goes around.
    came: u32,
    /// Whether it is somebody's news, and not a place that is free.
    told: bool,
    /// Whether it is still sent.
    sent_on: bool,
}

/// Whose turn it is. Valid while the rumour in its place is the one that came then.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    place: u32,
    came: u32,
}

impl Rumour {
    fn is(&self, ticket: Ticket) -> bool {
        self.told && self.came == ticket.came
    }
}

/// Tickets by how often their news were sent; of those that were sent equally often the one that came first is first, so that
/// nobody's choice of ids goes before others' news.
#[derive(Debug, Clone, Default)]
struct Queue(Vec<VecDeque<Ticket>>);

impl Queue {
    fn put(&mut self, sent: usize, ticket: Ticket) {
        if self.0.len() <= sent {
            self.0.resize(sent + 1, VecDeque::new());
        }
        if let Some(tickets) = self.0.get_mut(sent) {
            tickets.push_back(ticket);
        }
    }

    fn len(&self) -> usize {
        self.0.iter().map(VecDeque::len).sum()
    }

    /// One of those that were sent most.
    fn pop_most_sent(&mut self) -> Option<Ticket> {
        self.0.iter_mut().rev().find_map(VecDeque::pop_back)
    }
}

/// Which of the queues it waits in, and as if it had been sent how often.
fn queue_of(life: Life) -> (usize, usize) {
    match life {
        Life::Suspect => (0, 0),
        Life::Alive => (1, 0),
        Life::Dead => (1, SENDS_MAX - SENDS_OF_DEATHS),
    }
}

/// News under way.
#[derive(Debug, Clone)]
pub(super) struct Rumours {
    most: usize,
    /// Where each node's news are in `all`.
    places: HashMap<NodeId, u32, Hashing>,
    /// Places of nobody are in `free`, and their rumours are nobody's turn.
    all: Vec<Rumour>,
    free: Vec<u32>,
    /// Those that are still sent: suspicions, and the others.
    queues: [Queue; 2],
    /// Those that are not any more, the oldest first.
    spent: VecDeque<(Duration, Ticket)>,
    /// How many in `queues` are valid.
    waiting: usize,
    /// How many there have been, around and around.
    count: u32,
}

impl Rumours {
    pub(super) fn new(most: usize, hashing: Hashing) -> Rumours {
        Rumours {
            most,
            places: HashMap::with_hasher(hashing),
            all: Vec::new(),
            free: Vec::new(),
            queues: [Queue::default(), Queue::default()],
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
        self.all.get(*place as usize).map(|one| &one.news)
    }

    fn is_valid(&self, ticket: Ticket) -> bool {
        (self.all.get(ticket.place as usize)).is_some_and(|one| one.is(ticket))
    }

    /// Takes one out of the tables, and so makes its ticket void.
    fn remove(&mut self, place: u32) {
        if let Some(one) = self.all.get_mut(place as usize) {
            one.told = false;
            self.waiting -= usize::from(one.sent_on);
            self.places.remove(&one.news.node);
            self.free.push(place);
        }
    }

    /// Has news told from now on until then, instead of what was told of its node before.
    pub(super) fn put(&mut self, news: News, until: Duration) {
        if let Some(place) = self.places.get(&news.node).copied() {
            self.remove(place);
        }
        while self.places.len() >= self.most {
            // What was told goes first; then what was told most, suspicions last.
            let oldest = self.spent.pop_front().map(|(_, ticket)| ticket);
            let most = || self.queues.iter_mut().rev().find_map(Queue::pop_most_sent);
            match oldest.or_else(most) {
                Some(ticket) if self.is_valid(ticket) => self.remove(ticket.place),
                Some(_) => {}
                None => return,
            }
        }
        self.tidy();
        let came = self.count;
        self.count = self.count.wrapping_add(1);
        let rumour = Rumour {
            news,
            until,
            came,
            told: true,
            sent_on: true,
        };
        // Fewer than `most`, which is far below what fits.
        let place = self.free.pop().unwrap_or(self.all.len() as u32);
        match self.all.get_mut(place as usize) {
            Some(one) => *one = rumour,
            None => self.all.push(rumour),
        }
        self.places.insert(news.node, place);
        self.waiting += 1;
        let (queue, sent) = queue_of(news.life);
        self.queues[queue].put(sent, Ticket { place, came });
    }

    /// Up to this many, each counted as sent. What was sent as often as news are, or is old, is not sent again.
    pub(super) fn take(&mut self, most: usize, now: Duration, into: &mut Vec<Told>) {
        let others = most.div_ceil(OTHERS_SHARE);
        let end = into.len() + most;
        // Who is told again waits behind those that were told as often, and is in one packet once.
        let mut again = Vec::with_capacity(most.min(self.waiting));
        self.take_of(0, most - others, now, into, &mut again);
        for queue in [1, 0] {
            self.take_of(queue, end - into.len(), now, into, &mut again);
        }
        for (queue, sent, ticket) in again {
            self.queues[queue].put(sent, ticket);
        }
    }

    /// Up to this many of one queue; what is to be sent again goes to `again`.
    fn take_of(
        &mut self,
        queue: usize,
        most: usize,
        now: Duration,
        into: &mut Vec<Told>,
        again: &mut Vec<(usize, usize, Ticket)>,
    ) {
        let mut left = most.min(self.waiting);
        for (sent, tickets) in self.queues[queue].0.iter_mut().enumerate() {
            while left > 0
                && let Some(ticket) = tickets.pop_front()
            {
                let one = self.all.get_mut(ticket.place as usize);
                let Some(one) = one.filter(|one| one.is(ticket)) else {
                    continue;
                };
                let age = Age::of(now, one.until);
                if let Some(age) = age {
                    let news = one.news;
                    into.push(Told { news, age });
                    left -= 1;
                }
                if age.is_some() && sent + 1 < SENDS_MAX {
                    again.push((queue, sent + 1, ticket));
                } else {
                    one.sent_on = false;
                    self.waiting -= 1;
                    self.spent.push_back((now, ticket));
                }
            }
            if tickets.is_empty() {
                tickets.shrink_to(QUEUE_KEEPS);
            }
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
        let tickets = self.queues.iter().map(Queue::len).sum::<usize>() + self.spent.len();
        if tickets <= TICKETS_PER_NEWS_MAX.saturating_mul(self.most) {
            return;
        }
        let all = &self.all;
        let is_valid =
            |ticket: &Ticket| (all.get(ticket.place as usize)).is_some_and(|one| one.is(*ticket));
        for tickets in self.queues.iter_mut().flat_map(|queue| &mut queue.0) {
            tickets.retain(is_valid);
        }
        self.spent.retain(|(_, ticket)| is_valid(ticket));
    }
}

#[cfg(test)]
mod tests {
    //! The rules that the queues keep, against a plain list.

    #![allow(clippy::unwrap_used)]

    use super::super::Life;
    use super::super::age::NEWS_LAST;
    use super::super::table::Keys;
    use super::*;
    use proptest::prelude::*;

    fn about(number: u8, incarnation: u64, life: Life) -> News {
        News {
            node: NodeId::from_bytes([number; 32]),
            incarnation,
            life,
        }
    }

    fn taken(rumours: &mut Rumours, most: usize, now: Duration) -> Vec<News> {
        let mut told = Vec::new();
        rumours.take(most, now, &mut told);
        told.into_iter().map(|told| told.news).collect()
    }

    /// What is told, in a plain list.
    struct Plain {
        queue: usize,
        sent: usize,
        /// When it came, or was told last.
        turn: usize,
        news: News,
    }

    fn due(plain: &mut [Plain], most: usize, turn: &mut usize) -> Vec<News> {
        plain.sort_by_key(|one| (one.queue, one.sent, one.turn));
        let mut due = Vec::new();
        let others = most.div_ceil(OTHERS_SHARE);
        for (queue, most) in [(0, most - others), (1, most), (0, most)] {
            for one in plain.iter_mut().filter(|one| one.queue == queue) {
                let told = due.contains(&one.news);
                if due.len() < most && one.sent < SENDS_MAX && !told {
                    due.push(one.news);
                    one.sent += 1;
                    one.turn = *turn;
                    *turn += 1;
                }
            }
        }
        due
    }

    proptest! {
        #[test]
        fn suspicions_have_three_places_of_four_and_the_least_told_that_came_first_come_first(
            steps in prop::collection::vec(
                (0u8..12, prop::option::of(0usize..3), 1usize..20), 1..200)
        ) {
            let mut rumours = Rumours::new(100, Keys::new(1).hashing());
            let mut plain: Vec<Plain> = Vec::new();
            let mut turn = 0;
            for (came, (number, put, most)) in steps.into_iter().enumerate() {
                if let Some(life) = put {
                    let life = [Life::Alive, Life::Suspect, Life::Dead][life];
                    let news = about(number, came as u64, life);
                    rumours.put(news, NEWS_LAST);
                    plain.retain(|one| one.news.node != news.node);
                    let (queue, sent) = queue_of(life);
                    plain.push(Plain { queue, sent, turn, news });
                    turn += 1;
                    continue;
                }
                let due = due(&mut plain, most, &mut turn);
                prop_assert_eq!(taken(&mut rumours, most, Duration::ZERO), due);
                let waiting = plain.iter().any(|one| one.sent < SENDS_MAX);
                prop_assert_eq!(rumours.waiting(), waiting);
                prop_assert_eq!(rumours.len(), plain.len());
            }
            rumours.forget(REMEMBERED);
            let left = plain.iter().filter(|one| one.sent < SENDS_MAX).count();
            prop_assert_eq!(rumours.len(), left);
        }
    }

    #[test]
    fn a_fresh_suspicion_goes_before_all_that_a_cut_has_left() {
        let mut rumours = Rumours::new(2048, Keys::new(1).hashing());
        for number in 0..200 {
            let life = if number % 2 == 0 {
                Life::Dead
            } else {
                Life::Alive
            };
            rumours.put(about(number, 1, life), NEWS_LAST);
        }
        let late = NEWS_LAST - Duration::from_secs(1);
        let fresh = about(201, 1, Life::Suspect);
        rumours.put(fresh, late + NEWS_LAST);
        let packet = taken(&mut rumours, 23, late);
        assert_eq!(packet.first(), Some(&fresh));
        assert_eq!(packet.len(), 23, "the others are told, too");
    }

    #[test]
    fn old_news_are_not_told_but_remembered() {
        let mut rumours = Rumours::new(8, Keys::new(1).hashing());
        let (old, new) = (about(1, 1, Life::Suspect), about(2, 1, Life::Suspect));
        rumours.put(old, NEWS_LAST);
        rumours.put(new, NEWS_LAST + Duration::from_secs(8));
        let mut told = Vec::new();
        rumours.take(8, NEWS_LAST, &mut told);
        let age = Age(20);
        assert_eq!(told, [Told { news: new, age }]);
        assert_eq!(rumours.of(old.node), Some(&old));
        rumours.take(8, NEWS_LAST * 2, &mut told);
        assert!(!rumours.waiting());
        rumours.forget(NEWS_LAST + REMEMBERED);
        assert_eq!(rumours.of(old.node), None);
    }

    #[test]
    fn tickets_do_not_grow_however_often_news_of_one_node_are_replaced() {
        let mut rumours = Rumours::new(8, Keys::new(1).hashing());
        for count in 0..10_000u64 {
            let life = if count % 2 == 0 {
                Life::Alive
            } else {
                Life::Suspect
            };
            rumours.put(about((count % 3) as u8, count, life), NEWS_LAST);
            taken(&mut rumours, 2, Duration::ZERO);
        }
        let waiting = rumours.queues.iter().map(Queue::len).sum::<usize>();
        let tickets = waiting + rumours.spent.len();
        assert!(tickets <= 8 * TICKETS_PER_NEWS_MAX + 1, "{tickets}");
        assert_eq!(rumours.len(), 3);
    }
}
