//! Forks of a captured machine.

use super::*;

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
        fork.end_of(&Firecracker).await;
    }
    assert_eq!(std::fs::read(&writable).unwrap()[0], b'w');
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_captured_goes_on_and_so_does_what_goes_on_from_it() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let writable = disk(dir.path(), "writable", "wwww", 0o600);
    let shape = |dir: &Path, writable: &Path| {
        let mut plan = Firecracker.plan(dir);
        plan.memory = Bytes::mib(128);
        plan.disks = vec![Disk {
            path: writable.to_owned(),
            read_only: false,
        }];
        plan
    };
    let own = tempfile::tempdir().unwrap();
    let plan = shape(own.path(), &writable);
    let vm = launch(&*vmm, &plan).await;
    let lines = Lines::open(&*vm).await;
    let mut first = Running {
        vm,
        lines,
        dir: own,
    };
    first.load_drivers().await;
    first.sh("X=kept; echo 1 > /dev/vda; sync").await;
    first.vm.can_snapshot().unwrap();
    let mut from = writable;
    // A fork of a fork as well: what is captured need not have booted.
    for round in 1..=2 {
        let copy = dir.path().join(format!("copy{round}"));
        let (own, to) = (from, copy.clone());
        let at_rest = Box::new(move || std::fs::copy(&own, &to).map(drop));
        let quiet = Box::pin(async { Ok(()) });
        let taken = soon("the snapshot", first.vm.snapshot(quiet, at_rest)).await;
        let taken = taken.unwrap();
        println!("round {round}: held for {:?}", taken.pause);
        // Whoever spoke with the guest finds the channel closed, and calls again.
        first.lines = Lines::open(&*first.vm).await;
        assert_eq!(first.sh("echo $X").await, "kept");
        first.sh("X=changed; echo 2 > /dev/vda; sync").await;
        let left: Vec<_> = names_in(&first.dir.path().join("jail"))
            .into_iter()
            .filter(|name| name.starts_with("taken"))
            .collect();
        assert_eq!(left, [] as [String; 0]);
        let own = tempfile::tempdir().unwrap();
        let mut plan = shape(own.path(), &copy);
        plan.start = Start::Fork(Arc::new(taken.capture));
        let vm = launch(&*vmm, &plan).await;
        let lines = Lines::open(&*vm).await;
        let mut fork = Running {
            vm,
            lines,
            dir: own,
        };
        let told = fork.sh("echo $X; head -c 1 /dev/vda").await;
        assert_eq!(told, "kept\n1");
        // The captured one is another machine, and was not held by what is done with its copy.
        assert_eq!(first.sh("echo $X; head -c 1 /dev/vda").await, "changed\n2");
        first.end_of(&Firecracker).await;
        (first, from) = (fork, copy);
    }
    // Held by its owner, its monitor answers nobody: that is said, and harms nothing.
    first.vm.pause().await.unwrap();
    let refused = first
        .vm
        .snapshot(Box::pin(async { Ok(()) }), Box::new(|| Ok(())))
        .await;
    assert!(
        matches!(refused, Err(VmmError::Control { .. })),
        "{refused:?}"
    );
    first.vm.resume().await.unwrap();
    // What fails meanwhile is told, and the machine goes on.
    let failing = Box::new(|| Err(std::io::Error::other("no room")));
    let failed = first.vm.snapshot(Box::pin(async { Ok(()) }), failing).await;
    assert!(matches!(failed, Err(VmmError::Io { .. })), "{failed:?}");
    first.lines = Lines::open(&*first.vm).await;
    assert_eq!(first.sh("echo $X").await, "kept");
    first.end_of(&Firecracker).await;
}

/// Names of all files below a directory.
fn names_in(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(names_in(&entry.path()));
        }
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names
}
