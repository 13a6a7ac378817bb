//! The agent's program as bytes, compiled for this host's architecture and linked statically.

/// The program: a static executable, to be `/init` of an initial RAM file system.
pub const AGENT: &[u8] = &[];

/// SHA-256 of [`AGENT`] in hexadecimal digits: changes whenever the program does.
pub const AGENT_SHA256: &str = "";

/// The agent's version.
pub const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");
