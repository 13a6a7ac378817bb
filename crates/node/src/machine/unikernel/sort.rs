//! Tells what a unikernel's program prints from what its kernel prints: both come by one serial line.
//!
//! The kernel's lines begin with a time in brackets, `[12.345678] `; when a signal ends the program, the kernel prints the
//! state of the machine until the end, from a line that begins with `*** signal `. A program that prints such lines itself
//! has them taken for the kernel's: nothing is lost, they are told with the console.

/// Beginning of the kernel's account of a program that a signal has ended.
const SIGNAL_LINE: &[u8] = b"*** signal ";
/// Most bytes of a kernel's time, with its brackets and the blank: a machine that runs for years.
const TIME_MAX: usize = 32;
/// Digits after the point.
const MICROSECONDS: usize = 6;

/// Where a byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Too little of the line has come to tell.
    Unknown,
    Program,
    Kernel,
    /// From here to the end all is the kernel's.
    Rest,
}

/// What the beginning of a line says.
enum Verdict {
    Kernel,
    Rest,
    Program,
    More,
}

fn judge(begin: &[u8]) -> Verdict {
    if begin.starts_with(SIGNAL_LINE) {
        return Verdict::Rest;
    }
    if SIGNAL_LINE.starts_with(begin) {
        return Verdict::More;
    }
    let Some(rest) = begin.strip_prefix(b"[") else {
        return Verdict::Program;
    };
    let digits = |bytes: &[u8]| {
        bytes
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count()
    };
    let more = |complete: bool| match complete {
        true => Verdict::Program,
        false if begin.len() < TIME_MAX => Verdict::More,
        false => Verdict::Program,
    };
    let seconds = digits(rest);
    let Some(rest) = rest[seconds..].strip_prefix(b".") else {
        return more(seconds < rest.len());
    };
    if seconds == 0 {
        return Verdict::Program;
    }
    let micros = digits(rest);
    match rest.get(micros..) {
        Some([]) if micros <= MICROSECONDS => more(false),
        Some([b']', b' ', ..]) if micros == MICROSECONDS => Verdict::Kernel,
        Some([b']']) if micros == MICROSECONDS => more(false),
        _ => Verdict::Program,
    }
}

/// Sorts a stream.
#[derive(Debug)]
pub(super) struct Sorter {
    line: Line,
    begin: Vec<u8>,
}

/// A stretch of bytes, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sorted {
    pub(super) program: Vec<u8>,
    pub(super) kernel: Vec<u8>,
}

impl Default for Sorter {
    fn default() -> Sorter {
        Sorter {
            line: Line::Unknown,
            begin: Vec::new(),
        }
    }
}

impl Sorter {
    /// Takes more bytes in, and gives those that can be told.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Sorted {
        let mut sorted = Sorted::default();
        for &byte in bytes {
            match self.line {
                Line::Program => sorted.program.push(byte),
                Line::Kernel | Line::Rest => sorted.kernel.push(byte),
                Line::Unknown => {
                    self.begin.push(byte);
                    self.line = match judge(&self.begin) {
                        Verdict::More => continue,
                        Verdict::Program => Line::Program,
                        Verdict::Kernel => Line::Kernel,
                        Verdict::Rest => Line::Rest,
                    };
                    self.release(&mut sorted);
                }
            }
            if byte == b'\n' && self.line != Line::Rest {
                self.line = Line::Unknown;
            }
        }
        sorted
    }

    /// Gives what is held back because it might have become a kernel's line: nothing has come for a while, or will.
    pub(super) fn flush(&mut self) -> Sorted {
        let mut sorted = Sorted::default();
        if !self.begin.is_empty() {
            self.line = Line::Program;
            self.release(&mut sorted);
        }
        sorted
    }

    /// Whether something is held back.
    pub(super) fn holds(&self) -> bool {
        !self.begin.is_empty()
    }

    fn release(&mut self, sorted: &mut Sorted) {
        match self.line {
            Line::Kernel | Line::Rest => sorted.kernel.append(&mut self.begin),
            Line::Program | Line::Unknown => sorted.program.append(&mut self.begin),
        }
    }
}

/// The signal that ended the program, by the kernel's account of it.
pub(super) fn signal(kernel: &str) -> Option<u8> {
    let rest = kernel
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("*** signal "))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(pieces: &[&str]) -> (String, String) {
        let mut sorter = Sorter::default();
        let mut all = Sorted::default();
        let mut add = |part: Sorted| {
            all.program.extend(part.program);
            all.kernel.extend(part.kernel);
        };
        for piece in pieces {
            add(sorter.push(piece.as_bytes()));
        }
        add(sorter.flush());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(all.program), text(all.kernel))
    }

    #[test]
    fn lines_with_the_kernels_time_are_the_kernels() {
        let (program, kernel) = sorted(&[
            "[0.117770] NET: no network interface found\nhello\n",
            "[1.000001] en1: assigned 10.0.2.15\nmore [1.234567] inside\n",
        ]);
        assert_eq!(program, "hello\nmore [1.234567] inside\n");
        assert_eq!(
            kernel,
            "[0.117770] NET: no network interface found\n[1.000001] en1: assigned 10.0.2.15\n"
        );
    }

    #[test]
    fn what_only_looks_like_a_time_is_the_programs() {
        for text in [
            "[1.5] x\n",
            "[info] x\n",
            "[1.1234567] x\n",
            "[.123456] x\n",
            "[1.123456]x\n",
            "*** note\n",
            "[\n",
            "\n\n",
            "[12345678901234567890123456789012345.123456] x\n",
        ] {
            assert_eq!(sorted(&[text]), (text.to_owned(), String::new()), "{text}");
        }
    }

    #[test]
    fn after_a_signal_all_is_the_kernels() {
        let (program, kernel) = sorted(&[
            "dying\n\n*** signal 6 received by tid 2, errno 0, code -6\n\nrax: 0\n",
            "core dump\n",
        ]);
        assert_eq!(program, "dying\n\n");
        assert!(kernel.ends_with("core dump\n"));
        assert_eq!(signal(&kernel), Some(6));
        assert_eq!(signal("quiet\n"), None);
        assert_eq!(signal("*** signal 999 received"), None);
    }

    #[test]
    fn a_prompt_without_an_end_of_line_comes_at_once() {
        let mut sorter = Sorter::default();
        assert_eq!(sorter.push(b"name? ").program, b"name? ");
        assert!(!sorter.holds());
        let mut sorter = Sorter::default();
        assert_eq!(sorter.push(b"[1"), Sorted::default());
        assert!(sorter.holds());
        assert_eq!(sorter.flush().program, b"[1");
        assert_eq!(sorter.push(b".000000] x").program, b".000000] x");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_pieces_do_not_matter(
            text in "([a-z\\[\\]*. 0-9\n]|\\[1\\.000001\\] |\\*\\*\\* signal ){0,80}",
            cut in 0usize..200,
        ) {
            let cut = (0..=cut.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            let whole = sorted(&[&text]);
            let pieces = sorted(&[&text[..cut], &text[cut..]]);
            prop_assert_eq!(&whole, &pieces);
            prop_assert_eq!(whole.0.len() + whole.1.len(), text.len());
        }
    }
}
