//! Which nonces have been seen: a request that comes a second time is refused.
//!
//! The transport lets nobody replay another's bytes; what this guards against is the sender itself, or a program between
//! its user and the mesh, that sends one request twice (after a reconnection, say): at most one of them is done. Nonces are
//! remembered until their deadline, which is bounded; a start of the node forgets them, which is why a request also names
//! the start that it is meant for.

use std::collections::{BTreeSet, HashMap, HashSet};
use vistara_model::NodeId;

/// Latest deadline, counted from now, so that nonces need not be remembered longer.
const DEADLINE_MS_MAX: u64 = 10 * 60 * 1000;
/// How far two nodes' clocks may be apart.
const SKEW_MS: u64 = 60 * 1000;
/// Nonces remembered of one sender: at a hundred requests a second with the usual deadline of half a minute a tenth is used.
const PER_SENDER_MAX: usize = 32 * 1024;

/// Why a request's time or nonce is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NonceError {
    /// It has come before.
    #[error("this request has been made already")]
    Replayed,
    /// Its time is over.
    #[error("the request's deadline has passed: are the clocks of both nodes right?")]
    Late,
    /// Its time lies further ahead than allowed.
    #[error(
        "the request's deadline lies more than ten minutes ahead: are the clocks of both nodes right?"
    )]
    Early,
    /// One sender makes too many requests.
    #[error("too many requests at a time")]
    Flood,
}

/// The nonces seen.
#[derive(Debug, Default)]
pub struct Nonces {
    senders: HashMap<NodeId, Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    nonces: HashSet<[u8; 16]>,
    by_deadline: BTreeSet<(u64, [u8; 16])>,
}

impl Nonces {
    /// Takes note of a request, or says why it must not be served.
    ///
    /// # Errors
    /// [`NonceError`].
    pub fn admit(
        &mut self,
        sender: NodeId,
        nonce: [u8; 16],
        deadline_ms: u64,
        now_ms: u64,
    ) -> Result<(), NonceError> {
        if deadline_ms.saturating_add(SKEW_MS) < now_ms {
            return Err(NonceError::Late);
        }
        if deadline_ms > now_ms.saturating_add(DEADLINE_MS_MAX + SKEW_MS) {
            return Err(NonceError::Early);
        }
        self.senders.retain(|_, seen| {
            seen.forget(now_ms);
            !seen.nonces.is_empty()
        });
        let seen = self.senders.entry(sender).or_default();
        if seen.nonces.contains(&nonce) {
            return Err(NonceError::Replayed);
        }
        if seen.nonces.len() >= PER_SENDER_MAX {
            return Err(NonceError::Flood);
        }
        seen.nonces.insert(nonce);
        seen.by_deadline.insert((deadline_ms, nonce));
        Ok(())
    }
}

impl Seen {
    fn forget(&mut self, now_ms: u64) {
        while let Some((deadline, nonce)) = self.by_deadline.first().copied() {
            if deadline.saturating_add(SKEW_MS) >= now_ms {
                break;
            }
            self.by_deadline.pop_first();
            self.nonces.remove(&nonce);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    #[test]
    fn a_nonce_counts_once_for_each_sender_and_is_forgotten_after_its_time() {
        let mut nonces = Nonces::default();
        let (a, b) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
        assert_eq!(nonces.admit(a, [0; 16], NOW, NOW), Ok(()));
        assert_eq!(
            nonces.admit(a, [0; 16], NOW, NOW),
            Err(NonceError::Replayed)
        );
        assert_eq!(nonces.admit(b, [0; 16], NOW, NOW), Ok(()));
        let later = NOW + SKEW_MS + 1;
        assert_eq!(nonces.admit(a, [0; 16], NOW, later), Err(NonceError::Late));
        assert_eq!(nonces.admit(a, [1; 16], later, later), Ok(()));
        assert_eq!(nonces.senders.len(), 1);
    }

    #[test]
    fn a_deadline_that_could_not_be_remembered_is_refused() {
        let mut nonces = Nonces::default();
        let a = NodeId::from_bytes([1; 32]);
        assert_eq!(
            nonces.admit(a, [0; 16], u64::MAX, NOW),
            Err(NonceError::Early)
        );
    }

    #[test]
    fn one_sender_cannot_fill_the_memory() {
        let mut nonces = Nonces::default();
        let a = NodeId::from_bytes([1; 32]);
        for count in 0..PER_SENDER_MAX {
            let mut nonce = [0; 16];
            nonce[..8].copy_from_slice(&count.to_le_bytes());
            assert_eq!(nonces.admit(a, nonce, NOW, NOW), Ok(()));
        }
        assert_eq!(nonces.admit(a, [255; 16], NOW, NOW), Err(NonceError::Flood));
    }
}
