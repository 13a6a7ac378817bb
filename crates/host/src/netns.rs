//! Network namespaces of launched processes, and the devices in them: taps, and a bridge that joins them.
//!
//! Everything happens in a thread that enters the namespace and ends there, so that this process's own network is never
//! touched and nothing has to be undone: a namespace's devices go with its last process.

// Requests to network devices, for which no crate here has a call.
#![allow(unsafe_code)]

use crate::frames::FrameFilter;
use crate::process::ProcessHandle;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `SIOCBRADDBR` and `SIOCBRADDIF` of `linux/sockios.h`.
const ADD_BRIDGE: libc::c_ulong = 0x89a0;
const ADD_TO_BRIDGE: libc::c_ulong = 0x89a2;

/// A network namespace.
#[derive(Debug)]
pub struct NetworkNamespace(File);

/// A tap that stays as long as its namespace, whoever opens and closes it.
#[derive(Debug, Clone, Copy)]
pub struct Tap<'a> {
    /// Its name, at most 15 bytes.
    pub name: &'a str,
    /// The one user who may open it, beside whoever has the rights of an administrator.
    pub owner: u32,
    /// What its reader never sees, from the first frame on; absent where it may see all.
    pub filter: Option<&'a FrameFilter>,
}

/// Why devices could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct NetworkError {
    /// What was being done.
    pub step: &'static str,
    /// The system's answer.
    pub source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> NetworkError {
    move |error| NetworkError {
        step,
        source: error.into(),
    }
}

/// Runs `work` in a thread of its own, whose namespaces it may change.
fn in_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| {
        let panicked = io::Error::other("the thread panicked");
        Err(at("working in a network namespace")(panicked))
    })
}

impl NetworkNamespace {
    /// A new one, empty, which goes when this is dropped and no process is in it.
    ///
    /// # Errors
    /// Without the right to make one.
    pub fn new() -> Result<NetworkNamespace, NetworkError> {
        let step = "making a network namespace";
        in_thread(|| {
            // SAFETY: CLONE_NEWNET changes only of which network namespace this thread is, and the thread ends here.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(at(step))?;
            let file = File::open("/proc/thread-self/ns/net").map_err(at(step))?;
            Ok(NetworkNamespace(file))
        })
    }

    /// That of a process.
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn of(process: &ProcessHandle) -> Result<NetworkNamespace, NetworkError> {
        let file = process.namespace("net");
        Ok(NetworkNamespace(
            file.map_err(at("opening a network namespace"))?,
        ))
    }

    /// Its file, by which another program can enter it.
    pub fn into_file(self) -> File {
        self.0
    }

    /// Makes taps in it and joins them by a bridge: what is written to one is read from the others. None of the devices has
    /// an address.
    ///
    /// # Errors
    /// What could not be done: some devices may be there then.
    pub fn make_joined_taps(&self, bridge: &str, taps: &[Tap<'_>]) -> Result<(), NetworkError> {
        in_thread(|| {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(self.0.as_fd(), kind)
                .map_err(at("entering a network namespace"))?;
            // Else each device would speak for itself. Where it cannot be written, or there is no IPv6, it is only noise.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)
                .map_err(at("opening a socket"))?;
            let socket = socket.as_fd();
            let step =
                "making a bridge (the kernel needs bridges: CONFIG_BRIDGE, or modprobe bridge)";
            add_bridge(socket, bridge).map_err(at(step))?;
            for tap in taps {
                add_tap(tap)?;
                join(socket, bridge, tap.name).map_err(at("joining a tap to a bridge"))?;
                switch_on(socket, tap.name).map_err(at("switching a tap on"))?;
            }
            switch_on(socket, bridge).map_err(at("switching a bridge on"))
        })
    }
}

/// A request about the device of this name.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeros are a value of this structure of numbers and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn answered(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes a request of which the kernel reads and writes one `ifreq`.
fn ask(fd: BorrowedFd<'_>, code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the callers' codes take the address of an `ifreq`, which lives until the call returns.
    answered(unsafe { libc::ioctl(fd.as_raw_fd(), code as _, std::ptr::from_mut(request)) })
}

fn add_bridge(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // The name alone, in as many bytes as it has in a request.
    ask(socket, ADD_BRIDGE, &mut request(name)?)
}

/// Opens the tap of this name; makes it where there is none, until the file is closed.
fn open_tap(name: &str) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    ask(file.as_fd(), libc::TUNSETIFF as libc::c_ulong, &mut request)?;
    Ok(file)
}

fn add_tap(tap: &Tap<'_>) -> Result<(), NetworkError> {
    let step = "making a tap (the kernel needs taps: CONFIG_TUN, or modprobe tun)";
    let file = open_tap(tap.name).map_err(at(step))?;
    // Before it stays: one that is to be filtered is never there without.
    if let Some(filter) = tap.filter {
        filter
            .set_on(file.as_fd())
            .map_err(at("filtering a tap (Linux 4.16)"))?;
    }
    let set = |code: libc::c_ulong, value: libc::c_ulong| {
        // SAFETY: both codes below take a number.
        answered(unsafe { libc::ioctl(file.as_raw_fd(), code as _, value) })
    };
    set(libc::TUNSETOWNER as libc::c_ulong, tap.owner.into())
        .and_then(|()| set(libc::TUNSETPERSIST as libc::c_ulong, 1))
        .map_err(at(step))
}

fn join(socket: BorrowedFd<'_>, bridge: &str, name: &str) -> io::Result<()> {
    let mut of_tap = request(name)?;
    ask(socket, libc::SIOCGIFINDEX as libc::c_ulong, &mut of_tap)?;
    let mut of_bridge = request(bridge)?;
    // SAFETY: the kernel has just written the index there, and any number is one.
    of_bridge.ifr_ifru.ifru_ifindex = unsafe { of_tap.ifr_ifru.ifru_ifindex };
    ask(socket, ADD_TO_BRIDGE, &mut of_bridge)
}

fn switch_on(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    ask(socket, libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)
}

#[cfg(test)]
#[path = "netns_tests.rs"]
mod tests;
