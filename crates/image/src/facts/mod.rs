//! Looks at a program of an image and says what it is: see [`vistara_model::ProgramFacts`].
//!
//! Works on the merged tree and the layers; nothing is unpacked onto the host, no program is ever run, and no path of the
//! image is ever a path of the host. What is gathered is kept beside the image's record (`cache`), with the number of the
//! analyser that gathered it.
//!
//! Left to others: what follows from the facts (`vistara-control`).

mod elf;
mod evidence;
mod gather;
mod libraries;
pub(crate) mod paths;
pub(crate) mod read;
mod runtimes;
mod scan;
mod scripts;
#[cfg(test)]
mod tests;

use crate::ImageError;
use crate::merge::{Content, Tree};
use read::Source;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use vistara_model::{Bytes, Correction, Digest, EnvVar, ImageFacts, ProgramFacts};

/// Raise it when the same image would give other facts: what older analysers gathered is then gathered again.
const ANALYSER: u32 = 1;
const VERSION: u32 = 1;
/// Programs of one image that are remembered; the one looked at longest ago goes first. An image has one or two.
const PROGRAMS_MAX: usize = 32;
/// Corrections of one image that are remembered: as many as programs could be run from it in earnest.
const CORRECTIONS_MAX: usize = 256;
/// So many commands of one program that were corrected speak against the program.
const COMMANDS_MAX: usize = 3;
/// Where a command is looked for if its environment does not say: what `execvp` and a guest use.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Which program is asked about: the parts of a resolved command that decide what is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked<'a> {
    /// The first word of the command line.
    pub argv0: &'a str,
    /// `PATH`.
    pub path: &'a str,
    /// `LD_LIBRARY_PATH`; mostly empty.
    pub library_path: &'a str,
    /// The absolute working directory.
    pub working_dir: &'a str,
    /// The whole command line: corrections may be about one command only.
    pub argv: &'a [String],
}

impl<'a> Asked<'a> {
    /// From a resolved command, as `vistara_control::program` makes it. An empty command asks for nothing, and is told
    /// missing.
    pub fn new(argv: &'a [String], env: &'a [EnvVar], working_dir: &'a str) -> Asked<'a> {
        let variable = |name: &str| {
            env.iter()
                .find(|variable| variable.name == name)
                .map(|variable| variable.value.as_str())
        };
        Asked {
            argv0: argv.first().map_or("", String::as_str),
            path: variable("PATH").unwrap_or(DEFAULT_PATH),
            library_path: variable("LD_LIBRARY_PATH").unwrap_or_default(),
            working_dir,
            argv,
        }
    }

    /// By what its command is known again: short, and nothing of it can be read back.
    fn command(&self) -> Digest {
        let mut hash = Sha256::new();
        for word in self.argv {
            hash.update((word.len() as u64).to_le_bytes());
            hash.update(word);
        }
        Digest::from_sha256(hash.finalize().into())
    }
}

/// What is remembered of an image's programs; a small JSON file with a version, replaced whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cache {
    version: u32,
    analyser: u32,
    entries: u64,
    size: Bytes,
    /// The one looked at last comes last.
    programs: Vec<Known>,
    corrections: Vec<Corrected>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    argv0: String,
    path: String,
    library_path: String,
    working_dir: String,
    facts: ProgramFacts,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Corrected {
    file: String,
    /// The only command that it is about, where it is not about all.
    #[serde(default)]
    command: Option<Digest>,
    correction: Correction,
}

impl Cache {
    /// Nothing known.
    pub(crate) fn empty() -> Cache {
        Cache {
            version: VERSION,
            analyser: ANALYSER,
            entries: 0,
            size: Bytes(0),
            programs: Vec::new(),
            corrections: Vec::new(),
        }
    }

    /// What a file of the store holds. Facts of another analyser are dropped, corrections kept. A file that cannot be
    /// understood is as good as none: all but corrections can be gathered again.
    pub(crate) fn parse(content: &[u8]) -> Option<Cache> {
        // Facts may have changed their form with the analyser, so that they are read only where they are of use.
        #[derive(Deserialize)]
        struct Lasting {
            version: u32,
            analyser: u32,
            corrections: Vec<Corrected>,
        }
        let lasting: Lasting = serde_json::from_slice(content).ok()?;
        if lasting.version != VERSION {
            return None;
        }
        if lasting.analyser == ANALYSER
            && let Ok(cache) = serde_json::from_slice(content)
        {
            return Some(cache);
        }
        Some(Cache {
            corrections: lasting.corrections,
            ..Cache::empty()
        })
    }

    /// The facts of this program, if they are known.
    pub(crate) fn get(&self, asked: &Asked<'_>) -> Option<ImageFacts> {
        let known = self.programs.iter().find(|known| known.is(asked))?;
        Some(ImageFacts {
            program: known.facts.clone(),
            correction: self.correction(&known.facts.file, asked),
            entries: self.entries,
            size: self.size,
        })
    }

    fn correction(&self, file: &str, asked: &Asked<'_>) -> Option<Correction> {
        let of_file: Vec<&Corrected> = (self.corrections.iter())
            .filter(|corrected| corrected.file == file)
            .collect();
        if let Some(whole) = of_file.iter().find(|known| known.command.is_none()) {
            return Some(whole.correction.clone());
        }
        let command = asked.command();
        let same = |known: &&&Corrected| known.command.as_ref() == Some(&command);
        if let Some(same) = of_file.iter().find(same) {
            return Some(same.correction.clone());
        }
        let last = of_file.last().filter(|_| of_file.len() >= COMMANDS_MAX)?;
        Some(Correction {
            seen: format!(
                "{} of its commands did not do; of the last, {}",
                of_file.len(),
                last.correction.seen
            ),
        })
    }

    /// Remembers what was gathered.
    pub(crate) fn put(&mut self, asked: &Asked<'_>, facts: ProgramFacts, counted: (u64, Bytes)) {
        (self.entries, self.size) = counted;
        self.programs.retain(|known| !known.is(asked));
        let excess = (self.programs.len() + 1).saturating_sub(PROGRAMS_MAX);
        self.programs.drain(..excess);
        self.programs.push(Known {
            argv0: asked.argv0.to_owned(),
            path: asked.path.to_owned(),
            library_path: asked.library_path.to_owned(),
            working_dir: asked.working_dir.to_owned(),
            facts,
        });
    }

    /// Remembers a correction for the program in this file of the image, or for one command of it; the latest one counts.
    pub(crate) fn correct(
        &mut self,
        file: &str,
        only: Option<&Asked<'_>>,
        correction: &Correction,
    ) {
        let command = only.map(Asked::command);
        self.corrections
            .retain(|known| known.file != file || known.command != command);
        let excess = (self.corrections.len() + 1).saturating_sub(CORRECTIONS_MAX);
        self.corrections.drain(..excess);
        self.corrections.push(Corrected {
            file: file.to_owned(),
            command,
            correction: correction.clone(),
        });
    }
}

impl Known {
    fn is(&self, asked: &Asked<'_>) -> bool {
        self.argv0 == asked.argv0
            && self.path == asked.path
            && self.library_path == asked.library_path
            && self.working_dir == asked.working_dir
    }
}

/// How many names a tree has, and how many bytes its files have together; hard links count once.
pub(crate) fn count(tree: &Tree) -> (u64, Bytes) {
    let mut seen = std::collections::HashSet::new();
    let (mut entries, mut bytes) = (0, 0_u64);
    for visit in tree.walk() {
        entries += 1;
        if let Content::File { size, .. } = visit.inode.content
            && seen.insert(visit.inode_number)
        {
            bytes = bytes.saturating_add(size);
        }
    }
    (entries, Bytes(bytes))
}

/// Looks at a program of this tree. Costs one pass over the layers for each link of the chain from the command to the last
/// library, four or five in all.
pub(crate) fn look(
    tree: &Tree,
    source: &mut dyn Source,
    asked: &Asked<'_>,
) -> Result<ProgramFacts, ImageError> {
    gather::gather(tree, source, asked)
}

/// Takes any bytes as a program in an image, and as what was remembered of one, for a fuzzer. Whatever they are, this returns.
#[doc(hidden)]
pub fn fuzz_program(bytes: &[u8]) {
    if elf::is_elf(bytes) {
        // Only that these return matters.
        let _ = elf::read(bytes, true);
        let _ = elf::read(bytes, false);
    }
    let _ = scripts::interpreter(bytes);
    let _ = Cache::parse(bytes);
}
