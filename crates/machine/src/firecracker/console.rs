//! The end of a guest's console: kept on disk whether or not a node runs, and bounded.
//!
//! A Linux guest's serial port is a file in the machine's directory, to which Firecracker appends. What the guest may write is
//! limited by Firecracker itself; beside that, whenever the file is large, its end is kept and it begins anew. Versions of
//! Firecracker that cannot limit the guest write to a box in memory instead, which takes the first bytes only and goes with
//! the machine unless a node reads it before.

use super::state::{KEPT_CONSOLE, LIVE_CONSOLE, NEW_CONSOLE};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes that are kept: the last words of a panic take about 3 KiB.
const KEPT: u64 = 64 << 10;
/// Bytes of a box in memory.
pub(super) const BOX_MAX: u64 = 1 << 20;
/// Size at which the file begins anew.
const LIVE_MAX: u64 = 512 << 10;
/// Most characters of a panic's message.
const PANIC_MESSAGE_MAX: usize = 2_000;
/// How the kernel begins its last words.
const PANIC_WORDS: &[u8] = b"Kernel panic - not syncing";

/// One machine's console.
#[derive(Debug)]
pub(super) struct Console {
    dir: PathBuf,
    /// What is written to now, where that is no file in the directory.
    in_memory: Option<File>,
}

impl Console {
    /// Makes the file to which Firecracker writes, and gives its writer's end.
    pub(super) fn create(dir: &Path) -> io::Result<(Console, File)> {
        let writer = File::options()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(dir.join(LIVE_CONSOLE))?;
        Ok((Console::open(dir), writer))
    }

    /// The console of a machine that was started before.
    pub(super) fn open(dir: &Path) -> Console {
        Console {
            dir: dir.to_owned(),
            in_memory: None,
        }
    }

    /// The same where the guest's words go to this box in memory.
    pub(super) fn with_box(mut self, file: Option<File>) -> Console {
        self.in_memory = file;
        self
    }

    fn live(&self) -> Option<File> {
        match &self.in_memory {
            Some(file) => file.try_clone().ok(),
            None => File::open(self.dir.join(LIVE_CONSOLE)).ok(),
        }
    }

    /// At most the last `limit` bytes.
    pub(super) fn last(&self, limit: usize) -> Vec<u8> {
        let mut bytes = fs::read(self.dir.join(KEPT_CONSOLE)).unwrap_or_default();
        if let Some(live) = self.live() {
            bytes.extend_from_slice(&match self.in_memory {
                // Its length is the box's from the beginning, and what was written is at its beginning.
                Some(_) => written_to(&live, 0, BOX_MAX),
                None => {
                    let len = live.metadata().map_or(0, |data| data.len());
                    written_to(&live, len.saturating_sub(LIVE_MAX), LIVE_MAX)
                }
            });
        }
        let limit = limit.min(KEPT as usize);
        bytes.split_off(bytes.len().saturating_sub(limit))
    }

    /// Sees to it that it does not grow.
    pub(super) fn trim(&self) {
        let path = self.dir.join(LIVE_CONSOLE);
        if self.in_memory.is_some() || !fs::metadata(&path).is_ok_and(|data| data.len() > LIVE_MAX)
        {
            return;
        }
        // What is written between the two is lost; it is a flood by then.
        let trimmed = self
            .keep()
            .and_then(|()| File::options().write(true).open(&path)?.set_len(0));
        if let Err(error) = trimmed {
            tracing::warn!(%error, dir = %self.dir.display(), "a machine's console could not be trimmed");
        }
    }

    /// Keeps the end of what was written so far, for when the file is gone.
    pub(super) fn keep(&self) -> io::Result<()> {
        let end = self.last(KEPT as usize);
        if end.is_empty() {
            return Ok(());
        }
        let new = self.dir.join(NEW_CONSOLE);
        fs::write(&new, end)?;
        fs::rename(new, self.dir.join(KEPT_CONSOLE))
    }
}

/// What was written to a file or a box from `start` on, at most so many bytes, without the zeros that are a box's rest.
fn written_to(file: &File, start: u64, limit: u64) -> Vec<u8> {
    let len = file.metadata().map_or(0, |data| data.len());
    let count = len.saturating_sub(start).min(limit);
    let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], start + got as u64) {
            Ok(count @ 1..) => got += count,
            _ => break,
        }
    }
    let end = bytes[..got].iter().rposition(|byte| *byte != 0);
    bytes.truncate(end.map_or(0, |last| last + 1));
    bytes
}

/// What a kernel's panic says: its line and what came after; nothing where there was none.
pub(super) fn panic_message(console: &[u8]) -> Option<String> {
    let at = console
        .windows(PANIC_WORDS.len())
        .rposition(|window| window == PANIC_WORDS)?;
    let text = String::from_utf8_lossy(&console[at..]).replace('\r', "");
    Some(text.trim_end().chars().take(PANIC_MESSAGE_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_box_in_memory_gives_what_was_written_to_it_and_not_its_empty_rest() {
        let dir = tempfile::tempdir().unwrap();
        let output = vistara_host::files::OutputBox::new(BOX_MAX).unwrap();
        let mut writer = output.writer().unwrap();
        let reader = output.writer().unwrap();
        let console = Console::open(dir.path()).with_box(Some(reader));
        assert_eq!(console.last(usize::MAX), b"");
        writer
            .write_all(b"Kernel panic - not syncing: no init\n")
            .unwrap();
        let words = panic_message(&console.last(usize::MAX)).unwrap();
        assert_eq!(words, "Kernel panic - not syncing: no init");
        // More than a file would keep; the last words are the last all the same.
        writer.write_all(&vec![b'x'; 700 << 10]).unwrap();
        writer.write_all(b"end").unwrap();
        assert!(console.last(usize::MAX).ends_with(b"xend"));
    }

    #[test]
    fn a_flood_leaves_its_end_and_takes_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let (console, mut writer) = Console::create(dir.path()).unwrap();
        for round in 0..5 {
            writer.write_all(&vec![b'x'; 400 << 10]).unwrap();
            writeln!(writer, "round {round}").unwrap();
            console.trim();
            let len = fs::metadata(dir.path().join(LIVE_CONSOLE)).unwrap().len();
            assert!(len <= LIVE_MAX, "{len}");
        }
        writer.write_all(b"end").unwrap();
        assert_eq!(console.last(3), b"end");
        assert_eq!(console.last(0), b"");
        let end = console.last(usize::MAX);
        assert_eq!(end.len(), KEPT as usize);
        assert!(end.ends_with(b"round 4\nend"));
        // As at the machine's end: the file goes, the end stays.
        console.keep().unwrap();
        fs::remove_file(dir.path().join(LIVE_CONSOLE)).unwrap();
        assert_eq!(Console::open(dir.path()).last(usize::MAX), end);
    }

    #[test]
    fn a_panics_message_begins_at_its_line_and_is_bounded() {
        assert_eq!(panic_message(b"Linux version 6\r\n"), None);
        let mut text = b"[ 1.6] Kernel panic - not syncing: test\r\n".to_vec();
        text.extend_from_slice(&[0xff; 5000]);
        let message = panic_message(&text).unwrap();
        assert!(message.starts_with("Kernel panic - not syncing: test\n"));
        assert_eq!(message.chars().count(), PANIC_MESSAGE_MAX);
    }
}
