//! What a node states about itself, signed by it, so that it may be kept and passed on by others.
//!
//! A statement is a signature (64 bytes) and the facts in postcard; what is signed begins with words that stand before
//! nothing else. Reading is bounded and total.

use crate::identity::Identity;
use iroh::{PublicKey, Signature};
use vistara_model::{FactsError, NodeFacts, NodeId};

/// What is signed begins with this.
const CONTEXT: &[u8] = b"vistara 2026-11 facts of a node\0";
/// Longest statement: that of a node with as many images, labels and letters as it may tell of.
pub const STATEMENT_BYTES_MAX: usize = 1500;
const SIGNATURE_BYTES: usize = 64;

/// Why a statement is thrown away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// It is longer than any, or shorter.
    #[error("it is no statement: {0} bytes")]
    Length(usize),
    /// It is none.
    #[error("it is no statement")]
    Malformed,
    /// It is not signed by the node that it is about.
    #[error("it is not signed by the node that it is about")]
    Signature,
    /// It says what no node may.
    #[error("it says what no node may")]
    Facts(#[from] FactsError),
}

/// The signature of these bytes in this context, and they.
pub(crate) fn seal(identity: &Identity, context: &[u8], body: &[u8]) -> Vec<u8> {
    let signature = identity.secret().sign(&[context, body].concat());
    [&signature.to_bytes()[..], body].concat()
}

/// The signature, and what was signed, as far as that can be told without knowing by whom.
pub(crate) fn split(bytes: &[u8]) -> Result<(&[u8; SIGNATURE_BYTES], &[u8]), StatementError> {
    (bytes.split_first_chunk::<SIGNATURE_BYTES>()).ok_or(StatementError::Length(bytes.len()))
}

/// Whether a node has signed these bytes in this context.
pub(crate) fn verify(
    node: &NodeId,
    context: &[u8],
    (signature, body): (&[u8; SIGNATURE_BYTES], &[u8]),
) -> Result<(), StatementError> {
    let key = PublicKey::from_bytes(node.as_bytes()).map_err(|_| StatementError::Signature)?;
    key.verify(&[context, body].concat(), &Signature::from_bytes(signature))
        .map_err(|_| StatementError::Signature)
}

/// Signs what this node states about itself.
///
/// # Errors
/// [`StatementError`] where the facts are another node's, or are too many.
pub fn state(identity: &Identity, facts: &NodeFacts) -> Result<Vec<u8>, StatementError> {
    if facts.node != identity.id() {
        return Err(StatementError::Signature);
    }
    facts.check()?;
    let body = postcard::to_stdvec(facts).map_err(|_| StatementError::Malformed)?;
    let bytes = seal(identity, CONTEXT, &body);
    if bytes.len() > STATEMENT_BYTES_MAX {
        return Err(StatementError::Length(bytes.len()));
    }
    Ok(bytes)
}

/// Reads a statement, whoever it came from.
///
/// # Errors
/// [`StatementError`].
pub fn read(bytes: &[u8]) -> Result<NodeFacts, StatementError> {
    if bytes.len() > STATEMENT_BYTES_MAX {
        return Err(StatementError::Length(bytes.len()));
    }
    let (signature, body) = split(bytes)?;
    let facts: NodeFacts = match postcard::take_from_bytes(body) {
        Ok((facts, [])) => facts,
        Ok(_) | Err(_) => return Err(StatementError::Malformed),
    };
    verify(&facts.node, CONTEXT, (signature, body))?;
    facts.check()?;
    Ok(facts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use vistara_model::{Architecture, Bytes, Hypervisor, ImageMark, OwnerTerms, Stock};

    /// As many as a node may tell of.
    pub(crate) fn facts(node: NodeId) -> NodeFacts {
        let stock = Stock {
            memory: Bytes(u64::MAX),
            machines: u32::MAX,
        };
        NodeFacts {
            node,
            version: u64::MAX,
            arch: Architecture("a".repeat(32)),
            cpus: u32::MAX,
            capacity: stock,
            free: stock,
            queue_depth: u32::MAX,
            hypervisors: BTreeSet::from([Hypervisor::Qemu, Hypervisor::Nanovms]),
            kvm: true,
            images: (0..16).map(|number| ImageMark(u64::MAX - number)).collect(),
            templates: (0..16).map(|number| ImageMark(u64::MAX - number)).collect(),
            ready_ms: Some(u32::MAX),
            region: Some("r".repeat(32)),
            price_micros: u64::MAX,
            labels: (0..8)
                .map(|number| format!("{number}{}", "l".repeat(31)))
                .collect(),
            terms: OwnerTerms {
                draining: true,
                memory_max: Some(Bytes(u64::MAX)),
            },
        }
    }

    #[test]
    fn the_longest_statement_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let facts = facts(identity.id());
        let bytes = state(&identity, &facts).unwrap();
        assert_eq!(read(&bytes).unwrap(), facts);
    }

    #[test]
    fn nobody_states_anything_about_another_and_nothing_is_changed_on_the_way() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, other] = [0, 1].map(|index: usize| Identity::open(dirs[index].path()).unwrap());
        let about_one = facts(one.id());
        assert_eq!(state(&other, &about_one), Err(StatementError::Signature));
        let bytes = state(&one, &about_one).unwrap();
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            assert!(read(&changed).is_err(), "{place}");
            assert!(read(&bytes[..place]).is_err(), "{place}");
        }
        let mut more = bytes.clone();
        more.push(0);
        assert_eq!(read(&more), Err(StatementError::Malformed));
        assert!(read(&vec![0; STATEMENT_BYTES_MAX + 1]).is_err());
    }
}
