//! Snapshots and forks as users ask for them: a machine that runs is held still for a moment, and others go on from there.

use super::Node;
use crate::fault::{Answer, Fault, blocking, chain};
use crate::machine::{Command, Continues, Handle, OVERLAY, Origin, Record, disks, now_ns, plan};
use crate::mesh::Asker;
use crate::snapshots::{About, Listed, Moment, Reserved, Room, Snapshots, Unusable};
use futures_util::StreamExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vistara_api::{ErrorKind, ForkRequest, PackedSnapshot, RestoreRequest};
use vistara_control::{MEMORY_MIN, lookup};
use vistara_host::files::clone_sparse;
use vistara_image::ProgressSink;
use vistara_machine::{Capture, Start, Vm, VmmError};
use vistara_model::{
    Bytes, Digest, Generation, MachineId, MachineSpec, MachineState, Network, Payload, VmmKind,
};

/// Most forks of one request.
const FORKS_MAX: u32 = 1000;
/// Forks that are launched at once: more than a few take each other's processors.
const LAUNCHES_AT_ONCE: usize = 4;
/// How long a guest may take to hold its processes still. Its agent gives up after 2 s; the rest is a busy host's.
const FREEZE_BOUND: Duration = Duration::from_secs(5);

/// Forks of a machine.
pub(crate) struct Forks {
    pub(crate) machines: Vec<Arc<Handle>>,
    /// How long the machine was held still.
    pub(crate) pause: Duration,
    /// How long it took until others could go on from it.
    pub(crate) captured: Duration,
}

/// A machine at a moment, and how long it was held.
struct Taken {
    capture: Capture,
    pause: Duration,
    record: Record,
    /// Kept until nothing more is copied.
    room: Room,
}

fn random_id() -> Answer<MachineId> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
    Ok(MachineId::from_random(random))
}

/// Why no moment of a machine can be taken, whatever its state.
fn refusal(record: &Record) -> Option<Fault> {
    let name = &record.name;
    if record.backend.payload != Payload::Linux {
        let message = format!("machine {name} is a unikernel, which cannot be captured");
        return Some(Fault::conflict(message).hint("run the image with --hypervisor qemu"));
    }
    if !record.spec.volumes.is_empty() || !record.spec.named_volumes.is_empty() {
        return Some(Fault::conflict(format!(
            "machine {name} has volumes, which belong to one machine and cannot be captured"
        )));
    }
    if record.spec.huge_pages {
        return Some(Fault::conflict(format!(
            "machine {name} has huge pages, which cannot be captured"
        )));
    }
    None
}

impl Node {
    /// Takes a moment of a machine: its writable disk is copied to the new file `overlay` meanwhile.
    async fn take(&self, handle: &Arc<Handle>, overlay: PathBuf) -> Answer<Taken> {
        if let Some(fault) = refusal(&handle.record()) {
            return Err(fault);
        }
        let agent = handle.agent().await?;
        let vm = handle.shared.vm.borrow().clone();
        let vm: Arc<dyn Vm> =
            vm.ok_or_else(|| Fault::conflict(format!("machine {} is not running", handle.id)))?;
        vm.can_snapshot().map_err(|error| {
            let fault = Fault::from(error);
            match vm.record().kind {
                VmmKind::Qemu | VmmKind::Fake => fault,
                VmmKind::Firecracker => fault.hint("run it with --hypervisor qemu"),
            }
        })?;
        let room = self.room(&handle.record()).await?;
        handle.ask(|answer| Command::Hold(true, answer)).await?;
        let handle = Arc::clone(handle);
        // A client that goes away in the middle must not leave a machine that stands still.
        let task = tokio::spawn(async move {
            let (disk, to) = (handle.dir.join(OVERLAY), overlay);
            let begin = Arc::new(OnceLock::new());
            let refused = Arc::new(OnceLock::new());
            let quiet = {
                let (begin, refused) = (Arc::clone(&begin), Arc::clone(&refused));
                Box::pin(async move {
                    let _ = begin.set(Instant::now());
                    let fault = match tokio::time::timeout(FREEZE_BOUND, agent.freeze()).await {
                        Ok(Ok(())) => return Ok(()),
                        Ok(Err(error)) => Fault::from(error),
                        Err(_) => Fault::conflict(format!(
                            "the guest did not hold its processes still within {} s",
                            FREEZE_BOUND.as_secs()
                        ))
                        .hint("try again in a moment"),
                    };
                    let message = fault.0.message.clone();
                    let _ = refused.set(fault);
                    Err(VmmError::Control {
                        operation: "holding the guest's processes still",
                        message,
                    })
                })
            };
            let at_rest = Box::new(move || clone_sparse(&disk, &to));
            let taken = vm.snapshot(quiet, at_rest).await;
            let record = handle.record();
            // Also where it was refused: half of it may hold.
            if handle.shared.thaw().await {
                let noted = handle.ask(|answer| Command::Hold(false, answer)).await;
                if let Err(fault) = noted {
                    tracing::debug!(machine = %handle.id, message = fault.0.message, "a machine ended while it was captured");
                }
            } else {
                // The next session does it, or the next node's, or has done it already.
                tracing::warn!(machine = %handle.id, "a guest that was held still for a snapshot does not answer");
            }
            let pause = begin.get().map_or(Duration::ZERO, Instant::elapsed);
            let snapshot = match (taken, refused.get()) {
                (Ok(snapshot), _) => snapshot,
                // The agent's own words, and what kind of an error it is.
                (Err(_), Some(fault)) => return Err(fault.clone()),
                (Err(error), None) => return Err(error.into()),
            };
            tracing::info!(machine = %handle.id, held = ?snapshot.pause, ?pause, "a machine was captured");
            Ok(Taken {
                capture: snapshot.capture,
                pause,
                record: record.as_ref().clone(),
                room,
            })
        });
        task.await.map_err(|error| Fault::internal(&error))?
    }

    /// Room for a capture of a machine, as soon as it is its turn.
    async fn room(&self, record: &Record) -> Answer<Room> {
        let available = || Bytes(vistara_host::facts::memory_available().unwrap_or(0));
        self.captures.room(record.spec.memory, available).await
    }

    /// The root disk of a machine's image.
    async fn root_of(&self, record: &Record) -> Answer<PathBuf> {
        let images = &self.mechanisms.images;
        let image = images.find(record.image_id.as_ref())?.ok_or_else(|| {
            let name = record.spec.image.familiar();
            let message = format!("image {name} ({}) is not on this node", record.image_id);
            Fault::new(ErrorKind::ImageNotFound, message)
                .hint(format!("vistara images pull {name}"))
        })?;
        Ok(images.root_disk(&image, &ProgressSink::none()).await?.path)
    }

    /// Writes a snapshot of a machine that runs, and lets it go on; with a base, only what differs from that snapshot.
    pub(crate) async fn create_snapshot(
        self: &Arc<Self>,
        handle: &Arc<Handle>,
        name: Option<String>,
        base: Option<String>,
    ) -> Answer<Listed> {
        let snapshots = self.snapshots.clone();
        let base = match base {
            Some(typed) => {
                let (node, record) = (Arc::clone(self), handle.record());
                Some(blocking(move || node.base(&typed, &record)).await??)
            }
            None => None,
        };
        let mut reserved = None;
        if let Some(name) = name.clone() {
            let all = snapshots.clone();
            reserved = Some(blocking(move || reserve(&all, &name)).await??);
        }
        let root = self.root_of(&handle.record()).await?;
        let id = random_id()?.to_string();
        let failed = |message: String| {
            Fault::new(
                ErrorKind::Host,
                format!("the snapshot could not be written: {message}"),
            )
            .hint("free some disk space, or see `vistara doctor`")
        };
        let fresh = blocking(move || snapshots.begin(id)).await?;
        let fresh = fresh.map_err(|error| failed(error.to_string()))?;
        let taken = self.take(handle, fresh.overlay()).await?;
        let (capture, pause, record) = (taken.capture, taken.pause, taken.record);
        let room = taken.room;
        let finished = blocking(move || {
            let finished = fresh.finish(&capture, &root, (name, base), pause, record);
            drop(capture);
            vistara_host::memory::give_back();
            drop((reserved, room));
            finished
        });
        finished.await?.map_err(failed)
    }

    pub(crate) fn snapshots(&self) -> Snapshots {
        self.snapshots.clone()
    }

    /// Whether the snapshot with this id is here. Where it is not, whether it could have this name. Blocks on files.
    pub(crate) fn offered_snapshot(&self, id: &str, name: Option<&str>) -> Answer<bool> {
        let id = snapshot_id(id)?;
        let all = self.snapshots.list();
        if all.iter().any(|listed| listed.id == id.as_ref()) {
            return Ok(true);
        }
        // Given back at once: what counts is that another has it now.
        name.map(|name| reserve(&self.snapshots, name))
            .transpose()?;
        Ok(false)
    }

    /// Makes one file of a snapshot. Blocks on files for as long as some 100 MB take.
    pub(crate) fn pack_snapshot(&self, typed: &str) -> Answer<PackedSnapshot> {
        let listed = self.find_snapshot(typed)?;
        let about = listed.about.map_err(|Unusable(why)| {
            let shown = &listed.id;
            Fault::new(
                ErrorKind::Host,
                format!("snapshot {shown} cannot be used: {why}"),
            )
        })?;
        let packed = self.snapshots.pack(&listed.id).map_err(|error| {
            let message = format!("snapshot {} could not be packed: {error}", listed.id);
            Fault::new(ErrorKind::Host, message).hint("free some disk space")
        })?;
        Ok(PackedSnapshot {
            id: listed.id,
            name: about.name,
            image_id: about.record.image_id.to_string(),
            digest: packed.digest.to_string(),
            bytes: packed.bytes,
        })
    }

    /// Puts a snapshot in place whose file has come as a blob, and removes that.
    pub(crate) async fn import_snapshot(
        &self,
        id: &str,
        name: Option<String>,
        file: Digest,
    ) -> Answer<Listed> {
        let id = snapshot_id(id)?;
        let (images, snapshots) = (self.mechanisms.images.clone(), self.snapshots.clone());
        blocking(move || {
            let here = snapshots
                .list()
                .into_iter()
                .find(|one| one.id == id.as_ref());
            if let Some(listed) = here {
                return Ok(listed);
            }
            let _reserved = name
                .as_deref()
                .map(|name| reserve(&snapshots, name))
                .transpose()?;
            let Some((packed, _)) = images.open_blob(&file)? else {
                let message = format!("the snapshot's file {file} is not here");
                return Err(Fault::new(ErrorKind::NotFound, message)
                    .hint("send it first: vistara snapshot fetch"));
            };
            let fresh = snapshots.begin(id.to_string()).map_err(|error| {
                let message = format!("the snapshot could not be written: {error}");
                Fault::new(ErrorKind::Host, message)
            })?;
            let listed = fresh.arrive(packed, name).map_err(|Unusable(why)| {
                let message = format!("snapshot {id} is not taken: {why}");
                Fault::new(ErrorKind::Host, message)
                    .hint("remove it where it came from, or free some disk space")
            })?;
            images.drop_blob(&file)?;
            Ok(listed)
        })
        .await?
    }

    /// The snapshot of which one of this machine is to keep only what differs. Blocks on files.
    fn base(&self, typed: &str, of: &Record) -> Answer<String> {
        let listed = self.find_snapshot(typed)?;
        let about = listed.about.map_err(|Unusable(why)| {
            let message = format!("snapshot {typed} cannot be a base: {why}");
            Fault::new(ErrorKind::Host, message).hint("leave --base out")
        })?;
        let (theirs, ours) = (about.record.spec.memory, of.spec.memory);
        if theirs != ours {
            return Err(Fault::conflict(format!(
                "snapshot {typed} is of a machine with {theirs} of memory, and machine {} has {ours}",
                of.name
            ))
            .hint("take a snapshot of the same machine as the base, or leave --base out"));
        }
        Ok(listed.id)
    }

    /// The snapshot that a user typed. Blocks on files.
    pub(crate) fn find_snapshot(&self, typed: &str) -> Answer<Listed> {
        let all = self.snapshots.list();
        let names = all
            .iter()
            .map(|listed| (listed.id.as_str(), listed.name().unwrap_or(&listed.id)));
        let id = lookup(typed, names).map_err(|error| {
            Fault::lookup(error, "snapshot", "ids").hint("see `vistara snapshot ls`")
        })?;
        let id = id.to_owned();
        let found = all.into_iter().find(|listed| listed.id == id);
        found.ok_or_else(|| Fault::new(ErrorKind::NotFound, format!("there is no snapshot {id}")))
    }

    /// A new machine that goes on from a snapshot; it is being launched when this returns.
    pub(crate) async fn restore(
        self: &Arc<Self>,
        typed: &str,
        request: &RestoreRequest,
        asker: &Asker,
        zero: Instant,
    ) -> Answer<Arc<Handle>> {
        let (node, of) = (Arc::clone(self), typed.to_owned());
        let listed = blocking(move || node.find_snapshot(&of)).await??;
        let shown = listed.name().unwrap_or(&listed.id).to_owned();
        let unusable = |Unusable(why): Unusable| {
            Fault::new(
                ErrorKind::Host,
                format!("snapshot {shown} cannot be used: {why}"),
            )
            .hint(format!(
                "nothing was started; remove it with `vistara snapshot rm {shown}` if it is of no more use"
            ))
        };
        let about: About = listed.about.clone().map_err(unusable)?;
        let records = || self.all().iter().map(|handle| handle.record()).collect();
        // Held until the record is there, from which what the machine takes is counted.
        let (owner, _held) = asker.claim(&about.record.spec, about.record.spec.memory, records)?;
        let root = self.root_of(&about.record).await?;
        let room = self.room(&about.record).await?;
        let (snapshots, id, disk) = (self.snapshots.clone(), listed.id.clone(), root.clone());
        let parts = blocking(move || {
            let parts = snapshots.read(&id, &disk);
            vistara_host::memory::give_back();
            parts
        });
        let parts = parts.await?.map_err(unusable)?;
        drop(room);
        let moment = Arc::new(Moment {
            capture: Arc::new(parts.capture),
            overlay: parts.overlay,
            root,
        });
        let changes = Changes {
            name: request.name.clone(),
            hostname: request.hostname.clone(),
            ports: request.ports.clone(),
            auto_remove: request.auto_remove,
        };
        let parent = format!("snapshot {shown}");
        let from = Record {
            owner,
            ..parts.about.record
        };
        self.go_on_from(&from, parent, &changes, moment, zero).await
    }

    /// Copies of a machine that runs; they run, or have ended, when this returns.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        handle: &Arc<Handle>,
        request: &ForkRequest,
        zero: Instant,
    ) -> Answer<Forks> {
        let count = request.count;
        if count == 0 || count > FORKS_MAX {
            return Err(Fault::user(format!(
                "{count} forks: it takes 1 to {FORKS_MAX} at a time"
            )));
        }
        if count > 1 && request.name.is_some() {
            return Err(Fault::user("a name is for one machine")
                .hint("leave out --name: forks get names of their own"));
        }
        let root = self.root_of(&handle.record()).await?;
        let path = self
            .options
            .state_dir
            .join("tmp")
            .join(format!("fork-{}.img", random_id()?));
        let gone = Unlinked(path.clone());
        let taken = self.take(handle, path.clone()).await?;
        let overlay = blocking(move || std::fs::File::open(&path)).await?;
        // It lives on as long as somebody has it open.
        drop(gone);
        let overlay = overlay.map_err(|error| {
            let message = format!("the copy of its disk cannot be read: {error}");
            Fault::new(ErrorKind::Host, message)
        })?;
        drop(taken.room);
        let captured = zero.elapsed();
        let moment = Arc::new(Moment {
            capture: Arc::new(taken.capture),
            overlay,
            root,
        });
        let changes = Changes {
            name: request.name.clone(),
            hostname: None,
            ports: request.ports.clone(),
            auto_remove: request.auto_remove,
        };
        let parent = format!("machine {}", taken.record.name);
        let (record, changes, parent, moment) = (&taken.record, &changes, &parent, &moment);
        let all: Vec<Answer<Arc<Handle>>> = futures_util::stream::iter(0..count)
            .map(|_| async move {
                let handle = self
                    .go_on_from(record, parent.clone(), changes, Arc::clone(moment), zero)
                    .await?;
                let launched = |state| state != MachineState::Preparing;
                handle
                    .wait_until(|snapshot| launched(snapshot.record.state))
                    .await;
                Ok(handle)
            })
            .buffered(LAUNCHES_AT_ONCE)
            .collect()
            .await;
        let mut machines = Vec::new();
        let mut refused = None;
        for made in all {
            match made {
                Ok(handle) => machines.push(handle),
                Err(fault) => refused = Some(fault),
            }
        }
        for handle in &machines {
            handle.wait_started().await;
        }
        // Those that were made are told; where there is none, why.
        if let Some(fault) = refused {
            if machines.is_empty() {
                return Err(fault);
            }
            tracing::warn!(message = fault.0.message, "not every fork was made");
        }
        Ok(Forks {
            machines,
            pause: taken.pause,
            captured,
        })
    }

    /// A new machine that goes on from a moment of the one whose record this is.
    async fn go_on_from(
        self: &Arc<Self>,
        from: &Record,
        parent: String,
        changes: &Changes,
        moment: Arc<Moment>,
        zero: Instant,
    ) -> Answer<Arc<Handle>> {
        let mut spec: MachineSpec = from.spec.clone();
        changes.apply(&mut spec)?;
        super::create::choose_ports(&mut spec)?;
        let vmm = from.backend.vmm;
        let Some(monitor) = self.mechanisms.vmm(vmm) else {
            let message = format!("{vmm} is not on this node");
            return Err(Fault::new(ErrorKind::Host, message).hint("vistara doctor"));
        };
        self.admit_size_before_stock(&spec, MEMORY_MIN, vmm, &self.facts())
            .await?;
        let id = random_id()?;
        let mut for_name = [0; 4];
        getrandom::fill(&mut for_name).map_err(|error| Fault::internal(&error))?;
        let record = |name, slot| Record {
            format: Record::FORMAT,
            id: id.clone(),
            name,
            generation: Generation(1),
            hostname: (spec.hostname.clone()).unwrap_or_else(|| id.short().to_owned()),
            reasons: vec![format!("it goes on from {parent}")],
            slot,
            spec: spec.clone(),
            state: MachineState::Preparing,
            end: None,
            created_ns: now_ns(),
            started_ns: None,
            ended_ns: None,
            vm: None,
            retried: false,
            provisional: false,
            // What the other was tried as is its own story.
            undone: None,
            undone_boot_id: None,
            log_base: crate::logbook::Offsets::default(),
            template: None,
            warm: false,
            continues: Some(Continues {
                parent: parent.clone(),
                renewed: false,
                printed_before: crate::logbook::Offsets::default(),
            }),
            // Whoever goes on from a copy of a service is none: nobody has a lease for it.
            copy_of: None,
            held: false,
            proof: from.proof.of_copy(),
            timings: Vec::new(),
            ..from.clone()
        };
        // What its monitor would refuse is told before there is a machine.
        let start = Start::Fork(Arc::clone(&moment.capture));
        let dir = self.machine_dir(&id);
        let disks = disks(moment.root.clone(), dir.join(OVERLAY));
        let checked = monitor.check(&plan(
            self,
            &record(from.name.clone(), 0),
            Path::new(&dir),
            start,
            disks,
        ));
        checked.map_err(|error| {
            Fault::new(
                ErrorKind::Host,
                format!("{parent} cannot be used here: {}", chain(&error)),
            )
        })?;
        let (name, slot) = self.reserve(&spec, None, for_name)?;
        let origin = Origin::Request {
            at: zero,
            attach: false,
            moment: Some(moment),
            warm: None,
            lease: None,
        };
        self.begin(record(name, slot), origin).await
    }
}

fn snapshot_id(typed: &str) -> Answer<MachineId> {
    let parsed = typed.parse();
    parsed.map_err(|_| Fault::user(format!("{typed:?} is no snapshot's id")))
}

/// Keeps a name for a snapshot that is to be here. Blocks on files.
fn reserve(snapshots: &Snapshots, name: &str) -> Answer<Reserved> {
    let _: vistara_model::MachineName = name
        .parse()
        .map_err(|error: vistara_model::IdError| Fault::user(error.to_string()))?;
    snapshots.reserve(name).ok_or_else(|| {
        Fault::conflict(format!("there is a snapshot named {name} already"))
            .hint(format!("vistara snapshot rm {name}, or another name"))
    })
}

/// What of a machine that goes on is not as it was.
struct Changes {
    name: Option<String>,
    hostname: Option<String>,
    ports: Vec<String>,
    auto_remove: bool,
}

impl Changes {
    fn apply(&self, spec: &mut MachineSpec) -> Answer<()> {
        let own = crate::request::spec(
            &vistara_api::RunRequest {
                name: self.name.clone(),
                hostname: self.hostname.clone(),
                ports: self.ports.clone(),
                network: (spec.network == Network::None).then(|| "none".to_owned()),
                ..vistara_api::RunRequest::default()
            },
            spec.image.clone(),
        )?;
        spec.name = own.name;
        spec.hostname = own.hostname;
        spec.ports = own.ports;
        spec.auto_remove = self.auto_remove;
        Ok(())
    }
}

/// A file whose name goes with this, whatever happens.
struct Unlinked(PathBuf);

impl Drop for Unlinked {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}
