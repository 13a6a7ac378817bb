//! The keys that detach from a program with a terminal: ctrl-p ctrl-q, as docker's.

/// Ctrl-p.
const FIRST: u8 = 0x10;
/// Ctrl-q.
const SECOND: u8 = 0x11;

/// Watches what is typed. A ctrl-p is held back until the next key shows whether it begins the sequence.
#[derive(Debug, Default)]
pub(crate) struct DetachKeys {
    held: bool,
}

impl DetachKeys {
    /// The bytes to pass on, and whether the sequence was completed (what was typed after it is dropped).
    pub(crate) fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            match (self.held, byte) {
                (true, SECOND) => return (out, true),
                (true, FIRST) => out.push(FIRST),
                (false, FIRST) => self.held = true,
                (true, other) => {
                    out.extend([FIRST, other]);
                    self.held = false;
                }
                (false, other) => out.push(other),
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_p_ctrl_q_detaches_also_when_typed_in_two_reads() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.feed(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(keys.feed(b"\x11tail"), (vec![], true));
    }

    #[test]
    fn a_ctrl_p_alone_reaches_the_program_with_the_next_key() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.feed(b"\x10x"), (b"\x10x".to_vec(), false));
        assert_eq!(keys.feed(b"\x10\x10\x10"), (b"\x10\x10".to_vec(), false));
        assert_eq!(keys.feed(b"\x11"), (vec![], true));
        assert_eq!(DetachKeys::default().feed(b"\x11"), (vec![0x11], false));
    }
}
