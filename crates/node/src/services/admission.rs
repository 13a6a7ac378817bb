//! How many messages are taken in at once, and from whom: before a message is read nobody knows whether it counts for anything,
//! and reading it takes memory and the task's time.

use crate::fault::{Answer, Fault};
use crate::mesh::lock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vistara_model::NodeId;

/// Messages of one node that are read or answered at a time.
const EACH_MAX: usize = 32;
/// Messages of all nodes together with which no service connects this one: a new service comes from such a node.
const STRANGERS_MAX: usize = 16;
/// How long a message may take to arrive.
pub(crate) const ARRIVAL_BOUND: Duration = Duration::from_secs(10);

/// Who is being heard.
#[derive(Debug, Clone, Default)]
pub(super) struct Admission(Arc<Mutex<BTreeMap<NodeId, Guest>>>);

#[derive(Debug, Default)]
struct Guest {
    messages: usize,
    of_them_strange: usize,
}

/// A message's place, until it is answered.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Admission,
    from: NodeId,
    strange: bool,
}

impl Admission {
    /// A place for one more message.
    pub(super) fn admit(&self, from: NodeId, strange: bool) -> Answer<Place> {
        let mut guests = lock(&self.0);
        let strangers: usize = guests.values().map(|guest| guest.of_them_strange).sum();
        let of_this = guests.get(&from).map_or(0, |guest| guest.messages);
        if of_this >= EACH_MAX || (strange && strangers >= STRANGERS_MAX) {
            return Err(busy());
        }
        let guest = guests.entry(from).or_default();
        guest.messages += 1;
        guest.of_them_strange += usize::from(strange);
        Ok(Place {
            admission: self.clone(),
            from,
            strange,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut guests = lock(&self.admission.0);
        if let Some(guest) = guests.get_mut(&self.from) {
            guest.messages -= 1;
            guest.of_them_strange -= usize::from(self.strange);
            if guest.messages == 0 {
                guests.remove(&self.from);
            }
        }
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

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    #[test]
    fn one_node_has_so_many_places_and_has_them_again_once_it_is_answered() {
        let admission = Admission::default();
        let mut places: Vec<Place> = (0..EACH_MAX)
            .map(|_| admission.admit(id(1), false).unwrap())
            .collect();
        assert!(admission.admit(id(1), false).is_err());
        assert!(admission.admit(id(2), false).is_ok());
        places.pop();
        assert!(admission.admit(id(1), false).is_ok());
        drop(places);
        assert!(lock(&admission.0).is_empty(), "nobody is remembered");
    }

    #[test]
    fn strangers_share_their_places_and_take_none_of_those_who_are_known() {
        let admission = Admission::default();
        let all: Vec<Place> = (0..STRANGERS_MAX)
            .map(|number| admission.admit(id(number as u8), true).unwrap())
            .collect();
        assert!(admission.admit(id(200), true).is_err());
        assert!(admission.admit(id(200), false).is_ok());
        drop(all);
        assert!(admission.admit(id(200), true).is_ok());
    }
}
