//! A machine's user-mode network: `slirp4netns` beside Firecracker, with the addresses that QEMU's user networking has.
//!
//! ```text
//! Firecracker's network namespace:   guest ── vistara0 (tap) ── bridge ── vistara1 (tap) ── slirp4netns ── sockets of the host
//! ```
//! The host's own network is never changed: the devices are in the machine's namespace, and what the guest sends leaves the
//! host from ordinary sockets of `slirp4netns`, which is in the host's network. Why it is done so: `docs/decisions/0011`.
//!
//! `slirp4netns` runs in the machine's process namespace, as Firecracker's child. So the kernel ends it together with
//! Firecracker, whether a node runs or not, and a killed machine is gone only when its helper is.
//!
//! It begins as root, which opening the tap takes, and then fences itself: no capability but the one for low ports, a file
//! system with nothing in it but `etc` and `run`, a seccomp filter. Both directories are shown from the machine's own
//! (`network/`), so that it sees of the host's files only the resolver's addresses.
//!
//! Invariant: a guest does not reach the host's loopback by it. `--disable-host-loopback` closes 10.0.2.2 only: it connects
//! to 127.0.0.1 or 0.0.0.0 where a frame names that, and root in a guest can send any frame. So its tap has a filter that
//! lets it see none of those, and where none can be had there is no network. (The one way that stays: port 53 of 10.0.2.3 is
//! the host's name server, also where that listens on loopback. IPv6, and so `::1`, is off.)

use super::io_error;
use crate::{LaunchPlan, VmmError, resolver};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_host::cgroup::Cgroup;
use vistara_host::files::OutputBox;
use vistara_host::frames::FrameFilter;
use vistara_host::launch::Launch;
use vistara_host::mounts::Bind;
use vistara_host::netns::{NetworkNamespace, Tap};
use vistara_host::process::{ProcessHandle, ProcessIdentity};
use vistara_host::{facts, sockets};
use vistara_model::{PortMapping, Protocol};

/// The tap that Firecracker opens. A fork looks for the one of its template, so it has this name in every machine.
pub(super) const TAP: &str = "vistara0";
/// The tap that `slirp4netns` opens, and what joins the two.
const HELPERS_TAP: &str = "vistara1";
const BRIDGE: &str = "vistara-bridge";

/// The guest's address: QEMU's user networking leads published ports there, too.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// The helper's part of the machine's directory, and its socket there.
const DIR: &str = "network";
const SOCKET: &str = "api.sock";
/// Where, in its directory, programs find the name servers' addresses.
const RESOLVER_DIR: &str = "etc";

/// Bytes of the helper's complaints that are kept, and characters of them that are told.
const COMPLAINTS: u64 = 16 << 10;
const TOLD: usize = 500;
/// How long the helper may take to be ready, and to answer. On a busy host it takes some 20 ms.
const READY_LIMIT: Duration = Duration::from_secs(20);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked for: nothing tells of it.
const LOOK: Duration = Duration::from_millis(1);
/// Bytes of the longest answer.
const ANSWER_MAX: u64 = 4 << 10;
/// What holds for the helper, in words.
pub(super) const FENCES: &str = "its network, slirp4netns: user 0 without capabilities but that for low ports, in the host's network and the machine's process namespace, a file system with nothing in it but name servers, a seccomp filter; no frame to 127.0.0.0/8 or 0.0.0.0/8 comes to it";
/// Step of a launch in which it is made.
const STEP: &str = "making its network";

/// `slirp4netns`, where it can be used.
#[derive(Debug, Clone)]
pub(super) struct UserNetwork {
    program: PathBuf,
    /// For each machine's tap. Loaded once: it is checked and compiled then, and some kernels count it against a limit.
    filter: Arc<FrameFilter>,
}

/// The helper of a running machine, in its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HelperRecord {
    pid: u32,
    start_ticks: u64,
}

/// A helper that has just been started.
pub(super) struct Helper {
    pub(super) process: ProcessHandle,
    complaints: OutputBox,
}

impl UserNetwork {
    /// Finds the program and tries what it takes, or says why machines have no network here.
    pub(super) async fn find(configured: Option<PathBuf>) -> Result<UserNetwork, String> {
        if !facts::is_root() {
            return Err(
                "a network of Firecracker's machines takes a node that runs as root, to give each a network namespace of its own"
                    .to_owned(),
            );
        }
        let program = configured
            .or_else(|| super::find_program("slirp4netns", None))
            .ok_or("slirp4netns is not installed (apt-get install slirp4netns)")?;
        let answer = super::ask_version(&program)
            .await
            .map_err(|error| error.to_string())?;
        let answer = answer.ok_or_else(|| format!("{} is not there", program.display()))?;
        if !answer.starts_with("slirp4netns version 1.") {
            return Err(format!(
                "{} is not slirp4netns 1: it says {answer:?}",
                program.display()
            ));
        }
        let tried = tokio::task::spawn_blocking(|| {
            let filter = FrameFilter::no_loopback().map_err(|error| {
                format!(
                    "guests could not be kept from the host's loopback: loading a filter for taps (the kernel needs CONFIG_BPF_SYSCALL, the node CAP_BPF): {error}"
                )
            })?;
            NetworkNamespace::new()
                .and_then(|namespace| namespace.make_joined_taps(BRIDGE, &taps(0, &filter)))
                .map_err(|error| format!("no network can be made for a machine: {error}"))?;
            Ok::<_, String>(Arc::new(filter))
        });
        let filter = tried.await.map_err(|error| error.to_string())??;
        Ok(UserNetwork { program, filter })
    }

    /// Makes the taps of the machine whose Firecracker is `process`, and starts the helper, where anybody is to be reached by
    /// it: a machine that is to be captured only has the device. Blocking.
    pub(super) fn start(
        &self,
        plan: &LaunchPlan,
        uid: u32,
        process: &ProcessHandle,
        cgroup: Option<&Cgroup>,
        oom_score_adj: i16,
    ) -> Result<Option<Helper>, VmmError> {
        let failed = |message: String| VmmError::Launch {
            step: STEP,
            message,
        };
        let namespace = NetworkNamespace::of(process).map_err(|error| failed(error.to_string()))?;
        namespace
            .make_joined_taps(BRIDGE, &taps(uid, &self.filter))
            .map_err(|error| failed(error.to_string()))?;
        if plan.capturable {
            return Ok(None);
        }
        let dir = make_dir(&plan.dir)?;
        let said = |error: io::Error| failed(error.to_string());
        let complaints = OutputBox::new(COMPLAINTS).map_err(said)?;
        let mut launch = Launch::new(&self.program);
        let namespace: OwnedFd = namespace.into_file().into();
        launch.args = [
            "--netns-type=path",
            &format!("/proc/self/fd/{}", namespace.as_raw_fd()),
            HELPERS_TAP,
            // In its working directory, since a socket's path must be short.
            "--api-socket",
            SOCKET,
            "--disable-host-loopback",
            "--enable-sandbox",
            "--enable-seccomp",
        ]
        .map(Into::into)
        .into();
        launch.inherit = vec![namespace];
        launch.working_dir = dir.clone();
        launch.output = Some(complaints.writer().map_err(said)?);
        launch.keep_capabilities = true;
        launch.cgroup = cgroup.cloned();
        launch.oom_score_adj = oom_score_adj;
        for name in ["etc", "run"] {
            let shown = File::open(dir.join(name))
                .and_then(|file| Bind::new(&file, &Path::new("/").join(name), true));
            launch.binds.push(shown.map_err(said)?);
        }
        launch.processes_of = Some(process.process_namespace().map_err(said)?);
        let launched = launch
            .start()
            .map_err(|error| failed(format!("{error}: {}", error.source)))?;
        Ok(Some(Helper {
            process: launched.process,
            complaints,
        }))
    }
}

fn taps(uid: u32, filter: &FrameFilter) -> [Tap<'_>; 2] {
    [
        Tap {
            name: TAP,
            owner: uid,
            filter: None,
        },
        Tap {
            name: HELPERS_TAP,
            // The kernel lets everybody open one that is nobody's.
            owner: 0,
            filter: Some(filter),
        },
    ]
}

/// Makes the helper's directory.
fn make_dir(machine: &Path) -> Result<PathBuf, VmmError> {
    let dir = machine.join(DIR);
    let below = dir.join("run");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&below)
        .map_err(io_error("making the directory", &below))?;
    let path = dir.join(RESOLVER_DIR);
    resolver::make(&path).map_err(io_error("writing the name servers in", &path))?;
    Ok(dir)
}

/// Tells a running machine's helper of changes of the host's name servers. Blocks on files.
pub(super) fn keep_resolver(machine: &Path) {
    resolver::keep(&machine.join(DIR).join(RESOLVER_DIR));
}

/// Removes what the helper had.
pub(super) fn remove(machine: &Path) {
    let dir = machine.join(DIR);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, dir = %dir.display(), "a machine's network directory stays");
        }
        _ => {}
    }
}

/// Why a helper does not do its work.
#[derive(Debug)]
pub(super) enum NetworkFailure {
    /// It could not publish this port.
    Port(PortMapping),
    /// Anything else.
    Other(String),
}

impl Helper {
    /// For the machine's record.
    pub(super) fn record(&self) -> HelperRecord {
        let identity = self.process.identity();
        HelperRecord {
            pid: identity.pid,
            start_ticks: identity.start_ticks,
        }
    }

    /// Waits until it works, and publishes the machine's ports.
    pub(super) async fn publish(
        &self,
        machine: &Path,
        ports: &[PortMapping],
    ) -> Result<(), NetworkFailure> {
        let dir = machine.join(DIR);
        let ready = async {
            let mut ready = Some(connect(&dir).await);
            for port in ports {
                let stream = match ready.take() {
                    Some(stream) => stream,
                    None => connect(&dir).await,
                };
                let request = add(port);
                let answer = tokio::time::timeout(ANSWER_LIMIT, ask(stream, &request)).await;
                let answer = answer
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                    .map_err(|error| {
                        NetworkFailure::Other(format!("slirp4netns does not answer: {error}"))
                    })?;
                if !added(&answer) {
                    return Err(NetworkFailure::Port(port.clone()));
                }
            }
            Ok(())
        };
        tokio::select! {
            biased;
            ready = tokio::time::timeout(READY_LIMIT, ready) => ready.unwrap_or_else(|_| {
                Err(NetworkFailure::Other(format!("slirp4netns is not ready after {READY_LIMIT:?}")))
            }),
            _ = self.process.wait() => {
                let words = self.complaints.tail(TOLD);
                Err(NetworkFailure::Other(format!("slirp4netns ended at once: {}", words.trim())))
            }
        }
    }
}

impl HelperRecord {
    /// Takes hold of the helper of a machine that an earlier process started; nothing where it is gone.
    pub(super) fn adopt(&self, boot_id: &str) -> io::Result<Option<ProcessHandle>> {
        ProcessHandle::adopt(&ProcessIdentity {
            pid: self.pid,
            start_ticks: self.start_ticks,
            boot_id: boot_id.to_owned(),
        })
    }
}

fn add(port: &PortMapping) -> serde_json::Value {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    serde_json::json!({
        "execute": "add_hostfwd",
        "arguments": {
            "proto": protocol,
            "host_addr": port.host_address.to_string(),
            "host_port": port.host_port,
            "guest_addr": GUEST.to_string(),
            "guest_port": port.guest_port,
        },
    })
}

/// Whether an answer says that a port is published. A refusal gives no reason; in practice the port is taken, or may not be
/// bound.
fn added(answer: &[u8]) -> bool {
    let answer: serde_json::Value = serde_json::from_slice(answer).unwrap_or_default();
    answer.get("return").is_some() && answer.get("error").is_none()
}

/// Connects to the helper as soon as it listens. It has no room for many who wait, so that a connection is made only to be
/// used, and made again where there is none.
async fn connect(dir: &Path) -> std::os::unix::net::UnixStream {
    loop {
        match sockets::connect_in(dir, SOCKET) {
            Ok(stream) => return stream,
            Err(error) => tracing::trace!(%error, "a machine's network is not ready yet"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// One request and its answer: each has a connection of its own, which the helper closes.
async fn ask(
    stream: std::os::unix::net::UnixStream,
    request: &serde_json::Value,
) -> io::Result<Vec<u8>> {
    let mut stream = tokio::net::UnixStream::from_std(stream)?;
    stream.write_all(request.to_string().as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
