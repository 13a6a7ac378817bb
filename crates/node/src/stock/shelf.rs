//! What is in stock, and what was asked for.

use super::Pattern;
use super::make::discard;
use crate::node::Node;
use crate::templates::Template;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use vistara_control::{Arrivals, Want, allot};
use vistara_guest_client::{Agent, Welcome};
use vistara_machine::Vm;
use vistara_model::{Bytes, MachineId};

/// Templates of which it is remembered when they were used; each takes some KiB. Beyond them the one used longest ago is
/// forgotten.
const KINDS_MAX: usize = 64;
/// What a machine is taken to cost before one was made: a fork's own pages and its monitor's, under emulation.
const EACH_GUESSED: Bytes = Bytes::mib(48);
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

    /// Its monitor's machine.
    pub(crate) fn vm(&self) -> Option<Arc<dyn Vm>> {
        self.ready.as_ref().map(|ready| Arc::clone(&ready.vm))
    }

    fn is_stale(&self) -> bool {
        (self.ready.as_ref()).is_none_or(|ready| ready.template.is_retired())
    }

    fn has(&self, id: &MachineId) -> bool {
        self.ready.as_ref().is_some_and(|ready| ready.id == *id)
    }

    /// Ends it, and waits until it is gone.
    pub(crate) async fn end(mut self) {
        if let (Some(ready), Some(node)) = (self.ready.take(), self.node.upgrade()) {
            discard(&node, ready).await;
        }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        if let (Some(ready), Some(node)) = (self.ready.take(), self.node.upgrade())
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { discard(&node, ready).await });
        }
    }
}

/// One template's part of the stock.
struct Kind {
    arrivals: Arrivals,
    pattern: Pattern,
    shelf: Vec<Warm>,
    each: Bytes,
    failed: Option<Instant>,
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
    /// A machine to be made, of this key and pattern.
    pub(super) make: Option<(String, Pattern)>,
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
    /// Whether one is being made now.
    pub(super) making: AtomicBool,
}

impl Stock {
    pub(crate) fn new(budget: Bytes) -> Stock {
        Stock {
            zero: Instant::now(),
            budget,
            state: Mutex::default(),
            bell: Notify::new(),
            making: AtomicBool::new(false),
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

    /// A machine of this kind was asked for. What is given is one of the stock.
    pub(crate) fn take(&self, key: &str, pattern: Pattern) -> Option<Warm> {
        let now = self.zero.elapsed();
        let mut state = self.state();
        if state.closed {
            return None;
        }
        if !state.kinds.contains_key(key) && state.kinds.len() >= KINDS_MAX {
            let oldest = state
                .kinds
                .iter()
                .min_by_key(|(_, kind)| kind.arrivals.last());
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                state.kinds.remove(&oldest);
            }
        }
        let kind = state.kinds.entry(key.to_owned()).or_insert_with(|| Kind {
            arrivals: Arrivals::default(),
            pattern: pattern.clone(),
            shelf: Vec::new(),
            each: EACH_GUESSED,
            failed: None,
        });
        kind.arrivals.arrived(now);
        kind.pattern = pattern;
        // The oldest first: it has been still longest, and none should grow old.
        let at = kind.shelf.iter().position(|warm| !warm.is_stale());
        let warm = at.map(|at| kind.shelf.remove(at));
        drop(state);
        self.bell.notify_one();
        warm
    }

    /// Puts back what was taken and not needed.
    pub(crate) fn put_back(&self, key: &str, warm: Warm) {
        let mut state = self.state();
        if !state.closed
            && let Some(kind) = state.kinds.get_mut(key)
        {
            kind.shelf.insert(0, warm);
        }
    }

    /// Adds a machine that was made, and what it takes of the host's memory.
    pub(super) fn add(&self, key: &str, warm: Warm, each: Bytes) {
        let mut state = self.state();
        if !state.closed
            && let Some(kind) = state.kinds.get_mut(key)
        {
            kind.each = each;
            kind.shelf.push(warm);
        }
    }

    /// None of this kind can be made now.
    pub(super) fn failed(&self, key: &str) {
        if let Some(kind) = self.state().kinds.get_mut(key) {
            kind.failed = Some(Instant::now());
        }
    }

    /// The monitor of a machine is gone, for whatever reason: where it is still here nobody gets it.
    pub(crate) fn lost(&self, id: &MachineId) {
        let mut state = self.state();
        for kind in state.kinds.values_mut() {
            if let Some(at) = kind.shelf.iter().position(|warm| warm.has(id)) {
                tracing::warn!(machine = %id, "a machine of the stock has ended by itself");
                drop(kind.shelf.remove(at));
                kind.failed = Some(Instant::now());
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

    pub(super) fn quiet_for(&self) -> Duration {
        let asked = self.state().asked;
        asked.map_or(Duration::MAX, |asked| asked.elapsed())
    }

    /// Everything that is here; nothing is kept of it, and of what comes while it is being ended if `for_good`.
    pub(crate) fn empty(&self, for_good: bool) -> Vec<Warm> {
        let mut state = self.state();
        state.closed |= for_good;
        let kinds = state.kinds.values_mut();
        kinds.flat_map(|kind| kind.shelf.drain(..)).collect()
    }

    /// What is too much, or of a template that was removed; and what is missing most, where more may be made.
    pub(super) fn plan(&self, fill: bool) -> Plan {
        let now = self.zero.elapsed();
        let mut state = self.state();
        let kinds = &mut state.kinds;
        let mut surplus = Vec::new();
        for kind in kinds.values_mut() {
            surplus.extend(kind.shelf.extract_if(.., |warm| warm.is_stale()));
        }
        let wants = kinds.iter().map(|(key, kind)| Want {
            key: key.clone(),
            count: kind.arrivals.wanted(now),
            last: kind.arrivals.last(),
            each: kind.each,
        });
        let shares: HashMap<String, u32> =
            allot(wants.collect(), self.budget).into_iter().collect();
        let share = |key: &str| shares.get(key).map_or(0, |share| *share as usize);
        for (key, kind) in kinds.iter_mut() {
            let kept = share(key).min(kind.shelf.len());
            surplus.extend(kind.shelf.drain(kept..));
        }
        let missing = kinds.iter().filter(|(key, kind)| {
            let retries = (kind.failed).is_none_or(|failed| failed.elapsed() > RETRY_AFTER);
            retries && kind.shelf.len() < share(key)
        });
        let most = missing.max_by_key(|(key, kind)| share(key) - kind.shelf.len());
        let make = most
            .filter(|_| fill)
            .map(|(key, kind)| (key.clone(), kind.pattern.clone()));
        let busy = !shares.is_empty() || kinds.values().any(|kind| !kind.shelf.is_empty());
        Plan {
            surplus,
            make: make.filter(|_| !state.closed),
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

    pub(crate) fn is_making(&self) -> bool {
        self.making.load(Ordering::Acquire)
    }
}
