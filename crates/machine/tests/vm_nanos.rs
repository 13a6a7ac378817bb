//! Real unikernels in QEMU: that they print, end and are adopted as the contract says.
//!
//! Skipped, with the reason on stdout, without QEMU, a Nanos kernel (`VISTARA_NANOS_KERNEL`, or
//! `/opt/vistara/nanos/kernel.img`) or a C compiler.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::{accelerator, kvm, launch, patience, soon};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use vistara_host::facts;
use vistara_machine::qemu::{OVERHEAD_MAX, QemuOptions, QemuVmm};
use vistara_machine::{
    Adoption, Disk, Fence, LaunchPlan, NanosBoot, OutputStream, Start, VmEnd, Vmm, VmmError,
};
use vistara_model::{Bytes, MachineId, Rates};
use vistara_nanos::disk::{BootDisk, DiskOptions};
use vistara_nanos::manifest::{ExitMatch, Manifest};
use vistara_nanos::tfs::{Label, VolumeId};
use vistara_nanos::{KernelFacts, klog};

const USER: (u32, u32) = (61_003, 61_003);

const PROGRAM: &str = r#"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void term(int s) { printf("asked to end\n"); exit(9); }
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 0);
    if (!strcmp(argv[1], "exit")) { printf("code %s\n", argv[2]); return atoi(argv[2]); }
    if (!strcmp(argv[1], "flood")) {
        for (int i = 0; i < atoi(argv[2]); i++) printf("line %06d of a flood that fills any pipe\n", i);
        return 0;
    }
    if (!strcmp(argv[1], "wait")) { signal(SIGTERM, term); printf("waiting\n"); for (;;) pause(); }
    if (!strcmp(argv[1], "abort")) { printf("dying\n"); abort(); }
    return 1;
}
"#;

struct Lab {
    vmm: QemuVmm,
    kernel: PathBuf,
    program: Vec<u8>,
}

async fn lab() -> Option<Lab> {
    let kernel = std::env::var_os("VISTARA_NANOS_KERNEL").map_or_else(
        || PathBuf::from("/opt/vistara/nanos/kernel.img"),
        PathBuf::from,
    );
    let Ok(bytes) = std::fs::read(&kernel) else {
        println!("SKIP: no Nanos kernel at {}", kernel.display());
        return None;
    };
    KernelFacts::read(&bytes).unwrap();
    let options = QemuOptions {
        program: None,
        virtiofsd: None,
        kvm: kvm(),
    };
    let vmm = match QemuVmm::detect(options).await {
        Ok(vmm) if !vmm.capabilities().accelerators.contains(&accelerator()) => {
            println!("SKIP: {} cannot be had here", accelerator());
            return None;
        }
        Ok(vmm) => vmm,
        Err(error) => {
            println!("SKIP: {error}");
            return None;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("p.c"), dir.path().join("p"));
    std::fs::write(&source, PROGRAM).unwrap();
    let built = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .args([&program, &source])
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("SKIP: no C compiler (apt-get install gcc)");
        return None;
    }
    let program = std::fs::read(program).unwrap();
    Some(Lab {
        vmm,
        kernel,
        program,
    })
}

impl Lab {
    fn plan(&self, dir: &Path, arguments: &[&str]) -> LaunchPlan {
        let disk = dir.join("disk");
        let manifest = Manifest {
            program: b"/p".to_vec(),
            arguments: std::iter::once("p")
                .chain(arguments.iter().copied())
                .map(|word| word.as_bytes().to_vec())
                .collect(),
            reboot_on_exit: Some(ExitMatch::AllBut(126)),
            debug_exit: true,
            ..Manifest::default()
        };
        let options = DiskOptions {
            id: VolumeId([1; 16]),
            label: Label::none(),
            free_bytes: 0,
        };
        let mut boot =
            BootDisk::create(File::create_new(&disk).unwrap(), &options, &manifest).unwrap();
        let root = boot.tree().root();
        let length = self.program.len() as u64;
        boot.tree()
            .file(root, b"p", length, &mut self.program.as_slice())
            .unwrap();
        boot.finish().unwrap();
        let mut random = [0; 16];
        std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut random).unwrap();
        LaunchPlan {
            id: MachineId::from_random(random),
            dir: dir.to_owned(),
            accelerator: accelerator(),
            vcpus: 1,
            memory: Bytes::mib(64),
            start: Start::Nanos(NanosBoot {
                kernel: self.kernel.clone(),
            }),
            huge_pages: false,
            capturable: false,
            disks: vec![Disk {
                path: disk,
                read_only: false,
            }],
            nic: None,
            shares: vec![],
            rates: Rates::default(),
            fence: Fence {
                uid_gid: facts::is_root().then_some(USER),
                memory_max: Bytes(Bytes::mib(64).0 + OVERHEAD_MAX.0),
                pids_max: 64,
                cpu_millis: None,
            },
        }
    }
}

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
        let vm = launch(&lab.vmm, &plan).await;
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
    let vm = launch(&lab.vmm, &plan).await;
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
    let vm = launch(&lab.vmm, &plan).await;
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
    let vm = launch(&lab.vmm, &plan).await;
    let printed = all(vm.open_output().unwrap()).await;
    assert_eq!(soon("ending", vm.wait()).await, VmEnd::GuestOff);
    assert!(printed.contains("*** signal 6 received"), "{printed}");
    assert_eq!(recorded(&plan), Some(6));
}
