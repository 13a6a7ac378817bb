//! Partners: the nodes with which this one looks after services. They are let in, and kept connected, as far as they are not for
//! another reason.
//!
//! They follow from the documents that are known, and from nothing else: whoever is named in none any more is forgotten after a
//! while. A document whose owner's grant does not count names nobody, unless a copy of it is here still.

use super::{Known, PARTNER_KEPT, PARTNERS_EVERY, PARTNERS_MAX, ServiceId, Task};
use crate::mesh::lock;
use std::collections::BTreeMap;
use std::time::Duration;
use vistara_model::NodeId;

/// Those that are wanted in this order, and those that were until lately, as many as there may be.
fn chosen(
    before: &BTreeMap<NodeId, Duration>,
    wanted: impl IntoIterator<Item = NodeId>,
    now: Duration,
) -> BTreeMap<NodeId, Duration> {
    let mut all = BTreeMap::new();
    for node in wanted {
        if all.len() >= PARTNERS_MAX {
            break;
        }
        all.insert(node, now);
    }
    for (node, named) in before {
        if all.len() < PARTNERS_MAX && now < *named + PARTNER_KEPT {
            all.entry(*node).or_insert(*named);
        }
    }
    all
}

impl Task {
    /// Whom a document has this node be connected with.
    fn named_by(&self, known: &Known) -> Vec<NodeId> {
        let document = known.document();
        if document.removed {
            let late = known.told.iter();
            return late
                .filter(|(_, told)| **told < document.version)
                .map(|(node, _)| *node)
                .collect();
        }
        if known.jobs.is_empty() && self.stands(known.id()).is_err() {
            return Vec::new();
        }
        let named = document.nodes.iter().map(|one| one.node);
        named.chain([document.owner]).collect()
    }

    /// Finds out who is a partner now; lets those in and dials them, and forgets the others.
    pub(super) fn settle_partners(&mut self, now: Duration) {
        let Some(open) = self.open.clone() else {
            return;
        };
        self.partners_due = now + PARTNERS_EVERY;
        let own = open.identity.id();
        let mut services: Vec<(bool, ServiceId)> = (self.known.values())
            .map(|known| (known.document().owner != own, known.id()))
            .collect();
        services.sort_unstable();
        let mut wanted = Vec::new();
        for (_, service) in services {
            if let Some(known) = self.known.get(&service) {
                wanted.extend(self.named_by(known));
            }
        }
        wanted.retain(|node| *node != own);
        let all = chosen(&self.partners, wanted, now);
        let before = std::mem::replace(&mut self.partners, all);
        *lock(&open.partners) = self.partners.keys().copied().collect();
        let Some(link) = self.mesh.link() else {
            return;
        };
        let over = before
            .keys()
            .filter(|node| !self.partners.contains_key(node));
        for node in over {
            if lock(&open.peers).get(node).is_none() {
                link.forget(node);
            }
        }
        for node in self.partners.keys() {
            if link.state(node).is_none()
                // It is dialled where it states to be.
                && let Err(error) = link.keep(*node, Vec::new())
            {
                tracing::debug!(%error, node = node.short(), "a partner cannot be dialled");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::id;
    use super::*;

    #[test]
    fn partners_are_bounded_and_forgotten_some_time_after_they_are_named_no_more() {
        let begin = Duration::from_secs(1000);
        let many = chosen(&BTreeMap::new(), (0..2 * PARTNERS_MAX).map(id), begin);
        assert_eq!(many.len(), PARTNERS_MAX);
        assert!(many.contains_key(&id(0)), "the first ones come first");
        let other = id(5 * PARTNERS_MAX);
        let soon = chosen(&many, [other], begin + Duration::from_secs(1));
        assert!(soon.len() == PARTNERS_MAX && soon.contains_key(&other));
        let late = chosen(&soon, [other], begin + PARTNER_KEPT);
        assert_eq!(late.into_keys().collect::<Vec<_>>(), [other]);
    }
}
