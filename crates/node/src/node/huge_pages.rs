//! Whether there are huge pages for one more machine.
//!
//! Firecracker takes pages when its guest first touches them, and is killed where there are none left. So what machines that
//! run were promised and have not touched yet is not free, though the kernel says so.

use crate::fault::{Answer, Fault};
use crate::machine::Record;
use std::collections::HashMap;
use std::sync::Arc;
use vistara_host::hugepages;
use vistara_model::{Bytes, MachineId, MachineState};

/// The huge pages that a machine may come to take, where it has any: one that is tried as a unikernel may be run again in a
/// larger guest.
pub(super) fn wanted(record: &Record) -> Option<Bytes> {
    let again = record.linux_memory.filter(|_| record.provisional);
    let memory = again.map_or(record.spec.memory, |again| again.max(record.spec.memory));
    record.spec.huge_pages.then_some(memory)
}

/// What machines have touched of what they were promised. Blocks on the kernel's files.
pub(super) fn touched(records: &[Arc<Record>]) -> HashMap<MachineId, u64> {
    let huge = records.iter().filter(|record| runs_on_them(record));
    huge.filter_map(|record| {
        let vm = record.vm.as_ref()?;
        Some((record.id.clone(), hugepages::touched(vm.pid)))
    })
    .collect()
}

fn runs_on_them(record: &Record) -> bool {
    record.spec.huge_pages && record.state != MachineState::Ended
}

/// What a machine that is about to be may come to take.
pub(super) struct Wish {
    pub(super) memory: Bytes,
    /// What [`touched`] said of the others.
    pub(super) touched: HashMap<MachineId, u64>,
}

impl Wish {
    /// Refuses what there are no pages for, beside these machines and what those that are being made were promised. What they have
    /// touched was looked at before, and the pool is asked after: what is touched meanwhile counts twice, and never not at all.
    pub(super) fn admit(&self, records: &[Arc<Record>], promised: Bytes) -> Answer<()> {
        let untouched = records.iter().filter_map(|record| {
            let wanted = wanted(record).filter(|_| runs_on_them(record))?;
            let touched = self.touched.get(&record.id).copied().unwrap_or(0);
            Some(wanted.0.saturating_sub(touched))
        });
        let promised = untouched.fold(promised.0, u64::saturating_add);
        let pool = hugepages::pool().map_err(|error| Fault::internal(&error))?;
        judge(self.memory, pool, Bytes(promised))
    }
}

fn judge(memory: Bytes, pool: hugepages::Pool, promised: Bytes) -> Answer<()> {
    let pages = |bytes: Bytes| bytes.0.div_ceil(hugepages::PAGE);
    let wanted = pages(memory);
    let free = pool.free.saturating_sub(pages(promised));
    if wanted <= free {
        return Ok(());
    }
    let enough = pool.total + (wanted + pages(promised)).saturating_sub(pool.free);
    Err(Fault::conflict(format!(
        "{memory} of huge pages are {wanted} of 2 MiB, and this host has {free} free of {} set aside",
        pool.total
    ))
    .hint(format!(
        "set more aside as root, `sysctl vm.nr_hugepages={enough}`, or leave out --huge-pages"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_host::hugepages::Pool;

    #[test]
    fn what_was_promised_is_not_free() {
        let pool = Pool {
            total: 100,
            free: 64,
        };
        assert!(judge(Bytes::mib(128), pool, Bytes(0)).is_ok());
        let refused = judge(Bytes::mib(128), pool, Bytes::mib(1)).unwrap_err();
        let text = format!("{refused:?}");
        assert!(text.contains("63 free of 100"), "{text}");
        assert!(text.contains("vm.nr_hugepages=101"), "{text}");
        // Also where more was promised than is free.
        let short = Pool {
            total: 100,
            free: 10,
        };
        let refused = judge(Bytes::mib(40), short, Bytes::mib(100)).unwrap_err();
        let text = format!("{refused:?}");
        assert!(text.contains("vm.nr_hugepages=160"), "{text}");
    }
}
