//! How much memory a Nanos machine needs, from what is known about it before it runs.
//!
//! The numbers are measured (see `docs/formats/nanos-disk.md`); what was not measured is scaled from them and rounded up.

/// The devices that a machine has, as far as they cost the guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineKind {
    /// QEMU's `microvm`, whose virtio queues are 1,024 deep: each network device costs buffers for them.
    QemuMicrovm,
    /// QEMU's `pc` and `q35`, or Firecracker, with queues of 256.
    ShallowQueues,
}

/// What memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFacts {
    /// Bytes of the program and of its libraries. A C program of 800 KiB is the measured case.
    pub program_bytes: u64,
    /// Files, directories and links in all file systems that the machine mounts; the kernel holds every one.
    pub files: u64,
    /// It has a network device.
    pub network: bool,
    /// Where it runs.
    pub machine: MachineKind,
}

const MIB: u64 = 1 << 20;
/// The least with which a static C program without network ran.
const BASE_BYTES: u64 = 12 * MIB;
/// The least with network on `microvm`, and elsewhere.
const NETWORK_MICROVM_BYTES: u64 = 80 * MIB;
const NETWORK_SHALLOW_BYTES: u64 = 24 * MIB;
/// 20,000 files ran with 256 MiB and not with the next power of two below; 12.5 KiB for each, rounded up.
const FILE_BYTES: u64 = 13 << 10;
/// Program bytes that are part of [`BASE_BYTES`].
const PROGRAM_BYTES_INCLUDED: u64 = MIB;
/// What a machine gets that nobody sized: the program has room for a heap.
const USUAL_BYTES: u64 = 64 * MIB;
const USUAL_NETWORK_BYTES: u64 = 128 * MIB;

impl MemoryFacts {
    /// The least memory, in bytes and whole MiB, with which the kernel starts the program. What the program itself allocates
    /// comes on top.
    pub fn floor(&self) -> u64 {
        let base = match (self.network, self.machine) {
            (false, _) => BASE_BYTES,
            (true, MachineKind::QemuMicrovm) => NETWORK_MICROVM_BYTES,
            (true, MachineKind::ShallowQueues) => NETWORK_SHALLOW_BYTES,
        };
        let program = self.program_bytes.saturating_sub(PROGRAM_BYTES_INCLUDED);
        let files = self.files.saturating_mul(FILE_BYTES);
        whole_mib(base.saturating_add(program).saturating_add(files))
    }

    /// What a machine gets when the request names no size, in bytes and whole MiB.
    pub fn usual(&self) -> u64 {
        let usual = match self.network {
            false => USUAL_BYTES,
            true => USUAL_NETWORK_BYTES,
        };
        let base = MemoryFacts {
            program_bytes: 0,
            files: 0,
            ..*self
        };
        usual.saturating_add(self.floor() - base.floor())
    }
}

/// The next whole MiB; the largest number that is one, if there is none.
fn whole_mib(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(MIB)
        .unwrap_or(u64::MAX / MIB * MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: MemoryFacts = MemoryFacts {
        program_bytes: 800 << 10,
        files: 3,
        network: false,
        machine: MachineKind::QemuMicrovm,
    };

    #[test]
    fn the_measured_cases_fit_and_are_not_far_off() {
        assert_eq!(SMALL.floor(), 13 * MIB);
        let network = MemoryFacts {
            network: true,
            ..SMALL
        };
        assert_eq!(network.floor(), 81 * MIB);
        let pc = MemoryFacts {
            machine: MachineKind::ShallowQueues,
            ..network
        };
        assert_eq!(pc.floor(), 25 * MIB);
        let many = MemoryFacts {
            files: 20_000,
            ..SMALL
        };
        assert!((256..300).contains(&(many.floor() / MIB)));
    }

    #[test]
    fn a_machine_that_nobody_sized_has_room_beyond_the_floor() {
        assert_eq!(SMALL.usual(), 65 * MIB);
        let large = MemoryFacts {
            program_bytes: 100 * MIB,
            network: true,
            ..SMALL
        };
        assert!(large.usual() >= large.floor() + 40 * MIB);
    }

    #[test]
    fn absurd_facts_give_an_absurd_number_and_no_overflow() {
        let absurd = MemoryFacts {
            program_bytes: u64::MAX,
            files: u64::MAX,
            ..SMALL
        };
        assert!(absurd.floor() > 1 << 60);
        assert!(absurd.usual() >= absurd.floor());
    }
}
