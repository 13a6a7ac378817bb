//! Machines that come to their end at any moment, by any hand: nothing of them may be left but the logs that were asked for.
//!
//! Twelve kinds of ends, three in each of four stages of a machine's life, in turn; the moment within a stage is drawn. The
//! seed is printed. How many there are is `VISTARA_TEST_KILLED`, the seed `VISTARA_TEST_SEED`. At the end a table tells what
//! was met: a machine may be further, or gone by itself, by the moment that was drawn for it.

use super::{Heard, Subject, ends_with_this_test, launch, limit, soon};
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use vistara_machine::{LaunchPlan, Vm, VmEnd, Vmm};
use vistara_model::MachineId;

/// How many machines there are, unless more are asked for: one of each kind takes about half a minute.
const KILLED: u64 = 12;
/// How long a guest has run when it is hit, at the latest.
const RUNNING: Duration = Duration::from_millis(300);
/// How long after the last of them all are looked for once more.
const LATER: Duration = Duration::from_secs(1);
/// What may be left in a machine's directory.
const LOGS: [&str; 2] = ["end.json", "console"];

/// Tells the process that plays a node its machine's id and directory.
const NODE_ID: &str = "VISTARA_TEST_NODE_ID";
const NODE_DIR: &str = "VISTARA_TEST_NODE_DIR";
/// What that process says when it begins to launch, and when it has.
const NODE_BEGINS: &str = "it begins to launch";
const NODE_LAUNCHED: &str = "it has launched";

/// The stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The monitor is made, jailed and set up.
    Launching,
    /// Its guest boots.
    Booting,
    /// The guest has answered.
    Running,
    /// The guest was asked to switch itself off.
    Stopping,
    /// It had gone by itself.
    Gone,
}

/// By whose hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hand {
    /// The node's: it kills the machine, or nobody waits for the launch any more.
    Node,
    /// Somebody's: the monitor is killed.
    Monitor,
    /// Nobody's: the node dies before it has written its record, and the next one sweeps.
    NodeGone,
}

const STAGES: [Stage; 4] = [
    Stage::Launching,
    Stage::Booting,
    Stage::Running,
    Stage::Stopping,
];
const HANDS: [Hand; 3] = [Hand::Node, Hand::Monitor, Hand::NodeGone];

/// Marsaglia's xorshift: enough to spread moments.
struct Draw(u64);

impl Draw {
    fn of(seed: u64) -> Draw {
        /// Any number but 0, from which nothing comes but 0.
        const STIR: u64 = 0x9e37_79b9_7f4a_7c15;
        Draw(match seed ^ STIR {
            0 => STIR,
            state => state,
        })
    }

    /// A part of `whole`.
    fn part(&mut self, whole: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let thousandths = u32::try_from(self.0 % 1000).unwrap();
        whole * thousandths / 1000
    }
}

/// How long the stages take here.
#[derive(Debug)]
struct Usual {
    launching: Duration,
    booting: Duration,
    /// From asking a guest to switch itself off to its end.
    stopping: Duration,
}

impl Usual {
    async fn measure(vmm: &dyn Vmm, subject: &dyn Subject) -> Usual {
        let mut usual = Usual {
            launching: Duration::MAX,
            booting: Duration::MAX,
            stopping: Duration::MAX,
        };
        // The first of all takes longest.
        for _ in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let begin = Instant::now();
            let vm = launch(vmm, &subject.ending_plan(dir.path())).await;
            let launched = Instant::now();
            let mut heard = Heard::open(subject, &*vm).await;
            heard.answer("up").await;
            usual.launching = usual.launching.min(launched - begin);
            usual.booting = usual.booting.min(launched.elapsed());
            heard.end().await;
            let asked = Instant::now();
            let ended = async {
                soon("switching off", vm.wait()).await;
                asked.elapsed()
            };
            let (stopping, ()) = tokio::join!(ended, heard.silence());
            usual.stopping = usual.stopping.min(stopping);
        }
        usual
    }
}

/// What is left of the machine of `plan`, whoever started it and however far it came.
pub(crate) fn left_at_all(plan: &LaunchPlan) -> Vec<String> {
    let dir = &plan.dir;
    let mut left = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        let brought = plan.disks.iter().any(|disk| disk.path == entry.path());
        if socket || !(brought || LOGS.contains(&name.as_str())) {
            left.push(format!("file {name}"));
        }
    }
    for pid in processes_of(plan) {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        left.push(format!("process {pid}: {command}"));
    }
    if let Ok(groups) = vistara_host::cgroup::Cgroups::detect()
        && let Some(group) = groups.find(plan.id.as_ref())
    {
        left.extend(group.dirs().iter().map(|dir| format!("{}", dir.display())));
    }
    let dir = dir.to_str().unwrap();
    for list in ["/proc/self/mountinfo", "/proc/net/unix"] {
        let text = std::fs::read_to_string(list).unwrap();
        let ours = text.lines().filter(|line| line.contains(dir));
        left.extend(ours.map(str::to_owned));
    }
    left
}

/// Processes that name the machine, by their words or their environment, work in its directory or are in its cgroup. One that has ended and waits to be collected is
/// none: it holds nothing any more.
fn processes_of(plan: &LaunchPlan) -> Vec<u32> {
    let id: &str = plan.id.as_ref();
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let read = |name: &str| std::fs::read(process.path().join(name)).unwrap_or_default();
        let names = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).contains(id);
        let works_in = std::fs::read_link(process.path().join("cwd")).unwrap_or_default();
        let ended = String::from_utf8_lossy(&read("stat")).contains(") Z ");
        let its = ["cmdline", "cgroup", "environ"]
            .into_iter()
            .any(|name| names(read(name)))
            || works_in.starts_with(&plan.dir);
        if its && !ended {
            found.push(pid);
        }
    }
    found
}

/// A network namespace that is not this process's own: what makes it, and the taps in it, go away is that nobody has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Namespace(String);

impl Namespace {
    /// That of a process.
    fn of(pid: u32) -> Option<Namespace> {
        let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let its = link(&pid.to_string())?;
        let other = link("self").is_some_and(|own| own != its);
        other.then(|| Namespace(its.display().to_string()))
    }

    /// Who has it yet: processes in it or with a descriptor of it, and mounts.
    fn holders(&self) -> Vec<String> {
        let is = |path: &Path| {
            std::fs::read_link(path).is_ok_and(|link| link.as_os_str() == self.0.as_str())
        };
        let mut holders = Vec::new();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let open = std::fs::read_dir(process.path().join("fd")).into_iter();
            let mut open = open.flatten().flatten();
            if is(&process.path().join("ns/net")) || open.any(|entry| is(&entry.path())) {
                holders.push(format!("{} has {}", process.path().display(), self.0));
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = mounts.lines().filter(|line| line.contains(&self.0));
        holders.extend(ours.map(str::to_owned));
        holders
    }
}

/// What this process has open of what machines are made of: namespaces, memory, devices and cgroups, by name.
fn held() -> Vec<String> {
    const BEGINS: [&str; 10] = [
        "net:[",
        "mnt:[",
        "user:[",
        "pid:[",
        "/memfd:",
        "/dev/kvm",
        "/dev/net",
        "/dev/vhost",
        "/dev/shm",
        "/sys/fs/cgroup",
    ];
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let mut held: Vec<String> = links
        .map(|link| link.display().to_string())
        .filter(|name| BEGINS.iter().any(|begin| name.starts_with(begin)))
        .collect();
    held.sort_unstable();
    held
}

/// Children of this process that have ended and that it has not collected.
fn uncollected() -> Vec<String> {
    let own = format!(") Z {} ", std::process::id());
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok())
        .filter(|stat| stat.contains(&own))
        .collect()
}

/// Network devices of ours in the host's own network, where none belongs; others may come and go meanwhile.
fn devices() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let names = text
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0));
    let ours = names
        .map(str::trim)
        .filter(|name| name.starts_with("vistara"));
    ours.map(str::to_owned).collect()
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    // It may be gone already.
    let _ = rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL);
}

/// What plays the node that dies while it launches: one test of this program, run by itself.
pub(crate) async fn a_node_that_is_killed_as_it_launches(subject: &dyn Subject) {
    let (Some(id), Some(dir)) = (std::env::var_os(NODE_ID), std::env::var_os(NODE_DIR)) else {
        return;
    };
    let vmm = subject.vmm().await.unwrap();
    let mut plan = subject.plan(Path::new(&dir));
    plan.id = id.to_str().unwrap().parse().unwrap();
    println!("{NODE_BEGINS}");
    let _vm = launch(&*vmm, &plan).await;
    println!("{NODE_LAUNCHED}");
    // It is killed, whatever it does; a machine would end with this process otherwise.
    std::future::pending::<()>().await;
}

pub(crate) async fn machines_that_end_at_any_moment_leave_nothing(subject: &dyn Subject) {
    let Some(vmm) = subject.vmm().await else {
        return;
    };
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let count: u64 = number("VISTARA_TEST_KILLED").unwrap_or(KILLED);
    let seed: u64 = number("VISTARA_TEST_SEED").unwrap_or_else(|| {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap();
        since.as_secs() | 1
    });
    println!("{count} machines, VISTARA_TEST_SEED={seed}");
    let mut draw = Draw::of(seed);
    let (before, held_before) = (devices(), held());
    let mut usual = Usual::measure(&*vmm, subject).await;
    println!("{usual:?}");
    let mut met: BTreeMap<(Stage, Hand), u64> = BTreeMap::new();
    let mut plans = Vec::new();
    let begin = Instant::now();
    for index in 0..usize::try_from(count).unwrap() {
        let (stage, hand) = (STAGES[index / 3 % 4], HANDS[index % 3]);
        let dir = tempfile::tempdir().unwrap();
        let plan = match stage {
            Stage::Stopping => subject.ending_plan(dir.path()),
            _ => subject.plan(dir.path()),
        };
        let mut namespace = None;
        let reached = match stage {
            Stage::Launching => {
                let moment = draw.part(usual.launching);
                while_launching(vmm.clone(), &plan, hand, moment).await
            }
            stage => {
                let begin = Instant::now();
                let vm = soon("launching", vmm.launch(&plan)).await.unwrap();
                // A host that has become less busy would leave none in that stage.
                usual.launching = usual.launching.min(begin.elapsed());
                ends_with_this_test(vm.record());
                namespace = Namespace::of(vm.record().pid);
                let reached = reach(stage, subject, &*vm, &mut draw, &usual).await;
                end(&*vmm, vm, &plan, hand).await.unwrap_or(reached)
            }
        };
        *met.entry((reached, hand)).or_default() += 1;
        nothing_is_left(&format!("{stage:?}, {hand:?}"), || {
            let mut left = left_at_all(&plan);
            left.extend(namespace.iter().flat_map(Namespace::holders));
            left
        })
        .await;
        plans.push((plan, dir));
    }
    println!("{count} in {:?}", begin.elapsed());
    println!(
        "{:<12}{:>10}{:>10}{:>10}",
        "stage", "Node", "Monitor", "NodeGone"
    );
    for stage in STAGES.into_iter().chain([Stage::Gone]) {
        let of = |hand| met.get(&(stage, hand)).copied().unwrap_or(0);
        println!(
            "{:<12}{:>10}{:>10}{:>10}",
            format!("{stage:?}"),
            of(HANDS[0]),
            of(HANDS[1]),
            of(HANDS[2])
        );
    }
    assert_eq!(met.values().sum::<u64>(), count);
    assert_eq!(devices(), before);
    nothing_is_left("at the end", || {
        let mut left = uncollected();
        let held = held();
        if held != held_before {
            left.push(format!(
                "this process has {held:?}, and had {held_before:?}"
            ));
        }
        left
    })
    .await;
    // What was between two places when it was looked for has arrived by now.
    tokio::time::sleep(LATER).await;
    let left = plans.iter().flat_map(|(plan, _)| left_at_all(plan));
    assert_eq!(left.collect::<Vec<_>>(), [""; 0], "later");
}

/// Brings a machine that was launched to a moment in this stage; gives the stage in which it is.
async fn reach(
    stage: Stage,
    subject: &dyn Subject,
    vm: &dyn Vm,
    draw: &mut Draw,
    usual: &Usual,
) -> Stage {
    if stage == Stage::Booting {
        tokio::time::sleep(draw.part(usual.booting)).await;
        return stage;
    }
    let mut heard = Heard::open(subject, vm).await;
    heard.answer("up").await;
    if stage == Stage::Running {
        tokio::time::sleep(draw.part(RUNNING)).await;
        return stage;
    }
    heard.end().await;
    tokio::time::sleep(draw.part(usual.stopping)).await;
    stage
}

/// Ends a machine that runs by this hand; tells where it was gone already.
async fn end(vmm: &dyn Vmm, vm: Box<dyn Vm>, plan: &LaunchPlan, hand: Hand) -> Option<Stage> {
    match hand {
        Hand::Node => soon("killing", vm.kill()).await.unwrap(),
        Hand::Monitor => kill(vm.record().pid),
        Hand::NodeGone => {
            let own = vm.wait();
            let gone = tokio::time::timeout(Duration::from_millis(1), own).await;
            drop(vm);
            soon("sweeping", vmm.sweep(&plan.id, &plan.dir))
                .await
                .unwrap();
            return gone.ok().map(|_| Stage::Gone);
        }
    }
    match (hand, soon("ending", vm.wait()).await) {
        (_, VmEnd::GuestOff) => Some(Stage::Gone),
        (Hand::Node, VmEnd::Killed) | (Hand::Monitor, VmEnd::Crashed { .. }) => None,
        (_, other) => panic!("{hand:?}: {other:?}"),
    }
}

/// Ends a machine by this hand at this moment of its launch.
async fn while_launching(
    vmm: Arc<dyn Vmm>,
    plan: &LaunchPlan,
    hand: Hand,
    moment: Duration,
) -> Stage {
    match hand {
        // Whoever asked for it goes away.
        Hand::Node => match tokio::time::timeout(moment, vmm.launch(plan)).await {
            Err(_) => Stage::Launching,
            Ok(launched) => {
                soon("killing", launched.unwrap().kill()).await.unwrap();
                Stage::Booting
            }
        },
        Hand::Monitor => {
            let launching = {
                let plan = plan.clone();
                tokio::spawn(async move { vmm.launch(&plan).await })
            };
            tokio::time::sleep(moment).await;
            let mut hit = 0;
            for pid in processes_of(plan) {
                // The process that becomes it still has our own command line, and is not found by that.
                if pid != std::process::id() {
                    kill(pid);
                    hit += 1;
                }
            }
            match soon("launching", launching).await.unwrap() {
                // Either it did not start, or there was nothing to kill yet, or it was running by then.
                Err(error) => {
                    assert!(hit > 0, "nothing was killed, and yet: {error}");
                    Stage::Launching
                }
                Ok(vm) => {
                    let end = tokio::time::timeout(Duration::from_secs(1), vm.wait()).await;
                    let killed = matches!(end, Ok(VmEnd::Crashed { .. }));
                    soon("killing", vm.kill()).await.unwrap();
                    assert!(killed || end.is_err(), "{end:?}");
                    if killed {
                        Stage::Booting
                    } else {
                        Stage::Running
                    }
                }
            }
        }
        Hand::NodeGone => {
            let launched = node_dies(&plan.id, &plan.dir, moment).await;
            soon("sweeping", vmm.sweep(&plan.id, &plan.dir))
                .await
                .unwrap();
            if launched {
                Stage::Booting
            } else {
                Stage::Launching
            }
        }
    }
}

/// Starts a process that launches the machine, and kills it at this moment of its launch. Tells whether the machine was launched
/// by then.
async fn node_dies(id: &MachineId, dir: &Path, moment: Duration) -> bool {
    let program: PathBuf = std::env::current_exe().unwrap();
    let mut node = tokio::process::Command::new(program)
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("a_node_that_is_killed_as_it_launches")
        .env(NODE_ID, id.to_string())
        .env(NODE_DIR, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut out = node.stdout.take().unwrap();
    let begins = async {
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(NODE_BEGINS) {
            let byte = out.read_u8().await;
            said.push(byte.unwrap_or_else(|_| {
                panic!("the node said only {:?}", String::from_utf8_lossy(&said))
            }));
        }
    };
    soon("the node's beginning", begins).await;
    tokio::time::sleep(moment).await;
    soon("the node's end", node.kill()).await.unwrap();
    let mut rest = Vec::new();
    // What it launched has no descriptor of its, so that this ends.
    soon("the node's last words", out.read_to_end(&mut rest))
        .await
        .unwrap();
    String::from_utf8_lossy(&rest).contains(NODE_LAUNCHED)
}

/// Waits until there is nothing of what is looked for.
pub(super) async fn nothing_is_left(what: &str, look: impl Fn() -> Vec<String>) {
    let mut left = Vec::new();
    let gone = async {
        loop {
            left = look();
            if left.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(limit(), gone).await.is_err() {
        panic!("{what}: left are {left:#?}");
    }
}

#[test]
fn every_seed_gives_moments_that_differ() {
    for seed in [0, 1, 0x9e37_79b9_7f4a_7c15, u64::MAX] {
        let mut draw = Draw::of(seed);
        let parts: Vec<_> = (0..8).map(|_| draw.part(Duration::from_secs(1))).collect();
        assert!(parts.windows(2).any(|two| two[0] != two[1]), "{parts:?}");
    }
}
