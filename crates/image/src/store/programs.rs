//! Facts of programs, and trees for unikernels: looked up in the store, or made from an image's layers.
//!
//! All of it blocks, unpacks layers and belongs on a blocking thread.

use super::ImageStore;
use super::files::Files;
use crate::disk::{self, LayerFile};
use crate::facts::{self, Asked, Cache, read::Layers};
use crate::unikernel::{self, NanosTree, Wishes};
use crate::{Image, ImageError};
use std::fs;
use vistara_model::{Correction, Digest, ImageFacts, ProgramFacts};

impl ImageStore {
    /// What is known of one program of an image; looked at the first time, and remembered with the image.
    ///
    /// Blocks. When remembered: one small file is read. Else the image's layers are unpacked five or six times in memory,
    /// at some hundreds of MB a second, and the largest file of the program (at most 384 MiB) is held meanwhile. Two callers
    /// that ask for the same at once both do the work; both get the same.
    ///
    /// A program that is missing or cannot be understood is no error but a fact.
    ///
    /// # Errors
    /// Where the store cannot be read or an image's layer is damaged.
    pub fn program_facts(
        &self,
        image: &Image,
        asked: &Asked<'_>,
    ) -> Result<ImageFacts, ImageError> {
        if let Some(known) = self.known_program_facts(image, asked)? {
            return Ok(known);
        }
        let _work = self.files.work_blocking()?;
        let layers = self.layer_files(image);
        let tree = disk::tree(&layers, &self.limits)?;
        let mut source = Layers {
            layers: &layers,
            limits: &self.limits,
        };
        let program = facts::look(&tree, &mut source, asked)?;
        let counted = facts::count(&tree);
        let cache = self.change(&image.id, |cache| {
            cache.put(asked, program, counted);
        })?;
        cache
            .get(asked)
            .ok_or_else(|| ImageError::Internal("facts were lost on the way".to_owned()))
    }

    /// What [`ImageStore::program_facts`] found before, if it did: at the price of reading a small file.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn known_program_facts(
        &self,
        image: &Image,
        asked: &Asked<'_>,
    ) -> Result<Option<ImageFacts>, ImageError> {
        Ok(read(&self.files, &image.id)?.get(asked))
    }

    /// Remembers that practice showed a program to need what its facts did not say. `file` is
    /// [`ProgramFacts::file`]; the correction is in every later answer of [`ImageStore::program_facts`] for it, or where `only`
    /// is given, in those for that command line; after some of these, in all.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn correct(
        &self,
        image: &Digest,
        file: &str,
        only: Option<&Asked<'_>>,
        correction: &Correction,
    ) -> Result<(), ImageError> {
        self.change(image, |cache| cache.correct(file, only, correction))?;
        Ok(())
    }

    /// What a unikernel's disk has to hold for this program: see [`NanosTree`].
    ///
    /// Blocks: the layers are unpacked once here, and once more by [`NanosTree::read`].
    ///
    /// # Errors
    /// Where the store cannot be read or an image's layer is damaged.
    pub fn nanos_tree(
        &self,
        image: &Image,
        facts: &ProgramFacts,
        wishes: &Wishes<'_>,
    ) -> Result<NanosTree, ImageError> {
        let work = self.files.work_blocking()?;
        let layers = self.layer_files(image);
        let tree = disk::tree(&layers, &self.limits)?;
        Ok(
            unikernel::select(tree, facts, wishes).with_layers(
                layers,
                (*self.limits).clone(),
                work,
            ),
        )
    }

    /// An image's layers as files of the store.
    pub(super) fn layer_files(&self, image: &Image) -> Vec<LayerFile> {
        image
            .layers
            .iter()
            .map(|layer| LayerFile {
                path: self.files.blob(&layer.digest),
                digest: layer.digest.clone(),
                size: layer.size_bytes,
                diff_id: Some(layer.diff_id.clone()),
            })
            .collect()
    }

    /// Changes what is remembered of an image, as it is at this moment.
    fn change(&self, image: &Digest, change: impl FnOnce(&mut Cache)) -> Result<Cache, ImageError> {
        let _index = self.files.index()?;
        let mut cache = read(&self.files, image)?;
        change(&mut cache);
        let path = self.files.facts(image);
        let content = serde_json::to_vec(&cache)
            .map_err(|error| ImageError::Internal(format!("facts cannot be written: {error}")))?;
        // An image that was removed in the meantime leaves no facts behind.
        if self.files.record(image).exists() {
            self.files.replace(&path, &content)?;
        }
        Ok(cache)
    }
}

fn read(files: &Files, image: &Digest) -> Result<Cache, ImageError> {
    let path = files.facts(image);
    match fs::read(&path) {
        Ok(content) => Ok(Cache::parse(&content).unwrap_or_else(|| {
            tracing::warn!(path = %path.display(), "facts of an image cannot be understood; they are gathered anew");
            Cache::empty()
        })),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Cache::empty()),
        Err(error) => Err(ImageError::io("read", &path, error)),
    }
}
