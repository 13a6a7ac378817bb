//! Byte streams with windows: what a program prints until the host holds it, and what the host sends until the program
//! has read it.
//!
//! Invariants: neither holds more than [`WINDOW`] bytes; an [`Outflow`] drops no byte that was not acknowledged, and is
//! at its end only once all was read.

use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use vistara_guest_protocol::{DATA_MAX, WINDOW};

/// The offset of some bytes, and the bytes in the two parts in which a ring buffer has them.
pub(crate) type Piece<'a> = (u64, (&'a [u8], &'a [u8]));

/// Bytes on their way to the host.
#[derive(Debug)]
pub(crate) struct Outflow {
    fd: Option<OwnedFd>,
    kept: VecDeque<u8>,
    kept_from: u64,
    sent: u64,
}

impl Outflow {
    /// A stream read from `fd`, which does not block; without one it is at its end.
    pub(crate) fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            kept: VecDeque::new(),
            kept_from: 0,
            sent: 0,
        }
    }

    /// What to wait for, while there is room for more.
    pub(crate) fn readable(&self) -> Option<&OwnedFd> {
        if self.room() > 0 {
            self.fd.as_ref()
        } else {
            None
        }
    }

    /// How much the kernel may hold of what was printed, where it is a pipe: programs can enlarge theirs.
    pub(crate) fn pipe_capacity(&self) -> Option<usize> {
        let size = rustix::pipe::fcntl_getpipe_size(self.fd.as_ref()?);
        size.ok()
    }

    fn room(&self) -> usize {
        (WINDOW as usize).saturating_sub(self.kept.len())
    }

    fn end(&self) -> u64 {
        self.kept_from + self.kept.len() as u64
    }

    /// From where bytes can still be had.
    pub(crate) fn kept_from(&self) -> u64 {
        self.kept_from
    }

    /// Whether the program cannot print any more.
    pub(crate) fn ended(&self) -> bool {
        self.fd.is_none()
    }

    /// Whether everything printed so far was sent in this session.
    pub(crate) fn all_sent(&self) -> bool {
        self.sent == self.end()
    }

    /// Whether everything printed so far was acknowledged.
    pub(crate) fn all_acknowledged(&self) -> bool {
        self.kept.is_empty()
    }

    /// Stops reading, whatever the program may still print.
    pub(crate) fn close(&mut self) {
        self.fd = None;
    }

    /// Reads what there is, as far as there is room. Says how much; nothing where there is nothing now.
    pub(crate) fn read(&mut self, scratch: &mut [u8]) -> Option<usize> {
        let fd = self.fd.as_ref()?;
        let room = self.room().min(scratch.len());
        if room == 0 {
            return None;
        }
        match rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut scratch[..room])) {
            Ok(0) => self.fd = None,
            Ok(count) => {
                self.kept.extend(&scratch[..count]);
                return Some(count);
            }
            Err(Errno::AGAIN) => {}
            // A terminal says EIO once nobody has it open any more.
            Err(_) => self.fd = None,
        }
        None
    }

    /// The next bytes to send, at most a frame's worth, and their offset.
    pub(crate) fn next(&self) -> Option<Piece<'_>> {
        let skip = (self.sent - self.kept_from) as usize;
        let (front, back) = self.kept.as_slices();
        let front_left = front.get(skip..).unwrap_or_default();
        let back_left = back
            .get(skip.saturating_sub(front.len())..)
            .unwrap_or_default();
        let first = &front_left[..front_left.len().min(DATA_MAX)];
        let second = &back_left[..back_left.len().min(DATA_MAX - first.len())];
        if first.is_empty() && second.is_empty() {
            None
        } else {
            Some((self.sent, (first, second)))
        }
    }

    /// Counts bytes as sent.
    pub(crate) fn advance(&mut self, count: usize) {
        self.sent = (self.sent + count as u64).min(self.end());
    }

    /// The host holds everything up to here. False where that cannot be.
    pub(crate) fn acknowledge(&mut self, upto: u64) -> bool {
        if upto > self.sent {
            return false;
        }
        if let Some(count) = upto.checked_sub(self.kept_from) {
            self.kept.drain(..count as usize);
            self.kept_from = upto;
        }
        true
    }

    /// Sends again from here in a new session. False where the bytes are not kept.
    pub(crate) fn resume(&mut self, from: u64) -> bool {
        let possible = from >= self.kept_from && from <= self.end();
        if possible {
            self.sent = from;
            self.acknowledge(from);
        }
        possible
    }
}

/// Bytes on their way to a program.
#[derive(Debug)]
pub(crate) struct Inflow {
    fd: Option<OwnedFd>,
    waiting: VecDeque<u8>,
    received: u64,
    granted: u64,
    ended: bool,
    close_told: bool,
}

/// What the host should hear about an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InflowNews {
    /// Send up to here.
    Credit(u64),
    /// Nobody reads any more.
    Closed,
}

impl Inflow {
    /// A stream written to `fd`, which does not block; without one, bytes are thrown away.
    pub(crate) fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            waiting: VecDeque::new(),
            received: 0,
            granted: WINDOW,
            ended: false,
            close_told: false,
        }
    }

    /// What to wait for, while something waits to be written.
    pub(crate) fn writable(&self) -> Option<&OwnedFd> {
        if self.waiting.is_empty() {
            None
        } else {
            self.fd.as_ref()
        }
    }

    /// How many bytes have come from the host.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Takes bytes from the host. False where they are not the next ones, or were not granted.
    pub(crate) fn receive(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.saturating_add(bytes.len() as u64);
        if offset != self.received || end > self.granted {
            return false;
        }
        self.received = end;
        if self.fd.is_some() && !self.ended {
            self.waiting.extend(bytes);
            self.write();
        }
        true
    }

    /// Writes what the program takes now.
    pub(crate) fn write(&mut self) {
        while let Some(fd) = &self.fd {
            let (front, _) = self.waiting.as_slices();
            if front.is_empty() {
                break;
            }
            match rustix::io::write(fd, front) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.fd = None,
            }
        }
        if self.fd.is_none() {
            self.waiting = VecDeque::new();
        } else if self.ended && self.waiting.is_empty() {
            self.fd = None;
        }
    }

    /// No more comes from the host; the program is told once it has read the rest.
    pub(crate) fn end(&mut self) {
        self.ended = true;
        self.write();
    }

    /// As [`Inflow::end`], with a last byte that says so.
    pub(crate) fn end_with(&mut self, last: u8) {
        if self.fd.is_some() && !self.ended {
            self.waiting.push_back(last);
        }
        self.end();
    }

    /// Nobody reads any more.
    pub(crate) fn close(&mut self) {
        self.fd = None;
        self.waiting = VecDeque::new();
    }

    /// What the host should hear now. Small credits are saved up, a quarter of a window at a time.
    pub(crate) fn news(&mut self) -> Option<InflowNews> {
        if self.fd.is_none() && !self.ended && !self.close_told {
            self.close_told = true;
            return Some(InflowNews::Closed);
        }
        let grant = (self.received + WINDOW).saturating_sub(self.waiting.len() as u64);
        if grant >= self.granted + WINDOW / 4 {
            Some(self.grant(grant))
        } else {
            None
        }
    }

    /// What a host that has just come must hear.
    pub(crate) fn news_for_newcomer(&mut self) -> InflowNews {
        if self.fd.is_none() {
            self.close_told = true;
            return InflowNews::Closed;
        }
        self.grant((self.received + WINDOW).saturating_sub(self.waiting.len() as u64))
    }

    fn grant(&mut self, upto: u64) -> InflowNews {
        self.granted = self.granted.max(upto);
        InflowNews::Credit(self.granted)
    }
}
