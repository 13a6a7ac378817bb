//! The image store.

use crate::{Image, ImageError, Limits, ProgressSink, Pruned, PullOptions, Removed, RootDisk};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vistara_model::{Digest, ImageConfig, ImageRef};

/// A directory of images. Cheap to clone; several processes may share the directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    limits: Limits,
}

fn unwritten() -> ImageError {
    ImageError::Internal("not written yet".to_owned())
}

impl ImageStore {
    /// Opens or makes the store in this directory, and clears away what a crash left half made.
    pub fn open(root: &Path, limits: Limits) -> Result<ImageStore, ImageError> {
        Ok(ImageStore {
            inner: Arc::new(Inner {
                root: root.to_owned(),
                limits,
            }),
        })
    }

    /// Fetches an image from its registry and builds its root disk. What is here already is not fetched again; an
    /// interrupted pull is taken up where it stopped; concurrent pulls share their work.
    ///
    /// Always asks the registry: whether to use what is here is the caller's policy.
    pub async fn pull(
        &self,
        name: &ImageRef,
        options: &PullOptions,
        progress: &ProgressSink,
    ) -> Result<Image, ImageError> {
        let _ = (
            name,
            options,
            progress,
            &self.inner.root,
            &self.inner.limits,
        );
        Err(unwritten())
    }

    /// Takes in an OCI layout (directory or tar), a `docker save` archive or a plain root file-system tar, each possibly
    /// compressed with gzip or zstd, and builds its root disk.
    ///
    /// `name` overrides the names in the archive; `config` is what a plain root file-system tar is given for its
    /// configuration, and is an error for the other kinds.
    pub async fn import(
        &self,
        source: &Path,
        name: Option<&ImageRef>,
        config: Option<ImageConfig>,
        progress: &ProgressSink,
    ) -> Result<Image, ImageError> {
        let _ = (source, name, config, progress);
        Err(unwritten())
    }

    /// The image of this full name, familiar name, digest (of the image or its manifest) or unambiguous id prefix.
    pub fn find(&self, name_or_id: &str) -> Result<Option<Image>, ImageError> {
        let _ = name_or_id;
        Err(unwritten())
    }

    /// The image of exactly this name.
    pub fn get(&self, name: &ImageRef) -> Result<Option<Image>, ImageError> {
        let _ = name;
        Err(unwritten())
    }

    /// All images, by their first name and then their id.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        Err(unwritten())
    }

    /// Gives an image one more name, which another image may lose by it.
    pub fn tag(&self, name_or_id: &str, new: &ImageRef) -> Result<Image, ImageError> {
        let _ = (name_or_id, new);
        Err(unwritten())
    }

    /// Takes a name away, and the image with its last name. By id, the image with all its names, for which `force` is
    /// needed when there are several. `in_use` answers, by image id, whether a machine still needs it; such an image is
    /// never removed, but with `force` it may lose its names.
    pub fn remove(
        &self,
        name_or_id: &str,
        in_use: &dyn Fn(&Digest) -> bool,
        force: bool,
    ) -> Result<Removed, ImageError> {
        let _ = (name_or_id, in_use, force);
        Err(unwritten())
    }

    /// Removes every image that has no name and is not in use (`all`: also those with names), and every blob, partial
    /// download and root disk that belongs to no image.
    pub fn prune(&self, in_use: &dyn Fn(&Digest) -> bool, all: bool) -> Result<Pruned, ImageError> {
        let _ = (in_use, all);
        Err(unwritten())
    }

    /// The image's root disk, built if it is missing.
    pub async fn root_disk(
        &self,
        image: &Image,
        progress: &ProgressSink,
    ) -> Result<RootDisk, ImageError> {
        let _ = (image, progress);
        Err(unwritten())
    }
}
