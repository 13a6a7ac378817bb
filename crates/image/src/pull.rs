//! From a name to blobs in the store: choose a manifest, check what it promises, fetch what is missing.

use crate::compress::digest_of;
use crate::credentials;
use crate::disk::LayerFile;
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::registry::Registry;
use crate::store::{
    Added, Admission, Arrived, ArrivedConfig, Files, admit, blocking, publish_path,
};
use crate::{ImageError, Limits, Progress, ProgressSink, PullOptions, Refusal};
use reqwest::StatusCode;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use vistara_model::{Architecture, Bytes, Digest, ImageRef};

/// Waits between attempts: doubled from the first to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(5);
/// An attempt that brought so much was no failure: the count of attempts starts again.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Chunks (some 16 KiB each) between the line and the disk.
const CHUNKS_QUEUED: usize = 64;
/// Bytes between two progress reports of a layer.
const REPORT_BYTES: u64 = 256 << 10;
/// Bytes of the root disk expected for each byte of compressed layers, for the check of free space.
pub(crate) const DISK_RATIO: u64 = 2;

/// Brings an image's blobs into the store.
pub(crate) async fn pull(
    files: &Arc<Files>,
    limits: &Arc<Limits>,
    name: &ImageRef,
    options: &PullOptions,
    guest: Option<&Arc<dyn Admission>>,
    added: &Added,
    progress: &ProgressSink,
) -> Result<Arrived, ImageError> {
    progress.report(Progress::Resolving);
    let credential = credentials::find(&name.registry, options).await?;
    let registry = Arc::new(Registry::new(name, options, credential)?);
    let wanted = options
        .architecture
        .clone()
        .unwrap_or_else(Architecture::host);
    let chosen = resolve(&registry, limits, name, &wanted).await?;
    let subject = name.familiar();
    let refused = |why| ImageError::refused(subject.clone(), why);
    check(&chosen.manifest, limits).map_err(refused)?;
    let descriptor = &chosen.manifest.config;
    let config = match files.blob_bytes(&descriptor.digest) {
        Some(_) => files.read_blob(&descriptor.digest, limits.manifest_bytes_max.0)?,
        None => {
            let bytes_max = limits.manifest_bytes_max.0;
            let digest = descriptor.digest.as_ref();
            registry.small_blob(digest, bytes_max).await?
        }
    };
    check_blob(&config, descriptor)
        .map_err(|why| ImageError::refused(format!("the configuration of {subject}"), why))?;
    let file = manifest::parse_config(&config)
        .map_err(|why| ImageError::refused(format!("the configuration of {subject}"), why))?;
    check_platform(&subject, &file.os, &file.architecture, &wanted)?;
    if file.diff_ids.len() != chosen.manifest.layers.len() {
        return Err(refused(Refusal::LayerCount {
            manifest: chosen.manifest.layers.len(),
            config: file.diff_ids.len(),
        }));
    }
    check_space(files, &chosen.manifest)?;
    let document = |bytes: &Vec<u8>| (digest_of(bytes), bytes.len() as u64);
    let mut blobs: Vec<_> = (chosen.manifest.layers.iter())
        .map(|layer| (layer.digest.clone(), layer.size))
        .collect();
    blobs.extend([document(&config), document(&chosen.bytes)]);
    blobs.extend(chosen.index.as_ref().map(document));
    admit(guest, blobs).await?;
    fetch_layers(files, limits, &registry, &chosen.manifest, added, progress).await?;
    let documents = [Some(&config), Some(&chosen.bytes), chosen.index.as_ref()];
    for document in documents.into_iter().flatten() {
        let (digest, new) = files.put_blob(document)?;
        if new {
            added.blob(&digest);
        }
    }
    let layers = chosen
        .manifest
        .layers
        .iter()
        .zip(&file.diff_ids)
        .map(|(layer, diff_id)| LayerFile {
            path: files.blob(&layer.digest),
            digest: layer.digest.clone(),
            size: layer.size,
            diff_id: Some(diff_id.clone()),
        })
        .collect();
    Ok(Arrived {
        names: vec![name.clone()],
        manifest: Some(digest_of(&chosen.bytes)),
        index: chosen.index.as_deref().map(digest_of),
        source: ArrivedConfig::Own(descriptor.digest.clone(), Box::new(file)),
        layers,
    })
}

struct Chosen {
    bytes: Vec<u8>,
    manifest: Manifest,
    /// The outermost index, where there was one.
    index: Option<Vec<u8>>,
}

async fn resolve(
    registry: &Registry,
    limits: &Limits,
    name: &ImageRef,
    wanted: &Architecture,
) -> Result<Chosen, ImageError> {
    let subject = name.familiar();
    let refused = |why| ImageError::refused(format!("the manifest of {subject}"), why);
    let mut pinned: Option<(Digest, Option<u64>)> = name.digest.clone().map(|it| (it, None));
    let mut index = None;
    for _ in 0..=limits.index_depth_max {
        let reference = match (&pinned, &name.tag) {
            (Some((digest, _)), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        };
        let bytes_max = limits.manifest_bytes_max.0;
        let raw = registry.manifest(&reference, bytes_max).await?;
        if let Some((digest, size)) = &pinned {
            check_content(&raw.bytes, digest, *size).map_err(refused)?;
        }
        let document = manifest::parse_document(&raw.bytes, raw.content_type.as_deref());
        match document.map_err(refused)? {
            Document::Manifest(manifest) => {
                return Ok(Chosen {
                    bytes: raw.bytes,
                    manifest,
                    index,
                });
            }
            Document::Index(entries) => {
                let fitting = manifest::choose(&entries, wanted).map_err(|available| {
                    ImageError::Architecture {
                        subject: subject.clone(),
                        wanted: wanted.clone(),
                        available,
                    }
                })?;
                let Some(best) = fitting.first() else {
                    return Err(ImageError::Internal("a choice of nothing".to_owned()));
                };
                pinned = Some((best.digest.clone(), Some(best.size)));
                index.get_or_insert(raw.bytes);
            }
        }
    }
    Err(refused(Refusal::Limit {
        what: "indexes within one another",
        limit: limits.index_depth_max as u64,
    }))
}

/// What a manifest promises is within bounds.
pub(crate) fn check(manifest: &Manifest, limits: &Limits) -> Result<(), Refusal> {
    manifest::check_media_types(manifest)?;
    let limit = |what, limit| Refusal::Limit { what, limit };
    if manifest.layers.len() > limits.layers_max {
        return Err(limit("layers", limits.layers_max as u64));
    }
    if manifest.config.size > limits.manifest_bytes_max.0 {
        let bytes_max = limits.manifest_bytes_max.0;
        return Err(limit("bytes of configuration", bytes_max));
    }
    let mut left = limits.image_bytes_max.0;
    for layer in &manifest.layers {
        left = left
            .checked_sub(layer.size)
            .ok_or_else(|| limit("bytes of layers", limits.image_bytes_max.0))?;
    }
    Ok(())
}

/// The image runs here.
pub(crate) fn check_platform(
    subject: &str,
    os: &str,
    architecture: &Architecture,
    wanted: &Architecture,
) -> Result<(), ImageError> {
    // Some small builders leave the system out; a missing architecture cannot be guessed.
    if (os == "linux" || os.is_empty()) && architecture == wanted {
        return Ok(());
    }
    Err(ImageError::Architecture {
        subject: subject.to_owned(),
        wanted: wanted.clone(),
        available: vec![format!("{os}/{architecture}")],
    })
}

fn check_content(bytes: &[u8], wanted: &Digest, size: Option<u64>) -> Result<(), Refusal> {
    if let Some(size) = size
        && size != bytes.len() as u64
    {
        return Err(Refusal::Size {
            wanted: size,
            found: bytes.len() as u64,
        });
    }
    let found = digest_of(bytes);
    if found != *wanted {
        let wanted = wanted.clone();
        return Err(Refusal::Digest { wanted, found });
    }
    Ok(())
}

/// A document is the one that its descriptor announces.
pub(crate) fn check_blob(bytes: &[u8], descriptor: &Descriptor) -> Result<(), Refusal> {
    check_content(bytes, &descriptor.digest, Some(descriptor.size))
}

fn check_space(files: &Files, manifest: &Manifest) -> Result<(), ImageError> {
    let missing: u64 = manifest
        .layers
        .iter()
        .filter(|layer| files.blob_bytes(&layer.digest).is_none())
        .map(|layer| {
            let partial = fs::metadata(files.partial(&layer.digest)).map_or(0, |meta| meta.len());
            layer.size.saturating_sub(partial)
        })
        .sum();
    let needed = missing.saturating_mul(1 + DISK_RATIO);
    match files.free_bytes() {
        Some(free) if missing > 0 && free < needed => Err(ImageError::NoSpace {
            path: files.root().to_owned(),
            needed: Some(Bytes(needed)),
        }),
        _ => Ok(()),
    }
}

async fn fetch_layers(
    files: &Arc<Files>,
    limits: &Arc<Limits>,
    registry: &Arc<Registry>,
    manifest: &Manifest,
    added: &Added,
    progress: &ProgressSink,
) -> Result<(), ImageError> {
    let slots = Arc::new(Semaphore::new(limits.parallel_downloads.max(1)));
    let mut fetches = JoinSet::new();
    let mut seen = std::collections::BTreeSet::new();
    for layer in &manifest.layers {
        if !seen.insert(layer.digest.clone()) {
            continue;
        }
        let fetch = Fetch {
            files: Arc::clone(files),
            limits: Arc::clone(limits),
            registry: Arc::clone(registry),
            digest: layer.digest.clone(),
            size: layer.size,
            added: added.clone(),
            progress: progress.clone(),
        };
        let slots = Arc::clone(&slots);
        fetches.spawn(async move {
            let slot = slots.acquire_owned().await;
            let _slot = slot.map_err(|error| ImageError::Internal(error.to_string()))?;
            fetch.run().await
        });
    }
    while let Some(fetched) = fetches.join_next().await {
        let fetched = fetched.map_err(|error| ImageError::Internal(error.to_string()))?;
        if let Err(error) = fetched {
            // The others stop before the caller clears up.
            fetches.shutdown().await;
            return Err(error);
        }
    }
    Ok(())
}

struct Fetch {
    files: Arc<Files>,
    limits: Arc<Limits>,
    registry: Arc<Registry>,
    digest: Digest,
    size: u64,
    added: Added,
    progress: ProgressSink,
}

/// A download's file, and what is known of what it holds.
pub(crate) struct Sink {
    file: File,
    pub(crate) hash: Sha256,
    pub(crate) bytes: u64,
}

impl Fetch {
    fn refused(&self, why: Refusal) -> ImageError {
        ImageError::refused(format!("layer {}", self.digest.short()), why)
    }

    fn exists(&self) -> Result<bool, ImageError> {
        match self.files.blob_bytes(&self.digest) {
            Some(found) if found == self.size => {
                self.progress.report(Progress::LayerExists {
                    digest: self.digest.clone(),
                });
                Ok(true)
            }
            Some(found) => Err(self.refused(Refusal::Size {
                wanted: self.size,
                found,
            })),
            None => Ok(false),
        }
    }

    async fn run(self) -> Result<(), ImageError> {
        if self.exists()? {
            return Ok(());
        }
        let _guard = self
            .files
            .keyed(&format!("blob:{}", self.digest.hex()))
            .await?;
        if self.exists()? {
            return Ok(());
        }
        let partial = self.files.partial(&self.digest);
        // From here on there is something to clear up.
        self.added.blob(&self.digest);
        let (path, size) = (partial.clone(), self.size);
        let mut sink = blocking(move |_| open_partial(&path, size)).await?;
        // What an earlier pull left may itself be broken, by a power cut or by what sent it.
        let mut resumed = sink.bytes > 0;
        let mut attempts = 0;
        let mut pause = PAUSE_FIRST;
        loop {
            if sink.bytes == self.size {
                let found = Digest::from_sha256(sink.hash.clone().finalize().into());
                if found == self.digest {
                    break;
                }
                if !resumed {
                    drop(sink.file);
                    fs::remove_file(&partial)
                        .map_err(|error| ImageError::io("remove", &partial, error))?;
                    let wanted = self.digest.clone();
                    return Err(self.refused(Refusal::Digest { wanted, found }));
                }
                resumed = false;
                sink = blocking(move |_| sink.restart()).await?;
            }
            let before = sink.bytes;
            let (back, result) = self.attempt(sink, &partial).await?;
            sink = back;
            let Err(error) = result else {
                continue;
            };
            if sink.bytes >= before + PROGRESS_BYTES {
                (attempts, pause) = (0, PAUSE_FIRST);
            }
            attempts += 1;
            let lasting = error.kind() != crate::ErrorKind::Peer;
            if lasting || attempts >= self.limits.download_attempts {
                return Err(error);
            }
            tracing::debug!(error = %error, attempts, "a download is taken up again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_LAST);
        }
        self.report(sink.bytes);
        drop(sink.file);
        let place = self.files.blob(&self.digest);
        blocking(move |_| publish_path(&partial, &place)).await
    }

    fn report(&self, done_bytes: u64) {
        self.progress.report(Progress::Layer {
            digest: self.digest.clone(),
            done_bytes,
            total_bytes: self.size,
        });
    }

    /// Reads from where the sink stands. Gives the sink back unless the disk failed.
    async fn attempt(
        &self,
        mut sink: Sink,
        path: &Path,
    ) -> Result<(Sink, Result<(), ImageError>), ImageError> {
        const DOING: &str = "fetch a layer";
        let mut response = match self.registry.blob(self.digest.as_ref(), sink.bytes).await {
            Ok(response) => response,
            Err(error) => return Ok((sink, Err(error))),
        };
        let from = match response.status() {
            StatusCode::PARTIAL_CONTENT => content_start(&response),
            StatusCode::OK => Some(0),
            _ => None,
        };
        if from != Some(sink.bytes) {
            // It does not do ranges, or not this one: from the start, in this answer or the next.
            sink = blocking(move |_| sink.restart()).await?;
            if from != Some(0) {
                let error = self.registry.odd(DOING, "it answers for another range");
                return Ok((sink, Err(error)));
            }
        }
        self.report(sink.bytes);
        let mut coming = sink.bytes;
        let mut reported = coming;
        let (sender, mut receiver) = mpsc::channel::<bytes::Bytes>(CHUNKS_QUEUED);
        let written_to = path.to_owned();
        let writer = blocking(move |_| {
            while let Some(chunk) = receiver.blocking_recv() {
                sink.write(&chunk)
                    .map_err(|error| ImageError::io("write", &written_to, error))?;
            }
            Ok(sink)
        });
        let reader = async {
            let sender = sender;
            loop {
                let chunk = match response.chunk().await {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) if coming < self.size => {
                        return Err(self.registry.odd(DOING, "it ends before its length"));
                    }
                    Ok(None) => return Ok(()),
                    Err(error) => return Err(self.registry.failed(DOING, error)),
                };
                coming += chunk.len() as u64;
                if coming > self.size {
                    return Err(self.refused(Refusal::Size {
                        wanted: self.size,
                        found: coming,
                    }));
                }
                if sender.send(chunk).await.is_err() {
                    // The writer has failed; its own error tells why.
                    return Ok(());
                }
                if coming - reported >= REPORT_BYTES {
                    reported = coming;
                    self.report(coming);
                }
            }
        };
        let (written, read) = tokio::join!(writer, reader);
        Ok((written?, read))
    }
}

impl Sink {
    pub(crate) fn write(&mut self, chunk: &[u8]) -> std::io::Result<()> {
        self.file.write_all(chunk)?;
        self.hash.update(chunk);
        self.bytes += chunk.len() as u64;
        Ok(())
    }

    fn restart(mut self) -> Result<Sink, ImageError> {
        let failed = |error| ImageError::io("write", Path::new("partial"), error);
        self.file.set_len(0).map_err(failed)?;
        self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        Ok(Sink {
            file: self.file,
            hash: Sha256::new(),
            bytes: 0,
        })
    }
}

/// Opens what an earlier pull left, reads it once for its hash, and stands at its end.
pub(crate) fn open_partial(path: &Path, size: u64) -> Result<Sink, ImageError> {
    let failed = |error| ImageError::io("open", path, error);
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed)?;
    if file.metadata().map_err(failed)?.len() > size {
        file.set_len(0).map_err(failed)?;
    }
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let mut chunk = vec![0; 256 << 10];
    loop {
        let got = file.read(&mut chunk).map_err(failed)?;
        if got == 0 {
            return Ok(Sink { file, hash, bytes });
        }
        hash.update(&chunk[..got]);
        bytes += got as u64;
    }
}

/// Where a partial answer begins.
fn content_start(response: &reqwest::Response) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    let (start, _) = range.strip_prefix("bytes ")?.split_once('-')?;
    start.trim().parse().ok()
}
