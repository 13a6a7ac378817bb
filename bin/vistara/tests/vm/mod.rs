//! A built `vistara` with a node, a kernel and an image, for tests with real machines.

// Helpers outside a test function: a failure is the test's. Each file of tests uses a part of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

pub(crate) mod three;
pub(crate) mod two;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) const IMAGE: &str = "vistara-demo/python3";
/// Longest that anything here may take on a busy machine without KVM.
pub(crate) const BOUND: Duration = Duration::from_secs(150);

pub(crate) struct System {
    pub(crate) state: PathBuf,
}

pub(crate) fn target() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vistara"))
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned()
}

fn hash(value: impl std::hash::Hash) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    value.hash(&mut hasher);
    std::hash::Hasher::finish(&hasher)
}

/// Names of nodes that one test alone has: it finds nothing of what it left when it last ran.
const OF_ONE_TEST: [&str; 5] = ["mesh-", "net-", "receipts-", "services-", "tasks-"];

/// Ends a node with all that it has, and clears it away.
fn clear(state: PathBuf) {
    let old = System { state };
    let machines = text(&old.vistara(&["ps", "-q"]).stdout);
    for machine in machines.split_whitespace() {
        old.vistara(&["rm", "-f", machine]);
    }
    old.vistara(&["node", "stop"]);
    // Another test may be clearing the same away.
    let _ = std::fs::remove_dir_all(&old.state);
}

/// A state directory for this build of the program, outside the target directory since paths of sockets are short. What
/// earlier builds of the same checkout left is cleared away, machines and all.
pub(crate) fn state_dir(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_vistara"));
    let prefix = format!("vistara-system-{:08x}-{name}-", hash(program) as u32);
    let built = std::fs::metadata(program).unwrap().modified().unwrap();
    let own = format!("{prefix}{:08x}", hash(built) as u32);
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        // Another test's name may begin with this one's: what follows must be the build alone.
        let build = other.strip_prefix(&prefix);
        if build.is_some_and(|build| build.len() == 8 && !build.contains('-')) && other != own {
            clear(entry.path());
        }
    }
    let state = std::env::temp_dir().join(own);
    if OF_ONE_TEST.iter().any(|begin| name.starts_with(begin))
        && let Ok(attempt) = std::env::var("NEXTEST_ATTEMPT_ID")
    {
        let stamp = state.join("test.attempt");
        if state.exists() && std::fs::read_to_string(&stamp).ok().as_ref() != Some(&attempt) {
            clear(state.clone());
        }
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(stamp, attempt).unwrap();
    }
    state
}

impl System {
    /// The shared node with a kernel and the image in it, or nothing and the reason.
    pub(crate) fn ready() -> Option<System> {
        System::ready_as("shared")
    }

    /// A node of this name, for tests that others must not suffer from.
    pub(crate) fn ready_as(name: &str) -> Option<System> {
        let archive = target().join("demo/python3.oci.tar");
        if !archive.exists() {
            return skip("no demonstration image (cargo xtask demo-image)");
        }
        let system = System::without_image(name)?;
        let _lock = system.lock();
        if !system
            .vistara(&["images", "inspect", IMAGE])
            .status
            .success()
        {
            let done = system.vistara(&[
                "images",
                "import",
                archive.to_str().unwrap(),
                "--name",
                IMAGE,
            ]);
            assert!(done.status.success(), "{}", text(&done.stderr));
        }
        Some(system)
    }

    /// Keeps other tests of the same node out of what is made once, until it is dropped.
    fn lock(&self) -> File {
        let lock = File::create(self.state.join("test.lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        lock
    }

    /// A node of this name with a kernel and no image.
    pub(crate) fn without_image(name: &str) -> Option<System> {
        let Some(kernels) = std::env::var_os("VISTARA_TEST_KERNELS") else {
            return skip(
                "no guest kernel (VISTARA_TEST_KERNELS is not set; `cargo xtask test` sets it)",
            );
        };
        // Not below the target directory: paths of sockets are short.
        let state = state_dir(name);
        std::fs::create_dir_all(&state).unwrap();
        let system = System { state };
        let _lock = system.lock();
        let link = system.state.join("kernels");
        if !link.exists() {
            std::os::unix::fs::symlink(kernels, &link).unwrap();
        }
        let doctor: serde_json::Value =
            serde_json::from_slice(&system.vistara(&["doctor", "--json"]).stdout).unwrap();
        if doctor["ready"] != true {
            return skip(&format!("this host cannot run machines: {doctor}"));
        }
        Some(system)
    }

    /// Whether this is the node of the tests of the stock.
    fn has_stock(&self) -> bool {
        let name = self.state.file_name().unwrap_or_default();
        name.to_string_lossy().contains("-stock-")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vistara"));
        command
            .env("VISTARA_STATE_DIR", &self.state)
            // Who asks for no stock has none: what is measured and counted is then a test's own doing alone.
            .env(
                "VISTARA_WARM_MEMORY",
                if self.has_stock() { "1g" } else { "0" },
            )
            .env_remove("VISTARA_SOCKET")
            .args(arguments);
        command
    }

    pub(crate) fn vistara(&self, arguments: &[&str]) -> Output {
        finish(
            self.command(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )
    }

    pub(crate) fn feed(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = wait(child);
        writer.join().unwrap().unwrap();
        output
    }

    /// A machine in the background, removed when the test ends, however it does.
    pub(crate) fn machine(&self, options: &[&str], command: &[&str]) -> Machine<'_> {
        let arguments = [&["run", "-d"], options, &[IMAGE], command].concat();
        let output = self.vistara(&arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        Machine {
            system: self,
            id: text(&output.stdout).trim().to_owned(),
        }
    }

    /// A machine that was made otherwise, to be removed likewise.
    pub(crate) fn adopt(&self, id: &str) -> Machine<'_> {
        Machine {
            system: self,
            id: id.to_owned(),
        }
    }

    pub(crate) fn inspect(&self, machine: &str) -> serde_json::Value {
        let output = self.vistara(&["inspect", machine]);
        let list: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("inspect prints JSON");
        list[0].clone()
    }
}

/// Why a test cannot run here.
fn skip(reason: &str) -> Option<System> {
    println!("SKIP: {reason}");
    None
}

pub(crate) fn finish(command: &mut Command) -> Output {
    wait(command.spawn().unwrap())
}

/// Waits with a bound, so that a hang is a failure with a name.
pub(crate) fn wait(child: Child) -> Output {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if finished.recv_timeout(BOUND).is_err() {
            // It is our own child and has not been waited for: the number is still its own.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    // The guard may have given up already.
    let _ = done.send(());
    guard.join().unwrap();
    output
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) struct Machine<'a> {
    system: &'a System,
    pub(crate) id: String,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.system.vistara(&["rm", "-f", &self.id]);
    }
}

impl System {
    /// Ends the node at once, as `kill -9` does, and waits until it is gone: until then its socket still takes connections.
    pub(crate) fn kill_node(&self) {
        let status: serde_json::Value =
            serde_json::from_slice(&self.vistara(&["node", "status", "--json"]).stdout).unwrap();
        let node = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(node).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        until("the node's death", || {
            let stat = std::fs::read_to_string(format!("/proc/{node}/stat")).unwrap_or_default();
            let state = stat
                .rsplit(')')
                .next()
                .and_then(|rest| rest.trim().chars().next());
            matches!(state, None | Some('Z' | 'X'))
        });
        // Its other threads may hold the socket for a moment longer than the first one lives.
        let socket = self.state.join("run/node.sock");
        until("the end of its socket", || {
            std::os::unix::net::UnixStream::connect(&socket).is_err()
        });
    }
}
