//! Unix sockets in a directory, however long its path is (a socket's own path may have 107 bytes only).

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Binds and listens at `dir/name`, mode 0600, replacing what is there. Not inherited by default.
///
/// # Errors
/// The system's.
pub fn listen_in(dir: &Path, name: &str) -> io::Result<UnixListener> {
    UnixListener::bind(dir.join(name))
}

/// Connects to the socket `dir/name`.
///
/// # Errors
/// The system's.
pub fn connect_in(dir: &Path, name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(dir.join(name))
}
