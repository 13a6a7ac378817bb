//! Admission: whether this host can hold one more machine of the size asked for.

use vistara_model::{Bytes, Cpus};

/// Least memory of a Linux guest: below it Debian's kernel does not reach the agent.
pub const MEMORY_MIN: Bytes = Bytes::mib(80);
/// Least writable layer: an ext4 file system of less has no room for files.
pub const DISK_MIN: Bytes = Bytes::mib(16);
/// Largest writable layer: sparse, but its tables are not free.
pub const DISK_MAX: Bytes = Bytes::gib(16 << 10);
/// Memory that is left to the host whatever is asked.
const HOST_RESERVE: Bytes = Bytes::mib(128);
/// What a monitor needs beside its guest's memory.
const VMM_OVERHEAD: Bytes = Bytes::mib(32);

/// What a machine wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// CPUs.
    pub cpus: Cpus,
    /// Guest memory.
    pub memory: Bytes,
    /// The least with which it boots: [`MEMORY_MIN`] for a Linux guest; for a unikernel, what its disk's maker says.
    pub memory_min: Bytes,
    /// Writable layer.
    pub disk: Bytes,
    /// Whether the memory is of huge pages, which somebody else counts.
    pub huge_pages: bool,
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Processors online.
    pub cpus: u32,
    /// Most virtual CPUs the monitor gives one machine.
    pub vcpus_max: u32,
    /// Memory that could be given away now.
    pub memory_available: Bytes,
}

/// Why a machine is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// Too little memory to boot.
    #[error("{asked} of memory is too little for this guest, which needs {needed}; raise --memory")]
    MemoryTooSmall {
        /// What was asked for.
        asked: Bytes,
        /// What it needs.
        needed: Bytes,
    },
    /// More memory than is free.
    #[error(
        "{asked} of memory is more than this host can give now ({available}); lower --memory or stop other machines"
    )]
    MemoryShort {
        /// What was asked for.
        asked: Bytes,
        /// What could be given.
        available: Bytes,
    },
    /// More CPUs than there are.
    #[error("{asked} CPUs are more than this host has ({present}); lower --cpus")]
    CpusShort {
        /// What was asked for.
        asked: Cpus,
        /// What there is.
        present: u32,
    },
    /// A writable layer of an impossible size.
    #[error("a writable layer of {asked} cannot be made: --disk takes {DISK_MIN} to {DISK_MAX}")]
    DiskSize {
        /// What was asked for.
        asked: Bytes,
    },
}

/// Admits a machine, or says why not.
///
/// # Errors
/// [`AdmissionError`]: the first of its demands that cannot be met.
pub fn admit(demand: Demand, capacity: Capacity) -> Result<(), AdmissionError> {
    if demand.memory < demand.memory_min {
        return Err(AdmissionError::MemoryTooSmall {
            asked: demand.memory,
            needed: demand.memory_min,
        });
    }
    let available = capacity
        .memory_available
        .0
        .saturating_sub(HOST_RESERVE.0 + VMM_OVERHEAD.0);
    // What is set aside as huge pages is not among what is available, and is counted by itself.
    let taken = match demand.huge_pages {
        true => Bytes(0),
        false => demand.memory,
    };
    if taken.0 > available || available == 0 {
        return Err(AdmissionError::MemoryShort {
            asked: demand.memory,
            available: Bytes(available),
        });
    }
    let present = capacity.cpus.min(capacity.vcpus_max);
    if demand.cpus.vcpus() > present {
        return Err(AdmissionError::CpusShort {
            asked: demand.cpus,
            present,
        });
    }
    if !(DISK_MIN..=DISK_MAX).contains(&demand.disk) {
        return Err(AdmissionError::DiskSize { asked: demand.disk });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Capacity = Capacity {
        cpus: 2,
        vcpus_max: 288,
        memory_available: Bytes::gib(4),
    };

    fn demand(memory: Bytes, cpus: u32, disk: Bytes) -> Demand {
        Demand {
            cpus: Cpus {
                millis: cpus * 1000,
            },
            memory,
            memory_min: MEMORY_MIN,
            disk,
            huge_pages: false,
        }
    }

    #[test]
    fn huge_pages_are_not_of_the_memory_that_is_available() {
        let huge = |memory_available| {
            let demand = Demand {
                huge_pages: true,
                ..demand(Bytes::gib(8), 1, Bytes::gib(1))
            };
            let host = Capacity {
                memory_available,
                ..HOST
            };
            admit(demand, host)
        };
        assert_eq!(huge(Bytes::gib(1)), Ok(()));
        // The monitor itself needs some.
        assert!(huge(VMM_OVERHEAD).is_err());
    }

    #[test]
    fn a_machine_that_fits_is_admitted() {
        assert_eq!(
            admit(demand(Bytes::mib(512), 2, Bytes::gib(10)), HOST),
            Ok(())
        );
    }

    #[test]
    fn a_unikernel_is_admitted_with_less_than_a_linux_guest_needs() {
        let small = Demand {
            memory_min: Bytes::mib(16),
            ..demand(Bytes::mib(24), 1, Bytes::gib(1))
        };
        assert_eq!(admit(small, HOST), Ok(()));
    }

    #[test]
    fn each_demand_that_cannot_be_met_is_named() {
        let gib10 = Bytes::gib(10);
        assert!(matches!(
            admit(demand(Bytes::mib(8), 1, gib10), HOST),
            Err(AdmissionError::MemoryTooSmall { .. })
        ));
        assert!(matches!(
            admit(demand(Bytes::gib(4), 1, gib10), HOST),
            Err(AdmissionError::MemoryShort { .. })
        ));
        assert!(matches!(
            admit(demand(Bytes::gib(1), 3, gib10), HOST),
            Err(AdmissionError::CpusShort { .. })
        ));
        assert!(matches!(
            admit(demand(Bytes::gib(1), 1, Bytes(1)), HOST),
            Err(AdmissionError::DiskSize { .. })
        ));
    }
}
