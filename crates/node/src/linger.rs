//! Streams that are read a little longer than they are served.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// How long, and for how many bytes, one is read on.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 64 << 20;

/// A served stream. An answer may come before all of its request was read, and closing then has the other side lose the answer
/// beside what it still sends (RFC 9112, section 9.6): so what comes is read, and forgotten, until the other side stops.
pub(crate) struct Lingering<T: AsyncRead + Unpin + Send + 'static> {
    /// There until it is dropped.
    stream: Option<T>,
    /// Whether nothing more can come.
    read: bool,
    /// Whether the last word of the answer was said.
    answered: bool,
}

impl<T: AsyncRead + Unpin + Send + 'static> Lingering<T> {
    pub(crate) fn new(stream: T) -> Lingering<T> {
        Lingering {
            stream: Some(stream),
            read: false,
            answered: false,
        }
    }

    fn stream(&mut self) -> io::Result<Pin<&mut T>> {
        let stream = self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Pin::new(stream))
    }
}

impl<T: AsyncRead + Unpin + Send + 'static> Drop for Lingering<T> {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if self.answered && !self.read {
            runtime.spawn(async move {
                let (mut rest, mut nowhere) = (stream.take(LINGER_BYTES), tokio::io::sink());
                let drained = tokio::io::copy(&mut rest, &mut nowhere);
                // Whatever ends it, nobody is left who would be told.
                let _ = tokio::time::timeout(LINGER, drained).await;
            });
        }
    }
}

impl<T: AsyncRead + Unpin + Send + 'static> AsyncRead for Lingering<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before, room) = (buf.filled().len(), buf.remaining());
        let polled = self.stream()?.poll_read(cx, buf);
        if let Poll::Ready(read) = &polled {
            self.read = read.is_err() || (room > 0 && buf.filled().len() == before);
        }
        polled
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> AsyncWrite for Lingering<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.stream()?.poll_shutdown(cx);
        self.answered |= matches!(polled, Poll::Ready(Ok(())));
        polled
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::UnixStream;

    /// Sends more than fits while the other side answers the first bytes and is dropped; what it then reads.
    async fn told(serve: impl AsyncFnOnce(UnixStream)) -> io::Result<String> {
        let (mut client, server) = UnixStream::pair().unwrap();
        let sender = async {
            client.write_all(&vec![0; 4 << 20]).await?;
            client.shutdown().await?;
            let mut answer = String::new();
            client.read_to_string(&mut answer).await?;
            Ok(answer)
        };
        tokio::join!(sender, serve(server)).0
    }

    async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        stream.read_exact(&mut [0; 16]).await.unwrap();
        stream.write_all(b"no room").await.unwrap();
        stream.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn who_is_answered_before_all_was_sent_hears_the_answer() {
        let lost = told(async |mut server| answer(&mut server).await).await;
        assert!(lost.is_err(), "{lost:?}");
        let heard = told(async |server| answer(&mut Lingering::new(server)).await).await;
        assert_eq!(heard.unwrap(), "no room");
    }
}
