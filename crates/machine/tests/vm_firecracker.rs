//! Real machines in Firecracker: the conformance suite, and what only a real monitor can show (jail, faults, disks, forks).
//!
//! Skipped, with the reason on stdout, without Firecracker, without a KVM that really runs guests, or without a kernel (see
//! `conformance/guest.rs`). `cargo xtask lab --tests` has all three wherever Firecracker is installed.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::{Lines, Subject, ends_with_this_test, guest, launch, limit, slower, soon};
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
        program: None,
        jailer: None,
        slirp4netns: None,
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

conformance!(Firecracker);
of_real_monitors!(Firecracker);

/// A running machine with its lines, from a plan that the test has changed.
struct Running {
    vm: Box<dyn Vm>,
    lines: Lines,
    dir: tempfile::TempDir,
}

async fn run(change: impl FnOnce(&mut LaunchPlan)) -> Option<Running> {
    let vmm = Firecracker.vmm().await?;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Firecracker.plan(dir.path());
    change(&mut plan);
    let vm = launch(&*vmm, &plan).await;
    let mut lines = Lines::open(&*vm).await;
    lines.echo("up").await;
    Some(Running { vm, lines, dir })
}

impl Running {
    /// What a command prints in the guest.
    async fn sh(&mut self, command: &str) -> String {
        self.lines.say(&format!("sh {command}")).await;
        let mut printed = String::new();
        loop {
            let line = self.lines.hear().await;
            if line.starts_with("done ") {
                return printed.trim_end().to_owned();
            }
            printed.push_str(&line);
            printed.push('\n');
        }
    }

    async fn load_drivers(&mut self) {
        self.lines.say("load").await;
        assert_eq!(self.lines.hear().await, "loaded");
    }

    fn root(&self) -> PathBuf {
        self.vm.record().backend["root"].as_str().unwrap().into()
    }

    async fn end(self) {
        let left = Firecracker.leftovers(&*self.vm);
        soon("killing", self.vm.kill()).await.unwrap();
        assert_eq!(left(), [] as [&str; 0]);
    }
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
    machine.end().await;
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
    machine.end().await;
}

fn port(host_port: u16, guest_port: u16) -> PortMapping {
    PortMapping {
        host_address: std::net::Ipv4Addr::LOCALHOST,
        host_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

fn nic(ports: Vec<PortMapping>) -> Nic {
    Nic {
        ports,
        mac: [0x52, 0x54, 0, 0, 0, 7],
    }
}

/// Whether machines have a network here; said on stdout where not.
async fn networked() -> Option<Arc<dyn Vmm>> {
    let vmm = Firecracker.vmm().await?;
    if let Err(reason) = &vmm.capabilities().user_network {
        println!("SKIP: machines have no network here: {reason}");
        return None;
    }
    Some(vmm)
}

/// What a machine's network runs on: the process beside Firecracker.
fn helper(record: &VmRecord) -> u32 {
    let pid = record.backend["network"]["pid"].as_u64().unwrap();
    u32::try_from(pid).unwrap()
}

const ADDRESS: &str = "ifconfig eth0 10.0.2.15 up; route add default gw 10.0.2.2";

/// What comes back on a connection to a port of the host, made until something does: it is accepted before the guest listens.
async fn echoed(number: u16, text: &[u8]) -> Vec<u8> {
    let answer = async {
        loop {
            let dialled = tokio::net::TcpStream::connect(("127.0.0.1", number)).await;
            let mut stream = dialled.unwrap();
            stream.write_all(text).await.unwrap();
            let mut answer = vec![0; text.len()];
            if stream.read_exact(&mut answer).await.is_ok() {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("an answer by the network", answer).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_port_leads_into_the_guest_and_a_taken_one_is_named() {
    let Some(vmm) = networked().await else { return };
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = held.local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Firecracker.plan(dir.path());
    plan.nic = Some(nic(vec![port(number, 7)]));
    match soon("launching", vmm.launch(&plan)).await {
        Err(VmmError::PortTaken(taken)) => assert_eq!(taken, port(number, 7)),
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    drop(held);
    let mut machine = run(|plan| plan.nic = Some(nic(vec![port(number, 7)])))
        .await
        .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!("{ADDRESS}; nc -ll -p 7 -e cat >/dev/null 2>&1 &"))
        .await;
    assert_eq!(echoed(number, b"ping").await, b"ping");
    let mac = machine.sh("cat /sys/class/net/eth0/address").await;
    assert_eq!(mac, "52:54:00:00:00:07");
    // Another process takes the machine over: its network has gone on.
    let record = machine.vm.record().clone();
    let record: VmRecord = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
    drop((machine.vm, machine.lines));
    let adopted = soon("adopting", vmm.adopt(machine.dir.path(), &record)).await;
    let Adoption::Running(vm) = adopted.unwrap() else {
        panic!("it runs");
    };
    assert_eq!(echoed(number, b"pong").await, b"pong");
    assert_eq!(vm.trouble(), None);
    let helper = helper(&record);
    assert!(facts::start_ticks(helper).is_some());
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(facts::start_ticks(helper), None);
    assert_eq!(left_of(&record), [] as [&str; 0]);
    assert!(!machine.dir.path().join("network").exists());
    std::net::TcpListener::bind(("127.0.0.1", number)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_reaches_what_the_host_reaches_but_not_its_loopback() {
    if networked().await.is_none() {
        return;
    }
    // An address of the host that is no loopback's, whatever network it has.
    let ip = |words: &[&str]| {
        let run = Command::new("ip").args(words).output();
        run.is_ok_and(|output| output.status.success())
    };
    let name = format!("vst{}", std::process::id());
    let made = ip(&["link", "add", &name, "type", "dummy"])
        && ip(&["addr", "add", "198.51.100.77/32", "dev", &name])
        && ip(&["link", "set", &name, "up"]);
    if !made {
        ip(&["link", "del", &name]);
        return println!("SKIP: this host can have no further address");
    }
    let tested = async {
        let outside = std::net::TcpListener::bind("198.51.100.77:0").unwrap();
        let inner = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut machine = run(|plan| plan.nic = Some(nic(vec![]))).await.unwrap();
        machine.load_drivers().await;
        machine.sh(ADDRESS).await;
        let number = inner.local_addr().unwrap().port();
        let dial = format!("nc -w 3 10.0.2.2 {number} </dev/null && echo INSIDE");
        let said = machine.sh(&dial).await;
        assert!(!said.contains("INSIDE"), "{said}");
        let number = outside.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = outside.accept().unwrap();
            std::io::Write::write_all(&mut stream, b"from outside").unwrap();
        });
        let dial = format!("nc -w 10 198.51.100.77 {number} </dev/null");
        assert_eq!(machine.sh(&dial).await, "from outside");
        machine.end().await;
    };
    let done = tokio::time::timeout(2 * limit(), tested).await;
    assert!(ip(&["link", "del", &name]));
    done.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_whose_helper_dies_is_told_and_the_machine_goes_on() {
    if networked().await.is_none() {
        return;
    }
    let mut machine = run(|plan| plan.nic = Some(nic(vec![]))).await.unwrap();
    assert_eq!(machine.vm.trouble(), None);
    signal(helper(machine.vm.record()), "-9");
    let told = async {
        loop {
            if let Some(trouble) = machine.vm.trouble() {
                return trouble;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let trouble = soon("telling", told).await;
    assert!(trouble.contains("network"), "{trouble}");
    machine.lines.echo("still here").await;
    machine.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_have_a_network_each() {
    let Some(vmm) = networked().await else { return };
    let mut machine = run(|plan| {
        plan.capturable = true;
        plan.nic = Some(nic(vec![]));
    })
    .await
    .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!("{ADDRESS}; nc -ll -p 7 -e cat >/dev/null 2>&1 &"))
        .await;
    drop(machine.lines);
    let capture = Arc::new(soon("capturing", machine.vm.capture()).await.unwrap());
    let mut forks = Vec::new();
    for _ in 0..2 {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = free.local_addr().unwrap().port();
        drop(free);
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Firecracker.plan(dir.path());
        plan.nic = Some(nic(vec![port(number, 7)]));
        plan.start = Start::Fork(Arc::clone(&capture));
        let begin = Instant::now();
        let vm = launch(&*vmm, &plan).await;
        println!("fork: launch call {:?}", begin.elapsed());
        forks.push((vm, number, dir));
    }
    for (_, number, _) in &forks {
        let word = format!("to {number}");
        assert_eq!(echoed(*number, word.as_bytes()).await, word.as_bytes());
    }
    for (vm, _, _) in &forks {
        soon("killing", vm.kill()).await.unwrap();
        assert_eq!(left_of(vm.record()), [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processors_are_two_in_the_guest() {
    let Some(mut machine) = run(|plan| plan.vcpus = 2).await else {
        return;
    };
    assert_eq!(machine.sh("nproc").await, "2");
    machine.end().await;
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_that_is_killed_from_outside_has_crashed() {
    let Some(machine) = run(|_| {}).await else {
        return;
    };
    let left = Firecracker.leftovers(&*machine.vm);
    signal(machine.vm.record().pid, "-9");
    match soon("ending", machine.vm.wait()).await {
        VmEnd::Crashed { message } => assert!(message.contains("signal 9"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(left(), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_api_is_gone_can_still_be_taken_over_held_and_killed() {
    let Some(machine) = run(|plan| plan.capturable = true).await else {
        return;
    };
    let vmm = Firecracker.vmm().await.unwrap();
    std::fs::remove_file(machine.root().join("api.sock")).unwrap();
    match soon("capturing", machine.vm.capture()).await {
        Err(VmmError::Control { message, .. }) => assert!(message.contains("API"), "{message}"),
        other => panic!("{other:?}"),
    }
    let record = machine.vm.record().clone();
    drop((machine.vm, machine.lines));
    let adopted = soon("adopting", vmm.adopt(machine.dir.path(), &record)).await;
    let Adoption::Running(vm) = adopted.unwrap() else {
        panic!("it runs");
    };
    let mut lines = Lines::open(&*vm).await;
    lines.echo("there").await;
    soon("holding", vm.pause()).await.unwrap();
    soon("letting go", vm.resume()).await.unwrap();
    lines.echo("still there").await;
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(left_of(&record), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_that_stands_still_is_taken_over_as_it_is_and_can_be_killed() {
    let Some(machine) = run(|_| {}).await else {
        return;
    };
    let vmm = Firecracker.vmm().await.unwrap();
    signal(machine.vm.record().pid, "-STOP");
    let record = machine.vm.record().clone();
    drop((machine.vm, machine.lines));
    let begin = Instant::now();
    let adopted = soon("adopting", vmm.adopt(machine.dir.path(), &record)).await;
    let Adoption::Running(vm) = adopted.unwrap() else {
        panic!("it is there");
    };
    soon("killing", vm.kill()).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(left_of(&record), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_booted_is_refused_with_the_reason_and_leaves_nothing() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let Start::Linux(good) = Firecracker.plan(files.path()).start else {
        unreachable!()
    };
    let text = disk(files.path(), "text", "no kernel at all", 0o644);
    // The header of a program for another processor (183, AArch64).
    let mut foreign = std::fs::read(&good.kernel).unwrap();
    foreign[18] = 183;
    foreign.truncate(1 << 20);
    let foreign_path = files.path().join("foreign");
    std::fs::write(&foreign_path, foreign).unwrap();
    for kernel in [files.path().join("missing"), text, foreign_path] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Firecracker.plan(dir.path());
        let mut boot = good.clone();
        boot.kernel = kernel.clone();
        plan.start = Start::Linux(boot);
        let error = soon("launching", vmm.launch(&plan)).await.err().unwrap();
        println!("{}: {error}", kernel.display());
        match error {
            VmmError::Io { path, .. } => assert_eq!(path, kernel),
            VmmError::Launch { message, .. } => assert!(!message.is_empty()),
            other => panic!("{other}"),
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_kvm_every_plan_is_refused_with_the_reason() {
    let mut options = options();
    options.kvm = KvmVerdict::Broken("guests are emulated".to_owned());
    let Ok(vmm) = FirecrackerVmm::detect(options).await else {
        return println!("SKIP: no Firecracker");
    };
    assert_eq!(vmm.capabilities().accelerators, []);
    if guest::boot_with(guest::Channel::Vsock).is_err() {
        return println!("SKIP: no kernel");
    }
    let dir = tempfile::tempdir().unwrap();
    match vmm.launch(&Firecracker.plan(dir.path())).await.err() {
        Some(VmmError::Unsupported { reason, .. }) => {
            assert!(reason.contains("guests are emulated"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_beyond_its_memory_limit_is_ended_with_that_reason() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Firecracker.plan(dir.path());
    plan.fence.memory_max = Bytes::mib(48);
    let vm = match soon("launching", vmm.launch(&plan)).await {
        Ok(vm) => vm,
        // It may not even come so far as to start the guest.
        Err(error) => return println!("refused: {error}"),
    };
    ends_with_this_test(vm.record());
    let held = vm
        .record()
        .fences
        .iter()
        .any(|fence| fence.starts_with("cgroup: memory"));
    if !held {
        println!("SKIP: no memory cgroup");
        return vm.kill().await.unwrap();
    }
    match soon("ending", vm.wait()).await {
        VmEnd::Crashed { message } => assert!(message.contains("memory limit"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(left_of(vm.record()), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_disk_fails_the_guests_writes_and_is_told() {
    if !facts::is_root() {
        return println!("SKIP: a small file system of its own takes root");
    }
    let small = tempfile::tempdir().unwrap();
    let at = small.path().to_str().unwrap().to_owned();
    let mount = |args: &[&str]| {
        let status = Command::new(args[0]).args(&args[1..]).status();
        status.unwrap().success()
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=24m", "small", &at]) {
        return println!("SKIP: a tmpfs cannot be mounted here");
    }
    let path = small.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(20 << 20).unwrap();
    drop(file);
    std::fs::write(small.path().join("ballast"), vec![1; 18 << 20]).unwrap();
    let tested = async {
        let own = vec![Disk {
            path,
            read_only: false,
        }];
        let Some(mut machine) = run(|plan| plan.disks = own).await else {
            return;
        };
        machine.load_drivers().await;
        let write = "dd if=/dev/zero of=/dev/vda bs=1M count=12 conv=fsync 2>/dev/null; echo $?";
        assert_eq!(machine.sh(write).await, "1");
        let told = async {
            while machine.vm.trouble().is_none() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        soon("telling of the full disk", told).await;
        println!("trouble: {:?}", machine.vm.trouble());
        std::fs::remove_file(small.path().join("ballast")).unwrap();
        assert_eq!(machine.sh(write).await, "0");
        machine.end().await;
    };
    let done = tokio::time::timeout(2 * limit(), tested).await;
    // The kernel gives up the machine's mounts a moment after its last process.
    let begin = Instant::now();
    while !mount(&["umount", &at]) {
        assert!(begin.elapsed() < Duration::from_secs(10), "it stays busy");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("unmounted after {:?}", begin.elapsed());
    done.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "each of 400,000 bytes is a trap: minutes in the lab"]
async fn a_guest_that_floods_its_console_takes_no_room_on_the_host() {
    let Some(mut machine) = run(|_| {}).await else {
        return;
    };
    let flood = "i=0; while [ $i -lt 6000 ]; do echo line $i of a flood that is written to the console for ever; i=$((i+1)); done > /dev/ttyS0";
    machine.sh(flood).await;
    let live = machine.dir.path().join("console.live");
    let len = std::fs::metadata(live).map_or(0, |data| data.len());
    println!("console: {len} bytes");
    assert!(len <= 512 << 10, "{len}");
    assert!(machine.vm.console(usize::MAX).await.len() <= 64 << 10);
    machine.end().await;
}

/// Names the directory to the process that [`a_machine_survives_the_process_that_launched_it`] starts.
const LAUNCHER_DIR: &str = "VISTARA_TEST_LAUNCHER_DIR";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other process of the test below"]
async fn launcher_that_dies() {
    let Some(dir) = std::env::var_os(LAUNCHER_DIR).map(PathBuf::from) else {
        return;
    };
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let vm = launch(&*vmm, &Firecracker.plan(&dir.join("machine"))).await;
    std::fs::write(dir.join("record"), serde_json::to_vec(vm.record()).unwrap()).unwrap();
    // No destructor, no goodbye.
    std::process::abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_survives_the_process_that_launched_it() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    // It goes off while somebody watches, and while nobody does: the log tells what the exit status cannot.
    for watched in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let machine = dir.path().join("machine");
        std::fs::create_dir(&machine).unwrap();
        let mut launcher = tokio::process::Command::new(std::env::current_exe().unwrap());
        launcher
            .args(["--ignored", "--exact", "launcher_that_dies"])
            .env(LAUNCHER_DIR, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = soon("launching", launcher.status()).await.unwrap();
        assert!(!status.success());
        let record = std::fs::read(dir.path().join("record")).unwrap();
        let record: VmRecord = serde_json::from_slice(&record).unwrap();
        ends_with_this_test(&record);
        let adopt = || async {
            soon("adopting", vmm.adopt(&machine, &record))
                .await
                .unwrap()
        };
        let Adoption::Running(vm) = adopt().await else {
            panic!("it should run");
        };
        let mut lines = Lines::open(&*vm).await;
        lines.echo("still here").await;
        lines.say("off").await;
        let end = if watched {
            soon("ending", vm.wait()).await
        } else {
            drop(vm);
            let gone = async {
                while facts::start_ticks(record.pid) == Some(record.pid_start_ticks) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            soon("going", gone).await;
            match adopt().await {
                Adoption::Gone(end) => end,
                Adoption::Running(_) => panic!("it is gone"),
            }
        };
        assert_eq!(end, VmEnd::GuestOff, "watched: {watched}");
        assert_eq!(left_of(&record), [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitor_is_jailed_and_sees_nothing_of_others() {
    if !facts::is_root() {
        return println!("SKIP: the jail takes root");
    }
    let files = tempfile::tempdir().unwrap();
    let root_disk = disk(files.path(), "root", "ROOT", 0o644);
    let shared = vec![Disk {
        path: root_disk,
        read_only: true,
    }];
    let Some(machine) = run(|plan| plan.disks = shared.clone()).await else {
        return;
    };
    let other = run(|plan| plan.disks = shared).await.unwrap();
    println!("fences: {:#?}", machine.vm.record().fences);
    let pid = machine.vm.record().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let words = line.split_whitespace().skip(1);
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("Uid:"), ["61004"; 4]);
    assert_eq!(field("Gid:"), ["61005"; 4]);
    assert_eq!(field("Groups:"), [] as [&str; 0]);
    assert_eq!(field("NSpid:"), [pid.to_string(), "1".to_owned()]);
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
        assert_ne!(namespace(&pid.to_string()), namespace("self"), "{kind}");
    }
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        let target = std::fs::read_link(fd.path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let own = [
            "/dev/null",
            "/memfd:output",
            "socket:",
            "anon_inode:",
            "/log",
            "/disk0",
            "/dev/kvm",
            "/dev/net/tun",
            "/kernel",
            "/dev/urandom",
            "pipe:",
        ];
        let console = target.ends_with("/console.live");
        assert!(
            console || own.iter().any(|start| target.starts_with(start)),
            "{target}"
        );
    }
    // A program that shares everything with the monitor: user, root directory and namespaces.
    let (host, port) = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    };
    let busybox = machine.root().join("busybox");
    std::fs::copy("/bin/busybox", &busybox).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&busybox, mode).unwrap();
    let inside = |script: &str| {
        let output = Command::new("nsenter")
            .stdin(Stdio::null())
            .args(["--target", &pid.to_string()])
            .args([
                "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd",
            ])
            .args(["--setuid", "61004", "--setgid", "61005"])
            .args(["--", "/busybox", "sh", "-c", script])
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).trim().to_owned(),
        )
    };
    let (code, listing) = inside("/busybox ls /");
    assert_eq!(code, Some(0), "{listing}");
    let mut names: Vec<&str> = listing.split_whitespace().collect();
    names.sort_unstable();
    println!("in the jail: {names:?}");
    let expected = [
        "agent.sock",
        "api.sock",
        "busybox",
        "dev",
        "disk0",
        "firecracker",
        "firecracker.pid",
        "initramfs",
        "kernel",
        "log",
        "run",
    ];
    assert_eq!(names, expected);
    let other_root = other.root();
    for (what, script) in [
        ("the host's files", "/busybox ls /etc".to_owned()),
        ("the way up", "/busybox ls /../etc".to_owned()),
        (
            "another's files",
            format!("/busybox ls {}", other_root.display()),
        ),
        (
            "another's process",
            format!("/busybox kill -0 {}", other.vm.record().pid),
        ),
        (
            "this test's process",
            format!("/busybox kill -0 {}", std::process::id()),
        ),
        ("processes at all", "/busybox ls /proc/1".to_owned()),
        (
            "the host's network",
            format!("/busybox nc -w 2 127.0.0.1 {port}"),
        ),
        (
            "a new mount",
            "/busybox mkdir /m && /busybox mount -t tmpfs m /m".to_owned(),
        ),
        ("another root", "/busybox chroot / /busybox true".to_owned()),
        (
            "a disk of the host",
            "/busybox mknod /dev/sda b 8 0".to_owned(),
        ),
        ("the shared root disk", "echo x >> /disk0".to_owned()),
        ("the shared kernel", "echo x >> /kernel".to_owned()),
        ("the console's file", "/busybox ls /console.live".to_owned()),
    ] {
        let (code, text) = inside(&script);
        println!("{what}: {code:?} {text}");
        assert_ne!(code, Some(0), "{what}: {text}");
    }
    drop(host);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains("/jail/"),
        "the host's mounts are as they were"
    );
    machine.end().await;
    other.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_go_on_with_the_captured_memory_and_see_nothing_of_each_other() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let root = disk(dir.path(), "root", "root", 0o644);
    let writable = disk(dir.path(), "writable", "wwww", 0o600);
    let shape = |dir: &Path, writable: &Path| {
        let mut plan = Firecracker.plan(dir);
        // Every byte is looked at several times, in the lab by a translated program.
        plan.memory = Bytes::mib(128);
        let disk = |path: &Path, read_only| Disk {
            path: path.to_owned(),
            read_only,
        };
        plan.disks = vec![disk(&root, true), disk(writable, false)];
        plan
    };
    let own = tempfile::tempdir().unwrap();
    let mut plan = shape(own.path(), &writable);
    plan.capturable = true;
    let vm = launch(&*vmm, &plan).await;
    let lines = Lines::open(&*vm).await;
    let mut first = Running {
        vm,
        lines,
        dir: own,
    };
    first.load_drivers().await;
    first.sh("X=kept; echo before > /tmp/file").await;
    let vm = first.vm;
    drop(first.lines);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begin = Instant::now();
    let capture = soon("capturing", vm.capture()).await.unwrap();
    println!("captured in {:?}", begin.elapsed());
    assert_eq!(left_of(vm.record()), [] as [&str; 0]);
    println!("capture holds {} KiB", capture.resident_bytes() >> 10);
    let kept = dir.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    capture.write(&kept).unwrap();
    drop(capture);
    let capture = Arc::new(Capture::read(&kept).unwrap());
    let mut forks = Vec::new();
    for number in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        std::fs::copy(&writable, &own).unwrap();
        let mut plan = shape(dir.path(), &own);
        plan.start = Start::Fork(capture.clone());
        let begin = Instant::now();
        let vm = launch(&*vmm, &plan).await;
        let launched = begin.elapsed();
        let mut lines = Lines::open(&*vm).await;
        lines.echo("there").await;
        println!(
            "fork {number}: launched after {launched:?}, answers after {:?}",
            begin.elapsed()
        );
        let mut fork = Running { vm, lines, dir };
        assert_eq!(fork.sh("echo $X; cat /tmp/file").await, "kept\nbefore");
        let change = format!("X={number}; echo {number} > /tmp/file; echo {number} > /dev/vdb");
        fork.sh(&change).await;
        forks.push((fork, own));
    }
    for (number, (mut fork, own)) in forks.into_iter().enumerate() {
        let told = fork
            .sh("sync; echo $X; cat /tmp/file; head -c 1 /dev/vda")
            .await;
        assert_eq!(told, format!("{number}\n{number}\nr"));
        let written = std::fs::read(own).unwrap();
        assert_eq!(written[0], b'0' + u8::try_from(number).unwrap());
        fork.end().await;
    }
    assert_eq!(std::fs::read(&writable).unwrap()[0], b'w');
}

/// How long 400,000 bytes take out of a machine whose network has this rate.
async fn fetching(rate: Option<Bytes>) -> Duration {
    let number = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let mut machine = run(|plan| {
        plan.nic = Some(nic(vec![port(number, 7)]));
        plan.rates.network_per_s = rate;
    })
    .await
    .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!(
            "{ADDRESS}; nc -ll -p 7 -e head -c 400000 /dev/zero >/dev/null 2>&1 &"
        ))
        .await;
    let fetched = async {
        loop {
            let begin = Instant::now();
            let dialled = tokio::net::TcpStream::connect(("127.0.0.1", number)).await;
            let mut text = Vec::new();
            // It is accepted before the guest listens.
            if dialled.unwrap().read_to_end(&mut text).await.is_ok() && text.len() == 400_000 {
                return begin.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let took = soon("fetching", fetched).await;
    machine.end().await;
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_networks_rate_holds() {
    if networked().await.is_none() {
        return;
    }
    let free = fetching(None).await;
    let (rate, least) = slower(400_000, free);
    let bounded = fetching(Some(rate)).await;
    println!("free {free:?}, at {rate} a second {bounded:?}, at least {least:?}");
    assert!(bounded > least, "{bounded:?}");
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
