//! From a record to a running monitor: disks, kernel, addresses, then the launch.

use super::Record;
use super::record::Step;
use super::unikernel;
use crate::fault::{Fault, chain};
use crate::node::Node;
use crate::snapshots::Moment;
use crate::stock::Ready;
use crate::templates::{Blueprint, Shape, Template};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use vistara_guest_client::{Agent, GuestConfig, NetworkConfig, VolumeMount, Welcome};
use vistara_host::files::clone_sparse_file;
use vistara_image::ProgressSink;
use vistara_machine::boot::UpperLayer;
use vistara_machine::{Disk, Fence, GuestShare, LaunchPlan, Nic, Start, Vm, Vmm, VmmError};
use vistara_model::{Bytes, MachineId, Network, Payload};

/// What a monitor may use beside its guest's memory, with room to spare over what backends are known to need
/// (`vistara_machine::qemu::OVERHEAD_MAX`).
pub(crate) const OVERHEAD: Bytes = Bytes::mib(512);
/// Processes and threads of a monitor: its virtual CPUs, and up to 64 workers for disks.
pub(crate) const MONITOR_PIDS: u32 = 128;
/// First user id on the host for monitors; each machine's slot is added. Above what people, services and subordinate
/// ids of containers usually have.
pub(crate) const UID_BASE: u32 = 1_879_048_192;
/// How many user ids from there on are for machines, one for each slot: more than a node keeps machines
/// (`node::MACHINES_MAX`).
pub(crate) const MACHINE_UIDS: u32 = 1 << 17;
/// Random bytes that a guest gets at its start.
const ENTROPY_BYTES: usize = 64;

/// Addresses of user-mode networking: every machine has its own private copy of this network.
pub(super) const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(super) const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(super) const PREFIX: u8 = 24;

/// Name of a machine's writable disk in its directory.
pub(crate) const OVERLAY: &str = "overlay.img";

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

/// A machine whose monitor runs.
pub(crate) struct Launched {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) steps: Vec<Step>,
    /// The template it was forked from, if it did not boot.
    pub(crate) template: Option<String>,
    /// The session with its agent, where there is one already.
    pub(crate) greeted: Option<(Agent, Welcome)>,
}

/// Why a machine that nobody wants any more does not start; whoever asked it to end hears their own reason.
const CANCELLED: &str = "it was asked to end while it was being prepared";

/// A failure's words for the user.
pub(super) fn told(fault: Fault) -> String {
    match fault.0.hint {
        Some(hint) => format!("{}; {hint}", fault.0.message),
        None => fault.0.message,
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, String> {
    crate::fault::blocking(work).await.flatten().map_err(told)
}

/// Makes everything ready and launches. The message of a failure is for the user.
pub(crate) async fn prepare(
    node: &Node,
    record: &Record,
    dir: &Path,
    zero: Instant,
    cancel: &CancellationToken,
) -> Result<Launched, String> {
    let mechanisms = &node.mechanisms();
    let mut watch = Stopwatch::new(zero);
    let begin = Instant::now();
    let image = mechanisms
        .images
        .find(record.image_id.as_ref())
        .map_err(|error| told(error.into()))?
        .ok_or_else(|| format!("image {} is gone", record.spec.image.familiar()))?;
    let vmm = mechanisms.vmm(record.backend.vmm).ok_or_else(|| {
        format!(
            "{} is not on this node any more; see `vistara doctor`",
            record.backend.vmm
        )
    })?;
    if record.backend.payload == Payload::Nanos {
        let vm = unikernel::launch(node, record, dir, image, vmm.as_ref(), &mut watch).await?;
        return Ok(Launched {
            vm,
            steps: watch.into_steps(),
            template: None,
            greeted: None,
        });
    }
    let root = mechanisms
        .images
        .root_disk(&image, &ProgressSink::none())
        .await
        .map_err(|error| told(error.into()))?;
    watch.note("root disk", begin);
    let boot = {
        let (mechanisms, kernel) = (mechanisms.clone(), record.kernel.clone());
        blocking(move || mechanisms.linux_boot(kernel.as_deref(), UpperLayer::Disk)).await?
    };
    let boot = match record.spec.console {
        true => boot.telling(),
        false => boot,
    };
    let overlay = dir.join(OVERLAY);
    let disks = disks(root.path.clone(), overlay.clone());
    let plan = plan(node, record, dir, Start::Linux(boot.clone()), disks);

    // Shared directories and huge pages cannot be captured; a template's machine has none. A fork's kernel has told its console
    // nothing.
    let may_fork = !record.spec.no_template
        && !record.spec.console
        && plan.shares.is_empty()
        && !plan.huge_pages;
    if may_fork && vmm.capabilities().capture.is_ok() {
        let begin = Instant::now();
        let parts = node.parts(root.path, boot, Arc::clone(&vmm));
        let blueprint = Blueprint::new(Shape::of(record), parts);
        let templates = node.templates();
        let template = tokio::select! {
            template = templates.get_or_make(blueprint) => template,
            // It is made on: others will want it.
            () = cancel.cancelled() => return Err(CANCELLED.to_owned()),
        };
        if let Some(template) = template {
            watch.note("template", begin);
            let begin = Instant::now();
            match fork(vmm.as_ref(), &plan, &template).await {
                Ok(vm) => {
                    watch.note("fork", begin);
                    return Ok(Launched {
                        vm: Arc::from(vm),
                        steps: watch.into_steps(),
                        template: Some(template.key().to_owned()),
                        greeted: None,
                    });
                }
                // Booting would not help.
                Err(error @ VmmError::PortTaken(_)) => return Err(chain(&error)),
                Err(error) => {
                    tracing::warn!(
                        machine = %record.id, template = template.key(), error = chain(&error),
                        "a fork failed, and the machine boots"
                    );
                    let _ = std::fs::remove_file(&overlay);
                    if error.speaks_against_capture() {
                        templates.give_up(&template, &error).await;
                    }
                }
            }
        }
    }

    let begin = Instant::now();
    let (overlays, size) = (mechanisms.overlays.clone(), record.spec.disk);
    blocking(move || Ok(overlays.create(size, &overlay)?)).await?;
    watch.note("writable disk", begin);
    let begin = Instant::now();
    let vm = vmm.launch(&plan).await.map_err(|error| chain(&error))?;
    watch.note("launch", begin);
    Ok(Launched {
        vm: Arc::from(vm),
        steps: watch.into_steps(),
        template: None,
        greeted: None,
    })
}

/// Launches a machine that goes on from another one's moment. The message of a failure is for the user.
pub(crate) async fn go_on(
    node: &Node,
    record: &Record,
    dir: &Path,
    zero: Instant,
    moment: &Arc<Moment>,
) -> Result<Launched, String> {
    let mechanisms = &node.mechanisms();
    let mut watch = Stopwatch::new(zero);
    let vmm = mechanisms
        .vmm(record.backend.vmm)
        .ok_or_else(|| format!("{} is not on this node any more", record.backend.vmm))?;
    let begin = Instant::now();
    let overlay = dir.join(OVERLAY);
    let (from, to) = (Arc::clone(moment), overlay.clone());
    let copied = tokio::task::spawn_blocking(move || clone_sparse_file(&from.overlay, &to));
    let copied = copied.await.map_err(|error| error.to_string())?;
    copied.map_err(|error| format!("its writable disk could not be made: {error}"))?;
    watch.note("writable disk", begin);
    let begin = Instant::now();
    let start = Start::Fork(Arc::clone(&moment.capture));
    let disks = disks(moment.root.clone(), overlay);
    let plan = plan(node, record, dir, start, disks);
    let vm = vmm.launch(&plan).await.map_err(|error| chain(&error))?;
    watch.note("fork", begin);
    Ok(Launched {
        vm: Arc::from(vm),
        steps: watch.into_steps(),
        template: None,
        greeted: None,
    })
}

/// The disks of a Linux guest.
pub(crate) fn disks(root: PathBuf, overlay: PathBuf) -> Vec<Disk> {
    vec![
        Disk {
            path: root,
            read_only: true,
        },
        Disk {
            path: overlay,
            read_only: false,
        },
    ]
}

/// Starts the machine from a template: with a copy of its disk, and its memory as it was.
pub(crate) async fn fork(
    vmm: &dyn Vmm,
    plan: &LaunchPlan,
    template: &Arc<Template>,
) -> Result<Box<dyn Vm>, VmmError> {
    for disk in plan.disks.iter().filter(|disk| !disk.read_only) {
        let (template, to) = (Arc::clone(template), disk.path.clone());
        let io = |source: std::io::Error| VmmError::Io {
            operation: "copying the template's disk to",
            path: disk.path.clone(),
            source,
        };
        tokio::task::spawn_blocking(move || clone_sparse_file(&template.overlay, &to))
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(io)?;
    }
    let mut plan = plan.clone();
    plan.start = Start::Fork(Arc::clone(&template.capture));
    vmm.launch(&plan).await
}

/// Lets a machine of the stock go on. Where that fails another is made in its place.
pub(crate) async fn go_on_warm(
    node: &Node,
    record: &Record,
    dir: &Path,
    zero: Instant,
    cancel: &CancellationToken,
    warm: Ready,
) -> Result<Launched, String> {
    let mut watch = Stopwatch::new(zero);
    let begin = Instant::now();
    match warm.vm.resume().await {
        Ok(()) => {
            watch.note("from the stock", begin);
            Ok(Launched {
                vm: warm.vm,
                steps: watch.into_steps(),
                template: Some(warm.template.key().to_owned()),
                greeted: Some((warm.agent, warm.welcome)),
            })
        }
        Err(error) => {
            tracing::warn!(machine = %record.id, error = chain(&error), "a machine of the stock does not go on, and another is forked");
            if let Err(error) = warm.vm.kill().await {
                // It may still run: it is this machine's, which its session or its user ends, and has its slot until it is gone.
                tracing::error!(machine = %record.id, error = chain(&error), "a machine of the stock that does not go on could not be ended");
                return Ok(Launched {
                    vm: warm.vm,
                    steps: watch.into_steps(),
                    template: Some(warm.template.key().to_owned()),
                    greeted: Some((warm.agent, warm.welcome)),
                });
            }
            // It may not be there any more.
            let _ = std::fs::remove_file(dir.join(OVERLAY));
            prepare(node, record, dir, zero, cancel).await
        }
    }
}

pub(crate) fn plan(
    node: &Node,
    record: &Record,
    dir: &Path,
    start: Start,
    disks: Vec<Disk>,
) -> LaunchPlan {
    let spec = &record.spec;
    LaunchPlan {
        id: record.id.clone(),
        dir: dir.to_owned(),
        accelerator: record.backend.accelerator,
        vcpus: spec.cpus.vcpus(),
        memory: spec.memory,
        start,
        huge_pages: spec.huge_pages,
        capturable: false,
        disks,
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
        rates: spec.rates,
        fence: Fence {
            uid_gid: (node.mechanisms().is_root)
                .then_some((UID_BASE + record.slot, UID_BASE + record.slot)),
            memory_max: Bytes(spec.memory.0.saturating_add(OVERHEAD.0)),
            pids_max: MONITOR_PIDS + spec.cpus.vcpus(),
            // Whole CPUs are bounded by the number of virtual ones already.
            cpu_millis: (!spec.cpus.millis.is_multiple_of(1000)).then_some(spec.cpus.millis),
        },
    }
}

/// The network of a machine with this hardware address.
fn network_config(mac: Option<[u8; 6]>) -> NetworkConfig {
    NetworkConfig {
        mac,
        addresses: vec![(IpAddr::V4(GUEST_ADDRESS), PREFIX)],
        gateways: vec![IpAddr::V4(GATEWAY)],
        dns: vec![IpAddr::V4(NAME_SERVER)],
        search: Vec::new(),
        mtu: None,
    }
}

/// What most machines' guests are told, with a host name that none has: a template does what it can of it.
pub(crate) fn likely_config(network: bool) -> GuestConfig {
    GuestConfig {
        hostname: MachineId::from_random([0; 16]).short().to_owned(),
        network: network.then(|| network_config(None)),
        ..GuestConfig::default()
    }
}

/// What a machine's guest is told before it runs anything.
pub(crate) fn guest_config(record: &Record, now_ns: u64) -> Result<GuestConfig, getrandom::Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy)?;
    let spec = &record.spec;
    let network = match spec.network {
        Network::None => None,
        // A fork's device still has its template's address.
        Network::User => Some(network_config(Some(mac(&record.id)))),
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
