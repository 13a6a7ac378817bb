//! Making a template: a machine boots, its guest gets ready, and it is captured before it is told who it is.

use super::store::{note_making, overlay_in};
use crate::fault::chain;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vistara_guest_client::ConnectOptions;
use vistara_machine::boot::overlay::OverlayTemplates;
use vistara_machine::{Capture, LaunchPlan, LinuxBoot, Start, Vm, Vmm};
use vistara_model::{Bytes, Digest, MachineId};

/// Version of how templates are made; part of their keys.
const RECIPE: u32 = 1;
/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 32;
/// How long a guest may take for what it prepares.
const PREPARE_BOUND: Duration = Duration::from_secs(60);
/// Users below the machines' own, one after the other, as which machines to be captured run.
const UID_TOP: u32 = crate::machine::UID_BASE - 1;
const UIDS: u32 = 4096;

/// Everything a template is made of.
pub(crate) struct Blueprint {
    pub(crate) image_id: Digest,
    /// The image's name, for listings.
    pub(crate) image: String,
    /// The kernel's name, for listings.
    pub(crate) kernel: String,
    /// A plan of a machine that is to be forked, whose start is a boot. Its identity, directory and ports do not matter.
    pub(crate) plan: LaunchPlan,
    pub(crate) boot: LinuxBoot,
    /// Size of the writable disk.
    pub(crate) disk: Bytes,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) overlays: OverlayTemplates,
    /// Files that the image's programs read first.
    pub(crate) read_ahead: Vec<String>,
    pub(crate) boot_bound: Duration,
}

impl Blueprint {
    /// A name made of everything that a fork shares with the template.
    pub(crate) fn key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let capabilities = self.vmm.capabilities();
        part(&RECIPE.to_le_bytes());
        part(self.image_id.to_string().as_bytes());
        // The name of the initramfs is a digest of kernel, modules and agent.
        part(self.boot.initramfs.as_os_str().as_encoded_bytes());
        part(self.boot.cmdline.as_bytes());
        part(capabilities.kind.to_string().as_bytes());
        part(capabilities.version.as_bytes());
        part(self.plan.accelerator.to_string().as_bytes());
        part(&self.plan.vcpus.to_le_bytes());
        part(&self.plan.memory.0.to_le_bytes());
        part(&self.disk.0.to_le_bytes());
        part(&[u8::from(self.plan.nic.is_some())]);
        hash.finalize().to_hex()[..KEY_DIGITS].to_owned()
    }
}

/// Boots and captures. Nothing of the machine is left, whatever happens; the directory may hold files.
pub(super) async fn capture(blueprint: &Blueprint, dir: &Path) -> Result<Capture, String> {
    let overlay = overlay_in(dir);
    let (overlays, size) = (blueprint.overlays.clone(), blueprint.disk);
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| error.to_string())?;
    let id = MachineId::from_random(random);
    let mut plan = blueprint.plan.clone();
    plan.id = id.clone();
    plan.dir = dir.to_owned();
    plan.start = Start::Linux(blueprint.boot.clone());
    plan.capturable = true;
    plan.fence.uid_gid = plan.fence.uid_gid.map(|_| own_user());
    for disk in plan.disks.iter_mut().filter(|disk| !disk.read_only) {
        disk.path.clone_from(&overlay);
    }
    if let Some(nic) = &mut plan.nic {
        // They belong to the machine for which the template is made.
        nic.ports.clear();
        nic.mac = [0x02, 0, 0, 0, 0, 1];
    }
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        // An earlier try may have left its own.
        let _ = std::fs::remove_file(&overlay);
        overlays
            .create(size, &overlay)
            .map_err(|error| chain(&error))?;
        note_making(&dir, &id).map_err(|error| error.to_string())
    })
    .await
    .map_err(|error| error.to_string())??;
    let vm = blueprint
        .vmm
        .launch(&plan)
        .await
        .map_err(|error| chain(&error))?;
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

fn own_user() -> (u32, u32) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let user = UID_TOP - NEXT.fetch_add(1, Ordering::Relaxed) % UIDS;
    (user, user)
}

/// Waits until the guest has done all that any program in it will need.
async fn ready(vm: &dyn Vm, blueprint: &Blueprint) -> Result<(), String> {
    let stream = vm.open_channel().await.map_err(|error| chain(&error))?;
    let options = ConnectOptions {
        hello_timeout: blueprint.boot_bound,
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
