//! Making a machine for the stock, and ending one.

use super::shelf::{Ready, Warm};
use super::{Note, Pattern};
use crate::fault::chain;
use crate::machine::{OVERLAY, Record, disks, fork, guest_config, make_dir, now_ns, plan};
use crate::node::Node;
use crate::templates::Template;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use vistara_guest_client::{Agent, ConnectOptions, ExitStatus, ProcessId, ProcessSpec};
use vistara_image::ProgressSink;
use vistara_machine::{LinuxBoot, Start, Vm};
use vistara_model::{Bytes, Generation, MachineId, VmmKind};

/// How long a fork's guest may take to answer, and for each thing that it is told. Under emulation on a busy host it takes
/// most of a second.
const GUEST_BOUND: Duration = Duration::from_secs(20);
/// The number of the process by which starting one is rehearsed: no other has it.
const REHEARSAL: ProcessId = ProcessId(u32::MAX);

/// Makes a machine: forks it, tells it who it is, and holds it still. Where it is not wanted any more it is ended.
pub(super) async fn make(
    node: &Arc<Node>,
    pattern: &Pattern,
    template: &Arc<Template>,
    cancel: &CancellationToken,
) -> Result<(Warm, Bytes), String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| error.to_string())?;
    let id = MachineId::from_random(random);
    let dir = node.machine_dir(&id);
    let slot = node.reserve_slot();
    let record = Record {
        hostname: id.short().to_owned(),
        id: id.clone(),
        generation: Generation(1),
        slot,
        ..pattern.0.clone()
    };
    let launched = launch(node, &record, template, &dir).await;
    let vm = match launched {
        Ok(vm) => vm,
        Err(message) => {
            // A launch that fails leaves nothing but the directory.
            clear(node, slot, dir).await;
            return Err(message);
        }
    };
    // A launch is not broken off: it would leave half a monitor.
    let told = tokio::select! {
        told = tell(vm.as_ref(), &record) => told,
        () = cancel.cancelled() => Err("it is not wanted any more".to_owned()),
    };
    match told {
        Ok((agent, welcome)) => {
            let each = private_memory(vm.as_ref());
            let ready = Ready {
                id,
                slot,
                dir,
                vm,
                agent,
                welcome,
                template: Arc::clone(template),
            };
            Ok((Warm::new(node, ready), each))
        }
        Err(message) => {
            end(node, vm.as_ref(), slot, dir).await;
            Err(message)
        }
    }
}

async fn launch(
    node: &Arc<Node>,
    record: &Record,
    template: &Arc<Template>,
    dir: &Path,
) -> Result<Arc<dyn Vm>, String> {
    let mechanisms = node.mechanisms();
    let vmm = mechanisms
        .vmm(record.backend.vmm)
        .ok_or_else(|| format!("{} is not on this node any more", record.backend.vmm))?;
    let found = mechanisms.images.find(record.image_id.as_ref());
    let image = found
        .map_err(|error| chain(&error))?
        .ok_or("its image is gone")?;
    let root = mechanisms
        .images
        .root_disk(&image, &ProgressSink::none())
        .await
        .map_err(|error| chain(&error))?;
    let made = dir.to_owned();
    let note = Note::new(vmm.capabilities().kind, record.slot);
    tokio::task::spawn_blocking(move || make_dir(&made).and_then(|()| note.write(&made)))
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(|error| format!("its directory cannot be made: {error}"))?;
    let disks = disks(root.path, dir.join(OVERLAY));
    // What it starts from is the fork's to say.
    let nothing = Start::Linux(LinuxBoot {
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        cmdline: String::new(),
    });
    let plan = plan(node, record, dir, nothing, disks);
    let vm = fork(vmm.as_ref(), &plan, template).await;
    vm.map(Arc::from).map_err(|error| chain(&error))
}

/// Tells a fork who it is, has it do once what its first program would wait for, and holds it still.
async fn tell(
    vm: &dyn Vm,
    record: &Record,
) -> Result<(Agent, vistara_guest_client::Welcome), String> {
    let stream = vm.open_channel().await.map_err(|error| chain(&error))?;
    let options = ConnectOptions {
        hello_timeout: GUEST_BOUND,
    };
    let (agent, mut welcome) = vistara_guest_client::connect(stream, options)
        .await
        .map_err(|error| chain(&error))?;
    let config = guest_config(record, now_ns()).map_err(|error| error.to_string())?;
    let rehearsed = async {
        agent
            .configure(config)
            .await
            .map_err(|error| chain(&error))?;
        // A fake machine's agent is no PID 1 of its own.
        if vm.record().kind != VmmKind::Fake {
            rehearse(&agent).await?;
        }
        Ok::<(), String>(())
    };
    tokio::time::timeout(GUEST_BOUND, rehearsed)
        .await
        .map_err(|_| "its guest does not answer".to_owned())??;
    welcome.configured = true;
    vm.pause().await.map_err(|error| chain(&error))?;
    Ok((agent, welcome))
}

/// Starts a process, of the agent's own program, that ends at once: under emulation the way from the host's message to a
/// running program is translated by this, and in memory.
async fn rehearse(agent: &Agent) -> Result<(), String> {
    let spawned = agent.spawn(REHEARSAL, rehearsal()).await;
    let process = spawned.map_err(|error| chain(&error))?;
    let vistara_guest_client::Process {
        handle,
        mut output,
        input,
    } = process;
    input.close().await;
    while output.next().await.is_some() {}
    let exited = handle.exited().await.map_err(|error| chain(&error))?;
    if exited.status != ExitStatus::Code(0) {
        return Err(format!("the rehearsal ended with {:?}", exited.status));
    }
    handle.forget().await.map_err(|error| chain(&error))
}

/// The agent's own program, by a path of the kernel's that nothing of the image can stand at: a name would be looked for in the
/// image first, and nothing of the image's runs before somebody has asked for it.
fn rehearsal() -> ProcessSpec {
    ProcessSpec {
        argv: vec!["/proc/1/exe".to_owned(), "--rehearse".to_owned()],
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        tty: None,
        stdin: false,
    }
}

/// What a machine takes of the host's memory that no other shares.
fn private_memory(vm: &dyn Vm) -> Bytes {
    let usage = vm.usage();
    let private = vistara_host::facts::private_memory(vm.record().pid);
    Bytes(private.unwrap_or(usage.resident_bytes))
}

/// Ends a machine of the stock and clears away what is left of it.
pub(super) async fn discard(node: &Arc<Node>, ready: Ready) {
    let Ready {
        vm,
        slot,
        dir,
        agent,
        ..
    } = ready;
    drop(agent);
    end(node, vm.as_ref(), slot, dir).await;
}

async fn end(node: &Arc<Node>, vm: &dyn Vm, slot: u32, dir: PathBuf) {
    if let Err(error) = vm.kill().await {
        // Its directory stays without a record: the next node tries again. Its slot stays taken, which costs a number.
        tracing::error!(
            path = %dir.display(), error = chain(&error),
            "a machine of the stock could not be ended"
        );
        return;
    }
    clear(node, slot, dir).await;
}

async fn clear(node: &Arc<Node>, slot: u32, dir: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(&dir)).await;
    match removed {
        Ok(Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "the directory of a machine of the stock could not be removed");
        }
        _ => {}
    }
    node.release_slot(slot);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rehearsed_is_not_looked_for_in_the_image() {
        let spec = rehearsal();
        assert_eq!(spec.argv[0], "/proc/1/exe");
        assert!(spec.env.is_empty(), "no PATH finds another");
    }
}
