//! This node as a keeper: its record on disk before each answer, what its overseer wants done, and other keepers in place of dead
//! ones.

use super::documents::cannot_keep;
use super::{About, Known, Task};
use crate::fault::{Answer, Fault, blocking};
use crate::fence::boottime;
use std::collections::BTreeSet;
use std::time::Duration;
use vistara_api::ErrorKind;
use vistara_control::services::wire::{self, Keeping, SlotState, Status, ToNode};
use vistara_control::services::{
    Action, Change, ChangeOutput, FromKeeper, Keeper, Keepers, Overseer, Semantics, ServiceId,
    Spec, ToKeeper, next_keepers,
};
use vistara_mesh::service::{ServiceDocument, TaskSemantics};
use vistara_model::NodeId;

/// How often a keeper asks the others whether they still keep.
const ASK_KEEPERS_EVERY: Duration = Duration::from_secs(5);

/// What control looks after.
pub(super) fn spec(document: &ServiceDocument) -> Spec {
    Spec {
        service: ServiceId(document.service),
        version: document.version,
        replicas: document.replicas,
        semantics: match document.task.as_ref().map(|task| task.semantics) {
            None => Semantics::Service,
            Some(TaskSemantics::AtMostOnce) => Semantics::AtMostOnce,
            Some(TaskSemantics::AtLeastOnce) => Semantics::AtLeastOnce,
        },
    }
}

fn denied(message: &str) -> Fault {
    Fault::new(ErrorKind::Denied, message)
}

/// Whether all of them may keep.
pub(super) fn may_keep(document: &ServiceDocument, keepers: &Keepers) -> bool {
    keepers.nodes.iter().all(|node| document.names(node))
}

/// Whether a node may say who keeps next, as far as it is known here who does: anybody who is named may where nobody is known.
fn may_name(known: &Known, from: NodeId) -> bool {
    let keeper = known.keeper.as_ref();
    let sets = [
        known.keepers.as_ref(),
        keeper.map(Keeper::keepers),
        keeper.and_then(Keeper::next),
    ];
    let mut sets = sets.into_iter().flatten().peekable();
    sets.peek().is_none() || sets.any(|keepers| keepers.nodes.contains(&from))
}

impl Task {
    /// Somebody whose word does not count says that others keep now: those whose word does are asked. One that was away for
    /// more than one change hears of its part again that way.
    fn ask_who(&mut self, service: ServiceId, epoch: u64, now: Duration) {
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let Some(keepers) = known.keepers.clone() else {
            return;
        };
        if now < known.next_who || epoch <= keepers.epoch {
            return;
        }
        known.next_who = now + ASK_KEEPERS_EVERY;
        for node in keepers.nodes {
            if self.own() != Some(node) && self.lives(node) {
                self.send(service, node, About::Who, ToNode::Status);
            }
        }
    }

    /// A keeper has said who keeps now.
    pub(super) async fn heard_who(&mut self, from: NodeId, service: ServiceId, status: Status) {
        let trusted = (self.known.get(&service)).is_some_and(|known| may_name(known, from));
        if let (true, Some(keeping)) = (trusted, status.keeping) {
            self.moved_to(service, keeping.keepers).await;
        }
    }

    /// Answers what a keeper is asked. It is named in the document, or this node itself.
    pub(super) async fn kept(
        &mut self,
        service: ServiceId,
        from: NodeId,
        mut question: ToKeeper,
    ) -> Answer<Option<FromKeeper>> {
        let (Some(own), Some(known)) = (self.own(), self.known.get_mut(&service)) else {
            return Ok(None);
        };
        let now = boottime();
        match &mut question {
            ToKeeper::Begin {
                keepers,
                spec: told,
                ..
            } => {
                if !may_keep(known.sealed.document(), keepers) {
                    return Err(denied("a keeper is not named in the service's document"));
                }
                // The first keepers are the owner's choice.
                if keepers.epoch <= 1 && from != known.document().owner {
                    return Err(denied("only the service's owner chooses its first keepers"));
                }
                // Later ones are named by those before them, or by one of those that this node has sealed itself for.
                if keepers.epoch > 1 && !may_name(known, from) {
                    let epoch = keepers.epoch;
                    self.ask_who(service, epoch, now);
                    return Err(denied("only a keeper says who looks after a service next"));
                }
                // What is wanted is what the owner has signed, whatever was said.
                *told = spec(known.sealed.document());
            }
            ToKeeper::Seal { next, .. } => {
                if !may_keep(known.sealed.document(), next) {
                    return Err(denied("a keeper is not named in the service's document"));
                }
                let present = known.keeper.as_ref().map(Keeper::keepers);
                if !present.is_some_and(|present| present.nodes.contains(&from)) {
                    return Err(denied("only a keeper hands a service over"));
                }
            }
            ToKeeper::Prepare { .. } => {
                let present = known.keeper.as_ref().map(Keeper::keepers);
                if !present.is_some_and(|present| present.nodes.contains(&from)) {
                    return Err(denied("only a keeper hands a service over"));
                }
            }
            ToKeeper::Ask { .. }
            | ToKeeper::Withdraw { .. }
            | ToKeeper::Released { .. }
            | ToKeeper::Done { .. }
            | ToKeeper::Lose { .. } => {}
        }
        let begun = if let ToKeeper::Begin { keepers, .. } = &question {
            Some(keepers.clone())
        } else {
            None
        };
        let before = known.keeper.as_ref().map(Keeper::state);
        let answer = match (&mut known.keeper, question) {
            (Some(keeper), question) => keeper.handle(now, from, question),
            (
                None,
                ToKeeper::Begin {
                    keepers,
                    spec,
                    records,
                },
            ) if keepers.nodes.contains(&own) => {
                known.keeper = Some(Keeper::new(own, self.terms, spec, keepers, records, now));
                known.overseer = Some(Overseer::new(own, now));
                None
            }
            (None, _) => None,
        };
        let after = known.keeper.as_ref().map(Keeper::state);
        if after != before
            && let Some(state) = after
        {
            let store = self.store.clone();
            let stored = blocking(move || store.put_keeper(service, &state)).await?;
            if let Err(error) = stored {
                // What is not on disk was never promised: it is as it was, and nobody hears anything.
                let terms = self.terms;
                if let Some(known) = self.known.get_mut(&service) {
                    known.keeper = before.map(|state| Keeper::restored(state, terms, now));
                }
                return Err(cannot_keep(&error));
            }
        }
        if let Some(keepers) = begun {
            self.moved_to(service, keepers).await;
        }
        Ok(answer)
    }

    /// Others look after a service now, as a keeper says.
    pub(super) async fn moved_to(&mut self, service: ServiceId, keepers: Keepers) {
        let now = boottime();
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let newer = (known.keepers.as_ref()).is_none_or(|known| keepers.epoch > known.epoch);
        if !newer || !may_keep(known.document(), &keepers) {
            return;
        }
        known.keepers = Some(keepers.clone());
        known.to_begin.clear();
        for job in known.jobs.values_mut() {
            job.moved(now, keepers.clone());
        }
        let store = self.store.clone();
        let stored = blocking(move || store.put_keepers(service, &keepers)).await;
        if let Ok(Err(error)) = stored {
            // It is heard again.
            tracing::warn!(%error, "who looks after a service could not be written down");
        }
    }

    /// Takes what another keeper answered.
    pub(super) async fn heard_keeper(
        &mut self,
        from: NodeId,
        service: ServiceId,
        answer: FromKeeper,
    ) {
        if answer.service() != service {
            return;
        }
        let now = boottime();
        match &answer {
            FromKeeper::Granted { slot, .. }
            | FromKeeper::Denied { slot, .. }
            | FromKeeper::DoneNoted(slot, _)
            | FromKeeper::Superseded(slot, _) => {
                // Keepers tell each other, too.
                self.heard_noted(from, service, &answer);
                if let FromKeeper::Denied {
                    why: vistara_control::services::Denied::Moved(keepers),
                    ..
                } = &answer
                {
                    let trusted = (self.known.get(&service))
                        .is_some_and(|known| may_keep(known.document(), keepers));
                    if !trusted {
                        return;
                    }
                    self.moved_to(service, keepers.clone()).await;
                    return;
                }
                self.granted(from, *slot, answer);
            }
            FromKeeper::LostNoted(..) => self.heard_noted(from, service, &answer),
            FromKeeper::Promised { .. } | FromKeeper::Sealed { .. } => {
                let change = self
                    .known
                    .get_mut(&service)
                    .and_then(|known| known.change.as_mut());
                if let Some(change) = change {
                    let outputs = change.handle(now, from, answer);
                    self.change(service, outputs);
                }
            }
        }
    }

    /// What another keeper has noted is its overseer's affair.
    fn heard_noted(&mut self, from: NodeId, service: ServiceId, answer: &FromKeeper) {
        if let Some(known) = self.known.get_mut(&service)
            && let (Some(overseer), Some(keeper)) = (&mut known.overseer, &known.keeper)
        {
            let actions = overseer.handle(from, answer, keeper.keepers());
            self.oversee(service, actions);
        }
    }

    /// Does what a keeper does by itself.
    pub(super) fn keep_on(&mut self, service: ServiceId, now: Duration) {
        let keeps = |known: &Known| known.keeper.is_some() && !known.document().removed;
        if !self.known.get(&service).is_some_and(keeps) || self.stands(service).is_err() {
            return;
        }
        let mut overseer = match self.known.get_mut(&service) {
            Some(known) => known.overseer.take(),
            None => return,
        };
        let mut actions = Vec::new();
        if let (Some(overseer), Some(known)) = (&mut overseer, self.known.get(&service))
            && let Some(keeper) = &known.keeper
        {
            // Who lives and does not keep is as good as dead here.
            actions = overseer.poll(now, keeper, |node| self.keeps(known, node));
            actions.extend(self.widen(known, keeper));
        }
        if let Some(known) = self.known.get_mut(&service) {
            known.overseer = overseer;
        }
        self.oversee(service, actions);
        let change = self
            .known
            .get_mut(&service)
            .and_then(|known| known.change.as_mut());
        if let Some(change) = change {
            let outputs = change.poll(now);
            self.change(service, outputs);
        }
        self.place_next(service, now);
        self.ask_keepers(service, now);
    }

    /// Hears from the other keepers whether they still keep, and which document they have.
    fn ask_keepers(&mut self, service: ServiceId, now: Duration) {
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let keeper = known.keeper.as_ref().filter(|keeper| keeper.is_active());
        if now < known.next_asking {
            return;
        }
        known.next_asking = now + ASK_KEEPERS_EVERY;
        let others = keeper.map(|keeper| keeper.keepers().nodes.clone());
        for node in others.into_iter().flatten() {
            if self.own() != Some(node) && self.lives(node) {
                self.send(service, node, About::Keeper, ToNode::Describe);
            }
        }
    }

    /// Whether others could keep better than those that do, or some do that its owner does not name any more.
    fn widen(&self, known: &Known, keeper: &Keeper) -> Option<Action> {
        if !keeper.is_active() || keeper.is_sealed() || known.change.is_some() {
            return None;
        }
        let present = &keeper.keepers().nodes;
        let first = present.iter().find(|node| self.keeps(known, **node));
        if first.copied() != self.own() {
            return None;
        }
        // Those that are away have some time to come back.
        let away = BTreeSet::new();
        let next = self.next_keepers(known, present, &away);
        next.map(|_| Action::Replace { away })
    }

    /// Whether a node lives, as far as is known here, and has not said that it does not keep.
    fn keeps(&self, known: &Known, node: NodeId) -> bool {
        self.lives(node) && !known.refusing.contains(&node)
    }

    /// Who would look after a service better than those that do.
    fn next_keepers(
        &self,
        known: &Known,
        present: &[NodeId],
        away: &BTreeSet<NodeId>,
    ) -> Option<Vec<NodeId>> {
        let nodes = known.document().nodes.iter().map(|one| one.node);
        let named = nodes.filter(|node| present.contains(node) || !known.refusing.contains(node));
        next_keepers(known.id(), present, away, named, |node| self.lives(node))
    }

    pub(super) fn oversee(&mut self, service: ServiceId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Place {
                    slot,
                    generation,
                    apart_from,
                } => self.want_place(slot, generation, apart_from),
                Action::Send(to, question) => {
                    self.send(service, to, About::Other, ToNode::Keeper(question));
                }
                // Who asked for it asks the keepers.
                Action::Lost(slot, generation) => {
                    tracing::warn!(
                        service = super::id_text(service),
                        slot = slot.number,
                        generation = generation.0,
                        "a task is lost: it may have begun, and is not begun again"
                    );
                }
                Action::Replace { away } => self.hand_over(service, &away),
            }
        }
    }

    fn hand_over(&mut self, service: ServiceId, away: &BTreeSet<NodeId>) {
        let (Some(open), Some(known)) = (self.open.clone(), self.known.get(&service)) else {
            return;
        };
        let running = known
            .change
            .as_ref()
            .is_some_and(|change| !change.is_over());
        let (Some(keeper), false) = (&known.keeper, running) else {
            return;
        };
        let present = keeper.keepers().clone();
        let Some(next) = self.next_keepers(known, &present.nodes, away) else {
            return;
        };
        self.rounds += 1;
        // Larger than any round before, those of earlier starts included.
        let round = (open.identity.generation() << 32) + self.rounds;
        tracing::info!(
            service = super::id_text(service),
            epoch = present.epoch + 1,
            "other nodes are to look after a service"
        );
        let change = Change::new(
            service,
            open.identity.id(),
            round,
            present,
            next,
            boottime(),
        );
        if let Some(known) = self.known.get_mut(&service) {
            known.change = Some(change);
        }
    }

    fn change(&mut self, service: ServiceId, outputs: Vec<ChangeOutput>) {
        for output in outputs {
            match output {
                ChangeOutput::Send(to, question) => {
                    self.send(service, to, About::Other, ToNode::Keeper(question));
                }
                ChangeOutput::Over { .. } => {
                    if let Some(known) = self.known.get_mut(&service) {
                        known.change = None;
                    }
                }
            }
        }
    }

    /// What this node knows as a keeper, while it is one.
    pub(super) fn keeping(&self, known: &Known) -> Option<Keeping> {
        let keeper = known.keeper.as_ref().filter(|keeper| keeper.is_active())?;
        let now = boottime();
        Some(Keeping {
            keepers: keeper.keepers().clone(),
            slots: (0..keeper.spec().replicas)
                .map(|number| {
                    let record = keeper.record(number);
                    let held = record.held.filter(|_| record.is_held(now));
                    SlotState {
                        number,
                        generation: record.largest,
                        holder: held.map(|(_, node)| node),
                        trouble: known.care.trouble(number).map(|why| wire::words(&why)),
                    }
                })
                .collect(),
        })
    }
}
