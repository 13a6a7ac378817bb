//! Which monitors there are, and whether KVM really runs a guest.

use super::Node;
use crate::fault::chain;
use crate::options::Vmms;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use vistara_machine::firecracker::{FirecrackerOptions, FirecrackerVmm};
use vistara_machine::qemu::{QemuOptions, QemuVmm};
use vistara_machine::{Vmm, VmmError};
use vistara_model::KvmVerdict;

impl Node {
    /// Looks for monitors and probes KVM; `fresh` forgets what was found before in this boot of the host.
    pub(crate) async fn detect(&self, fresh: bool) {
        let found = match &self.options.vmms {
            Vmms::Given(vmm) => vec![Arc::clone(vmm)],
            Vmms::Detect => {
                let kvm = probe_kvm(&self.options.state_dir, fresh).await;
                *self.kvm.lock().unwrap_or_else(PoisonError::into_inner) = kvm.clone();
                let options = QemuOptions {
                    program: self.options.qemu.clone(),
                    virtiofsd: self.options.virtiofsd.clone(),
                    kvm,
                };
                let qemu = async {
                    match QemuVmm::detect(options).await {
                        Ok(vmm) => Some(Arc::new(vmm) as Arc<dyn Vmm>),
                        Err(error) => {
                            tracing::warn!(error = chain(&error), "QEMU cannot be used");
                            None
                        }
                    }
                };
                let (qemu, firecracker) = tokio::join!(qemu, self.detect_firecracker());
                [qemu, firecracker].into_iter().flatten().collect()
            }
        };
        let mut vmms = self
            .mechanisms
            .vmms
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        vmms.clear();
        vmms.extend(found.into_iter().map(|vmm| (vmm.capabilities().kind, vmm)));
    }
}

impl Node {
    /// Firecracker, where it is installed; whether it can run machines is told by its capabilities.
    async fn detect_firecracker(&self) -> Option<Arc<dyn Vmm>> {
        let options = FirecrackerOptions {
            program: self.options.firecracker.clone(),
            jailer: self.options.jailer.clone(),
            slirp4netns: self.options.slirp4netns.clone(),
            cpu_template: self.options.cpu_template.clone(),
            kvm: self
                .kvm
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        };
        match FirecrackerVmm::detect(options).await {
            Ok(vmm) => Some(Arc::new(vmm)),
            // Most hosts have none, and QEMU stands in.
            Err(error @ VmmError::Absent { .. }) => {
                tracing::debug!(error = chain(&error), "there is no Firecracker");
                None
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "Firecracker cannot be used");
                None
            }
        }
    }
}

/// The KVM probe's verdict, remembered for this boot of the host.
async fn probe_kvm(state_dir: &Path, fresh: bool) -> KvmVerdict {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Remembered {
        boot_id: String,
        /// What the device was: other permissions or another device need another look.
        device: String,
        kvm: KvmVerdict,
    }
    let path = state_dir.join("kvm.json");
    let work = move || {
        use std::os::unix::fs::MetadataExt;
        let boot_id = vistara_host::facts::boot_id().unwrap_or_default();
        let device = std::fs::metadata("/dev/kvm").map_or_else(
            |error| error.to_string(),
            |meta| format!("{:o} {} {}", meta.mode(), meta.uid(), meta.gid()),
        );
        // Whether we may open it changes with our groups, too.
        let openable = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        let device = format!("{device} {openable}");
        let known = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Remembered>(&bytes).ok());
        if let Some(known) =
            known.filter(|known| !fresh && known.boot_id == boot_id && known.device == device)
        {
            return known.kvm;
        }
        let kvm = match vistara_host::kvm::probe(vistara_host::kvm::PROBE_BOUND) {
            vistara_host::kvm::Verdict::Works => KvmVerdict::Works,
            vistara_host::kvm::Verdict::Absent(why) => KvmVerdict::Absent(why),
            vistara_host::kvm::Verdict::Broken(why) => KvmVerdict::Broken(why),
        };
        let remembered = Remembered {
            boot_id,
            device,
            kvm,
        };
        if let Ok(bytes) = serde_json::to_vec(&remembered)
            && let Err(error) = std::fs::write(&path, bytes)
        {
            tracing::warn!(%error, "the verdict on KVM could not be kept; it will be probed again");
        }
        remembered.kvm
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(kvm) => kvm,
        Err(error) => KvmVerdict::Broken(format!("the probe itself failed: {error}")),
    }
}
