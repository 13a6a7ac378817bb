//! The calls to the kernel that have no safe wrapper. All of this crate's unsafe code is here.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sends any signal, real-time ones included, to a process, or with a negative `pid` to a group.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers and touches no memory of ours.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// A descriptor that is readable when a child has changed state; the signal itself is blocked.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: `set` is a plain structure of integers, for which zeros are a value; sigemptyset then initialises it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives for all three calls, and the old mask is not asked for. The descriptor that signalfd gives
    // is new and nobody else's.
    unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &set,
            std::ptr::null_mut(),
        ))?;
        let fd = check(libc::signalfd(
            -1,
            &set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Runs `prepare` in the child, between fork and exec.
///
/// `prepare` may only do what is safe after a fork in a program with threads: system calls on values that it has
/// already, no allocation and no lock.
pub(crate) fn before_exec(
    command: &mut Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the one caller keeps to the rule above: its closure makes system calls only.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Most bytes of entropy taken at a time.
pub(crate) const ENTROPY_MAX: usize = 512;

/// Feeds the kernel's random generator, credits the bytes, and has it reseed at once: two forks of one template would
/// give the same random numbers without.
pub(crate) fn add_entropy(device: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: u64 = 0x4008_5203;
    const RNDRESEEDCRNG: u64 = 0x5207;
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; ENTROPY_MAX],
    }
    let mut pool = Pool {
        entropy_bits: 0,
        length: 0,
        bytes: [0; ENTROPY_MAX],
    };
    for (to, from) in pool.bytes.iter_mut().zip(seed) {
        *to = *from;
        pool.length += 1;
    }
    pool.entropy_bits = pool.length * 8;
    // SAFETY: `pool` has the layout of struct rand_pool_info, and its length field does not exceed its buffer. The
    // second request takes no argument.
    unsafe {
        check(libc::ioctl(
            device.as_raw_fd(),
            RNDADDENTROPY as _,
            &raw const pool,
        ))?;
        check(libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _, 0)).map(drop)
    }
}

/// A listening vsock socket on `port`, for connections from the host.
pub(crate) fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: the address is a plain structure of integers that lives for the call, and its own size is given. The
    // descriptor is new and nobody else's.
    unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        check(libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            length,
        ))?;
        check(libc::listen(fd.as_raw_fd(), 4))?;
        Ok(fd)
    }
}
