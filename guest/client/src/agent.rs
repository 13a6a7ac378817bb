//! The handle to an agent, and how a session begins.

use crate::{AgentError, ArchiveReader, Process, SpawnError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use vistara_guest_protocol::{
    Configured, FileStat, GuestConfig, GuestStats, Offsets, ProcessId, ProcessSpec, UnpackOptions,
    Welcome,
};

/// How patiently a session is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectOptions {
    /// How long the agent may take to answer; the guest may still be booting.
    pub hello_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(60),
        }
    }
}

/// Begins a session: greets the agent until it answers.
///
/// # Errors
/// [`AgentError::Silent`] after the timeout, or what became of the stream.
pub async fn connect(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    options: ConnectOptions,
) -> Result<(Agent, Welcome), AgentError> {
    let _ = (stream, options);
    Err(AgentError::Closed)
}

/// A session with an agent. Clones are the same session; it ends when the last of them, and of the [`Process`]es and
/// [`ArchiveReader`]s that came from it, is dropped. Nothing in the guest ends with it.
#[derive(Debug, Clone)]
pub struct Agent {}

impl Agent {
    /// Sets the guest up. Once in a guest's life; [`Welcome::configured`] tells whether it has been done.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure(&self, config: GuestConfig) -> Result<Configured, AgentError> {
        let _ = config;
        Err(AgentError::Closed)
    }

    /// Starts a process under a number that the agent does not know (see [`Welcome::processes`]).
    ///
    /// # Errors
    /// [`SpawnError::Failed`] with the exit code to report, or [`SpawnError::Agent`].
    pub async fn spawn(&self, id: ProcessId, spec: ProcessSpec) -> Result<Process, SpawnError> {
        let _ = (id, spec);
        Err(AgentError::Closed.into())
    }

    /// Takes up a process of an earlier session. Its output flows from `from` on, which is what was stored of it; what
    /// is before is acknowledged by this. For a process that ended, `exited` answers once its output has come.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where the agent does not know it, or `from` is not among what it kept.
    pub async fn resume(&self, id: ProcessId, from: Offsets) -> Result<Process, AgentError> {
        let _ = (id, from);
        Err(AgentError::Closed)
    }

    /// Sends a signal to a process, or to its whole group where it has a terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn signal(&self, id: ProcessId, number: i32) -> Result<(), AgentError> {
        let _ = (id, number);
        Err(AgentError::Closed)
    }

    /// Has the agent forget a process that ended: its number and what is kept of it are free.
    ///
    /// # Errors
    /// [`AgentError::Refused`] while it runs.
    pub async fn forget(&self, id: ProcessId) -> Result<(), AgentError> {
        let _ = id;
        Err(AgentError::Closed)
    }

    /// What the guest uses.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stats(&self) -> Result<GuestStats, AgentError> {
        Err(AgentError::Closed)
    }

    /// Asks whether the agent is there.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn ping(&self) -> Result<(), AgentError> {
        Err(AgentError::Closed)
    }

    /// What a path in the guest leads to; nothing where there is no such file. `follow` says whether a symbolic link at
    /// its end is followed.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stat(&self, path: &str, follow: bool) -> Result<Option<FileStat>, AgentError> {
        let _ = (path, follow);
        Err(AgentError::Closed)
    }

    /// Reads a file or a tree of the guest as a tar stream; its entries begin with the path's last component. Reading
    /// fails where the guest fails midway; an end of file means that all of it came.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn archive_out(&self, path: &str, follow: bool) -> Result<ArchiveReader, AgentError> {
        let _ = (path, follow);
        Err(AgentError::Closed)
    }

    /// Unpacks a tar stream into a directory of the guest that exists. Dropping the future cancels it; what was
    /// unpacked stays.
    ///
    /// # Errors
    /// [`AgentError::Refused`] for what the guest could not unpack, [`AgentError::Source`] where `tar` failed.
    pub async fn archive_in(
        &self,
        path: &str,
        tar: impl AsyncRead + Send + Unpin,
        options: UnpackOptions,
    ) -> Result<(), AgentError> {
        let _ = (path, tar, options);
        Err(AgentError::Closed)
    }

    /// Ends the guest: `signal` to its main process, after `grace` SIGKILL to all. Returns when the agent has written
    /// everything and is about to switch off. Exits of processes still arrive before that.
    ///
    /// # Errors
    /// [`AgentError`]; that the channel closed first may also mean that the guest is off.
    pub async fn shutdown(&self, grace: Duration, signal: i32) -> Result<(), AgentError> {
        let _ = (grace, signal);
        Err(AgentError::Closed)
    }

    /// Waits for the end of the session and says why it ended.
    pub async fn closed(&self) -> AgentError {
        AgentError::Closed
    }
}
