//! How long the choice of a node takes among many that are known, for `vistara bench mesh`: the search that places
//! machines, over facts that are made up, with nodes that answer at once. Only the search's own steps are timed.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use vistara_control::placement::{
    Book, Candidate, Policy, RequestId, Search, SearchInput, SearchOutput, Seen,
};
use vistara_model::{
    Architecture, Bytes, Constraints, Cpus, Hypervisor, ImageMark, NodeFacts, NodeId, OwnerTerms,
    Stock, Wanted,
};

/// What each placement that is timed wants.
const WANTED_MEMORY: Bytes = Bytes::mib(512);
/// Largest node.
const MEMORY_MAX_GIB: u64 = 256;
/// Images that nodes have, and of how many in all.
const IMAGES_EACH: usize = 8;
const IMAGES: u64 = 200;
const LABELS: [&str; 4] = ["ssd", "gpu", "eu", "cheap"];

/// The policies that are timed, by their names.
pub const PLACEMENT_POLICIES: [&str; 5] = ["spread", "pack", "nearest", "cheapest", "image-local"];

fn node(rng: &mut SmallRng) -> NodeId {
    let mut bytes = [0; 32];
    rng.fill(&mut bytes);
    NodeId::from_bytes(bytes)
}

/// A node as there may be many: of some size, more or less full, one in ten of which does not fit for another reason.
fn candidate(rng: &mut SmallRng) -> Candidate {
    let memory = Bytes::gib(rng.random_range(1..=MEMORY_MAX_GIB));
    let machines = 1024;
    let free = Bytes(rng.random_range(0..=memory.0));
    Candidate {
        facts: NodeFacts {
            node: node(rng),
            version: 1,
            arch: Architecture::host(),
            cpus: rng.random_range(1..=64),
            capacity: Stock { memory, machines },
            free: Stock {
                memory: free,
                machines: rng.random_range(0..machines),
            },
            queue_depth: 0,
            hypervisors: [Hypervisor::Qemu, Hypervisor::Firecracker].into(),
            kvm: rng.random(),
            images: (0..IMAGES_EACH)
                .map(|_| ImageMark(rng.random_range(0..IMAGES)))
                .collect(),
            templates: [ImageMark(rng.random_range(0..IMAGES))].into(),
            ready_ms: Some(rng.random_range(10..1000)),
            region: Some(format!("region-{}", rng.random_range(0..20))),
            price_micros: rng.random_range(0..100),
            labels: LABELS
                .into_iter()
                .filter(|_| rng.random())
                .map(str::to_owned)
                .collect(),
            terms: OwnerTerms {
                draining: rng.random_ratio(1, 20),
                memory_max: None,
            },
        },
        seen: Seen {
            granted: rng.random_ratio(19, 20),
            rtt: Some(Duration::from_micros(rng.random_range(100..200_000))),
            ..Seen::default()
        },
    }
}

/// Times placements among this many known nodes, from the first question to the offer that is taken, without the nodes' own
/// time and the way to them. Nothing for a policy that is none of [`PLACEMENT_POLICIES`], or where a search ends without a
/// place.
pub fn placement_times(
    known: usize,
    policy: &str,
    rounds: u32,
    seed: u64,
) -> Option<Vec<Duration>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let policy = Policy::named(policy)?;
    let known: Vec<Candidate> = (0..known).map(|_| candidate(&mut rng)).collect();
    (0..rounds)
        .map(|round| one_placement(&known, &policy, u128::from(round), &mut rng))
        .collect()
}

fn one_placement(
    known: &[Candidate],
    policy: &Policy,
    number: u128,
    rng: &mut SmallRng,
) -> Option<Duration> {
    let wanted = Wanted {
        memory: WANTED_MEMORY,
        cpus: Cpus::ONE,
        arch: Architecture::host(),
        hypervisor: Hypervisor::Auto,
        image: Some(ImageMark(rng.random_range(0..IMAGES))),
        constraints: Constraints::default(),
    };
    let (asker, request) = (node(rng), RequestId(number));
    let now = Duration::ZERO;
    let mut books: HashMap<NodeId, Book> = HashMap::new();
    let begin = Instant::now();
    let mut search = Search::new(wanted, policy.clone(), request);
    let mut outputs = search.begin(now, known, rng);
    let mut took = begin.elapsed();
    let mut inputs = Vec::new();
    loop {
        for output in outputs {
            match output {
                SearchOutput::Ask(node) => {
                    let one = known.iter().find(|one| one.facts.node == node)?;
                    let book = books.entry(node).or_default();
                    book.set_stock(one.facts.free);
                    let (size, price) = (Stock::one(WANTED_MEMORY), one.facts.price_micros);
                    inputs.push(match book.offer(now, node, (asker, request), size, price) {
                        Ok(offer) => SearchInput::Offered(offer),
                        Err(refused) => SearchInput::Refused(node, refused.to_string()),
                    });
                }
                SearchOutput::Take(node) => inputs.push(SearchInput::Taken(node)),
                SearchOutput::Placed(..) => return Some(took),
                SearchOutput::Unplaced(_) => return None,
                SearchOutput::Release(_) | SearchOutput::WakeAt(_) => {}
            }
        }
        // Nothing is waited for that does not come.
        let input = inputs.pop()?;
        let begin = Instant::now();
        outputs = search.handle(now, input, || known, rng);
        took += begin.elapsed();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_places_among_many() {
        for policy in PLACEMENT_POLICIES {
            let times = placement_times(200, policy, 3, 7).unwrap();
            assert_eq!(times.len(), 3, "{policy}");
        }
        assert_eq!(placement_times(200, "luck", 3, 7), None);
    }
}
