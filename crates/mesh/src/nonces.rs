//! Which nonces have been seen: a request that comes a second time is refused.
//!
//! The transport lets nobody replay another's bytes; what this guards against is the sender itself, or a program between
//! its user and the mesh, that sends one request twice (after a reconnection, say): at most one of them is done. Only what
//! comes under a verified grant is noted: nothing is done for others. Nonces are remembered until their deadline, which is bounded; a start of the node forgets them, which is why a request also names
//! the start that it is meant for.

use std::collections::{BTreeSet, HashMap, HashSet};
use vistara_model::NodeId;

/// Latest deadline, counted from now, so that nonces need not be remembered longer.
const DEADLINE_MS_MAX: u64 = 10 * 60 * 1000;
/// How far two nodes' clocks may be apart.
const SKEW_MS: u64 = 60 * 1000;
/// Nonces remembered of one holder: a hundred requests a second with the usual deadline of half a minute, remembered for a
/// minute more, use a quarter.
const PER_HOLDER_MAX: usize = 32 * 1024;
/// Holders with requests in the last minutes: far more than a node has guests at a time.
const HOLDERS_MAX: usize = 1024;
/// Nonces all together, at some 150 bytes each: eight holders at their bound.
const ALL_MAX: usize = 8 * PER_HOLDER_MAX;

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
    /// One holder makes too many requests, or all together do.
    #[error("too many requests at a time")]
    Flood,
}

/// Whether a request's deadline lies where its nonce could be remembered until then. Costs nothing and keeps nothing.
///
/// # Errors
/// [`NonceError::Late`], [`NonceError::Early`].
pub fn timely(deadline_ms: u64, now_ms: u64) -> Result<(), NonceError> {
    if deadline_ms.saturating_add(SKEW_MS) < now_ms {
        return Err(NonceError::Late);
    }
    if deadline_ms > now_ms.saturating_add(DEADLINE_MS_MAX + SKEW_MS) {
        return Err(NonceError::Early);
    }
    Ok(())
}

/// The nonces seen.
#[derive(Debug, Default)]
pub struct Nonces {
    holders: HashMap<NodeId, HashSet<[u8; 16]>>,
    /// All of them, the first to be forgotten first: a request pays for those whose time is over, not for all that there are.
    by_deadline: BTreeSet<(u64, NodeId, [u8; 16])>,
}

impl Nonces {
    /// Takes note of a request, or says why it must not be served. `holder` is whom the grant was given to under which it
    /// comes, also where that one has passed it on: keys cost nothing, grants are given by the node's owner.
    ///
    /// To be called **only after that grant was verified**, for this caller: what is noted takes memory, and strangers must
    /// not be able to fill it. Where nothing is shown nothing is done, and a second time is as good as the first.
    ///
    /// # Errors
    /// [`NonceError`].
    pub fn admit(
        &mut self,
        holder: NodeId,
        nonce: [u8; 16],
        deadline_ms: u64,
        now_ms: u64,
    ) -> Result<(), NonceError> {
        timely(deadline_ms, now_ms)?;
        self.forget(now_ms);
        let among = self.holders.len();
        let seen = self.holders.get(&holder);
        if seen.is_some_and(|seen| seen.contains(&nonce)) {
            return Err(NonceError::Replayed);
        }
        let full = match seen {
            Some(seen) => seen.len() >= PER_HOLDER_MAX,
            None => among >= HOLDERS_MAX,
        };
        if full || self.by_deadline.len() >= ALL_MAX {
            return Err(NonceError::Flood);
        }
        self.holders.entry(holder).or_default().insert(nonce);
        self.by_deadline.insert((deadline_ms, holder, nonce));
        Ok(())
    }

    fn forget(&mut self, now_ms: u64) {
        while let Some((deadline, holder, nonce)) = self.by_deadline.first().copied() {
            if deadline.saturating_add(SKEW_MS) >= now_ms {
                break;
            }
            self.by_deadline.pop_first();
            if let Some(seen) = self.holders.get_mut(&holder) {
                seen.remove(&nonce);
                if seen.is_empty() {
                    self.holders.remove(&holder);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    #[test]
    fn a_nonce_counts_once_for_each_holder_and_is_forgotten_after_its_time() {
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
        assert_eq!(nonces.holders.len(), 1);
        assert_eq!(nonces.by_deadline.len(), 1);
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

    fn numbered(count: usize) -> [u8; 16] {
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&count.to_le_bytes());
        nonce
    }

    fn holder(count: usize) -> NodeId {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&count.to_le_bytes());
        NodeId::from_bytes(key)
    }

    #[test]
    fn one_holder_cannot_fill_the_memory_and_all_together_cannot_either() {
        let mut nonces = Nonces::default();
        for other in 0..ALL_MAX / PER_HOLDER_MAX {
            let of = holder(other);
            for count in 0..PER_HOLDER_MAX {
                assert_eq!(nonces.admit(of, numbered(count), NOW, NOW), Ok(()));
            }
            let over = nonces.admit(of, [255; 16], NOW, NOW);
            assert_eq!(over, Err(NonceError::Flood));
        }
        let over = nonces.admit(holder(100), [0; 16], NOW, NOW);
        assert_eq!(over, Err(NonceError::Flood));
        let later = NOW + SKEW_MS + 1;
        assert_eq!(nonces.admit(holder(100), [0; 16], later, later), Ok(()));
        assert_eq!(nonces.holders.len(), 1);
    }

    #[test]
    fn holders_are_so_many_at_most_and_those_of_before_make_room() {
        let mut nonces = Nonces::default();
        for count in 0..HOLDERS_MAX {
            assert_eq!(nonces.admit(holder(count), [0; 16], NOW, NOW), Ok(()));
        }
        let new = holder(HOLDERS_MAX);
        assert_eq!(nonces.admit(new, [0; 16], NOW, NOW), Err(NonceError::Flood));
        assert_eq!(nonces.admit(holder(0), [1; 16], NOW, NOW), Ok(()));
        let later = NOW + SKEW_MS + 1;
        assert_eq!(nonces.admit(new, [0; 16], later, later), Ok(()));
    }
}
