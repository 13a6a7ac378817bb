//! The loop: one `poll` over the host, the programs' pipes and the tar threads.
//!
//! ```text
//! no host ──(arrives)──► host without session ──Hello──► session ──Hello, other number──► next session
//!    ▲                          ▲                            │
//!    │                          └────(frame lost: Broken)────┤
//!    └──────────────────────(hang-up)────────────────────────┘
//! ```
//! A session's end takes back what belonged to it (transfers, half a frame, what was not written yet) and leaves the
//! processes alone.

mod ending;
mod requests;

use crate::flow::InflowNews;
use crate::init::Machine;
use crate::link::{Channel, Link, Received};
use crate::process::Process;
use crate::spawn::Surroundings;
use crate::transfer::{Transfer, Workers};
use crate::{Options, stats, sys};
use ending::Ending;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vistara_guest_protocol::{
    Decoder, Frame, FrameKind, Mark, OutputStream, PROTOCOL_VERSION, Sequence, Stage, ToHost,
    Welcome, decode_message, encode_data, encode_frame,
};

/// Bytes for the host beyond which no more data is framed: it keeps the way to the host short for what is urgent.
const OUT_HIGH: usize = 256 * 1024;

/// Bytes for the host beyond which nothing is read from it: one that asks and does not listen to answers must wait.
const OUT_MAX: usize = 1024 * 1024;

/// Size of one read.
const SCRATCH: usize = 64 * 1024;

/// How long nothing must have happened before work is done that nobody waits for.
const IDLE: Duration = Duration::from_millis(50);

/// Most reads from the host before the programs have their turn.
const READS_PER_TURN: usize = 8;

/// Everything the agent knows.
pub(crate) struct Server {
    link: Link,
    decoder: Decoder,
    session: Option<Session>,
    out: Vec<u8>,
    written: usize,
    processes: BTreeMap<u32, Process>,
    transfers: BTreeMap<u32, Transfer>,
    workers: Workers,
    around: Surroundings,
    machine: Option<Machine>,
    children: Option<OwnedFd>,
    configured: bool,
    boot: u64,
    timings: Vec<Mark>,
    oom_kills: u64,
    ending: Ending,
    /// Whether something may be done for which nobody waits, once.
    settle: bool,
    turn: u32,
}

/// The numbering of frames both ways.
struct Session {
    sent: Sequence,
    received: Sequence,
}

/// What a descriptor that is ready belongs to.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Arrivals,
    Link,
    Children,
    Workers,
    Exit(u32),
    Stdin(u32),
    Output(u32, OutputStream),
    TransferIn(u32),
    TransferOut(u32),
}

impl Server {
    pub(crate) fn new(
        channel: Channel,
        options: Options,
        machine: Option<Machine>,
    ) -> io::Result<Self> {
        let mut boot = [0; 8];
        // Numbers that are only to differ need not wait until the kernel's generator is seeded.
        let _ = rustix::rand::getrandom(&mut boot, rustix::rand::GetRandomFlags::INSECURE);
        let init = machine.is_some();
        let timings = machine
            .as_ref()
            .map(|machine| machine.timings.clone())
            .unwrap_or_default();
        Ok(Self {
            link: Link::new(channel),
            decoder: Decoder::new(),
            session: None,
            out: Vec::new(),
            written: 0,
            processes: BTreeMap::new(),
            transfers: BTreeMap::new(),
            workers: Workers::new()?,
            around: Surroundings {
                hostname: options.hostname,
                rlimits: Vec::new(),
                init,
            },
            children: if init {
                Some(sys::child_signals()?)
            } else {
                None
            },
            machine,
            configured: false,
            boot: u64::from_le_bytes(boot),
            timings,
            oom_kills: 0,
            ending: Ending::No,
            settle: false,
            turn: 0,
        })
    }

    /// Runs until the guest is to be switched off. The machine, where there is one, has been put in order by then.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut scratch = vec![0; SCRATCH];
        let result = loop {
            let now = Instant::now();
            if self.link.look(now) {
                self.host_arrived();
            }
            for process in self.processes.values_mut() {
                process.drain(now, &mut scratch);
            }
            self.fill();
            self.step_ending(now);
            self.flush(now);
            if matches!(self.ending, Ending::Done) || self.link.is_over() {
                break Ok(());
            }
            match self.wait(now) {
                Ok(ready) if ready.is_empty() => self.idle(),
                Ok(ready) => self.serve_ready(&ready, &mut scratch),
                Err(error) => break Err(error),
            }
        };
        for process in self.processes.values().filter(|process| process.runs()) {
            // One that has just ended needs no signal.
            let _ = sys::kill(-process.pid.as_raw_nonzero().get(), libc::SIGKILL);
            if self.machine.is_none() {
                let _ = rustix::process::waitpid(Some(process.pid), WaitOptions::empty());
            }
        }
        result
    }

    /// Records that a stage was reached.
    fn mark(&mut self, stage: Stage) {
        if !self.timings.iter().any(|mark| mark.stage == stage) {
            self.timings.push(Mark {
                stage,
                at_us: crate::init::since_boot_us(),
            });
        }
    }

    /// Nothing has happened for a while: what nobody waits for is done now.
    fn idle(&mut self) {
        if std::mem::take(&mut self.settle)
            && let Some(machine) = &mut self.machine
        {
            machine.settle();
        }
    }

    fn wait(&mut self, now: Instant) -> io::Result<Vec<(Ready, PollFlags)>> {
        let mut fds = Vec::new();
        let mut whose = Vec::new();
        let mut add = |fd, flags, ready| {
            fds.push(PollFd::new(fd, flags));
            whose.push(ready);
        };
        if let Some(fd) = self.link.arrivals() {
            add(fd, PollFlags::IN, Ready::Arrivals);
        }
        if let Some(fd) = self.link.stream() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, self.out.len() < OUT_MAX);
            flags.set(PollFlags::OUT, self.written < self.out.len());
            add(fd, flags, Ready::Link);
        }
        if let Some(fd) = &self.children {
            add(fd, PollFlags::IN, Ready::Children);
        }
        add(self.workers.bell(), PollFlags::IN, Ready::Workers);
        let mut wake_at = [self.link.look_at(), self.ending.wake_at(now)]
            .into_iter()
            .flatten()
            .min();
        for (&id, process) in &self.processes {
            if let Some(fd) = &process.pidfd {
                add(fd, PollFlags::IN, Ready::Exit(id));
            }
            if let Some(fd) = process.stdin.writable() {
                add(fd, PollFlags::OUT, Ready::Stdin(id));
            }
            if let Some(fd) = process.stdout.readable() {
                add(fd, PollFlags::IN, Ready::Output(id, OutputStream::Stdout));
            }
            if let Some(fd) = process.stderr.readable() {
                add(fd, PollFlags::IN, Ready::Output(id, OutputStream::Stderr));
            }
            wake_at = [wake_at, process.drain_at()].into_iter().flatten().min();
        }
        for (&id, transfer) in &self.transfers {
            if let Some(fd) = transfer.input.writable() {
                add(fd, PollFlags::OUT, Ready::TransferIn(id));
            }
            if let Some(fd) = transfer.out.readable() {
                add(fd, PollFlags::IN, Ready::TransferOut(id));
            }
        }
        if self.settle {
            wake_at = Some(now + IDLE);
        }
        let timeout =
            wake_at.map(|at| at.saturating_duration_since(now) + Duration::from_micros(500));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = whose.into_iter().zip(fds.iter().map(PollFd::revents));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn serve_ready(&mut self, ready: &[(Ready, PollFlags)], scratch: &mut [u8]) {
        let now = Instant::now();
        for &(whose, flags) in ready {
            match whose {
                // The next turn of the loop looks.
                Ready::Arrivals => {}
                Ready::Link => self.link_ready(flags, now, scratch),
                Ready::Children => self.reap_all(now, scratch),
                Ready::Workers => self.workers.collect(self.transfers.values_mut()),
                Ready::Exit(id) => self.reap(id, now, scratch),
                Ready::Stdin(id) => {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.stdin.write();
                    }
                }
                Ready::Output(id, stream) => {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.read(stream, scratch);
                    }
                }
                Ready::TransferIn(id) => {
                    if let Some(transfer) = self.transfers.get_mut(&id) {
                        transfer.input.write();
                    }
                }
                Ready::TransferOut(id) => {
                    if let Some(transfer) = self.transfers.get_mut(&id) {
                        transfer.out.read(scratch);
                    }
                }
            }
        }
    }

    fn link_ready(&mut self, flags: PollFlags, now: Instant, scratch: &mut [u8]) {
        if flags.contains(PollFlags::IN) {
            for _ in 0..READS_PER_TURN {
                match self.link.read(scratch) {
                    Received::Bytes(count) => {
                        self.decoder.push(&scratch[..count]);
                        while let Some(frame) = self.decoder.next_frame() {
                            self.frame(&frame);
                        }
                        if count < scratch.len() {
                            break;
                        }
                    }
                    Received::Nothing => break,
                    Received::Gone => return self.host_left(now),
                }
            }
        } else if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            self.host_left(now);
        }
    }

    fn host_arrived(&mut self) {
        self.end_session();
        self.decoder.reset();
        self.out.clear();
        self.written = 0;
        self.mark(Stage::ChannelOpen);
    }

    fn host_left(&mut self, now: Instant) {
        self.link.hang_up(now);
        self.end_session();
        self.decoder.reset();
        self.out = Vec::new();
        self.written = 0;
    }

    /// Takes back what belonged to the session. Dropping a transfer closes its pipe, at which its thread ends.
    fn end_session(&mut self) {
        self.session = None;
        self.transfers.clear();
        for process in self.processes.values_mut() {
            process.forget_host();
        }
    }

    /// Acts on one frame.
    fn frame(&mut self, frame: &Frame) {
        if frame.kind == FrameKind::Hello {
            return self.hello(frame);
        }
        let Some(session) = &mut self.session else {
            return;
        };
        if frame.session != session.received.session {
            return;
        }
        if !session.received.accept(frame) {
            return self.broken("frames were lost");
        }
        let stream = frame.stream;
        let taken = match frame.kind {
            FrameKind::Hello => true,
            FrameKind::Message => match decode_message(&frame.payload) {
                Ok(message) => return self.message(message),
                Err(_) => false,
            },
            FrameKind::Stdin => match (self.processes.get_mut(&stream), frame.data()) {
                (Some(process), Some((offset, bytes))) => process.stdin.receive(offset, bytes),
                // The process may just have been forgotten.
                (None, Some(_)) => true,
                (_, None) => false,
            },
            FrameKind::Transfer => match (self.transfers.get_mut(&stream), frame.data()) {
                (Some(transfer), Some((offset, bytes))) => transfer.input.receive(offset, bytes),
                (None, Some(_)) => true,
                (_, None) => false,
            },
            FrameKind::Stdout | FrameKind::Stderr => false,
        };
        if !taken {
            self.broken("a frame made no sense");
        }
    }

    fn hello(&mut self, frame: &Frame) {
        let known = self
            .session
            .as_ref()
            .is_some_and(|known| known.sent.session == frame.session);
        if !known {
            self.end_session();
            let session = frame.session;
            self.session = Some(Session {
                sent: Sequence::new(session),
                received: Sequence::new(session),
            });
        }
        self.mark(Stage::Greeted);
        if frame.version != PROTOCOL_VERSION {
            // The frame's own version tells the host what is wrong.
            return self.broken("the host speaks another version of the protocol");
        }
        let welcome = ToHost::Welcome(Welcome {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot: self.boot,
            configured: self.configured,
            processes: self.processes.values().map(Process::state).collect(),
            timings: self.timings.clone(),
        });
        self.say(&welcome);
        if let (Some(machine), false) = (&mut self.machine, self.configured) {
            // The answer travels while this works.
            self.written += self.link.write(&self.out[self.written..]).count();
            machine.prepare();
        }
    }

    /// Ends the session because it cannot be trusted any more.
    fn broken(&mut self, reason: &str) {
        self.say(&ToHost::Broken {
            reason: reason.to_owned(),
        });
        self.end_session();
    }

    /// Puts a message on the way to the host, if there is one.
    fn say(&mut self, message: &ToHost) {
        if let Some(session) = &mut self.session {
            let sent = encode_frame(
                &mut self.out,
                FrameKind::Message,
                &mut session.sent,
                message,
            );
            debug_assert!(sent.is_ok(), "every message of the agent is bounded");
        }
    }

    /// Puts data and news on the way to the host, each stream one frame a turn, as long as the way is short.
    fn fill(&mut self) {
        if self.session.is_none() {
            return;
        }
        self.fill_data();
        let mut news = Vec::new();
        for (&number, process) in &mut self.processes {
            if !process.flowing {
                continue;
            }
            let id = process.id;
            match process.stdin.news() {
                Some(InflowNews::Credit(upto)) => news.push(ToHost::StdinCredit { id, upto }),
                Some(InflowNews::Closed) => news.push(ToHost::StdinClosed { id }),
                None => {}
            }
            if let Some(exit) = process
                .end()
                .filter(|_| !process.exit_told && process.all_sent())
            {
                process.exit_told = true;
                news.push(ToHost::Exited { id, exit });
            }
            debug_assert_eq!(number, id.0);
        }
        self.transfers.retain(|&transfer, state| {
            if let Some(InflowNews::Credit(upto)) = state.input.news() {
                news.push(ToHost::TransferCredit { transfer, upto });
            }
            let done = state.result.is_some() && state.out.ended() && state.out.all_sent();
            if done {
                let refusal = state.result.take().and_then(Result::err);
                news.push(ToHost::TransferEnded { transfer, refusal });
            }
            !done
        });
        for message in &news {
            self.say(message);
        }
    }

    fn fill_data(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        // Beginning at another stream each time, nobody is always last.
        self.turn = self.turn.wrapping_add(1);
        let start = self.turn % u32::try_from(self.processes.len().max(1)).unwrap_or(1);
        let mut more = true;
        while more && self.out.len() - self.written < OUT_HIGH {
            more = false;
            let (later, first): (Vec<_>, Vec<_>) = self
                .processes
                .values_mut()
                .enumerate()
                .partition(|(index, _)| *index < start as usize);
            let flowing = first
                .into_iter()
                .chain(later)
                .filter(|(_, process)| process.flowing);
            let outputs = flowing.flat_map(|(_, process)| {
                let id = process.id.0;
                [
                    (FrameKind::Stdout, id, &mut process.stdout),
                    (FrameKind::Stderr, id, &mut process.stderr),
                ]
            });
            let transfers = self
                .transfers
                .iter_mut()
                .map(|(&id, state)| (FrameKind::Transfer, id, &mut state.out));
            for (kind, id, flow) in outputs.chain(transfers) {
                let Some((offset, bytes)) = flow.next() else {
                    continue;
                };
                encode_data(&mut self.out, kind, &mut session.sent, id, offset, bytes);
                let count = bytes.0.len() + bytes.1.len();
                flow.advance(count);
                more = true;
            }
        }
    }

    /// Writes to the host what it takes now.
    fn flush(&mut self, now: Instant) {
        while self.written < self.out.len() {
            match self.link.write(&self.out[self.written..]) {
                Received::Bytes(count) => self.written += count,
                Received::Nothing => break,
                Received::Gone => return self.host_left(now),
            }
            if self.written == self.out.len() {
                self.out.clear();
                self.written = 0;
                self.fill();
            }
        }
        if self.written >= OUT_HIGH {
            self.out.drain(..self.written);
            self.written = 0;
        }
    }

    /// Takes the end of one process, where ends are told by pidfd.
    fn reap(&mut self, id: u32, now: Instant, scratch: &mut [u8]) {
        let Some(pid) = self.processes.get(&id).map(|process| process.pid) else {
            return;
        };
        if let Ok(Some((_, status))) = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
            self.process_ended(pid, status, now, scratch);
        }
    }

    /// Takes the ends of all children, orphans that were left to us included.
    fn reap_all(&mut self, now: Instant, scratch: &mut [u8]) {
        if let Some(children) = &self.children {
            // Which signals came does not matter: waiting tells.
            let _ = rustix::io::read(children, &mut *scratch);
        }
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.process_ended(pid, status, now, scratch);
        }
    }

    fn process_ended(&mut self, pid: Pid, status: WaitStatus, now: Instant, scratch: &mut [u8]) {
        let found = |process: &&mut Process| process.pid == pid && process.runs();
        let Some(process) = self.processes.values_mut().find(found) else {
            return;
        };
        if self.machine.is_some() {
            self.oom_kills = stats::oom_kills();
        }
        let oom = self.oom_kills > process.oom_kills_before;
        process.ended(status, oom, now, scratch);
    }
}
