//! The node's own state: its mechanisms, what it knows of the host, and its machines.

mod adopt;
mod choice;
mod create;
mod detect;
mod huge_pages;
mod snapshots;
mod stock;
mod templates;

pub(crate) use adopt::Fate;
pub(crate) use choice::{Decision, Look};
pub(crate) use create::LeasedCopy;

use crate::fault::{Answer, Fault, NodeError};
use crate::machine::{Command, Handle, Record, now_ns};
use crate::mesh::Mesh;
use crate::options::{NodeOptions, TemplateLimits};
use crate::snapshots::{Captures, Snapshots};
use crate::stock::Stock;
use crate::templates::Templates;
use crate::volumes::Volumes;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vistara_api::ErrorKind;
use vistara_control::lookup;
use vistara_image::ImageStore;
use vistara_machine::boot::overlay::OverlayTemplates;
use vistara_machine::boot::{KernelStore, LinuxPayload, NanosKernels, UpperLayer};
use vistara_machine::{LinuxBoot, Vmm};
use vistara_model::{
    Backend, Bytes, Digest, HostFacts, KvmVerdict, MachineId, MachineName, MachineSpec,
    MachineState, Payload, VmmKind,
};

/// Most machines kept by a node, ended ones included: beyond it something is wrong, and listings would take seconds.
const MACHINES_MAX: usize = 100_000;

/// How long a node that is on its way out is waited for, and how often it is looked for. It leaves within 2 s.
const LOCK_BOUND: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The mechanisms that make machines, shared by all tasks.
#[derive(Clone)]
pub(crate) struct Mechanisms {
    pub(crate) images: ImageStore,
    pub(crate) kernels: KernelStore,
    pub(crate) nanos: NanosKernels,
    pub(crate) overlays: OverlayTemplates,
    payload: LinuxPayload,
    vmms: Arc<Mutex<HashMap<VmmKind, Arc<dyn Vmm>>>>,
    pub(crate) is_root: bool,
}

impl Mechanisms {
    pub(crate) fn vmm(&self, kind: VmmKind) -> Option<Arc<dyn Vmm>> {
        let vmms = self.vmms.lock().unwrap_or_else(PoisonError::into_inner);
        // A monitor given by a test stands for whichever was chosen.
        vmms.get(&kind)
            .or_else(|| vmms.get(&VmmKind::Fake))
            .cloned()
    }

    /// What a Linux guest with this kernel, or the default one, is started with. Blocks on files.
    pub(crate) fn linux_boot(&self, kernel: Option<&str>, upper: UpperLayer) -> Answer<LinuxBoot> {
        if let Some(fake) = self
            .vmm(VmmKind::Fake)
            .filter(|vmm| vmm.capabilities().kind == VmmKind::Fake)
        {
            // A fake machine boots nothing; it must not need a kernel on the host that tests it.
            drop(fake);
            let nothing = PathBuf::from("/dev/null");
            return Ok(LinuxBoot {
                kernel: nothing.clone(),
                initramfs: nothing,
                cmdline: String::new(),
            });
        }
        let kernel = match kernel {
            Some(name) => self.kernels.get(name)?,
            None => self
                .kernels
                .default_kernel()?
                .ok_or(vistara_machine::boot::BootError::NoKernel)?,
        };
        Ok(self.payload.prepare(&kernel, upper)?)
    }
}

/// The node.
pub(crate) struct Node {
    pub(crate) options: NodeOptions,
    pub(crate) started_ns: u64,
    mechanisms: Mechanisms,
    templates: Arc<Templates>,
    snapshots: Snapshots,
    captures: Captures,
    stock: Arc<Stock>,
    /// Whose key signs receipts.
    mesh: Arc<Mesh>,
    kvm: Mutex<KvmVerdict>,
    machines: Mutex<Machines>,
    /// Held for the node's life: one node serves a state directory.
    _lock: File,
}

#[derive(Default)]
struct Machines {
    by_id: HashMap<MachineId, Arc<Handle>>,
    /// Names and slots promised to machines that are being created.
    names: HashSet<MachineName>,
    slots: HashSet<u32>,
    volumes: HashSet<String>,
    /// Huge pages promised to machines that are being created.
    huge_pages: HashMap<MachineName, Bytes>,
    /// Directories of machines that never began and that could not be cleared away.
    left: HashMap<MachineId, PathBuf>,
}

impl Machines {
    /// The lowest number that no machine has from which its user follows.
    fn free_slot(&self) -> u32 {
        let records = self.by_id.values().map(|handle| handle.record());
        let used: HashSet<u32> = records
            .filter(|record| record.state != MachineState::Ended)
            .map(|record| record.slot)
            .chain(self.slots.iter().copied())
            .collect();
        (0..).find(|slot| !used.contains(slot)).unwrap_or(0)
    }

    /// The machine that has this volume, or what else does, in words.
    fn user_of_volume(&self, name: &str) -> Option<String> {
        let records = self.by_id.values().map(|handle| handle.record());
        let uses = |record: &Arc<Record>| {
            let volumes = &record.spec.named_volumes;
            record.state != MachineState::Ended && volumes.iter().any(|other| other.name == name)
        };
        match records.into_iter().find(uses) {
            Some(record) => Some(record.name.to_string()),
            None => (self.volumes.contains(name)).then(|| "that is being made".to_owned()),
        }
    }
}

fn volume_in_use(name: &str, user: &str) -> Fault {
    Fault::conflict(format!(
        "the volume {name:?} is used by the machine {user}, and one machine at a time can have it"
    ))
}

/// A volume that no machine gets meanwhile.
pub(crate) struct HeldVolume {
    node: Arc<Node>,
    name: String,
}

impl Drop for HeldVolume {
    fn drop(&mut self) {
        self.node.machines().volumes.remove(&self.name);
    }
}

fn make_private_dir(dir: &Path) -> Result<(), NodeError> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(dir)
        .map_err(|source| NodeError::Io {
            operation: "make directory",
            path: dir.to_owned(),
            source,
        })
}

impl Node {
    /// Makes the state directory ready and takes over what an earlier node left.
    pub(crate) async fn open(
        options: NodeOptions,
        mesh: Arc<Mesh>,
    ) -> Result<Arc<Node>, NodeError> {
        make_private_dir(&options.state_dir)?;
        let lock = take_lock(&options).await?;
        let state = options.state_dir.clone();
        // Archives that were on their way in when an earlier node died. There may be none.
        let _ = std::fs::remove_dir_all(state.join("tmp"));
        for name in [
            "machines",
            "images",
            "kernels",
            "nanos",
            "overlays",
            "initramfs",
            "templates",
            "snapshots",
            "volumes",
            "tmp",
        ] {
            make_private_dir(&state.join(name))?;
        }
        let mechanisms = Mechanisms {
            images: ImageStore::open(&state.join("images"), vistara_image::Limits::default())
                .map_err(NodeError::Images)?,
            kernels: KernelStore::open(&state.join("kernels")).map_err(NodeError::Kernels)?,
            nanos: NanosKernels::open(&state.join("nanos")).map_err(NodeError::Kernels)?,
            overlays: OverlayTemplates::open(&state.join("overlays"))
                .map_err(NodeError::Kernels)?,
            payload: LinuxPayload::open(&state.join("initramfs"), vistara_guest_embed::AGENT)
                .map_err(NodeError::Kernels)?,
            vmms: Arc::default(),
            is_root: rustix::process::geteuid().is_root(),
        };
        let limits = options
            .template_limits
            .unwrap_or_else(TemplateLimits::of_this_host);
        let stock = Arc::new(Stock::new(options.warm_budget()));
        let node = Arc::new(Node {
            options,
            started_ns: now_ns(),
            mechanisms,
            templates: Arc::new(Templates::new(state.join("templates"), limits)),
            snapshots: Snapshots::new(state.join("snapshots")),
            captures: Captures::new(),
            stock,
            mesh,
            kvm: Mutex::new(KvmVerdict::Absent("it has not been probed yet".to_owned())),
            machines: Mutex::default(),
            _lock: lock,
        });
        if let Err(error) = node.volumes().sweep() {
            tracing::warn!(%error, "volumes that an earlier node was making could not be cleared away");
        }
        node.detect(false).await;
        // What was half made may still run, in a monitor that had to be found first.
        let images = &node.mechanisms.images;
        let is_there = |id: &Digest| !matches!(images.find(id.as_ref()), Ok(None));
        node.templates.survey(&node.all_vmms(), is_there).await;
        node.snapshots.sweep().await;
        node.adopt_all().await;
        node.begin_stock();
        Ok(node)
    }

    pub(crate) fn mechanisms(&self) -> Mechanisms {
        self.mechanisms.clone()
    }

    pub(crate) fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    pub(crate) fn templates(&self) -> Arc<Templates> {
        Arc::clone(&self.templates)
    }

    /// Every monitor that is usable here.
    fn all_vmms(&self) -> Vec<Arc<dyn Vmm>> {
        let vmms = self.mechanisms.vmms.lock();
        let vmms = vmms.unwrap_or_else(PoisonError::into_inner);
        vmms.values().cloned().collect()
    }

    pub(crate) fn boot_bound(&self) -> Duration {
        self.options.boot_bound
    }

    fn machines(&self) -> MutexGuard<'_, Machines> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the choice of hypervisor needs to know.
    pub(crate) fn facts(&self) -> HostFacts {
        let version = |kind| {
            self.mechanisms
                .vmm(kind)
                .map(|vmm| vmm.capabilities().version.clone())
        };
        let kernel = self.mechanisms.kernels.default_kernel().ok().flatten();
        let nanos = self.mechanisms.nanos.default_kernel().ok().flatten();
        HostFacts {
            kvm: self
                .kvm
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            qemu: version(VmmKind::Qemu),
            firecracker: version(VmmKind::Firecracker),
            firecracker_no_network: self
                .mechanisms
                .vmm(VmmKind::Firecracker)
                .and_then(|vmm| vmm.capabilities().user_network.clone().err()),
            nanos_tells_calls: nanos.as_ref().is_some_and(|kernel| {
                let mut modules = kernel.record.klibs.iter();
                modules.any(|module| module == vistara_nanos::calls::MODULE)
            }),
            nanos_kernel: nanos.map(|kernel| kernel.record.name),
            linux_kernel: kernel.map(|kernel| kernel.record.name),
            cpus: vistara_host::facts::cpus(),
            memory_available: Bytes(vistara_host::facts::memory_available().unwrap_or(0)),
        }
    }

    pub(crate) fn volumes(&self) -> Volumes {
        Volumes::new(self.options.state_dir.join("volumes"))
    }

    /// The machine that has this volume.
    pub(crate) fn user_of_volume(&self, name: &str) -> Option<String> {
        self.machines().user_of_volume(name)
    }

    /// Keeps every machine from having this volume, as long as what is given lives.
    pub(crate) fn hold_volume(self: Arc<Self>, name: &str) -> Answer<HeldVolume> {
        let mut machines = self.machines();
        if let Some(user) = machines.user_of_volume(name) {
            return Err(volume_in_use(name, &user).hint("wait until that machine ends, or stop it"));
        }
        machines.volumes.insert(name.to_owned());
        drop(machines);
        Ok(HeldVolume {
            node: self,
            name: name.to_owned(),
        })
    }

    pub(crate) fn machine_dir(&self, id: &MachineId) -> PathBuf {
        self.options.state_dir.join("machines").join(id.as_ref())
    }

    /// The name of the kernel that a machine boots.
    pub(crate) fn kernel(
        &self,
        spec: &MachineSpec,
        backend: Backend,
        host: &HostFacts,
    ) -> Answer<Option<String>> {
        match backend.payload {
            Payload::Linux => {
                if let Some(kernel) = &spec.kernel {
                    self.mechanisms.kernels.get(kernel)?;
                } else if host.linux_kernel.is_none() && backend.vmm != VmmKind::Fake {
                    self.mechanisms.linux_boot(None, UpperLayer::Disk)?;
                }
                Ok(spec.kernel.clone().or_else(|| host.linux_kernel.clone()))
            }
            Payload::Nanos => Ok(host.nanos_kernel.clone()),
        }
    }

    /// All machines, newest first.
    pub(crate) fn all(&self) -> Vec<Arc<Handle>> {
        let mut all: Vec<Arc<Handle>> = self.machines().by_id.values().cloned().collect();
        all.sort_by_key(|handle| std::cmp::Reverse(handle.record().created_ns));
        all
    }

    /// The machine that a user typed.
    pub(crate) fn find(&self, typed: &str) -> Answer<Arc<Handle>> {
        let all = self.all();
        let names: Vec<(String, String)> = all
            .iter()
            .map(|handle| (handle.id.to_string(), handle.record().name.to_string()))
            .collect();
        let id = lookup(
            typed,
            names.iter().map(|(id, name)| (id.as_str(), name.as_str())),
        )?
        .to_owned();
        all.into_iter()
            .find(|handle| handle.id.as_ref() == id)
            .ok_or_else(|| {
                Fault::new(
                    ErrorKind::NotFound,
                    format!("there is no machine {typed:?}"),
                )
            })
    }

    /// Machines that have not ended.
    pub(crate) fn active(&self) -> usize {
        self.machines()
            .by_id
            .values()
            .filter(|handle| handle.state() != MachineState::Ended)
            .count()
    }

    /// How many machines, ended ones included, use an image.
    pub(crate) fn users_of(&self, image: &Digest) -> u64 {
        self.machines()
            .by_id
            .values()
            .filter(|handle| handle.record().image_id == *image)
            .count() as u64
    }

    /// Whether a machine that has not ended needs an image.
    pub(crate) fn needs(&self, image: &Digest) -> bool {
        self.machines().by_id.values().any(|handle| {
            handle.state() != MachineState::Ended && handle.record().image_id == *image
        })
    }

    pub(crate) fn forget(&self, id: &MachineId) {
        self.machines().by_id.remove(id);
    }

    /// Removes a machine and waits until it is gone.
    pub(crate) async fn remove(&self, handle: &Handle, force: bool) -> Answer<()> {
        let name = handle.record().name.clone();
        if handle.state() != MachineState::Ended {
            if !force {
                return Err(
                    Fault::conflict(format!("machine {name} has not ended")).hint(format!(
                        "stop it first with `vistara stop {name}`, or add --force"
                    )),
                );
            }
            handle.send(Command::Kill).await;
            handle.wait_end().await;
        }
        handle.send(Command::Remove).await;
        handle.wait_until(|snapshot| snapshot.removed).await;
        Ok(())
    }
}

/// Takes the state directory's lock. A node that is on its way out (its socket answers no more) is waited for.
async fn take_lock(options: &NodeOptions) -> Result<File, NodeError> {
    let path = options.state_dir.join("lock");
    let io = |source: std::io::Error| NodeError::Io {
        operation: "open",
        path: path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io)?;
    let deadline = Instant::now() + LOCK_BOUND;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(io(error.into())),
        }
        let answers = tokio::net::UnixStream::connect(&options.socket)
            .await
            .is_ok();
        if answers || Instant::now() >= deadline {
            return Err(NodeError::AlreadyServed(options.state_dir.clone()));
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
}
