//! The agent in a Linux guest: it runs programs for the host and keeps their output until the host holds it.
//!
//! As PID 1 (the program of this package) it also sets the guest up and switches it off: [`init`]. Without, [`serve`] is
//! a library that runs plain host processes, for tests and for a fake monitor.
//!
//! Invariants: one thread and one loop own everything, and only tar streams have threads of their own. Whatever the
//! host sends, nothing panics, and no more than a window is held for each stream. A host that goes away harms nothing:
//! programs run on until their output windows are full, and the next host takes everything up.

mod files;
mod flow;
pub mod init;
mod link;
mod process;
mod server;
mod spawn;
mod stats;
mod sys;
mod transfer;
mod users;

pub use link::{Channel, Connector};

use std::io;

/// What the agent may do to the machine it runs on.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Name of the machine that processes find in `HOSTNAME` until a host configures another.
    pub hostname: String,
}

/// Serves hosts until one of them asks for a shutdown, or until no host is here and none can come (all [`Connector`]s
/// dropped). Every process it started is killed then. It blocks: give it a thread of its own.
///
/// # Errors
/// Where the system refuses what nothing works without.
pub fn serve(channel: Channel, options: Options) -> io::Result<()> {
    server::Server::new(channel, options, None)?.run()
}
