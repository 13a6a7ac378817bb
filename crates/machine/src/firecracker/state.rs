//! What a machine keeps in its directory besides the node's record: its console, how it ended, and its monitor's own
//! directory (`jail/`, see `stage.rs`), which goes with it.

use super::network::{self, HelperRecord};
use crate::{CaptureInfo, VmEnd, VmRecord};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Pipe of a unikernel's output. Firecracker holds both its ends, so that it neither fails nor forgets while no node reads.
pub(super) const OUTPUT_PIPE: &str = "output.pipe";
/// What a Linux guest writes to its serial console while it runs.
pub(super) const LIVE_CONSOLE: &str = "console.live";
/// The end of the console as it was before, or is since the machine ended.
pub(super) const KEPT_CONSOLE: &str = "console";
/// The record of a machine, written as soon as it runs: a node that dies before it has written its own can still end it.
const LAUNCH_FILE: &str = "launch.json";
/// How the machine ended: the next node reads it if this one does not live to tell.
const END_FILE: &str = "end.json";
/// Files as they are written; a node that died over it leaves one.
const LAUNCH_NEW: &str = "launch.new";
const END_NEW: &str = "end.new";
pub(super) const NEW_CONSOLE: &str = "console.new";

/// The fields of [`VmRecord::backend`] that are Firecracker's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(super) struct BackendRecord {
    /// Directories of its cgroup; none where there is none.
    pub(super) cgroup: Vec<PathBuf>,
    /// Firecracker's own directory.
    pub(super) root: PathBuf,
    /// Its writable disks: a full file system under them is told as trouble.
    pub(super) writable_disks: Vec<PathBuf>,
    /// Whether a unikernel runs in it.
    pub(super) unikernel: bool,
    /// What a capture of it is of, where it may be captured.
    pub(super) capture: Option<CaptureInfo>,
    /// What it is captured as while it goes on, where it can be.
    #[serde(default)]
    pub(super) shape: Option<CaptureInfo>,
    /// What gives it a network, where something does.
    #[serde(default)]
    pub(super) network: Option<HelperRecord>,
}

/// The reader's end of the pipe of a unikernel's output; nothing where the machine has none.
pub(super) fn open_output(dir: &Path) -> Option<fs::File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir.join(OUTPUT_PIPE), flags, Mode::empty());
    opened.ok().map(fs::File::from)
}

fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    // Written beside and renamed: a reader finds all of it or nothing.
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(value)?)?;
    fs::rename(&new, path)
}

/// A file of ours; nothing where it is missing or damaged, which is as good as missing.
fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

pub(super) fn write_launch(dir: &Path, record: &VmRecord) -> io::Result<()> {
    write_json(&dir.join(LAUNCH_FILE), record)
}

pub(super) fn read_launch(dir: &Path) -> Option<VmRecord> {
    read_json(&dir.join(LAUNCH_FILE))
}

pub(super) fn write_end(dir: &Path, end: &VmEnd) {
    if let Err(error) = write_json(&dir.join(END_FILE), end) {
        tracing::warn!(%error, dir = %dir.display(), "a machine's end could not be noted");
    }
}

pub(super) fn read_end(dir: &Path) -> Option<VmEnd> {
    read_json(&dir.join(END_FILE))
}

/// Removes what means nothing once the machine is gone.
pub(super) fn remove_live_files(dir: &Path) {
    for name in [
        OUTPUT_PIPE,
        LIVE_CONSOLE,
        LAUNCH_FILE,
        LAUNCH_NEW,
        END_NEW,
        NEW_CONSOLE,
    ] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, name, dir = %dir.display(), "a file of a machine stays");
            }
            _ => {}
        }
    }
    super::stage::remove(dir);
    network::remove(dir);
}

/// Removes everything that a launch writes.
pub(super) fn remove_all_files(dir: &Path) {
    remove_live_files(dir);
    for name in [END_FILE, KEPT_CONSOLE] {
        // They may never have been there.
        let _ = fs::remove_file(dir.join(name));
    }
}
