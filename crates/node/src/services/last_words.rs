//! Last words: the documents of removed services, kept for nodes that have not heard. Whoever creates and removes services all
//! the time shall neither fill this node's memory nor have it forget what others have removed.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use vistara_control::services::ServiceId;
use vistara_model::NodeId;

/// How long one is kept.
pub(super) const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Bytes of those of other nodes' owners.
pub(super) const BYTES_MAX: usize = 16 << 20;
/// What one takes at least: a block of the disk.
const BYTES_LEAST: usize = 4096;

/// What is left of a removed service.
#[derive(Debug)]
pub(super) struct LastWord {
    pub(super) service: ServiceId,
    pub(super) owner: NodeId,
    pub(super) bytes: usize,
    pub(super) heard: SystemTime,
}

impl LastWord {
    fn weight(&self) -> usize {
        self.bytes.max(BYTES_LEAST)
    }
}

/// Which are to be forgotten so that no more than so many bytes are kept: the oldest of whoever has most.
pub(super) fn beyond(mut words: Vec<LastWord>, bytes_max: usize) -> Vec<ServiceId> {
    let mut total: usize = words.iter().map(LastWord::weight).sum();
    if total <= bytes_max {
        return Vec::new();
    }
    let mut of_each: BTreeMap<NodeId, usize> = BTreeMap::new();
    for word in &words {
        *of_each.entry(word.owner).or_default() += word.weight();
    }
    // The oldest last, where they are taken from.
    words.sort_by_key(|word| std::cmp::Reverse((word.heard, word.service)));
    let mut over = Vec::new();
    while total > bytes_max {
        let most = of_each.iter().max_by_key(|(_, bytes)| **bytes);
        let Some(at) =
            most.and_then(|(owner, _)| words.iter().rposition(|word| word.owner == *owner))
        else {
            break;
        };
        let word = words.remove(at);
        total -= word.weight();
        of_each
            .entry(word.owner)
            .and_modify(|bytes| *bytes -= word.weight());
        over.push(word.service);
    }
    over
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::id;
    use super::*;

    const BLOCK: usize = BYTES_LEAST;

    fn word(service: u128, owner: usize, bytes: usize, heard: u64) -> LastWord {
        LastWord {
            service: ServiceId(service),
            owner: id(owner),
            bytes,
            heard: SystemTime::UNIX_EPOCH + Duration::from_secs(heard),
        }
    }

    #[test]
    fn last_words_are_forgotten_beyond_the_bound_the_oldest_of_whoever_has_most() {
        let words = || {
            vec![
                word(1, 1, 10, 1),
                word(2, 2, 10, 5),
                word(3, 2, BLOCK, 4),
                word(4, 2, 10, 3),
            ]
        };
        assert_eq!(beyond(words(), 4 * BLOCK), []);
        assert_eq!(beyond(words(), 4 * BLOCK - 1), [ServiceId(4)]);
        // The other owner's is older than all of them, and stays.
        assert_eq!(beyond(words(), 2 * BLOCK), [ServiceId(4), ServiceId(3)]);
        assert_eq!(beyond(words(), 0).len(), 4);
    }

    #[test]
    fn a_large_one_counts_for_what_it_is() {
        let words = vec![word(1, 1, 10 * BLOCK, 2), word(2, 2, 10, 1)];
        assert_eq!(beyond(words, 10 * BLOCK), [ServiceId(1)]);
    }
}
