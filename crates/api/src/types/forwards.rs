//! Forwards on the wire: ports of this host that lead into machines on other nodes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The header by which a client asks that its connection becomes one to a published port of a machine
/// (`GET /v1/machines/{machine}/port` with `Connection: upgrade`).
pub const PORT_STREAM: &str = "vistara-port";

/// A port of this host that leads into a machine on another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forward {
    /// 16 hexadecimal digits.
    pub id: String,
    /// The node, by its whole id.
    pub node: String,
    /// The machine there, by its whole id.
    pub machine: String,
    /// `ADDRESS:PORT` of this host.
    pub listen: String,
    /// The port in the guest.
    pub guest_port: u16,
    /// Why it does not listen now, where it does not: somebody else may have taken the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// `POST /v1/forwards`. It ends with its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardRequest {
    /// The node: its id, name here, or an unambiguous beginning of its id.
    pub node: String,
    /// The machine there, which publishes the port, by its whole id.
    pub machine: String,
    /// `ADDRESS:PORT` of this host; port 0 takes any.
    pub listen: String,
    /// The port in the guest; TCP.
    pub guest_port: u16,
}
