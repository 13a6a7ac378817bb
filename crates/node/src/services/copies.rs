//! Copies that this node holds: the lease of each, its machine, and its end.
//!
//! ```text
//! asking ── lease ──► starting ──► up ── its program ends ──► resting ──► starting …
//!    │                   │          │ │                          │
//!    └── none to be had ─┴──────────┴─│ lease lost, not wanted ──┴──► stopping ──► gone
//!                                     └ a task's program ends ──► ended ── most keepers know ──► gone
//! ```
//! A machine is there only between a lease that was granted and its end; the guard in its directory sees to the end where this
//! node cannot. Each renewal puts the guard off. A node that starts again asks for the same slot under the same generation,
//! and goes on with the machine that it finds.

use super::{About, Event, Task, tasks};
use crate::fault::{Answer, Fault, blocking};
use crate::fence::{self, boottime};
use crate::machine::{Command, CopyOf, Handle};
use crate::mesh::{Asker, Caller};
use crate::node::LeasedCopy;
use crate::service::tame;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vistara_api::RunRequest;
use vistara_control::placement::RequestId;
use vistara_control::services::wire::{self, FromNode, ToNode};
use vistara_control::services::{
    FromKeeper, Holder, HolderOutput, Keepers, ServiceId, Slot, Terms, ToKeeper,
};
use vistara_mesh::service::ServiceDocument;
use vistara_model::{Generation, MachineId, MachineState, NodeId};

/// How long before the lease's end the guard acts: half of what the node itself has for it.
const GUARD_BEFORE: Duration = Duration::from_millis(500);
/// How long a node that has started again tries to get back the lease of a copy that it finds: others may have to dial it first,
/// which take a while to see that it was gone.
const RESUMED_ACQUIRE: Duration = Duration::from_secs(8);
/// First pause after a copy's program has ended; doubled up to the longest.
const REST_MIN: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(60);
/// Who ran for so long begins with the first pause again.
const RAN_WELL: Duration = Duration::from_secs(60);
/// Longest that a copy that is not wanted any more gets to end by itself.
const GRACE_MAX: Duration = Duration::from_secs(5);

/// How a copy is that has no lease yet.
pub(crate) const ASKING: &str = "asking";

/// What there is of a copy.
pub(super) enum Body {
    /// Nothing yet.
    None,
    /// Its machine is being made.
    Starting,
    /// Its machine.
    Up(Arc<Handle>),
    /// Its program has ended and is started again at this time.
    Resting(Duration),
    /// The task is done; keepers are to know.
    Ended,
}

/// A slot that this node was given.
pub(super) struct Job {
    pub(super) holder: Holder,
    /// Who gave it; nobody where it was taken over from an earlier start.
    given_by: Option<NodeId>,
    /// The offer that its first machine is made under.
    offer: Option<RequestId>,
    pub(super) body: Body,
    /// Whether its machine had been told to end before this node started: by whom is not known.
    pub(super) end_found: bool,
    stopping: bool,
    /// What is to be told when it is gone.
    last_words: Vec<(NodeId, ToKeeper)>,
    /// What keepers said when the lease was not to be had, and why the copy does not run.
    failed: Option<(Generation, String)>,
    restarts: u32,
    rest: Duration,
    up_since: Duration,
    trouble: Option<String>,
    guarded_until: Option<Duration>,
}

impl Job {
    pub(super) fn new(holder: Holder, given_by: Option<NodeId>, offer: Option<RequestId>) -> Job {
        Job {
            holder,
            given_by,
            offer,
            body: Body::None,
            end_found: false,
            stopping: false,
            last_words: Vec::new(),
            failed: None,
            restarts: 0,
            rest: Duration::ZERO,
            up_since: Duration::ZERO,
            trouble: None,
            guarded_until: None,
        }
    }

    pub(super) fn wake_at(&self) -> Duration {
        match self.body {
            Body::Resting(at) if !self.stopping => self.holder.wake_at().min(at),
            Body::None | Body::Starting | Body::Up(_) | Body::Resting(_) | Body::Ended => {
                self.holder.wake_at()
            }
        }
    }

    pub(super) fn moved(&mut self, now: Duration, keepers: Keepers) {
        self.holder.moved(now, keepers);
    }

    /// Whether its machine may be there now.
    fn holds(&self, now: Duration) -> bool {
        !self.holder.is_over() && self.holder.valid_until().is_some_and(|until| now < until)
    }

    pub(super) fn shown(&self) -> wire::Copy {
        let (state, machine) = match &self.body {
            _ if self.stopping => ("stopping".to_owned(), None),
            Body::None => (ASKING.to_owned(), None),
            Body::Starting => ("starting".to_owned(), None),
            Body::Up(handle) => (handle.state().to_string(), Some(handle.id.to_string())),
            Body::Resting(_) => ("resting".to_owned(), None),
            Body::Ended => (MachineState::Ended.to_string(), None),
        };
        wire::Copy {
            number: self.holder.slot().number,
            generation: self.holder.generation(),
            machine,
            state,
            restarts: self.restarts,
            trouble: self.trouble.as_deref().map(wire::words),
        }
    }
}

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
    pub(super) fn job(&mut self, slot: Slot) -> Option<&mut Job> {
        self.known
            .get_mut(&slot.service)?
            .jobs
            .get_mut(&slot.number)
    }

    fn job_of(&mut self, slot: Slot, generation: Generation) -> Option<&mut Job> {
        self.job(slot)
            .filter(|job| job.holder.generation() == generation)
    }

    /// A keeper gives this node a slot.
    pub(super) async fn run_slot(
        &mut self,
        from: NodeId,
        request: u128,
        slot: Slot,
        generation: Generation,
        keepers: Keepers,
    ) -> Answer<FromNode> {
        let now = boottime();
        let terms = self.terms;
        let Some(known) = self.known.get_mut(&slot.service) else {
            return Ok(FromNode::Unknown);
        };
        if let Err(why) = super::placing::may_give(known, from, &keepers) {
            return Ok(FromNode::Refused(why));
        }
        if slot.number >= known.document().replicas {
            return Ok(FromNode::Refused(
                "the slot is not wanted any more".to_owned(),
            ));
        }
        if known.jobs.contains_key(&slot.number) {
            let why = "it has that slot already, or is about to be rid of it";
            return Ok(FromNode::Refused(why.to_owned()));
        }
        let holder = Holder::new(terms, slot, generation, keepers.clone(), now);
        let job = Job::new(holder, Some(from), Some(RequestId(request)));
        known.jobs.insert(slot.number, job);
        self.moved_to(slot.service, keepers).await;
        self.poll(slot, now);
        Ok(FromNode::Nothing)
    }

    /// Goes on with the copies of an earlier start, whose leases may be valid still; ends those of services that are not known.
    pub(super) fn take_over_copies(&mut self) {
        let now = boottime();
        for handle in self.node.all() {
            let record = handle.record();
            let Some(copy) = record.copy_of.clone() else {
                continue;
            };
            let number = u128::from_str_radix(&copy.service, 16).map(ServiceId);
            let known = number.ok().and_then(|id| self.known.get_mut(&id));
            if record.state == MachineState::Ended {
                self.take_over_ended(&handle);
                continue;
            }
            let keepers = known.as_ref().and_then(|known| known.keepers.clone());
            let (Some(known), Some(keepers)) = (known, keepers) else {
                tracing::info!(machine = %handle.id, "a copy of a service that is not known here is ended");
                self.clear(handle, None);
                continue;
            };
            if known.document().removed || known.jobs.contains_key(&copy.number) {
                self.clear(handle, None);
                continue;
            }
            let slot = Slot {
                service: known.id(),
                number: copy.number,
            };
            // Until the keepers are reached again what is left of the earlier lease counts, which the guard sees to.
            let terms = Terms {
                acquire: RESUMED_ACQUIRE,
                ..self.terms
            };
            let holder = Holder::resumed(terms, slot, copy.generation, keepers, now);
            let mut job = Job::new(holder, None, None);
            job.up_since = now;
            job.end_found = record.end.is_some();
            job.body = Body::Up(Arc::clone(&handle));
            known.jobs.insert(copy.number, job);
            self.watch(slot, copy.generation, handle);
        }
    }

    /// Does what is due for the copies of a service.
    pub(super) fn hold_on(&mut self, service: ServiceId, now: Duration) {
        let Some(known) = self.known.get(&service) else {
            return;
        };
        if known.jobs.is_empty() {
            return;
        }
        // Of a removed one everything is let go already.
        let stands = known.document().removed || self.stands(service).is_ok();
        let own = self.own();
        let nodes = &known.document().nodes;
        let named = nodes.iter().any(|one| Some(one.node) == own);
        let numbers: Vec<u32> = known.jobs.keys().copied().collect();
        for number in numbers {
            let slot = Slot { service, number };
            // A program that has ended did so under the grant that it had: that is told to the end.
            let finishing = (self.job(slot)).is_some_and(|job| job.holder.is_finishing());
            if finishing {
                // Nothing of it runs any more.
            } else if !stands {
                self.let_go(slot, "the owner's grant counts no more");
            } else if !named {
                // The owner's own node acts for itself, whether it is named or not.
                self.let_go(slot, "the service's owner does not name this node any more");
            }
            self.poll(slot, now);
            let Some(job) = self.job(slot) else {
                continue;
            };
            let due = matches!(job.body, Body::Resting(at) if now >= at);
            if due && !job.stopping && job.holds(now) {
                job.restarts += 1;
                self.start(slot);
            }
        }
    }

    fn poll(&mut self, slot: Slot, now: Duration) {
        if let Some(job) = self.job(slot)
            && job.holder.wake_at() <= now
        {
            let outputs = job.holder.poll(now);
            self.carry_out(slot, outputs);
        }
    }

    /// A keeper's answer to a holder.
    pub(super) fn granted(&mut self, from: NodeId, slot: Slot, answer: FromKeeper) {
        let now = boottime();
        let Some(job) = self.job(slot) else {
            return;
        };
        let outputs = job.holder.handle(now, from, answer);
        self.put_off(slot);
        self.carry_out(slot, outputs);
    }

    /// Has the guard wait as long as the lease is valid.
    fn put_off(&mut self, slot: Slot) {
        let Some(job) = self.job(slot) else {
            return;
        };
        let until = (job.holder.valid_until()).map(|until| until.saturating_sub(GUARD_BEFORE));
        let Body::Up(handle) = &job.body else {
            return;
        };
        if let Some(until) = until
            && job.guarded_until.is_none_or(|guarded| guarded < until)
            && !job.holder.is_over()
            && handle.state() != MachineState::Ended
        {
            // A file of some bytes, which is not forced to the disk.
            match fence::renew(&handle.dir, until) {
                Ok(()) => job.guarded_until = Some(until),
                Err(error) => {
                    tracing::error!(machine = %handle.id, %error, "a copy's lease cannot be written down");
                }
            }
        }
    }

    pub(super) fn carry_out(&mut self, slot: Slot, outputs: Vec<HolderOutput>) {
        for output in outputs {
            match output {
                HolderOutput::Send(to, question) => self.say(slot, to, question),
                HolderOutput::Start => match self.job(slot).map(|job| &job.body) {
                    // It runs already, from an earlier start.
                    Some(Body::Up(_)) => self.put_off(slot),
                    Some(_) => self.start(slot),
                    None => return,
                },
                HolderOutput::Failed(largest) => {
                    if let Some(job) = self.job(slot) {
                        let why = || (largest, "no lease for the slot was to be had".to_owned());
                        job.failed.get_or_insert_with(why);
                    }
                    self.stop(slot);
                }
                HolderOutput::Stop => self.stop(slot),
                HolderOutput::Ended(noted) => self.told(slot, noted),
            }
        }
    }

    /// Asks a keeper; what says that a copy is gone, or never was, waits until that is so.
    fn say(&mut self, slot: Slot, to: NodeId, question: ToKeeper) {
        let parting = matches!(
            question,
            ToKeeper::Withdraw { .. } | ToKeeper::Released { .. }
        );
        if let Some(job) = self.job(slot)
            && parting
            && !matches!(job.body, Body::None | Body::Resting(_) | Body::Ended)
        {
            let Body::Up(handle) = &job.body else {
                job.last_words.push((to, question));
                return;
            };
            if handle.state() != MachineState::Ended {
                job.last_words.push((to, question));
                return;
            }
        }
        self.send(slot.service, to, About::Other, ToNode::Keeper(question));
    }

    /// Makes a copy's machine.
    fn start(&mut self, slot: Slot) {
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
    fn watch(&self, slot: Slot, generation: Generation, handle: Arc<Handle>) {
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

    /// A copy's machine has ended. A service's is started again, after a while, as long as the lease is there.
    pub(super) fn ended(&mut self, slot: Slot, generation: Generation, machine: &MachineId) {
        let now = boottime();
        let Some(job) = self.job_of(slot, generation) else {
            return;
        };
        let Body::Up(handle) = &job.body else { return };
        if handle.id != *machine || job.stopping {
            return;
        }
        let record = handle.record();
        if let Some(known) = self.known.get(&slot.service)
            && known.document().task.is_some()
        {
            return self.task_ended(slot, record.end.as_ref());
        }
        let Some(job) = self.job(slot) else { return };
        let code = record.end.as_ref().map_or(125, |end| end.exit_code());
        let told = record.end.as_ref().and_then(|end| end.message());
        job.trouble = Some(match told {
            Some(told) => format!("its program ended with {code}: {told}"),
            None => format!("its program ended with {code}"),
        });
        if now.saturating_sub(job.up_since) >= RAN_WELL {
            job.rest = Duration::ZERO;
        }
        job.rest = (job.rest * 2).clamp(REST_MIN, REST_MAX);
        job.body = Body::Resting(now + job.rest);
        tracing::info!(service = super::id_text(slot.service), slot = slot.number, code, rest = ?job.rest, "a copy's program has ended");
    }

    /// A copy's program was never begun here, for this reason: its lease was never used.
    pub(super) fn could_not(&mut self, slot: Slot, why: String) {
        let Some(job) = self.job(slot).filter(|job| !job.stopping) else {
            return;
        };
        // No generation: there was a lease to be had.
        job.failed.get_or_insert((Generation(0), why));
        let outputs = job.holder.never_ran();
        if outputs.is_empty() {
            // Over already.
            return self.stop(slot);
        }
        self.carry_out(slot, outputs);
    }

    /// Gives a slot up, for this reason.
    pub(super) fn let_go(&mut self, slot: Slot, why: &str) {
        let Some(job) = self.job(slot).filter(|job| !job.stopping) else {
            return;
        };
        let generation = job.holder.generation();
        job.failed.get_or_insert((generation, why.to_owned()));
        let outputs = job.holder.end();
        if outputs.is_empty() {
            // Over already.
            return self.stop(slot);
        }
        self.carry_out(slot, outputs);
    }

    /// Gives up the slots that are not wanted any more.
    pub(super) fn let_go_of(&mut self, service: ServiceId, replicas: u32) {
        let Some(known) = self.known.get(&service) else {
            return;
        };
        let numbers: Vec<u32> = known
            .jobs
            .keys()
            .copied()
            .filter(|one| *one >= replicas)
            .collect();
        for number in numbers {
            self.let_go(Slot { service, number }, "the slot is not wanted any more");
        }
    }

    fn stop(&mut self, slot: Slot) {
        let Some(job) = self.job(slot).filter(|job| !job.stopping) else {
            return;
        };
        job.stopping = true;
        let generation = job.holder.generation();
        match &job.body {
            Body::None | Body::Resting(_) | Body::Ended => self.gone(slot, generation),
            // It is ended as soon as it is there.
            Body::Starting => {}
            Body::Up(_) => self.end_body(slot),
        }
    }

    /// Ends a copy's machine: at once where others may get the slot, and otherwise with some time for its program to end.
    fn end_body(&mut self, slot: Slot) {
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

    /// A copy is gone: whoever is next need not wait.
    pub(super) fn gone(&mut self, slot: Slot, generation: Generation) {
        if self.job_of(slot, generation).is_none() {
            return;
        }
        let known = self.known.get_mut(&slot.service);
        let Some(job) = known.and_then(|known| known.jobs.remove(&slot.number)) else {
            return;
        };
        for (to, question) in job.last_words {
            self.send(slot.service, to, About::Other, ToNode::Keeper(question));
        }
        for output in job.holder.gone() {
            if let HolderOutput::Send(to, question) = output {
                self.send(slot.service, to, About::Other, ToNode::Keeper(question));
            }
        }
        let lost = || (generation, "its lease was lost".to_owned());
        let (largest, why) = job.failed.unwrap_or_else(lost);
        self.tell_not_run(job.given_by, slot, generation, largest, &why);
        if let Some(offer) = job.offer
            && let Some(own) = self.own()
        {
            let owner = self
                .known
                .get(&slot.service)
                .map(|known| known.document().owner);
            self.placing.decline(owner.unwrap_or(own), offer);
        }
    }
}
