//! Real machines in QEMU: the conformance suite, and what only a real monitor can show (fences, disks, ports, shares).
//!
//! Skipped, with the reason on stdout, where there is no QEMU or no kernel (see `conformance/guest.rs`).

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::faults::Monitor;
use conformance::running::{self, Running};
use conformance::{
    Lines, Subject, accelerator, ends_with_this_test, guest, kvm, launch, limit, soon,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_host::facts;
use vistara_machine::qemu::{OVERHEAD_MAX, QemuOptions, QemuVmm};
use vistara_machine::{
    Adoption, Capture, Disk, Fence, GuestShare, LaunchPlan, Nic, Start, Vm, VmRecord, Vmm, VmmError,
};
use vistara_model::{Accelerator, Bytes, KvmVerdict, MachineId, PortMapping, Protocol, Rates};

/// The user as which machines run when the tests do as root.
const USER: (u32, u32) = (61_001, 61_002);

struct Qemu;

#[async_trait::async_trait]
impl Subject for Qemu {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        if let Err(reason) = guest::boot() {
            println!("SKIP: {reason}");
            return None;
        }
        let options = QemuOptions {
            program: None,
            virtiofsd: None,
            kvm: kvm(),
        };
        match QemuVmm::detect(options).await {
            Ok(vmm) if !vmm.capabilities().accelerators.contains(&accelerator()) => {
                println!("SKIP: {} cannot be had here", accelerator());
                None
            }
            Ok(vmm) => Some(Arc::new(vmm)),
            Err(error) => {
                println!("SKIP: {error}");
                None
            }
        }
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        LaunchPlan {
            id: new_id(),
            dir: dir.to_owned(),
            accelerator: accelerator(),
            vcpus: 1,
            memory: Bytes::mib(256),
            start: Start::Linux(guest::boot().unwrap()),
            huge_pages: false,
            capturable: false,
            disks: vec![],
            nic: None,
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
    std::io::Read::read_exact(
        &mut std::fs::File::open("/dev/urandom").unwrap(),
        &mut bytes,
    )
    .unwrap();
    MachineId::from_random(bytes)
}

fn left_of(record: &VmRecord) -> Vec<String> {
    conformance::left_of(record.clone())()
}

#[async_trait::async_trait]
impl Monitor for Qemu {
    async fn vmm_told(&self, kvm: KvmVerdict) -> Option<Arc<dyn Vmm>> {
        let options = QemuOptions {
            program: None,
            virtiofsd: None,
            kvm,
        };
        let vmm = QemuVmm::detect(options).await.ok()?;
        Some(Arc::new(vmm))
    }

    fn control_socket(&self, _: &VmRecord, dir: &Path) -> PathBuf {
        dir.join("qmp.sock")
    }

    fn too_little_memory(&self) -> Bytes {
        match accelerator() {
            // Translated code is the greater part.
            Accelerator::Tcg => Bytes::mib(128),
            Accelerator::Kvm => Bytes::mib(88),
        }
    }
}

conformance!(Qemu);
of_real_monitors!(Qemu);
faults!(Qemu);

/// A running machine, from a plan that the test has changed.
async fn run(change: impl FnOnce(&mut LaunchPlan)) -> Option<Running> {
    running::run(&Qemu, change).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitor_runs_fenced() {
    let Some(mut machine) = run(|_| {}).await else {
        return;
    };
    println!("fences: {:?}", machine.vm.record().fences);
    let pid = machine.vm.record().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    assert_eq!(field("CapEff:"), ["0000000000000000"]);
    if facts::is_root() {
        assert_eq!(field("Uid:"), ["61001"; 4]);
        assert_eq!(field("Gid:"), ["61002"; 4]);
        assert_eq!(field("CapBnd:"), ["0000000000000000"]);
        // Under KVM the group of its device is there, never root's.
        let groups = field("Groups:");
        assert!(!groups.contains(&"0".to_owned()), "{groups:?}");
        assert!(
            accelerator() == Accelerator::Kvm || groups.is_empty(),
            "{groups:?}"
        );
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        for fd in fds.flatten() {
            let target = std::fs::read_link(fd.path())
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let expected = [
                "/dev/null",
                "/memfd:output",
                "socket:",
                "pipe:",
                "anon_inode:",
            ];
            let boot = target.contains("vmlinux")
                || target.contains("initramfs")
                || (accelerator() == Accelerator::Kvm && target == "/dev/kvm")
                || target.contains("urandom");
            assert!(
                boot || expected.iter().any(|start| target.starts_with(start)),
                "{target}"
            );
        }
    } else {
        println!("SKIP: user, group and descriptors are checked as root only");
    }
    let version = machine.sh("cat /proc/version").await;
    assert!(version.contains("Linux version"), "{version}");
    machine.end_of(&Qemu).await;
}

/// Runs a script as one who has taken over this machine's monitor would: with its user and its namespaces, and so its root
/// directory, and without capabilities. Gives whether it succeeded, and what it said.
fn inside(machine: &Running, script: &str) -> (bool, String) {
    // To enter takes root: the namespaces first, then the user.
    let output = std::process::Command::new("nsenter")
        .stdin(std::process::Stdio::null())
        .args(["--target", &machine.vm.record().pid.to_string()])
        .args(["--mount", "--pid", "--ipc", "--uts", "--net", "--"])
        .args([
            "setpriv",
            "--reuid=61001",
            "--regid=61002",
            "--clear-groups",
        ])
        .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"])
        .args(["/bin/busybox", "sh", "-c", script])
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).trim().to_owned(),
    )
}

/// Whether a process has a namespace of this kind for itself.
fn has_its_own(pid: u32, kind: &str) -> bool {
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
    namespace(&pid.to_string()) != namespace("self")
}

/// What a taken-over monitor may do to others, and see of them and of the host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitors_user_reaches_nothing_of_other_machines_or_the_host() {
    if !facts::is_root() {
        return println!("SKIP: users of their own take root");
    }
    let files = tempfile::tempdir().unwrap();
    let own = disk(files.path(), "own", "OWN");
    let others = disk(files.path(), "others", "OTHERS");
    // One that everybody may read: what keeps a monitor from it is that it is not there.
    let open_to_all = files.path().join("open-to-all");
    std::fs::write(&open_to_all, "x").unwrap();
    let writable = |path: &Path| {
        vec![Disk {
            path: path.to_owned(),
            read_only: false,
        }]
    };
    let Some(machine) = run(|plan| plan.disks = writable(&own)).await else {
        return;
    };
    let other = run(|plan| {
        plan.disks = writable(&others);
        plan.fence.uid_gid = Some((USER.0 + 10, USER.1 + 10));
    })
    .await
    .unwrap();
    println!("fences: {:#?}", machine.vm.record().fences);
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        assert!(has_its_own(machine.vm.record().pid, kind), "{kind}");
    }
    let inside = |script: &str| inside(&machine, script);
    // It works at all, and is who it should be.
    assert_eq!(inside("busybox id -u"), (true, "61001".to_owned()));
    let (_, root) = inside("ls / /dev /etc");
    println!("its root directory:\n{root}");
    // Itself, and those that look.
    let (_, processes) = inside("cd /proc; echo [0-9]*");
    assert!(processes.starts_with("1 "), "{processes}");
    assert!(processes.split(' ').count() <= 4, "{processes}");
    // As a node makes its machines' directories, and as it does not.
    let (theirs, at) = (other.vm.record().pid, other.dir.path().display());
    let mode = |bits| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(bits);
        std::fs::set_permissions(other.dir.path(), mode).unwrap();
    };
    mode(0o755);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    for (what, script) in [
        ("another's disk", format!("cat {}", others.display())),
        ("another's directory", format!("ls {at}")),
        ("another's socket", format!("ls {at}/agent.sock")),
        ("its own directory", format!("ls {}", machine.dir.path().display())),
        ("a file that all may read", format!("cat {}", open_to_all.display())),
        ("another's monitor", format!("kill -0 {theirs}")),
        ("that it is there", format!("ls -d /proc/{theirs}")),
        ("another's command line", format!("cat /proc/{theirs}/cmdline")),
        ("another's memory", format!("head -c 1 /proc/{theirs}/mem")),
        ("another's descriptors", format!("ls /proc/{theirs}/fd")),
        ("another's root", format!("ls /proc/{theirs}/root/")),
        ("this test's process", format!("kill -0 {}", std::process::id())),
        ("that this test is there", format!("ls -d /proc/{}", std::process::id())),
        ("the host's users", "cat /etc/passwd".to_owned()),
        ("the host's mounts", "cat /proc/self/mountinfo | grep -v -e ' /usr ' -e ' / / ' | grep -e /var -e /home -e /sys".to_owned()),
        ("the host's devices", "ls /sys".to_owned()),
        ("what the host runs with", "cat /proc/cmdline".to_owned()),
        ("the host's loopback", format!("busybox nc -w 2 127.0.0.1 {port} </dev/null")),
        ("a way to anywhere", "busybox ip route | grep .".to_owned()),
        ("a network device", "grep -v -e '|' -e 'lo:' /proc/self/net/dev".to_owned()),
        ("a socket without a file", "grep '@' /proc/self/net/unix".to_owned()),
        ("a place to write at", "for d in / /etc /proc /dev /run /run/resolver /usr /usr/bin /usr/tmp /usr/local; do busybox touch $d/of-a-test && exit 0; done; exit 1".to_owned()),
        ("a new mount", "busybox mount -t tmpfs m /etc".to_owned()),
        ("another root", "busybox chroot / /bin/busybox true".to_owned()),
        ("another user", "busybox su root -c true".to_owned()),
        ("a disk of the host", "busybox mknod /dev/sda-of-a-test b 8 0".to_owned()),
        ("the kernel's settings", "echo x > /proc/sys/kernel/hostname".to_owned()),
        ("its own cgroup's limits", "for d in /sys/fs/cgroup/*/vistara /sys/fs/cgroup/vistara; do mkdir $d/of-a-test && exit 0; done; exit 1".to_owned()),
    ] {
        let (done, text) = inside(&script);
        println!("{what}: {done} {text}");
        assert!(!done, "{what}: {text}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of_machines = mounts.lines().filter(|line| line.contains(&at.to_string()));
    assert_eq!(of_machines.count(), 0, "the host's mounts are as they were");
    machine.end_of(&Qemu).await;
    other.end_of(&Qemu).await;
}

/// A network that QEMU makes itself speaks from the host's: that stays open, and is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_with_a_network_has_the_hosts_and_says_so_and_nothing_else_of_it() {
    if !facts::is_root() {
        return println!("SKIP: namespaces take root");
    }
    let network = Nic {
        ports: vec![],
        mac: [0x52, 0x54, 0, 0, 0, 7],
    };
    let Some(machine) = run(|plan| plan.nic = Some(network)).await else {
        return;
    };
    let pid = machine.vm.record().pid;
    for (kind, own) in [
        ("mnt", true),
        ("pid", true),
        ("ipc", true),
        ("uts", true),
        ("net", false),
    ] {
        assert_eq!(has_its_own(pid, kind), own, "{kind}");
    }
    let fences = &machine.vm.record().fences;
    let said = |words: &str| fences.iter().any(|fence| fence.contains(words));
    assert!(
        said("the host's network") && !said("own network namespace"),
        "{fences:?}"
    );
    // It finds name servers, and hears of others; of the host's files it has that one.
    assert_eq!(
        inside(&machine, "ls /run /run/resolver"),
        (
            true,
            "/run:\nresolver\n\n/run/resolver:\nresolv.conf".to_owned()
        )
    );
    let (_, found) = inside(&machine, "cat /etc/resolv.conf");
    let hosts = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(found, hosts.trim());
    let kept = machine.dir.path().join("resolver/resolv.conf");
    std::fs::write(&kept, "# of a test").unwrap();
    assert_eq!(inside(&machine, "cat /etc/resolv.conf").1, "# of a test");
    let again = async {
        while std::fs::read_to_string(&kept).unwrap() != hosts {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("looking for name servers", again).await;
    machine.end_of(&Qemu).await;
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
    machine.end_of(&Qemu).await;
}

/// Names the directory to the process that [`a_machine_survives_the_process_that_launched_it`] starts.
const LAUNCHER_DIR: &str = "VISTARA_TEST_LAUNCHER_DIR";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other process of the test below"]
async fn launcher_that_dies() {
    let Some(dir) = std::env::var_os(LAUNCHER_DIR).map(PathBuf::from) else {
        return;
    };
    let Some(vmm) = Qemu.vmm().await else { return };
    let vm = launch(&*vmm, &Qemu.plan(&dir.join("machine"))).await;
    std::fs::write(dir.join("record"), serde_json::to_vec(vm.record()).unwrap()).unwrap();
    // No destructor, no goodbye.
    std::process::abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_survives_the_process_that_launched_it() {
    let Some(vmm) = Qemu.vmm().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let machine = dir.path().join("machine");
    std::fs::create_dir(&machine).unwrap();
    let mut launcher = tokio::process::Command::new(std::env::current_exe().unwrap());
    launcher
        .args(["--ignored", "--exact", "launcher_that_dies"])
        .env(LAUNCHER_DIR, dir.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    assert!(
        !soon("launching", launcher.status())
            .await
            .unwrap()
            .success()
    );
    let record = std::fs::read(dir.path().join("record")).unwrap();
    let record: VmRecord = serde_json::from_slice(&record).unwrap();
    ends_with_this_test(&record);
    let vm = match soon("adopting", vmm.adopt(&machine, &record))
        .await
        .unwrap()
    {
        Adoption::Running(vm) => vm,
        Adoption::Gone(end) => panic!("gone: {end:?}"),
    };
    Lines::open(&*vm).await.echo("still here").await;
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(left_of(&record), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processors_are_two_in_the_guest() {
    let Some(mut machine) = run(|plan| plan.vcpus = 2).await else {
        return;
    };
    assert_eq!(machine.sh("nproc").await, "2");
    // A guest that answers soon has its first clock yet, until the kernel has measured the next.
    let clock = machine
        .sh("i=0; until c=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource); [ $c != tsc-early ] || [ $i -ge 100 ]; do usleep 100000; i=$((i+1)); done; echo $c")
        .await;
    // KVM offers a clock of its own; without it, only this one is as good on two.
    match accelerator() {
        Accelerator::Kvm => assert!(["kvm-clock", "tsc"].contains(&&*clock), "{clock}"),
        Accelerator::Tcg => assert_eq!(clock, "tsc"),
    }
    machine.end_of(&Qemu).await;
}

fn disk(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    let file = std::fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &file, text.as_bytes()).unwrap();
    file.set_len(1 << 20).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_come_in_their_order_and_a_read_only_one_cannot_be_written() {
    let files = tempfile::tempdir().unwrap();
    let first = disk(files.path(), "first", "FIRST");
    let second = disk(files.path(), "second", "SECOND");
    let disks = vec![
        Disk {
            path: first.clone(),
            read_only: true,
        },
        Disk {
            path: second.clone(),
            read_only: false,
        },
    ];
    let Some(mut machine) = run(|plan| plan.disks = disks).await else {
        return;
    };
    machine.load_drivers().await;
    assert_eq!(
        machine.sh("dd if=/dev/vda bs=5 count=1 2>/dev/null").await,
        "FIRST"
    );
    assert_eq!(
        machine.sh("dd if=/dev/vdb bs=6 count=1 2>/dev/null").await,
        "SECOND"
    );
    assert_eq!(
        machine.sh("cat /sys/block/vda/ro /sys/block/vdb/ro").await,
        "0\n0".replacen('0', "1", 1)
    );
    machine
        .sh("echo written | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null")
        .await;
    machine
        .sh("echo written | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")
        .await;
    machine.end_of(&Qemu).await;
    assert!(std::fs::read(&second).unwrap().starts_with(b"written"));
    assert!(std::fs::read(&first).unwrap().starts_with(b"FIRST"));
}

fn port(host_port: u16, guest_port: u16) -> PortMapping {
    PortMapping {
        host_address: std::net::Ipv4Addr::LOCALHOST,
        host_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

fn nic(port: PortMapping) -> Nic {
    Nic {
        ports: vec![port],
        mac: [0x52, 0x54, 0, 0, 0, 7],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_port_leads_into_the_guest_and_a_taken_one_is_named() {
    let Some(vmm) = Qemu.vmm().await else { return };
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = held.local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Qemu.plan(dir.path());
    plan.nic = Some(nic(port(number, 7)));
    match soon("launching", vmm.launch(&plan)).await {
        Err(VmmError::PortTaken(taken)) => assert_eq!(taken, port(number, 7)),
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    drop(held);
    let Some(mut machine) = run(|plan| plan.nic = Some(nic(port(number, 7)))).await else {
        return;
    };
    machine.load_drivers().await;
    machine
        .sh("ifconfig eth0 10.0.2.15 up; nc -l -p 7 -e cat & usleep 100000")
        .await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", number))
        .await
        .unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    soon("an answer by the network", stream.read_exact(&mut answer))
        .await
        .unwrap();
    assert_eq!(&answer, b"ping");
    assert_eq!(
        machine.sh("cat /sys/class/net/eth0/address").await,
        "52:54:00:00:00:07"
    );
    machine.end_of(&Qemu).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_directory_is_seen_and_a_read_only_one_cannot_be_changed() {
    let Some(vmm) = Qemu.vmm().await else { return };
    if let Err(reason) = &vmm.capabilities().shares {
        return println!("SKIP: no shares: {reason}");
    }
    let (open, closed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&open, &closed] {
        std::fs::write(dir.path().join("here"), "from the host").unwrap();
    }
    let share = |tag: &str, dir: &tempfile::TempDir, read_only| GuestShare {
        tag: tag.to_owned(),
        path: dir.path().to_owned(),
        read_only,
    };
    let shares = vec![share("open", &open, false), share("closed", &closed, true)];
    let Some(mut machine) = run(|plan| plan.shares = shares).await else {
        return;
    };
    machine.load_drivers().await;
    machine
        .sh("mkdir /a /b; mount -t virtiofs open /a; mount -t virtiofs closed /b")
        .await;
    assert_eq!(machine.sh("cat /a/here").await, "from the host");
    assert_eq!(machine.sh("cat /b/here").await, "from the host");
    machine
        .sh("echo changed > /a/new; echo changed > /b/here; rm /b/here; echo new > /b/new")
        .await;
    assert_eq!(
        std::fs::read_to_string(open.path().join("new")).unwrap(),
        "changed\n"
    );
    assert_eq!(
        std::fs::read_to_string(closed.path().join("here")).unwrap(),
        "from the host"
    );
    assert!(!closed.path().join("new").exists());
    machine.end_of(&Qemu).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_disk_holds_the_guest_until_there_is_room() {
    if !facts::is_root() {
        return println!("SKIP: a small file system of its own takes root");
    }
    let small = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        std::process::Command::new(args[0])
            .args(&args[1..])
            .status()
            .unwrap()
            .success()
    };
    let at = small.path().to_str().unwrap().to_owned();
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=24m", "small", &at]) {
        return println!("SKIP: a tmpfs cannot be mounted here");
    }
    let path = small.path().join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(20 << 20)
        .unwrap();
    std::fs::write(small.path().join("ballast"), vec![1; 18 << 20]).unwrap();
    let tested = async {
        let Some(mut machine) = run(|plan| {
            plan.disks = vec![Disk {
                path,
                read_only: false,
            }]
        })
        .await
        else {
            return;
        };
        machine.load_drivers().await;
        machine
            .lines
            .say("sh dd if=/dev/zero of=/dev/vda bs=1M count=12 conv=fsync 2>/dev/null")
            .await;
        let told = async {
            while machine.vm.trouble().is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon("telling of the full disk", told).await;
        println!("trouble: {:?}", machine.vm.trouble());
        std::fs::remove_file(small.path().join("ballast")).unwrap();
        assert_eq!(machine.lines.hear().await, "");
        assert_eq!(machine.lines.hear().await, "done 0");
        assert_eq!(machine.vm.trouble(), None);
        machine.end_of(&Qemu).await;
    };
    let done = tokio::time::timeout(2 * limit(), tested).await;
    assert!(mount(&["umount", &at]));
    done.unwrap();
}

/// Prints what each device costs: `cargo test -p vistara-machine --test vm_qemu -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, of use on a quiet machine only"]
async fn measure_the_launch_and_the_first_answer() {
    // With RUST_LOG=vistara_machine=debug each launch tells its parts.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).init();
    let Some(vmm) = Qemu.vmm().await else { return };
    let files = tempfile::tempdir().unwrap();
    let disks = vec![
        Disk {
            path: disk(files.path(), "a", "A"),
            read_only: true,
        },
        Disk {
            path: disk(files.path(), "b", "B"),
            read_only: false,
        },
    ];
    let share = GuestShare {
        tag: "s".to_owned(),
        path: files.path().to_owned(),
        read_only: false,
    };
    let shares = if vmm.capabilities().shares.is_ok() {
        vec![share]
    } else {
        vec![]
    };
    let nic = nic(port(39_017, 7));
    for (name, with_disks, with_nic, with_share) in [
        ("console, channel, rng", false, false, false),
        ("and two disks", true, false, false),
        ("and a network", false, true, false),
        ("and a share", false, false, true),
        ("and all of them", true, true, true),
    ] {
        let (mut calls, mut answers, mut kills) = (vec![], vec![], vec![]);
        for _ in 0..7 {
            let dir = tempfile::tempdir().unwrap();
            let mut plan = Qemu.plan(dir.path());
            plan.disks = if with_disks { disks.clone() } else { vec![] };
            plan.nic = with_nic.then(|| nic.clone());
            plan.shares = if with_share { shares.clone() } else { vec![] };
            let begin = std::time::Instant::now();
            let vm = launch(&*vmm, &plan).await;
            calls.push(begin.elapsed());
            Lines::open(&*vm).await.echo("up").await;
            answers.push(begin.elapsed());
            let begin = std::time::Instant::now();
            vm.kill().await.unwrap();
            kills.push(begin.elapsed());
        }
        for times in [&mut calls, &mut answers, &mut kills] {
            times.sort();
        }
        println!(
            "{name}: launch call {:?} (least {:?}), first answer {:?} (least {:?}), kill {:?}",
            calls[3], calls[0], answers[3], answers[0], kills[3]
        );
    }
}

/// Prints what a launch call alone costs, without and with a network: what fences add is in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, of use on a quiet machine only"]
async fn measure_the_launch_call() {
    const LAUNCHES: usize = 31;
    let Some(vmm) = Qemu.vmm().await else { return };
    for networked in [false, true] {
        let mut calls = Vec::new();
        for _ in 0..LAUNCHES {
            let dir = tempfile::tempdir().unwrap();
            let mut plan = Qemu.plan(dir.path());
            plan.nic = networked.then(|| Nic {
                ports: vec![],
                mac: [0x52, 0x54, 0, 0, 0, 7],
            });
            let begin = std::time::Instant::now();
            let vm = launch(&*vmm, &plan).await;
            calls.push(begin.elapsed());
            vm.kill().await.unwrap();
        }
        calls.sort();
        println!(
            "network: {networked}, launch call: median {:?}, quarters {:?} and {:?}, least {:?}",
            calls[LAUNCHES / 2],
            calls[LAUNCHES / 4],
            calls[LAUNCHES * 3 / 4],
            calls[0]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_go_on_with_the_captured_memory_and_see_nothing_of_each_other() {
    let Some(vmm) = Qemu.vmm().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let (root, writable) = (dir.path().join("root"), dir.path().join("writable"));
    std::fs::write(&root, vec![b'r'; 1 << 20]).unwrap();
    std::fs::write(&writable, vec![b'w'; 1 << 20]).unwrap();
    let disk = |path: &Path, read_only| Disk {
        path: path.to_owned(),
        read_only,
    };
    let shape = |dir: &Path, writable: &Path| {
        let mut plan = Qemu.plan(dir);
        // No whole MiB: what QEMU rounds up must be rounded up everywhere.
        plan.memory.0 += 4096;
        plan.disks = vec![disk(&root, true), disk(writable, false)];
        plan.nic = Some(Nic {
            ports: vec![],
            mac: [2, 0, 0, 0, 0, 1],
        });
        plan
    };
    let mut plan = shape(dir.path(), &writable);
    plan.capturable = true;
    let vm = launch(&*vmm, &plan).await;
    let lines = Lines::open(&*vm).await;
    let mut first = Running {
        vm,
        lines,
        dir: tempfile::tempdir().unwrap(),
    };
    first.load_drivers().await;
    first.sh("X=kept; echo before > /tmp/file").await;
    let vm = first.vm;
    drop(first.lines);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let capture = soon("capturing", vm.capture()).await.unwrap();
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
        let begin = std::time::Instant::now();
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
        fork.end_of(&Qemu).await;
    }
    assert_eq!(std::fs::read(&writable).unwrap()[0], b'w');
}
