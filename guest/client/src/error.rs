//! What can go wrong between a node and an agent.

use std::time::Duration;
use vistara_guest_protocol::{Refusal, SpawnFailed};

/// Why a session, or a request in one, failed.
///
/// All but [`AgentError::Refused`], [`AgentError::TooLong`] and [`AgentError::Source`] mean that the session is over.
/// The guest goes on: connect again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// The agent did not answer the greeting in time.
    #[error("the guest's agent did not answer within {0:?}")]
    Silent(Duration),
    /// The agent speaks another version of the protocol.
    #[error("the guest's agent speaks protocol version {theirs}, this node version {ours}")]
    Version {
        /// The agent's.
        theirs: u8,
        /// Ours.
        ours: u8,
    },
    /// The stream ended: the guest is gone, or its monitor.
    #[error("the channel to the guest's agent was closed")]
    Closed,
    /// The stream failed.
    #[error("the channel to the guest's agent failed: {0}")]
    Io(String),
    /// Bytes were lost, or the agent said something that it may not say.
    #[error("the guest's agent broke the protocol: {0}")]
    Broken(String),
    /// The guest said goodbye and is switching itself off.
    #[error("the guest is off")]
    Off,
    /// The agent did not do what it was asked. The session goes on.
    #[error("the guest refused: {0}")]
    Refused(#[source] Refusal),
    /// A request is larger than a message may be. The session goes on.
    #[error("the request is larger than a message to the guest may be")]
    TooLong,
    /// What should have been sent to the guest could not be read. The session goes on.
    #[error("reading what should go to the guest failed: {0}")]
    Source(String),
}

/// Why a process does not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpawnError {
    /// The guest tried and could not; the exit code to report is in it.
    #[error(transparent)]
    Failed(#[from] SpawnFailed),
    /// The session failed: whether the process runs is told by the next session's welcome.
    #[error(transparent)]
    Agent(#[from] AgentError),
}
