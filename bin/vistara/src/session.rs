//! One program's streams on our own: output as it comes, input, the terminal, signals, and how it ended.
//!
//! ```text
//! waiting ──started──► running ──exited──► flushing ──► over
//!    │                   │  └─ctrl-p ctrl-q─► detached
//!    └──── ctrl-c: stop ─┴─ ctrl-c: forward, stop, kill, leave
//! ```
//! The caller's terminal turns raw only when the program runs: until then ctrl-c still works on us.

mod input;
pub(crate) mod keys;
pub(crate) mod signals;
pub(crate) mod terminal;
mod writer;

use crate::failure::{Failure, OUTPUT_CLOSED};
use crate::receipts::Heard;
use bytes::Bytes;
use keys::DetachKeys;
use signals::{Answer, Came, Signals};
use std::io::Write;
use std::time::{Duration, Instant};
use terminal::notice;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vistara_api::client::{StreamItem, Streams};
use vistara_api::stream::{ClientSignal, StreamEvent};
use vistara_api::{Client, ErrorBody, KillRequest, Machine, MachineDetail, StopRequest};
use writer::{Piece, Writer};

/// How long a program has to end by itself once its user insists (second ctrl-c), or once nobody reads its output.
const INSIST_GRACE: Duration = Duration::from_secs(3);
/// How long we wait for the end of an executed program whose output nobody reads.
const CLOSED_WAIT: Duration = Duration::from_secs(2);
/// How long the console's text may take to come: the program's output waits meanwhile.
const CONSOLE_WAIT: Duration = Duration::from_secs(5);

/// Whose streams these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A machine that we have started: it ends with us.
    Own,
    /// A machine that somebody has started: it outlives our losing interest.
    Attached,
    /// A program beside a machine's own.
    Executed,
}

/// What a session does.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Whose streams.
    pub(crate) subject: Subject,
    /// The machine, for signals and hints.
    pub(crate) machine: String,
    /// Whether our standard input goes to the program.
    pub(crate) stdin: bool,
    /// Whether our terminal is the program's.
    pub(crate) raw: bool,
    /// Whether the program's terminal follows the size of ours.
    pub(crate) resize: bool,
    /// No notices.
    pub(crate) quiet: bool,
    /// Ask for everything known of the machine when it starts: afterwards it may be gone.
    pub(crate) detail: bool,
    /// Show what the guest's console told of its boot, before anything else.
    pub(crate) console: bool,
    /// Count what arrives, to compare a receipt with.
    pub(crate) count: bool,
}

/// How a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The program ended.
    Exited {
        /// Its exit code.
        code: u8,
        /// Why, where that is known.
        message: Option<String>,
    },
    /// It could not start, or was lost.
    Failed(ErrorBody),
    /// The user detached.
    Detached,
    /// The reader of our output went away; with the error where it was another.
    OutputClosed(Option<std::io::Error>),
    /// The user insisted on leaving, with a signal of this number.
    Left(u8),
    /// The stream broke off.
    Lost(String),
}

/// What a session saw.
#[derive(Debug)]
pub(crate) struct Report {
    /// How it ended.
    pub(crate) end: End,
    /// When the program was said to run.
    pub(crate) started_at: Option<Instant>,
    /// When the first byte of output came.
    pub(crate) first_output_at: Option<Instant>,
    /// The machine as it was at the start.
    pub(crate) machine: Option<Machine>,
    /// Everything known of it at the start, where that was asked for.
    pub(crate) detail: Option<JoinHandle<Option<MachineDetail>>>,
    /// The receipt, or why there is none, where that was asked for.
    pub(crate) receipt: Option<Result<String, String>>,
    /// Digests of what arrived, where they were asked for.
    pub(crate) heard: Heard,
}

impl Report {
    /// The exit code, or the failure to report.
    pub(crate) fn exit_code(&self, name: &str) -> Result<u8, Failure> {
        match &self.end {
            End::Exited { code, .. } => Ok(*code),
            End::Failed(body) => Err(Failure::refused(body)),
            End::Detached => Ok(0),
            End::OutputClosed(None) => Err(Failure::silent(OUTPUT_CLOSED)),
            End::OutputClosed(Some(error)) => {
                Err(Failure::because("cannot write standard output", error))
            }
            End::Left(number) => Err(Failure::silent(128u8.saturating_add(*number))),
            End::Lost(why) => Err(Failure::because("lost the program's output", why).hint(
                format!("it may still run: `vistara ps` shows it, `vistara attach {name}` comes back to it"),
            ).lost()),
        }
    }
}

/// Waits for a request that must not be given up half-way (it may have made a machine), while signals are counted:
/// the second one leaves all the same.
pub(crate) async fn patiently<T>(
    request: impl Future<Output = T>,
    signals: &mut Signals,
    early: &mut Option<Came>,
) -> Result<T, Failure> {
    tokio::pin!(request);
    loop {
        tokio::select! {
            result = &mut request => return Ok(result),
            came = signals.next() => if let Came::End(_, number) = came {
                if early.is_some() {
                    return Err(Failure::silent(128u8.saturating_add(number)));
                }
                *early = Some(came);
            },
        }
    }
}

/// Follows a program to its end.
pub(crate) async fn follow(
    client: &Client,
    streams: Streams,
    plan: Plan,
    signals: &mut Signals,
    early: Option<Came>,
) -> Result<Report, Failure> {
    let writer = writer::start().map_err(|error| Failure::because("cannot start", error))?;
    let (controls, control_queue) = mpsc::channel(input::CONTROLS_MAX);
    let (stdin, stdin_queue) = mpsc::channel(1);
    let sending = tokio::spawn(input::send(streams.input, stdin_queue, control_queue));
    let mut session = Session {
        client: client.clone(),
        plan,
        controls,
        stdin: Some(stdin),
        typed: None,
        keys: DetachKeys::default(),
        raw: None,
        ends_asked: 0,
        left: None,
        report: Report {
            end: End::Detached,
            started_at: None,
            first_output_at: None,
            machine: None,
            detail: None,
            receipt: None,
            heard: Heard::default(),
        },
    };
    // Without input its channel stays open and silent: an end of input would be a ctrl-d on a program's terminal.
    if session.plan.stdin && !session.plan.raw {
        session.read_input()?;
    }
    if let Some(came) = early {
        session.on_signal(came);
    }
    let end = session.watch(streams.output, writer, signals).await;
    sending.abort();
    drop(session.raw.take());
    session.report.end = end?;
    Ok(session.report)
}

struct Session {
    client: Client,
    plan: Plan,
    controls: mpsc::Sender<ClientSignal>,
    /// Towards the sending task; `None` once input has ended.
    stdin: Option<mpsc::Sender<Bytes>>,
    /// From the reading thread, once it runs.
    typed: Option<mpsc::Receiver<Bytes>>,
    keys: DetachKeys,
    raw: Option<terminal::Raw>,
    ends_asked: u32,
    left: Option<u8>,
    report: Report,
}

/// What is still to be handed over before the next thing is taken.
enum Pending {
    None,
    Output(Piece),
    Over(End),
}

impl Session {
    fn read_input(&mut self) -> Result<(), Failure> {
        self.typed = Some(
            input::read_stdin()
                .map_err(|error| Failure::because("cannot read standard input", error))?,
        );
        Ok(())
    }

    /// The program runs: the terminal is its own now.
    fn on_started(&mut self) -> Result<(), Failure> {
        if self.report.started_at.is_some() {
            return Ok(());
        }
        self.report.started_at = Some(Instant::now());
        if self.plan.detail {
            let (client, machine) = (self.client.clone(), self.plan.machine.clone());
            self.report.detail = Some(tokio::spawn(
                async move { client.machine(&machine).await.ok() },
            ));
        }
        if self.plan.raw {
            self.raw = Some(
                terminal::Raw::enter()
                    .map_err(|error| Failure::because("cannot set the terminal", error))?,
            );
            self.read_input()?;
        }
        if self.plan.resize {
            if self.plan.subject == Subject::Attached {
                // A size that changes makes programs draw their screen anew, which we have not seen; as docker does.
                let mut other = terminal::size();
                other.columns = other.columns.saturating_add(1);
                let _ = self.controls.try_send(ClientSignal::Resize { size: other });
            }
            // It may have changed since the request was made.
            self.send_size();
        }
        Ok(())
    }

    /// What the guest's console told up to now, once.
    async fn show_console(&mut self) {
        self.plan.console = false;
        let asked = self.client.console(&self.plan.machine);
        let told = match tokio::time::timeout(CONSOLE_WAIT, asked).await {
            Ok(Ok(text)) => std::io::stderr().lock().write_all(&text),
            Ok(Err(error)) => return notice(&format!("cannot show the console: {error}")),
            Err(_) => return notice("cannot show the console: the node does not answer"),
        };
        // Nobody reads it: the program matters more.
        drop(told);
    }

    fn send_size(&self) {
        // Where the queue is full the program does not read; the next size will do.
        let _ = self.controls.try_send(ClientSignal::Resize {
            size: terminal::size(),
        });
    }

    fn on_signal(&mut self, came: Came) {
        match came {
            Came::Resize if self.plan.resize && self.report.started_at.is_some() => {
                self.send_size();
            }
            Came::Resize => {}
            Came::Pass(name) => self.signal_program(name),
            Came::End(name, number) => {
                self.ends_asked += 1;
                let started = self.report.started_at.is_some();
                match (
                    signals::answer(self.ends_asked, started),
                    self.plan.subject == Subject::Executed,
                ) {
                    (Answer::Forward, _) => {
                        self.signal_program(name);
                        // A hang-up has no reader any more, and a terminated one's supervisor knows what it does.
                        if name == "INT" {
                            self.say("sent INT to the program; again to stop it now");
                        }
                    }
                    (Answer::Stop, false) => {
                        self.say("stopping the machine; again to kill it");
                        self.stop("TERM");
                    }
                    (Answer::Stop, true) => self.signal_program("KILL"),
                    (Answer::Kill, false) => {
                        self.say("killing the machine");
                        self.signal_machine("KILL");
                    }
                    (Answer::Kill, true) | (Answer::Leave, _) => self.left = Some(number),
                }
            }
        }
    }

    fn say(&self, text: &str) {
        if !self.plan.quiet && (terminal::is_raw() || terminal::stdin_is_terminal()) {
            notice(text);
        }
    }

    fn signal_program(&self, name: &str) {
        if self.plan.subject == Subject::Executed {
            let _ = self.controls.try_send(ClientSignal::Signal {
                signal: name.to_owned(),
            });
        } else {
            self.signal_machine(name);
        }
    }

    /// By a request of its own, which a program that does not read its input cannot hold up.
    fn signal_machine(&self, name: &str) {
        let (client, machine) = (self.client.clone(), self.plan.machine.clone());
        let request = KillRequest {
            signal: Some(name.to_owned()),
        };
        tokio::spawn(async move {
            if let Err(error) = client.kill(&machine, &request).await {
                notice(&format!("cannot signal the program: {error}"));
            }
        });
    }

    fn stop(&self, signal: &str) {
        let (client, machine) = (self.client.clone(), self.plan.machine.clone());
        let request = StopRequest {
            grace_ms: Some(INSIST_GRACE.as_millis() as u64),
            signal: Some(signal.to_owned()),
        };
        tokio::spawn(async move {
            if let Err(error) = client.stop(&machine, &request).await {
                notice(&format!("cannot stop the machine: {error}"));
            }
        });
    }

    /// The reader of standard output is gone. What the program does about it is what it would do in a pipe of its own:
    /// SIGPIPE ends it, or it goes on for a little while.
    fn on_output_closed(&mut self) {
        match self.plan.subject {
            Subject::Own => self.stop("PIPE"),
            Subject::Executed => self.signal_program("PIPE"),
            Subject::Attached => self.left = Some(0),
        }
    }

    fn on_typed(&mut self, data: Option<Bytes>) -> (Option<Bytes>, bool) {
        let Some(data) = data else {
            self.typed = None;
            // A program that somebody else started may get more input from the next who attaches.
            if self.plan.subject != Subject::Attached {
                self.stdin = None;
            }
            return (None, false);
        };
        if !self.plan.raw {
            return (Some(data), false);
        }
        let (data, detach) = self.keys.feed(&data);
        ((!data.is_empty()).then(|| data.into()), detach)
    }

    fn on_item(&mut self, item: StreamItem) -> Result<Pending, Failure> {
        let piece = match item {
            StreamItem::Stdout(data) => Piece::Stdout(data),
            StreamItem::Stderr(data) => Piece::Stderr(data),
            StreamItem::Event(StreamEvent::Started { machine }) => {
                self.on_started()?;
                self.report.machine = Some(*machine);
                return Ok(Pending::None);
            }
            StreamItem::Event(StreamEvent::Notice { message }) => {
                if !self.plan.quiet {
                    notice(&message);
                }
                return Ok(Pending::None);
            }
            StreamItem::Event(StreamEvent::Receipt { receipt, missing }) => {
                self.report.receipt =
                    Some(receipt.ok_or_else(|| missing.unwrap_or_else(|| "none came".to_owned())));
                return Ok(Pending::None);
            }
            StreamItem::Event(StreamEvent::Exited { exit_code, message }) => {
                return Ok(Pending::Over(End::Exited {
                    code: exit_code,
                    message,
                }));
            }
            StreamItem::Event(StreamEvent::Failed { error }) => {
                return Ok(Pending::Over(End::Failed(error)));
            }
        };
        self.on_started()?;
        self.report.first_output_at.get_or_insert_with(Instant::now);
        if self.plan.count {
            match &piece {
                Piece::Stdout(bytes) => self.report.heard.stdout(bytes),
                Piece::Stderr(bytes) => self.report.heard.stderr(bytes),
            }
        }
        Ok(Pending::Output(piece))
    }

    async fn watch(
        &mut self,
        mut output: vistara_api::client::StreamsOutput,
        writer: Writer,
        signals: &mut Signals,
    ) -> Result<End, Failure> {
        let Writer { pieces, mut done } = writer;
        let mut pieces = Some(pieces);
        let mut pending = Pending::None;
        let mut to_send: Option<Bytes> = None;
        let mut detach = false;
        let mut closed: Option<Option<std::io::Error>> = None;
        let mut give_up_at: Option<tokio::time::Instant> = None;
        loop {
            if let Some(number) = self.left {
                return Ok(match closed {
                    Some(error) => End::OutputClosed(error),
                    None => End::Left(number),
                });
            }
            if detach && to_send.is_none() {
                return Ok(End::Detached);
            }
            match (&pending, &closed) {
                (Pending::Over(_), None) => pieces = None,
                (Pending::Over(_), Some(_)) => return Ok(End::OutputClosed(closed.flatten())),
                // Nobody reads it: the program must not wait for us.
                (Pending::Output(_), Some(_)) => pending = Pending::None,
                (Pending::Output(_) | Pending::None, _) => {}
            }
            let idle = matches!(pending, Pending::None);
            let waits = matches!(pending, Pending::Output(_));
            let give_up = async {
                match give_up_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                came = signals.next() => match (&pending, came) {
                    // Only our reader is slow: nobody is left to forward it to.
                    (Pending::Over(_), Came::End(_, number)) => self.left = Some(number),
                    (Pending::Over(_) | Pending::Output(_) | Pending::None, came) => self.on_signal(came),
                },
                permit = reserve(pieces.clone()), if waits => {
                    if let (Some(permit), Pending::Output(piece)) = (permit, std::mem::replace(&mut pending, Pending::None)) {
                        drop(permit.send(piece));
                    } else {
                        // The thread is gone; `done` says why.
                        pieces = None;
                    }
                }
                result = &mut done, if closed.is_none() => match result {
                    Ok(Ok(())) | Err(_) => return Ok(match pending {
                        Pending::Over(end) => end,
                        Pending::None | Pending::Output(_) => End::Lost("the output thread ended".to_owned()),
                    }),
                    Ok(Err(error)) => {
                        let broken = error.kind() == std::io::ErrorKind::BrokenPipe;
                        closed = Some((!broken).then_some(error));
                        pieces = None;
                        if self.plan.subject == Subject::Executed {
                            give_up_at = Some(tokio::time::Instant::now() + CLOSED_WAIT);
                        }
                        self.on_output_closed();
                    }
                },
                permit = reserve(self.stdin.clone()), if to_send.is_some() => {
                    match (permit, to_send.take()) {
                        (Some(permit), Some(data)) => drop(permit.send(data)),
                        // The sending task is gone with the stream, which says why itself.
                        (_, _) => self.typed = None,
                    }
                }
                data = receive(self.typed.as_mut()), if to_send.is_none() && !detach => {
                    (to_send, detach) = self.on_typed(data);
                }
                item = output.next(), if idle => pending = match item {
                    Ok(Some(item)) => {
                        if self.plan.console && matches!(item, StreamItem::Event(StreamEvent::Started { .. } | StreamEvent::Exited { .. } | StreamEvent::Failed { .. })) {
                            self.show_console().await;
                        }
                        self.on_item(item)?
                    }
                    Ok(None) => Pending::Over(End::Lost("the node closed the stream".to_owned())),
                    Err(error) => Pending::Over(End::Lost(error.to_string())),
                },
                () = give_up => return Ok(End::OutputClosed(closed.flatten())),
            }
        }
    }
}

/// A place in the queue; `None` where it is closed or absent.
async fn reserve<T>(sender: Option<mpsc::Sender<T>>) -> Option<mpsc::OwnedPermit<T>> {
    sender?.reserve_owned().await.ok()
}

/// The next piece of input; waits for ever where none is read.
async fn receive(receiver: Option<&mut mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}
