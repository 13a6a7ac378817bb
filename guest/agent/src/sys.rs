//! The calls to the kernel that have no safe wrapper. All of this crate's unsafe code is here.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
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

/// Gives every signal its default action and blocks none, as a program expects to find them: both an ignored signal and
/// the mask outlive exec, and the agent's own mask holds back the signals that tell a program of its children.
///
/// System calls only, on values of its own: it may be called between fork and exec.
fn default_signals() -> io::Result<()> {
    // The actions first: no handler of the parent's must run in the child once nothing is blocked.
    for signal in 1..=SIGNAL_MAX {
        // SAFETY: the kernel reads its structure of at most four words, in which zeros say the default action, and writes
        // nothing. Actions that cannot be changed are refused, and are the default.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                std::ptr::null::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: as in `child_signals`, and the old mask is not asked for.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &none,
            std::ptr::null_mut(),
        ))
        .map(drop)
    }
}

/// The last signal, real-time ones included.
const SIGNAL_MAX: libc::c_int = 64;

/// The kernel's own structure of a signal's action. It is given to the kernel itself: the C library refuses to change
/// some real-time signals, which a parent may have ignored all the same.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// A program, its arguments and its environment, laid out as the kernel wants them.
pub(crate) struct Image {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Image {
    /// Nothing where a text holds a zero byte.
    pub(crate) fn new(
        program: &Path,
        arguments: &[String],
        environment: &[(String, String)],
    ) -> Option<Self> {
        let texts = |texts: &mut dyn Iterator<Item = String>| {
            texts
                .map(|text| CString::new(text).ok())
                .collect::<Option<Vec<_>>>()
        };
        Some(Self {
            program: CString::new(program.as_os_str().as_bytes()).ok()?,
            arguments: texts(&mut arguments.iter().cloned())?,
            environment: texts(
                &mut environment
                    .iter()
                    .map(|(key, value)| format!("{key}={value}")),
            )?,
        })
    }
}

/// Pointers to texts, with a null pointer at the end.
struct Pointers(Vec<*const libc::c_char>);

// SAFETY: the pointers are only read, and what they point to is owned by the closure that owns them and never changed.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}

impl Pointers {
    fn to(texts: &[CString]) -> Self {
        let pointers = texts.iter().map(|text| text.as_ptr());
        Self(pointers.chain([std::ptr::null()]).collect())
    }
}

/// Runs `prepare` in the child, with no signal blocked or ignored, and then executes `image`. Not the standard library's own way of executing, which gives
/// a file that is no program to a shell.
///
/// `prepare` may only do what is safe after a fork in a program with threads: system calls on values that it has
/// already, no allocation and no lock.
pub(crate) fn execute(
    command: &mut Command,
    image: Image,
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    let (arguments, environment) = (
        Pointers::to(&image.arguments),
        Pointers::to(&image.environment),
    );
    let closure = move || {
        let (image, arguments, environment) = (&image, &arguments, &environment);
        default_signals()?;
        prepare()?;
        // SAFETY: all three point to texts and arrays, ended by zero and by null, that this closure owns.
        unsafe {
            libc::execve(
                image.program.as_ptr(),
                arguments.0.as_ptr(),
                environment.0.as_ptr(),
            )
        };
        Err(io::Error::last_os_error())
    };
    // SAFETY: the closure makes system calls only, as the one caller's `prepare` does; an error made from a number
    // allocates nothing.
    unsafe {
        command.pre_exec(closure);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_starts_with_no_signal_blocked_or_ignored() {
        let _children = child_signals().unwrap();
        for ignored in [libc::SIGPIPE, libc::SIGUSR2] {
            // SAFETY: ignoring needs no code of ours.
            unsafe { libc::signal(ignored, libc::SIG_IGN) };
        }
        let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert_ne!(masks(&own), [0, 0], "the test can fail");
        let program = Path::new("/bin/cat");
        let arguments = ["cat".to_owned(), "/proc/self/status".to_owned()];
        let image = Image::new(program, &arguments, &[]).unwrap();
        let mut command = Command::new(program);
        execute(&mut command, image, || Ok(()));
        let output = command.output().unwrap();
        assert_eq!(masks(&String::from_utf8(output.stdout).unwrap()), [0, 0]);
    }

    /// What is blocked and what is ignored.
    fn masks(status: &str) -> [u64; 2] {
        ["SigBlk:", "SigIgn:"].map(|name| {
            let mask = status.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(mask.unwrap().trim(), 16).unwrap()
        })
    }
}
