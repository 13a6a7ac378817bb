//! Devices of real machines: that bounds on disks hold, that huge pages come and go, and that there is entropy.

use super::{Lines, Subject, killed, launch, soon};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_host::hugepages;
use vistara_machine::{Disk, LaunchPlan, Start, VmmError};
use vistara_model::{Bytes, Rates};

/// Bytes of the disk that [`reading`] reads.
const READ: u64 = 1 << 20;

/// How long a guest takes to read a mebibyte of its first disk, past its cache; the drivers are loaded.
async fn reading(lines: &mut Lines) -> Duration {
    let begin = Instant::now();
    lines
        .say("sh dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null")
        .await;
    assert_eq!(lines.hear().await, "");
    assert_eq!(lines.hear().await, "done 0");
    begin.elapsed()
}

/// A rate, of a second, by which so much takes thrice as long as they do without any and some seconds more, and the time that they must take
/// by it: a slow host must not pass for a bound that holds, nor fail one that is not there.
pub(crate) fn slower(amount: u64, free: Duration) -> (u64, Duration) {
    let whole = 3 * free + Duration::from_secs(3);
    // A tenth of a second's worth comes at once.
    let least = whole.mul_f64(0.8);
    ((amount as f64 / whole.as_secs_f64()) as u64, least)
}

/// A fork of a machine without bounds has its own, too.
pub(crate) async fn a_disks_rate_holds_from_a_boot_on_and_in_a_fork(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("disk");
    std::fs::write(&path, vec![7; 4 << 20]).unwrap();
    let plan = |dir: &Path, rate| LaunchPlan {
        disks: vec![Disk {
            path: path.clone(),
            read_only: true,
        }],
        rates: Rates {
            disk_per_s: rate,
            ..Rates::default()
        },
        ..subject.plan(dir)
    };
    let booted = async |rate| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(dir.path(), rate);
        plan.capturable = rate.is_none();
        let vm = launch(&*vmm, &plan).await;
        let mut lines = Lines::open(&*vm).await;
        lines.say("load").await;
        assert_eq!(lines.hear().await, "loaded");
        let took = reading(&mut lines).await;
        (vm, took, dir)
    };
    let (vm, free, _dir) = booted(None).await;
    let (rate, least) = slower(READ, free);
    let rate = Bytes(rate);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let capture = Arc::new(soon("capturing", vm.capture()).await.unwrap());
    let (vm, bounded, _dir) = booted(Some(rate)).await;
    soon("killing", vm.kill()).await.unwrap();
    println!("free {free:?}, at {rate} a second {bounded:?}, at least {least:?}");
    assert!(bounded > least, "{bounded:?}");
    for rate in [Some(rate), None] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(dir.path(), rate);
        plan.start = Start::Fork(capture.clone());
        let vm = launch(&*vmm, &plan).await;
        let took = reading(&mut Lines::open(&*vm).await).await;
        println!("a fork, {rate:?}: {took:?}");
        assert_eq!(took > least, rate.is_some(), "{took:?}");
        soon("killing", vm.kill()).await.unwrap();
    }
}

/// Requests of the disk that [`asking`] makes.
const REQUESTS: u64 = 64;

/// How long a guest takes to ask its first disk so often, for a page at a time; the drivers are loaded.
async fn asking(lines: &mut Lines) -> Duration {
    // The next page is not asked for until it is wanted.
    lines
        .say("sh echo 0 > /sys/block/vda/queue/read_ahead_kb")
        .await;
    assert_eq!(lines.hear().await, "");
    assert_eq!(lines.hear().await, "done 0");
    let begin = Instant::now();
    lines
        .say(&format!(
            "sh dd if=/dev/vda of=/dev/null bs=4k count={REQUESTS} 2>/dev/null; cut -c 1-9 /sys/block/vda/stat"
        ))
        .await;
    let made: u64 = lines.hear().await.trim().parse().unwrap();
    assert!(made >= REQUESTS, "{made} requests");
    assert_eq!(lines.hear().await, "");
    assert_eq!(lines.hear().await, "done 0");
    begin.elapsed()
}

/// Whatever they weigh: the bound on bytes is not what holds them.
pub(crate) async fn a_bound_on_a_disks_requests_holds_and_one_on_its_bytes_is_another(
    subject: &dyn Subject,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("disk");
    std::fs::write(&path, vec![7; 4 << 20]).unwrap();
    let booted = async |ops: Option<u32>| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = subject.plan(dir.path());
        plan.disks = vec![Disk {
            path: path.clone(),
            read_only: true,
        }];
        plan.rates.disk_ops_per_s = ops;
        // Twice what all requests weigh comes at once.
        plan.rates.disk_per_s = ops.map(|_| Bytes::mib(5));
        let vm = launch(&*vmm, &plan).await;
        let mut lines = Lines::open(&*vm).await;
        lines.say("load").await;
        assert_eq!(lines.hear().await, "loaded");
        let took = asking(&mut lines).await;
        soon("killing", vm.kill()).await.unwrap();
        took
    };
    let free = booted(None).await;
    let (rate, least) = slower(REQUESTS, free);
    let rate = u32::try_from(rate.max(1)).unwrap();
    let bounded = booted(Some(rate)).await;
    println!("free {free:?}, at {rate} requests a second {bounded:?}, at least {least:?}");
    assert!(bounded > least, "{bounded:?}");
}

/// The suite's guest has loaded the driver of whatever kernel it is; one that has it built in needs none.
pub(crate) async fn the_guest_draws_on_the_hosts_entropy(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    let mut lines = Lines::open(&*vm).await;
    lines.say("load").await;
    assert_eq!(lines.hear().await, "loaded");
    lines
        .say("sh cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c")
        .await;
    let current = lines.hear().await;
    assert!(current.starts_with("virtio_rng"), "{current}");
    assert_eq!(lines.hear().await, "64");
    soon("killing", vm.kill()).await.unwrap();
}

pub(crate) async fn a_machine_of_huge_pages_takes_them_and_gives_them_back(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.huge_pages = true;
    plan.memory = Bytes::mib(128);
    let wanted = plan.memory.0 / hugepages::PAGE;
    let before = hugepages::pool().unwrap();
    if before.free < wanted {
        return println!(
            "SKIP: {} huge pages are free, and it takes {wanted}: sysctl vm.nr_hugepages={wanted}",
            before.free
        );
    }
    let vm = launch(&*vmm, &plan).await;
    Lines::open(&*vm).await.echo("up").await;
    let touched = hugepages::touched(vm.record().pid);
    println!("{touched} bytes of huge pages are touched");
    assert!(touched > Bytes::mib(16).0 && touched <= plan.memory.0);
    let left = subject.leftovers(&*vm);
    soon("killing", vm.kill()).await.unwrap();
    killed::nothing_is_left("huge pages", || {
        let mut left = left();
        let now = hugepages::pool().unwrap();
        if now != before {
            left.push(format!("{now:?}, and there were {before:?}"));
        }
        left
    })
    .await;
    plan.capturable = true;
    let refused = soon("launching", vmm.launch(&plan)).await.err();
    assert!(
        matches!(refused, Some(VmmError::Unsupported { .. })),
        "{refused:?}"
    );
}
