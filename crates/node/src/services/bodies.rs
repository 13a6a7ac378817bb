//! Machines of copies: made under a lease, watched, ended, and cleared away.

use super::copies::{Body, GUARD_BEFORE};
use super::{Event, Task, tasks};
use crate::fault::{Answer, Fault, blocking};
use crate::fence::boottime;
use crate::machine::{Command, CopyOf, Handle};
use crate::mesh::{Asker, Caller};
use crate::node::LeasedCopy;
use crate::service::tame;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_api::RunRequest;
use vistara_control::services::{ServiceId, Slot};
use vistara_mesh::service::ServiceDocument;
use vistara_model::{Generation, MachineState};

/// Longest that a copy that is not wanted any more gets to end by itself.
const GRACE_MAX: Duration = Duration::from_secs(5);

/// What a copy's machine is asked for with.
fn request(
    document: &ServiceDocument,
    asker: &Asker,
    number: u32,
    generation: Generation,
) -> Answer<RunRequest> {
    let mut request: RunRequest = serde_json::from_slice(&document.request)
        .map_err(|error| Fault::user(format!("the service's request makes no sense: {error}")))?;
    // Where it runs is not its owner's host, whoever's it is: nothing of a host is a copy's.
    if !request.volumes.is_empty() || !request.ports.is_empty() || request.huge_pages {
        return Err(Fault::user(
            "a service's copies get no directories, volumes, ports or huge pages of the host",
        ));
    }
    request.image = document.image.to_string();
    request.name = None;
    (request.stdin, request.attach, request.auto_remove) = (false, false, false);
    (request.tty, request.nonce) = (None, None);
    if request.hostname.is_none() {
        request.hostname = Some(format!("{}-{number}", document.name));
    }
    if let Some(task) = &document.task {
        tasks::tell_program(&mut request.env, &task.key, generation.0);
    }
    if let Asker::Foreign(foreign, _) = asker {
        tame(&Caller::Foreign(Arc::clone(foreign)), &mut request)?;
    }
    Ok(request)
}

impl Task {
    /// Makes a copy's machine.
    pub(super) fn start(&mut self, slot: Slot) {
        let Some(own) = self.own() else { return };
        let (node, placing) = (Arc::clone(&self.node), Arc::clone(&self.placing));
        let events = self.sender();
        let Some(known) = self.known.get_mut(&slot.service) else {
            return;
        };
        let document = Arc::clone(&known.sealed);
        let role = known.role.clone();
        let Some(job) = known.jobs.get_mut(&slot.number) else {
            return;
        };
        let Some(until) = job.holder.valid_until() else {
            return;
        };
        let until = until.saturating_sub(GUARD_BEFORE);
        job.guarded_until = Some(until);
        job.body = Body::Starting;
        let generation = job.holder.generation();
        let offer = job.offer.take();
        tokio::spawn(async move {
            let made = async {
                let document = document.document();
                let asker = role?;
                let mut request = request(document, &asker, slot.number, generation)?;
                let service = super::id_text(slot.service);
                // The ended machines of this slot here: what they printed was there to be read until now.
                for old in node.all() {
                    let record = old.record();
                    let same = record
                        .copy_of
                        .as_ref()
                        .is_some_and(|copy| copy.service == service && copy.number == slot.number);
                    if same && record.state == MachineState::Ended {
                        node.remove(&old, true).await?;
                    }
                }
                let name = format!("{}-{}", document.name, slot.number);
                let taken = |handle: &Arc<Handle>| *handle.record().name.as_ref() == *name;
                request.name = (!node.all().iter().any(taken)).then_some(name);
                let from = asker.node().unwrap_or(own);
                let (book, memory) = (Arc::clone(&placing), document.memory);
                blocking(move || book.admits(from, offer, memory)).await??;
                let copy = LeasedCopy {
                    of: CopyOf {
                        service,
                        name: document.name.clone(),
                        number: slot.number,
                        generation,
                    },
                    until,
                };
                let made = node
                    .create_as(&request, None, &asker, Instant::now(), Some(copy))
                    .await;
                if let Some(offer) = offer {
                    // Its record counts from here on; or there is none.
                    placing.counted(from, offer);
                }
                made
            };
            let made = Event::Made {
                slot,
                generation,
                made: made.await,
            };
            // The node may be leaving: the lease ends by itself.
            let _ = events.send(made).await;
        });
    }

    /// Tells when a machine has ended.
    pub(super) fn watch(&self, slot: Slot, generation: Generation, handle: Arc<Handle>) {
        let events = self.sender();
        tokio::spawn(async move {
            handle.wait_end().await;
            let machine = handle.id.clone();
            drop(handle);
            let ended = Event::Ended {
                slot,
                generation,
                machine,
            };
            let _ = events.send(ended).await;
        });
    }

    pub(super) fn made(&mut self, slot: Slot, generation: Generation, made: Answer<Arc<Handle>>) {
        let now = boottime();
        let Some(job) = self.job_of(slot, generation) else {
            // Nobody waits for it any more.
            if let Ok(handle) = made {
                self.clear(handle, None);
            }
            return;
        };
        match made {
            Ok(handle) => {
                job.body = Body::Up(Arc::clone(&handle));
                job.up_since = now;
                if job.stopping {
                    return self.end_body(slot);
                }
                self.put_off(slot);
                self.watch(slot, generation, handle);
            }
            Err(fault) => {
                let why = fault.0.message;
                tracing::warn!(
                    service = super::id_text(slot.service),
                    slot = slot.number,
                    why,
                    "a copy cannot be made here"
                );
                job.body = Body::None;
                if job.stopping {
                    return self.gone(slot, generation);
                }
                self.could_not(slot, why);
            }
        }
    }

    /// Ends a copy's machine: at once where others may get the slot, and otherwise with some time for its program to end.
    pub(super) fn end_body(&mut self, slot: Slot) {
        let now = boottime();
        let stop_time = self.terms.stop_time;
        let Some(known) = self.known.get(&slot.service) else {
            return;
        };
        let wanted = slot.number < known.document().replicas;
        let Some(job) = known.jobs.get(&slot.number) else {
            return;
        };
        let Body::Up(handle) = &job.body else { return };
        let left = (job.holder.valid_until()).map_or(Duration::ZERO, |until| {
            until.saturating_sub(now + stop_time * 2)
        });
        let grace = if wanted {
            Duration::ZERO
        } else {
            left.min(GRACE_MAX)
        };
        let (handle, generation) = (Arc::clone(handle), job.holder.generation());
        let events = self.sender();
        let node = Arc::clone(&self.node);
        tokio::spawn(async move {
            let command = match grace.is_zero() {
                true => Command::Kill,
                false => Command::Stop {
                    signal: None,
                    grace,
                },
            };
            handle.send(command).await;
            handle.wait_end().await;
            let _ = events.send(Event::Gone { slot, generation }).await;
            if let Err(fault) = node.remove(&handle, true).await {
                tracing::warn!(machine = %handle.id, error = fault.0.message, "a copy's machine stays");
            }
        });
    }

    /// Ends and removes a machine that nobody has a lease for.
    pub(super) fn clear(&self, handle: Arc<Handle>, told: Option<Event>) {
        let (events, node) = (self.sender(), Arc::clone(&self.node));
        tokio::spawn(async move {
            if let Err(fault) = node.remove(&handle, true).await {
                tracing::warn!(machine = %handle.id, error = fault.0.message, "a copy's machine stays");
            }
            if let Some(event) = told {
                let _ = events.send(event).await;
            }
        });
    }

    /// Whether a machine of it is here.
    pub(super) fn has_copies(&self, service: ServiceId) -> bool {
        let jobs = self
            .known
            .get(&service)
            .is_some_and(|known| !known.jobs.is_empty());
        let service = super::id_text(service);
        jobs || self.node.all().iter().any(|handle| {
            let record = handle.record();
            record
                .copy_of
                .as_ref()
                .is_some_and(|copy| copy.service == service)
        })
    }

    /// Removes what is left of the copies of a service that is wanted no more: ended ones.
    pub(super) fn clear_copies(&self, service: ServiceId) {
        let service = super::id_text(service);
        for handle in self.node.all() {
            let record = handle.record();
            let of_it = (record.copy_of.as_ref()).is_some_and(|copy| copy.service == service);
            if of_it && record.state == MachineState::Ended {
                self.clear(handle, None);
            }
        }
    }
}
