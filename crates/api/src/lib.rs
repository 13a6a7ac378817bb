//! The node's public interface, version 1: wire types, and the client that the CLI and other programs use.
//!
//! HTTP and JSON over the node's Unix socket. Long answers are server-sent events; a program's standard streams are a
//! WebSocket (see [`stream`]). The types here are the wire's own: a change to them is a change to the interface, and the
//! OpenAPI document that is checked in (`docs/openapi.json`) is made from them.

pub mod client;
pub mod mesh;
pub mod stream;
pub mod types;

pub use client::{Client, ClientError};
pub use mesh::*;
pub use types::*;

/// The version in every path: `/v1/…`.
pub const API_VERSION: &str = "v1";

/// Header in every answer that carries the version of the program that serves it.
pub const SERVER_VERSION_HEADER: &str = "vistara-version";
