//! SHA-256 of each stream's whole output, counted as it is recorded: the log forgets its oldest parts, the digest does not.
//!
//! Where a segment begins, what was counted before it is kept beside it (`00000003.sum` beside `00000003.log`), so that a
//! later node goes on from there after reading one segment. The hash's middle state is kept as SHA-256 defines it, eight
//! words, which no library's version changes; the compression itself is the library's.

use super::Stream;
use super::segment::Entry;
use serde::{Deserialize, Serialize};
use sha2::compress256;
use sha2::digest::generic_array::GenericArray;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use vistara_model::Digest;

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Bytes that are hashed at once.
const BLOCK: usize = 64;
/// The state in which SHA-256 begins (FIPS 180-4, 5.3.3).
const BEGIN: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// A SHA-256 that is under way, and can be written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Running {
    state: [u32; 8],
    /// Bytes so far.
    length: u64,
    /// Those that are no whole block yet.
    rest: Vec<u8>,
}

impl Running {
    fn begin() -> Running {
        Running {
            state: BEGIN,
            length: 0,
            rest: Vec::with_capacity(BLOCK),
        }
    }

    /// Whether what was written down can have been written by us.
    fn makes_sense(&self) -> bool {
        self.rest.len() < BLOCK && self.rest.len() as u64 == self.length % BLOCK as u64
    }

    fn block(&mut self, block: &[u8]) {
        compress256(
            &mut self.state,
            std::slice::from_ref(GenericArray::from_slice(block)),
        );
    }

    fn update(&mut self, bytes: &[u8]) {
        self.length = self.length.wrapping_add(bytes.len() as u64);
        let room = BLOCK - self.rest.len();
        let (head, tail) = bytes.split_at(room.min(bytes.len()));
        self.rest.extend_from_slice(head);
        if self.rest.len() < BLOCK {
            return;
        }
        let whole = std::mem::take(&mut self.rest);
        self.block(&whole);
        let mut blocks = tail.chunks_exact(BLOCK);
        for block in &mut blocks {
            self.block(block);
        }
        self.rest = whole;
        self.rest.clear();
        self.rest.extend_from_slice(blocks.remainder());
    }

    /// The digest of what came so far (FIPS 180-4, 5.1.1: a one bit, zeros, and the length in bits).
    fn digest(&self) -> [u8; 32] {
        let mut last = self.clone();
        let bits = self.length.wrapping_mul(8).to_be_bytes();
        let mut end = last.rest.clone();
        end.push(0x80);
        let zeros = (2 * BLOCK - 8 - end.len()) % BLOCK;
        end.resize(end.len() + zeros, 0);
        end.extend_from_slice(&bits);
        for block in end.chunks_exact(BLOCK) {
            last.block(block);
        }
        let mut digest = [0; 32];
        for (to, word) in digest.chunks_exact_mut(4).zip(last.state) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }
}

/// What was counted of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Absent where count was lost.
    running: Option<Running>,
    /// Bytes delivered.
    pub(crate) bytes: u64,
    /// Bytes lost on their way.
    pub(crate) missing: u64,
}

impl Tally {
    fn begin() -> Tally {
        Tally {
            running: Some(Running::begin()),
            bytes: 0,
            missing: 0,
        }
    }

    /// The digest of all bytes delivered.
    pub(crate) fn digest(&self) -> Option<Digest> {
        let running = self.running.as_ref()?;
        Some(Digest::from_sha256(running.digest()))
    }
}

/// What was counted of both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tallies {
    format: u32,
    pub(crate) stdout: Tally,
    pub(crate) stderr: Tally,
}

impl Tallies {
    /// Nothing was printed yet.
    pub(crate) fn begin() -> Tallies {
        Tallies {
            format: FORMAT,
            stdout: Tally::begin(),
            stderr: Tally::begin(),
        }
    }

    /// Count was lost of what was printed.
    pub(super) fn lost() -> Tallies {
        let lost = || Tally {
            running: None,
            bytes: 0,
            missing: 0,
        };
        Tallies {
            format: FORMAT,
            stdout: lost(),
            stderr: lost(),
        }
    }

    fn of(&mut self, stream: Stream) -> &mut Tally {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// These bytes were delivered.
    pub(super) fn delivered(&mut self, stream: Stream, bytes: &[u8]) {
        let tally = self.of(stream);
        tally.bytes = tally.bytes.saturating_add(bytes.len() as u64);
        if let Some(running) = &mut tally.running {
            running.update(bytes);
        }
    }

    /// So many bytes never came.
    pub(super) fn missed(&mut self, stream: Stream, bytes: u64) {
        let tally = self.of(stream);
        tally.missing = tally.missing.saturating_add(bytes);
    }

    /// What a record of the log says.
    pub(super) fn count(&mut self, entry: &Entry, counted: Option<(Stream, u64)>) {
        match (entry, counted) {
            (Entry::Output { stream, bytes, .. }, _) => self.delivered(*stream, bytes),
            (Entry::Gap { .. }, Some((stream, missing))) => self.missed(stream, missing),
            (Entry::Gap { .. }, None) => {}
        }
    }

    /// Writes down what was counted before the segment of this number. Blocks on files.
    pub(super) fn save(&self, dir: &Path, number: u64) -> io::Result<()> {
        let fresh = dir.join("sum.new");
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        io::Write::write_all(&mut file, &bytes)?;
        drop(file);
        std::fs::rename(&fresh, path(dir, number))
    }

    /// What was counted before the segment of this number; where that cannot be told, count was lost. Blocks on files.
    pub(super) fn load(dir: &Path, number: u64) -> Tallies {
        if number == 0 {
            return Tallies::begin();
        }
        let path = path(dir, number);
        let read = std::fs::read(&path).map_err(|error| error.to_string());
        let found = read.and_then(|bytes| {
            serde_json::from_slice::<Tallies>(&bytes).map_err(|error| error.to_string())
        });
        let sound = |tally: &Tally| tally.running.as_ref().is_none_or(Running::makes_sense);
        match found {
            Ok(tallies)
                if tallies.format == FORMAT && sound(&tallies.stdout) && sound(&tallies.stderr) =>
            {
                tallies
            }
            Ok(_) => Tallies::lost(),
            Err(error) => {
                tracing::warn!(path = %path.display(), error, "the digest of a machine's output cannot be gone on with");
                Tallies::lost()
            }
        }
    }
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:08}.sum"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    #[test]
    fn lengths_around_blocks_have_the_digest_that_everybody_gets() {
        let bytes: Vec<u8> = (0..300u32).map(|number| number as u8).collect();
        for length in 0..bytes.len() {
            let mut running = Running::begin();
            running.update(&bytes[..length]);
            let known: [u8; 32] = Sha256::digest(&bytes[..length]).into();
            assert_eq!(running.digest(), known, "{length}");
        }
    }

    proptest! {
        #[test]
        fn however_it_comes_and_is_written_down_between_it_is_the_same(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20),
        ) {
            let mut running = Running::begin();
            let mut whole = Vec::new();
            for piece in &pieces {
                running.update(piece);
                whole.extend_from_slice(piece);
                prop_assert!(running.makes_sense());
                let text = serde_json::to_string(&running).unwrap();
                running = serde_json::from_str(&text).unwrap();
            }
            let known: [u8; 32] = Sha256::digest(&whole).into();
            prop_assert_eq!(running.digest(), known);
        }
    }
}
