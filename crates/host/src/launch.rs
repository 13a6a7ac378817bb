//! Starting a program behind fences.
//!
//! Everything is prepared before the fork; between fork and exec the child makes system calls only. What a fence could
//! not do ends the launch with the name of the step, so that a fence that is reported as holding does hold.

// The hook between fork and exec, and the calls in it that no crate wraps for that place.
#![allow(unsafe_code)]

use crate::birth::{self, Birth};
use crate::cgroup::{self, Cgroup};
use crate::facts;
use crate::mounts::{self, Bind};
use crate::process::ProcessHandle;
use crate::root::Root;
use rustix::fs::Mode;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Gid, Resource, Rlimit as RawLimit, Uid, setrlimit, setsid, umask};
use rustix::thread::{CapabilitySet, UnshareFlags, set_no_new_privs};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// A program to start. It inherits nothing but what is named here, leads a session of its own and outlives us.
#[derive(Debug)]
pub struct Launch {
    /// Absolute path.
    pub program: PathBuf,
    /// Arguments after the program's name.
    pub args: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors that it inherits **under their own numbers** (so arguments can name `fd.as_raw_fd()`, and nothing has
    /// to be renumbered). They are closed here once it runs.
    pub inherit: Vec<OwnedFd>,
    /// User and group to become; absent to stay what we are.
    pub uid_gid: Option<(u32, u32)>,
    /// Supplementary groups: none but these. Used only with `uid_gid`.
    pub groups: Vec<u32>,
    /// Keeps its capabilities (for a helper that fences itself); else they are dropped.
    pub keep_capabilities: bool,
    /// Resources and their hard limits.
    pub rlimits: Vec<(Rlimit, u64)>,
    /// Its cgroup, entered before the program begins.
    pub cgroup: Option<Cgroup>,
    /// Where standard output and standard error go; nowhere where absent.
    pub output: Option<File>,
    /// Where standard error goes instead.
    pub errors: Option<File>,
    /// What standard input is; nothing where absent.
    pub input: Option<File>,
    /// Where it works: absolute, and there.
    pub working_dir: PathBuf,
    /// -1000 to 1000: higher is killed earlier when the host runs out of memory.
    pub oom_score_adj: i16,
    /// Directories that are read-only for it with all that is mounted below them, whatever they are for others. Needs the
    /// right to mount.
    pub read_only: Vec<PathBuf>,
    /// Files that only it sees at these places. Needs the right to mount.
    pub binds: Vec<Bind>,
    /// It is the first process of a process namespace of its own. Needs the right to make one.
    pub own_processes: bool,
    /// It is a process of this process namespace ([`ProcessHandle::process_namespace`]), and a child of that one's first process
    /// instead of ours: it ends with that process, whoever lives then, and nobody has to collect it. How it ends is told to
    /// nobody. Needs the right to enter one; not together with `own_processes`.
    pub processes_of: Option<File>,
    /// A directory at which it sees its own process namespace's `/proc`, without anything of the kernel's.
    pub proc_at: Option<PathBuf>,
    /// It has a network namespace of its own, in which there is nothing. Needs the right to make one.
    pub own_network: bool,
    /// Its root directory; its program, and every path here, is looked up there. Needs the right to enter one.
    pub root: Option<Arc<Root>>,
}

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rlimit {
    /// Bytes of a core file.
    Core,
    /// Open descriptors.
    Descriptors,
    /// Bytes of any file that it writes.
    FileSize,
    /// Bytes of address space.
    AddressSpace,
}

/// Why a program could not be started. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
#[error("starting {program:?} failed at: {step}")]
pub struct LaunchError {
    /// Which.
    pub program: PathBuf,
    /// At which step.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// A started program, and which fences hold.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub process: ProcessHandle,
    /// The fences that hold, in words.
    pub fences: Vec<String>,
}

const CAP_SETPCAP: u32 = 8;

impl Launch {
    /// A launch of `program` without anything: no arguments, environment or descriptors.
    pub fn new(program: impl Into<PathBuf>) -> Launch {
        Launch {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            inherit: Vec::new(),
            uid_gid: None,
            groups: Vec::new(),
            keep_capabilities: false,
            rlimits: vec![(Rlimit::Core, 0)],
            cgroup: None,
            output: None,
            errors: None,
            input: None,
            working_dir: PathBuf::from("/"),
            oom_score_adj: 0,
            read_only: Vec::new(),
            binds: Vec::new(),
            own_processes: false,
            processes_of: None,
            proc_at: None,
            own_network: false,
            root: None,
        }
    }

    /// Starts it. Blocking for some milliseconds, until the program's image is loaded.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn start(mut self) -> Result<Launched, LaunchError> {
        let program = self.program.clone();
        let fail = |step: &'static str| {
            let program = program.clone();
            move |source: io::Error| LaunchError {
                program,
                step,
                source,
            }
        };
        let binds = std::mem::take(&mut self.binds);
        let (plan, fences) = Plan::prepare(&self, binds).map_err(fail("preparing the fences"))?;
        let born = self.born_in();
        let born = born.map(|home| birth::prepare(home, self.own_processes));
        let born = born.transpose();
        let (birth, newborn) = born.map_err(fail("preparing the fences"))?.unzip();
        let (mut steps, step_writer) = io::pipe().map_err(fail("preparing the fences"))?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.working_dir)
            .stdin(self.input.take().map_or_else(Stdio::null, Stdio::from));
        match &self.output {
            Some(file) => {
                let copy = || file.try_clone().map_err(fail("handing over the output"));
                command.stdout(copy()?).stderr(copy()?);
            }
            None => {
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        if let Some(file) = self.errors.take() {
            command.stderr(file);
        }
        let leaves = self.processes_of.is_some();
        let hook = move || {
            let inside = birth.as_ref().map_or(Ok(false), Birth::goes_on_inside);
            let inside = inside.map_err(|error| (Step::Namespaces, error));
            let applied = inside.and_then(|inside| plan.apply(inside));
            let left = applied.and_then(|()| match leaves {
                true => leave_parent(&step_writer),
                false => Ok(()),
            });
            left.map_err(|(step, error)| {
                // One byte says which step; without it the message is only less exact.
                let _ = rustix::io::write(&step_writer, &[step as u8]);
                error.into()
            })
        };
        // SAFETY: `Plan::apply` makes system calls on data that was prepared before the fork. It allocates nothing, takes
        // no lock and touches no thread-local state but errno, so it may run between fork and exec of a threaded program.
        unsafe { command.pre_exec(hook) };
        let child = match &self.processes_of {
            Some(namespace) => spawn_among(&mut command, namespace),
            None if self.own_processes && newborn.is_none() => {
                spawn_first_of_its_namespace(&mut command)
            }
            None => command.spawn(),
        };
        // The writers' copies in the hook go, so that reading ends.
        drop(command);
        let newborn = newborn.and_then(|newborn| newborn.number().transpose());
        let child = child.map_err(|source| {
            if let Some(Ok(number)) = newborn {
                birth::bury(number);
            }
            let mut byte = [0];
            let step = match steps.read(&mut byte) {
                Ok(1) => STEPS
                    .iter()
                    .find(|(step, _)| *step as u8 == byte[0])
                    .map_or("loading the program", |(_, words)| words),
                _ => "loading the program",
            };
            fail(step)(source)
        })?;
        if leaves {
            let mut child = child;
            // Gone by now: it has only left its own child behind, which has said its number.
            let left = child.wait().and_then(|_| {
                let mut number = String::new();
                steps.take(32).read_to_string(&mut number)?;
                ProcessHandle::of_child(number.parse().map_err(io::Error::other)?)
            });
            let process = left.map_err(fail("watching the process"))?;
            return Ok(Launched { process, fences });
        }
        if let Some(number) = newborn {
            let mut child = child;
            // Gone by now, as above. Where the new process is not known, whoever removes its cgroup ends it; where it is known
            // and cannot be watched, it must not be left.
            let process = child.wait().and(number).and_then(|number| {
                ProcessHandle::of_child(number).inspect_err(|_| birth::end_and_bury(number))
            });
            let process = process.map_err(fail("watching the process"))?;
            return Ok(Launched { process, fences });
        }
        let process = ProcessHandle::of_child(child.id()).map_err(|source| {
            let mut child = child;
            // It cannot be watched, so it must not be left.
            let _ = child.kill();
            let _ = child.wait();
            fail("watching the process")(source)
        })?;
        Ok(Launched { process, fences })
    }
}

impl Launch {
    /// The cgroup in which the process can be made, so that it need not be moved there.
    fn born_in(&self) -> Option<&Path> {
        // One that becomes another's child makes a process itself.
        let leaves = self.processes_of.is_some();
        self.cgroup.as_ref().filter(|_| !leaves)?.home()
    }
}

/// Starts a program as the first process of a process namespace. A namespace is that of a thread's children, hence the
/// thread; the child is this process's all the same.
fn spawn_first_of_its_namespace(command: &mut Command) -> io::Result<Child> {
    let in_thread = || {
        // SAFETY: CLONE_NEWPID changes only of which namespace this thread's next children are, and the thread ends here.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    std::thread::scope(|scope| scope.spawn(in_thread).join())
        .unwrap_or_else(|_| Err(io::Error::other("the launching thread panicked")))
}

/// Starts a program in another process namespace, whose first process becomes its parent ([`leave_parent`]).
fn spawn_among(command: &mut Command, namespace: &File) -> io::Result<Child> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    let in_thread = || {
        // Only of which namespace this thread's next children are, and the thread ends here.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        command.spawn()
    };
    std::thread::scope(|scope| scope.spawn(in_thread).join())
        .unwrap_or_else(|_| Err(io::Error::other("the launching thread panicked")))
}

/// Goes on as a child of ours, and ends us: a process whose parent of the same namespace has gone is given to that namespace's
/// first process. The child writes its number, as `/proc` has it, to `number`. System calls only, as for [`Plan::apply`].
fn leave_parent(number: &impl AsFd) -> Result<(), (Step, rustix::io::Errno)> {
    const NONE: libc::c_long = 0;
    let signal = libc::c_long::from(libc::SIGCHLD);
    // SAFETY: without flags this is a fork, by the kernel alone: no handler runs and no lock is taken. The child makes system
    // calls only until it execs, as this process would have; the parent ends without running anything more.
    match unsafe { libc::syscall(libc::SYS_clone, signal, NONE, NONE, NONE, NONE) } {
        -1 => Err((Step::Leaving, errno())),
        0 => {
            let at = |error| (Step::Leaving, error);
            let mut text = [0; 32];
            let len = rustix::fs::readlinkat_raw(rustix::fs::CWD, c"/proc/self", &mut text[..])
                .map_err(at)?;
            rustix::io::write(number, &text[..len]).map_err(at)?;
            Ok(())
        }
        // SAFETY: ends this process, which is the only thread of its own.
        _ => unsafe { libc::_exit(0) },
    }
}

/// The steps between fork and exec that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session = 1,
    Cgroup,
    Limits,
    Namespaces,
    ReadOnly,
    Binds,
    Descriptors,
    Bounding,
    Identity,
    Capabilities,
    NoNewPrivileges,
    Leaving,
    Root,
}

const STEPS: [(Step, &str); 13] = [
    (Step::Session, "a session of its own"),
    (Step::Cgroup, "entering its cgroup"),
    (Step::Limits, "resource limits"),
    (Step::Namespaces, "namespaces of its own"),
    (Step::ReadOnly, "making a directory read-only"),
    (Step::Binds, "showing files at their places"),
    (Step::Descriptors, "handing over descriptors"),
    (Step::Bounding, "limiting capabilities"),
    (Step::Identity, "changing user and group"),
    (Step::Capabilities, "dropping capabilities"),
    (Step::NoNewPrivileges, "refusing new privileges"),
    (Step::Leaving, "becoming another process's child"),
    (Step::Root, "entering its root directory"),
];

/// What the child does between fork and exec.
struct Plan {
    cgroup_files: Vec<File>,
    oom_text: String,
    rlimits: Vec<(Resource, u64)>,
    namespaces: Option<UnshareFlags>,
    root: Option<Arc<Root>>,
    read_only: Vec<CString>,
    binds: Vec<Bind>,
    proc_at: Option<CString>,
    inherit: Vec<i32>,
    bounding_last: Option<u32>,
    uid_gid: Option<(Uid, Gid)>,
    groups: Vec<Gid>,
    drop_capabilities: bool,
}

impl Plan {
    /// Opens and formats all that [`Plan::apply`] needs, and says in words what will hold.
    fn prepare(launch: &Launch, binds: Vec<Bind>) -> io::Result<(Plan, Vec<String>)> {
        let capabilities = facts::effective_capabilities();
        let capable = |bit: u32| capabilities >> bit & 1 == 1;
        let mut fences = vec![
            "no inherited descriptors".to_owned(),
            "no new privileges".to_owned(),
        ];
        let mut cgroup_files = Vec::new();
        if let Some(cgroup) = &launch.cgroup {
            for dir in cgroup.dirs() {
                cgroup_files.push(cgroup::entrance(dir)?);
            }
            fences.extend(cgroup.holds().iter().map(|hold| format!("cgroup: {hold}")));
        }
        let drop_capabilities = !launch.keep_capabilities;
        if drop_capabilities {
            fences.push("no capabilities".to_owned());
        }
        if let Some((uid, gid)) = launch.uid_gid {
            fences.push(format!("user {uid}, group {gid}"));
        }
        let mut wanted = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNS;
        if launch.own_network {
            wanted |= UnshareFlags::NEWNET;
        }
        let namespaces = facts::may_make_namespaces().then_some(wanted);
        let mounts = !launch.read_only.is_empty() || !binds.is_empty() || launch.proc_at.is_some();
        if namespaces.is_some() {
            fences.push("own ipc, uts and mount namespaces".to_owned());
        } else if mounts
            || launch.own_network
            || launch.own_processes
            || launch.processes_of.is_some()
            || launch.root.is_some()
        {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "other mounts, processes or networks can be shown only with the right to mount",
            ));
        }
        if launch.own_processes {
            fences.push("own process namespace".to_owned());
        }
        if launch.processes_of.is_some() {
            fences.push("another's process namespace".to_owned());
        }
        if launch.own_network {
            fences.push("own network namespace".to_owned());
        }
        if launch.root.is_some() {
            fences.push("own root directory".to_owned());
        }
        let mut read_only = Vec::new();
        for dir in &launch.read_only {
            read_only.push(CString::new(dir.as_os_str().as_bytes())?);
            fences.push(format!("read-only: {}", dir.display()));
        }
        let bounding_last = if drop_capabilities && capable(CAP_SETPCAP) {
            let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
            Some(last.trim().parse().map_err(io::Error::other)?)
        } else {
            None
        };
        let plan = Plan {
            cgroup_files,
            oom_text: launch.oom_score_adj.to_string(),
            rlimits: launch
                .rlimits
                .iter()
                .map(|(limit, value)| {
                    // What is limited more tightly already stays so: it may not be raised without privilege.
                    let already = rustix::process::getrlimit(limit.resource()).maximum;
                    (
                        limit.resource(),
                        already.map_or(*value, |hard| hard.min(*value)),
                    )
                })
                .collect(),
            namespaces,
            root: launch.root.clone(),
            read_only,
            binds,
            proc_at: match &launch.proc_at {
                Some(dir) => Some(CString::new(dir.as_os_str().as_bytes())?),
                None => None,
            },
            inherit: launch.inherit.iter().map(AsRawFd::as_raw_fd).collect(),
            bounding_last,
            uid_gid: launch
                .uid_gid
                .map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid))),
            groups: launch
                .groups
                .iter()
                .map(|gid| Gid::from_raw(*gid))
                .collect(),
            drop_capabilities,
        };
        Ok((plan, fences))
    }

    /// Runs in the child. System calls only: see the safety comment at its caller.
    fn apply(&self, in_its_cgroup: bool) -> Result<(), (Step, rustix::io::Errno)> {
        let at = |step: Step| move |error: rustix::io::Errno| (step, error);
        setsid().map_err(at(Step::Session))?;
        let to_enter = if in_its_cgroup {
            &[]
        } else {
            self.cgroup_files.as_slice()
        };
        for file in to_enter {
            rustix::io::write(file, b"0").map_err(at(Step::Cgroup))?;
        }
        self.set_oom_score();
        umask(Mode::RWXG | Mode::RWXO);
        for (resource, value) in &self.rlimits {
            let limit = RawLimit {
                current: Some(*value),
                maximum: Some(*value),
            };
            setrlimit(*resource, limit).map_err(at(Step::Limits))?;
        }
        if let Some(flags) = self.namespaces {
            self.enter_namespaces(flags)?;
        }
        self.keep_only_named_descriptors()
            .map_err(at(Step::Descriptors))?;
        if let Some(last) = self.bounding_last {
            for bit in 0..=last {
                // SAFETY: PR_CAPBSET_DROP takes one number and changes this thread's bounding set only.
                if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, bit, 0, 0, 0) } != 0 {
                    return Err((Step::Bounding, errno()));
                }
            }
        }
        if let Some((uid, gid)) = self.uid_gid {
            self.become_user(uid, gid).map_err(at(Step::Identity))?;
        }
        if self.drop_capabilities {
            rustix::thread::clear_ambient_capability_set().map_err(at(Step::Capabilities))?;
            let none = rustix::thread::CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            };
            rustix::thread::set_capabilities(None, none).map_err(at(Step::Capabilities))?;
        }
        set_no_new_privs(true).map_err(at(Step::NoNewPrivileges))
    }

    /// Not a fence but a wish: a host that refuses it still runs the program.
    fn set_oom_score(&self) {
        use rustix::fs::{OFlags, open};
        if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty()) {
            let _ = rustix::io::write(file.as_fd(), self.oom_text.as_bytes());
        }
    }

    fn enter_namespaces(&self, flags: UnshareFlags) -> Result<(), (Step, rustix::io::Errno)> {
        use rustix::mount::{MountPropagationFlags, mount_change};
        let at = |step: Step| move |error: rustix::io::Errno| (step, error);
        if let Some(root) = &self.root {
            // Its mounts are copied below instead of the host's.
            let kind = Some(rustix::thread::LinkNameSpaceType::Mount);
            rustix::thread::move_into_link_name_space(root.namespace().as_fd(), kind)
                .map_err(at(Step::Root))?;
        }
        // SAFETY: `unshare` without CLONE_FILES changes no descriptor table, which is what would need care.
        unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(at(Step::Namespaces))?;
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        mount_change(c"/", private).map_err(at(Step::Namespaces))?;
        for dir in &self.read_only {
            mounts::make_read_only(dir, mounts::set_read_only_below).map_err(at(Step::ReadOnly))?;
        }
        for bind in &self.binds {
            bind.attach().map_err(at(Step::Binds))?;
        }
        if let Some(dir) = &self.proc_at {
            mounts::own_processes(dir).map_err(at(Step::Binds))?;
        }
        Ok(())
    }

    fn keep_only_named_descriptors(&self) -> rustix::io::Result<()> {
        close_descriptors_on_exec()?;
        for fd in &self.inherit {
            // SAFETY: the descriptor is owned by the `Launch` that the parent holds while it waits for us.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    }

    fn become_user(&self, uid: Uid, gid: Gid) -> rustix::io::Result<()> {
        // These are the calls for one thread (glibc's would change all threads, by signals): after a fork there is but one.
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)
    }
}

impl Rlimit {
    fn resource(self) -> Resource {
        match self {
            Rlimit::Core => Resource::Core,
            Rlimit::Descriptors => Resource::Nofile,
            Rlimit::FileSize => Resource::Fsize,
            Rlimit::AddressSpace => Resource::As,
        }
    }
}

/// The last system call's error. Allocates nothing.
pub(crate) fn errno() -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)
}

/// Marks every descriptor but the standard three to be closed by the next exec, in this process or a child of it: what a
/// caller left open (a pipe of its shell, a lock) is no business of a program that outlives it.
///
/// # Errors
/// Where the kernel is older than 5.11.
pub fn close_descriptors_on_exec() -> rustix::io::Result<()> {
    // SAFETY: CLOSE_RANGE_CLOEXEC closes nothing now; it only marks descriptors to be closed by exec.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked == 0 { Ok(()) } else { Err(errno()) }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
