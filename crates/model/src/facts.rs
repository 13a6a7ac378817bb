//! What is known of a program in an image: what it is, what it needs, and whether it may create processes.
//!
//! Facts are gathered by `vistara-image` and judged by `vistara-control`; here are only their words. A fact says where it
//! was seen and how sure it is, and never what follows from it.

use crate::{Architecture, Bytes};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How much a statement is to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// Something that would tell is missing or cannot be read.
    Guess,
    /// True unless the program does something uncommon.
    Likely,
    /// It follows from how programs are linked.
    Certain,
}

impl fmt::Display for Confidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Confidence::Guess => "guess",
            Confidence::Likely => "likely",
            Confidence::Certain => "certain",
        })
    }
}

/// What the first word of a command line turned out to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ProgramKind {
    /// One executable in the ELF format.
    Elf,
    /// A text whose first line names what interprets it. The other facts are then the interpreter's.
    Script {
        /// The words of the first line that are executed, such as `/usr/bin/env`, `python3`.
        words: Vec<String>,
    },
    /// There is nothing of that name in the image.
    Missing,
    /// It is there and cannot be executed, or not be understood; the text says why.
    Other {
        /// Why, as the end of a sentence that begins with the program's name.
        why: String,
    },
}

/// How an executable finds the code that it does not have itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Linkage {
    /// It has all, at fixed addresses.
    Static,
    /// It has all, and runs at any address.
    StaticPie,
    /// It names an interpreter, which loads its libraries.
    Dynamic,
}

impl fmt::Display for Linkage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Linkage::Static => "static",
            Linkage::StaticPie => "static-pie",
            Linkage::Dynamic => "dynamic",
        })
    }
}

/// A language or its runtime, known by marks in the executable or its libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// Compiled from Go.
    Go,
    /// Compiled from Rust.
    Rust,
    /// The Python interpreter.
    Python,
    /// Node.js.
    Node,
    /// A Java virtual machine.
    Jvm,
    /// The Perl interpreter.
    Perl,
    /// The Ruby interpreter.
    Ruby,
    /// The Lua interpreter.
    Lua,
    /// The PHP interpreter.
    Php,
    /// A shell.
    Shell,
    /// Many programs in one, a shell among them.
    Busybox,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Runtime::Go => "Go",
            Runtime::Rust => "Rust",
            Runtime::Python => "Python",
            Runtime::Node => "Node.js",
            Runtime::Jvm => "Java",
            Runtime::Perl => "Perl",
            Runtime::Ruby => "Ruby",
            Runtime::Lua => "Lua",
            Runtime::Php => "PHP",
            Runtime::Shell => "a shell",
            Runtime::Busybox => "busybox",
        })
    }
}

/// Something that was seen, and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Evidence {
    /// What: a symbol such as `fork`, or words such as `system call 59 (execve)`.
    pub what: String,
    /// The path of the file in the image.
    pub file: String,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.what, self.file)
    }
}

/// Whether a program may create processes. *May*: a program that can fork need not ever do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MayCreate {
    /// Nothing for it was found in the program or its libraries.
    No,
    /// The program itself has none of it, but a library that it loads has.
    InLibraries,
    /// Only `system` or `popen` in the program itself: it runs the commands that it is told to, and none otherwise.
    OnDemand,
    /// The program itself forks or executes others somewhere.
    Yes,
}

/// What is known about a program's making of processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// The statement.
    pub may_create: MayCreate,
    /// How far to trust it.
    pub confidence: Confidence,
    /// Why the confidence is not higher, where it is not; the end of a sentence.
    pub doubt: Option<String>,
    /// What speaks for it; the strongest first, at most a few dozen.
    pub evidence: Vec<Evidence>,
}

/// A shared library that a program loads when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// As it is asked for, such as `libc.so.6`.
    pub name: String,
    /// The path in the image where the loader finds it; may be, or lead through, a symbolic link.
    pub path: String,
    /// Its length.
    pub size: Bytes,
}

/// What is known of one program of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramFacts {
    /// The path at which it was found; the first word of the command line where it was not.
    pub path: String,
    /// The file behind that path, links followed; empty where there is none. Corrections are kept under it.
    pub file: String,
    /// What it is.
    #[serde(flatten)]
    pub kind: ProgramKind,
    /// The executable that the other facts speak of: the program itself, or a script's interpreter. Empty where none.
    pub executable: String,
    /// The processor that it is made for.
    pub architecture: Option<Architecture>,
    /// How it is linked.
    pub linkage: Option<Linkage>,
    /// The loader that it names.
    pub loader: Option<String>,
    /// All libraries that it loads when it starts, those of its libraries included.
    pub libraries: Vec<Library>,
    /// Libraries, or the loader, that the image does not have.
    pub missing: Vec<String>,
    /// Marks of languages.
    pub runtimes: Vec<Runtime>,
    /// Whether it may create processes.
    pub processes: ProcessFacts,
    /// Calls of the program itself for services that only a whole Linux system gives: mounts, namespaces, tracing, System V
    /// shared memory, ….
    pub whole_system: Vec<Evidence>,
    /// Program, loader and libraries together.
    pub size: Bytes,
}

/// A correction from practice: a program that the facts took for self-contained was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    /// What was seen, as a sentence without its full stop.
    pub seen: String,
}

/// What is known of an image with regard to one of its programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// The program.
    pub program: ProgramFacts,
    /// A correction from practice, which outweighs [`ProgramFacts::processes`].
    pub correction: Option<Correction>,
    /// Files, directories and links of the whole image.
    pub entries: u64,
    /// Bytes of all its files.
    pub size: Bytes,
}
