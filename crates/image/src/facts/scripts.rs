//! From the first word of a command line to a file, and from a script to its interpreter.

use super::Asked;
use super::paths::{self, Found};
use crate::merge::{Content, Tree};

/// Bytes of a script's first line that the kernel reads.
pub(super) const LINE_BYTES_MAX: usize = 256;
/// Directories of `PATH` that are looked into.
const PATH_DIRS_MAX: usize = 256;

/// Finds a command as `execvp` does. The path is the one at which it was found, links not followed.
pub(super) fn which(tree: &Tree, name: &str, asked: &Asked<'_>) -> Option<(String, Found)> {
    if name.contains('/') {
        let found = paths::find(tree, asked.working_dir, name)?;
        let path = if name.starts_with('/') {
            name.to_owned()
        } else {
            format!("{}/{name}", asked.working_dir.trim_end_matches('/'))
        };
        return Some((path, found));
    }
    let mut not_executable = None;
    for dir in asked.path.split(':').take(PATH_DIRS_MAX) {
        // An empty entry, or a relative one, means the working directory.
        let dir = if dir.starts_with('/') {
            dir.to_owned()
        } else {
            format!("{}/{dir}", asked.working_dir)
        };
        let path = format!("{}/{name}", dir.trim_end_matches('/'));
        let Some(found) = paths::find(tree, "/", &path) else {
            continue;
        };
        if paths::is_executable(tree, found.node) {
            return Some((path, found));
        }
        if matches!(tree.content(found.node), Content::File { .. }) {
            not_executable.get_or_insert((path, found));
        }
    }
    not_executable
}

/// The words of a script's first line: the interpreter, and all that follows it as one argument, as the kernel has it.
pub(super) fn interpreter(start: &[u8]) -> Option<Vec<String>> {
    let line = start.strip_prefix(b"#!")?;
    let line = line.split(|byte| *byte == b'\n').next()?;
    let line = String::from_utf8_lossy(line);
    let line = line.trim();
    let (interpreter, argument) = match line.split_once([' ', '\t']) {
        Some((interpreter, argument)) => (interpreter, argument.trim()),
        None => (line, ""),
    };
    if interpreter.is_empty() {
        return None;
    }
    let mut words = vec![interpreter.to_owned()];
    if !argument.is_empty() {
        words.push(argument.to_owned());
    }
    Some(words)
}

/// The executable that such a line runs in the end: `env` looks a name up.
pub(super) fn executed(
    tree: &Tree,
    words: &[String],
    asked: &Asked<'_>,
) -> Option<(String, Found)> {
    let interpreter = words.first()?;
    let found = paths::find(tree, asked.working_dir, interpreter)?;
    if interpreter.rsplit('/').next() == Some("env")
        && let Some(argument) = words.get(1)
    {
        let name = argument
            .split_whitespace()
            .find(|word| !word.starts_with('-') && !word.contains('='))?;
        return which(tree, name, asked);
    }
    Some((interpreter.clone(), found))
}
