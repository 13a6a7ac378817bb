//! The agent's channel: a stream through Firecracker's vsock to a port in the guest.
//!
//! A connection to the Unix socket waits until the guest's driver runs, and is closed where nobody listens at the port yet.
//! So it is made again until somebody does.

use super::configure::{AGENT_PORT, CHANNEL_SOCKET};
use crate::ChannelStream;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vistara_host::sockets;

/// How long the guest may take until its agent listens: a boot on a loaded machine takes seconds.
pub(super) const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// How long after a refusal the first further try is made, and how long at most.
const RETRY_FIRST: Duration = Duration::from_millis(2);
const RETRY_LONGEST: Duration = Duration::from_millis(20);
/// How long one try may take: Firecracker gives a guest that runs two seconds to answer.
const TRY_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of the longest answer to `CONNECT`.
const ANSWER_MAX: usize = 32;

/// Connects to the agent, as soon as it listens.
pub(super) async fn open(root: &Path) -> io::Result<ChannelStream> {
    let mut pause = RETRY_FIRST;
    let tries = async {
        loop {
            let error = match tokio::time::timeout(TRY_LIMIT, connect(root)).await {
                Ok(Ok(stream)) => return stream,
                Ok(Err(error)) => error,
                // The guest's driver does not run yet, or the guest is held.
                Err(_) => io::ErrorKind::TimedOut.into(),
            };
            tracing::trace!(%error, "the agent does not listen yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    };
    tokio::time::timeout(OPEN_LIMIT, tries)
        .await
        .map_err(|_| io::ErrorKind::TimedOut.into())
}

async fn connect(root: &Path) -> io::Result<ChannelStream> {
    let stream = sockets::connect_in_foreign(root, CHANNEL_SOCKET)?;
    let mut stream = ChannelStream::from_std(stream)?;
    let request = format!("CONNECT {AGENT_PORT}\n");
    stream.write_all(request.as_bytes()).await?;
    // Byte by byte: what follows the line is the guest's first word already.
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() == ANSWER_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn it_is_tried_until_somebody_listens_and_no_word_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let listener = sockets::listen_in(dir.path(), CHANNEL_SOCKET).unwrap();
        let server = std::thread::spawn(move || {
            for _ in 0..3 {
                // Nobody listens at the port: the connection is closed.
                drop(listener.accept().unwrap());
            }
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(b"OK 1073741824\nfirst word").unwrap();
            request
        });
        let mut stream = open(dir.path()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first word");
        assert_eq!(&server.join().unwrap(), b"CONNECT 1024\n");
    }

    #[tokio::test]
    async fn an_answer_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let listener = sockets::listen_in(dir.path(), CHANNEL_SOCKET).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // The question first: an answer to nobody breaks the asker's pipe.
            let mut asked = [0; 64];
            assert!(std::io::Read::read(&mut stream, &mut asked).unwrap() > 0);
            let _ = stream.write_all(&[b'x'; 1000]);
        });
        let refused = connect(dir.path()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        server.join().unwrap();
    }
}
