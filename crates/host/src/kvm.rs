//! Whether `/dev/kvm` really runs guests, found by running one.
//!
//! A device that opens proves little: some hosts emulate guest kernels an instruction at a time, and a guest there takes
//! minutes to boot or dies. So the probe runs a tiny 64-bit kernel-mode guest that does what an ordinary kernel does all
//! day (loops, page-table reloads, model-specific registers, CPUID, port output), and sees how long that takes.
//!
//! The answer holds until the host reboots: the caller keeps it beside [`crate::facts::boot_id`].

// Guest memory must be mapped here and handed to KVM by address: both are unsafe by nature.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The probe's three honest answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// A guest ran at hardware speed.
    Works,
    /// No `/dev/kvm`, or no permission to open it, for us or for the monitors we start; the text says which.
    Absent(String),
    /// It opens but cannot run an ordinary guest; the text says how that showed.
    Broken(String),
}

/// The time limit to give to [`probe`]. On hardware the guest takes about 2 ms, in an emulated nested machine 50 to 150 ms, and where
/// guest code is emulated one instruction at a time 6 s.
pub const PROBE_BOUND: Duration = Duration::from_millis(300);

/// Beyond the bound, how long the probe waits for a guest that does not come out by itself.
const GRACE: Duration = Duration::from_millis(200);

/// How many times `bound` the guest gets in each further try, for its share of the work in percent in the one before. A busy
/// host is not a broken one: one that emulates does 5 % in [`PROBE_BOUND`] and 10 % in twice that, busy or not, and is not waited
/// for any longer; one on which a guest got further gets time for all of it, and so does one on which not even that could be
/// told in time.
const FURTHER: [(u32, u32); 2] = [(2, 0), (8, 15)];

/// Runs a tiny guest for at most `bound`, and where that is not enough again for longer. Blocking: call it on a thread that may
/// block.
pub fn probe(bound: Duration) -> Verdict {
    tries(bound, try_guest)
}

fn tries(bound: Duration, run: impl Fn(Duration) -> Tried) -> Verdict {
    let mut tried = run(bound);
    for (times, done_min) in FURTHER {
        match tried {
            Tried::Slow { done, .. } if done.is_none_or(|done| done >= done_min) => {
                tried = run(times * bound);
            }
            // A passing want of something gets its second chance, too.
            Tried::Known(Verdict::Broken(_)) if done_min == 0 => tried = run(times * bound),
            _ => break,
        }
    }
    match tried {
        Tried::Known(verdict) => verdict,
        Tried::Slow { why, .. } => Verdict::Broken(why),
    }
}

/// What came of one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tried {
    Known(Verdict),
    /// It ran for its whole time and did so many percent of its work, where that is known.
    Slow {
        done: Option<u32>,
        why: String,
    },
}

/// The guest runs on a thread of its own and comes out a hundred times on its way; should it hang in between (never seen),
/// that thread is abandoned and the verdict is `Broken`.
fn try_guest(bound: Duration) -> Tried {
    let (sender, receiver) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("kvm-probe".to_owned())
        .spawn(move || {
            // The receiver may have given up; then nobody is left to tell.
            let _ = sender.send(arch::run(bound));
        });
    match spawned {
        Ok(_) => match receiver.recv_timeout(bound + GRACE) {
            Ok(Tried::Known(Verdict::Works)) => {
                Tried::Known(monitors_may_open().map_or_else(Verdict::Absent, |()| Verdict::Works))
            }
            Ok(tried) => tried,
            Err(_) => Tried::Slow {
                done: None,
                why: format!("a guest did not come back within {bound:?}"),
            },
        },
        Err(error) => known_broken(format!("no thread could be started: {error}")),
    }
}

/// Whether the monitors that this process starts may open the device.
///
/// An ordinary user's monitors are the user's, and may what the user may. Root's become a user of their own each, with the
/// device's group as their only one: so it takes a device that its group or everybody may open. Root's own group is given
/// to no monitor, since other files are open to it, and neither the device's owner nor its mode is changed: they are the
/// host's to decide.
///
/// # Errors
/// Why not, and the command that mends it.
pub fn monitors_may_open() -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    if !crate::facts::is_root() {
        return Ok(());
    }
    let data = std::fs::metadata("/dev/kvm")
        .map_err(|error| format!("/dev/kvm cannot be looked at: {error}"))?;
    if opens_for_monitors(data.mode(), data.gid()) {
        return Ok(());
    }
    Err(format!(
        "/dev/kvm (mode {:04o}, group {}) opens for root alone, and monitors do not run as root; run: groupadd -rf kvm; chgrp kvm /dev/kvm; chmod 0660 /dev/kvm",
        data.mode() & 0o7777,
        data.gid(),
    ))
}

fn opens_for_monitors(mode: u32, gid: u32) -> bool {
    const READ_WRITE: u32 = 0o6;
    // A member of the group has the group's rights only, even where everybody has more.
    let shift = if gid == 0 { 0 } else { 3 };
    mode >> shift & READ_WRITE == READ_WRITE
}

fn known_broken(why: String) -> Tried {
    Tried::Known(Verdict::Broken(why))
}

fn broken(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Verdict {
    move |error| Verdict::Broken(format!("{what} failed: {error}"))
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use super::*;
    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    use std::ptr::null_mut;

    /// How often the guest comes out.
    const ROUNDS: u32 = 100;
    /// Turns of the loop between two exits.
    const TURNS: u32 = 10_000;

    const MEMORY_LEN: usize = 0x8000;
    const PML4: usize = 0x1000;
    const PDPT: usize = 0x2000;
    const PAGE_DIRECTORY: usize = 0x3000;
    const CODE: usize = 0x4000;

    #[rustfmt::skip]
    const PROGRAM: [u8; 33] = [
        0xb9, TURNS as u8, (TURNS >> 8) as u8, (TURNS >> 16) as u8, 0, // mov ecx, TURNS
        0xff, 0xc9,                         // 1: dec ecx
        0x75, 0xfc,                         // jnz 1b
        0x0f, 0x20, 0xd8,                   // mov rax, cr3
        0x0f, 0x22, 0xd8,                   // mov cr3, rax
        0xb9, 0x01, 0x01, 0x00, 0xc0,       // mov ecx, IA32_GS_BASE
        0x0f, 0x32,                         // rdmsr
        0x0f, 0x30,                         // wrmsr
        0x31, 0xc0,                         // xor eax, eax
        0x0f, 0xa2,                         // cpuid
        0xe6, 0x10,                         // out 0x10, al
        0xeb, 0xe0, 0x90,                   // jmp to the start; nop
    ];

    /// Guest memory, unmapped when the probe is over.
    struct Memory(*mut u8);

    impl Memory {
        fn new() -> rustix::io::Result<Memory> {
            // SAFETY: an anonymous private mapping at an address the kernel chooses touches nothing that exists.
            let start = unsafe {
                mmap_anonymous(
                    null_mut(),
                    MEMORY_LEN,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )
            }?;
            Ok(Memory(start.cast()))
        }

        fn write(&mut self, offset: usize, bytes: &[u8]) {
            assert!(offset + bytes.len() <= MEMORY_LEN);
            // SAFETY: the range lies in the mapping (checked above), which is ours, and no vCPU runs while we write.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(offset), bytes.len())
            }
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: mapped in `new` with this length, and the machine that used it is dropped before (see `run`).
            let _ = unsafe { munmap(self.0.cast(), MEMORY_LEN) };
        }
    }

    pub(super) fn run(bound: Duration) -> Tried {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return Tried::Known(Verdict::Absent(absence(&error))),
        };
        match Memory::new() {
            Ok(mut memory) => match machine(&kvm, &mut memory) {
                // Locals are dropped in reverse order: the machine first, then its memory.
                Ok((vm, mut vcpu)) => {
                    let verdict = turns(&mut vcpu, bound);
                    drop(vcpu);
                    drop(vm);
                    verdict
                }
                Err(verdict) => Tried::Known(verdict),
            },
            Err(error) => known_broken(format!("no memory for a guest: {error}")),
        }
    }

    fn absence(error: &impl Display) -> String {
        match std::fs::metadata("/dev/kvm") {
            Err(_) => "there is no /dev/kvm".to_owned(),
            Ok(_) => format!("/dev/kvm cannot be opened: {error}"),
        }
    }

    /// A machine in 64-bit mode, in ring 0, about to run [`PROGRAM`].
    fn machine(kvm: &Kvm, memory: &mut Memory) -> Result<(VmFd, VcpuFd), Verdict> {
        let vm = kvm.create_vm().map_err(broken("creating a machine"))?;
        // An address for the pages that Intel's real-mode emulation wants; harmless elsewhere.
        let _ = vm.set_tss_address(0xfffb_d000);
        vm.create_irq_chip()
            .map_err(broken("creating an interrupt controller"))?;
        let entry = |address: usize, flags: u64| (address as u64 | flags).to_le_bytes();
        memory.write(PML4, &entry(PDPT, 3));
        memory.write(PDPT, &entry(PAGE_DIRECTORY, 3));
        memory.write(PAGE_DIRECTORY, &entry(0, 0x83)); // One page of 2 MiB.
        memory.write(CODE, &PROGRAM);
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_LEN as u64,
            userspace_addr: memory.0 as u64,
            flags: 0,
        };
        // SAFETY: the region is a live mapping of ours of this length, and `run` drops the machine before it.
        unsafe { vm.set_user_memory_region(region) }.map_err(broken("giving memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(broken("creating a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(broken("reading CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(broken("setting CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(broken("reading registers"))?;
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
            &mut sregs.cs,
        ] {
            segment.base = 0;
            segment.limit = 0xffff_ffff;
            segment.selector = 16;
            segment.type_ = 3;
            segment.present = 1;
            segment.dpl = 0;
            segment.db = 1;
            segment.s = 1;
            segment.l = 0;
            segment.g = 1;
        }
        sregs.cs.selector = 8;
        sregs.cs.type_ = 11;
        sregs.cs.db = 0;
        sregs.cs.l = 1;
        sregs.cr0 = 0x8000_0033; // PE, MP, ET, NE, PG
        sregs.cr3 = PML4 as u64;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LME, LMA
        vcpu.set_sregs(&sregs)
            .map_err(broken("entering 64-bit mode"))?;
        let mut regs = vcpu.get_regs().map_err(broken("reading registers"))?;
        regs.rip = CODE as u64;
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(broken("setting registers"))?;
        Ok((vm, vcpu))
    }

    fn turns(vcpu: &mut VcpuFd, bound: Duration) -> Tried {
        let begin = Instant::now();
        for round in 1..=ROUNDS {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => {}
                Ok(other) => {
                    return known_broken(format!("a guest in kernel mode ended with {other:?}"));
                }
                Err(error) => return Tried::Known(broken("running a guest")(error)),
            }
            let taken = begin.elapsed();
            if taken > bound && round < ROUNDS {
                // Two instructions in each turn.
                let speed = f64::from(2 * TURNS * round) / taken.as_secs_f64() / 1e6;
                return Tried::Slow {
                    // Rounds are a hundred.
                    done: Some(round),
                    why: format!(
                        "a guest did {round} % of its work in {} ms: its kernel code is being emulated, at about {speed:.1} million instructions a second",
                        taken.as_millis()
                    ),
                };
            }
        }
        Tried::Known(Verdict::Works)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_root_alone_is_none_for_monitors() {
        for (mode, gid, opens) in [
            (0o20600, 0, false),
            (0o20660, 0, false),
            (0o20666, 0, true),
            (0o20660, 104, true),
            (0o20600, 104, false),
            (0o20640, 104, false),
            (0o20606, 104, false),
            (0o20666, 104, true),
        ] {
            assert_eq!(opens_for_monitors(mode, gid), opens, "{mode:o} {gid}");
        }
    }

    /// A host whose guests do this much of their work in each millisecond that they get.
    fn host(percent_per_ms: f64, tells: bool) -> (Verdict, Duration) {
        let spent = std::cell::Cell::new(Duration::ZERO);
        let verdict = tries(PROBE_BOUND, |bound| {
            let done = percent_per_ms * bound.as_secs_f64() * 1e3;
            spent.set(spent.get() + bound);
            if done >= 100.0 {
                return Tried::Known(Verdict::Works);
            }
            Tried::Slow {
                done: tells.then_some(done as u32),
                why: "slow".to_owned(),
            }
        });
        (verdict, spent.get())
    }

    #[test]
    fn a_busy_host_gets_time_and_a_broken_one_is_soon_known() {
        // Hardware, and an emulated nested machine, each by itself and where a dozen others want the processor.
        for whole_ms in [2.0, 30.0, 150.0, 1_500.0, 2_000.0] {
            for tells in [true, false] {
                let (verdict, _) = host(100.0 / whole_ms, tells);
                assert_eq!(verdict, Verdict::Works, "{whole_ms} ms");
            }
        }
        let (verdict, spent) = host(100.0 / 6_000.0, true);
        assert_eq!(verdict, Verdict::Broken("slow".to_owned()));
        assert_eq!(spent, 3 * PROBE_BOUND);
        let (verdict, spent) = host(100.0 / 6_000.0, false);
        assert_eq!(verdict, Verdict::Broken("slow".to_owned()));
        assert_eq!(spent, 11 * PROBE_BOUND);
    }

    #[test]
    fn the_probe_answers_within_its_bound_and_says_why() {
        let begin = Instant::now();
        let verdict = probe(PROBE_BOUND);
        let taken = begin.elapsed();
        println!("{verdict:?} after {taken:?}");
        assert!(taken < 12 * PROBE_BOUND + 5 * GRACE, "{taken:?}");
        if let Verdict::Absent(why) | Verdict::Broken(why) = verdict {
            assert!(!why.is_empty());
        }
    }
}
