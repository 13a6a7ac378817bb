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
    /// The kernel loads modules, and its own symbols with them.
    pub modules: bool,
    /// Where it runs.
    pub machine: MachineKind,
}

const MIB: u64 = 1 << 20;
/// The least with which a static C program without network and some files ran.
const BASE_BYTES: u64 = 12 * MIB;
/// The least with network on `microvm`, and elsewhere.
const NETWORK_MICROVM_BYTES: u64 = 80 * MIB;
const NETWORK_SHALLOW_BYTES: u64 = 24 * MIB;
/// On disks of this crate 20,000 files ran with 56 MiB and not with 48, 2,000 with 16 MiB and not with 12: 2.7 KiB for each
/// at most, rounded up generously, since the names were short. (Disks of `mkfs`, whose log is one record, needed 256 MiB.)
const FILE_BYTES: u64 = 4 << 10;
/// Program bytes that are part of [`BASE_BYTES`].
const PROGRAM_BYTES_INCLUDED: u64 = MIB;
/// What modules cost: one of 118 KiB did not load with 64 MiB, and did with 96.
const MODULES_BYTES: u64 = 64 * MIB;
/// What a machine gets that nobody sized: the program has room for a heap.
const USUAL_BYTES: u64 = 64 * MIB;
const USUAL_NETWORK_BYTES: u64 = 128 * MIB;
/// Up to which growth of program and files the usual sizes stay: a quarter of the smaller.
const USUAL_GROWTH_BYTES: u64 = 16 * MIB;

/// The least size that is given to any machine.
const LEAST_BYTES: u64 = 16 * MIB;

impl MemoryFacts {
    /// The least memory, in bytes, with which the kernel starts the program; a size that [`safe_size`] gives. What the
    /// program itself allocates comes on top.
    pub fn floor(&self) -> u64 {
        safe_size(self.need())
    }

    /// What a machine gets when the request names no size, in bytes; a size that [`safe_size`] gives.
    pub fn usual(&self) -> u64 {
        let usual = match self.network {
            false => USUAL_BYTES,
            true => USUAL_NETWORK_BYTES,
        };
        let growth = self.growth();
        // A few files and a small program are what the usual sizes are for.
        match growth < USUAL_GROWTH_BYTES {
            true => usual,
            false => safe_size(usual.saturating_add(growth)),
        }
    }

    fn need(&self) -> u64 {
        let base = match (self.network, self.machine) {
            (false, _) => BASE_BYTES,
            (true, MachineKind::QemuMicrovm) => NETWORK_MICROVM_BYTES,
            (true, MachineKind::ShallowQueues) => NETWORK_SHALLOW_BYTES,
        };
        base.saturating_add(self.growth())
    }

    /// What comes on top of the measured base.
    fn growth(&self) -> u64 {
        let modules = if self.modules { MODULES_BYTES } else { 0 };
        self.program_growth()
            .saturating_add(self.files_growth())
            .saturating_add(modules)
    }

    fn program_growth(&self) -> u64 {
        self.program_bytes.saturating_sub(PROGRAM_BYTES_INCLUDED)
    }

    fn files_growth(&self) -> u64 {
        self.files.saturating_mul(FILE_BYTES)
    }
}

/// The next size up with which Nanos can be trusted: a power of two, at least 16 MiB; the largest one, if `bytes` is beyond.
///
/// More memory is not always better: with 100 files 12 to 66 MiB run, 68 does not ("page fill failed … out of memory"), 72
/// does; with 5,000 files 32 to 64 run, 72 does not; with 20,000 56 and 64 run, 72 to 104 do not, 112 does. No power of two
/// above the floor failed. The cause lies in how the kernel divides its memory and was not looked for.
pub fn safe_size(bytes: u64) -> u64 {
    bytes
        .max(LEAST_BYTES)
        .checked_next_power_of_two()
        .unwrap_or(1 << 63)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: MemoryFacts = MemoryFacts {
        program_bytes: 800 << 10,
        files: 3,
        network: false,
        modules: false,
        machine: MachineKind::QemuMicrovm,
    };

    #[test]
    fn the_measured_cases_get_sizes_that_ran() {
        let floor = |files, network, machine| {
            let facts = MemoryFacts {
                files,
                network,
                machine,
                ..SMALL
            };
            facts.floor() / MIB
        };
        assert_eq!(floor(3, false, MachineKind::QemuMicrovm), 16);
        assert_eq!(floor(3, true, MachineKind::QemuMicrovm), 128);
        assert_eq!(floor(3, true, MachineKind::ShallowQueues), 32);
        assert_eq!(floor(1_000, false, MachineKind::QemuMicrovm), 16);
        assert_eq!(floor(5_000, false, MachineKind::QemuMicrovm), 32);
        assert_eq!(floor(20_000, false, MachineKind::QemuMicrovm), 128);
        let modules = MemoryFacts {
            modules: true,
            ..SMALL
        };
        assert_eq!(modules.floor(), 128 * MIB);
    }

    #[test]
    fn no_size_lies_a_little_above_a_power_of_two() {
        assert_eq!(safe_size(1), 16 * MIB);
        assert_eq!(safe_size(64 * MIB), 64 * MIB);
        assert_eq!(safe_size(68 * MIB), 128 * MIB);
    }

    #[test]
    fn a_machine_that_nobody_sized_has_room_beyond_the_floor() {
        assert_eq!(SMALL.usual(), 64 * MIB);
        let large = MemoryFacts {
            program_bytes: 100 * MIB,
            network: true,
            ..SMALL
        };
        assert_eq!((large.floor(), large.usual()), (256 * MIB, 256 * MIB));
    }

    #[test]
    fn absurd_facts_give_an_absurd_number_and_no_overflow() {
        let absurd = MemoryFacts {
            program_bytes: u64::MAX,
            files: u64::MAX,
            ..SMALL
        };
        assert_eq!((absurd.floor(), absurd.usual()), (1 << 63, 1 << 63));
    }
}
