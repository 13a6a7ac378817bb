//! The choice of hypervisor: what was asked × what this host can do → a backend, and the reasons in words.

use vistara_model::{Accelerator, Backend, HostFacts, Hypervisor, KvmVerdict, Payload, VmmKind};

/// What was chosen, and each rule that fired, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// As users name it; never [`Hypervisor::Auto`].
    pub hypervisor: Hypervisor,
    /// Monitor, payload and accelerator.
    pub backend: Backend,
    /// The rules, as sentences.
    pub reasons: Vec<String>,
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

/// Chooses the hypervisor for one request.
///
/// # Errors
/// [`ChoiceError`] where the one asked for, or any at all, cannot run on this host.
pub fn choose(asked: Hypervisor, host: &HostFacts) -> Result<Choice, ChoiceError> {
    match asked {
        Hypervisor::Auto => automatic(host),
        Hypervisor::Qemu => {
            let mut reasons = vec!["qemu was asked for".to_owned()];
            qemu(host, &mut reasons).ok_or_else(|| ChoiceError::Unavailable {
                hypervisor: asked,
                reason: "QEMU is not installed".to_owned(),
                hint: "apt-get install qemu-system-x86".to_owned(),
            })
        }
        Hypervisor::Firecracker => firecracker(host, vec!["firecracker was asked for".to_owned()])
            .map_err(|reason| ChoiceError::Unavailable {
                hypervisor: asked,
                reason,
                hint: "leave --hypervisor out, or see `vistara doctor`".to_owned(),
            }),
        Hypervisor::Nanovms => Err(ChoiceError::Unavailable {
            hypervisor: asked,
            reason: if host.nanos_kernel {
                "this version does not build unikernel disks yet".to_owned()
            } else {
                "there is no Nanos kernel on this node".to_owned()
            },
            hint: "leave --hypervisor out to run it in a Linux guest".to_owned(),
        }),
    }
}

fn automatic(host: &HostFacts) -> Result<Choice, ChoiceError> {
    let mut reasons = vec!["Linux guest: it runs any image".to_owned()];
    match firecracker(host, reasons.clone()) {
        Ok(choice) => return Ok(choice),
        Err(why_not) => reasons.push(format!("not firecracker: {why_not}")),
    }
    qemu(host, &mut reasons).ok_or_else(|| ChoiceError::NoneAvailable {
        reason: "neither QEMU nor Firecracker is usable".to_owned(),
        hint: "apt-get install qemu-system-x86, then `vistara doctor`".to_owned(),
    })
}

fn firecracker(host: &HostFacts, mut reasons: Vec<String>) -> Result<Choice, String> {
    let Some(version) = &host.firecracker else {
        return Err("it is not available on this node".to_owned());
    };
    match &host.kvm {
        KvmVerdict::Works => {
            reasons.push(format!(
                "firecracker {version} is present and KVM really runs a guest"
            ));
            Ok(Choice {
                hypervisor: Hypervisor::Firecracker,
                backend: Backend {
                    vmm: VmmKind::Firecracker,
                    payload: Payload::Linux,
                    accelerator: Accelerator::Kvm,
                },
                reasons,
            })
        }
        KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => {
            Err(format!("it needs KVM, and {why}"))
        }
    }
}

fn qemu(host: &HostFacts, reasons: &mut Vec<String>) -> Option<Choice> {
    let version = host.qemu.as_ref()?;
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
    Some(Choice {
        hypervisor: Hypervisor::Qemu,
        backend: Backend {
            vmm: VmmKind::Qemu,
            payload: Payload::Linux,
            accelerator,
        },
        reasons: std::mem::take(reasons),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_model::Bytes;

    fn host(kvm: KvmVerdict, qemu: bool, firecracker: bool) -> HostFacts {
        HostFacts {
            kvm,
            qemu: qemu.then(|| "7.2".to_owned()),
            firecracker: firecracker.then(|| "1.7".to_owned()),
            nanos_kernel: false,
            linux_kernel: Some("6.1".to_owned()),
            cpus: 2,
            memory_available: Bytes::gib(8),
        }
    }

    fn works() -> KvmVerdict {
        KvmVerdict::Works
    }
    fn broken() -> KvmVerdict {
        KvmVerdict::Broken("guests hang".to_owned())
    }
    fn absent() -> KvmVerdict {
        KvmVerdict::Absent("there is no /dev/kvm".to_owned())
    }

    /// The table that specifies the choice: asked, KVM, QEMU there, Firecracker there → monitor and accelerator.
    #[test]
    fn the_choice_follows_the_table() {
        use Accelerator::{Kvm, Tcg};
        use Hypervisor::{Auto, Firecracker, Nanovms, Qemu};
        let table = [
            (Auto, works(), true, true, Some((VmmKind::Firecracker, Kvm))),
            (
                Auto,
                works(),
                false,
                true,
                Some((VmmKind::Firecracker, Kvm)),
            ),
            (Auto, works(), true, false, Some((VmmKind::Qemu, Kvm))),
            (Auto, broken(), true, true, Some((VmmKind::Qemu, Tcg))),
            (Auto, absent(), true, true, Some((VmmKind::Qemu, Tcg))),
            (Auto, absent(), true, false, Some((VmmKind::Qemu, Tcg))),
            (Auto, broken(), false, true, None),
            (Auto, works(), false, false, None),
            (Qemu, works(), true, true, Some((VmmKind::Qemu, Kvm))),
            (Qemu, broken(), true, false, Some((VmmKind::Qemu, Tcg))),
            (Qemu, works(), false, true, None),
            (
                Firecracker,
                works(),
                true,
                true,
                Some((VmmKind::Firecracker, Kvm)),
            ),
            (Firecracker, broken(), true, true, None),
            (Firecracker, absent(), true, true, None),
            (Firecracker, works(), true, false, None),
            (Nanovms, works(), true, true, None),
        ];
        for (asked, kvm, qemu, firecracker, expected) in table {
            let facts = host(kvm, qemu, firecracker);
            let chosen = choose(asked, &facts)
                .ok()
                .map(|choice| (choice.backend.vmm, choice.backend.accelerator));
            assert_eq!(chosen, expected, "{asked} on {facts:?}");
        }
    }

    #[test]
    fn a_broken_kvm_is_named_in_the_reasons() {
        let choice = choose(Hypervisor::Auto, &host(broken(), true, true)).unwrap();
        assert!(
            choice
                .reasons
                .iter()
                .any(|reason| reason.contains("guests hang")),
            "{:?}",
            choice.reasons
        );
    }

    #[test]
    fn a_refusal_says_what_to_type_next() {
        let error = choose(Hypervisor::Auto, &host(absent(), false, false)).unwrap_err();
        assert!(error.hint().contains("apt-get install"), "{error}");
    }
}
