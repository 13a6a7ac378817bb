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
//! with the thread's name or number in brackets. [`Told`] takes them out of the stream again. Only what has exactly the
//! module's form (Nanos 0.1.55) is taken out; what is nearly so stays the program's, and [`Told::is_unclear`] from then on. A
//! program that prints such lines exactly has them taken for the module's. Where nothing is told, calls cost next to nothing; the module itself costs
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
const RESUMED: &str = "<... ";
/// What the module tells of the arguments of `clone3`.
const CLONE3: &[&str] = &[
    "pidfd",
    "child_tid",
    "parent_tid",
    "exit_signal",
    "stack",
    "stack_size",
    "tls",
];

/// What is told of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// What it gave, as the module prints it (`3`, `-ENOENT`, `-113`); none where it has not come back yet.
    pub result: Option<String>,
    /// How many bytes the program had printed by then, as far as [`Told::push`]'s `program` has them.
    pub at: usize,
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
    unclear: bool,
}

/// What a line is.
enum Line {
    Program,
    /// It ends with what was told, which begins there.
    Told(usize, String, Option<String>),
    /// Nearly so.
    Unclear,
}

impl<'a> Told<'a> {
    /// For these calls.
    pub fn new(calls: &'a [&'a str]) -> Told<'a> {
        Told {
            calls,
            line: Vec::new(),
            unclear: false,
        }
    }

    /// Whether a line has come of which it cannot be told whose it is.
    pub fn is_unclear(&self) -> bool {
        self.unclear
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
            match self.whose() {
                Line::Told(begin, name, result) => {
                    program.extend_from_slice(&self.line[..begin]);
                    let at = program.len();
                    told.push(Call { name, result, at });
                }
                Line::Unclear => {
                    self.unclear = true;
                    program.extend_from_slice(&self.line);
                }
                Line::Program => program.extend_from_slice(&self.line),
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

    fn whose(&self) -> Line {
        let from = self.line.len().saturating_sub(LINE_MAX);
        let line = &self.line[from..];
        // The module ends the line, so that the last bracket that fits is its own.
        let Some((close, name)) = (0..line.len())
            .rev()
            .filter(|at| line[*at..].starts_with(b"] "))
            .find_map(|at| Some((at, self.named(&line[at + 2..])?)))
        else {
            return Line::Program;
        };
        let earliest = close.saturating_sub(NAME_MAX + 1);
        let open = line[earliest..close].iter().rposition(|b| *b == b'[');
        let begin = open.map(|open| earliest + open);
        let is_name = |thread: &[u8]| !thread.is_empty() && !thread.contains(&b']');
        match begin {
            Some(begin) if is_name(&line[begin + 1..close]) => match told(name, &line[close..]) {
                Some(result) => Line::Told(from + begin, name.to_owned(), result),
                None => Line::Unclear,
            },
            // A thread may have any name.
            Some(_) | None => Line::Unclear,
        }
    }

    /// The call that this begins to tell of.
    fn named(&self, text: &[u8]) -> Option<&'a str> {
        let resumed = text.strip_prefix(RESUMED.as_bytes());
        let end: &[u8] = match resumed {
            Some(_) => b" resumed>",
            None => b"(",
        };
        let text = resumed.unwrap_or(text);
        let is_it = |name: &&&str| {
            let rest = text.strip_prefix(name.as_bytes());
            rest.is_some_and(|rest| rest.starts_with(end))
        };
        self.calls.iter().find(is_it).copied()
    }
}

/// The result, where `text` has exactly the form that the module gives to this call from the thread's bracket on.
fn told(name: &str, text: &[u8]) -> Option<Option<String>> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.strip_prefix("] ")?.strip_suffix('\n')?;
    if let Some(rest) = text.strip_prefix(RESUMED) {
        let rest = rest.strip_prefix(name)?.strip_prefix(" resumed>")?;
        return Some(Some(result(rest.strip_prefix(") = ")?)?));
    }
    let rest = text.strip_prefix(name)?.strip_prefix('(')?;
    if let Some(given) = rest.strip_suffix(UNFINISHED) {
        return arguments(name, given).then_some(None);
    }
    let (given, rest) = rest.rsplit_once(") = ")?;
    match arguments(name, given) {
        true => Some(Some(result(rest)?)),
        false => None,
    }
}

/// Whether the module prints a call's arguments so.
fn arguments(name: &str, given: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let address = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    match name {
        "clone" => given.split(", ").count() == 5 && given.split(", ").all(address),
        "clone3" => {
            let Some((fields, size)) = given.rsplit_once(", ") else {
                return false;
            };
            let inner = fields.strip_prefix('{').and_then(|it| it.strip_suffix('}'));
            let fits = match inner {
                None => fields == "NULL" || address(fields),
                Some(inner) => {
                    let fields: Vec<_> = inner.split(", ").collect();
                    fields.len() == CLONE3.len()
                        && fields.iter().zip(CLONE3).all(|(field, name)| {
                            let value =
                                field.strip_prefix(name).and_then(|it| it.strip_prefix('='));
                            value.is_some_and(|value| address(value) || number(value))
                        })
                }
            };
            fits && number(size)
        }
        // The module has no words for its code yet.
        "exit_group" => given.is_empty() || number(given.strip_prefix('-').unwrap_or(given)),
        _ => given.is_empty(),
    }
}

/// A result as the module prints it.
fn result(text: &str) -> Option<String> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
    let fits = text == "?"
        || digits(text.strip_prefix('-').unwrap_or(text))
        || (text.strip_prefix("-E")).is_some_and(|it| !it.is_empty() && it.bytes().all(plain));
    fits.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CALLS: &[&str] = &["fork", "socket", "connect", "clone", "clone3", "exit_group"];

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
            "[2] clone3({pidfd=0x0, child_tid=0x0, parent_tid=0x0, exit_signal=17, stack=0x0, stack_size=0, tls=0x0}, 88) = -EINVAL\n",
            "[2] clone(0x1200011, 0x0, 0x0, 0x7f00a, 0x0) = -ENOSYS\n",
            "[9] connect( <unfinished ...>\n[9] <... connect resumed>) = -113\nend\n[2] exit_group( <unfinished ...>\n",
        ]);
        assert_eq!(program, "begin more\nend\n");
        let wanted = [
            "socket 3",
            "connect -ENOENT",
            "fork -ENOSYS",
            "clone3 -EINVAL",
            "clone -ENOSYS",
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
            "fork() = 3\n",
            "[2]fork() = 3\n",
        ] {
            assert_eq!(told(&[text]), (text.to_owned(), vec![]), "{text}");
        }
    }

    #[test]
    fn what_is_nearly_told_is_the_programs_and_unclear() {
        for text in [
            "[2] fork() = 3 and more\n",
            "[2] fork(1) = 3\n",
            "[2] fork() = 3)\n",
            "[2] fork() = -nothing\n",
            "[pid 1] clone(child_stack=NULL, flags=CLONE_CHILD_SETTID) = 7\n",
            "[pid 1] clone3({flags=CLONE_VM, child_tid=0x7f}, 88) = 7\n",
            "[a name that is too long] fork() = 3\n",
            "newline] fork() = 3\n",
            "[] fork() = 3\n",
            "[a]b] fork() = 3\n",
        ] {
            let (mut told, mut program) = (Told::new(CALLS), Vec::new());
            assert_eq!(told.push(text.as_bytes(), &mut program), vec![], "{text}");
            assert!(told.is_unclear(), "{text}");
            assert_eq!(program, text.as_bytes());
        }
        let (mut told, mut program) = (Told::new(CALLS), Vec::new());
        let calls = told.push(b"[\xff] fork() = -ENOSYS\nab\n", &mut program);
        assert_eq!((calls.len(), calls[0].at), (1, 0));
        assert!(!told.is_unclear());
    }

    #[test]
    fn where_a_call_came_is_told() {
        let (mut told, mut program) = (Told::new(CALLS), Vec::new());
        let calls = told.push(b"a[2] exit_group( <unfinished ...>\nmore\n", &mut program);
        assert_eq!(calls[0].at, 1);
        assert!(program.len() > calls[0].at);
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
