//! A template's directory: what is written to it, and what is believed of it when it is read. All of this blocks on files.

use crate::fault::chain;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use vistara_machine::{Capture, CaptureError, sparse_digest};
use vistara_model::{Digest, MachineId};

/// Version of `template.json`. 2: with the digest of the writable disk.
pub(super) const FORMAT: u32 = 2;
const ABOUT: &str = "template.json";
const MAKING: &str = "making.json";
const OVERLAY: &str = "overlay.img";

/// What `template.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub(super) format: u32,
    pub(crate) key: String,
    pub(crate) image_id: Digest,
    pub(crate) image: String,
    pub(crate) kernel: String,
    pub(crate) vmm: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) network: bool,
    pub(crate) created_ns: u64,
    /// How long its first machine took to boot and to be captured.
    pub(crate) making_us: u64,
    /// [`sparse_digest`] of the writable disk.
    pub(super) overlay_blake3: String,
}

#[derive(Serialize, Deserialize)]
struct Making {
    id: MachineId,
}

/// Makes an empty directory, in place of whatever an earlier try left.
pub(super) fn begin(dir: &Path) -> io::Result<()> {
    remove(dir);
    std::fs::DirBuilder::new().mode(0o700).create(dir)
}

/// Notes which machine is captured in `dir`.
pub(super) fn note_making(dir: &Path, id: &MachineId) -> io::Result<()> {
    let bytes = serde_json::to_vec(&Making { id: id.clone() }).map_err(io::Error::other)?;
    std::fs::write(dir.join(MAKING), bytes)
}

/// The machine that was being captured in `dir`, if that was noted.
pub(super) fn making(dir: &Path) -> Option<MachineId> {
    let bytes = std::fs::read(dir.join(MAKING)).ok()?;
    let making: Making = serde_json::from_slice(&bytes).ok()?;
    Some(making.id)
}

pub(super) fn overlay_in(dir: &Path) -> PathBuf {
    dir.join(OVERLAY)
}

/// The writable disk in `dir`, open, with its digest.
pub(super) fn open_overlay(dir: &Path) -> io::Result<(File, String)> {
    let file = File::open(overlay_in(dir))?;
    let digest = sparse_digest(&file)?;
    Ok((file, digest))
}

/// What the template in `dir` is of; `None` where it was not finished, or by another version.
pub(super) fn read_about(dir: &Path) -> Option<Kept> {
    let bytes = std::fs::read(dir.join(ABOUT)).ok()?;
    let kept: Kept = serde_json::from_slice(&bytes).ok()?;
    let named_so = dir.file_name().is_some_and(|name| *name == *kept.key);
    (kept.format == FORMAT && named_so).then_some(kept)
}

/// Bytes that a directory's files really take.
pub(super) fn size_on_disk(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let sizes = entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok().map(|data| data.blocks() * 512));
    sizes.sum()
}

/// Directories of templates, whole or not, by their names.
pub(super) fn directories(parent: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return Vec::new();
    };
    let named = entries.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((name, entry.path()))
    });
    named.collect()
}

/// When a template was used last, as far as its directory tells.
pub(super) fn used_ns(dir: &Path) -> Option<u64> {
    let time = std::fs::metadata(dir.join(ABOUT)).ok()?.modified().ok()?;
    u64::try_from(time.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
}

/// Writes all of a template whose writable disk lies in `dir` already.
pub(super) fn write(capture: &Capture, kept: &Kept, dir: &Path) -> Result<(), CaptureError> {
    capture.write(dir)?;
    let io = |source: io::Error| CaptureError::Io {
        operation: "write",
        path: dir.join(ABOUT),
        source,
    };
    // Only the capture's own machine needed it, which is gone.
    let _ = std::fs::remove_file(dir.join(MAKING));
    let fresh = dir.join("template.json.new");
    let bytes = serde_json::to_vec_pretty(kept).map_err(|error| io(error.into()))?;
    std::fs::write(&fresh, bytes).map_err(io)?;
    std::fs::rename(&fresh, dir.join(ABOUT)).map_err(io)
}

/// The template in `dir`, every byte of it checked. One that cannot be used is removed; `None` then, and where there is
/// none.
pub(super) fn read(dir: &Path) -> Option<(Kept, Capture, File)> {
    if !dir.exists() {
        return None;
    }
    match read_checked(dir) {
        Ok(found) => {
            // Its time of use, for the next node. That it cannot be noted makes it look old.
            if let Ok(file) = File::options().write(true).open(dir.join(ABOUT)) {
                let _ = file.set_modified(SystemTime::now());
            }
            Some(found)
        }
        Err(reason) => {
            tracing::warn!(path = %dir.display(), reason, "a template cannot be used and is removed");
            remove(dir);
            None
        }
    }
}

fn read_checked(dir: &Path) -> Result<(Kept, Capture, File), String> {
    let kept = read_about(dir).ok_or("it does not say what it is")?;
    let capture = Capture::read(dir).map_err(|error| chain(&error))?;
    let (overlay, digest) = open_overlay(dir).map_err(|error| format!("its disk: {error}"))?;
    if digest != kept.overlay_blake3 {
        return Err("its disk is not what was written".to_owned());
    }
    Ok((kept, capture, overlay))
}

/// Removes a directory. Templates in use live on without theirs.
pub(super) fn remove(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "a template's directory could not be removed");
        }
        _ => {}
    }
}
