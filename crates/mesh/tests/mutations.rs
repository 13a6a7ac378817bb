//! What peers send and users are given, changed here and there: nothing of it makes reading panic, and what is signed does not
//! survive a change. The fuzz targets do the same for longer (`fuzz/`); this runs with the ordinary tests, and prints the case
//! that failed.

// Helpers of tests: a failure here is the test's.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use vistara_mesh::card::Card;
use vistara_mesh::frame::{Hello, Open};
use vistara_mesh::{Authority, Identity, Ticket, Token, facts, frame, receipt};
use vistara_model::{
    Architecture, Bytes, GrantId, GrantLimits, GrantTerms, Hypervisor, ImageMark, NodeFacts,
    OwnerTerms, Right, Stock,
};

const GOLDEN_RECEIPT: &[u8] = include_bytes!("../src/receipt/golden.receipt");

/// One of everything, as it is sent.
struct Seeds {
    hello: Vec<u8>,
    open: Vec<u8>,
    token: Vec<u8>,
    facts: Vec<u8>,
    card: Vec<u8>,
    ticket: Vec<u8>,
    authority: Authority,
}

fn seeds() -> &'static Seeds {
    static SEEDS: OnceLock<Seeds> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        let node = identity.id();
        let authority = Authority::new(&identity).unwrap();
        let token = authority
            .give(&GrantTerms {
                id: GrantId::from_random([3; 8]),
                node,
                holder: node,
                rights: [Right::Run, Right::Images].into(),
                until_s: 4_000_000_000,
                limits: GrantLimits::default(),
            })
            .unwrap();
        let stock = Stock {
            memory: Bytes::gib(8),
            machines: 64,
        };
        let facts = NodeFacts {
            node,
            version: 3,
            arch: Architecture::host(),
            cpus: 4,
            capacity: stock,
            free: stock,
            queue_depth: 1,
            hypervisors: [Hypervisor::Qemu].into(),
            kvm: true,
            images: (0..4).map(ImageMark).collect(),
            templates: BTreeSet::new(),
            ready_ms: Some(30),
            region: Some("eu".to_owned()),
            price_micros: 5,
            labels: ["ssd".to_owned()].into(),
            terms: OwnerTerms::default(),
        };
        let addresses = vec!["192.0.2.1:7".parse().unwrap()];
        let relay: vistara_mesh::Relay = format!("{node}@192.0.2.9:7443").parse().unwrap();
        let ticket = Ticket {
            node,
            addresses: addresses.clone(),
            relays: vec![relay],
        };
        let card = Card {
            facts: facts.clone(),
            addresses,
            leaves: false,
            relay: Some(relay),
        };
        let open = Open {
            target: *node.as_bytes(),
            generation: 2,
            nonce: [5; 16],
            deadline_ms: 9,
            token: Some(token.as_bytes().to_vec()),
        };
        let hello = Hello {
            version: 1,
            generation: 2,
        };
        Seeds {
            hello: frame::encode(&hello).unwrap()[4..].to_vec(),
            open: frame::encode(&open).unwrap()[4..].to_vec(),
            token: token.as_bytes().to_vec(),
            facts: facts::state(&identity, &facts).unwrap(),
            card: card.sign(&identity).unwrap(),
            ticket: ticket.to_string().into_bytes(),
            authority,
        }
    })
}

/// Bytes that are changed, at least one of them; or a seed cut short or continued.
#[derive(Debug, Clone)]
struct Change {
    bytes: Vec<(Index, u8)>,
    cut: Option<Index>,
    more: Vec<u8>,
}

fn change() -> impl Strategy<Value = Change> {
    let bytes = prop::collection::vec((any::<Index>(), 1_u8..), 1..6);
    let cut = prop::option::weighted(0.2, any::<Index>());
    let more = prop::collection::vec(any::<u8>(), 0..4);
    (bytes, cut, more).prop_map(|(bytes, cut, more)| Change { bytes, cut, more })
}

impl Change {
    fn of(&self, seed: &[u8]) -> Vec<u8> {
        let mut changed = seed.to_vec();
        for (at, by) in &self.bytes {
            changed[at.index(seed.len())] ^= by;
        }
        if let Some(cut) = self.cut {
            changed.truncate(cut.index(seed.len()));
        }
        changed.extend_from_slice(&self.more);
        changed
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn frames_that_were_changed_are_read_as_they_are_or_refused(change in change()) {
        let _ = frame::decode_hello(&change.of(&seeds().hello));
        if let Ok(open) = frame::decode_open(&change.of(&seeds().open)) {
            let again = frame::encode(&open).unwrap();
            prop_assert_eq!(frame::decode_open(&again[4..]).unwrap(), open);
        }
    }

    #[test]
    fn a_ticket_that_was_changed_is_another_or_none(change in change()) {
        if let Ok(text) = String::from_utf8(change.of(&seeds().ticket))
            && let Ok(ticket) = text.parse::<Ticket>()
        {
            prop_assert_eq!(ticket.to_string().parse(), Ok(ticket));
        }
    }

    #[test]
    fn nothing_that_is_signed_survives_a_change(change in change()) {
        let seeds = seeds();
        for (seed, is_read) in [
            (&seeds.facts[..], facts::read(&change.of(&seeds.facts)).is_ok()),
            (&seeds.card[..], Card::read(&change.of(&seeds.card)).is_ok()),
            (GOLDEN_RECEIPT, receipt::read(&change.of(GOLDEN_RECEIPT)).is_ok()),
        ] {
            // Two changes may be each other's opposite.
            prop_assert!(!is_read || change.of(seed) == seed);
        }
    }
}

proptest! {
    // Each takes a check of signatures.
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_token_that_was_changed_says_the_same_or_counts_no_more(change in change()) {
        let Ok(token) = Token::from_bytes(change.of(&seeds().token)) else {
            return Ok(());
        };
        let _ = token.unchecked_terms();
        let _ = token.is_passed_on();
        // Something may stand there that its format skips: then the terms are the same.
        if let Ok(verified) = seeds().authority.verify(&token) {
            let whole = Token::from_bytes(seeds().token.clone()).unwrap();
            let terms = seeds().authority.verify(&whole).unwrap().terms().clone();
            prop_assert_eq!(verified.terms(), &terms);
        }
    }
}
