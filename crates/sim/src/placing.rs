//! Placing: carries what a search asks for, and begins one for each slot that an overseer wants filled.

use crate::wire::{MACHINE, Wire, candidate};
use crate::world::World;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::time::Duration;
use vistara_control::membership::Life;
use vistara_control::placement::{Candidate, Policy, RequestId, Search, SearchInput, SearchOutput};
use vistara_control::services::{Action, Keeper, ServiceId, Slot, Spec};
use vistara_model::{Architecture, Constraints, Cpus, Generation, Hypervisor, Wanted};

impl World {
    pub(crate) fn candidates(&self, node: usize) -> Vec<Candidate> {
        let one = &self.nodes[node];
        let capacity = one.stock;
        (one.membership.members())
            .filter_map(|(member, life, facts)| {
                let rtt = Duration::from_millis(20);
                Some(candidate(
                    member,
                    capacity,
                    &facts?.bytes,
                    rtt,
                    life != Life::Alive,
                ))
            })
            .collect()
    }

    pub(crate) fn search(&mut self, node: usize, request: RequestId, input: SearchInput) {
        let local = self.local(node);
        let Some((mut search, purpose)) = self.nodes[node].searches.remove(&request) else {
            // Nobody waits for it any more: it is not to hold anything.
            match input {
                SearchInput::Offered(offer) => {
                    self.send(node, offer.node, Wire::Release(request));
                }
                SearchInput::Taken(from) => self.send(node, from, Wire::Release(request)),
                SearchInput::Refused(..) | SearchInput::Timer => {}
            }
            return;
        };
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        let known = std::cell::OnceCell::new();
        let all = || known.get_or_init(|| self.candidates(node));
        let outputs = search.handle(local, input, all, &mut rng);
        self.searched(node, search, purpose, outputs);
    }

    pub(crate) fn searched(
        &mut self,
        node: usize,
        search: Search,
        purpose: (Spec, Slot, Generation),
        outputs: Vec<SearchOutput>,
    ) {
        let request = search.request();
        let (spec, slot, generation) = purpose;
        for output in outputs {
            match output {
                SearchOutput::Ask(to) => self.send(node, to, Wire::Ask(request)),
                SearchOutput::Take(to) => self.send(node, to, Wire::Take(request)),
                SearchOutput::Release(to) => self.send(node, to, Wire::Release(request)),
                SearchOutput::WakeAt(at) => {
                    self.nodes[node].search_wakes.insert((at, request));
                }
                SearchOutput::Placed(to, _) => {
                    let keepers = self.nodes[node].keepers.get(&slot.service);
                    if let Some(keepers) = keepers.map(|keeper| keeper.keepers().clone()) {
                        let run = Wire::Run {
                            request,
                            spec,
                            slot,
                            generation,
                            keepers,
                        };
                        self.send(node, to, run);
                    }
                }
                SearchOutput::Unplaced(_) => {}
            }
        }
        if !search.is_over() {
            (self.nodes[node].searches).insert(request, (search, purpose));
        }
    }

    pub(crate) fn oversee(&mut self, node: usize, service: ServiceId, actions: Vec<Action>) {
        let now = self.queue.now();
        let local = self.local(node);
        for action in actions {
            match action {
                Action::Place {
                    slot,
                    generation,
                    apart_from,
                } => {
                    let Some(spec) = self.nodes[node].keepers.get(&service).map(Keeper::spec)
                    else {
                        continue;
                    };
                    let wanted = Wanted {
                        memory: MACHINE,
                        cpus: Cpus::ONE,
                        arch: Architecture("amd64".to_owned()),
                        hypervisor: Hypervisor::Auto,
                        image: None,
                        constraints: Constraints {
                            apart_from,
                            ..Constraints::default()
                        },
                    };
                    let request = RequestId(self.rng.random());
                    let mut search = Search::new(wanted, Policy::Spread, request);
                    let known = self.candidates(node);
                    let mut rng = SmallRng::seed_from_u64(self.rng.random());
                    let outputs = search.begin(local, &known, &mut rng);
                    self.searched(node, search, (spec, slot, generation), outputs);
                }
                Action::Send(to, question) => self.send(node, to, Wire::ToKeeper(question)),
                Action::Lost(slot, _) => self.checks.task_lost(now, slot),
                Action::Replace { away } => self.replace(node, service, &away),
            }
        }
    }
}
