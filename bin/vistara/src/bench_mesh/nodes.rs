//! The two nodes of the benchmark, and what lies between them.

use crate::environment;
use crate::failure::Failure;
use crate::places::Places;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vistara_api::{Client, GrantRequest, JoinRequest, ListenRequest, StopRequest};

/// How long a node may take until it answers, and until it has left.
const START_LIMIT: Duration = Duration::from_secs(20);
const LEAVE_LIMIT: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(20);
/// How long the grant counts.
const GRANTED: Duration = Duration::from_secs(24 * 3600);
/// Addresses of a cable's ends. They exist in the benchmark's own namespaces alone.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);

fn failed_to(what: impl std::fmt::Display) -> impl Fn(std::io::Error) -> Failure {
    move |error| Failure::because(format!("cannot {what}"), error)
}

/// Runs a program of the host, which must go well.
fn host(words: &[&str]) -> Result<(), Failure> {
    let what = words.join(" ");
    let output = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output()
        .map_err(failed_to(format!("run `{what}`")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::because(format!("`{what}` failed"), said)
        .hint("--link namespace takes root, and `ip` and `tc` (iproute2)"))
}

/// A cable between two namespaces, gone with them when dropped.
#[derive(Debug)]
struct Cable {
    spaces: [String; 2],
}

impl Cable {
    /// Of this rate each way.
    fn lay(mbit: u32) -> Result<Cable, Failure> {
        let name = |end: &str| format!("vistara-bench-{}-{end}", std::process::id());
        let cable = Cable {
            spaces: [name("near"), name("far")],
        };
        let [near, far] = &cable.spaces;
        for space in [near, far] {
            host(&["ip", "netns", "add", space])?;
            host(&["ip", "-n", space, "link", "set", "lo", "up"])?;
        }
        let link = ["ip", "link", "add", "v", "netns", near, "type", "veth"];
        host(&[&link[..], &["peer", "name", "v", "netns", far]].concat())?;
        // As much as the largest burst of a device that splits no segments, and half a queue of a millisecond beside it.
        let (rate, burst) = (format!("{mbit}mbit"), format!("{}", 128_000 + mbit * 60));
        for (space, address) in [(near, NEAR), (far, FAR)] {
            let address = format!("{address}/24");
            host(&["ip", "-n", space, "address", "add", &address, "dev", "v"])?;
            host(&["ip", "-n", space, "link", "set", "v", "up"])?;
            let shape = ["tc", "-n", space, "qdisc", "add", "dev", "v", "root", "tbf"];
            let shape = [&shape[..], &["rate", &rate, "burst", &burst]].concat();
            host(&[&shape[..], &["latency", "20ms"]].concat())?;
        }
        Ok(cable)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for space in &self.spaces {
            // One that was never made cannot be removed.
            let _ = host(&["ip", "netns", "delete", space]);
        }
    }
}

/// A node's daemon.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    pub(super) client: Client,
    dir: PathBuf,
}

impl Daemon {
    fn start(dir: PathBuf, space: Option<&str>) -> Result<Daemon, Failure> {
        // By its path: `/proc/self` would be that of `ip`.
        let program = std::env::current_exe().map_err(failed_to("find this program"))?;
        let log = File::create(dir.join("bench.log")).map_err(failed_to("make a log"))?;
        let errors = log.try_clone().map_err(failed_to("make a log"))?;
        let mut command = in_space(space, program.as_os_str());
        command
            .args(["node", "--warm-memory", "0", "--state-dir"])
            .arg(&dir)
            .env_remove(environment::SOCKET)
            .env_remove(environment::STATE_DIR)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let child = command.spawn().map_err(failed_to("start a node"))?;
        let client = Client::new(dir.join("run/node.sock"));
        Ok(Daemon { child, client, dir })
    }

    async fn answers(&mut self) -> Result<(), Failure> {
        let begin = Instant::now();
        while self.client.version().await.is_err() {
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || begin.elapsed() > START_LIMIT {
                let log = std::fs::read_to_string(self.dir.join("bench.log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing").to_owned();
                return Err(Failure::because(
                    "a node of the benchmark does not answer",
                    last,
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    async fn end(&mut self) {
        // What fails here is a failure of the measurement already, or ends with the process below.
        for machine in self.client.machines(true).await.unwrap_or_default() {
            let now = StopRequest {
                grace_ms: Some(0),
                signal: None,
            };
            let _ = self.client.stop(&machine.id, &now).await;
            let _ = self.client.remove_machine(&machine.id, true).await;
        }
        let _ = self.client.shutdown().await;
        let begin = Instant::now();
        while begin.elapsed() < LEAVE_LIMIT {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has left is not there to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program in a namespace, or here.
fn in_space(space: Option<&str>, program: &OsStr) -> Command {
    match space {
        None => Command::new(program),
        Some(space) => {
            let mut command = Command::new("ip");
            let words: [OsString; 4] =
                ["netns".into(), "exec".into(), space.into(), program.into()];
            command.args(words);
            command
        }
    }
}

/// Two nodes, of which the near one has joined the far one as `far` and may do everything there.
#[derive(Debug)]
pub(super) struct Two {
    pub(super) near: Daemon,
    pub(super) far: Daemon,
    /// Last: it goes when the nodes are gone.
    cable: Option<Cable>,
}

impl Two {
    /// Starts them with the user's kernels, and joins them.
    pub(super) async fn start(
        scratch: &Path,
        places: &Places,
        mbit: Option<u32>,
    ) -> Result<Two, Failure> {
        let cable = mbit.map(Cable::lay).transpose()?;
        let start = |name: &str, end: usize| {
            let dir = scratch.join(name);
            std::fs::create_dir(&dir).map_err(failed_to("make a state directory"))?;
            let kernels = places.state_dir.join("kernels");
            if kernels.exists() {
                std::os::unix::fs::symlink(kernels, dir.join("kernels"))
                    .map_err(failed_to("show a node the kernels"))?;
            }
            Daemon::start(dir, cable.as_ref().map(|cable| cable.spaces[end].as_str()))
        };
        let (near, far) = (start("near", 0)?, start("far", 1)?);
        let mut two = Two { near, far, cable };
        two.near.answers().await?;
        two.far.answers().await?;
        two.join().await?;
        Ok(two)
    }

    /// Where a node of these listens.
    pub(super) fn address(&self, near: bool) -> Ipv4Addr {
        match (&self.cable, near) {
            (None, _) => Ipv4Addr::LOCALHOST,
            (Some(_), true) => NEAR,
            (Some(_), false) => FAR,
        }
    }

    async fn join(&self) -> Result<(), Failure> {
        self.ticket(true).await?;
        let ticket = self.ticket(false).await?;
        let until = jiff::Timestamp::now() + GRANTED;
        let grant = GrantRequest {
            to: self.near.client.mesh().await?.id,
            rights: ["run", "images", "admin"].map(str::to_owned).to_vec(),
            until: until.to_string(),
            ..GrantRequest::default()
        };
        let token = self.far.client.grant(&grant).await?.token;
        let join = JoinRequest {
            ticket,
            name: Some("far".to_owned()),
            grant: Some(token),
        };
        self.near.client.join(&join).await?;
        Ok(())
    }

    /// The ticket of one of them, which listens from then on.
    pub(super) async fn ticket(&self, near: bool) -> Result<String, Failure> {
        let (node, address) = (
            if near { &self.near } else { &self.far },
            self.address(near),
        );
        let known = node.client.mesh().await?.ticket;
        if let Some(ticket) = known {
            return Ok(ticket);
        }
        let listen = ListenRequest {
            listen: Some(format!("{address}:0")),
        };
        let status = node.client.mesh_listen(&listen).await?;
        (status.ticket).ok_or_else(|| Failure::new("a node of the benchmark gives no ticket"))
    }

    /// The far node, asked through the near one.
    pub(super) fn across(&self) -> Client {
        self.near.client.on("far")
    }

    /// A program at one end of the link.
    pub(super) fn command(&self, near: bool, program: &str) -> Command {
        let end = usize::from(!near);
        let space = self.cable.as_ref().map(|cable| cable.spaces[end].as_str());
        in_space(space, OsStr::new(program))
    }

    /// Has both leave, with what they made.
    pub(super) async fn end(mut self) {
        self.near.end().await;
        self.far.end().await;
    }
}
