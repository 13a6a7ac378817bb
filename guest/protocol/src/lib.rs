//! The words that a node and the agent in its guest speak over one byte stream.
//!
//! Two layers, both pure functions over bytes: [`frame`] finds frames in a stream that may hold garbage, and
//! [`message`] says what is in them. Both ends treat the other as hostile: decoding never panics and never allocates
//! more than a frame's worth of memory. The wire format is described in `docs/formats/agent-protocol.md`.
//!
//! Left to others: who sends what when (the agent and the client), and what the words do to a machine (the agent).

pub mod config;
pub mod frame;
pub mod message;
#[cfg(test)]
mod tests;

pub use config::*;
pub use frame::{Decoder, Frame, FrameKind, Sequence, encode_data, encode_frame};
pub use message::*;

/// Version of the protocol. A change that an older end would misread raises it; both ends refuse any other.
pub const PROTOCOL_VERSION: u8 = 1;

/// Most payload bytes of one frame: large enough that headers cost nothing, small enough to be held for every peer.
pub const PAYLOAD_MAX: usize = 64 * 1024;

/// Most bytes of a stream in one data frame: half a payload, so that two streams take turns often.
pub const DATA_MAX: usize = 32 * 1024;

/// Bytes of one stream that may be under way without having been acknowledged. At the channel's round trip of 0.2 ms
/// this carries more than 1 GB/s, and 50 programs whose host is away hold 25 MiB at the most.
pub const WINDOW: u64 = 256 * 1024;

/// Most processes that the agent knows at a time, those included that have exited and were not forgotten yet.
pub const PROCESSES_MAX: usize = 256;

/// Most file transfers at a time; each has a thread in the guest.
pub const TRANSFERS_MAX: usize = 16;

/// Name of the virtio-serial port on which the agent listens.
pub const PORT_NAME: &str = "vistara.agent";

/// Bytes of zeros which end every frame that an earlier host may have left half written: more than any frame has.
pub const FLUSH_LEN: usize = PAYLOAD_MAX + frame::HEADER_LEN;

/// Takes any bytes as both ends would, for a fuzzer: as a stream of frames whose payloads are messages, and as a message.
/// Whatever they are, this returns.
pub fn fuzz(bytes: &[u8]) {
    let mut decoder = Decoder::new();
    for part in bytes.chunks(97) {
        decoder.push(part);
        while let Some(frame) = decoder.next_frame() {
            // Only that these return matters.
            let _ = frame.data();
            let _ = decode_message::<ToGuest>(&frame.payload);
            let _ = decode_message::<ToHost>(&frame.payload);
        }
    }
    let _ = decode_message::<Hello>(bytes);
    let _ = decode_message::<ToGuest>(bytes);
    let _ = decode_message::<ToHost>(bytes);
}
