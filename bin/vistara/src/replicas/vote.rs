//! Which answer enough nodes gave. Pure.

use std::str::FromStr;
use vistara_model::Digest;

/// Most nodes that one program is run on: each one's output is held in memory.
const NODES_MAX: usize = 16;

/// `M/N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quorum {
    /// So many must agree.
    pub(crate) agree: usize,
    /// Of so many.
    pub(crate) of: usize,
}

impl FromStr for Quorum {
    type Err = String;

    fn from_str(text: &str) -> Result<Quorum, String> {
        let parts = text.split_once('/');
        let numbers = parts.and_then(|(agree, of)| Some((agree.parse().ok()?, of.parse().ok()?)));
        let Some((agree, of)) = numbers else {
            return Err("write how many of how many, such as 2/3".to_owned());
        };
        if of > NODES_MAX {
            return Err(format!("at most {NODES_MAX} nodes are asked"));
        }
        if agree > of {
            return Err(format!("of {of} nodes {agree} cannot agree"));
        }
        if agree * 2 <= of {
            return Err(format!(
                "more than half must agree, or two answers could both count: of {of}, at least {}",
                of / 2 + 1
            ));
        }
        Ok(Quorum { agree, of })
    }
}

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The image that ran.
    pub(crate) image: Digest,
    pub(crate) exit_code: u8,
    /// Of standard output.
    pub(crate) stdout: Digest,
    pub(crate) stdout_bytes: usize,
    /// Standard error is in it too, as in a unikernel's. Not compared: it may be empty.
    pub(crate) merged: bool,
}

impl Answer {
    fn agrees(&self, other: &Answer) -> bool {
        (&self.image, self.exit_code, &self.stdout)
            == (&other.image, other.exit_code, &other.stdout)
    }
}

/// What a node gave.
#[derive(Debug, Clone)]
pub(crate) enum Gave<T> {
    /// An answer, and what belongs to it.
    Answer(Answer, T),
    /// None, and why.
    Nothing(String),
}

/// Whether an answer counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Enough gave this one.
    Agreed {
        /// The answer.
        answer: Answer,
        /// Who gave it.
        whose: Vec<usize>,
    },
    /// None did.
    Divided,
}

/// Who gave this answer.
fn same_as<T>(all: &[Gave<T>], answer: &Answer) -> Vec<usize> {
    let same = |gave: &Gave<T>| matches!(gave, Gave::Answer(other, _) if other.agrees(answer));
    (all.iter().enumerate())
        .filter(|(_, gave)| same(gave))
        .map(|(index, _)| index)
        .collect()
}

/// Whether an answer may still count when so many have given nothing yet.
pub(crate) fn may_agree<T>(all: &[Gave<T>], waiting: usize, quorum: Quorum) -> bool {
    let given = all.iter().map(|gave| match gave {
        Gave::Answer(answer, _) => same_as(all, answer).len(),
        Gave::Nothing(_) => 0,
    });
    given.max().unwrap_or(0) + waiting >= quorum.agree
}

/// Whether some ran as unikernels and some did not, so that their output may differ by what standard error was.
pub(crate) fn is_mixed<T>(all: &[Gave<T>]) -> bool {
    let merged = |wanted: bool| {
        all.iter()
            .any(|gave| matches!(gave, Gave::Answer(answer, _) if answer.merged == wanted))
    };
    merged(true) && merged(false)
}

/// Counts. More than half must agree ([`Quorum`]), so at most one answer counts.
pub(crate) fn count<T>(all: &[Gave<T>], quorum: Quorum) -> Outcome {
    for gave in all {
        let Gave::Answer(answer, _) = gave else {
            continue;
        };
        let whose = same_as(all, answer);
        if whose.len() >= quorum.agree {
            return Outcome::Agreed {
                answer: answer.clone(),
                whose,
            };
        }
    }
    Outcome::Divided
}

/// Who agreed, who differed and in what, who gave nothing and why.
pub(crate) fn words<'a, T>(
    all: &[Gave<T>],
    outcome: &Outcome,
    quorum: Quorum,
    name: &dyn Fn(usize) -> &'a str,
) -> Vec<String> {
    let mut lines = Vec::new();
    if let Outcome::Agreed { whose, .. } = outcome {
        let names: Vec<&str> = whose.iter().map(|index| name(*index)).collect();
        lines.push(format!(
            "{} of {} nodes agree: {}",
            whose.len(),
            quorum.of,
            names.join(", ")
        ));
    }
    for (index, gave) in all.iter().enumerate() {
        let name = name(index);
        match (gave, outcome) {
            (Gave::Nothing(why), _) => lines.push(format!("{name} gave no answer: {why}")),
            (Gave::Answer(..), Outcome::Agreed { whose, .. }) if whose.contains(&index) => {}
            (Gave::Answer(answer, _), Outcome::Agreed { answer: agreed, .. }) => {
                lines.push(format!("{name} differs: {}", difference(answer, agreed)));
            }
            (Gave::Answer(answer, _), Outcome::Divided) => lines.push(format!(
                "{name} answers: exit code {}, {} bytes of output, {}",
                answer.exit_code, answer.stdout_bytes, answer.stdout
            )),
        }
    }
    lines
}

fn difference(answer: &Answer, agreed: &Answer) -> String {
    let mut parts = Vec::new();
    if answer.image != agreed.image {
        parts.push(format!("it ran another image, {}", answer.image));
    }
    if answer.exit_code != agreed.exit_code {
        parts.push(format!(
            "exit code {} instead of {}",
            answer.exit_code, agreed.exit_code
        ));
    }
    if answer.stdout != agreed.stdout {
        parts.push(format!(
            "other output ({} bytes instead of {})",
            answer.stdout_bytes, agreed.stdout_bytes
        ));
        if answer.merged != agreed.merged {
            parts.push(match answer.merged {
                true => "it ran as a unikernel, whose standard error is part of that".to_owned(),
                false => {
                    "the others ran as unikernels, whose standard error is part of that".to_owned()
                }
            });
        }
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(image: u8, code: u8, out: u8) -> Gave<()> {
        let answer = Answer {
            image: Digest::from_sha256([image; 32]),
            exit_code: code,
            stdout: Digest::from_sha256([out; 32]),
            stdout_bytes: 1,
            merged: false,
        };
        Gave::Answer(answer, ())
    }

    fn whose(all: &[Gave<()>], text: &str) -> Option<Vec<usize>> {
        match count(all, text.parse().unwrap_or_else(|error| panic!("{error}"))) {
            Outcome::Agreed { whose, .. } => Some(whose),
            Outcome::Divided => None,
        }
    }

    #[test]
    fn a_quorum_is_more_than_half_of_a_few() {
        for (text, agree, of) in [
            ("2/3", 2, 3),
            ("1/1", 1, 1),
            ("16/16", 16, 16),
            ("3/4", 3, 4),
        ] {
            assert_eq!(text.parse(), Ok(Quorum { agree, of }));
        }
        for text in [
            "",
            "2",
            "/",
            "2/",
            "a/b",
            "0/0",
            "0/3",
            "1/2",
            "2/4",
            "3/2",
            "9/17",
            "-1/3",
            "2/3/4",
            "99999999999999999999999/3",
        ] {
            assert!(text.parse::<Quorum>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_answer_counts_once_enough_gave_the_very_same() {
        let (good, other) = (answer(1, 0, 7), answer(1, 0, 8));
        let nothing = || Gave::Nothing("late".to_owned());
        assert_eq!(
            whose(&[good.clone(), other.clone(), good.clone()], "2/3"),
            Some(vec![0, 2])
        );
        assert_eq!(
            whose(&[good.clone(), other.clone(), good.clone()], "3/3"),
            None
        );
        assert_eq!(
            whose(&[good.clone(), other.clone(), nothing()], "2/3"),
            None
        );
        assert_eq!(
            whose(&[nothing(), good.clone(), good.clone()], "2/3"),
            Some(vec![1, 2])
        );
        // The same output from another image, or with another code, is another answer.
        assert_eq!(whose(&[good.clone(), answer(2, 0, 7)], "2/2"), None);
        assert_eq!(whose(&[good, answer(1, 1, 7)], "2/2"), None);
    }

    #[test]
    fn nobody_is_waited_for_whose_answer_changes_nothing() {
        let (good, other) = (answer(1, 0, 7), answer(1, 0, 8));
        let nothing = || Gave::Nothing("it failed".to_owned());
        let quorum = Quorum { agree: 2, of: 3 };
        for (all, waiting, may) in [
            (vec![nothing(), nothing(), nothing()], 3, true),
            (vec![nothing(), nothing(), nothing()], 2, true),
            (vec![nothing(), nothing(), nothing()], 1, false),
            (vec![good.clone(), nothing(), nothing()], 1, true),
            (vec![good.clone(), nothing(), nothing()], 0, false),
            (vec![good.clone(), other.clone(), nothing()], 1, true),
            (vec![good.clone(), other, nothing()], 0, false),
            (vec![good.clone(), good, nothing()], 0, true),
        ] {
            assert_eq!(may_agree(&all, waiting, quorum), may, "{all:?} {waiting}");
        }
    }

    #[test]
    fn a_unikernels_other_output_is_told_with_why_it_may_be_so() {
        let merged = |gave: Gave<()>| match gave {
            Gave::Answer(answer, ()) => Gave::Answer(
                Answer {
                    merged: true,
                    ..answer
                },
                (),
            ),
            Gave::Nothing(why) => Gave::Nothing(why),
        };
        let good = || answer(1, 0, 7);
        // Where it printed the same it agrees.
        assert_eq!(whose(&[good(), merged(good())], "2/2"), Some(vec![0, 1]));
        let all = [good(), good(), merged(answer(1, 0, 8))];
        assert!(is_mixed(&all) && !is_mixed(&all[..2]));
        let quorum = Quorum { agree: 2, of: 3 };
        let lines = words(&all, &count(&all, quorum), quorum, &|_| "c");
        assert!(lines[1].contains("as a unikernel"), "{}", lines[1]);
    }

    #[test]
    fn whoever_differs_is_named_with_what_differs() {
        let all = [
            answer(1, 0, 7),
            answer(1, 3, 8),
            answer(1, 0, 7),
            Gave::Nothing("it is gone".to_owned()),
            answer(2, 0, 7),
            answer(1, 0, 7),
            answer(1, 0, 7),
        ];
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let quorum = Quorum { agree: 4, of: 7 };
        let outcome = count(&all, quorum);
        let lines = words(&all, &outcome, quorum, &|index| names[index]);
        assert_eq!(lines[0], "4 of 7 nodes agree: a, c, f, g");
        assert!(lines[1].starts_with("b differs: exit code 3 instead of 0, other output"));
        assert_eq!(lines[2], "d gave no answer: it is gone");
        assert!(lines[3].starts_with("e differs: it ran another image"));
        assert_eq!(lines.len(), 4);
        let quorum = Quorum { agree: 5, of: 7 };
        let outcome = count(&all, quorum);
        let lines = words(&all, &outcome, quorum, &|index| names[index]);
        assert_eq!(lines.len(), 7);
        assert!(lines[1].starts_with("b answers: exit code 3"));
    }
}
