//! How many of something each of many has at a time: connections of an address, messages of a node. Who has none is not
//! remembered.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Those who are there. Clones are the same crowd.
#[derive(Debug)]
pub struct Crowd<K: Eq + Hash>(Arc<Mutex<HashMap<K, usize>>>);

/// One that was let in, until it is dropped.
#[derive(Debug)]
pub struct InCrowd<K: Eq + Hash> {
    crowd: Crowd<K>,
    who: K,
}

impl<K: Eq + Hash> Clone for Crowd<K> {
    fn clone(&self) -> Crowd<K> {
        Crowd(Arc::clone(&self.0))
    }
}

impl<K: Eq + Hash> Default for Crowd<K> {
    fn default() -> Crowd<K> {
        Crowd(Arc::default())
    }
}

impl<K: Eq + Hash> Crowd<K> {
    fn counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more of `who`; nothing where it has `most` already.
    pub fn enter(&self, who: K, most: usize) -> Option<InCrowd<K>>
    where
        K: Clone,
    {
        let mut counts = self.counts();
        let of_this = counts.get(&who).copied().unwrap_or(0);
        if of_this >= most {
            return None;
        }
        counts.insert(who.clone(), of_this + 1);
        let crowd = self.clone();
        Some(InCrowd { crowd, who })
    }
}

impl<K: Eq + Hash> Drop for InCrowd<K> {
    fn drop(&mut self) {
        let mut counts = self.crowd.counts();
        if let Some(count) = counts.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_has_so_many_and_has_them_again_and_nobody_is_remembered() {
        let crowd = Crowd::default();
        let mut inside: Vec<InCrowd<&str>> = (0..2).map(|_| crowd.enter("a", 2).unwrap()).collect();
        assert!(crowd.enter("a", 2).is_none());
        assert!(crowd.enter("b", 2).is_some());
        inside.pop();
        assert!(crowd.enter("a", 2).is_some());
        assert!(crowd.enter("c", 0).is_none());
        drop(inside);
        assert!(crowd.counts().is_empty());
    }
}
