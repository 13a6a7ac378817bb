//! What the tests make images from: tars byte by byte, OCI layouts, and a look at what a store holds.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test binaries, each of which uses a part of it"
)]

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use vistara_image::{Image, ImageError, ImageStore, Limits, ProgressSink};
use vistara_model::Architecture;

pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

pub fn sha(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes)
        .iter()
        .fold("sha256:".to_owned(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
}

/// A tar under construction. Nothing is checked: that is the point.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

pub struct Head<'a> {
    pub name: &'a str,
    pub flag: u8,
    pub link: &'a str,
    pub size: &'a [u8],
    pub mode: u32,
    pub owner: (u32, u32),
    pub device: (u32, u32),
}

impl Tar {
    pub fn new() -> Tar {
        Tar::default()
    }

    pub fn raw(mut self, head: &Head<'_>, data: &[u8]) -> Tar {
        let mut block = [0u8; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, head.name.as_bytes());
        put(100, format!("{:07o}", head.mode).as_bytes());
        put(108, format!("{:07o}", head.owner.0).as_bytes());
        put(116, format!("{:07o}", head.owner.1).as_bytes());
        put(124, head.size);
        put(136, b"00000001750");
        put(156, &[head.flag]);
        put(157, head.link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", head.device.0).as_bytes());
        put(337, format!("{:07o}", head.device.1).as_bytes());
        put(148, b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(data);
        let rest = data.len().next_multiple_of(512) - data.len();
        self.0.resize(self.0.len() + rest, 0);
        self
    }

    pub fn entry(self, name: &str, flag: u8, link: &str, data: &[u8]) -> Tar {
        let size = format!("{:011o}", data.len());
        self.raw(
            &Head {
                name,
                flag,
                link,
                size: size.as_bytes(),
                mode: if flag == b'5' { 0o755 } else { 0o644 },
                owner: (0, 0),
                device: (0, 0),
            },
            data,
        )
    }

    pub fn file(self, name: &str, data: &[u8]) -> Tar {
        self.entry(name, b'0', "", data)
    }

    pub fn dir(self, name: &str) -> Tar {
        self.entry(name, b'5', "", b"")
    }

    pub fn symlink(self, name: &str, to: &str) -> Tar {
        self.entry(name, b'2', to, b"")
    }

    pub fn hard_link(self, name: &str, to: &str) -> Tar {
        self.entry(name, b'1', to, b"")
    }

    pub fn device(self, name: &str, device: (u32, u32)) -> Tar {
        self.raw(
            &Head {
                name,
                flag: b'3',
                link: "",
                size: b"0",
                mode: 0o600,
                owner: (0, 0),
                device,
            },
            b"",
        )
    }

    /// A PAX header for the entry that follows.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Tar {
        let mut body = Vec::new();
        for (key, value) in records {
            let bare = key.len() + value.len() + 3;
            let length = (bare + 1..)
                .find(|length| bare + length.to_string().len() == *length)
                .unwrap();
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.entry("pax", b'x', "", &body)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One layer of an image to be.
#[derive(Clone)]
pub struct Layer {
    pub media_type: String,
    pub blob: Vec<u8>,
    pub diff_id: String,
}

pub fn plain(tar: Vec<u8>) -> Layer {
    Layer {
        media_type: TAR.to_owned(),
        diff_id: sha(&tar),
        blob: tar,
    }
}

pub fn gzipped(tar: &[u8]) -> Layer {
    Layer {
        media_type: GZIP.to_owned(),
        diff_id: sha(tar),
        blob: gzip(tar),
    }
}

/// An image to be: its blobs by digest and its manifest.
#[derive(Clone)]
pub struct Made {
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub layers: Vec<Layer>,
    pub config: Value,
    pub manifest: Value,
}

pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": sha(bytes), "size": bytes.len() })
}

pub fn image(layers: &[Layer]) -> Made {
    let config = json!({
        "architecture": Architecture::host().0,
        "os": "linux",
        "config": {
            "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo"], "Env": ["A=1", "B=2"], "User": "1000:1000",
            "WorkingDir": "/srv", "StopSignal": "SIGINT", "ExposedPorts": {"80/tcp": {}}, "Volumes": null,
            "Labels": {"x": "y"}
        },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|it| it.diff_id.clone()).collect::<Vec<_>>() },
    });
    let mut made = Made {
        blobs: layers
            .iter()
            .map(|it| (sha(&it.blob), it.blob.clone()))
            .collect(),
        layers: layers.to_vec(),
        config: Value::Null,
        manifest: Value::Null,
    };
    made.set_config(config);
    made
}

impl Made {
    pub fn set_config(&mut self, config: Value) {
        let bytes = config.to_string().into_bytes();
        self.config = config;
        self.manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &bytes),
            "layers": self.layers.iter().map(|it| descriptor(&it.media_type, &it.blob)).collect::<Vec<_>>(),
        });
        self.blobs.insert(sha(&bytes), bytes);
    }

    /// Writes an OCI layout.
    pub fn layout(&self, directory: &Path) -> PathBuf {
        let manifest = self.manifest.to_string().into_bytes();
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor(MANIFEST, &manifest)] });
        let mut blobs = self.blobs.clone();
        blobs.insert(sha(&manifest), manifest);
        write_layout(directory, &blobs, &index)
    }
}

pub fn write_layout(directory: &Path, blobs: &BTreeMap<String, Vec<u8>>, index: &Value) -> PathBuf {
    let layout = directory.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    for (digest, bytes) in blobs {
        fs::write(layout.join("blobs").join(digest.replace(':', "/")), bytes).unwrap();
    }
    layout
}

/// Bytes that do not compress, the same for the same seed (xorshift).
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Bounds small enough to be reached by a test.
pub fn small() -> Limits {
    Limits {
        image_bytes_max: vistara_model::Bytes::mib(8),
        entries_max: 1000,
        layers_max: 10,
        devices_max: 10,
        xattr_bytes_max: 1000,
        xattrs_bytes_max: vistara_model::Bytes(20_000),
        names_bytes_max: vistara_model::Bytes(100_000),
        manifest_bytes_max: vistara_model::Bytes(64 << 10),
        bomb_floor_bytes: vistara_model::Bytes(64 << 10),
        bomb_ratio_max: 100,
        ..Limits::default()
    }
}

/// Every file of a store but its locks, with its length.
pub fn contents(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() == "locks" {
                continue;
            }
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                todo.push(entry.path());
            } else {
                found.insert(entry.path(), meta.len());
            }
        }
    }
    found
}

/// The error and its causes, as the command line prints them.
pub fn chain(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Imports into a fresh store that must be as before if that fails.
pub async fn import(
    source: &Path,
    limits: Limits,
) -> Result<(tempfile::TempDir, ImageStore, Image), ImageError> {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path(), limits).unwrap();
    let before = contents(root.path());
    match store
        .import(source, None, None, &ProgressSink::none())
        .await
    {
        Ok(image) => Ok((root, store, image)),
        Err(error) => {
            assert_eq!(before, contents(root.path()), "something was left behind");
            Err(error)
        }
    }
}

/// A root disk's listing by `unsquashfs`, one line a name; `None`, said aloud, where it is not installed.
pub async fn listing(store: &ImageStore, image: &Image) -> Option<String> {
    let disk = store.root_disk(image, &ProgressSink::none()).await.unwrap();
    let output = std::process::Command::new("unsquashfs")
        .args(["-lln", "-d", ""])
        .arg(&disk.path)
        .output();
    match output {
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(_) => {
            println!("SKIP: unsquashfs is not installed");
            None
        }
    }
}

pub fn has_packer() -> bool {
    let found = std::process::Command::new("sqfstar")
        .arg("-version")
        .output()
        .is_ok();
    if !found {
        println!("SKIP: sqfstar is not installed (apt-get install squashfs-tools)");
    }
    found
}
