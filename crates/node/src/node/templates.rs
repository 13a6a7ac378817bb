//! Templates as users ask for them: one made ahead, and what a run would start from.

use super::{Decision, Look, Mechanisms, Node};
use crate::fault::{Answer, Fault};
use crate::machine::MACHINE_UIDS;
use crate::templates::{Blueprint, Parts, Shape, Template};
use std::path::PathBuf;
use std::sync::Arc;
use vistara_api::{CreateTemplateRequest, ErrorKind, RunRequest};
use vistara_control::Choice;
use vistara_image::ProgressSink;
use vistara_machine::boot::UpperLayer;
use vistara_machine::{LinuxBoot, Vmm};
use vistara_model::{MachineSpec, MachineState, Payload, VmmKind};

// Each of the machines that a node keeps may run as a user of its own.
const _: () = assert!(super::MACHINES_MAX < MACHINE_UIDS as usize);

/// Why a machine of this choice is not forked.
fn no_forks(choice: &Choice, vmm: &dyn Vmm) -> Option<String> {
    if choice.backend.payload != Payload::Linux {
        return Some("unikernels have no templates".to_owned());
    }
    let refused = vmm.capabilities().capture.as_ref().err();
    refused.map(|reason| format!("{} cannot: {reason}", choice.backend.vmm))
}

impl Mechanisms {
    fn planned_boot(&self, kernel: Option<&str>) -> Answer<Option<LinuxBoot>> {
        const UPPER: UpperLayer = UpperLayer::Disk;
        let fake = self.vmm(VmmKind::Fake);
        if fake.is_some_and(|vmm| vmm.capabilities().kind == VmmKind::Fake) {
            // For these machines there is nothing to make.
            return self.linux_boot(kernel, UPPER).map(Some);
        }
        let kernel = match kernel {
            Some(name) => Some(self.kernels.get(name)?),
            None => self.kernels.default_kernel()?,
        };
        Ok(kernel.map(|kernel| self.payload.planned(&kernel, UPPER)))
    }
}

impl Node {
    fn vmm_of(&self, choice: &Choice) -> Answer<Arc<dyn Vmm>> {
        let kind = choice.backend.vmm;
        (self.mechanisms.vmm(kind)).ok_or_else(|| {
            Fault::new(ErrorKind::Host, format!("{kind} is not on this node"))
                .hint("vistara doctor")
        })
    }

    /// The kernel of a machine that names none is the default one.
    fn kernel_of(&self, spec: &MachineSpec) -> Option<String> {
        let named = spec.kernel.clone();
        named.or_else(|| self.facts().linux_kernel)
    }

    async fn boot_of(&self, spec: &MachineSpec) -> Answer<(Option<String>, LinuxBoot)> {
        let (mechanisms, kernel) = (self.mechanisms(), self.kernel_of(spec));
        let boot = {
            let kernel = kernel.clone();
            tokio::task::spawn_blocking(move || {
                mechanisms.linux_boot(kernel.as_deref(), UpperLayer::Disk)
            })
        };
        Ok((
            kernel,
            boot.await.map_err(|error| Fault::internal(&error))??,
        ))
    }

    /// As [`Node::boot_of`], of which nothing need be there yet, and nothing is made; `None` where there is no kernel.
    pub(super) async fn planned_boot(&self, kernel: Option<String>) -> Answer<Option<LinuxBoot>> {
        let mechanisms = self.mechanisms();
        let planned =
            tokio::task::spawn_blocking(move || mechanisms.planned_boot(kernel.as_deref()));
        planned.await.map_err(|error| Fault::internal(&error))?
    }

    /// The template for a request, and whether it was made now.
    pub(crate) async fn make_template(
        &self,
        request: &CreateTemplateRequest,
    ) -> Answer<(Arc<Template>, bool)> {
        let request = RunRequest {
            image: request.image.clone(),
            command: request.command.clone(),
            cpus: request.cpus.clone(),
            memory: request.memory.clone(),
            disk: request.disk.clone(),
            network: request.network.clone(),
            kernel: request.kernel.clone(),
            hypervisor: request.hypervisor.clone(),
            ..RunRequest::default()
        };
        let decision = self.decide(&request, Look::IfItMatters).await?;
        let vmm = self.vmm_of(&decision.choice)?;
        if let Some(reason) = no_forks(&decision.choice, vmm.as_ref()) {
            let hint = match decision.choice.backend.payload {
                Payload::Linux => "vistara doctor",
                Payload::Nanos => "add --hypervisor qemu, or run it as it is: it boots",
            };
            let message = format!("no template can be made: {reason}");
            return Err(Fault::user(message).hint(hint));
        }
        self.admit_before_stock(&decision, &self.facts()).await?;
        let (kernel, boot) = self.boot_of(&decision.spec).await?;
        let images = &self.mechanisms.images;
        let root = images
            .root_disk(&decision.image, &ProgressSink::none())
            .await?;
        let shape = shape(&decision, kernel.as_deref());
        let blueprint = Blueprint::new(shape, self.parts(root.path, boot, vmm));
        let made = self.templates.make_now(blueprint).await;
        made.map_err(|reason| {
            Fault::new(
                ErrorKind::Host,
                format!("the template could not be made: {reason}"),
            )
            .hint("machines boot without it; see `vistara doctor`, then try again")
        })
    }

    /// Of what templates are made, beside the shape of their machines.
    pub(crate) fn parts(&self, root: PathBuf, boot: LinuxBoot, vmm: Arc<dyn Vmm>) -> Parts {
        Parts {
            root,
            boot,
            vmm,
            overlays: self.mechanisms.overlays.clone(),
            images: self.mechanisms.images.clone(),
            is_root: self.mechanisms.is_root,
            boot_bound: self.boot_bound(),
        }
    }

    /// The key of the template from which such a machine is forked, whether it is there or not.
    pub(super) fn template_key(
        &self,
        shape: Shape<'_>,
        boot: LinuxBoot,
        vmm: Arc<dyn Vmm>,
    ) -> String {
        // It does not depend on where the root disk lies.
        Blueprint::new(shape, self.parts(PathBuf::new(), boot, vmm)).key()
    }

    /// How a machine would start, in words.
    pub(crate) async fn outlook(&self, decision: &Decision) -> Answer<String> {
        let (spec, choice) = (&decision.spec, &decision.choice);
        let vmm = self.vmm_of(choice)?;
        let reason = no_forks(choice, vmm.as_ref());
        let reason = reason.or_else(|| {
            if spec.no_template {
                Some("--no-template".to_owned())
            } else if spec.console {
                Some("--console".to_owned())
            } else if !spec.volumes.is_empty() {
                Some("volumes cannot be captured".to_owned())
            } else if spec.huge_pages {
                Some("huge pages cannot be captured".to_owned())
            } else {
                None
            }
        });
        let boots = |reason| Ok(format!("boots ({reason})"));
        if let (Some(reason), Payload::Nanos) = (&reason, choice.backend.payload) {
            return boots(reason.clone());
        }
        let kernel = self.kernel_of(spec);
        let Some(boot) = self.planned_boot(kernel.clone()).await? else {
            return Ok("cannot boot (no Linux kernel; vistara kernel add debian)".to_owned());
        };
        if let Some(reason) = reason {
            return boots(reason);
        }
        let key = self.template_key(shape(decision, kernel.as_deref()), boot, vmm);
        let known = self.templates.list().await;
        Ok(if self.is_in_stock(decision, &key) {
            format!("warm, from the stock of template {key}")
        } else if known.iter().any(|listed| listed.kept.key == key) {
            format!("forked from template {key}")
        } else {
            format!("forked from template {key}, which is made first")
        })
    }

    /// How many machines that have not ended were forked from a template.
    pub(crate) fn forks_of(&self, key: &str) -> u64 {
        let all = self.all();
        let forks = all.iter().filter(|handle| {
            let record = handle.record();
            record.state != MachineState::Ended && record.template.as_deref() == Some(key)
        });
        forks.count() as u64
    }
}

fn shape<'a>(decision: &'a Decision, kernel: Option<&'a str>) -> Shape<'a> {
    Shape {
        image_id: &decision.image.id,
        spec: &decision.spec,
        kernel,
        accelerator: decision.choice.backend.accelerator,
        argv: &decision.program.argv,
        env: &decision.program.env,
    }
}
