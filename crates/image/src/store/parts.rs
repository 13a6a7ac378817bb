//! An image's parts, as one store gives them to another: its documents whole, its layers by digest, in pieces.
//!
//! Nothing is taken on another's word: a layer has its place in the store only with the digest by which it was asked for,
//! and the image is put together from checked parts in the way of every import. What arrived before a cut stays, and is
//! gone on from.

use super::guest::admit_added;
use super::{Added, Arrived, ArrivedConfig, Files, ImageStore, blocking, complete, publish_path};
use crate::compress::digest_of;
use crate::disk::LayerFile;
use crate::manifest::{self, Document};
use crate::pull::{DISK_RATIO, check_platform, open_partial};
use crate::{Image, ImageError, Limits, ProgressSink, Refusal};
use sha2::Digest as _;
use std::fs::{self, File, OpenOptions};
use std::sync::Arc;
use tokio::sync::mpsc;
use vistara_model::{Architecture, Bytes, Digest, ImageRef};

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// Its configuration, whole; its digest is the image's id.
    pub config: Vec<u8>,
    /// Its manifest, whole, where it came with one.
    pub manifest: Option<Vec<u8>>,
    /// Its layers' blobs, lowest first, with their lengths.
    pub layers: Vec<(Digest, u64)>,
}

/// A layer that is not here, or not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub digest: Digest,
    /// Its length.
    pub bytes: u64,
    /// How much of it is here.
    pub have_bytes: u64,
}

impl Parts {
    /// The image's id.
    pub fn id(&self) -> Digest {
        digest_of(&self.config)
    }

    /// Whether they make one image that runs here, before anything of it is taken.
    fn check(&self, limits: &Limits) -> Result<manifest::ConfigFile, ImageError> {
        let subject = format!("image {}", self.id().short());
        let refused = |why| ImageError::refused(subject.clone(), why);
        let limit = |what, limit| refused(Refusal::Limit { what, limit });
        let document_max = limits.manifest_bytes_max.0;
        let documents = [Some(&self.config), self.manifest.as_ref()];
        if (documents.into_iter().flatten()).any(|bytes| bytes.len() as u64 > document_max) {
            return Err(limit("bytes in one document", document_max));
        }
        if self.layers.len() > limits.layers_max {
            return Err(limit("layers", limits.layers_max as u64));
        }
        let all = (self.layers.iter()).try_fold(0_u64, |sum, (_, bytes)| sum.checked_add(*bytes));
        if all.is_none_or(|all| all > limits.image_bytes_max.0) {
            return Err(limit("bytes of layers", limits.image_bytes_max.0));
        }
        let file = manifest::parse_config(&self.config).map_err(refused)?;
        check_platform(
            &subject,
            &file.os,
            &file.architecture,
            &Architecture::host(),
        )?;
        if file.diff_ids.len() != self.layers.len() {
            return Err(refused(Refusal::LayerCount {
                manifest: self.layers.len(),
                config: file.diff_ids.len(),
            }));
        }
        let Some(bytes) = &self.manifest else {
            return Ok(file);
        };
        let parsed = manifest::parse_document(bytes, None).map_err(refused)?;
        let Document::Manifest(manifest) = parsed else {
            let why = "an index is in its manifest's place".to_owned();
            return Err(refused(Refusal::Json(why)));
        };
        manifest::check_media_types(&manifest).map_err(refused)?;
        let told = manifest.layers.iter().map(|one| (&one.digest, one.size));
        let same = manifest.config.digest == self.id()
            && told.eq(self.layers.iter().map(|(digest, bytes)| (digest, *bytes)));
        if !same {
            let why = "its manifest is another image's".to_owned();
            return Err(refused(Refusal::Json(why)));
        }
        Ok(file)
    }

    fn layer_files(&self, files: &Files, diff_ids: &[Digest]) -> Vec<LayerFile> {
        (self.layers.iter().zip(diff_ids))
            .map(|((digest, bytes), diff_id)| LayerFile {
                path: files.blob(digest),
                digest: digest.clone(),
                size: *bytes,
                diff_id: Some(diff_id.clone()),
            })
            .collect()
    }
}

impl ImageStore {
    /// What an image is made of. Blocks.
    ///
    /// # Errors
    /// [`ImageError`] where a document cannot be read.
    pub fn parts(&self, image: &Image) -> Result<Parts, ImageError> {
        let bytes_max = self.limits.manifest_bytes_max.0;
        let manifest = match &image.manifest {
            Some(digest) => Some(self.files.read_blob(digest, bytes_max)?),
            None => None,
        };
        Ok(Parts {
            config: self.files.read_blob(&image.id, bytes_max)?,
            manifest,
            layers: (image.layers.iter())
                .map(|layer| (layer.digest.clone(), layer.size_bytes))
                .collect(),
        })
    }

    /// A blob that is here whole, with its length. Blocks.
    ///
    /// # Errors
    /// [`ImageError`] where it is here and cannot be read.
    pub fn open_blob(&self, digest: &Digest) -> Result<Option<(File, u64)>, ImageError> {
        let path = self.files.blob(digest);
        let failed = |error| ImageError::io("open", &path, error);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let bytes = file.metadata().map_err(failed)?.len();
        Ok(Some((file, bytes)))
    }

    /// How much is here of a blob, whole or not, or of a root disk that was admitted by its digest.
    pub fn blob_bytes(&self, digest: &Digest) -> u64 {
        let partial = || fs::metadata(self.files.partial(digest)).ok();
        let disk = || fs::metadata(self.files.disk(digest.hex())).ok();
        self.files
            .blob_bytes(digest)
            .or_else(|| partial().or_else(disk).map(|meta| meta.len()))
            .unwrap_or(0)
    }

    /// Which layers of an image are wanted; what is here of any other image is not asked for again. Blocks.
    ///
    /// # Errors
    /// [`ImageError`] where the parts make no image that runs here.
    pub fn missing(&self, parts: &Parts) -> Result<Vec<Missing>, ImageError> {
        parts.check(&self.limits)?;
        let mut missing: Vec<Missing> = Vec::new();
        for (digest, bytes) in &parts.layers {
            let known = self.files.blob_bytes(digest) == Some(*bytes);
            if !known && !missing.iter().any(|one| one.digest == *digest) {
                missing.push(Missing {
                    digest: digest.clone(),
                    bytes: *bytes,
                    // A beginning that is longer than the whole is another's mistake.
                    have_bytes: Some(self.blob_bytes(digest))
                        .filter(|have| have <= bytes)
                        .unwrap_or(0),
                });
            }
        }
        Ok(missing)
    }

    /// Takes a blob's bytes from `from` on, as they come. Says how many of it are here afterwards: all, and checked; or
    /// fewer where they ended early, or where `from` is neither 0 nor where the store stands, and then none was taken. Who
    /// begins anew erases nothing: what was there gives way to the whole blob, or to a longer beginning.
    ///
    /// # Errors
    /// [`ImageError`]; where the blob was another than it should be, nothing of what was sent is left.
    pub async fn receive(
        &self,
        digest: &Digest,
        bytes: u64,
        from: u64,
        mut chunks: mpsc::Receiver<bytes::Bytes>,
    ) -> Result<u64, ImageError> {
        let work = self.files.work().await?;
        let guard = (self.files)
            .keyed(&format!("blob:{}", digest.hex()))
            .await?;
        if let Some(here) = self.files.blob_bytes(digest) {
            return Ok(here);
        }
        let needed = bytes.saturating_sub(from).saturating_mul(1 + DISK_RATIO);
        if self.files.free_bytes().is_some_and(|free| free < needed) {
            return Err(ImageError::NoSpace {
                path: self.files.root().to_owned(),
                needed: Some(Bytes(needed)),
            });
        }
        let (files, digest) = (Arc::clone(&self.files), digest.clone());
        blocking(move |cancel| {
            let _held = (work, guard);
            let partial = files.partial(&digest);
            let here = fs::metadata(&partial).map_or(0, |meta| meta.len());
            // What lies there may be broken, and whoever began it may come back: who begins anew does so beside it.
            let aside = (from == 0 && here > 0).then(|| files.temp());
            if aside.is_none() && from != here {
                return Ok(if here > bytes { 0 } else { here });
            }
            let path = (aside.as_ref()).map_or_else(|| partial.clone(), |temp| temp.path.clone());
            let mut sink = open_partial(&path, bytes)?;
            let refused = |why| {
                // What was there before stays; whoever comes next may go on from it or begin anew.
                let undone = match from {
                    0 => fs::remove_file(&path),
                    _ => (OpenOptions::new().write(true).open(&path))
                        .and_then(|file| file.set_len(from)),
                };
                undone.map_err(|error| ImageError::io("write", &path, error))?;
                Err(ImageError::refused(
                    format!("layer {}", digest.short()),
                    why,
                ))
            };
            while let Some(chunk) = chunks.blocking_recv() {
                if cancel.check().is_err() {
                    // Nobody waits any more; what came is kept as after a cut.
                    break;
                }
                let found = sink.bytes.saturating_add(chunk.len() as u64);
                if found > bytes {
                    return refused(Refusal::Size {
                        wanted: bytes,
                        found,
                    });
                }
                sink.write(&chunk)
                    .map_err(|error| ImageError::io("write", &path, error))?;
            }
            if sink.bytes < bytes {
                if aside.is_some() && sink.bytes <= here {
                    return Ok(if here > bytes { 0 } else { here });
                }
                if aside.is_some() {
                    fs::rename(&path, &partial)
                        .map_err(|error| ImageError::io("move", &path, error))?;
                }
                return Ok(sink.bytes);
            }
            let found = Digest::from_sha256(sink.hash.clone().finalize().into());
            if found != digest {
                let wanted = digest.clone();
                return refused(Refusal::Digest { wanted, found });
            }
            publish_path(&path, &files.blob(&digest))?;
            if aside.is_some() {
                // One that stays is removed with the next clean-up.
                let _ = fs::remove_file(&partial);
            }
            Ok(bytes)
        })
        .await
    }

    /// Puts an image together whose layers are all here, under these names, which other images lose.
    ///
    /// # Errors
    /// [`ImageError`]; where the image is refused, the layers that no other image needs are gone; of a guest's image, those
    /// that the guest brought.
    pub async fn assemble(
        &self,
        parts: Parts,
        names: Vec<ImageRef>,
        progress: &ProgressSink,
    ) -> Result<Image, ImageError> {
        let file = parts.check(&self.limits)?;
        if let Some(missing) = self.missing(&parts)?.first() {
            let why = Refusal::Missing(missing.digest.to_string());
            return Err(ImageError::refused(
                format!("image {}", parts.id().short()),
                why,
            ));
        }
        let added = Added::default();
        let assembled = async {
            let work = Arc::new(self.files.work().await?);
            let guest = self.guest.clone();
            for document in [Some(&parts.config), parts.manifest.as_ref()] {
                let Some(document) = document else { continue };
                let (digest, new) = self.files.put_blob(document)?;
                if new {
                    added.blob(&digest);
                }
            }
            let (files, documents, asked) = (Arc::clone(&self.files), added.clone(), guest.clone());
            let ours: Vec<Digest> = parts.layers.iter().map(|one| one.0.clone()).collect();
            blocking(move |_| {
                admit_added(asked.as_ref(), &files, &documents)?;
                for digest in &ours {
                    if asked.as_ref().is_none_or(|guest| guest.brought(digest)) {
                        documents.blob(digest);
                    }
                }
                Ok(())
            })
            .await?;
            let arrived = Arrived {
                names,
                manifest: parts.manifest.as_deref().map(digest_of),
                index: None,
                layers: parts.layer_files(&self.files, &file.diff_ids),
                source: ArrivedConfig::Own(parts.id(), Box::new(file)),
            };
            let (files, limits, guest) = (&self.files, &self.limits, guest.as_ref());
            complete(files, limits, arrived, work, &added, guest, progress).await
        };
        let result = assembled.await;
        self.undone(result, added).await
    }
}
