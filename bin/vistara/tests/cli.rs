//! The program as users run it, against a node of a few lines: what goes where, and with which exit code.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod fake;

use fake::Fake;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

struct Scene {
    dir: tempfile::TempDir,
    fake: Fake,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::serve(dir.path());
        Scene { dir, fake }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vistara"));
        command
            .arg("--socket")
            .arg(self.socket())
            .args(words)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(child: &Child, name: &str) {
    let done = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(done.success());
}

#[test]
fn the_programs_exit_code_is_ours() {
    let scene = Scene::new();
    for want in ["0", "1", "7", "137", "255"] {
        let output = scene.run(&["run", "debian", "exit", want]);
        assert_eq!(code(&output).to_string(), want);
        assert_eq!((output.stdout.len(), err(&output).as_str()), (0, ""));
        let output = scene.run(&["exec", "m", "exit", want]);
        assert_eq!(code(&output).to_string(), want);
    }
}

#[test]
fn stdout_and_stderr_stay_apart_and_every_byte_arrives() {
    let scene = Scene::new();
    let output = scene.run(&["run", "debian", "both"]);
    assert_eq!(output.stdout, (0..=255).collect::<Vec<u8>>());
    assert_eq!(output.stderr, b"err\n");
    let output = scene.run(&["run", "debian", "much"]);
    assert_eq!(output.stdout.len(), 256 * 65536);
}

#[test]
fn a_pipe_on_stdin_reaches_the_program_with_its_end() {
    let scene = Scene::new();
    for words in [
        &["run", "debian", "cat"][..],
        &["exec", "-i", "m", "cat"][..],
    ] {
        let mut child = scene.command(words).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let data: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let sent = data.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.stdout == data, "{words:?}");
        assert_eq!(code(&output), 0);
    }
}

#[test]
fn no_stdin_sends_none_and_tells_the_node_so() {
    let scene = Scene::new();
    let run = |options: &[&str], stdin: Stdio| {
        let words = [&["run"], options, &["debian", "exit", "0"]].concat();
        let output = scene.command(&words).stdin(stdin).output().unwrap();
        assert_eq!(code(&output), 0);
    };
    run(&["--no-stdin"], Stdio::piped());
    run(&[], Stdio::piped());
    // What is at its end from the start, and what a unikernel could not read, are none.
    run(&[], Stdio::null());
    run(&["--hypervisor", "nanovms"], Stdio::piped());
    run(&["--hypervisor", "nanovms", "-i"], Stdio::piped());
    let seen = scene.fake.seen.lock().unwrap();
    let stdin: Vec<bool> = seen.runs.values().map(|request| request.stdin).collect();
    assert_eq!(stdin, [false, true, false, false, true]);
    assert!(seen.runs.values().all(|request| request.attach));
}

#[test]
fn a_program_that_cannot_start_gives_dockers_exit_code() {
    let scene = Scene::new();
    for words in [
        &["run", "debian", "start-fails"][..],
        &["run", "-d", "debian", "start-fails"][..],
        &["exec", "m", "start-fails"][..],
    ] {
        let output = scene.run(words);
        assert_eq!(code(&output), 127, "{words:?}");
        assert_eq!(err(&output), "vistara: no such program in the image\n");
    }
}

#[test]
fn our_own_faults_are_125_in_run_and_1_or_2_elsewhere() {
    let scene = Scene::new();
    for (words, want) in [
        (&["run", "--no-such-option", "debian"][..], 125),
        (&["run"][..], 125),
        (&["run", "-v", "x", "debian"][..], 125),
        (&["run", "--pull", "never", "missing"][..], 125),
        (&["run", "debian", "lost"][..], 125),
        (&["exec", "m"][..], 125),
        (&["ps", "--no-such-option"][..], 2),
        (&["inspect", "--type", "machine", "nobody"][..], 1),
        (&["no-such-command"][..], 2),
    ] {
        let output = scene.run(words);
        assert_eq!(code(&output), want, "{words:?}: {}", err(&output));
        assert!(!output.stderr.is_empty(), "{words:?}");
    }
}

#[test]
fn an_image_that_is_not_here_is_pulled_first() {
    let scene = Scene::new();
    let output = scene.run(&["run", "missing", "exit", "3"]);
    assert_eq!(code(&output), 3);
    assert_eq!(
        err(&output),
        "image missing is not here yet: pulling it\nresolving\nlayer cc: 2.00 KiB\n"
    );
    let quiet = Scene::new();
    let output = quiet.run(&["run", "-q", "missing", "exit", "3"]);
    assert_eq!((code(&output), err(&output).as_str()), (3, ""));
}

#[test]
fn a_pull_that_fails_says_what_and_why_and_what_to_do() {
    let scene = Scene::new();
    let output = scene.run(&["images", "pull", "broken"]);
    assert_eq!(code(&output), 1);
    let text = err(&output);
    assert!(
        text.starts_with("vistara: cannot pull broken: the registry said 500\nhint: "),
        "{text}"
    );
}

#[test]
fn detached_prints_the_id_and_nothing_else() {
    let scene = Scene::new();
    let output = scene.run(&["run", "-d", "--rm", "debian", "until-signal", "INT"]);
    assert_eq!(code(&output), 0);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("{:032x}\n", 1)
    );
    let output = scene.run(&["run", "-d", "--json", "debian", "exit", "0"]);
    let machine: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(machine["id"], format!("{:032x}", 2));
}

/// Starts a program that prints `ready`, and waits until it has.
fn ready(scene: &Scene, words: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = scene.command(words).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, out)
}

#[test]
fn the_first_signal_goes_to_the_program_whose_exit_code_counts() {
    for name in ["INT", "TERM", "HUP", "USR1"] {
        let scene = Scene::new();
        let (mut child, _out) = ready(&scene, &["run", "debian", "until-signal", name]);
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(42), "{name}");
        assert_eq!(
            scene.fake.seen.lock().unwrap().signals,
            [format!("kill {name}")]
        );
    }
}

#[test]
fn the_second_signal_stops_the_machine_the_third_kills_it_the_fourth_leaves() {
    let scene = Scene::new();
    let (mut child, _out) = ready(&scene, &["run", "debian", "until-signal", "never"]);
    for count in 1..=4 {
        signal(&child, "INT");
        if count < 4 {
            while scene.fake.seen.lock().unwrap().signals.len() < count {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(
        scene.fake.seen.lock().unwrap().signals,
        ["kill INT", "stop TERM", "kill KILL"]
    );
}

#[test]
fn a_reader_that_goes_away_ends_the_machine_quietly() {
    let scene = Scene::new();
    let mut child = scene
        .command(&["run", "debian", "endless"])
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 10]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), err(&output).as_str()), (141, ""));
    assert_eq!(scene.fake.seen.lock().unwrap().signals, ["stop PIPE"]);
}

#[test]
fn a_listing_whose_reader_is_gone_ends_quietly() {
    let scene = Scene::new();
    let mut child = scene.command(&["ps"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(err(&output), "");
}

#[test]
fn the_json_summary_is_the_last_line_of_standard_error() {
    let scene = Scene::new();
    let output = scene.run(&["run", "--json", "--timings", "debian", "both"]);
    assert_eq!(output.stdout.len(), 256);
    let text = err(&output);
    let summary: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(summary["exit_code"], 0);
    let steps: Vec<&str> = summary["timings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    for step in ["connect", "accepted", "boot", "first output", "over"] {
        assert!(steps.contains(&step), "{steps:?}");
    }
    assert!(text.contains("STEP"), "{text}");
}

#[test]
fn logs_keep_the_streams_apart_and_may_carry_times() {
    let scene = Scene::new();
    let output = scene.run(&["logs", "m"]);
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    let output = scene.run(&["logs", "-t", "m"]);
    assert_eq!(output.stdout, b"2026-01-01T00:00:00Z out\n");
}

#[test]
fn listings_are_tables_ids_or_json() {
    let scene = Scene::new();
    let output = scene.run(&["ps", "-q"]);
    assert_eq!(output.stdout, b"001122334455\n");
    let output = scene.run(&["ps", "--json"]);
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows[0]["name"], "swift-otter");
    let output = scene.run(&["ps"]);
    assert!(output.stdout.starts_with(b"ID            NAME"));
    let output = scene.run(&["wait", "a", "b"]);
    assert_eq!(output.stdout, b"7\n7\n");
    let output = scene.run(&["images", "--json"]);
    assert_eq!(output.stdout, b"[]\n");
}

#[test]
fn an_unknown_name_is_explained() {
    let scene = Scene::new();
    let output = scene.run(&["inspect", "--type", "machine", "nobody"]);
    assert_eq!(
        err(&output),
        "vistara: nobody: no machine is called nobody\nhint: `vistara ps -a` lists machines, `vistara images` lists images\n"
    );
    assert_eq!(output.stdout, b"[]\n");
}

#[test]
fn files_come_out_and_hostile_ones_do_not() {
    let scene = Scene::new();
    let output = scene.run(&["cp", "m:/etc/file", "copy"]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    let path = scene.dir.path().join("copy");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "hello");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o7777, 0o640);
    std::fs::create_dir(scene.dir.path().join("in")).unwrap();
    let output = scene.run(&["cp", "m:/etc/evil", "in"]);
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("refused what the machine sent"));
    assert!(!scene.dir.path().join("escapee!").exists());
    let output = scene.run(&["cp", "m:/etc/nothing", "x"]);
    assert!(err(&output).contains("m has no /etc/nothing"));
    let output = scene.run(&["cp", "m:/etc/file", "-"]);
    assert!(output.stdout.starts_with(b"file\0"));
}

#[test]
fn trees_go_in_as_roots_under_their_new_name() {
    let scene = Scene::new();
    let tree = scene.dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("a"), "123").unwrap();
    let output = scene.run(&["cp", "tree", "m:/new"]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    let output = scene.run(&["cp", "tree/.", "m:/some/dir"]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    let output = scene.run(&["cp", "tree/a", "m:/some/dir/"]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    assert_eq!(
        scene.fake.seen.lock().unwrap().said,
        [
            "into /",
            "new 0 0",
            "new/a 3 0",
            "into /some/dir",
            "a 3 0",
            "into /some/dir",
            "a 3 0"
        ]
    );
    let output = scene.run(&["cp", "gone", "m:/new"]);
    assert!(err(&output).starts_with("vistara: cp: gone: No such file"));
}

#[test]
fn a_node_that_has_no_place_for_its_state_is_told_to_take_another() {
    let dir = tempfile::tempdir().unwrap();
    // A state directory that is no directory.
    std::fs::write(dir.path().join("state"), "").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vistara"))
        .arg("--state-dir")
        .arg(dir.path().join("state"))
        .args(["run", "debian"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 125);
    assert!(err(&output).contains("--state-dir DIR"), "{}", err(&output));
}

#[test]
fn version_and_node_status_start_no_node() {
    let dir = tempfile::tempdir().unwrap();
    for (words, want) in [
        (&["version"][..], 0),
        (&["node", "status"][..], 1),
        (&["node", "stop"][..], 0),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vistara"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .args(words)
            .output()
            .unwrap();
        assert_eq!(code(&output), want, "{words:?}: {}", err(&output));
    }
    assert!(!dir.path().join("state").exists());
}
