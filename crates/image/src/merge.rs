//! The merged tree of an image's layers, held in memory.
//!
//! Layers are applied lowest first by the rules of the OCI image specification: whiteouts and opaque markers hide what
//! *lower* layers have and never what their own layer adds; an entry replaces whatever was at its path, except that a
//! directory over a directory keeps the children; a hard link shares the inode of its target.
//!
//! A path whose parent is a symbolic link is followed inside the image, as a container engine does that applies the layer
//! to the tree of the layers below. It can only ever lead to a place in this tree: the host's files are nowhere in sight.
//! What smells of an attack is refused all the same: a path that climbs above the root, and an entry that goes through an
//! absolute link of its own layer.
//!
//! No recursion: a tree may be as deep as the bound on paths allows.

use crate::tar::{Entry, EntryKind};
use crate::{Limits, Refusal};
use std::collections::{BTreeMap, BTreeSet};

/// Links followed for one path, as the kernel's MAXSYMLINKS.
pub(crate) const LINKS_MAX: usize = 40;
/// Bytes of one name; squashfs and every Linux file system agree.
const NAME_BYTES_MAX: usize = 255;
/// Owners and groups that a squashfs can tell apart.
const OWNERS_MAX: usize = 65_535;

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What an inode holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory.
    Directory,
    /// A file's data: which layer and which entry in it.
    File {
        /// Bytes.
        size: u64,
        /// Index of the layer.
        layer: u32,
        /// Index of the entry within that layer's tar.
        ordinal: u32,
    },
    /// A symbolic link to this target.
    Symlink(Box<[u8]>),
    /// A character device, major and minor.
    CharDevice(u32, u32),
    /// A block device, major and minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// What hard links share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// What it holds.
    pub content: Content,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Extended attributes, sorted by name; only those a root disk can hold.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug)]
struct Node {
    name: Box<[u8]>,
    parent: u32,
    inode: u32,
    /// The layer that last wrote this name.
    layer: u32,
    depth: u16,
    path_bytes: u16,
    /// Of directories.
    children: Option<BTreeMap<Box<[u8]>, u32>>,
}

/// The tree. See the module.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    inodes: Vec<Inode>,
    limits: Limits,
    xattr_bytes: u64,
    name_bytes: u64,
    devices: u64,
    layers: u32,
    /// Attributes that a root disk cannot hold and that were left out.
    xattrs_dropped: u64,
}

/// One name of the finished tree.
#[derive(Debug, Clone, Copy)]
pub struct Visit<'a> {
    /// The node; see [`Tree::path`].
    pub node: u32,
    /// The inode's number: equal for hard links of one another.
    pub inode_number: u32,
    /// The inode.
    pub inode: &'a Inode,
}

pub(crate) const ROOT: u32 = 0;

impl Tree {
    /// A root directory and nothing in it.
    pub fn new(limits: &Limits) -> Tree {
        let root = Node {
            name: Box::default(),
            parent: ROOT,
            inode: 0,
            layer: 0,
            depth: 0,
            path_bytes: 0,
            children: Some(BTreeMap::new()),
        };
        Tree {
            nodes: vec![root],
            inodes: vec![directory_inode(0o755)],
            limits: limits.clone(),
            xattr_bytes: 0,
            name_bytes: 0,
            devices: 0,
            layers: 0,
            xattrs_dropped: 0,
        }
    }

    /// Puts a layer's entries, in the order of its tar, above what is there. After an error the tree is of no use.
    pub fn apply_layer(&mut self, entries: Vec<Entry>) -> Result<(), Refusal> {
        let layer = self.layers;
        self.layers += 1;
        for entry in &entries {
            let (parents, name) = split(&entry.path)?;
            if let Some(name) = name.filter(|name| name.starts_with(WHITEOUT)) {
                self.whiteout(entry, &parents, name, layer)?;
            }
        }
        for (ordinal, entry) in entries.into_iter().enumerate() {
            let ordinal = u32::try_from(ordinal).map_err(|_| self.too_many())?;
            self.add(entry, layer, ordinal)?;
        }
        Ok(())
    }

    /// Makes the directories that a Linux guest mounts on, where the image has nothing of that name.
    pub fn add_mount_points(&mut self) -> Result<(), Refusal> {
        for (name, mode) in [
            ("dev", 0o755),
            ("etc", 0o755),
            ("proc", 0o555),
            ("run", 0o755),
            ("sys", 0o555),
            ("tmp", 0o1777),
        ] {
            if self.child(ROOT, name.as_bytes()).is_none() {
                self.insert(ROOT, name.as_bytes(), directory_inode(mode), self.layers)?;
            }
        }
        let mut owners = BTreeSet::new();
        for visit in self.walk() {
            owners.insert(visit.inode.uid);
            owners.insert(visit.inode.gid);
        }
        if owners.len() > OWNERS_MAX {
            return Err(Refusal::Limit {
                what: "different owners and groups",
                limit: OWNERS_MAX as u64,
            });
        }
        Ok(())
    }

    /// The root directory's inode.
    pub fn root(&self) -> &Inode {
        &self.inodes[0]
    }

    /// How many extended attributes were left out because a root disk cannot hold them.
    pub fn xattrs_dropped(&self) -> u64 {
        self.xattrs_dropped
    }

    /// The inode of this number.
    pub fn inode(&self, number: u32) -> &Inode {
        &self.inodes[number as usize]
    }

    /// The number of a node's inode.
    pub fn inode_number(&self, node: u32) -> u32 {
        self.nodes[node as usize].inode
    }

    /// All names but the root's: parents before children, children by the order of their bytes.
    pub fn walk(&self) -> impl Iterator<Item = Visit<'_>> {
        let mut stack = vec![self.child_nodes(ROOT)];
        std::iter::from_fn(move || {
            loop {
                let node = match stack.last_mut()?.pop() {
                    Some(node) => node,
                    None => {
                        stack.pop();
                        continue;
                    }
                };
                stack.push(self.child_nodes(node));
                let inode_number = self.nodes[node as usize].inode;
                return Some(Visit {
                    node,
                    inode_number,
                    inode: &self.inodes[inode_number as usize],
                });
            }
        })
    }

    /// Children in reverse order, as a stack takes them.
    pub(crate) fn child_nodes(&self, node: u32) -> Vec<u32> {
        match &self.nodes[node as usize].children {
            Some(children) => children.values().rev().copied().collect(),
            None => Vec::new(),
        }
    }

    /// A node's path without a leading slash.
    pub fn path(&self, node: u32) -> Vec<u8> {
        let mut names = Vec::new();
        let mut current = node;
        while current != ROOT {
            let node = &self.nodes[current as usize];
            names.push(&node.name[..]);
            current = node.parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// A node and the directories above it, without the root.
    pub(crate) fn lineage(&self, node: u32) -> impl Iterator<Item = u32> {
        let above = move |node: &u32| Some(self.nodes[*node as usize].parent);
        std::iter::successors(Some(node), above).take_while(|node| *node != ROOT)
    }

    fn too_many(&self) -> Refusal {
        Refusal::Limit {
            what: "files and directories",
            limit: self.limits.entries_max,
        }
    }

    /// A directory's child of this name.
    pub(crate) fn child(&self, node: u32, name: &[u8]) -> Option<u32> {
        self.nodes[node as usize]
            .children
            .as_ref()?
            .get(name)
            .copied()
    }

    /// What a node's inode holds.
    pub(crate) fn content(&self, node: u32) -> &Content {
        &self.inodes[self.nodes[node as usize].inode as usize].content
    }

    /// Follows the parents of a path from the root. Without `create`, `None` where something is missing or not a directory.
    fn resolve(
        &mut self,
        entry: &Entry,
        parents: &[&[u8]],
        layer: u32,
        create: bool,
    ) -> Result<Option<u32>, Refusal> {
        let mut todo: Vec<Box<[u8]>> = parents.iter().rev().map(|part| Box::from(*part)).collect();
        let mut current = ROOT;
        let mut links = 0;
        while let Some(part) = todo.pop() {
            match &part[..] {
                b"" | b"." => continue,
                b".." => {
                    if current == ROOT {
                        return Err(refuse(&entry.path, "leads out of the image through a link"));
                    }
                    current = self.nodes[current as usize].parent;
                    continue;
                }
                _ => {}
            }
            let Some(child) = self.child(current, &part) else {
                if !create {
                    return Ok(None);
                }
                check_name(&entry.path, &part)?;
                current = self.insert(current, &part, directory_inode(0o755), layer)?;
                continue;
            };
            match self.content(child) {
                Content::Directory => current = child,
                Content::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(refuse(&entry.path, "goes through too many links"));
                    }
                    if target.starts_with(b"/") {
                        if self.nodes[child as usize].layer == layer {
                            return Err(refuse(
                                &entry.path,
                                "goes through an absolute link of its own layer",
                            ));
                        }
                        current = ROOT;
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev().map(Box::from));
                }
                _ if create => {
                    return Err(refuse(
                        &entry.path,
                        "lies below something that is no directory",
                    ));
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(current))
    }

    fn whiteout(
        &mut self,
        entry: &Entry,
        parents: &[&[u8]],
        name: &[u8],
        layer: u32,
    ) -> Result<(), Refusal> {
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refuse(&entry.path, "is a whiteout of no name"));
        }
        let Some(parent) = self.resolve(entry, parents, layer, false)? else {
            return Ok(());
        };
        let Some(children) = &mut self.nodes[parent as usize].children else {
            return Ok(());
        };
        // Nothing of this layer is in the tree yet, so that all there is belongs to lower ones.
        if name == OPAQUE {
            children.clear();
        } else if !name.starts_with(WHITEOUT_META) {
            children.remove(hidden);
        }
        Ok(())
    }

    fn add(&mut self, entry: Entry, layer: u32, ordinal: u32) -> Result<(), Refusal> {
        let (parents, name) = split(&entry.path)?;
        let Some(name) = name else {
            if entry.kind != EntryKind::Directory {
                return Err(refuse(&entry.path, "would replace the root directory"));
            }
            self.inodes[0] = self.inode_of(&entry, Content::Directory)?;
            return Ok(());
        };
        if name.starts_with(WHITEOUT) {
            return Ok(());
        }
        if parents.len() + 1 > self.limits.path_depth_max {
            return Err(self.too_deep());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(refuse(&entry.path, "lies below a whiteout"));
        }
        check_name(&entry.path, name)?;
        let Some(parent) = self.resolve(&entry, &parents, layer, true)? else {
            return Err(refuse(&entry.path, "has no parent directory"));
        };
        let content = match entry.kind {
            EntryKind::Directory => Content::Directory,
            EntryKind::File => Content::File {
                size: entry.size,
                layer,
                ordinal,
            },
            EntryKind::Symlink => {
                if entry.link.is_empty() {
                    return Err(refuse(&entry.path, "is a link to nothing"));
                }
                Content::Symlink(Box::from(&entry.link[..]))
            }
            EntryKind::CharDevice => Content::CharDevice(entry.device.0, entry.device.1),
            EntryKind::BlockDevice => Content::BlockDevice(entry.device.0, entry.device.1),
            EntryKind::Fifo => Content::Fifo,
            EntryKind::HardLink => return self.hard_link(&entry, parent, name, layer),
        };
        if matches!(content, Content::CharDevice(..) | Content::BlockDevice(..)) {
            self.devices += 1;
            if self.devices > self.limits.devices_max {
                return Err(Refusal::Limit {
                    what: "device nodes",
                    limit: self.limits.devices_max,
                });
            }
        }
        let is_directory = content == Content::Directory;
        let inode = self.inode_of(&entry, content)?;
        if let Some(existing) = self.child(parent, name)
            && is_directory
            && self.nodes[existing as usize].children.is_some()
        {
            let node = &mut self.nodes[existing as usize];
            node.layer = layer;
            self.inodes[node.inode as usize] = inode;
            return Ok(());
        }
        self.insert(parent, name, inode, layer)?;
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        parent: u32,
        name: &[u8],
        layer: u32,
    ) -> Result<(), Refusal> {
        // An absolute target means the image's root, as container engines take it.
        let relative = entry.link.strip_prefix(b"/").unwrap_or(&entry.link);
        let (target_parents, target_name) = split(relative)
            .map_err(|_| refuse(&entry.path, "is a hard link to something outside the image"))?;
        let Some(target_name) = target_name else {
            return Err(refuse(&entry.path, "is a hard link to a directory"));
        };
        let target = match self.resolve(entry, &target_parents, layer, false)? {
            Some(target_parent) => self.child(target_parent, target_name),
            None => None,
        };
        let Some(target) = target else {
            return Err(refuse(&entry.path, "is a hard link to something missing"));
        };
        if self.nodes[target as usize].children.is_some() {
            return Err(refuse(&entry.path, "is a hard link to a directory"));
        }
        if self.child(parent, name) == Some(target) {
            return Err(refuse(&entry.path, "is a hard link to itself"));
        }
        let inode = self.nodes[target as usize].inode;
        self.insert_node(parent, name, inode, layer, false)?;
        Ok(())
    }

    fn inode_of(&mut self, entry: &Entry, content: Content) -> Result<Inode, Refusal> {
        let mut xattrs = Vec::new();
        for (name, value) in &entry.xattrs {
            if !is_kept(name) {
                self.xattrs_dropped += 1;
                continue;
            }
            self.xattr_bytes += (name.len() + value.len()) as u64;
            if self.xattr_bytes > self.limits.xattrs_bytes_max.0 {
                return Err(Refusal::Limit {
                    what: "bytes of extended attributes",
                    limit: self.limits.xattrs_bytes_max.0,
                });
            }
            xattrs.push((name.clone(), value.clone()));
        }
        xattrs.sort();
        Ok(Inode {
            content,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
        })
    }

    fn insert(
        &mut self,
        parent: u32,
        name: &[u8],
        inode: Inode,
        layer: u32,
    ) -> Result<u32, Refusal> {
        let is_directory = inode.content == Content::Directory;
        let number = u32::try_from(self.inodes.len()).map_err(|_| self.too_many())?;
        self.inodes.push(inode);
        self.insert_node(parent, name, number, layer, is_directory)
    }

    /// Puts a new node at a name; what was there, with all below it, is no longer reached.
    fn insert_node(
        &mut self,
        parent: u32,
        name: &[u8],
        inode: u32,
        layer: u32,
        is_directory: bool,
    ) -> Result<u32, Refusal> {
        if self.nodes.len() as u64 > self.limits.entries_max {
            return Err(self.too_many());
        }
        let number = u32::try_from(self.nodes.len()).map_err(|_| self.too_many())?;
        let above = &self.nodes[parent as usize];
        let depth = usize::from(above.depth) + 1;
        let path_bytes = usize::from(above.path_bytes) + name.len() + 1;
        if depth > self.limits.path_depth_max {
            return Err(self.too_deep());
        }
        let (Ok(depth), Ok(path_bytes), true) = (
            u16::try_from(depth),
            u16::try_from(path_bytes),
            path_bytes <= self.limits.path_bytes_max,
        ) else {
            return Err(Refusal::Limit {
                what: "bytes in one path",
                limit: self.limits.path_bytes_max as u64,
            });
        };
        // Links let a short path imply directories of long names again and again, each hidden by the next.
        self.name_bytes += name.len() as u64;
        if self.name_bytes > self.limits.names_bytes_max.0 {
            return Err(Refusal::Limit {
                what: "bytes of names of files and directories",
                limit: self.limits.names_bytes_max.0,
            });
        }
        self.nodes.push(Node {
            name: Box::from(name),
            parent,
            inode,
            layer,
            depth,
            path_bytes,
            children: is_directory.then(BTreeMap::new),
        });
        if let Some(children) = &mut self.nodes[parent as usize].children {
            children.insert(Box::from(name), number);
        }
        Ok(number)
    }

    fn too_deep(&self) -> Refusal {
        Refusal::Limit {
            what: "directories in one path",
            limit: self.limits.path_depth_max as u64,
        }
    }
}

/// Attributes that squashfs can hold, without those by which an image could speak to the overlay that will lie above it.
fn is_kept(name: &[u8]) -> bool {
    let namespace = [&b"user."[..], b"security.", b"trusted."]
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    namespace && !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay.")
}

fn directory_inode(mode: u32) -> Inode {
    Inode {
        content: Content::Directory,
        mode,
        uid: 0,
        gid: 0,
        mtime: 0,
        xattrs: Vec::new(),
    }
}

fn refuse(path: &[u8], why: &'static str) -> Refusal {
    // A path is shown whole up to here; the rest is of no help to anyone.
    const SHOWN: usize = 200;
    let shown = &path[..path.len().min(SHOWN)];
    Refusal::Entry {
        path: String::from_utf8_lossy(shown).into_owned(),
        why,
    }
}

fn check_name(path: &[u8], name: &[u8]) -> Result<(), Refusal> {
    if name.len() > NAME_BYTES_MAX {
        return Err(refuse(path, "has a name of more than 255 bytes"));
    }
    Ok(())
}

/// A path's parents and its last name; no name for the root itself.
type Split<'a> = (Vec<&'a [u8]>, Option<&'a [u8]>);

fn split(path: &[u8]) -> Result<Split<'_>, Refusal> {
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(refuse(path, "leads out of the image")),
            _ => parts.push(part),
        }
    }
    if path.starts_with(b"/") && !parts.is_empty() {
        return Err(refuse(path, "is an absolute path"));
    }
    let name = parts.pop();
    Ok((parts, name))
}
