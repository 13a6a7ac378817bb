//! What a session knows, and what each frame from the guest changes in it.
//!
//! All under one lock that is never held across a wait. Invariants: for each stream at most a window of bytes is held,
//! in at most [`PIECES_MAX`] and a few pieces; acknowledgements that were not written yet take one place for each stream.

use crate::{AgentError, OutputChunk};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use tokio::sync::{Notify, oneshot};
use vistara_guest_protocol::{
    Configured, DATA_MAX, Exit, FileStat, Frame, FrameKind, GuestStats, Offsets, OutputStream,
    PROTOCOL_VERSION, ProcessId, Refusal, Sequence, SpawnFailed, ToGuest, ToHost, WINDOW, Welcome,
    decode_message, encode_data, encode_frame,
};

/// Pieces of a process's output beyond which new bytes join the last piece of their stream instead of keeping their
/// order among the two streams: a program that writes single bytes in turns must not cost more than its bytes.
const PIECES_MAX: usize = 1024;

/// Bytes that belong to no frame after which a guest is not listened to any more: a kernel's stray messages are less.
pub(crate) const GARBAGE_MAX: u64 = 1 << 20;

/// Most bytes waiting to be written before more input is framed.
const OUT_HIGH: usize = 256 * 1024;

/// Most bytes waiting to be written at all: many times what callers ask for at once. A guest that lets more pile up does
/// not read.
const OUT_MAX: usize = 4 * 1024 * 1024;

/// What a request was answered with.
pub(crate) enum Reply {
    Done,
    Configured(Configured),
    Stat(Option<FileStat>),
    Stats(GuestStats),
}

pub(crate) type Answer = Result<Reply, Refusal>;
pub(crate) type SpawnAnswer = Result<(u32, u64), SpawnFailed>;

/// One process, as this session knows it.
pub(crate) struct ProcessState {
    pub(crate) pieces: VecDeque<OutputChunk>,
    received: Offsets,
    acknowledged: Offsets,
    pub(crate) input_sent: u64,
    pub(crate) input_granted: u64,
    pub(crate) input_closed: bool,
    pub(crate) exit: Option<Exit>,
    pub(crate) changed: Arc<Notify>,
}

impl ProcessState {
    pub(crate) fn new(from: Offsets, input_sent: u64, input_granted: u64) -> Self {
        Self {
            pieces: VecDeque::new(),
            received: from,
            acknowledged: from,
            input_sent,
            input_granted,
            input_closed: false,
            exit: None,
            changed: Arc::new(Notify::new()),
        }
    }

    /// Takes output. False where the guest may not have sent it.
    fn receive(&mut self, stream: OutputStream, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.saturating_add(bytes.len() as u64);
        let acknowledged = *place(&mut self.acknowledged, stream);
        let received = place(&mut self.received, stream);
        if offset != *received || end > acknowledged.saturating_add(WINDOW) || self.exit.is_some() {
            return false;
        }
        *received = end;
        if bytes.is_empty() {
            return true;
        }
        let last = match self.pieces.len() {
            0..PIECES_MAX => self
                .pieces
                .back_mut()
                .filter(|piece| piece.stream == stream),
            _ => self
                .pieces
                .iter_mut()
                .rev()
                .find(|piece| piece.stream == stream),
        };
        let crowded = last
            .as_ref()
            .is_some_and(|piece| piece.bytes.len() + bytes.len() > DATA_MAX);
        match last {
            Some(piece) if !crowded => piece.bytes.extend_from_slice(bytes),
            _ => self.pieces.push_back(OutputChunk {
                stream,
                offset,
                bytes: bytes.to_vec(),
            }),
        }
        true
    }
}

/// The count of one of the two streams.
fn place(offsets: &mut Offsets, stream: OutputStream) -> &mut u64 {
    match stream {
        OutputStream::Stdout => &mut offsets.stdout,
        OutputStream::Stderr => &mut offsets.stderr,
    }
}

/// One transfer, either way.
#[derive(Default)]
pub(crate) struct TransferState {
    pub(crate) pieces: VecDeque<Vec<u8>>,
    received: u64,
    consumed: u64,
    told: u64,
    pub(crate) sent: u64,
    pub(crate) granted: u64,
    pub(crate) ended: Option<Option<Refusal>>,
    pub(crate) changed: Arc<Notify>,
    pub(crate) reader: Option<Waker>,
}

impl TransferState {
    pub(crate) fn new() -> Self {
        Self {
            granted: WINDOW,
            ..Self::default()
        }
    }

    fn wake(&mut self) {
        self.changed.notify_waiters();
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn receive(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.saturating_add(bytes.len() as u64);
        if offset != self.received || end > self.told.saturating_add(WINDOW) || self.ended.is_some()
        {
            return false;
        }
        self.received = end;
        if bytes.is_empty() {
            return true;
        }
        match self.pieces.back_mut() {
            Some(piece) if piece.len() + bytes.len() <= DATA_MAX => piece.extend_from_slice(bytes),
            _ => self.pieces.push_back(bytes.to_vec()),
        }
        true
    }
}

/// What waits to be acknowledged to the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    Output(ProcessId, OutputStream),
    Transfer(u32),
}

/// Everything a session knows.
pub(crate) struct State {
    pub(crate) session: u64,
    sent: Sequence,
    received: Sequence,
    out: Vec<u8>,
    due: Vec<Due>,
    pub(crate) failure: Option<AgentError>,
    pub(crate) closing: bool,
    pub(crate) bye: bool,
    pub(crate) welcome: Option<oneshot::Sender<Welcome>>,
    pub(crate) requests: HashMap<u32, oneshot::Sender<Answer>>,
    pub(crate) spawns: HashMap<u32, oneshot::Sender<SpawnAnswer>>,
    pub(crate) processes: HashMap<u32, ProcessState>,
    pub(crate) transfers: HashMap<u32, TransferState>,
    next_number: u32,
}

impl State {
    pub(crate) fn new(session: u64, welcome: oneshot::Sender<Welcome>) -> Self {
        Self {
            session,
            sent: Sequence::new(session),
            received: Sequence::new(session),
            out: Vec::new(),
            due: Vec::new(),
            failure: None,
            closing: false,
            bye: false,
            welcome: Some(welcome),
            requests: HashMap::new(),
            spawns: HashMap::new(),
            processes: HashMap::new(),
            transfers: HashMap::new(),
            next_number: 0,
        }
    }

    /// A number for a request or a transfer that no other has.
    pub(crate) fn number(&mut self) -> u32 {
        loop {
            self.next_number = self.next_number.wrapping_add(1);
            let number = self.next_number;
            if !self.requests.contains_key(&number) && !self.transfers.contains_key(&number) {
                return number;
            }
        }
    }

    /// Whether everything has been taken to be written.
    pub(crate) fn nothing_to_write(&self) -> bool {
        self.out.is_empty()
    }

    /// Whether input may be framed now.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < OUT_HIGH
    }

    /// Puts bytes that are no frame of this session's numbering on the way.
    pub(crate) fn say_raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Puts a message on the way. Where too much waits already the session ends.
    pub(crate) fn say(&mut self, message: &ToGuest) -> Result<(), AgentError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        if self.out.len() > OUT_MAX {
            let failure = AgentError::Broken("it does not read".to_owned());
            self.fail(failure.clone());
            return Err(failure);
        }
        encode_frame(&mut self.out, FrameKind::Message, &mut self.sent, message)
            .map_err(|_| AgentError::TooLong)
    }

    /// Puts input of a process or bytes of a transfer on the way.
    pub(crate) fn say_data(&mut self, kind: FrameKind, stream: u32, offset: u64, bytes: &[u8]) {
        encode_data(
            &mut self.out,
            kind,
            &mut self.sent,
            stream,
            offset,
            (bytes, &[]),
        );
    }

    /// Takes what is to be written.
    pub(crate) fn take_out(&mut self) -> Vec<u8> {
        for due in std::mem::take(&mut self.due) {
            let message = match due {
                Due::Output(id, stream) => {
                    let Some(process) = self.processes.get_mut(&id.0) else {
                        continue;
                    };
                    ToGuest::Ack {
                        id,
                        stream,
                        upto: *place(&mut process.acknowledged, stream),
                    }
                }
                Due::Transfer(transfer) => {
                    let Some(state) = self.transfers.get_mut(&transfer) else {
                        continue;
                    };
                    state.told = state.consumed;
                    ToGuest::TransferAck {
                        transfer,
                        upto: state.consumed,
                    }
                }
            };
            // Without a failure a message of this size always goes; with one nobody listens.
            let _ = self.say(&message);
        }
        std::mem::take(&mut self.out)
    }

    /// Output is held up to here. True where the writer has something to do.
    pub(crate) fn acknowledge(&mut self, id: ProcessId, stream: OutputStream, upto: u64) -> bool {
        let Some(process) = self.processes.get_mut(&id.0) else {
            return false;
        };
        let upto = upto.min(*place(&mut process.received, stream));
        let acknowledged = place(&mut process.acknowledged, stream);
        if upto <= *acknowledged {
            return false;
        }
        *acknowledged = upto;
        self.owe(Due::Output(id, stream))
    }

    /// Bytes of a transfer were consumed. True where the writer has something to do.
    pub(crate) fn consumed(&mut self, transfer: u32, count: usize) -> bool {
        let Some(state) = self.transfers.get_mut(&transfer) else {
            return false;
        };
        state.consumed += count as u64;
        state.consumed - state.told >= WINDOW / 4 && self.owe(Due::Transfer(transfer))
    }

    fn owe(&mut self, due: Due) -> bool {
        if !self.due.contains(&due) {
            self.due.push(due);
        }
        true
    }

    /// Ends the session; the first reason stays. Everybody who waits is woken.
    pub(crate) fn fail(&mut self, error: AgentError) {
        if self.failure.is_none() {
            let off = self.bye && matches!(error, AgentError::Closed | AgentError::Io(_));
            self.failure = Some(if off { AgentError::Off } else { error });
        }
        self.welcome = None;
        self.requests.clear();
        self.spawns.clear();
        for process in self.processes.values() {
            process.changed.notify_waiters();
        }
        for transfer in self.transfers.values_mut() {
            transfer.wake();
        }
    }

    /// Acts on a frame. An error ends the session.
    pub(crate) fn frame(&mut self, frame: &Frame) -> Result<(), AgentError> {
        let broken = |what: &str| AgentError::Broken(what.to_owned());
        if frame.session != self.session {
            return Ok(());
        }
        if frame.version != PROTOCOL_VERSION {
            return Err(AgentError::Version {
                theirs: frame.version,
                ours: PROTOCOL_VERSION,
            });
        }
        if !self.received.accept(frame) {
            return Err(broken("frames were lost"));
        }
        let stream = match frame.kind {
            FrameKind::Message => {
                let message =
                    decode_message(&frame.payload).map_err(|error| broken(&error.to_string()))?;
                return self.message(message);
            }
            FrameKind::Stdout => OutputStream::Stdout,
            FrameKind::Stderr => OutputStream::Stderr,
            FrameKind::Transfer => {
                let (offset, bytes) = frame.data().ok_or_else(|| broken("short data"))?;
                // One that was cancelled may still be under way.
                let Some(transfer) = self.transfers.get_mut(&frame.stream) else {
                    return Ok(());
                };
                if !transfer.receive(offset, bytes) {
                    return Err(broken("bytes of a transfer that it may not send"));
                }
                transfer.wake();
                return Ok(());
            }
            FrameKind::Hello | FrameKind::Stdin => return Err(broken("a frame of the wrong kind")),
        };
        let (offset, bytes) = frame.data().ok_or_else(|| broken("short data"))?;
        let Some(process) = self.processes.get_mut(&frame.stream) else {
            return Ok(());
        };
        if !process.receive(stream, offset, bytes) {
            return Err(broken("output that it may not send"));
        }
        process.changed.notify_waiters();
        Ok(())
    }

    fn message(&mut self, message: ToHost) -> Result<(), AgentError> {
        match message {
            ToHost::Welcome(welcome) => {
                // Later ones answer greetings that were sent again.
                if let Some(waiting) = self.welcome.take() {
                    let _ = waiting.send(welcome);
                }
            }
            ToHost::Broken { reason } => return Err(AgentError::Broken(reason)),
            ToHost::Done { request } => self.answer(request, Ok(Reply::Done)),
            ToHost::Refused { request, refusal } => self.answer(request, Err(refusal)),
            ToHost::Configured {
                request,
                configured,
            } => {
                self.answer(request, Ok(Reply::Configured(configured)));
            }
            ToHost::Stat { request, stat } => self.answer(request, Ok(Reply::Stat(stat))),
            ToHost::Stats { request, stats } => self.answer(request, Ok(Reply::Stats(stats))),
            ToHost::Spawned { id, pid, at_us } => {
                if let Some(waiting) = self.spawns.remove(&id.0) {
                    let _ = waiting.send(Ok((pid, at_us)));
                }
            }
            ToHost::SpawnFailed { id, failed } => {
                if let Some(waiting) = self.spawns.remove(&id.0) {
                    self.processes.remove(&id.0);
                    let _ = waiting.send(Err(failed));
                }
            }
            ToHost::StdinCredit { id, upto } => self.on_process(id, |process| {
                process.input_granted = process.input_granted.max(upto);
            }),
            ToHost::StdinClosed { id } => {
                self.on_process(id, |process| process.input_closed = true)
            }
            ToHost::Exited { id, exit } => self.on_process(id, |process| {
                process.exit.get_or_insert(exit);
                process.input_closed = true;
            }),
            ToHost::TransferCredit { transfer, upto } => {
                if let Some(transfer) = self.transfers.get_mut(&transfer) {
                    transfer.granted = transfer.granted.max(upto);
                    transfer.wake();
                }
            }
            ToHost::TransferEnded { transfer, refusal } => {
                if let Some(transfer) = self.transfers.get_mut(&transfer) {
                    transfer.ended.get_or_insert(refusal);
                    transfer.wake();
                }
            }
            ToHost::Bye => {
                if !std::mem::replace(&mut self.bye, true) {
                    return self.say(&ToGuest::ByeSeen);
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: u32, answer: Answer) {
        // Whoever asked may have given up.
        if let Some(waiting) = self.requests.remove(&request) {
            let _ = waiting.send(answer);
        }
    }

    fn on_process(&mut self, id: ProcessId, change: impl FnOnce(&mut ProcessState)) {
        if let Some(process) = self.processes.get_mut(&id.0) {
            change(process);
            process.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_sends_beyond_the_window_is_found_out() {
        let mut process = ProcessState::new(Offsets::default(), 0, WINDOW);
        let full = vec![7; DATA_MAX];
        for index in 0..WINDOW / DATA_MAX as u64 {
            assert!(process.receive(OutputStream::Stdout, index * DATA_MAX as u64, &full));
        }
        assert!(!process.receive(OutputStream::Stdout, WINDOW, &[7]));
        assert!(process.receive(OutputStream::Stderr, 0, &[7]));
        assert!(
            !process.receive(OutputStream::Stderr, 0, &[7]),
            "twice the same byte"
        );
    }

    #[test]
    fn a_second_goodbye_is_not_answered() {
        let mut state = State::new(1, oneshot::channel().0);
        state.message(ToHost::Bye).unwrap();
        let answer = state.take_out();
        assert!(!answer.is_empty());
        state.message(ToHost::Bye).unwrap();
        assert!(state.take_out().is_empty());
    }

    #[test]
    fn a_guest_that_does_not_read_ends_the_session_at_a_bound() {
        let mut state = State::new(1, oneshot::channel().0);
        let question = ToGuest::Stat {
            request: 1,
            path: "x".repeat(DATA_MAX),
            follow: true,
        };
        let asked = (0..1000).take_while(|_| state.say(&question).is_ok());
        assert_eq!(asked.count(), OUT_MAX / DATA_MAX);
        assert!(matches!(state.failure, Some(AgentError::Broken(_))));
        assert!(state.take_out().len() <= OUT_MAX + 2 * DATA_MAX);
    }

    #[test]
    fn single_bytes_in_turns_cost_little_and_keep_their_places() {
        let mut process = ProcessState::new(Offsets::default(), 0, WINDOW);
        for offset in 0..5000 {
            assert!(process.receive(OutputStream::Stdout, offset, &[1]));
            assert!(process.receive(OutputStream::Stderr, offset, &[2]));
        }
        assert!(process.pieces.len() <= PIECES_MAX + 2);
        let mut next = 0;
        for piece in process
            .pieces
            .iter()
            .filter(|piece| piece.stream == OutputStream::Stderr)
        {
            assert_eq!(piece.offset, next);
            next += piece.bytes.len() as u64;
        }
        assert_eq!(next, 5000);
    }
}
