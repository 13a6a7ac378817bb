//! Which frames may be read from a tap: a program that the kernel runs for each frame before a reader sees it.
//!
//! Invariant: what is not known to be harmless is dropped. The program is the device's, not the reader's: it stays as long as
//! the device, whoever opens it, and takes no module of the kernel, no packet filter's rules, and none of the reader's rights.
//! It decides by a frame's kind and destination only; what a reader makes of what passes is the reader's affair.

// Loading a program and giving it to a tap are calls for which no crate here has a function.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `BPF_PROG_LOAD` and `BPF_PROG_TYPE_SOCKET_FILTER` of `linux/bpf.h`.
const LOAD: libc::c_int = 5;
const SOCKET_FILTER: u32 = 1;

/// A program for taps, in the kernel. Many taps can have the same one.
#[derive(Debug)]
pub struct FrameFilter(OwnedFd);

/// One instruction of `linux/bpf.h`.
#[repr(C)]
struct Instruction {
    code: u8,
    /// The destination's register, and four bits above it the source's.
    registers: u8,
    /// How many instructions a jump leaves out.
    skip: i16,
    value: i32,
}

/// As much of `union bpf_attr` as a load without a log takes; the kernel takes the rest for zeros.
#[repr(C)]
struct LoadRequest {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// Passes ARP, and IPv4 to any address but those of 0.0.0.0/8 and 127.0.0.0/8. Anything else it drops, among it IPv6 and frames
/// with two VLAN tags (the kernel takes the first tag off before it asks). A load beyond a frame's end drops the frame.
const NO_LOOPBACK: [Instruction; 12] = {
    const fn step(code: u8, registers: u8, skip: i16, value: i32) -> Instruction {
        Instruction {
            code,
            registers,
            skip,
            value,
        }
    }
    // r0 = what is at this place of the frame, in the host's order of bytes.
    const LOAD_U16: u8 = 0x28;
    const LOAD_U32: u8 = 0x20;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const JUMP_IF_NOT: u8 = 0x55;
    const SHIFT_RIGHT: u8 = 0x77;
    const SET: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    const EXIT: u8 = 0x95;
    [
        // The loads want the frame in r6.
        step(COPY, 0x16, 0, 0),
        step(LOAD_U16, 0, 0, 12),
        step(JUMP_IF_EQUAL, 0, 5, 0x0806),
        step(JUMP_IF_NOT, 0, 6, 0x0800),
        // 14 bytes of Ethernet's header, 16 of IPv4's: the destination, of which the first byte counts.
        step(LOAD_U32, 0, 0, 30),
        step(SHIFT_RIGHT, 0, 0, 24),
        step(JUMP_IF_EQUAL, 0, 3, 0),
        step(JUMP_IF_EQUAL, 0, 2, 127),
        // How many bytes pass: all.
        step(SET, 0, 0, i32::MAX),
        step(EXIT, 0, 0, 0),
        step(SET, 0, 0, 0),
        step(EXIT, 0, 0, 0),
    ]
};

impl FrameFilter {
    /// One for a tap whose reader would connect to whatever address a frame names: it never sees a frame to an address by
    /// which it would reach the loopback of the host it runs on. (To Linux, a connection to 0.0.0.0 is one to 127.0.0.1.)
    ///
    /// # Errors
    /// Where the kernel has no such programs, or this process may load none (`CAP_BPF` or `CAP_SYS_ADMIN`).
    pub fn no_loopback() -> io::Result<FrameFilter> {
        let address = |at: *const u8| at.addr() as u64;
        let request = LoadRequest {
            kind: SOCKET_FILTER,
            count: NO_LOOPBACK.len() as u32,
            instructions: address(NO_LOOPBACK.as_ptr().cast()),
            license: address(c"Apache-2.0".as_ptr().cast()),
        };
        // SAFETY: the kernel reads `size_of::<LoadRequest>()` bytes of the request, as many instructions as `count` says and a
        // text up to its zero; all of it lives until the call returns. It writes nothing.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                LOAD,
                &raw const request,
                size_of::<LoadRequest>(),
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has it. It is closed on exec.
        Ok(FrameFilter(unsafe {
            OwnedFd::from_raw_fd(fd as libc::c_int)
        }))
    }

    /// Gives it to the tap that this file of `/dev/net/tun` is attached to, in place of what it had.
    pub(crate) fn set_on(&self, tap: BorrowedFd<'_>) -> io::Result<()> {
        let filter = self.0.as_raw_fd();
        // SAFETY: the request takes the address of a number, which lives until the call returns.
        let result = unsafe {
            libc::ioctl(
                tap.as_raw_fd(),
                libc::TUNSETFILTEREBPF as _,
                &raw const filter,
            )
        };
        match result {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}
