//! One process: its streams, and how far the host has been told of it.

use crate::flow::{Inflow, Outflow};
use crate::spawn::Started;
use rustix::process::{Pid, WaitStatus};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vistara_guest_protocol::{Exit, ExitStatus, Offsets, OutputStream, ProcessId, ProcessState};

/// How long an output may stay open after the process has ended, because something it left behind holds it: long
/// enough for a pipeline's last words, short enough for nobody to wonder.
const DRAIN_AFTER_EXIT: Duration = Duration::from_millis(500);

/// What a pipe holds by default, and more than a terminal does.
const PIPE_CAPACITY: usize = 64 * 1024;

/// A process that the host started and has not forgotten.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    pub(crate) pid: Pid,
    /// Readable once it has ended; only where its end is not told by signal.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) stdin: Inflow,
    pub(crate) stdout: Outflow,
    pub(crate) stderr: Outflow,
    pub(crate) terminal: Option<OwnedFd>,
    /// Whether this session's host has asked for the output.
    pub(crate) flowing: bool,
    /// Whether this session's host was told of the end.
    pub(crate) exit_told: bool,
    /// The kernel's count of kills for want of memory when it started.
    pub(crate) oom_kills_before: u64,
    exit: Option<Exit>,
    drain_until: Option<Instant>,
    /// How much of each output was not read yet of what it can have left in the kernel at its end.
    left: [usize; 2],
}

impl Process {
    pub(crate) fn new(
        id: ProcessId,
        started: Started,
        pidfd: Option<OwnedFd>,
        oom_kills: u64,
    ) -> Self {
        Self {
            id,
            pid: started.pid,
            pidfd,
            stdin: Inflow::new(started.stdin),
            stdout: Outflow::new(started.stdout),
            stderr: Outflow::new(started.stderr),
            terminal: started.terminal,
            flowing: true,
            exit_told: false,
            oom_kills_before: oom_kills,
            exit: None,
            drain_until: None,
            left: [0; 2],
        }
    }

    /// Whether it still runs.
    pub(crate) fn runs(&self) -> bool {
        self.exit.is_none()
    }

    /// How it ended, once its outputs are complete too.
    pub(crate) fn end(&self) -> Option<Exit> {
        self.exit
            .filter(|_| self.stdout.ended() && self.stderr.ended())
    }

    /// Whether the host has received, or has acknowledged, everything.
    pub(crate) fn all_sent(&self) -> bool {
        self.stdout.all_sent() && self.stderr.all_sent()
    }

    /// Whether the host holds all output durably.
    pub(crate) fn all_acknowledged(&self) -> bool {
        self.stdout.all_acknowledged() && self.stderr.all_acknowledged()
    }

    /// One of its outputs.
    pub(crate) fn output(&mut self, stream: OutputStream) -> &mut Outflow {
        match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        }
    }

    /// It has ended. What it printed last is read at once, as far as there is room.
    pub(crate) fn ended(
        &mut self,
        status: WaitStatus,
        oom: bool,
        now: Instant,
        scratch: &mut [u8],
    ) {
        let status = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ExitStatus::Code(code),
            (None, Some(signal)) => ExitStatus::Signal(signal),
            (None, None) => return,
        };
        self.exit = Some(Exit { status, oom });
        self.pidfd = None;
        self.drain_until = Some(now + DRAIN_AFTER_EXIT);
        self.stdin.close();
        for stream in [OutputStream::Stdout, OutputStream::Stderr] {
            let capacity = self.output(stream).pipe_capacity();
            self.left[stream as usize] = capacity.unwrap_or(PIPE_CAPACITY);
            while self.read(stream, scratch).is_some() {}
        }
    }

    /// Reads an output.
    pub(crate) fn read(&mut self, stream: OutputStream, scratch: &mut [u8]) -> Option<usize> {
        let count = self.output(stream).read(scratch)?;
        if self.exit.is_some() {
            let left = &mut self.left[stream as usize];
            *left = left.saturating_sub(count);
        }
        Some(count)
    }

    /// When [`Process::drain`] should be called, if it should.
    pub(crate) fn drain_at(&self) -> Option<Instant> {
        let waits = |flow: &Outflow| flow.readable().is_some();
        self.drain_until
            .filter(|_| waits(&self.stdout) || waits(&self.stderr))
    }

    /// Closes outputs that something left behind holds open. Everything printed before the end is read first.
    pub(crate) fn drain(&mut self, now: Instant, scratch: &mut [u8]) {
        if self.drain_until.is_none_or(|until| now < until) {
            return;
        }
        for stream in [OutputStream::Stdout, OutputStream::Stderr] {
            while self.output(stream).readable().is_some() {
                let all_came = self.left[stream as usize] == 0;
                if all_came || self.read(stream, scratch).is_none() {
                    self.output(stream).close();
                }
            }
        }
    }

    /// The host has no more input for it. On a terminal that is what the end-of-file character says.
    pub(crate) fn end_input(&mut self) {
        if let Some(terminal) = &self.terminal {
            let character = rustix::termios::tcgetattr(terminal)
                .map(|settings| settings.special_codes[rustix::termios::SpecialCodeIndex::VEOF]);
            self.stdin.end_with(character.unwrap_or(0x04));
        } else {
            self.stdin.end();
        }
    }

    /// A new host has come, and has not asked for anything yet.
    pub(crate) fn forget_host(&mut self) {
        self.flowing = false;
        self.exit_told = false;
    }

    /// Lets the output flow in this session. False where the offsets are not among what is kept.
    pub(crate) fn resume(&mut self, from: Offsets) -> bool {
        self.flowing = self.stdout.resume(from.stdout) && self.stderr.resume(from.stderr);
        self.flowing
    }

    /// What a new host is told.
    pub(crate) fn state(&self) -> ProcessState {
        ProcessState {
            id: self.id,
            pid: self.pid.as_raw_nonzero().get().unsigned_abs(),
            exit: self.end(),
            kept_from: Offsets {
                stdout: self.stdout.kept_from(),
                stderr: self.stderr.kept_from(),
            },
            stdin_received: self.stdin.received(),
            tty: self.terminal.is_some(),
        }
    }

    /// Sends a signal to it, or to the group in the foreground of its terminal and its own. False once it has ended.
    pub(crate) fn signal(&self, number: i32) -> std::io::Result<bool> {
        if !self.runs() {
            return Ok(false);
        }
        let pid = self.pid.as_raw_nonzero().get();
        crate::sys::kill(if self.terminal.is_some() { -pid } else { pid }, number)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
    use rustix::process::WaitOptions;
    use std::process::Command;

    /// More than the window and a pipe's usual capacity together.
    const ENLARGED: usize = 1 << 20;

    /// Sends what there is, and says how much.
    fn send(flow: &mut Outflow) -> usize {
        let mut sent = 0;
        while let Some((_, (front, back))) = flow.next() {
            let count = front.len() + back.len();
            flow.advance(count);
            sent += count;
        }
        sent
    }

    #[test]
    fn an_enlarged_pipe_is_read_to_its_end_though_something_holds_it_open_and_the_host_is_slow() {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
        fcntl_setpipe_size(&writer, ENLARGED).unwrap();
        let printed = vec![7; ENLARGED];
        assert_eq!(rustix::io::write(&writer, &printed), Ok(ENLARGED));
        #[allow(clippy::zombie_processes)] // Waited for below, by its id.
        let child = Command::new("/bin/true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        let started = Started {
            pid,
            stdin: None,
            stdout: Some(reader),
            stderr: None,
            terminal: None,
        };
        let mut process = Process::new(ProcessId(1), started, None, 0);
        let mut scratch = vec![0; 64 * 1024];
        let end = Instant::now();
        process.ended(status, false, end, &mut scratch);
        let mut received = 0;
        while process.end().is_none() {
            received += send(&mut process.stdout);
            assert!(process.stdout.acknowledge(received as u64));
            // What is still held open may go on printing, as much as it likes.
            let _ = rustix::io::write(&writer, &printed);
            process.drain(end + DRAIN_AFTER_EXIT, &mut scratch);
        }
        received += send(&mut process.stdout);
        assert!(received <= 2 * ENLARGED, "the writer holds nothing up");
        assert!(received >= ENLARGED, "{received} bytes of {ENLARGED}");
    }
}
