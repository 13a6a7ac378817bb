//! Hearing, believing and passing on.

use super::{
    Body, DENIAL_BITS, FACTS_BYTES_MAX, FACTS_HEAD_BYTES, HEAD_BYTES, Life, Membership, NEWS_BYTES,
    News, Output, Packet, Stated,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use vistara_model::NodeId;

/// News are sent this many times the logarithm of the network's size, which reaches everybody with high probability;
const SENDS_PER_LOG: u32 = 2;
/// and this many times more, since in small networks chance is less even.
const SENDS_MORE: u32 = 6;
/// Facts are passed on this often: they may be missed, the next ping asks for them.
const FACTS_SENDS_MAX: u32 = 6;
/// How long news that were passed on are remembered, so that they are not taken for new ones.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Most that are waiting to be tried because somebody contradicts: a minute's.
const DOUBTS_MAX: usize = 256;
/// Most of them on one peer's word: who contradicts everything delays the others by seconds.
const DOUBTS_EACH_MAX: usize = 64;
/// How far others' word may be ahead of the known incarnation within one start of a node. What is further, or of another
/// start, only its node can say.
const LEAP_MAX: u64 = 1 << 12;

/// Members to be tried, and on whose word.
#[derive(Debug, Clone, Default)]
pub(super) struct Doubts(VecDeque<(NodeId, NodeId)>);

impl Doubts {
    pub(super) fn pop(&mut self) -> Option<NodeId> {
        self.0.pop_front().map(|(node, _)| node)
    }

    fn put(&mut self, node: NodeId, by: NodeId) {
        let full = self.0.len() >= DOUBTS_MAX
            || self.0.iter().filter(|(_, one)| *one == by).count() >= DOUBTS_EACH_MAX;
        if !full && !self.0.iter().any(|(one, _)| *one == node) {
            self.0.push_back((node, by));
        }
    }
}

/// Whether an incarnation is of the same start of a node as another.
fn same_start(one: u64, other: u64) -> bool {
    one >> DENIAL_BITS == other >> DENIAL_BITS
}

/// Whether others' word of `news` may follow on what is known: of the same start, not far ahead, and, where it speaks ill,
/// such that it can be denied.
fn follows(known: &News, news: &News) -> bool {
    let next = news.incarnation.saturating_add(1);
    same_start(known.incarnation, news.incarnation)
        && news.incarnation < known.incarnation.saturating_add(LEAP_MAX)
        && (news.life == Life::Alive || same_start(known.incarnation, next))
}

#[derive(Debug, Clone, Copy)]
struct Rumour {
    news: News,
    sent: u32,
    /// As the how-manieth it came.
    came: u64,
}

/// News under way.
#[derive(Debug, Clone)]
pub(super) struct Rumours {
    most: usize,
    all: BTreeMap<NodeId, Rumour>,
    /// Those that are still sent, the least sent first; of those that were sent equally often the one that came first, so that
    /// nobody's choice of ids goes before others' news.
    queue: BTreeSet<(u32, u64, NodeId)>,
    /// How many there have been.
    count: u64,
    /// Those that are not any more, the oldest first.
    spent: VecDeque<(Duration, News)>,
}

impl Rumours {
    pub(super) fn new(most: usize) -> Rumours {
        Rumours {
            most,
            all: BTreeMap::new(),
            queue: BTreeSet::new(),
            count: 0,
            spent: VecDeque::new(),
        }
    }

    /// Whether there is something to tell.
    pub(super) fn waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether this is known, or outweighed by what is known.
    fn knows(&self, news: &News) -> bool {
        (self.all.get(&news.node)).is_some_and(|known| !news.outweighs(&known.news))
    }

    fn put(&mut self, news: News) {
        if let Some(old) = self.all.remove(&news.node) {
            self.queue.remove(&(old.sent, old.came, news.node));
        }
        while self.all.len() >= self.most {
            // What was told goes first; then what was told most.
            let gone = match self.spent.pop_front() {
                Some((_, old)) if self.is_spent(&old) => old.node,
                Some(_) => continue,
                None => match self.queue.pop_last() {
                    Some((_, _, node)) => node,
                    None => return,
                },
            };
            self.all.remove(&gone);
        }
        let (sent, came) = (0, self.count);
        self.count += 1;
        self.all.insert(news.node, Rumour { news, sent, came });
        self.queue.insert((sent, came, news.node));
    }

    fn is_spent(&self, old: &News) -> bool {
        (self.all.get(&old.node)).is_some_and(|one| {
            one.news == *old && !self.queue.contains(&(one.sent, one.came, old.node))
        })
    }

    /// Up to this many, each counted as sent; what has been sent `limit` times is not sent again.
    fn take(&mut self, most: usize, limit: u32, now: Duration) -> Vec<News> {
        let chosen: Vec<_> = self.queue.iter().take(most).copied().collect();
        let mut taken = Vec::with_capacity(chosen.len());
        for (sent, came, node) in chosen {
            self.queue.remove(&(sent, came, node));
            if let Some(one) = self.all.get_mut(&node) {
                one.sent = sent + 1;
                taken.push(one.news);
                if one.sent < limit {
                    self.queue.insert((one.sent, came, node));
                } else {
                    self.spent.push_back((now, one.news));
                }
            }
        }
        taken
    }

    /// Forgets what was told long ago.
    pub(super) fn forget(&mut self, now: Duration) {
        while let Some((at, old)) = self.spent.front().copied() {
            if at + REMEMBERED > now {
                break;
            }
            self.spent.pop_front();
            if self.is_spent(&old) {
                self.all.remove(&old.node);
            }
        }
    }
}

impl Membership {
    /// How many pieces of news are passed on or remembered.
    pub fn rumours_held(&self) -> usize {
        self.rumours.all.len()
    }

    /// Takes one piece of news; `vouched` where facts of whom it is about came along.
    pub(super) fn hear(
        &mut self,
        now: Duration,
        from: NodeId,
        (news, vouched): (News, bool),
        page: bool,
        outputs: &mut Vec<Output>,
    ) {
        if news.node == self.me.node {
            self.hear_of_me(news);
            return;
        }
        let known = self.members.get(&self.place(news.node)).map(|one| one.news);
        if news.node == from {
            // Its own word, over a connection that proves who speaks, counts whatever others said.
            match known {
                Some(known) if known == news => {}
                _ if news.life == Life::Suspect => {}
                _ => self.believe(now, news, true, outputs),
            }
            return;
        }
        match known {
            Some(known) if !news.outweighs(&known) => {
                if known.life == Life::Dead && news.life == Life::Alive && page {
                    self.doubt(news.node, from);
                }
            }
            // Others' word does not raise the dead, and nobody but the node itself makes its incarnation much larger: it is
            // asked.
            Some(known)
                if !follows(&known, &news)
                    || (known.life == Life::Dead && news.life != Life::Dead) =>
            {
                self.doubt(news.node, from);
            }
            Some(known) => self.hear_of(now, from, (known, news), page, outputs),
            None if self.rumours.knows(&news) => {}
            // Anybody can invent ids: one peer's word of strangers counts at a bounded rate, beyond what strangers have signed.
            None if !vouched && !self.strangers.may_tell(now, from) => {}
            // A stranger's death is passed on, not entered.
            None if news.life == Life::Dead => {
                if !page {
                    self.rumours.put(news);
                }
            }
            None => {
                let entered = self.enter(now, news, (false, !page), outputs);
                if !entered && !page {
                    self.rumours.put(news);
                }
            }
        }
    }

    /// Others' word of a member, heavier than what was known.
    fn hear_of(
        &mut self,
        now: Duration,
        from: NodeId,
        (known, news): (News, News),
        page: bool,
        outputs: &mut Vec<Output>,
    ) {
        let place = self.place(news.node);
        let Some(member) = self.members.get_mut(&place) else {
            return;
        };
        match (known.life, news.life) {
            // Once it was suspected and the suspicion taken back, all by others' word, its own answers count.
            (Life::Alive, Life::Suspect | Life::Dead) | (Life::Suspect, Life::Alive)
                if member.denied =>
            {
                self.doubt(news.node, from);
                return;
            }
            (Life::Suspect, Life::Alive) => {
                member.denied = true;
                self.doubt(news.node, from);
            }
            (Life::Alive | Life::Suspect | Life::Dead, _) => {}
        }
        // A death that this node saw no sign of: its own three seconds first.
        let sudden = known.life == Life::Alive && news.life == Life::Dead;
        let life = if sudden { Life::Suspect } else { news.life };
        self.believe(now, News { life, ..news }, !page, outputs);
    }

    fn hear_of_me(&mut self, news: News) {
        let me = &mut self.me;
        if me.life == Life::Dead || news.life == Life::Alive {
            return;
        }
        // Of another start, or the last of this one, nobody believes on others' word: there is nothing to deny. So denials
        // stay within this start, and the next one is ahead of them.
        let denial = news.incarnation.saturating_add(1);
        if news.incarnation >= me.incarnation && same_start(me.incarnation, denial) {
            me.incarnation = denial;
            self.rumours.put(*me);
        }
    }

    /// Holds something for true of a member, and tells others: what stands in a page is no news. Enters it where it is not
    /// known.
    pub(super) fn believe(
        &mut self,
        now: Duration,
        news: News,
        tell: bool,
        outputs: &mut Vec<Output>,
    ) {
        let place = self.place(news.node);
        let Some(member) = self.members.get_mut(&place) else {
            // Whom this node believes something of without having it in its table has just spoken.
            self.enter(now, news, (true, tell), outputs);
            return;
        };
        let before = member.news.life;
        self.suspicions.remove(&(member.deadline, news.node));
        member.news = news;
        if news.life == Life::Suspect {
            // Suspecting it again gives it no more time.
            if before != Life::Suspect {
                member.deadline = now + self.config.suspicion;
            }
            self.suspicions.insert((member.deadline, news.node));
        }
        self.alive -= usize::from(before == Life::Alive);
        self.alive += usize::from(news.life == Life::Alive);
        if before != news.life {
            outputs.push(Output::Changed(news.node, news.life));
        }
        if tell {
            self.rumours.put(news);
        }
    }

    /// Tries it soon: somebody contradicts what is believed of it.
    pub(super) fn doubt(&mut self, node: NodeId, by: NodeId) {
        self.doubts.put(node, by);
    }

    /// Takes facts, if they are newer and about a member.
    pub(super) fn learn(&mut self, stated: Stated, outputs: &mut Vec<Output>) {
        let place = self.place(stated.node);
        let Some(member) = self.members.get_mut(&place) else {
            return;
        };
        let known = member.facts.as_ref().map_or(0, |facts| facts.version);
        if stated.version <= known || stated.bytes.len() > FACTS_BYTES_MAX {
            return;
        }
        member.facts = Some(stated.clone());
        self.fresh_facts.remove(&(member.facts_sent, stated.node));
        member.facts_sent = 0;
        self.fresh_facts.insert((0, stated.node));
        outputs.push(Output::Facts(stated));
    }

    /// A packet with as much news and facts as it holds. `room_for` is put in by the caller.
    pub(super) fn packet(
        &mut self,
        body: Body,
        to: Option<NodeId>,
        room_for: Option<&Stated>,
    ) -> Packet {
        let mut news = vec![self.me];
        let believed = to.and_then(|to| self.members.get(&self.place(to)));
        // Who is thought to be gone is told so, and can deny it.
        news.extend(
            believed
                .map(|member| member.news)
                .filter(|news| news.life != Life::Alive),
        );
        let reserved = room_for.map_or(0, |own| own.bytes.len() + FACTS_HEAD_BYTES);
        let room = self
            .config
            .packet_bytes
            .saturating_sub(HEAD_BYTES + reserved + news.len() * NEWS_BYTES);
        let size = u64::try_from(self.members.len()).unwrap_or(u64::MAX).max(2);
        // A full table is a part of a network whose size is not known: 2^14 is assumed.
        let log = if self.is_full() {
            14
        } else {
            u64::BITS - size.leading_zeros()
        };
        // Remembered from the last gossip on: exact enough for a minute.
        let now = self.next_gossip;
        news.extend(
            self.rumours
                .take(room / NEWS_BYTES, SENDS_PER_LOG * log + SENDS_MORE, now),
        );
        let mut packet = Packet {
            body,
            news,
            facts: Vec::new(),
        };
        if !matches!(body, Body::Gossip) {
            self.add_facts(&mut packet, reserved);
        }
        packet
    }

    fn add_facts(&mut self, packet: &mut Packet, reserved: usize) {
        let mut room = (self.config.packet_bytes).saturating_sub(packet.bytes() + reserved);
        let mut sent = Vec::new();
        for (count, node) in &self.fresh_facts {
            let facts = if *node == self.me.node {
                self.own_facts.as_ref()
            } else {
                (self.members.get(&self.place(*node))).and_then(|member| member.facts.as_ref())
            };
            let Some(facts) = facts else {
                continue;
            };
            let bytes = facts.bytes.len() + FACTS_HEAD_BYTES;
            if bytes > room {
                break;
            }
            room -= bytes;
            packet.facts.push(facts.clone());
            sent.push((*count, *node));
        }
        for (count, node) in sent {
            self.fresh_facts.remove(&(count, node));
            if count + 1 < FACTS_SENDS_MAX {
                self.fresh_facts.insert((count + 1, node));
            }
            let place = self.place(node);
            if node == self.me.node {
                self.own_facts_sent = count + 1;
            } else if let Some(member) = self.members.get_mut(&place) {
                member.facts_sent = count + 1;
            }
        }
    }

    pub(super) fn send(&mut self, to: NodeId, body: Body, outputs: &mut Vec<Output>) {
        let packet = self.packet(body, Some(to), None);
        outputs.push(Output::Send(to, packet));
    }

    /// A page of the table.
    pub(super) fn page(&self, number: u64, from: u64) -> Packet {
        let mut page = Packet {
            body: Body::Page { number, next: None },
            news: vec![self.me],
            facts: self.own_facts.iter().cloned().collect(),
        };
        let mut bytes = page.bytes();
        let start = (from, NodeId::from_bytes([0; 32]));
        for ((place, _), member) in self.members.range(start..) {
            let facts = member.facts.as_ref();
            bytes += NEWS_BYTES + facts.map_or(0, |one| one.bytes.len() + FACTS_HEAD_BYTES);
            if bytes > self.config.page_bytes {
                let next = Some(*place);
                page.body = Body::Page { number, next };
                break;
            }
            page.news.push(member.news);
            page.facts.extend(facts.cloned());
        }
        page
    }
}
