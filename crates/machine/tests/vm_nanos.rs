//! Real unikernels in QEMU: that they print, end and are adopted as the contract says.
//!
//! Skipped, with the reason on stdout, without QEMU, a Nanos kernel (see
//! `conformance/unikernel.rs`) or a C compiler.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::faults::Monitor;
use conformance::unikernel::{self, Shape};
use conformance::{Answers, Subject, accelerator, kvm, launch, left_of, patience, soon};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use vistara_machine::qemu::{OVERHEAD_MAX, QemuOptions, QemuVmm};
use vistara_machine::{Adoption, LaunchPlan, OutputStream, Vm, VmEnd, VmRecord, Vmm, VmmError};
use vistara_model::{Bytes, KvmVerdict};
use vistara_nanos::klog;
use vistara_nanos::manifest::{ExitMatch, Manifest};

const USER: (u32, u32) = (61_003, 61_003);

struct Lab {
    vmm: Arc<dyn Vmm>,
}

async fn detected(kvm: KvmVerdict) -> Result<QemuVmm, VmmError> {
    let options = QemuOptions {
        program: None,
        virtiofsd: None,
        kvm,
    };
    QemuVmm::detect(options).await
}

async fn lab() -> Option<Lab> {
    if let Err(reason) = unikernel::can_be_made() {
        println!("SKIP: {reason}");
        return None;
    }
    match detected(kvm()).await {
        Ok(vmm) if !vmm.capabilities().accelerators.contains(&accelerator()) => {
            println!("SKIP: {} cannot be had here", accelerator());
            None
        }
        Ok(vmm) => Some(Lab { vmm: Arc::new(vmm) }),
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
    }
}

fn plan(dir: &Path, arguments: &[&str]) -> LaunchPlan {
    let shape = Shape {
        accelerator: accelerator(),
        user: USER,
        overhead: OVERHEAD_MAX,
    };
    let manifest = Manifest {
        reboot_on_exit: Some(ExitMatch::AllBut(126)),
        ..Manifest::default()
    };
    unikernel::plan(dir, &shape, arguments, manifest)
}

impl Lab {
    fn plan(&self, dir: &Path, arguments: &[&str]) -> LaunchPlan {
        plan(dir, arguments)
    }
}

struct QemuNanos;

#[async_trait::async_trait]
impl Subject for QemuNanos {
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
impl Monitor for QemuNanos {
    async fn vmm_told(&self, kvm: KvmVerdict) -> Option<Arc<dyn Vmm>> {
        Some(Arc::new(detected(kvm).await.ok()?))
    }

    fn control_socket(&self, _: &VmRecord, dir: &Path) -> PathBuf {
        dir.join("qmp.sock")
    }

    fn too_little_memory(&self) -> Bytes {
        Bytes::mib(24)
    }
}

conformance!(QemuNanos);
faults!(QemuNanos);
ends_at_any_moment!(QemuNanos);

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
        let printed = all(vm.open_output().unwrap()).await;
        let end = soon("ending", vm.wait()).await;
        println!("code {code}: {end:?} after {:?}", begin.elapsed());
        match code {
            // Told as a kernel's failure is; the record on the disk says that it was the program's.
            126 => assert!(matches!(end, VmEnd::GuestPanic { .. }), "{end:?}"),
            _ => assert_eq!(end, VmEnd::GuestOff),
        }
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
    // Some 40 bytes a line: twice what the pipe takes, once it is as small as pipes get. Each byte leaves the guest by itself, which
    // on KVM in the lab takes milliseconds when its host is busy.
    let lines = 200;
    let plan = lab.plan(dir.path(), &["flood", &lines.to_string()]);
    let vm = launch(&*lab.vmm, &plan).await;
    let pipe = File::open(dir.path().join("output.pipe")).unwrap();
    rustix::pipe::fcntl_setpipe_size(&pipe, 4096).unwrap();
    drop(pipe);
    let record = vm.record().clone();
    drop(vm);
    tokio::time::sleep(Duration::from_secs(4) * patience()).await;
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
async fn the_power_button_ends_the_program_and_there_is_no_agent() {
    let Some(lab) = lab().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let plan = lab.plan(dir.path(), &["wait"]);
    let vm = launch(&*lab.vmm, &plan).await;
    let refused = vm.open_channel().await.err().unwrap();
    assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    let mut output = vm.open_output().unwrap();
    let mut text = String::new();
    while !text.contains("waiting") {
        let mut part = [0; 256];
        let got = soon("reading", output.read(&mut part)).await.unwrap();
        assert!(got > 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&part[..got]));
    }
    vm.press_power_button().await.unwrap();
    let end = soon("ending", vm.wait()).await;
    let rest = all(output).await;
    assert_eq!(end, VmEnd::GuestOff);
    assert!(rest.contains("asked to end"), "{rest}");
    assert_eq!(recorded(&plan), Some(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_that_kills_the_program_is_its_code() {
    let Some(lab) = lab().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let plan = lab.plan(dir.path(), &["abort"]);
    let vm = launch(&*lab.vmm, &plan).await;
    let printed = all(vm.open_output().unwrap()).await;
    assert_eq!(soon("ending", vm.wait()).await, VmEnd::GuestOff);
    assert!(printed.contains("*** signal 6 received"), "{printed}");
    assert_eq!(recorded(&plan), Some(6));
}
