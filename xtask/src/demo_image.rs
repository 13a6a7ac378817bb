//! The demonstration image: Debian with python3, made by `mmdebstrap` from the mirror that this host's apt uses, as an
//! OCI archive (the tar of an OCI layout).
//!
//! The same packages give the same bytes: times are clamped, owners and order fixed. An archive made by the same recipe
//! is kept, so a second call only prints its path.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Raised when what is made changes.
const RECIPE: &str = "1";
const ARCHIVE: &str = "python3.oci.tar";
/// No file in the image is newer: 2025-01-01.
const EPOCH: &str = "1735689600";
const PACKAGES: &str = "python3,netbase";
/// Left out of the file system: nothing of it runs.
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
];

/// Makes the archive in `dir` unless it is there, and prints its path.
pub(crate) fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {dir:?}"))?;
    let archive = dir.join(ARCHIVE);
    let recipe_path = dir.join(format!("{ARCHIVE}.recipe"));
    let recipe = format!("{RECIPE} {EPOCH} {PACKAGES} {}\n", LEFT_OUT.join(" "));
    let kept = fs::read_to_string(&recipe_path).is_ok_and(|kept| kept == recipe);
    if !kept || !archive.exists() {
        let sources = apt_sources()?;
        eprintln!(
            "making a Debian image with python3 from {} (about a minute)",
            sources.0
        );
        let scratch = tempfile::tempdir_in(dir).context("make a scratch directory")?;
        let layer = scratch.path().join("layer.tar");
        // Compiled modules that are believed without a look at their source: clamped times would make Python compile the
        // others again at every start, and hashing the sources is slow where the guest's code is translated.
        let compile =
            "chroot \"$1\" python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib";
        bootstrap(&sources, PACKAGES, compile, &layer)?;
        let layer = fs::read(&layer).context("read the root file system")?;
        let fresh = scratch.path().join(ARCHIVE);
        fs::write(&fresh, oci_archive(&layer)?).with_context(|| format!("write {fresh:?}"))?;
        fs::rename(&fresh, &archive).with_context(|| format!("write {archive:?}"))?;
        fs::write(&recipe_path, recipe).with_context(|| format!("write {recipe_path:?}"))?;
    }
    println!("{}", archive.display());
    Ok(())
}

/// Makes a root file system with these packages as a tar of this name in `dir`, unless one of the same recipe is there.
/// `script` is run by the shell with the file system's directory as its first argument. Gives the tar's path.
pub(crate) fn root_tar(dir: &Path, name: &str, packages: &str, script: &str) -> Result<PathBuf> {
    let tar = dir.join(name);
    let recipe_path = dir.join(format!("{name}.recipe"));
    let recipe = format!(
        "{RECIPE} {EPOCH} {packages} {} {script}\n",
        LEFT_OUT.join(" ")
    );
    let kept = fs::read_to_string(&recipe_path).is_ok_and(|kept| kept == recipe);
    if kept && tar.exists() {
        return Ok(tar);
    }
    let sources = apt_sources()?;
    eprintln!("making a Debian image from {} (some minutes)", sources.0);
    let scratch = tempfile::tempdir_in(dir).context("make a scratch directory")?;
    let fresh = scratch.path().join(name);
    bootstrap(&sources, packages, script, &fresh)?;
    fs::rename(&fresh, &tar).with_context(|| format!("write {tar:?}"))?;
    fs::write(&recipe_path, recipe).with_context(|| format!("write {recipe_path:?}"))?;
    Ok(tar)
}

/// The suite's name and the `deb` lines of the Debian mirror that apt here uses.
fn apt_sources() -> Result<(String, Vec<String>)> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(CODENAME)|$(COMPONENT)", "Created-By: Packages"])
        .output()
        .context("run apt-get; the demonstration image is made of Debian's packages, so it needs a Debian host")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = Vec::new();
    let mut suite = None;
    for line in text.lines() {
        let [origin, uri, codename, component] = line.split('|').collect::<Vec<_>>()[..] else {
            continue;
        };
        if origin != "Debian" || component != "main" {
            continue;
        }
        if !codename.contains('-') {
            suite = Some(codename.to_owned());
        }
        let entry = format!("deb {uri} {codename} {component}");
        if !lines.contains(&entry) {
            lines.push(entry);
        }
    }
    match suite {
        Some(suite) => Ok((suite, lines)),
        None => bail!("apt here knows no Debian mirror; run: sudo apt-get update"),
    }
}

fn bootstrap(
    (suite, lines): &(String, Vec<String>),
    packages: &str,
    script: &str,
    dest: &Path,
) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=essential", "--format=tar"])
        .arg(format!("--include={packages}"))
        .env("SOURCE_DATE_EPOCH", EPOCH);
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.arg(format!("--customize-hook={script}"));
    command.arg(suite).arg(dest).args(lines);
    let status = match command.status() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("mmdebstrap is not installed; run: sudo apt-get install mmdebstrap")
        }
        other => other.context("run mmdebstrap")?,
    };
    if !status.success() {
        bail!("mmdebstrap failed ({status}); if apt's lists are old, run: sudo apt-get update");
    }
    Ok(())
}

/// An OCI layout with one image of one layer, as a tar.
fn oci_archive(layer: &[u8]) -> Result<Vec<u8>> {
    const TYPE: &str = "application/vnd.oci.image";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(layer).context("compress the layer")?;
    let packed = gzip.finish().context("compress the layer")?;
    let config = to_bytes(&json!({
        "architecture": match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other },
        "os": "linux",
        "created": "2025-01-01T00:00:00Z",
        "config": {
            "Cmd": ["python3"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": [digest(layer)] },
        "history": [{ "created": "2025-01-01T00:00:00Z", "created_by": "mmdebstrap" }],
    }))?;
    let describe = |kind: &str, data: &[u8]| json!({ "mediaType": format!("{TYPE}.{kind}"), "digest": digest(data), "size": data.len() });
    let manifest = to_bytes(&json!({
        "schemaVersion": 2,
        "mediaType": format!("{TYPE}.manifest.v1+json"),
        "config": describe("config.v1+json", &config),
        "layers": [describe("layer.v1.tar+gzip", &packed)],
    }))?;
    let mut described = describe("manifest.v1+json", &manifest);
    described["annotations"] = json!({ "org.opencontainers.image.ref.name": "python3" });
    let index = to_bytes(&json!({
        "schemaVersion": 2,
        "mediaType": format!("{TYPE}.index.v1+json"),
        "manifests": [described],
    }))?;

    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |name: String, data: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        archive
            .append_data(&mut header, name, data)
            .context("write the archive")
    };
    add(
        "oci-layout".to_owned(),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    add("index.json".to_owned(), &index)?;
    for blob in [&manifest, &config, &packed] {
        add(
            format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]),
            blob,
        )?;
    }
    archive.into_inner().context("write the archive")
}

fn to_bytes(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context("write JSON")
}

fn digest(data: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(data)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read as _;

    #[test]
    fn the_archive_is_an_oci_layout_whose_digests_hold_and_which_is_the_same_each_time() {
        let archive = oci_archive(b"a layer").unwrap();
        assert_eq!(archive, oci_archive(b"a layer").unwrap());
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            files.insert(name, data);
        }
        for (name, data) in &files {
            if let Some(hex) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(digest(data), format!("sha256:{hex}"));
            }
        }
        let blob = |value: &Value| {
            let text = value["digest"].as_str().unwrap();
            serde_json::from_slice::<Value>(&files[&format!("blobs/sha256/{}", &text[7..])])
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest = blob(&index["manifests"][0]).unwrap();
        let config = blob(&manifest["config"]).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(b"a layer"));
        assert_eq!(config["config"]["Cmd"][0], "python3");
    }
}
