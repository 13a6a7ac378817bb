//! A receipt: what a node vouches for when a machine has ended.
//!
//! Pure data. How it is written, signed and read is `vistara-mesh`'s; `docs/formats/receipt.md` describes the form. The
//! order of the fields here is the order in which they are written and signed: it may not change within one format.

use crate::{Architecture, Digest, GrantId, Hypervisor, MachineId, NodeId};
use serde::{Deserialize, Serialize};

/// The form that this program writes and reads.
pub const RECEIPT_FORMAT: u32 = 1;
/// A command is told in clear up to so many bytes, its words together; beyond it only its digest is.
pub const COMMAND_BYTES_MAX: usize = 4096;
/// And up to so many words.
pub const COMMAND_WORDS_MAX: usize = 128;
/// Longest of the other texts: names of images, kernels, versions.
pub const TEXT_BYTES_MAX: usize = 512;
/// Digits of a nonce: 16 random bytes.
const NONCE_DIGITS: usize = 32;

/// What a node states of a machine that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`RECEIPT_FORMAT`].
    pub format: u32,
    /// Whose word it is.
    pub node: NodeId,
    /// The machine.
    pub machine: MachineId,
    /// Counts runs of its program: 1, or 2 where a run as a unikernel was undone or repeated.
    pub generation: u64,
    /// What was asked for, and by whom.
    pub request: ReceiptRequest,
    /// What ran it.
    pub ran: ReceiptRan,
    /// How it ended.
    pub end: ReceiptEnd,
    /// What it printed.
    pub output: ReceiptOutput,
    /// What it took.
    pub usage: ReceiptUsage,
    /// When.
    pub times: ReceiptTimes,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptRequest {
    /// The request's body as it was sent. Absent where no request for a run made the machine (a fork, a restored snapshot).
    pub digest: Option<Digest>,
    /// What the asker put into the request so that no other receipt could be shown for it: 32 hexadecimal digits.
    pub nonce: Option<String>,
    /// Who asked, as the connection proved; the node's own owner where absent.
    pub caller: Option<NodeId>,
    /// Under which grant of this node.
    pub grant: Option<GrantId>,
    /// The image's name.
    pub image: String,
    /// The image: the digest of its configuration, which names every layer's content.
    pub image_id: Digest,
    /// The digest of its manifest, where it came with one.
    pub manifest: Option<Digest>,
    /// For which processors the image was built, where that was known.
    pub architecture: Option<Architecture>,
    /// The program and its arguments, where they are short.
    pub command: Option<Vec<String>>,
    /// The digest of the command: SHA-256 of its words, each followed by a zero byte.
    pub command_digest: Digest,
    /// Thousandths of a processor.
    pub cpu_millis: u32,
    /// Memory of the guest in bytes.
    pub memory_bytes: u64,
    /// Size of the writable layer in bytes.
    pub disk_bytes: u64,
    /// Whether it had a network.
    pub network: bool,
    /// Whether it had standard input from a client, which no digest here covers.
    pub stdin: bool,
    /// Longest run, where one was asked for.
    pub timeout_ms: Option<u64>,
}

/// What ran it, after every choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptRan {
    /// As users name it.
    pub hypervisor: Hypervisor,
    /// The monitor.
    pub vmm: String,
    /// Its version as it was launched, where that is known.
    pub vmm_version: Option<String>,
    /// What it booted: `linux` or `nanos`.
    pub payload: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The guest's kernel by its name on the node.
    pub kernel: Option<String>,
    /// The digest of that kernel's file, where it is known to be the one.
    pub kernel_digest: Option<Digest>,
    /// The template that it was forked from, where it did not boot.
    pub template: Option<String>,
    /// The machine or snapshot that it went on from, where its program did not begin in it.
    pub parent: Option<String>,
    /// It was tried as a unikernel before, which was undone unseen.
    pub undone: bool,
    /// It is the second run of its program: what the first printed is part of the output unless that was undone.
    pub second_run: bool,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiptHow {
    /// By itself, with a code.
    Exited,
    /// By a signal.
    Signaled,
    /// The program could not be started in the guest.
    StartFailed,
    /// Somebody stopped or killed it.
    Stopped,
    /// Its time was over.
    TimedOut,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The monitor died.
    MonitorFailed,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptEnd {
    /// In a word.
    pub how: ReceiptHow,
    /// The exit code that its user got.
    pub exit_code: u8,
    /// The signal that ended the program, where one did.
    pub signal: Option<u8>,
    /// Whether the guest's kernel killed something for want of memory.
    pub out_of_memory: bool,
}

/// One stream of output as it was delivered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptStream {
    /// SHA-256 of all bytes delivered, whether the log still has them or not; absent where the node lost count of it.
    pub digest: Option<Digest>,
    /// How many bytes those were.
    pub bytes: u64,
    /// How many were lost on their way from the guest, and are in no digest.
    pub missing_bytes: u64,
}

/// What it printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptOutput {
    /// Standard output.
    pub stdout: ReceiptStream,
    /// Standard error.
    pub stderr: ReceiptStream,
    /// Whether that is all: the program's end was told after its last byte, and nothing was lost.
    pub complete: bool,
    /// The program had a terminal: both streams came as standard output.
    pub terminal: bool,
    /// Standard error came with standard output, as a unikernel's does.
    pub merged: bool,
}

/// What it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptUsage {
    /// Processor time of the monitor, its guest included, until the machine was taken down; absent where nobody looked in
    /// time. Of a machine that was kept ready or adopted, all of the monitor's life.
    pub cpu_ms: Option<u64>,
    /// Memory that the monitor held then, its guest's included.
    pub memory_bytes: Option<u64>,
    /// The most that it held at any time, where the host tells.
    pub memory_peak_bytes: Option<u64>,
    /// From the program's start to its machine's end.
    pub run_ms: u64,
}

/// When it was, in milliseconds since 1970, by the node's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptTimes {
    /// It was asked for.
    pub asked_ms: u64,
    /// Its program began; absent where it could not be started.
    pub began_ms: Option<u64>,
    /// It was over.
    pub ended_ms: u64,
}

/// Why a receipt says what none may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptFault {
    /// Another form.
    #[error("it has the form {0}, and this program reads {RECEIPT_FORMAT}")]
    Format(u32),
    /// A text is too long, or not one.
    #[error("its {0} is longer than any, or no such thing")]
    Text(&'static str),
    /// Two fields contradict each other.
    #[error("it contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl Receipt {
    /// Whether it says only what a receipt may. Whoever signs and whoever reads one asks this.
    ///
    /// # Errors
    /// [`ReceiptFault`].
    pub fn check(&self) -> Result<(), ReceiptFault> {
        if self.format != RECEIPT_FORMAT {
            return Err(ReceiptFault::Format(self.format));
        }
        let (request, ran) = (&self.request, &self.ran);
        let architecture = request.architecture.as_ref().map(|name| name.0.as_str());
        for (what, text) in [
            ("image", Some(request.image.as_str())),
            ("architecture", architecture),
            ("monitor", Some(ran.vmm.as_str())),
            ("monitor's version", ran.vmm_version.as_deref()),
            ("payload", Some(ran.payload.as_str())),
            ("accelerator", Some(ran.accelerator.as_str())),
            ("kernel", ran.kernel.as_deref()),
            ("template", ran.template.as_deref()),
            ("parent", ran.parent.as_deref()),
        ] {
            if text.is_some_and(|text| text.is_empty() || text.len() > TEXT_BYTES_MAX) {
                return Err(ReceiptFault::Text(what));
            }
        }
        if (request.nonce.as_deref()).is_some_and(|nonce| !is_nonce(nonce)) {
            return Err(ReceiptFault::Text("nonce"));
        }
        if (request.command.as_deref()).is_some_and(|command| !is_short(command)) {
            return Err(ReceiptFault::Text("command"));
        }
        self.check_sense()
    }

    fn check_sense(&self) -> Result<(), ReceiptFault> {
        let wrong = |what| Err(ReceiptFault::Contradiction(what));
        let end = self.end;
        match (end.how, end.signal) {
            (ReceiptHow::Signaled, None) => return wrong("a signal without a number"),
            (ReceiptHow::Signaled, Some(number)) if end.exit_code != number.saturating_add(128) => {
                return wrong("another exit code than its signal's");
            }
            (
                ReceiptHow::Exited
                | ReceiptHow::StartFailed
                | ReceiptHow::TimedOut
                | ReceiptHow::GuestPanic
                | ReceiptHow::MonitorFailed,
                Some(_),
            ) => return wrong("a signal that did not end it"),
            (
                ReceiptHow::Signaled
                | ReceiptHow::Stopped
                | ReceiptHow::Exited
                | ReceiptHow::StartFailed
                | ReceiptHow::TimedOut
                | ReceiptHow::GuestPanic
                | ReceiptHow::MonitorFailed,
                _,
            ) => {}
        }
        if self.times.began_ms.is_none() != (end.how == ReceiptHow::StartFailed) {
            return wrong("an end without a beginning, or the other way round");
        }
        if self.request.caller.is_none() && self.request.grant.is_some() {
            return wrong("a grant without whom it was given to");
        }
        let output = &self.output;
        for stream in [&output.stdout, &output.stderr] {
            if output.complete && (stream.missing_bytes > 0 || stream.digest.is_none()) {
                return wrong("output that is complete and is not");
            }
        }
        Ok(())
    }
}

/// Whether this is a nonce as requests have them.
pub fn is_nonce(text: &str) -> bool {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == NONCE_DIGITS && text.bytes().all(lower)
}

/// Whether a command is told in clear.
pub fn is_short(command: &[String]) -> bool {
    command.len() <= COMMAND_WORDS_MAX
        && command.iter().map(String::len).sum::<usize>() <= COMMAND_BYTES_MAX
}
