//! From a request to a machine: is there room, whose name is it, and its task begins.

use super::{Decision, Look, MACHINES_MAX, Node, huge_pages, volume_in_use};
use crate::fault::{Answer, Fault};
use crate::logbook::{Limits, LogBook};
use crate::machine::{Actor, CopyOf, Handle, Origin, Record, made_up_name, make_dir, now_ns};
use crate::mesh::Asker;
use crate::receipts::{Asked, Proof};
use crate::stock::Warm;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_api::{ErrorKind, RunRequest};
use vistara_control::{Capacity, Demand, MEMORY_MIN, admit};
use vistara_model::{
    Bytes, Digest, Generation, HostFacts, MachineId, MachineName, MachineSpec, MachineState,
    VmmKind,
};

/// A copy of a service that is to be made.
pub(crate) struct LeasedCopy {
    /// Which.
    pub(crate) of: CopyOf,
    /// When it must be gone, by `CLOCK_BOOTTIME`, unless that is put off.
    pub(crate) until: Duration,
}

impl Node {
    /// Whether a machine of this size has room here.
    pub(super) fn admit_size(
        &self,
        spec: &MachineSpec,
        memory_min: Bytes,
        vmm: VmmKind,
        facts: &HostFacts,
    ) -> Answer<()> {
        let vcpus_max = self
            .mechanisms
            .vmm(vmm)
            .map_or(1, |vmm| vmm.capabilities().vcpus_max);
        Ok(admit(
            Demand {
                cpus: spec.cpus,
                memory: spec.memory,
                memory_min,
                disk: spec.disk,
                huge_pages: spec.huge_pages,
            },
            Capacity {
                cpus: facts.cpus,
                vcpus_max,
                memory_available: facts.memory_available,
            },
        )?)
    }

    /// Whether a machine of this size has room here as a Linux guest under this monitor.
    pub(crate) fn admit_on_linux(&self, spec: &MachineSpec, vmm: VmmKind) -> Answer<()> {
        self.admit_size(spec, MEMORY_MIN, vmm, &self.facts())
    }

    /// Accepts a request, whose body has this digest: the machine exists, and is being prepared, when this returns.
    pub(crate) async fn create(
        self: &Arc<Self>,
        request: &RunRequest,
        digest: Option<Digest>,
        asker: &Asker,
        zero: Instant,
    ) -> Answer<Arc<Handle>> {
        self.create_as(request, digest, asker, zero, None).await
    }

    /// The same, as a copy of a service that may run for so long.
    pub(crate) async fn create_as(
        self: &Arc<Self>,
        request: &RunRequest,
        digest: Option<Digest>,
        asker: &Asker,
        zero: Instant,
        copy: Option<LeasedCopy>,
    ) -> Answer<Arc<Handle>> {
        let decision = self.decide(request, Look::IfItMatters).await?;
        let host = self.facts();
        let memory = decision.spec.memory.max(decision.linux_memory);
        let records = || self.all().iter().map(|handle| handle.record()).collect();
        // Held until the record is there, from which what the machine takes is counted.
        let (owner, _held) = asker.claim(&decision.spec, memory, records)?;
        // Nothing goes for a request that its asker may not make.
        self.admit_before_stock(&decision, &host).await?;
        let Decision {
            image,
            mut spec,
            program,
            choice,
            memory_min: _,
            linux_memory,
            facts,
        } = decision;
        let asked = Asked::new(digest, request.nonce.as_ref(), &image)?;
        let kernel = self.kernel(&spec, choice.backend, &host)?;
        choose_ports(&mut spec)?;
        let mut random = [0; 20];
        getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
        let (for_id, for_name) = random.split_at(16);
        let id = MachineId::from_random(for_id.try_into().unwrap_or([0; 16]));
        let for_name = for_name.try_into().unwrap_or([0; 4]);
        let mut record = Record {
            format: Record::FORMAT,
            hostname: spec
                .hostname
                .clone()
                .unwrap_or_else(|| id.short().to_owned()),
            id,
            // Reserved below, with the slot.
            name: made_up_name(for_name, |_| false)
                .parse()
                .map_err(|error: vistara_model::IdError| Fault::internal(&error))?,
            generation: Generation(1),
            image_id: image.id.clone(),
            argv: program.argv,
            env: program.env,
            user: program.user,
            working_dir: program.working_dir,
            stop_signal: program.stop_signal,
            hypervisor: choice.hypervisor,
            backend: choice.backend,
            reasons: choice.reasons,
            kernel,
            program_file: facts.map(|facts| facts.program.file),
            linux_memory: Some(linux_memory),
            owner,
            slot: 0,
            spec,
            state: MachineState::Preparing,
            end: None,
            created_ns: now_ns(),
            started_ns: None,
            ended_ns: None,
            vm: None,
            provisional: choice.provisional,
            undone: None,
            undone_boot_id: None,
            retried: false,
            log_base: crate::logbook::Offsets::default(),
            template: None,
            warm: false,
            continues: None,
            copy_of: copy.as_ref().map(|copy| copy.of.clone()),
            held: false,
            proof: Proof::of(asked),
            timings: Vec::new(),
        };
        let wish = self.wish(&record).await;
        (record.name, record.slot) =
            self.reserve(&record.spec, self.huge_pages_for(&record).await, for_name)?;
        let warm = wish.and_then(|wish| self.take_from_stock(wish));
        if let Some((id, its_slot)) = warm.as_ref().and_then(Warm::identity) {
            // It is who it is already.
            self.release_slot(record.slot);
            record.hostname = id.short().to_owned();
            (record.id, record.slot, record.warm) = (id, its_slot, true);
        }
        let origin = Origin::Request {
            at: zero,
            attach: request.attach,
            moment: None,
            warm: warm.map(Box::new),
            lease: copy.map(|copy| copy.until),
        };
        self.begin(record, origin).await
    }

    /// What is to be reserved of huge pages.
    async fn huge_pages_for(&self, record: &Record) -> Option<huge_pages::Wish> {
        let memory = huge_pages::wanted(record)?;
        let others: Vec<Arc<Record>> = self.all().iter().map(|handle| handle.record()).collect();
        let looked = tokio::task::spawn_blocking(move || huge_pages::touched(&others)).await;
        Some(huge_pages::Wish {
            memory,
            // Not to know it only makes what is free look less.
            touched: looked.unwrap_or_default(),
        })
    }

    /// Gives a machine whose name and slot are reserved its directory and its task.
    pub(super) async fn begin(
        self: &Arc<Self>,
        record: Record,
        origin: Origin,
    ) -> Answer<Arc<Handle>> {
        let (id, name, slot) = (record.id.clone(), record.name.clone(), record.slot);
        let warm = record.warm;
        let volumes: Vec<String> = (record.spec.named_volumes.iter())
            .map(|volume| volume.name.clone())
            .collect();
        let dir = self.machine_dir(&id);
        let made = {
            let (dir, record) = (dir.clone(), record.clone());
            tokio::task::spawn_blocking(move || {
                let made = match record.warm {
                    true => Ok(()),
                    false => make_dir(&dir),
                };
                let result = made
                    .and_then(|()| record.save(&dir))
                    .and_then(|()| LogBook::open(&dir.join("log"), Limits::default()));
                if result.is_err() && !record.warm {
                    // Half a directory is nobody's machine. That it cannot be removed changes nothing of the error.
                    let _ = std::fs::remove_dir_all(&dir);
                }
                result
            })
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        };
        let mut machines = self.machines();
        machines.names.remove(&name);
        machines.huge_pages.remove(&name);
        if made.is_ok() || !warm {
            // That of a machine of the stock is free once its monitor is gone.
            machines.slots.remove(&slot);
        }
        machines.volumes.retain(|volume| !volumes.contains(volume));
        let log = made.map_err(|error| {
            Fault::new(
                ErrorKind::Host,
                format!("the machine's directory {dir:?} could not be made: {error}"),
            )
            .hint("free some disk space, or see `vistara doctor`")
        })?;
        let handle = Actor::start(Arc::clone(self), dir, record, log, origin);
        machines.by_id.insert(id, Arc::clone(&handle));
        Ok(handle)
    }

    /// Promises a name, a slot, its volumes and so much of huge pages to a machine that is about to be.
    pub(super) fn reserve(
        &self,
        spec: &MachineSpec,
        huge_pages: Option<huge_pages::Wish>,
        random: [u8; 4],
    ) -> Answer<(MachineName, u32)> {
        let wanted = spec.name.as_ref();
        let mut machines = self.machines();
        if machines.by_id.len() >= MACHINES_MAX {
            return Err(Fault::conflict(format!(
                "this node keeps {MACHINES_MAX} machines and takes no more"
            ))
            .hint("remove ended ones: vistara rm MACHINE…"));
        }
        let records: Vec<Arc<Record>> = machines
            .by_id
            .values()
            .map(|handle| handle.record())
            .collect();
        let taken = |name: &str| {
            records.iter().any(|record| record.name.as_ref() == name)
                || machines.names.iter().any(|known| known.as_ref() == name)
        };
        for volume in &spec.named_volumes {
            if let Some(user) = machines.user_of_volume(&volume.name) {
                return Err(volume_in_use(&volume.name, &user)
                    .hint("wait until that machine ends, stop it, or use another volume"));
            }
        }
        if let Some(wish) = &huge_pages {
            let promised = machines.huge_pages.values();
            let promised = Bytes(promised.map(|memory| memory.0).sum());
            wish.admit(&records, promised)?;
        }
        let name = match wanted {
            Some(name) if taken(name.as_ref()) => {
                return Err(
                    Fault::conflict(format!("there is a machine named {name} already")).hint(
                        format!("remove it with `vistara rm {name}`, or choose another name"),
                    ),
                );
            }
            Some(name) => name.clone(),
            None => made_up_name(random, taken)
                .parse()
                .map_err(|error: vistara_model::IdError| Fault::internal(&error))?,
        };
        let slot = machines.free_slot();
        machines.names.insert(name.clone());
        machines.slots.insert(slot);
        (machines.huge_pages).extend(huge_pages.map(|wish| (name.clone(), wish.memory)));
        let volumes = spec.named_volumes.iter();
        (machines.volumes).extend(volumes.map(|volume| volume.name.clone()));
        Ok((name, slot))
    }
}

/// Gives each port that the user left open a free number. Another program may take it before the monitor does; the
/// launch then says so.
pub(super) fn choose_ports(spec: &mut MachineSpec) -> Answer<()> {
    for port in spec.ports.iter_mut().filter(|port| port.host_port == 0) {
        let free = match port.protocol {
            vistara_model::Protocol::Tcp => std::net::TcpListener::bind((port.host_address, 0))
                .and_then(|socket| socket.local_addr()),
            vistara_model::Protocol::Udp => std::net::UdpSocket::bind((port.host_address, 0))
                .and_then(|socket| socket.local_addr()),
        };
        port.host_port = free
            .map_err(|error| {
                Fault::user(format!(
                    "no port of {} can be bound: {error}",
                    port.host_address
                ))
                .hint("publish on an address of this host, such as 127.0.0.1")
            })?
            .port();
    }
    Ok(())
}
