//! Hearing, believing and passing on.

use super::pages::spend;
use super::{
    Age, Body, DENIAL_BITS, FACTS_BYTES_MAX, FACTS_HEAD_BYTES, Life, Membership, NEWS_BYTES, News,
    Output, Packet, Stated, Tie, Told,
};
use std::collections::VecDeque;
use std::time::Duration;
use vistara_model::NodeId;

/// Facts are passed on this often: they may be missed, the next ping asks for them.
const FACTS_SENDS_MAX: u32 = 6;
/// Others' facts twice, where this node knows a part of the network: few of those that it tells know whom they are about, and
/// only they take them.
const FACTS_SENDS_IN_PART: u32 = 2;
/// Answers carry news and others' facts four times a second, twice as often as a node is pinged on average, and 16 times at
/// once. Who is pinged more (many contradict each other about it, or somebody wants it to send much) says what it is asked.
const ANSWERS_PERIOD: Duration = Duration::from_millis(250);
const ANSWERS_BURST: u32 = 16;
/// Its own facts a node says eight times a second to those that have older ones, and 64 times at once. Who does not get them asks with
/// its next ping. After a cut hundreds ping one node within seconds; and who asks for a large answer with a small question gets few.
const ASKED_FACTS_PERIOD: Duration = Duration::from_millis(125);
const ASKED_FACTS_BURST: u32 = 64;
/// Most that are waiting to be tried because somebody contradicts, of each kind: two minutes' of the dead.
const DOUBTS_MAX: usize = 256;
/// Most of them on one peer's word: who contradicts everything delays the others by seconds.
const DOUBTS_EACH_MAX: usize = 64;
/// Up to which age others' ill word of a member is believed: it is told for as long again, so that the member hears it and can say
/// that it lives. What is in a page is older.
const ILL_BELIEVED: Age = Age(50);
/// How far others' word may be ahead of the known incarnation within one start of a node. What is further, or of another
/// start, only its node can say.
const LEAP_MAX: u64 = 1 << 12;

/// A member to be tried.
#[derive(Debug, Clone, Copy)]
struct Doubt {
    node: NodeId,
    /// On whose word.
    by: NodeId,
    /// Whether it was believed to be gone.
    dead: bool,
}

/// Members to be tried: those of whom others say just now that they may be gone, and the others. A cut leaves many of these, behind
/// which nobody should wait who may have died just now.
#[derive(Debug, Clone, Default)]
pub(super) struct Doubts([VecDeque<Doubt>; 2]);

impl Doubts {
    /// The next, first of the urgent or of the others, about whom the same is believed as then.
    pub(super) fn pop(
        &mut self,
        urgent: bool,
        is_dead: impl Fn(NodeId) -> Option<bool>,
    ) -> Option<NodeId> {
        let [first, second] = &mut self.0;
        let order = if urgent {
            [first, second]
        } else {
            [second, first]
        };
        order.into_iter().find_map(|doubts| {
            std::iter::from_fn(|| doubts.pop_front())
                .find(|doubt| is_dead(doubt.node) == Some(doubt.dead))
                .map(|doubt| doubt.node)
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(VecDeque::is_empty)
    }

    fn put(&mut self, urgent: bool, doubt: Doubt) {
        let doubts = &mut self.0[usize::from(!urgent)];
        let full = doubts.len() >= DOUBTS_MAX
            || doubts.iter().filter(|one| one.by == doubt.by).count() >= DOUBTS_EACH_MAX;
        if !full && !doubts.iter().any(|one| one.node == doubt.node) {
            doubts.push_back(doubt);
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

impl Membership {
    /// How many pieces of news are passed on or remembered.
    pub fn rumours_held(&self) -> usize {
        self.rumours.len()
    }

    /// Takes one piece of news; `vouched` where facts of whom it is about came along.
    pub(super) fn hear(
        &mut self,
        now: Duration,
        from: NodeId,
        (told, vouched): (Told, bool),
        page: bool,
        outputs: &mut Vec<Output>,
    ) {
        let news = told.news;
        let age = if page { Age::OLD } else { told.age };
        let until = age.until(now);
        if news.node == self.me.node {
            self.hear_of_me(news);
            return;
        }
        let known = self.members.get(news.node).map(|one| one.news);
        if news.node == from {
            // Its own word, over a connection that proves who speaks, counts whatever others said.
            match known {
                Some(known) if known == news => {}
                _ if news.life == Life::Suspect => {}
                Some(_) => {
                    // Whom others have said to live they go on to tell of.
                    let said = (self.members.get_mut(from)).and_then(|one| one.said_alive.take());
                    let others_tell = said.is_some_and(|said| said >= news.incarnation);
                    let until = Age::NEW.until(now).filter(|_| !others_tell);
                    self.believe(now, news, until, outputs);
                }
                None => {
                    let until = Age::NEW.until(now);
                    if !self.enter(now, news, (Tie::Heard, until), outputs) {
                        self.pass_on(news, until);
                    }
                }
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
                let raised = news.life == Life::Alive && known.life == Life::Dead;
                if raised
                    && until.is_some()
                    && let Some(member) = self.members.get_mut(news.node)
                {
                    member.said_alive = member.said_alive.max(Some(news.incarnation));
                }
                self.doubt(news.node, from);
            }
            // It would not hear of that in time to deny it: it is asked.
            Some(known)
                if age > ILL_BELIEVED && known.life == Life::Alive && news.life != Life::Alive =>
            {
                let (node, by, dead) = (news.node, from, false);
                self.doubts.put(false, Doubt { node, by, dead });
            }
            Some(known) => self.hear_of(now, from, (known, news), until, outputs),
            None if self.is_told(&news) => {}
            // Anybody can invent ids: one peer's word of strangers counts at a bounded rate, beyond what strangers have signed.
            None if !vouched && !self.strangers.may_tell(now, from) => {}
            // A stranger's end, or what may become one, is passed on, not entered.
            None if page && news.life != Life::Alive => {}
            None if news.life != Life::Alive => self.pass_on(news, until),
            None => {
                if !self.enter(now, news, (Tie::Hearsay, until), outputs) {
                    self.pass_on(news, until);
                }
            }
        }
    }

    /// Whether this is told or remembered already, or outweighed by what is.
    fn is_told(&self, news: &News) -> bool {
        (self.rumours.of(news.node)).is_some_and(|told| !news.outweighs(told))
    }

    /// Passes on what is said of a stranger. That it lives is news only where something else was told of it: who knows a part
    /// of a network meets strangers all the time, and would have all others tell each other of each of them.
    fn pass_on(&mut self, news: News, until: Option<Duration>) {
        let told = self.rumours.of(news.node);
        let newer = told.is_some_and(|told| news.outweighs(told));
        if newer || (told.is_none() && news.life != Life::Alive) {
            self.tell(news, until);
        }
    }

    /// Has news told from now on, if they are to be.
    fn tell(&mut self, news: News, until: Option<Duration>) {
        if let Some(until) = until.filter(|until| self.now < *until) {
            self.rumours.put(news, until);
        }
    }

    /// Others' word of a member, heavier than what was known.
    fn hear_of(
        &mut self,
        now: Duration,
        from: NodeId,
        (known, news): (News, News),
        until: Option<Duration>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(member) = self.members.get_mut(news.node) else {
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
        self.believe(now, News { life, ..news }, until, outputs);
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
            let me = *me;
            self.tell(me, Age::NEW.until(self.now));
        }
    }

    /// Holds something for true of a member, and tells others until then: what stands in a page is no news. Enters it where it is
    /// not known.
    pub(super) fn believe(
        &mut self,
        now: Duration,
        news: News,
        until: Option<Duration>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(member) = self.members.get_mut(news.node) else {
            // Whom this node believes something of without having it in its table has just spoken.
            self.enter(now, news, (Tie::Heard, until), outputs);
            return;
        };
        let before = member.news.life;
        self.dead.remove(&(member.deadline, member.rank));
        self.suspicions.remove(&(member.deadline, news.node));
        member.news = news;
        member.until = until;
        if news.life == Life::Suspect {
            // Suspecting it again gives it no more time.
            if before != Life::Suspect {
                member.deadline = now + self.config.suspicion;
            }
            self.suspicions.insert((member.deadline, news.node));
        }
        if news.life == Life::Dead {
            if before != Life::Dead {
                member.deadline = now;
            }
            self.dead.insert((member.deadline, member.rank));
        }
        self.alive -= usize::from(before == Life::Alive);
        self.alive += usize::from(news.life == Life::Alive);
        if before != news.life {
            outputs.push(Output::Changed(news.node, news.life));
        }
        self.tell(news, until);
    }

    /// Tries it soon: somebody contradicts what is believed of it.
    pub(super) fn doubt(&mut self, node: NodeId, by: NodeId) {
        let dead = self.life(node) == Some(Life::Dead);
        self.doubts.put(!dead, Doubt { node, by, dead });
    }

    /// Takes facts, if they are newer and about a member.
    pub(super) fn learn(&mut self, stated: Stated, outputs: &mut Vec<Output>) {
        let Some(member) = self.members.get_mut(stated.node) else {
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

    /// A packet with no more than has to be said: who speaks, and to whom it thinks to be gone, that it thinks so.
    pub(super) fn bare(&self, body: Body, to: NodeId) -> Packet {
        // Most have room for a few more.
        let mut news = Vec::with_capacity(8);
        news.push(self.me.into());
        let believed = self.members.get(to).map(|member| member.news);
        let ill = believed.filter(|news| news.life != Life::Alive);
        news.extend(ill.map(Told::from));
        let facts = Vec::new();
        Packet { body, news, facts }
    }

    /// A packet with as much news and facts as it holds. `room_for` is put in by the caller.
    pub(super) fn packet(&mut self, body: Body, to: NodeId, room_for: Option<&Stated>) -> Packet {
        let mut packet = self.bare(body, to);
        let reserved = room_for.map_or(0, |own| own.bytes.len() + FACTS_HEAD_BYTES);
        let room = (self.config.packet_bytes).saturating_sub(packet.bytes() + reserved);
        (self.rumours).take(room / NEWS_BYTES, self.now, &mut packet.news);
        if !matches!(body, Body::Gossip) {
            self.add_facts(&mut packet, reserved);
        }
        packet
    }

    /// An answer: with news and others' facts as often as [`ANSWERS_PERIOD`] allows, since others decide how many there are.
    pub(super) fn answer(
        &mut self,
        now: Duration,
        body: Body,
        to: NodeId,
        own: Option<Stated>,
    ) -> Packet {
        let next = spend(self.answers_until, now, ANSWERS_PERIOD, ANSWERS_BURST);
        let mut packet = match next {
            Some(next) => {
                self.answers_until = next;
                self.packet(body, to, own.as_ref())
            }
            None => self.bare(body, to),
        };
        packet.facts.splice(0..0, own);
        packet
    }

    /// Its own facts for one who has them of this version, if they are newer, and as often as [`ASKED_FACTS_PERIOD`] allows.
    pub(super) fn facts_for(&mut self, now: Duration, version: u64) -> Option<Stated> {
        let newer = |own: &&Stated| own.version > version;
        let own = self.own_facts.as_ref().filter(newer)?;
        let until = self.asked_facts_until;
        self.asked_facts_until = spend(until, now, ASKED_FACTS_PERIOD, ASKED_FACTS_BURST)?;
        Some(own.clone())
    }

    fn add_facts(&mut self, packet: &mut Packet, reserved: usize) {
        let mut room = (self.config.packet_bytes).saturating_sub(packet.bytes() + reserved);
        let mut sent = Vec::new();
        for (count, node) in &self.fresh_facts {
            let facts = if *node == self.me.node {
                self.own_facts.as_ref()
            } else {
                self.members
                    .get(*node)
                    .and_then(|member| member.facts.as_ref())
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
        let others_most = if self.is_full() {
            FACTS_SENDS_IN_PART
        } else {
            FACTS_SENDS_MAX
        };
        for (count, node) in sent {
            self.fresh_facts.remove(&(count, node));
            let most = if node == self.me.node {
                FACTS_SENDS_MAX
            } else {
                others_most
            };
            if count + 1 < most {
                self.fresh_facts.insert((count + 1, node));
            }
            if node == self.me.node {
                self.own_facts_sent = count + 1;
            } else if let Some(member) = self.members.get_mut(node) {
                member.facts_sent = count + 1;
            }
        }
    }

    pub(super) fn send(&mut self, to: NodeId, body: Body, outputs: &mut Vec<Output>) {
        let packet = self.packet(body, to, None);
        outputs.push(Output::Send(to, packet));
    }

    /// A page of the table.
    pub(super) fn page(&self, number: u64, from: u64) -> Packet {
        let mut page = Packet {
            body: Body::Page { number, next: None },
            news: vec![self.me.into()],
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
            let (news, age) = (member.news, Age::OLD);
            page.news.push(Told { news, age });
            page.facts.extend(facts.cloned());
        }
        page
    }
}
