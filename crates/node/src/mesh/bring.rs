//! Whether somebody may bring so many bytes of images, and taking note of it.

use super::brought::{Brought, Coming};
use super::caller::Foreign;
use super::{Caller, Mesh, lock};
use crate::fault::{Answer, Fault, blocking};
use crate::node::Node;
use std::fmt::{Debug, Formatter};
use std::sync::{Arc, Mutex};
use vistara_api::ErrorKind;
use vistara_control::{Refusal, within_disk};
use vistara_image::{Admission, ImageError, ImageStore};
use vistara_model::{Bytes, Digest, GrantId, Right};

/// The books, open for one caller.
struct Books<'a> {
    brought: &'a mut Brought,
    store: &'a ImageStore,
    grant: &'a GrantId,
    judge: &'a dyn Fn(Bytes, Bytes) -> Answer<()>,
}

impl Books<'_> {
    /// What these blobs cost the caller; those that are here whole, nothing, unless they have arrived just now.
    fn costs(&self, blobs: &[(Digest, u64)], arrived: bool) -> Vec<(Digest, u64)> {
        let here = |digest: &Digest| self.store.blob_bytes(digest) > 0;
        let mut costs: Vec<(Digest, u64)> = Vec::new();
        for (digest, bytes) in blobs {
            let free = if arrived {
                self.brought.has(digest)
            } else {
                self.store.has_blob(digest)
            };
            if !free && !costs.iter().any(|one| one.0 == *digest) {
                let cost = self.brought.cost(digest, *bytes, here);
                costs.push((digest.clone(), cost));
            }
        }
        costs
    }

    fn judge(&self, costs: &[(Digest, u64)], more: u64) -> Answer<()> {
        let here = |digest: &Digest| self.store.blob_bytes(digest) > 0;
        let asked = (costs.iter()).fold(more, |sum, one| sum.saturating_add(one.1));
        (self.judge)(self.brought.used(self.grant, costs, here), Bytes(asked))
    }

    /// Judges and enters. An archive's own bytes are not counted beside what came out of it.
    fn admit(&mut self, blobs: &[(Digest, u64)], arrived: bool, held: &mut Coming) -> Answer<()> {
        if arrived {
            held.unspool(self.brought);
        }
        let costs = self.costs(blobs, arrived);
        if costs.is_empty() {
            return Ok(());
        }
        self.judge(&costs, 0)?;
        let store = self.store;
        (self.brought).enter(self.grant, &costs, |digest| store.blob_bytes(digest) > 0)?;
        held.blobs(self.brought, &costs);
        Ok(())
    }
}

/// What of a caller is under way: an operation on its image, under the terms of its grant.
pub(crate) struct Bringing {
    mesh: Arc<Mesh>,
    store: ImageStore,
    foreign: Arc<Foreign>,
    held: Mutex<Coming>,
}

impl Debug for Bringing {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bringing").finish_non_exhaustive()
    }
}

impl Bringing {
    fn with<T>(&self, work: impl FnOnce(&mut Books<'_>, &mut Coming) -> Answer<T>) -> Answer<T> {
        let terms = (self.foreign.terms())
            .ok_or_else(|| Fault::new(ErrorKind::Denied, Refusal::NoGrant.to_string()))?;
        let judge = |used: Bytes, asked: Bytes| {
            let disk = within_disk(terms, used, asked)?;
            Ok(self.foreign.permits_disk(Right::Images, disk)?)
        };
        let mut held = lock(&self.held);
        let mut brought = lock(&self.mesh.brought);
        brought.read()?;
        let mut books = Books {
            brought: &mut brought,
            store: &self.store,
            grant: &terms.id,
            judge: &judge,
        };
        work(&mut books, &mut held)
    }

    /// Lets so many further bytes of an archive come.
    pub(crate) async fn spool(self: &Arc<Self>, bytes: u64) -> Answer<()> {
        let this = Arc::clone(self);
        blocking(move || {
            this.with(|books, held| {
                books.judge(&[], bytes)?;
                held.spool(books.brought, bytes);
                Ok(())
            })
        })
        .await?
    }
}

impl Admission for Bringing {
    fn admit(&self, blobs: &[(Digest, u64)], arrived: bool) -> Result<(), ImageError> {
        self.with(|books, held| books.admit(blobs, arrived, held))
            .map_err(|fault| ImageError::NotAdmitted {
                why: fault.0.message,
                hint: fault.0.hint,
            })
    }

    fn brought(&self, digest: &Digest) -> bool {
        self.with(|books, _| Ok(books.brought.is_of(digest, books.grant)))
            .unwrap_or(false)
    }
}

impl Mesh {
    /// Begins something that brings images; none where the caller is the owner, of whom no note is taken. `stream`: its
    /// bytes come from the caller.
    pub(crate) fn bringing(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        stream: bool,
    ) -> Answer<Option<Arc<Bringing>>> {
        if let Caller::Refused(fault) = caller {
            return Err(fault.clone());
        }
        let Some(foreign) = caller.foreign().cloned() else {
            return Ok(None);
        };
        let terms = (foreign.terms())
            .ok_or_else(|| Fault::new(ErrorKind::Denied, Refusal::NoGrant.to_string()))?;
        let mut held = Coming::under(self, &terms.id);
        if stream {
            held.stream(&mut lock(&self.brought))?;
        }
        Ok(Some(Arc::new(Bringing {
            mesh: Arc::clone(self),
            store: node.mechanisms().images,
            foreign,
            held: Mutex::new(held),
        })))
    }

    /// Whether a caller may bring these blobs, all of them.
    pub(crate) async fn may_bring(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        blobs: Vec<(Digest, u64)>,
    ) -> Answer<()> {
        let Some(bringing) = self.bringing(node, caller, false)? else {
            return Ok(());
        };
        blocking(move || {
            bringing.with(|books, _| {
                let costs = books.costs(&blobs, false);
                books.judge(&costs, 0)
            })
        })
        .await?
    }

    /// Takes note that a caller brings a blob, where it may; of the owner's none is taken.
    pub(crate) async fn bring(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        digest: &Digest,
        bytes: u64,
    ) -> Answer<Option<Arc<Bringing>>> {
        let Some(bringing) = self.bringing(node, caller, true)? else {
            return Ok(None);
        };
        let blobs = [(digest.clone(), bytes)];
        blocking(move || {
            bringing.with(|books, held| books.admit(&blobs, false, held))?;
            Ok(Some(bringing))
        })
        .await?
    }

    /// Bytes that are here under a grant; none where the books are damaged, which the log says.
    pub(crate) async fn brought_under(
        self: &Arc<Self>,
        node: &Arc<Node>,
        grant: &GrantId,
    ) -> Answer<Bytes> {
        let (mesh, node, grant) = (Arc::clone(self), Arc::clone(node), grant.clone());
        blocking(move || {
            let store = node.mechanisms().images;
            let mut brought = lock(&mesh.brought);
            // What a grant is, and that it can be revoked, does not hang on this.
            if let Err(fault) = brought.read() {
                tracing::error!(
                    error = fault.0.message,
                    "what was brought under grants cannot be said"
                );
                return Bytes(0);
            }
            brought.used(&grant, &[], |digest| store.blob_bytes(digest) > 0)
        })
        .await
    }
}
