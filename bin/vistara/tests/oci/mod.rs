//! OCI image layouts as tar archives, with the command that a test needs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A layout of these blobs with this configuration and these layers (media type, bytes).
fn layout(config: &Value, layers: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, bytes).unwrap();
    };
    let mut blob = |media: &str, bytes: &[u8]| {
        let digits = digest(bytes);
        add(&format!("blobs/sha256/{digits}"), bytes);
        json!({"mediaType": media, "digest": format!("sha256:{digits}"), "size": bytes.len()})
    };
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let layers: Vec<Value> = layers
        .iter()
        .map(|(media, bytes)| blob(media, bytes))
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    let manifest = blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    add("index.json", index.to_string().as_bytes());
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    tar.into_inner().unwrap()
}

/// An image of one small file, for machines whose programs are the host's.
pub(crate) fn with_only(command: &[&str]) -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    layer
        .append_data(&mut header, "etc/passwd", std::io::empty())
        .unwrap();
    let layer = layer.into_inner().unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Cmd": command, "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer))]},
    });
    let media = "application/vnd.oci.image.layer.v1.tar".to_owned();
    layout(&config, &[(media, layer)])
}

/// The image of an archive, with another command.
pub(crate) fn with_command(archive: &Path, command: &[&str]) -> Vec<u8> {
    let mut files = BTreeMap::new();
    let mut tar = tar::Archive::new(std::fs::File::open(archive).unwrap());
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.insert(path.trim_start_matches("./").to_owned(), bytes);
    }
    let parsed = |path: &str| -> Value { serde_json::from_slice(&files[path]).unwrap() };
    let path_of = |described: &Value| {
        let digits = described["digest"].as_str().unwrap();
        format!("blobs/sha256/{}", digits.strip_prefix("sha256:").unwrap())
    };
    let manifest = parsed(&path_of(&parsed("index.json")["manifests"][0]));
    let mut config = parsed(&path_of(&manifest["config"]));
    config["config"]["Cmd"] = json!(command);
    config["config"]["Entrypoint"] = Value::Null;
    let layers: Vec<(String, Vec<u8>)> = manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| {
            let media = layer["mediaType"].as_str().unwrap().to_owned();
            (media, files[&path_of(layer)].clone())
        })
        .collect();
    layout(&config, &layers)
}
