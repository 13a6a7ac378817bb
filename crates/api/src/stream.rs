//! A program's standard streams over a WebSocket (`…/attach` and `…/exec`).
//!
//! The client's first message is text: an [`crate::AttachRequest`] or [`crate::ExecRequest`]. After it,
//! - binary, client to node: bytes for standard input;
//! - text, client to node: a [`ClientSignal`];
//! - binary, node to client: one byte, 1 for standard output or 2 for standard error, then the program's bytes;
//! - text, node to client: a [`StreamEvent`]; after `exited` or `failed` the node closes.
//!
//! Closing early detaches from an attached program and hangs up (SIGHUP, then SIGKILL) an executed one with a terminal;
//! one without a terminal goes on.

use crate::types::{ErrorBody, Machine, TerminalSize};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// First byte of a binary message that carries standard output.
pub const STDOUT: u8 = 1;
/// First byte of a binary message that carries standard error.
pub const STDERR: u8 = 2;

/// Largest message either side accepts, in bytes. Output and input are cut to 64 KiB pieces; requests are small.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// What a client says beside standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum ClientSignal {
    /// Standard input has ended.
    CloseStdin,
    /// The terminal has a new size.
    Resize {
        /// The size.
        size: TerminalSize,
    },
    /// Send this signal (name or number) to the program.
    Signal {
        /// The signal.
        signal: String,
    },
}

/// What the node says beside output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum StreamEvent {
    /// The program runs now (sent once, at once if it ran already).
    Started {
        /// The machine as it is.
        machine: Box<Machine>,
    },
    /// Something the user should hear of while the program runs (a full disk, a gap in the output).
    Notice {
        /// In words.
        message: String,
    },
    /// The receipt of the machine, which has ended (only where the client asked for it; right before the end is told).
    Receipt {
        /// As its node signed it.
        receipt: Option<String>,
        /// Why there is none.
        missing: Option<String>,
    },
    /// The program has ended; every byte of its output has been sent.
    Exited {
        /// The exit code.
        exit_code: u8,
        /// Why, where the code alone does not say.
        message: Option<String>,
    },
    /// It could not be started, or was lost.
    Failed {
        /// How.
        error: ErrorBody,
    },
}
