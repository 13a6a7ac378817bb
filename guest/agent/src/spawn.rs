//! Starting a process: finding the program, its user and its environment, and saying clearly what was wrong.

use crate::link::set_nonblocking;
use crate::sys;
use crate::users::{self, Identity};
use rustix::process::{Pid, Resource};
use rustix::pty::OpenptFlags;
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vistara_guest_protocol::{ProcessSpec, Rlimit, SpawnFailed, TtySize};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What every process of a guest shares.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    /// For `HOSTNAME`.
    pub(crate) hostname: String,
    /// Limits of every process.
    pub(crate) rlimits: Vec<(Resource, rustix::process::Rlimit)>,
    /// Whether this is PID 1 of a guest.
    pub(crate) init: bool,
}

/// A process that runs, and our ends of its streams, none of which blocks.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) terminal: Option<OwnedFd>,
}

fn failed(code: u8, message: impl Into<String>) -> SpawnFailed {
    SpawnFailed {
        code,
        message: message.into(),
    }
}

/// Reads limits as the host names them.
///
/// # Errors
/// The name that is not a limit's.
pub(crate) fn parse_rlimits(
    limits: &[Rlimit],
) -> Result<Vec<(Resource, rustix::process::Rlimit)>, String> {
    let parse = |limit: &Rlimit| {
        let resource = match limit.name.as_str() {
            "as" => Resource::As,
            "core" => Resource::Core,
            "cpu" => Resource::Cpu,
            "data" => Resource::Data,
            "fsize" => Resource::Fsize,
            "locks" => Resource::Locks,
            "memlock" => Resource::Memlock,
            "msgqueue" => Resource::Msgqueue,
            "nice" => Resource::Nice,
            "nofile" => Resource::Nofile,
            "nproc" => Resource::Nproc,
            "rss" => Resource::Rss,
            "rtprio" => Resource::Rtprio,
            "rttime" => Resource::Rttime,
            "sigpending" => Resource::Sigpending,
            "stack" => Resource::Stack,
            _ => return Err(format!("there is no resource limit {:?}", limit.name)),
        };
        Ok((
            resource,
            rustix::process::Rlimit {
                current: limit.soft,
                maximum: limit.hard,
            },
        ))
    };
    limits.iter().map(parse).collect()
}

/// Sets a terminal's size.
pub(crate) fn resize(terminal: &OwnedFd, size: TtySize) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

struct Streams {
    child: [OwnedFd; 3],
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

fn terminal(size: TtySize, stdin: bool) -> io::Result<Streams> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    resize(&master, size)?;
    set_nonblocking(master.as_fd())?;
    Ok(Streams {
        child: [slave.try_clone()?, slave.try_clone()?, slave],
        stdin: if stdin {
            Some(master.try_clone()?)
        } else {
            None
        },
        stdout: master.try_clone()?,
        stderr: None,
        terminal: Some(master),
    })
}

fn pipes(stdin: bool) -> io::Result<Streams> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (child_in, our_in) = if stdin {
        let (reader, writer) = pipe()?;
        set_nonblocking(writer.as_fd())?;
        (reader, Some(writer))
    } else {
        (File::open("/dev/null")?.into(), None)
    };
    let (our_out, child_out) = pipe()?;
    let (our_err, child_err) = pipe()?;
    set_nonblocking(our_out.as_fd())?;
    set_nonblocking(our_err.as_fd())?;
    Ok(Streams {
        child: [child_in, child_out, child_err],
        stdin: our_in,
        stdout: our_out,
        stderr: Some(our_err),
        terminal: None,
    })
}

/// Starts a process.
pub(crate) fn spawn(spec: &ProcessSpec, around: &Surroundings) -> Result<Started, SpawnFailed> {
    let name = match spec.argv.first() {
        Some(name) if !name.is_empty() => name,
        _ => {
            return Err(failed(
                127,
                "no command was given: the image names none either",
            ));
        }
    };
    let identity = users::resolve(&spec.user)?;
    let cwd = if spec.cwd.is_empty() {
        "/"
    } else {
        spec.cwd.as_str()
    };
    enter(cwd)?;
    let env = environment(spec, around, &identity);
    let path = env
        .iter()
        .rev()
        .find(|(key, _)| key == "PATH")
        .map_or("", |(_, value)| value);
    let program = find_program(name, path, Path::new(cwd))?;

    let streams = match spec.tty {
        Some(size) => terminal(size, spec.stdin),
        None => pipes(spec.stdin),
    }
    .map_err(|error| failed(125, format!("the streams of the process: {error}")))?;
    let [child_in, child_out, child_err] = streams.child;
    let Some(image) = sys::Image::new(&program, &spec.argv, &env) else {
        return Err(failed(
            125,
            "arguments and environment cannot hold a zero byte",
        ));
    };
    let mut command = Command::new(&program);
    command.current_dir(cwd).stdin(Stdio::from(child_in));
    command
        .stdout(Stdio::from(child_out))
        .stderr(Stdio::from(child_err));
    let change_user = (around.init || !spec.user.is_empty()).then_some(identity);
    prepare(&mut command, image, around, change_user, spec.tty.is_some());
    match command.spawn() {
        Ok(child) => Ok(Started {
            pid: Pid::from_child(&child),
            stdin: streams.stdin,
            stdout: Some(streams.stdout),
            stderr: streams.stderr,
            terminal: streams.terminal,
        }),
        Err(error) => Err(exec_failed(name, &Path::new(cwd).join(&program), &error)),
    }
}

/// What the child does between fork and exec: system calls only.
fn prepare(
    command: &mut Command,
    image: sys::Image,
    around: &Surroundings,
    identity: Option<Identity>,
    tty: bool,
) {
    let rlimits = around.rlimits.clone();
    let init = around.init;
    let who = identity.map(|id| {
        let groups: Vec<_> = id
            .groups
            .iter()
            .map(|gid| rustix::fs::Gid::from_raw(*gid))
            .collect();
        (
            rustix::fs::Uid::from_raw(id.uid),
            rustix::fs::Gid::from_raw(id.gid),
            groups,
        )
    });
    sys::execute(command, image, move || {
        rustix::process::setsid()?;
        if tty {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if init {
            // The agent's own score must not be inherited. Where it cannot be changed the process still runs.
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            let mode = rustix::fs::Mode::empty();
            if let Ok(score) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, mode) {
                let _ = rustix::io::write(&score, b"0");
            }
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        }
        for (resource, limit) in &rlimits {
            rustix::process::setrlimit(*resource, *limit)?;
        }
        if let Some((uid, gid, groups)) = &who {
            set_thread_groups(groups)?;
            set_thread_gid(*gid)?;
            set_thread_uid(*uid)?;
        }
        Ok(())
    });
}

/// Sees to it that the working directory is there.
fn enter(cwd: &str) -> Result<(), SpawnFailed> {
    if !cwd.starts_with('/') {
        return Err(failed(
            125,
            format!("the working directory {cwd:?} is not an absolute path"),
        ));
    }
    match fs::metadata(cwd) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(failed(
            125,
            format!("the working directory {cwd} is not a directory"),
        )),
        Err(_) => fs::create_dir_all(cwd)
            .map_err(|error| failed(125, format!("the working directory {cwd}: {error}"))),
    }
}

fn environment(
    spec: &ProcessSpec,
    around: &Surroundings,
    identity: &Identity,
) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::with_capacity(spec.env.len() + 4);
    for (key, value) in spec
        .env
        .iter()
        .filter(|(key, _)| !key.is_empty() && !key.contains('='))
    {
        // The last of a name counts, and stands alone: programs disagree about which of two they see.
        match env.iter_mut().find(|(have, _)| have == key) {
            Some((_, have)) => have.clone_from(value),
            None => env.push((key.clone(), value.clone())),
        }
    }
    let mut default = |key: &str, value: &str| {
        if !env.iter().any(|(have, _)| have == key) {
            env.push((key.to_owned(), value.to_owned()));
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", &identity.home);
    if !around.hostname.is_empty() {
        default("HOSTNAME", &around.hostname);
    }
    if spec.tty.is_some() {
        default("TERM", "xterm");
    }
    env
}

/// Finds the program that `name` means. What comes back has a slash in it, so that nobody looks it up again.
fn find_program(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, SpawnFailed> {
    let refuse = |code, why: &str| Err(failed(code, format!("exec: {name:?}: {why}")));
    if name.contains('/') {
        return match fs::metadata(cwd.join(name)) {
            Ok(found) if found.is_dir() => refuse(126, "is a directory"),
            Ok(found) if found.permissions().mode() & 0o111 == 0 => {
                refuse(126, "permission denied: the file is not executable")
            }
            Ok(_) => Ok(PathBuf::from(name)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                refuse(127, "no such file in the guest")
            }
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => refuse(
                127,
                "no such file in the guest: a part of the path is not a directory",
            ),
            Err(error) => refuse(126, &error.to_string()),
        };
    }
    let mut present = None;
    for dir in path.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match fs::metadata(cwd.join(&candidate)) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => {
                return Ok(candidate);
            }
            Ok(found) if found.is_file() => present = Some(candidate),
            _ => {}
        }
    }
    match present {
        Some(file) => refuse(
            126,
            &format!("permission denied: {} is not executable", file.display()),
        ),
        None => refuse(127, &format!("not found in the guest's PATH ({path})")),
    }
}

/// Says why exec failed.
fn exec_failed(name: &str, program: &Path, error: &io::Error) -> SpawnFailed {
    let refuse = |code, why: &str| failed(code, format!("exec: {name:?}: {why}"));
    match error.raw_os_error() {
        Some(libc::ENOENT) => match interpreter(program) {
            Some(missing) => refuse(
                127,
                &format!("its interpreter {missing} is not in the guest"),
            ),
            None => refuse(127, "no such file in the guest"),
        },
        Some(libc::EACCES) => refuse(126, "permission denied"),
        Some(libc::ENOEXEC) => refuse(
            126,
            "exec format error: neither a program for this architecture nor a script with #!",
        ),
        Some(libc::EISDIR) => refuse(126, "is a directory"),
        Some(libc::ETXTBSY | libc::ELOOP | libc::ELIBBAD | libc::EPERM) => {
            refuse(126, &error.to_string())
        }
        Some(libc::E2BIG) => refuse(126, "the arguments and the environment are too long"),
        _ => refuse(125, &error.to_string()),
    }
}

/// The interpreter that a script or a dynamically linked program names.
fn interpreter(program: &Path) -> Option<String> {
    let mut file = File::open(program).ok()?;
    let mut head = [0; 256];
    let length = file.read(&mut head).ok()?;
    let head = &head[..length];
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = String::from_utf8_lossy(line.split(|byte| *byte == b'\n').next()?).into_owned();
        return line.split_whitespace().next().map(str::to_owned);
    }
    // A 64-bit little-endian ELF file: the program header of type 3 holds the name.
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let long = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let short =
        |bytes: &[u8], at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let (table, size, count) = (long(head, 32)?, short(head, 54)?, short(head, 56)?);
    for index in 0..u64::from(count.min(64)) {
        let mut entry = [0; 56];
        file.seek(SeekFrom::Start(table.checked_add(index * u64::from(size))?))
            .ok()?;
        file.read_exact(&mut entry).ok()?;
        if entry.starts_with(&[3, 0, 0, 0]) {
            let mut text = vec![0; usize::try_from(long(&entry, 32)?.min(4096)).ok()?];
            file.seek(SeekFrom::Start(long(&entry, 8)?)).ok()?;
            file.read_exact(&mut text).ok()?;
            let text = text.split(|byte| *byte == 0).next()?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
    }
    None
}
