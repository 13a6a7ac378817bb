//! Copies and keepers: carries between the machines of `control::services` what they say to each other, and runs copies.

use crate::scenario::{Event, Fault};
use crate::wire::{MACHINE, Wire, id};
use crate::world::World;
use rand::RngExt;
use std::collections::BTreeSet;
use std::time::Duration;
use vistara_control::membership::{Life, Tie};
use vistara_control::services::{
    Change, ChangeOutput, FromKeeper, HolderOutput, Keeper, Overseer, Semantics, ServiceId, Slot,
    Terms, ToKeeper, next_keepers,
};
use vistara_model::NodeId;

/// How often keepers that do not know each other try to.
const MEETINGS: Duration = Duration::from_secs(2);

impl World {
    pub(crate) fn keep(&mut self, node: usize, from: usize, question: ToKeeper) {
        let local = self.local(node);
        let one = &mut self.nodes[node];
        let service = question.service();
        match one.keepers.get_mut(&service) {
            Some(keeper) => {
                if let Some(answer) = keeper.handle(local, id(from), question) {
                    self.send(node, id(from), Wire::FromKeeper(answer));
                }
            }
            None => {
                let ToKeeper::Begin {
                    keepers,
                    spec,
                    records,
                } = question
                else {
                    return;
                };
                if keepers.nodes.contains(&id(node)) {
                    let keeper =
                        Keeper::new(id(node), Terms::default(), spec, keepers, records, local);
                    one.keepers.insert(service, keeper);
                    one.overseers
                        .insert(service, Overseer::new(id(node), local));
                }
            }
        }
    }

    /// Keepers of a service have each other in their tables, however large the network is: who is the first that lives, and who
    /// is to be replaced, each says by what it believes. As in the node, they speak to each other, and who has spoken stays.
    pub(crate) fn meet_keepers(&mut self, node: usize) {
        let local = self.local(node);
        let one = &mut self.nodes[node];
        if local < one.next_meeting {
            return;
        }
        one.next_meeting = local + MEETINGS;
        let own = id(node);
        let keepers = (one.keepers.values())
            .filter(|keeper| keeper.keepers().nodes.contains(&own))
            .flat_map(|keeper| &keeper.keepers().nodes);
        let mut outputs = Vec::new();
        for keeper in keepers.filter(|keeper| **keeper != own) {
            if one.membership.tie(*keeper) != Some(Tie::Pinned) {
                outputs.extend(one.membership.keep(local, *keeper));
            }
        }
        self.members(node, outputs);
    }

    pub(crate) fn kept(&mut self, node: usize, from: NodeId, answer: FromKeeper) {
        let local = self.local(node);
        let one = &mut self.nodes[node];
        match &answer {
            FromKeeper::Granted { slot, .. }
            | FromKeeper::Denied { slot, .. }
            | FromKeeper::DoneNoted(slot, _)
            | FromKeeper::Superseded(slot, _) => {
                let slot = *slot;
                // Keepers tell each other, too.
                let service = slot.service;
                let keepers = one.keepers.get(&service).map(|keeper| keeper.keepers());
                if let (Some(keepers), Some(overseer)) = (keepers, one.overseers.get_mut(&service))
                {
                    overseer.handle(from, &answer, keepers);
                }
                if let Some(job) = one.jobs.get_mut(&slot) {
                    let outputs = job.holder.handle(local, from, answer);
                    self.holder(node, slot, outputs);
                }
            }
            FromKeeper::LostNoted(slot, _) => {
                let service = slot.service;
                let keepers = one.keepers.get(&service).map(|keeper| keeper.keepers());
                if let (Some(keepers), Some(overseer)) = (keepers, one.overseers.get_mut(&service))
                {
                    let actions = overseer.handle(from, &answer, keepers);
                    self.oversee(node, service, actions);
                }
            }
            FromKeeper::Promised { service, .. } | FromKeeper::Sealed { service, .. } => {
                let service = *service;
                if let Some(change) = one.changes.get_mut(&service) {
                    let outputs = change.handle(local, from, answer);
                    self.change(node, service, outputs);
                }
            }
        }
    }

    pub(crate) fn holder(&mut self, node: usize, slot: Slot, outputs: Vec<HolderOutput>) {
        let now = self.queue.now();
        for output in outputs {
            let one = &mut self.nodes[node];
            let boot = one.boot;
            let (stock, rate) = (one.stock, one.rate);
            let Some(job) = one.jobs.get_mut(&slot) else {
                return;
            };
            let generation = job.holder.generation();
            let spec = job.spec;
            let job_id = (slot, generation);
            match output {
                HolderOutput::Send(keeper, question) => {
                    self.send(node, keeper, Wire::ToKeeper(question));
                }
                HolderOutput::Start => {
                    job.runs = true;
                    let what = (MACHINE, stock);
                    (self.checks).started(now, slot, spec.semantics, node, generation, what);
                    if spec.semantics != Semantics::Service {
                        let takes = Duration::from_secs(5 + self.rng.random_range(0..60));
                        let job = job_id;
                        self.queue
                            .at(now + takes, Event::TaskEnds { node, boot, job });
                    }
                }
                HolderOutput::Failed(largest) => {
                    let (asker, request) = job.room;
                    one.jobs.remove(&slot);
                    one.book.ended(asker, request);
                    self.send(node, asker, Wire::NotRun(slot, largest));
                }
                HolderOutput::Stop => {
                    if self.scenario.fault == Some(Fault::LeaseIgnored) {
                        continue;
                    }
                    let share = self.rng.random::<f64>();
                    let takes = Terms::default().stop_time.mul_f64(share / rate);
                    let job = job_id;
                    self.queue
                        .at(now + takes, Event::CopyGone { node, boot, job });
                }
                HolderOutput::Ended(_) => {
                    // It has run to its end, whether or not a majority knows; if not, it may run again.
                    let (asker, request) = job.room;
                    one.jobs.remove(&slot);
                    one.book.ended(asker, request);
                    self.checks.task_ended(slot.service);
                }
            }
        }
    }

    pub(crate) fn copy_gone(&mut self, node: usize, slot: Slot) {
        let now = self.queue.now();
        let wanted = self.is_wanted(slot);
        let one = &mut self.nodes[node];
        if let Some(job) = one.jobs.remove(&slot) {
            let (asker, request) = job.room;
            one.book.ended(asker, request);
            let generation = job.holder.generation();
            (self.checks).gone(now, slot, node, generation, MACHINE, wanted);
            for output in job.holder.gone() {
                if let HolderOutput::Send(keeper, question) = output {
                    self.send(node, keeper, Wire::ToKeeper(question));
                }
            }
        }
    }

    /// Whether somebody should run it.
    pub(crate) fn is_wanted(&self, slot: Slot) -> bool {
        let replicas = self
            .specs
            .get(&slot.service)
            .map_or(0, |spec| spec.replicas);
        slot.number < replicas && !self.checks.is_settled(slot.service)
    }

    pub(crate) fn replace(&mut self, node: usize, service: ServiceId, away: &BTreeSet<NodeId>) {
        let local = self.local(node);
        let one = &mut self.nodes[node];
        let Some(keeper) = one.keepers.get(&service) else {
            return;
        };
        if one
            .changes
            .get(&service)
            .is_some_and(|change| !change.is_over())
        {
            return;
        }
        let present = keeper.keepers().clone();
        let alive: BTreeSet<NodeId> = (one.membership.members())
            .filter(|(_, life, _)| *life == Life::Alive)
            .map(|(member, ..)| member)
            .collect();
        let named = alive.iter().chain(&present.nodes).copied();
        let lives = |node| alive.contains(&node);
        let Some(next) = next_keepers(service, &present.nodes, away, named, lives) else {
            return;
        };
        one.rounds += 1;
        // Larger than any round before, those of earlier starts included.
        let round = (one.boot << 32) + one.rounds;
        let change = Change::new(service, id(node), round, present, next, local);
        one.changes.insert(service, change);
    }

    pub(crate) fn change(&mut self, node: usize, service: ServiceId, outputs: Vec<ChangeOutput>) {
        for output in outputs {
            match output {
                ChangeOutput::Send(to, question) => {
                    self.send(node, to, Wire::ToKeeper(question));
                }
                ChangeOutput::Over { .. } => {
                    self.nodes[node].changes.remove(&service);
                }
            }
        }
    }
}
