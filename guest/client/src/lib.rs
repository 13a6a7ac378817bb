//! The host's end of the channel to a guest's agent.
//!
//! [`connect`] greets the agent and gives an [`Agent`] to ask things of, and [`Process`]es whose output can be read and
//! acknowledged. A session ends with its stream; the processes in the guest go on, and another [`connect`] on another
//! stream takes them up again with [`Agent::resume`], without a lost or doubled byte.
//!
//! The guest is hostile: whatever it sends, nothing here panics, waits for ever without [`Agent::closed`] being able to
//! tell why, or holds more than a window of bytes for each stream. A consumer that does not read holds up only its own
//! stream.
//!
//! Left to others: when to reconnect, where output is stored, and what an exit means (the node).

mod agent;
mod error;
mod process;
mod session;
mod state;
mod transfer;

pub use agent::{Agent, ConnectOptions, connect};
pub use error::{AgentError, SpawnError};
pub use process::{Input, Output, OutputChunk, Process, ProcessHandle};
pub use transfer::ArchiveReader;
pub use vistara_guest_protocol::{
    Configured, Exit, ExitStatus, FileStat, GuestConfig, GuestStats, HostEntry, Mark,
    NetworkConfig, Offsets, OutputStream, PROTOCOL_VERSION, ProcessId, ProcessSpec, ProcessState,
    Refusal, RefusalKind, Rlimit, SpawnFailed, Stage, TtySize, UnpackOptions, VolumeMount, Welcome,
};
