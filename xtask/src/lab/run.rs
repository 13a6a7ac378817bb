//! One run: the servers of files, QEMU, and between them the way to the command's status.
//!
//! The children are told by the kernel to die with this process; their sockets are pairs, or have lost their name before
//! anybody else could know it. So nothing is left whatever ends the run, `kill -9` included.

use super::command::{Descriptors, Plan, server};
use super::host::Programs;
use anyhow::{Context as _, Result, bail};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net as blocking;
use std::pin::pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

const STATUS_TIMEOUT: u8 = 124;
/// What is kept of the console and of the children's complaints, for when the run fails.
const KEPT_BYTES: usize = 16 << 10;
/// How long whoever reads our output may take for what is left of it once the command has ended, at least.
const DRAIN_MIN: Duration = Duration::from_secs(10);

/// Runs the plan's script; its status, or that of the time limit or of a signal that ended the run.
pub(super) fn run(programs: &Programs, plan: &Plan, console: bool) -> Result<u8> {
    // On this thread: the kernel ends the children when the thread that started them ends.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    let status = runtime.block_on(drive(programs, plan, console));
    // A write to a reader that does not read may still wait.
    runtime.shutdown_background();
    status
}

/// How a run ended.
enum End {
    Status(u8),
    TimeOver,
    Signal(u8),
    Failed(String),
}

async fn drive(programs: &Programs, plan: &Plan, console: bool) -> Result<u8> {
    let deadline = Instant::now() + plan.limit;
    let mut signals = Signals::new()?;
    let kept = Kept::default();
    let (control, control_fd) = pair()?;
    let (out, out_fd) = pair()?;
    let (err, err_fd) = pair()?;
    let mut servers = vec![];
    let mut share_fds = vec![];
    for share in plan.all_shares() {
        let (listener, connection) = named_nowhere()?;
        let (program, words) = server(programs, &share);
        let mut child = spawn(
            command(&program)
                .args(words)
                .stdin(OwnedFd::from(listener))
                .stdout(Stdio::null()),
        )?;
        kept.take(child.stderr.take(), false);
        servers.push(child);
        share_fds.push(OwnedFd::from(connection));
    }

    // Only now, so that the servers did not inherit them.
    let inherited = |fd: OwnedFd| rustix::io::dup(fd).context("duplicate a descriptor");
    let (control_fd, out_fd, err_fd) = (
        inherited(control_fd)?,
        inherited(out_fd)?,
        inherited(err_fd)?,
    );
    let share_fds = share_fds
        .into_iter()
        .map(inherited)
        .collect::<Result<Vec<OwnedFd>>>()?;
    let descriptors = Descriptors {
        control: control_fd.as_raw_fd(),
        out: out_fd.as_raw_fd(),
        err: err_fd.as_raw_fd(),
        shares: share_fds.iter().map(|fd| fd.as_raw_fd()).collect(),
    };
    let mut qemu = spawn(
        command(&programs.setpriv)
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&programs.qemu)
            .args(plan.qemu(&descriptors))
            .stdin(Stdio::null())
            .stdout(Stdio::piped()),
    )?;
    drop((control_fd, out_fd, err_fd, share_fds));
    kept.take(qemu.stdout.take(), console);
    kept.take(qemu.stderr.take(), console);
    let out = forward(out, tokio::io::stdout());
    let err = forward(err, tokio::io::stderr());

    let end = match timeout_at(deadline, follow(control, plan, &mut signals)).await {
        Ok(end) => end?,
        Err(_) => End::TimeOver,
    };
    let ended = timeout_at(Instant::now() + DRAIN_MIN, async {
        if matches!(end, End::Failed(_)) {
            // It may just be about to say why.
            let patience = Instant::now() + Duration::from_millis(500);
            let _ = timeout_at(patience, qemu.wait()).await;
        }
        for child in servers.iter_mut().chain([&mut qemu]) {
            // Fails only for one that has ended.
            let _ = child.start_kill();
            child.wait().await.context("wait for a child")?;
        }
        anyhow::Ok(())
    });
    ended.await.context("a child does not die")??;
    // All ends but ours are closed now; what is in the sockets is still to be told.
    let drained = timeout_at(deadline.max(Instant::now() + DRAIN_MIN), async {
        tokio::select! {
            _ = async { (out.await, err.await) } => {}
            _ = signals.next() => {}
        }
    });
    if drained.await.is_err() {
        eprintln!("lab: nobody reads the output; what was left of it is lost");
    }
    match end {
        End::Status(status) => Ok(status),
        End::Signal(number) => Ok(128 + number),
        End::TimeOver => {
            eprintln!("lab: the time of {} s is over", plan.limit.as_secs());
            Ok(STATUS_TIMEOUT)
        }
        End::Failed(reason) => {
            let told = kept.text();
            bail!(
                "{reason}{}{told}",
                if told.is_empty() {
                    ""
                } else {
                    "; what was said last:\n"
                }
            )
        }
    }
}

/// Speaks with the second stage until the command has ended.
async fn follow(control: UnixStream, plan: &Plan, signals: &mut Signals) -> Result<End> {
    let (from, mut to) = control.into_split();
    let mut lines = BufReader::new(from).lines();
    let (mut started, mut told) = (false, false);
    loop {
        tokio::select! {
            line = lines.next_line() => {
                let Ok(Some(line)) = line else {
                    return Ok(End::Failed("the machine went off".to_owned()));
                };
                match line.split_once(' ').unwrap_or((&line, "")) {
                    ("ready", "") => {
                        let now = SystemTime::now().duration_since(UNIX_EPOCH);
                        let settings = plan.settings(now.context("the clock is before 1970")?);
                        for block in [&settings, &plan.script] {
                            let mut bytes = format!("{}\n", block.len()).into_bytes();
                            bytes.extend(block);
                            to.write_all(&bytes).await.context("tell the machine its work")?;
                        }
                    }
                    ("started", "") => started = true,
                    ("exit", status) => {
                        let status = status.parse().context("the command's status")?;
                        return Ok(End::Status(status));
                    }
                    ("fail", reason) => return Ok(End::Failed(reason.to_owned())),
                    _ => return Ok(End::Failed(format!("the machine says {line:?}"))),
                }
            }
            (name, number) = signals.next() => {
                // The first is the command's own business, which it may take its time for; a second means it.
                if !started || told {
                    return Ok(End::Signal(number));
                }
                told = true;
                to.write_all(format!("{name}\n").as_bytes())
                    .await
                    .context("tell the command of a signal")?;
            }
        }
    }
}

/// The signals that are passed on, and what the second stage calls them.
struct Signals([(tokio::signal::unix::Signal, &'static str, u8); 4]);

impl Signals {
    fn new() -> Result<Signals> {
        let listen = |kind, name, number| {
            let signal = signal(kind).with_context(|| format!("listen for SIG{name}"))?;
            anyhow::Ok((signal, name, number))
        };
        Ok(Signals([
            listen(SignalKind::interrupt(), "INT", 2)?,
            listen(SignalKind::terminate(), "TERM", 15)?,
            listen(SignalKind::hangup(), "HUP", 1)?,
            listen(SignalKind::quit(), "QUIT", 3)?,
        ]))
    }

    async fn next(&mut self) -> (&'static str, u8) {
        let waits = self.0.iter_mut().map(|(signal, name, number)| {
            Box::pin(async move {
                signal.recv().await;
                (*name, *number)
            })
        });
        let mut waits: Vec<_> = waits.collect();
        std::future::poll_fn(|context| {
            for wait in &mut waits {
                if let std::task::Poll::Ready(found) = wait.as_mut().poll(context) {
                    return std::task::Poll::Ready(found);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

/// A process group of its own, so that the terminal's Ctrl-C reaches us alone.
fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .process_group(0)
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn spawn(command: &mut Command) -> Result<Child> {
    let program = command.as_std().get_program().to_owned();
    command
        .spawn()
        .with_context(|| format!("start {program:?}"))
}

/// Two ends: ours, and one to be inherited.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = blocking::UnixStream::pair().context("make a pair of sockets")?;
    ours.set_nonblocking(true).context("make a socket ready")?;
    let ours = UnixStream::from_std(ours).context("make a socket ready")?;
    Ok((ours, theirs.into()))
}

/// A listening socket and the one connection to it. Its name lasts microseconds, in a directory of our user's only.
fn named_nowhere() -> Result<(blocking::UnixListener, blocking::UnixStream)> {
    let dir = tempfile::tempdir().context("make a directory for a socket")?;
    let path = dir.path().join("socket");
    let listener = blocking::UnixListener::bind(&path).context("make a socket")?;
    let connection = blocking::UnixStream::connect(&path).context("connect to our own socket")?;
    Ok((listener, connection))
}

/// Copies until the end. Where our own output is closed the rest is dropped: the command should not wait for nobody.
fn forward(
    mut from: UnixStream,
    mut to: impl tokio::io::AsyncWrite + Unpin + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut part = vec![0; 64 << 10];
        let mut open = true;
        while let Ok(count @ 1..) = from.read(&mut part).await {
            if open {
                open = to.write_all(&part[..count]).await.is_ok() && to.flush().await.is_ok();
            }
        }
    })
}

/// The end of what the console and the children say.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<VecDeque<u8>>>);

impl Kept {
    fn take(&self, from: Option<impl AsyncRead + Send + 'static>, show: bool) {
        let kept = self.0.clone();
        tokio::spawn(async move {
            let Some(from) = from else { return };
            let mut from = pin!(from);
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut part).await {
                if show {
                    // Who closes our standard error does not want it.
                    let _ = tokio::io::stderr().write_all(&part[..count]).await;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(&part[..count]);
                let excess = kept.len().saturating_sub(KEPT_BYTES);
                kept.drain(..excess);
            }
        });
    }

    fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}
