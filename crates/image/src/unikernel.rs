//! Which files a unikernel's disk needs.
//!
//! An image of ordinary size travels whole ([`Selection::Whole`]): nothing can be missing then, data files included. The
//! price is memory, since Nanos keeps its file system's metadata there, and the time to write
//! the disk once; so a large image gives only the part that a program is known to need ([`Selection::Part`]): itself, its
//! loader and libraries, the directory it lies in unless that is a general one, its working directory, every path that its
//! arguments and environment name, and the small files that a C library reads. Interpreters' own libraries are not part of
//! it: in a large image a Python program does not run as a unikernel.
//!
//! Device nodes and pipes are left out: a unikernel has its own `/dev`. Owners and modes are left out: it has one user.

use crate::facts::paths;
use crate::facts::read::{Layers, Source as _};
use crate::merge::{Content, Tree};
use crate::store::Guard;
use crate::{ImageError, Limits, disk::LayerFile};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::path::Path;
use vistara_model::{Bytes, EnvVar, ProgramFacts};

/// Names of an image that still travels whole: Debian with a few packages has 5,000 to 8,000. At 4 KiB each, as
/// `vistara-nanos` reckons, these are at most 64 MiB of a unikernel's memory.
pub const WHOLE_ENTRIES_MAX: u64 = 16_384;
/// Bytes of an image that still travels whole: a disk of this size is written within some seconds, once.
pub const WHOLE_BYTES_MAX: Bytes = Bytes::mib(512);

/// Files and directories that programs expect on any system; small.
const NECESSITIES: &[&str] = &[
    "/etc/ca-certificates",
    "/etc/gai.conf",
    "/etc/group",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl",
    "/etc/terminfo",
    "/etc/timezone",
    "/lib/terminfo",
    "/usr/lib/locale/C.utf8",
    "/usr/lib/ssl",
    "/usr/share/terminfo",
    "/var/lib/ca-certificates",
];
/// Directories that programs expect, without what is in them.
const DIRECTORIES: &[&str] = &[
    "/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/var", "/var/log", "/var/run",
    "/var/tmp",
];
/// What glibc loads by itself while a program runs; looked for beside its other libraries.
const LOADED_LATE: &[&str] = &[
    "libnss_files.so.2",
    "libnss_dns.so.2",
    "libresolv.so.2",
    "libgcc_s.so.1",
];
/// Directories that hold everybody's files, so that lying in one says nothing about a program's own.
const GENERAL: &[&str] = &[
    "/",
    "/bin",
    "/sbin",
    "/usr",
    "/usr/bin",
    "/usr/sbin",
    "/usr/local",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/opt",
    "/etc",
    "/lib",
    "/usr/lib",
    "/usr/libexec",
    "/usr/share",
    "/home",
    "/root",
    "/var",
    "/var/lib",
    "/tmp",
];

/// What a program's own configuration adds to a selection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes<'a> {
    /// The command line.
    pub argv: &'a [String],
    /// The environment.
    pub env: &'a [EnvVar],
    /// The working directory.
    pub working_dir: &'a str,
}

/// Whether all of an image was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// All of it.
    Whole,
    /// What the program is known to need; these paths, which it names too, were too much.
    Part {
        /// Paths of directories.
        left_out: Vec<String>,
    },
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NanosKind {
    /// A directory.
    Directory,
    /// A file of this many bytes.
    File {
        /// Its length.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// What it says.
        target: Vec<u8>,
    },
}

/// One entry of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NanosEntry {
    /// Its path from the root, without a leading slash.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: NanosKind,
    /// Whether somebody may execute it.
    pub executable: bool,
    /// When it was last changed, in seconds since 1970.
    pub modified: u32,
    /// The same for all names of one file: hard links of one another.
    pub inode: u32,
}

/// What is called with each file's content: see [`NanosTree::read`].
pub type VisitFiles<'a> = dyn FnMut(&[usize], &mut dyn Read) -> io::Result<()> + 'a;

/// The files of a unikernel's disk, their contents still in the image's layers.
#[derive(Debug)]
pub struct NanosTree {
    tree: Tree,
    entries: Vec<NanosEntry>,
    selection: Selection,
    layers: Vec<LayerFile>,
    limits: Limits,
    /// While it is held, nobody removes the layers.
    _work: Option<Guard>,
}

impl NanosTree {
    /// All entries: parents before children, children by the order of their bytes. The root itself is not among them.
    pub fn entries(&self) -> &[NanosEntry] {
        &self.entries
    }

    /// Whether it is all of the image.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Bytes of all files; a file with several names counts once.
    pub fn bytes(&self) -> Bytes {
        let mut seen = BTreeSet::new();
        let mut bytes = 0_u64;
        for entry in &self.entries {
            if let NanosKind::File { size } = entry.kind
                && seen.insert(entry.inode)
            {
                bytes = bytes.saturating_add(size);
            }
        }
        Bytes(bytes)
    }

    /// Gives the content of every file once, in the order in which layers have them: `visit` gets the indexes into
    /// [`NanosTree::entries`] of all names of the file, at least one, and a reader of exactly its bytes. What `visit` does
    /// not read is skipped. Blocks, and unpacks each layer once.
    ///
    /// # Errors
    /// Where a layer cannot be read, or `visit` fails.
    pub fn read(&self, visit: &mut VisitFiles<'_>) -> Result<(), ImageError> {
        let mut names: HashMap<u32, Vec<usize>> = HashMap::new();
        for (index, entry) in self.entries.iter().enumerate() {
            if let NanosKind::File { .. } = entry.kind {
                names.entry(entry.inode).or_default().push(index);
            }
        }
        let mut inodes: Vec<u32> = names.keys().copied().collect();
        inodes.sort_unstable();
        let mut source = Layers {
            layers: &self.layers,
            limits: &self.limits,
        };
        source.read(&self.tree, &inodes, &mut |inode, reader| {
            let indexes = names.get(&inode).map_or(&[][..], Vec::as_slice);
            visit(indexes, reader).map_err(|error| {
                ImageError::io(
                    "write a unikernel's disk from",
                    Path::new("the image"),
                    error,
                )
            })
        })
    }

    pub(crate) fn with_layers(
        self,
        layers: Vec<LayerFile>,
        limits: Limits,
        work: Guard,
    ) -> NanosTree {
        NanosTree {
            layers,
            limits,
            _work: Some(work),
            ..self
        }
    }
}

/// Selects the entries.
pub(crate) fn select(tree: Tree, facts: &ProgramFacts, wishes: &Wishes<'_>) -> NanosTree {
    let (count, bytes) = crate::facts::count(&tree);
    let (chosen, selection) = if count <= WHOLE_ENTRIES_MAX && bytes <= WHOLE_BYTES_MAX {
        (None, Selection::Whole)
    } else {
        let mut part = Part {
            tree: &tree,
            nodes: BTreeSet::new(),
            bytes: 0,
            left_out: Vec::new(),
        };
        part.choose(facts, wishes);
        let left_out = std::mem::take(&mut part.left_out);
        (Some(part.nodes), Selection::Part { left_out })
    };
    let mut entries = Vec::new();
    for visit in tree.walk() {
        if chosen
            .as_ref()
            .is_some_and(|nodes| !nodes.contains(&visit.node))
        {
            continue;
        }
        let kind = match &visit.inode.content {
            Content::Directory => NanosKind::Directory,
            Content::File { size, .. } => NanosKind::File { size: *size },
            Content::Symlink(target) => NanosKind::Symlink {
                target: target.to_vec(),
            },
            Content::CharDevice(..) | Content::BlockDevice(..) | Content::Fifo => continue,
        };
        entries.push(NanosEntry {
            path: tree.path(visit.node),
            kind,
            executable: visit.inode.mode & 0o111 != 0,
            modified: visit.inode.mtime,
            inode: visit.inode_number,
        });
    }
    NanosTree {
        tree,
        entries,
        selection,
        layers: Vec::new(),
        limits: Limits::default(),
        _work: None,
    }
}

/// The paths that a program's configuration names, as far as they say anything: its own directory, its working directory,
/// and what stands in its arguments and environment. In the order in which they are named.
pub(crate) fn named(facts: &ProgramFacts, wishes: &Wishes<'_>) -> Vec<String> {
    let home = paths::parent(&facts.file).to_owned();
    let texts = wishes
        .argv
        .iter()
        .map(String::as_str)
        .chain(wishes.env.iter().flat_map(|it| it.value.split(':')))
        .chain([wishes.working_dir, home.as_str()]);
    let plain = texts.map(|text| {
        // `--config=/etc/x.conf` names a path too.
        let path = text
            .find('/')
            .map_or("", |at| match text.as_bytes().get(at.wrapping_sub(1)) {
                None | Some(b'=' | b',' | b':' | b'@') => &text[at..],
                Some(_) => "",
            });
        path.trim_end_matches('/')
    });
    plain
        .filter(|path| !path.is_empty() && !GENERAL.contains(path))
        .map(str::to_owned)
        .collect()
}

/// A part of a tree under selection: closed under parents and under what links lead to.
struct Part<'a> {
    tree: &'a Tree,
    nodes: BTreeSet<u32>,
    bytes: u64,
    left_out: Vec<String>,
}

impl Part<'_> {
    fn choose(&mut self, facts: &ProgramFacts, wishes: &Wishes<'_>) {
        for path in [&facts.path, &facts.executable]
            .into_iter()
            .chain(&facts.loader)
        {
            self.one(path);
        }
        let mut beside = BTreeSet::new();
        for library in &facts.libraries {
            self.one(&library.path);
            beside.insert(paths::parent(&library.path));
        }
        for dir in beside {
            for name in LOADED_LATE {
                self.one(&format!("{dir}/{name}"));
            }
        }
        for path in DIRECTORIES {
            self.one(path);
        }
        for path in NECESSITIES {
            self.all(path);
        }
        for path in named(facts, wishes) {
            self.all(&path);
        }
    }

    /// Takes what is at a path, and all that leads there.
    fn one(&mut self, path: &str) -> Option<u32> {
        if path.is_empty() {
            return None;
        }
        let found = paths::find(self.tree, "/", path)?;
        for node in &found.walked {
            self.take(*node);
        }
        Some(found.node)
    }

    fn take(&mut self, node: u32) {
        for node in self.tree.lineage(node) {
            if self.nodes.insert(node)
                && let Content::File { size, .. } = self.tree.content(node)
            {
                self.bytes = self.bytes.saturating_add(*size);
            }
        }
    }

    /// Takes what is at a path with all that is in it, unless that is too much. Links in it are followed one step.
    fn all(&mut self, path: &str) {
        let Some(top) = self.one(path) else { return };
        let mut below = Vec::new();
        let mut todo = self.tree.child_nodes(top);
        let mut bytes = self.bytes;
        while let Some(node) = todo.pop() {
            if let Content::File { size, .. } = self.tree.content(node) {
                bytes = bytes.saturating_add(*size);
            }
            below.push(node);
            let entries = (self.nodes.len() + below.len()) as u64;
            if entries > WHOLE_ENTRIES_MAX || bytes > WHOLE_BYTES_MAX.0 {
                self.left_out.push(path.to_owned());
                return;
            }
            todo.extend(self.tree.child_nodes(node));
        }
        for node in below {
            self.take(node);
            if let Content::Symlink(_) = self.tree.content(node) {
                self.one(&paths::text(self.tree, node));
            }
        }
    }
}
