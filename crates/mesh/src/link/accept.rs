//! What others open: connections, each with a place among a bounded number, and their streams.

use super::{
    ACCEPTED_MAX, Accepted, CODE_GARBAGE, CODE_LEAVING, CODE_TOO_MANY, CONNECTION_WINDOW,
    HANDSHAKES_MAX, Inner, MEMBERS_MAX, MeshStream, OF_MEMBER_MAX, OF_ONE_MAX, OF_STRANGER_MAX,
    STEP_BOUND, STRANGERS_MAX, STREAMS_MAX, lock, packets,
};
use crate::frame::{self, FrameError, Hello};
use iroh::endpoint::{Connection, Incoming, VarInt};
use std::collections::HashMap;
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

/// What business a node has here, as far as its places among the connections go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// Nobody knows it, and nobody has [vouched](Accepted::vouch) for it.
    #[default]
    Stranger,
    /// It is a member of the network, which gives it a place and nothing else.
    Member,
    /// It was joined, or has a grant.
    Known,
}

/// What one node has of the accepted connections.
#[derive(Debug, Default)]
pub(super) struct Taken {
    connections: usize,
    standing: Standing,
}

/// How many connections those of one standing have, all together.
fn count(accepted: &HashMap<NodeId, Taken>, standing: Standing) -> usize {
    let alike = |taken: &&Taken| taken.standing == standing;
    let connections = accepted.values().filter(alike);
    connections.map(|taken| taken.connections).sum()
}

/// As what a node gets one more connection; nothing where it has as many as it may.
fn standing_of_next(
    accepted: &HashMap<NodeId, Taken>,
    node: &NodeId,
    known: bool,
    member: bool,
) -> Option<Standing> {
    let before = accepted.get(node);
    let connections = before.map_or(0, |taken| taken.connections);
    let before = before.map_or(Standing::Stranger, |taken| taken.standing);
    // Those that it has as a stranger would be a member's, too.
    let more = 1 + match before {
        Standing::Stranger => connections,
        Standing::Member | Standing::Known => 0,
    };
    let standing = if known || before == Standing::Known {
        Standing::Known
    } else if member && count(accepted, Standing::Member) + more <= MEMBERS_MAX {
        Standing::Member
    } else {
        Standing::Stranger
    };
    let most = match standing {
        Standing::Stranger => OF_STRANGER_MAX,
        Standing::Member => OF_MEMBER_MAX,
        Standing::Known => OF_ONE_MAX,
    };
    (connections < most).then_some(standing)
}

/// Looks which strangers are members by now, and says whether that makes room for another.
fn clear(inner: &Inner, accepted: &mut HashMap<NodeId, Taken>) -> bool {
    let mut members = count(accepted, Standing::Member);
    for (node, taken) in accepted.iter_mut() {
        let room = members + taken.connections <= MEMBERS_MAX;
        let stranger = taken.standing == Standing::Stranger;
        if room && stranger && inner.packets.is_member(node) {
            taken.standing = Standing::Member;
            members += taken.connections;
        }
    }
    count(accepted, Standing::Stranger) < STRANGERS_MAX
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
        let member = inner.packets.is_member(&node);
        let mut accepted = lock(&inner.accepted);
        let standing = standing_of_next(&accepted, &node, known, member)?;
        let crowded = count(&accepted, Standing::Stranger) >= STRANGERS_MAX;
        if standing == Standing::Stranger && crowded && !clear(inner, &mut accepted) {
            return None;
        }
        let taken = accepted.entry(node).or_default();
        taken.connections += 1;
        taken.standing = standing;
        drop(accepted);
        let place = Place {
            inner: Arc::clone(inner),
            node,
            connection: connection.clone(),
            raised: AtomicBool::new(false),
        };
        if standing == Standing::Known {
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

    /// Whether it may stay though it asks nothing: as a member of the network, if there is a place for one.
    fn is_member(&self) -> bool {
        let member = self.inner.packets.is_member(&self.node);
        let mut accepted = lock(&self.inner.accepted);
        let others = count(&accepted, Standing::Member);
        let Some(taken) = accepted.get_mut(&self.node) else {
            return false;
        };
        match taken.standing {
            Standing::Known => true,
            Standing::Member if member => true,
            Standing::Stranger if member && others + taken.connections <= MEMBERS_MAX => {
                taken.standing = Standing::Member;
                true
            }
            Standing::Member | Standing::Stranger => {
                taken.standing = Standing::Stranger;
                false
            }
        }
    }

    /// Gives it what a node gets that has business here.
    pub(super) fn raise(&self) {
        if self.raised.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(taken) = lock(&self.inner.accepted).get_mut(&self.node) {
            taken.standing = Standing::Known;
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
    let (listener, line) = (Arc::clone(&inner), connection.clone());
    let listen = async move { packets::listen(&listener, peer, &line).await };
    inner
        .tasks
        .spawn(inner.stop.clone().run_until_cancelled_owned(listen));
    let counted = Arc::new(());
    loop {
        let stream = if place.is_known() {
            connection.accept_bi().await
        } else {
            match tokio::time::timeout(inner.stranger_idle, connection.accept_bi()).await {
                Ok(stream) => stream,
                Err(_) if Arc::strong_count(&counted) > 1 => continue,
                Err(_) if place.is_known() || place.is_member() => continue,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_of_members_leaves_half_of_the_connections_to_those_that_were_named() {
        let mut accepted: HashMap<NodeId, Taken> = HashMap::new();
        for number in 0..=255 {
            let node = NodeId::from_bytes([number; 32]);
            for _ in 0..2 * OF_MEMBER_MAX {
                if standing_of_next(&accepted, &node, false, true) == Some(Standing::Member) {
                    let taken = accepted.entry(node).or_default();
                    taken.connections += 1;
                    taken.standing = Standing::Member;
                    assert!(taken.connections <= OF_MEMBER_MAX);
                }
            }
        }
        assert_eq!(count(&accepted, Standing::Member), MEMBERS_MAX);
        const { assert!(MEMBERS_MAX + STRANGERS_MAX < ACCEPTED_MAX) };
        let named = NodeId::from_bytes([255; 32]);
        let next = standing_of_next(&accepted, &named, true, false);
        assert_eq!(next, Some(Standing::Known));
    }
}
