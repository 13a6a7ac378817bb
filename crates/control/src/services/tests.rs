//! Leases and keepers, step by step. What happens in networks is the simulation's.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(1000);
const SECOND: Duration = Duration::from_secs(1);
const SERVICE: ServiceId = ServiceId(7);
const SLOT: Slot = Slot {
    service: SERVICE,
    number: 0,
};

fn id(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

fn spec(semantics: Semantics) -> Spec {
    Spec {
        service: SERVICE,
        version: 1,
        replicas: 1,
        semantics,
    }
}

fn keepers(epoch: u64, numbers: std::ops::RangeInclusive<u8>) -> Keepers {
    Keepers {
        epoch,
        nodes: numbers.map(id).collect(),
    }
}

fn keeper(number: u8, semantics: Semantics) -> Keeper {
    Keeper::new(
        id(number),
        Terms::default(),
        spec(semantics),
        keepers(1, 1..=3),
        BTreeMap::new(),
        NOW,
    )
}

fn outcome(node: u8, generation: u64) -> Outcome {
    Outcome {
        node: id(node),
        generation: Generation(generation),
        exit_code: 7,
    }
}

fn done(node: u8, generation: u64) -> ToKeeper {
    ToKeeper::Done {
        slot: SLOT,
        outcome: outcome(node, generation),
    }
}

fn ask(keeper: &mut Keeper, now: Duration, from: u8, generation: u64) -> Result<(), Denied> {
    let question = ToKeeper::Ask {
        number: 1,
        epoch: keeper.keepers().epoch,
        slot: SLOT,
        generation: Generation(generation),
    };
    match keeper.handle(now, id(from), question).unwrap() {
        FromKeeper::Granted { .. } => Ok(()),
        FromKeeper::Denied { why, .. } => Err(why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_slot_is_granted_to_one_node_until_its_grant_is_over() {
    let mut keeper = keeper(1, Semantics::Service);
    assert_eq!(ask(&mut keeper, NOW, 11, 1), Ok(()));
    assert_eq!(ask(&mut keeper, NOW, 12, 2), Err(Denied::Held));
    assert_eq!(ask(&mut keeper, NOW + 5 * SECOND, 11, 1), Ok(()));
    let kept = Terms::default().kept();
    let over = NOW + 5 * SECOND + kept;
    let before = over - Duration::from_millis(1);
    assert_eq!(ask(&mut keeper, before, 12, 2), Err(Denied::Held));
    assert_eq!(
        ask(&mut keeper, over, 12, 1),
        Err(Denied::Old(Generation(1)))
    );
    assert_eq!(ask(&mut keeper, over, 12, 2), Ok(()));
    assert_eq!(ask(&mut keeper, over, 11, 1), Err(Denied::Held));
}

#[test]
fn nobody_says_that_a_services_copy_is_done_or_lost() {
    let mut keeper = keeper(1, Semantics::Service);
    let generation = Generation(5);
    for question in [
        done(11, 5),
        ToKeeper::Lose {
            slot: SLOT,
            generation,
        },
    ] {
        assert_eq!(keeper.handle(NOW, id(11), question), None);
    }
    assert_eq!(ask(&mut keeper, NOW, 11, 1), Ok(()));
}

#[test]
fn a_keeper_that_restarts_holds_every_grant_for_fresh() {
    let mut keeper = keeper(1, Semantics::Service);
    ask(&mut keeper, NOW, 11, 1).unwrap();
    keeper.restarted(NOW + 9 * SECOND);
    assert_eq!(
        ask(&mut keeper, NOW + 18 * SECOND, 12, 2),
        Err(Denied::Held)
    );
    assert_eq!(ask(&mut keeper, NOW + 20 * SECOND, 12, 2), Ok(()));
}

#[test]
fn what_never_ran_may_be_given_to_another_at_once_and_what_ran_once_never() {
    let mut keeper = keeper(1, Semantics::AtMostOnce);
    let (slot, generation) = (SLOT, Generation(1));
    ask(&mut keeper, NOW, 11, 1).unwrap();
    keeper.handle(NOW, id(11), ToKeeper::Withdraw { slot, generation });
    assert_eq!(ask(&mut keeper, NOW, 12, 2), Ok(()));
    let later = NOW + 100 * SECOND;
    assert_eq!(ask(&mut keeper, later, 13, 3), Err(Denied::Closed));
    let generation = Generation(2);
    let noted = keeper.handle(later, id(1), ToKeeper::Lose { slot, generation });
    assert_eq!(noted, Some(FromKeeper::LostNoted(slot, generation)));
    assert_eq!(ask(&mut keeper, later, 12, 2), Err(Denied::Closed));
}

#[test]
fn a_task_that_has_a_lease_is_not_lost_and_one_that_is_done_is_not_begun() {
    let mut keeper = keeper(1, Semantics::AtLeastOnce);
    let (slot, generation) = (SLOT, Generation(1));
    ask(&mut keeper, NOW, 11, 1).unwrap();
    let lose = ToKeeper::Lose { slot, generation };
    assert_eq!(keeper.handle(NOW, id(1), lose), None);
    // Another node's word about it counts for nothing, and neither does an end under an earlier generation.
    assert_eq!(keeper.handle(NOW, id(12), done(11, 1)), None);
    let superseded = FromKeeper::Superseded(slot, generation);
    assert_eq!(keeper.handle(NOW, id(12), done(12, 1)), Some(superseded));
    // One that was never granted it here: that is for other keepers to say.
    assert_eq!(keeper.handle(NOW, id(12), done(12, 9)), None);
    assert_eq!(keeper.record(0).end(), None);
    let mut other = self::keeper(2, Semantics::AtLeastOnce);
    assert!(other.handle(NOW, id(1), done(11, 1)).is_some());
    assert_eq!(other.record(0).end(), Some(End::Done(outcome(11, 1))));
    let noted = FromKeeper::DoneNoted(slot, generation);
    assert_eq!(keeper.handle(NOW, id(11), done(11, 1)), Some(noted));
    assert_eq!(keeper.record(0).end(), Some(End::Done(outcome(11, 1))));
    let later = NOW + 100 * SECOND;
    assert_eq!(ask(&mut keeper, later, 12, 2), Err(Denied::Closed));
}

#[test]
fn an_end_of_an_earlier_attempt_does_not_take_the_place_of_a_later_ones() {
    let mut keeper = keeper(1, Semantics::AtLeastOnce);
    let (slot, generation) = (SLOT, Generation(1));
    ask(&mut keeper, NOW, 11, 1).unwrap();
    // What another keeper has noted of the attempt after it comes first.
    assert!(keeper.handle(NOW, id(1), done(12, 2)).is_some());
    let late = keeper.handle(NOW, id(11), done(11, 1));
    assert_eq!(late, Some(FromKeeper::Superseded(slot, generation)));
    assert_eq!(keeper.record(0).end(), Some(End::Done(outcome(12, 2))));
    assert_eq!(keeper.record(0).largest, Generation(2));
}

#[test]
fn what_was_reported_lost_is_done_after_all_where_its_holder_comes_back_and_never_begun() {
    let mut keeper = keeper(1, Semantics::AtMostOnce);
    let (slot, generation) = (SLOT, Generation(1));
    ask(&mut keeper, NOW, 11, 1).unwrap();
    let later = NOW + 100 * SECOND;
    let lose = ToKeeper::Lose { slot, generation };
    assert_eq!(
        keeper.handle(later, id(11), lose.clone()),
        None,
        "no keeper"
    );
    assert_eq!(keeper.record(0).end(), None);
    assert!(keeper.handle(later, id(1), lose.clone()).is_some());
    assert_eq!(keeper.record(0).end(), Some(End::Lost));
    assert!(keeper.handle(later, id(11), done(11, 1)).is_some());
    assert_eq!(keeper.record(0).end(), Some(End::Done(outcome(11, 1))));
    assert_eq!(keeper.handle(later, id(1), lose), None);
    assert_eq!(ask(&mut keeper, later, 11, 1), Err(Denied::Closed));
    assert_eq!(ask(&mut keeper, later, 12, 2), Err(Denied::Closed));
}

#[test]
fn an_end_is_kept_over_a_restart_and_by_those_that_take_over() {
    let mut keeper = keeper(1, Semantics::AtLeastOnce);
    ask(&mut keeper, NOW, 11, 1).unwrap();
    keeper.handle(NOW, id(11), done(11, 1)).unwrap();
    let file = serde_json::to_vec(&keeper.state()).unwrap();
    let state: KeeperState = serde_json::from_slice(&file).unwrap();
    let terms = Terms::default();
    let restored = Keeper::restored(state, terms, NOW);
    assert_eq!(restored.record(0).end(), Some(End::Done(outcome(11, 1))));
    let mut all = BTreeMap::from([(0, Record::default())]);
    let ToKeeper::Begin { records, .. } = restored.announcement() else {
        panic!("another announcement");
    };
    merge_records(&mut all, records);
    let spec = spec(Semantics::AtLeastOnce);
    let mut fresh = Keeper::new(id(4), terms, spec, keepers(2, 3..=5), all, NOW);
    let later = NOW + 100 * SECOND;
    assert_eq!(ask(&mut fresh, later, 12, 2), Err(Denied::Closed));
    // As a keeper of a service, or of before there were outcomes, has left it.
    let old = r#"{"largest":3,"held":null,"contested":false,"done":false,"lost":false}"#;
    let old: Record = serde_json::from_str(old).unwrap();
    assert_eq!((old.largest, old.end()), (Generation(3), None));
}

#[test]
fn an_end_counts_whoever_knows_it_and_a_loss_when_most_have_noted_it() {
    let keepers = keepers(1, 1..=3);
    let (first, second) = (End::Done(outcome(11, 1)), End::Done(outcome(12, 2)));
    assert_eq!(end_of(&keepers, []), None);
    assert_eq!(end_of(&keepers, [End::Lost]), None);
    assert_eq!(end_of(&keepers, [End::Lost, End::Lost]), Some(End::Lost));
    assert_eq!(end_of(&keepers, [End::Lost, first, End::Lost]), Some(first));
    assert_eq!(end_of(&keepers, [second, first]), Some(second));
}

/// Carries a holder's questions to the keepers that hear, and their answers back at once.
fn carry(
    holder: &mut Holder,
    now: Duration,
    keepers: &mut [Keeper],
    outputs: Vec<HolderOutput>,
) -> Vec<HolderOutput> {
    let mut rest = Vec::new();
    for output in outputs {
        match output {
            HolderOutput::Send(to, question) => {
                let keeper = keepers.iter_mut().find(|one| one.node() == to);
                let answer = keeper.and_then(|one| one.handle(now, id(11), question));
                if let Some(answer) = answer {
                    rest.extend(holder.handle(now, to, answer));
                }
            }
            other => rest.push(other),
        }
    }
    rest
}

fn holder() -> Holder {
    let terms = Terms::default();
    Holder::new(terms, SLOT, Generation(1), keepers(1, 1..=3), NOW)
}

#[test]
fn a_copy_starts_with_a_majority_and_stops_before_its_lease_is_over() {
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, Semantics::Service)).collect();
    let mut holder = holder();
    let outputs = holder.poll(NOW);
    assert_eq!(
        carry(&mut holder, NOW, &mut all[..2], outputs),
        [HolderOutput::Start]
    );
    let terms = Terms::default();
    assert_eq!(holder.valid_until(), Some(NOW + terms.held()));
    // One keeper alone renews: that is no majority.
    let mut now = NOW;
    loop {
        now = now.max(holder.wake_at());
        let outputs = holder.poll(now);
        let rest = carry(&mut holder, now, &mut all[..1], outputs);
        if rest == [HolderOutput::Stop] {
            break;
        }
        assert!(rest.is_empty(), "{rest:?}");
    }
    assert!(now + terms.stop_time <= NOW + terms.held());
    assert!(holder.is_over());
    // By then no majority has let go of it.
    assert!(all.iter().filter(|one| one.record(0).is_held(now)).count() >= 2);
}

#[test]
fn a_task_that_has_ended_is_said_to_be_until_most_have_noted_it_and_runs_nowhere_again() {
    let semantics = Semantics::AtLeastOnce;
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, semantics)).collect();
    let mut holder = holder();
    let outputs = holder.poll(NOW);
    carry(&mut holder, NOW, &mut all, outputs);
    // One hears of it, and the lease is long over when the others do.
    let outputs = holder.finish(NOW, id(11), 7);
    assert_eq!(carry(&mut holder, NOW, &mut all[..1], outputs), []);
    let late = NOW + 100 * SECOND;
    assert!(holder.wake_at() <= late);
    let outputs = holder.poll(late);
    assert_eq!(
        carry(&mut holder, late, &mut all[1..], outputs),
        [HolderOutput::Ended(true)]
    );
    for keeper in &mut all {
        let end = keeper.record(0).end();
        assert_eq!(end, Some(End::Done(outcome(11, 1))));
        assert_eq!(ask(keeper, late, 12, 2), Err(Denied::Closed));
    }
}

#[test]
fn a_node_that_starts_again_tells_how_a_task_has_ended_unless_it_was_given_to_others() {
    let semantics = Semantics::AtLeastOnce;
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, semantics)).collect();
    for keeper in &mut all {
        ask(keeper, NOW, 11, 1).unwrap();
    }
    let late = NOW + 100 * SECOND;
    let mut again = holder();
    let outputs = again.finish(late, id(11), 7);
    let mut told = all.clone();
    assert_eq!(
        carry(&mut again, late, &mut told, outputs),
        [HolderOutput::Ended(true)]
    );
    for keeper in &mut all {
        ask(keeper, late, 12, 2).unwrap();
    }
    let mut again = holder();
    let outputs = again.finish(late, id(11), 7);
    assert_eq!(
        carry(&mut again, late, &mut all, outputs),
        [HolderOutput::Ended(false)]
    );
    assert!(all.iter().all(|keeper| keeper.record(0).end().is_none()));
}

#[test]
fn a_copy_that_could_not_be_made_is_begun_elsewhere_though_it_is_to_run_at_most_once() {
    let semantics = Semantics::AtMostOnce;
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, semantics)).collect();
    let mut holder = holder();
    let outputs = holder.poll(NOW);
    carry(&mut holder, NOW, &mut all, outputs);
    let outputs = holder.never_ran();
    carry(&mut holder, NOW, &mut all, outputs);
    assert!(holder.is_over());
    assert_eq!(ask(&mut all[0], NOW, 12, 2), Ok(()));
}

#[test]
fn a_task_that_a_node_finds_when_it_starts_again_is_never_said_not_to_have_run() {
    let semantics = Semantics::AtMostOnce;
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, semantics)).collect();
    for keeper in &mut all {
        ask(keeper, NOW, 11, 1).unwrap();
    }
    let terms = Terms::default();
    let mut again = Holder::resumed(terms, SLOT, Generation(1), keepers(1, 1..=3), NOW);
    // Nobody answers until it gives up.
    again.poll(NOW);
    let late = NOW + terms.acquire;
    let outputs = again.poll(late);
    assert!(outputs.contains(&HolderOutput::Failed(Generation(1))));
    carry(&mut again, late, &mut all, outputs);
    for keeper in &mut all {
        assert_eq!(ask(keeper, late, 12, 2), Err(Denied::Closed));
    }
}

#[test]
fn a_task_that_nobody_can_take_waits_and_one_that_nobody_gets_a_lease_for_is_lost() {
    let keeper = keeper(1, Semantics::AtMostOnce);
    let mut overseer = Overseer::new(id(1), NOW);
    let mut now = NOW;
    let mut look = |failed: Generation| {
        now += 30 * SECOND;
        let mut actions = overseer.poll(now, &keeper, |_| true);
        actions.retain(|action| !matches!(action, Action::Send(_, ToKeeper::Begin { .. })));
        overseer.failed(SLOT, failed);
        actions
    };
    // No node has room for it, or none can make its machine: whichever, it was never begun.
    for round in 1..20 {
        let actions = look(Generation(0));
        let placed = |action: &Action| matches!(action, Action::Place { .. });
        assert!(
            actions.iter().all(placed) && !actions.is_empty(),
            "{round}: {actions:?}"
        );
    }
    // Others know of a grant that this keeper does not.
    let lost = (0..4).find_map(|_| {
        let actions = look(Generation(30));
        let lose = |action: &Action| matches!(action, Action::Send(_, ToKeeper::Lose { .. }));
        actions.iter().all(lose).then_some(actions.len())
    });
    assert_eq!(lost, Some(3));
}

#[test]
fn keepers_tell_each_other_of_an_end_until_all_have_heard() {
    let semantics = Semantics::AtMostOnce;
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, semantics)).collect();
    for keeper in &mut all {
        ask(keeper, NOW, 11, 1).unwrap();
    }
    // Only the last one has heard, which does not oversee.
    all[2].handle(NOW, id(11), done(11, 1)).unwrap();
    let mut overseer = Overseer::new(id(3), NOW);
    let mut now = NOW;
    for round in 0..3 {
        now = (now + 30 * SECOND).max(overseer.wake_at());
        let mut told = 0;
        for action in overseer.poll(now, &all[2], |_| true) {
            let Action::Send(to, question) = action else {
                panic!("{action:?}");
            };
            told += 1;
            // The first one is not reached at first.
            let place = usize::from(to == id(2));
            if place == 0 && round == 0 {
                continue;
            }
            let answer = all[place].handle(now, id(3), question).unwrap();
            overseer.handle(to, &answer, &keepers(1, 1..=3));
        }
        assert_eq!(told, [2, 1, 0][round]);
    }
    let ended = |keeper: &Keeper| keeper.record(0).end() == Some(End::Done(outcome(11, 1)));
    assert!(all.iter().all(ended));
}

#[test]
fn a_copy_without_a_majority_never_starts_and_says_so() {
    let mut all = [keeper(1, Semantics::Service)];
    let mut holder = holder();
    let mut now = NOW;
    loop {
        let outputs = holder.poll(now);
        let rest = carry(&mut holder, now, &mut all, outputs);
        if rest == [HolderOutput::Failed(Generation(1))] {
            break;
        }
        assert!(rest.is_empty(), "{rest:?}");
        now = holder.wake_at();
    }
    assert!(!all[0].record(0).was_granted());
}

#[test]
fn an_answer_counts_from_when_it_was_asked_for() {
    let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, Semantics::Service)).collect();
    let mut holder = holder();
    let outputs = holder.poll(NOW);
    // A second later, and nothing of that second is gained.
    carry(&mut holder, NOW + SECOND, &mut all, outputs);
    assert_eq!(holder.valid_until(), Some(NOW + Terms::default().held()));
}

/// Runs a change among keepers that hear; the others are dead.
fn run_change(change: &mut Change, now: Duration, all: &mut [Keeper]) -> Option<ToKeeper> {
    let mut todo = change.poll(now);
    let mut begun = None;
    while let Some(output) = todo.pop() {
        if let ChangeOutput::Send(to, question) = output {
            if matches!(question, ToKeeper::Begin { .. }) {
                begun = Some(question.clone());
            }
            let keeper = all.iter_mut().find(|one| one.node() == to);
            if let Some(answer) = keeper.and_then(|one| one.handle(now, id(1), question)) {
                todo.extend(change.handle(now, to, answer));
            }
        }
    }
    begun
}

#[test]
fn keepers_that_take_over_let_nobody_else_in_before_the_old_lease_is_over() {
    let mut old: Vec<Keeper> = (1..=3).map(|n| keeper(n, Semantics::Service)).collect();
    for one in &mut old {
        ask(one, NOW, 11, 1).unwrap();
    }
    // Keeper 3 is dead; 4 takes its place.
    let next = vec![id(1), id(2), id(4)];
    let mut change = Change::new(SERVICE, id(1), 1, keepers(1, 1..=3), next.clone(), NOW);
    let begin = run_change(&mut change, NOW, &mut old[..2]).unwrap();
    let ToKeeper::Begin {
        keepers: decided,
        spec,
        records,
    } = begin
    else {
        panic!("{begin:?}");
    };
    assert_eq!((decided.epoch, &decided.nodes), (2, &next));
    let mut fresh = Keeper::new(id(4), Terms::default(), spec, decided, records, NOW);
    assert_eq!(ask(&mut fresh, NOW + 9 * SECOND, 12, 2), Err(Denied::Held));
    assert_eq!(ask(&mut fresh, NOW + 9 * SECOND, 11, 1), Ok(()));
    assert_eq!(old[0].keepers().epoch, 2);
}

#[test]
fn a_sealed_keeper_grants_nothing_and_two_changes_end_in_the_same_keepers() {
    let mut old: Vec<Keeper> = (1..=3).map(|n| keeper(n, Semantics::Service)).collect();
    let present = keepers(1, 1..=3);
    // The first proposer dies when one keeper has sealed itself.
    let one = Keepers {
        epoch: 2,
        nodes: vec![id(1), id(2), id(4)],
    };
    let seal = ToKeeper::Seal {
        service: SERVICE,
        ballot: Ballot(1, id(1)),
        next: one.clone(),
    };
    old[1].handle(NOW, id(1), seal);
    assert_eq!(ask(&mut old[1], NOW, 11, 1), Err(Denied::Sealed));
    // The second wants others, meets that keeper, and finishes what was begun.
    let mut change = Change::new(SERVICE, id(2), 2, present, vec![id(1), id(2), id(5)], NOW);
    let begin = run_change(&mut change, NOW, &mut old[..2]).unwrap();
    assert!(matches!(begin, ToKeeper::Begin { keepers, .. } if keepers == one));
}

#[test]
fn of_two_holders_that_were_handed_over_nobody_renews() {
    let record = |node: u8, generation: u64| Record {
        largest: Generation(generation),
        held: Some((Generation(generation), id(node))),
        ..Record::default()
    };
    let mut all = BTreeMap::from([(0, record(11, 1))]);
    merge_records(&mut all, BTreeMap::from([(0, record(12, 2))]));
    let terms = Terms::default();
    let spec = spec(Semantics::Service);
    let mut fresh = Keeper::new(id(4), terms, spec, keepers(2, 3..=5), all, NOW);
    for (node, generation) in [(11, 1), (12, 2), (13, 3)] {
        assert_eq!(ask(&mut fresh, NOW, node, generation), Err(Denied::Held));
    }
    assert_eq!(ask(&mut fresh, NOW + terms.kept(), 13, 3), Ok(()));
}

#[test]
fn keepers_are_the_same_for_all_and_few_change_when_a_node_goes() {
    let all: Vec<NodeId> = (0..100).map(id).collect();
    let mut turned = all.clone();
    turned.reverse();
    let keepers = keepers_of(SERVICE, all.clone());
    assert_eq!(keepers, keepers_of(SERVICE, turned));
    assert_eq!(keepers.len(), KEEPERS);
    let without = all.into_iter().filter(|node| *node != keepers[0]);
    let after = keepers_of(SERVICE, without);
    assert_eq!(after[..KEEPERS - 1], keepers[1..]);
}

#[test]
fn keepers_that_went_at_different_times_are_replaced_together() {
    let keeper = Keeper::new(
        id(1),
        Terms::default(),
        spec(Semantics::Service),
        keepers(1, 1..=5),
        BTreeMap::new(),
        NOW,
    );
    let mut overseer = Overseer::new(id(1), NOW);
    let mut replaced = Vec::new();
    for half_seconds in 0..120u32 {
        let since = Duration::from_millis(500) * half_seconds;
        let lives = |node: NodeId| {
            let gone_after = match node {
                node if node == id(4) => 0,
                node if node == id(5) => 7,
                _ => 1000,
            };
            since < Duration::from_secs(gone_after)
        };
        for action in overseer.poll(NOW + since, &keeper, lives) {
            if let Action::Replace { away } = action {
                replaced.push((since.as_secs(), away));
            }
        }
    }
    let both = BTreeSet::from([id(4), id(5)]);
    assert_eq!(replaced[0].1, BTreeSet::from([id(4)]));
    // The second one as soon as it is its time, and then now and then.
    assert_eq!(replaced[1].1, both, "{replaced:?}");
    assert!(replaced[1].0 < 30, "{replaced:?}");
    assert!((3..5).contains(&replaced.len()), "{replaced:?}");
    assert!(replaced[2..].iter().all(|(_, away)| *away == both));
}

#[test]
fn keepers_are_odd_in_number_and_one_that_is_away_makes_them_so() {
    let nodes = |numbers: &[u8]| numbers.iter().copied().map(id).collect::<Vec<_>>();
    let sorted = |mut nodes: Vec<NodeId>| {
        nodes.sort_unstable();
        nodes
    };
    let choose = |present: &[u8], named: &[u8], away: &[u8]| {
        let (present, away) = (nodes(present), nodes(away));
        choose_keepers(SERVICE, &present, nodes(named), |node| {
            !away.contains(&node)
        })
    };
    // The living, and one that is away where they were even.
    assert_eq!(sorted(choose(&[], &[1, 2, 3], &[])), nodes(&[1, 2, 3]));
    assert_eq!(sorted(choose(&[], &[1, 2, 3], &[2])), nodes(&[1, 2, 3]));
    assert_eq!(choose(&[], &[1, 2, 3], &[2]).last(), Some(&id(2)));
    assert_eq!(choose(&[], &[1, 2, 3], &[2, 3]), nodes(&[1]));
    assert_eq!(choose(&[], &[1, 2], &[]).len(), 1);
    assert_eq!(choose(&[], &[1, 2, 3, 4], &[]).len(), 3);
    assert_eq!(choose(&[], &[1, 2, 3], &[1, 2, 3]), []);
    // Those that do it stay, in their order, as long as they are counted on; a spare one takes the place of one that is not.
    assert_eq!(choose(&[3, 1, 2], &[1, 2, 3, 4], &[]), nodes(&[3, 1, 2]));
    assert_eq!(choose(&[3, 1, 2], &[1, 2, 3, 4], &[1]), nodes(&[3, 2, 4]));
    assert_eq!(choose(&[3, 1, 2], &[1, 2, 3], &[1]), nodes(&[3, 2, 1]));
    assert_eq!(choose(&[3, 1, 2], &[1, 3], &[]), nodes(&[3]));
    // Two deaths of five: three are better than five of which two are away.
    assert_eq!(
        choose(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5], &[4, 5]),
        nodes(&[1, 2, 3])
    );
    assert_eq!(choose(&[1, 2, 3], &[1, 2, 3, 4, 5, 6], &[]).len(), KEEPERS);
}

proptest! {
    /// Three keepers, three nodes that ask whomever they like with whatever delay: a majority is never two nodes' at once.
    #[test]
    fn no_two_nodes_ever_hold_a_majority(
        steps in prop::collection::vec((0usize..3, 11u8..14, 0u64..5, 0u64..6000), 1..120),
    ) {
        let terms = Terms::default();
        let mut all: Vec<Keeper> = (1..=3).map(|n| keeper(n, Semantics::Service)).collect();
        let mut granted: BTreeMap<(u8, u64), BTreeMap<usize, Duration>> = BTreeMap::new();
        let mut now = NOW;
        for (which, node, generation, wait) in steps {
            now += Duration::from_millis(wait);
            if ask(&mut all[which], now, node, generation).is_ok() {
                granted.entry((node, generation)).or_default().insert(which, now + terms.held());
            }
            let holding = granted
                .values()
                .filter(|by| by.values().filter(|until| now < **until).count() >= 2);
            prop_assert!(holding.count() <= 1, "{granted:?}");
        }
    }
}
