//! TFS, version 5: the file system of Nanos. One log of tuples describes the whole tree; file contents lie beside it.
//!
//! A disk's sector has 512 bytes; sectors are counted from the start of the file system. There are no checksums: a damaged
//! log is noticed only where it contradicts itself.
//!
//! [`Writer`] makes a new file system in one pass; [`Reader`] reads one that this crate, `mkfs` or the Nanos kernel itself
//! wrote. Neither changes an existing file system: the kernel alone does that.

mod content;
mod encoding;
mod error;
mod graph;
mod label;
mod log;
mod reader;
mod store;
mod value;
mod writer;

pub use content::Content;
pub use error::{ReadError, WriteError};
pub use label::{Label, LabelError, VolumeId};
pub use reader::{Entry, FileHandle, Limits, Node, NodeId, Reader};
pub use value::Value;
pub use writer::{Directory, File, Writer, Written};

/// Bytes of a sector, the unit of every address in TFS.
pub const SECTOR_BYTES: u64 = 512;
/// Directories below one another that [`Writer`] accepts. The kernel walks the tree by recursion on a stack of fixed size.
pub const DEPTH_MAX: u32 = 128;
/// Bytes of one name, as on Linux.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of a symbolic link's target: Linux' PATH_MAX.
pub const TARGET_BYTES_MAX: usize = 4096;
