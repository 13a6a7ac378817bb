//! Room for captures: how many may be under way at once, and whether the host has the memory for one more.

use crate::fault::{Answer, Fault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vistara_api::ErrorKind;
use vistara_model::Bytes;

/// Captures that are taken or read at once: each copies up to a whole guest's memory, and more only share the disk's speed.
const CAPTURES_MAX: usize = 2;

/// What a node gives to captures.
#[derive(Debug, Clone)]
pub(crate) struct Captures {
    turns: Arc<Semaphore>,
    promised: Arc<AtomicU64>,
}

/// Room for one capture, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Room {
    _turn: OwnedSemaphorePermit,
    promised: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.promised.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

impl Captures {
    pub(crate) fn new() -> Captures {
        Captures {
            turns: Arc::new(Semaphore::new(CAPTURES_MAX)),
            promised: Arc::default(),
        }
    }

    /// Waits for its turn, then gives room for a guest with so much memory if the host has that `available`. What is being
    /// captured meanwhile counts in full, whatever of it is copied already.
    pub(crate) async fn room(
        &self,
        memory: Bytes,
        available: impl FnOnce() -> Bytes,
    ) -> Answer<Room> {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        let turn = turn.map_err(|error| Fault::internal(&error))?;
        let before = self.promised.fetch_add(memory.0, Ordering::SeqCst);
        // Gives it back in every case.
        let room = Room {
            _turn: turn,
            promised: Arc::clone(&self.promised),
            bytes: memory.0,
        };
        let free = Bytes(available().0.saturating_sub(before));
        if memory > free {
            let message = format!(
                "a capture takes up to {memory} of memory, as much as its machine has, and this host can give {free} now"
            );
            return Err(Fault::new(ErrorKind::Host, message)
                .hint("stop other machines, or try again when they have ended"));
        }
        Ok(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn captures_have_room_together_or_are_refused_and_give_it_back() {
        let captures = Captures::new();
        let host = || Bytes::mib(300);
        let first = captures.room(Bytes::mib(200), host).await.unwrap();
        let fault = captures.room(Bytes::mib(200), host).await.unwrap_err();
        assert_eq!(fault.0.kind, ErrorKind::Host);
        let second = captures.room(Bytes::mib(100), host).await.unwrap();
        assert_eq!(captures.turns.available_permits(), 0);
        drop((first, second));
        assert_eq!(captures.turns.available_permits(), CAPTURES_MAX);
        captures.room(Bytes::mib(300), host).await.unwrap();
    }
}
