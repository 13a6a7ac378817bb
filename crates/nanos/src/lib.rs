//! The bytes of a Nanos disk: the file system TFS, the manifest in its root, the disk around it, the kernel's log record,
//! and what a kernel file needs before a monitor can start it. The format is in `docs/formats/nanos-disk.md`.
//!
//! Invariants: nothing here has a clock, a socket, a random source or a path on the host: callers give readers, writers and
//! identities; what is read from a disk or a kernel file is parsed with bounds ([`tfs::Limits`]) and never panics; what the
//! writer produces, the reader reads back as the same tree.
//!
//! Left to others: which files travel (the image crate), how a machine is started (the machine crate), and whether Nanos
//! fits at all (`control`).

pub mod calls;
pub mod disk;
pub mod kernel;
pub mod klog;
pub mod manifest;
pub mod memory;
mod remaster;
pub mod tfs;

pub use disk::{BootDisk, DiskError, DiskOptions, Geometry, PartitionTable, Volume};
pub use kernel::{KernelError, KernelFacts};
pub use klog::{KlogError, Record};
pub use manifest::{Manifest, ManifestError};
pub use memory::{MachineKind, MemoryFacts, safe_size};
pub use remaster::{BootFiles, Changes, RemasterError, remaster};
