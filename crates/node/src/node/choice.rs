//! What is decided about a request before anything is done: which image, which program, which hypervisor, how much memory.
//!
//! The decisions are `vistara-control`'s; here the facts for them are gathered. To look at a program costs the unpacking of
//! its image the first time, so it is done only where the choice may depend on it: with a Nanos kernel on the node.

use super::Node;
use crate::fault::{Answer, Fault, chain};
use vistara_api::{ErrorKind, RunRequest};
use vistara_control::{Choice, MEMORY_MIN, Program, Request, choose, program};
use vistara_image::{Asked, Image, WHOLE_ENTRIES_MAX};
use vistara_model::{
    Bytes, HostFacts, Hypervisor, ImageFacts, KvmVerdict, MachineSpec, Network, Payload,
};
use vistara_nanos::{MachineKind, MemoryFacts};

/// Everything about a request that is decided before anything is done.
pub(crate) struct Decision {
    pub(crate) image: Image,
    pub(crate) spec: MachineSpec,
    pub(crate) program: Program,
    pub(crate) choice: Choice,
    /// The least memory with which it boots.
    pub(crate) memory_min: Bytes,
    /// What it gets in a Linux guest, also where it is not to be one.
    pub(crate) linux_memory: Bytes,
    /// What is known of the program, where it was looked at.
    pub(crate) facts: Option<ImageFacts>,
}

/// When a program is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Where the choice may depend on it.
    IfItMatters,
    /// Always: somebody wants to know.
    Always,
}

/// What a unikernel of this program needs.
fn memory_facts(facts: &ImageFacts, spec: &MachineSpec, host: &HostFacts) -> MemoryFacts {
    let firecracker = host.firecracker.is_some() && host.kvm == KvmVerdict::Works;
    MemoryFacts {
        program_bytes: facts.program.size.0,
        // Of a larger image only a part travels.
        files: facts.entries.min(WHOLE_ENTRIES_MAX),
        network: spec.network != Network::None,
        modules: false,
        machine: if firecracker {
            MachineKind::ShallowQueues
        } else {
            MachineKind::QemuMicrovm
        },
    }
}

impl Node {
    /// The image of a request, by name, id or id prefix.
    pub(crate) fn image(&self, typed: &str) -> Answer<Image> {
        match self.mechanisms.images.find(typed)? {
            Some(image) => Ok(image),
            None => Err(Fault::new(
                ErrorKind::ImageNotFound,
                format!("image {typed:?} is not on this node"),
            )
            .hint(format!("vistara images pull {typed}"))),
        }
    }

    /// Decides about a request.
    pub(crate) async fn decide(&self, request: &RunRequest, look: Look) -> Answer<Decision> {
        let image = self.image(&request.image)?;
        let name = request
            .image
            .parse()
            .ok()
            .filter(|name| image.names.contains(name))
            .or_else(|| image.names.first().cloned())
            .map_or_else(|| format!("image:{}", image.id.short()).parse(), Ok)
            .map_err(|error: vistara_model::ImageRefError| Fault::internal(&error))?;
        let mut spec = crate::request::spec(request, name)?;
        let ours = vistara_model::Architecture::host();
        if image.architecture != ours {
            return Err(Fault::user(format!(
                "image {} is made for {}, and this host is {ours}",
                spec.image.familiar(),
                image.architecture
            ))
            .hint("pull or import the image for this architecture"));
        }
        let program = program(&spec, &image.config)?;
        let host = self.facts();
        let matters = host.nanos_kernel.is_some()
            && match spec.hypervisor {
                Hypervisor::Auto | Hypervisor::Nanovms => true,
                Hypervisor::Firecracker | Hypervisor::Qemu => false,
            };
        let facts = if matters || look == Look::Always {
            self.look_at(&image, &program, spec.hypervisor).await?
        } else {
            None
        };
        let mut asked = Request::of(&spec, &program);
        let needs = facts
            .as_ref()
            .map(|facts| memory_facts(facts, &spec, &host));
        let floor = needs.map(|needs| Bytes(needs.floor()));
        // Who names no memory gets what the program needs.
        let usual = needs.filter(|_| request.memory.is_none());
        let usual = usual.map(|needs| Bytes(needs.usual()));
        asked.unikernel_memory_min = floor;
        asked.memory = usual.unwrap_or(asked.memory);
        let mut choice = choose(&asked, facts.as_ref(), &host)?;
        let linux_memory = spec.memory;
        if choice.provisional {
            // So that it does not fail for want of what it would have on Linux.
            asked.memory = asked.memory.max(linux_memory);
        }
        let memory_min = match choice.backend.payload {
            Payload::Linux => MEMORY_MIN,
            Payload::Nanos => {
                spec.memory = Bytes(vistara_nanos::memory::safe_size(asked.memory.0));
                if spec.memory != asked.memory {
                    choice.reasons.push(format!(
                        "memory is raised from {} to {}: Nanos fails at some sizes between powers of two",
                        asked.memory, spec.memory
                    ));
                }
                floor.unwrap_or(MEMORY_MIN)
            }
        };
        Ok(Decision {
            image,
            spec,
            program,
            choice,
            memory_min,
            linux_memory,
            facts,
        })
    }

    /// What is known of a program. An image that cannot be looked at is no reason not to run it on Linux.
    async fn look_at(
        &self,
        image: &Image,
        program: &Program,
        hypervisor: Hypervisor,
    ) -> Answer<Option<ImageFacts>> {
        let (images, image, program) = (
            self.mechanisms.images.clone(),
            image.clone(),
            program.clone(),
        );
        let looked = tokio::task::spawn_blocking(move || {
            let asked = Asked::new(&program.argv, &program.env, &program.working_dir);
            if let Some(known) = images.known_program_facts(&image, &asked)? {
                return Ok(known);
            }
            let facts = images.program_facts(&image, &asked);
            // Layers and programs were in memory.
            vistara_host::memory::give_back();
            facts
        });
        match looked.await.map_err(|error| Fault::internal(&error))? {
            Ok(facts) => Ok(Some(facts)),
            Err(error) if hypervisor == Hypervisor::Nanovms => Err(error.into()),
            Err(error) => {
                tracing::warn!(error = chain(&error), "a program could not be looked at");
                Ok(None)
            }
        }
    }

    /// Looks at an image's own program as soon as the image is there, so that its first run does not wait for that. Does
    /// nothing without a Nanos kernel.
    pub(crate) async fn look_ahead(&self, image: &Image) {
        if self.facts().nanos_kernel.is_none() {
            return;
        }
        let request = RunRequest {
            image: image.id.to_string(),
            ..RunRequest::default()
        };
        // An image without a command of its own has nothing to look at; what else is wrong is told when it is run.
        if let Err(error) = self.decide(&request, Look::IfItMatters).await {
            tracing::debug!(error = error.0.message, "an image was not looked at");
        }
    }
}
