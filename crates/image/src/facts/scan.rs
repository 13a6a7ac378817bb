//! Looks for system calls that make processes in machine code, without a symbol to go by.
//!
//! No disassembly: from every `syscall` instruction the bytes before it are searched for one that loads the number. Code
//! that computes the number, or hands it to a function (Go's `syscall.Syscall`, libc's `syscall`), is not seen; bytes that
//! are no instructions may be taken for some. Hence never more than [`vistara_model::Confidence::Likely`].

use memchr::memmem;
use std::collections::BTreeSet;

/// Bytes before a `syscall` in which its number is looked for: compilers load it a few instructions before, among the other
/// arguments.
const WINDOW: usize = 48;
/// System calls of one piece of code that are looked at: a static program has some hundreds, the largest some thousands.
const CALLS_MAX: usize = 1 << 20;
/// The flags with which glibc's `fork` calls clone: CHILD_SETTID, CHILD_CLEARTID and SIGCHLD.
const FORK_FLAGS: [u8; 4] = 0x0120_0011_u32.to_le_bytes();

/// A pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hit {
    Fork,
    Vfork,
    Execve,
    Execveat,
    /// A clone that makes a process rather than a thread.
    CloneProcess,
}

impl Hit {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Hit::Fork => "system call 57 (fork)",
            Hit::Vfork => "system call 58 (vfork)",
            Hit::Execve => "system call 59 (execve)",
            Hit::Execveat => "system call 322 (execveat)",
            Hit::CloneProcess => "system call 56 (clone) with the flags of fork",
        }
    }
}

/// Scans code for x86-64. False where it has more of the instruction than code can have.
pub(super) fn amd64(code: &[u8], hits: &mut BTreeSet<Hit>) -> bool {
    for (count, at) in memmem::find_iter(code, b"\x0f\x05").enumerate() {
        if count >= CALLS_MAX {
            return false;
        }
        let before = &code[at.saturating_sub(WINDOW)..at];
        // The last load of eax before the instruction is the one that counts.
        let Some(number) = last_load(before) else {
            continue;
        };
        match number {
            56 if memmem::find(before, &FORK_FLAGS).is_some() => {
                hits.insert(Hit::CloneProcess);
            }
            57 => {
                hits.insert(Hit::Fork);
            }
            58 => {
                hits.insert(Hit::Vfork);
            }
            59 => {
                hits.insert(Hit::Execve);
            }
            322 => {
                hits.insert(Hit::Execveat);
            }
            _ => {}
        }
    }
    true
}

/// The number that is last loaded into eax or rax: `mov $n,%eax`, `mov $n,%rax`, or `push $n; pop %rax`.
fn last_load(before: &[u8]) -> Option<u32> {
    let number = |bytes: &[u8]| Some(u32::from_le_bytes(bytes.try_into().ok()?));
    (0..before.len()).rev().find_map(|at| match &before[at..] {
        // Only what may be a system call's number: a byte b8 within another instruction gives anything.
        [0xb8, rest @ ..] if rest.len() >= 4 => number(&rest[..4]).filter(|n| *n < 1024),
        [0x48, 0xc7, 0xc0, rest @ ..] if rest.len() >= 4 => {
            number(&rest[..4]).filter(|n| *n < 1024)
        }
        [0x6a, n, 0x58, ..] if *n < 128 => Some(u32::from(*n)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(code: &[u8]) -> BTreeSet<Hit> {
        let mut hits = BTreeSet::new();
        assert!(amd64(code, &mut hits));
        hits
    }

    #[test]
    fn nothing_but_the_instruction_is_no_code() {
        let code = [0x0f, 0x05].repeat(CALLS_MAX + 1);
        assert!(!amd64(&code, &mut BTreeSet::new()));
    }

    #[test]
    fn the_number_that_is_loaded_last_before_a_system_call_counts() {
        let execve = [0xb8, 56, 0, 0, 0, 0x90, 0xb8, 59, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(scan(&execve), BTreeSet::from([Hit::Execve]));
        let short = [0x6a, 58, 0x58, 0x0f, 0x05];
        assert_eq!(scan(&short), BTreeSet::from([Hit::Vfork]));
        let long = [0x48, 0xc7, 0xc0, 57, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(scan(&long), BTreeSet::from([Hit::Fork]));
    }

    #[test]
    fn a_clone_is_a_process_only_with_the_flags_of_fork() {
        let thread = [0xb8, 56, 0, 0, 0, 0x0f, 0x05];
        assert!(scan(&thread).is_empty());
        let fork = [0xbf, 0x11, 0, 0x20, 1, 0xb8, 56, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(scan(&fork), BTreeSet::from([Hit::CloneProcess]));
    }

    #[test]
    fn a_number_far_before_a_system_call_is_not_its_own() {
        let mut code = vec![0xb8, 59, 0, 0, 0];
        code.extend([0x90; WINDOW]);
        code.extend([0x0f, 0x05]);
        assert!(scan(&code).is_empty());
    }
}
