//! The program's output on our standard streams, byte for byte and in order, from one thread: a reader that is slow or
//! stopped holds the program back and leaves the session awake for signals.

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use tokio::sync::{mpsc, oneshot};

/// Pieces that may wait (each at most 64 KiB): enough that the thread never idles, few enough to hold the program back.
const PIECES_MAX: usize = 8;

/// A piece of output.
#[derive(Debug)]
pub(crate) enum Piece {
    /// For standard output.
    Stdout(Bytes),
    /// For standard error.
    Stderr(Bytes),
}

/// The thread's ends.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Takes pieces; dropped at the end.
    pub(crate) pieces: mpsc::Sender<Piece>,
    /// Says that standard output is gone, and how; or, once `pieces` is dropped, that everything is written.
    pub(crate) done: oneshot::Receiver<Result<(), std::io::Error>>,
}

/// Starts the thread.
pub(crate) fn start() -> std::io::Result<Writer> {
    let (pieces, mut queue) = mpsc::channel::<Piece>(PIECES_MAX);
    let (finish, done) = oneshot::channel();
    std::thread::Builder::new()
        .name("output".to_owned())
        .spawn(move || {
            let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
            let result = loop {
                match queue.blocking_recv() {
                    None => break Ok(()),
                    Some(Piece::Stdout(data)) => {
                        if let Err(error) = write_all(std::os::fd::AsFd::as_fd(&stdout), &data) {
                            break Err(error.into());
                        }
                    }
                    // Where nobody reads standard error, standard output may still matter.
                    Some(Piece::Stderr(data)) => {
                        let _ = write_all(std::os::fd::AsFd::as_fd(&stderr), &data);
                    }
                }
            };
            let _ = finish.send(result);
        })?;
    Ok(Writer { pieces, done })
}

fn write_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(count) => data = data.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Somebody else made this terminal or pipe non-blocking.
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until the descriptor is ready; an error shows at the next read or write.
pub(crate) fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) {
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None);
}
