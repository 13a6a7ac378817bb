//! The task that owns one machine. It carries out what the lifecycle says, keeps the record, and publishes it.

mod again;
mod earlier;
mod guarded;
mod hold;

pub(super) use hold::set_clock;

use super::handle::{COMMANDS_MAX, Shared};
use super::prepare::{Launched, go_on, go_on_warm, prepare};
use super::record::now_ns;
use super::session::{News, Session};
use super::unikernel::{Undone, UnikernelSession, clear_held};
use super::{Command, Handle, Record, Snapshot, Step};
use crate::fault::chain;
use crate::fence::Guard;
use crate::logbook::LogBook;
use crate::node::Node;
use crate::receipts::{self, LastUsage, Ran};
use crate::snapshots::Moment;
use crate::stock::Warm;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vistara_control::{Effect, Event, Lifecycle, VmGone};
use vistara_guest_client::{Agent, Welcome};
use vistara_machine::{Vm, VmEnd, VmmError};
use vistara_model::{MachineState, Payload, Signal};

/// How many news may wait for the machine's task.
const NEWS_MAX: usize = 64;
/// How long a signal waits for a session with the agent.
const SIGNAL_BOUND: Duration = Duration::from_secs(10);
/// Tries to end a monitor, and the pause between two.
const KILL_TRIES: u32 = 30;
const KILL_PAUSE: Duration = Duration::from_secs(1);
/// How long an ended machine waits for the client that said it would attach, before it removes itself.
const ATTACH_BOUND: Duration = Duration::from_secs(5);
/// Longest that an ended machine waits to be removed for clients that still read its output.
const READERS_BOUND: Duration = Duration::from_secs(3600);
/// How long a guest may take to write back what it holds of shared directories before it is taken down all the same.
const FLUSH_BOUND: Duration = Duration::from_secs(10);
/// How long the session may take to record the last output after the guest is gone.
const LAST_WORDS_BOUND: Duration = Duration::from_secs(5);
/// Program's time to end when a stop names none.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(10);

/// A launched machine with the steps that led to it, or what went wrong, in words for the user.
type Prepared = Result<(Launched, Ran), String>;

/// Where a machine comes from.
pub(crate) enum Origin {
    /// A request that arrived now.
    Request {
        /// When.
        at: Instant,
        /// Whether its client will attach, and should find the machine whatever became of it.
        attach: bool,
        /// What it goes on from, if it is not to begin anew.
        moment: Option<Arc<Moment>>,
        /// The machine of the stock that it is.
        warm: Option<Box<Warm>>,
        /// When it must be gone, unless that is put off.
        lease: Option<Duration>,
    },
    /// An earlier node, when it had not ended yet.
    Earlier,
    /// An earlier node, when it had ended already.
    Ended,
}

/// The task's own state.
pub(crate) struct Actor {
    node: Arc<Node>,
    dir: PathBuf,
    record: Record,
    life: Lifecycle,
    vm: Option<Arc<dyn Vm>>,
    log: Arc<LogBook>,
    shared: Arc<Shared>,
    news: (mpsc::Sender<News>, mpsc::Receiver<News>),
    commands: mpsc::Receiver<Command>,
    published: watch::Sender<Snapshot>,
    session: Option<JoinHandle<()>>,
    prepared: Option<JoinHandle<Prepared>>,
    /// Ends the wait for what is being prepared.
    cancel: CancellationToken,
    waiter: Option<JoinHandle<VmEnd>>,
    grace: Option<tokio::time::Instant>,
    limit: Option<tokio::time::Instant>,
    zero: Option<Instant>,
    attach: bool,
    /// What it goes on from, until it does.
    moment: Option<Arc<Moment>>,
    /// The machine of the stock that it is, until it goes on.
    warm: Option<Warm>,
    /// A session with the agent that was begun before the machine was asked for, until it is taken up.
    greeted: Option<(Agent, Welcome)>,
    /// Why a provisional run never was.
    undone: Option<Undone>,
    /// Who ends it when its lease is over, if it is a copy of a service.
    guard: Option<Guard>,
    /// What its monitor used when it was taken down.
    usage: Option<LastUsage>,
    trouble: Option<String>,
    unsaved: bool,
}

/// A future that never is, where there is nothing to wait for.
async fn joined<T>(handle: &mut Option<JoinHandle<T>>) -> Result<T, String> {
    match handle {
        Some(task) => {
            let result = task
                .await
                .map_err(|error| format!("a task of the node failed: {error}"));
            *handle = None;
            result
        }
        None => std::future::pending().await,
    }
}

async fn at(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn gone(guard: &mut Option<Guard>) {
    match guard {
        Some(guard) => guard.gone().await,
        None => std::future::pending().await,
    }
}

/// A monitor's word in the lifecycle's.
fn vm_gone(end: Result<VmEnd, String>) -> VmGone {
    match end {
        Ok(VmEnd::GuestOff) => VmGone::GuestOff,
        Ok(VmEnd::GuestPanic { message }) => VmGone::GuestPanic(message),
        Ok(VmEnd::Killed) => VmGone::Killed,
        Ok(VmEnd::Crashed { message }) => VmGone::Crashed(message),
        Err(message) => VmGone::Crashed(message),
    }
}

impl Actor {
    /// Starts the task of a machine whose record is on disk.
    pub(crate) fn start(
        node: Arc<Node>,
        dir: PathBuf,
        record: Record,
        log: Arc<LogBook>,
        origin: Origin,
    ) -> Arc<Handle> {
        let shared = Arc::new(Shared::default());
        shared.to_thaw.store(record.held, Ordering::Relaxed);
        if let Some(continues) = &record.continues {
            (shared.renewed).store(continues.renewed, Ordering::Relaxed);
            shared.set_printed_before(continues.printed_before);
        }
        let (commands_in, commands) = mpsc::channel(COMMANDS_MAX);
        let snapshot = Snapshot {
            record: Arc::new(record.clone()),
            trouble: None,
            removed: false,
        };
        let (published, snapshot) = watch::channel(snapshot);
        let handle = Arc::new(Handle {
            id: record.id.clone(),
            dir: dir.clone(),
            log: Arc::clone(&log),
            shared: Arc::clone(&shared),
            commands: commands_in,
            snapshot,
        });
        let life = Lifecycle::resumed(record.state, record.end.clone());
        let actor = Actor {
            node,
            dir,
            record,
            life,
            vm: None,
            log,
            shared,
            news: mpsc::channel(NEWS_MAX),
            commands,
            published,
            session: None,
            prepared: None,
            cancel: CancellationToken::new(),
            waiter: None,
            grace: None,
            limit: None,
            zero: None,
            attach: false,
            moment: None,
            warm: None,
            greeted: None,
            undone: None,
            guard: None,
            usage: None,
            trouble: None,
            unsaved: false,
        };
        tokio::spawn(actor.run(origin));
        handle
    }

    async fn run(mut self, origin: Origin) {
        match origin {
            Origin::Request {
                at: zero,
                attach,
                moment,
                warm,
                lease,
            } => {
                self.zero = Some(zero);
                self.attach = attach;
                self.moment = moment;
                self.warm = warm.map(|warm| *warm);
                match self.set_guard(lease).await {
                    Ok(()) => self.prepare(zero),
                    Err(message) => self.on(Event::PrepareFailed(message)).await,
                }
            }
            Origin::Earlier => self.find_out().await,
            Origin::Ended => {}
        }
        while self.life.state() != MachineState::Ended {
            self.step().await;
        }
        self.rest().await;
    }

    async fn step(&mut self) {
        tokio::select! {
            // What has happened comes before what is asked: who has seen a program's output asks of one that runs.
            biased;
            Some(news) = self.news.1.recv() => self.hear(news).await,
            Some(command) = self.commands.recv() => self.command(command).await,
            result = joined(&mut self.prepared) => match result.and_then(|result| result) {
                Ok((launched, ran)) => {
                    self.record.proof.ran = Some(ran);
                    self.add_steps(launched.steps);
                    self.record.warm &= launched.greeted.is_some();
                    self.record.template = launched.template;
                    self.greeted = launched.greeted;
                    self.take_up(launched.vm);
                    self.on(Event::Launched).await;
                }
                Err(message) => self.on(Event::PrepareFailed(message)).await,
            },
            end = joined(&mut self.waiter) => self.gone(end).await,
            () = gone(&mut self.guard) => {
                self.guard = None;
                self.replace_guard().await;
            }
            () = at(self.grace) => {
                self.grace = None;
                self.on(Event::GraceOver).await;
            }
            () = at(self.limit) => {
                self.limit = None;
                self.on(Event::TimeLimit).await;
            }
        }
    }

    fn take_up(&mut self, vm: Arc<dyn Vm>) {
        self.record.vm = Some(vm.record().clone());
        let waited = Arc::clone(&vm);
        self.waiter = Some(tokio::spawn(async move { waited.wait().await }));
        if self.life.state() != MachineState::Paused {
            self.begin_session(&vm);
        }
        self.shared.vm.send_replace(Some(Arc::clone(&vm)));
        self.vm = Some(vm);
    }

    /// Starts the task that speaks with the guest.
    fn begin_session(&mut self, vm: &Arc<dyn Vm>) {
        let unikernel = self.record.backend.payload == Payload::Nanos;
        if unikernel && self.zero.is_none() && !self.record.provisional {
            // What an earlier node had read and not recorded is lost: a unikernel says nothing twice.
            self.note_cut();
        }
        let record = Arc::new(self.record.clone());
        let (log, shared) = (Arc::clone(&self.log), Arc::clone(&self.shared));
        let (news, zero) = (self.news.0.clone(), self.zero);
        self.session = Some(match self.record.backend.payload {
            Payload::Linux => tokio::spawn(
                Session {
                    record,
                    vm: Arc::clone(vm),
                    log,
                    shared,
                    news,
                    boot_bound: self.node.boot_bound(),
                    zero,
                    greeted: self.greeted.take(),
                }
                .run(),
            ),
            Payload::Nanos => tokio::spawn(
                UnikernelSession {
                    record,
                    dir: self.dir.clone(),
                    vm: Arc::clone(vm),
                    log,
                    shared,
                    news,
                    zero,
                }
                .run(),
            ),
        });
    }

    async fn command(&mut self, command: Command) {
        self.obey(command).await;
        if self.life.state() == MachineState::Preparing && self.life.end().is_some() {
            // Nobody waits any more for what is being prepared.
            self.cancel.cancel();
        }
    }

    async fn obey(&mut self, command: Command) {
        if matches!(command, Command::Stop { .. } | Command::Kill) && self.record.provisional {
            // What a user ends is not begun again, whatever is done to end it.
            self.shared.asked_to_end.store(true, Ordering::Relaxed);
        }
        match command {
            Command::Stop { signal, grace } => {
                let signal = signal.unwrap_or(self.record.stop_signal);
                self.on(Event::StopAsked { signal, grace }).await;
            }
            Command::Signal(signal) => self.signal(signal),
            Command::Kill => self.on(Event::KillAsked).await,
            Command::Pause(answer) => {
                let done = self.pause().await;
                // Who asked may have gone.
                let _ = answer.send(done);
            }
            Command::Resume(answer) => {
                let done = self.resume().await;
                let _ = answer.send(done);
            }
            Command::Hold(held, answer) => {
                let done = self.note_held(held).await;
                let _ = answer.send(done);
            }
            // Whoever removes waits for the end first; before it there is nothing to do.
            Command::Remove => {}
        }
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::Event(event) => self.on(event).await,
            News::Steps(steps) => {
                self.add_steps(steps);
                self.publish().await;
            }
            News::Thawed => {
                self.record.held = false;
                self.unsaved = true;
                self.publish().await;
            }
            News::Renewed(printed_before, saved) => {
                if let Some(continues) = &mut self.record.continues {
                    continues.renewed = true;
                    continues.printed_before = printed_before;
                }
                self.unsaved = true;
                self.publish().await;
                if !self.unsaved {
                    // The session may have gone.
                    let _ = saved.send(());
                }
            }
            News::Trouble(trouble) => {
                self.trouble = trouble;
                self.publish().await;
            }
            News::Cut => self.note_cut(),
            News::Undone { seen, learned } => self.undone = Some(Undone { seen, learned }),
        }
    }

    /// Whatever the end will be, nobody can say that all was heard. Written with the next change of the record.
    fn note_cut(&mut self) {
        self.record.proof.cut = true;
        self.unsaved = true;
    }

    fn add_steps(&mut self, steps: Vec<Step>) {
        self.record.timings.extend(steps);
        self.unsaved = true;
    }

    /// The monitor is gone. What the session still holds is recorded before that is believed.
    async fn gone(&mut self, end: Result<VmEnd, String>) {
        if let Some(mut session) = self.session.take() {
            // A Linux guest is taken down only when all it said is recorded. A unikernel is gone by itself: its session ends
            // when the last word is recorded, however long the disk or a reader takes, unless somebody wants it gone.
            let bound = match self.record.backend.payload {
                Payload::Linux => Some(tokio::time::Instant::now() + LAST_WORDS_BOUND),
                Payload::Nanos => None,
            };
            loop {
                tokio::select! {
                    Some(news) = self.news.1.recv() => self.hear(news).await,
                    _ = &mut session => break,
                    () = at(bound) => break,
                    Some(command) = self.commands.recv() => {
                        if matches!(command, Command::Kill | Command::Stop { .. }) {
                            self.shared.asked_to_end.store(true, Ordering::Relaxed);
                            break;
                        }
                        // What is asked of a machine at its end has no answer, and who asked hears that.
                    }
                }
            }
            session.abort();
            while let Ok(news) = self.news.1.try_recv() {
                self.hear(news).await;
            }
        }
        self.vm = None;
        self.shared.vm.send_replace(None);
        self.shared.agent.send_replace(None);
        let gone = vm_gone(end);
        let gone = Event::VmGone(gone);
        self.learn_unseen_end(&gone).await;
        self.on(gone).await;
    }

    async fn on(&mut self, event: Event) {
        tracing::debug!(machine = %self.record.id, ?event, "event");
        let started = event == Event::ProgramStarted;
        self.record.proof.exit_heard |= matches!(event, Event::ProgramExited { .. });
        let effects = self.life.on(event);
        self.record.state = self.life.state();
        self.record.end = self.life.end().cloned();
        self.unsaved = true;
        if self.record.state == MachineState::Ended && self.run_again().await {
            return self.publish().await;
        }
        if started {
            self.record.started_ns.get_or_insert_with(now_ns);
            if self.record.undone.is_some() {
                (self.record.proof.began_again_ns).get_or_insert_with(now_ns);
            }
            // A run that began anew after the node did has been running before.
            if self.limit.is_none() {
                self.arm_time_limit();
            }
        }
        let ends = self.record.state == MachineState::Ended && self.record.ended_ns.is_none();
        if ends {
            self.record.ended_ns = Some(now_ns());
            self.record.vm = None;
            self.lift_guard().await;
            self.log.finish();
            let (node, tallies) = (Arc::clone(&self.node), self.log.tallies());
            let made = receipts::make(node.mesh(), &self.record, tallies, self.usage).await;
            self.record.proof.receipt = Some(made);
        }
        self.publish().await;
        if ends && !self.record.spec.auto_remove {
            self.clear_away().await;
        }
        for effect in effects {
            self.carry_out(effect);
        }
    }

    /// Starts the task that makes the machine ready.
    fn prepare(&mut self, zero: Instant) {
        let (node, record, dir) = (
            Arc::clone(&self.node),
            self.record.clone(),
            self.dir.clone(),
        );
        let (cancel, moment) = (self.cancel.clone(), self.moment.take());
        let warm = self.warm.take().and_then(Warm::give);
        self.prepared = Some(tokio::spawn(async move {
            let launched = async {
                match (moment, warm) {
                    (_, Some(warm)) => go_on_warm(&node, &record, &dir, zero, &cancel, warm).await,
                    (Some(moment), None) => go_on(&node, &record, &dir, zero, &moment).await,
                    (None, None) => prepare(&node, &record, &dir, zero, &cancel).await,
                }
            };
            let (mechanisms, told) = (node.mechanisms(), record.clone());
            let ran = tokio::task::spawn_blocking(move || Ran::now(&mechanisms, &told));
            // Its receipt is signed at its end; the key is at hand by then. Where it is not, the receipt says why.
            let (launched, ran, _key) = tokio::join!(launched, ran, node.mesh().open());
            Ok((launched?, ran.map_err(|error| error.to_string())?))
        }));
    }

    fn arm_time_limit(&mut self) {
        let (Some(limit), Some(started)) = (self.record.spec.timeout, self.record.started_ns)
        else {
            return;
        };
        let passed = Duration::from_nanos(now_ns().saturating_sub(started));
        self.limit = Some(tokio::time::Instant::now() + limit.saturating_sub(passed));
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::SignalProgram(signal) => self.signal(signal),
            Effect::ArmGrace(grace) => self.grace = Some(tokio::time::Instant::now() + grace),
            Effect::ResumeVm => self.go_on(),
            Effect::TakeDown => self.take_down(!self.record.spec.volumes.is_empty()),
            Effect::KillVm => self.take_down(false),
        }
    }

    /// Sends the program a signal, as soon as there is a session to send it through: after a restart of the node it comes
    /// a moment later.
    fn signal(&self, signal: Signal) {
        if self.record.backend.payload == Payload::Nanos {
            return self.press_power_button(signal);
        }
        let mut sessions = self.shared.agent.subscribe();
        let id = self.record.id.clone();
        tokio::spawn(async move {
            let found = async { sessions.wait_for(Option::is_some).await.ok()?.clone() };
            let Ok(Some(agent)) = tokio::time::timeout(SIGNAL_BOUND, found).await else {
                return;
            };
            let number = i32::from(signal.0);
            if let Err(error) = agent
                .signal(vistara_guest_client::ProcessId::MAIN, number)
                .await
            {
                tracing::info!(machine = %id, %error, "a program could not be signalled");
            }
        });
    }

    /// A unikernel hears nothing but its power button, which its program has as SIGTERM.
    fn press_power_button(&self, signal: Signal) {
        let Some(vm) = self.vm.clone() else { return };
        let news = self.news.0.clone();
        let id = self.record.id.clone();
        self.shared.asked_to_end.store(true, Ordering::Relaxed);
        tokio::spawn(async move {
            if signal != Signal::TERM {
                tracing::info!(machine = %id, %signal, "a unikernel gets SIGTERM whatever signal was asked for");
            }
            let Err(error) = vm.press_power_button().await else {
                return;
            };
            tracing::info!(machine = %id, error = chain(&error), "a unikernel could not be asked to end");
            if let VmmError::Unsupported { .. } = error {
                // Nobody could hear it, as in Firecracker: there is nothing to wait for, where it was asked to end.
                let _ = news.send(News::Event(Event::GraceOver)).await;
            }
        });
    }

    fn take_down(&mut self, flush: bool) {
        let Some(vm) = self.vm.clone() else { return };
        self.usage = LastUsage::of(vm.as_ref()).or(self.usage);
        let agent = self.shared.agent.borrow().clone();
        let id = self.record.id.clone();
        tokio::spawn(async move {
            if let (true, Some(agent)) = (flush, agent) {
                let asked = agent.shutdown(Duration::ZERO, i32::from(Signal::KILL.0));
                if tokio::time::timeout(FLUSH_BOUND, asked).await.is_err() {
                    tracing::warn!(machine = %id, "a guest did not write back what it held in time");
                }
            }
            for _ in 0..KILL_TRIES {
                match vm.kill().await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::error!(machine = %id, error = chain(&error), "a monitor could not be ended");
                    }
                }
                tokio::time::sleep(KILL_PAUSE).await;
            }
        });
    }

    /// Frees what an ended machine needs no more: its disk. Its record and log stay. On a busy disk this takes some 10 ms.
    async fn clear_away(&self) {
        let path = self.dir.join(super::prepare::OVERLAY);
        let held = self.record.provisional.then(|| self.dir.clone());
        let removed = tokio::task::spawn_blocking(move || {
            if let Some(dir) = held {
                clear_held(&dir);
            }
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a file could not be removed");
                }
                _ => {}
            }
        });
        if let Err(error) = removed.await {
            tracing::error!(machine = %self.record.id, %error, "the removing task failed");
        }
    }

    /// Puts the record on disk, then shows it. Where that failed, `unsaved` says so.
    async fn publish(&mut self) {
        if self.unsaved {
            let (record, dir) = (self.record.clone(), self.dir.clone());
            let saved = tokio::task::spawn_blocking(move || record.save(&dir)).await;
            match saved {
                Ok(Ok(())) => self.unsaved = false,
                // Tried again with the next change; the machine itself is well.
                Ok(Err(error)) => {
                    tracing::error!(machine = %self.record.id, %error, "a machine's record could not be written");
                }
                Err(error) => {
                    tracing::error!(machine = %self.record.id, %error, "the writing task failed")
                }
            }
        }
        self.published.send_replace(Snapshot {
            record: Arc::new(self.record.clone()),
            trouble: self.trouble.clone(),
            removed: false,
        });
    }

    /// The machine is over: wait to be removed.
    async fn rest(mut self) {
        self.log.finish();
        self.publish().await;
        if !self.record.spec.auto_remove {
            loop {
                match self.commands.recv().await {
                    Some(Command::Remove) => break,
                    Some(
                        Command::Stop { .. }
                        | Command::Signal(_)
                        | Command::Kill
                        // Who asked hears that nobody answers.
                        | Command::Pause(_)
                        | Command::Resume(_)
                        | Command::Hold(..),
                    ) => {}
                    // Nobody holds a handle any more: the node is leaving, and the record stays for the next one.
                    None => return,
                }
            }
        }
        if self.attach {
            // A machine that failed at once must not be gone before the client that asked for it hears why.
            let _ = tokio::time::timeout(ATTACH_BOUND, self.log.wait_until_read()).await;
        }
        // A client may still be reading what was printed: `run --rm … | less`.
        let _ = tokio::time::timeout(READERS_BOUND, self.log.wait_until_unread()).await;
        // Who removes a machine finds nothing of it afterwards. Who has run one that removes itself waits for its name, and not
        // until its disk is freed.
        let early = self.record.spec.auto_remove && self.forget_record().await;
        if early {
            self.be_forgotten();
        }
        let dir = self.dir.clone();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(dir)).await;
        if let Ok(Err(error)) = removed {
            tracing::error!(machine = %self.record.id, %error, "a machine's directory could not be removed");
        }
        if !early {
            self.be_forgotten();
        }
    }

    /// Removes the record alone, without which a later node clears the rest away.
    async fn forget_record(&self) -> bool {
        let dir = self.dir.clone();
        let removed = tokio::task::spawn_blocking(move || Record::remove(&dir)).await;
        matches!(removed, Ok(Ok(())))
    }

    /// Its name is free, and nobody finds it any more.
    fn be_forgotten(&self) {
        self.node.forget(&self.record.id);
        self.published.send_replace(Snapshot {
            record: Arc::new(self.record.clone()),
            trouble: None,
            removed: true,
        });
    }
}
