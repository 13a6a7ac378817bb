//! The handle to an agent, and how a session begins.

use crate::session::Session;
use crate::state::{ProcessState, Reply, State};
use crate::transfer;
use crate::{AgentError, ArchiveReader, Process, SpawnError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use vistara_guest_protocol::{
    Configured, FLUSH_LEN, FileStat, FrameKind, GuestConfig, GuestStats, Hello, Offsets, ProcessId,
    ProcessSpec, Refusal, RefusalKind, Sequence, SpawnFailed, ToGuest, UnpackOptions, WINDOW,
    Welcome, encode_frame,
};

/// When a greeting without an answer is sent again, and how much longer it takes each time. An agent that is there
/// answers in a millisecond; one that still boots finds the first greeting when it comes.
const GREET_AGAIN: Duration = Duration::from_millis(500);
const GREET_AGAIN_LONGEST: Duration = Duration::from_secs(4);

/// How patiently a session is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectOptions {
    /// How long the agent may take to answer; the guest may still be booting.
    pub hello_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(60),
        }
    }
}

/// Begins a session: greets the agent until it answers.
///
/// # Errors
/// [`AgentError::Silent`] after the timeout, or what became of the stream.
pub async fn connect(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    options: ConnectOptions,
) -> Result<(Agent, Welcome), AgentError> {
    let mut number = [0; 8];
    getrandom::fill(&mut number).map_err(|error| AgentError::Io(error.to_string()))?;
    let number = u64::from_le_bytes(number);
    let (sender, mut welcome) = oneshot::channel();
    let session = Session::start(stream, State::new(number, sender));

    let mut greeting = Vec::new();
    let hello = Hello {
        host_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    // Greetings are not among the numbered frames of a session, for they may come more than once.
    encode_frame(
        &mut greeting,
        FrameKind::Hello,
        &mut Sequence::new(number),
        &hello,
    )
    .map_err(|_| AgentError::TooLong)?;
    session.shared.lock().say_raw(&greeting);
    session.shared.to_write.notify_one();

    let end = Instant::now() + options.hello_timeout;
    let mut pause = GREET_AGAIN;
    loop {
        let again = (Instant::now() + pause).min(end);
        match timeout_at(again, &mut welcome).await {
            Ok(Ok(welcome)) => {
                let states = welcome
                    .processes
                    .iter()
                    .map(|state| (state.id.0, state.stdin_received));
                let resumable = Arc::new(Mutex::new(states.collect()));
                return Ok((
                    Agent {
                        session: Arc::new(session),
                        resumable,
                    },
                    welcome,
                ));
            }
            Ok(Err(_)) => return Err(session.shared.failure()),
            Err(_) if again == end => return Err(AgentError::Silent(options.hello_timeout)),
            Err(_) => {
                // An earlier host may have died in the middle of a frame, which the agent still waits for: zeros end
                // it. Nothing is added to what the guest has not even taken yet.
                let mut state = session.shared.lock();
                if state.nothing_to_write() {
                    state.say_raw(&vec![0; FLUSH_LEN]);
                    state.say_raw(&greeting);
                    session.shared.to_write.notify_one();
                }
                pause = (pause * 2).min(GREET_AGAIN_LONGEST);
            }
        }
    }
}

/// A session with an agent. Clones are the same session; it ends when the last of them, and of the [`Process`]es and
/// [`ArchiveReader`]s that came from it, is dropped. Nothing in the guest ends with it.
#[derive(Debug, Clone)]
pub struct Agent {
    session: Arc<Session>,
    /// How much of their inputs the processes had that the welcome told of.
    resumable: Arc<Mutex<HashMap<u32, u64>>>,
}

impl Agent {
    /// Sets the guest up. Once in a guest's life; [`Welcome::configured`] tells whether it has been done.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure(&self, config: GuestConfig) -> Result<Configured, AgentError> {
        match self
            .session
            .ask(|request| ToGuest::Configure { request, config })
            .await?
        {
            Reply::Configured(configured) => Ok(configured),
            Reply::Done | Reply::Stat(_) | Reply::Stats(_) => Err(wrong_answer()),
        }
    }

    /// Makes a guest that is not configured yet ready to be captured; these files (absolute paths) are read into its cache.
    /// `likely` is what most forks of it will be told by [`Agent::configure`], which costs them less then.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn prepare(
        &self,
        read_ahead: Vec<String>,
        likely: GuestConfig,
    ) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Prepare {
                    request,
                    read_ahead,
                    likely,
                })
                .await?,
        )
    }

    /// Sets the guest's clock (nanoseconds since 1970), which stands while a machine is held still.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_clock(&self, wall_clock_ns: u64) -> Result<(), AgentError> {
        let answer = self.session.ask(|request| ToGuest::SetClock {
            request,
            wall_clock_ns,
        });
        done(answer.await?)
    }

    /// Holds every process of the guest still until [`Agent::thaw`] or, in a machine that goes on from there,
    /// [`Agent::renew`].
    ///
    /// # Errors
    /// [`AgentError`]; after a refusal all go on.
    pub async fn freeze(&self) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Freeze { request })
                .await?,
        )
    }

    /// Lets the processes go on that [`Agent::freeze`] held.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn thaw(&self) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Thaw { request })
                .await?,
        )
    }

    /// Tells a guest that goes on from a captured one which machine it is now, and lets its processes go on.
    ///
    /// # Errors
    /// [`AgentError`]; nothing goes on then.
    pub async fn renew(&self, config: GuestConfig) -> Result<Configured, AgentError> {
        match self
            .session
            .ask(|request| ToGuest::Renew { request, config })
            .await?
        {
            Reply::Configured(configured) => Ok(configured),
            Reply::Done | Reply::Stat(_) | Reply::Stats(_) => Err(wrong_answer()),
        }
    }

    /// Starts a process under a number that the agent does not know (see [`Welcome::processes`]).
    ///
    /// # Errors
    /// [`SpawnError::Failed`] with the exit code to report, or [`SpawnError::Agent`].
    pub async fn spawn(&self, id: ProcessId, spec: ProcessSpec) -> Result<Process, SpawnError> {
        let (sender, answer) = oneshot::channel();
        {
            let mut state = self.session.shared.lock();
            if state.spawns.contains_key(&id.0) || state.processes.contains_key(&id.0) {
                let message = format!("process number {id} is taken");
                return Err(SpawnFailed { code: 125, message }.into());
            }
            state.say(&ToGuest::Spawn { id, spec })?;
            state.spawns.insert(id.0, sender);
            // Its output may come in the same breath as the answer.
            state
                .processes
                .insert(id.0, ProcessState::new(Offsets::default(), 0, WINDOW));
        }
        self.session.shared.to_write.notify_one();
        match answer.await {
            Ok(Ok((pid, at_us))) => Ok(Process::new(&self.session, id, pid, at_us)),
            Ok(Err(failed)) => Err(failed.into()),
            Err(_) => Err(self.session.shared.failure().into()),
        }
    }

    /// Takes up a process of an earlier session. Its output flows from `from` on, which is what was stored of it; what
    /// is before is acknowledged by this. For a process that ended, `exited` answers once its output has come.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where the agent does not know it, or `from` is not among what it kept.
    pub async fn resume(&self, id: ProcessId, from: Offsets) -> Result<Process, AgentError> {
        let resumable = |map: &Mutex<HashMap<u32, u64>>| {
            map.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(&id.0)
                .copied()
        };
        let input_sent = resumable(&self.resumable).unwrap_or(0);
        {
            let mut state = self.session.shared.lock();
            if state.processes.contains_key(&id.0) {
                let message = format!("process number {id} is in use in this session");
                let refusal = Refusal {
                    kind: RefusalKind::Busy,
                    message,
                };
                return Err(AgentError::Refused(refusal));
            }
            // The agent says after its answer how much input it takes.
            state
                .processes
                .insert(id.0, ProcessState::new(from, input_sent, input_sent));
        }
        let answer = self
            .session
            .ask(|request| ToGuest::Resume { request, id, from })
            .await;
        if let Err(error) = answer {
            self.session.shared.lock().processes.remove(&id.0);
            return Err(error);
        }
        Ok(Process::new(&self.session, id, 0, 0))
    }

    /// Sends a signal to a process, or to its whole group where it has a terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn signal(&self, id: ProcessId, number: i32) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Signal {
                    request,
                    id,
                    number,
                })
                .await?,
        )
    }

    /// Has the agent forget a process that ended: its number and what is kept of it are free.
    ///
    /// # Errors
    /// [`AgentError::Refused`] while it runs.
    pub async fn forget(&self, id: ProcessId) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Forget { request, id })
                .await?,
        )?;
        self.session.shared.lock().processes.remove(&id.0);
        Ok(())
    }

    /// What the guest uses.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stats(&self) -> Result<GuestStats, AgentError> {
        match self
            .session
            .ask(|request| ToGuest::Stats { request })
            .await?
        {
            Reply::Stats(stats) => Ok(stats),
            Reply::Done | Reply::Configured(_) | Reply::Stat(_) => Err(wrong_answer()),
        }
    }

    /// Asks whether the agent is there.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn ping(&self) -> Result<(), AgentError> {
        done(
            self.session
                .ask(|request| ToGuest::Ping { request })
                .await?,
        )
    }

    /// What a path in the guest leads to; nothing where there is no such file. `follow` says whether a symbolic link at
    /// its end is followed.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stat(&self, path: &str, follow: bool) -> Result<Option<FileStat>, AgentError> {
        let path = path.to_owned();
        match self
            .session
            .ask(|request| ToGuest::Stat {
                request,
                path,
                follow,
            })
            .await?
        {
            Reply::Stat(stat) => Ok(stat),
            Reply::Done | Reply::Configured(_) | Reply::Stats(_) => Err(wrong_answer()),
        }
    }

    /// Reads a file or a tree of the guest as a tar stream; its entries begin with the path's last component. Reading
    /// fails where the guest fails midway; an end of file means that all of it came.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn archive_out(&self, path: &str, follow: bool) -> Result<ArchiveReader, AgentError> {
        transfer::out_of(&self.session, path, follow).await
    }

    /// Unpacks a tar stream into a directory of the guest that exists. Dropping the future cancels it; what was
    /// unpacked stays.
    ///
    /// # Errors
    /// [`AgentError::Refused`] for what the guest could not unpack, [`AgentError::Source`] where `tar` failed.
    pub async fn archive_in(
        &self,
        path: &str,
        tar: impl AsyncRead + Send + Unpin,
        options: UnpackOptions,
    ) -> Result<(), AgentError> {
        transfer::into(&self.session, path, tar, options).await
    }

    /// Ends the guest: `signal` to its main process, after `grace` SIGKILL to all. Returns when the agent has written
    /// everything and is about to switch off. Exits of processes still arrive before that.
    ///
    /// # Errors
    /// [`AgentError`]; that the channel closed first may also mean that the guest is off.
    pub async fn shutdown(&self, grace: Duration, signal: i32) -> Result<(), AgentError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let shared = &self.session.shared;
        shared.lock().say(&ToGuest::Shutdown { grace_ms, signal })?;
        shared.to_write.notify_one();
        shared.over().await;
        let state = shared.lock();
        match &state.failure {
            Some(error) if !state.bye => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Waits for the end of the session and says why it ended.
    pub async fn closed(&self) -> AgentError {
        self.session.shared.failed().await
    }
}

fn done(reply: Reply) -> Result<(), AgentError> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Configured(_) | Reply::Stat(_) | Reply::Stats(_) => Err(wrong_answer()),
    }
}

fn wrong_answer() -> AgentError {
    AgentError::Broken("an answer to another question".to_owned())
}
