//! The agent in a Linux guest: it runs programs for the host and keeps their output until the host holds it.
//!
//! As PID 1 ([`Options::init`]) it also sets the guest up and switches it off. Without, it is a library that runs plain
//! host processes, for tests and for a fake monitor.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

/// Where the host comes from.
#[derive(Debug)]
pub struct Channel {}

/// Makes connections to an agent that was given the other half.
#[derive(Debug, Clone)]
pub struct Connector {}

impl Connector {
    /// A new connection, which replaces the one before it.
    ///
    /// # Errors
    /// Where the system has no more descriptors, or [`serve`] has returned.
    pub fn connect(&self) -> io::Result<UnixStream> {
        Err(io::ErrorKind::NotConnected.into())
    }
}

impl Channel {
    /// Connections made within this process.
    ///
    /// # Errors
    /// Where the system has no more descriptors.
    pub fn in_process() -> io::Result<(Connector, Self)> {
        Ok((Connector {}, Self {}))
    }

    /// Connections to a socket; a new one replaces the one before it.
    ///
    /// # Errors
    /// Where the socket cannot be used.
    pub fn listener(listener: UnixListener) -> io::Result<Self> {
        drop(listener);
        Ok(Self {})
    }
}

/// What the agent may do to the machine it runs on.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether it is PID 1 of a guest: configures it, reaps orphans, and switches it off at the end.
    pub init: bool,
}

/// Serves hosts until one of them asks for a shutdown, or all [`Connector`]s are gone with the connection; every process
/// it started is killed then. It blocks: give it a thread of its own.
///
/// # Errors
/// Where the system refuses what nothing works without.
pub fn serve(channel: Channel, options: Options) -> io::Result<()> {
    let _ = (channel, options);
    Ok(())
}
