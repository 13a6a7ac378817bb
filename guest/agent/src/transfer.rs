//! Tar streams under way: a thread at one end of a pipe, the loop at the other.

use crate::files;
use crate::flow::{Inflow, Outflow};
use crate::link::set_nonblocking;
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use vistara_guest_protocol::{Refusal, TRANSFERS_MAX, UnpackOptions};

/// Result of a thread, with the serial number of its transfer.
type Finished = (u64, Result<(), Refusal>);

/// What is done.
#[derive(Debug)]
pub(crate) enum Job {
    /// Out of the guest.
    Pack {
        /// What.
        path: PathBuf,
        /// Whether a link at its end is followed.
        follow: bool,
    },
    /// Into the guest.
    Unpack {
        /// Where.
        path: PathBuf,
        /// How.
        options: UnpackOptions,
    },
}

/// One transfer.
#[derive(Debug)]
pub(crate) struct Transfer {
    serial: u64,
    pub(crate) result: Option<Result<(), Refusal>>,
    pub(crate) out: Outflow,
    pub(crate) input: Inflow,
}

/// The threads, those included whose transfers were cancelled and that have not noticed yet.
#[derive(Debug)]
pub(crate) struct Workers {
    sender: mpsc::Sender<Finished>,
    finished: mpsc::Receiver<Finished>,
    ringer: OwnedFd,
    bell: OwnedFd,
    running: usize,
    next_serial: u64,
}

impl Workers {
    pub(crate) fn new() -> io::Result<Self> {
        let (sender, finished) = mpsc::channel();
        let (bell, ringer) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        let (ringer, bell) = (ringer.into(), bell.into());
        Ok(Self {
            sender,
            finished,
            ringer,
            bell,
            running: 0,
            next_serial: 0,
        })
    }

    /// Readable when a thread has finished.
    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// Starts a transfer; nothing where there are too many.
    pub(crate) fn start(&mut self, job: Job) -> io::Result<Option<Transfer>> {
        if self.running >= TRANSFERS_MAX {
            return Ok(None);
        }
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let serial = self.next_serial;
        let (sender, ringer) = (self.sender.clone(), self.ringer.try_clone()?);
        let (out, input, theirs) = match &job {
            Job::Pack { .. } => {
                set_nonblocking(reader.as_fd())?;
                (Some(reader), None, writer)
            }
            Job::Unpack { .. } => {
                set_nonblocking(writer.as_fd())?;
                (None, Some(writer), reader)
            }
        };
        let work = move || {
            let (what, result) = match job {
                Job::Pack { path, follow } => {
                    let result = files::pack(&path, follow, File::from(theirs));
                    (path, result)
                }
                Job::Unpack { path, options } => {
                    let result = files::unpack(&path, &options, File::from(theirs));
                    (path, result)
                }
            };
            let result =
                result.map_err(|error| files::refusal(&what.display().to_string(), &error));
            // Where the loop is gone nobody wants to know.
            let _ = sender.send((serial, result));
            let _ = rustix::io::write(&ringer, &[0]);
        };
        std::thread::Builder::new()
            .name("transfer".to_owned())
            .spawn(work)?;
        self.running += 1;
        self.next_serial += 1;
        Ok(Some(Transfer {
            serial,
            result: None,
            out: Outflow::new(out),
            input: Inflow::new(input),
        }))
    }

    /// Gives the results that have come to their transfers.
    pub(crate) fn collect<'a>(&mut self, transfers: impl Iterator<Item = &'a mut Transfer>) {
        let mut rings = [0; 64];
        let _ = rustix::io::read(&self.bell, &mut rings);
        let finished: Vec<Finished> = self.finished.try_iter().collect();
        self.running = self.running.saturating_sub(finished.len());
        if finished.is_empty() {
            return;
        }
        let mut finished = finished;
        for transfer in transfers {
            if let Some(at) = finished
                .iter()
                .position(|(serial, _)| *serial == transfer.serial)
            {
                transfer.result = Some(finished.swap_remove(at).1);
            }
        }
    }
}
