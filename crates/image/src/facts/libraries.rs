//! Where a program's loader looks for libraries: the rules of glibc's `ld.so` (ld.so(8)) and of musl's, joined.
//!
//! `ld.so.cache` is not read: it is a table of what the configured directories hold, and these are looked into themselves.

use super::Asked;
use super::elf::Summary;
use super::paths::{self, Found};
use crate::merge::Tree;

/// Directories that a loader looks into when nothing else is said, in its order.
const DEFAULT: &[&str] = &["/lib64", "/usr/lib64", "/lib", "/usr/lib"];
/// Directories of Debian's multiarch, which its loader has built in.
const MULTIARCH: &[(&str, &str)] = &[
    ("amd64", "x86_64-linux-gnu"),
    ("arm64", "aarch64-linux-gnu"),
    ("riscv64", "riscv64-linux-gnu"),
];
/// Directories that the configuration may name; Debian's names about ten.
const CONFIGURED_MAX: usize = 64;
/// Files of `/etc/ld.so.conf.d` that are read.
const CONF_FILES_MAX: usize = 128;
/// Directories in which one library is looked for, for hostile run paths.
const PLACES_MAX: usize = 160;

/// The file that asks for a library.
pub(super) struct Asker<'a> {
    pub(super) rpath: &'a [String],
    pub(super) runpath: &'a [String],
    /// The directory that it lies in.
    pub(super) origin: &'a str,
}

/// The search path of one program.
pub(super) struct Search<'a> {
    /// Configuration files that are still to be read.
    files: Vec<u32>,
    configured: Vec<String>,
    /// `LD_LIBRARY_PATH`.
    environment: Vec<&'a str>,
    /// The program's own RPATH with its origin, which holds for its libraries too.
    program_rpath: Vec<String>,
    program_runpath: bool,
    multiarch: Vec<String>,
}

impl<'a> Search<'a> {
    pub(super) fn new(tree: &Tree, asked: &Asked<'a>) -> Search<'a> {
        let mut files = Vec::new();
        let mut add = |path: &str| {
            if let Some(found) = paths::find(tree, "/", path)
                && files.len() < CONF_FILES_MAX
            {
                files.push(found.node);
            }
        };
        // The main file's own lines mostly include the directory, whose files come in order of their names.
        if let Some(found) = paths::find(tree, "/", "/etc/ld.so.conf.d") {
            let mut children = tree.child_nodes(found.node);
            children.reverse();
            for child in children {
                let path = paths::text(tree, child);
                if path.ends_with(".conf") {
                    add(&path);
                }
            }
        }
        add("/etc/ld.so.conf");
        for machine in ["x86_64", "aarch64", "riscv64"] {
            add(&format!("/etc/ld-musl-{machine}.path"));
        }
        Search {
            files,
            configured: Vec::new(),
            environment: asked
                .library_path
                .split([':', ';'])
                .filter(|dir| dir.starts_with('/'))
                .collect(),
            program_rpath: Vec::new(),
            program_runpath: false,
            multiarch: Vec::new(),
        }
    }

    /// The configuration files; none the second time.
    pub(super) fn take_files(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.files)
    }

    /// Takes in a configuration file: one directory a line. Includes are not followed; the one that everyone has is read.
    pub(super) fn add_conf(&mut self, text: &str) {
        for line in text.split(['\n', ':', ',', ' ', '\t']) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.starts_with('/')
                && !line.contains('*')
                && self.configured.len() < CONFIGURED_MAX
                && !self.configured.iter().any(|known| known == line)
            {
                self.configured.push(line.to_owned());
            }
        }
    }

    /// Sets what the executable itself says.
    pub(super) fn program(&mut self, summary: &Summary, origin: &str) {
        self.program_runpath = !summary.runpath.is_empty();
        self.program_rpath = summary
            .rpath
            .iter()
            .map(|dir| expand(dir, origin))
            .collect();
        self.multiarch = MULTIARCH
            .iter()
            .filter(|(architecture, _)| *architecture == summary.architecture.0)
            .flat_map(|(_, triplet)| [format!("/lib/{triplet}"), format!("/usr/lib/{triplet}")])
            .collect();
    }

    /// The files that a name may stand for, in the order in which the loader tries them.
    pub(super) fn candidates(
        &self,
        tree: &Tree,
        name: &str,
        asker: &Asker<'_>,
    ) -> Vec<(String, Found)> {
        if name.contains('/') {
            let path = expand(name, asker.origin);
            return paths::find(tree, "/", &path)
                .map(|found| (path, found))
                .into_iter()
                .collect();
        }
        let own = |dirs: &[String]| {
            dirs.iter()
                .map(|dir| expand(dir, asker.origin))
                .collect::<Vec<_>>()
        };
        let mut places: Vec<String> = Vec::new();
        if asker.runpath.is_empty() {
            places.extend(own(asker.rpath));
            if !self.program_runpath {
                places.extend(self.program_rpath.iter().cloned());
            }
        }
        places.extend(self.environment.iter().map(|dir| (*dir).to_owned()));
        places.extend(own(asker.runpath));
        places.extend(self.configured.iter().cloned());
        places.extend(self.multiarch.iter().cloned());
        places.extend(DEFAULT.iter().map(|dir| (*dir).to_owned()));
        // musl's default beside the others.
        places.push("/usr/local/lib".to_owned());
        places
            .iter()
            .take(PLACES_MAX)
            .filter(|dir| dir.starts_with('/'))
            .filter_map(|dir| {
                let path = format!("{}/{name}", dir.trim_end_matches('/'));
                paths::find(tree, "/", &path).map(|found| (path, found))
            })
            .collect()
    }
}

/// `$ORIGIN` and `$LIB` in a path.
fn expand(path: &str, origin: &str) -> String {
    let mut text = path.to_owned();
    for (name, value) in [("ORIGIN", origin), ("LIB", "lib")] {
        text = text
            .replace(&format!("${{{name}}}"), value)
            .replace(&format!("${name}"), value);
    }
    text
}
