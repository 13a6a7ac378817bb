//! Reading ahead across seeks: whoever seeks to where it already is, or a little further, keeps what was read.

use std::io::{self, Read, Seek, SeekFrom};

/// Bytes read at once, where less is asked for.
const WINDOW_BYTES: usize = 256 << 10;

/// Reads from `R` in large pieces. Seeking costs nothing until the next read, and then only outside the piece at hand.
#[derive(Debug)]
pub(super) struct Ahead<R> {
    input: R,
    /// Where `input` stands; unknown after a failure.
    stands_at: Option<u64>,
    /// Where the next read begins.
    position: u64,
    /// What was read last, and where it lies.
    window: Vec<u8>,
    window_at: u64,
}

impl<R: Read + Seek> Ahead<R> {
    pub(super) fn new(input: R) -> Ahead<R> {
        Ahead {
            input,
            stands_at: None,
            position: 0,
            window: Vec::new(),
            window_at: 0,
        }
    }

    /// Puts the input where the next read begins. Where it stands is unknown until that read has told.
    fn approach(&mut self) -> io::Result<()> {
        if self.stands_at != Some(self.position) {
            self.input.seek(SeekFrom::Start(self.position))?;
        }
        self.stands_at = None;
        Ok(())
    }

    /// Reads the piece that begins at the position.
    fn fill(&mut self) -> io::Result<()> {
        self.approach()?;
        self.window.clear();
        self.window.reserve_exact(WINDOW_BYTES);
        self.window_at = self.position;
        let mut piece = (&mut self.input).take(WINDOW_BYTES as u64);
        piece.read_to_end(&mut self.window)?;
        self.stands_at = Some(self.position + self.window.len() as u64);
        Ok(())
    }

    /// What is at hand from the position on.
    fn at_hand(&self) -> &[u8] {
        let inside = self.position.checked_sub(self.window_at);
        let inside = inside.and_then(|inside| usize::try_from(inside).ok());
        inside
            .and_then(|inside| self.window.get(inside..))
            .unwrap_or_default()
    }
}

impl<R: Read + Seek> Read for Ahead<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at_hand().is_empty() && !buffer.is_empty() {
            if buffer.len() >= WINDOW_BYTES {
                // More than would be kept: it is copied once only.
                self.approach()?;
                let count = self.input.read(buffer)?;
                self.position += count as u64;
                self.stands_at = Some(self.position);
                return Ok(count);
            }
            self.fill()?;
        }
        let at_hand = self.at_hand();
        let count = at_hand.len().min(buffer.len());
        buffer[..count].copy_from_slice(&at_hand[..count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl<R: Read + Seek> Seek for Ahead<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self
                .position
                .checked_add_signed(by)
                .ok_or(io::ErrorKind::InvalidInput)?,
            SeekFrom::End(_) => {
                self.stands_at = None;
                let end = self.input.seek(to)?;
                self.stands_at = Some(end);
                end
            }
        };
        Ok(self.position)
    }
}
