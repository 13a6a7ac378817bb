//! The caller's terminal: its size, and raw mode that never outlives us.
//!
//! The saved mode is kept process-wide, so that every way out can put it back: the end of a session (drop), the end of
//! `main`, and a panic (its hook, before the message is printed). A kill -9 cannot be answered; `reset` helps then.

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::IsTerminal;
use std::sync::{Mutex, Once, PoisonError};
use vistara_api::TerminalSize;

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Raw mode of standard input, until dropped.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Enters raw mode.
    ///
    /// # Errors
    /// The system's, where standard input is no terminal.
    pub(crate) fn enter() -> std::io::Result<Raw> {
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                before(info);
            }));
        });
        let stdin = std::io::stdin();
        let mode = tcgetattr(&stdin)?;
        let mut raw = mode.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(mode);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether raw mode is on: then a line ends with CR LF.
pub(crate) fn is_raw() -> bool {
    SAVED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some()
}

/// Puts the terminal back as it was; nothing where it was not changed.
pub(crate) fn restore() {
    // A panic inside the lock would have to come from the system call below; a lock that is held is left alone rather
    // than waited for.
    let Ok(mut saved) = SAVED.try_lock() else {
        return;
    };
    if let Some(mode) = saved.take() {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &mode);
    }
}

/// The size of the caller's terminal, whichever of its streams is one; 24 by 80 where none is.
pub(crate) fn size() -> TerminalSize {
    [
        tcgetwinsize(std::io::stdout()),
        tcgetwinsize(std::io::stderr()),
        tcgetwinsize(std::io::stdin()),
    ]
    .into_iter()
    .flatten()
    .find(|size| size.ws_row > 0 && size.ws_col > 0)
    .map_or(
        TerminalSize {
            rows: 24,
            columns: 80,
        },
        |size| TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
    )
}

/// Whether standard input is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    std::io::stdin().is_terminal()
}

/// Whether standard input is `/dev/null`.
pub(crate) fn stdin_is_null() -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let device = |path| {
        let found = std::fs::metadata(path).ok()?;
        found.file_type().is_char_device().then(|| found.rdev())
    };
    device("/dev/stdin").is_some_and(|stdin| device("/dev/null") == Some(stdin))
}

/// A notice for a person, on standard error, whatever the terminal's mode.
pub(crate) fn notice(text: &str) {
    let text = crate::text::visible(text, true);
    if is_raw() {
        use std::io::Write;
        let _ = write!(
            std::io::stderr().lock(),
            "vistara: {}\r\n",
            text.replace('\n', "\r\n")
        );
    } else {
        crate::failure::eprint_line(&format!("vistara: {text}"));
    }
}
