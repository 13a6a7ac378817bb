//! Files: copies that keep holes, and files without a name.

use std::fs::File;
use std::io;
use std::path::Path;

/// How [`clone_sparse`] made its copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMethod {
    /// The file system shares the blocks (FICLONE).
    Reflink,
    /// Data was copied, holes were kept.
    SparseCopy,
}

/// Copies `source` to the new file `destination`, sharing blocks where the file system can and keeping holes elsewhere.
/// Blocking. Nothing is left at `destination` after an error.
///
/// # Errors
/// The system's; `AlreadyExists` where `destination` is there.
pub fn clone_sparse(source: &Path, destination: &Path) -> io::Result<CloneMethod> {
    let _ = (source, destination);
    Err(io::ErrorKind::Unsupported.into())
}

/// A file without a name in `dir`, readable and writable, gone with its last descriptor (O_TMPFILE, or a file unlinked at
/// once where the file system has none).
///
/// # Errors
/// The system's.
pub fn anonymous_file(dir: &Path) -> io::Result<File> {
    let _ = dir;
    Err(io::ErrorKind::Unsupported.into())
}
