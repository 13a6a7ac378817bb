//! What nodes that look after a service say to each other, as bytes. Reading is bounded and total.
//!
//! A message is one byte, the [`FORMAT`], and the rest in postcard. Each names the version of the service's document that its
//! sender has; who lacks that says so, or gets it along. What stands here is nobody's signed word: the connection proves who
//! sent it, and the document, which its owner has signed, says what that one may.

use super::{End, FromKeeper, KEEPERS, Keepers, REPLICAS_MAX, Record, ServiceId, Slot, ToKeeper};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vistara_model::{Generation, NodeId};

/// Version of the form.
pub const FORMAT: u8 = 1;
/// Longest message: a document, and the records of as many slots as a service may have.
pub const MESSAGE_BYTES_MAX: usize = 512 << 10;
/// Epochs and generations are below this: far more than are ever counted, and whoever says one cannot have another node's
/// count overflow.
pub const NUMBER_END: u64 = 1 << 48;
/// Longest reason in words, in bytes.
pub const WORDS_MAX: usize = 1000;

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It is longer than any.
    #[error("it is longer than any message: {0} bytes")]
    Length(usize),
    /// Its form is another.
    #[error("its form is {0:?}, and this version reads {FORMAT}")]
    Format(Option<u8>),
    /// It is none.
    #[error("it is no message")]
    Malformed,
}

/// What is asked of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Of which service.
    pub service: ServiceId,
    /// The version of its document that the asker has.
    pub version: u64,
    /// That document, sealed; where the asked does not have it.
    pub document: Option<Vec<u8>>,
    /// What.
    pub body: ToNode,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNode {
    /// Of a keeper.
    Keeper(ToKeeper),
    /// A place for one copy, held for a while.
    Offer {
        /// The search's number.
        request: u128,
    },
    /// The offer is taken.
    Take {
        /// The search's number.
        request: u128,
    },
    /// The offer is not wanted.
    Release {
        /// The search's number.
        request: u128,
    },
    /// Hold this slot, in the place that was taken.
    Run {
        /// The search's number.
        request: u128,
        /// Which copy.
        slot: Slot,
        /// Under which generation.
        generation: Generation,
        /// Who grants it; the asker is one of them.
        keepers: Keepers,
    },
    /// The slot that you have given me is not held here.
    NotRun {
        /// Which.
        slot: Slot,
        /// Under which generation it was tried.
        generation: Generation,
        /// The largest generation that was seen; none (zero) where there was a lease to be had, and it was not used.
        largest: Generation,
        /// Why, in words.
        why: String,
    },
    /// Nothing: the document is what matters.
    Describe,
    /// How it stands with the service there.
    Status,
}

/// What a node answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The version of the document that the asked has; zero where it has none.
    pub version: u64,
    /// That document, sealed; where it is newer than the asker's.
    pub document: Option<Vec<u8>>,
    /// What.
    pub body: FromNode,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromNode {
    /// A keeper's.
    Keeper(FromKeeper),
    /// It is done, or there is nothing to say.
    Nothing,
    /// The document is not known here.
    Unknown,
    /// No, for this reason.
    Refused(String),
    /// A place is held.
    Offered {
        /// For how long.
        ttl_ms: u64,
        /// Memory that is free beside it.
        memory: u64,
        /// Machines that are free beside it.
        machines: u32,
        /// What it costs.
        price_micros: u64,
    },
    /// How it stands.
    Status(Status),
    /// How it stands with a task: as with a service, and what has ended of it. What is said of services is as it was before
    /// there were tasks.
    Task {
        /// As of a service.
        status: Status,
        /// The slots that the asked, as a keeper, has noted as over.
        ends: BTreeMap<u32, End>,
    },
}

/// How it stands with a service on one node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Status {
    /// What it knows as a keeper.
    pub keeping: Option<Keeping>,
    /// The copies that it holds.
    pub copies: Vec<Copy>,
}

/// What a keeper knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeping {
    /// With whom it keeps.
    pub keepers: Keepers,
    /// Each slot: its number, the largest generation, who has it now, and why nobody does.
    pub slots: Vec<SlotState>,
}

/// A slot, as a keeper knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// Which.
    pub number: u32,
    /// The largest generation that was granted.
    pub generation: Generation,
    /// Who has it now.
    pub holder: Option<NodeId>,
    /// What is in the way.
    pub trouble: Option<String>,
}

/// A copy on the node that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Which.
    pub number: u32,
    /// Under which generation.
    pub generation: Generation,
    /// Its machine there, by id.
    pub machine: Option<String>,
    /// How it is, in a word.
    pub state: String,
    /// How often its program was started again.
    pub restarts: u32,
    /// What troubles it.
    pub trouble: Option<String>,
}

/// Cuts words to what a message may carry.
pub fn words(text: &str) -> String {
    let mut end = text.len().min(WORDS_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let bytes = postcard::to_extend(value, vec![FORMAT]).map_err(|_| WireError::Malformed)?;
    match bytes.len() {
        length if length > MESSAGE_BYTES_MAX => Err(WireError::Length(length)),
        _ => Ok(bytes),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(WireError::Length(bytes.len()));
    }
    match bytes.split_first() {
        Some((&FORMAT, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            Ok(_) | Err(_) => Err(WireError::Malformed),
        },
        other => Err(WireError::Format(other.map(|(format, _)| *format))),
    }
}

fn checked(holds: bool) -> Result<(), WireError> {
    if holds {
        Ok(())
    } else {
        Err(WireError::Malformed)
    }
}

fn is_generation(generation: &Generation) -> bool {
    generation.0 < NUMBER_END
}

fn are_records(records: &BTreeMap<u32, Record>) -> bool {
    records.iter().all(|(number, record)| {
        let held = record.held.as_ref();
        *number < REPLICAS_MAX
            && is_generation(&record.largest)
            && held.is_none_or(|(generation, _)| is_generation(generation))
            && (record.outcome.as_ref()).is_none_or(|one| is_generation(&one.generation))
    })
}

fn are_ends(ends: &BTreeMap<u32, End>) -> bool {
    ends.iter().all(|(number, end)| {
        *number < REPLICAS_MAX
            && match end {
                End::Done(outcome) => is_generation(&outcome.generation),
                End::Lost => true,
            }
    })
}

fn is_status(status: &Status) -> bool {
    let short = |text: &String| text.len() <= WORDS_MAX;
    let most = REPLICAS_MAX as usize;
    status.copies.len() <= most
        && (status.copies.iter()).all(|copy| {
            short(&copy.state)
                && [&copy.machine, &copy.trouble]
                    .into_iter()
                    .flatten()
                    .all(short)
        })
        && (status.keeping.as_ref()).is_none_or(|keeping| {
            are_keepers(&keeping.keepers)
                && keeping.slots.len() <= most
                && (keeping.slots.iter()).all(|slot| slot.trouble.as_ref().is_none_or(short))
        })
}

/// As many nodes as may keep, none of them twice.
fn are_keepers(keepers: &Keepers) -> bool {
    let nodes = &keepers.nodes;
    keepers.epoch < NUMBER_END
        && (1..=KEEPERS).contains(&nodes.len())
        && (nodes.iter().enumerate()).all(|(place, node)| !nodes[..place].contains(node))
}

fn is_question(question: &ToKeeper) -> bool {
    match question {
        ToKeeper::Ask {
            epoch,
            slot,
            generation,
            ..
        } => slot.number < REPLICAS_MAX && is_generation(generation) && *epoch < NUMBER_END,
        ToKeeper::Withdraw { slot, generation }
        | ToKeeper::Released { slot, generation }
        | ToKeeper::Lose { slot, generation } => {
            slot.number < REPLICAS_MAX && is_generation(generation)
        }
        ToKeeper::Done { slot, outcome } => {
            slot.number < REPLICAS_MAX && is_generation(&outcome.generation)
        }
        ToKeeper::Prepare { epoch, .. } => *epoch < NUMBER_END,
        ToKeeper::Seal { next, .. } => are_keepers(next),
        ToKeeper::Begin {
            keepers,
            spec,
            records,
        } => are_keepers(keepers) && spec.replicas <= REPLICAS_MAX && are_records(records),
    }
}

fn is_answer(answer: &FromKeeper) -> bool {
    use super::Denied;
    match answer {
        FromKeeper::Denied {
            generation, why, ..
        } => {
            is_generation(generation)
                && match why {
                    Denied::Moved(keepers) => are_keepers(keepers),
                    Denied::Old(largest) => is_generation(largest),
                    Denied::Held | Denied::Closed | Denied::Sealed => true,
                }
        }
        FromKeeper::Granted { generation, .. }
        | FromKeeper::DoneNoted(_, generation)
        | FromKeeper::LostNoted(_, generation)
        | FromKeeper::Superseded(_, generation) => is_generation(generation),
        FromKeeper::Promised { before, .. } => {
            (before.as_ref()).is_none_or(|(_, keepers)| are_keepers(keepers))
        }
        FromKeeper::Sealed { spec, records, .. } => {
            spec.replicas <= REPLICAS_MAX && are_records(records)
        }
    }
}

impl Request {
    /// Its bytes.
    ///
    /// # Errors
    /// [`WireError::Length`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        encode(self)
    }

    /// Reads one, whoever sent it.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Request, WireError> {
        let request: Request = decode(bytes)?;
        let (slot, good) = match &request.body {
            ToNode::Keeper(question) => {
                checked(question.service() == request.service)?;
                (None, is_question(question))
            }
            ToNode::Run {
                slot,
                generation,
                keepers,
                ..
            } => (
                Some(slot),
                are_keepers(keepers) && is_generation(generation),
            ),
            ToNode::NotRun {
                slot,
                generation,
                largest,
                why,
            } => {
                let numbers = is_generation(generation) && is_generation(largest);
                (Some(slot), numbers && why.len() <= WORDS_MAX)
            }
            ToNode::Offer { .. }
            | ToNode::Take { .. }
            | ToNode::Release { .. }
            | ToNode::Describe
            | ToNode::Status => (None, true),
        };
        let of_it = |slot: &Slot| slot.service == request.service && slot.number < REPLICAS_MAX;
        checked(good && slot.is_none_or(of_it))?;
        Ok(request)
    }
}

impl Answer {
    /// Its bytes.
    ///
    /// # Errors
    /// [`WireError::Length`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        encode(self)
    }

    /// Reads one, whoever sent it.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Answer, WireError> {
        let answer: Answer = decode(bytes)?;
        checked(match &answer.body {
            FromNode::Keeper(answer) => is_answer(answer),
            FromNode::Refused(why) => why.len() <= WORDS_MAX,
            FromNode::Status(status) => is_status(status),
            FromNode::Task { status, ends } => is_status(status) && are_ends(ends),
            FromNode::Nothing | FromNode::Unknown | FromNode::Offered { .. } => true,
        })?;
        Ok(answer)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Ballot, Denied, Outcome, Semantics, Spec};
    use super::*;
    use proptest::prelude::*;

    const SERVICE: ServiceId = ServiceId(u128::MAX);

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    fn keepers() -> Keepers {
        Keepers {
            epoch: NUMBER_END - 1,
            nodes: (0..KEEPERS as u8).map(id).collect(),
        }
    }

    fn begin(slots: u32) -> Request {
        let record = Record {
            largest: Generation(NUMBER_END - 1),
            held: Some((Generation(NUMBER_END - 1), id(9))),
            ..Record::default()
        };
        Request {
            service: SERVICE,
            version: u64::MAX,
            document: Some(vec![255; 128 << 10]),
            body: ToNode::Keeper(ToKeeper::Begin {
                keepers: keepers(),
                spec: Spec {
                    service: SERVICE,
                    version: u64::MAX,
                    replicas: REPLICAS_MAX,
                    semantics: Semantics::Service,
                },
                records: (0..slots)
                    .map(|number| (number, record))
                    .collect::<BTreeMap<_, _>>(),
            }),
        }
    }

    #[test]
    fn the_longest_message_is_read_as_it_was_written() {
        let request = begin(REPLICAS_MAX);
        let bytes = request.encode().unwrap();
        assert_eq!(Request::decode(&bytes).unwrap(), request);
        assert!(Request::decode(&bytes[..bytes.len() - 1]).is_err());
        let mut more = bytes.clone();
        more.push(0);
        assert_eq!(Request::decode(&more), Err(WireError::Malformed));
        let mut other = bytes;
        other[0] = FORMAT + 1;
        assert_eq!(
            Request::decode(&other),
            Err(WireError::Format(Some(FORMAT + 1)))
        );
        let long = vec![FORMAT; MESSAGE_BYTES_MAX + 1];
        assert_eq!(Request::decode(&long), Err(WireError::Length(long.len())));
        assert_eq!(Request::decode(&[]), Err(WireError::Format(None)));
    }

    #[test]
    fn what_no_keeper_may_say_is_no_message() {
        assert!(Request::decode(&begin(REPLICAS_MAX + 1).encode().unwrap()).is_err());
        let mut of_another = begin(1);
        of_another.service = ServiceId(1);
        assert!(Request::decode(&of_another.encode().unwrap()).is_err());
        let mut twice = keepers();
        twice.nodes[1] = twice.nodes[0];
        let none = Keepers {
            epoch: 1,
            nodes: Vec::new(),
        };
        let slot = Slot {
            service: SERVICE,
            number: 0,
        };
        for keepers in [twice, none] {
            let denied = Answer {
                version: 1,
                document: None,
                body: FromNode::Keeper(FromKeeper::Denied {
                    slot,
                    generation: Generation(1),
                    why: Denied::Moved(keepers.clone()),
                }),
            };
            assert!(Answer::decode(&denied.encode().unwrap()).is_err());
            let seal = Request {
                service: SERVICE,
                version: 1,
                document: None,
                body: ToNode::Keeper(ToKeeper::Seal {
                    service: SERVICE,
                    ballot: Ballot(1, id(1)),
                    next: keepers,
                }),
            };
            assert!(Request::decode(&seal.encode().unwrap()).is_err());
        }
    }

    #[test]
    fn numbers_that_could_overflow_are_no_message() {
        let slot = Slot {
            service: SERVICE,
            number: 0,
        };
        let end = Generation(NUMBER_END);
        let mut later = keepers();
        later.epoch = NUMBER_END;
        let ask = |epoch, generation| {
            ToNode::Keeper(ToKeeper::Ask {
                number: u64::MAX,
                epoch,
                slot,
                generation,
            })
        };
        let not_run = |generation, largest| ToNode::NotRun {
            slot,
            generation,
            largest,
            why: String::new(),
        };
        let run = |generation, keepers| ToNode::Run {
            request: 1,
            slot,
            generation,
            keepers,
        };
        let said = |body| {
            let request = Request {
                service: SERVICE,
                version: 1,
                document: None,
                body,
            };
            Request::decode(&request.encode().unwrap()).is_ok()
        };
        let good = Generation(NUMBER_END - 1);
        assert!(said(ask(good.0, good)) && said(not_run(good, good)) && said(run(good, keepers())));
        for bad in [
            ask(end.0, good),
            ask(good.0, end),
            not_run(end, good),
            not_run(good, end),
            run(end, keepers()),
            run(good, later.clone()),
            ToNode::Keeper(ToKeeper::Prepare {
                service: SERVICE,
                epoch: end.0,
                ballot: Ballot(1, id(1)),
            }),
        ] {
            assert!(!said(bad.clone()), "{bad:?}");
        }
        for why in [Denied::Old(end), Denied::Moved(later)] {
            let denied = Answer {
                version: 1,
                document: None,
                body: FromNode::Keeper(FromKeeper::Denied {
                    slot,
                    generation: good,
                    why,
                }),
            };
            assert!(Answer::decode(&denied.encode().unwrap()).is_err());
        }
        let mut begun = begin(1);
        if let ToNode::Keeper(ToKeeper::Begin { records, .. }) = &mut begun.body {
            records.get_mut(&0).unwrap().largest = end;
        }
        assert!(Request::decode(&begun.encode().unwrap()).is_err());
    }

    #[test]
    fn what_is_said_of_services_has_the_bytes_of_before_there_were_outcomes() {
        let held = Some((Generation(7), id(9)));
        let record = Record {
            largest: Generation(8),
            held,
            ..Record::default()
        };
        // Largest generation, holder, contested, done, lost.
        let before = (Generation(8), held, false, false, false);
        let bytes = postcard::to_stdvec(&record).unwrap();
        assert_eq!(bytes, postcard::to_stdvec(&before).unwrap());
        assert_eq!(postcard::from_bytes::<Record>(&bytes).unwrap(), record);
    }

    #[test]
    fn a_tasks_status_is_read_as_it_was_written_and_within_bounds() {
        let outcome = |generation| Outcome {
            node: id(3),
            generation: Generation(generation),
            exit_code: 255,
        };
        let answer = |number, end| Answer {
            version: 1,
            document: None,
            body: FromNode::Task {
                status: Status::default(),
                ends: BTreeMap::from([(number, end)]),
            },
        };
        for good in [
            answer(0, End::Lost),
            answer(0, End::Done(outcome(NUMBER_END - 1))),
        ] {
            assert_eq!(Answer::decode(&good.encode().unwrap()).unwrap(), good);
        }
        for bad in [
            answer(REPLICAS_MAX, End::Lost),
            answer(0, End::Done(outcome(NUMBER_END))),
        ] {
            assert!(Answer::decode(&bad.encode().unwrap()).is_err());
        }
        let slot = Slot {
            service: SERVICE,
            number: 0,
        };
        let done = |generation| Request {
            service: SERVICE,
            version: 1,
            document: None,
            body: ToNode::Keeper(ToKeeper::Done {
                slot,
                outcome: outcome(generation),
            }),
        };
        assert!(Request::decode(&done(NUMBER_END - 1).encode().unwrap()).is_ok());
        assert!(Request::decode(&done(NUMBER_END).encode().unwrap()).is_err());
    }

    #[test]
    fn words_are_cut_between_letters() {
        assert_eq!(words("short"), "short");
        assert!(words(&"é".repeat(WORDS_MAX)).len() <= WORDS_MAX);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), format in any::<bool>()) {
            if let (true, Some(first)) = (format, bytes.first_mut()) {
                *first = FORMAT;
            }
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(Request::decode(&request.encode().unwrap()).unwrap(), request);
            }
            let _ = Answer::decode(&bytes);
        }
    }
}
