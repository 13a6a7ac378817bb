//! Running a search for a node: its questions go over the mesh, its decisions are `vistara_control::placement::Search`'s.

use super::placing::Placing;
use crate::fault::{Answer, Fault};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::{ErrorKind, OfferRequest, Placed};
use vistara_control::placement::{
    Candidate, Decision, Offer, Policy, RequestId, Search, SearchInput, SearchOutput, Unplaced,
};
use vistara_model::{Bytes, NodeId, Stock, Wanted};

/// Answers on their way: each candidate that is asked has a few.
const ANSWERS_MAX: usize = 64;

pub(crate) fn text(request: RequestId) -> String {
    format!("{:032x}", request.0)
}

/// Reads a request's number.
pub(crate) fn number(text: &str) -> Answer<RequestId> {
    let good = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = good.then(|| u128::from_str_radix(text, 16).ok()).flatten();
    number
        .map(RequestId)
        .ok_or_else(|| Fault::user("an offer's number has 32 hexadecimal digits"))
}

impl Placing {
    /// Looks for a node that takes a machine, and holds a place for it there.
    pub(crate) async fn place(
        self: &Arc<Self>,
        own: NodeId,
        wanted: Wanted,
        policy: Policy,
    ) -> Answer<Placed> {
        // What one knows may be seconds old, and a node that was joined just now has said nothing yet.
        self.ask_others(true).await;
        let known = self.candidates().await?;
        let names: HashMap<NodeId, String> = known
            .iter()
            .map(|(candidate, name)| (candidate.facts.node, name.clone()))
            .collect();
        let known: Vec<Candidate> = known.into_iter().map(|(candidate, _)| candidate).collect();
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
        let (for_request, for_rng) = random.split_at(16);
        let request = RequestId(u128::from_le_bytes(
            for_request.try_into().unwrap_or([0; 16]),
        ));
        let seed = u64::from_le_bytes(for_rng.try_into().unwrap_or([0; 8]));
        let mut rng = SmallRng::seed_from_u64(seed);
        let memory = wanted.memory;
        let mut search = Search::new(wanted, policy, request);
        let (answers_in, mut answers) = mpsc::channel(ANSWERS_MAX);
        let mut wake = self.now();
        let mut outputs = search.begin(self.now(), &known, &mut rng);
        loop {
            for output in std::mem::take(&mut outputs) {
                match output {
                    SearchOutput::WakeAt(at) => wake = at,
                    SearchOutput::Placed(node, decision) => {
                        return Ok(Placed {
                            node: node.to_string(),
                            name: called(&names, node),
                            here: node == own,
                            offer: text(request),
                            reasons: placed_words(&names, &decision, &search),
                            ignored: Vec::new(),
                        });
                    }
                    SearchOutput::Unplaced(unplaced) => return Err(nobody(&names, &unplaced)),
                    output @ (SearchOutput::Ask(_)
                    | SearchOutput::Take(_)
                    | SearchOutput::Release(_)) => {
                        self.carry_out(output, own, request, memory, answers_in.clone());
                    }
                }
            }
            let left = wake.saturating_sub(self.now());
            let input = match tokio::time::timeout(left, answers.recv()).await {
                Ok(Some(input)) => input,
                Ok(None) | Err(_) => SearchInput::Timer,
            };
            outputs = search.handle(self.now(), input, || &known, &mut rng);
        }
    }

    fn carry_out(
        &self,
        output: SearchOutput,
        own: NodeId,
        request: RequestId,
        memory: Bytes,
        answers: mpsc::Sender<SearchInput>,
    ) {
        let node = match output {
            SearchOutput::Ask(node) | SearchOutput::Take(node) | SearchOutput::Release(node) => {
                node
            }
            SearchOutput::WakeAt(_) | SearchOutput::Placed(..) | SearchOutput::Unplaced(_) => {
                return;
            }
        };
        let client = self.client_of(node, own);
        let number = text(request);
        // Each is bounded by the streams' own time limits; a search that is over hears no more.
        tokio::spawn(async move {
            let input = match output {
                SearchOutput::Ask(_) => {
                    let ask = OfferRequest {
                        request: number,
                        memory_bytes: memory.0,
                    };
                    match client.ask_offer(&ask).await {
                        Ok(offer) => SearchInput::Offered(Offer {
                            node,
                            request,
                            ttl: Duration::from_millis(offer.ttl_ms),
                            free: Stock {
                                memory: Bytes(offer.memory_free_bytes),
                                machines: offer.machines_free,
                            },
                            price_micros: offer.price_micros,
                        }),
                        Err(error) => SearchInput::Refused(node, error.to_string()),
                    }
                }
                SearchOutput::Take(_) => match client.take_offer(&number).await {
                    Ok(()) => SearchInput::Taken(node),
                    Err(error) => SearchInput::Refused(node, error.to_string()),
                },
                SearchOutput::Release(_)
                | SearchOutput::WakeAt(_)
                | SearchOutput::Placed(..)
                | SearchOutput::Unplaced(_) => {
                    // What is not released is over by itself.
                    let _ = client.release_offer(&number).await;
                    return;
                }
            };
            let _ = answers.send(input).await;
        });
    }
}

fn called(names: &HashMap<NodeId, String>, node: NodeId) -> String {
    names.get(&node).cloned().unwrap_or_else(|| node.short())
}

fn placed_words(
    names: &HashMap<NodeId, String>,
    decision: &Decision,
    search: &Search,
) -> Vec<String> {
    let mut lines = vec![format!("policy {}", decision.policy)];
    for (place, one) in decision.ranked.iter().enumerate() {
        let verb = if place == 0 { "takes it" } else { "offers" };
        lines.push(format!(
            "{} {verb}: {}",
            called(names, one.node),
            one.reason
        ));
    }
    for (node, reason) in &decision.declined {
        lines.push(format!("{} declined: {reason}", called(names, *node)));
    }
    for (node, reason) in &search.shortlist().unfit {
        lines.push(format!("{} not asked: {reason}", called(names, *node)));
    }
    lines
}

fn nobody(names: &HashMap<NodeId, String>, unplaced: &Unplaced) -> Fault {
    let mut reasons: Vec<String> = (unplaced.refusals.iter())
        .map(|(node, reason)| format!("{}: {reason}", called(names, *node)))
        .collect();
    let unfit = unplaced.shortlist.unfit.iter();
    reasons.extend(unfit.map(|(node, reason)| format!("{}: {reason}", called(names, *node))));
    let reasons = if reasons.is_empty() {
        "none is known that has given a grant".to_owned()
    } else {
        reasons.join("; ")
    };
    Fault::new(ErrorKind::Host, format!("no node takes it: {reasons}"))
        .hint("`vistara nodes` shows what they have; ask for less, or for less of a kind")
}
