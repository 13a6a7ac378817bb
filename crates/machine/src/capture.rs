//! A captured machine: its memory and its monitor's state, from which any number of others go on.
//!
//! In use both lie in sealed memory files: forks map the memory privately, and nobody, not even a monitor that has been
//! taken over by its guest, can write to what the others read. On disk ([`Capture::write`], [`Capture::read`]) they lie as
//! plain files beside a versioned description with their digests, which are checked whenever they are read.
//!
//! | file           | content                                                                     |
//! |----------------|-----------------------------------------------------------------------------|
//! | `memory`       | the guest's memory from address 0 on; a sparse file, holes are zero          |
//! | `state`        | the monitor's own: devices and processors                                   |
//! | `capture.json` | format, [`CaptureInfo`], digests; written last                              |

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vistara_host::files;
use vistara_model::{Accelerator, Bytes, VmmKind};

/// Version of the files' form. 2: with the counter's frequency.
const FORMAT: u32 = 2;
const MEMORY: &str = "memory";
const STATE: &str = "state";
const ABOUT: &str = "capture.json";

/// By how many parts of a million two measurements of one counter's frequency may differ: a clock that is being corrected
/// runs wrong by as much (adjtimex(2)), while it is measured by it.
const COUNTER_PPM: u64 = 500;

/// Memory is looked at, hashed and written in pieces of this size; pieces of zeros are left out.
const PIECE: usize = 64 << 10;
/// Most bytes of a monitor's state that are read: QEMU's is some 100 KB, with the firmware's memory in it.
const STATE_MAX: u64 = 64 << 20;
/// Most bytes of a description.
const ABOUT_MAX: u64 = 64 << 10;

/// What a machine that goes on from a capture must have in common with the captured one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureInfo {
    /// The monitor.
    pub kind: VmmKind,
    /// Its version: another one may lay its state out otherwise.
    pub version: String,
    /// How guest code is executed.
    pub accelerator: Accelerator,
    /// The processor as the guest has seen it, as far as it follows the host's.
    pub cpu: String,
    /// Frequency of the host's counter as it was measured, in kHz: the guest goes on telling the time by it.
    pub counter_khz: Option<u32>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// For each disk, whether it is read-only.
    pub disks: Vec<bool>,
    /// Whether there is a network interface.
    pub nic: bool,
    /// Whether it is known that no bounds on disks and network come with it, so that a machine without any need not be told.
    #[serde(default)]
    pub without_bounds: bool,
}

impl CaptureInfo {
    /// What differs, in words; nothing where a machine of `other`'s shape can go on from this.
    pub fn difference(&self, other: &CaptureInfo) -> Option<String> {
        let differs = |what: &str, ours: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            Some(format!("its {what} is {ours:?}, here it is {theirs:?}"))
        };
        if self.kind != other.kind {
            return differs("monitor", &self.kind, &other.kind);
        }
        if self.version != other.version {
            return differs("monitor's version", &self.version, &other.version);
        }
        if self.accelerator != other.accelerator {
            return differs("accelerator", &self.accelerator, &other.accelerator);
        }
        if self.cpu != other.cpu {
            return differs("processor", &self.cpu, &other.cpu);
        }
        if !same_counter(self.counter_khz, other.counter_khz) {
            return differs(
                "counter's frequency in kHz",
                &self.counter_khz,
                &other.counter_khz,
            );
        }
        if self.vcpus != other.vcpus {
            return differs("number of CPUs", &self.vcpus, &other.vcpus);
        }
        if self.memory != other.memory {
            return differs("memory", &self.memory, &other.memory);
        }
        if self.disks != other.disks {
            return differs("set of disks", &self.disks, &other.disks);
        }
        if self.nic != other.nic {
            return differs("network interface", &self.nic, &other.nic);
        }
        None
    }
}

/// Whether two measurements can be of one counter.
fn same_counter(one: Option<u32>, other: Option<u32>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => {
            u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one.max(other)) * COUNTER_PPM
        }
        (one, other) => one == other,
    }
}

/// Why a capture cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A file could not be handled.
    #[error("{operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("the capture in {path:?} is damaged: {reason}")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another version of this program wrote it.
    #[error("the capture in {path:?} has format {found}, and this version reads {FORMAT}")]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

#[derive(Serialize, Deserialize)]
struct About {
    format: u32,
    info: CaptureInfo,
    memory_blake3: String,
    memory_data_bytes: u64,
    state_blake3: String,
}

/// A captured machine, ready to be forked.
#[derive(Debug)]
pub struct Capture {
    info: CaptureInfo,
    memory: File,
    state: File,
}

/// A capture is itself only: two with the same content are still two.
impl PartialEq for Capture {
    fn eq(&self, other: &Capture) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Capture {}

impl Capture {
    /// Takes over what a monitor has written into two sealable memory files, and seals them for good.
    ///
    /// # Errors
    /// The system's; `ResourceBusy` where somebody still has the memory mapped writable.
    pub(crate) fn seal(info: CaptureInfo, memory: File, state: File) -> io::Result<Capture> {
        files::seal_for_good(&memory)?;
        files::seal_for_good(&state)?;
        Ok(Capture {
            info,
            memory,
            state,
        })
    }

    /// One made of these bytes, at the beginning of the memory and of the state, for tests.
    ///
    /// # Errors
    /// The system's.
    pub fn of_bytes(info: CaptureInfo, memory: &[u8], state: &[u8]) -> io::Result<Capture> {
        let memory_file = files::sealable_memory_file(info.memory.0)?;
        memory_file.write_all_at(memory, 0)?;
        let state_file = files::sealable_memory_file(state.len() as u64)?;
        state_file.write_all_at(state, 0)?;
        Capture::seal(info, memory_file, state_file)
    }

    /// What a fork must have in common with it.
    pub fn info(&self) -> &CaptureInfo {
        &self.info
    }

    /// The memory, by a descriptor of the receiver's own.
    pub(crate) fn memory(&self) -> io::Result<File> {
        self.memory.try_clone()
    }

    /// The monitor's state, to be read from its beginning whatever others do.
    pub(crate) fn state(&self) -> io::Result<File> {
        files::reopen_to_read(&self.state)
    }

    /// Bytes of the host's memory that it holds.
    pub fn resident_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let held = |file: &File| file.metadata().map_or(0, |data| data.blocks() * 512);
        held(&self.memory).saturating_add(held(&self.state))
    }

    /// Writes it to the directory `dir`, which exists. The description comes last: a directory without one holds nothing.
    /// Blocks on files for as long as some 100 MB take.
    ///
    /// # Errors
    /// [`CaptureError::Io`].
    pub fn write(&self, dir: &Path) -> Result<(), CaptureError> {
        let path = dir.join(MEMORY);
        let file = create(&path)?;
        let (digest, data_bytes) = copy_memory(&self.memory, &file, self.info.memory.0)
            .map_err(io_error("write", &path))?;
        file.sync_all().map_err(io_error("write", &path))?;
        let path = dir.join(STATE);
        let state = self.state_bytes().map_err(io_error("read", &path))?;
        write_whole(&path, &state)?;
        let about = About {
            format: FORMAT,
            info: self.info.clone(),
            memory_blake3: digest.to_hex().to_string(),
            memory_data_bytes: data_bytes,
            state_blake3: blake3::hash(&state).to_hex().to_string(),
        };
        let path = dir.join(ABOUT);
        let fresh = dir.join("capture.json.new");
        let text = serde_json::to_vec_pretty(&about)
            .map_err(|error| io_error("write", &path)(io::Error::other(error)))?;
        write_whole(&fresh, &text)?;
        std::fs::rename(&fresh, &path).map_err(io_error("write", &path))
    }

    fn state_bytes(&self) -> io::Result<Vec<u8>> {
        let bytes = at_most(self.state()?, STATE_MAX)?;
        bytes.ok_or_else(|| io::ErrorKind::FileTooLarge.into())
    }

    /// Reads the one in `dir` into memory, and checks every byte of it. Blocks on files for as long as some 100 MB take.
    ///
    /// # Errors
    /// Any [`CaptureError`]; `NotFound` inside [`CaptureError::Io`] where there is none.
    pub fn read(dir: &Path) -> Result<Capture, CaptureError> {
        let path = dir.join(MEMORY);
        let memory = File::open(&path).map_err(io_error("open", &path))?;
        Capture::read_with(dir, &memory)
    }

    /// As [`Capture::read`], with the memory out of another file: one that was put together from several.
    ///
    /// # Errors
    /// As [`Capture::read`].
    pub fn read_with(dir: &Path, file: &File) -> Result<Capture, CaptureError> {
        let about = read_about(dir)?;
        let damaged = |reason: String| CaptureError::Damaged {
            path: dir.to_owned(),
            reason,
        };
        let path = dir.join(STATE);
        let state = read_bounded(&path, STATE_MAX, &damaged)?;
        if blake3::hash(&state).to_hex().as_str() != about.state_blake3 {
            return Err(damaged(
                "the monitor's state is not what was written".to_owned(),
            ));
        }
        let path = dir.join(MEMORY);
        let len = file.metadata().map_err(io_error("read", &path))?.len();
        if len != about.info.memory.0 {
            return Err(damaged(format!(
                "its memory has {len} bytes instead of {}",
                about.info.memory.0
            )));
        }
        let memory = files::sealable_memory_file(len).map_err(io_error("make", &path))?;
        let (digest, _) = copy_memory(file, &memory, len).map_err(io_error("read", &path))?;
        if digest.to_hex().as_str() != about.memory_blake3 {
            return Err(damaged("its memory is not what was written".to_owned()));
        }
        let path = dir.join(STATE);
        let in_memory = files::sealable_memory_file(state.len() as u64)
            .and_then(|file| file.write_all_at(&state, 0).map(|()| file))
            .map_err(io_error("read", &path))?;
        Capture::seal(about.info, memory, in_memory).map_err(io_error("seal", &path))
    }

    /// What the one in `dir` is of, without reading it whole.
    ///
    /// # Errors
    /// Any [`CaptureError`].
    pub fn read_info(dir: &Path) -> Result<CaptureInfo, CaptureError> {
        Ok(read_about(dir)?.info)
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> CaptureError {
    let path = path.to_owned();
    move |source| CaptureError::Io {
        operation,
        path: path.clone(),
        source,
    }
}

fn create(path: &Path) -> Result<File, CaptureError> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("write", path))
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CaptureError> {
    let file = create(path)?;
    file.write_all_at(bytes, 0)
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", path))
}

/// All that there is to read; nothing where that is more than `limit` bytes.
fn at_most(from: impl Read, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    from.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}

fn read_bounded(
    path: &Path,
    limit: u64,
    damaged: &impl Fn(String) -> CaptureError,
) -> Result<Vec<u8>, CaptureError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let bytes = at_most(file, limit).map_err(io_error("read", path))?;
    let name = path.file_name().unwrap_or_default();
    bytes.ok_or_else(|| damaged(format!("{name:?} has more than {limit} bytes")))
}

fn read_about(dir: &Path) -> Result<About, CaptureError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let because = |reason: String| CaptureError::Damaged {
        path: dir.to_owned(),
        reason,
    };
    let bytes = read_bounded(&dir.join(ABOUT), ABOUT_MAX, &because)?;
    let damaged =
        |error: serde_json::Error| because(format!("its description cannot be read: {error}"));
    let Format { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(CaptureError::Foreign {
            path: dir.to_owned(),
            found: format,
        });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

/// Copies what is not zero to the empty file `to`, which gets the same length, and gives the digest of place and content of
/// every piece that is not, with their bytes together.
fn copy_memory(from: &File, to: &File, len: u64) -> io::Result<(blake3::Hash, u64)> {
    to.set_len(len)?;
    digest_pieces(from, len, |at, part| to.write_all_at(part, at))
}

/// The digest of a file's length and of place and content of everything in it that is not zero, in hexadecimal: the same
/// wherever its holes are. Blocks on files, for as long as its data take to be read.
///
/// # Errors
/// The system's.
pub fn sparse_digest(file: &File) -> io::Result<String> {
    let len = file.metadata()?.len();
    let (digest, _) = digest_pieces(file, len, |_, _| Ok(()))?;
    Ok(digest.to_hex().to_string())
}

/// Shows every piece of a file that is not zero to `each`, with its place, and gives the file's [`sparse_digest`]. The same
/// content gives the same pieces, of at most 64 KiB, wherever its holes are. Blocks on files.
///
/// # Errors
/// The system's, and those of `each`.
pub fn sparse_pieces(
    file: &File,
    each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<String> {
    let len = file.metadata()?.len();
    let (digest, _) = digest_pieces(file, len, each)?;
    Ok(digest.to_hex().to_string())
}

/// Shows every piece that is not zero to `each`, with its place, and gives the digest of all that and their bytes together.
fn digest_pieces(
    from: &File,
    len: u64,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<(blake3::Hash, u64)> {
    let mut digest = blake3::Hasher::new();
    digest.update(&len.to_le_bytes());
    let mut piece = vec![0; PIECE];
    let mut bytes = 0;
    let mut at = 0;
    while let Some((start, end)) = files::next_data(from, at, len)? {
        // Pieces lie at multiples of their size, so that the same content gives the same pieces wherever its holes are.
        at = start - start % PIECE as u64;
        while at < end.min(len) {
            let want = usize::try_from(len - at).unwrap_or(PIECE).min(PIECE);
            let part = &mut piece[..want];
            from.read_exact_at(part, at)?;
            if part.iter().any(|byte| *byte != 0) {
                digest.update(&at.to_le_bytes());
                digest.update(part);
                each(at, part)?;
                bytes += want as u64;
            }
            at += want as u64;
        }
    }
    Ok((digest.finalize(), bytes))
}

#[cfg(test)]
mod tests;
