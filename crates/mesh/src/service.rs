//! A service's or a task's document: what its owner wants run, signed by the owner's node, so that others may keep it, pass it on
//! and act on it when the owner is away.
//!
//! It names the nodes that may run copies or look after them, each with the token that this node has given to the owner. Such a
//! node acts on a document only if the token in it is its own, is the owner's, and counts: nobody is given anything by being
//! named. Tokens are bound to their holder's key and are no secrets. What is in the environment of the program is seen by all
//! nodes that are named.
//!
//! A task's document is a service's with more behind it ([`Task`]). A service's is written as it was before there were tasks; a
//! program of before throws a task's away as no document, and never takes one for a service.

use crate::facts::{self, StatementError};
use crate::frame::TOKEN_BYTES_MAX;
use crate::identity::Identity;
use serde::{Deserialize, Serialize};
use vistara_model::{Bytes, Cpus, Digest, Hypervisor, NodeId};

/// What is signed begins with this.
const CONTEXT: &[u8] = b"vistara 2026-11 document of a service\0";
/// Longest document, sealed.
pub const DOCUMENT_BYTES_MAX: usize = 192 << 10;
/// Most nodes that may run or look after one service.
pub const NODES_MAX: usize = 64;
/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 40;
/// Longest request for a copy's machine, in bytes: the environment is most of it.
pub const REQUEST_BYTES_MAX: usize = 48 << 10;
/// Most copies.
pub const REPLICAS_MAX: u32 = 256;
/// Most regions and labels that are asked for, and longest of them in bytes.
const WISHES_MAX: usize = 16;
const WISH_BYTES_MAX: usize = 64;
/// Longest idempotency key of a task, in bytes.
pub const KEY_BYTES_MAX: usize = 128;
/// Longest file with hypercore's policy.
const RULES_BYTES_MAX: usize = 8 << 10;

/// A node that may run copies of a service and look after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eligible {
    /// Which.
    pub node: NodeId,
    /// The token that it has given to the owner; none where it is the owner itself.
    pub token: Option<Vec<u8>>,
}

/// On which of the nodes copies are placed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Placement {
    /// The policy's name.
    pub policy: Option<String>,
    /// Or what stands in a file with hypercore's policy.
    pub rules: Option<String>,
    /// Any of these regions.
    pub regions: Vec<String>,
    /// All of these labels and capabilities.
    pub capabilities: Vec<String>,
    /// Most that it may cost.
    pub price_micros_max: Option<u64>,
    /// Never two copies on one node; else only where there are too few nodes.
    pub apart: bool,
}

/// What becomes of a task whose node is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskSemantics {
    /// It is reported lost, and never begun a second time.
    AtMostOnce,
    /// It is run again elsewhere until it has ended once.
    AtLeastOnce,
}

/// What makes a task of a service: a program that is run to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// What becomes of it when its node is lost.
    pub semantics: TaskSemantics,
    /// Its idempotency key: its owner asks for the task of one key once, and the program can know a run for a second one by it.
    pub key: String,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceDocument {
    /// The service's number.
    pub service: u128,
    /// Grows with each change.
    pub version: u64,
    /// Whose it is, and who has signed.
    pub owner: NodeId,
    /// What its owner calls it.
    pub name: String,
    /// How many copies.
    pub replicas: u32,
    /// It is wanted no more: everybody forgets it.
    pub removed: bool,
    /// The image of the copies.
    pub image: Digest,
    /// Guest memory of each.
    pub memory: Bytes,
    /// CPUs of each.
    pub cpus: Cpus,
    /// On what each runs.
    pub hypervisor: Hypervisor,
    /// The whole request for a copy's machine, as the interface takes it.
    pub request: Vec<u8>,
    /// Where.
    pub placement: Placement,
    /// By whom.
    pub nodes: Vec<Eligible>,
    /// Absent of services. Written behind everything else, and only where it is there.
    #[serde(skip)]
    pub task: Option<Task>,
}

/// A document with its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedDocument {
    document: ServiceDocument,
    bytes: Vec<u8>,
}

/// Why a document is thrown away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// It is none, or not signed by its owner.
    #[error("the service's document is no good: {0}")]
    Seal(#[from] StatementError),
    /// It is longer than any.
    #[error("the service's document has {0} bytes, and {DOCUMENT_BYTES_MAX} are allowed")]
    Length(usize),
    /// It says what none may.
    #[error("the service's document says what none may: {0}")]
    Content(&'static str),
}

fn is_key(key: &str) -> bool {
    (1..=KEY_BYTES_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
}

impl ServiceDocument {
    /// Whether it says only what one may say.
    ///
    /// # Errors
    /// [`DocumentError::Content`].
    pub fn check(&self) -> Result<(), DocumentError> {
        let wish = |text: &String| (1..=WISH_BYTES_MAX).contains(&text.len());
        let placement = &self.placement;
        let nodes = &self.nodes;
        let twice = (nodes.iter().enumerate())
            .any(|(place, one)| nodes[..place].iter().any(|other| other.node == one.node));
        let tokens = nodes.iter().filter_map(|one| one.token.as_ref());
        let name = self.name.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let first = |byte: &u8| byte.is_ascii_alphanumeric();
        let bad = if self.version == 0 {
            "versions begin with 1"
        } else if !name.first().is_some_and(first)
            || !name.iter().all(plain)
            || name.len() > NAME_BYTES_MAX
        {
            "a name has at most 40 lower-case letters, digits and '-', and does not begin with '-'"
        } else if self.replicas > REPLICAS_MAX {
            "a service has at most 256 copies"
        } else if nodes.len() > NODES_MAX || twice {
            "at most 64 nodes, each once, look after a service"
        } else if tokens
            .into_iter()
            .any(|token| token.len() > TOKEN_BYTES_MAX)
        {
            "a grant in it is larger than any"
        } else if self.request.len() > REQUEST_BYTES_MAX {
            "the request for its machines is longer than 48 KiB"
        } else if placement.regions.len() > WISHES_MAX
            || placement.capabilities.len() > WISHES_MAX
            || !(placement.regions.iter())
                .chain(&placement.capabilities)
                .chain(&placement.policy)
                .all(wish)
            || (placement.rules.as_ref()).is_some_and(|rules| rules.len() > RULES_BYTES_MAX)
        {
            "at most 16 regions and 16 labels of 64 letters each are asked for"
        } else if self.removed && (self.replicas > 0 || !nodes.is_empty()) {
            "what is removed has no copies and no nodes"
        } else if self.task.as_ref().is_some_and(|task| !is_key(&task.key)) {
            "a task's key has 1 to 128 letters, digits and marks of ASCII, without spaces"
        } else if self.task.is_some() && !self.removed && self.replicas != 1 {
            "a task is run in one copy"
        } else {
            return Ok(());
        };
        Err(DocumentError::Content(bad))
    }

    /// Whether a node is named in it, the owner included.
    pub fn names(&self, node: &NodeId) -> bool {
        self.owner == *node || self.nodes.iter().any(|one| one.node == *node)
    }

    fn body(&self) -> Result<Vec<u8>, StatementError> {
        let body = postcard::to_stdvec(self).map_err(|_| StatementError::Malformed)?;
        match &self.task {
            None => Ok(body),
            Some(task) => postcard::to_extend(task, body).map_err(|_| StatementError::Malformed),
        }
    }

    /// Signs it.
    ///
    /// # Errors
    /// [`DocumentError`] where it is another's, or says what none may.
    pub fn seal(self, identity: &Identity) -> Result<SealedDocument, DocumentError> {
        if self.owner != identity.id() {
            return Err(StatementError::Signature.into());
        }
        self.check()?;
        let bytes = facts::seal(identity, CONTEXT, &self.body()?);
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(DocumentError::Length(bytes.len()));
        }
        Ok(SealedDocument {
            document: self,
            bytes,
        })
    }
}

impl SealedDocument {
    /// Reads one, whoever it came from.
    ///
    /// # Errors
    /// [`DocumentError`].
    pub fn read(bytes: &[u8]) -> Result<SealedDocument, DocumentError> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(DocumentError::Length(bytes.len()));
        }
        let (signature, body) = facts::split(bytes)?;
        let (mut document, rest): (ServiceDocument, &[u8]) =
            postcard::take_from_bytes(body).map_err(|_| StatementError::Malformed)?;
        document.task = match rest {
            [] => None,
            rest => match postcard::take_from_bytes(rest) {
                Ok((task, [])) => Some(task),
                Ok(_) | Err(_) => return Err(StatementError::Malformed.into()),
            },
        };
        // Cheap before dear.
        document.check()?;
        facts::verify(&document.owner, CONTEXT, (signature, body))?;
        Ok(SealedDocument {
            document,
            bytes: bytes.to_owned(),
        })
    }

    /// What it says.
    pub fn document(&self) -> &ServiceDocument {
        &self.document
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn identity() -> (tempfile::TempDir, Identity) {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        (dir, identity)
    }

    fn document(owner: NodeId) -> ServiceDocument {
        ServiceDocument {
            service: 7,
            version: 1,
            owner,
            name: "web".to_owned(),
            replicas: 3,
            removed: false,
            image: format!("sha256:{}", "ab".repeat(32)).parse().unwrap(),
            memory: Bytes(64 << 20),
            cpus: Cpus::ONE,
            hypervisor: Hypervisor::Auto,
            request: b"{}".to_vec(),
            placement: Placement::default(),
            nodes: vec![Eligible {
                node: NodeId::from_bytes([9; 32]),
                token: Some(vec![1; 900]),
            }],
            task: None,
        }
    }

    fn task(owner: NodeId) -> ServiceDocument {
        ServiceDocument {
            replicas: 1,
            nodes: Vec::new(),
            task: Some(Task {
                semantics: TaskSemantics::AtLeastOnce,
                key: "order-1".to_owned(),
            }),
            ..document(owner)
        }
    }

    #[test]
    fn a_document_is_its_owners_and_nothing_of_it_is_changed_on_the_way() {
        let ((_one_dir, one), (_other_dir, other)) = (identity(), identity());
        assert!(document(one.id()).seal(&other).is_err());
        for document in [document(one.id()), task(one.id())] {
            let sealed = document.seal(&one).unwrap();
            let bytes = sealed.bytes().to_vec();
            assert_eq!(SealedDocument::read(&bytes).unwrap(), sealed);
            for place in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[place] ^= 1;
                assert!(SealedDocument::read(&changed).is_err(), "{place}");
                assert!(SealedDocument::read(&bytes[..place]).is_err(), "{place}");
            }
            let mut more = bytes;
            more.push(0);
            assert!(SealedDocument::read(&more).is_err());
        }
    }

    #[test]
    fn a_services_document_is_written_as_before_there_were_tasks_and_a_tasks_is_none_to_programs_of_then()
     {
        let (_dir, own) = identity();
        let service = document(own.id());
        // The fields of version 1 and nothing more: this is what such a program reads to the last byte.
        let body = service.body().unwrap();
        let read: (ServiceDocument, &[u8]) = postcard::take_from_bytes(&body).unwrap();
        assert_eq!(read, (service, &[][..]));
        let body = task(own.id()).body().unwrap();
        let (_, rest): (ServiceDocument, &[u8]) = postcard::take_from_bytes(&body).unwrap();
        assert_eq!(rest, b"\x01\x07order-1");
    }

    #[test]
    fn what_no_document_may_say_is_neither_signed_nor_read() {
        let (_dir, own) = identity();
        let bad: [fn(&mut ServiceDocument); 13] = [
            |one| one.version = 0,
            |one| one.name = "-web".to_owned(),
            |one| one.name = "Web".to_owned(),
            |one| one.name = String::new(),
            |one| one.replicas = REPLICAS_MAX + 1,
            |one| one.nodes.push(one.nodes[0].clone()),
            |one| one.nodes[0].token = Some(vec![0; TOKEN_BYTES_MAX + 1]),
            |one| one.request = vec![0; REQUEST_BYTES_MAX + 1],
            |one| one.removed = true,
            |one| one.task.as_mut().unwrap().key = String::new(),
            |one| one.task.as_mut().unwrap().key = "k".repeat(KEY_BYTES_MAX + 1),
            |one| one.task.as_mut().unwrap().key = "a b".to_owned(),
            |one| one.replicas = 2,
        ];
        for change in bad {
            let mut one = ServiceDocument {
                nodes: document(own.id()).nodes,
                ..task(own.id())
            };
            change(&mut one);
            assert!(one.check().is_err(), "{one:?}");
            assert!(one.clone().seal(&own).is_err());
            // Its owner may sign it with another program.
            let body = one.body().unwrap();
            assert!(SealedDocument::read(&facts::seal(&own, CONTEXT, &body)).is_err());
        }
    }

    #[test]
    fn a_document_of_all_nodes_with_usual_grants_fits() {
        let (_dir, own) = identity();
        let mut one = document(own.id());
        one.request = vec![b' '; REQUEST_BYTES_MAX];
        one.nodes = (0..NODES_MAX as u8)
            .map(|number| Eligible {
                node: NodeId::from_bytes([number; 32]),
                token: Some(vec![0; 2000]),
            })
            .collect();
        assert!(one.seal(&own).is_ok());
    }
}
