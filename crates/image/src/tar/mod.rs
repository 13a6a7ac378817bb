//! Tar, read strictly and written canonically.
//!
//! The reader is for hostile input: it never panics, holds at most one bounded header in memory and refuses what it does
//! not know. The writer makes the one dialect that the packer of root disks is given.

mod read;
mod write;

pub(crate) use read::TarError;
pub use read::{Entry, EntryKind, TarReader};
pub(crate) use write::{Fields, TarWriter};
