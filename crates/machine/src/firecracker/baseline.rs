//! The least that Firecracker needs to bring a guest's agent up: the baseline that our own start is measured against.
//!
//! It is the very machine that a Vistara machine is: its settings are asked of a running one, and its kernel, initramfs and
//! read-only disks are copies of what that one sees. They are given to a Firecracker without jail, cgroup or notes, by its
//! configuration file; so whatever else a start of ours costs, it is ours. It has an API that nobody asks: without one, the
//! same guest's kernel takes twice as long (`docs/performance.md`), and that would be held in our favour.

use super::api::{API_SOCKET, ApiError, SNAPSHOT_LIMIT};
use super::configure::disk_name;
use super::types::{MemoryBackend, SnapshotCreate, SnapshotLoad};
use super::{Api, channel, find_program, io_error, state};
use crate::boot::overlay::OverlayTemplates;
use crate::{ChannelStream, VmmError};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vistara_host::files::clone_sparse;
use vistara_model::Bytes;

/// Name of the configuration file, in the directory where it works.
const CONFIG: &str = "machine.json";
/// What a capture of it consists of, beside its disks.
const STATE: &str = "captured.state";
const MEMORY: &str = "captured.memory";
/// How long it may take until it listens at its API.
const API_LIMIT: Duration = Duration::from_secs(10);
/// What a configuration file has of what a running machine tells of itself; of the rest it is the output's place, which is
/// ours, or nothing.
const KEPT: [&str; 6] = [
    "machine-config",
    "boot-source",
    "drives",
    "vsock",
    "balloon",
    "entropy",
];

fn failed(step: &'static str) -> impl Fn(String) -> VmmError {
    move |message| VmmError::Launch { step, message }
}

/// A machine that can be started again and again.
#[derive(Debug)]
pub struct RawFirecracker {
    program: PathBuf,
    dir: PathBuf,
    writable: Vec<(String, PathBuf)>,
    read_only: Vec<String>,
    restored: AtomicU32,
}

/// One that runs; it is ended when this is dropped.
#[derive(Debug)]
pub struct RawRun {
    child: Child,
    dir: PathBuf,
    /// Whether its directory is its own, and goes with it.
    is_copy: bool,
}

impl RawFirecracker {
    /// The like of the machine that runs in `machine`, a machine's directory, with files in `dir`, an empty directory. It may not have
    /// a network: there is no tap for it. Its writable disks are empty file systems of the same size, as that one began with.
    /// `program` is looked for as ever where absent. Takes the right to look into the machine's root directory.
    ///
    /// # Errors
    /// [`VmmError::Absent`], [`VmmError::Launch`], [`VmmError::Io`].
    pub async fn like(
        machine: &Path,
        program: Option<PathBuf>,
        dir: &Path,
    ) -> Result<RawFirecracker, VmmError> {
        let program = program
            .or_else(|| find_program("firecracker", None))
            .ok_or_else(|| VmmError::Absent {
                what: "firecracker".to_owned(),
                mend: "name it with VISTARA_FIRECRACKER".to_owned(),
            })?;
        let step = failed("asking the machine what it is");
        let record = state::read_launch(machine)
            .ok_or_else(|| step("it does not run in Firecracker".to_owned()))?;
        let backend: state::BackendRecord =
            serde_json::from_value(record.backend).map_err(|error| step(error.to_string()))?;
        let told = Api::new(&backend.root).settings().await;
        let mut told: Value = told.map_err(|error| step(error.to_string()))?;
        // They are told in any order, and the guest names its disks by the order in which they are set.
        if let Some(drives) = told["drives"].as_array_mut() {
            drives.sort_by_cached_key(|drive| {
                let id = drive["drive_id"].to_string();
                (id.len(), id)
            });
        }
        let mut config = serde_json::Map::new();
        for name in KEPT {
            if let Some(value) = told.get(name).filter(|value| !value.is_null()) {
                config.insert(name.to_owned(), value.clone());
            }
        }
        // Where it works is its root directory, or it has none of its own.
        let sees = PathBuf::from(format!("/proc/{}/cwd", record.pid));
        let copy = |name: &str| {
            let (from, to) = (sees.join(name), dir.join(name));
            clone_sparse(&from, &to).map_err(io_error("copying", &from))
        };
        let source = &told["boot-source"];
        for file in ["kernel_image_path", "initrd_path"] {
            if let Some(name) = source[file].as_str() {
                copy(name)?;
            }
        }
        let (mut writable, mut read_only) = (Vec::new(), Vec::new());
        let drives = told["drives"].as_array().map_or(0, Vec::len);
        for index in 0..drives {
            let name = disk_name(index);
            if told["drives"][index]["is_read_only"] == true {
                copy(&name)?;
                read_only.push(name);
                continue;
            }
            let at = sees.join(&name);
            let size = fs::metadata(&at).map_err(io_error("asking the size of", &at))?;
            let kept = dir.join(format!("{name}.blank"));
            OverlayTemplates::open(dir)
                .and_then(|blanks| blanks.create(Bytes(size.len()), &kept))
                .map_err(|error| failed("making its writable disk")(error.to_string()))?;
            writable.push((name, kept));
        }
        let path = dir.join(CONFIG);
        fs::write(&path, Value::Object(config).to_string()).map_err(io_error("writing", &path))?;
        Ok(RawFirecracker {
            program,
            dir: dir.to_owned(),
            writable,
            read_only,
            restored: AtomicU32::new(0),
        })
    }

    /// Makes its writable disks anew. Blocks on files.
    ///
    /// # Errors
    /// [`VmmError::Io`].
    pub fn reset(&self) -> Result<(), VmmError> {
        for (name, blank) in &self.writable {
            let disk = self.dir.join(name);
            match fs::remove_file(&disk) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io_error("removing", &disk)(error));
                }
                _ => {}
            }
            clone_sparse(blank, &disk).map_err(io_error("copying to", &disk))?;
        }
        Ok(())
    }

    /// Starts it; one at a time.
    ///
    /// # Errors
    /// [`VmmError::Io`].
    pub fn start(&self) -> Result<RawRun, VmmError> {
        let child = Command::new(&self.program)
            .args(["--api-sock", API_SOCKET, "--config-file", CONFIG])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            // What it logs, and what the guest says, goes where ours goes: to a file.
            .stdout(self.log()?)
            .stderr(self.log()?)
            .spawn()
            .map_err(io_error("starting", &self.program))?;
        Ok(RawRun {
            child,
            dir: self.dir.clone(),
            is_copy: false,
        })
    }

    /// Captures the one that runs, and ends it. Its disks stay as they are.
    ///
    /// # Errors
    /// [`VmmError::Launch`].
    pub async fn capture(&self, run: RawRun) -> Result<(), VmmError> {
        let step = |error: ApiError| failed("capturing the bare guest")(error.to_string());
        let api = Api::new(&run.dir);
        api.pause().await.map_err(step)?;
        let body = SnapshotCreate {
            snapshot_type: "Full",
            snapshot_path: STATE.to_owned(),
            mem_file_path: MEMORY.to_owned(),
        };
        let created = api.put("/snapshot/create", &body, SNAPSHOT_LIMIT).await;
        created.map_err(step)
    }

    /// A directory for one that goes on from the capture: links to its files, and a disk of its own. Blocks on files.
    fn place(&self) -> Result<PathBuf, VmmError> {
        let number = self.restored.fetch_add(1, Ordering::Relaxed);
        let place = self.dir.join(format!("copy-{number}"));
        fs::create_dir(&place).map_err(io_error("making", &place))?;
        let shared = self.read_only.iter().map(String::as_str);
        for name in shared.chain([STATE, MEMORY]) {
            let from = self.dir.join(name);
            fs::hard_link(&from, place.join(name)).map_err(io_error("linking to", &from))?;
        }
        for (name, _) in &self.writable {
            let from = self.dir.join(name);
            clone_sparse(&from, &place.join(name)).map_err(io_error("copying", &from))?;
        }
        Ok(place)
    }

    /// Starts one that goes on from the capture, with its files in a directory of its own. The moment is that of its start, after
    /// its files were made.
    ///
    /// # Errors
    /// [`VmmError::Launch`], [`VmmError::Io`].
    pub async fn restore(&self) -> Result<(RawRun, Instant), VmmError> {
        let dir = self.place()?;
        let begin = Instant::now();
        let child = Command::new(&self.program)
            .args(["--api-sock", API_SOCKET])
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(self.log()?)
            .stderr(self.log()?)
            .spawn()
            .map_err(io_error("starting", &self.program))?;
        let run = RawRun {
            child,
            dir,
            is_copy: true,
        };
        let load = SnapshotLoad {
            snapshot_path: STATE.to_owned(),
            mem_backend: MemoryBackend {
                backend_type: "File",
                backend_path: MEMORY.to_owned(),
            },
            resume_vm: true,
        };
        let step = failed("restoring the bare guest");
        let listening = tokio::time::timeout(API_LIMIT, Api::new(&run.dir).listening()).await;
        let mut session = listening
            .map_err(|_| step("its API does not listen".to_owned()))?
            .map_err(|error| step(error.to_string()))?;
        let loaded = session.put("/snapshot/load", &load, SNAPSHOT_LIMIT).await;
        loaded.map_err(|error| step(error.to_string()))?;
        Ok((run, begin))
    }

    fn log(&self) -> Result<fs::File, VmmError> {
        let path = self.dir.join("log");
        let mut options = fs::File::options();
        let opened = options.create(true).append(true).open(&path);
        opened.map_err(io_error("opening", &path))
    }
}

impl RawRun {
    /// Its monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to the guest's agent as soon as it listens, with the tries and pauses of our own machines.
    ///
    /// # Errors
    /// [`VmmError::Launch`] with the end of what it said where that takes too long.
    pub async fn open_channel(&self) -> Result<ChannelStream, VmmError> {
        channel::open(&self.dir).await.map_err(|error| {
            let words = fs::read(self.dir.join("log")).unwrap_or_default();
            let words =
                String::from_utf8_lossy(&words[words.len().saturating_sub(1_000)..]).into_owned();
            failed("booting the bare guest")(format!("{error}: {words}"))
        })
    }
}

impl Drop for RawRun {
    fn drop(&mut self) {
        // All can only fail where it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.is_copy {
            let _ = fs::remove_dir_all(&self.dir);
        }
        for socket in [API_SOCKET, super::configure::CHANNEL_SOCKET] {
            let _ = fs::remove_file(self.dir.join(socket));
        }
    }
}
