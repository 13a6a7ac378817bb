//! Our own kernel (`vistara kernel build`) in both monitors: parts of the conformance suite, and what guests need of it.
//!
//! It is looked for in the kernel store that `VISTARA_TEST_OWN_KERNELS` names, or `target/vm-tests/own-kernels`; skipped, with
//! the command that builds it, where there is none. To run the whole of the other suites on it, name that store to them as
//! `VISTARA_TEST_KERNELS`.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::guest::{self, Channel};
use conformance::{Lines, Subject, accelerator, kvm, launch, patience, soon};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use vistara_host::{facts, kvm as probe};
use vistara_machine::boot::{Kernel, KernelStore};
use vistara_machine::firecracker::{self, FirecrackerOptions, FirecrackerVmm};
use vistara_machine::qemu::{self, QemuOptions, QemuVmm};
use vistara_machine::{Disk, Fence, GuestShare, LaunchPlan, Nic, Start, Vm, Vmm};
use vistara_model::{Accelerator, Bytes, KvmVerdict, MachineId, Rates};

/// The user as which machines run when the tests do as root.
const USER: (u32, u32) = (61_007, 61_008);

/// The kernel, or how to get one.
fn kernel() -> Result<Kernel, String> {
    let dir = std::env::var_os("VISTARA_TEST_OWN_KERNELS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/vm-tests/own-kernels"),
        PathBuf::from,
    );
    let none = || {
        format!(
            "there is no kernel of our own in {dir:?}; build one (it takes many minutes): cargo run --package vistara-machine --example build_kernel target/vm-tests/own-kernels"
        )
    };
    if !dir.exists() {
        return Err(none());
    }
    let store = KernelStore::open(&dir).map_err(|error| error.to_string())?;
    let kernel = store.default_kernel().map_err(|error| error.to_string())?;
    kernel
        .filter(|kernel| kernel.record.release.ends_with("-vistara"))
        .ok_or_else(none)
}

fn plan(dir: &Path, accelerator: Accelerator, channel: Channel, overhead: Bytes) -> LaunchPlan {
    let kernel = kernel().unwrap();
    let mut bytes = [0; 16];
    std::io::Read::read_exact(
        &mut std::fs::File::open("/dev/urandom").unwrap(),
        &mut bytes,
    )
    .unwrap();
    LaunchPlan {
        id: MachineId::from_random(bytes),
        dir: dir.to_owned(),
        accelerator,
        vcpus: 1,
        memory: Bytes::mib(128),
        huge_pages: false,
        start: Start::Linux(guest::boot_of(kernel.vmlinux(), &kernel.modules(), channel).unwrap()),
        capturable: false,
        disks: vec![],
        nic: None,
        shares: vec![],
        rates: Rates::default(),
        fence: Fence {
            uid_gid: facts::is_root().then_some(USER),
            memory_max: Bytes(Bytes::mib(128).0 + overhead.0),
            pids_max: 64,
            cpu_millis: None,
        },
    }
}

fn skip<T>(reason: impl std::fmt::Display) -> Option<T> {
    println!("SKIP: {reason}");
    None
}

/// The monitor's process; what else may be left is looked for with the other kernel.
fn left(vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
    let (pid, start) = (vm.record().pid, vm.record().pid_start_ticks);
    Box::new(move || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let alive = facts::start_ticks(pid) == Some(start) && !stat.contains(") Z ");
        alive
            .then(|| format!("process {pid}"))
            .into_iter()
            .collect()
    })
}

struct Qemu;

#[async_trait::async_trait]
impl Subject for Qemu {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        if let Err(reason) = kernel() {
            return skip(reason);
        }
        let options = QemuOptions {
            program: None,
            virtiofsd: None,
            kvm: kvm(),
        };
        match QemuVmm::detect(options).await {
            Ok(vmm) if !vmm.capabilities().accelerators.contains(&accelerator()) => {
                skip(format!("{} cannot be had here", accelerator()))
            }
            Ok(vmm) => Some(Arc::new(vmm)),
            Err(error) => skip(error),
        }
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        plan(dir, accelerator(), Channel::Port, qemu::OVERHEAD_MAX)
    }

    fn leftovers(&self, vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
        left(vm)
    }
}

struct Firecracker;

/// Whether guests run here: found once, by running one.
fn kvm_works() -> &'static KvmVerdict {
    static VERDICT: OnceLock<KvmVerdict> = OnceLock::new();
    VERDICT.get_or_init(|| match probe::probe(probe::PROBE_BOUND * patience()) {
        probe::Verdict::Works => KvmVerdict::Works,
        probe::Verdict::Absent(why) => KvmVerdict::Absent(why),
        probe::Verdict::Broken(why) => KvmVerdict::Broken(why),
    })
}

#[async_trait::async_trait]
impl Subject for Firecracker {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        if let Err(reason) = kernel() {
            return skip(reason);
        }
        let options = FirecrackerOptions {
            program: None,
            jailer: None,
            slirp4netns: None,
            cpu_template: None,
            kvm: kvm_works().clone(),
        };
        let vmm = match FirecrackerVmm::detect(options).await {
            Ok(vmm) => vmm,
            Err(error) => return skip(error),
        };
        match kvm_works() {
            KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => {
                skip(format!("KVM does not run guests here: {why}"))
            }
            _ => Some(Arc::new(vmm)),
        }
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        let overhead = firecracker::OVERHEAD_MAX;
        plan(dir, Accelerator::Kvm, Channel::Vsock, overhead)
    }

    fn leftovers(&self, vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
        left(vm)
    }
}

/// What a command prints in the guest.
async fn sh(lines: &mut Lines, command: &str) -> String {
    lines.say(&format!("sh {command}")).await;
    let mut printed = String::new();
    loop {
        let line = lines.hear().await;
        if let Some(code) = line.strip_prefix("done ") {
            printed.push_str(&format!("={code}"));
            return printed;
        }
        if !line.is_empty() {
            printed.push_str(&line);
            printed.push('\n');
        }
    }
}

/// A guest has what the agent and ordinary programs ask its kernel for: each a command, and the beginning of what it prints.
async fn a_guest_has_what_programs_need(subject: &dyn Subject, change: fn(&mut LaunchPlan, &Path)) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let kernel = kernel().unwrap();
    assert!(kernel.record.missing.is_empty(), "{:?}", kernel.record);
    assert!(kernel.record.modules.is_empty(), "{:?}", kernel.record);
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut plan = subject.plan(dir.path());
    let root = squashfs(files.path());
    let second = ext4(files.path());
    for (path, read_only) in [(root, true), (second, false)] {
        plan.disks.push(Disk { path, read_only });
    }
    change(&mut plan, files.path());
    let shared = !plan.shares.is_empty();
    let networked = plan.nic.is_some();
    let vm = launch(&*vmm, &plan).await;
    let mut lines = Lines::open(&*vm).await;
    lines.echo("up").await;
    let release = sh(&mut lines, "uname -r").await;
    assert_eq!(release, format!("{}\n=0", kernel.record.release));
    let mut wanted = vec![
        // The root as the agent makes it: a compressed disk below, a written one above.
        (
            "mkdir -p /r /w /n; mount -t squashfs -o ro /dev/vda /r && cat /r/hello",
            "squashed\n=0",
        ),
        (
            "mount -t ext4 /dev/vdb /w && mkdir -p /w/u /w/k && mount -t overlay -o lowerdir=/r,upperdir=/w/u,workdir=/w/k o /n && echo over > /n/hello && cat /r/hello /n/hello",
            "squashed\nover\n=0",
        ),
        (
            "echo 2 > /n/.x; ln /n/.x /n/.y; mknod /n/null c 1 3; ls /n | wc -l",
            "",
        ),
        // What the agent mounts and writes.
        (
            "mkdir -p /dev/pts /dev/shm /dev/mqueue; mount -t devpts devpts /dev/pts; mount -t mqueue mqueue /dev/mqueue; mount -t tmpfs -o mode=1777 shm /dev/shm; ls /dev/ptmx",
            "/dev/ptmx\n=0",
        ),
        (
            "mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers",
            "cpuset cpu io memory pids\n=0",
        ),
        (
            "mkdir /sys/fs/cgroup/held; echo 1 > /sys/fs/cgroup/held/cgroup.freeze; cat /sys/fs/cgroup/held/cgroup.freeze",
            "1\n=0",
        ),
        (
            "echo y > /sys/kernel/mm/lru_gen/enabled; echo 1000 > /sys/kernel/mm/lru_gen/min_ttl_ms; cat /sys/kernel/mm/lru_gen/min_ttl_ms",
            "1000\n=0",
        ),
        ("grep -c '^oom_kill ' /proc/vmstat", "1\n=0"),
        (
            "echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
            "0\n=0",
        ),
        (
            "cat /sys/class/misc/hw_random/rng_current",
            "virtio_rng.0\n=0",
        ),
        (
            "ls /sys/bus/virtio/drivers | grep -E -c 'virtio_(balloon|blk|console|net|rng|rproc_serial)|virtiofs|vmw_vsock'",
            "8\n=0",
        ),
        // What programs ask for.
        ("unshare -m -u -i -n -p -f -U -r true", "=0"),
        (
            "cat /proc/sys/kernel/seccomp/actions_avail | grep -c errno",
            "1\n=0",
        ),
        (
            "ifconfig lo up && ping -c 1 127.0.0.1 | grep -c 'bytes from'; ping6 -c 1 ::1 | grep -c 'bytes from'",
            "1\n1\n=0",
        ),
        ("losetup /dev/loop0 /r/hello && losetup -d /dev/loop0", "=0"),
        (
            "grep -c -E '^nodev.(proc|sysfs|tmpfs|devtmpfs|devpts|cgroup2|mqueue|hugetlbfs|overlay|virtiofs)$' /proc/filesystems",
            "10\n=0",
        ),
        (
            "grep -c fuse /proc/misc; ls /dev/net/tun /dev/fuse",
            "1\n/dev/fuse\n/dev/net/tun\n=0",
        ),
        (
            "ls /proc/sys/fs/inotify/max_user_watches /proc/sys/fs/aio-max-nr /proc/sys/kernel/shmmax /proc/sys/fs/mqueue/msg_max /proc/sys/fs/epoll/max_user_watches | wc -l",
            "5\n=0",
        ),
        (
            "zcat /proc/config.gz | grep -E -c '^CONFIG_(IO_URING|FUTEX|EPOLL|SIGNALFD|TIMERFD|EVENTFD|USERFAULTFD|FILE_LOCKING|VMGENID|SECURITY_LANDLOCK|IA32_EMULATION|UNIX|PACKET)=y'",
            "13\n=0",
        ),
        // Nothing can be loaded, and nothing hides in what the kernel was started with.
        ("ls /proc/modules 2>/dev/null", "=1"),
        // The processor of the lab tells guests of KVM two sizes of its state, of which Linux warns.
        (
            "dmesg | sed '/XSAVE consistency/,/end trace/d' | grep -E -c 'BUG:|WARNING:|Call Trace'",
            "0\n=1",
        ),
    ];
    if shared {
        wanted.push(("mount -t virtiofs host /mnt && cat /mnt/note", "shared\n=0"));
    }
    if networked {
        wanted.push(("ls -d /sys/class/net/eth0", "/sys/class/net/eth0\n=0"));
    }
    for (command, expected) in wanted {
        let printed = sh(&mut lines, command).await;
        println!("{command}: {printed:?}");
        assert!(printed.starts_with(expected), "{command}: {printed}");
    }
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(subject.leftovers(&*vm)(), [] as [&str; 0]);
}

fn made(path: PathBuf, program: &str, arguments: &[&str]) -> PathBuf {
    let status = std::process::Command::new(program)
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success(), "{program} {arguments:?}");
    path
}

fn squashfs(dir: &Path) -> PathBuf {
    let (tree, path) = (dir.join("tree"), dir.join("root"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("hello"), "squashed\n").unwrap();
    let words = [tree.to_str().unwrap(), path.to_str().unwrap()];
    let words = [&words[..], &["-comp", "lz4", "-quiet", "-no-progress"]].concat();
    made(path.clone(), "mksquashfs", &words)
}

fn ext4(dir: &Path) -> PathBuf {
    let path = dir.join("written");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    made(path.clone(), "mkfs.ext4", &["-q", path.to_str().unwrap()])
}

/// What only QEMU's machines have: a directory of the host. And a network, which in Firecracker takes programs of the host.
fn with_share_and_network(plan: &mut LaunchPlan, files: &Path) {
    plan.nic = Some(Nic {
        ports: vec![],
        mac: [2, 0, 0, 0, 0, 7],
    });
    if !facts::is_root() {
        return println!("SKIP: host directories take root");
    }
    let dir = files.join("shared");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("note"), "shared\n").unwrap();
    plan.shares = vec![GuestShare {
        tag: "host".into(),
        path: dir,
        read_only: true,
    }];
}

macro_rules! suite {
    ($module:ident, $subject:expr, $change:expr) => {
        mod $module {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_guest_has_what_programs_need() {
                super::a_guest_has_what_programs_need(&$subject, $change).await;
            }

            conformance!(@tests $subject;
                launch_gives_a_running_machine_whose_guest_answers
                the_channel_is_closed_and_opened_again_without_harm
                a_guest_that_reboots_has_switched_itself_off
                a_kernels_panic_is_told_with_its_words
                pause_and_resume_may_be_repeated_and_the_guest_goes_on
                a_captured_machine_is_gone_and_its_forks_answer
            );
        }
    };
}

suite!(in_qemu, Qemu, with_share_and_network);
suite!(in_firecracker, Firecracker, |_, _| {});
