//! The conversation with a machine's agent: from the first greeting to the program's end, over as many connections as it
//! takes. What the program prints goes into the log book and is acknowledged only then, so that nothing is lost however
//! often the node is restarted.

use super::handle::Shared;
use super::prepare::guest_config;
use super::record::now_ns;
use super::recording::record_output;
use super::{Record, Step};
use crate::fault::chain;
use crate::logbook::{LogBook, Offsets as LogOffsets, Stream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use vistara_control::Event;
use vistara_guest_client::{
    Agent, AgentError, ConnectOptions, ExitStatus, Mark, Offsets, Output, OutputChunk,
    OutputStream, Process, ProcessId, ProcessSpec, SpawnError, Stage, TtySize, Welcome,
};
use vistara_machine::{Vm, VmmError};

/// How long an agent that answered before may take to answer a new connection.
const RECONNECT_BOUND: Duration = Duration::from_secs(20);
/// First and longest pause between two attempts to connect: a guest that breaks every session must not keep us busy.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long the guest of a machine of the stock may take to start its program, which it has rehearsed.
const WARM_BOUND: Duration = Duration::from_secs(20);
/// A session of this length was a good one: the next loss is met with the first pause again.
const GOOD_SESSION: Duration = Duration::from_secs(30);
/// Warnings of a guest that are logged, and characters of each.
const WARNINGS_MAX: usize = 16;
const WARNING_CHARS_MAX: usize = 200;

/// What a session tells the machine's task.
#[derive(Debug)]
pub(super) enum News {
    /// Something that the lifecycle must know.
    Event(Event),
    /// Steps of the start.
    Steps(Vec<Step>),
    /// Something troubles the machine, or no longer does.
    Trouble(Option<String>),
    /// Processes that an earlier node had held for a snapshot go on.
    Thawed,
    /// The guest of a machine that goes on from another knows who it is; what of its output was the other's. Answered
    /// when that is on record; where it cannot be written, nobody answers.
    Renewed(LogOffsets, oneshot::Sender<()>),
    /// Some of what a unikernel printed may never have been read.
    Cut,
    /// A provisional run never was.
    Undone {
        /// What was seen, as a sentence.
        seen: String,
        /// Whether that speaks against the command, so that the next run need not try.
        learned: bool,
    },
}

/// Everything a session needs.
pub(super) struct Session {
    pub(super) record: Arc<Record>,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) log: Arc<LogBook>,
    pub(super) shared: Arc<Shared>,
    pub(super) news: mpsc::Sender<News>,
    pub(super) boot_bound: Duration,
    /// When the request arrived, for a machine that this node launched itself.
    pub(super) zero: Option<Instant>,
    /// A session that was begun before, with a guest that has stood still since.
    pub(super) greeted: Option<(Agent, Welcome)>,
}

/// Why a connection is over.
enum Over {
    /// The program has ended, or never will have begun.
    ForGood,
    /// The connection is lost; another may do.
    Lost(AgentError),
}

impl Session {
    /// Runs until the program's end is known or the monitor is gone.
    pub(super) async fn run(mut self) {
        let mut bound = self.boot_bound;
        let mut greeted = false;
        let mut pause = RECONNECT_PAUSE;
        let begin = Instant::now();
        if let Some((agent, welcome)) = self.greeted.take() {
            (bound, greeted) = (RECONNECT_BOUND, true);
            match self.converse(&agent, welcome, true).await {
                Over::ForGood => return,
                Over::Lost(error) => self.session_lost(&error),
            }
        }
        loop {
            let attempt = Instant::now();
            // A monitor's own patience may be longer than what is left of the time for booting.
            let opening = self.vm.open_channel();
            let opened = match self.left_to_boot(begin) {
                Some(left) => tokio::time::timeout(left, opening).await,
                None => Ok(opening.await),
            };
            let greeting = match opened {
                Ok(Ok(stream)) => {
                    let options = ConnectOptions {
                        hello_timeout: bound,
                    };
                    vistara_guest_client::connect(stream, options).await
                }
                Ok(Err(VmmError::Ended)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(machine = %self.record.id, error = chain(&error), "a guest's channel cannot be opened");
                    Err(AgentError::Closed)
                }
                Err(_) => Err(AgentError::Silent(self.boot_bound)),
            };
            match greeting {
                Ok((agent, welcome)) => {
                    if !greeted {
                        let forked =
                            self.record.template.is_some() || self.record.continues.is_some();
                        let steps = match forked {
                            // The stages of a fork's guest were its template's.
                            true => self.host_step("greeting", begin),
                            false => self.guest_steps(&welcome.timings),
                        };
                        self.tell(News::Steps(steps)).await;
                    }
                    let first = !std::mem::replace(&mut greeted, true);
                    bound = RECONNECT_BOUND;
                    let over = self.converse(&agent, welcome, first).await;
                    if let Over::Lost(error) = over {
                        self.session_lost(&error);
                    } else {
                        // The agent stays reachable: the machine may still be asked to write back what it holds.
                        return;
                    }
                }
                Err(AgentError::Silent(after))
                    if !greeted && self.left_to_boot(begin).is_some() =>
                {
                    self.tell(News::Event(Event::BootTimedOut { after })).await;
                    return;
                }
                Err(error @ AgentError::Version { .. }) => {
                    self.tell(News::Event(Event::ConfigureFailed(chain(&error))))
                        .await;
                    return;
                }
                Err(error) => {
                    tracing::debug!(machine = %self.record.id, %error, "a guest does not answer");
                }
            }
            if self.left_to_boot(begin).is_some_and(|left| left.is_zero()) {
                let after = self.boot_bound;
                self.tell(News::Event(Event::BootTimedOut { after })).await;
                return;
            }
            if attempt.elapsed() > GOOD_SESSION {
                pause = RECONNECT_PAUSE;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.shared.reconnect.notified() => {}
            }
            pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
        }
    }

    /// What is left of the time in which the guest's program shall have started; nothing once it has, be it for an earlier node.
    fn left_to_boot(&self, begin: Instant) -> Option<Duration> {
        let started =
            self.record.started_ns.is_some() || self.shared.started.load(Ordering::Relaxed);
        (!started).then(|| self.boot_bound.saturating_sub(begin.elapsed()))
    }

    fn session_lost(&self, error: &AgentError) {
        self.shared.agent.send_replace(None);
        self.shared.process.send_replace(None);
        tracing::info!(machine = %self.record.id, %error, "the session with a guest was lost");
    }

    async fn tell(&self, news: News) {
        // The machine's task outlives its session.
        let _ = self.news.send(news).await;
    }

    async fn converse(&self, agent: &Agent, welcome: Welcome, first: bool) -> Over {
        if !welcome.configured
            && let Some(over) = self.configure(agent, first).await
        {
            return over;
        }
        let renewed = self.shared.renewed.load(Ordering::Relaxed);
        if self.record.continues.is_some()
            && !renewed
            && let Some(over) = self.renew(agent, &welcome).await
        {
            return over;
        }
        if self.shared.to_thaw.swap(false, Ordering::SeqCst) {
            if let Err(error) = agent.thaw().await {
                self.shared.to_thaw.store(true, Ordering::SeqCst);
                return Over::Lost(error);
            }
            self.tell(News::Thawed).await;
            super::actor::set_clock(agent).await;
        }
        let highest = welcome
            .processes
            .iter()
            .map(|state| state.id.0)
            .max()
            .unwrap_or(0);
        self.shared
            .next_process
            .fetch_max(highest, Ordering::Relaxed);
        for state in &welcome.processes {
            if state.id != ProcessId::MAIN {
                drain(agent.clone(), state.id, state.kept_from);
            }
        }
        let begin = Instant::now();
        let known = welcome
            .processes
            .iter()
            .any(|state| state.id == ProcessId::MAIN);
        let process = if known {
            let held = self.log.offsets();
            // The log may begin with what an earlier run printed.
            let base = self.record.log_base;
            // Or the program with what was printed in another machine.
            let before = self.shared.printed_before();
            let from = Offsets {
                stdout: (held.stdout.saturating_sub(base.stdout)).saturating_add(before.stdout),
                stderr: (held.stderr.saturating_sub(base.stderr)).saturating_add(before.stderr),
            };
            match agent.resume(ProcessId::MAIN, from).await {
                Ok(process) => process,
                Err(error) => return Over::Lost(error),
            }
        } else {
            match self.spawn_main(agent).await {
                Ok(process) => process,
                Err(SpawnError::Failed(failed)) => {
                    let event = Event::ProgramFailed {
                        code: failed.code,
                        message: failed.message,
                    };
                    self.tell(News::Event(event)).await;
                    return Over::ForGood;
                }
                Err(SpawnError::Agent(error)) => return Over::Lost(error),
            }
        };
        if !self.shared.started.swap(true, Ordering::Relaxed) {
            self.tell(News::Steps(self.host_step("start program", begin)))
                .await;
        }
        self.shared
            .process
            .send_replace(Some(process.handle.clone()));
        self.tell(News::Event(Event::ProgramStarted)).await;
        self.shared.agent.send_replace(Some(agent.clone()));
        self.follow(process).await
    }

    /// Starts the program. The clock of a guest that has stood still is set before, in whichever session that comes to it.
    async fn spawn_main(&self, agent: &Agent) -> Result<Process, SpawnError> {
        let spawned = agent.spawn(ProcessId::MAIN, self.process_spec());
        if !self.record.warm {
            return spawned.await;
        }
        // In this order, and without waiting for the answer in between.
        let both = async { tokio::join!(agent.set_clock(now_ns()), spawned) };
        // One that has been told and does not answer finds its program in the next session, if there is one.
        let (set, spawned) = tokio::time::timeout(WARM_BOUND, both)
            .await
            .map_err(|_| SpawnError::Agent(AgentError::Silent(WARM_BOUND)))?;
        if let Err(error) = set {
            tracing::warn!(machine = %self.record.id, %error, "the clock of a machine of the stock was not set");
        }
        spawned
    }

    async fn configure(&self, agent: &Agent, first: bool) -> Option<Over> {
        let begin = Instant::now();
        let config = match guest_config(&self.record, now_ns()) {
            Ok(config) => config,
            Err(error) => {
                let message = format!("the host gives no random numbers: {error}");
                self.tell(News::Event(Event::ConfigureFailed(message)))
                    .await;
                return Some(Over::ForGood);
            }
        };
        match agent.configure(config).await {
            Ok(configured) => {
                self.log_warnings(&configured.warnings);
                if first {
                    self.tell(News::Steps(self.host_step("configure", begin)))
                        .await;
                }
                None
            }
            Err(error @ (AgentError::Refused(_) | AgentError::TooLong)) => {
                self.tell(News::Event(Event::ConfigureFailed(chain(&error))))
                    .await;
                Some(Over::ForGood)
            }
            Err(error) => Some(Over::Lost(error)),
        }
    }

    /// Tells the guest of a machine that goes on from another who it is. Only then do its programs go on.
    async fn renew(&self, agent: &Agent, welcome: &Welcome) -> Option<Over> {
        let begin = Instant::now();
        // One that was not configured has just been: a fake one, which begins anew.
        if welcome.configured {
            let refused = match guest_config(&self.record, now_ns()) {
                Ok(config) => match agent.renew(config).await {
                    Ok(configured) => {
                        self.log_warnings(&configured.warnings);
                        None
                    }
                    Err(error @ (AgentError::Refused(_) | AgentError::TooLong)) => {
                        Some(chain(&error))
                    }
                    Err(error) => return Some(Over::Lost(error)),
                },
                Err(error) => Some(format!("the host gives no random numbers: {error}")),
            };
            if let Some(message) = refused {
                self.tell(News::Event(Event::ConfigureFailed(message)))
                    .await;
                return Some(Over::ForGood);
            }
        }
        let main = welcome.processes.iter();
        let kept_from = main.filter(|state| state.id == ProcessId::MAIN);
        let kept_from = kept_from.map(|state| state.kept_from).next();
        let before = kept_from.map_or_else(LogOffsets::default, |from| LogOffsets {
            stdout: from.stdout,
            stderr: from.stderr,
        });
        self.shared.set_printed_before(before);
        // Before anything is acknowledged: a later node must know where the log begins, however long the disk has no room.
        let mut pause = RECONNECT_PAUSE;
        loop {
            let (saved, done) = oneshot::channel();
            self.tell(News::Renewed(before, saved)).await;
            if done.await.is_ok() {
                break;
            }
            if self.news.is_closed() {
                return Some(Over::ForGood);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
        }
        self.shared.renewed.store(true, Ordering::Relaxed);
        self.tell(News::Steps(self.host_step("renew", begin))).await;
        None
    }

    fn log_warnings(&self, warnings: &[String]) {
        for warning in warnings.iter().take(WARNINGS_MAX) {
            let warning: String = warning.chars().take(WARNING_CHARS_MAX).collect();
            tracing::warn!(machine = %self.record.id, warning, "a guest could not be set up in all its parts");
        }
    }

    async fn follow(&self, process: Process) -> Over {
        let Process {
            handle,
            mut output,
            input,
        } = process;
        if self.record.spec.stdin {
            self.shared.offer_input(input).await;
        } else {
            input.close().await;
        }
        let mut first = self.zero;
        while let Some(chunk) = output.next().await {
            self.store(chunk, &output).await;
            if let Some(zero) = first.take() {
                let at = zero.elapsed();
                let begin_us = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
                let step = Step {
                    step: "first output".to_owned(),
                    begin_us,
                    took_us: 0,
                };
                self.tell(News::Steps(vec![step])).await;
            }
        }
        match handle.exited().await {
            Ok(exit) => {
                let status = exit_status(exit.status);
                self.tell(News::Event(Event::ProgramExited {
                    status,
                    out_of_memory: exit.oom,
                }))
                .await;
                Over::ForGood
            }
            Err(error) => Over::Lost(error),
        }
    }

    /// Records a piece of output, however long the disk takes to have room for it. The program waits meanwhile.
    async fn store(&self, chunk: OutputChunk, output: &Output) {
        self.log.wait_for_readers().await;
        let stream = match chunk.stream {
            OutputStream::Stdout => Stream::Stdout,
            OutputStream::Stderr => Stream::Stderr,
        };
        let before = self.shared.printed_before();
        let (base, before) = match stream {
            Stream::Stdout => (self.record.log_base.stdout, before.stdout),
            Stream::Stderr => (self.record.log_base.stderr, before.stderr),
        };
        let end = chunk.offset.saturating_add(chunk.bytes.len() as u64);
        let offset = chunk.offset.saturating_sub(before).saturating_add(base);
        let bytes = bytes::Bytes::from(chunk.bytes);
        if record_output(&self.log, &self.news, stream, offset, bytes).await {
            output.ack(chunk.stream, end);
        }
    }

    fn process_spec(&self) -> ProcessSpec {
        let record = &self.record;
        ProcessSpec {
            argv: record.argv.clone(),
            env: record
                .env
                .iter()
                .map(|v| (v.name.clone(), v.value.clone()))
                .collect(),
            cwd: record.working_dir.clone(),
            user: record.user.clone(),
            tty: record.spec.tty.map(|size| TtySize {
                rows: size.rows,
                columns: size.columns,
            }),
            stdin: record.spec.stdin,
        }
    }

    fn host_step(&self, name: &str, begin: Instant) -> Vec<Step> {
        let Some(zero) = self.zero else {
            return Vec::new();
        };
        let mut watch = super::prepare::Stopwatch::new(zero);
        watch.note(name, begin);
        watch.into_steps()
    }

    /// The guest's own stages, placed on the host's clock: the greeting arrived about now.
    fn guest_steps(&self, marks: &[Mark]) -> Vec<Step> {
        let Some(zero) = self.zero else {
            return Vec::new();
        };
        let now_us = u64::try_from(zero.elapsed().as_micros()).unwrap_or(u64::MAX);
        let Some(last) = marks.iter().find(|mark| mark.stage == Stage::Greeted) else {
            return Vec::new();
        };
        let guest_zero = now_us.saturating_sub(last.at_us);
        let stages = guest_stages(marks).into_iter();
        stages
            .map(|(name, begin, took)| Step {
                step: name.to_owned(),
                begin_us: guest_zero.saturating_add(begin),
                took_us: took,
            })
            .collect()
    }
}

/// The stages of a guest's boot by name, with their begin and length in microseconds of the guest's clock.
pub(crate) fn guest_stages(marks: &[Mark]) -> Vec<(&'static str, u64, u64)> {
    let mut stages = Vec::new();
    let mut before = 0;
    for mark in marks {
        let name = match mark.stage {
            Stage::AgentStart => "guest kernel",
            Stage::ModulesLoaded => "guest drivers",
            Stage::RootMounted => "guest root",
            Stage::ChannelOpen => "guest channel",
            Stage::Greeted => "greeting",
            Stage::Configured | Stage::Spawned => continue,
        };
        stages.push((name, before, mark.at_us.saturating_sub(before)));
        before = mark.at_us.max(before);
    }
    stages
}

/// How a program ended, from a guest's word for it: whatever that says, eight bits of it count.
pub(crate) fn exit_status(told: ExitStatus) -> vistara_model::ExitStatus {
    let byte = |number: i32| u8::try_from(number & 0xff).unwrap_or(u8::MAX);
    match told {
        ExitStatus::Code(code) => vistara_model::ExitStatus::Code(byte(code)),
        ExitStatus::Signal(number) => vistara_model::ExitStatus::Signal(byte(number)),
    }
}

/// Lets a process that an earlier node executed run on: its client is gone, so its output is thrown away.
fn drain(agent: Agent, id: ProcessId, from: Offsets) {
    tokio::spawn(async move {
        let Ok(Process {
            handle,
            mut output,
            input,
        }) = agent.resume(id, from).await
        else {
            return;
        };
        input.close().await;
        while let Some(chunk) = output.next().await {
            output.ack(
                chunk.stream,
                chunk.offset.saturating_add(chunk.bytes.len() as u64),
            );
        }
        if handle.exited().await.is_ok() {
            // A refusal would only mean that somebody else has it forgotten.
            let _ = handle.forget().await;
        }
    });
}
