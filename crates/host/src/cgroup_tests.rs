//! Tests of cgroups, on a tree of plain files for both versions, and on the host's own where we may.

use super::*;

fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

const LIMITS: Limits = Limits {
    memory_max: Some(512 << 20),
    pids_max: Some(64),
    cpu_millis: Some(500),
};

#[test]
fn version_two_at_the_top_is_taken_with_its_controllers() {
    let root = tree(&[
        ("cgroup.controllers", "cpuset cpu io memory pids\n"),
        ("cgroup.subtree_control", "cpu memory pids"),
        ("vistara/cgroup.subtree_control", "cpu memory pids"),
        ("vistara/m1/memory.max", "max"),
        ("vistara/m1/pids.max", "max"),
        ("vistara/m1/cpu.max", "max 100000"),
    ]);
    let groups = detect_under(root.path(), "0::/user.slice\n").unwrap();
    assert_eq!(groups.describe(), "v2: cpu, memory, pids");
    let group = groups.create("m1", &LIMITS).unwrap();
    let read = |name: &str| fs::read_to_string(group.dirs()[0].join(name)).unwrap();
    assert_eq!(read("memory.max"), (512 << 20).to_string());
    assert_eq!(read("pids.max"), "64");
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(
        group.holds()[..3],
        [
            "memory at most 512 MiB",
            "at most 64 threads",
            "at most 0.5 of a CPU"
        ]
    );
}

#[test]
fn whoever_is_in_a_delegated_cgroup_finds_the_same_place() {
    let root = tree(&[
        // Its top passes nothing to us.
        ("cgroup.controllers", ""),
        ("user/app/cgroup.controllers", "cpu memory pids"),
        ("user/app/cgroup.subtree_control", "cpu memory pids"),
        ("user/app/vistara/cgroup.subtree_control", "cpu memory pids"),
        ("user/app/vistara/m1/memory.max", "max"),
        // They have what they are given, and may have children of their own as well.
        ("user/app/vistara-node/cgroup.controllers", "memory pids"),
        (
            "user/app/vistara-node/cgroup.subtree_control",
            "memory pids",
        ),
        ("user/app/vistara/guards/cgroup.controllers", "memory pids"),
        (
            "user/app/vistara/guards/cgroup.subtree_control",
            "memory pids",
        ),
    ]);
    let node = detect_under(root.path(), "0::/user/app\n").unwrap();
    assert!(node.find("m1").is_some());
    for own in ["/user/app/vistara-node", "/user/app/vistara/guards"] {
        let groups = detect_under(root.path(), &format!("0::{own}\n")).unwrap();
        assert_eq!(groups, node, "{own}");
    }
}

#[test]
fn a_cgroup_of_another_name_is_nobodys_but_its_own() {
    for own in ["", "vistara", "user/vistara", "user/app", "a/vistara-nodes"] {
        assert_eq!(delegated(own), Path::new(own));
    }
    assert_eq!(delegated("vistara-node"), Path::new(""));
    assert_eq!(delegated("vistara/guards"), Path::new(""));
}

#[test]
fn version_one_takes_the_hierarchies_that_are_there() {
    let root = tree(&[("memory/cgroup.procs", ""), ("pids/cgroup.procs", "")]);
    let groups = detect_under(root.path(), "3:memory:/\n").unwrap();
    assert_eq!(groups.describe(), "v1: memory, pids");
    assert_eq!(
        groups
            .create("m1", &Limits::default())
            .unwrap()
            .dirs()
            .len(),
        2
    );
}

#[test]
fn without_controllers_the_reason_is_told() {
    let root = tree(&[("cgroup.controllers", "hugetlb\n")]);
    let reason = detect_under(root.path(), "0::/\n").unwrap_err();
    assert!(reason.contains("none of cpu, memory, pids"), "{reason}");
    assert!(reason.contains("no controllers are mounted"), "{reason}");
}

#[test]
fn a_name_cannot_lead_out_of_our_directory() {
    let root = tree(&[("memory/cgroup.procs", "")]);
    let groups = detect_under(root.path(), "").unwrap();
    for bad in ["", "..", "a/b", "a.b"] {
        assert!(groups.create(bad, &LIMITS).is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn a_real_cgroup_kills_what_is_in_it_and_goes() {
    let groups = match Cgroups::detect() {
        Ok(groups) => groups,
        Err(reason) => return println!("SKIP: no cgroups: {reason}"),
    };
    let group = groups
        .create(&format!("test-{}", std::process::id()), &LIMITS)
        .unwrap();
    println!("{} holds {:?}", groups.describe(), group.holds());
    let mut launch = crate::launch::Launch::new("/bin/sleep");
    launch.args = vec!["100".into()];
    launch.cgroup = Some(group.clone());
    let launched = launch.start().unwrap();
    assert_eq!(group.pids(), [launched.process.identity().pid]);
    group.destroy(Duration::from_secs(5)).await.unwrap();
    let end = launched.process.wait().await.unwrap();
    assert_eq!(end, crate::process::ProcessEnd::Signaled(9));
    assert!(group.dirs().iter().all(|dir| !dir.exists()));
    // Again, as after a crash in the middle.
    group.destroy(Duration::from_secs(5)).await.unwrap();
}
