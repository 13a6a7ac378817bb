//! How many messages of strangers are taken in at once: before one is read nobody knows whether it counts for anything, and
//! reading it takes memory and the task's time. Whoever has a grant, or looks after a service with this node, is none; their
//! messages are bounded by their connection's streams and by the task's queue.

use crate::fault::{Answer, Fault};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vistara_mesh::{Crowd, InCrowd};
use vistara_model::NodeId;

/// Messages of all strangers, at half a MiB each.
const STRANGERS_MAX: usize = 16;
/// Of these, messages of one.
const STRANGER_MAX: usize = 2;
/// How long a message may take to arrive.
pub(crate) const ARRIVAL_BOUND: Duration = Duration::from_secs(10);

/// Who is being heard.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    all: Arc<Semaphore>,
    each: Crowd<NodeId>,
}

/// A stranger's message, until it is answered.
#[derive(Debug)]
pub(crate) struct Seat {
    _of_all: OwnedSemaphorePermit,
    _of_its_own: InCrowd<NodeId>,
}

impl Default for Admission {
    fn default() -> Admission {
        Admission {
            all: Arc::new(Semaphore::new(STRANGERS_MAX)),
            each: Crowd::default(),
        }
    }
}

impl Admission {
    /// Room for one more message.
    pub(super) fn admit(&self, from: NodeId) -> Answer<Seat> {
        let own = self.each.enter(from, STRANGER_MAX);
        let all = Arc::clone(&self.all).try_acquire_owned().ok();
        let (of_its_own, of_all) = own.zip(all).ok_or_else(busy)?;
        Ok(Seat {
            _of_all: of_all,
            _of_its_own: of_its_own,
        })
    }
}

/// Whoever is not heard asks again: nobody waits in a queue.
pub(super) fn busy() -> Fault {
    Fault::conflict("this node is too busy with its services; ask again")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::fixtures::id;
    use super::*;

    #[test]
    fn one_stranger_does_not_take_the_others_room_and_has_its_own_again_once_it_is_answered() {
        let admission = Admission::default();
        let mut seats: Vec<Seat> = (0..STRANGER_MAX)
            .map(|_| admission.admit(id(1)).unwrap())
            .collect();
        assert!(admission.admit(id(1)).is_err());
        assert!(admission.admit(id(2)).is_ok());
        seats.pop();
        assert!(admission.admit(id(1)).is_ok());
        drop(seats);
        let again: Vec<Seat> = (0..STRANGER_MAX)
            .map(|_| admission.admit(id(1)).unwrap())
            .collect();
        assert_eq!(
            admission.all.available_permits(),
            STRANGERS_MAX - again.len()
        );
    }

    #[test]
    fn all_strangers_together_have_so_much_room_and_no_more() {
        let admission = Admission::default();
        let all: Vec<Seat> = (0..STRANGERS_MAX)
            .map(|number| admission.admit(id(number)).unwrap())
            .collect();
        assert!(admission.admit(id(200)).is_err());
        drop(all);
        assert!(admission.admit(id(200)).is_ok());
    }
}
