//! What several tests need.

use vistara_model::NodeId;

/// One of many nodes.
pub(super) fn id(number: usize) -> NodeId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    NodeId::from_bytes(bytes)
}
