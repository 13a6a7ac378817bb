//! A machine's record: one versioned JSON file in its directory, replaced as a whole.
//!
//! It is not forced to the disk: after a power cut no machine is left to describe. One that was cut short then is reported
//! and left where it is, with the log beside it.

use crate::logbook::Offsets as LogOffsets;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use vistara_machine::VmRecord;
use vistara_model::{
    Backend, Bytes, Digest, EndReason, EnvVar, Generation, Hypervisor, MachineId, MachineName,
    MachineSpec, MachineState, Signal,
};

/// Version of the file's form. A record of another version is not read, and its machine is left alone.
const FORMAT: u32 = 1;
const FILE: &str = "record.json";

/// One step of a machine's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) step: String,
    /// Microseconds after the request.
    pub(crate) begin_us: u64,
    pub(crate) took_us: u64,
}

/// Everything a node keeps of a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) format: u32,
    pub(crate) id: MachineId,
    pub(crate) name: MachineName,
    pub(crate) generation: Generation,
    pub(crate) spec: MachineSpec,
    pub(crate) image_id: Digest,
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<EnvVar>,
    pub(crate) user: String,
    pub(crate) working_dir: String,
    pub(crate) hostname: String,
    pub(crate) stop_signal: Signal,
    pub(crate) hypervisor: Hypervisor,
    pub(crate) backend: Backend,
    pub(crate) reasons: Vec<String>,
    pub(crate) kernel: Option<String>,
    /// The file of the program in its image, where it was looked at: corrections of what is known of it are kept under it.
    #[serde(default)]
    pub(crate) program_file: Option<String>,
    /// The memory that it gets if it is run again in a Linux guest; `spec` has what it has now.
    #[serde(default)]
    pub(crate) linux_memory: Option<Bytes>,
    /// Whose it is, where it is not the node's owner's.
    #[serde(default)]
    pub(crate) owner: Option<crate::mesh::Owner>,
    /// The slot from which its user id and group id on the host follow, where it has any of its own.
    pub(crate) slot: u32,
    pub(crate) state: MachineState,
    pub(crate) end: Option<EndReason>,
    /// Nanoseconds since 1970, as all times here.
    pub(crate) created_ns: u64,
    pub(crate) started_ns: Option<u64>,
    pub(crate) ended_ns: Option<u64>,
    pub(crate) vm: Option<VmRecord>,
    /// Whether it is only tried as a unikernel: nothing of it is shown until it has ended well.
    #[serde(default)]
    pub(crate) provisional: bool,
    /// Why a provisional run was undone, as a sentence for the user.
    #[serde(default)]
    pub(crate) undone: Option<String>,
    /// The host's boot in which that was.
    #[serde(default)]
    pub(crate) undone_boot_id: Option<String>,
    /// Whether this is the second run of its program, on Linux, after one as a unikernel.
    #[serde(default)]
    pub(crate) retried: bool,
    /// Where this run's output begins in the log.
    #[serde(default)]
    pub(crate) log_base: LogOffsets,
    /// The template it was forked from, if it did not boot.
    #[serde(default)]
    pub(crate) template: Option<String>,
    /// Whether it was forked before it was asked for.
    #[serde(default)]
    pub(crate) warm: bool,
    /// What it goes on from, if it is a fork of a machine that ran, or was restored.
    #[serde(default)]
    pub(crate) continues: Option<Continues>,
    /// Which copy of which service it is, if it is one.
    #[serde(default)]
    pub(crate) copy_of: Option<CopyOf>,
    /// Whether its guest's processes may be held still for a snapshot: a node that finds it so has them go on.
    #[serde(default)]
    pub(crate) held: bool,
    /// What its receipt is made of, and the receipt.
    #[serde(default)]
    pub(crate) proof: crate::receipts::Proof,
    pub(crate) timings: Vec<Step>,
}

/// A machine that is a copy of a service. It runs only while its node has a lease for the slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopyOf {
    /// The service's number, as 32 hexadecimal digits.
    pub(crate) service: String,
    /// What its owner calls it.
    pub(crate) name: String,
    /// Which slot.
    pub(crate) number: u32,
    /// Under which generation of it.
    pub(crate) generation: Generation,
}

/// A machine that goes on from another one's moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Continues {
    /// Whose, in words.
    pub(crate) parent: String,
    /// Whether its guest knows who it is now, and runs.
    pub(crate) renewed: bool,
    /// What of the program's output was the other's: this one's log begins there.
    pub(crate) printed_before: LogOffsets,
}

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
}

impl Record {
    pub(crate) const FORMAT: u32 = FORMAT;

    /// Removes the record in `dir`, so that what else is there is nobody's. Blocks on files.
    pub(crate) fn remove(dir: &Path) -> io::Result<()> {
        std::fs::remove_file(dir.join(FILE))
    }

    /// Replaces the record in `dir`. Blocks on files.
    pub(crate) fn save(&self, dir: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        let fresh = dir.join("record.json.new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        drop(file);
        std::fs::rename(&fresh, dir.join(FILE))
    }
}

/// Makes a machine's directory: nobody but the node's user may look into it.
pub(crate) fn make_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(dir)
}

/// What is found in a machine's directory.
#[derive(Debug)]
pub(crate) enum Loaded {
    /// A record of this version.
    Record(Box<Record>),
    /// No record: the node ended before the machine began.
    Nothing,
    /// Something that is not a record of this version, and why. It is left alone: it may describe a running machine.
    Damaged(String),
    /// A record of another version, which is left alone.
    Foreign(u32),
}

/// Reads the record in `dir`. Blocks on files.
pub(crate) fn load(dir: &Path) -> io::Result<Loaded> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let bytes = match std::fs::read(dir.join(FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::Nothing),
        Err(error) => return Err(error),
    };
    match serde_json::from_slice::<Format>(&bytes) {
        Ok(Format { format }) if format != FORMAT => return Ok(Loaded::Foreign(format)),
        Ok(_) => {}
        Err(error) => return Ok(Loaded::Damaged(error.to_string())),
    }
    Ok(match serde_json::from_slice(&bytes) {
        Ok(record) => Loaded::Record(Box::new(record)),
        Err(error) => Loaded::Damaged(error.to_string()),
    })
}

/// Directories of machines below `root`, with the ids that they are named after.
pub(crate) fn machine_dirs(root: &Path) -> io::Result<Vec<(MachineId, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            found.push((id, entry.path()));
        }
    }
    Ok(found)
}
