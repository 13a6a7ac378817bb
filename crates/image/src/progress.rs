//! How far a pull, an import or the building of a root disk has come.
//!
//! A report never blocks and never fails the work it reports on.

use std::fmt;
use std::sync::Arc;
use vistara_model::Digest;

/// One report. Reports of different layers interleave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The image's name is being turned into a manifest.
    Resolving,
    /// So much of a layer has come in.
    Layer {
        /// The layer's blob.
        digest: Digest,
        /// Bytes here so far, those of an earlier interrupted pull included.
        done_bytes: u64,
        /// Bytes of the whole blob.
        total_bytes: u64,
    },
    /// The layer was here already, or another pull has just fetched it.
    LayerExists {
        /// The layer's blob.
        digest: Digest,
    },
    /// Layers are being read, checked against their digests and merged.
    Verifying,
    /// The root disk is being written.
    BuildingDisk {
        /// Files and directories written.
        done_entries: u64,
        /// Files and directories in all.
        total_entries: u64,
    },
    /// The image is ready to run.
    Done,
}

/// Where reports go. Cheap to clone.
#[derive(Clone, Default)]
pub struct ProgressSink(Option<Arc<dyn Fn(Progress) + Send + Sync>>);

impl ProgressSink {
    /// Nowhere.
    pub fn none() -> ProgressSink {
        ProgressSink(None)
    }

    /// To this function, which must return at once.
    pub fn new(report: impl Fn(Progress) + Send + Sync + 'static) -> ProgressSink {
        ProgressSink(Some(Arc::new(report)))
    }

    /// To this channel; a report is dropped while the channel is full.
    pub fn channel(sender: tokio::sync::mpsc::Sender<Progress>) -> ProgressSink {
        ProgressSink::new(move |progress| {
            // A full or closed channel only means that nobody looks just now.
            let _ = sender.try_send(progress);
        })
    }

    /// Reports.
    pub fn report(&self, progress: Progress) {
        if let Some(report) = &self.0 {
            report(progress);
        }
    }
}

impl fmt::Debug for ProgressSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressSink")
    }
}
