//! The conformance suite: every line of the `Vmm` contract as a named test, the same for every backend.
//!
//! A backend gives a [`Subject`] and calls [`conformance!`]. Its guest mostly speaks lines on the channel (see [`Answers`]): it answers `off`,
//! `reboot` and `panic` by doing so, and every other line by repeating it; it writes [`GREETING`] to the console first.
// A test fails by panicking; what one test file does not use another does.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

pub(crate) mod devices;
pub(crate) mod faults;
pub(crate) mod guest;
pub(crate) mod killed;
pub(crate) mod running;
pub(crate) mod unikernel;

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use vistara_host::facts;
use vistara_machine::{
    Adoption, ChannelStream, Disk, LaunchPlan, OutputStream, Start, Vm, VmEnd, VmRecord, VmUsage,
    Vmm, VmmError,
};
use vistara_model::{Accelerator, KvmVerdict};

/// What the guest writes to its console when it begins.
pub(crate) const GREETING: &str = "guest begins";

/// How long anything may take before the test fails: a boot under translation on a loaded machine takes seconds. Where all
/// is slower still, as in the lab, `VISTARA_TEST_PATIENCE` says how many times longer.
pub(crate) fn limit() -> Duration {
    const LIMIT: Duration = Duration::from_secs(60);
    LIMIT * patience()
}

/// How many times longer than usual is waited.
pub(crate) fn patience() -> u32 {
    std::env::var("VISTARA_TEST_PATIENCE").map_or(1, |times| times.parse().unwrap())
}

/// Translation, which is everywhere, unless `VISTARA_TEST_ACCELERATOR=kvm` asks for the other.
pub(crate) fn accelerator() -> Accelerator {
    match std::env::var("VISTARA_TEST_ACCELERATOR").as_deref() {
        Ok("kvm") => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    }
}

/// What a backend is told of KVM for that.
pub(crate) fn kvm() -> KvmVerdict {
    match accelerator() {
        Accelerator::Kvm => KvmVerdict::Works,
        Accelerator::Tcg => KvmVerdict::Absent("not asked for".to_owned()),
    }
}

/// How the suite's guest is heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    /// By lines on the channel.
    Channel,
    /// By what it prints, line after line, as long as it runs: nobody can say anything to it.
    Output,
}

/// A backend under test, with one kind of guest.
#[async_trait::async_trait]
pub(crate) trait Subject: Send + Sync {
    /// A new handle on the backend, as a new process would make one; `None` where it cannot run here (said on stdout).
    async fn vmm(&self) -> Option<Arc<dyn Vmm>>;
    /// A plan whose guest is the suite's.
    fn plan(&self, dir: &Path) -> LaunchPlan;
    /// How that guest answers.
    fn answers(&self) -> Answers {
        Answers::Channel
    }
    /// A plan whose guest answers and then ends by itself, where nobody can tell it to.
    fn ending_plan(&self, dir: &Path) -> LaunchPlan {
        self.plan(dir)
    }
    /// Tests of the suite that this guest cannot pass by its nature, and why: they are told as skipped.
    fn lacks(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
    /// What is left of a machine outside its directory: processes, cgroups, mounts.
    fn leftovers(&self, vm: &dyn Vm) -> Box<dyn Fn() -> Vec<String> + Send>;
}

/// Panics where it takes too long.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let limit = limit();
    tokio::time::timeout(limit, future)
        .await
        .unwrap_or_else(|_| panic!("{what} took more than {limit:?}"))
}

/// A channel that speaks lines.
pub(crate) struct Lines(pub(crate) BufReader<ChannelStream>);

impl Lines {
    pub(crate) async fn open(vm: &dyn Vm) -> Lines {
        let stream = soon("opening the channel", vm.open_channel()).await;
        Lines(BufReader::new(stream.unwrap()))
    }

    pub(crate) async fn say(&mut self, line: &str) {
        let text = format!("{line}\n");
        soon("writing", self.0.write_all(text.as_bytes()))
            .await
            .unwrap();
    }

    pub(crate) async fn hear(&mut self) -> String {
        let mut line = String::new();
        soon("reading", self.0.read_line(&mut line)).await.unwrap();
        line.trim_end().to_owned()
    }

    /// Says a word and hears it back.
    pub(crate) async fn echo(&mut self, word: &str) {
        self.say(word).await;
        assert_eq!(self.hear().await, word);
    }
}

/// The suite's guest, heard in whatever way it answers.
pub(crate) enum Heard {
    Lines(Lines),
    Output(BufReader<OutputStream>),
}

impl Heard {
    pub(crate) async fn open(subject: &dyn Subject, vm: &dyn Vm) -> Heard {
        match subject.answers() {
            Answers::Channel => Heard::Lines(Lines::open(vm).await),
            Answers::Output => Heard::Output(BufReader::new(vm.open_output().unwrap())),
        }
    }

    /// Hears that the guest runs now.
    pub(crate) async fn answer(&mut self, word: &str) {
        match self {
            Heard::Lines(lines) => lines.echo(word).await,
            Heard::Output(output) => {
                let mut line = String::new();
                // What it has printed before says nothing.
                let moment = Duration::from_millis(50);
                while tokio::time::timeout(moment, output.read_line(&mut line))
                    .await
                    .is_ok_and(|read| read.unwrap() > 0)
                {}
                let read = soon("reading", output.read_line(&mut line)).await;
                assert!(read.unwrap() > 0, "it has ended");
            }
        }
    }

    /// Has the guest of an ending plan end.
    pub(crate) async fn end(&mut self) {
        match self {
            Heard::Lines(lines) => lines.say("off").await,
            // It does so by itself.
            Heard::Output(_) => {}
        }
    }

    /// Waits until the guest says no more: it has ended, or is about to.
    pub(crate) async fn silence(&mut self) {
        let mut rest = Vec::new();
        match self {
            // The channel ends or falls silent when the guest is gone.
            Heard::Lines(lines) => {
                let read = lines.0.read_to_end(&mut rest);
                let _ = tokio::time::timeout(Duration::from_secs(3), read).await;
            }
            Heard::Output(output) => {
                soon("reading", output.read_to_end(&mut rest))
                    .await
                    .unwrap();
            }
        }
    }
}

/// What is left of a monitor's machine outside of its directory: its process, its helpers and its cgroup.
pub(crate) fn left_of(record: VmRecord) -> Box<dyn Fn() -> Vec<String> + Send> {
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let mut processes = vec![(record.pid, record.pid_start_ticks)];
    for helper in record.backend["helpers"].as_array().into_iter().flatten() {
        let pid = u32::try_from(number(&helper[0])).unwrap();
        processes.push((pid, number(&helper[1])));
    }
    let network = &record.backend["network"];
    if let Some(start) = network["start_ticks"].as_u64() {
        let pid = u32::try_from(number(&network["pid"])).unwrap();
        processes.push((pid, start));
    }
    let dirs = record.backend["cgroup"].as_array().unwrap();
    let dirs: Vec<String> = (dirs.iter())
        .map(|dir| dir.as_str().unwrap().to_owned())
        .collect();
    Box::new(move || {
        let mut left = Vec::new();
        for (pid, start) in &processes {
            // One that has ended and waits to be collected by the process that inherited it holds nothing any more.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if facts::start_ticks(*pid) == Some(*start) && !stat.contains(") Z ") {
                left.push(format!("process {pid}"));
            }
        }
        left.extend(dirs.iter().filter(|dir| Path::new(dir).exists()).cloned());
        left
    })
}

/// Whether this guest cannot pass the test of this name; says why.
pub(crate) fn lacks(subject: &dyn Subject, test: &str) -> bool {
    let found = subject.lacks().iter().find(|(name, _)| *name == test);
    if let Some((_, why)) = found {
        println!("SKIP: {why}");
    }
    found.is_some()
}

pub(crate) async fn launch(vmm: &dyn Vmm, plan: &LaunchPlan) -> Box<dyn Vm> {
    let vm = soon("launching", vmm.launch(plan)).await.unwrap();
    ends_with_this_test(vm.record());
    vm
}

/// A machine's process: its number and its start.
struct Guard(u32, u64);

impl Drop for Guard {
    fn drop(&mut self) {
        let Guard(pid, start) = *self;
        // The fake's machines are in the test's own process.
        if pid == std::process::id() || facts::start_ticks(pid) != Some(start) {
            return;
        }
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // It fails only for one that is gone by now.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

thread_local! {
    /// Machines that were launched on this thread, which is the test's, or one of its runtime's: both end with the test,
    /// also where it panics. A machine outlives its handle by design, so that a guard beside the handle would not do.
    static LAUNCHED: RefCell<Vec<Guard>> = const { RefCell::new(Vec::new()) };
}

/// Sees to it that the machine's process does not outlive the test, however that ends.
pub(crate) fn ends_with_this_test(record: &VmRecord) {
    let guard = Guard(record.pid, record.pid_start_ticks);
    LAUNCHED.with_borrow_mut(|launched| launched.push(guard));
}

pub(crate) async fn adopted(vmm: &dyn Vmm, plan: &LaunchPlan, vm: &dyn Vm) -> Adoption {
    soon("adopting", vmm.adopt(&plan.dir, vm.record()))
        .await
        .unwrap()
}

fn running(adoption: Adoption) -> Box<dyn Vm> {
    match adoption {
        Adoption::Running(vm) => vm,
        Adoption::Gone(end) => panic!("gone: {end:?}"),
    }
}

fn gone(adoption: Adoption) -> VmEnd {
    match adoption {
        Adoption::Gone(end) => end,
        Adoption::Running(_) => panic!("still running"),
    }
}

fn files_in(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Files in the machine's directory, but for disks that its plan has there.
fn files_beside(plan: &LaunchPlan) -> Vec<String> {
    let mut names = files_in(&plan.dir);
    names.retain(|name| {
        !plan
            .disks
            .iter()
            .any(|disk| disk.path == plan.dir.join(name))
    });
    names
}

pub(crate) async fn launch_gives_a_running_machine_whose_guest_answers(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    assert_eq!(vm.record().kind, vmm.capabilities().kind);
    // Said before the guest can have opened its end: it waits there.
    Heard::open(subject, &*vm).await.answer("hello").await;
    assert_ne!(vm.usage(), VmUsage::default());
    assert_eq!(vm.trouble(), None);
    vm.kill().await.unwrap();
}

pub(crate) async fn a_launch_that_fails_leaves_nothing(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.disks.push(Disk {
        path: dir.path().join("no-such-disk"),
        read_only: true,
    });
    assert!(soon("launching", vmm.launch(&plan)).await.is_err());
    assert_eq!(files_beside(&plan), [] as [&str; 0]);
    // And nothing stands in the way of another try.
    plan.disks.pop();
    launch(&*vmm, &plan).await.kill().await.unwrap();
}

pub(crate) async fn a_plan_beyond_the_capabilities_is_refused_before_anything_starts(
    subject: &dyn Subject,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.vcpus = vmm.capabilities().vcpus_max + 1;
    let refused = soon("launching", vmm.launch(&plan)).await.err().unwrap();
    assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    assert_eq!(files_beside(&plan), [] as [&str; 0]);
}

pub(crate) async fn a_machine_outlives_its_handle_and_is_adopted(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    Heard::open(subject, &*vm).await.answer("one").await;
    // The record goes through the node's file and back.
    let record = serde_json::to_string(vm.record()).unwrap();
    let record = serde_json::from_str(&record).unwrap();
    drop((vm, vmm));
    let vmm = subject.vmm().await.unwrap();
    let vm = running(
        soon("adopting", vmm.adopt(dir.path(), &record))
            .await
            .unwrap(),
    );
    assert_eq!(*vm.record(), record);
    Heard::open(subject, &*vm).await.answer("two").await;
    vm.kill().await.unwrap();
    assert_eq!(vm.wait().await, VmEnd::Killed);
}

pub(crate) async fn the_channel_is_closed_and_opened_again_without_harm(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    for round in 0..5 {
        Heard::open(subject, &*vm)
            .await
            .answer(&format!("round {round}"))
            .await;
    }
    vm.kill().await.unwrap();
}

pub(crate) async fn wait_gives_every_caller_the_same_answer(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.ending_plan(dir.path())).await;
    let mut heard = Heard::open(subject, &*vm).await;
    heard.answer("up").await;
    let both = async { tokio::join!(vm.wait(), vm.wait()) };
    let ((one, two), ()) = tokio::join!(both, async {
        heard.end().await;
        heard.silence().await;
    });
    assert_eq!((one, two), (VmEnd::GuestOff, VmEnd::GuestOff));
    assert_eq!(vm.wait().await, VmEnd::GuestOff);
    // A kill after the end changes nothing.
    vm.kill().await.unwrap();
    assert_eq!(vm.wait().await, VmEnd::GuestOff);
}

pub(crate) async fn a_guest_that_reboots_has_switched_itself_off(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    let mut lines = Lines::open(&*vm).await;
    lines.echo("up").await;
    lines.say("reboot").await;
    assert_eq!(soon("ending", vm.wait()).await, VmEnd::GuestOff);
}

pub(crate) async fn a_kernels_panic_is_told_with_its_words(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    let mut lines = Lines::open(&*vm).await;
    lines.echo("up").await;
    lines.say("panic").await;
    match soon("ending", vm.wait()).await {
        VmEnd::GuestPanic { message } => {
            assert!(
                message.starts_with("Kernel panic - not syncing"),
                "{message}"
            );
            assert!(message.len() <= 2000);
        }
        other => panic!("{other:?}"),
    }
    let console = String::from_utf8_lossy(&vm.console(1 << 20).await).into_owned();
    assert!(console.contains("Kernel panic"), "{console}");
}

pub(crate) async fn kill_returns_when_all_is_gone_and_may_be_repeated(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    let leftovers = subject.leftovers(&*vm);
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(leftovers(), [] as [&str; 0]);
    soon("killing again", vm.kill()).await.unwrap();
    assert_eq!(vm.wait().await, VmEnd::Killed);
    assert_eq!(vm.usage(), VmUsage::default());
    assert_eq!(vm.trouble(), None);
    for refused in [
        vm.pause().await,
        vm.resume().await,
        vm.open_channel().await.map(drop),
    ] {
        assert!(matches!(refused, Err(VmmError::Ended)), "{refused:?}");
    }
    assert_eq!(gone(adopted(&*vmm, &plan, &*vm).await), VmEnd::Killed);
}

pub(crate) async fn an_end_that_nobody_saw_is_told_to_the_one_who_adopts(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.ending_plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    let record = vm.record().clone();
    let leftovers = subject.leftovers(&*vm);
    let mut heard = Heard::open(subject, &*vm).await;
    heard.answer("up").await;
    drop(vm);
    match &mut heard {
        Heard::Lines(lines) => {
            lines.say("panic").await;
            heard.silence().await;
        }
        // Its last words are there for whoever looks then.
        Heard::Output(_) => tokio::time::sleep(Duration::from_secs(3) * patience()).await,
    }
    let vmm = subject.vmm().await.unwrap();
    let end = match soon("adopting", vmm.adopt(dir.path(), &record))
        .await
        .unwrap()
    {
        Adoption::Running(vm) => {
            let (end, ()) = tokio::join!(soon("ending", vm.wait()), async {
                if let Heard::Output(_) = &heard {
                    heard.silence().await;
                }
            });
            end
        }
        Adoption::Gone(end) => end,
    };
    match subject.answers() {
        Answers::Channel => assert!(matches!(end, VmEnd::GuestPanic { .. }), "{end:?}"),
        Answers::Output => assert_eq!(end, VmEnd::GuestOff),
    }
    assert_eq!(leftovers(), [] as [&str; 0]);
}

pub(crate) async fn pause_and_resume_may_be_repeated_and_the_guest_goes_on(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    if !vmm.capabilities().pause {
        return println!("SKIP: this backend cannot pause");
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    let mut heard = Heard::open(subject, &*vm).await;
    heard.answer("up").await;
    for _ in 0..2 {
        soon("pausing", vm.pause()).await.unwrap();
    }
    for _ in 0..2 {
        soon("resuming", vm.resume()).await.unwrap();
    }
    heard.answer("still up").await;
    // A paused machine can be killed too.
    vm.pause().await.unwrap();
    soon("killing", vm.kill()).await.unwrap();
}

pub(crate) async fn the_console_gives_its_end_and_no_more_than_asked(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    Lines::open(&*vm).await.echo("up").await;
    let seen = |text: Vec<u8>| String::from_utf8_lossy(&text).contains(GREETING);
    assert!(seen(vm.console(1 << 20).await));
    assert!(
        seen(vm.console(1 << 20).await),
        "reading does not take it away"
    );
    assert_eq!(vm.console(3).await.len(), 3);
    assert_eq!(vm.console(0).await.len(), 0);
    let record = vm.record().clone();
    drop(vm);
    let vmm = subject.vmm().await.unwrap();
    let vm = running(
        soon("adopting", vmm.adopt(&plan.dir, &record))
            .await
            .unwrap(),
    );
    assert!(seen(vm.console(1 << 20).await), "nor does a new process");
    vm.kill().await.unwrap();
}

pub(crate) async fn a_launch_whose_record_was_lost_is_swept_away(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plan = subject.plan(dir.path());
    let vm = launch(&*vmm, &plan).await;
    let (record, leftovers) = (vm.record().clone(), subject.leftovers(&*vm));
    drop(vm);
    let vmm = subject.vmm().await.unwrap();
    soon("sweeping", vmm.sweep(&plan.id, dir.path()))
        .await
        .unwrap();
    soon("sweeping", vmm.sweep(&plan.id, dir.path()))
        .await
        .unwrap();
    assert_eq!(leftovers(), [] as [&str; 0]);
    gone(
        soon("adopting", vmm.adopt(dir.path(), &record))
            .await
            .unwrap(),
    );
}

pub(crate) async fn thirty_machines_come_and_go_and_nothing_is_left(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let mut leftovers = Vec::new();
    let mut dirs = Vec::new();
    let mut took = Vec::new();
    for _ in 0..10 {
        let mut three = Vec::new();
        for _ in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let begin = std::time::Instant::now();
            let vm = launch(&*vmm, &subject.plan(dir.path())).await;
            took.push(begin.elapsed());
            leftovers.push(subject.leftovers(&*vm));
            dirs.push(dir);
            three.push(vm);
        }
        for vm in three {
            soon("killing", vm.kill()).await.unwrap();
        }
    }
    took.sort();
    println!("launch call: median {:?}, longest {:?}", took[15], took[29]);
    let left: Vec<String> = leftovers.iter().flat_map(|leftovers| leftovers()).collect();
    assert_eq!(left, [] as [&str; 0]);
    for dir in dirs {
        let files = files_in(dir.path());
        assert!(
            !files.iter().any(|name| name.ends_with(".sock")),
            "{files:?}"
        );
    }
}

pub(crate) async fn a_captured_machine_is_gone_and_its_forks_answer(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    if let Err(reason) = &vmm.capabilities().capture {
        println!("SKIP: it cannot capture: {reason}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.capturable = true;
    let vm = launch(&*vmm, &plan).await;
    Lines::open(&*vm).await.echo("before").await;
    let capture = Arc::new(soon("capturing", vm.capture()).await.unwrap());
    assert_eq!(vm.wait().await, VmEnd::Killed);
    assert!(matches!(vm.capture().await.err().unwrap(), VmmError::Ended));
    assert_eq!(subject.leftovers(&*vm)(), [] as [&str; 0]);
    let mut forks = Vec::new();
    for _ in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = subject.plan(dir.path());
        plan.start = Start::Fork(Arc::clone(&capture));
        let vm = launch(&*vmm, &plan).await;
        let mut lines = Lines::open(&*vm).await;
        lines.echo("after").await;
        forks.push((vm, lines, dir));
    }
    // The capture may be dropped while its forks run.
    drop(capture);
    for (vm, lines, _dir) in &mut forks {
        lines.echo("still").await;
        vm.kill().await.unwrap();
        assert_eq!(subject.leftovers(&**vm)(), [] as [&str; 0]);
    }
}

pub(crate) async fn a_capture_is_refused_where_it_was_not_planned_or_does_not_fit(
    subject: &dyn Subject,
) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    if vmm.capabilities().capture.is_err() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = launch(&*vmm, &subject.plan(dir.path())).await;
    let refused = vm.capture().await.err().unwrap();
    assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    // Nothing has happened to it.
    Lines::open(&*vm).await.echo("alive").await;
    vm.kill().await.unwrap();
    let mut plan = subject.plan(dir.path());
    plan.capturable = true;
    let vm = launch(&*vmm, &plan).await;
    Lines::open(&*vm).await.echo("ready").await;
    let capture = soon("capturing", vm.capture()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    plan.start = Start::Fork(Arc::new(capture));
    plan.vcpus += 1;
    let refused = soon("launching", vmm.launch(&plan)).await.err().unwrap();
    assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    assert_eq!(files_in(dir.path()), [] as [&str; 0]);
}

/// The tests for one subject that a fake cannot show: `of_real_monitors!(subject_expression)`.
#[macro_export]
macro_rules! of_real_monitors {
    ($subject:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_disks_rate_holds_from_a_boot_on_and_in_a_fork() {
            conformance::devices::a_disks_rate_holds_from_a_boot_on_and_in_a_fork(&$subject).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_machine_of_huge_pages_takes_them_and_gives_them_back() {
            conformance::devices::a_machine_of_huge_pages_takes_them_and_gives_them_back(&$subject)
                .await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_bound_on_a_disks_requests_holds_and_one_on_its_bytes_is_another() {
            conformance::devices::a_bound_on_a_disks_requests_holds_and_one_on_its_bytes_is_another(
                                                                                        &$subject,
                                                                                    )
                                                                                    .await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn the_guest_draws_on_the_hosts_entropy() {
            conformance::devices::the_guest_draws_on_the_hosts_entropy(&$subject).await;
        }

        $crate::ends_at_any_moment!($subject);
    };
}

/// Machines of a real monitor that come to their end at any moment: `ends_at_any_moment!(subject_expression)`.
#[macro_export]
macro_rules! ends_at_any_moment {
    ($subject:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn machines_that_end_at_any_moment_leave_nothing() {
            conformance::killed::machines_that_end_at_any_moment_leave_nothing(&$subject).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = "the other process of the test above"]
        async fn a_node_that_is_killed_as_it_launches() {
            conformance::killed::a_node_that_is_killed_as_it_launches(&$subject).await;
        }
    };
}

/// The suite's tests for one subject: `conformance!(subject_expression)`.
#[macro_export]
macro_rules! conformance {
    ($subject:expr) => {
        $crate::conformance!(@tests $subject;
            launch_gives_a_running_machine_whose_guest_answers
            a_launch_that_fails_leaves_nothing
            a_plan_beyond_the_capabilities_is_refused_before_anything_starts
            a_machine_outlives_its_handle_and_is_adopted
            the_channel_is_closed_and_opened_again_without_harm
            wait_gives_every_caller_the_same_answer
            a_guest_that_reboots_has_switched_itself_off
            a_kernels_panic_is_told_with_its_words
            kill_returns_when_all_is_gone_and_may_be_repeated
            an_end_that_nobody_saw_is_told_to_the_one_who_adopts
            pause_and_resume_may_be_repeated_and_the_guest_goes_on
            the_console_gives_its_end_and_no_more_than_asked
            a_launch_whose_record_was_lost_is_swept_away
            thirty_machines_come_and_go_and_nothing_is_left
            a_captured_machine_is_gone_and_its_forks_answer
            a_capture_is_refused_where_it_was_not_planned_or_does_not_fit
        );
    };
    (@tests $subject:expr; $($name:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if !conformance::lacks(&$subject, stringify!($name)) {
                conformance::$name(&$subject).await;
            }
        })*
    };
}
