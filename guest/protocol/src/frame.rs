//! Frames in a byte stream: how they are written, and how they are found again among garbage.
//!
//! A frame is a header of [`HEADER_LEN`] bytes and a payload. All numbers are little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `F5 56 41 9B` (no UTF-8 text holds it) |
//! | 4 | 1 | protocol version |
//! | 5 | 1 | kind |
//! | 6 | 2 | header check: the low 16 bits of the CRC-32 of these 28 bytes with zeros here |
//! | 8 | 8 | session |
//! | 16 | 4 | sequence number in this session and direction |
//! | 20 | 4 | stream: the number of a process or transfer, else zero |
//! | 24 | 4 | payload length |
//! | 28 | 4 | CRC-32 of the 28 bytes before it and of the payload |
//!
//! The header has a check of its own so that garbage costs no more than its headers: only behind one that is right is a
//! payload looked at. Against a sender that makes such headers on purpose, [`Decoder::distrustful`] bears few.
//!
//! Invariants: a [`Decoder`] yields only frames whose checksum holds, holds at most one frame's bytes and what one
//! [`Decoder::push`] brought, and never skips a whole frame that follows garbage (unless it has given up).

use crate::{MessageError, PAYLOAD_MAX, PROTOCOL_VERSION, encode_message};
use serde::Serialize;

/// Bytes before the payload.
pub const HEADER_LEN: usize = 32;

const MAGIC: [u8; 4] = [0xF5, 0x56, 0x41, 0x9B];

/// Where the header's own check stands.
const CHECK: std::ops::Range<usize> = 6..8;

/// How much of the header the checks cover.
const CHECKED_LEN: usize = HEADER_LEN - 4;

/// Frames with a right header and a wrong payload that a distrustful decoder bears. An honest sender makes one when it
/// dies in the middle of a frame; each costs a checksum over a payload.
const BAD_FRAMES_MAX: u32 = 16;

/// The header's check, of its first bytes with whatever stands in the check's place.
fn header_check(header: &[u8]) -> [u8; 2] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..CHECK.start]);
    crc.update(&[0; 2]);
    crc.update(&header[CHECK.end..CHECKED_LEN]);
    let [low, high, ..] = crc.finalize().to_le_bytes();
    [low, high]
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// [`crate::Hello`]: begins a session.
    Hello = 1,
    /// [`crate::ToGuest`] or [`crate::ToHost`].
    Message = 2,
    /// Input of a process.
    Stdin = 3,
    /// Standard output of a process.
    Stdout = 4,
    /// Standard error of a process.
    Stderr = 5,
    /// Bytes of a transfer.
    Transfer = 6,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Message,
            3 => Self::Stdin,
            4 => Self::Stdout,
            5 => Self::Stderr,
            6 => Self::Transfer,
            _ => return None,
        })
    }
}

/// One whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Protocol version of the sender; kinds are known only for ours.
    pub version: u8,
    /// What it carries.
    pub kind: FrameKind,
    /// Session it belongs to.
    pub session: u64,
    /// Its number among the frames of its session and direction.
    pub sequence: u32,
    /// Process or transfer, for data.
    pub stream: u32,
    /// What it says.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Offset and bytes of a data frame; nothing where it is too short.
    #[must_use]
    pub fn data(&self) -> Option<(u64, &[u8])> {
        let (offset, bytes) = self.payload.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*offset), bytes))
    }
}

/// Numbers the frames of one session in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// The session.
    pub session: u64,
    next: u32,
}

impl Sequence {
    /// The start of a session.
    #[must_use]
    pub fn new(session: u64) -> Self {
        Self { session, next: 0 }
    }

    /// The next frame's number. It wraps round.
    pub fn take(&mut self) -> u32 {
        let number = self.next;
        self.next = number.wrapping_add(1);
        number
    }

    /// Whether a frame is the next one that should arrive; counts it if so.
    pub fn accept(&mut self, frame: &Frame) -> bool {
        let right = frame.session == self.session && frame.sequence == self.next;
        if right {
            self.next = self.next.wrapping_add(1);
        }
        right
    }
}

/// Appends a frame to `out`. `parts` together are the payload.
fn write_frame(
    out: &mut Vec<u8>,
    kind: FrameKind,
    session: u64,
    sequence: u32,
    stream: u32,
    parts: [&[u8]; 3],
) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    debug_assert!(length <= PAYLOAD_MAX, "callers bound their payloads");
    let start = out.len();
    out.reserve(HEADER_LEN + length);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[PROTOCOL_VERSION, kind as u8, 0, 0]);
    out.extend_from_slice(&session.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&stream.to_le_bytes());
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    let header = &mut out[start..];
    let check = header_check(header);
    header[CHECK].copy_from_slice(&check);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&out[start..]);
    for part in parts {
        crc.update(part);
    }
    out.extend_from_slice(&crc.finalize().to_le_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends a message in a frame to `out`. On an error nothing is appended and no number is used up.
///
/// # Errors
/// [`MessageError::TooLong`].
pub fn encode_frame<T: Serialize>(
    out: &mut Vec<u8>,
    kind: FrameKind,
    sequence: &mut Sequence,
    message: &T,
) -> Result<(), MessageError> {
    let payload = encode_message(message)?;
    write_frame(
        out,
        kind,
        sequence.session,
        sequence.take(),
        0,
        [&payload, &[], &[]],
    );
    Ok(())
}

/// Appends bytes of a stream to `out` as one frame; they are at most [`crate::DATA_MAX`]. They come in two parts because
/// a ring buffer has them so.
pub fn encode_data(
    out: &mut Vec<u8>,
    kind: FrameKind,
    sequence: &mut Sequence,
    stream: u32,
    offset: u64,
    bytes: (&[u8], &[u8]),
) {
    write_frame(
        out,
        kind,
        sequence.session,
        sequence.take(),
        stream,
        [&offset.to_le_bytes(), bytes.0, bytes.1],
    );
}

/// Finds frames in a stream.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    skipped: u64,
    bad: u32,
    bad_max: Option<u32>,
}

impl Decoder {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one for a sender that may mean harm: after a few frames with a right header and a wrong payload it gives
    /// up and yields nothing more.
    #[must_use]
    pub fn distrustful() -> Self {
        Self {
            bad_max: Some(BAD_FRAMES_MAX),
            ..Self::default()
        }
    }

    /// Whether it yields nothing any more.
    #[must_use]
    pub fn has_given_up(&self) -> bool {
        self.bad_max.is_some_and(|max| self.bad > max)
    }

    /// Takes bytes as they arrived. Call [`Decoder::next_frame`] until it has no more before the next push.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Forgets a frame that has begun: its sender is gone.
    pub fn reset(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }

    /// Bytes held because they may be the beginning of a frame.
    #[must_use]
    pub fn held(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Bytes that belonged to no frame so far.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn skip(&mut self, count: usize) {
        self.start += count;
        self.skipped = self.skipped.saturating_add(count as u64);
    }

    /// The next whole frame, or nothing until more bytes come.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let rest = self.buffer.get(self.start..)?;
            if self.has_given_up() {
                let length = rest.len();
                self.skip(length);
                return None;
            }
            let Some(found) = rest.iter().position(|byte| *byte == MAGIC[0]) else {
                let length = rest.len();
                self.skip(length);
                return None;
            };
            if found > 0 {
                self.skip(found);
                continue;
            }
            let shown = rest.len().min(MAGIC.len());
            if rest[..shown] != MAGIC[..shown] {
                self.skip(1);
                continue;
            }
            let (header, body) = rest.split_first_chunk::<HEADER_LEN>()?;
            let Some(parsed) = Header::parse(header) else {
                self.skip(1);
                continue;
            };
            let payload = body.get(..parsed.length)?;
            let mut crc = crc32fast::Hasher::new();
            crc.update(&header[..CHECKED_LEN]);
            crc.update(payload);
            if crc.finalize() != parsed.crc {
                self.bad = self.bad.saturating_add(1);
                self.skip(1);
                continue;
            }
            let payload = payload.to_vec();
            self.start += HEADER_LEN + parsed.length;
            let Header {
                version,
                kind,
                session,
                sequence,
                stream,
                ..
            } = parsed;
            return Some(Frame {
                version,
                kind,
                session,
                sequence,
                stream,
                payload,
            });
        }
    }
}

struct Header {
    version: u8,
    kind: FrameKind,
    session: u64,
    sequence: u32,
    stream: u32,
    length: usize,
    crc: u32,
}

impl Header {
    /// Reads a header whose magic was checked; nothing where its check is wrong or a field cannot be.
    fn parse(header: &[u8; HEADER_LEN]) -> Option<Self> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(*header.get(at..)?.first_chunk()?))
        };
        let length = word(24)? as usize;
        if length > PAYLOAD_MAX || header[CHECK] != header_check(header) {
            return None;
        }
        Some(Self {
            version: header[4],
            kind: FrameKind::from_byte(header[5])?,
            session: u64::from_le_bytes(*header[8..].first_chunk()?),
            sequence: word(16)?,
            stream: word(20)?,
            length,
            crc: word(28)?,
        })
    }
}
