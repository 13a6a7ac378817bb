//! How many messages of strangers are taken in at once: before one is read nobody knows whether it counts for anything, and
//! reading it takes memory and the task's time. Whoever has a grant, or looks after a service with this node, is none; their
//! messages are bounded by their connection's streams and by the task's queue.

use crate::fault::{Answer, Fault};
use crate::mesh::lock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vistara_model::NodeId;

/// Messages of all strangers, at half a MiB each.
const STRANGERS_MAX: usize = 16;
/// Of these, messages of one.
const STRANGER_MAX: usize = 2;
/// How long a message may take to arrive.
pub(crate) const ARRIVAL_BOUND: Duration = Duration::from_secs(10);

/// Who is being heard, with how many messages.
#[derive(Debug, Clone, Default)]
pub(super) struct Admission(Arc<Mutex<BTreeMap<NodeId, usize>>>);

/// A stranger's message, until it is answered.
#[derive(Debug)]
pub(crate) struct Seat {
    admission: Admission,
    from: NodeId,
}

impl Admission {
    /// Room for one more message.
    pub(super) fn admit(&self, from: NodeId) -> Answer<Seat> {
        let mut heard = lock(&self.0);
        let all: usize = heard.values().sum();
        let of_this = heard.get(&from).copied().unwrap_or(0);
        if of_this >= STRANGER_MAX || all >= STRANGERS_MAX {
            return Err(busy());
        }
        heard.insert(from, of_this + 1);
        Ok(Seat {
            admission: self.clone(),
            from,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut heard = lock(&self.admission.0);
        let left = heard.get(&self.from).map_or(0, |count| count - 1);
        match left {
            0 => heard.remove(&self.from),
            more => heard.insert(self.from, more),
        };
    }
}

/// Whoever is not heard asks again: nobody waits in a queue.
pub(super) fn busy() -> Fault {
    Fault::conflict("this node is too busy with its services; ask again")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn id(number: usize) -> NodeId {
        NodeId::from_bytes([u8::try_from(number).unwrap(); 32])
    }

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
        assert!(lock(&admission.0).is_empty(), "nobody is remembered");
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
