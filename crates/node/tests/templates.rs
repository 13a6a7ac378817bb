//! Templates as clients see them, with fake machines: made once, used by all that fit, and never wrong ones.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Each file of tests uses a part of it.
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, guest, request};
use vistara_api::{
    ClientError, CreateTemplateRequest, ErrorKind, Machine, MachineDetail, RunRequest, Template,
};
use vistara_machine::fake::{FakeVmm, Faults};
use vistara_machine::{LaunchPlan, Vmm};
use vistara_model::{Bytes, VmmKind};
use vistara_node::TemplateLimits;

/// A node whose monitor counts what boots to be captured.
struct Setup {
    dir: tempfile::TempDir,
    vmm: Arc<FakeVmm>,
    captured: Arc<AtomicUsize>,
}

impl Setup {
    fn new() -> Option<Setup> {
        Setup::with(|_| {})
    }

    /// One in which `before` runs in every machine that is to be captured, before its guest.
    fn with(before: impl Fn(&LaunchPlan) + Send + Sync + 'static) -> Option<Setup> {
        if !can_make_disks() {
            return None;
        }
        let captured = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&captured);
        let vmm = FakeVmm::new(Arc::new(move |fake| {
            if fake.plan().capturable && !fake.is_killed() {
                count.fetch_add(1, Ordering::Relaxed);
                before(fake.plan());
            }
            guest(fake)
        }));
        Some(Setup {
            dir: tempfile::tempdir().unwrap(),
            vmm: Arc::new(vmm),
            captured,
        })
    }

    async fn node(&self) -> TestNode {
        let node = TestNode::start(self.dir.path(), Arc::clone(&self.vmm)).await;
        node.image("test").await;
        node
    }

    fn captured(&self) -> usize {
        self.captured.load(Ordering::Relaxed)
    }

    fn dirs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path().join("state/templates")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits until the only template is on disk, and gives its directory.
    async fn written(&self) -> PathBuf {
        until("the template is on disk", async || {
            self.dirs()
                .iter()
                .any(|dir| dir.join("template.json").exists())
        })
        .await;
        let dirs = self.dirs();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        dirs[0].clone()
    }
}

fn pipe_at(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(BOUND, wait).await;
    assert!(waited.is_ok(), "{what}: it does not come to be");
}

async fn ran(node: &TestNode, wanted: &RunRequest) -> MachineDetail {
    let machine = node.client.run(wanted).await.unwrap();
    over(node, &machine).await
}

/// Waits until a program has said its words, and gives what is known of its machine.
async fn over(node: &TestNode, machine: &Machine) -> MachineDetail {
    let (out, ..) = node.follow(&machine.id).await;
    assert_eq!(out, b"said\n");
    node.client.machine(&machine.id).await.unwrap()
}

fn said() -> RunRequest {
    request(&["echo", "said"])
}

async fn listed(node: &TestNode) -> Vec<Template> {
    node.client.templates().await.unwrap()
}

#[tokio::test]
async fn the_first_run_makes_a_template_and_the_second_is_forked_from_the_same() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let first = ran(&node, &said()).await.template.expect("it is a fork");
    let second = ran(&node, &said()).await.template;
    assert_eq!(second.as_ref(), Some(&first));
    assert_eq!(setup.captured(), 1);
    let all = listed(&node).await;
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].key.as_str(), all[0].machines), (first.as_str(), 0));
    assert!(all[0].resident_bytes > 0, "{:?}", all[0]);
}

#[tokio::test]
async fn who_wants_no_template_boots_and_makes_none() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let wanted = RunRequest {
        no_template: true,
        ..said()
    };
    assert_eq!(ran(&node, &wanted).await.template, None);
    assert_eq!(setup.captured(), 0);
    assert!(listed(&node).await.is_empty());
}

#[tokio::test]
async fn machines_that_differ_in_what_a_fork_shares_have_different_templates() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let mut keys = Vec::new();
    for wanted in [
        said(),
        RunRequest {
            memory: Some("129m".to_owned()),
            ..said()
        },
        RunRequest {
            cpus: Some("2".to_owned()),
            ..said()
        },
        RunRequest {
            disk: Some("65m".to_owned()),
            ..said()
        },
        RunRequest {
            network: Some("none".to_owned()),
            ..said()
        },
    ] {
        keys.push(ran(&node, &wanted).await.template.expect("it is a fork"));
    }
    // And what a fork does not share makes none of its own.
    let same = RunRequest {
        cpus: Some("0.5".to_owned()),
        env: vec!["A=b".to_owned()],
        hostname: Some("other".to_owned()),
        read_only: true,
        ..said()
    };
    assert_eq!(ran(&node, &same).await.template.as_ref(), Some(&keys[0]));
    keys.sort();
    keys.dedup();
    assert_eq!((keys.len(), setup.captured()), (5, 5));
}

#[tokio::test]
async fn ten_first_runs_at_once_make_one_template() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let runs = (0..10).map(|_| async { ran(&node, &said()).await.template });
    let mut keys = futures_util::future::join_all(runs).await;
    keys.dedup();
    assert_eq!((keys.len(), setup.captured()), (1, 1));
    assert!(keys[0].is_some());
}

#[tokio::test]
async fn a_template_that_cannot_be_made_costs_one_try_and_machines_boot() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    setup.vmm.set_faults(Faults {
        capture_failure: Some("on purpose".to_owned()),
        ..Faults::default()
    });
    for _ in 0..3 {
        assert_eq!(ran(&node, &said()).await.template, None);
    }
    assert_eq!(setup.captured(), 1);
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
    // Who asks for a template hears why there is none, and may try again.
    let asked = CreateTemplateRequest {
        image: "test".to_owned(),
        memory: Some("128m".to_owned()),
        disk: Some("64m".to_owned()),
        ..CreateTemplateRequest::default()
    };
    let wanted = CreateTemplateRequest {
        command: vec!["echo".to_owned()],
        ..asked
    };
    let error = node.client.create_template(&wanted).await.unwrap_err();
    assert!(error.to_string().contains("on purpose"), "{error}");
    setup.vmm.set_faults(Faults::default());
    let made = node.client.create_template(&wanted).await.unwrap();
    assert!(made.created);
    let again = node.client.create_template(&wanted).await.unwrap();
    assert!(!again.created);
    assert_eq!(again.template.key, made.template.key);
    assert_eq!(ran(&node, &said()).await.template, Some(made.template.key));
}

#[tokio::test]
async fn a_node_that_dies_while_making_leaves_nothing_to_the_next() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    setup.vmm.set_faults(Faults {
        boot_delay: Some(BOUND),
        ..Faults::default()
    });
    node.client.run(&said()).await.unwrap();
    until("a machine boots to be captured", async || {
        setup
            .dirs()
            .iter()
            .any(|dir| dir.join("making.json").exists())
    })
    .await;
    node.vanish();
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
    setup.vmm.set_faults(Faults::default());
    assert!(ran(&node, &said()).await.template.is_some());
    // The one that was to be captured was ended before its guest began.
    assert_eq!(setup.captured(), 1);
}

#[tokio::test]
async fn the_next_node_forks_from_the_template_on_disk() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let key = ran(&node, &said()).await.template;
    let dir = setup.written().await;
    assert!(!dir.join("making.json").exists());
    node.vanish();
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert_eq!(ran(&node, &said()).await.template, key);
    assert_eq!(setup.captured(), 1);
}

/// Damages the template's files, and expects the next node to notice before any machine is made of it.
async fn is_noticed(damage: impl Fn(&Path)) {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let key = ran(&node, &said()).await.template;
    let dir = setup.written().await;
    node.vanish();
    damage(&dir);
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert_eq!(ran(&node, &said()).await.template, key);
    assert_eq!(setup.captured(), 2, "a damaged template was used");
    // What was made in its place is whole.
    setup.written().await;
    node.vanish();
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert_eq!(ran(&node, &said()).await.template, key);
    assert_eq!(setup.captured(), 2);
}

fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test]
async fn a_flipped_bit_of_memory_is_noticed() {
    is_noticed(|dir| flip(&dir.join("memory"), 5 << 20)).await;
}

#[tokio::test]
async fn a_flipped_bit_of_a_hole_in_memory_is_noticed() {
    is_noticed(|dir| flip(&dir.join("memory"), 77 << 20)).await;
}

#[tokio::test]
async fn a_flipped_bit_of_the_monitors_state_is_noticed() {
    is_noticed(|dir| flip(&dir.join("state"), 3)).await;
}

#[tokio::test]
async fn a_flipped_bit_of_the_writable_disk_is_noticed() {
    // In the ext4 superblock.
    is_noticed(|dir| flip(&dir.join("overlay.img"), 1024 + 4)).await;
}

#[tokio::test]
async fn a_shortened_description_is_noticed() {
    is_noticed(|dir| {
        let path = dir.join("template.json");
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    })
    .await;
}

#[tokio::test]
async fn another_templates_files_under_this_key_are_noticed() {
    is_noticed(|dir| {
        let path = dir.join("template.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let key = dir.file_name().unwrap().to_str().unwrap();
        std::fs::write(&path, text.replace(key, &"0".repeat(key.len()))).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_template_that_cannot_be_written_serves_from_memory_and_leaves_no_files() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    setup.vmm.set_faults(Faults {
        capture_unreadable: true,
        ..Faults::default()
    });
    let key = ran(&node, &said()).await.template;
    assert!(key.is_some());
    until("the half written template is gone", async || {
        setup.dirs().is_empty()
    })
    .await;
    assert_eq!(ran(&node, &said()).await.template, key);
    let all = listed(&node).await;
    assert_eq!((all.len(), all[0].stored_bytes), (1, 0));
    assert_eq!(setup.captured(), 1);
}

#[tokio::test]
async fn beyond_the_budget_the_one_used_longest_ago_goes() {
    let Some(setup) = Setup::new() else { return };
    let one = TemplateLimits {
        memory_bytes: u64::MAX,
        // Not even one, and yet the one just made stays.
        disk_bytes: 1,
    };
    let node = TestNode::start_with(setup.dir.path(), Arc::clone(&setup.vmm), |options| {
        options.template_limits = Some(one);
    })
    .await;
    node.image("test").await;
    ran(&node, &said()).await;
    setup.written().await;
    let larger = RunRequest {
        memory: Some("130m".to_owned()),
        ..said()
    };
    let kept = ran(&node, &larger).await.template;
    until("one of the two is gone", async || {
        let all = listed(&node).await;
        all.len() == 1 && Some(&all[0].key) == kept.as_ref()
    })
    .await;
}

#[tokio::test]
async fn what_does_not_fit_into_memory_is_read_again_from_disk() {
    let Some(setup) = Setup::new() else { return };
    let none = TemplateLimits {
        memory_bytes: 0,
        disk_bytes: u64::MAX,
    };
    let node = TestNode::start_with(setup.dir.path(), Arc::clone(&setup.vmm), |options| {
        options.template_limits = Some(none);
    })
    .await;
    node.image("test").await;
    let first = ran(&node, &said()).await.template;
    setup.written().await;
    let larger = RunRequest {
        memory: Some("130m".to_owned()),
        ..said()
    };
    ran(&node, &larger).await;
    until("the first is dropped from memory", async || {
        let all = listed(&node).await;
        let held = all.iter().find(|known| Some(&known.key) == first.as_ref());
        held.is_some_and(|held| held.resident_bytes == 0 && held.stored_bytes > 0)
    })
    .await;
    assert_eq!(ran(&node, &said()).await.template, first);
    assert_eq!(setup.captured(), 2);
}

#[tokio::test]
async fn a_template_that_is_being_written_is_not_dropped_from_memory() {
    let side = tempfile::tempdir().unwrap();
    let pipe = side.path().join("pipe");
    pipe_at(&pipe);
    let again = pipe.clone();
    // Whoever writes the small machine's template waits there for a reader.
    let Some(setup) = Setup::with(move |plan| {
        if plan.memory == Bytes::mib(128) {
            std::fs::hard_link(&again, plan.dir.join("template.json.new")).unwrap();
        }
    }) else {
        return;
    };
    let none = TemplateLimits {
        memory_bytes: 0,
        disk_bytes: u64::MAX,
    };
    let node = TestNode::start_with(setup.dir.path(), Arc::clone(&setup.vmm), |options| {
        options.template_limits = Some(none);
    })
    .await;
    node.image("test").await;
    let first = ran(&node, &said()).await.template;
    let resident = async |key: &Option<String>| {
        let all = listed(&node).await;
        let held = all.iter().find(|known| Some(&known.key) == key.as_ref());
        held.map_or(0, |held| held.resident_bytes)
    };
    for size in ["130m", "132m"] {
        let larger = RunRequest {
            memory: Some(size.to_owned()),
            ..said()
        };
        // Each drops what it may once it is written.
        let larger = ran(&node, &larger).await.template;
        until("it is written", async || {
            let all = listed(&node).await;
            let held = all.iter().find(|known| Some(&known.key) == larger.as_ref());
            held.is_some_and(|held| held.stored_bytes > 0)
        })
        .await;
    }
    until("the one before the last is dropped", async || {
        let held = listed(&node).await;
        held.iter().filter(|held| held.resident_bytes > 0).count() == 2
    })
    .await;
    assert!(resident(&first).await > 0, "dropped while it was written");
    assert_eq!(ran(&node, &said()).await.template, first);
    assert_eq!(setup.captured(), 3, "made again under its writer");
    // The writer goes on, and fails, as what it was about to rename is gone: the limits are kept now.
    let dirs = setup.dirs();
    let held = dirs.iter().map(|dir| dir.join("template.json.new"));
    let held: Vec<PathBuf> = held.filter(|path| path.exists()).collect();
    assert_eq!(held.len(), 1, "{held:?}");
    std::fs::remove_file(&held[0]).unwrap();
    let mut reader = std::fs::File::open(&pipe).unwrap();
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    until(
        "only the one that was written last is in memory",
        async || {
            let held = listed(&node).await;
            held.iter().filter(|held| held.resident_bytes > 0).count() == 1
        },
    )
    .await;
    assert!(resident(&first).await > 0);
    assert_eq!(ran(&node, &said()).await.template, first);
    assert_eq!(setup.captured(), 3);
}

#[tokio::test]
async fn a_machine_that_cannot_be_ended_keeps_its_note_until_it_can() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let stuck = Faults {
        capture_failure: Some("no capture".to_owned()),
        end_failure: Some("it stays".to_owned()),
        ..Faults::default()
    };
    setup.vmm.set_faults(stuck.clone());
    assert_eq!(ran(&node, &said()).await.template, None);
    let note = || {
        let dirs = setup.dirs();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        std::fs::read_to_string(dirs[0].join("making.json")).unwrap()
    };
    let noted = note();
    // Nobody makes another in its place.
    let wanted = CreateTemplateRequest {
        image: "test".to_owned(),
        memory: Some("128m".to_owned()),
        disk: Some("64m".to_owned()),
        command: vec!["echo".to_owned()],
        ..CreateTemplateRequest::default()
    };
    let error = node.client.create_template(&wanted).await.unwrap_err();
    assert!(error.to_string().contains("it stays"), "{error}");
    assert_eq!((note(), setup.captured()), (noted.clone(), 1));
    node.vanish();
    // Nor does the next node forget it, whether it cannot end it or has not its monitor.
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert_eq!(note(), noted);
    node.vanish();
    setup.vmm.set_faults(Faults::default());
    let mut of_another = support::fake().capabilities().clone();
    of_another.kind = VmmKind::Qemu;
    let other = FakeVmm::new(Arc::new(guest)).with_capabilities(of_another);
    let node = TestNode::start(setup.dir.path(), Arc::new(other)).await;
    assert_eq!(note(), noted);
    node.vanish();
    // The one that cannot end it at its start does so before it makes another.
    setup.vmm.set_faults(stuck);
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert_eq!(note(), noted);
    setup.vmm.set_faults(Faults::default());
    assert!(ran(&node, &said()).await.template.is_some());
    assert_eq!(setup.captured(), 2);
    let dir = setup.written().await;
    assert!(!dir.join("making.json").exists());
}

#[tokio::test]
async fn an_image_that_is_removed_while_its_template_is_made_takes_it_with_it() {
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let Some(setup) = Setup::with(move |_| {
        let begin = std::time::Instant::now();
        while !gate.load(Ordering::Relaxed) && begin.elapsed() < BOUND {
            std::thread::sleep(Duration::from_millis(5));
        }
    }) else {
        return;
    };
    let node = setup.node().await;
    let wanted = CreateTemplateRequest {
        image: "test".to_owned(),
        memory: Some("128m".to_owned()),
        disk: Some("64m".to_owned()),
        command: vec!["echo".to_owned()],
        ..CreateTemplateRequest::default()
    };
    let remove = async {
        until("a machine is to be captured", async || {
            setup.captured() == 1
        })
        .await;
        node.client.remove_image("test", true).await.unwrap();
        open.store(true, Ordering::Relaxed);
    };
    let (made, ()) = tokio::join!(node.client.create_template(&wanted), remove);
    let error = made.unwrap_err();
    assert!(error.to_string().contains("image was removed"), "{error}");
    assert!(listed(&node).await.is_empty());
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
}

#[tokio::test]
async fn a_templates_use_is_noted_for_the_next_node_while_it_is_in_memory() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    ran(&node, &said()).await;
    let dir = setup.written().await;
    let file = std::fs::File::options()
        .write(true)
        .open(dir.join("template.json"))
        .unwrap();
    let days = Duration::from_secs(13 * 24 * 3600);
    let long_ago = std::time::SystemTime::now() - days;
    file.set_modified(long_ago).unwrap();
    ran(&node, &said()).await;
    until("its use is noted", async || {
        let modified = file.metadata().unwrap().modified().unwrap();
        modified > long_ago + Duration::from_secs(3600)
    })
    .await;
}

#[tokio::test]
async fn an_image_takes_its_templates_with_it() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let machine = ran(&node, &said()).await.machine;
    setup.written().await;
    node.client
        .remove_machine(&machine.id, false)
        .await
        .unwrap();
    node.client.remove_image("test", true).await.unwrap();
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
    assert!(listed(&node).await.is_empty());
}

#[tokio::test]
async fn a_fork_that_fails_boots_instead_and_its_template_is_not_tried_again_at_once() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    assert!(ran(&node, &said()).await.template.is_some());
    setup.vmm.set_faults(Faults {
        fork_failure: Some("on purpose".to_owned()),
        ..Faults::default()
    });
    assert_eq!(ran(&node, &said()).await.template, None);
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
    assert_eq!(ran(&node, &said()).await.template, None);
    assert_eq!(setup.captured(), 1);
}

#[tokio::test]
async fn a_fork_that_fails_for_its_own_machines_reasons_leaves_the_template() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let key = ran(&node, &said()).await.template;
    setup.vmm.set_faults(Faults {
        fork_shortage: Some("no room for it".to_owned()),
        ..Faults::default()
    });
    assert_eq!(ran(&node, &said()).await.template, None, "it boots");
    assert_eq!(listed(&node).await.len(), 1);
    setup.vmm.set_faults(Faults::default());
    assert_eq!(ran(&node, &said()).await.template, key);
    assert_eq!(setup.captured(), 1);
}

#[tokio::test]
async fn a_taken_port_is_told_and_says_nothing_against_the_template() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    assert!(ran(&node, &said()).await.template.is_some());
    setup.vmm.set_faults(Faults {
        ports_taken: true,
        ..Faults::default()
    });
    let published = RunRequest {
        ports: vec!["0:80".to_owned()],
        ..said()
    };
    let machine = node.client.run(&published).await.unwrap();
    let answer = node.client.wait(&machine.id).await.unwrap();
    assert_eq!(answer.exit_code, 125);
    assert!(answer.message.unwrap().contains("in use"));
    assert_eq!(listed(&node).await.len(), 1);
    assert!(ran(&node, &said()).await.template.is_some());
    assert_eq!(setup.captured(), 1);
}

#[tokio::test]
async fn templates_are_removed_by_key_and_by_prune_but_not_under_running_forks() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let machine = node.run(&["sleep", "1000"]).await;
    until("it is forked", async || {
        listed(&node)
            .await
            .iter()
            .any(|template| template.machines == 1)
    })
    .await;
    let key = listed(&node).await[0].key.clone();
    let pruned = node.client.prune_templates(0, false).await.unwrap();
    assert!(pruned.deleted.is_empty(), "{pruned:?}");
    node.client.remove_machine(&machine.id, true).await.unwrap();
    let pruned = node.client.prune_templates(3_600_000, false).await.unwrap();
    assert!(pruned.deleted.is_empty(), "{pruned:?}");
    let pruned = node.client.prune_templates(0, false).await.unwrap();
    assert_eq!(pruned.deleted, [key.as_str()]);
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());

    ran(&node, &said()).await;
    assert_eq!(node.client.remove_template(&key[..5]).await.unwrap(), key);
    match node.client.remove_template(&key).await {
        Err(ClientError::Refused(body)) => assert_eq!(body.kind, ErrorKind::NotFound),
        other => panic!("{other:?}"),
    }
    assert!(setup.dirs().is_empty(), "{:?}", setup.dirs());
}

#[tokio::test]
async fn templates_removed_while_others_are_made_of_the_same_key_are_never_mixed() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    for _ in 0..5 {
        let key = ran(&node, &said()).await.template.unwrap();
        let wanted = said();
        let (removed, run) = tokio::join!(node.client.remove_template(&key), ran(&node, &wanted));
        assert_eq!(removed.unwrap(), key);
        assert!(run.template.is_some());
    }
    ran(&node, &said()).await;
    let made = setup.captured();
    setup.written().await;
    node.vanish();
    let node = TestNode::start(setup.dir.path(), Arc::clone(&setup.vmm)).await;
    assert!(ran(&node, &said()).await.template.is_some());
    assert_eq!(setup.captured(), made, "what was written was not whole");
}

#[tokio::test]
async fn explain_says_from_what_a_machine_would_start() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    let start = async |wanted: &RunRequest| node.client.explain(wanted).await.unwrap().start;
    assert!(start(&said()).await.ends_with("which is made first"));
    let key = ran(&node, &said()).await.template.unwrap();
    assert_eq!(start(&said()).await, format!("forked from template {key}"));
    let boots = RunRequest {
        no_template: true,
        ..said()
    };
    assert_eq!(start(&boots).await, "boots (--no-template)");
}

#[tokio::test]
async fn explain_without_a_kernel_says_so_and_makes_nothing() {
    let Some(setup) = Setup::new() else { return };
    // One that stands for QEMU boots a kernel, of which there is none.
    let mut capabilities = support::fake().capabilities().clone();
    capabilities.kind = VmmKind::Qemu;
    let vmm = FakeVmm::new(Arc::new(guest)).with_capabilities(capabilities);
    let node = TestNode::start(setup.dir.path(), Arc::new(vmm)).await;
    node.image("test").await;
    let start = node.client.explain(&said()).await.unwrap().start;
    assert!(start.contains("no Linux kernel"), "{start}");
    let made = std::fs::read_dir(setup.dir.path().join("state/initramfs")).unwrap();
    assert_eq!(made.count(), 0);
}
