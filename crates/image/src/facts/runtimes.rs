//! Languages and their runtimes, known by marks in the program, by the libraries that only they load, and by name.

use super::elf::Summary;
use super::evidence::Part;
use vistara_model::Runtime;

/// Libraries that hold a whole runtime.
const LIBRARIES: &[(&str, Runtime)] = &[
    ("libpython", Runtime::Python),
    ("libnode.so", Runtime::Node),
    ("libjli.so", Runtime::Jvm),
    ("libjvm.so", Runtime::Jvm),
    ("libperl.so", Runtime::Perl),
    ("libruby", Runtime::Ruby),
    ("liblua", Runtime::Lua),
];
/// Names of interpreters and shells, without version numbers.
const NAMES: &[(&str, Runtime)] = &[
    ("sh", Runtime::Shell),
    ("bash", Runtime::Shell),
    ("dash", Runtime::Shell),
    ("zsh", Runtime::Shell),
    ("ash", Runtime::Shell),
    ("busybox", Runtime::Busybox),
    ("python", Runtime::Python),
    ("pypy", Runtime::Python),
    ("node", Runtime::Node),
    ("nodejs", Runtime::Node),
    ("java", Runtime::Jvm),
    ("perl", Runtime::Perl),
    ("ruby", Runtime::Ruby),
    ("lua", Runtime::Lua),
    ("luajit", Runtime::Lua),
    ("php", Runtime::Php),
];

/// The runtimes of a program that was found at `path` and lies at `file`.
pub(super) fn of(path: &str, file: &str, libraries: &[Part<'_>], own: &Summary) -> Vec<Runtime> {
    let mut found = own.runtimes.clone();
    for part in libraries {
        for (start, runtime) in LIBRARIES {
            if part.name.starts_with(start) {
                found.push(*runtime);
            }
        }
    }
    for path in [path, file] {
        let name = path.rsplit('/').next().unwrap_or_default();
        let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.' || c == '-');
        found.extend(
            NAMES
                .iter()
                .filter(|(known, _)| *known == name)
                .map(|(_, runtime)| *runtime),
        );
    }
    found.sort_unstable();
    found.dedup();
    found
}
