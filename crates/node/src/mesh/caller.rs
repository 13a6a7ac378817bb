//! Who asks: the owner over the local socket, or somebody else over the mesh, with what that one may do.

use super::{Mesh, lock, now_s};
use crate::fault::{Answer, Fault};
use crate::linger::Lingering;
use crate::machine::Record;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vistara_control::{
    Question, Refusal, Requirement, Standing, Usage, authorize, has_right, leaves_host_alone,
    right, within_quota,
};
use vistara_mesh::{Ambient, MeshStream, Verified};
use vistara_model::{Bytes, GrantId, GrantTerms, MachineSpec, MachineState, NodeId, Right};

/// Who makes a request. Every route needs one: a request without it reaches no handler that asks.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// Whoever may open the node's socket.
    Owner,
    /// Another node, as its connection proves, with the token that it showed.
    Foreign(Arc<Foreign>),
    /// Somebody whose stream was no good, and why.
    Refused(Fault),
}

impl Caller {
    /// The grant under which it comes, and until when that counts.
    pub(super) fn grant(&self) -> Option<(GrantId, u64)> {
        match self {
            Caller::Foreign(foreign) => foreign
                .terms()
                .map(|terms| (terms.id.clone(), terms.until_s)),
            Caller::Owner | Caller::Refused(_) => None,
        }
    }

    /// Whether a machine is shown to it.
    pub(crate) fn sees(&self, record: &Record) -> bool {
        match self {
            Caller::Owner => true,
            Caller::Foreign(foreign) => foreign.sees(record),
            Caller::Refused(_) => false,
        }
    }

    /// Somebody else, or none where it is the owner.
    pub(crate) fn foreign(&self) -> Option<&Arc<Foreign>> {
        match self {
            Caller::Foreign(foreign) => Some(foreign),
            Caller::Owner | Caller::Refused(_) => None,
        }
    }
}

/// Another node, with the token that it showed.
#[derive(Debug, Clone)]
pub(crate) struct Foreign {
    node: NodeId,
    verified: Option<Verified>,
}

impl Foreign {
    pub(crate) fn new(node: NodeId, verified: Option<Verified>) -> Foreign {
        Foreign { node, verified }
    }

    /// Whether it has shown a token of this node's; [`Foreign::authorize`] says whether that counts.
    pub(super) fn is_granted(&self) -> bool {
        self.verified.is_some()
    }

    pub(super) fn terms(&self) -> Option<&GrantTerms> {
        self.verified.as_ref().map(Verified::terms)
    }

    /// Whether it may make a request that needs this, of the node `own`.
    pub(crate) fn authorize(
        &self,
        mesh: &Mesh,
        own: NodeId,
        requirement: Requirement,
    ) -> Answer<()> {
        let terms = self.terms();
        let now_s = now_s();
        let question = Question {
            node: own,
            terms,
            standing: terms.map_or(Standing::Unknown, |terms| mesh.standing(&terms.id)),
            now_s,
            requirement,
        };
        authorize(&question)?;
        Ok(self.permits(right(requirement), Usage::default())?)
    }

    /// Whether what holders have added to the token allows it, too.
    fn permits(&self, right: Option<Right>, after: Usage) -> Result<(), vistara_mesh::TokenError> {
        self.permits_all(right, after, Bytes(0))
    }

    /// The same, of somebody who brings images.
    pub(super) fn permits_disk(
        &self,
        right: Right,
        disk: Bytes,
    ) -> Result<(), vistara_mesh::TokenError> {
        self.permits_all(Some(right), Usage::default(), disk)
    }

    fn permits_all(
        &self,
        right: Option<Right>,
        after: Usage,
        disk: Bytes,
    ) -> Result<(), vistara_mesh::TokenError> {
        match &self.verified {
            None => Ok(()),
            Some(verified) => verified.permits(&Ambient {
                caller: self.node,
                now_s: now_s(),
                right,
                memory: after.memory,
                machines: after.machines,
                disk,
            }),
        }
    }

    /// Whether it has a right at all.
    pub(crate) fn may(&self, right: Right) -> bool {
        self.terms().is_some_and(|terms| has_right(terms, right))
            && self.permits(Some(right), Usage::default()).is_ok()
    }

    fn sees(&self, record: &Record) -> bool {
        let own = record
            .owner
            .as_ref()
            .is_some_and(|owner| owner.node == self.node);
        own || self.may(Right::Admin)
    }
}

/// Somebody on another node, and the grant under which a machine was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    pub(crate) node: NodeId,
    pub(crate) grant: GrantId,
}

/// For whom a machine is made.
#[derive(Clone)]
pub(crate) enum Asker {
    /// The node's owner.
    Owner,
    /// Another node.
    Foreign(Arc<Foreign>, Arc<Mesh>),
}

/// A share of a grant, held while a machine is being made: from its record on, the record counts.
pub(crate) struct Held(Arc<Mesh>, GrantId, Bytes);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(usage) = lock(&self.0.held).get_mut(&self.1) {
            usage.machines -= 1;
            usage.memory.0 -= self.2.0;
        }
    }
}

impl Asker {
    /// The other node's key, where it is another.
    pub(crate) fn node(&self) -> Option<NodeId> {
        match self {
            Asker::Owner => None,
            Asker::Foreign(foreign, _) => Some(foreign.node),
        }
    }

    /// Whether the asker's grant would allow one more machine with so much memory.
    pub(crate) fn could_have(
        &self,
        memory: Bytes,
        records: impl FnOnce() -> Vec<Arc<Record>>,
    ) -> Answer<()> {
        let Asker::Foreign(foreign, _) = self else {
            return Ok(());
        };
        let terms = foreign.terms().ok_or(Refusal::NoGrant)?;
        let after = within_quota(terms, used(&terms.id, &records()), memory)?;
        Ok(foreign.permits(Some(Right::Run), after)?)
    }

    /// Who will own a machine of this size, after looking whether the asker may have it. `records` gives the machines that
    /// there are.
    pub(crate) fn claim(
        &self,
        spec: &MachineSpec,
        memory: Bytes,
        records: impl FnOnce() -> Vec<Arc<Record>>,
    ) -> Answer<(Option<Owner>, Option<Held>)> {
        let Asker::Foreign(foreign, mesh) = self else {
            return Ok((None, None));
        };
        leaves_host_alone(spec, foreign.may(Right::Network))?;
        let terms = foreign.terms().ok_or(Refusal::NoGrant)?;
        // One after another from here on, so that two requests never get the same share.
        let mut held = lock(&mesh.held);
        let mut usage = used(&terms.id, &records());
        let promised = held.entry(terms.id.clone()).or_default();
        usage.machines += promised.machines;
        usage.memory.0 = usage.memory.0.saturating_add(promised.memory.0);
        let after = within_quota(terms, usage, memory)?;
        foreign.permits(Some(Right::Run), after)?;
        promised.machines += 1;
        promised.memory.0 += memory.0;
        let owner = Owner {
            node: foreign.node,
            grant: terms.id.clone(),
        };
        let held = Held(Arc::clone(mesh), terms.id.clone(), memory);
        Ok((Some(owner), Some(held)))
    }
}

/// What the machines under a grant take, ended ones that are kept included. It is read from their records, so that a restart
/// forgets nothing of it.
pub(crate) fn used(grant: &GrantId, records: &[Arc<Record>]) -> Usage {
    let mut usage = Usage::default();
    for record in records {
        let under = (record.owner.as_ref()).is_some_and(|owner| owner.grant == *grant);
        if !under {
            continue;
        }
        usage.machines += 1;
        if record.state != MachineState::Ended {
            let memory = record
                .spec
                .memory
                .max(record.linux_memory.unwrap_or(Bytes(0)));
            usage.memory.0 = usage.memory.0.saturating_add(memory.0);
        }
    }
    usage
}

/// A stream to be served, and whose it is.
pub(crate) struct Visit {
    pub(crate) stream: Guarded,
    pub(crate) caller: Caller,
}

type End = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A stream that breaks off when what it is served under ends.
pub(crate) struct Guarded {
    stream: Lingering<MeshStream>,
    end: Option<End>,
}

impl Guarded {
    pub(super) fn new(
        stream: MeshStream,
        end: impl Future<Output = ()> + Send + 'static,
    ) -> Guarded {
        Guarded {
            stream: Lingering::new(stream),
            end: Some(Box::pin(end)),
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let over = match &mut self.end {
            Some(end) => end.as_mut().poll(cx).is_ready(),
            None => true,
        };
        if over {
            self.end = None;
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the grant is void",
            ));
        }
        Ok(())
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
