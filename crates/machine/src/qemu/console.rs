//! The end of a guest's console: bounded, and what a panic says in it.

use super::command::CONSOLE_RING;

/// Most characters of a panic's message.
const PANIC_MESSAGE_MAX: usize = 2_000;

/// How the kernel begins its last words.
const PANIC_WORDS: &[u8] = b"Kernel panic - not syncing";

/// The last [`CONSOLE_RING`] bytes of a console.
#[derive(Debug, Default)]
pub(super) struct ConsoleTail {
    bytes: Vec<u8>,
}

impl ConsoleTail {
    /// A tail that goes on from what an earlier process has read.
    pub(super) fn new(bytes: Vec<u8>) -> ConsoleTail {
        let mut tail = ConsoleTail { bytes };
        tail.trim();
        tail
    }

    pub(super) fn push(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        self.trim();
    }

    fn trim(&mut self) {
        let excess = self.bytes.len().saturating_sub(CONSOLE_RING);
        self.bytes.drain(..excess);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// At most the last `limit` bytes.
    pub(super) fn last(&self, limit: usize) -> Vec<u8> {
        self.bytes[self.bytes.len().saturating_sub(limit)..].to_vec()
    }

    /// What a kernel's panic says: its line and what came after; nothing where there was none.
    pub(super) fn panic_message(&self) -> Option<String> {
        let at = self
            .bytes
            .windows(PANIC_WORDS.len())
            .rposition(|window| window == PANIC_WORDS)?;
        let text = String::from_utf8_lossy(&self.bytes[at..]).replace('\r', "");
        Some(text.trim_end().chars().take(PANIC_MESSAGE_MAX).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let mut tail = ConsoleTail::default();
        for _ in 0..3 {
            tail.push(&vec![b'x'; CONSOLE_RING]);
        }
        tail.push(b"end");
        assert_eq!(tail.bytes().len(), CONSOLE_RING);
        assert_eq!(tail.last(4), b"xend");
        assert_eq!(
            ConsoleTail::new(vec![1; 2 * CONSOLE_RING]).bytes().len(),
            CONSOLE_RING
        );
    }

    #[test]
    fn a_panics_message_begins_at_its_line_and_is_bounded() {
        let mut tail = ConsoleTail::default();
        tail.push(b"Linux version 6\r\n");
        assert_eq!(tail.panic_message(), None);
        tail.push(b"[    1.6] Kernel panic - not syncing: sysrq triggered crash\r\n");
        tail.push(&[0xff; 5000]);
        let message = tail.panic_message().unwrap();
        assert!(message.starts_with("Kernel panic - not syncing: sysrq triggered crash\n"));
        assert_eq!(message.chars().count(), PANIC_MESSAGE_MAX);
    }
}
