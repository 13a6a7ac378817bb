//! What others open: connections, each with a place among a bounded number, and their streams.

use super::{
    ACCEPTED_MAX, Accepted, CODE_GARBAGE, CODE_LEAVING, CODE_TOO_MANY, Inner, MeshStream,
    OF_ONE_MAX, STEP_BOUND, STRANGER_IDLE, STRANGERS_MAX, lock,
};
use crate::frame::{self, FrameError, Hello};
use iroh::endpoint::Incoming;
use std::io;
use std::sync::Arc;
use tokio::sync::mpsc;
use vistara_model::NodeId;

pub(super) async fn accept_all(inner: Arc<Inner>, sender: mpsc::Sender<Accepted>) {
    loop {
        let incoming = tokio::select! {
            incoming = inner.endpoint.accept() => incoming,
            () = inner.stop.cancelled() => None,
        };
        let Some(incoming) = incoming else { return };
        let open: usize = lock(&inner.accepted).values().sum();
        if open >= ACCEPTED_MAX {
            incoming.refuse();
            continue;
        }
        // Under load, only who receives what is sent to its address gets further.
        if open >= ACCEPTED_MAX / 4 && !incoming.remote_addr_validated() {
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "a connection was not retried");
            }
            continue;
        }
        let task = accept_one(Arc::clone(&inner), incoming, sender.clone());
        inner
            .tasks
            .spawn(inner.stop.clone().run_until_cancelled_owned(task));
    }
}

/// One place among the accepted connections, given back when dropped.
struct Place(Arc<Inner>, NodeId);

impl Place {
    fn take(inner: &Arc<Inner>, node: NodeId) -> Option<Place> {
        let known = (inner.knows)(&node);
        let mut accepted = lock(&inner.accepted);
        if accepted
            .get(&node)
            .is_some_and(|count| *count >= OF_ONE_MAX)
        {
            return None;
        }
        if !known {
            let strangers = accepted
                .keys()
                .filter(|other| !(inner.knows)(other))
                .count();
            if strangers >= STRANGERS_MAX {
                return None;
            }
        }
        *accepted.entry(node).or_default() += 1;
        Some(Place(Arc::clone(inner), node))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut accepted = lock(&self.0.accepted);
        if let Some(count) = accepted.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                accepted.remove(&self.1);
            }
        }
    }
}

async fn accept_one(inner: Arc<Inner>, incoming: Incoming, sender: mpsc::Sender<Accepted>) {
    let Ok(Ok(connection)) = tokio::time::timeout(STEP_BOUND, async { incoming.await }).await
    else {
        return;
    };
    let peer = NodeId::from_bytes(*connection.remote_id().as_bytes());
    let Some(_place) = Place::take(&inner, peer) else {
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
    let counted = Arc::new(());
    loop {
        let stream = if (inner.knows)(&peer) {
            connection.accept_bi().await
        } else {
            match tokio::time::timeout(STRANGER_IDLE, connection.accept_bi()).await {
                Ok(stream) => stream,
                Err(_) if Arc::strong_count(&counted) > 1 => continue,
                Err(_) => {
                    connection.close(CODE_LEAVING.into(), b"nothing was asked");
                    return;
                }
            }
        };
        let Ok(pair) = stream else { return };
        let (connection, sender) = (connection.clone(), sender.clone());
        let counted = Arc::clone(&counted);
        let task = async move {
            let mut stream = MeshStream::new(pair);
            stream._counted = Some(counted);
            let first = async { frame::decode_open(&frame::read(&mut stream).await?) };
            match tokio::time::timeout(STEP_BOUND, first).await {
                Ok(Ok(open)) => {
                    let _ = sender.send(Accepted { peer, open, stream }).await;
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
