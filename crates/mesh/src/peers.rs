//! The nodes that the user joined: remembered in one file that is replaced as a whole.

use crate::files;
use crate::relay::Relay;
use crate::whereabouts::Whereabouts;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use vistara_model::NodeId;

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Most nodes that are remembered: each is kept connected.
const PEERS_MAX: usize = 1024;

/// Why the remembered nodes cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The file could not be read or written.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It is not such a file, or one of another version. It is left alone.
    #[error(
        "{path:?} does not hold remembered nodes ({why}); put a copy back, or remove it and join again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// There are too many.
    #[error("a node remembers at most {PEERS_MAX} others")]
    TooMany,
    /// Another has this name.
    #[error("the node {1} has the name {0:?} already")]
    NameTaken(String, String),
}

/// A remembered node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its key.
    pub id: NodeId,
    /// What the user calls it.
    pub name: Option<String>,
    /// Where it may be reached.
    pub addresses: Vec<SocketAddr>,
    /// Through which relays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relays: Vec<Relay>,
    /// The token by which it lets us in, as text.
    pub grant: Option<String>,
}

impl Peer {
    /// Where it may be reached.
    pub fn whereabouts(&self) -> Whereabouts {
        Whereabouts {
            addresses: self.addresses.clone(),
            relays: self.relays.clone(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    peers: Vec<Peer>,
}

/// The remembered nodes.
#[derive(Debug)]
pub struct Peers {
    path: PathBuf,
    peers: Vec<Peer>,
}

impl Peers {
    /// Reads `peers.json` in `dir`; there may be none. Blocks.
    ///
    /// # Errors
    /// [`PeersError::Io`], [`PeersError::Damaged`].
    pub fn open(dir: &Path) -> Result<Peers, PeersError> {
        let path = dir.join("peers.json");
        let bytes = files::read(&path).map_err(|source| PeersError::Io {
            operation: "read",
            path: path.clone(),
            source,
        })?;
        let peers = match bytes {
            None => Vec::new(),
            Some(bytes) => match serde_json::from_slice::<Kept>(&bytes) {
                Ok(Kept { format, peers }) if format == FORMAT => peers,
                Ok(Kept { format, .. }) => {
                    let why = format!("its format is {format}, this program knows {FORMAT}");
                    return Err(PeersError::Damaged { path, why });
                }
                Err(error) => {
                    let why = error.to_string();
                    return Err(PeersError::Damaged { path, why });
                }
            },
        };
        Ok(Peers { path, peers })
    }

    /// All of them, in the order in which they were joined.
    pub fn all(&self) -> &[Peer] {
        &self.peers
    }

    /// One by its key.
    pub fn get(&self, id: &NodeId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == *id)
    }

    /// Remembers a node, in place of what was known of it. Blocks.
    ///
    /// # Errors
    /// [`PeersError`]; nothing has changed then.
    pub fn put(&mut self, peer: Peer) -> Result<(), PeersError> {
        let mut peers = self.peers.clone();
        if let Some(name) = &peer.name
            && let Some(other) = peers
                .iter()
                .find(|other| other.id != peer.id && other.name.as_ref() == Some(name))
        {
            return Err(PeersError::NameTaken(name.clone(), other.id.short()));
        }
        match peers.iter().position(|known| known.id == peer.id) {
            Some(index) => peers[index] = peer,
            None if peers.len() >= PEERS_MAX => return Err(PeersError::TooMany),
            None => peers.push(peer),
        }
        self.save(peers)
    }

    /// Forgets a node; says whether it was known. Blocks.
    ///
    /// # Errors
    /// [`PeersError::Io`]; nothing has changed then.
    pub fn remove(&mut self, id: &NodeId) -> Result<bool, PeersError> {
        let mut peers = self.peers.clone();
        peers.retain(|peer| peer.id != *id);
        let known = peers.len() < self.peers.len();
        self.save(peers)?;
        Ok(known)
    }

    /// Forgets all. Blocks.
    ///
    /// # Errors
    /// [`PeersError::Io`]; nothing has changed then.
    pub fn clear(&mut self) -> Result<(), PeersError> {
        self.save(Vec::new())
    }

    fn save(&mut self, peers: Vec<Peer>) -> Result<(), PeersError> {
        let kept = Kept {
            format: FORMAT,
            peers,
        };
        serde_json::to_vec_pretty(&kept)
            .map_err(std::io::Error::other)
            .and_then(|bytes| files::replace(&self.path, &bytes))
            .map_err(|source| PeersError::Io {
                operation: "write",
                path: self.path.clone(),
                source,
            })?;
        self.peers = kept.peers;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn peer(byte: u8, name: Option<&str>) -> Peer {
        Peer {
            id: NodeId::from_bytes([byte; 32]),
            name: name.map(str::to_owned),
            addresses: vec!["127.0.0.1:1".parse().unwrap()],
            relays: Vec::new(),
            grant: None,
        }
    }

    #[test]
    fn what_was_joined_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let mut peers = Peers::open(dir.path()).unwrap();
        peers.put(peer(1, Some("a"))).unwrap();
        peers.put(peer(2, None)).unwrap();
        let mut behind = peer(1, Some("b"));
        let relay = format!("{}@192.0.2.1:7443", "09".repeat(32));
        behind.relays.push(relay.parse().unwrap());
        peers.put(behind.clone()).unwrap();
        assert!(peers.remove(&NodeId::from_bytes([2; 32])).unwrap());
        assert!(!peers.remove(&NodeId::from_bytes([2; 32])).unwrap());
        let again = Peers::open(dir.path()).unwrap();
        assert_eq!(again.all(), &[behind]);
    }

    #[test]
    fn what_was_remembered_before_there_were_relays_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            r#"{{"format":1,"peers":[{{"id":"{}","name":"a","addresses":["127.0.0.1:1"],"grant":null}}]}}"#,
            "01".repeat(32)
        );
        std::fs::write(dir.path().join("peers.json"), text).unwrap();
        assert_eq!(
            Peers::open(dir.path()).unwrap().all(),
            &[peer(1, Some("a"))]
        );
    }

    #[test]
    fn a_name_stands_for_one_node() {
        let dir = tempfile::tempdir().unwrap();
        let mut peers = Peers::open(dir.path()).unwrap();
        peers.put(peer(1, Some("a"))).unwrap();
        assert!(matches!(
            peers.put(peer(2, Some("a"))),
            Err(PeersError::NameTaken(..))
        ));
        assert_eq!(peers.all().len(), 1);
    }

    #[test]
    fn a_damaged_file_is_told_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["{", r#"{"format":9,"peers":[]}"#] {
            std::fs::write(dir.path().join("peers.json"), text).unwrap();
            assert!(matches!(
                Peers::open(dir.path()),
                Err(PeersError::Damaged { .. })
            ));
            assert_eq!(
                std::fs::read_to_string(dir.path().join("peers.json")).unwrap(),
                text
            );
        }
    }
}
