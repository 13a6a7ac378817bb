//! A process in the guest: its output, its input and its end.

use crate::AgentError;
use crate::session::Session;
use crate::state::{ProcessState, Reply};
use std::sync::Arc;
use tokio::sync::Notify;
use vistara_guest_protocol::{
    DATA_MAX, Exit, FrameKind, OutputStream, ProcessId, Refusal, RefusalKind, ToGuest, TtySize,
};

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

impl Process {
    pub(crate) fn new(session: &Arc<Session>, id: ProcessId, pid: u32, spawned_at_us: u64) -> Self {
        let handle = ProcessHandle {
            session: Arc::clone(session),
            id,
            pid,
            spawned_at_us,
        };
        let output = Output {
            handle: handle.clone(),
        };
        let input = Input {
            handle: handle.clone(),
        };
        Self {
            handle,
            output,
            input,
        }
    }
}

/// Controls a process and waits for its end. Clones are the same process.
#[derive(Debug, Clone)]
pub struct ProcessHandle {
    session: Arc<Session>,
    id: ProcessId,
    pid: u32,
    spawned_at_us: u64,
}

/// What a look at a process gave.
enum Look<T> {
    Found(T),
    /// Look again when this wakes.
    Wait(Arc<Notify>),
}

impl ProcessHandle {
    /// Its number on the channel.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Its process id in the guest; 0 for one that was resumed, whose id the welcome told.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it was spawned, in microseconds since the guest's kernel started; 0 for one that was resumed.
    #[must_use]
    pub fn spawned_at_us(&self) -> u64 {
        self.spawned_at_us
    }

    /// Says that an output is stored durably up to here, which lets the guest forget it and send more. Amounts may come
    /// in any order; the greatest counts. More than was received counts as what was received.
    pub fn ack(&self, stream: OutputStream, upto: u64) {
        if self
            .session
            .shared
            .lock()
            .acknowledge(self.id, stream, upto)
        {
            self.session.shared.to_write.notify_one();
        }
    }

    /// Sends a signal to it, or to its whole group where it has a terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn signal(&self, number: i32) -> Result<(), AgentError> {
        let id = self.id;
        self.ask(|request| ToGuest::Signal {
            request,
            id,
            number,
        })
        .await
    }

    /// Changes its terminal's size.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where it has no terminal.
    pub async fn resize(&self, size: TtySize) -> Result<(), AgentError> {
        let id = self.id;
        self.ask(|request| ToGuest::Resize { request, id, size })
            .await
    }

    async fn ask(&self, message: impl FnOnce(u32) -> ToGuest) -> Result<(), AgentError> {
        match self.session.ask(message).await? {
            Reply::Done => Ok(()),
            Reply::Configured(_) | Reply::Stat(_) | Reply::Stats(_) => Err(AgentError::Broken(
                "an answer to another question".to_owned(),
            )),
        }
    }

    /// Waits for its end. All its output has been received by then, though perhaps not yet been taken from [`Output`].
    ///
    /// # Errors
    /// [`AgentError`] where the session ends first; the agent keeps the answer for the next session.
    pub async fn exited(&self) -> Result<Exit, AgentError> {
        self.wait_for(|process| process.exit.map(Ok), Err).await
    }

    /// Has the agent forget it, once it has ended and everything about it is stored.
    ///
    /// # Errors
    /// [`AgentError::Refused`] while it runs.
    pub async fn forget(&self) -> Result<(), AgentError> {
        let id = self.id;
        self.ask(|request| ToGuest::Forget { request, id }).await?;
        let mut state = self.session.shared.lock();
        if let Some(process) = state.processes.remove(&id.0) {
            process.changed.notify_waiters();
        }
        Ok(())
    }

    /// Waits until `look` finds something in the process's state; once the session is over it looks a last time.
    async fn wait_for<T>(
        &self,
        mut look: impl FnMut(&mut ProcessState) -> Option<T>,
        over: impl FnOnce(AgentError) -> T,
    ) -> T {
        loop {
            let changed = match self.look(&mut look) {
                Look::Found(Ok(found)) => return found,
                Look::Found(Err(error)) => return over(error),
                Look::Wait(changed) => changed,
            };
            let notified = changed.notified();
            tokio::pin!(notified);
            // Listening first, looking then: what happens in between is not missed.
            notified.as_mut().enable();
            match self.look(&mut look) {
                Look::Found(Ok(found)) => return found,
                Look::Found(Err(error)) => return over(error),
                Look::Wait(_) => notified.await,
            }
        }
    }

    fn look<T>(
        &self,
        look: &mut impl FnMut(&mut ProcessState) -> Option<T>,
    ) -> Look<Result<T, AgentError>> {
        let mut state = self.session.shared.lock();
        let failure = state.failure.clone();
        let Some(process) = state.processes.get_mut(&self.id.0) else {
            let message = format!("process number {} was forgotten", self.id);
            let refusal = Refusal {
                kind: RefusalKind::NotFound,
                message,
            };
            return Look::Found(Err(failure.unwrap_or(AgentError::Refused(refusal))));
        };
        match (look(process), failure) {
            (Some(found), _) => Look::Found(Ok(found)),
            (None, Some(failure)) => Look::Found(Err(failure)),
            (None, None) => Look::Wait(Arc::clone(&process.changed)),
        }
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

impl OutputChunk {
    /// Where its bytes end: what to acknowledge once they are stored.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

/// What a process prints. Unread and unacknowledged output is held up to a window for each stream, beyond which the
/// process waits. Dropping it leaves what was not acknowledged for a later session.
#[derive(Debug)]
pub struct Output {
    handle: ProcessHandle,
}

impl Output {
    /// The next bytes of either output; nothing once the process has ended and all was taken, or the session is over
    /// ([`ProcessHandle::exited`] tells which). Can be cancelled without loss.
    pub async fn next(&mut self) -> Option<OutputChunk> {
        let look = |process: &mut ProcessState| match process.pieces.pop_front() {
            Some(piece) => Some(Some(piece)),
            None => process.exit.map(|_| None),
        };
        self.handle.wait_for(look, |_| None).await
    }

    /// As [`ProcessHandle::ack`].
    pub fn ack(&self, stream: OutputStream, upto: u64) {
        self.handle.ack(stream, upto);
    }
}

/// What a process reads.
#[derive(Debug)]
pub struct Input {
    handle: ProcessHandle,
}

impl Input {
    /// How many bytes of the input have been sent since the process began, over all sessions. Of an earlier session
    /// only those count that the agent has.
    #[must_use]
    pub fn offset(&self) -> u64 {
        let state = self.handle.session.shared.lock();
        state
            .processes
            .get(&self.handle.id.0)
            .map_or(0, |process| process.input_sent)
    }

    /// Sends bytes, waiting while the process does not read. Bytes for a process that has ended or closed its input are
    /// taken and thrown away, as `false` tells. Where the future is cancelled, [`Input::offset`] tells how much was sent.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<bool, AgentError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let may_send = |process: &mut ProcessState| {
                let room = process.input_granted.saturating_sub(process.input_sent);
                if process.input_closed {
                    Some(Ok(None))
                } else {
                    (room > 0).then_some(Ok(Some(room)))
                }
            };
            let Some(room) = self.handle.wait_for(may_send, Err).await? else {
                return Ok(false);
            };
            if !self.send(&mut rest, room) {
                self.wait_for_room().await?;
            }
        }
        Ok(true)
    }

    /// Puts as much on the way as may be. False where the channel is full.
    fn send(&self, rest: &mut &[u8], room: u64) -> bool {
        let shared = &self.handle.session.shared;
        let id = self.handle.id.0;
        let mut state = shared.lock();
        if !state.has_room() {
            return false;
        }
        let Some(process) = state.processes.get_mut(&id) else {
            return true;
        };
        let count = rest
            .len()
            .min(DATA_MAX)
            .min(usize::try_from(room).unwrap_or(DATA_MAX));
        let (now, later) = rest.split_at(count);
        let offset = process.input_sent;
        process.input_sent += count as u64;
        state.say_data(FrameKind::Stdin, id, offset, now);
        drop(state);
        shared.to_write.notify_one();
        *rest = later;
        true
    }

    async fn wait_for_room(&self) -> Result<(), AgentError> {
        self.handle.session.shared.room().await
    }

    /// Ends the input. On a terminal, as the end-of-file character does. Dropping without it leaves the input open.
    pub async fn close(self) {
        let shared = &self.handle.session.shared;
        // Where the session is over, the next one's input can be closed.
        let _ = shared.lock().say(&ToGuest::StdinEnd { id: self.handle.id });
        shared.to_write.notify_one();
    }
}
