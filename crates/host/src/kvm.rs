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
use std::os::unix::thread::JoinHandleExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// The processor time in which a guest must be able to do its work, to give to [`probe`]. On hardware it takes about 2 ms, in an
/// emulated nested machine 30 to 150 ms, and where guest code is emulated one instruction at a time 2 to 6 s.
pub const PROBE_BOUND: Duration = Duration::from_millis(300);

/// How long it may take to make a guest. The first one after a boot of an emulated nested machine took more than half a second.
const MAKING: Duration = Duration::from_secs(3);

/// How long a guest that was told to come out may take for it and for being cleared away: a matter of microseconds, unless the
/// host has no processor to spare.
const GRACE: Duration = Duration::from_secs(2);

/// How many times `bound` on the clock the guest gets in each further try.
const FURTHER: [u32; 2] = [2, 8];

/// The part of `bound` in processor time after which a guest that is not done has told how fast it is.
const TOLD_AFTER: u32 = 3;

/// How often the guest comes out.
const ROUNDS: u32 = 100;
/// Turns of the loop between two exits.
const TURNS: u32 = 10_000;

/// A guest that could not be brought to an end is still there: another would be the next one of that kind.
static ABANDONED: AtomicBool = AtomicBool::new(false);

/// Runs a tiny guest, and judges by the processor time that it takes, not by the clock: on a busy host it gets little of it and
/// is no slower for that, where it is emulated it needs a lot. What counts is the middle one of its rounds, which shows its speed
/// even where somebody beneath this host takes time away that looks as if it were the guest's.
///
/// It is tried for `bound` on the clock; once more for twice that if it failed or was slow; and for eight times that where there
/// was too little processor time to tell. So this takes 11 times `bound` at most, and a little for bringing guests to their
/// ends. Blocking: call it on a thread that may block.
pub fn probe(bound: Duration) -> Verdict {
    tries(bound, |clock| try_guest(clock, bound))
}

fn tries(bound: Duration, run: impl Fn(Duration) -> Tried) -> Verdict {
    let mut tried = run(bound);
    for times in FURTHER {
        tried = match tried {
            // A passing want of something gets its second chance, too.
            Tried::Slow(_) | Tried::Known(Verdict::Broken(_)) if times == FURTHER[0] => {
                run(times * bound)
            }
            Tried::Starved(_) => run(times * bound),
            Tried::Slow(_) | Tried::Known(_) | Tried::Lost(_) => break,
        }
    }
    match tried {
        Tried::Known(verdict) => verdict,
        Tried::Slow(why) | Tried::Starved(why) | Tried::Lost(why) => Verdict::Broken(why),
    }
}

/// What came of one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tried {
    Known(Verdict),
    /// It is slow, however much processor time it gets.
    Slow(String),
    /// It was not done when its time was over, and had too little processor time to tell why.
    Starved(String),
    /// It could not be brought to an end.
    Lost(String),
}

/// What a guest did until it was done or its time was over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ran {
    /// The processor time of each round.
    rounds: Vec<Duration>,
    /// That of the round in which it was brought to an end.
    unfinished: Duration,
    /// On the clock.
    clock: Duration,
}

impl Ran {
    fn judge(&self, bound: Duration) -> Tried {
        let round_max = bound / ROUNDS;
        let done = self.rounds.len();
        let mut rounds = self.rounds.clone();
        // Of how long the last one would have been only the least is known.
        if self.unfinished > round_max {
            rounds.push(self.unfinished);
        }
        rounds.sort_unstable();
        let middle = rounds.get(rounds.len().saturating_sub(1) / 2);
        let middle = middle.copied().unwrap_or_default();
        let spent = self.rounds.iter().sum::<Duration>() + self.unfinished;
        let all = done >= ROUNDS as usize;
        let clock_ms = self.clock.as_millis();
        if middle > round_max && (all || spent >= bound / TOLD_AFTER) {
            // Two instructions in each turn.
            let speed = f64::from(2 * TURNS) / middle.as_secs_f64() / 1e6;
            return Tried::Slow(format!(
                "a guest did {done} % of its work in {} ms of processor time: its kernel code is being emulated, at about {speed:.1} million instructions a second",
                spent.as_millis()
            ));
        }
        if all {
            return Tried::Known(Verdict::Works);
        }
        Tried::Starved(format!(
            "a guest did {done} % of its work in {clock_ms} ms, of which it had the processor for {} ms",
            spent.as_millis()
        ))
    }
}

/// The guest runs on a thread of its own, which is told to come out when its time is over and is then waited for. Should it not
/// come out even so (never seen), it is abandoned, and no other is tried as long as it is there.
fn try_guest(clock: Duration, bound: Duration) -> Tried {
    try_program(clock, bound, &arch::PROGRAM)
}

fn try_program(clock: Duration, bound: Duration, program: &'static [u8]) -> Tried {
    if ABANDONED.load(Ordering::SeqCst) {
        return Tried::Lost("an earlier guest still does not come back".to_owned());
    }
    enum Word {
        /// The guest is made, and runs.
        Begun,
        Ended(Result<Ran, Verdict>),
    }
    let (sender, receiver) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("kvm-probe".to_owned())
        .spawn(move || {
            // The receiver may have given up; then nobody is left to tell.
            let begun = || {
                let _ = sender.send(Word::Begun);
            };
            let _ = sender.send(Word::Ended(arch::run(clock, program, begun)));
            ABANDONED.store(false, Ordering::SeqCst);
        });
    let thread = match spawned {
        Ok(thread) => thread,
        Err(error) => return known_broken(format!("no thread could be started: {error}")),
    };
    let word = receiver.recv_timeout(MAKING).and_then(|word| match word {
        Word::Begun => receiver.recv_timeout(clock),
        ended => Ok(ended),
    });
    let word = word.or_else(|_| {
        // SAFETY: the thread is not joined yet, so its handle is valid, also where it has ended meanwhile. It blocks this
        // signal as the first thing that it does, before it can take as long as `clock`.
        let _ = unsafe { libc::pthread_kill(thread.as_pthread_t(), come_out()) };
        receiver.recv_timeout(GRACE)
    });
    // One that was long in the making begins only now, and was told to end.
    let word = word.and_then(|word| match word {
        Word::Begun => receiver.recv_timeout(clock + GRACE),
        ended => Ok(ended),
    });
    match word {
        Ok(Word::Ended(ran)) => {
            // It has said its last word.
            let _ = thread.join();
            match ran {
                Ok(ran) => match ran.judge(bound) {
                    Tried::Known(Verdict::Works) => Tried::Known(
                        monitors_may_open().map_or_else(Verdict::Absent, |()| Verdict::Works),
                    ),
                    tried => tried,
                },
                Err(verdict) => Tried::Known(verdict),
            }
        }
        Ok(Word::Begun) | Err(_) => {
            ABANDONED.store(true, Ordering::SeqCst);
            if thread.is_finished() {
                ABANDONED.store(false, Ordering::SeqCst);
            }
            Tried::Lost(format!("a guest did not come back within {clock:?}"))
        }
    }
}

/// The signal that brings a guest to its end. It is let through by `KVM_RUN` only, and pending otherwise: no handler runs, and none
/// comes too early.
fn come_out() -> libc::c_int {
    libc::SIGRTMIN()
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
    use std::os::fd::AsRawFd as _;
    use std::ptr::null_mut;

    const MEMORY_LEN: usize = 0x8000;
    const PML4: usize = 0x1000;
    const PDPT: usize = 0x2000;
    const PAGE_DIRECTORY: usize = 0x3000;
    const CODE: usize = 0x4000;

    #[rustfmt::skip]
    pub(super) const PROGRAM: [u8; 33] = [
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

    pub(super) fn run(
        clock: Duration,
        program: &[u8],
        begun: impl FnOnce(),
    ) -> Result<Ran, Verdict> {
        block_signals();
        let kvm = Kvm::new().map_err(|error| Verdict::Absent(absence(&error)))?;
        let memory = Memory::new();
        let mut memory =
            memory.map_err(|error| Verdict::Broken(format!("no memory for a guest: {error}")))?;
        // Locals are dropped in reverse order: the machine first, then its memory.
        let (vm, mut vcpu) = machine(&kvm, &mut memory, program)?;
        begun();
        let ran = turns(&mut vcpu, clock);
        drop(vcpu);
        drop(vm);
        ran
    }

    /// Nothing that is sent to this process or thread shall look like an end of the guest, but for [`come_out`].
    fn block_signals() {
        // SAFETY: a set of signals is plain data, filled before it is read, and only this thread's mask is changed.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, null_mut());
        }
    }

    /// Lets the guest be interrupted by [`come_out`] alone.
    fn let_through(vcpu: &VcpuFd) -> Result<(), Verdict> {
        /// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`.
        const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
        /// `struct kvm_signal_mask`, with the kernel's set of signals.
        #[repr(C)]
        struct Mask {
            len: u32,
            signals: [u8; 8],
        }
        let signals = !(1_u64 << (come_out() - 1));
        let mask = Mask {
            len: 8,
            signals: signals.to_le_bytes(),
        };
        // SAFETY: the descriptor is a vCPU's, and the mask is as long as it says and outlives the call, which only reads it.
        let done =
            unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK as _, &raw const mask) };
        if done < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Verdict::Broken(format!(
                "choosing a vCPU's signals failed: {error}"
            )));
        }
        Ok(())
    }

    /// What this thread has had of the processor, in the kernel and in its guest, too.
    fn processor_time() -> Duration {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes the one structure that it is given. It cannot fail with this clock.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        Duration::new(
            time.tv_sec.try_into().unwrap_or(0),
            time.tv_nsec.try_into().unwrap_or(0),
        )
    }

    fn absence(error: &impl Display) -> String {
        match std::fs::metadata("/dev/kvm") {
            Err(_) => "there is no /dev/kvm".to_owned(),
            Ok(_) => format!("/dev/kvm cannot be opened: {error}"),
        }
    }

    /// A machine in 64-bit mode, in ring 0, about to run this program.
    fn machine(kvm: &Kvm, memory: &mut Memory, program: &[u8]) -> Result<(VmFd, VcpuFd), Verdict> {
        let vm = kvm.create_vm().map_err(broken("creating a machine"))?;
        // An address for the pages that Intel's real-mode emulation wants; harmless elsewhere.
        let _ = vm.set_tss_address(0xfffb_d000);
        vm.create_irq_chip()
            .map_err(broken("creating an interrupt controller"))?;
        let entry = |address: usize, flags: u64| (address as u64 | flags).to_le_bytes();
        memory.write(PML4, &entry(PDPT, 3));
        memory.write(PDPT, &entry(PAGE_DIRECTORY, 3));
        memory.write(PAGE_DIRECTORY, &entry(0, 0x83)); // One page of 2 MiB.
        memory.write(CODE, program);
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

    fn turns(vcpu: &mut VcpuFd, clock: Duration) -> Result<Ran, Verdict> {
        let_through(vcpu)?;
        let begin = Instant::now();
        let mut ran = Ran::default();
        let mut before = processor_time();
        while ran.rounds.len() < ROUNDS as usize {
            let exit = vcpu.run();
            let now = processor_time();
            ran.clock = begin.elapsed();
            match exit {
                Ok(VcpuExit::IoOut(0x10, _)) => {
                    ran.rounds.push(now.saturating_sub(before));
                    before = now;
                }
                Ok(other) => {
                    return Err(Verdict::Broken(format!(
                        "a guest in kernel mode ended with {other:?}"
                    )));
                }
                Err(error) if error.errno() == libc::EINTR => {
                    // Whoever has been stopped and let go on again is not told to come out.
                    if ran.clock >= clock {
                        ran.unfinished = now.saturating_sub(before);
                        break;
                    }
                    // A signal that came too early ends every try at once until then; that is not the guest's time.
                    before = processor_time();
                }
                Err(error) => return Err(broken("running a guest")(error)),
            }
            if ran.clock >= clock {
                break;
            }
        }
        Ok(ran)
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

    /// A host on which the guest takes `whole_ms` of processor time, and gets `share` of a processor.
    fn host(whole_ms: f64, share: f64) -> (Verdict, Duration) {
        let spent = std::cell::Cell::new(Duration::ZERO);
        let verdict = tries(PROBE_BOUND, |clock| {
            spent.set(spent.get() + clock);
            let got = clock.as_secs_f64() * 1e3 * share;
            let done = ((100.0 * got / whole_ms) as usize).min(ROUNDS as usize);
            let round = whole_ms / f64::from(ROUNDS);
            let duration = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
            let mut ran = Ran {
                rounds: vec![duration(round); done],
                clock,
                ..Ran::default()
            };
            if done < ROUNDS as usize {
                ran.unfinished = duration(got - round * done as f64);
            }
            ran.judge(PROBE_BOUND)
        });
        (verdict, spent.get())
    }

    #[test]
    fn a_busy_host_gets_time_and_one_that_emulates_is_broken_however_long_it_is_watched() {
        // Hardware, and an emulated nested machine, each by itself and where dozens of others want the processor.
        for whole_ms in [2.0, 30.0, 150.0, 290.0] {
            for share in [1.0, 0.5, 0.15] {
                let (verdict, _) = host(whole_ms, share);
                assert_eq!(verdict, Verdict::Works, "{whole_ms} ms, {share}");
            }
        }
        // What is too slow is so whether there is time for all of it or not, and on a busy host, too.
        for whole_ms in [310.0, 500.0, 1_000.0, 2_300.0, 6_000.0, 1e6] {
            for share in [1.0, 0.5, 0.15] {
                let (verdict, spent) = host(whole_ms, share);
                let Verdict::Broken(why) = verdict else {
                    panic!("{whole_ms} ms, {share}: {verdict:?}");
                };
                assert!(why.contains("emulated"), "{why}");
                // Busy or not, that is soon known.
                if share >= 0.5 {
                    assert_eq!(spent, 3 * PROBE_BOUND, "{whole_ms} ms, {share}");
                }
            }
        }
        // Next to no processor time at all says nothing about KVM, and it is told as what it is.
        let (verdict, spent) = host(6_000.0, 0.01);
        let Verdict::Broken(why) = verdict else {
            panic!("{verdict:?}");
        };
        assert!(why.contains("had the processor for 24 ms"), "{why}");
        assert_eq!(spent, 11 * PROBE_BOUND);
    }

    #[test]
    fn rounds_in_which_somebody_else_took_the_time_do_not_count() {
        let mut rounds = vec![Duration::from_millis(1); 70];
        rounds.extend([Duration::from_millis(20); 30]);
        let mut ran = Ran {
            rounds,
            ..Ran::default()
        };
        assert_eq!(ran.judge(PROBE_BOUND), Tried::Known(Verdict::Works));
        ran.rounds.truncate(90);
        assert!(matches!(ran.judge(PROBE_BOUND), Tried::Starved(_)));
        ran.rounds.drain(..60);
        assert!(matches!(ran.judge(PROBE_BOUND), Tried::Slow(_)));
    }

    #[test]
    fn a_guest_that_never_comes_out_is_brought_to_its_end_with_its_thread() {
        /// `jmp` to itself.
        static FOREVER: [u8; 2] = [0xeb, 0xfe];
        let threads = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let names =
                tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
            names.filter(|name| name.trim() == "kvm-probe").count()
        };
        let begin = Instant::now();
        match try_program(PROBE_BOUND, PROBE_BOUND, &FOREVER) {
            Tried::Known(Verdict::Absent(why) | Verdict::Broken(why)) => {
                println!("SKIP: no guest of any kind runs here: {why}");
            }
            Tried::Slow(why) | Tried::Starved(why) => {
                assert!(why.starts_with("a guest did 0 %"), "{why}");
            }
            other => panic!("{other:?} after {:?}", begin.elapsed()),
        }
        assert!(begin.elapsed() < PROBE_BOUND + MAKING + 2 * GRACE);
        assert_eq!(threads(), 0);
    }

    #[test]
    fn the_probe_answers_within_its_bound_and_says_why() {
        let begin = Instant::now();
        let verdict = probe(PROBE_BOUND);
        let taken = begin.elapsed();
        println!("{verdict:?} after {taken:?}");
        assert!(taken < 12 * PROBE_BOUND + 3 * (MAKING + GRACE), "{taken:?}");
        if let Verdict::Absent(why) | Verdict::Broken(why) = verdict {
            assert!(!why.is_empty());
        }
    }
}
