//! Images in, root disks out.
//!
//! An image comes from a registry, an OCI layout, a `docker save` archive or a plain root file-system tar; what leaves is
//! one read-only squashfs per list of layers, and the part of the image's configuration that a machine honours.
//!
//! Invariants: no byte of an image is ever extracted onto the host's file system; every blob in the store has the digest
//! it is filed under; what a registry or an archive sent is parsed with bounds ([`Limits`]) and never panics; an image that
//! is refused leaves nothing behind.
//!
//! Beside the disk leaves what is known of a program in it (`facts`), and a disk with its files for unikernels.
//!
//! Left to others: when to pull (the caller's policy), the writable layer above the root disk, and which hypervisor fits.

mod compress;
mod credentials;
mod disk;
mod error;
mod facts;
mod image;
mod import;
mod limits;
pub mod manifest;
pub mod merge;
mod progress;
mod pull;
mod registry;
mod squashfs;
mod store;
pub mod tar;
mod unikernel;

pub use error::{ErrorKind, ImageError, Refusal};
pub use facts::Asked;
#[doc(hidden)]
pub use facts::fuzz_program;
pub use image::{Image, Layer, Pruned, PullOptions, Removed, RootDisk};
pub use limits::Limits;
pub use progress::{Progress, ProgressSink};
pub use store::{Admission, ImageStore, Missing, Parts, UnikernelDisk};
pub use unikernel::{
    NanosEntry, NanosKind, NanosTree, Selection, VisitFiles, WHOLE_BYTES_MAX, WHOLE_ENTRIES_MAX,
    Wishes,
};
