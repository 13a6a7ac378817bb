//! The choice of hypervisor: what was asked × what is known of the program × what this host can do → a backend, and the
//! reasons in words.
//!
//! Two questions, one after the other. *What is booted*: a Nanos unikernel for one self-contained program that neither makes
//! processes nor wants anything that a unikernel lacks (`unikernel` has the rules), a Linux guest for all others. *What boots
//! it*: Firecracker wherever KVM really works and it is there, else QEMU with KVM, else QEMU with emulation.
//!
//! `auto` errs on the side of Linux: a program that is wrongly given a Linux guest is slower, one that is wrongly given a
//! unikernel may lose its work. Who asks for `nanovms` by name is believed, and refused only what cannot be.

mod known;
mod unikernel;

#[cfg(test)]
mod tests;

use crate::Program;
use vistara_model::{
    Accelerator, Backend, Bytes, HostFacts, Hypervisor, ImageFacts, KvmVerdict, MachineSpec,
    Network, Payload, Signal, VmmKind,
};

/// What was chosen, and each rule that fired, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// As users name it; never [`Hypervisor::Auto`].
    pub hypervisor: Hypervisor,
    /// Monitor, payload and accelerator.
    pub backend: Backend,
    /// The rules, as sentences.
    pub reasons: Vec<String>,
    /// Whether it is only tried: nothing of the run is seen until it has ended well, and else it is undone and run on Linux.
    pub provisional: bool,
}

/// Why no hypervisor can serve a request here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// The one asked for cannot run here.
    #[error("{hypervisor} cannot run this here: {reason}")]
    Unavailable {
        /// The one asked for.
        hypervisor: Hypervisor,
        /// Why not.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// There is none at all.
    #[error("no hypervisor can run here: {reason}")]
    NoneAvailable {
        /// Why not.
        reason: String,
        /// What to do about it.
        hint: String,
    },
}

impl ChoiceError {
    /// What to type next.
    pub fn hint(&self) -> &str {
        match self {
            ChoiceError::Unavailable { hint, .. } | ChoiceError::NoneAvailable { hint, .. } => hint,
        }
    }
}

/// What of a request matters to the choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What the user asked for.
    pub hypervisor: Hypervisor,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The program gets a terminal.
    pub tty: bool,
    /// Standard input is kept open.
    pub stdin: bool,
    /// Directories of the host are mounted.
    pub host_directories: bool,
    /// It is to have a network.
    pub network: bool,
    /// What goes through the network is bounded.
    pub network_rate: bool,
    /// Volumes that the node keeps under names are mounted.
    pub named_volumes: bool,
    /// Ports are published.
    pub ports: bool,
    /// Somebody will want to run further programs in the machine.
    pub exec: bool,
    /// A graphics processor is wanted.
    pub gpu: bool,
    /// The user in the OCI form; empty for root.
    pub user: String,
    /// The signal that asks it to end.
    pub stop_signal: Signal,
    /// A Linux guest kernel by name, where one was asked for.
    pub linux_kernel: Option<String>,
    /// Guest memory.
    pub memory: Bytes,
    /// The least with which this program boots as a unikernel, as the crate that makes the disks knows it; where it is not
    /// given, memory is no rule.
    pub unikernel_memory_min: Option<Bytes>,
    /// The task may be run a second time, from its beginning, without harm.
    pub retry_safe: bool,
}

impl Request {
    /// From a validated request and the program that came out of it. `exec` and `gpu` are false, since a spec
    /// does not say them yet, and `unikernel_memory_min` is not given: set them afterwards where they are known.
    pub fn of(spec: &MachineSpec, program: &Program) -> Request {
        Request {
            hypervisor: spec.hypervisor,
            argv: program.argv.clone(),
            tty: spec.tty.is_some(),
            stdin: spec.stdin,
            host_directories: !spec.volumes.is_empty(),
            network: spec.network != Network::None,
            network_rate: spec.rates.network_per_s.is_some(),
            named_volumes: !spec.named_volumes.is_empty(),
            ports: !spec.ports.is_empty(),
            exec: false,
            gpu: false,
            user: program.user.clone(),
            stop_signal: program.stop_signal,
            linux_kernel: spec.kernel.clone(),
            memory: spec.memory,
            unikernel_memory_min: None,
            retry_safe: spec.retry_safe,
        }
    }
}

/// Chooses the hypervisor for one request. Without facts of the image `auto` gives a Linux guest, and `nanovms` is refused.
///
/// # Errors
/// [`ChoiceError`] where the one asked for, or any at all, cannot run on this host, or cannot run this.
pub fn choose(
    request: &Request,
    image: Option<&ImageFacts>,
    host: &HostFacts,
) -> Result<Choice, ChoiceError> {
    let asked = request.hypervisor;
    let unavailable = |reason: String, hint: &str| ChoiceError::Unavailable {
        hypervisor: asked,
        reason,
        hint: hint.to_owned(),
    };
    let mut reasons = Vec::new();
    let linux_by_name = matches!(asked, Hypervisor::Qemu | Hypervisor::Firecracker);
    if linux_by_name && request.named_volumes {
        return Err(named_volumes(asked, "a Linux guest was asked for"));
    }
    match asked {
        Hypervisor::Auto => automatic(request, image, host),
        Hypervisor::Qemu => {
            reasons.push("qemu was asked for".to_owned());
            let backend = qemu(Payload::Linux, request, host, &mut reasons).map_err(|reason| {
                let hint = match (&host.qemu, request.network_rate) {
                    (Some(_), _) => "leave out --network-rate, or --hypervisor",
                    (None, true) => "apt-get install qemu-system-x86, and leave out --network-rate",
                    (None, false) => "apt-get install qemu-system-x86",
                };
                unavailable(reason, hint)
            })?;
            Ok(Choice {
                hypervisor: Hypervisor::Qemu,
                backend,
                reasons,
                provisional: false,
            })
        }
        Hypervisor::Firecracker => {
            reasons.push("firecracker was asked for".to_owned());
            let backend =
                firecracker(Payload::Linux, request, host, &mut reasons).map_err(|reason| {
                    unavailable(reason, "leave --hypervisor out, or see `vistara doctor`")
                })?;
            Ok(Choice {
                hypervisor: Hypervisor::Firecracker,
                backend,
                reasons,
                provisional: false,
            })
        }
        Hypervisor::Nanovms => {
            reasons.push("nanovms was asked for".to_owned());
            match unikernel::asked_for(request, image, host) {
                Ok(warnings) => reasons.extend(warnings),
                Err(no) => return Err(unavailable(no.reason, no.hint)),
            }
            let backend = monitor(Payload::Nanos, request, host, &mut reasons)
                .map_err(|reason| unavailable(reason, no_monitor(request)))?;
            Ok(Choice {
                hypervisor: Hypervisor::Nanovms,
                backend,
                reasons,
                provisional: false,
            })
        }
    }
}

/// What a Linux guest cannot do yet.
fn named_volumes(hypervisor: Hypervisor, why_linux: &str) -> ChoiceError {
    ChoiceError::Unavailable {
        hypervisor,
        reason: format!("a volume with a name is mounted by unikernels only, and {why_linux}"),
        hint:
            "mount a directory of this host instead: -v /DIR:/GUESTDIR; or try --hypervisor nanovms"
                .to_owned(),
    }
}

fn automatic(
    request: &Request,
    image: Option<&ImageFacts>,
    host: &HostFacts,
) -> Result<Choice, ChoiceError> {
    let mut reasons = Vec::new();
    let mut provisional = false;
    let payload = match unikernel::fits(request, image, host) {
        Ok(fit) => {
            reasons.extend(fit.why);
            provisional = fit.provisional;
            Payload::Nanos
        }
        Err(why_not) if request.named_volumes => {
            return Err(named_volumes(request.hypervisor, &why_not.join("; ")));
        }
        Err(why_not) => {
            reasons.extend(
                why_not
                    .into_iter()
                    .map(|reason| format!("Linux guest: {reason}")),
            );
            Payload::Linux
        }
    };
    let backend = monitor(payload, request, host, &mut reasons).map_err(|reason| {
        ChoiceError::NoneAvailable {
            reason,
            hint: no_monitor(request).to_owned(),
        }
    })?;
    let hypervisor = match (payload, backend.vmm) {
        (Payload::Nanos, _) => Hypervisor::Nanovms,
        (Payload::Linux, VmmKind::Firecracker) => Hypervisor::Firecracker,
        (Payload::Linux, VmmKind::Qemu | VmmKind::Fake) => Hypervisor::Qemu,
    };
    Ok(Choice {
        hypervisor,
        backend,
        reasons,
        provisional,
    })
}

/// What to do where there is no monitor. With a bound on the network QEMU would be none, installed or not.
fn no_monitor(request: &Request) -> &'static str {
    match request.network_rate {
        true => {
            "leave out --network-rate, or see with `vistara doctor` what Firecracker lacks, which alone can bound the network"
        }
        false => "apt-get install qemu-system-x86, then `vistara doctor`",
    }
}

/// The best monitor for a payload.
fn monitor(
    payload: Payload,
    request: &Request,
    host: &HostFacts,
    reasons: &mut Vec<String>,
) -> Result<Backend, String> {
    match firecracker(payload, request, host, reasons) {
        Ok(backend) => Ok(backend),
        Err(why_not) => {
            reasons.push(format!("not firecracker: {why_not}"));
            qemu(payload, request, host, reasons)
                .map_err(|no_qemu| format!("{no_qemu}, and Firecracker cannot be used: {why_not}"))
        }
    }
}

fn firecracker(
    payload: Payload,
    request: &Request,
    host: &HostFacts,
    reasons: &mut Vec<String>,
) -> Result<Backend, String> {
    let Some(version) = &host.firecracker else {
        return Err("it is not available on this node".to_owned());
    };
    // A unikernel takes none, under any monitor: that is a matter of the payload.
    if request.host_directories && payload == Payload::Linux {
        return Err("it has no device for directories of the host".to_owned());
    }
    if let (true, Some(why), KvmVerdict::Works) =
        (request.network, &host.firecracker_no_network, &host.kvm)
    {
        return Err(format!("its machines have no network here: {why}"));
    }
    match &host.kvm {
        KvmVerdict::Works => {
            reasons.push(format!(
                "firecracker {version} is present and KVM really runs a guest"
            ));
            Ok(Backend {
                vmm: VmmKind::Firecracker,
                payload,
                accelerator: Accelerator::Kvm,
            })
        }
        KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => {
            Err(format!("it needs KVM, and {why}"))
        }
    }
}

fn qemu(
    payload: Payload,
    request: &Request,
    host: &HostFacts,
    reasons: &mut Vec<String>,
) -> Result<Backend, String> {
    let Some(version) = &host.qemu else {
        return Err("QEMU is not installed".to_owned());
    };
    if request.network_rate {
        return Err("it has no bound on what goes through the network".to_owned());
    }
    let accelerator = match &host.kvm {
        KvmVerdict::Works => {
            reasons.push(format!(
                "qemu {version} with KVM, which really runs a guest here"
            ));
            Accelerator::Kvm
        }
        KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => {
            reasons.push(format!(
                "qemu {version} with emulation (TCG), since KVM is no use: {why}"
            ));
            Accelerator::Tcg
        }
    };
    Ok(Backend {
        vmm: VmmKind::Qemu,
        payload,
        accelerator,
    })
}
