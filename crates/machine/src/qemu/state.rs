//! What a machine keeps in its directory besides the node's record: sockets, its console's end, and how it ended.

use crate::{CaptureInfo, VmEnd, VmRecord};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vistara_host::process::ProcessIdentity;

/// Socket of the agent's channel.
pub(super) const CHANNEL_SOCKET: &str = "agent.sock";
/// Socket of QEMU's machine protocol.
pub(super) const QMP_SOCKET: &str = "qmp.sock";
/// Pipe of a unikernel's output. QEMU holds both its ends, so that it neither fails nor forgets while no node reads.
pub(super) const OUTPUT_PIPE: &str = "output.pipe";
/// Directory in which QEMU finds the host's name servers where it has a root directory of its own and a network.
pub(super) const RESOLVER: &str = "resolver";
/// The record of a machine, written as soon as it runs: a node that dies before it has written its own can still end it.
const LAUNCH_FILE: &str = "launch.json";
/// How the machine ended, written before it is ended: the next node reads it if this one does not live to tell.
const END_FILE: &str = "end.json";
/// The two as they are written; a node that died over it leaves one.
const LAUNCH_NEW: &str = "launch.new";
const END_NEW: &str = "end.new";
/// The end of the console, written when it was read from QEMU, which then has it no longer.
const CONSOLE_FILE: &str = "console";

/// The fields of [`VmRecord::backend`] that are QEMU's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(super) struct BackendRecord {
    /// Directories of its cgroup; none where there is none.
    pub(super) cgroup: Vec<PathBuf>,
    /// Helper processes: number and start time.
    pub(super) helpers: Vec<(u32, u64)>,
    /// Its writable disks: a full file system under them is told as trouble.
    pub(super) writable_disks: Vec<PathBuf>,
    /// What a machine that goes on from this one must have in common with it; absent in records of earlier versions, and
    /// where it cannot be captured.
    #[serde(default)]
    pub(super) info: Option<CaptureInfo>,
}

impl BackendRecord {
    /// The helpers' identities, of the boot in which they were started.
    pub(super) fn helper_identities(&self, boot_id: &str) -> Vec<ProcessIdentity> {
        let identity = |&(pid, start_ticks): &(u32, u64)| ProcessIdentity {
            pid,
            start_ticks,
            boot_id: boot_id.to_owned(),
        };
        self.helpers.iter().map(identity).collect()
    }
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

pub(super) fn write_console(dir: &Path, text: &[u8]) {
    if let Err(error) = fs::write(dir.join(CONSOLE_FILE), text) {
        tracing::warn!(%error, dir = %dir.display(), "a machine's console could not be kept");
    }
}

pub(super) fn read_console(dir: &Path) -> Vec<u8> {
    fs::read(dir.join(CONSOLE_FILE)).unwrap_or_default()
}

/// Removes the sockets and the launch's record, which mean nothing once the machine is gone.
pub(super) fn remove_live_files(dir: &Path) {
    for name in [
        CHANNEL_SOCKET,
        QMP_SOCKET,
        OUTPUT_PIPE,
        LAUNCH_FILE,
        LAUNCH_NEW,
        END_NEW,
    ] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, name, dir = %dir.display(), "a file of a machine stays");
            }
            _ => {}
        }
    }
    match fs::remove_dir_all(dir.join(RESOLVER)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, RESOLVER, dir = %dir.display(), "a directory of a machine stays");
        }
        _ => {}
    }
}

/// Removes what a launch that failed has written.
pub(super) fn remove_all_files(dir: &Path) {
    remove_live_files(dir);
    for name in [END_FILE, CONSOLE_FILE] {
        // They may never have been there.
        let _ = fs::remove_file(dir.join(name));
    }
}
