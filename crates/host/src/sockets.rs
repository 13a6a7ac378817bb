//! Unix sockets in a directory, however long its path is.
//!
//! A socket's own path may have 107 bytes only, which a data directory deep in a home exceeds soon. The directory is
//! therefore opened first and named through `/proc/self/fd`.

use rustix::fs::inotify;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

fn in_dir(dir: &Path, name: &str) -> io::Result<(File, PathBuf)> {
    let handle = File::open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()));
    Ok((handle, path))
}

/// Binds and listens at `dir/name`, mode 0600, replacing what is there. Closed on exec like every descriptor of ours.
///
/// # Errors
/// The system's.
pub fn listen_in(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let (_handle, path) = in_dir(dir, name)?;
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to the socket `dir/name`, without ever waiting: the stream is in non-blocking mode, and where too many wait to
/// be accepted the answer is `WouldBlock`.
///
/// # Errors
/// The system's.
pub fn connect_in(dir: &Path, name: &str) -> io::Result<UnixStream> {
    let (_handle, path) = in_dir(dir, name)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// As [`connect_in`], where somebody who is not trusted may write to `dir`: only a socket that lies there itself is connected
/// to, never one that a symbolic link in its place points to.
///
/// # Errors
/// The system's; `InvalidInput` where it is no socket.
pub fn connect_in_foreign(dir: &Path, name: &str) -> io::Result<UnixStream> {
    use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
    let dir = File::open(dir)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(&dir, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::Socket {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Bytes of events that are read at a time: more than the longest.
const EVENTS_READ: usize = 4096;

/// Tells when a name has been made in a directory, without being asked all the time.
#[derive(Debug)]
pub struct NewNames(AsyncFd<OwnedFd>);

impl NewNames {
    /// Watches `dir` from now on. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's: each user has a limited number of such watches.
    #[allow(
        unsafe_code,
        reason = "tokio asks for a promise about the descriptor that it is given"
    )]
    pub fn watch(dir: &Path) -> io::Result<NewNames> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&events, dir, inotify::WatchFlags::CREATE)?;
        // SAFETY: the registration owns the descriptor, which nothing else closes or replaces, and an `OwnedFd` always gives
        // the same number.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?;
        Ok(NewNames(events))
    }

    /// Waits for names that were made since the last answer. Whoever may write to the directory can make so many that some are
    /// not told of: look from time to time all the same.
    ///
    /// # Errors
    /// The runtime's and the system's.
    pub async fn next(&self) -> io::Result<()> {
        let mut told = self.0.readable().await?;
        // What they are called does not matter. What is left unread makes it readable again.
        let mut events = [0; EVENTS_READ];
        match rustix::io::read(&self.0, &mut events) {
            Ok(length) if length == events.len() => {}
            Ok(_) | Err(rustix::io::Errno::WOULDBLOCK) => told.clear_ready(),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn each_name_that_is_made_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let names = NewNames::watch(dir.path()).unwrap();
        let bound = std::time::Duration::from_secs(10);
        for name in ["dev", "firecracker.pid", "api.sock"] {
            let waiting = names.next();
            tokio::pin!(waiting);
            assert!(is_pending(&mut waiting).await, "before {name}");
            std::fs::write(dir.path().join(name), "").unwrap();
            let told = tokio::time::timeout(bound, waiting).await;
            told.unwrap().unwrap();
        }
        assert!(NewNames::watch(&dir.path().join("absent")).is_err());
    }

    /// Whether it is not ready yet.
    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|context| {
            let ready = std::pin::Pin::new(&mut *future).poll(context).is_ready();
            std::task::Poll::Ready(!ready)
        })
        .await
    }

    #[test]
    fn a_link_in_a_sockets_place_leads_nowhere() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let _secret = listen_in(ours.path(), "s").unwrap();
        std::os::unix::fs::symlink(ours.path().join("s"), theirs.path().join("link")).unwrap();
        std::fs::write(theirs.path().join("file"), "").unwrap();
        assert!(connect_in(theirs.path(), "link").is_ok());
        for name in ["link", "file", "absent"] {
            assert!(connect_in_foreign(theirs.path(), name).is_err(), "{name}");
        }
        let listener = listen_in(theirs.path(), "own").unwrap();
        let mut stream = connect_in_foreign(theirs.path(), "own").unwrap();
        stream.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
    }

    #[test]
    fn a_socket_may_lie_deeper_than_its_own_path_could_say() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("d".repeat(120)).join("e".repeat(120));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = listen_in(&dir, "s").unwrap();
        // Bound again, as after a crash that left the file behind.
        drop(listener);
        let listener = listen_in(&dir, "s").unwrap();
        connect_in(&dir, "s").unwrap().write_all(b"hi").unwrap();
        let mut text = String::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "hi");
        let mode = std::fs::metadata(dir.join("s"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
