//! Which offer is taken.

use super::{Candidate, Offer, Policy, fits, rank};
use std::fmt;
use vistara_model::{NodeId, Wanted};

/// One offer in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// Whose.
    pub node: NodeId,
    /// Why it stands there.
    pub reason: String,
    /// What it costs.
    pub price_micros: u64,
}

/// What came of the offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The policy's name.
    pub policy: String,
    /// The best first: it is taken, and if it cannot be, the next.
    pub ranked: Vec<Ranked>,
    /// Offers that are not good enough after all, with the reason.
    pub declined: Vec<(NodeId, String)>,
}

/// Puts offers in order. What an offer says of room and price counts; what was stated before does not any more.
pub fn decide<'a>(
    wanted: &Wanted,
    policy: &Policy,
    offers: impl IntoIterator<Item = (&'a Candidate, &'a Offer)>,
) -> Decision {
    let mut ranked = Vec::new();
    let mut declined = Vec::new();
    for (candidate, offer) in offers {
        let mut candidate = candidate.clone();
        candidate.facts.free = offer.free;
        candidate.facts.price_micros = offer.price_micros;
        if let Err(unfit) = fits(wanted, policy, &candidate) {
            declined.push((offer.node, unfit.to_string()));
            continue;
        }
        let (rank, reason) = rank(wanted, policy, &candidate, offer.free, offer.price_micros);
        // Ties go by the request's number, so that not every asker's tie goes to the same node.
        let tie = u128::from_le_bytes(first_half(offer.node)) ^ offer.request.0;
        ranked.push((rank, tie, offer, reason));
    }
    ranked.sort_by_key(|(rank, tie, ..)| (*rank, *tie));
    Decision {
        policy: policy.name().to_owned(),
        ranked: ranked
            .into_iter()
            .map(|(_, _, offer, reason)| Ranked {
                node: offer.node,
                reason,
                price_micros: offer.price_micros,
            })
            .collect(),
        declined,
    }
}

fn first_half(node: NodeId) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&node.as_bytes()[..16]);
    half
}

impl fmt::Display for Decision {
    /// One line for each node, as `--explain` shows them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "policy {}", self.policy)?;
        for (place, one) in self.ranked.iter().enumerate() {
            let mark = if place == 0 { "takes it" } else { "offers" };
            writeln!(f, "{} {mark}: {}", one.node.short(), one.reason)?;
        }
        for (node, reason) in &self.declined {
            writeln!(f, "{} declined: {reason}", node.short())?;
        }
        Ok(())
    }
}
