//! The program on a terminal: raw only while the guest's program runs, and as before on every way out.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)]

mod fake;

use fake::Fake;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

struct Scene {
    dir: tempfile::TempDir,
    fake: Fake,
    /// The terminal's other side: what a person sees and types.
    person: File,
    child: Child,
    seen: String,
}

fn cooked(terminal: &File) -> bool {
    let modes = tcgetattr(terminal).unwrap().local_modes;
    modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

impl Scene {
    fn new(words: &[&str]) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::serve(dir.path());
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap().into_string().unwrap();
        let person = File::from(person);
        let size = Winsize {
            ws_row: 30,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&person, size).unwrap();
        let terminal = || {
            let mut options = File::options();
            std::os::unix::fs::OpenOptionsExt::custom_flags(
                options.read(true).write(true),
                rustix::fs::OFlags::NOCTTY.bits() as i32,
            );
            options.open(&name).unwrap()
        };
        let child = Command::new(env!("CARGO_BIN_EXE_vistara"))
            .arg("--socket")
            .arg(dir.path().join("s"))
            .args(words)
            .env("TERM", "test-term")
            .stdin(terminal())
            .stdout(terminal())
            .stderr(terminal())
            .spawn()
            .unwrap();
        Scene {
            dir,
            fake,
            person,
            child,
            seen: String::new(),
        }
    }

    /// Reads the screen until it has the text.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.seen.contains(text) {
            let count = self.person.read(&mut buffer).unwrap();
            assert!(count > 0, "{}", self.seen);
            self.seen
                .push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    fn until(&self, what: impl Fn(&Scene) -> bool) {
        let begin = Instant::now();
        while !what(self) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn raw(self) -> Scene {
        self.until(|scene| !cooked(&scene.person));
        self
    }

    fn send(&self, signal: &str) {
        let id = self.child.id().to_string();
        let done = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(done.unwrap().success());
    }

    fn ends_with(&mut self, code: i32) {
        assert_eq!(self.child.wait().unwrap().code(), Some(code));
        assert!(cooked(&self.person), "the terminal is still raw");
    }
}

#[test]
fn keys_go_to_the_program_one_by_one_and_ctrl_p_ctrl_q_detaches() {
    let mut scene = Scene::new(&["run", "-it", "debian", "cat"]).raw();
    // A ctrl-c is a byte like another while the terminal is raw.
    scene.person.write_all(b"a\x03b").unwrap();
    scene.expect("a\x03b");
    scene.person.write_all(b"\x10\x11").unwrap();
    scene.expect("vistara attach swift-otter");
    scene.ends_with(0);
    let seen = scene.fake.seen.lock().unwrap();
    let request = seen.runs.values().next().unwrap();
    let size = request.tty.unwrap();
    assert_eq!((size.rows, size.columns), (30, 100));
    assert!(request.stdin);
    assert_eq!(request.env, ["TERM=test-term"]);
    assert_eq!(seen.signals, Vec::<String>::new());
}

#[test]
fn a_new_size_reaches_the_program() {
    let mut scene = Scene::new(&["run", "-it", "debian", "cat"]).raw();
    let size = Winsize {
        ws_row: 11,
        ws_col: 22,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&scene.person, size).unwrap();
    scene.send("WINCH");
    scene.until(|scene| {
        let seen = scene.fake.seen.lock().unwrap();
        seen.said
            .iter()
            .any(|text| text.contains(r#""rows":11,"columns":22"#))
    });
    scene.person.write_all(b"\x10\x11").unwrap();
    scene.ends_with(0);
}

#[test]
fn the_terminal_is_as_before_after_every_end() {
    let mut scene = Scene::new(&["exec", "-it", "m", "until-signal", "never"]).raw();
    scene.expect("ready");
    for signal in ["TERM", "KILL", ""] {
        scene.send("TERM");
        // The third is not for the program any more.
        scene.until(|scene| {
            let seen = scene.fake.seen.lock().unwrap();
            seen.said.iter().any(|text| text.contains(signal))
        });
    }
    scene.ends_with(143);

    let mut scene = Scene::new(&["run", "-it", "debian", "until-signal", "HUP"]).raw();
    scene.expect("ready");
    scene.send("HUP");
    scene.ends_with(42);

    for words in [
        &["run", "-it", "debian", "exit", "5"][..],
        &["run", "-it", "debian", "start-fails"],
        &["run", "-it", "debian", "lost"],
    ] {
        let mut scene = Scene::new(words);
        let code = scene.child.wait().unwrap().code().unwrap();
        assert!([5, 127, 125].contains(&code), "{words:?}: {code}");
        assert!(cooked(&scene.person), "{words:?}");
    }
}

#[test]
fn without_i_a_terminal_keeps_its_input() {
    let mut scene = Scene::new(&["run", "debian", "until-signal", "INT"]);
    scene.expect("ready");
    assert!(cooked(&scene.person));
    scene.send("INT");
    scene.ends_with(42);
    let seen = scene.fake.seen.lock().unwrap();
    assert!(!seen.runs.values().next().unwrap().stdin);
}
