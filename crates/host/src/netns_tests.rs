//! Tests of network namespaces, with programs that live in them. They take root.

use super::*;
use crate::files::OutputBox;
use crate::launch::Launch;
use std::time::Duration;

fn may_make() -> bool {
    if !crate::facts::is_root() {
        println!("SKIP: network namespaces take root");
        return false;
    }
    if !std::fs::exists("/dev/net/tun").unwrap() {
        println!("SKIP: there is no /dev/net/tun");
        return false;
    }
    true
}

/// The first process of its own process and network namespaces.
fn first_process() -> ProcessHandle {
    let mut launch = Launch::new("/bin/sleep");
    launch.args = vec!["60".into()];
    (launch.own_processes, launch.own_network) = (true, true);
    launch.start().unwrap().process
}

#[tokio::test]
async fn taps_are_made_in_a_processs_namespace_and_nowhere_else() {
    if !may_make() {
        return;
    }
    let process = first_process();
    let taps = [
        Tap {
            name: "vst-test0",
            owner: Some(61_004),
        },
        Tap {
            name: "vst-test1",
            owner: None,
        },
    ];
    let namespace = NetworkNamespace::of(&process).unwrap();
    namespace.make_joined_taps("vst-bridge", &taps).unwrap();
    let seen_by = |of: &str| std::fs::read_to_string(format!("/proc/{of}/net/dev")).unwrap();
    let (there, here) = (
        seen_by(&process.identity().pid.to_string()),
        seen_by("self"),
    );
    for name in ["vst-test0:", "vst-test1:", "vst-bridge:"] {
        assert!(there.contains(name), "{there}");
        assert!(!here.contains(name), "{here}");
    }
    let again = namespace.make_joined_taps("vst-bridge", &taps).unwrap_err();
    assert!(again.step.starts_with("making a bridge"), "{again}");
    let long = namespace.make_joined_taps("a-name-that-is-too-long", &[]);
    assert_eq!(long.unwrap_err().source.kind(), io::ErrorKind::InvalidInput);
    process.kill().unwrap();
    process.wait().await.unwrap();
}

#[tokio::test]
async fn a_process_in_anothers_process_namespace_ends_with_that_ones_first() {
    if !may_make() {
        return;
    }
    let first = first_process();
    let output = OutputBox::new(4096).unwrap();
    let mut launch = Launch::new("/bin/sh");
    launch.args = vec!["-c".into(), "echo here; exec sleep 60".into()];
    launch.output = Some(output.writer().unwrap());
    launch.processes_of = Some(first.process_namespace().unwrap());
    let second = launch.start().unwrap().process;
    while output.tail(100).is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let pid = second.identity().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = format!("PPid:\t{}\n", first.identity().pid);
    assert!(status.contains(&parent), "{status}");
    let spaces = status.lines().find(|line| line.starts_with("NSpid:"));
    assert_eq!(spaces.unwrap().split_whitespace().count(), 3, "{status}");
    let end = tokio::time::timeout(Duration::from_millis(50), second.wait()).await;
    assert!(end.is_err(), "it runs");
    first.kill().unwrap();
    first.wait().await.unwrap();
    // By then the kernel has ended and collected the other, too: nobody had to.
    assert_eq!(crate::facts::start_ticks(pid), None);
    second.wait().await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_of_in_anothers_process_namespace_too() {
    if !may_make() {
        return;
    }
    let first = first_process();
    let mut launch = Launch::new("/no/such/program");
    launch.processes_of = Some(first.process_namespace().unwrap());
    let error = launch.start().unwrap_err();
    assert_eq!(error.step, "loading the program");
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    first.kill().unwrap();
    first.wait().await.unwrap();
}
