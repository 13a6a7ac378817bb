//! Making a template: a machine boots, its guest gets ready, and it is captured before it is told who it is.

use super::blueprint::Blueprint;
use super::files;
use crate::fault::chain;
use std::path::Path;
use std::time::Duration;
use vistara_guest_client::ConnectOptions;
use vistara_machine::{Capture, Vm};
use vistara_model::MachineId;

/// How long a guest may take for what it prepares.
const PREPARE_BOUND: Duration = Duration::from_secs(60);

/// Boots and captures. Nothing of the machine is left, whatever happens; the directory, which is empty before, may hold
/// files.
pub(super) async fn capture(blueprint: &Blueprint, dir: &Path) -> Result<Capture, String> {
    let overlay = files::overlay_in(dir);
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| error.to_string())?;
    let id = MachineId::from_random(random);
    let plan = blueprint.plan(id.clone(), dir, overlay.clone());
    let (overlays, size) = (blueprint.parts.overlays.clone(), blueprint.disk);
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        overlays
            .create(size, &overlay)
            .map_err(|error| chain(&error))?;
        files::note_making(&dir, &id).map_err(|error| error.to_string())
    })
    .await
    .map_err(|error| error.to_string())??;
    let vmm = &blueprint.parts.vmm;
    let vm = vmm.launch(&plan).await.map_err(|error| chain(&error))?;
    let captured = ready(vm.as_ref(), blueprint).await;
    let captured = match captured {
        Ok(()) => vm.capture().await.map_err(|error| chain(&error)),
        Err(message) => Err(message),
    };
    if captured.is_err()
        && let Err(error) = vm.kill().await
    {
        tracing::error!(machine = %plan.id, error = chain(&error), "a machine that was to be captured could not be ended");
    }
    captured
}

/// Waits until the guest has done all that any program in it will need.
async fn ready(vm: &dyn Vm, blueprint: &Blueprint) -> Result<(), String> {
    let stream = vm.open_channel().await.map_err(|error| chain(&error))?;
    let options = ConnectOptions {
        hello_timeout: blueprint.parts.boot_bound,
    };
    let greeted = tokio::select! {
        greeted = vistara_guest_client::connect(stream, options) => greeted,
        end = vm.wait() => return Err(format!("its machine ended: {end:?}")),
    };
    let (agent, _) = greeted.map_err(|error| chain(&error))?;
    let prepared = agent.prepare(blueprint.read_ahead.clone());
    tokio::time::timeout(PREPARE_BOUND, prepared)
        .await
        .map_err(|_| "its guest does not get ready".to_owned())?
        .map_err(|error| chain(&error))
}
