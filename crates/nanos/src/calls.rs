//! Which system calls a program makes: the kernel's module `strace` tells of those that it is asked for.
//!
//! It prints by the console, among what the program prints, whole lines' ends such as
//!
//! ```text
//! [2] socket() = 3
//! [worker] connect() = -ENOENT
//! [2] exit_group( <unfinished ...>
//! ```
//!
//! with the thread's name or number in brackets. [`Told`] takes them out of the stream again. A program that prints such
//! lines itself has them taken for the module's. Where nothing is told, calls cost next to nothing; the module itself costs
//! the machine about a tenth of a second when it starts under emulation, most of it for the kernel's symbols.

use crate::manifest::{KlibsFrom, Manifest};
use crate::remaster::BootFiles;
use crate::tfs::Value;

/// The module's name among a kernel's modules.
pub const MODULE: &str = "strace";

/// Most bytes of a thread's name, as on Linux.
const NAME_MAX: usize = 15;
/// Most bytes of a line that is looked at; what is longer is the program's. The longest of the module's are those of
/// `clone3`, with about 250.
const LINE_MAX: usize = 1024;
const UNFINISHED: &str = " <unfinished ...>";

/// What is told of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// What it gave, as the module prints it (`3`, `-ENOENT`, `-113`); none where it has not come back yet.
    pub result: Option<String>,
}

/// Asks the kernel to tell of these calls, and gives what the boot file system must have for it. `module` is the module's
/// file, `kernel` the kernel's.
pub fn tell(
    manifest: &mut Manifest,
    calls: &[&str],
    kernel: Vec<u8>,
    module: Vec<u8>,
) -> BootFiles {
    manifest.klibs = Some(KlibsFrom::Boot);
    let calls = calls.iter().map(Value::text).collect();
    manifest
        .further
        .push((b"tracelist".to_vec(), Value::Vector(calls)));
    manifest
        .further
        .push((b"debugsyscalls".to_vec(), Value::text("t")));
    BootFiles {
        kernel,
        klibs: vec![(MODULE.as_bytes().to_vec(), module)],
    }
}

/// Takes what the module tells out of what a program prints.
#[derive(Debug)]
pub struct Told<'a> {
    calls: &'a [&'a str],
    /// The beginning of a line of which the end has not come.
    line: Vec<u8>,
}

impl<'a> Told<'a> {
    /// For these calls.
    pub fn new(calls: &'a [&'a str]) -> Told<'a> {
        Told {
            calls,
            line: Vec::new(),
        }
    }

    /// Takes more of the stream in. The program's own bytes go to `program`, at the latest when their line ends; what was
    /// told is given.
    pub fn push(&mut self, bytes: &[u8], program: &mut Vec<u8>) -> Vec<Call> {
        let mut told = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.last() != Some(&b'\n') {
                continue;
            }
            match self.call() {
                Some((begin, call)) => {
                    program.extend_from_slice(&self.line[..begin]);
                    told.push(call);
                }
                None => program.extend_from_slice(&self.line),
            }
            self.line.clear();
        }
        told
    }

    /// Bytes of a line that are held back, since its end has not come.
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// Nothing more will come: what is left is the program's.
    pub fn finish(&mut self, program: &mut Vec<u8>) {
        program.append(&mut self.line);
    }

    /// What this line's end tells, and where that begins.
    fn call(&self) -> Option<(usize, Call)> {
        let from = self.line.len().saturating_sub(LINE_MAX);
        let line = &self.line[from..];
        // The module ends the line, so that the last bracket that fits is its own.
        (0..line.len())
            .rev()
            .filter(|at| line[*at] == b'[')
            .find_map(|at| Some((from + at, self.parse(&line[at..])?)))
    }

    fn parse(&self, text: &[u8]) -> Option<Call> {
        let text = std::str::from_utf8(text).ok()?;
        let text = text.strip_prefix('[')?.strip_suffix('\n')?;
        let (thread, rest) = text.split_once("] ")?;
        if thread.is_empty() || thread.len() > NAME_MAX {
            return None;
        }
        if let Some(rest) = rest.strip_prefix("<... ") {
            let (name, rest) = rest.split_once(" resumed>")?;
            return self.named(name, rest.strip_prefix(") = ")?);
        }
        let (name, rest) = rest.split_once('(')?;
        if let Some(arguments) = rest.strip_suffix(UNFINISHED) {
            let known = self.calls.contains(&name) && !arguments.contains(") = ");
            return known.then(|| Call {
                name: name.to_owned(),
                result: None,
            });
        }
        let (_, result) = rest.rsplit_once(") = ")?;
        self.named(name, result)
    }

    fn named(&self, name: &str, result: &str) -> Option<Call> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'?');
        let fits = self.calls.contains(&name) && !result.is_empty() && result.bytes().all(plain);
        fits.then(|| Call {
            name: name.to_owned(),
            result: Some(result.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CALLS: &[&str] = &["fork", "socket", "connect", "clone3", "exit_group"];

    fn told(pieces: &[&str]) -> (String, Vec<String>) {
        let (mut told, mut program, mut calls) = (Told::new(CALLS), Vec::new(), Vec::new());
        for piece in pieces {
            calls.extend(told.push(piece.as_bytes(), &mut program));
        }
        told.finish(&mut program);
        let calls = calls
            .into_iter()
            .map(|call| format!("{} {}", call.name, call.result.as_deref().unwrap_or("…")));
        (String::from_utf8(program).unwrap(), calls.collect())
    }

    #[test]
    fn calls_are_taken_out_wherever_a_programs_line_stood() {
        let (program, calls) = told(&[
            "begin [2] socket() = 3\n[2] connect() = -ENOENT\nmore\n[a b] fork() = -ENOSYS\n",
            "[2] clone3({pidfd=0x0, stack=0x0, stack_size=0, tls=0x0}, 88) = -EINVAL\n",
            "[9] connect( <unfinished ...>\n[9] <... connect resumed>) = -113\nend\n[2] exit_group( <unfinished ...>\n",
        ]);
        assert_eq!(program, "begin more\nend\n");
        let wanted = [
            "socket 3",
            "connect -ENOENT",
            "fork -ENOSYS",
            "clone3 -EINVAL",
            "connect …",
            "connect -113",
            "exit_group …",
        ];
        assert_eq!(calls, wanted);
    }

    #[test]
    fn what_only_looks_alike_is_the_programs() {
        for text in [
            "[2] open() = 3\n",
            "[2] fork() = 3",
            "[] fork() = 3\n",
            "[a name that is too long] fork() = 3\n",
            "fork() = 3\n",
            "[2] fork() = 3 and more\n",
            "[2]fork() = 3\n",
        ] {
            assert_eq!(told(&[text]), (text.to_owned(), vec![]), "{text}");
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter_and_what_is_not_told_is_kept(
            parts in proptest::collection::vec("([a-z\\[\\]() =\n]{0,6}|\\[2\\] fork\\(\\) = -ENOSYS\n)", 0..20),
            cut in 0usize..200,
        ) {
            let text = parts.concat();
            let cut = cut.min(text.len());
            let whole = told(&[&text]);
            prop_assert_eq!(&whole, &told(&[&text[..cut], &text[cut..]]));
            prop_assert!(whole.0.len() <= text.len());
            prop_assert!(!whole.1.is_empty() || whole.0 == text);
        }
    }
}
