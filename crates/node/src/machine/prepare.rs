//! From a record to a running monitor: disks, kernel, addresses, then the launch.

use super::Record;
use super::record::Step;
use crate::fault::{Fault, chain};
use crate::node::Mechanisms;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use vistara_guest_client::{GuestConfig, NetworkConfig, VolumeMount};
use vistara_image::ProgressSink;
use vistara_machine::boot::UpperLayer;
use vistara_machine::{Disk, Fence, GuestShare, LaunchPlan, Nic, Vm};
use vistara_model::{Bytes, MachineId, Network};

/// What a monitor may use beside its guest's memory, with room to spare over what backends are known to need
/// (`vistara_machine::qemu::OVERHEAD_MAX`).
const OVERHEAD: Bytes = Bytes::mib(512);
/// Processes and threads of a monitor: its virtual CPUs, and up to 64 workers for disks.
const MONITOR_PIDS: u32 = 128;
/// First user id on the host for monitors; each machine's slot is added. Above what people, services and subordinate
/// ids of containers usually have.
const UID_BASE: u32 = 1_879_048_192;
/// Random bytes that a guest gets at its start.
const ENTROPY_BYTES: usize = 64;

/// Addresses of user-mode networking: every machine has its own private copy of this network.
const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX: u8 = 24;

/// Name of a machine's writable disk in its directory.
pub(super) const OVERLAY: &str = "overlay.img";

/// Measures steps against the moment in which the request arrived.
#[derive(Debug, Clone)]
pub(crate) struct Stopwatch {
    zero: Instant,
    steps: Vec<Step>,
}

impl Stopwatch {
    pub(crate) fn new(zero: Instant) -> Stopwatch {
        Stopwatch {
            zero,
            steps: Vec::new(),
        }
    }

    /// Notes a step that began at `begin` and ends now.
    pub(crate) fn note(&mut self, step: &str, begin: Instant) {
        let micros =
            |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.steps.push(Step {
            step: step.to_owned(),
            begin_us: micros(begin.saturating_duration_since(self.zero)),
            took_us: micros(begin.elapsed()),
        });
    }

    pub(crate) fn into_steps(self) -> Vec<Step> {
        self.steps
    }
}

fn mac(id: &MachineId) -> [u8; 6] {
    // Locally administered, and different for every machine: from the id's random digits.
    let digits = id.as_ref().as_bytes();
    let mut mac = [0x02; 6];
    for (byte, pair) in mac[1..].iter_mut().zip(digits.chunks(2)) {
        let text = std::str::from_utf8(pair).unwrap_or("00");
        *byte = u8::from_str_radix(text, 16).unwrap_or(0);
    }
    mac
}

fn share_tag(index: usize) -> String {
    format!("volume{index}")
}

/// Makes everything ready and launches. The message of a failure is for the user.
pub(crate) async fn prepare(
    mechanisms: &Mechanisms,
    record: &Record,
    dir: &Path,
    zero: Instant,
) -> Result<(Arc<dyn Vm>, Vec<Step>), String> {
    let mut watch = Stopwatch::new(zero);
    let fault = |fault: Fault| match fault.0.hint {
        Some(hint) => format!("{}; {hint}", fault.0.message),
        None => fault.0.message,
    };
    let begin = Instant::now();
    let image = mechanisms
        .images
        .find(record.image_id.as_ref())
        .map_err(|error| fault(error.into()))?
        .ok_or_else(|| format!("image {} is gone", record.spec.image.familiar()))?;
    let root = mechanisms
        .images
        .root_disk(&image, &ProgressSink::none())
        .await
        .map_err(|error| fault(error.into()))?;
    watch.note("root disk", begin);

    let begin = Instant::now();
    let overlay = dir.join(OVERLAY);
    let (boot, overlay) = {
        let mechanisms = mechanisms.clone();
        let (kernel, size) = (record.kernel.clone(), record.spec.disk);
        let work = move || {
            mechanisms.overlays.create(size, &overlay)?;
            let boot = mechanisms.linux_boot(kernel.as_deref(), UpperLayer::Disk)?;
            Ok::<_, Fault>((boot, overlay))
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| error.to_string())?
            .map_err(fault)?
    };
    watch.note("overlay and kernel", begin);

    let begin = Instant::now();
    let spec = &record.spec;
    let plan = LaunchPlan {
        id: record.id.clone(),
        dir: dir.to_owned(),
        accelerator: record.backend.accelerator,
        vcpus: spec.cpus.vcpus(),
        memory: spec.memory,
        boot,
        disks: vec![
            Disk {
                path: root.path,
                read_only: true,
            },
            Disk {
                path: overlay,
                read_only: false,
            },
        ],
        nic: match spec.network {
            Network::User => Some(Nic {
                ports: spec.ports.clone(),
                mac: mac(&record.id),
            }),
            Network::None => None,
        },
        shares: (spec.volumes.iter().enumerate())
            .map(|(index, volume)| GuestShare {
                tag: share_tag(index),
                path: volume.host_path.clone().into(),
                read_only: volume.read_only,
            })
            .collect(),
        fence: Fence {
            uid_gid: mechanisms
                .is_root
                .then_some((UID_BASE + record.slot, UID_BASE + record.slot)),
            memory_max: Bytes(spec.memory.0.saturating_add(OVERHEAD.0)),
            pids_max: MONITOR_PIDS + spec.cpus.vcpus(),
            // Whole CPUs are bounded by the number of virtual ones already.
            cpu_millis: (!spec.cpus.millis.is_multiple_of(1000)).then_some(spec.cpus.millis),
        },
    };
    let vmm = mechanisms.vmm(record.backend.vmm).ok_or_else(|| {
        format!(
            "{} is not on this node any more; see `vistara doctor`",
            record.backend.vmm
        )
    })?;
    let vm = vmm.launch(&plan).await.map_err(|error| chain(&error))?;
    watch.note("launch", begin);
    Ok((Arc::from(vm), watch.into_steps()))
}

/// What a machine's guest is told before it runs anything.
pub(crate) fn guest_config(record: &Record, now_ns: u64) -> Result<GuestConfig, getrandom::Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy)?;
    let spec = &record.spec;
    let network = match spec.network {
        Network::None => None,
        Network::User => Some(NetworkConfig {
            mac: None,
            addresses: vec![(IpAddr::V4(GUEST_ADDRESS), PREFIX)],
            gateways: vec![IpAddr::V4(GATEWAY)],
            dns: vec![IpAddr::V4(NAME_SERVER)],
            search: Vec::new(),
            mtu: None,
        }),
    };
    Ok(GuestConfig {
        hostname: record.hostname.clone(),
        wall_clock_ns: now_ns,
        entropy,
        root_read_only: spec.read_only,
        network,
        volumes: (spec.volumes.iter().enumerate())
            .map(|(index, volume)| VolumeMount {
                tag: share_tag(index),
                path: volume.guest_path.clone(),
                read_only: volume.read_only,
            })
            .collect(),
        hosts: Vec::new(),
        rlimits: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_address_is_locally_administered_and_follows_its_id() {
        let one = mac(&MachineId::from_random([0xab; 16]));
        let two = mac(&MachineId::from_random([0xcd; 16]));
        assert_eq!(one, [0x02, 0xab, 0xab, 0xab, 0xab, 0xab]);
        assert_ne!(one, two);
    }
}
