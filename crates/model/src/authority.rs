//! Nodes by their keys, and what one may do on another.

use crate::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// Why a text or some bytes are not what they were taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// A node's id is its public key.
    #[error(
        "{0:?} is not a node's id: it takes 64 lowercase hexadecimal digits, as `vistara id` prints them"
    )]
    NodeId(String),
    /// A grant's id.
    #[error(
        "{0:?} is not a grant's id: it takes 16 lowercase hexadecimal digits, as `vistara grant ls` prints them"
    )]
    GrantId(String),
    /// There is no such right.
    #[error("there is no right {0:?}: use run, network, images or admin")]
    Right(String),
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.bytes().all(lower) {
        return None;
    }
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

/// A node's identity: its Ed25519 public key. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The node with this public key. Whether it is a point of the curve is for whoever uses it as a key to find out.
    pub fn from_bytes(bytes: [u8; 32]) -> NodeId {
        NodeId(bytes)
    }

    /// The public key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first twelve digits, as listings show them.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

impl FromStr for NodeId {
    type Err = AuthorityError;
    fn from_str(text: &str) -> Result<NodeId, AuthorityError> {
        unhex(text)
            .map(NodeId)
            .ok_or_else(|| AuthorityError::NodeId(text.to_owned()))
    }
}

impl TryFrom<String> for NodeId {
    type Error = AuthorityError;
    fn try_from(text: String) -> Result<NodeId, AuthorityError> {
        text.parse()
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> String {
        id.to_string()
    }
}

/// A grant's id: 64 random bits as 16 hexadecimal digits. Unique on the node that gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GrantId(String);

impl GrantId {
    /// The id made of these random bytes.
    pub fn from_random(bytes: [u8; 8]) -> GrantId {
        GrantId(hex::encode(bytes))
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for GrantId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for GrantId {
    type Err = AuthorityError;
    fn from_str(text: &str) -> Result<GrantId, AuthorityError> {
        match unhex::<8>(text) {
            Some(_) => Ok(GrantId(text.to_owned())),
            None => Err(AuthorityError::GrantId(text.to_owned())),
        }
    }
}

impl TryFrom<String> for GrantId {
    type Error = AuthorityError;
    fn try_from(text: String) -> Result<GrantId, AuthorityError> {
        text.parse()
    }
}

impl From<GrantId> for String {
    fn from(id: GrantId) -> String {
        id.0
    }
}

/// What a grant is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Right {
    /// To run machines, and everything with one's own: logs, exec, copying, ending, removing.
    Run,
    /// That one's machines use the node's network, and with it whatever the node itself can reach.
    Network,
    /// To bring images to the node.
    Images,
    /// Everything the node's owner may do, except what concerns the node's own authority.
    Admin,
}

impl Right {
    /// All there are.
    pub const ALL: [Right; 4] = [Right::Run, Right::Network, Right::Images, Right::Admin];

    /// The word that users type.
    pub fn as_str(self) -> &'static str {
        match self {
            Right::Run => "run",
            Right::Network => "network",
            Right::Images => "images",
            Right::Admin => "admin",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Right {
    type Err = AuthorityError;
    fn from_str(text: &str) -> Result<Right, AuthorityError> {
        match text {
            "run" => Ok(Right::Run),
            "network" => Ok(Right::Network),
            "images" => Ok(Right::Images),
            "admin" => Ok(Right::Admin),
            _ => Err(AuthorityError::Right(text.to_owned())),
        }
    }
}

/// How much a grant allows at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GrantLimits {
    /// Guest memory of all its machines together.
    pub memory_max: Option<Bytes>,
    /// Machines that are there, those that have ended and were not removed included: what they wrote stays.
    pub machines_max: Option<u64>,
    /// Bytes of images' layers that were brought in under it and are still there.
    #[serde(default)]
    pub disk_max: Option<Bytes>,
}

/// What a node has promised to the holder of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantTerms {
    /// Which grant.
    pub id: GrantId,
    /// The node that gave it, and on which alone it counts.
    pub node: NodeId,
    /// Whom it was given to.
    pub holder: NodeId,
    /// For what.
    pub rights: BTreeSet<Right>,
    /// Seconds since 1970 after which it is void.
    pub until_s: u64,
    /// How much.
    pub limits: GrantLimits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_is_read_as_it_is_written_and_nothing_else_is_read() {
        let id = NodeId::from_bytes([0xab; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in [
            "",
            "ab",
            &"AB".repeat(32),
            &"ab".repeat(33),
            &"xy".repeat(32),
        ] {
            assert!(text.parse::<NodeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn rights_are_read_as_they_are_written() {
        for right in Right::ALL {
            assert_eq!(right.to_string().parse(), Ok(right));
        }
        assert!("RUN".parse::<Right>().is_err());
    }
}
