//! The names that speak for the making of processes, and what follows from what was seen of a program and its libraries.

use super::elf::Summary;
use vistara_model::{Confidence, Evidence, Linkage, MayCreate, ProcessFacts};

/// Evidence that is kept of one program: enough to convince, little enough to be printed.
const EVIDENCE_MAX: usize = 24;

/// What a symbol is a sign of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Group {
    /// Makes a process.
    Fork,
    /// Becomes another program.
    Exec,
    /// Runs a command through the shell.
    Command,
    /// Loads code that cannot be seen here.
    Load,
    /// Any system call by its number.
    Raw,
    /// Of the whole Linux system.
    System,
}

const FORK: &[&str] = &[
    "fork",
    "vfork",
    "_Fork",
    "clone",
    "posix_spawn",
    "posix_spawnp",
    "pidfd_spawn",
    "pidfd_spawnp",
    "forkpty",
    "daemon",
];
const EXEC: &[&str] = &[
    "execl", "execle", "execlp", "execv", "execve", "execveat", "execvp", "execvpe", "fexecve",
];
/// As a static libc calls them inside, which is what is left where a program is linked with `--gc-sections`.
const FORK_STATIC: &[&str] = &["__libc_fork", "__posix_spawn", "__spawni"];
const EXEC_STATIC: &[&str] = &["__execve"];
const COMMAND: &[&str] = &["system", "popen", "wordexp"];
const LOAD: &[&str] = &["dlopen", "dlmopen"];
const RAW: &[&str] = &["syscall"];
const SYSTEM: &[&str] = &[
    "mount",
    "umount",
    "umount2",
    "unshare",
    "setns",
    "pivot_root",
    "chroot",
    "ptrace",
    "init_module",
    "finit_module",
    "reboot",
    "swapon",
    "shmget",
    "semget",
    "msgget",
    "mq_open",
];

/// The group of a symbol, for imports (`dynamic`) or for what a static program defines.
pub(super) fn known(name: &[u8], dynamic: bool) -> Option<(Group, &'static str)> {
    let of = |group: Group, list: &'static [&'static str]| {
        list.iter()
            .find(|known| known.as_bytes() == name)
            .map(|known| (group, *known))
    };
    if let Some(found) = of(Group::Fork, FORK).or_else(|| of(Group::Exec, EXEC))
        // Every static program with threads defines it.
        && (dynamic || found.1 != "clone")
    {
        return Some(found);
    }
    if dynamic {
        // A static libc brings `dlopen` and `syscall` along for its own use, and the calls of a whole system as members
        // that nothing of the program's need have asked for.
        of(Group::Command, COMMAND)
            .or_else(|| of(Group::Load, LOAD))
            .or_else(|| of(Group::Raw, RAW))
            .or_else(|| of(Group::System, SYSTEM))
    } else {
        of(Group::Fork, FORK_STATIC)
            .or_else(|| of(Group::Exec, EXEC_STATIC))
            .or_else(|| of(Group::Command, COMMAND))
    }
}

/// The C library and its parts, and the compilers' own: they have `fork` for others, and what they use it for themselves
/// (`system`, `popen`, `wordexp`) is seen where it is called from.
pub(super) fn is_base_library(name: &str) -> bool {
    const BASE: &[&str] = &[
        "libc.so.",
        "libm.so.",
        "libpthread.so.",
        "libdl.so.",
        "librt.so.",
        "libutil.so.",
        "libresolv.so.",
        "libnsl.so.",
        "libanl.so.",
        "libcrypt.so.",
        "libgcc_s.so.",
        "libstdc++.so.",
        "libatomic.so.",
        "ld-linux",
        "ld-musl",
        "libc.musl",
    ];
    BASE.iter().any(|base| name.starts_with(base))
}

/// One file that a program consists of.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) name: &'a str,
    pub(super) path: &'a str,
    pub(super) summary: &'a Summary,
}

fn of_group(part: &Part<'_>, group: Group) -> impl Iterator<Item = Evidence> {
    part.summary
        .symbols
        .iter()
        .filter(move |(of, _)| *of == group)
        .map(|(_, name)| Evidence {
            what: (*name).to_owned(),
            file: part.path.to_owned(),
        })
}

/// Calls for services of a whole system, by the program itself.
pub(super) fn whole_system(program: &Part<'_>) -> Vec<Evidence> {
    of_group(program, Group::System).collect()
}

/// Judges whether a program may create processes.
pub(super) fn processes(
    program: &Part<'_>,
    libraries: &[Part<'_>],
    missing: &[String],
) -> ProcessFacts {
    let summary = program.summary;
    let at = |what: String| Evidence {
        what,
        file: program.path.to_owned(),
    };
    if let Some(doubt) = unseen(summary) {
        return ProcessFacts {
            may_create: MayCreate::Yes,
            confidence: Confidence::Guess,
            doubt: Some(doubt.to_owned()),
            evidence: Vec::new(),
        };
    }
    let mut own: Vec<Evidence> = of_group(program, Group::Fork)
        .chain(of_group(program, Group::Exec))
        .collect();
    let linked = !own.is_empty();
    if let Some(starts) = summary.go.and_then(|go| go.starts) {
        own.push(at(starts.to_owned()));
    }
    own.extend(summary.code.iter().map(|hit| at(hit.describe().to_owned())));
    let commands: Vec<Evidence> = of_group(program, Group::Command).collect();
    // A library that only becomes another program (libselinux has such a helper) does that when the program wants to end;
    // it makes no process behind its back.
    let others: Vec<Evidence> = libraries
        .iter()
        .filter(|part| !is_base_library(part.name))
        .flat_map(|part| of_group(part, Group::Fork).chain(of_group(part, Group::Command)))
        .collect();
    let (may_create, confidence, doubt) = if !own.is_empty() {
        let confidence = if linked || summary.go.is_some_and(|go| go.starts.is_some()) {
            Confidence::Certain
        } else {
            Confidence::Likely
        };
        (MayCreate::Yes, confidence, None)
    } else if !commands.is_empty() {
        (MayCreate::OnDemand, Confidence::Certain, None)
    } else if !others.is_empty() {
        (MayCreate::InLibraries, Confidence::Likely, None)
    } else {
        let (confidence, doubt) = nothing_found(program, libraries, missing);
        (MayCreate::No, confidence, doubt)
    };
    let mut evidence = own;
    evidence.extend(commands);
    evidence.extend(others);
    evidence.truncate(EVIDENCE_MAX);
    ProcessFacts {
        may_create,
        confidence,
        doubt: doubt.map(str::to_owned),
        evidence,
    }
}

/// Why a program cannot be looked into.
fn unseen(summary: &Summary) -> Option<&'static str> {
    if !summary.wide {
        Some("it is a 32-bit program, which is not looked into")
    } else if summary.packed {
        Some("it is packed, so that its code cannot be seen")
    } else if summary.linkage == Linkage::Dynamic && !summary.has_symbols {
        Some("its table of symbols cannot be read")
    } else if summary.go.is_some_and(|go| !go.has_table) {
        Some("its table of Go functions cannot be found")
    } else {
        None
    }
}

/// How far to trust that nothing was found.
fn nothing_found(
    program: &Part<'_>,
    libraries: &[Part<'_>],
    missing: &[String],
) -> (Confidence, Option<&'static str>) {
    let summary = program.summary;
    let has = |part: &Part<'_>, group| of_group(part, group).next().is_some();
    let mut parts = libraries
        .iter()
        .filter(|part| !is_base_library(part.name))
        .chain([program]);
    if !missing.is_empty() {
        return (
            Confidence::Guess,
            Some("not all of its libraries are there"),
        );
    }
    if libraries.iter().any(|part| !part.summary.has_symbols) {
        return (
            Confidence::Guess,
            Some("a library's table of symbols cannot be read"),
        );
    }
    match summary.linkage {
        Linkage::Dynamic if parts.any(|part| has(part, Group::Load) || has(part, Group::Raw)) => (
            Confidence::Likely,
            Some("it can load further code, or make system calls by number, which cannot be seen"),
        ),
        Linkage::Dynamic
            if libraries
                .iter()
                .any(|part| !is_base_library(part.name) && has(part, Group::Exec)) =>
        {
            (
                Confidence::Likely,
                Some("a library has what becomes another program when it is told to"),
            )
        }
        Linkage::Dynamic => (Confidence::Certain, None),
        Linkage::Static | Linkage::StaticPie if summary.go.is_some() => (Confidence::Certain, None),
        Linkage::Static | Linkage::StaticPie if summary.has_symbols || summary.scanned => (
            Confidence::Likely,
            Some("a static program is known only by what is left of its symbols and its code"),
        ),
        Linkage::Static | Linkage::StaticPie => (
            Confidence::Guess,
            Some("it is static and without symbols, and its code cannot be scanned"),
        ),
    }
}
