//! The stock as the node's other parts see it: what a request takes from it, and when it must go.

use super::{Decision, Node};
use crate::fault::Answer;
use crate::machine::Record;
use crate::stock::{Pattern, Stock, Warm, keep, suits};
use crate::templates::{Blueprint, Shape};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vistara_model::{Bytes, HostFacts};

/// How long the stock may take to be ended when the node leaves; what is left then is the next node's to end.
const END_BOUND: Duration = Duration::from_secs(2);

/// What a request found in stock.
pub(super) struct Taken {
    pub(super) key: String,
    pub(super) warm: Warm,
}

impl Node {
    pub(crate) fn stock(&self) -> Arc<Stock> {
        Arc::clone(&self.stock)
    }

    /// Begins to keep a stock.
    pub(super) fn begin_stock(self: &Arc<Self>) {
        if self.stock.is_kept() {
            tokio::spawn(keep(Arc::downgrade(self)));
        }
    }

    /// A machine of the stock that stands in for the one that was asked for.
    pub(super) async fn from_stock(&self, record: &Record) -> Option<Taken> {
        if !self.stock.is_kept() {
            return None;
        }
        self.stock.somebody_asks();
        let pattern = Pattern::of(record)?;
        let vmm = self.mechanisms.vmm(record.backend.vmm)?;
        vmm.capabilities().capture.as_ref().ok()?;
        // What is wrong here is told when the machine is prepared.
        let (_, boot) = self.planned_boot(&record.spec).await.ok()??;
        let shape = Shape {
            image_id: &record.image_id,
            spec: &record.spec,
            kernel: record.kernel.as_deref(),
            accelerator: record.backend.accelerator,
            argv: &record.argv,
            env: &record.env,
        };
        // The key does not depend on where the root disk lies.
        let key = Blueprint::new(shape, self.parts(PathBuf::new(), boot, vmm)).key();
        let warm = self.stock.take(&key, pattern)?;
        self.templates.was_used(&key);
        Some(Taken { key, warm })
    }

    /// Whether a machine has room here, once the stock is gone if it has to: what may be of use goes before anybody is refused.
    pub(super) async fn admit_before_stock(
        &self,
        decision: &Decision,
        host: &HostFacts,
    ) -> Answer<()> {
        let Err(fault) = self.admit(decision, host) else {
            return Ok(());
        };
        let unbounded = HostFacts {
            memory_available: Bytes(u64::MAX),
            ..host.clone()
        };
        let for_want_of_memory = self.admit(decision, &unbounded).is_ok();
        if for_want_of_memory && self.empty_stock().await {
            return self.admit(decision, &self.facts());
        }
        Err(fault)
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
    pub(crate) fn watch_warm(&self, warm: &Warm) {
        let (Some((id, _)), Some(vm)) = (warm.identity(), warm.vm()) else {
            return;
        };
        let stock = Arc::downgrade(&self.stock);
        tokio::spawn(async move {
            vm.wait().await;
            if let Some(stock) = stock.upgrade() {
                stock.lost(&id);
            }
        });
    }

    /// Ends all of the stock, for whoever needs its memory; says whether there was any.
    pub(crate) async fn empty_stock(&self) -> bool {
        let all = self.stock.empty(false);
        let any = !all.is_empty();
        futures_util::future::join_all(all.into_iter().map(Warm::end)).await;
        any
    }

    /// Ends all of the stock before the node leaves, and makes no more.
    pub(crate) async fn close_stock(&self) {
        let all = self.stock.empty(true);
        self.stock.wake();
        let ended = async {
            futures_util::future::join_all(all.into_iter().map(Warm::end)).await;
            while self.stock.is_making() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(END_BOUND, ended).await.is_err() {
            tracing::warn!("the stock was not ended in time; the next node ends it");
        }
    }
}
