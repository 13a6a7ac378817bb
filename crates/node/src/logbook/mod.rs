//! What a machine's program printed, kept on disk in bounded segments, and read by any number of followers.
//!
//! One writer appends; readers follow at their own pace from wherever they like. The book is also the durable place up
//! to which the agent may forget output: after a crash of the node it tells exactly how many bytes of each stream are
//! held, a torn last record being cut off.
//!
//! Bounds: at most [`Limits::segments_max`] segments of [`Limits::segment_bytes`]; the oldest goes first, and a reader
//! that was still in it is told how much it missed. A reader that *paces* (a client in the foreground that must lose
//! nothing) holds the writer back instead once it lags by [`PACE_LAG_MAX`].

mod reader;
mod segment;
mod tally;

#[cfg(test)]
mod tests;

pub(crate) use reader::{Reader, Start};
pub(crate) use segment::{Entry, Stream};
pub(crate) use tally::{Tallies, Tally};

use segment::SegmentWriter;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// How far a pacing reader may lag behind, in bytes of output: a burst passes unhindered, and it fits a log many times.
const PACE_LAG_MAX: u64 = 8 << 20;

/// How much a book keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// A segment is closed once it is this long.
    pub(crate) segment_bytes: u64,
    /// So many segments are kept.
    pub(crate) segments_max: u64,
}

impl Default for Limits {
    /// 64 MiB in all: hours of chatter, and a thousand machines still fit an ordinary disk.
    fn default() -> Self {
        Limits {
            segment_bytes: 8 << 20,
            segments_max: 8,
        }
    }
}

/// How many bytes of each stream were ever recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Offsets {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

impl Offsets {
    fn of(&mut self, stream: Stream) -> &mut u64 {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    fn total(self) -> u64 {
        self.stdout.saturating_add(self.stderr)
    }
}

/// A machine's recorded output.
pub(crate) struct LogBook {
    dir: PathBuf,
    limits: Limits,
    writer: Mutex<Writer>,
    /// Whether there ever was a reader.
    begun: watch::Sender<bool>,
    /// Readers that are not dropped yet.
    reading: watch::Sender<usize>,
    /// Counts changes, for readers that wait; `true` once no more output will come.
    changed: watch::Sender<(u64, bool)>,
    pace: Pace,
}

struct Writer {
    /// Absent once the book is finished: an ended machine holds no file open.
    segment: Option<SegmentWriter>,
    offsets: Offsets,
    tallies: Tallies,
}

/// Positions of the readers that hold the writer back.
#[derive(Default)]
struct Pace {
    readers: Mutex<HashMap<u64, u64>>,
    moved: Notify,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held cannot leave half a change: every change is a single assignment or append.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogBook {
    /// Opens the book in `dir`, or begins one. Blocks on files.
    pub(crate) fn open(dir: &Path, limits: Limits) -> io::Result<Arc<LogBook>> {
        std::fs::create_dir_all(dir)?;
        let mut segments = segment::list(dir)?;
        let (segment, offsets, tallies) = loop {
            let Some((number, path)) = segments.pop_last() else {
                break (
                    SegmentWriter::create(dir, 0, Offsets::default())?,
                    Offsets::default(),
                    Tallies::begin(),
                );
            };
            let mut tallies = Tallies::load(dir, number);
            let count = |entry: &Entry, counted| tallies.count(entry, counted);
            match SegmentWriter::recover(number, &path, count) {
                Ok((segment, offsets)) => break (segment, offsets, tallies),
                // Cut off before its header was whole: nothing was ever recorded in it.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    std::fs::remove_file(&path)?
                }
                Err(error) => return Err(error),
            }
        };
        Ok(LogBook::new(
            dir,
            limits,
            Writer {
                segment: Some(segment),
                offsets,
                tallies,
            },
            false,
        ))
    }

    /// The book of a machine that has ended: it can only be read, and holds no file open.
    pub(crate) fn closed(dir: &Path, limits: Limits) -> Arc<LogBook> {
        LogBook::new(
            dir,
            limits,
            Writer {
                segment: None,
                offsets: Offsets::default(),
                tallies: Tallies::lost(),
            },
            true,
        )
    }

    fn new(dir: &Path, limits: Limits, writer: Writer, finished: bool) -> Arc<LogBook> {
        Arc::new(LogBook {
            dir: dir.to_owned(),
            limits,
            writer: Mutex::new(writer),
            begun: watch::Sender::new(false),
            reading: watch::Sender::new(0),
            changed: watch::Sender::new((0, finished)),
            pace: Pace::default(),
        })
    }

    /// How much of each stream is held or was, which is where the next byte belongs.
    pub(crate) fn offsets(&self) -> Offsets {
        locked(&self.writer).offsets
    }

    /// What was counted of all that was ever recorded. Of a book that was closed by an earlier node nothing is known.
    pub(crate) fn tallies(&self) -> Tallies {
        locked(&self.writer).tallies.clone()
    }

    /// Appends bytes whose place in their stream is `offset`. What is recorded already is skipped; what is missing
    /// before them is recorded as a gap. Blocks on files.
    ///
    /// On an error nothing of these bytes counts as recorded, and the call can be repeated.
    pub(crate) fn append(
        &self,
        stream: Stream,
        offset: u64,
        time_ns: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut writer = locked(&self.writer);
        let held = *writer.offsets.of(stream);
        let known = usize::try_from(held.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(fresh) = bytes.get(known..).filter(|fresh| !fresh.is_empty()) else {
            return Ok(());
        };
        let Writer {
            segment,
            offsets,
            tallies,
        } = &mut *writer;
        let Some(segment) = segment else {
            return Err(io::Error::other("the log is closed"));
        };
        if segment.len() >= self.limits.segment_bytes {
            let number = segment.number() + 1;
            // First: a segment without what was counted before it has no digest any more.
            tallies.save(&self.dir, number)?;
            *segment = SegmentWriter::create(&self.dir, number, *offsets)?;
            self.drop_oldest(segment.number());
        }
        if offset > held {
            segment.append_gap(stream, time_ns, offset - held)?;
            *offsets.of(stream) = offset;
            tallies.missed(stream, offset - held);
        }
        segment.append(stream, time_ns, fresh)?;
        *offsets.of(stream) += fresh.len() as u64;
        tallies.delivered(stream, fresh);
        drop(writer);
        self.changed.send_modify(|(count, _)| *count += 1);
        Ok(())
    }

    fn drop_oldest(&self, newest: u64) {
        let Ok(segments) = segment::list(&self.dir) else {
            return;
        };
        let keep_from = (newest + 1).saturating_sub(self.limits.segments_max);
        for (_, path) in segments.range(..keep_from) {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "an old log segment could not be removed");
            }
            // That of the first there is not.
            let _ = std::fs::remove_file(path.with_extension("sum"));
        }
    }

    /// Says that no more output will come: followers end once they have read all.
    pub(crate) fn finish(&self) {
        locked(&self.writer).segment = None;
        self.changed.send_modify(|(_, finished)| *finished = true);
    }

    /// Waits until no pacing reader lags too far behind.
    pub(crate) async fn wait_for_readers(&self) {
        loop {
            let moved = self.pace.moved.notified();
            let total = self.offsets().total();
            let slowest = locked(&self.pace.readers)
                .values()
                .copied()
                .min()
                .unwrap_or(total);
            if total.saturating_sub(slowest) < PACE_LAG_MAX {
                return;
            }
            moved.await;
        }
    }

    /// Waits until somebody has begun to read.
    pub(crate) async fn wait_until_read(&self) {
        // The sender is our own: it cannot be gone.
        let _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }

    /// Waits until nobody reads any more.
    pub(crate) async fn wait_until_unread(&self) {
        // The sender is our own: it cannot be gone.
        let _ = self.reading.subscribe().wait_for(|count| *count == 0).await;
    }

    /// A reader from `start` on; with `pace` it holds the writer back.
    pub(crate) fn reader(self: &Arc<Self>, start: Start, pace: bool) -> Reader {
        Reader::new(Arc::clone(self), start, pace)
    }

    fn segments(&self) -> io::Result<BTreeMap<u64, PathBuf>> {
        segment::list(&self.dir)
    }
}
