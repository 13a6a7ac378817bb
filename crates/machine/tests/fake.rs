//! The fake monitor passes the conformance suite, and does go wrong where it is told to.

// A test fails by panicking, its helpers included.
#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use conformance::{GREETING, Lines, Subject, launch, soon};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vistara_machine::fake::{FakeEnd, FakeGuest, FakeVmm, Faults};
use vistara_machine::{Fence, LaunchPlan, LinuxBoot, Start, Vm, VmEnd, Vmm, VmmError};
use vistara_model::{Accelerator, Bytes, MachineId, Rates};

fn echo(guest: &FakeGuest) -> FakeEnd {
    guest.console(GREETING);
    while let Some(stream) = guest.next_channel() {
        let mut writer = stream.try_clone().unwrap();
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { break };
            match line.as_str() {
                "off" | "reboot" => return FakeEnd::Off,
                "panic" => return FakeEnd::Panic("the test wants it".to_owned()),
                // The host may have gone between its word and our answer.
                line => drop(writeln!(writer, "{line}")),
            }
        }
    }
    FakeEnd::Off
}

struct Fake;

#[async_trait::async_trait]
impl Subject for Fake {
    async fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        Some(Arc::new(FakeVmm::new(Arc::new(echo))))
    }

    fn plan(&self, dir: &Path) -> LaunchPlan {
        LaunchPlan {
            id: MachineId::from_random([7; 16]),
            dir: dir.to_owned(),
            accelerator: Accelerator::Tcg,
            vcpus: 1,
            memory: Bytes::mib(64),
            start: Start::Linux(LinuxBoot {
                kernel: "/unused".into(),
                initramfs: "/unused".into(),
                cmdline: String::new(),
            }),
            huge_pages: false,
            capturable: false,
            disks: vec![],
            nic: None,
            shares: vec![],
            rates: Rates::default(),
            fence: Fence {
                uid_gid: None,
                memory_max: Bytes::mib(128),
                pids_max: 10,
                cpu_millis: None,
            },
        }
    }

    fn leftovers(&self, _vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send> {
        Box::new(Vec::new)
    }
}

conformance!(Fake);

fn faulty(faults: Faults) -> FakeVmm {
    let vmm = FakeVmm::new(Arc::new(echo));
    vmm.set_faults(faults);
    vmm
}

#[tokio::test]
async fn a_launch_fails_where_it_is_told_to() {
    let vmm = faulty(Faults {
        launch_failure: Some("no luck".to_owned()),
        ..Faults::default()
    });
    let dir = tempfile::tempdir().unwrap();
    match vmm.launch(&Fake.plan(dir.path())).await {
        Err(VmmError::Launch { message, .. }) => assert_eq!(message, "no luck"),
        other => panic!("{:?}", other.err()),
    }
}

#[tokio::test]
async fn a_monitor_that_crashes_and_a_guest_that_panics_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    for (end, expected) in [
        (
            FakeEnd::MonitorCrash("boom".to_owned()),
            VmEnd::Crashed {
                message: "boom".to_owned(),
            },
        ),
        (
            FakeEnd::Panic("oops".to_owned()),
            VmEnd::GuestPanic {
                message: "Kernel panic - not syncing: oops".to_owned(),
            },
        ),
    ] {
        let vmm = faulty(Faults {
            end_at_once: Some(end),
            ..Faults::default()
        });
        let vm = launch(&vmm, &Fake.plan(dir.path())).await;
        assert_eq!(soon("ending", vm.wait()).await, expected);
    }
}

#[tokio::test]
async fn a_slow_boot_can_be_killed_and_trouble_is_told_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = faulty(Faults {
        boot_delay: Some(Duration::from_secs(3600)),
        trouble: Some("the disk is full".to_owned()),
        ..Faults::default()
    });
    let vm = launch(&vmm, &Fake.plan(dir.path())).await;
    assert_eq!(vm.trouble().as_deref(), Some("the disk is full"));
    let mut lines = Lines::open(&*vm).await;
    lines.say("anybody there").await;
    vm.kill().await.unwrap();
    // The channel ends: with what was said unread, some systems call that a reset.
    let mut rest = Vec::new();
    let ended = tokio::io::AsyncReadExt::read_to_end(&mut lines.0, &mut rest);
    assert!(soon("ending", ended).await.map_or(true, |got| got == 0));
    assert_eq!(vm.trouble(), None);
}
