//! A listener that knows how many of its connections are open: an open one keeps an idle node from leaving.

use crate::linger::Lingering;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

/// Pause after a failed accept: usually too many open files, which takes time to mend itself.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many connections are open, and whether there were any since somebody last asked.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Counts>);

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    any: AtomicBool,
}

impl Connections {
    pub(super) fn open(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    pub(super) fn take_any(&self) -> bool {
        self.0.any.swap(false, Ordering::Relaxed)
    }
}

pub(super) struct CountingListener {
    listener: UnixListener,
    connections: Connections,
}

impl CountingListener {
    pub(super) fn new(listener: UnixListener, connections: Connections) -> CountingListener {
        CountingListener {
            listener,
            connections,
        }
    }
}

impl axum::serve::Listener for CountingListener {
    type Io = Counted;
    type Addr = ();

    async fn accept(&mut self) -> (Counted, ()) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    self.connections.0.any.store(true, Ordering::Relaxed);
                    self.connections.0.open.fetch_add(1, Ordering::Relaxed);
                    return (
                        Counted {
                            stream: Lingering::new(stream),
                            connections: self.connections.clone(),
                        },
                        (),
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that is counted as long as it lives, also after it became a WebSocket.
pub(super) struct Counted {
    stream: Lingering<UnixStream>,
    connections: Connections,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
