//! Tar streams out of a guest and into it.

use crate::AgentError;
use crate::session::Session;
use crate::state::TransferState;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::sync::Notify;
use vistara_guest_protocol::{
    DATA_MAX, FrameKind, Refusal, RefusalKind, TRANSFERS_MAX, ToGuest, UnpackOptions,
};

/// A transfer of a session. Dropping it cancels what is not at its end.
#[derive(Debug)]
struct Transfer {
    session: Arc<Session>,
    number: u32,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let mut state = self.session.shared.lock();
        let transfer = state.transfers.remove(&self.number);
        if transfer.is_some_and(|transfer| transfer.ended.is_none()) {
            // A session that is over has cancelled it already.
            let _ = state.say(&ToGuest::TransferCancel {
                transfer: self.number,
            });
            self.session.shared.to_write.notify_one();
        }
    }
}

impl Transfer {
    fn start(
        session: &Arc<Session>,
        message: impl FnOnce(u32) -> ToGuest,
    ) -> Result<Self, AgentError> {
        let mut state = session.shared.lock();
        if state.transfers.len() >= TRANSFERS_MAX {
            let message = "too many transfers are under way".to_owned();
            return Err(AgentError::Refused(Refusal {
                kind: RefusalKind::Busy,
                message,
            }));
        }
        let number = state.number();
        state.say(&message(number))?;
        state.transfers.insert(number, TransferState::new());
        session.shared.to_write.notify_one();
        Ok(Self {
            session: Arc::clone(session),
            number,
        })
    }

    /// Waits until `look` finds something in the transfer's state.
    async fn wait_for<T>(
        &self,
        mut look: impl FnMut(&mut TransferState) -> Option<T>,
    ) -> Result<T, AgentError> {
        let changed = match self.session.shared.lock().transfers.get(&self.number) {
            Some(transfer) => Arc::clone(&transfer.changed),
            None => Arc::new(Notify::new()),
        };
        loop {
            let notified = changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            {
                let mut state = self.session.shared.lock();
                let failure = state.failure.clone();
                let found = state.transfers.get_mut(&self.number).and_then(&mut look);
                match (found, failure) {
                    (Some(found), _) => return Ok(found),
                    (None, Some(failure)) => return Err(failure),
                    (None, None) => {}
                }
            }
            notified.await;
        }
    }

    /// Sends as much as may be sent now of some bytes.
    fn send(&self, rest: &mut &[u8]) -> bool {
        let mut state = self.session.shared.lock();
        if !state.has_room() {
            return false;
        }
        let Some(transfer) = state.transfers.get_mut(&self.number) else {
            return true;
        };
        let room =
            usize::try_from(transfer.granted.saturating_sub(transfer.sent)).unwrap_or(DATA_MAX);
        let (now, later) = rest.split_at(rest.len().min(room).min(DATA_MAX));
        let offset = transfer.sent;
        transfer.sent += now.len() as u64;
        if !now.is_empty() {
            state.say_data(FrameKind::Transfer, self.number, offset, now);
            self.session.shared.to_write.notify_one();
        }
        *rest = later;
        true
    }
}

/// Begins a tar stream out of the guest. Returns once its first bytes, or the reason for their absence, have come.
pub(crate) async fn out_of(
    session: &Arc<Session>,
    path: &str,
    follow: bool,
) -> Result<ArchiveReader, AgentError> {
    let path = path.to_owned();
    let transfer = Transfer::start(session, |transfer| ToGuest::Pack {
        transfer,
        path,
        follow,
    })?;
    let begun = |state: &mut TransferState| {
        if state.pieces.is_empty() {
            state.ended.clone()
        } else {
            Some(None)
        }
    };
    match transfer.wait_for(begun).await? {
        Some(refusal) => Err(AgentError::Refused(refusal)),
        None => Ok(ArchiveReader {
            transfer,
            piece: Vec::new(),
            taken: 0,
        }),
    }
}

/// Sends a tar stream into the guest.
pub(crate) async fn into(
    session: &Arc<Session>,
    path: &str,
    mut tar: impl AsyncRead + Send + Unpin,
    options: UnpackOptions,
) -> Result<(), AgentError> {
    let path = path.to_owned();
    let transfer = Transfer::start(session, |transfer| ToGuest::Unpack {
        transfer,
        path,
        options,
    })?;
    let ended = |state: &mut TransferState| state.ended.clone();
    let mut buffer = vec![0; DATA_MAX];
    let end = loop {
        let count = tokio::select! {
            end = transfer.wait_for(ended) => break end?,
            count = tar.read(&mut buffer) => {
                count.map_err(|error| AgentError::Source(error.to_string()))?
            }
        };
        if count == 0 {
            session.shared.lock().say(&ToGuest::TransferEnd {
                transfer: transfer.number,
            })?;
            session.shared.to_write.notify_one();
            break transfer.wait_for(ended).await?;
        }
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let go_on = |state: &mut TransferState| {
                (state.granted > state.sent || state.ended.is_some())
                    .then_some(state.ended.is_some())
            };
            if transfer.wait_for(go_on).await? {
                break;
            }
            if !transfer.send(&mut rest) {
                session.shared.room().await?;
            }
        }
    };
    end.map_or(Ok(()), |refusal| Err(AgentError::Refused(refusal)))
}

/// A tar stream from a guest. An end of file means that all of it came; dropping it cancels the transfer.
#[derive(Debug)]
pub struct ArchiveReader {
    transfer: Transfer,
    piece: Vec<u8>,
    taken: usize,
}

impl AsyncRead for ArchiveReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.piece.len() {
            let mut state = this.transfer.session.shared.lock();
            let failure = state.failure.clone();
            let Some(transfer) = state.transfers.get_mut(&this.transfer.number) else {
                return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
            };
            match (transfer.pieces.pop_front(), &transfer.ended, failure) {
                (Some(piece), ..) => (this.piece, this.taken) = (piece, 0),
                (None, Some(None), _) => return Poll::Ready(Ok(())),
                (None, Some(Some(refusal)), _) => {
                    let error = AgentError::Refused(refusal.clone());
                    return Poll::Ready(Err(io::Error::other(error)));
                }
                (None, None, Some(failure)) => return Poll::Ready(Err(io::Error::other(failure))),
                (None, None, None) => {
                    transfer.reader = Some(context.waker().clone());
                    return Poll::Pending;
                }
            }
        }
        let rest = &this.piece[this.taken..];
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        this.taken += count;
        if this
            .transfer
            .session
            .shared
            .lock()
            .consumed(this.transfer.number, count)
        {
            this.transfer.session.shared.to_write.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}
