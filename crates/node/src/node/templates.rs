//! Templates as users ask for them: one made ahead, and what a run would start from.

use super::{Decision, Look, Node};
use crate::fault::{Answer, Fault};
use crate::templates::{Blueprint, Parts, Shape, Template};
use std::path::PathBuf;
use std::sync::Arc;
use vistara_api::{CreateTemplateRequest, ErrorKind, RunRequest};
use vistara_control::Choice;
use vistara_image::ProgressSink;
use vistara_machine::boot::UpperLayer;
use vistara_machine::{LinuxBoot, Vmm};
use vistara_model::{MachineSpec, MachineState, Payload};

/// Why a machine of this choice is not forked.
fn no_forks(choice: &Choice, vmm: &dyn Vmm) -> Option<String> {
    if choice.backend.payload != Payload::Linux {
        return Some("unikernels have no templates".to_owned());
    }
    let refused = vmm.capabilities().capture.as_ref().err();
    refused.map(|reason| format!("{} cannot: {reason}", choice.backend.vmm))
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
    async fn boot_of(&self, spec: &MachineSpec) -> Answer<(Option<String>, LinuxBoot)> {
        let (mechanisms, kernel) = (self.mechanisms(), spec.kernel.clone());
        let kernel = kernel.or_else(|| self.facts().linux_kernel);
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
            return Err(Fault::user(format!("no template can be made: {reason}")));
        }
        self.admit(&decision, &self.facts())?;
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
        })
    }

    /// Of what templates are made, beside the shape of their machines.
    pub(crate) fn parts(&self, root: PathBuf, boot: LinuxBoot, vmm: Arc<dyn Vmm>) -> Parts {
        Parts {
            root,
            boot,
            vmm,
            overlays: self.mechanisms.overlays.clone(),
            is_root: self.mechanisms.is_root,
            boot_bound: self.boot_bound(),
        }
    }

    /// How a machine would start, in words.
    pub(crate) async fn outlook(&self, decision: &Decision) -> Answer<String> {
        let (spec, choice) = (&decision.spec, &decision.choice);
        let vmm = self.vmm_of(choice)?;
        let reason = no_forks(choice, vmm.as_ref());
        let reason = reason.or_else(|| {
            if spec.no_template {
                Some("--no-template".to_owned())
            } else if !spec.volumes.is_empty() {
                Some("volumes cannot be captured".to_owned())
            } else {
                None
            }
        });
        if let Some(reason) = reason {
            return Ok(format!("boots ({reason})"));
        }
        let (kernel, boot) = self.boot_of(spec).await?;
        let shape = shape(decision, kernel.as_deref());
        // The key does not depend on where the root disk lies.
        let key = Blueprint::new(shape, self.parts(PathBuf::new(), boot, vmm)).key();
        let known = self.templates.list().await;
        Ok(if known.iter().any(|listed| listed.kept.key == key) {
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
