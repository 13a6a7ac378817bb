//! Making a template: a machine boots, its guest gets ready, and it is captured before it is told who it is.

use super::blueprint::Blueprint;
use super::files::{self, Making};
use crate::fault::chain;
use crate::machine::likely_config;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vistara_guest_client::ConnectOptions;
use vistara_machine::{Capture, Vm, Vmm};
use vistara_model::MachineId;

/// How long a guest may take for what it prepares.
const PREPARE_BOUND: Duration = Duration::from_secs(60);

/// Ends the machine that was being captured in `dir` when an earlier try was given up, by whichever of `vmms` it is of. An
/// error says why it may still run; its note stays then, for a later try.
pub(super) async fn end_earlier(vmms: &[Arc<dyn Vmm>], dir: &Path) -> Result<(), String> {
    let blocking = |error: tokio::task::JoinError| error.to_string();
    let at = dir.to_owned();
    let noted = tokio::task::spawn_blocking(move || files::making(&at));
    let Some(making) = noted.await.map_err(blocking)? else {
        return Ok(());
    };
    if making.may_run() {
        let own: Vec<_> = vmms
            .iter()
            .filter(|vmm| making.is_of(vmm.capabilities().kind))
            .collect();
        if own.is_empty() {
            let kind = making.vmm.as_deref().unwrap_or("its monitor");
            return Err(format!("{kind} is not usable on this host now"));
        }
        for vmm in own {
            let swept = vmm.sweep(&making.id, dir).await;
            swept.map_err(|error| chain(&error))?;
        }
    }
    let at = dir.to_owned();
    tokio::task::spawn_blocking(move || files::forget_making(&at))
        .await
        .map_err(blocking)
}

/// Boots and captures. The directory, which is empty before, may hold files afterwards: where the machine could not be ended
/// its note is among them, otherwise nothing of it is left.
pub(super) async fn capture(blueprint: &Blueprint, dir: &Path) -> Result<Capture, String> {
    let overlay = files::overlay_in(dir);
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| error.to_string())?;
    let id = MachineId::from_random(random);
    let plan = blueprint.plan(id.clone(), dir, overlay.clone());
    let (overlays, size) = (blueprint.parts.overlays.clone(), blueprint.disk);
    let vmm = &blueprint.parts.vmm;
    let making = Making::new(id, vmm.capabilities().kind);
    let at = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        overlays
            .create(size, &overlay)
            .map_err(|error| chain(&error))?;
        files::note_making(&at, &making).map_err(|error| error.to_string())
    })
    .await
    .map_err(|error| error.to_string())??;
    let captured = match vmm.launch(&plan).await {
        Ok(vm) => {
            let captured = match ready(vm.as_ref(), blueprint).await {
                Ok(()) => vm.capture().await.map_err(|error| chain(&error)),
                Err(message) => Err(message),
            };
            if captured.is_err()
                && let Err(error) = vm.kill().await
            {
                tracing::error!(machine = %plan.id, error = chain(&error), "a machine that was to be captured could not be ended");
                // With the note: it is tried again before another is made here, and by the next node.
                return captured;
            }
            captured
        }
        // A launch that fails leaves nothing.
        Err(error) => Err(chain(&error)),
    };
    let at = dir.to_owned();
    tokio::task::spawn_blocking(move || files::forget_making(&at))
        .await
        .map_err(|error| error.to_string())?;
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
    let prepared = agent.prepare(
        blueprint.read_ahead.clone(),
        likely_config(blueprint.network),
    );
    tokio::time::timeout(PREPARE_BOUND, prepared)
        .await
        .map_err(|_| "its guest does not get ready".to_owned())?
        .map_err(|error| chain(&error))
}
