//! Faults of real monitors and of the host: each ends in the right state, with the reason, in bounded time, and frees everything.

use super::killed::{left_at_all, nothing_is_left};
use super::{Heard, Subject, ends_with_this_test, files_beside, files_in, launch, patience, soon};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_host::facts;
use vistara_machine::{Adoption, LaunchPlan, Start, VmEnd, VmRecord, Vmm, VmmError};
use vistara_model::{Accelerator, Bytes, KvmVerdict};

/// What tells tests that they may take KVM from this host for a moment: it is a lab of theirs.
const MAY_TAKE_KVM: &str = "VISTARA_TEST_MAY_TAKE_KVM";

/// A backend with a process of its own for each machine.
#[async_trait::async_trait]
pub(crate) trait Monitor: Subject {
    /// The backend where it is told this of KVM; `None` where its program is not here.
    async fn vmm_told(&self, kvm: KvmVerdict) -> Option<Arc<dyn Vmm>>;
    /// The socket by which a later node takes over the machine of this directory.
    fn control_socket(&self, record: &VmRecord, dir: &Path) -> PathBuf;
    /// A memory limit with which a monitor starts, and which the suite's guest exceeds while it boots.
    fn too_little_memory(&self) -> Bytes;
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

/// How long an answer about a machine that does not answer may take: what monitors are given, and some more.
fn bound() -> Duration {
    Duration::from_secs(15) * patience()
}

/// Takes a machine over as a new node would, and ends it by whatever way there is. Gives why it could not be taken over.
async fn taken_over_and_ended(
    vmm: &dyn Vmm,
    plan: &LaunchPlan,
    record: &VmRecord,
) -> Option<String> {
    let begin = Instant::now();
    let adopted = soon("adopting", vmm.adopt(&plan.dir, record)).await;
    let why = match adopted {
        Ok(Adoption::Running(vm)) => {
            soon("killing", vm.kill()).await.unwrap();
            assert_eq!(vm.wait().await, VmEnd::Killed);
            None
        }
        // It is as it was, and whoever knows its number can end it.
        Err(error) => {
            assert!(matches!(error, VmmError::Control { .. }), "{error}");
            soon("sweeping", vmm.sweep(&plan.id, &plan.dir))
                .await
                .unwrap();
            Some(error.to_string())
        }
        Ok(Adoption::Gone(end)) => panic!("it runs: {end:?}"),
    };
    assert!(begin.elapsed() < bound(), "{:?}", begin.elapsed());
    why
}

pub(crate) async fn a_monitor_that_is_killed_from_outside_has_crashed(subject: &dyn Monitor) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    Heard::open(subject, &*vm).await.answer("up").await;
    let left = subject.leftovers(&*vm);
    signal(vm.record().pid, "-9");
    match soon("ending", vm.wait()).await {
        VmEnd::Crashed { message } => assert!(message.contains("signal 9"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(left(), [] as [&str; 0]);
    nothing_is_left("killed from outside", || left_at_all(&plan)).await;
}

pub(crate) async fn a_machine_whose_control_socket_is_gone_goes_on_and_can_be_ended(
    subject: &dyn Monitor,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    let mut heard = Heard::open(subject, &*vm).await;
    heard.answer("up").await;
    std::fs::remove_file(subject.control_socket(vm.record(), dir.path())).unwrap();
    // Whoever has it, has it yet.
    soon("holding", vm.pause()).await.unwrap();
    soon("letting go", vm.resume()).await.unwrap();
    heard.answer("still up").await;
    let record = vm.record().clone();
    drop((vm, heard));
    if let Some(why) = taken_over_and_ended(&*vmm, &plan, &record).await {
        println!("not taken over: {why}");
    }
    nothing_is_left("its socket was gone", || left_at_all(&plan)).await;
}

pub(crate) async fn a_monitor_that_stands_still_is_told_in_time_and_can_be_ended(
    subject: &dyn Monitor,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    for own in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let plan = subject.plan(dir.path());
        let vm = launch(&*vmm, &plan).await;
        Heard::open(subject, &*vm).await.answer("up").await;
        signal(vm.record().pid, "-STOP");
        if own {
            let begin = Instant::now();
            // Holding is what it does already; a monitor that is asked for it may not answer.
            if let Err(error) = soon("holding", vm.pause()).await {
                assert!(matches!(error, VmmError::Control { .. }), "{error}");
                println!("not held: {error}");
            }
            soon("killing", vm.kill()).await.unwrap();
            assert_eq!(vm.wait().await, VmEnd::Killed);
            assert!(begin.elapsed() < bound(), "{:?}", begin.elapsed());
        } else {
            let record = vm.record().clone();
            drop(vm);
            if let Some(why) = taken_over_and_ended(&*vmm, &plan, &record).await {
                println!("not taken over: {why}");
            }
        }
        nothing_is_left("it stood still", || left_at_all(&plan)).await;
    }
}

pub(crate) async fn what_cannot_be_booted_is_refused_with_the_reason_and_leaves_nothing(
    subject: &dyn Monitor,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let kernel_of = |start: &mut Start, new: Option<&Path>| {
        let kernel = match start {
            Start::Linux(boot) => &mut boot.kernel,
            Start::Nanos(boot) => &mut boot.kernel,
            Start::Fork(_) => unreachable!("no plan of the suite is a fork"),
        };
        let old = kernel.clone();
        if let Some(new) = new {
            *kernel = new.to_owned();
        }
        old
    };
    let good = kernel_of(&mut subject.plan(scratch.path()).start, None);
    let written = |name: &str, bytes: &[u8]| {
        let path = files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&path, mode).unwrap();
        path
    };
    // The header of a program for another processor (183, AArch64).
    let mut foreign = std::fs::read(&good).unwrap();
    foreign[18] = 183;
    foreign.truncate(1 << 20);
    for kernel in [
        files.path().join("missing"),
        written("empty", b""),
        written("text", &b"no kernel at all\n".repeat(10_000)),
        written("foreign", &foreign),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = subject.plan(dir.path());
        kernel_of(&mut plan.start, Some(&kernel));
        let begin = Instant::now();
        let error = soon("launching", vmm.launch(&plan)).await.err();
        println!(
            "{}: {error:?} after {:?}",
            kernel.display(),
            begin.elapsed()
        );
        match error.unwrap_or_else(|| panic!("{} was started", kernel.display())) {
            VmmError::Io { path, .. } => assert_eq!(path, kernel),
            VmmError::Launch { message, .. } => assert!(!message.is_empty()),
            other => panic!("{other}"),
        }
        assert_eq!(files_beside(&plan), [] as [&str; 0]);
        nothing_is_left("what cannot be booted", || left_at_all(&plan)).await;
    }
}

pub(crate) async fn without_kvm_every_plan_for_it_is_refused_with_the_reason(
    subject: &dyn Monitor,
) {
    // That there is a guest for the plan.
    if subject.vmm().await.is_none() {
        return;
    }
    let told = KvmVerdict::Broken("guests are emulated".to_owned());
    let vmm = subject.vmm_told(told).await.unwrap();
    assert!(!vmm.capabilities().accelerators.contains(&Accelerator::Kvm));
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.accelerator = Accelerator::Kvm;
    match vmm.launch(&plan).await.err() {
        Some(VmmError::Unsupported { reason, .. }) => {
            assert!(reason.contains("guests are emulated"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(files_beside(&plan), [] as [&str; 0]);
}

/// Gives KVM back, whatever becomes of the test.
struct Kvm {
    module: &'static str,
    device: std::fs::Metadata,
}

const KVM: &str = "/dev/kvm";

impl Kvm {
    /// Takes the module out that has the processor's part of KVM.
    fn take() -> Result<Kvm, String> {
        let module = ["kvm_amd", "kvm_intel"]
            .into_iter()
            .find(|name| Path::new("/sys/module").join(name).exists())
            .ok_or("KVM is no module here")?;
        let device = std::fs::metadata(KVM).map_err(|error| error.to_string())?;
        let taken = Command::new("modprobe").args(["-r", module]).output();
        let taken = taken.map_err(|error| error.to_string())?;
        match taken.status.success() {
            true => Ok(Kvm { module, device }),
            false => Err(String::from_utf8_lossy(&taken.stderr).into_owned()),
        }
    }
}

impl Drop for Kvm {
    fn drop(&mut self) {
        use std::os::unix::fs::MetadataExt;
        let given = Command::new("modprobe").arg(self.module).status();
        assert!(given.is_ok_and(|status| status.success()), "KVM stays away");
        // Elsewhere a program of the system does that.
        let (uid, gid) = (self.device.uid(), self.device.gid());
        std::os::unix::fs::chown(KVM, Some(uid), Some(gid)).unwrap();
        std::fs::set_permissions(KVM, self.device.permissions()).unwrap();
    }
}

pub(crate) async fn a_kvm_that_refuses_after_it_was_found_fails_the_launch_with_the_reason(
    subject: &dyn Monitor,
) {
    if std::env::var_os(MAY_TAKE_KVM).is_none() {
        return println!("SKIP: KVM may not be taken from this host ({MAY_TAKE_KVM})");
    }
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    if !vmm.capabilities().accelerators.contains(&Accelerator::Kvm) {
        return println!("SKIP: there is no KVM that could be taken");
    }
    plan.accelerator = Accelerator::Kvm;
    let taken = match Kvm::take() {
        Ok(taken) => taken,
        Err(why) => return println!("SKIP: KVM cannot be taken: {why}"),
    };
    let begin = Instant::now();
    let error = soon("launching", vmm.launch(&plan)).await.err();
    println!("{error:?} after {:?}", begin.elapsed());
    match error {
        Some(error @ (VmmError::Launch { .. } | VmmError::Io { .. })) => {
            let text = format!("{error} {:?}", std::error::Error::source(&error));
            assert!(text.to_lowercase().contains("kvm"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    assert!(begin.elapsed() < bound());
    assert_eq!(files_beside(&plan), [] as [&str; 0]);
    nothing_is_left("KVM was gone", || left_at_all(&plan)).await;
    // And with KVM back, the same backend starts it.
    drop(taken);
    let vm = launch(&*vmm, &plan).await;
    Heard::open(subject, &*vm).await.answer("up").await;
    soon("killing", vm.kill()).await.unwrap();
}

pub(crate) async fn a_machine_beyond_its_memory_limit_is_ended_with_that_reason(
    subject: &dyn Monitor,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.fence.memory_max = subject.too_little_memory();
    let vm = soon("launching", vmm.launch(&plan)).await.unwrap();
    ends_with_this_test(vm.record());
    let limited = |fence: &String| fence.starts_with("cgroup: memory");
    if !vm.record().fences.iter().any(limited) {
        println!("SKIP: no memory cgroup");
        return vm.kill().await.unwrap();
    }
    match soon("ending", vm.wait()).await {
        VmEnd::Crashed { message } => assert!(message.contains("memory limit"), "{message}"),
        other => panic!("{other:?}"),
    }
    nothing_is_left("beyond its limit", || left_at_all(&plan)).await;
}

/// A small file system of its own, which goes with it.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(options: &str) -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_str().unwrap().to_owned();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "small", &at])
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Small(dir))
    }

    /// Whether nobody is in it any more.
    fn unmounted(&self) -> bool {
        let done = Command::new("umount").arg(self.0.path()).output();
        done.is_ok_and(|done| done.status.success())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .args(["-l".as_ref(), self.0.path()])
            .output();
    }
}

pub(crate) async fn a_launch_on_a_full_host_fails_with_the_reason_and_leaves_nothing(
    subject: &dyn Monitor,
) {
    if !facts::is_root() {
        return println!("SKIP: a small file system of its own takes root");
    }
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    // One without room for a byte, and one without room for a name.
    for (what, options) in [
        ("bytes", "size=1m,mode=755"),
        ("names", "nr_inodes=40,mode=755"),
    ] {
        let Some(small) = Small::mount(options) else {
            return println!("SKIP: a tmpfs cannot be mounted here");
        };
        let dir = small.0.path().join("machine");
        std::fs::create_dir(&dir).unwrap();
        let plan = subject.plan(&dir);
        match what {
            "bytes" => {
                // Ends with what the file system says when it is full.
                let ballast = std::fs::write(small.0.path().join("ballast"), vec![1; 2 << 20]);
                assert_eq!(ballast.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
            }
            _ => {
                let mut names = 0..;
                let make = |number: u32| {
                    std::fs::File::create(small.0.path().join(format!("ballast-{number}")))
                };
                while make(names.next().unwrap()).is_ok() {}
            }
        }
        let before = files_in(&dir);
        let begin = Instant::now();
        let error = soon("launching", vmm.launch(&plan)).await.err();
        println!("no room for {what}: {error:?} after {:?}", begin.elapsed());
        let error = error.unwrap_or_else(|| panic!("started without room for {what}"));
        let text = format!("{error} {:?}", std::error::Error::source(&error)).to_lowercase();
        assert!(
            text.contains("no space left") || text.contains("storagefull"),
            "{text}"
        );
        assert!(begin.elapsed() < bound());
        assert_eq!(files_in(&dir), before);
        nothing_is_left("a full host", || {
            let left = left_at_all(&plan);
            // The small file system itself is at a place of that name.
            let of_it = |line: &String| !line.contains(" - tmpfs small ");
            left.into_iter().filter(of_it).collect()
        })
        .await;
        let gone = async {
            while !small.unmounted() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon("unmounting", gone).await;
    }
}

/// The tests of faults for one subject: `faults!(subject_expression)`.
#[macro_export]
macro_rules! faults {
    ($subject:expr) => {
        $crate::faults!(@tests $subject;
            a_monitor_that_is_killed_from_outside_has_crashed
            a_machine_whose_control_socket_is_gone_goes_on_and_can_be_ended
            a_monitor_that_stands_still_is_told_in_time_and_can_be_ended
            what_cannot_be_booted_is_refused_with_the_reason_and_leaves_nothing
            without_kvm_every_plan_for_it_is_refused_with_the_reason
            a_kvm_that_refuses_after_it_was_found_fails_the_launch_with_the_reason
            a_machine_beyond_its_memory_limit_is_ended_with_that_reason
            a_launch_on_a_full_host_fails_with_the_reason_and_leaves_nothing
        );
    };
    (@tests $subject:expr; $($name:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if !conformance::lacks(&$subject, stringify!($name)) {
                conformance::faults::$name(&$subject).await;
            }
        })*
    };
}
