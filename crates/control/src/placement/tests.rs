//! Placement: who fits, who is asked, what is promised, and who is taken.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use vistara_model::{Constraints, Cpus, ImageMark, OwnerTerms};

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn node(number: u16) -> NodeId {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    NodeId::from_bytes(bytes)
}

fn candidate(number: u16) -> Candidate {
    let capacity = Stock {
        memory: Bytes::gib(8),
        machines: 32,
    };
    Candidate {
        facts: NodeFacts {
            node: node(number),
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
            region: None,
            price_micros: 0,
            labels: BTreeSet::new(),
            terms: OwnerTerms::default(),
        },
        seen: Seen {
            granted: true,
            ..Seen::default()
        },
    }
}

fn wanted() -> Wanted {
    Wanted {
        memory: Bytes::gib(1),
        cpus: Cpus::ONE,
        arch: Architecture("amd64".to_owned()),
        hypervisor: Hypervisor::Auto,
        image: Some(ImageMark(9)),
        constraints: Constraints::default(),
    }
}

/// Changes a candidate.
type Change = fn(&mut Candidate);
/// Changes what is wanted.
type Wish = fn(&mut Wanted);

#[test]
fn each_thing_that_keeps_a_node_from_being_asked_is_named() {
    let same: Change = |_| {};
    let any: Wish = |_| {};
    let table: [(Change, Wish, Unfit); 14] = [
        (|c| c.seen.granted = false, any, Unfit::NotGranted),
        (|c| c.seen.doubtful = true, any, Unfit::Doubtful),
        (|c| c.facts.terms.draining = true, any, Unfit::Draining),
        (
            same,
            |w| w.constraints.trusted = Some(BTreeSet::new()),
            Unfit::Untrusted,
        ),
        (
            same,
            |w| w.constraints.apart_from = [node(1)].into(),
            Unfit::Apart,
        ),
        (
            |c| c.facts.arch = Architecture("arm64".to_owned()),
            any,
            Unfit::Arch(Architecture("arm64".to_owned())),
        ),
        (
            same,
            |w| w.hypervisor = Hypervisor::Firecracker,
            Unfit::Hypervisor(Hypervisor::Firecracker),
        ),
        (
            |c| c.facts.hypervisors.clear(),
            any,
            Unfit::Hypervisor(Hypervisor::Auto),
        ),
        (
            same,
            |w| w.constraints.regions = ["eu".to_owned()].into(),
            Unfit::Region(None),
        ),
        (
            |c| c.facts.free.machines = 0,
            any,
            Unfit::Room(Stock {
                memory: Bytes::gib(8),
                machines: 0,
            }),
        ),
        (same, |w| w.cpus = Cpus { millis: 4001 }, Unfit::Cpus(4)),
        (
            |c| c.facts.terms.memory_max = Some(Bytes::mib(512)),
            any,
            Unfit::OwnersLimit(Bytes::mib(512)),
        ),
        (
            |c| c.facts.price_micros = 11,
            |w| w.constraints.price_micros_max = Some(10),
            Unfit::Price(11),
        ),
        (
            same,
            |w| w.constraints.capabilities = ["gpu".to_owned()].into(),
            Unfit::Incapable("gpu".to_owned()),
        ),
    ];
    assert_eq!(fits(&wanted(), &Policy::Spread, &candidate(1)), Ok(()));
    for (change, wish, reason) in table {
        let (mut candidate, mut wanted) = (candidate(1), wanted());
        change(&mut candidate);
        wish(&mut wanted);
        assert_eq!(fits(&wanted, &Policy::Spread, &candidate), Err(reason));
    }
}

#[test]
fn a_small_network_is_asked_as_a_whole_and_a_large_one_by_a_sample() {
    let small: Vec<_> = (0..8).map(candidate).collect();
    let list = shortlist(&wanted(), &Policy::Spread, &small, &mut rng());
    assert_eq!(list.asked.len(), 8);
    let large: Vec<_> = (0..1000).map(candidate).collect();
    let mut asked = BTreeSet::new();
    let mut rng = rng();
    for _ in 0..200 {
        let list = shortlist(&wanted(), &Policy::Spread, &large, &mut rng);
        assert_eq!((list.asked.len(), list.fitting), (ASK_SAMPLE, 1000));
        asked.extend(list.asked);
    }
    // 800 draws of 1,000: about 550 different ones.
    assert!(asked.len() > 450, "{}", asked.len());
}

#[test]
fn those_that_do_not_fit_are_named_up_to_a_bound_and_counted_beyond() {
    let mut all: Vec<_> = (0..100).map(candidate).collect();
    for one in &mut all {
        one.seen.granted = false;
    }
    let list = shortlist(&wanted(), &Policy::Spread, &all, &mut rng());
    assert_eq!(
        (list.fitting, list.unfit.len(), list.unfit_more),
        (0, 32, 68)
    );
}

fn offer_of(candidate: &Candidate) -> Offer {
    Offer {
        node: candidate.facts.node,
        request: RequestId(1),
        ttl: Book::OFFER_TTL,
        free: candidate.facts.free,
        price_micros: candidate.facts.price_micros,
    }
}

fn best(policy: &Policy, all: &[Candidate]) -> NodeId {
    let offers: Vec<_> = all.iter().map(offer_of).collect();
    let decision = decide(&wanted(), policy, all.iter().zip(&offers));
    decision.ranked[0].node
}

#[test]
fn each_policy_takes_the_offer_that_is_best_by_it() {
    let mut all: Vec<_> = (1..=4).map(candidate).collect();
    for one in &mut all {
        one.facts.free.memory = Bytes::gib(5);
        one.facts.price_micros = 50;
        one.seen.rtt = Some(Duration::from_millis(50));
    }
    all[0].facts.free.memory = Bytes::gib(2);
    all[1].facts.free.memory = Bytes::gib(7);
    all[2].facts.price_micros = 5;
    all[2].seen.rtt = None;
    all[3].seen.rtt = Some(Duration::from_millis(3));
    all[3].facts.images = [ImageMark(9)].into();
    for (policy, number) in [
        ("pack", 1),
        ("spread", 2),
        ("cheapest", 3),
        ("nearest", 4),
        ("image-local", 4),
    ] {
        let policy = Policy::named(policy).unwrap();
        assert_eq!(best(&policy, &all), node(number), "{}", policy.name());
    }
    all[0].facts.templates = [ImageMark(9)].into();
    assert_eq!(best(&Policy::ImageLocal, &all), node(1));
}

#[test]
fn what_is_offered_counts_and_not_what_was_stated() {
    let all = [candidate(1), candidate(2)];
    let mut offers: Vec<_> = all.iter().map(offer_of).collect();
    offers[0].free.memory = Bytes::mib(512);
    let decision = decide(&wanted(), &Policy::Spread, all.iter().zip(&offers));
    assert_eq!(decision.ranked.len(), 1);
    assert_eq!(decision.ranked[0].node, node(2));
    assert_eq!(decision.declined[0].0, node(1));
    assert!(decision.to_string().contains("declined: it has 512 MiB"));
}

const NOW: Duration = Duration::from_secs(100);
const SECOND: Duration = Duration::from_secs(1);

fn ask(book: &mut Book, now: Duration, number: u128) -> Result<Offer, OfferRefused> {
    let size = Stock::one(Bytes::gib(1));
    book.offer(now, node(1), (node(2), RequestId(number)), size, 0)
}

fn book() -> Book {
    Book::new(Stock {
        memory: Bytes::gib(2),
        machines: 10,
    })
}

#[test]
fn an_offer_holds_its_memory_until_it_is_over() {
    let mut book = book();
    let size = Stock::one(Bytes::gib(1));
    let other = (node(3), RequestId(2));
    ask(&mut book, NOW, 1).unwrap();
    book.offer(NOW + SECOND, node(1), other, size, 0).unwrap();
    assert!(matches!(
        ask(&mut book, NOW + SECOND, 3),
        Err(OfferRefused::Room(_))
    ));
    let later = NOW + Book::OFFER_TTL;
    ask(&mut book, later, 3).unwrap();
    assert_eq!(
        book.take(later, node(2), RequestId(1)),
        Err(TakeRefused::Over)
    );
    assert!(book.take(later, other.0, other.1).is_ok());
}

#[test]
fn the_same_question_gets_the_same_promise_and_another_size_none() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    let again = ask(&mut book, NOW + SECOND, 1).unwrap();
    assert_eq!(book.promised(), Stock::one(Bytes::gib(1)));
    assert_eq!(again.free.memory, Bytes::gib(2));
    let size = Stock::one(Bytes::gib(2));
    let larger = book.offer(NOW, node(1), (node(2), RequestId(1)), size, 0);
    assert_eq!(larger, Err(OfferRefused::Changed));
}

#[test]
fn asking_again_holds_nothing_longer() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    let again = ask(&mut book, NOW + 5 * SECOND, 1).unwrap();
    assert_eq!(again.ttl, Book::OFFER_TTL - 5 * SECOND);
    let over = NOW + Book::OFFER_TTL;
    assert_eq!(ask(&mut book, over, 1), Err(OfferRefused::Over));
    assert_eq!(book.promised(), Stock::default());
}

#[test]
fn one_asker_holds_half_of_the_node_taken_or_not_or_one_machine_of_any_size() {
    let stock = Stock {
        memory: Bytes::gib(8),
        machines: 100,
    };
    let mut book = Book::new(stock);
    for number in 0..4 {
        ask(&mut book, NOW, number).unwrap();
        book.take(NOW, node(2), RequestId(number)).unwrap();
    }
    assert_eq!(ask(&mut book, NOW, 4), Err(OfferRefused::AskerBusy));
    book.begin(NOW, node(2), RequestId(0)).unwrap();
    assert_eq!(ask(&mut book, NOW, 4), Err(OfferRefused::AskerBusy));
    book.begin(NOW, node(2), RequestId(1)).unwrap();
    assert!(ask(&mut book, NOW, 4).is_ok());
    let mut book = Book::new(stock);
    let all = Stock::one(Bytes::gib(8));
    let whole = book.offer(NOW, node(1), (node(2), RequestId(1)), all, 0);
    assert!(whole.is_ok());
}

#[test]
fn an_askers_word_does_not_free_what_its_machine_uses() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    book.take(NOW, node(2), RequestId(1)).unwrap();
    book.begin(NOW, node(2), RequestId(1)).unwrap();
    assert!(!book.decline(node(2), RequestId(1)));
    assert_eq!(book.promised(), Stock::one(Bytes::gib(1)));
    // And what has not begun has no machine that could end.
    ask(&mut book, NOW, 2).unwrap();
    assert!(!book.ended(node(2), RequestId(2)));
    assert!(book.decline(node(2), RequestId(2)));
}

#[test]
fn a_request_whose_machine_has_ended_does_not_begin_again() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    book.take(NOW, node(2), RequestId(1)).unwrap();
    book.begin(NOW, node(2), RequestId(1)).unwrap();
    assert!(book.ended(node(2), RequestId(1)));
    let late = NOW + 60 * SECOND;
    assert_eq!(ask(&mut book, late, 1), Err(OfferRefused::Over));
    let begun = Err(TakeRefused::Begun);
    assert_eq!(book.take(late, node(2), RequestId(1)), begun);
    assert_eq!(book.begin(late, node(2), RequestId(1)), begun);
    ask(&mut book, late, 2).unwrap();
    assert!(book.decline(node(2), RequestId(2)));
    assert_eq!(ask(&mut book, late, 2), Err(OfferRefused::Over));
}

#[test]
fn what_is_over_is_remembered_within_bounds() {
    let mut book = book();
    for number in 0..1000 {
        ask(&mut book, NOW, number).unwrap();
        book.decline(node(2), RequestId(number));
    }
    for asker in 0..10_000 {
        let key = (node(asker), RequestId(1));
        let size = Stock::one(Bytes::gib(1));
        let _ = book.offer(NOW + SECOND, node(1), key, size, 0);
        book.decline(key.0, key.1);
    }
    assert!(book.remembered() <= OVER_MAX, "{}", book.remembered());
    book.expire(NOW + SECOND + Book::REMEMBERED);
    assert_eq!(book.remembered(), 0);
}

#[test]
fn what_was_taken_begins_once_and_not_by_somebody_else() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    assert_eq!(
        book.begin(NOW, node(2), RequestId(1)),
        Err(TakeRefused::Over)
    );
    book.take(NOW, node(2), RequestId(1)).unwrap();
    assert_eq!(
        book.begin(NOW, node(3), RequestId(1)),
        Err(TakeRefused::Over)
    );
    assert!(book.begin(NOW, node(2), RequestId(1)).is_ok());
    assert_eq!(
        book.begin(NOW, node(2), RequestId(1)),
        Err(TakeRefused::Begun)
    );
    book.expire(NOW + 100 * SECOND);
    assert_eq!(book.promised(), Stock::one(Bytes::gib(1)));
    assert!(book.ended(node(2), RequestId(1)));
    assert_eq!(book.promised(), Stock::default());
}

#[test]
fn what_was_taken_and_never_begun_is_free_again() {
    let mut book = book();
    ask(&mut book, NOW, 1).unwrap();
    book.take(NOW, node(2), RequestId(1)).unwrap();
    book.expire(NOW + Book::TAKEN_TTL);
    assert_eq!(book.promised(), Stock::default());
}

#[test]
fn one_asker_does_not_get_all_offers() {
    let mut book = Book::new(Stock {
        memory: Bytes::gib(1000),
        machines: 1000,
    });
    for number in 0..ASKER_OFFERS_MAX as u128 {
        ask(&mut book, NOW, number).unwrap();
    }
    assert_eq!(ask(&mut book, NOW, 999), Err(OfferRefused::AskerBusy));
    let size = Stock::one(Bytes::gib(1));
    let other = book.offer(NOW, node(1), (node(5), RequestId(1)), size, 0);
    assert!(other.is_ok());
}

proptest! {
    #[test]
    fn promises_never_exceed_the_stock(
        steps in prop::collection::vec((0u8..6, 0u16..4, 0u128..6, 1u64..4, 0u64..9), 1..200),
    ) {
        let stock = Stock { memory: Bytes::gib(6), machines: 4 };
        let mut book = Book::new(stock);
        let mut now = NOW;
        // What runs, kept by the test itself.
        let mut running: std::collections::BTreeMap<_, Stock> = Default::default();
        for (what, asker, request, gib, wait) in steps {
            now += SECOND * u32::try_from(wait).unwrap();
            let key = (node(2 + asker), RequestId(request));
            match what {
                0 | 1 => { let _ = book.offer(now, node(1), key, Stock::one(Bytes::gib(gib)), 0); }
                2 => { let _ = book.take(now, key.0, key.1); }
                3 => if let Ok(size) = book.begin(now, key.0, key.1) {
                    prop_assert!(running.insert(key, size).is_none(), "{key:?} begins twice");
                },
                4 => { book.decline(key.0, key.1); }
                _ => { prop_assert_eq!(book.ended(key.0, key.1), running.remove(&key).is_some()); }
            }
            prop_assert!(stock.holds(book.promised()), "{book:?}");
            let used = running.values().copied().fold(Stock::default(), Stock::plus);
            prop_assert!(book.promised().holds(used), "{used} run: {book:?}");
        }
    }

    #[test]
    fn no_text_makes_the_policy_reader_panic(text in ".{0,200}") {
        let _ = read_policy(text.as_bytes());
    }
}

const POLICY: &str = r#"{"name": "near", "mode": "enforce", "owner": "me",
  "rules": {"max_latency_ms": 100, "min_reputation_score": 0.6, "min_uptime": 3,
            "required_capabilities": ["qemu"], "prefer_low_price": true},
  "scoring": {"latency_weight": 0.6, "gpu_weight": 1}}"#;

#[test]
fn a_policy_of_hypercore_is_read_and_what_means_nothing_is_named() {
    let (rules, unknown) = read_policy(POLICY.as_bytes()).unwrap();
    assert_eq!(unknown, ["owner", "rules.min_uptime", "scoring.gpu_weight"]);
    assert_eq!(rules.latency_ms_max, Some(100.0));
    assert_eq!((rules.weights.latency, rules.weights.price), (0.6, 0.5));
    assert_eq!(rules.queue_max, None);
    for (bad, word) in [
        (r#"{"name":"x"}"#, "mode"),
        (r#"{"mode":"enforce"}"#, "name"),
        (
            r#"{"name":"x","mode":"enforce","rules":{"max_jitter_ms":-1}}"#,
            "max_jitter_ms",
        ),
        (
            r#"{"name":"x","mode":"enforce","rules":{"min_reputation_score":2}}"#,
            "min_reputation",
        ),
        ("[]", "read"),
    ] {
        let error = read_policy(bad.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(word), "{bad}: {error}");
    }
}

#[test]
fn an_enforced_rule_keeps_a_node_out_and_a_permissive_one_puts_it_behind() {
    let (mut rules, _) = read_policy(POLICY.as_bytes()).unwrap();
    let good = Candidate {
        seen: Seen {
            granted: true,
            rtt: Some(Duration::from_millis(90)),
            kept: 3,
            ..Seen::default()
        },
        ..candidate(1)
    };
    let mut far = good.clone();
    far.facts.node = node(2);
    far.seen.rtt = Some(Duration::from_millis(101));
    let unproven = candidate(3);
    let policy = Policy::Weighted(rules.clone());
    assert_eq!(fits(&wanted(), &policy, &good), Ok(()));
    for bad in [&far, &unproven] {
        assert!(matches!(fits(&wanted(), &policy, bad), Err(Unfit::Rule(_))));
    }
    rules.enforce = false;
    far.seen.kept = 1000;
    let policy = Policy::Weighted(rules);
    assert_eq!(best(&policy, &[far, unproven, good]), node(1));
}

/// What one node answers to a step of a search.
fn answer(
    books: &mut [Book],
    now: Duration,
    request: RequestId,
    output: &SearchOutput,
) -> Option<SearchInput> {
    let index =
        |node: &NodeId| usize::from(u16::from_be_bytes([node.as_bytes()[0], node.as_bytes()[1]]));
    let asker = node(999);
    match output {
        SearchOutput::Ask(to) => {
            let size = Stock::one(Bytes::gib(1));
            let offered = books[index(to)].offer(now, *to, (asker, request), size, 0);
            Some(match offered {
                Ok(offer) => SearchInput::Offered(offer),
                Err(refused) => SearchInput::Refused(*to, refused.to_string()),
            })
        }
        SearchOutput::Take(to) => Some(match books[index(to)].take(now, asker, request) {
            Ok(_) => SearchInput::Taken(*to),
            Err(refused) => SearchInput::Refused(*to, refused.to_string()),
        }),
        SearchOutput::Release(to) => {
            books[index(to)].decline(asker, request);
            None
        }
        SearchOutput::WakeAt(_) | SearchOutput::Placed(..) | SearchOutput::Unplaced(_) => None,
    }
}

/// Runs a search to its end; nodes for which `hears` says no never answer.
fn run(books: &mut [Book], hears: impl Fn(&SearchOutput) -> bool) -> SearchOutput {
    let known: Vec<_> = (0..books.len() as u16).map(candidate).collect();
    let request = RequestId(5);
    let mut search = Search::new(wanted(), Policy::Spread, request);
    let mut rng = rng();
    let mut now = NOW;
    let mut wake = NOW;
    let mut todo: std::collections::VecDeque<_> = search.begin(now, &known, &mut rng).into();
    loop {
        let inputs = match todo.pop_front() {
            Some(SearchOutput::WakeAt(at)) => {
                wake = at;
                continue;
            }
            Some(end @ (SearchOutput::Placed(..) | SearchOutput::Unplaced(_))) => return end,
            Some(output) if hears(&output) => answer(books, now, request, &output),
            Some(_) => None,
            None => {
                now = wake;
                Some(SearchInput::Timer)
            }
        };
        if let Some(input) = inputs {
            todo.extend(search.handle(now, input, || &known, &mut rng));
        }
    }
}

#[test]
fn a_search_takes_one_offer_and_gives_the_others_back() {
    let mut books = vec![book(); 6];
    assert!(matches!(
        run(&mut books, |_| true),
        SearchOutput::Placed(..)
    ));
    let promised: u64 = books.iter().map(|book| book.promised().memory.0).sum();
    assert_eq!(Bytes(promised), Bytes::gib(1));
}

#[test]
fn a_search_goes_on_with_the_next_best_and_with_other_nodes() {
    // Of twenty only the last has room, whatever they all say: rounds go on until it is asked, or four are over.
    let mut books = vec![Book::default(); 16];
    books[3] = book();
    let SearchOutput::Placed(node_3, _) = run(&mut books, |_| true) else {
        panic!("not placed");
    };
    assert_eq!(node_3, node(3));
}

#[test]
fn a_take_that_is_not_answered_is_given_back_and_the_next_is_taken() {
    let mut books = vec![book(); 3];
    let first = std::cell::Cell::new(None);
    let placed = run(&mut books, |output| match output {
        SearchOutput::Take(node) => {
            let deaf = first.get().unwrap_or(*node);
            first.set(Some(deaf));
            deaf != *node
        }
        _ => true,
    });
    let SearchOutput::Placed(node, _) = placed else {
        panic!("{placed:?}");
    };
    assert_ne!(Some(node), first.get());
    let promised: u64 = books.iter().map(|book| book.promised().memory.0).sum();
    assert_eq!(Bytes(promised), Bytes::gib(1));
}

#[test]
fn a_search_that_nobody_answers_says_whom_it_asked() {
    let mut books = vec![book(); 3];
    let SearchOutput::Unplaced(unplaced) = run(&mut books, |_| false) else {
        panic!("placed by nobody");
    };
    assert_eq!((unplaced.asked, unplaced.refusals.len()), (3, 3));
}
