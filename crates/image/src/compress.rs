//! Unpacking with a bound, and counting and hashing on the way.

use crate::{Limits, Refusal};
use sha2::{Digest as _, Sha256};
use std::io::{self, BufRead, BufReader, Read};
use vistara_model::Digest;

/// Zstd frames may ask for a window of up to 2^27 bytes, which is what `zstd --ultra -22` makes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Enough for every magic number looked at here.
const BUFFER_BYTES: usize = 256 << 10;

/// How a stream is compressed, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    pub(crate) fn of(start: &[u8]) -> Compression {
        match start {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable zstd frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

/// Unpacks gzip and zstd and passes anything else through.
///
/// Errors of the compressed stream, and more output than allowed, come as I/O errors that carry a [`Refusal`].
pub(crate) struct Unpacked {
    reader: Box<dyn Read + Send>,
    packed: bool,
    done: u64,
    /// The first byte that is too much.
    bound: u64,
    refusal: Refusal,
}

impl Unpacked {
    /// `packed_bytes` is the length of the stream; `left` is what the whole image may still unpack to.
    pub(crate) fn new(
        reader: impl Read + Send + 'static,
        packed_bytes: u64,
        left: u64,
        limits: &Limits,
    ) -> io::Result<Unpacked> {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, reader);
        let compression = Compression::of(reader.fill_buf()?);
        let reader: Box<dyn Read + Send> = match compression {
            Compression::None => Box::new(reader),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
        };
        let bomb = packed_bytes
            .saturating_mul(limits.bomb_ratio_max)
            .max(limits.bomb_floor_bytes.0);
        let (bound, refusal) = if bomb < left {
            let ratio = limits.bomb_ratio_max;
            (bomb, Refusal::Bomb { ratio })
        } else {
            let limit = limits.image_bytes_max.0;
            let what = "bytes uncompressed";
            (left, Refusal::Limit { what, limit })
        };
        Ok(Unpacked {
            reader,
            packed: compression != Compression::None,
            done: 0,
            bound,
            refusal,
        })
    }
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.reader.read(buffer).map_err(|error| {
            // An error of the operating system has a number; one of the decoder has not.
            let decoder =
                error.raw_os_error().is_none() && error.kind() != io::ErrorKind::Interrupted;
            if self.packed && decoder {
                io::Error::other(Refusal::Compression(error.to_string()))
            } else {
                error
            }
        })?;
        self.done += got as u64;
        if self.done > self.bound {
            return Err(io::Error::other(self.refusal.clone()));
        }
        Ok(got)
    }
}

/// Counts and hashes what passes through.
#[derive(Debug)]
pub(crate) struct Hashing<R> {
    reader: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(reader: R) -> Hashing<R> {
        Hashing {
            reader,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// What has passed so far.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (Digest::from_sha256(self.hash.finalize().into()), self.bytes)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.reader.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.bytes += got as u64;
        Ok(got)
    }
}

/// The refusal inside an I/O error that one of the readers here made.
pub(crate) fn refusal_in(error: &io::Error) -> Option<&Refusal> {
    error.get_ref()?.downcast_ref::<Refusal>()
}

/// The digest of these bytes.
pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}
