//! A reader of a log book: from the beginning, from a time, or the last lines; to the end, or following.

use super::segment::{self, Entry, HEADER_LEN, Parsed};
use super::{LogBook, locked};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes read from a segment at once.
const READ_BYTES: usize = 256 << 10;

/// Why a reader that was overtaken misses bytes.
const OVERTAKEN: &str = "the log was full and its oldest part is gone";

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// With the oldest that is kept.
    Oldest,
    /// With what comes after now.
    Now,
    /// With the last so many lines.
    Tail(u64),
}

/// Reads entries in order. Dropping it frees a writer that it held back.
pub(crate) struct Reader {
    book: Arc<LogBook>,
    changed: watch::Receiver<(u64, bool)>,
    pace: Option<u64>,
    cursor: Option<Cursor>,
    start: Start,
    ready: VecDeque<Entry>,
    /// The read under way. It is kept here so that a caller who stops waiting loses nothing.
    reading: Option<JoinHandle<io::Result<Batch>>>,
}

/// Where a read ended, and what it found.
type Batch = (Cursor, Vec<Entry>);

/// A place in a segment. Blocking methods.
struct Cursor {
    number: u64,
    file: File,
    /// Bytes of output before this place, gaps and lost segments included.
    total: u64,
    pending: Vec<u8>,
}

impl Reader {
    pub(super) fn new(book: Arc<LogBook>, start: Start, pace: bool) -> Reader {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let changed = book.changed.subscribe();
        book.reading.send_modify(|count| *count += 1);
        book.begun.send_replace(true);
        let pace = pace.then(|| {
            let key = NEXT.fetch_add(1, Ordering::Relaxed);
            // Until it has read something it counts as being where the book is, so that an old log does not stop the
            // program at once.
            let total = book.offsets().total();
            locked(&book.pace.readers).insert(key, total);
            key
        });
        Reader {
            book,
            changed,
            pace,
            cursor: None,
            start,
            ready: VecDeque::new(),
            reading: None,
        }
    }

    /// The next entry. `None` at the end: now, or with `follow` once the book is finished. Can be cancelled without loss.
    pub(crate) async fn next(&mut self, follow: bool) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            // Taken before reading, so that what is appended meanwhile is not waited for.
            let finished = self.changed.borrow_and_update().1;
            let reading = match &mut self.reading {
                Some(reading) => reading,
                None => {
                    let (book, cursor, start) =
                        (Arc::clone(&self.book), self.cursor.take(), self.start);
                    self.reading.insert(tokio::task::spawn_blocking(move || {
                        step(&book, cursor, start)
                    }))
                }
            };
            let result = reading.await;
            self.reading = None;
            let (cursor, entries) = result.map_err(io::Error::other)??;
            self.note(cursor.total);
            self.cursor = Some(cursor);
            self.ready.extend(entries);
            if !self.ready.is_empty() {
                continue;
            }
            if !follow || finished || self.changed.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    fn note(&self, total: u64) {
        if let Some(key) = self.pace {
            locked(&self.book.pace.readers).insert(key, total);
            self.book.pace.moved.notify_waiters();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.book.reading.send_modify(|count| *count -= 1);
        if let Some(key) = self.pace {
            locked(&self.book.pace.readers).remove(&key);
            self.book.pace.moved.notify_waiters();
        }
    }
}

/// Reads what is there, up to [`READ_BYTES`]. No entries mean that the end is reached for now.
fn step(book: &LogBook, cursor: Option<Cursor>, start: Start) -> io::Result<Batch> {
    let mut entries = Vec::new();
    let mut cursor = match cursor {
        Some(cursor) => cursor,
        None => begin(book, start, &mut entries)?,
    };
    while entries.is_empty() {
        // Looked up before the read: when a later segment exists, this one is complete.
        let next = book
            .segments()?
            .range(cursor.number + 1..)
            .next()
            .map(|(n, p)| (*n, p.clone()));
        let at_end = cursor.read(&mut entries)? == 0;
        if !entries.is_empty() || !at_end {
            continue;
        }
        match next {
            None => break,
            Some((number, path)) => {
                let before = cursor.total;
                cursor = match Cursor::open(number, &path) {
                    Ok(cursor) => cursor,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                if cursor.total > before {
                    entries.push(Entry::Gap {
                        bytes: cursor.total - before,
                        reason: OVERTAKEN,
                    });
                }
            }
        }
    }
    Ok((cursor, entries))
}

fn begin(book: &LogBook, start: Start, entries: &mut Vec<Entry>) -> io::Result<Cursor> {
    loop {
        let segments = book.segments()?;
        let place = match start {
            Start::Now => segments.last_key_value(),
            Start::Oldest | Start::Tail(_) => segments.first_key_value(),
        };
        let Some((number, path)) = place else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the log has no segment",
            ));
        };
        let mut cursor = match Cursor::open(*number, path) {
            Ok(cursor) => cursor,
            // Dropped between the listing and the opening: list again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match start {
            Start::Oldest => {
                if cursor.total > 0 {
                    entries.push(Entry::Gap {
                        bytes: cursor.total,
                        reason: OVERTAKEN,
                    });
                }
            }
            Start::Now => {
                let mut skipped = Vec::new();
                while cursor.read(&mut skipped)? > 0 {
                    skipped.clear();
                }
            }
            Start::Tail(lines) => {
                let mut last = Tail::new(lines);
                loop {
                    let mut some = Vec::new();
                    while cursor.read(&mut some)? > 0 {
                        some.drain(..).for_each(|entry| last.push(entry));
                    }
                    let next = book.segments()?;
                    let Some((number, path)) = next.range(cursor.number + 1..).next() else {
                        break;
                    };
                    cursor = Cursor::open(*number, path)?;
                }
                entries.extend(last.finish());
            }
        }
        return Ok(cursor);
    }
}

impl Cursor {
    fn open(number: u64, path: &Path) -> io::Result<Cursor> {
        let mut file = File::open(path)?;
        let total = segment::read_header(&mut file)?.total();
        file.seek(SeekFrom::Start(HEADER_LEN as u64))?;
        Ok(Cursor {
            number,
            file,
            total,
            pending: Vec::new(),
        })
    }

    /// Reads once and takes the whole records out; returns how many bytes the file gave.
    fn read(&mut self, entries: &mut Vec<Entry>) -> io::Result<usize> {
        let count = (&mut self.file)
            .take(READ_BYTES as u64)
            .read_to_end(&mut self.pending)?;
        let mut at = 0;
        loop {
            match segment::parse(&self.pending[at..]) {
                Parsed::Record(entry, counted, size) => {
                    self.total += counted.map_or(0, |(_, length)| length);
                    at += size;
                    entries.push(entry);
                }
                Parsed::Incomplete => break,
                Parsed::Damaged => {
                    let bytes = (self.pending.len() - at) as u64;
                    entries.push(Entry::Gap {
                        bytes,
                        reason: "this part of the log is damaged",
                    });
                    // Record boundaries are lost: the rest of this segment is skipped.
                    self.file.seek(SeekFrom::End(0))?;
                    at = self.pending.len();
                    break;
                }
            }
        }
        self.pending.drain(..at);
        Ok(count)
    }
}

/// Keeps the entries that hold the last so many lines.
struct Tail {
    lines: u64,
    entries: VecDeque<Entry>,
    /// Line ends in `entries`.
    held: u64,
}

impl Tail {
    fn new(lines: u64) -> Tail {
        Tail {
            lines,
            entries: VecDeque::new(),
            held: 0,
        }
    }

    fn push(&mut self, entry: Entry) {
        self.held += ends(&entry);
        self.entries.push_back(entry);
        while let Some(first) = self.entries.front() {
            let own = ends(first);
            // One more line end than is wanted is kept: it is where the first wanted line begins.
            if self.held - own <= self.lines {
                break;
            }
            self.held -= own;
            self.entries.pop_front();
        }
    }

    fn finish(mut self) -> VecDeque<Entry> {
        if self.lines == 0 {
            return VecDeque::new();
        }
        // A last line without its end is a line.
        let whole = match last_byte(self.entries.back()) {
            Some(b'\n') | None => self.lines,
            Some(_) => self.lines - 1,
        };
        let mut surplus = self.held.saturating_sub(whole);
        while surplus > 0 {
            let Some(first) = self.entries.front_mut() else {
                break;
            };
            let own = ends(first);
            if own < surplus || (own == surplus && last_byte(Some(first)) == Some(b'\n')) {
                surplus -= own;
                self.entries.pop_front();
            } else {
                cut(first, surplus);
                surplus = 0;
            }
        }
        self.entries
    }
}

fn ends(entry: &Entry) -> u64 {
    match entry {
        Entry::Output { bytes, .. } => bytes.iter().filter(|byte| **byte == b'\n').count() as u64,
        Entry::Gap { .. } => 0,
    }
}

fn last_byte(entry: Option<&Entry>) -> Option<u8> {
    match entry {
        Some(Entry::Output { bytes, .. }) => bytes.last().copied(),
        Some(Entry::Gap { .. }) | None => None,
    }
}

/// Drops the first `lines` lines of an entry.
fn cut(entry: &mut Entry, lines: u64) {
    if let Entry::Output { bytes, .. } = entry {
        let mut left = lines;
        let at = bytes.iter().position(|byte| {
            left -= u64::from(*byte == b'\n' && left > 0);
            left == 0
        });
        bytes.drain(..at.map_or(bytes.len(), |at| at + 1));
    }
}
