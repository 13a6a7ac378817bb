//! What is said: every message with its fields, and their encoding (postcard inside a frame's payload).
//!
//! Requests that expect one answer carry a `request` number of the host's choosing, which the answer repeats.

use crate::{GuestConfig, PAYLOAD_MAX};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;

/// A process in the guest, numbered by the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId(pub u32);

impl ProcessId {
    /// The guest's main program.
    pub const MAIN: Self = Self(0);
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which of a process's two outputs. A process on a terminal has only [`OutputStream::Stdout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OutputStream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How far each output of a process is held durably by the host: byte counts from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Offsets {
    /// Of standard output.
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// The program, looked up in `PATH` where it has no slash, and its arguments. Not empty.
    pub argv: Vec<String>,
    /// Its environment, whole; the agent adds only `PATH`, `HOME`, `HOSTNAME` and, with a terminal, `TERM`, where absent.
    pub env: Vec<(String, String)>,
    /// Working directory, made where it is missing; empty for `/`.
    pub cwd: String,
    /// As in an OCI image: empty, `name`, `uid`, `name:group` or `uid:gid`. Empty is root.
    pub user: String,
    /// Whether it runs on a terminal of its own, and of which size.
    pub tty: Option<TtySize>,
    /// Whether it has an input. Without one it reads an end of file.
    pub stdin: bool,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// How.
    pub status: ExitStatus,
    /// Whether the guest's kernel killed some process for want of memory while this one ran.
    pub oom: bool,
}

impl Exit {
    /// The code as a shell gives it: 128 and the signal's number for a killed process.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// Why a process did not start, with the exit code that users of containers know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpawnFailed {
    /// 127: no such program; 126: it cannot be executed; 125: anything else.
    pub code: u8,
    /// One line for the user.
    pub message: String,
}

impl fmt::Display for SpawnFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SpawnFailed {}

/// Where a process stands, as told to a host that (re)connects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// Which.
    pub id: ProcessId,
    /// Its process id in the guest.
    pub pid: u32,
    /// How it ended, once it has and its outputs are complete.
    pub exit: Option<Exit>,
    /// From which offsets its outputs can still be read; what is before them was acknowledged.
    pub kept_from: Offsets,
    /// How many bytes of its input the agent has.
    pub stdin_received: u64,
    /// Whether it runs on a terminal.
    pub tty: bool,
}

/// A moment in the agent's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// First instruction of the agent.
    AgentStart,
    /// The drivers that every guest needs are loaded.
    ModulesLoaded,
    /// The root file system stands.
    RootMounted,
    /// The channel to the host is open.
    ChannelOpen,
    /// The first greeting came.
    Greeted,
    /// The host's configuration is in force.
    Configured,
    /// The main program runs.
    Spawned,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AgentStart => "agent-start",
            Self::ModulesLoaded => "modules-loaded",
            Self::RootMounted => "root-mounted",
            Self::ChannelOpen => "channel-open",
            Self::Greeted => "greeted",
            Self::Configured => "configured",
            Self::Spawned => "spawned",
        })
    }
}

/// When a stage was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Which stage.
    pub stage: Stage,
    /// Microseconds since the guest's kernel started.
    pub at_us: u64,
}

/// The host's greeting. It begins a session, whose number is in the frame's header; every session before it is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The host's version, for messages.
    pub host_version: String,
}

/// The agent's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The agent's version, for messages.
    pub agent_version: String,
    /// Random number of this run of the agent: another one means that the guest has rebooted.
    pub boot: u64,
    /// Whether [`ToGuest::Configure`] has been obeyed since the guest's start.
    pub configured: bool,
    /// Every process that was spawned and not forgotten.
    pub processes: Vec<ProcessState>,
    /// The stages reached so far.
    pub timings: Vec<Mark>,
}

/// The answer to [`ToGuest::Configure`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Configured {
    /// The stages reached so far.
    pub timings: Vec<Mark>,
    /// What did not work and was not worth failing for.
    pub warnings: Vec<String>,
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// The last component of the path.
    pub name: String,
    /// Type and permissions as `st_mode` has them.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last change, in seconds since 1970.
    pub mtime: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Where a symbolic link leads, all links on the way resolved as far as they can be.
    pub link_target: Option<String>,
}

impl FileStat {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Whether it is a symbolic link.
    #[must_use]
    pub fn is_symlink(&self) -> bool {
        self.mode & 0o170_000 == 0o120_000
    }
}

/// What the guest uses, as its kernel counts it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestStats {
    /// Memory the guest has, in bytes.
    pub memory_total: u64,
    /// Memory a new program could get, in bytes.
    pub memory_available: u64,
    /// CPU time that was not idle, in microseconds, all CPUs together.
    pub cpu_busy_us: u64,
    /// CPU time since the start, in microseconds, all CPUs together.
    pub cpu_total_us: u64,
    /// Processes, kernel threads not counted.
    pub processes: u32,
    /// Bytes used in the writable part of the root file system.
    pub disk_used: u64,
    /// Bytes of the writable part of the root file system.
    pub disk_total: u64,
    /// Bytes received by all interfaces but the loopback.
    pub net_received: u64,
    /// Bytes sent by all interfaces but the loopback.
    pub net_sent: u64,
}

impl GuestStats {
    /// Memory in use, in bytes.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        self.memory_total.saturating_sub(self.memory_available)
    }
}

/// How a tar stream is unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UnpackOptions {
    /// Whether files keep the owners that the stream names; otherwise they are root's.
    pub keep_owners: bool,
    /// Whether a directory that would replace another thing, or be replaced by one, is an error.
    pub refuse_kind_change: bool,
}

/// Why the agent did not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// No such file or process.
    NotFound,
    /// A file is not of the kind that is needed, or the request makes no sense.
    Invalid,
    /// Permission denied or read-only.
    Denied,
    /// It was done already, or too much goes on.
    Busy,
    /// This guest cannot do it.
    Unsupported,
    /// Anything else.
    Failed,
}

/// The agent's refusal of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Its kind.
    pub kind: RefusalKind,
    /// One line for the user.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

/// What the host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Sets the guest up, once in its life. Answered by [`ToHost::Configured`] or [`ToHost::Refused`].
    Configure {
        /// Request number.
        request: u32,
        /// The settings.
        config: GuestConfig,
    },
    /// Starts a process. Answered by [`ToHost::Spawned`] or [`ToHost::SpawnFailed`]; its output flows at once.
    Spawn {
        /// Its number; not one that the agent still knows.
        id: ProcessId,
        /// What to run.
        spec: ProcessSpec,
    },
    /// Lets the output of a process flow in this session, from these offsets on; they are also an acknowledgement.
    Resume {
        /// Request number; answered by [`ToHost::Done`] or [`ToHost::Refused`].
        request: u32,
        /// Which process.
        id: ProcessId,
        /// What the host holds already.
        from: Offsets,
    },
    /// The host holds an output durably up to here.
    Ack {
        /// Which process.
        id: ProcessId,
        /// Which output.
        stream: OutputStream,
        /// Byte count from the output's start.
        upto: u64,
    },
    /// The input of a process ends here.
    StdinEnd {
        /// Which process.
        id: ProcessId,
    },
    /// Sends a signal: to the process, or to its whole group where it has a terminal.
    Signal {
        /// Request number; answered by [`ToHost::Done`] or [`ToHost::Refused`].
        request: u32,
        /// Which process.
        id: ProcessId,
        /// The signal.
        number: i32,
    },
    /// Changes a terminal's size.
    Resize {
        /// Request number; answered by [`ToHost::Done`] or [`ToHost::Refused`].
        request: u32,
        /// Which process.
        id: ProcessId,
        /// The size.
        size: TtySize,
    },
    /// The host has all it wants of a process that ended; its number is free again.
    Forget {
        /// Request number; answered by [`ToHost::Done`] or [`ToHost::Refused`] (while it still runs).
        request: u32,
        /// Which process.
        id: ProcessId,
    },
    /// Asks what a path leads to. Answered by [`ToHost::Stat`] or [`ToHost::Refused`].
    Stat {
        /// Request number.
        request: u32,
        /// Absolute path.
        path: String,
        /// Whether a symbolic link at its end is followed.
        follow: bool,
    },
    /// Asks for a file or a tree as a tar stream in frames of the transfer; ended by [`ToHost::TransferEnded`].
    Pack {
        /// The transfer's number, of the host's choosing.
        transfer: u32,
        /// Absolute path.
        path: String,
        /// Whether a symbolic link at its end is followed.
        follow: bool,
    },
    /// Begins a tar stream that is unpacked into a directory; ended by [`ToHost::TransferEnded`].
    Unpack {
        /// The transfer's number, of the host's choosing.
        transfer: u32,
        /// Absolute path of a directory that exists.
        path: String,
        /// How.
        options: UnpackOptions,
    },
    /// The host has consumed a transfer's bytes up to here.
    TransferAck {
        /// Which transfer.
        transfer: u32,
        /// Byte count from the start.
        upto: u64,
    },
    /// The host's stream for an [`ToGuest::Unpack`] ends here.
    TransferEnd {
        /// Which transfer.
        transfer: u32,
    },
    /// The host does not want a transfer any more. Not answered.
    TransferCancel {
        /// Which transfer.
        transfer: u32,
    },
    /// Asks what the guest uses. Answered by [`ToHost::Stats`].
    Stats {
        /// Request number.
        request: u32,
    },
    /// Ends the guest: the signal to the main process, after the grace SIGKILL to all; [`ToHost::Bye`] comes last.
    Shutdown {
        /// Milliseconds that the main process has.
        grace_ms: u32,
        /// The signal that asks it to end.
        signal: i32,
    },
    /// The host has heard [`ToHost::Bye`].
    ByeSeen,
    /// Is the agent there? Answered by [`ToHost::Done`].
    Ping {
        /// Request number.
        request: u32,
    },
    /// Before [`ToGuest::Configure`]: the guest will be captured, and others will go on from there. The agent does what
    /// any of them will need. Answered by [`ToHost::Done`].
    Prepare {
        /// Request number.
        request: u32,
        /// Absolute paths of files that will be read first; those that cannot be read now are passed over.
        read_ahead: Vec<String>,
        /// What most of those that go on from there will be told, with a host name of the same length: what of it is so is
        /// not done again. Its clock and its random bytes are not used.
        likely: GuestConfig,
    },
    /// The guest was held still for a while: its clock is wrong. Answered by [`ToHost::Done`] or [`ToHost::Refused`].
    SetClock {
        /// Request number.
        request: u32,
        /// The time, in nanoseconds since 1970.
        wall_clock_ns: u64,
    },
    /// Holds every process but the agent still, so that none runs in another machine before that one knows who it is.
    /// Answered by [`ToHost::Done`] or [`ToHost::Refused`]; after a refusal all go on.
    Freeze {
        /// Request number.
        request: u32,
    },
    /// Lets what [`ToGuest::Freeze`] held go on; nothing happens where nothing is held. Answered by [`ToHost::Done`].
    Thaw {
        /// Request number.
        request: u32,
    },
    /// This guest is another machine now, which goes on from where the captured one was held. It takes on what is here,
    /// and lets its processes go on. Answered by [`ToHost::Configured`], or [`ToHost::Refused`]: nothing goes on then.
    Renew {
        /// Request number.
        request: u32,
        /// The new machine's settings. Volumes and limits stay what they were.
        config: GuestConfig,
    },
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Answer to [`Hello`].
    Welcome(Welcome),
    /// A frame was lost or made no sense: this session is over, and the host may begin another.
    Broken {
        /// What the agent saw.
        reason: String,
    },
    /// A request was done.
    Done {
        /// Which.
        request: u32,
    },
    /// A request was not done.
    Refused {
        /// Which.
        request: u32,
        /// Why.
        refusal: Refusal,
    },
    /// The guest is set up.
    Configured {
        /// Request number.
        request: u32,
        /// How it went.
        configured: Configured,
    },
    /// A process runs.
    Spawned {
        /// Which.
        id: ProcessId,
        /// Its process id in the guest.
        pid: u32,
        /// Microseconds since the guest's kernel started.
        at_us: u64,
    },
    /// A process could not be started. The agent has forgotten its number.
    SpawnFailed {
        /// Which.
        id: ProcessId,
        /// Why.
        failed: SpawnFailed,
    },
    /// The agent takes input of a process up to here: what was written to the process, and a window.
    StdinCredit {
        /// Which.
        id: ProcessId,
        /// Byte count from the input's start.
        upto: u64,
    },
    /// The process does not read its input any more; what is still sent is thrown away.
    StdinClosed {
        /// Which.
        id: ProcessId,
    },
    /// A process ended, and all its output was sent in this session.
    Exited {
        /// Which.
        id: ProcessId,
        /// How.
        exit: Exit,
    },
    /// What a path leads to; nothing where there is no such file.
    Stat {
        /// Request number.
        request: u32,
        /// The file.
        stat: Option<FileStat>,
    },
    /// What the guest uses.
    Stats {
        /// Request number.
        request: u32,
        /// The figures.
        stats: GuestStats,
    },
    /// The agent takes bytes of a transfer up to here.
    TransferCredit {
        /// Which transfer.
        transfer: u32,
        /// Byte count from the start.
        upto: u64,
    },
    /// A transfer is complete or failed. All its bytes were sent.
    TransferEnded {
        /// Which transfer.
        transfer: u32,
        /// Why it failed.
        refusal: Option<Refusal>,
    },
    /// Everything is written; the guest is off the next moment.
    Bye,
}

/// Why bytes are not a message, or a message is not one frame's worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageError {
    /// They say something else or are cut short.
    Malformed,
    /// More than [`PAYLOAD_MAX`] bytes.
    TooLong,
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the bytes are not a message of this protocol",
            Self::TooLong => "the message is longer than a frame may be",
        })
    }
}

impl std::error::Error for MessageError {}

/// Reads a message from a frame's payload. Nothing may follow it.
///
/// # Errors
/// [`MessageError`].
pub fn decode_message<T: DeserializeOwned>(payload: &[u8]) -> Result<T, MessageError> {
    if payload.len() > PAYLOAD_MAX {
        return Err(MessageError::TooLong);
    }
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        _ => Err(MessageError::Malformed),
    }
}

/// Writes a message as a frame's payload.
///
/// # Errors
/// [`MessageError::TooLong`].
pub fn encode_message<T: Serialize>(message: &T) -> Result<Vec<u8>, MessageError> {
    let payload = postcard::to_stdvec(message).map_err(|_| MessageError::Malformed)?;
    if payload.len() > PAYLOAD_MAX {
        Err(MessageError::TooLong)
    } else {
        Ok(payload)
    }
}
