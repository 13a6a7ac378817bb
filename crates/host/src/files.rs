//! Files: copies that keep holes, files in memory, and small boxes that cannot grow.

use rustix::fs::{
    MemfdFlags, Mode, SealFlags, SeekFrom, copy_file_range, fcntl_add_seals, ftruncate,
    ioctl_ficlone, memfd_create, seek,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Copies `source` to the new file `destination` (mode 0600), sharing blocks where the file system can and keeping holes
/// elsewhere. Blocking. Nothing is left at `destination` after an error.
///
/// # Errors
/// The system's; `AlreadyExists` where `destination` is there.
pub fn clone_sparse(source: &Path, destination: &Path) -> io::Result<()> {
    clone_sparse_file(&File::open(source)?, destination)
}

/// As [`clone_sparse`], of a file that is open: whatever became of its name meanwhile. Any number may copy from one
/// descriptor at once.
///
/// # Errors
/// As [`clone_sparse`].
pub fn clone_sparse_file(source: &File, destination: &Path) -> io::Result<()> {
    let to = File::options()
        .write(true)
        .create_new(true)
        .open(destination)?;
    rustix::fs::fchmod(&to, Mode::RUSR | Mode::WUSR)?;
    let copied = fill(source, &to);
    if copied.is_err() {
        // The copy's own error matters more than a failure to take it back.
        let _ = std::fs::remove_file(destination);
    }
    copied
}

fn fill(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    ftruncate(to, len)?;
    let mut position = 0;
    while let Some((start, end)) = next_data(from, position, len)? {
        copy_range(from, to, start, end)?;
        position = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read, mut written) = (start, start);
    while read < end {
        let want = usize::try_from(end - read)
            .unwrap_or(usize::MAX)
            .min(1 << 30);
        match copy_file_range(from, Some(&mut read), to, Some(&mut written), want) {
            // The source was shortened meanwhile: the rest stays a hole.
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {
                return copy_by_hand(from, to, read, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, mut position: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    while position < end {
        let want = usize::try_from(end - position)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = from.read_at(&mut buffer[..want], position)?;
        if got == 0 {
            return Ok(());
        }
        to.write_all_at(&buffer[..got], position)?;
        position += got as u64;
    }
    Ok(())
}

/// An empty file in memory that whoever holds a descriptor may open again.
///
/// # Errors
/// The system's.
pub fn memory_file() -> io::Result<File> {
    Ok(memfd_create("file", MemfdFlags::CLOEXEC)?.into())
}

/// A file of `len` zeros in memory that whoever holds a descriptor may open again, and that can be sealed.
///
/// # Errors
/// The system's.
pub fn sealable_memory_file(len: u64) -> io::Result<File> {
    let file = memfd_create("sealable", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, len)?;
    Ok(file.into())
}

/// Makes a [`sealable_memory_file`] one that nobody can change any more, in no way.
///
/// # Errors
/// `ResourceBusy` where somebody has it mapped shared and writable.
pub fn seal_for_good(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}

/// The same file with a position of its own, at the beginning.
///
/// # Errors
/// The system's.
pub fn reopen_to_read(file: &File) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The same file, to be written and not read.
///
/// # Errors
/// The system's.
pub fn reopen_to_write(file: &File) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    File::options()
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens the regular file `name` in `dir` for reading, where somebody who is not trusted may write to `dir`: no symbolic link
/// is followed, and nothing else that may lie there (a pipe, a device) makes the caller wait.
///
/// # Errors
/// The system's; `InvalidInput` where it is no regular file.
pub fn open_foreign(dir: &Path, name: &str) -> io::Result<File> {
    open_foreign_as(dir, name, rustix::fs::OFlags::RDONLY)
}

/// As [`open_foreign`], for writing.
///
/// # Errors
/// As [`open_foreign`].
pub fn open_foreign_to_change(dir: &Path, name: &str) -> io::Result<File> {
    open_foreign_as(dir, name, rustix::fs::OFlags::WRONLY)
}

fn open_foreign_as(dir: &Path, name: &str, access: rustix::fs::OFlags) -> io::Result<File> {
    use rustix::fs::{OFlags, openat};
    let dir = File::open(dir)?;
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(&dir, name, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

/// Where the next data at or after `from` begins and ends, in a file of `len` bytes whose holes are zeros.
///
/// # Errors
/// The system's.
pub fn next_data(file: &File, from: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= len {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        // Nothing but a hole up to the end.
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?.min(len);
    Ok((start < end).then_some((start, end)))
}

/// A box in memory for what a program prints: it takes the first `capacity` bytes, and writing more fails in the writer.
/// So a program that never stops complaining fills neither disk nor memory.
#[derive(Debug)]
pub struct OutputBox {
    file: File,
}

impl OutputBox {
    /// An empty box.
    ///
    /// # Errors
    /// The system's.
    pub fn new(capacity: u64) -> io::Result<OutputBox> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("output", flags)?;
        ftruncate(&file, capacity)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(OutputBox { file: file.into() })
    }

    /// The box behind a descriptor of another process of ours, as `/proc/PID/fd/N`.
    ///
    /// # Errors
    /// The system's.
    pub fn reopen(path: &Path) -> io::Result<OutputBox> {
        Ok(OutputBox {
            file: File::open(path)?,
        })
    }

    /// The writer's end.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The end of what was printed, at most `limit` bytes, without what is not text.
    pub fn tail(&self, limit: usize) -> String {
        let Ok(len) = self.file.metadata().map(|data| data.len().min(1 << 20)) else {
            return String::new();
        };
        let mut bytes = vec![0; len as usize];
        let got = self.file.read_at(&mut bytes, 0).unwrap_or(0);
        let end = bytes[..got]
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        String::from_utf8_lossy(&bytes[end.saturating_sub(limit)..end])
            .trim()
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_keeps_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let mut file = File::create(&from).unwrap();
        file.write_all(&[7; 5000]).unwrap();
        file.seek(io::SeekFrom::Start(50 << 20)).unwrap();
        file.write_all(b"middle").unwrap();
        file.set_len(100 << 20).unwrap();
        clone_sparse(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        let again = clone_sparse(&from, &to).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn an_empty_file_and_one_hole_are_copied_too() {
        let dir = tempfile::tempdir().unwrap();
        for len in [0, 1 << 20] {
            let from = dir.path().join(format!("from{len}"));
            File::create(&from).unwrap().set_len(len).unwrap();
            let to = dir.path().join(format!("to{len}"));
            clone_sparse(&from, &to).unwrap();
            assert_eq!(std::fs::metadata(&to).unwrap().len(), len);
        }
    }

    #[test]
    fn a_foreign_directory_gives_regular_files_only() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "text").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(open_foreign(dir.path(), "file").is_ok());
        for name in ["link", "pipe", "absent"] {
            assert!(open_foreign(dir.path(), name).is_err(), "{name}");
        }
    }

    #[test]
    fn an_output_box_keeps_the_first_bytes_and_refuses_the_rest() {
        let output = OutputBox::new(4096).unwrap();
        assert_eq!(output.tail(100), "");
        let mut writer = output.writer().unwrap();
        writer.write_all(b"one\ntwo\n").unwrap();
        assert_eq!(output.tail(100), "one\ntwo");
        assert_eq!(output.tail(4), "two");
        assert!(writer.write_all(&[b'x'; 10_000]).is_err());
        assert_eq!(output.tail(100_000).len(), 4096);
    }
}
