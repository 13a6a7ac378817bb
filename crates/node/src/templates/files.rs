//! A template's directory: what is written to it, and what is believed of it when it is read. All of this blocks on files.

use crate::fault::chain;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vistara_machine::{Capture, CaptureError, sparse_digest};
use vistara_model::{Digest, MachineId, VmmKind};

/// Version of `template.json`. 2: with the digest of the writable disk.
pub(super) const FORMAT: u32 = 2;
const ABOUT: &str = "template.json";
const MAKING: &str = "making.json";
const OVERLAY: &str = "overlay.img";
/// How exactly a template's time of use is on disk: it decides on days, and a write for every fork would be felt.
const USE_NOTED_EVERY: Duration = Duration::from_secs(3600);

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

/// A machine that is being captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Making {
    pub(super) id: MachineId,
    /// Its monitor, as text: another version may know others. Earlier ones did not note it.
    #[serde(default)]
    pub(super) vmm: Option<String>,
    /// The host's boot in which it was started: no machine outlives that.
    #[serde(default)]
    boot_id: Option<String>,
}

impl Making {
    pub(super) fn new(id: MachineId, vmm: VmmKind) -> Making {
        Making {
            id,
            vmm: Some(vmm.to_string()),
            boot_id: vistara_host::facts::boot_id().ok(),
        }
    }

    /// Whether it may still run: the host was not restarted since.
    pub(super) fn may_run(&self) -> bool {
        match (&self.boot_id, vistara_host::facts::boot_id()) {
            (Some(then), Ok(now)) => *then == now,
            _ => true,
        }
    }

    /// Whether it was started by a monitor of this kind, as far as that is known.
    pub(super) fn is_of(&self, kind: VmmKind) -> bool {
        (self.vmm.as_ref()).is_none_or(|noted| *noted == kind.to_string())
    }
}

/// Makes an empty directory, in place of whatever an earlier try left.
pub(super) fn begin(dir: &Path) -> io::Result<()> {
    remove(dir);
    std::fs::DirBuilder::new().mode(0o700).create(dir)
}

/// Notes which machine is captured in `dir`. Until [`forget_making`] the directory is not removed: this is all that is known
/// of a machine that runs.
pub(super) fn note_making(dir: &Path, making: &Making) -> io::Result<()> {
    let bytes = serde_json::to_vec(making).map_err(io::Error::other)?;
    // All of the note or none: what cannot be read could not be acted on.
    let fresh = dir.join("making.json.new");
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(&fresh, dir.join(MAKING))
}

/// The machine that was being captured in `dir`, if that was noted. A note that cannot be read is none: it is whole before
/// its machine is launched, unless the host lost power, and no machine outlives that.
pub(super) fn making(dir: &Path) -> Option<Making> {
    let bytes = std::fs::read(dir.join(MAKING)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Takes the note back: its machine is gone.
pub(super) fn forget_making(dir: &Path) {
    match std::fs::remove_file(dir.join(MAKING)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "the note of a machine that was captured stays");
        }
        _ => {}
    }
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

/// Notes that the template in `dir` is used now, for the next node, unless that was done within the hour. That it cannot be
/// noted makes it look old; one that is in memory only has nothing to note it by.
pub(super) fn note_use(dir: &Path) {
    let note = || {
        let file = File::options().write(true).open(dir.join(ABOUT))?;
        let noted = file.metadata()?.modified()?;
        // A time to come is as wrong as one long gone.
        match noted.elapsed() {
            Ok(ago) if ago < USE_NOTED_EVERY => Ok(()),
            _ => file.set_modified(SystemTime::now()),
        }
    };
    if let Err::<(), io::Error>(error) = note() {
        tracing::debug!(path = %dir.display(), %error, "a template's use could not be noted");
    }
}

/// Writes all of a template whose writable disk lies in `dir` already.
pub(super) fn write(capture: &Capture, kept: &Kept, dir: &Path) -> Result<(), CaptureError> {
    capture.write(dir)?;
    let io = |source: io::Error| CaptureError::Io {
        operation: "write",
        path: dir.join(ABOUT),
        source,
    };
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
            note_use(dir);
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

/// Removes a directory, unless it has the note of a machine that may run. Templates in use live on without theirs.
pub(super) fn remove(dir: &Path) {
    if making(dir).is_some() {
        tracing::warn!(path = %dir.display(), "a directory stays, as the machine noted in it may run");
        return;
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "a template's directory could not be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_a_machines_note_stays_until_the_note_is_taken_back() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("key");
        begin(&dir).unwrap();
        let making_one = Making::new(MachineId::from_random([7; 16]), VmmKind::Qemu);
        note_making(&dir, &making_one).unwrap();
        assert!(begin(&dir).is_err(), "made anew under a machine that runs");
        assert_eq!(making(&dir), Some(making_one));
        forget_making(&dir);
        begin(&dir).unwrap();
        assert_eq!(making(&dir), None);
        // One that was cut by a power failure keeps nobody out.
        std::fs::write(dir.join(MAKING), b"").unwrap();
        remove(&dir);
        assert!(!dir.exists());
    }

    #[test]
    fn a_note_tells_whose_machine_it_is_and_of_which_boot() {
        let id = MachineId::from_random([7; 16]);
        let ours = Making::new(id.clone(), VmmKind::Qemu);
        assert!(ours.may_run() && ours.is_of(VmmKind::Qemu));
        assert!(!ours.is_of(VmmKind::Firecracker));
        let earlier = Making {
            boot_id: Some("another".to_owned()),
            ..ours.clone()
        };
        assert!(!earlier.may_run());
        // As versions before wrote it: it may be anybody's, and run.
        let old: Making = serde_json::from_str(&format!("{{\"id\":\"{id}\"}}")).unwrap();
        assert!(old.may_run() && old.is_of(VmmKind::Qemu) && old.is_of(VmmKind::Firecracker));
        // As a later one may: it is nobody's that is known here.
        let later = ours.vmm.as_ref().map(|_| "another".to_owned());
        assert!(!Making { vmm: later, ..ours }.is_of(VmmKind::Qemu));
    }

    #[test]
    fn a_use_is_noted_once_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        // Nothing to note it by: no file appears.
        note_use(dir.path());
        assert_eq!(used_ns(dir.path()), None);
        let file = File::create(dir.path().join(ABOUT)).unwrap();
        let now = SystemTime::now();
        let minute = Duration::from_secs(60);
        for (then, noted) in [
            (now - 59 * minute, false),
            (now - 61 * minute, true),
            (now + 60 * minute, true),
        ] {
            file.set_modified(then).unwrap();
            note_use(dir.path());
            let modified = file.metadata().unwrap().modified().unwrap();
            assert_eq!(modified != then, noted, "{then:?}");
            assert!(!noted || modified.elapsed().unwrap() < minute);
        }
    }
}
