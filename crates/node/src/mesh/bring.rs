//! Whether somebody may bring so many bytes of images, and taking note of it.

use super::brought::{Brought, Coming};
use super::{Caller, Mesh, lock};
use crate::fault::{Answer, Fault, blocking};
use crate::node::Node;
use std::sync::Arc;
use vistara_api::ErrorKind;
use vistara_control::{Refusal, within_disk};
use vistara_model::{Bytes, Digest, GrantId, Right};

impl Mesh {
    /// Whether a caller may bring these blobs, all of them.
    pub(crate) async fn may_bring(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        blobs: &[(Digest, u64)],
    ) -> Answer<()> {
        let asked = (blobs.iter()).fold(0_u64, |sum, (_, bytes)| {
            sum.saturating_add(Brought::weight(*bytes).0)
        });
        self.with_books(node, caller, move |brought, here, judge| {
            let Some((grant, judge)) = judge else {
                return Ok(());
            };
            judge(brought.used(grant, None, here), Bytes(asked))
        })
        .await
    }

    /// Takes note that a caller brings a blob, where it may; of the owner's none is taken.
    pub(crate) async fn bring(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        digest: &Digest,
        bytes: u64,
    ) -> Answer<Option<Coming>> {
        let mesh = Arc::clone(self);
        let blob = digest.clone();
        self.with_books(node, caller, move |brought, here, judge| {
            let Some((grant, judge)) = judge else {
                return Ok(None);
            };
            // What is here already, whoever brought it, costs nothing.
            if here(&blob) && !brought.has(&blob) {
                return Ok(None);
            }
            judge(
                brought.used(grant, Some(&blob), here),
                Brought::weight(bytes),
            )?;
            brought.enter(grant, &[(blob.clone(), bytes)], true, here)?;
            Ok(Some(Coming::new(&mesh, &blob)))
        })
        .await
    }

    /// Most bytes that a caller's pull or archive may have; none where there is no limit.
    pub(crate) async fn may_bring_at_most(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
    ) -> Answer<Option<u64>> {
        let limit = caller
            .foreign()
            .and_then(|foreign| foreign.terms())
            .and_then(|terms| terms.limits.disk_max);
        self.with_books(node, caller, move |brought, here, judge| {
            let Some((grant, judge)) = judge else {
                return Ok(None);
            };
            let used = brought.used(grant, None, here);
            match limit {
                // Only a holder's own check can say no to this.
                None => judge(used, Bytes(u64::MAX - used.0)).map(|()| None),
                Some(limit) => {
                    let left = limit.0.saturating_sub(used.0);
                    judge(used, Bytes(left.max(1))).map(|()| Some(left))
                }
            }
        })
        .await
    }

    /// Takes note of the layers of an image that a caller had pulled or imported, of those that no other image has.
    pub(crate) async fn has_brought(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        image: &vistara_image::Image,
    ) -> Answer<()> {
        if caller.foreign().is_none() {
            return Ok(());
        }
        let store = node.mechanisms().images;
        let (id, mut layers) = (image.id.clone(), image.layers.clone());
        let others = blocking(move || store.list()).await??;
        layers.retain(|layer| {
            !(others.iter())
                .filter(|other| other.id != id)
                .any(|other| other.layers.iter().any(|one| one.digest == layer.digest))
        });
        self.with_books(node, caller, move |brought, here, judge| {
            let Some((grant, _)) = judge else {
                return Ok(());
            };
            let blobs: Vec<_> = (layers.iter())
                .filter(|layer| !brought.has(&layer.digest))
                .map(|layer| (layer.digest.clone(), layer.size_bytes))
                .collect();
            brought.enter(grant, &blobs, false, here)
        })
        .await
    }

    /// Bytes that are here under a grant.
    pub(crate) async fn brought_under(
        self: &Arc<Self>,
        node: &Arc<Node>,
        grant: &GrantId,
    ) -> Answer<Bytes> {
        let (mesh, node, grant) = (Arc::clone(self), Arc::clone(node), grant.clone());
        blocking(move || {
            let store = node.mechanisms().images;
            let mut brought = lock(&mesh.brought);
            brought.read()?;
            Ok(brought.used(&grant, None, |digest| store.blob_bytes(digest) > 0))
        })
        .await?
    }

    /// Looks into the books and the store, off the runtime's threads, one after another.
    async fn with_books<T: Send + 'static>(
        self: &Arc<Self>,
        node: &Arc<Node>,
        caller: &Caller,
        work: impl for<'a> FnOnce(
            &'a mut Brought,
            &'a dyn Fn(&Digest) -> bool,
            Option<(&'a GrantId, &'a dyn Fn(Bytes, Bytes) -> Answer<()>)>,
        ) -> Answer<T>
        + Send
        + 'static,
    ) -> Answer<T> {
        if let Caller::Refused(fault) = caller {
            return Err(fault.clone());
        }
        let (mesh, node) = (Arc::clone(self), Arc::clone(node));
        let foreign = caller.foreign().cloned();
        blocking(move || {
            let store = node.mechanisms().images;
            let here = |digest: &Digest| store.blob_bytes(digest) > 0;
            let mut brought = lock(&mesh.brought);
            let Some(foreign) = foreign else {
                return work(&mut brought, &here, None);
            };
            brought.read()?;
            let terms = foreign
                .terms()
                .ok_or_else(|| Fault::new(ErrorKind::Denied, Refusal::NoGrant.to_string()))?;
            let judge = |used: Bytes, asked: Bytes| {
                let disk = within_disk(terms, used, asked)?;
                Ok(foreign.permits_disk(Right::Images, disk)?)
            };
            work(&mut brought, &here, Some((&terms.id, &judge)))
        })
        .await?
    }
}
