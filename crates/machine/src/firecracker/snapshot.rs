//! Capturing a machine: one that ends with it, and one that goes on.
//!
//! Firecracker writes the whole memory to a file in its directory, while the guest is held; from there it is copied into
//! memory that can be sealed. A snapshot resets the guest's vsock, of the captured machine as well: its agent listens on, and
//! whoever spoke with it must call again.

use super::api::SNAPSHOT_LIMIT;
use super::configure::{SNAPSHOT_MEMORY, SNAPSHOT_STATE, TAKEN_MEMORY, TAKEN_STATE};
use super::start::copy_to_memory;
use super::state;
use super::types::SnapshotCreate;
use super::vm::FirecrackerVm;
use crate::{AtRest, Capture, CaptureInfo, Quiet, Snapshot, Vm, VmmError};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;
use vistara_host::cgroup::Cgroup;
use vistara_host::files;

/// Bytes of the largest state that is taken: it is some 30 KiB.
const STATE_MAX: u64 = 64 << 20;
/// Bytes that writing a snapshot takes beyond the guest's memory.
const SNAPSHOT_BEYOND: u64 = 32 << 20;

/// What Firecracker has written of a machine.
struct Written {
    memory: File,
    state: File,
}

fn refused(operation: &'static str) -> impl Fn(io::Error) -> VmmError {
    move |error| VmmError::Control {
        operation,
        message: error.to_string(),
    }
}

/// Captures a machine that was launched for it, and ends it.
pub(super) async fn capture(vm: &FirecrackerVm) -> Result<Capture, VmmError> {
    const OPERATION: &str = "the capture";
    let parts = &vm.inner.parts;
    let Some(info) = parts.backend.capture.clone() else {
        return Err(VmmError::Unsupported {
            kind: parts.record.kind,
            reason: "this machine was not launched to be captured".to_owned(),
        });
    };
    // One that is held answers nobody.
    vm.go_on()?;
    if let Err(error) = vm.inner.api.pause().await {
        return Err(vm.control(OPERATION, error).await);
    }
    // The guest is held, so nobody else can use what is given here.
    let cgroup = Cgroup::from_dirs(parts.backend.cgroup.clone());
    if let Err(error) = cgroup.raise_memory_max(room(&info)) {
        tracing::warn!(%error, "a machine has no more memory for its capture than for itself");
    }
    let names = (SNAPSHOT_STATE, SNAPSHOT_MEMORY);
    let written = write(vm, names, OPERATION).await?;
    Vm::kill(vm).await?;
    // How it ended says nothing to anybody: its state is the capture's now.
    state::remove_all_files(&parts.dir);
    seal(info, written).await.map_err(refused(OPERATION))
}

/// Captures a machine, and lets it go on whatever comes of it.
pub(super) async fn snapshot(
    vm: &FirecrackerVm,
    quiet: Quiet,
    at_rest: AtRest,
) -> Result<Snapshot, VmmError> {
    const OPERATION: &str = "the snapshot";
    let inner = &vm.inner;
    let info = vm.snapshot_of()?.clone();
    if inner.held.load(Ordering::Relaxed) {
        return Err(VmmError::Control {
            operation: OPERATION,
            message: "its monitor is held, and answers nobody".to_owned(),
        });
    }
    quiet.await?;
    let begin = Instant::now();
    if let Err(error) = inner.api.pause().await {
        // One that answered too late may be held all the same.
        if let Err(error) = inner.api.resume().await {
            tracing::debug!(%error, "a machine that was not held for its snapshot");
        }
        vm.close_channel();
        return Err(vm.control(OPERATION, error).await);
    }
    let cgroup = Cgroup::from_dirs(inner.parts.backend.cgroup.clone());
    let raised = cgroup.raise_memory_max(room(&info));
    let written = at_rest_of(vm, at_rest).await;
    let went_on = inner.api.resume().await;
    let pause = begin.elapsed();
    // Before what else may fail: the agent is to be called again by whoever finds its channel closed.
    vm.close_channel();
    let lowered = raised.and_then(|raised| raised.take_back());
    if let Err(error) = lowered {
        tracing::warn!(%error, dir = %inner.parts.dir.display(), "a machine's memory limit is not what it was before its snapshot");
    }
    let written = written?;
    if let Err(error) = went_on {
        return Err(vm.control(OPERATION, error).await);
    }
    let capture = seal(info, written).await.map_err(refused(OPERATION))?;
    Ok(Snapshot { capture, pause })
}

/// What is written is charged to the machine's cgroup, all the more where the directory is in memory.
fn room(info: &CaptureInfo) -> u64 {
    info.memory.0.saturating_add(SNAPSHOT_BEYOND)
}

/// What is done while the guest is held still.
async fn at_rest_of(vm: &FirecrackerVm, at_rest: AtRest) -> Result<Written, VmmError> {
    const OPERATION: &str = "the snapshot";
    let root = vm.inner.parts.backend.root.clone();
    let written = write(vm, (TAKEN_STATE, TAKEN_MEMORY), OPERATION).await;
    // Held open, they outlast their names. What a failed attempt has written goes with them.
    for name in [TAKEN_STATE, TAKEN_MEMORY] {
        forget(&root, name);
    }
    let written = written?;
    let copied = tokio::task::spawn_blocking(at_rest).await;
    let copied = copied.unwrap_or_else(|error| Err(io::Error::other(error)));
    copied.map_err(|source| VmmError::Io {
        operation: "copying the disks of",
        path: root,
        source,
    })?;
    Ok(written)
}

/// Has Firecracker write state and memory to files of these names.
async fn write(
    vm: &FirecrackerVm,
    (state, memory): (&str, &str),
    operation: &'static str,
) -> Result<Written, VmmError> {
    let body = SnapshotCreate {
        snapshot_type: "Full",
        snapshot_path: state.to_owned(),
        mem_file_path: memory.to_owned(),
    };
    let api = &vm.inner.api;
    if let Err(error) = api.put("/snapshot/create", &body, SNAPSHOT_LIMIT).await {
        return Err(vm.control(operation, error).await);
    }
    let root = &vm.inner.parts.backend.root;
    let open = |name| files::open_foreign(root, name).map_err(refused(operation));
    Ok(Written {
        memory: open(memory)?,
        state: open(state)?,
    })
}

/// Removes a file of Firecracker's directory; no link is followed.
fn forget(root: &Path, name: &str) {
    match std::fs::remove_file(root.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, root = %root.display(), name, "a part of a snapshot stays until its machine's end");
        }
        _ => {}
    }
}

async fn seal(info: CaptureInfo, written: Written) -> io::Result<Capture> {
    let sealed = tokio::task::spawn_blocking(move || {
        let memory = copy_to_memory(&written.memory, info.memory.0)?;
        let state = copy_to_memory(&written.state, STATE_MAX)?;
        Capture::seal(info, memory, state)
    });
    sealed
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}
