//! What is remembered of images and their names: small JSON files with a version, replaced whole.

use super::files::{Files, Guard};
use crate::{Image, ImageError, Layer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use vistara_model::{Architecture, Digest, ImageConfig, ImageRef};

const VERSION: u32 = 1;

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) id: Digest,
    pub(crate) manifest: Option<Digest>,
    /// The index that the manifest was chosen from, so that its digest finds the image too.
    pub(crate) index: Option<Digest>,
    pub(crate) architecture: Architecture,
    pub(crate) created: Option<String>,
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<Layer>,
    /// The key of its root disk.
    pub(crate) disk: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Names {
    version: u32,
    names: BTreeMap<String, Digest>,
}

/// All names and records, as they are at one moment.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) names: BTreeMap<ImageRef, Digest>,
    pub(crate) records: BTreeMap<Digest, Record>,
}

impl Record {
    #[expect(
        clippy::too_many_arguments,
        reason = "one for each field, each of its own type"
    )]
    pub(crate) fn new(
        id: Digest,
        manifest: Option<Digest>,
        index: Option<Digest>,
        architecture: Architecture,
        created: Option<String>,
        config: ImageConfig,
        layers: Vec<Layer>,
        disk: String,
    ) -> Record {
        Record {
            version: VERSION,
            id,
            manifest,
            index,
            architecture,
            created,
            config,
            layers,
            disk,
        }
    }

    /// Blobs that the image needs, its configuration and manifests included.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Digest> {
        std::iter::once(&self.id)
            .chain(&self.manifest)
            .chain(&self.index)
            .chain(self.layers.iter().map(|layer| &layer.digest))
    }
}

fn damaged(path: &Path, why: impl Into<String>) -> ImageError {
    ImageError::Record {
        path: path.to_owned(),
        why: why.into(),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path, content: &[u8]) -> Result<T, ImageError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let version: Version =
        serde_json::from_slice(content).map_err(|error| damaged(path, error.to_string()))?;
    if version.version != VERSION {
        return Err(damaged(
            path,
            format!("its version is {}, known is {VERSION}", version.version),
        ));
    }
    serde_json::from_slice(content).map_err(|error| damaged(path, error.to_string()))
}

fn json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>, ImageError> {
    serde_json::to_vec_pretty(value).map_err(|error| damaged(path, error.to_string()))
}

impl Index {
    pub(crate) fn read(files: &Files) -> Result<Index, ImageError> {
        let mut index = Index::default();
        let path = files.names();
        match fs::read(&path) {
            Ok(content) => {
                let names: Names = parse(&path, &content)?;
                for (name, id) in names.names {
                    let name = name
                        .parse()
                        .map_err(|_| damaged(&path, format!("{name:?} is no image name")))?;
                    index.names.insert(name, id);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(ImageError::io("read", &path, error)),
        }
        for path in files.entries("images")? {
            match fs::read(&path) {
                Ok(content) => {
                    let record: Record = parse(&path, &content)?;
                    index.records.insert(record.id.clone(), record);
                }
                // Removed by another process since the listing.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(ImageError::io("read", &path, error)),
            }
        }
        index.names.retain(|_, id| index.records.contains_key(id));
        Ok(index)
    }

    /// Writes the names. The guard shows that nobody else does.
    pub(crate) fn write_names(&self, files: &Files, _guard: &Guard) -> Result<(), ImageError> {
        let path = files.names();
        let names = Names {
            version: VERSION,
            names: self
                .names
                .iter()
                .map(|(name, id)| (name.to_string(), id.clone()))
                .collect(),
        };
        files.replace(&path, &json(&path, &names)?)
    }

    pub(crate) fn write_record(
        files: &Files,
        record: &Record,
        _guard: &Guard,
    ) -> Result<(), ImageError> {
        let path = files.record(&record.id);
        files.replace(&path, &json(&path, record)?)
    }

    pub(crate) fn names_of(&self, id: &Digest) -> Vec<ImageRef> {
        self.names
            .iter()
            .filter(|(_, of)| *of == id)
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// The image as callers see it.
    pub(crate) fn image(&self, files: &Files, record: &Record) -> Image {
        let mut counted: Vec<&Layer> = record.layers.iter().collect();
        counted.sort_by_key(|layer| &layer.digest);
        counted.dedup_by_key(|layer| &layer.digest);
        Image {
            id: record.id.clone(),
            manifest: record.manifest.clone(),
            names: self.names_of(&record.id),
            architecture: record.architecture.clone(),
            config: record.config.clone(),
            created: record.created.clone(),
            size_bytes: counted.iter().map(|layer| layer.size_bytes).sum(),
            disk_bytes: fs::metadata(files.disk(&record.disk))
                .map_or(0, |meta| meta.len())
                .saturating_add(super::unikernel_disk::bytes_of(files, &record.id)),
            layers: record.layers.clone(),
        }
    }

    /// What a user means by this text, and the name if it is one.
    pub(crate) fn find(
        &self,
        text: &str,
    ) -> Result<Option<(Option<ImageRef>, &Record)>, ImageError> {
        let by_digest = |digest: &Digest| {
            self.records.get(digest).or_else(|| {
                let wanted = Some(digest);
                let fits = |record: &&Record| {
                    record.manifest.as_ref() == wanted || record.index.as_ref() == wanted
                };
                self.records.values().find(fits)
            })
        };
        if let Ok(digest) = text.parse::<Digest>() {
            return Ok(by_digest(&digest).map(|record| (None, record)));
        }
        if let Ok(name) = text.parse::<ImageRef>() {
            if let Some(record) = self.names.get(&name).and_then(|id| self.records.get(id)) {
                return Ok(Some((Some(name), record)));
            }
            // A pinned name finds what its digest names, if it bears a name of that repository.
            if let Some(record) = name.digest.as_ref().and_then(by_digest)
                && self.names_of(&record.id).iter().any(|known| {
                    known.registry == name.registry && known.repository == name.repository
                })
            {
                return Ok(Some((None, record)));
            }
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if prefix.is_empty() || !prefix.bytes().all(hex) {
            return Ok(None);
        }
        let fitting: Vec<&Record> = self
            .records
            .values()
            .filter(|record| record.id.hex().starts_with(prefix))
            .collect();
        match fitting[..] {
            [] => Ok(None),
            [record] => Ok(Some((None, record))),
            _ => Err(ImageError::Ambiguous {
                prefix: text.to_owned(),
                count: fitting.len(),
            }),
        }
    }
}
