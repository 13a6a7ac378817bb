//! A snapshot as one file, for other nodes: its files one after another, without their zeros, under zstd. All of this blocks on
//! files.
//!
//! ```text
//! "vistara snapshot 1\n"
//! for each of its files, in a fixed order:
//!   its length, 8 bytes
//!   pieces that are not zero, in order: place (8 bytes), length (4 bytes), bytes
//!   8 bytes of ones
//! ```
//! Numbers are little-endian. The same snapshot gives the same bytes, so that a transfer that was cut off goes on from where it
//! was, also after a restart.

use super::files::{self, Unusable};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vistara_machine::sparse_pieces;
use vistara_model::Digest;

/// The packed snapshot, in its directory.
const PACKED: &str = "packed.zst";
/// Its digest and length, written after it.
const PACKED_ABOUT: &str = "packed.json";
/// More than the fastest costs more time than most lines take for what it saves.
const LEVEL: i32 = 1;
const MAGIC: &[u8] = b"vistara snapshot 1\n";
/// In place of a piece's place, after the last one.
const END: u64 = u64::MAX;
/// Longest piece that is taken.
const PIECE_MAX: u32 = 1 << 20;
/// Longest file of a snapshot that is taken: nothing here has more memory or disk. What it is of, and a monitor's state, are short.
const FILE_MAX: u64 = 16 << 40;
const SHORT_MAX: u64 = 64 << 20;

/// A snapshot that lies packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) path: PathBuf,
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct PackedAbout {
    digest: String,
    bytes: u64,
}

/// What is packed before, as long as it is. Each byte is looked at in [`pack`] alone.
pub(super) fn packed(dir: &Path) -> Option<Packed> {
    let about = std::fs::read(dir.join(PACKED_ABOUT)).ok()?;
    let about: PackedAbout = serde_json::from_slice(&about).ok()?;
    let path = dir.join(PACKED);
    let bytes = std::fs::metadata(&path).ok()?.len();
    let digest = about.digest.parse().ok()?;
    (bytes == about.bytes).then_some(Packed {
        path,
        digest,
        bytes,
    })
}

fn is_whole(packed: &Packed) -> io::Result<bool> {
    let mut hashing = Hashing {
        to: io::sink(),
        hash: Sha256::new(),
        bytes: 0,
    };
    io::copy(&mut File::open(&packed.path)?, &mut hashing)?;
    Ok(Digest::from_sha256(hashing.hash.finalize().into()) == packed.digest)
}

/// Passes on what is written, and takes its digest.
struct Hashing<W> {
    to: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.to.write(buf)?;
        self.hash.update(&buf[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn fresh(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Packs the snapshot in `dir`, unless that was done before and still is what it was.
pub(super) fn pack(dir: &Path) -> io::Result<Packed> {
    if let Some(packed) = packed(dir) {
        // Whoever fetches what has rotted finds its digest wrong at the end, each time.
        if is_whole(&packed)? {
            return Ok(packed);
        }
        tracing::warn!(path = %packed.path.display(), "a packed snapshot is not what it was, and is packed anew");
    }
    let making = dir.join("packed.zst.new");
    let packed = write_packed(dir, &making);
    if packed.is_err() {
        // Half of one only takes room; it may never have been made.
        let _ = std::fs::remove_file(&making);
    }
    packed
}

fn write_packed(dir: &Path, making: &Path) -> io::Result<Packed> {
    let to = Hashing {
        to: io::BufWriter::new(fresh(making)?),
        hash: Sha256::new(),
        bytes: 0,
    };
    let mut to = zstd::Encoder::new(to, LEVEL)?;
    let unusable = |Unusable(why)| io::Error::other(why);
    let bases = files::read_about(dir).and_then(|about| files::bases(dir, &about));
    let bases = bases.map_err(unusable)?;
    to.write_all(MAGIC)?;
    for name in files::ALL {
        let file = match files::is_long(name) {
            true => files::whole_file(dir, &bases, name).map_err(unusable)?,
            false => File::open(dir.join(name))?,
        };
        to.write_all(&file.metadata()?.len().to_le_bytes())?;
        sparse_pieces(&file, |place, bytes| {
            let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
            to.write_all(&place.to_le_bytes())?;
            to.write_all(&length.to_le_bytes())?;
            to.write_all(bytes)
        })?;
        to.write_all(&END.to_le_bytes())?;
    }
    let mut to = to.finish()?;
    to.flush()?;
    let (hash, bytes) = (to.hash, to.bytes);
    to.to.get_ref().sync_all()?;
    let path = dir.join(PACKED);
    std::fs::rename(making, &path)?;
    let digest = Digest::from_sha256(hash.finalize().into());
    let about = PackedAbout {
        digest: digest.to_string(),
        bytes,
    };
    fresh(&dir.join(PACKED_ABOUT))?.write_all(&serde_json::to_vec(&about)?)?;
    Ok(Packed {
        path,
        digest,
        bytes,
    })
}

/// Writes what is packed into the empty directory `dir`, under the names of what is arriving: whether it is a snapshot is for
/// [`files::adopt`] to say.
pub(super) fn unpack(packed: impl Read, dir: &Path) -> Result<(), Unusable> {
    let damaged =
        |error: io::Error| Unusable(format!("what arrived is no packed snapshot: {error}"));
    let mut from = zstd::Decoder::new(packed).map_err(damaged)?;
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic).map_err(damaged)?;
    if magic != *MAGIC {
        return Err(damaged(io::Error::other("it begins with other words")));
    }
    // As much as there is, but for what everybody else on this host needs.
    let mut room = free_bytes(dir).map_err(damaged)? / 10 * 9;
    for name in files::ALL {
        let longest = if files::is_long(name) {
            FILE_MAX
        } else {
            SHORT_MAX
        };
        let failed = |error| Unusable(format!("{name} could not be written: {error}"));
        let file = fresh(&files::arriving(dir, name)).map_err(failed)?;
        read_file(&mut from, &file, longest, &mut room).map_err(damaged)?;
        file.sync_all().map_err(failed)?;
    }
    match from.read(&mut [0]).map_err(damaged)? {
        0 => Ok(()),
        _ => Err(damaged(io::Error::other("it has more than a snapshot"))),
    }
}

fn read_file(from: &mut impl Read, to: &File, longest: u64, room: &mut u64) -> io::Result<()> {
    let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let length = read_u64(from)?;
    if length > longest {
        return wrong("a file of it is longer than any");
    }
    let (mut piece, mut done) = (Vec::new(), 0);
    loop {
        let place = read_u64(from)?;
        if place == END {
            return to.set_len(length);
        }
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes)?;
        let bytes = u32::from_le_bytes(bytes);
        let end = place.saturating_add(u64::from(bytes));
        if place < done || bytes == 0 || bytes > PIECE_MAX || end > length {
            return wrong("a piece lies where none can");
        }
        *room = (room.checked_sub(u64::from(bytes))).ok_or(io::ErrorKind::StorageFull)?;
        piece.resize(bytes as usize, 0);
        from.read_exact(&mut piece)?;
        to.write_all_at(&piece, place)?;
        done = end;
    }
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::files::tests::made;
    use super::super::store::Snapshots;
    use super::*;

    /// Another node's snapshots, and what became of these bytes there.
    fn arrived(bytes: &[u8], name: &str) -> (tempfile::TempDir, Result<(), Unusable>) {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(dir.path().to_owned());
        let fresh = snapshots.begin("0123".to_owned()).unwrap();
        let arrived = fresh.arrive(bytes, Some(name.to_owned()));
        (
            dir,
            arrived.map(|listed| assert_eq!(listed.name(), Some(name))),
        )
    }

    #[test]
    fn what_is_packed_twice_is_the_same_and_is_the_snapshot_on_another_node() {
        let (_parent, dir, root) = made();
        let first = pack(&dir).unwrap();
        let bytes = std::fs::read(&first.path).unwrap();
        assert_eq!(bytes.len() as u64, first.bytes);
        assert_eq!(packed(&dir), Some(first.clone()));
        std::fs::remove_file(&first.path).unwrap();
        assert_eq!(packed(&dir), None);
        assert_eq!(pack(&dir).unwrap(), first);
        // One that has rotted is seen, and packed anew.
        let mut rotten = bytes.clone();
        rotten[bytes.len() / 2] ^= 1;
        std::fs::write(&first.path, &rotten).unwrap();
        assert_eq!(pack(&dir).unwrap(), first);
        assert_eq!(std::fs::read(&first.path).unwrap(), bytes);

        let (there, taken) = arrived(&bytes, "other");
        taken.unwrap();
        let there = there.path().join("0123");
        let parts = files::read(&there, &root).unwrap();
        assert_eq!(parts.about.name.as_deref(), Some("other"));
        assert_eq!(parts.about.record.owner, None);
        let names = std::fs::read_dir(&there).unwrap().count();
        assert_eq!(names, files::ALL.len());
    }

    #[test]
    fn an_incremental_one_is_packed_whole() {
        let (_parent, base, root) = made();
        let dir = files::tests::made_on(&base, &root, "4567", b"other memory");
        let bytes = std::fs::read(pack(&dir).unwrap().path).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(elsewhere.path().to_owned());
        let fresh = snapshots.begin("4567".to_owned()).unwrap();
        let listed = fresh.arrive(bytes.as_slice(), None).unwrap();
        assert_eq!(listed.about.unwrap().base, None);
        files::read(&elsewhere.path().join("4567"), &root).unwrap();
    }

    #[test]
    fn what_is_no_packed_snapshot_leaves_nothing() {
        let (_parent, dir, _root) = made();
        let packed = pack(&dir).unwrap();
        let whole = std::fs::read(&packed.path).unwrap();
        let plain = zstd::decode_all(whole.as_slice()).unwrap();
        let anew = |plain: &[u8]| zstd::encode_all(plain, LEVEL).unwrap();
        let with = |at: usize, byte: u8| {
            let mut other = plain.clone();
            other[at] = byte;
            anew(&other)
        };
        let (length, place, bytes) = (MAGIC.len(), MAGIC.len() + 8, MAGIC.len() + 16);
        // In the first file's words: what it is of is sealed.
        let words = plain.windows(6).position(|six| six == b"debian").unwrap();
        let more = [plain.as_slice(), b"x"].concat();
        for (what, bytes) in [
            ("cut", whole[..whole.len() / 2].to_vec()),
            ("not compressed", b"words".to_vec()),
            ("nothing", anew(b"")),
            ("another format", with(length - 2, b'2')),
            ("half of the files", anew(&plain[..plain.len() / 2])),
            ("one byte more", anew(&more)),
            ("a file without end", with(length + 7, 0x7f)),
            ("a piece beyond the file", with(place + 6, 1)),
            ("an endless piece", with(bytes + 3, 0xff)),
            ("another description", with(words, b'D')),
        ] {
            let (dir, taken) = arrived(&bytes, "other");
            assert!(taken.is_err(), "{what}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{what}");
        }
    }
}
