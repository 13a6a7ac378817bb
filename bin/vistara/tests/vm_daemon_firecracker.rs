//! The whole system where KVM works and Firecracker is there: the built binary, a node that it starts by itself, real machines.
//! In the lab (`cargo xtask lab --tests`), and on hosts with both.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::path::Path;
use std::process::{Command, Stdio};
use vm::two::said;
use vm::{System, text, until};

const BUSYBOX: &str = "busybox";

/// A node that takes Firecracker by itself, with an image of busybox alone; or the reason why not.
fn ready() -> Option<System> {
    if !Path::new("/bin/busybox").exists() {
        println!("SKIP: no /bin/busybox (apt-get install busybox-static)");
        return None;
    }
    let system = System::without_image("firecracker")?;
    let state = need(&system, "firecracker");
    if state != "works" {
        println!("SKIP: Firecracker runs no machine here: it is {state}");
        return None;
    }
    if !system
        .vistara(&["images", "inspect", BUSYBOX])
        .status
        .success()
    {
        let dir = tempfile::tempdir().unwrap();
        let script = "mkdir -p root/bin root/tmp && cp /bin/busybox root/bin && \
                      root/bin/busybox --install -s root/bin && \
                      for link in root/bin/*; do [ -L $link ] && ln -sf busybox $link; done; \
                      tar -C root -cf root.tar .";
        let made = Command::new("sh")
            .args(["-euc", script])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made.stderr));
        let archive = dir.path().join("root.tar");
        let archive = archive.to_str().unwrap();
        let done = system.vistara(&["images", "import", archive, "--name", BUSYBOX]);
        assert!(done.status.success(), "{}", text(&done.stderr));
    }
    Some(system)
}

/// What `doctor` says of one need: `works`, `absent`, `broken`.
fn need(system: &System, name: &str) -> String {
    let doctor: serde_json::Value =
        serde_json::from_slice(&system.vistara(&["doctor", "--json"]).stdout).unwrap();
    let needs = doctor["needs"].as_array().unwrap().iter();
    let found = needs.clone().find(|need| need["name"] == name);
    let found = found.unwrap_or_else(|| panic!("no {name} in {doctor}"));
    found["state"].as_str().unwrap().to_owned()
}

/// Processes of Firecracker and of what gives its machines a network, by their command lines.
fn monitors_of(machine: &str) -> Vec<String> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(machine) && !line.contains("vistara") {
            found.push(line);
        }
    }
    found
}

#[test]
fn firecracker_is_chosen_by_itself_and_says_so() {
    let Some(system) = ready() else { return };
    assert_eq!(need(&system, "kvm"), "works");
    assert_eq!(need(&system, "jailer"), "works");
    let script = "uname -r; cat /sys/class/dmi/id/sys_vendor 2>/dev/null; echo bad >&2; exit 7";
    let output = system.vistara(&["run", "--rm", "--explain", BUSYBOX, "sh", "-c", script]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains("firecracker"), "{said}");
    assert!(said.contains("bad\n"), "{said}");
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(!text(&output.stdout).is_empty());
    println!("guest {} on {}", text(&output.stdout).trim(), host.trim());
}

#[test]
fn a_machine_in_firecracker_survives_its_nodes_violent_death_and_leaves_nothing() {
    let Some(system) = ready() else { return };
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 1; done";
    let started = system.vistara(&["run", "-d", BUSYBOX, "sh", "-c", script]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let id = text(&started.stdout).trim().to_owned();
    let machine = system.adopt(&id);
    let before = system.inspect(&machine.id);
    assert_eq!(before["choice"]["vmm"], "firecracker", "{before}");
    system.kill_node();
    let exec = system.vistara(&["exec", &machine.id, "echo", "still here"]);
    assert_eq!(text(&exec.stdout), "still here\n", "{}", text(&exec.stderr));
    let after = system.inspect(&machine.id);
    assert_eq!(
        after["vmm_pid"], before["vmm_pid"],
        "it is the same machine"
    );
    // The balloon reports every ten seconds, once its driver is there.
    until("the balloon's report", || {
        let stats = system.vistara(&["stats", "--no-stream", "--json", &machine.id]);
        let stats: serde_json::Value = serde_json::from_slice(&stats.stdout).unwrap_or_default();
        stats[0]["balloon"]["available_bytes"].as_u64() > Some(1 << 20)
    });
    let logs = text(&system.vistara(&["logs", &machine.id]).stdout);
    for (number, line) in logs.lines().enumerate() {
        assert_eq!(line, format!("line {number}"), "no line is lost or doubled");
    }
    assert!(!monitors_of(&machine.id).is_empty());
    let removed = system.vistara(&["rm", "-f", &machine.id]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    assert_eq!(monitors_of(&machine.id), [] as [&str; 0]);
    assert!(!system.state.join("machines").join(&machine.id).exists());
    let cgroups = Command::new("find")
        .args(["/sys/fs/cgroup", "-name", &format!("*{}*", machine.id)])
        .output()
        .unwrap();
    assert_eq!(text(&cgroups.stdout), "");
}

#[test]
fn the_kernel_tells_its_console_what_it_does_where_that_is_asked_for() {
    let Some(system) = ready() else { return };
    let quiet = system.vistara(&["run", "--rm", "-q", "--no-template", BUSYBOX, "true"]);
    assert_eq!(text(&quiet.stderr), "");
    let told = system.vistara(&["run", "--rm", "-q", "--console", BUSYBOX, "true"]);
    assert_eq!(told.status.code(), Some(0), "{}", text(&told.stderr));
    assert!(
        text(&told.stderr).contains("Linux version"),
        "{}",
        text(&told.stderr)
    );
}

#[test]
fn a_machine_in_firecracker_is_forked_and_restored_and_goes_on_itself() {
    let Some(system) = ready() else { return };
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 1; done";
    let started = system.vistara(&["run", "-d", BUSYBOX, "sh", "-c", script]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let parent = system.adopt(text(&started.stdout).trim());
    let said = |words: &[&str]| said(&system, words);
    let exec = |machine: &str, script: &str| said(&["exec", machine, "sh", "-c", script]);
    exec(
        &parent.id,
        "echo kept > /tmp/file; mkdir -p /mnt; mount -t tmpfs none /mnt && echo memory > /mnt/file",
    );
    let kept = "cat /tmp/file /mnt/file";
    let forked: serde_json::Value =
        serde_json::from_str(&said(&["fork", "-n", "2", "--json", &parent.id])).unwrap();
    println!("forked, held {} ms", forked["pause_ms"]);
    let machines = forked["machines"].as_array().unwrap().iter();
    let forks: Vec<_> = machines
        .map(|machine| system.adopt(machine["id"].as_str().unwrap()))
        .collect();
    assert_eq!(forks.len(), 2);
    let snapshot = said(&["snapshot", "create", "--name", "fc-moment", &parent.id]);
    println!("snapshot: {snapshot}");
    let restored = system.adopt(&said(&["snapshot", "restore", "fc-moment"]));
    let mut random = vec![];
    for machine in forks.iter().chain([&parent, &restored]) {
        assert_eq!(exec(&machine.id, kept), "kept\nmemory");
        random.push(exec(
            &machine.id,
            "hostname; head -c 16 /dev/urandom | hexdump -C",
        ));
        assert_eq!(system.inspect(&machine.id)["choice"]["vmm"], "firecracker");
    }
    random.sort_unstable();
    random.dedup();
    assert_eq!(random.len(), 4, "each is a machine of its own: {random:?}");
    // The captured one has printed on, and nothing twice.
    let logs = || text(&system.vistara(&["logs", &parent.id]).stdout);
    let before = logs().lines().count();
    until("it prints on", || logs().lines().count() > before + 1);
    for (number, line) in logs().lines().enumerate() {
        assert_eq!(line, format!("line {number}"), "no line is lost or doubled");
    }
    // So do the others, from where it was.
    let first = |id: &str| text(&system.vistara(&["logs", id]).stdout);
    until("a fork prints", || first(&forks[0].id).lines().count() > 1);
    assert!(first(&forks[0].id).starts_with("line "));
    said(&["snapshot", "rm", "fc-moment"]);
}
