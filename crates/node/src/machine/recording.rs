//! A machine's output on its way into the log book: it waits for room on the disk, and its program with it.

use super::record::now_ns;
use super::session::News;
use crate::logbook::{LogBook, Stream};
use bytes::Bytes;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Pause before what the disk had no room for is written again.
const FULL_DISK_PAUSE: Duration = Duration::from_secs(1);

/// Does work that needs room on the disk, again and again until there is some; the machine is troubled meanwhile, with what
/// `trouble` says of the error. False where the runtime ends first.
pub(in crate::machine) async fn until_room<W>(
    news: &mpsc::Sender<News>,
    trouble: impl Fn(&io::Error) -> String,
    work: impl Fn() -> W,
) -> bool
where
    W: FnOnce() -> io::Result<()> + Send + 'static,
{
    let mut troubled = false;
    // The machine's task outlives its session, so that there is somebody to hear of troubles.
    loop {
        match tokio::task::spawn_blocking(work()).await {
            Ok(Ok(())) => break,
            Ok(Err(error)) if !troubled => {
                let _ = news.send(News::Trouble(Some(trouble(&error)))).await;
                troubled = true;
            }
            Ok(Err(_)) => {}
            // Only the runtime's own end cancels blocking work.
            Err(_) => return false,
        }
        tokio::time::sleep(FULL_DISK_PAUSE).await;
    }
    if troubled {
        let _ = news.send(News::Trouble(None)).await;
    }
    true
}

/// Records a piece of output whose place in its stream is `offset`, however long the disk takes to have room for it; the
/// machine is troubled meanwhile. False where the runtime ends first.
pub(super) async fn record_output(
    log: &Arc<LogBook>,
    news: &mpsc::Sender<News>,
    stream: Stream,
    offset: u64,
    bytes: Bytes,
) -> bool {
    let time = now_ns();
    let trouble = |error: &io::Error| {
        format!(
            "its output cannot be recorded and waits until it can ({error}); free some disk space"
        )
    };
    until_room(news, trouble, || {
        let (log, piece) = (Arc::clone(log), bytes.clone());
        move || log.append(stream, offset, time, &piece)
    })
    .await
}
