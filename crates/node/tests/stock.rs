//! The stock as clients see it, with fake machines: who gets one of it, who does not, and that none is left over.

// Helpers of tests outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Each file of tests uses a part of it.
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{BOUND, TestNode, can_make_disks, guest, request};
use vistara_api::{MachineDetail, RunRequest};
use vistara_machine::Vmm;
use vistara_machine::fake::FakeVmm;
use vistara_model::{Bytes, MachineId};

/// A node with a stock, whose monitor knows how many machines it has.
struct Setup {
    dir: tempfile::TempDir,
    vmm: Arc<FakeVmm>,
    /// Machines that have not ended.
    alive: Arc<AtomicUsize>,
}

impl Setup {
    fn new() -> Option<Setup> {
        if !can_make_disks() {
            return None;
        }
        let alive = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&alive);
        let vmm = FakeVmm::new(Arc::new(move |fake| {
            count.fetch_add(1, Ordering::SeqCst);
            let end = guest(fake);
            count.fetch_sub(1, Ordering::SeqCst);
            end
        }));
        Some(Setup {
            dir: tempfile::tempdir().unwrap(),
            vmm: Arc::new(vmm),
            alive,
        })
    }

    async fn node(&self) -> TestNode {
        self.node_with(Bytes::mib(1 << 20)).await
    }

    async fn node_with(&self, budget: Bytes) -> TestNode {
        let node = TestNode::start_with(self.dir.path(), Arc::clone(&self.vmm), |options| {
            options.warm_memory = Some(budget);
        })
        .await;
        node.image("test").await;
        node
    }

    fn dirs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path().join("state/machines")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn alive(&self) -> usize {
        self.alive.load(Ordering::SeqCst)
    }
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

fn said() -> RunRequest {
    request(&["echo", "said"])
}

async fn ran(node: &TestNode, wanted: &RunRequest) -> MachineDetail {
    let machine = node.client.run(wanted).await.unwrap();
    let (out, ..) = node.follow(&machine.id).await;
    assert_eq!(out, b"said\n");
    let detail = node.client.machine(&machine.id).await.unwrap();
    node.client.remove_machine(&machine.id, true).await.unwrap();
    detail
}

async fn in_stock(node: &TestNode) -> u32 {
    let templates = node.client.templates().await.unwrap();
    templates.iter().map(|template| template.warm).sum()
}

/// Runs twice, after which there is a stock.
async fn stocked(node: &TestNode) {
    assert!(!ran(node, &said()).await.warm);
    assert_eq!(
        in_stock(node).await,
        0,
        "who runs an image once gets no stock"
    );
    assert!(!ran(node, &said()).await.warm);
    until("a stock", async || in_stock(node).await > 0).await;
}

#[tokio::test]
async fn the_third_run_is_a_machine_of_the_stock_which_is_filled_again() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    let before = setup.dirs();
    let third = ran(&node, &said()).await;
    assert!(third.warm, "{third:?}");
    assert!(third.template.is_some());
    let id = &third.machine.id;
    assert!(
        before.iter().any(|dir| dir.ends_with(id)),
        "it was there before it was asked for"
    );
    assert!(id.starts_with(&third.hostname));
    assert!(
        third
            .timings
            .iter()
            .any(|step| step.step == "from the stock")
    );
    until("another in its place", async || in_stock(&node).await > 0).await;
    let fourth = ran(&node, &said()).await;
    assert!(fourth.warm);
    assert_ne!(fourth.machine.id, third.machine.id);
    let explained = node.client.explain(&said()).await.unwrap().start;
    until("a stock again", async || in_stock(&node).await > 0).await;
    let warm = node.client.explain(&said()).await.unwrap().start;
    assert!(
        warm.starts_with("warm, from the stock of template"),
        "{explained}, {warm}"
    );
}

#[tokio::test]
async fn what_a_monitor_or_a_guest_would_have_to_be_told_before_does_not_come_from_the_stock() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    let text = |text: &str| Some(text.to_owned());
    for unlike in [
        RunRequest {
            ports: vec!["0:80".to_owned()],
            ..said()
        },
        RunRequest {
            hostname: text("mine"),
            ..said()
        },
        RunRequest {
            cpus: text("0.5"),
            ..said()
        },
        RunRequest {
            memory: text("160m"),
            ..said()
        },
        RunRequest {
            disk: text("96m"),
            ..said()
        },
        RunRequest {
            network: text("none"),
            ..said()
        },
        RunRequest {
            read_only: true,
            ..said()
        },
        RunRequest {
            disk_rate: text("64m"),
            ..said()
        },
        RunRequest {
            no_template: true,
            ..said()
        },
    ] {
        assert!(!ran(&node, &unlike).await.warm, "{unlike:?}");
    }
    let alike = RunRequest {
        name: text("mine"),
        env: vec!["A=B".to_owned()],
        working_dir: text("/tmp"),
        ..said()
    };
    until("a stock", async || in_stock(&node).await > 0).await;
    assert!(ran(&node, &alike).await.warm);
}

#[tokio::test]
async fn a_request_that_is_refused_leaves_the_stock_as_it_is() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    let named = RunRequest {
        name: Some("mine".to_owned()),
        ..request(&["sleep", "100"])
    };
    let first = node.client.run(&named).await.unwrap();
    until("a stock", async || in_stock(&node).await > 0).await;
    let count = in_stock(&node).await;
    assert!(node.client.run(&named).await.is_err());
    assert!(in_stock(&node).await >= count);
    node.client.remove_machine(&first.id, true).await.unwrap();
}

#[tokio::test]
async fn a_budget_of_nothing_is_no_stock() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node_with(Bytes(0)).await;
    for _ in 0..4 {
        assert!(!ran(&node, &said()).await.warm);
    }
    assert_eq!(in_stock(&node).await, 0);
    until("no machine", async || setup.alive() == 0).await;
}

#[tokio::test]
async fn the_node_after_a_killed_one_ends_the_stock() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    until("the stock is whole", async || {
        setup.alive() == setup.dirs().len()
    })
    .await;
    assert!(setup.alive() > 0);
    node.vanish();
    assert!(
        setup.alive() > 0,
        "it outlives its node, as every machine does"
    );
    let next = setup.node().await;
    until("no machine", async || setup.alive() == 0).await;
    assert_eq!(setup.dirs(), [] as [PathBuf; 0]);
    assert!(next.client.machines(true).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_node_without_the_monitor_leaves_the_stock_of_a_killed_one_to_the_next() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    until("the stock is whole", async || {
        setup.alive() == setup.dirs().len()
    })
    .await;
    let dirs = setup.dirs();
    node.vanish();
    let blind = TestNode::start_with(setup.dir.path(), Arc::clone(&setup.vmm), |options| {
        options.vmms = vistara_node::Vmms::Detect;
        options.qemu = Some("/nowhere/qemu".into());
        options.firecracker = Some("/nowhere/firecracker".into());
    })
    .await;
    assert_eq!(setup.dirs(), dirs, "all that is known of them");
    assert_eq!(setup.alive(), dirs.len());
    blind.vanish();
    let _next = setup.node().await;
    until("no machine", async || setup.alive() == 0).await;
    assert_eq!(setup.dirs(), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn a_node_that_leaves_ends_its_stock_and_not_its_machines() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    let own = node.client.run(&request(&["sleep", "1000"])).await.unwrap();
    until("a stock beside a machine", async || {
        in_stock(&node).await > 0
    })
    .await;
    node.client.shutdown().await.unwrap();
    until("the stock's end", async || {
        setup.alive() == 1 && setup.dirs().len() == 1
    })
    .await;
    assert!(setup.dirs()[0].ends_with(&own.id));
    drop(node);
    let next = setup.node().await;
    next.client.remove_machine(&own.id, true).await.unwrap();
}

#[tokio::test]
async fn a_template_takes_its_stock_with_it() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    let key = node.client.templates().await.unwrap()[0].key.clone();
    node.client.remove_template(&key).await.unwrap();
    assert!(
        !ran(&node, &said()).await.warm,
        "nothing stale is given to anybody"
    );
    // The image takes its templates, and they their stock.
    until("a new stock", async || in_stock(&node).await > 0).await;
    node.client.remove_image("test", true).await.unwrap();
    until("no machine", async || {
        setup.alive() == 0 && setup.dirs().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_machine_of_the_stock_that_ends_by_itself_is_given_to_nobody() {
    let Some(setup) = Setup::new() else { return };
    let node = setup.node().await;
    stocked(&node).await;
    // One that is still being made has nothing yet that could end by itself.
    let mut dirs = setup.dirs();
    while dirs.len() != in_stock(&node).await as usize {
        tokio::time::sleep(Duration::from_millis(5)).await;
        dirs = setup.dirs();
    }
    for dir in &dirs {
        let id: MachineId = dir.file_name().unwrap().to_str().unwrap().parse().unwrap();
        setup.vmm.sweep(&id, dir).await.unwrap();
    }
    until("nothing is left of it", async || {
        dirs.iter().all(|dir| !dir.exists())
    })
    .await;
    // Another may have taken its place by now.
    let machine = ran(&node, &said()).await.machine;
    assert!(dirs.iter().all(|dir| !dir.ends_with(&machine.id)));
}
