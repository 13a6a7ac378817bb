//! Real unikernels in Firecracker: that they print, end and are adopted as the contract says.
//!
//! Skipped, with the reason on stdout, without Firecracker, a KVM that really runs guests, a Nanos kernel (see `conformance/unikernel.rs`) or a C
//! compiler.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::faults::Monitor;
use conformance::unikernel::{self, Shape};
use conformance::{Answers, Subject, launch, left_of, patience, soon};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_host::kvm;
use vistara_machine::firecracker::{FirecrackerOptions, FirecrackerVmm, OVERHEAD_MAX};
use vistara_machine::{
    Adoption, LaunchPlan, Nic, OutputStream, Vm, VmEnd, VmRecord, Vmm, VmmError,
};
use vistara_model::{Accelerator, Bytes, KvmVerdict, PortMapping, Protocol};
use vistara_nanos::klog;
use vistara_nanos::manifest::{ExitMatch, Manifest, Network};

const USER: (u32, u32) = (61_006, 61_006);

struct Lab {
    vmm: Arc<dyn Vmm>,
}

async fn detected(kvm: KvmVerdict) -> Result<FirecrackerVmm, VmmError> {
    let options = FirecrackerOptions {
        program: std::env::var_os("VISTARA_FIRECRACKER").map(PathBuf::from),
        jailer: None,
        slirp4netns: None,
        cpu_template: None,
        kvm,
    };
    FirecrackerVmm::detect(options).await
}

async fn lab() -> Option<Lab> {
    if let Err(reason) = unikernel::can_be_made() {
        println!("SKIP: {reason}");
        return None;
    }
    let vmm = match detected(KvmVerdict::Works).await {
        Ok(vmm) => vmm,
        Err(error) => {
            println!("SKIP: {error}");
            return None;
        }
    };
    // In the lab all is slow at first.
    match kvm::probe(kvm::PROBE_BOUND * patience()) {
        kvm::Verdict::Works => Some(Lab { vmm: Arc::new(vmm) }),
        kvm::Verdict::Absent(why) | kvm::Verdict::Broken(why) => {
            println!("SKIP: KVM does not run guests here: {why}");
            None
        }
    }
}

fn plan(dir: &Path, arguments: &[&str]) -> LaunchPlan {
    let shape = Shape {
        accelerator: Accelerator::Kvm,
        user: USER,
        overhead: OVERHEAD_MAX,
    };
    let manifest = Manifest {
        // The kernel's own codes do not restart the machine: by that its failures are told from ends.
        reboot_on_exit: Some(ExitMatch::OneOf(
            (0..=255)
                .filter(|code| !(125..=127).contains(code))
                .collect(),
        )),
        network: Network::Static {
            address: Ipv4Addr::new(10, 0, 2, 15),
            netmask: Ipv4Addr::new(255, 255, 255, 0),
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
        },
        ..Manifest::default()
    };
    unikernel::plan(dir, &shape, arguments, manifest)
}

impl Lab {
    fn plan(&self, dir: &Path, arguments: &[&str]) -> LaunchPlan {
        plan(dir, arguments)
    }
}

struct FirecrackerNanos;

#[async_trait::async_trait]
impl Subject for FirecrackerNanos {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        Some(lab().await?.vmm)
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        plan(dir, &unikernel::ANSWERS)
    }

    fn ending_plan(&self, dir: &Path) -> LaunchPlan {
        plan(dir, &unikernel::ENDS)
    }

    fn answers(&self) -> Answers {
        Answers::Output
    }

    fn lacks(&self) -> &'static [(&'static str, &'static str)] {
        &unikernel::LACKS
    }

    fn leftovers(&self, vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
        left_of(vm.record().clone())
    }
}

#[async_trait::async_trait]
impl Monitor for FirecrackerNanos {
    async fn vmm_told(&self, kvm: KvmVerdict) -> Option<Arc<dyn Vmm>> {
        Some(Arc::new(detected(kvm).await.ok()?))
    }

    fn control_socket(&self, record: &VmRecord, _: &Path) -> PathBuf {
        Path::new(record.backend["root"].as_str().unwrap()).join("api.sock")
    }

    fn too_little_memory(&self) -> Bytes {
        Bytes::mib(24)
    }
}

conformance!(FirecrackerNanos);
faults!(FirecrackerNanos);
ends_at_any_moment!(FirecrackerNanos);

async fn all(mut output: OutputStream) -> String {
    let mut text = Vec::new();
    soon("reading", output.read_to_end(&mut text))
        .await
        .unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

fn recorded(plan: &LaunchPlan) -> Option<i32> {
    let mut disk = File::open(&plan.disks[0].path).unwrap();
    klog::read(&mut disk)
        .unwrap()
        .map(|record| record.exit_code)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_and_exit_codes_are_exact() {
    let Some(lab) = lab().await else { return };
    for code in [0, 1, 77, 126, 127, 128, 255] {
        let dir = tempfile::tempdir().unwrap();
        let plan = lab.plan(dir.path(), &["exit", &code.to_string()]);
        let begin = std::time::Instant::now();
        let vm = launch(&*lab.vmm, &plan).await;
        let output = vm.open_output().unwrap();
        let end = soon("ending", vm.wait()).await;
        println!("code {code}: {end:?} after {:?}", begin.elapsed());
        match code {
            // Told as a kernel's failure is; the record on the disk says that it was the program's.
            126 | 127 => assert!(matches!(end, VmEnd::GuestPanic { .. }), "{end:?}"),
            _ => assert_eq!(end, VmEnd::GuestOff),
        }
        let printed = all(output).await;
        assert!(printed.contains(&format!("code {code}")), "{printed:?}");
        assert_eq!(recorded(&plan), (code != 0).then_some(code));
        let names = std::fs::read_dir(dir.path()).unwrap();
        let left: Vec<String> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "disk" && name != "end.json")
            .collect();
        assert_eq!(left, [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_whose_output_nobody_reads_waits_and_loses_nothing() {
    let Some(lab) = lab().await else { return };
    let dir = tempfile::tempdir().unwrap();
    // Some 45 bytes a line: more than the pipe takes, once it is made smaller. Each byte is a trap, and in the lab those are
    // slow.
    let lines = 1_000;
    let plan = lab.plan(dir.path(), &["flood", &lines.to_string()]);
    let vm = launch(&*lab.vmm, &plan).await;
    let pipe = File::open(dir.path().join("output.pipe")).unwrap();
    rustix::pipe::fcntl_setpipe_size(&pipe, 4096).unwrap();
    drop(pipe);
    let record = vm.record().clone();
    drop(vm);
    tokio::time::sleep(Duration::from_secs(15)).await;
    let adopted = soon("adopting", lab.vmm.adopt(dir.path(), &record)).await;
    let Adoption::Running(vm) = adopted.unwrap() else {
        panic!("it should wait for a reader");
    };
    let printed = all(vm.open_output().unwrap()).await;
    assert_eq!(soon("ending", vm.wait()).await, VmEnd::GuestOff);
    let told: Vec<&str> = printed
        .lines()
        .filter(|line| line.starts_with("line "))
        .collect();
    assert_eq!(told.len(), lines);
    for (number, line) in told.iter().enumerate() {
        assert!(line.starts_with(&format!("line {number:06} ")), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_neither_agent_nor_power_button_and_a_kill_ends_it() {
    let Some(lab) = lab().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let plan = lab.plan(dir.path(), &["wait"]);
    let vm = launch(&*lab.vmm, &plan).await;
    for refused in [
        vm.open_channel().await.map(drop),
        vm.press_power_button().await,
    ] {
        let refused = refused.err().unwrap();
        assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    }
    let mut output = vm.open_output().unwrap();
    let mut text = String::new();
    while !text.contains("waiting") {
        let mut part = [0; 256];
        let got = soon("reading", output.read(&mut part)).await.unwrap();
        assert!(got > 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&part[..got]));
    }
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(vm.wait().await, VmEnd::Killed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_that_kills_the_program_is_its_code() {
    let Some(lab) = lab().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let plan = lab.plan(dir.path(), &["abort"]);
    let vm = launch(&*lab.vmm, &plan).await;
    let output = vm.open_output().unwrap();
    assert_eq!(soon("ending", vm.wait()).await, VmEnd::GuestOff);
    let printed = all(output).await;
    assert!(printed.contains("*** signal 6 received"), "{printed}");
    assert_eq!(recorded(&plan), Some(6));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_port_leads_into_the_unikernel() {
    let Some(lab) = lab().await else { return };
    if let Err(reason) = &lab.vmm.capabilities().user_network {
        return println!("SKIP: machines have no network here: {reason}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut plan = lab.plan(dir.path(), &["echo"]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = free.local_addr().unwrap().port();
    drop(free);
    plan.memory = Bytes::mib(128);
    plan.fence.memory_max = Bytes(Bytes::mib(128).0 + OVERHEAD_MAX.0);
    plan.nic = Some(Nic {
        ports: vec![PortMapping {
            host_address: Ipv4Addr::LOCALHOST,
            host_port: number,
            guest_port: 7,
            protocol: Protocol::Tcp,
        }],
        mac: [0x52, 0x54, 0, 0, 0, 8],
    });
    let vm = launch(&*lab.vmm, &plan).await;
    let answer = async {
        loop {
            let dialled = tokio::net::TcpStream::connect(("127.0.0.1", number)).await;
            let mut stream = dialled.unwrap();
            stream.write_all(b"ping").await.unwrap();
            let mut answer = [0; 4];
            if stream.read_exact(&mut answer).await.is_ok() {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(&soon("an answer by the network", answer).await, b"ping");
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(vm.wait().await, VmEnd::Killed);
    std::net::TcpListener::bind(("127.0.0.1", number)).unwrap();
}
