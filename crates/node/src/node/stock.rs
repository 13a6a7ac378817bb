//! The stock as the node's other parts see it: what a request takes from it, and when it must go.

use super::{Decision, Node};
use crate::fault::Answer;
use crate::machine::Record;
use crate::stock::{Pattern, Stock, Warm, keep, suits};
use crate::templates::Shape;
use std::sync::Arc;
use std::time::Duration;
use vistara_machine::Vm;
use vistara_model::{Bytes, HostFacts, MachineId, MachineSpec, NodeId, VmmKind};

/// How long the stock may take to be ended when the node leaves; what is left then is the next node's to end.
const END_BOUND: Duration = Duration::from_secs(2);

/// What of the stock could meet a request.
pub(super) struct Wish {
    key: String,
    pattern: Pattern,
    peer: Option<NodeId>,
}

impl Node {
    pub(crate) fn stock(&self) -> Arc<Stock> {
        Arc::clone(&self.stock)
    }

    /// Begins to keep a stock.
    pub(super) fn begin_stock(self: &Arc<Self>) {
        if self.stock.is_kept() {
            self.stock.run(keep(Arc::downgrade(self)));
        }
    }

    /// What could stand in for the machine that was asked for. It is not counted yet: the request may be refused.
    pub(super) async fn wish(&self, record: &Record) -> Option<Wish> {
        if !self.stock.is_kept() {
            return None;
        }
        self.stock.somebody_asks();
        let pattern = Pattern::of(record)?;
        let vmm = self.mechanisms.vmm(record.backend.vmm)?;
        vmm.capabilities().capture.as_ref().ok()?;
        // What is wrong here is told when the machine is prepared.
        let boot = self.planned_boot(record.kernel.clone()).await.ok()??;
        let key = self.template_key(Shape::of(record), boot, vmm);
        let peer = record.owner.as_ref().map(|owner| owner.node);
        Some(Wish { key, pattern, peer })
    }

    /// A machine of the stock for a request that is accepted, which counts from here on.
    pub(super) fn take_from_stock(&self, wish: Wish) -> Option<Warm> {
        let warm = self.stock.take(&wish.key, wish.pattern, wish.peer)?;
        self.templates.was_used(&wish.key);
        Some(warm)
    }

    /// Whether a machine has room here, once the stock is gone if it has to.
    pub(super) async fn admit_before_stock(
        &self,
        decision: &Decision,
        host: &HostFacts,
    ) -> Answer<()> {
        let vmm = decision.choice.backend.vmm;
        self.admit_size_before_stock(&decision.spec, decision.memory_min, vmm, host)
            .await
    }

    /// As [`Node::admit_before_stock`]: what may be of use goes before anybody is refused, and stays where it would not help.
    pub(super) async fn admit_size_before_stock(
        &self,
        spec: &MachineSpec,
        memory_min: Bytes,
        vmm: VmmKind,
        host: &HostFacts,
    ) -> Answer<()> {
        let Err(fault) = self.admit_size(spec, memory_min, vmm, host) else {
            return Ok(());
        };
        if !self.stock.is_kept() {
            return Err(fault);
        }
        // One after another: whoever comes while it is being emptied waits for the same memory.
        let _alone = self.stock.emptying.lock().await;
        let host = self.facts();
        let Err(fault) = self.admit_size(spec, memory_min, vmm, &host) else {
            return Ok(());
        };
        let held = self.stock.memory();
        let without = HostFacts {
            memory_available: Bytes(host.memory_available.0.saturating_add(held.0)),
            ..host
        };
        if held == Bytes(0) || self.admit_size(spec, memory_min, vmm, &without).is_err() {
            return Err(fault);
        }
        let all = self.stock.empty(false);
        futures_util::future::join_all(all.into_iter().map(Warm::end)).await;
        self.admit_size(spec, memory_min, vmm, &self.facts())
    }

    /// Whether a request like this one would get a machine of the stock of this template now.
    pub(super) fn is_in_stock(&self, decision: &Decision, key: &str) -> bool {
        let suits = suits(&decision.spec, decision.choice.backend.payload);
        suits && self.stock.count_of(key) > 0
    }

    /// A number from which a machine's user follows, for one that has no record yet.
    pub(crate) fn reserve_slot(&self) -> u32 {
        let mut machines = self.machines();
        let slot = machines.free_slot();
        machines.slots.insert(slot);
        slot
    }

    pub(crate) fn release_slot(&self, slot: u32) {
        self.machines().slots.remove(&slot);
    }

    /// Notices when a machine of the stock ends by itself.
    pub(crate) fn watch_warm(&self, id: MachineId, vm: Arc<dyn Vm>) {
        let stock = Arc::downgrade(&self.stock);
        // It ends with its machine, which a user may keep: nobody can wait for that.
        tokio::spawn(async move {
            vm.wait().await;
            if let Some(stock) = stock.upgrade() {
                stock.lost(&id);
            }
        });
    }

    /// Ends all of the stock before the node leaves, what is being made and ended now included, and makes no more.
    pub(crate) async fn close_stock(&self) {
        // Each ends by itself.
        drop(self.stock.empty(true));
        self.stock.wake();
        if tokio::time::timeout(END_BOUND, self.stock.settled())
            .await
            .is_err()
        {
            tracing::warn!("the stock was not ended in time; the next node ends it");
        }
    }
}
