//! What a node needs of its host, what is there, and the command that mends what is not.

use crate::node::Node;
use std::path::PathBuf;
use vistara_host::facts;
use vistara_model::{Bytes, KvmVerdict, Need, NeedState, VmmKind};

/// Free space below which images and machines soon fail.
const DISK_FREE_MIN: Bytes = Bytes::gib(2);

struct Report(Vec<Need>);

impl Report {
    fn add(
        &mut self,
        name: &str,
        required: bool,
        state: NeedState,
        detail: impl Into<String>,
        mend: Option<&str>,
    ) {
        self.0.push(Need {
            name: name.to_owned(),
            state,
            detail: detail.into(),
            mend: mend
                .filter(|_| state != NeedState::Works)
                .map(str::to_owned),
            required,
        });
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Tools for administrators are often not on the PATH of others.
    let more = ["/usr/sbin", "/sbin", "/usr/bin", "/opt/vistara/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn tool(report: &mut Report, name: &str, program: &str, use_of_it: &str, mend: &str) {
    match on_path(program) {
        Some(path) => report.add(
            name,
            true,
            NeedState::Works,
            path.display().to_string(),
            None,
        ),
        None => {
            let detail = format!("{program} is not installed; it {use_of_it}");
            report.add(name, true, NeedState::Absent, detail, Some(mend));
        }
    }
}

/// Examines the host. Blocks on files and small programs.
pub(crate) fn examine(node: &Node) -> Vec<Need> {
    let mut report = Report(Vec::new());
    let facts = node.facts();
    let mechanisms = node.mechanisms();
    match mechanisms.kernels.default_kernel() {
        Ok(Some(kernel)) => {
            report.add(
                "linux-kernel",
                true,
                NeedState::Works,
                format!("{} (guest)", kernel.record.release),
                None,
            );
        }
        Ok(None) => {
            let mend = Some("vistara kernel add debian");
            report.add(
                "linux-kernel",
                true,
                NeedState::Absent,
                "there is no guest kernel yet",
                mend,
            );
        }
        Err(error) => {
            let detail = crate::fault::chain(&error);
            report.add(
                "linux-kernel",
                true,
                NeedState::Broken,
                detail,
                Some("vistara kernel add debian"),
            );
        }
    }
    let firecracker_works = mechanisms
        .vmm(VmmKind::Firecracker)
        .is_some_and(|vmm| !vmm.capabilities().accelerators.is_empty());
    match mechanisms.vmm(VmmKind::Qemu) {
        Some(vmm) => {
            let capabilities = vmm.capabilities();
            report.add(
                "qemu",
                true,
                NeedState::Works,
                capabilities.version.clone(),
                None,
            );
            match &capabilities.shares {
                Ok(()) => report.add(
                    "volumes",
                    false,
                    NeedState::Works,
                    "virtiofsd is usable",
                    None,
                ),
                Err(why) => {
                    let mend =
                        Some("apt-get install qemu-system-common (Debian 12) or virtiofsd (later)");
                    report.add("volumes", false, NeedState::Absent, why.clone(), mend);
                }
            }
        }
        None => {
            let mend = Some("apt-get install qemu-system-x86, then vistara doctor --fresh");
            report.add(
                "qemu",
                // One monitor is enough, whichever it is.
                !firecracker_works,
                NeedState::Absent,
                "no usable qemu-system-x86_64",
                mend,
            );
        }
    }
    kvm(&mut report, &facts.kvm);
    firecracker(&mut report, node);
    let mend = Some("vistara kernel add nanos FILE");
    let (state, detail) = match mechanisms.nanos.default_kernel() {
        Ok(Some(kernel)) => (
            NeedState::Works,
            format!("{} (unikernels)", kernel.record.name),
        ),
        Ok(None) => (
            NeedState::Absent,
            "none on this node; Linux guests stand in".to_owned(),
        ),
        Err(error) => (NeedState::Broken, crate::fault::chain(&error)),
    };
    report.add("nanos-kernel", false, state, detail, mend);
    tool(
        &mut report,
        "squashfs",
        "sqfstar",
        "builds root disks",
        "apt-get install squashfs-tools",
    );
    tool(
        &mut report,
        "ext4",
        "mkfs.ext4",
        "makes writable layers",
        "apt-get install e2fsprogs",
    );
    match vistara_host::cgroup::Cgroups::detect() {
        Ok(cgroups) => report.add("cgroups", false, NeedState::Works, cgroups.describe(), None),
        Err(why) => {
            let detail = format!(
                "{why}; limits on a monitor's memory and processes are weaker without them"
            );
            report.add(
                "cgroups",
                false,
                NeedState::Absent,
                detail,
                Some("run the node as root, or under systemd"),
            );
        }
    }
    let namespaces = facts::namespaces();
    let list: Vec<&str> = [
        ("user", namespaces.user),
        ("mount", namespaces.mount),
        ("network", namespaces.network),
    ]
    .into_iter()
    .filter_map(|(name, usable)| usable.then_some(name))
    .collect();
    if list.len() == 3 {
        report.add("namespaces", false, NeedState::Works, list.join(", "), None);
    } else {
        let detail = format!(
            "usable: {}",
            if list.is_empty() {
                "none".to_owned()
            } else {
                list.join(", ")
            }
        );
        report.add(
            "namespaces",
            false,
            NeedState::Absent,
            detail,
            Some("run the node as root"),
        );
    }
    disk(&mut report, node);
    let memory = facts.memory_available;
    let (state, mend) = if memory < Bytes::mib(512) {
        (NeedState::Broken, Some("stop other programs or machines"))
    } else {
        (NeedState::Works, None)
    };
    report.add("memory", true, state, format!("{memory} available"), mend);
    if facts::clock_is_sane() {
        report.add(
            "clock",
            false,
            NeedState::Works,
            crate::view::time(crate::machine::now_ns()),
            None,
        );
    } else {
        let detail = format!("it says {}", crate::view::time(crate::machine::now_ns()));
        report.add(
            "clock",
            false,
            NeedState::Broken,
            detail,
            Some("set the clock, e.g. apt-get install chrony"),
        );
    }
    report.0
}

/// Firecracker, its jailer, and what gives its machines a network: QEMU stands in for each that is missing.
fn firecracker(report: &mut Report, node: &Node) {
    let mechanisms = node.mechanisms();
    let Some(vmm) = mechanisms.vmm(VmmKind::Firecracker) else {
        let configured = node.options.firecracker.clone();
        let found = configured.or_else(|| on_path("firecracker"));
        let (state, detail) = match found {
            Some(path) => (
                NeedState::Broken,
                format!(
                    "{} cannot be used, the node's log says why; QEMU stands in",
                    path.display()
                ),
            ),
            None => (
                NeedState::Absent,
                "not installed; QEMU stands in".to_owned(),
            ),
        };
        let mend = Some(
            "put firecracker and jailer of https://github.com/firecracker-microvm/firecracker/releases into PATH, then vistara doctor --fresh",
        );
        return report.add("firecracker", false, state, detail, mend);
    };
    let capabilities = vmm.capabilities();
    if capabilities.accelerators.is_empty() {
        let detail = format!(
            "{} is installed, and no machine of it runs here: it needs KVM (see kvm); QEMU stands in",
            capabilities.version
        );
        return report.add(
            "firecracker",
            false,
            NeedState::Broken,
            detail,
            Some("see kvm"),
        );
    }
    let version = capabilities.version.clone();
    report.add("firecracker", false, NeedState::Works, version, None);
    match (&capabilities.own_root, mechanisms.is_root) {
        (Ok(()), true) => {
            let detail = "of the same release";
            report.add("jailer", false, NeedState::Works, detail, None);
        }
        (_, false) => report.add(
            "jailer",
            false,
            NeedState::Absent,
            "machines of an ordinary user have no root directory of their own",
            Some("run the node as root"),
        ),
        (Err(why), true) => report.add(
            "jailer",
            false,
            NeedState::Absent,
            format!("{why}; machines have no root directory of their own"),
            Some("put the jailer of the same release beside firecracker"),
        ),
    }
    match &capabilities.user_network {
        Ok(()) => {
            let detail = "slirp4netns works";
            report.add("firecracker-network", false, NeedState::Works, detail, None);
        }
        Err(why) => {
            let mend = if why.contains("not installed") {
                "apt-get install slirp4netns, then vistara doctor --fresh"
            } else if mechanisms.is_root {
                "modprobe tun bridge, then vistara doctor --fresh"
            } else {
                "run the node as root"
            };
            let detail = format!("{why}; QEMU runs machines that need a network");
            report.add(
                "firecracker-network",
                false,
                NeedState::Absent,
                detail,
                Some(mend),
            );
        }
    }
}

fn kvm(report: &mut Report, verdict: &KvmVerdict) {
    match verdict {
        KvmVerdict::Works => report.add(
            "kvm",
            false,
            NeedState::Works,
            "a guest ran at hardware speed",
            None,
        ),
        KvmVerdict::Absent(why) => {
            let mend = if why.to_lowercase().contains("permission") {
                "add the node's user to the group kvm: usermod -aG kvm USER"
            } else {
                "enable virtualization in the firmware, or nested virtualization at the provider; emulation works meanwhile"
            };
            report.add("kvm", false, NeedState::Absent, why.clone(), Some(mend));
        }
        KvmVerdict::Broken(why) => {
            let detail = format!("{why}; guests run under emulation");
            let mend = "none on this host: ask its provider for nested virtualization";
            report.add("kvm", false, NeedState::Broken, detail, Some(mend));
        }
    }
}

fn disk(report: &mut Report, node: &Node) {
    let path = &node.options.state_dir;
    match facts::disk_free(path) {
        Ok(free) if Bytes(free) >= DISK_FREE_MIN => {
            report.add(
                "disk",
                true,
                NeedState::Works,
                format!("{} free in {}", Bytes(free), path.display()),
                None,
            );
        }
        Ok(free) => {
            let detail = format!("only {} free in {}", Bytes(free), path.display());
            report.add(
                "disk",
                true,
                NeedState::Broken,
                detail,
                Some("vistara images prune --all"),
            );
        }
        Err(error) => report.add("disk", true, NeedState::Broken, error.to_string(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_that_works_is_missing_or_is_of_no_use_are_three_things() {
        let told = |verdict| {
            let mut report = Report(vec![]);
            kvm(&mut report, &verdict);
            let need = report.0.remove(0);
            (need.state, need.detail, need.mend)
        };
        let (state, _, mend) = told(KvmVerdict::Works);
        assert_eq!((state, mend), (NeedState::Works, None));
        let (state, detail, mend) = told(KvmVerdict::Absent("there is no /dev/kvm".to_owned()));
        assert_eq!(
            (state, detail.as_str()),
            (NeedState::Absent, "there is no /dev/kvm")
        );
        assert!(mend.unwrap().contains("firmware"));
        let refused = KvmVerdict::Absent("/dev/kvm: Permission denied".to_owned());
        assert!(told(refused).2.unwrap().contains("usermod"));
        let (state, detail, mend) = told(KvmVerdict::Broken("its guests hang".to_owned()));
        assert_eq!(state, NeedState::Broken);
        assert!(detail.contains("emulation"), "{detail}");
        assert!(mend.unwrap().contains("provider"));
    }
}
