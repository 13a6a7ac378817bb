//! What a node says of itself to others, and what somebody wants of a node: the words in which placement is decided.
//!
//! Nothing here is believed because it was said: facts steer whom one asks, and what a node then offers is what counts.

use crate::{Architecture, Bytes, Cpus, Digest, Hypervisor, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// Most images, and most templates, that a node tells of: those used last. More would not fit a datagram.
pub const MARKS_MAX: usize = 16;
/// Most labels that an owner gives a node.
pub const LABELS_MAX: usize = 8;
/// Longest label or region, in bytes.
pub const LABEL_BYTES_MAX: usize = 32;

/// Eight bytes that stand for an image where 32 would be too many. Two images with one mark cost a transfer, no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageMark(pub u64);

impl ImageMark {
    /// The first 64 bits of an image's digest.
    pub fn of(image: &Digest) -> ImageMark {
        // A digest's form is checked when it is made: there are 64 hexadecimal digits.
        ImageMark(u64::from_str_radix(&image.hex()[..16], 16).unwrap_or(0))
    }
}

/// What machines take, or a node has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stock {
    /// Guest memory.
    pub memory: Bytes,
    /// Machines.
    pub machines: u32,
}

impl Stock {
    /// What one machine of this size takes.
    pub const fn one(memory: Bytes) -> Stock {
        Stock {
            memory,
            machines: 1,
        }
    }

    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Stock) -> Stock {
        Stock {
            memory: Bytes(self.memory.0.saturating_add(other.memory.0)),
            machines: self.machines.saturating_add(other.machines),
        }
    }

    /// What is left when this much is taken away; nothing below nothing.
    #[must_use]
    pub const fn minus(self, other: Stock) -> Stock {
        Stock {
            memory: Bytes(self.memory.0.saturating_sub(other.memory.0)),
            machines: self.machines.saturating_sub(other.machines),
        }
    }

    /// Whether this much can be had of it.
    pub const fn holds(self, asked: Stock) -> bool {
        self.memory.0 >= asked.memory.0 && self.machines >= asked.machines
    }
}

impl fmt::Display for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {} machines", self.memory, self.machines)
    }
}

/// What a node's owner wants of those who ask.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OwnerTerms {
    /// Takes nothing new: it is being drained.
    pub draining: bool,
    /// Largest machine taken.
    pub memory_max: Option<Bytes>,
}

/// What a node states about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Who states it.
    pub node: NodeId,
    /// Grows with each statement; the newest one counts.
    pub version: u64,
    /// What its processors execute.
    pub arch: Architecture,
    /// Processors.
    pub cpus: u32,
    /// What it has for machines in all.
    pub capacity: Stock,
    /// What of it is neither used nor promised.
    pub free: Stock,
    /// Machines that wait to be started.
    pub queue_depth: u32,
    /// Hypervisors that were seen to work there.
    pub hypervisors: BTreeSet<Hypervisor>,
    /// Whether guests run on hardware: KVM was seen to work.
    pub kvm: bool,
    /// Images that are there, at most [`MARKS_MAX`].
    pub images: BTreeSet<ImageMark>,
    /// Images of which a template is there, at most [`MARKS_MAX`].
    pub templates: BTreeSet<ImageMark>,
    /// How long its machines took to be ready, in milliseconds: the median of the last; nothing where none has been yet.
    pub ready_ms: Option<u32>,
    /// Where it is, in its owner's words.
    pub region: Option<String>,
    /// What a GiB of guest memory costs for an hour, in millionths of the currency that its owner and users agreed on.
    pub price_micros: u64,
    /// What its owner calls it: `ssd`, `gpu`, …; at most [`LABELS_MAX`].
    pub labels: BTreeSet<String>,
    /// What its owner wants.
    pub terms: OwnerTerms,
}

/// Why facts are not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// There is more of something than a node may tell.
    #[error("it tells of more {0} than a node may")]
    TooMany(&'static str),
    /// A text is too long or not printable.
    #[error("its {0} are too long or not printable")]
    Text(&'static str),
    /// More is free than there is.
    #[error("it has more free than it has")]
    Free,
}

impl NodeFacts {
    /// Looks through facts that came from elsewhere.
    ///
    /// # Errors
    /// [`FactsError`]: they are to be thrown away.
    pub fn check(&self) -> Result<(), FactsError> {
        let plain = |text: &String| {
            (1..=LABEL_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if self.images.len() > MARKS_MAX {
            return Err(FactsError::TooMany("images"));
        }
        if self.templates.len() > MARKS_MAX {
            return Err(FactsError::TooMany("templates"));
        }
        if self.labels.len() > LABELS_MAX {
            return Err(FactsError::TooMany("labels"));
        }
        if !self.labels.iter().all(plain) {
            return Err(FactsError::Text("labels"));
        }
        if !self.region.iter().all(plain) {
            return Err(FactsError::Text("region's letters"));
        }
        if !plain(&self.arch.0) {
            return Err(FactsError::Text("architecture's letters"));
        }
        if !self.capacity.holds(self.free) {
            return Err(FactsError::Free);
        }
        Ok(())
    }

    /// Whether it has this capability, as policies name them: a hypervisor, an architecture, `kvm`, a label; and `vm` and
    /// `container`, since each node runs containers' images in virtual machines.
    pub fn is_capable_of(&self, capability: &str) -> bool {
        match capability {
            "vm" | "container" => !self.hypervisors.is_empty(),
            "kvm" => self.kvm,
            other => {
                self.labels.contains(other)
                    || self.arch.to_string() == other
                    || self.hypervisors.iter().any(|one| one.to_string() == other)
            }
        }
    }
}

/// What a request wants of the node that takes it. Empty sets ask for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Constraints {
    /// Any of these regions.
    pub regions: BTreeSet<String>,
    /// None but these nodes.
    pub trusted: Option<BTreeSet<NodeId>>,
    /// None of these nodes: they have a copy already, or failed a moment ago.
    pub apart_from: BTreeSet<NodeId>,
    /// Most that a GiB of memory may cost for an hour, in the millionths of [`NodeFacts::price_micros`].
    pub price_micros_max: Option<u64>,
    /// What the node must be capable of, as [`NodeFacts::is_capable_of`] understands it.
    pub capabilities: BTreeSet<String>,
}

/// A machine that wants a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Guest memory.
    pub memory: Bytes,
    /// CPUs.
    pub cpus: Cpus,
    /// The architecture its image is for.
    pub arch: Architecture,
    /// On what it is to run; `auto` takes any.
    pub hypervisor: Hypervisor,
    /// Its image.
    pub image: Option<ImageMark>,
    /// Where it may run.
    pub constraints: Constraints,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> NodeFacts {
        let capacity = Stock {
            memory: Bytes::gib(8),
            machines: 64,
        };
        NodeFacts {
            node: NodeId::from_bytes([1; 32]),
            version: 1,
            arch: Architecture("amd64".to_owned()),
            cpus: 4,
            capacity,
            free: capacity,
            queue_depth: 0,
            hypervisors: [Hypervisor::Qemu].into(),
            kvm: false,
            images: BTreeSet::new(),
            templates: BTreeSet::new(),
            ready_ms: None,
            region: Some("eu-west".to_owned()),
            price_micros: 10,
            labels: ["ssd".to_owned()].into(),
            terms: OwnerTerms::default(),
        }
    }

    #[test]
    fn facts_that_are_too_large_or_impossible_are_not_taken() {
        assert_eq!(facts().check(), Ok(()));
        let many = NodeFacts {
            images: (0..17).map(ImageMark).collect(),
            ..facts()
        };
        assert_eq!(many.check(), Err(FactsError::TooMany("images")));
        let long = NodeFacts {
            region: Some("x".repeat(33)),
            ..facts()
        };
        assert_eq!(long.check(), Err(FactsError::Text("region's letters")));
        let loud = NodeFacts {
            labels: ["\u{1b}[2J".to_owned()].into(),
            ..facts()
        };
        assert_eq!(loud.check(), Err(FactsError::Text("labels")));
        let generous = NodeFacts {
            free: Stock::one(Bytes::gib(9)),
            ..facts()
        };
        assert_eq!(generous.check(), Err(FactsError::Free));
    }

    #[test]
    fn a_node_is_capable_of_what_it_has_and_no_more() {
        for capability in ["vm", "container", "qemu", "amd64", "ssd"] {
            assert!(facts().is_capable_of(capability), "{capability}");
        }
        for capability in ["kvm", "gpu", "firecracker", "arm64", ""] {
            assert!(!facts().is_capable_of(capability), "{capability}");
        }
    }

    #[test]
    fn a_mark_is_the_beginning_of_a_digest() {
        let digest = Digest::from_sha256([0xab; 32]);
        assert_eq!(ImageMark::of(&digest), ImageMark(0xabab_abab_abab_abab));
    }
}
