//! Looks at one program of an image: finds it, reads it, and follows it to its interpreter and its libraries.
//!
//! Files are read in rounds, each round in one pass over the layers: the program and the loader's configuration, then (for
//! a script) its interpreter, then the libraries that the last round's files ask for. A program has four or five rounds.

use super::elf::{self, Summary};
use super::evidence::{self, Part};
use super::libraries::{Asker, Search};
use super::paths::{self, Found};
use super::read::Source;
use super::{Asked, runtimes, scripts};
use crate::ImageError;
use crate::merge::{Content, Tree};
use std::collections::{HashMap, HashSet};
use std::io::Read;
use vistara_model::{
    Bytes, Confidence, Library, Linkage, MayCreate, ProcessFacts, ProgramFacts, ProgramKind,
};

/// The largest executable or library that is looked into: it is held in memory. Chromium's is about 250 MB, and what is
/// larger than this counts as a program that cannot be seen.
const ELF_BYTES_MAX: u64 = 384 << 20;
/// Interpreters of interpreters, as the kernel's bound.
const SCRIPTS_MAX: usize = 4;
/// Libraries of one program, those of libraries included. Large desktop programs load about 300.
const LIBRARIES_MAX: usize = 1024;
/// Rounds over the layers; chains of libraries in real images end before ten.
const ROUNDS_MAX: usize = 32;
/// Bytes of a configuration file of the loader.
const CONF_BYTES_MAX: u64 = 64 << 10;

/// Reads a file whole, unless it is larger than the bound: then only its first bytes, and false.
fn whole(reader: &mut dyn Read, bytes_max: u64) -> Result<(Vec<u8>, bool), ImageError> {
    let mut bytes = Vec::new();
    reader
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        // A layer's own failure is told by the source; nothing else can fail here.
        .map_err(|error| ImageError::Internal(error.to_string()))?;
    let complete = bytes.len() as u64 <= bytes_max;
    Ok((bytes, complete))
}

fn facts(path: String, file: String, kind: ProgramKind, doubt: &str) -> ProgramFacts {
    ProgramFacts {
        path,
        file,
        kind,
        executable: String::new(),
        architecture: None,
        linkage: None,
        loader: None,
        libraries: Vec::new(),
        missing: Vec::new(),
        runtimes: Vec::new(),
        processes: ProcessFacts {
            may_create: MayCreate::Yes,
            confidence: Confidence::Guess,
            doubt: Some(doubt.to_owned()),
            evidence: Vec::new(),
        },
        whole_system: Vec::new(),
        size: Bytes(0),
    }
}

/// Looks at the program that a command line names.
pub(super) fn gather(
    tree: &Tree,
    source: &mut dyn Source,
    asked: &Asked<'_>,
) -> Result<ProgramFacts, ImageError> {
    let Some((path, found)) = scripts::which(tree, asked.argv0, asked) else {
        let doubt = "there is no such program";
        let path = asked.argv0.to_owned();
        return Ok(facts(path, String::new(), ProgramKind::Missing, doubt));
    };
    let file = paths::text(tree, found.node);
    let mut script: Option<Vec<String>> = None;
    let (mut at, mut node) = (path.clone(), found.node);
    let mut conf = Search::new(tree, asked);
    for round in 0..=SCRIPTS_MAX {
        let other = |why: &str| {
            let kind = ProgramKind::Other {
                why: why.to_owned(),
            };
            Ok(facts(
                path.clone(),
                file.clone(),
                kind,
                "it cannot be executed",
            ))
        };
        if !paths::is_executable(tree, node) {
            return match tree.content(node) {
                Content::File { .. } => other("is not executable"),
                _ => other("is not a file"),
            };
        }
        let head = read_program(tree, source, node, &mut conf)?;
        let line = match head {
            Head::Elf(Ok(summary)) => {
                let kind = match script {
                    Some(words) => ProgramKind::Script { words },
                    None => ProgramKind::Elf,
                };
                let base = facts(path, file, kind, "");
                return link(tree, source, base, &at, node, *summary, &mut conf);
            }
            Head::Elf(Err(why)) => return other(why),
            Head::TooLarge => return other("is too large to be looked into"),
            Head::Text(line) => line,
        };
        let Some(words) = scripts::interpreter(&line) else {
            // As `execvp` and every shell do it: a text without a first line for the kernel is given to the shell.
            return other("is neither an ELF file nor a script with an interpreter");
        };
        let Some((next_path, next)) = scripts::executed(tree, &words, asked) else {
            let mut missing = facts(
                path,
                file,
                ProgramKind::Script {
                    words: words.clone(),
                },
                "its interpreter is not there",
            );
            missing.missing = words.last().cloned().into_iter().collect();
            return Ok(missing);
        };
        if script.is_none() {
            script = Some(words);
        }
        if round == SCRIPTS_MAX {
            return other("is a script of a script too many");
        }
        (at, node) = (next_path, next.node);
    }
    Err(ImageError::Internal("a script without an end".to_owned()))
}

/// What the start of a file showed.
enum Head {
    Elf(Result<Box<Summary>, &'static str>),
    /// The first bytes of something else.
    Text(Vec<u8>),
    TooLarge,
}

/// Reads an executable, and with the first one the configuration of the loader.
fn read_program(
    tree: &Tree,
    source: &mut dyn Source,
    node: u32,
    conf: &mut Search<'_>,
) -> Result<Head, ImageError> {
    let program = tree.inode_number(node);
    let files = conf.take_files();
    let mut numbers: Vec<u32> = files.iter().map(|node| tree.inode_number(*node)).collect();
    numbers.push(program);
    let mut head = Head::Text(Vec::new());
    let mut texts = HashMap::new();
    source.read(tree, &numbers, &mut |number, reader| {
        if number == program {
            let (bytes, complete) = whole(reader, ELF_BYTES_MAX)?;
            head = if !complete {
                Head::TooLarge
            } else if elf::is_elf(&bytes) {
                Head::Elf(elf::read(&bytes, true).map(Box::new))
            } else {
                Head::Text(bytes[..bytes.len().min(scripts::LINE_BYTES_MAX)].to_vec())
            };
        } else {
            let (bytes, _) = whole(reader, CONF_BYTES_MAX)?;
            texts.insert(number, String::from_utf8_lossy(&bytes).into_owned());
        }
        Ok(())
    })?;
    for file in files {
        if let Some(text) = texts.get(&tree.inode_number(file)) {
            conf.add_conf(text);
        }
    }
    Ok(head)
}

/// One library that is wanted, and where it may be.
struct Wanted {
    name: String,
    candidates: Vec<(String, Found)>,
}

/// A library that was found and read.
struct Loaded {
    library: Library,
    node: u32,
    summary: Summary,
}

/// Follows an executable to its loader and libraries, and judges the whole.
fn link(
    tree: &Tree,
    source: &mut dyn Source,
    mut facts: ProgramFacts,
    path: &str,
    node: u32,
    summary: Summary,
    search: &mut Search<'_>,
) -> Result<ProgramFacts, ImageError> {
    facts.executable = path.to_owned();
    facts.architecture = Some(summary.architecture.clone());
    facts.linkage = Some(summary.linkage);
    facts.loader = summary.loader.clone();
    let size_of = |node: u32| match tree.content(node) {
        Content::File { size, .. } => *size,
        _ => 0,
    };
    // A loader is often asked for as a library too; nothing counts twice.
    let mut files = HashSet::from([tree.inode_number(node)]);
    let mut size = size_of(node);
    let mut missing = Vec::new();
    if summary.linkage == Linkage::Dynamic
        && let Some(loader) = &summary.loader
    {
        match paths::find(tree, "/", loader) {
            Some(found) => {
                if files.insert(tree.inode_number(found.node)) {
                    size += size_of(found.node);
                }
            }
            None => missing.push(loader.clone()),
        }
    }
    let place = paths::text(tree, node);
    let mut loaded: Vec<Loaded> = Vec::new();
    let mut known: HashSet<String> = HashSet::new();
    search.program(&summary, paths::parent(&place));
    let mut wanted = ask(tree, search, &summary, paths::parent(&place), &mut known);
    for _ in 0..ROUNDS_MAX {
        if wanted.is_empty() || loaded.len() > LIBRARIES_MAX {
            break;
        }
        let mut numbers: Vec<u32> = wanted
            .iter()
            .filter_map(|it| it.candidates.first())
            .map(|(_, found)| tree.inode_number(found.node))
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        let mut summaries: HashMap<u32, Option<Summary>> = HashMap::new();
        source.read(tree, &numbers, &mut |number, reader| {
            let (bytes, complete) = whole(reader, ELF_BYTES_MAX)?;
            let read = complete.then(|| elf::read(&bytes, false).ok()).flatten();
            summaries.insert(number, read);
            Ok(())
        })?;
        let mut next = Vec::new();
        for mut it in std::mem::take(&mut wanted) {
            if it.candidates.is_empty() {
                missing.push(it.name);
                continue;
            }
            let (path, found) = it.candidates.remove(0);
            let fits = summaries
                .get(&tree.inode_number(found.node))
                .and_then(Option::as_ref)
                .filter(|of| of.wide && of.architecture == summary.architecture);
            let Some(of) = fits else {
                // A library for another processor of the same name: the loader passes over it, too.
                next.push(it);
                continue;
            };
            let place = paths::text(tree, found.node);
            next.extend(ask(tree, search, of, paths::parent(&place), &mut known));
            let bytes = size_of(found.node);
            if files.insert(tree.inode_number(found.node)) {
                size += bytes;
            }
            loaded.push(Loaded {
                library: Library {
                    name: it.name,
                    path,
                    size: Bytes(bytes),
                },
                node: found.node,
                summary: of.clone(),
            });
        }
        wanted = next;
    }
    missing.extend(wanted.into_iter().map(|it| it.name));
    missing.sort();
    missing.dedup();
    let mut nodes = HashSet::new();
    loaded.retain(|it| nodes.insert(it.node));
    loaded.sort_by(|a, b| a.library.path.cmp(&b.library.path));
    let program = Part {
        name: path,
        path,
        summary: &summary,
    };
    let parts: Vec<Part<'_>> = loaded
        .iter()
        .map(|it| Part {
            name: &it.library.name,
            path: &it.library.path,
            summary: &it.summary,
        })
        .collect();
    facts.processes = evidence::processes(&program, &parts, &missing);
    facts.whole_system = evidence::whole_system(&program);
    facts.runtimes = runtimes::of(path, &place, &parts, &summary);
    facts.libraries = loaded.into_iter().map(|it| it.library).collect();
    facts.missing = missing;
    facts.size = Bytes(size);
    Ok(facts)
}

/// What a file needs that was not asked for before.
fn ask(
    tree: &Tree,
    search: &Search<'_>,
    summary: &Summary,
    origin: &str,
    known: &mut HashSet<String>,
) -> Vec<Wanted> {
    let asker = Asker {
        rpath: &summary.rpath,
        runpath: &summary.runpath,
        origin,
    };
    let mut wanted = Vec::new();
    for name in &summary.needed {
        // A loader knows a library by the name that it was asked for, and loads it once.
        if known.len() < LIBRARIES_MAX && known.insert(name.clone()) {
            wanted.push(Wanted {
                name: name.clone(),
                candidates: search.candidates(tree, name, &asker),
            });
        }
    }
    wanted
}
