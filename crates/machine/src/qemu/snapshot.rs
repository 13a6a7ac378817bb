//! Capturing a machine that goes on.
//!
//! Its memory is mostly not a file that others could share: a fork keeps what it changes to itself, and a booted machine has
//! memory of its own. So it is copied: what a fork still shares with its template before the guest is held, and the rest, the
//! pages of QEMU's own, out of QEMU's address space while it is. A machine that is never captured pays nothing for that.

use super::vm::{Inner, QemuVm};
use crate::{AtRest, Capture, CaptureInfo, Quiet, Snapshot, VmmError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;
use vistara_host::files::{reopen_to_write, sealable_memory_file};
use vistara_host::foreign::ForeignMemory;

const OPERATION: &str = "the snapshot";

impl Inner {
    /// What a machine that goes on from this one must have in common with it.
    pub(super) fn captured_as(&self) -> Result<&CaptureInfo, VmmError> {
        self.parts.backend.info.as_ref().ok_or_else(|| {
            let why = match self.parts.printed {
                Some(_) => "a unikernel",
                None => {
                    "a machine with shared directories, or one that an earlier version of this program started"
                }
            };
            VmmError::Unsupported {
                kind: self.parts.record.kind,
                reason: format!("capturing {why}"),
            }
        })
    }
}

fn failed(message: impl Into<String>) -> VmmError {
    VmmError::Control {
        operation: OPERATION,
        message: message.into(),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmmError> + Send + 'static,
) -> Result<T, VmmError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(failed(error.to_string())))
}

/// Captures the machine. It goes on, whatever comes of it.
pub(super) async fn snapshot(
    vm: &QemuVm,
    quiet: Quiet,
    at_rest: AtRest,
) -> Result<Snapshot, VmmError> {
    let inner = &vm.inner;
    let info = inner.captured_as()?.clone();
    let control = vm.control(OPERATION);
    let address = inner.qmp.memory_address().await.map_err(&control)?;
    let (pid, len) = (inner.parts.record.pid, info.memory.0);
    let (foreign, memory, state) = blocking(move || {
        let prepared = || {
            let foreign = ForeignMemory::open(pid, address, len)?;
            let memory = sealable_memory_file(len)?;
            foreign.copy_shared(&memory)?;
            Ok((foreign, memory, sealable_memory_file(0)?))
        };
        prepared().map_err(|error| told(pid, error))
    })
    .await?;
    quiet.await?;
    // One that its owner holds stays held.
    let was_held = inner.held.swap(true, Ordering::Relaxed);
    let begin = Instant::now();
    let captured = at_rest_of(vm, foreign, memory, &state, at_rest).await;
    inner.held.store(was_held, Ordering::Relaxed);
    let went_on = match was_held {
        true => Ok(()),
        false => inner.qmp.cont().await.map_err(&control),
    };
    let pause = begin.elapsed();
    let memory = captured?;
    went_on?;
    let state = with_configuration(&state).map_err(|error| failed(error.to_string()))?;
    let capture = Capture::seal(info, memory, state).map_err(|error| failed(error.to_string()))?;
    Ok(Snapshot { capture, pause })
}

/// Where a stream's sections begin: behind `QEVM` and its version.
const SECTIONS: usize = 8;
/// The kind of the section that says of which machine a stream is, and with which capabilities it was written. A QEMU that
/// is told to go on from a stream wants it to be the first, and `xen-save-devices-state` writes none.
const CONFIGURATION: u8 = 7;
/// Most bytes of devices' state: 250 KB are usual.
const STATE_MAX: u64 = 64 << 20;

/// The section as `migrate` writes it for our machines (QEMU's migration/savevm.c): the machine's type, and the one
/// capability that both sides check.
fn configuration() -> Vec<u8> {
    const MACHINE: &[u8] = b"microvm";
    const CAPABILITIES: &[u8] = b"configuration/capabilities";
    const IGNORE_SHARED: &[u8] = b"x-ignore-shared";
    const SUBSECTION: u8 = 5;
    let number = |number: u32| number.to_be_bytes();
    // None of the names is longer than 255 bytes.
    let parts: [&[u8]; 9] = [
        &[CONFIGURATION],
        &number(MACHINE.len() as u32),
        MACHINE,
        &[SUBSECTION, CAPABILITIES.len() as u8],
        CAPABILITIES,
        // Its version, and how many capabilities follow.
        &number(1),
        &number(1),
        &[IGNORE_SHARED.len() as u8],
        IGNORE_SHARED,
    ];
    parts.concat()
}

/// Devices' state as a QEMU with `x-ignore-shared` takes it.
fn with_configuration(state: &File) -> io::Result<File> {
    let len = state.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(len.min(STATE_MAX + 1)).unwrap_or(0)];
    state.read_exact_at(&mut bytes, 0)?;
    if len > STATE_MAX || len <= SECTIONS as u64 || !bytes.starts_with(b"QEVM") {
        return Err(io::Error::other("QEMU's state of its devices is not one"));
    }
    if bytes[SECTIONS] != CONFIGURATION {
        bytes.splice(SECTIONS..SECTIONS, configuration());
    }
    let whole = sealable_memory_file(bytes.len() as u64)?;
    whole.write_all_at(&bytes, 0)?;
    Ok(whole)
}

/// What is done while the guest is held still. Gives the whole memory.
async fn at_rest_of(
    vm: &QemuVm,
    foreign: ForeignMemory,
    memory: File,
    state: &File,
    at_rest: AtRest,
) -> Result<File, VmmError> {
    let control = vm.control(OPERATION);
    let pid = vm.inner.parts.record.pid;
    vm.inner.qmp.stop().await.map_err(&control)?;
    // QEMU takes a descriptor for a file only if that can do just what it is to do.
    let writer = reopen_to_write(state).map_err(|error| failed(error.to_string()))?;
    vm.inner.qmp.save_devices(&writer).await.map_err(&control)?;
    blocking(move || {
        foreign
            .copy_own(&memory)
            .map_err(|error| told(pid, error))?;
        at_rest().map_err(|source| VmmError::Io {
            operation: "copying the disks of",
            path: PathBuf::from(format!("/proc/{pid}")),
            source,
        })?;
        Ok(memory)
    })
    .await
}

/// Why QEMU's memory could not be copied.
fn told(pid: u32, error: io::Error) -> VmmError {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return failed(
            "the host does not let this user read another process's memory (kernel.yama.ptrace_scope); \
             run the node as root, or start the machine anew with this node",
        );
    }
    VmmError::Io {
        operation: "copying the memory of",
        path: PathBuf::from(format!("/proc/{pid}")),
        source: error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_what_qemu_writes_itself() {
        // The beginning of what `migrate` of QEMU 7.2 wrote for a microvm, behind magic and version.
        let seen = b"\x07\0\0\0\x07microvm\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
        assert_eq!(configuration(), seen);
    }

    #[test]
    fn a_state_gets_its_configuration_once_and_what_is_none_is_refused() {
        let file = |bytes: &[u8]| {
            let file = sealable_memory_file(bytes.len() as u64).unwrap();
            file.write_all_at(bytes, 0).unwrap();
            file
        };
        let bytes = |file: &File| {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let once = with_configuration(&file(b"QEVM\0\0\0\x03\x04rest")).unwrap();
        let text = bytes(&once);
        assert!(text.starts_with(b"QEVM\0\0\0\x03\x07") && text.ends_with(b"\x04rest"));
        assert_eq!(bytes(&with_configuration(&once).unwrap()), text);
        for bad in [&b""[..], b"QEVM\0\0\0\x03", b"something else"] {
            assert!(with_configuration(&file(bad)).is_err());
        }
    }
}
