//! What is in stock, and what was asked for.

use super::Pattern;
use super::make::discard;
use crate::node::Node;
use crate::templates::Template;
use futures_util::FutureExt;
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vistara_control::{Arrivals, Want, allot};
use vistara_guest_client::{Agent, Welcome};
use vistara_machine::Vm;
use vistara_model::{Bytes, MachineId, NodeId};

/// Templates of which it is remembered when they were used; each takes some KiB. Beyond them the one used longest ago is
/// forgotten.
const KINDS_MAX: usize = 64;
/// Those of them that one peer alone asks for: sizes cost it nothing, and others' kinds must not go for them.
const KINDS_OF_PEER_MAX: usize = 4;
/// What of the budget may go into kinds that peers alone ask for, and only what the host's own leave: a part of so many.
const PEERS_PART: u64 = 2;
/// What a machine is taken to cost before one was made: a fork's own pages and its monitor's, under emulation.
const EACH_GUESSED: Bytes = Bytes::mib(48);
/// And at least: a machine that takes nothing is not measured yet, or was measured at its end.
const EACH_MIN: Bytes = Bytes::mib(4);
/// How long a kind is left out whose template somebody is at work on.
const BUSY_FOR: Duration = Duration::from_secs(1);
/// How long none of a template is made after one could not be.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// A machine that is ready and held still. One that is dropped is ended.
pub(crate) struct Warm {
    ready: Option<Ready>,
    node: Weak<Node>,
}

/// What a machine of the stock is.
pub(crate) struct Ready {
    pub(crate) id: MachineId,
    pub(crate) slot: u32,
    pub(crate) dir: PathBuf,
    pub(crate) vm: Arc<dyn Vm>,
    /// The session with its agent, and what that said at its beginning.
    pub(crate) agent: Agent,
    pub(crate) welcome: Welcome,
    pub(crate) template: Arc<Template>,
}

impl Warm {
    pub(super) fn new(node: &Arc<Node>, ready: Ready) -> Warm {
        Warm {
            ready: Some(ready),
            node: Arc::downgrade(node),
        }
    }

    /// Its id and its slot.
    pub(crate) fn identity(&self) -> Option<(MachineId, u32)> {
        self.ready
            .as_ref()
            .map(|ready| (ready.id.clone(), ready.slot))
    }

    /// The machine is somebody's from here on.
    pub(crate) fn give(mut self) -> Option<Ready> {
        self.ready.take()
    }

    /// What its end is noticed by.
    pub(super) fn watched(&self) -> Option<(MachineId, Arc<dyn Vm>)> {
        let ready = self.ready.as_ref()?;
        Some((ready.id.clone(), Arc::clone(&ready.vm)))
    }

    /// Whether nobody may have it: its template was removed, or its monitor is gone.
    fn is_stale(&self) -> bool {
        (self.ready.as_ref()).is_none_or(|ready| {
            ready.template.is_retired() || ready.vm.wait().now_or_never().is_some()
        })
    }

    fn has(&self, id: &MachineId) -> bool {
        self.ready.as_ref().is_some_and(|ready| ready.id == *id)
    }

    /// Ends it, and waits until it is gone. It ends also where nobody waits any more.
    pub(crate) async fn end(mut self) {
        if let Some(gone) = self.begin_end() {
            // A node that is leaving may not wait for it.
            let _ = gone.await;
        }
    }

    fn begin_end(&mut self) -> Option<oneshot::Receiver<()>> {
        let ready = self.ready.take()?;
        let node = self.node.upgrade()?;
        let (done, gone) = oneshot::channel();
        node.stock().run(async move {
            discard(&node, ready).await;
            // Few wait for it.
            let _ = done.send(());
        });
        Some(gone)
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        drop(self.begin_end());
    }
}

/// One template's part of the stock.
struct Kind {
    arrivals: Arrivals,
    pattern: Pattern,
    shelf: Vec<Warm>,
    each: Bytes,
    /// Who asks for it, where that is one peer or several alone: the last of them.
    peer: Option<NodeId>,
    left_out: Option<LeftOut>,
}

/// Why none of a kind is made now, and nothing of the budget is its.
enum LeftOut {
    /// Its template is not in memory: who asks for a machine of it next has it read or made.
    UntilAsked,
    /// It could not be made.
    Until(Instant),
}

impl Kind {
    fn is_left_out(&self) -> bool {
        match self.left_out {
            Some(LeftOut::UntilAsked) => true,
            Some(LeftOut::Until(then)) => Instant::now() < then,
            None => false,
        }
    }
}

#[derive(Default)]
struct State {
    kinds: HashMap<String, Kind>,
    /// When somebody asked for a machine last, of whatever kind.
    asked: Option<Instant>,
    /// Whether nothing is kept any more: the node leaves.
    closed: bool,
}

/// What the keeper is to do next.
pub(super) struct Plan {
    /// Machines that are too many.
    pub(super) surplus: Vec<Warm>,
    /// A machine that is missing, of this key and pattern.
    pub(super) missing: Option<(String, Pattern)>,
    /// Whether there is anything to look after.
    pub(super) busy: bool,
}

/// All of a node's stock.
pub(crate) struct Stock {
    zero: Instant,
    budget: Bytes,
    state: Mutex<State>,
    /// Rung when somebody has asked for a machine, or the stock is to be gone over for another reason.
    pub(super) bell: Notify,
    /// Rung for good when the node leaves.
    pub(super) closing: CancellationToken,
    /// Held by who empties it for a request: others who want its memory wait for the same.
    pub(crate) emptying: tokio::sync::Mutex<()>,
    /// Everything that is done for it: its keeper, and every machine's end. The node awaits it when it leaves.
    tasks: Mutex<JoinSet<()>>,
}

impl Stock {
    pub(crate) fn new(budget: Bytes) -> Stock {
        Stock {
            zero: Instant::now(),
            budget,
            state: Mutex::default(),
            bell: Notify::new(),
            closing: CancellationToken::new(),
            emptying: tokio::sync::Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does this, and has the node wait for it when it leaves. Without a runtime there is nobody to do it.
    pub(crate) fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let mut tasks = self.tasks();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(work, &runtime);
    }

    /// Waits until all that was begun is done.
    pub(crate) async fn settled(&self) {
        loop {
            let mut tasks = std::mem::take(&mut *self.tasks());
            if tasks.is_empty() {
                return;
            }
            while tasks.join_next().await.is_some() {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is to be any stock here.
    pub(crate) fn is_kept(&self) -> bool {
        self.budget > Bytes(0)
    }

    /// Somebody asks for a machine, of whatever kind: nothing is made in front of it.
    pub(crate) fn somebody_asks(&self) {
        self.state().asked = Some(Instant::now());
    }

    /// A machine of this kind was asked for, by this peer or on this host. What is given is one of the stock.
    pub(crate) fn take(&self, key: &str, pattern: Pattern, peer: Option<NodeId>) -> Option<Warm> {
        let now = self.zero.elapsed();
        let mut state = self.state();
        if state.closed {
            return None;
        }
        if !state.kinds.contains_key(key) {
            state.make_room(peer);
        }
        let kind = state.kinds.entry(key.to_owned()).or_insert_with(|| Kind {
            arrivals: Arrivals::default(),
            pattern: pattern.clone(),
            shelf: Vec::new(),
            each: EACH_GUESSED,
            peer,
            left_out: None,
        });
        kind.arrivals.arrived(now);
        kind.pattern = pattern;
        // What somebody on this host asks for is the host's own.
        kind.peer = kind.peer.and(peer);
        if let Some(LeftOut::UntilAsked) = kind.left_out {
            kind.left_out = None;
        }
        // The oldest first: it has been still longest, and none should grow old.
        let at = kind.shelf.iter().position(|warm| !warm.is_stale());
        let warm = at.map(|at| kind.shelf.remove(at));
        drop(state);
        self.bell.notify_one();
        warm
    }

    /// Adds a machine that was made, and what it takes of the host's memory. One that nobody may have is ended.
    pub(super) fn add(&self, key: &str, warm: Warm, each: Bytes) {
        let mut state = self.state();
        if !state.closed
            && !warm.is_stale()
            && let Some(kind) = state.kinds.get_mut(key)
        {
            kind.each = each.max(EACH_MIN);
            kind.shelf.push(warm);
        }
    }

    fn leave_out(&self, key: &str, left_out: LeftOut) {
        if let Some(kind) = self.state().kinds.get_mut(key) {
            kind.left_out = Some(left_out);
        }
    }

    /// None of this kind can be made now.
    pub(super) fn failed(&self, key: &str) {
        self.leave_out(key, LeftOut::Until(Instant::now() + RETRY_AFTER));
    }

    /// Somebody is at work on the template of this kind.
    pub(super) fn template_busy(&self, key: &str) {
        self.leave_out(key, LeftOut::Until(Instant::now() + BUSY_FOR));
    }

    /// The template of this kind is not in memory.
    pub(super) fn template_absent(&self, key: &str) {
        self.leave_out(key, LeftOut::UntilAsked);
    }

    /// The monitor of a machine is gone, for whatever reason: where it is still here nobody gets it.
    pub(crate) fn lost(&self, id: &MachineId) {
        let mut state = self.state();
        for kind in state.kinds.values_mut() {
            if let Some(at) = kind.shelf.iter().position(|warm| warm.has(id)) {
                tracing::warn!(machine = %id, "a machine of the stock has ended by itself");
                drop(kind.shelf.remove(at));
                kind.left_out = Some(LeftOut::Until(Instant::now() + RETRY_AFTER));
                return;
            }
        }
    }

    /// How many there are of a template.
    pub(crate) fn count_of(&self, key: &str) -> u32 {
        let state = self.state();
        let count = state.kinds.get(key).map_or(0, |kind| kind.shelf.len());
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        let state = self.state();
        state
            .kinds
            .values()
            .map(|kind| kind.shelf.len() as u64)
            .sum()
    }

    /// What the host would have back if it were emptied.
    pub(crate) fn memory(&self) -> Bytes {
        let state = self.state();
        let kinds = state.kinds.values();
        let held = kinds.map(|kind| kind.each.0.saturating_mul(kind.shelf.len() as u64));
        Bytes(held.fold(0, u64::saturating_add))
    }

    pub(super) fn quiet_for(&self) -> Duration {
        let asked = self.state().asked;
        asked.map_or(Duration::MAX, |asked| asked.elapsed())
    }

    /// Everything that is here; nothing is kept of it, and of what comes while it is being ended if `for_good`.
    pub(crate) fn empty(&self, for_good: bool) -> Vec<Warm> {
        let mut state = self.state();
        state.closed |= for_good;
        if for_good {
            self.closing.cancel();
        }
        let kinds = state.kinds.values_mut();
        kinds.flat_map(|kind| kind.shelf.drain(..)).collect()
    }

    /// What is too much, or of a template that was removed; and what is missing most.
    pub(super) fn plan(&self) -> Plan {
        let now = self.zero.elapsed();
        let mut state = self.state();
        let kinds = &mut state.kinds;
        let mut surplus = Vec::new();
        for kind in kinds.values_mut() {
            surplus.extend(kind.shelf.extract_if(.., |warm| warm.is_stale()));
        }
        let shares = shares(kinds, now, self.budget);
        let share = |key: &str| shares.get(key).map_or(0, |share| *share as usize);
        for (key, kind) in kinds.iter_mut() {
            let kept = share(key).min(kind.shelf.len());
            surplus.extend(kind.shelf.drain(kept..));
        }
        let missing = kinds
            .iter()
            .filter(|(key, kind)| !kind.is_left_out() && kind.shelf.len() < share(key));
        let most = missing.max_by_key(|(key, kind)| share(key) - kind.shelf.len());
        let missing = most.map(|(key, kind)| (key.clone(), kind.pattern.clone()));
        let waits = |kind: &Kind| {
            // It is tried again when its time is over.
            matches!(kind.left_out, Some(LeftOut::Until(_))) && kind.arrivals.wanted(now) > 0
        };
        let busy = !shares.is_empty()
            || (kinds.values()).any(|kind| !kind.shelf.is_empty() || waits(kind));
        Plan {
            surplus,
            missing: missing.filter(|_| !state.closed),
            busy: busy && !state.closed,
        }
    }

    /// Has the stock gone over at once.
    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }
}

impl State {
    /// Forgets a kind where there would be too many with one more of this peer's, or of the host's own: where a peer has too
    /// many, one of its own; else one of the peers' before one of the host's.
    fn make_room(&mut self, peer: Option<NodeId>) {
        let of_peer = |kind: &Kind| peer.is_some() && kind.peer == peer;
        let too_many = self.kinds.values().filter(|kind| of_peer(kind)).count();
        let oldest = if too_many >= KINDS_OF_PEER_MAX {
            let own = self.kinds.iter().filter(|(_, kind)| of_peer(kind));
            own.min_by_key(|(_, kind)| kind.arrivals.last())
        } else if self.kinds.len() >= KINDS_MAX {
            let all = self.kinds.iter();
            all.min_by_key(|(_, kind)| (kind.peer.is_none(), kind.arrivals.last()))
        } else {
            None
        };
        if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
            self.kinds.remove(&oldest);
        }
    }
}

/// How many of each kind there should be: the host's own first, and what peers alone ask for of what those leave.
fn shares(kinds: &HashMap<String, Kind>, now: Duration, budget: Bytes) -> HashMap<String, u32> {
    let wants = |peers: bool| {
        // What cannot be made now takes nothing from what can; what is there of it stays.
        let kinds = kinds.iter().filter(|(_, kind)| {
            kind.peer.is_some() == peers && (!kind.is_left_out() || !kind.shelf.is_empty())
        });
        let wants = kinds.map(|(key, kind)| {
            let wanted = kind.arrivals.wanted(now);
            let there = u32::try_from(kind.shelf.len()).unwrap_or(u32::MAX);
            Want {
                key: key.clone(),
                count: if kind.is_left_out() {
                    wanted.min(there)
                } else {
                    wanted
                },
                last: kind.arrivals.last(),
                each: kind.each,
            }
        });
        wants.collect::<Vec<_>>()
    };
    let own = allot(wants(false), budget);
    let takes = |(key, count): &(String, u32)| {
        let each = kinds.get(key).map_or(0, |kind| kind.each.0);
        each.saturating_mul(u64::from(*count))
    };
    let taken = own.iter().map(takes).fold(0, u64::saturating_add);
    let left = budget.0.saturating_sub(taken).min(budget.0 / PEERS_PART);
    let peers = allot(wants(true), Bytes(left));
    own.into_iter().chain(peers).collect()
}
