//! Images from files: an OCI layout, a `docker save` archive, or a plain root file-system tar.
//!
//! Which it is, is told by its content and never by its name. An archive is unpacked only as far as its compression goes,
//! into one temporary file; its members are then read in place, so that no path in it is ever a path of the host.

mod archive;

use crate::compress::{Compression, Unpacked, digest_of, refusal_in};
use crate::disk::{Cancel, LayerFile};
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::pull::{check, check_blob, check_platform};
use crate::store::{Added, Arrived, ArrivedConfig, Files};
use crate::{ImageError, Limits, Refusal};
use archive::{Members, Opened};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use vistara_model::{Architecture, Digest, ImageConfig, ImageRef};

/// The full name that containerd and docker write beside an image in a layout.
const FULL_NAME: &str = "io.containerd.image.name";
/// The tag, or with some tools the name, by the OCI's specification.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What to import.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) source: PathBuf,
    pub(crate) name: Option<ImageRef>,
    pub(crate) config: Option<ImageConfig>,
}

struct Import<'a> {
    files: &'a Files,
    limits: &'a Limits,
    request: &'a Request,
    added: &'a Added,
    cancel: &'a Cancel,
}

/// One image of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Brings an image's blobs into the store.
pub(crate) fn import(
    files: &Files,
    limits: &Limits,
    request: Request,
    added: &Added,
    cancel: &Cancel,
) -> Result<Arrived, ImageError> {
    let import = Import {
        files,
        limits,
        request: &request,
        added,
        cancel,
    };
    let source = &request.source;
    let failed = |error| ImageError::io("read", source, error);
    let meta = fs::metadata(source).map_err(failed)?;
    if meta.is_dir() {
        let members = Members::directory(source);
        if !members.has("oci-layout") {
            return Err(import.not_this(
                "it is a directory, but no OCI layout; pack a root file system with: tar -C DIR -cf FILE .",
            ));
        }
        return import.oci_layout(&members);
    }
    if !meta.is_file() {
        return Err(import.not_this("it is neither a file nor a directory"));
    }
    let mut file = File::open(source).map_err(failed)?;
    let mut start = [0; 4];
    let got = file.read(&mut start).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let packed = Compression::of(&start[..got]) != Compression::None;
    if !import.is_archive(&file, meta.len())? {
        return import.root_tar(&file, meta.len());
    }
    // Held until the end: the unpacked archive goes when it is dropped.
    let mut spooled = None;
    let archive = if packed {
        let unpacked = import.unpacked(&file, meta.len())?;
        let broken = |error| import.broken(error);
        let (temp, _, _) = files.spool(unpacked, u64::MAX, cancel, broken)?;
        let path = temp.path.clone();
        spooled = Some(temp);
        File::open(&path).map_err(|error| ImageError::io("read", &path, error))?
    } else {
        file.try_clone().map_err(failed)?
    };
    let members = Members::tar(archive, limits).map_err(|error| match error {
        ImageError::Refused { why, .. } => ImageError::refused(import.subject(), why),
        other => other,
    })?;
    let arrived = if members.has("oci-layout") && members.has("index.json") {
        import.oci_layout(&members)
    } else {
        import.docker_archive(&members)
    };
    drop(spooled);
    arrived
}

impl Import<'_> {
    fn subject(&self) -> String {
        let name = self.request.source.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn refused(&self, why: Refusal) -> ImageError {
        ImageError::refused(self.subject(), why)
    }

    fn not_this(&self, why: impl Into<String>) -> ImageError {
        ImageError::Source {
            path: self.request.source.clone(),
            why: why.into(),
        }
    }

    fn broken(&self, error: std::io::Error) -> ImageError {
        match refusal_in(&error) {
            Some(why) => self.refused(why.clone()),
            None => ImageError::io("read", &self.request.source, error),
        }
    }

    fn unpacked(&self, file: &File, bytes: u64) -> Result<Unpacked, ImageError> {
        let mut file = file.try_clone().map_err(|error| self.broken(error))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|error| self.broken(error))?;
        Unpacked::new(file, bytes, self.limits.image_bytes_max.0, self.limits)
            .map_err(|error| self.broken(error))
    }

    /// Whether a tar is an archive of an image rather than a root file system.
    fn is_archive(&self, file: &File, bytes: u64) -> Result<bool, ImageError> {
        let unpacked = self.unpacked(file, bytes)?;
        archive::looks_like_one(unpacked, self.limits, self.cancel).map_err(|error| match error {
            ImageError::Refused { why, .. } => self.refused(why),
            other => other,
        })
    }

    fn document(&self, members: &Members, name: &str) -> Result<Vec<u8>, ImageError> {
        let member = self.open(members, name)?;
        let bytes_max = self.limits.manifest_bytes_max.0;
        let mut bytes = Vec::new();
        member
            .reader
            .take(bytes_max.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|error| self.broken(error))?;
        if bytes.len() as u64 > bytes_max {
            return Err(self.refused(Refusal::Limit {
                what: "bytes in one document",
                limit: bytes_max,
            }));
        }
        Ok(bytes)
    }

    fn open(&self, members: &Members, name: &str) -> Result<Opened, ImageError> {
        match members.open(name).map_err(|error| self.broken(error))? {
            Some(opened) => Ok(opened),
            None => Err(self.refused(Refusal::Missing(name.to_owned()))),
        }
    }

    fn no_config(&self) -> Result<(), ImageError> {
        match self.request.config {
            Some(_) => Err(self.not_this(
                "it has a configuration of its own; another can be given for a plain root file system only",
            )),
            None => Ok(()),
        }
    }

    fn put(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let (digest, new) = self.files.put_blob(bytes)?;
        if new {
            self.added.blob(&digest);
        }
        Ok(digest)
    }

    /// Copies a layer into the store; `wanted` is its announced digest and size.
    fn layer(
        &self,
        reader: impl Read,
        bytes_max: u64,
        wanted: Option<&Descriptor>,
    ) -> Result<(Digest, u64), ImageError> {
        let subject = match wanted {
            Some(descriptor) => format!("layer {}", descriptor.digest.short()),
            None => self.subject(),
        };
        let spooled = self
            .files
            .spool(reader, bytes_max, self.cancel, |error| self.broken(error))?;
        let (temp, found, bytes) = spooled;
        if let Some(wanted) = wanted {
            let why = if bytes != wanted.size {
                Some(Refusal::Size {
                    wanted: wanted.size,
                    found: bytes,
                })
            } else if found != wanted.digest {
                Some(Refusal::Digest {
                    wanted: wanted.digest.clone(),
                    found: found.clone(),
                })
            } else {
                None
            };
            if let Some(why) = why {
                return Err(ImageError::refused(subject, why));
            }
        }
        if self.files.blob_bytes(&found).is_none() {
            self.files.publish(&temp, &self.files.blob(&found))?;
            self.added.blob(&found);
        }
        Ok((found, bytes))
    }

    fn root_tar(&self, file: &File, bytes: u64) -> Result<Arrived, ImageError> {
        let mut file = file.try_clone().map_err(|error| self.broken(error))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|error| self.broken(error))?;
        let (digest, size) = self.layer(file, bytes, None)?;
        let config = self.request.config.clone().unwrap_or_default();
        Ok(Arrived {
            names: self.request.name.iter().cloned().collect(),
            manifest: None,
            index: None,
            source: ArrivedConfig::Made(Architecture::host(), Box::new(config)),
            layers: vec![LayerFile {
                path: self.files.blob(&digest),
                digest,
                size,
                diff_id: None,
            }],
        })
    }

    fn oci_layout(&self, members: &Members) -> Result<Arrived, ImageError> {
        self.no_config()?;
        let index = self.document(members, "index.json")?;
        // index.json need not say what it is, and older tools leave even its schema version out of step: its place tells.
        let parsed = manifest::parse_document(&index, None).map_err(|why| self.refused(why))?;
        let Document::Index(entries) = parsed else {
            return Err(self.refused(Refusal::Json("its index.json is no index".to_owned())));
        };
        let wanted = Architecture::host();
        let mut descriptor = self.pick(&entries, &wanted)?.clone();
        let names = match &self.request.name {
            Some(name) => vec![name.clone()],
            None => entry_name(&descriptor).into_iter().collect(),
        };
        let mut outer = None;
        for _ in 0..=self.limits.index_depth_max {
            let path = format!("blobs/sha256/{}", descriptor.digest.hex());
            let bytes = self.document(members, &path)?;
            check_blob(&bytes, &descriptor).map_err(|why| self.refused(why))?;
            let told = Some(descriptor.media_type.as_str()).filter(|text| !text.is_empty());
            let document =
                manifest::parse_document(&bytes, told).map_err(|why| self.refused(why))?;
            match document {
                Document::Manifest(manifest) => {
                    return self.oci_manifest(members, &manifest, &bytes, outer, names);
                }
                Document::Index(entries) => {
                    descriptor = match manifest::choose(&entries, &wanted) {
                        Ok(fitting) if !fitting.is_empty() => fitting[0].clone(),
                        Ok(_) => return Err(ImageError::Internal("a choice of nothing".into())),
                        Err(available) => return Err(self.foreign(&wanted, available)),
                    };
                    outer.get_or_insert(bytes);
                }
            }
        }
        Err(self.refused(Refusal::Limit {
            what: "indexes within one another",
            limit: self.limits.index_depth_max as u64,
        }))
    }

    fn foreign(&self, wanted: &Architecture, available: Vec<String>) -> ImageError {
        ImageError::Architecture {
            subject: self.subject(),
            wanted: wanted.clone(),
            available,
        }
    }

    /// The image meant among those of a layout.
    fn pick<'a>(
        &self,
        entries: &'a [Descriptor],
        wanted: &Architecture,
    ) -> Result<&'a Descriptor, ImageError> {
        let fitting = manifest::choose(entries, wanted)
            .map_err(|available| self.foreign(wanted, available))?;
        let several = || {
            let listed: Vec<String> = fitting
                .iter()
                .map(|entry| match entry_label(entry) {
                    Some(label) => label.to_owned(),
                    None => entry.digest.to_string(),
                })
                .collect();
            self.not_this(format!(
                "it holds several images ({}); give the name of one",
                listed.join(", ")
            ))
        };
        let named = self.request.name.as_ref().and_then(|name| {
            fitting.iter().find(|entry| {
                entry_name(entry).as_ref() == Some(name)
                    || entry_label(entry).is_some_and(|label| Some(label) == name.tag.as_deref())
            })
        });
        match (named, &fitting[..]) {
            (Some(entry), _) | (None, [entry]) => Ok(entry),
            // The same image under several names.
            (None, [first, rest @ ..]) if rest.iter().all(|it| it.digest == first.digest) => {
                Ok(first)
            }
            _ => Err(several()),
        }
    }

    fn oci_manifest(
        &self,
        members: &Members,
        manifest: &Manifest,
        bytes: &[u8],
        outer: Option<Vec<u8>>,
        names: Vec<ImageRef>,
    ) -> Result<Arrived, ImageError> {
        check(manifest, self.limits).map_err(|why| self.refused(why))?;
        let member = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
        let config = self.document(members, &member(&manifest.config.digest))?;
        check_blob(&config, &manifest.config).map_err(|why| self.refused(why))?;
        let file = manifest::parse_config(&config).map_err(|why| self.refused(why))?;
        check_platform(
            &self.subject(),
            &file.os,
            &file.architecture,
            &Architecture::host(),
        )?;
        if file.diff_ids.len() != manifest.layers.len() {
            return Err(self.refused(Refusal::LayerCount {
                manifest: manifest.layers.len(),
                config: file.diff_ids.len(),
            }));
        }
        let mut layers = Vec::new();
        for (descriptor, diff_id) in manifest.layers.iter().zip(&file.diff_ids) {
            match self.files.blob_bytes(&descriptor.digest) {
                Some(found) if found == descriptor.size => {}
                _ => {
                    let opened = self.open(members, &member(&descriptor.digest))?;
                    self.layer(opened.reader, descriptor.size, Some(descriptor))?;
                }
            }
            layers.push(LayerFile {
                path: self.files.blob(&descriptor.digest),
                digest: descriptor.digest.clone(),
                size: descriptor.size,
                diff_id: Some(diff_id.clone()),
            });
        }
        let id = self.put(&config)?;
        let digest = self.put(bytes)?;
        let index = match outer {
            Some(outer) => Some(self.put(&outer)?),
            None => None,
        };
        Ok(Arrived {
            names,
            manifest: Some(digest),
            index,
            source: ArrivedConfig::Own(id, Box::new(file)),
            layers,
        })
    }

    fn saved(&self, members: &Members) -> Result<Vec<Saved>, ImageError> {
        let bytes = self.document(members, "manifest.json")?;
        serde_json::from_slice(&bytes)
            .map_err(|error| self.refused(Refusal::Json(error.to_string())))
    }

    fn docker_archive(&self, members: &Members) -> Result<Arrived, ImageError> {
        self.no_config()?;
        let images = self.saved(members)?;
        let tags = |image: &Saved| -> Vec<ImageRef> {
            let tags = image.repo_tags.iter().flatten();
            tags.filter_map(|tag| tag.parse().ok()).collect()
        };
        let wanted = self.request.name.as_ref();
        let named = wanted.and_then(|name| images.iter().find(|it| tags(it).contains(name)));
        let image = match (named, &images[..]) {
            (Some(image), _) | (None, [image]) => image,
            (None, []) => return Err(self.not_this("it holds no image")),
            (None, _) => {
                let listed: Vec<String> = images
                    .iter()
                    .flat_map(&tags)
                    .map(|name| name.familiar())
                    .collect();
                return Err(self.not_this(format!(
                    "it holds several images ({}); give the name of one",
                    listed.join(", ")
                )));
            }
        };
        if image.layers.len() > self.limits.layers_max {
            return Err(self.refused(Refusal::Limit {
                what: "layers",
                limit: self.limits.layers_max as u64,
            }));
        }
        let config = self.document(members, &image.config)?;
        // The member is named after its digest: HEX.json, or blobs/sha256/HEX.
        let stem = Path::new(&image.config).file_stem().unwrap_or_default();
        if let Ok(wanted) = format!("sha256:{}", stem.to_string_lossy()).parse::<Digest>() {
            let found = digest_of(&config);
            if found != wanted {
                return Err(self.refused(Refusal::Digest { wanted, found }));
            }
        }
        let file = manifest::parse_config(&config).map_err(|why| self.refused(why))?;
        check_platform(
            &self.subject(),
            &file.os,
            &file.architecture,
            &Architecture::host(),
        )?;
        if file.diff_ids.len() != image.layers.len() {
            return Err(self.refused(Refusal::LayerCount {
                manifest: image.layers.len(),
                config: file.diff_ids.len(),
            }));
        }
        let mut layers = Vec::new();
        for (name, diff_id) in image.layers.iter().zip(&file.diff_ids) {
            let opened = self.open(members, name)?;
            let (digest, size) = self.layer(opened.reader, opened.bytes, None)?;
            layers.push(LayerFile {
                path: self.files.blob(&digest),
                digest,
                size,
                diff_id: Some(diff_id.clone()),
            });
        }
        let names = match wanted {
            Some(name) => vec![name.clone()],
            None => tags(image),
        };
        Ok(Arrived {
            names,
            manifest: None,
            index: None,
            source: ArrivedConfig::Own(self.put(&config)?, Box::new(file)),
            layers,
        })
    }
}

fn note<'a>(entry: &'a Descriptor, key: &str) -> Option<&'a str> {
    entry.annotations.as_ref()?.get(key).map(String::as_str)
}

/// What a layout calls an entry.
fn entry_label(entry: &Descriptor) -> Option<&str> {
    note(entry, FULL_NAME).or_else(|| note(entry, REF_NAME))
}

/// The full name of an entry, where it has one: a bare tag is none.
fn entry_name(entry: &Descriptor) -> Option<ImageRef> {
    note(entry, FULL_NAME)
        .or_else(|| note(entry, REF_NAME).filter(|label| label.contains([':', '/'])))?
        .parse()
        .ok()
}
