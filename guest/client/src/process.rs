//! A process in the guest: its output, its input and its end.

use crate::AgentError;
use vistara_guest_protocol::{Exit, OutputStream, ProcessId, TtySize};

/// A process in the guest. Its parts are used independently, by different tasks if need be.
#[derive(Debug)]
pub struct Process {
    /// To signal it and to wait for it. Clonable.
    pub handle: ProcessHandle,
    /// What it prints.
    pub output: Output,
    /// What it reads.
    pub input: Input,
}

/// Controls a process and waits for its end. Clones are the same process.
#[derive(Debug, Clone)]
pub struct ProcessHandle {}

impl ProcessHandle {
    /// Its number on the channel.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        ProcessId::MAIN
    }

    /// Its process id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        0
    }

    /// When it was spawned, in microseconds since the guest's kernel started; 0 for one that was resumed.
    #[must_use]
    pub fn spawned_at_us(&self) -> u64 {
        0
    }

    /// Says that an output is stored durably up to here, which lets the guest forget it and send more. Amounts may come
    /// in any order; the greatest counts. Nothing happens for more than was received.
    pub fn ack(&self, stream: OutputStream, upto: u64) {
        let _ = (stream, upto);
    }

    /// Sends a signal to it, or to its whole group where it has a terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn signal(&self, number: i32) -> Result<(), AgentError> {
        let _ = number;
        Err(AgentError::Closed)
    }

    /// Changes its terminal's size.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where it has no terminal.
    pub async fn resize(&self, size: TtySize) -> Result<(), AgentError> {
        let _ = size;
        Err(AgentError::Closed)
    }

    /// Waits for its end. All its output has been received by then, though perhaps not yet been taken from [`Output`].
    ///
    /// # Errors
    /// [`AgentError`] where the session ends first; the agent keeps the answer for the next session.
    pub async fn exited(&self) -> Result<Exit, AgentError> {
        Err(AgentError::Closed)
    }

    /// Has the agent forget it, once it has ended and everything about it is stored.
    ///
    /// # Errors
    /// [`AgentError::Refused`] while it runs.
    pub async fn forget(&self) -> Result<(), AgentError> {
        Err(AgentError::Closed)
    }
}

/// Bytes of an output, in order and without gaps for each stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputChunk {
    /// Which output.
    pub stream: OutputStream,
    /// Where its bytes begin, counted from the output's start.
    pub offset: u64,
    /// The bytes; never empty.
    pub bytes: Vec<u8>,
}

/// What a process prints. Unread and unacknowledged output is held up to a window for each stream, beyond which the
/// process waits. Dropping it leaves what was not acknowledged for a later session.
#[derive(Debug)]
pub struct Output {}

impl Output {
    /// The next bytes of either output; nothing once the process has ended and all was taken, or the session is over
    /// ([`ProcessHandle::exited`] tells which). Can be cancelled without loss.
    pub async fn next(&mut self) -> Option<OutputChunk> {
        None
    }

    /// As [`ProcessHandle::ack`].
    pub fn ack(&self, stream: OutputStream, upto: u64) {
        let _ = (stream, upto);
    }
}

/// What a process reads.
#[derive(Debug)]
pub struct Input {}

impl Input {
    /// How many bytes of the input have been sent since the process began, over all sessions.
    #[must_use]
    pub fn offset(&self) -> u64 {
        0
    }

    /// Sends bytes, waiting while the process does not read. Bytes for a process that has ended or closed its input are
    /// taken and thrown away, as `false` tells. Where the future is cancelled, [`Input::offset`] tells how much was sent.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<bool, AgentError> {
        let _ = bytes;
        Err(AgentError::Closed)
    }

    /// Ends the input. On a terminal, as the end-of-file character does. Dropping without it leaves the input open.
    pub async fn close(self) {}
}
