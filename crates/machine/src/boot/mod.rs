//! Boot payloads: what a monitor is told to start.
//!
//! A Linux guest is a kernel of the node's [`KernelStore`], an initramfs with our agent as `/init` and the few modules
//! that it loads itself, and a command line ([`LinuxPayload`]). Its root is the image's read-only disk, its writes go to
//! a disk from [`overlay::OverlayTemplates`]. How a monitor is started with these is the backend's business.
//!
//! A unikernel is a Nanos kernel of the node's [`NanosKernels`]; its disk is others' to make.
//!
//! Everything here blocks on files or programs: call it off the runtime's threads.

mod cpio;
mod debian;
mod elf;
mod error;
#[cfg(test)]
mod fixtures;
mod modules;
mod nanos;
pub mod overlay;
pub mod own;
mod payload;
mod program;
mod shelf;
mod store;
mod unpack;

pub(crate) use cpio::Archive;
pub(crate) use payload::CMDLINE;

pub use error::BootError;
pub use modules::StagedModule;
pub use nanos::{NanosKernel, NanosKernelRecord, NanosKernels};
pub use payload::{LinuxPayload, UpperLayer};
pub use store::{Kernel, KernelRecord, KernelStore};

/// Takes any bytes as a kernel's file and as a module's, for a fuzzer. Whatever they are, this returns.
#[doc(hidden)]
pub fn fuzz_kernel(bytes: &[u8]) {
    /// What one may unpack to.
    const UNPACKED_MAX: u64 = 1 << 20;
    // Only that these return matters.
    let _ = elf::compact_kernel(bytes);
    let _ = elf::slim_module(bytes);
    let _ = elf::module_depends(bytes);
    let _ = unpack::decompress(bytes, UNPACKED_MAX);
    let _ = unpack::bzimage_payload(bytes);
}
