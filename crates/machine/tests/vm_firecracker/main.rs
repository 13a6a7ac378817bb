//! Real machines in Firecracker: the conformance suite, and what only a real monitor can show (jail, faults, disks, forks).
//!
//! Skipped, with the reason on stdout, without Firecracker, without a KVM that really runs guests, or without a kernel (see
//! `conformance/guest.rs`). `cargo xtask lab --tests` has all three wherever Firecracker is installed.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../conformance/mod.rs"]
mod conformance;
mod ends;
mod forks;
mod jail;
mod network;
mod processor_and_memory;

use conformance::devices::slower;
use conformance::faults::Monitor;
use conformance::running::{self, Running};
use conformance::{Lines, Subject, ends_with_this_test, guest, launch, limit, soon};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_host::{facts, kvm};
use vistara_machine::firecracker::{FirecrackerOptions, FirecrackerVmm, OVERHEAD_MAX};
use vistara_machine::{
    Adoption, Capture, Disk, Fence, LaunchPlan, Nic, Start, Vm, VmEnd, VmRecord, Vmm, VmmError,
};
use vistara_model::{Accelerator, Bytes, KvmVerdict, MachineId, PortMapping, Protocol, Rates};

/// The user as which machines run when the tests do as root.
const USER: (u32, u32) = (61_004, 61_005);

/// Whether guests run here: found once, by running one.
fn kvm_works() -> &'static KvmVerdict {
    static VERDICT: OnceLock<KvmVerdict> = OnceLock::new();
    // In the lab all is slow at first, and it may be busy.
    VERDICT.get_or_init(
        || match kvm::probe(kvm::PROBE_BOUND * conformance::patience()) {
            kvm::Verdict::Works => KvmVerdict::Works,
            kvm::Verdict::Absent(why) => KvmVerdict::Absent(why),
            kvm::Verdict::Broken(why) => KvmVerdict::Broken(why),
        },
    )
}

fn options() -> FirecrackerOptions {
    FirecrackerOptions {
        program: std::env::var_os("VISTARA_FIRECRACKER").map(PathBuf::from),
        jailer: None,
        slirp4netns: None,
        cpu_template: None,
        kvm: kvm_works().clone(),
    }
}

/// Whether machines have a network here: known once a [`FirecrackerVmm`] is.
static NETWORKED: AtomicBool = AtomicBool::new(false);

struct Firecracker;

#[async_trait::async_trait]
impl Subject for Firecracker {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        let vmm = match FirecrackerVmm::detect(options()).await {
            Ok(vmm) => vmm,
            Err(error) => {
                println!("SKIP: {error}");
                return None;
            }
        };
        if let KvmVerdict::Absent(why) | KvmVerdict::Broken(why) = kvm_works() {
            println!("SKIP: KVM does not run guests here: {why}");
            return None;
        }
        if let Err(reason) = guest::boot_with(guest::Channel::Vsock) {
            println!("SKIP: {reason}");
            return None;
        }
        NETWORKED.store(vmm.capabilities().user_network.is_ok(), Ordering::Relaxed);
        Some(Arc::new(vmm))
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        LaunchPlan {
            id: new_id(),
            dir: dir.to_owned(),
            accelerator: Accelerator::Kvm,
            vcpus: 1,
            memory: Bytes::mib(256),
            start: Start::Linux(guest::boot_with(guest::Channel::Vsock).unwrap()),
            huge_pages: false,
            capturable: false,
            disks: vec![],
            // Wherever machines may have a network, the suite's do.
            nic: NETWORKED.load(Ordering::Relaxed).then(|| nic(vec![])),
            shares: vec![],
            rates: Rates::default(),
            fence: Fence {
                uid_gid: facts::is_root().then_some(USER),
                memory_max: Bytes(Bytes::mib(256).0 + OVERHEAD_MAX.0),
                pids_max: 64,
                cpu_millis: None,
            },
        }
    }

    fn leftovers(&self, vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
        let record = vm.record().clone();
        Box::new(move || left_of(&record))
    }
}

fn new_id() -> MachineId {
    let mut bytes = [0; 16];
    let mut source = std::fs::File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut source, &mut bytes).unwrap();
    MachineId::from_random(bytes)
}

/// What is left of a machine: its process, its cgroup, its jail, and mounts that anybody here could see.
fn left_of(record: &VmRecord) -> Vec<String> {
    let mut left = Vec::new();
    // One that has ended and waits to be collected by the process that inherited it holds nothing any more.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", record.pid)).unwrap_or_default();
    let alive = facts::start_ticks(record.pid) == Some(record.pid_start_ticks);
    if alive && !stat.contains(") Z ") {
        left.push(format!("process {}", record.pid));
    }
    let network = &record.backend["network"];
    if let Some(start) = network["start_ticks"].as_u64()
        && facts::start_ticks(helper(record)) == Some(start)
    {
        left.push(format!("its network's process {}", helper(record)));
    }
    for dir in record.backend["cgroup"].as_array().unwrap() {
        let dir = dir.as_str().unwrap();
        if Path::new(dir).exists() {
            left.push(dir.to_owned());
        }
    }
    let root = record.backend["root"].as_str().unwrap();
    let (machine, _) = root.split_once("/jail/").unwrap();
    for name in ["jail", "network"] {
        if Path::new(machine).join(name).exists() {
            left.push(format!("{machine}/{name}"));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = mounts.lines().filter(|line| line.contains(machine));
    left.extend(ours.map(str::to_owned));
    left
}

#[async_trait::async_trait]
impl Monitor for Firecracker {
    async fn vmm_told(&self, kvm: KvmVerdict) -> Option<Arc<dyn Vmm>> {
        let options = FirecrackerOptions { kvm, ..options() };
        let vmm = FirecrackerVmm::detect(options).await.ok()?;
        Some(Arc::new(vmm))
    }

    fn control_socket(&self, record: &VmRecord, _: &Path) -> PathBuf {
        Path::new(record.backend["root"].as_str().unwrap()).join("api.sock")
    }

    fn too_little_memory(&self) -> Bytes {
        Bytes::mib(48)
    }
}

conformance!(Firecracker);
of_real_monitors!(Firecracker);
faults!(Firecracker);

/// A running machine, from a plan that the test has changed.
async fn run(change: impl FnOnce(&mut LaunchPlan)) -> Option<Running> {
    running::run(&Firecracker, change).await
}

/// Where the files are that a machine's Firecracker sees.
fn root(machine: &Running) -> PathBuf {
    machine.vm.record().backend["root"].as_str().unwrap().into()
}

fn disk(dir: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
    let path = dir.join(name);
    let file = std::fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &file, text.as_bytes()).unwrap();
    file.set_len(1 << 20).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&path, mode).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_come_in_their_order_and_a_read_only_one_cannot_be_written() {
    let files = tempfile::tempdir().unwrap();
    // One that everybody may read, one that only we may, and one of the machine's own.
    let disks = [
        (disk(files.path(), "first", "FIRST", 0o644), true),
        (disk(files.path(), "second", "SECOND", 0o600), true),
        (disk(files.path(), "third", "THIRD", 0o600), false),
    ];
    let owner = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        let data = std::fs::metadata(path).unwrap();
        (data.uid(), data.mode() & 0o777)
    };
    let plan_disks = disks
        .clone()
        .map(|(path, read_only)| Disk { path, read_only });
    let Some(mut machine) = run(|plan| plan.disks = plan_disks.to_vec()).await else {
        return;
    };
    machine.load_drivers().await;
    for (device, word) in [("vda", "FIRST"), ("vdb", "SECOND"), ("vdc", "THIRD")] {
        let read = format!("dd if=/dev/{device} bs={} count=1 2>/dev/null", word.len());
        assert_eq!(machine.sh(&read).await, word);
        let write = format!("echo written | dd of=/dev/{device} conv=notrunc,fsync 2>/dev/null");
        machine.sh(&write).await;
    }
    let read_only = machine.sh("cat /sys/block/vd?/ro").await;
    assert_eq!(read_only, "1\n1\n0");
    machine.end_of(&Firecracker).await;
    for ((path, _), word) in disks.iter().zip(["FIRST", "SECOND", "written"]) {
        assert!(std::fs::read(path).unwrap().starts_with(word.as_bytes()));
    }
    assert_eq!(owner(&disks[0].0).1, 0o644, "what others use is as it was");
    let us = owner(files.path()).0;
    assert_eq!(owner(&disks[1].0), (us, 0o600));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_guest_does_not_answer_until_it_is_resumed() {
    let Some(mut machine) = run(|_| {}).await else {
        return;
    };
    machine.vm.pause().await.unwrap();
    machine.lines.say("later").await;
    let mut byte = [0];
    let heard =
        tokio::time::timeout(Duration::from_millis(500), machine.lines.0.read(&mut byte)).await;
    assert!(heard.is_err(), "{heard:?}");
    machine.vm.resume().await.unwrap();
    assert_eq!(machine.lines.hear().await, "later");
    machine.end_of(&Firecracker).await;
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

fn nic(ports: Vec<PortMapping>) -> Nic {
    Nic {
        ports,
        mac: [0x52, 0x54, 0, 0, 0, 7],
    }
}

/// What a machine's network runs on: the process beside Firecracker.
fn helper(record: &VmRecord) -> u32 {
    let pid = record.backend["network"]["pid"].as_u64().unwrap();
    u32::try_from(pid).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processors_are_two_in_the_guest() {
    let Some(mut machine) = run(|plan| plan.vcpus = 2).await else {
        return;
    };
    assert_eq!(machine.sh("nproc").await, "2");
    machine.end_of(&Firecracker).await;
}

/// Prints what a start costs: `… --test vm_firecracker -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, of use on a quiet machine only"]
async fn measure_the_launch_and_the_first_answer() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).init();
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let (mut calls, mut answers, mut kills) = (vec![], vec![], vec![]);
    for _ in 0..7 {
        let dir = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        let vm = launch(&*vmm, &Firecracker.plan(dir.path())).await;
        calls.push(begin.elapsed());
        Lines::open(&*vm).await.echo("up").await;
        answers.push(begin.elapsed());
        println!("resident {} KiB", vm.usage().resident_bytes >> 10);
        let begin = Instant::now();
        vm.kill().await.unwrap();
        kills.push(begin.elapsed());
    }
    for times in [&mut calls, &mut answers, &mut kills] {
        times.sort();
    }
    println!(
        "launch call {:?} (least {:?}), first answer {:?} (least {:?}), kill {:?}",
        calls[3], calls[0], answers[3], answers[0], kills[3]
    );
}
