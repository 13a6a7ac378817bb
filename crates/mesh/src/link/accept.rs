//! What others open: connections, each with a place among a bounded number, and their streams.

use super::{
    ACCEPTED_MAX, Accepted, CODE_GARBAGE, CODE_LEAVING, CODE_TOO_MANY, CONNECTION_WINDOW,
    HANDSHAKES_MAX, Inner, MeshStream, OF_ONE_MAX, OF_STRANGER_MAX, STEP_BOUND, STRANGERS_MAX,
    STREAMS_MAX, lock,
};
use crate::frame::{self, FrameError, Hello};
use iroh::endpoint::{Connection, Incoming, VarInt};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use vistara_model::NodeId;

pub(super) async fn accept_all(inner: Arc<Inner>, sender: mpsc::Sender<Accepted>) {
    loop {
        let incoming = tokio::select! {
            incoming = inner.endpoint.accept() => incoming,
            () = inner.stop.cancelled() => None,
        };
        let Some(incoming) = incoming else { return };
        let open: usize = lock(&inner.accepted)
            .values()
            .map(|taken| taken.connections)
            .sum();
        if open >= ACCEPTED_MAX {
            incoming.refuse();
            continue;
        }
        let handshakes = HANDSHAKES_MAX - inner.handshakes.available_permits();
        // Under load, only who receives what is sent to its address gets further. An answer that asks for that costs nothing
        // here, neither a task nor keys.
        let loaded = open >= ACCEPTED_MAX / 4 || handshakes >= HANDSHAKES_MAX / 4;
        if loaded && !incoming.remote_addr_validated() {
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "a connection was not retried");
            }
            continue;
        }
        let Ok(permit) = Arc::clone(&inner.handshakes).try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let task = accept_one(Arc::clone(&inner), incoming, permit, sender.clone());
        inner
            .tasks
            .spawn(inner.stop.clone().run_until_cancelled_owned(task));
    }
}

/// What one node has of the accepted connections.
#[derive(Debug, Default)]
pub(super) struct Taken {
    connections: usize,
    /// Nobody knows it, and nobody has [vouched](Accepted::vouch) for it.
    stranger: bool,
}

/// One place among the accepted connections, given back when dropped.
pub(super) struct Place {
    inner: Arc<Inner>,
    node: NodeId,
    connection: Connection,
    /// Whether the connection has the windows of a node that has business here.
    raised: AtomicBool,
}

impl Place {
    fn take(inner: &Arc<Inner>, node: NodeId, connection: &Connection) -> Option<Place> {
        let known = (inner.knows)(&node);
        let mut accepted = lock(&inner.accepted);
        let (connections, stranger) = accepted
            .get(&node)
            .map_or((0, true), |taken| (taken.connections, taken.stranger));
        let stranger = stranger && !known;
        let most = if stranger {
            OF_STRANGER_MAX
        } else {
            OF_ONE_MAX
        };
        if connections >= most {
            return None;
        }
        let strangers = accepted.values().filter(|taken| taken.stranger).count();
        if stranger && strangers >= STRANGERS_MAX {
            return None;
        }
        let taken = accepted.entry(node).or_default();
        taken.connections += 1;
        taken.stranger = stranger;
        drop(accepted);
        let place = Place {
            inner: Arc::clone(inner),
            node,
            connection: connection.clone(),
            raised: AtomicBool::new(false),
        };
        if !stranger {
            place.raise();
        }
        Some(place)
    }

    /// Whether it is no stranger's, or not any more.
    fn is_known(&self) -> bool {
        if !self.raised.load(Ordering::Acquire) && (self.inner.knows)(&self.node) {
            self.raise();
        }
        self.raised.load(Ordering::Acquire)
    }

    /// Gives it what a node gets that has business here.
    pub(super) fn raise(&self) {
        if self.raised.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(taken) = lock(&self.inner.accepted).get_mut(&self.node) {
            taken.stranger = false;
        }
        self.connection
            .set_receive_window(VarInt::from_u32(CONNECTION_WINDOW));
        self.connection
            .set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut accepted = lock(&self.inner.accepted);
        if let Some(taken) = accepted.get_mut(&self.node) {
            taken.connections -= 1;
            if taken.connections == 0 {
                accepted.remove(&self.node);
            }
        }
    }
}

async fn accept_one(
    inner: Arc<Inner>,
    incoming: Incoming,
    permit: OwnedSemaphorePermit,
    sender: mpsc::Sender<Accepted>,
) {
    let Ok(Ok(connection)) = tokio::time::timeout(STEP_BOUND, async { incoming.await }).await
    else {
        return;
    };
    let peer = NodeId::from_bytes(*connection.remote_id().as_bytes());
    let Some(place) = Place::take(&inner, peer, &connection).map(Arc::new) else {
        connection.close(CODE_TOO_MANY.into(), b"too many connections");
        return;
    };
    let greet = async {
        let pair = connection.accept_bi().await.map_err(io::Error::other)?;
        let mut stream = MeshStream::new(pair);
        frame::decode_hello(&frame::read(&mut stream).await?)?;
        let hello = Hello {
            version: frame::VERSION,
            generation: inner.identity.generation(),
        };
        frame::write(&mut stream, &hello).await?;
        // Finished, not dropped: what was written still goes out.
        let _ = stream.send.finish();
        Ok::<_, FrameError>(())
    };
    match tokio::time::timeout(STEP_BOUND, greet).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) | Err(_) => {
            connection.close(CODE_GARBAGE.into(), b"no greeting");
            return;
        }
    }
    drop(permit);
    let counted = Arc::new(());
    loop {
        let stream = if place.is_known() {
            connection.accept_bi().await
        } else {
            match tokio::time::timeout(inner.stranger_idle, connection.accept_bi()).await {
                Ok(stream) => stream,
                Err(_) if Arc::strong_count(&counted) > 1 || place.is_known() => continue,
                Err(_) => {
                    connection.close(CODE_LEAVING.into(), b"nothing was asked");
                    return;
                }
            }
        };
        let Ok(pair) = stream else { return };
        // It may have been given a grant since.
        place.is_known();
        let (connection, sender) = (connection.clone(), sender.clone());
        let (counted, place) = (Arc::clone(&counted), Arc::downgrade(&place));
        let task = async move {
            let mut stream = MeshStream::new(pair);
            stream._counted = Some(counted);
            let first = async { frame::decode_open(&frame::read(&mut stream).await?) };
            match tokio::time::timeout(STEP_BOUND, first).await {
                Ok(Ok(open)) => {
                    let accepted = Accepted {
                        peer,
                        open,
                        stream,
                        place,
                    };
                    let _ = sender.send(accepted).await;
                }
                // Who speaks garbage, or nothing, has no further business here.
                Ok(Err(_)) | Err(_) => connection.close(CODE_GARBAGE.into(), b"garbage"),
            }
        };
        inner
            .tasks
            .spawn(inner.stop.clone().run_until_cancelled_owned(task));
    }
}
