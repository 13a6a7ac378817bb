//! The connection to the host, which comes and goes.
//!
//! A [`Channel`] says where hosts come from. A virtio-serial port is one descriptor for ever, on which a host's absence
//! shows as a hang-up that `poll` reports at once, so its return is looked for at growing intervals.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// First and longest interval at which a port without a host is looked at.
const LOOK_FIRST: Duration = Duration::from_millis(1);
const LOOK_LONGEST: Duration = Duration::from_millis(50);
/// The longest until the machine is told who it is: somebody waits for it to begin.
const LOOK_EAGER: Duration = Duration::from_millis(2);

/// Where hosts come from.
#[derive(Debug)]
pub struct Channel {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Handover {
        arrivals: mpsc::Receiver<OwnedFd>,
        bell: OwnedFd,
    },
    Listener(OwnedFd),
    Port(OwnedFd),
}

/// Makes connections to an agent in this process, which has the [`Channel`] that came with it.
#[derive(Debug, Clone)]
pub struct Connector {
    arrivals: mpsc::Sender<OwnedFd>,
    bell: Arc<OwnedFd>,
}

impl Connector {
    /// A new connection, which replaces the one before it.
    ///
    /// # Errors
    /// Where the system has no more descriptors, or [`crate::serve`] has returned.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let gone = || io::Error::new(io::ErrorKind::ConnectionRefused, "the agent has ended");
        self.arrivals.send(theirs.into()).map_err(|_| gone())?;
        rustix::io::write(&self.bell, &[0]).map_err(|_| gone())?;
        Ok(ours)
    }
}

impl Channel {
    /// Connections made within this process.
    ///
    /// # Errors
    /// Where the system has no more descriptors.
    pub fn in_process() -> io::Result<(Connector, Self)> {
        let (sender, arrivals) = mpsc::channel();
        // A socket pair rather than a pipe: writing to one without a reader gives an error and no signal to fear.
        let (bell, ringer) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        let connector = Connector {
            arrivals: sender,
            bell: Arc::new(ringer.into()),
        };
        Ok((
            connector,
            Self {
                source: Source::Handover {
                    arrivals,
                    bell: bell.into(),
                },
            },
        ))
    }

    /// Connections to a socket; a new one replaces the one before it.
    ///
    /// # Errors
    /// Where the socket cannot be used.
    pub fn listener(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            source: Source::Listener(listener.into()),
        })
    }

    /// Connections to a vsock port.
    ///
    /// # Errors
    /// Where the kernel has no vsock, or the port is taken.
    pub fn vsock(port: u32) -> io::Result<Self> {
        Ok(Self {
            source: Source::Listener(crate::sys::vsock_listener(port)?),
        })
    }

    /// A port that is open for good, on which hosts come and go.
    ///
    /// # Errors
    /// Where the descriptor cannot be used.
    pub fn port(port: OwnedFd) -> io::Result<Self> {
        set_nonblocking(port.as_fd())?;
        Ok(Self {
            source: Source::Port(port),
        })
    }
}

/// Makes reads and writes return instead of waiting.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// What reading from the host gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The host is gone.
    Gone,
}

impl Received {
    /// How many bytes, if any.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::Bytes(count) => count,
            Self::Nothing | Self::Gone => 0,
        }
    }
}

/// The connection, or the want of one.
#[derive(Debug)]
pub(crate) struct Link {
    source: Source,
    stream: Option<OwnedFd>,
    port_present: bool,
    look_interval: Duration,
    look_longest: Duration,
    look_at: Instant,
    orphaned: bool,
}

impl Link {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            source: channel.source,
            stream: None,
            port_present: false,
            look_interval: LOOK_FIRST,
            look_longest: LOOK_EAGER,
            look_at: Instant::now(),
            orphaned: false,
        }
    }

    /// From now on a host that is away may take its time.
    pub(crate) fn be_patient(&mut self) {
        self.look_longest = LOOK_LONGEST;
    }

    /// The connection's descriptor.
    pub(crate) fn stream(&self) -> Option<&OwnedFd> {
        match &self.source {
            Source::Port(port) if self.port_present => Some(port),
            Source::Port(_) => None,
            Source::Handover { .. } | Source::Listener(_) => self.stream.as_ref(),
        }
    }

    /// What is readable when a host comes.
    pub(crate) fn arrivals(&self) -> Option<&OwnedFd> {
        match &self.source {
            Source::Handover { bell, .. } => (!self.orphaned).then_some(bell),
            Source::Listener(listener) => Some(listener),
            Source::Port(_) => None,
        }
    }

    /// Whether no host is here and none can come.
    pub(crate) fn is_over(&self) -> bool {
        self.orphaned && self.stream.is_none()
    }

    /// When to look for a host that comes without a sign.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        (matches!(self.source, Source::Port(_)) && !self.port_present).then_some(self.look_at)
    }

    /// Looks for a host that has come. True where there is a new connection.
    pub(crate) fn look(&mut self, now: Instant) -> bool {
        match &self.source {
            Source::Port(port) => {
                if self.port_present || now < self.look_at {
                    return false;
                }
                let mut fds = [PollFd::new(port, PollFlags::IN)];
                let found = poll(&mut fds, Some(&Timespec::default())).is_ok();
                self.port_present = found && !fds[0].revents().contains(PollFlags::HUP);
                self.look_interval = (self.look_interval * 2).min(self.look_longest);
                self.look_at = now + self.look_interval;
                self.port_present
            }
            Source::Listener(listener) => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                match rustix::net::accept_with(listener, flags) {
                    Ok(stream) => {
                        self.stream = Some(stream);
                        true
                    }
                    Err(_) => false,
                }
            }
            Source::Handover { arrivals, bell } => {
                let mut rings = [0; 16];
                match rustix::io::read(bell, &mut rings) {
                    Ok(0) => self.orphaned = true,
                    Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => self.orphaned = true,
                }
                let Some(stream) = arrivals.try_iter().last() else {
                    return false;
                };
                let usable = set_nonblocking(stream.as_fd()).is_ok();
                self.stream = usable.then_some(stream);
                usable
            }
        }
    }

    /// The host is gone.
    pub(crate) fn hang_up(&mut self, now: Instant) {
        self.stream = None;
        self.port_present = false;
        self.look_interval = LOOK_FIRST;
        self.look_at = now + self.look_interval;
    }

    /// Reads what there is.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> Received {
        let Some(stream) = self.stream() else {
            return Received::Nothing;
        };
        match rustix::io::read(stream, buffer) {
            Ok(0) => Received::Gone,
            Ok(count) => Received::Bytes(count),
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            Err(_) => Received::Gone,
        }
    }

    /// Writes what can be written now.
    pub(crate) fn write(&self, bytes: &[u8]) -> Received {
        let Some(stream) = self.stream() else {
            return Received::Nothing;
        };
        match rustix::io::write(stream, bytes) {
            Ok(count) => Received::Bytes(count),
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            Err(_) => Received::Gone,
        }
    }
}
