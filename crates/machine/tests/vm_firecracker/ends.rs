//! Faults, and ends that nobody ordered.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_api_is_gone_cannot_be_captured_and_is_taken_over_all_the_same() {
    let Some(machine) = run(|plan| plan.capturable = true).await else {
        return;
    };
    let vmm = Firecracker.vmm().await.unwrap();
    std::fs::remove_file(root(&machine).join("api.sock")).unwrap();
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
    Lines::open(&*vm).await.echo("there").await;
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(left_of(&record), [] as [&str; 0]);
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
        machine.end_of(&Firecracker).await;
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
    machine.end_of(&Firecracker).await;
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
            .args(["--ignored", "--exact", "ends::launcher_that_dies"])
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
