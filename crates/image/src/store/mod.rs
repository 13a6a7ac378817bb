//! The image store: a directory of blobs, records and root disks, and what can be done with it.
//!
//! Invariants: a blob or disk that has its final name is whole; a record is written after everything it names; what an
//! operation added is removed if the operation is refused. Two callers who want the same thing share the work.

mod complete;
mod files;
mod guest;
mod parts;
mod programs;
mod records;
mod sweep;
mod unikernel_disk;

pub(crate) use complete::{Added, Arrived, ArrivedConfig, blocking, complete};
pub(crate) use files::{Files, Guard, publish_path};
pub use guest::Admission;
pub(crate) use guest::admit;
pub use parts::{Missing, Parts};
pub use unikernel_disk::UnikernelDisk;

use crate::disk;
use crate::{Image, ImageError, Limits, ProgressSink, Pruned, PullOptions, Removed, RootDisk};
use crate::{import, pull};
use records::Index;
use std::path::Path;
use std::sync::Arc;
use vistara_model::{Digest, ImageConfig, ImageRef};

/// A directory of images. Cheap to clone; several processes may share the directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    files: Arc<Files>,
    limits: Arc<Limits>,
    /// Whom it works for, where that is not its owner.
    guest: Option<Arc<dyn Admission>>,
}

impl ImageStore {
    /// Opens or makes the store in this directory, and clears away what a crash left half made.
    pub fn open(root: &Path, limits: Limits) -> Result<ImageStore, ImageError> {
        Ok(ImageStore {
            files: Arc::new(Files::open(root)?),
            limits: Arc::new(limits),
            guest: None,
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
        let added = Added::default();
        let pulled = async {
            let work = Arc::new(self.files.work().await?);
            let guest = self.guest.as_ref();
            let (files, limits) = (&self.files, &self.limits);
            let arrived = pull::pull(files, limits, name, options, guest, &added, progress).await?;
            complete(files, limits, arrived, work, &added, guest, progress).await
        };
        let result = pulled.await;
        self.undone(result, added).await
    }

    /// Takes in an OCI layout (directory or tar), a `docker save` archive or a plain root file-system tar, each possibly
    /// compressed with gzip or zstd, and builds its root disk.
    ///
    /// `name` overrides the names in the archive, and chooses where it holds several images. `config` is what a plain root
    /// file-system tar is given for its configuration, and is an error for the other kinds.
    pub async fn import(
        &self,
        source: &Path,
        name: Option<&ImageRef>,
        config: Option<ImageConfig>,
        progress: &ProgressSink,
    ) -> Result<Image, ImageError> {
        let added = Added::default();
        let imported = async {
            let work = Arc::new(self.files.work().await?);
            let request = import::Request {
                source: source.to_owned(),
                name: name.cloned(),
                config,
            };
            let (files, limits) = (Arc::clone(&self.files), Arc::clone(&self.limits));
            let (blobs, held) = (added.clone(), Arc::clone(&work));
            let guest = self.guest.clone();
            let arrived = blocking(move |cancel| {
                let _held = held;
                let arrived = import::import(&files, &limits, request, &blobs, cancel)?;
                guest::admit_added(guest.as_ref(), &files, &blobs)?;
                Ok(arrived)
            })
            .await?;
            let (files, limits, guest) = (&self.files, &self.limits, self.guest.as_ref());
            complete(files, limits, arrived, work, &added, guest, progress).await
        };
        let result = imported.await;
        self.undone(result, added).await
    }

    /// After a failure, takes away what was added.
    async fn undone(
        &self,
        result: Result<Image, ImageError>,
        added: Added,
    ) -> Result<Image, ImageError> {
        let Err(error) = result else {
            return result;
        };
        let (files, cause) = (Arc::clone(&self.files), error.clone());
        blocking(move |_| {
            added.undo(&files, &cause);
            Ok(())
        })
        .await?;
        Err(error)
    }

    /// The image of this full name, familiar name, digest (of the image or its manifest) or unambiguous id prefix.
    pub fn find(&self, name_or_id: &str) -> Result<Option<Image>, ImageError> {
        let index = Index::read(&self.files)?;
        let found = index.find(name_or_id)?;
        Ok(found.map(|(_, record)| index.image(&self.files, record)))
    }

    /// The image of exactly this name.
    pub fn get(&self, name: &ImageRef) -> Result<Option<Image>, ImageError> {
        let index = Index::read(&self.files)?;
        let record = index.names.get(name).and_then(|id| index.records.get(id));
        Ok(record.map(|record| index.image(&self.files, record)))
    }

    /// All images, by their first name and then their id; those without a name last.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let index = Index::read(&self.files)?;
        let mut images: Vec<Image> = index
            .records
            .values()
            .map(|record| index.image(&self.files, record))
            .collect();
        images.sort_by(|a, b| {
            let key = |image: &Image| (image.names.is_empty(), image.names.first().cloned());
            key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
        });
        Ok(images)
    }

    /// Gives an image one more name, which another image may lose by it.
    pub fn tag(&self, name_or_id: &str, new: &ImageRef) -> Result<Image, ImageError> {
        let guard = self.files.index()?;
        let mut index = Index::read(&self.files)?;
        let Some((_, record)) = index.find(name_or_id)? else {
            return Err(ImageError::NotFound(name_or_id.to_owned()));
        };
        let record = record.clone();
        index.names.insert(new.clone(), record.id.clone());
        index.write_names(&self.files, &guard)?;
        Ok(index.image(&self.files, &record))
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
        sweep::remove(&self.files, name_or_id, in_use, force)
    }

    /// Removes every image that has no name and is not in use (`all`: also those with names), and every blob, partial
    /// download and root disk that belongs to no image.
    pub fn prune(&self, in_use: &dyn Fn(&Digest) -> bool, all: bool) -> Result<Pruned, ImageError> {
        sweep::prune(&self.files, in_use, all)
    }

    /// The image's root disk, built if it is missing.
    pub async fn root_disk(
        &self,
        image: &Image,
        progress: &ProgressSink,
    ) -> Result<RootDisk, ImageError> {
        let diff_ids: Vec<Digest> = image.layers.iter().map(|it| it.diff_id.clone()).collect();
        let key = complete::disk_key(&diff_ids);
        let place = self.files.disk(&key);
        let ready = || {
            std::fs::metadata(&place).ok().map(|meta| RootDisk {
                path: place.clone(),
                bytes: meta.len(),
            })
        };
        if let Some(disk) = ready() {
            return Ok(disk);
        }
        let work = self.files.work().await?;
        let guard = self.files.keyed(&format!("disk:{key}")).await?;
        if let Some(disk) = ready() {
            return Ok(disk);
        }
        let layers = self.layer_files(image);
        let (files, limits) = (Arc::clone(&self.files), Arc::clone(&self.limits));
        let progress = progress.clone();
        blocking(move |cancel| {
            let _held = (work, guard);
            progress.report(crate::Progress::Verifying);
            let (tree, _) = disk::index(&layers, &limits, cancel)?;
            complete::build(&files, &limits, &tree, &layers, &key, cancel, &progress)
        })
        .await
    }
}
