//! Provisional runs as users have them: a program that could fork is tried as a unikernel, and what is seen of it is either all
//! of that run or all of one on Linux, never both and never a part.
//!
//! Needs a Nanos kernel with its modules beside it (`VISTARA_NANOS_KERNEL`, or `/opt/vistara/nanos/kernel.img`), QEMU, gcc and
//! a Linux guest's kernel (`VISTARA_TEST_KERNELS`); each test is skipped with the reason where one is missing.

// Helpers outside a test function: a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vm::{System, text, until};

/// Could fork, whatever it is told to do.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  printf("begin ");
  fflush(stdout);
  if (!strcmp(what, "alone")) { puts("alone"); return 5; }
  if (!strcmp(what, "line")) {
    puts("");
    fflush(stdout);
    if (fork() == 0) { puts("child"); return 0; }
    return 4;
  }
  if (!strcmp(what, "mode")) { chmod("/etc/made", 0600); puts("made"); return 0; }
  if (!strcmp(what, "trace")) {
    puts("trace\n[2] fork(1) = 3\n[2] exit_group( <unfinished ...>\nend");
    return 0;
  }
  if (!strcmp(what, "silent")) {
    if (fork() == 0) { puts("child"); return 0; }
    wait(NULL);
    puts("end");
    return 0;
  }
  if (!strcmp(what, "become")) { execl("/bin/other", "other", NULL); puts("unbecome"); return 0; }
  if (!strcmp(what, "slow")) { for (int i = 0; i < 12; i++) { printf("%d ", i); fflush(stdout); usleep(500000); } puts("end"); return 6; }
  if (!strcmp(what, "ask")) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    to.sin_addr.s_addr = inet_addr("10.0.2.2");
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(s, (void *)&to, sizeof to)) { puts("nobody there"); return 0; }
    write(s, "x", 1);
    puts("asked");
    return 0;
  }
  return 2;
}
"#;
/// What it prints when it is slow.
const SLOW: &str = "begin 0 1 2 3 4 5 6 7 8 9 10 11 end";
const OTHER: &str = r#"
#include <stdio.h>
int main(void) { puts("another"); return 0; }
"#;

fn skip<T>(reason: &str) -> Option<T> {
    println!("SKIP: {reason}");
    None
}

fn kernel() -> Option<PathBuf> {
    let kernel = std::env::var_os("VISTARA_NANOS_KERNEL")
        .map_or_else(|| "/opt/vistara/nanos/kernel.img".into(), PathBuf::from);
    let module = kernel.with_file_name("klibs").join("strace");
    match kernel.exists() && module.exists() {
        true => Some(kernel),
        false => skip(&format!("no Nanos kernel with {}", module.display())),
    }
}

fn compiled(scratch: &Path, name: &str, source: &str) -> bool {
    let from = scratch.join(format!("{name}.c"));
    fs::write(&from, source).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-O1", "-w", "-o"])
        .arg(scratch.join("root/bin").join(name))
        .arg(from);
    gcc.status().is_ok_and(|status| status.success())
}

/// A node of this name, and an image on it of which nothing is known.
struct Tried {
    system: System,
    image: String,
}

impl Tried {
    fn ready(name: &str) -> Option<Tried> {
        let kernel = kernel()?;
        let Some(kernels) = std::env::var_os("VISTARA_TEST_KERNELS") else {
            return skip("no guest kernel (VISTARA_TEST_KERNELS is not set)");
        };
        let state = vm::state_dir(name);
        fs::create_dir_all(&state).unwrap();
        let system = System { state };
        let lock = File::create(system.state.join("test.lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let link = system.state.join("kernels");
        if !link.exists() {
            symlink(kernels, link).unwrap();
        }
        let scratch = tempfile::tempdir().unwrap();
        for dir in ["bin", "etc", "tmp"] {
            fs::create_dir_all(scratch.path().join("root").join(dir)).unwrap();
        }
        if !compiled(scratch.path(), "program", PROGRAM)
            || !compiled(scratch.path(), "other", OTHER)
        {
            return skip("no gcc that links statically");
        }
        // Other bytes each time.
        let unique = format!("{name} {}", std::process::id());
        fs::write(scratch.path().join("root/etc/made"), &unique).unwrap();
        let tar = scratch.path().join("image.tar");
        let made = Command::new("tar")
            .arg("-C")
            .arg(scratch.path().join("root"))
            .arg("-cf")
            .arg(&tar)
            .arg(".")
            .status();
        assert!(made.unwrap().success());
        let image = format!("local/{name}:{}", std::process::id());
        let tried = Tried { system, image };
        let klibs = kernel.with_file_name("klibs");
        tried.done(&[
            "kernel",
            "add",
            "nanos",
            kernel.to_str().unwrap(),
            "--klibs",
            klibs.to_str().unwrap(),
        ]);
        tried.done(&[
            "images",
            "import",
            tar.to_str().unwrap(),
            "--name",
            &tried.image,
        ]);
        Some(tried)
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.system.vistara(arguments);
        let told = text(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {told}");
        text(&output.stdout).trim().to_owned()
    }

    /// Runs it to the end under this name. Gives the code, all output, and what the client itself said.
    fn run(&self, name: &str, command: &[&str]) -> (Option<i32>, String, String) {
        let options = ["run", "--name", name, &self.image, "/bin/program"];
        let output = self.system.vistara(&[&options, command].concat());
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    /// What ran in the end: payload, generation, and the reasons in one.
    fn ran(&self, name: &str) -> (String, i64, String) {
        let inspected = self.system.inspect(name);
        let payload = inspected["choice"]["payload"].as_str().unwrap().to_owned();
        let reasons = inspected["choice"]["reasons"].to_string();
        (payload, inspected["generation"].as_i64().unwrap(), reasons)
    }

    fn next(&self, command: &[&str]) -> String {
        let words = [&["explain", &self.image, "/bin/program"], command].concat();
        self.done(&words)
    }
}

impl Drop for Tried {
    fn drop(&mut self) {
        let machines = text(&self.system.vistara(&["ps", "-aq"]).stdout);
        for machine in machines.split_whitespace() {
            self.system.vistara(&["rm", "-f", machine]);
        }
        self.system.vistara(&["images", "rm", &self.image]);
    }
}

#[test]
fn a_run_that_needed_nothing_more_stands_with_its_code_and_its_output() {
    let Some(tried) = Tried::ready("tried-well") else {
        return;
    };
    assert!(tried.next(&["alone"]).contains("provisionally"));
    let (code, out, err) = tried.run("well", &["alone"]);
    assert_eq!((code, out.as_str()), (Some(5), "begin alone\n"), "{err}");
    let (payload, generation, reasons) = tried.ran("well");
    assert_eq!((payload.as_str(), generation), ("nanos", 1), "{reasons}");
    assert!(!err.contains("undone"), "{err}");
    assert!(tried.next(&["alone"]).contains("provisionally"));
    assert_eq!(tried.done(&["logs", "well"]), "begin alone");
}

#[test]
fn a_run_that_missed_something_in_silence_never_was_and_is_remembered() {
    let Some(tried) = Tried::ready("tried-silent") else {
        return;
    };
    for (what, wanted) in [
        ("silent", "begin child\nend\n"),
        ("become", "begin another\n"),
    ] {
        let (code, out, err) = tried.run(what, &[what]);
        // The C library forgets what it has not written, when the program becomes another.
        assert_eq!((code, out.as_str()), (Some(0), wanted), "{err}");
        assert_eq!(err.matches("tried to make a process").count(), 1, "{err}");
        let (payload, generation, reasons) = tried.ran(what);
        assert_eq!((payload.as_str(), generation), ("linux", 2), "{reasons}");
        assert!(reasons.contains("undone before anything of it was shown"));
        assert_eq!(tried.done(&["logs", what]), wanted.trim());
        let next = tried.next(&[what]);
        assert!(next.contains("tried as a unikernel before"), "{next}");
    }
    // Its other commands are not spoken against.
    assert!(tried.next(&["alone"]).contains("provisionally"));
}

#[test]
fn what_a_unikernel_only_says_it_did_and_what_reads_like_its_kernel_are_undone() {
    let Some(tried) = Tried::ready("tried-other") else {
        return;
    };
    for (what, wanted, word) in [
        ("mode", "begin made\n", "the call chmod"),
        (
            "trace",
            "begin trace\n[2] fork(1) = 3\n[2] exit_group( <unfinished ...>\nend\n",
            "cannot be told from what its kernel tells",
        ),
    ] {
        let (code, out, err) = tried.run(what, &[what]);
        assert_eq!((code, out.as_str()), (Some(0), wanted), "{err}");
        let (payload, generation, reasons) = tried.ran(what);
        assert_eq!((payload.as_str(), generation), ("linux", 2), "{reasons}");
        assert!(reasons.contains(word), "{reasons}");
    }
    // The kernel's word about the fork has a line of its own, and comes byte by byte. Nobody waits for the child.
    let (code, out, err) = tried.run("line", &["line"]);
    assert_eq!(
        (code, out.starts_with("begin \n")),
        (Some(4), true),
        "{out} {err}"
    );
    assert_eq!(tried.ran("line").0, "linux", "{err}");
    assert!(err.contains("tried to make a process"), "{err}");
}

#[test]
fn a_run_whose_node_dies_when_it_stands_or_between_its_runs_is_shown_once() {
    let Some(tried) = Tried::ready("tried-between") else {
        return;
    };
    let image = &tried.image;
    let begin = |name: &str, what: &str| {
        let options = [
            "run",
            "-d",
            "-q",
            "--name",
            name,
            image,
            "/bin/program",
            what,
        ];
        tried.done(&options);
    };
    begin("stands", "alone");
    let id = tried.system.inspect("stands")["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let held = tried.system.state.join("machines").join(id).join("held");
    // It is there for some milliseconds; whenever the node dies, it is one run that is shown.
    let record = held.with_file_name("record.json");
    let is_over = || fs::read_to_string(&record).is_ok_and(|it| it.contains(r#""state":"ended""#));
    let bound = Instant::now() + vm::BOUND;
    while !held.exists() && !is_over() && Instant::now() < bound {
        std::thread::sleep(Duration::from_micros(100));
    }
    tried.system.kill_node();
    assert_eq!(tried.done(&["wait", "stands"]), "5");
    assert_eq!(tried.done(&["logs", "stands"]), "begin alone");
    begin("between", "silent");
    until("the second run's preparation", || {
        let inspected = tried.system.inspect("between");
        inspected["generation"] == 2
    });
    tried.system.kill_node();
    assert_eq!(tried.done(&["wait", "between"]), "0");
    assert_eq!(tried.done(&["logs", "between"]), "begin child\nend");
    let (payload, generation, reasons) = tried.ran("between");
    assert_eq!((payload.as_str(), generation), ("linux", 2), "{reasons}");
}

#[test]
fn what_a_run_would_send_is_sent_once() {
    let Some(tried) = Tried::ready("tried-sending") else {
        return;
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut word = [0];
            if stream.read(&mut word).is_ok_and(|read| read == 1) {
                count.fetch_add(1, Ordering::SeqCst);
            }
            let _ = stream.write_all(b"y");
        }
    });
    let (code, out, err) = tried.run("sending", &["ask", &port]);
    assert_eq!((code, out.as_str()), (Some(0), "begin asked\n"), "{err}");
    until("the word", || heard.load(Ordering::SeqCst) > 0);
    assert_eq!(heard.load(Ordering::SeqCst), 1);
    let (payload, _, reasons) = tried.ran("sending");
    assert_eq!(payload, "linux");
    assert!(reasons.contains("it used the network"), "{reasons}");
}

#[test]
fn a_run_whose_node_died_is_undone_and_its_output_is_there_once() {
    let Some(tried) = Tried::ready("tried-killed") else {
        return;
    };
    let image = &tried.image;
    let options = ["run", "-d", "-q", "--name", "killed", image, "/bin/program"];
    tried.done(&[&options[..], &["slow"]].concat());
    until("the program", || {
        tried.system.inspect("killed")["state"] == "running"
    });
    let (payload, ..) = tried.ran("killed");
    assert_eq!(payload, "nanos");
    // It prints every half a second from about now on, to nobody.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(tried.done(&["logs", "killed"]), "");
    tried.system.kill_node();
    assert_eq!(tried.done(&["wait", "killed"]), "6");
    assert_eq!(tried.done(&["logs", "killed"]), SLOW);
    let (payload, generation, reasons) = tried.ran("killed");
    assert_eq!((payload.as_str(), generation), ("linux", 2), "{reasons}");
    // That it was the node's fault is not held against the command.
    assert!(tried.next(&["slow"]).contains("provisionally"));
}

#[test]
fn a_run_that_is_stopped_or_out_of_time_is_not_begun_again() {
    let Some(tried) = Tried::ready("tried-stopped") else {
        return;
    };
    let image = &tried.image;
    let options = [
        "run",
        "-d",
        "-q",
        "--name",
        "stopped",
        image,
        "/bin/program",
    ];
    tried.done(&[&options[..], &["slow"]].concat());
    until("the program", || {
        tried.system.inspect("stopped")["state"] == "running"
    });
    // Nothing of it can be seen before it ends, so that there is nothing to wait for but the time that it takes.
    std::thread::sleep(Duration::from_secs(3));
    tried.done(&["stop", "-t", "20", "stopped"]);
    assert_eq!(tried.done(&["wait", "stopped"]), "143");
    let (payload, generation, _) = tried.ran("stopped");
    assert_eq!((payload.as_str(), generation), ("nanos", 1));
    let shown = tried.done(&["logs", "stopped"]);
    // What it had printed until then.
    assert!(SLOW.starts_with(&shown), "{shown:?}");
    assert!(shown.starts_with("begin 0"), "{shown:?}");
    let words = [
        "run",
        "--timeout",
        "3s",
        "--name",
        "late",
        image,
        "/bin/program",
        "slow",
    ];
    let output = tried.system.vistara(&words);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
    assert_eq!(tried.ran("late").1, 1);
}
