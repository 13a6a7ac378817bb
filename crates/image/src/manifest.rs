//! Manifests, indexes and image configurations, OCI and docker schema 2, as pure parsers.

use crate::Refusal;
use serde::Deserialize;
use std::collections::BTreeMap;
use vistara_model::{Architecture, Digest, ImageConfig};

/// What a client says it understands, for the `Accept` header.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
const FOREIGN: [&str; 2] = [
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
];

/// A reference to a blob or a further manifest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What is there.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// What it runs on, in an index.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Free notes.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What a manifest of an index is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// By its Go name.
    #[serde(default)]
    pub architecture: String,
    /// By its Go name.
    #[serde(default)]
    pub os: String,
    /// `v7`, `v8`, ….
    #[serde(default)]
    pub variant: Option<String>,
}

/// A manifest: one image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// What a manifest URL or an `index.json` may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several manifests to choose from.
    Index(Vec<Descriptor>),
}

/// An image's configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFile {
    /// What it was built for.
    pub architecture: Architecture,
    /// The operating system, by its Go name.
    pub os: String,
    /// When it was built.
    pub created: Option<String>,
    /// How to run it.
    pub config: ImageConfig,
    /// Digests of the layers' tars, lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct RawConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    created: Option<String>,
    config: Option<RawConfig>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
}

fn json_error(error: &serde_json::Error) -> Refusal {
    Refusal::Json(error.to_string())
}

/// Reads a manifest or an index. `content_type` is what the registry called it, where it did.
pub fn parse_document(bytes: &[u8], content_type: Option<&str>) -> Result<Document, Refusal> {
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| json_error(&error))?;
    if raw.schema_version == Some(1) || raw.fs_layers.is_some() {
        return Err(Refusal::SchemaOne);
    }
    if raw.schema_version != Some(2) {
        return Err(Refusal::Json("its schemaVersion is not 2".to_owned()));
    }
    let told = content_type
        .map(|text| text.split(';').next().unwrap_or(text).trim())
        .filter(|text| INDEXES.contains(text) || MANIFESTS.contains(text));
    let media_type = match (raw.media_type.as_deref(), told) {
        // A document that is one thing by its header and another by its body fools one of two readers (CVE-2021-41190).
        (Some(own), Some(told)) if own != told => {
            return Err(Refusal::MediaType(format!("{own} sent as {told}")));
        }
        (Some(own), _) => own.to_owned(),
        (None, Some(told)) => told.to_owned(),
        (None, None) if raw.manifests.is_some() => INDEXES[0].to_owned(),
        (None, None) => MANIFESTS[0].to_owned(),
    };
    if raw.manifests.is_some() && (raw.layers.is_some() || raw.config.is_some()) {
        return Err(Refusal::Json(
            "it is a manifest and an index at once".to_owned(),
        ));
    }
    if INDEXES.contains(&media_type.as_str()) {
        let manifests = raw
            .manifests
            .ok_or_else(|| Refusal::Json("it is an index without manifests".to_owned()))?;
        return Ok(Document::Index(manifests));
    }
    if !MANIFESTS.contains(&media_type.as_str()) {
        return Err(Refusal::MediaType(media_type));
    }
    match (raw.config, raw.layers) {
        (Some(config), Some(layers)) => Ok(Document::Manifest(Manifest { config, layers })),
        _ => Err(Refusal::Json(
            "it is a manifest without a config or without layers".to_owned(),
        )),
    }
}

/// Refuses a manifest whose configuration or layers are of a kind that is not supported.
pub fn check_media_types(manifest: &Manifest) -> Result<(), Refusal> {
    let config = manifest.config.media_type.as_str();
    if !CONFIGS.contains(&config) {
        return Err(Refusal::MediaType(config.to_owned()));
    }
    for layer in &manifest.layers {
        let layer = layer.media_type.as_str();
        if FOREIGN.iter().any(|foreign| layer.starts_with(foreign)) {
            return Err(Refusal::ForeignLayer);
        }
        if !LAYERS.contains(&layer) {
            return Err(Refusal::MediaType(layer.to_owned()));
        }
    }
    Ok(())
}

/// Whether an index's entry is not an image but a note about one, such as a build attestation.
fn is_note(entry: &Descriptor) -> bool {
    let unknown = entry
        .platform
        .as_ref()
        .is_some_and(|platform| platform.os == "unknown" || platform.architecture == "unknown");
    let attestation = entry
        .annotations
        .as_ref()
        .is_some_and(|notes| notes.contains_key("vnd.docker.reference.type"));
    unknown || attestation
}

/// The entries of an index that fit this architecture, the best first; else what there is, as `os/architecture`.
///
/// Entries that do not say what they are for fit: their configuration will tell.
pub fn choose<'a>(
    entries: &'a [Descriptor],
    wanted: &Architecture,
) -> Result<Vec<&'a Descriptor>, Vec<String>> {
    let images = || entries.iter().filter(|entry| !is_note(entry));
    let mut fitting: Vec<_> = images()
        .filter(|entry| match &entry.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == wanted.0,
            None => true,
        })
        .collect();
    // The plain variant runs everywhere; amd64/v3 and its like do not.
    fitting.sort_by_key(|entry| {
        let variant = entry.platform.as_ref().and_then(|it| it.variant.clone());
        !matches!(
            (variant.as_deref(), wanted.0.as_str()),
            (None | Some("" | "v1"), _) | (Some("v8"), "arm64")
        )
    });
    if fitting.is_empty() {
        let mut available: Vec<String> = images()
            .filter_map(|entry| entry.platform.as_ref())
            .map(|platform| match &platform.variant {
                Some(variant) => format!("{}/{}/{variant}", platform.os, platform.architecture),
                None => format!("{}/{}", platform.os, platform.architecture),
            })
            .collect();
        available.sort();
        available.dedup();
        return Err(available);
    }
    Ok(fitting)
}

/// Reads an image's configuration.
pub fn parse_config(bytes: &[u8]) -> Result<ConfigFile, Refusal> {
    let raw: RawConfigFile = serde_json::from_slice(bytes).map_err(|error| json_error(&error))?;
    let config = raw.config.unwrap_or_default();
    Ok(ConfigFile {
        architecture: Architecture(raw.architecture),
        os: raw.os,
        created: raw.created,
        config: ImageConfig {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            stop_signal: config.stop_signal.unwrap_or_default(),
            exposed_ports: config
                .exposed_ports
                .map(|ports| ports.into_keys().collect())
                .unwrap_or_default(),
            volumes: config
                .volumes
                .map(|volumes| volumes.into_keys().collect())
                .unwrap_or_default(),
            labels: config.labels.unwrap_or_default(),
        },
        diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
    })
}

/// The configuration file of a plain root file-system tar.
pub(crate) fn write_config(
    architecture: &Architecture,
    config: &ImageConfig,
    diff_id: &Digest,
) -> Vec<u8> {
    let set = |names: &[String]| -> serde_json::Map<String, serde_json::Value> {
        names
            .iter()
            .map(|name| (name.clone(), serde_json::json!({})))
            .collect()
    };
    let document = serde_json::json!({
        "architecture": architecture.0,
        "os": "linux",
        "config": {
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "Env": config.env,
            "User": config.user,
            "WorkingDir": config.working_dir,
            "StopSignal": config.stop_signal,
            "ExposedPorts": set(&config.exposed_ports),
            "Volumes": set(&config.volumes),
            "Labels": config.labels,
        },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    document.to_string().into_bytes()
}
