//! Documents of services on their way: heard from others and believed or not, told to others, and forgotten once all have heard
//! that they are wanted no more.

use super::documents::{cannot_keep, counts, role};
use super::keeping::spec;
use super::last_words::{self, LastWord};
use super::store::{self, Stored, text};
use super::{
    About, Known, SERVICES_MAX, SERVICES_OF_ONE_MAX, Task, VERDICT_KEPT, VERDICT_SHARE, Verdict,
};
use crate::fault::{Answer, Fault, blocking, chain};
use crate::fence::boottime;
use crate::mesh::{Open, lock};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use vistara_api::ErrorKind;
use vistara_control::services::ServiceId;
use vistara_control::services::wire::ToNode;
use vistara_mesh::service::SealedDocument;
use vistara_model::NodeId;

/// How often nodes are given a document that they do not have.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How often it is looked what can be forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(1);

impl Task {
    /// Somebody has a document. What is older than what is known, or not this node's affair, is left alone.
    pub(super) async fn hear_document(&mut self, open: &Open, bytes: &[u8]) -> Answer<()> {
        let denied = |error: &dyn std::error::Error| Fault::new(ErrorKind::Denied, chain(error));
        let sealed = SealedDocument::read(bytes).map_err(|error| denied(&error))?;
        let document = sealed.document();
        match self.known.get(&store::id(&sealed)) {
            Some(known) if known.document().owner != document.owner => {
                return Err(Fault::new(
                    ErrorKind::Denied,
                    "the service's document is another owner's",
                ));
            }
            Some(known) if known.document().version >= document.version => return Ok(()),
            Some(known) if known.document().task != document.task => {
                return Err(Fault::new(
                    ErrorKind::Denied,
                    "what was asked for as a service or a task does not become another",
                ));
            }
            Some(_) => {}
            None if self.damaged.contains(&store::id(&sealed)) => {
                return Err(Fault::conflict(
                    "what this node kept of the service is damaged, and it may have promised something there",
                ));
            }
            // Nobody has this node remember anything but who holds its own, live grant.
            None if document.removed => return Ok(()),
            None => {
                let own = open.identity.id();
                let owners = (self.known.values().map(Known::document))
                    .filter(|known| !known.removed && known.owner != own)
                    .map(|known| known.owner);
                let of_it = owners.clone().filter(|owner| *owner == document.owner);
                if owners.count() >= SERVICES_MAX || of_it.count() >= SERVICES_OF_ONE_MAX {
                    return Err(Fault::conflict("this node knows enough services"));
                }
                let asker = role(&self.mesh, open, document)?;
                counts(&self.mesh, open, &asker)?;
            }
        }
        self.replace(sealed).await
    }

    /// A newer document, or a first one: it is on disk before anything is done about it.
    pub(super) async fn replace(&mut self, sealed: SealedDocument) -> Answer<()> {
        let open = self.opened().await?;
        let service = store::id(&sealed);
        let (store, kept) = (self.store.clone(), sealed.clone());
        let removed = sealed.document().removed;
        blocking(move || {
            store.put_document(&kept)?;
            if removed {
                store.strip(service)
            } else {
                Ok(())
            }
        })
        .await?
        .map_err(|error| cannot_keep(&error))?;
        tracing::info!(
            service = text(service),
            name = sealed.document().name,
            version = sealed.document().version,
            removed,
            "a service's document"
        );
        let Some(known) = self.known.get_mut(&service) else {
            self.take_in(Stored {
                document: sealed,
                keepers: None,
                keeper: None,
                late: Vec::new(),
                settled: None,
            });
            self.settle_partners(boottime());
            return Ok(());
        };
        let document = sealed.document().clone();
        known.bytes = sealed.bytes().into();
        known.sealed = Arc::new(sealed);
        known.heard = SystemTime::now();
        known.next_telling = Duration::ZERO;
        known.verdict = Mutex::default();
        if removed {
            (known.keeper, known.overseer, known.change) = (None, None, None);
            known.to_begin.clear();
            known.care = Default::default();
        } else {
            known.role = role(&self.mesh, &open, &document);
            if let Some(keeper) = &mut known.keeper {
                keeper.update(spec(&document));
            }
        }
        self.let_go_of(service, document.replicas);
        if removed {
            self.clear_copies(service);
        }
        self.settle_partners(boottime());
        Ok(())
    }

    /// Whether the owner's grant counts now.
    pub(super) fn stands(&self, service: ServiceId) -> Answer<()> {
        let (Some(open), Some(known)) = (&self.open, self.known.get(&service)) else {
            return Err(Fault::conflict("the service is not known here"));
        };
        let asker = known.role.as_ref().map_err(Clone::clone)?;
        let (begin, revocations) = (boottime(), self.mesh.revocations());
        let mut verdict = lock(&known.verdict);
        if let Some(found) = verdict.as_ref()
            && (begin < found.until && revocations == found.revocations)
        {
            return found.stands.clone();
        }
        let stands = counts(&self.mesh, open, asker);
        let now = boottime();
        let dear = now.saturating_sub(begin) * VERDICT_SHARE;
        *verdict = Some(Verdict {
            until: now + VERDICT_KEPT.max(dear),
            revocations,
            stands: stands.clone(),
        });
        stands
    }

    /// Gives the document to those that may not have it: the owner to all, a keeper to all that were never heard of it.
    pub(super) fn tell(&mut self, service: ServiceId, now: Duration) {
        let Some(own) = self.own() else { return };
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let is_owner = known.document().owner == own;
        if now < known.next_telling || !(is_owner || known.document().removed) {
            return;
        }
        known.next_telling = now + TELL_EVERY;
        let version = known.document().version;
        let named: BTreeSet<NodeId> = (known.document().nodes.iter())
            .map(|one| one.node)
            .chain(known.told.keys().copied())
            .collect();
        let mut late: Vec<NodeId> = (named.into_iter())
            .filter(|node| known.told.get(node).is_none_or(|told| *told < version))
            .collect();
        let removed = known.document().removed;
        late.retain(|node| self.lives(*node));
        for node in late {
            if node == own {
                continue;
            }
            self.send(service, node, About::Document, ToNode::Describe);
        }
        if !removed {
            self.begin_keepers(service);
        }
    }

    /// Forgets services that were removed long ago, or of which everybody has heard.
    pub(super) async fn forget_old(&mut self, now: Duration) {
        self.forget_due = now + FORGET_EVERY;
        self.forget_tasks().await;
        let own = self.own();
        let removed =
            (self.known.values()).filter(|known| known.document().removed && known.jobs.is_empty());
        let (over, kept): (Vec<&Known>, Vec<&Known>) = removed.partition(|known| {
            let version = known.document().version;
            let all_told = Some(known.document().owner) == own
                && !known.told.is_empty()
                && (known.told.iter()).all(|(node, told)| *told >= version || Some(*node) == own);
            // A clock that was set back makes none old.
            let late = known
                .heard
                .elapsed()
                .is_ok_and(|age| age > last_words::KEPT);
            all_told || late
        });
        let words = (kept.into_iter())
            .filter(|known| Some(known.document().owner) != own)
            .map(|known| LastWord {
                service: known.id(),
                owner: known.document().owner,
                bytes: known.bytes.len(),
                heard: known.heard,
            });
        let beyond = last_words::beyond(words.collect(), last_words::BYTES_MAX);
        let over: Vec<ServiceId> = over.into_iter().map(Known::id).collect();
        for service in over.into_iter().chain(beyond) {
            self.known.remove(&service);
            self.partners_due = Duration::ZERO;
            let store = self.store.clone();
            let removed = blocking(move || store.remove(service)).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(%error, "a removed service's directory stays");
            }
        }
    }
}
