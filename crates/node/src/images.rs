//! Pulls and imports as streams of events.

use crate::fault::{Answer, Fault};
use crate::node::Node;
use crate::view;
use futures_util::Stream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::ImageEvent;
use vistara_image::{Image, ImageError, Progress, ProgressSink};

/// Reports that may wait for a slow client; further ones are dropped, the last one never.
const REPORTS_MAX: usize = 64;
/// Longest silence on the stream: after it the last step is told again, so that neither side takes the other for dead.
const SILENCE_MAX: Duration = Duration::from_secs(15);

fn report(progress: Progress) -> Option<ImageEvent> {
    let step = |step: &str| {
        Some(ImageEvent::Step {
            step: step.to_owned(),
        })
    };
    match progress {
        Progress::Resolving => step("resolving"),
        Progress::Layer {
            digest,
            done_bytes,
            total_bytes,
        } => Some(ImageEvent::Layer {
            digest: digest.to_string(),
            done_bytes,
            total_bytes,
        }),
        Progress::LayerExists { digest } => Some(ImageEvent::Layer {
            digest: digest.to_string(),
            done_bytes: 0,
            total_bytes: 0,
        }),
        Progress::Verifying => step("verifying"),
        Progress::BuildingDisk { .. } => step("building disk"),
        Progress::Done => None,
    }
}

/// Runs `work` with a sink, and gives its reports and then its result. The work goes on when nobody listens any more:
/// what it fetched is of use to the next one who asks.
pub(crate) fn events<F, W>(node: Arc<Node>, work: W) -> impl Stream<Item = ImageEvent> + Send
where
    W: FnOnce(Arc<Node>, ProgressSink) -> F,
    F: Future<Output = Result<Image, ImageError>> + Send + 'static,
{
    let (reports_in, reports) = mpsc::channel(REPORTS_MAX);
    let sink = ProgressSink::channel(reports_in);
    let worked = work(Arc::clone(&node), sink.clone());
    let looking = Arc::clone(&node);
    let done = tokio::spawn(async move {
        let image = worked.await?;
        looking.look_ahead(&image).await;
        // Until here it counts as under way.
        drop(sink);
        Ok::<_, ImageError>(image)
    });
    futures_util::stream::unfold(Some((node, reports, done)), |state| async move {
        let (node, mut reports, done) = state?;
        loop {
            match tokio::time::timeout(SILENCE_MAX, reports.recv()).await {
                Ok(Some(progress)) => {
                    if let Some(event) = report(progress) {
                        return Some((event, Some((node, reports, done))));
                    }
                }
                Err(_) => {
                    let event = ImageEvent::Step {
                        step: "working".to_owned(),
                    };
                    return Some((event, Some((node, reports, done))));
                }
                // Every sender is gone: the work is over.
                Ok(None) => {
                    let event = match done.await {
                        Ok(Ok(image)) => {
                            let users = node.users_of(&image.id);
                            ImageEvent::Done {
                                image: view::image(&image, users),
                            }
                        }
                        Ok(Err(error)) => ImageEvent::Failed {
                            error: Fault::from(error).0,
                        },
                        Err(error) => ImageEvent::Failed {
                            error: Fault::internal(&error).0,
                        },
                    };
                    return Some((event, None));
                }
            }
        }
    })
}

/// A file in the node's own temporary directory, removed when dropped.
pub(crate) fn spool(node: &Node) -> Answer<tempfile::NamedTempFile> {
    let dir: PathBuf = node.options.state_dir.join("tmp");
    tempfile::NamedTempFile::new_in(&dir).map_err(|error| {
        Fault::new(
            vistara_api::ErrorKind::Host,
            format!("no file can be made in {dir:?}: {error}"),
        )
    })
}
