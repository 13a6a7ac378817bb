//! Finds paths in the merged tree as the guest's kernel would: links are followed inside the image, and `..` of the root
//! is the root. Nothing here is ever a path of the host.

use crate::merge::{Content, LINKS_MAX, ROOT, Tree};

/// Components that one lookup walks, those of links included: beyond any real path, and a bound for hostile ones.
const STEPS_MAX: usize = 1024;

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// The node that the path ends at, links followed.
    pub(crate) node: u32,
    /// All nodes that were walked over, links and directories, without the root; `node` last.
    pub(crate) walked: Vec<u32>,
}

/// Follows a path. A relative one begins at `from`, which is a path itself.
pub(crate) fn find(tree: &Tree, from: &str, path: &str) -> Option<Found> {
    let whole = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{from}/{path}")
    };
    let mut todo: Vec<Box<[u8]>> = parts(whole.as_bytes()).collect();
    // The directories from the root to where we are: a parent is the one before, whatever links led here.
    let mut place: Vec<u32> = vec![ROOT];
    let mut walked = Vec::new();
    let (mut links, mut steps) = (0, 0);
    while let Some(part) = todo.pop() {
        steps += 1;
        if steps > STEPS_MAX {
            return None;
        }
        match &part[..] {
            b"" | b"." => continue,
            b".." => {
                if place.len() > 1 {
                    place.pop();
                }
                continue;
            }
            _ => {}
        }
        let here = place.last().copied()?;
        let child = tree.child(here, &part)?;
        walked.push(child);
        match tree.content(child) {
            Content::Symlink(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return None;
                }
                if target.starts_with(b"/") {
                    place.truncate(1);
                }
                todo.extend(parts(target));
            }
            Content::Directory => place.push(child),
            _ if todo.iter().any(|part| !part.is_empty()) => return None,
            _ => {
                return Some(Found {
                    node: child,
                    walked,
                });
            }
        }
    }
    let node = place.last().copied()?;
    Some(Found { node, walked })
}

/// A path's parts, the last first, as a stack takes them.
fn parts(path: &[u8]) -> impl Iterator<Item = Box<[u8]>> {
    path.split(|byte| *byte == b'/').rev().map(Box::from)
}

/// The node's path as text, beginning with `/`.
pub(crate) fn text(tree: &Tree, node: u32) -> String {
    format!("/{}", String::from_utf8_lossy(&tree.path(node)))
}

/// The directory part of a path.
pub(crate) fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

/// Whether a node is a regular file that somebody may execute.
pub(crate) fn is_executable(tree: &Tree, node: u32) -> bool {
    matches!(tree.content(node), Content::File { .. })
        && tree.inode(tree.inode_number(node)).mode & 0o111 != 0
}
