//! What tasks have that services have not: keys, ends, and an owner's node that waits for the end and forgets the task some time
//! after it.
//!
//! Keepers note an end for good ([`vistara_control::services::End`]) and forget it with the owner's word alone: who forgot it by
//! itself might have the task run again.

use super::{About, Draft, Known, Task};
use crate::fault::{Answer, Fault, blocking};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vistara_control::services::wire::{Status, ToNode};
use vistara_control::services::{End, Keeper, ServiceId, end_of};
use vistara_mesh::service::{NAME_BYTES_MAX, ServiceDocument};
use vistara_model::NodeId;

/// How long the owner's node keeps a task that is over, with its key and what it printed.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Of those without a key of the owner's, so many: other nodes look after 64 services and tasks of one owner.
const UNNAMED_KEPT: usize = 32;
/// How often the owner's node asks how its tasks have ended, and how often of those that are lost: their node may come back.
const ASK_EVERY: Duration = Duration::from_secs(5);
const ASK_LOST_EVERY: Duration = Duration::from_secs(60);
/// What the program finds in its environment.
const KEY_VARIABLE: &str = "VISTARA_TASK_KEY";
const ATTEMPT_VARIABLE: &str = "VISTARA_TASK_ATTEMPT";

/// How a task of this owner has ended, and since when that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settled {
    /// How.
    pub(crate) end: End,
    /// Seconds since 1970.
    pub(crate) heard_s: u64,
}

/// What the program is told of its task, whatever was in its environment under these names.
pub(super) fn tell_program(env: &mut Vec<String>, key: &str, attempt: u64) {
    for (name, value) in [
        (KEY_VARIABLE, key.to_owned()),
        (ATTEMPT_VARIABLE, attempt.to_string()),
    ] {
        env.retain(|line| line.split('=').next() != Some(name));
        env.push(format!("{name}={value}"));
    }
}

/// A name for a task that was given none, of at most as many letters as one has.
pub(super) fn made_up(called: &str, id: &str) -> String {
    let id = &id[..id.len().min(6)];
    let room = NAME_BYTES_MAX - id.len() - 1;
    let called = called.get(..room).unwrap_or(called).trim_matches('-');
    match called {
        "" => format!("task-{id}"),
        called => format!("{called}-{id}"),
    }
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Whether it is the task that is asked for: what its program is and gets, not where it runs.
fn is_asked(document: &ServiceDocument, draft: &Draft) -> bool {
    let semantics = |task: &vistara_mesh::service::Task| task.semantics;
    document.task.as_ref().map(semantics) == draft.task.as_ref().map(|task| task.semantics)
        && document.image == draft.image
        && document.request == draft.request
        && draft
            .name
            .as_ref()
            .is_none_or(|name| *name == document.name)
}

/// Which of an owner's ended tasks are to be forgotten: `(service, whether its key was chosen, since when it is over)`.
fn outdated(mut over: Vec<(ServiceId, bool, u64)>, now_s: u64) -> Vec<ServiceId> {
    // The newest first.
    over.sort_by_key(|(service, _, heard)| (std::cmp::Reverse(*heard), *service));
    let mut unnamed = 0;
    let mut outdated = Vec::new();
    for (service, chosen, heard) in over {
        unnamed += usize::from(!chosen);
        let beyond = !chosen && unnamed > UNNAMED_KEPT;
        // A clock that was set back makes none old.
        if beyond || now_s.saturating_sub(heard) > KEPT.as_secs() {
            outdated.push(service);
        }
    }
    outdated
}

impl Task {
    /// The owner's task of the key that is asked for, where there is one already.
    pub(super) fn known_by_key(&self, own: NodeId, draft: &Draft) -> Answer<Option<ServiceId>> {
        let Some(key) = draft.task.as_ref().and_then(|task| task.key.as_ref()) else {
            return Ok(None);
        };
        let of_key = |known: &&Known| {
            let document = known.document();
            let same = document.task.as_ref().is_some_and(|task| task.key == *key);
            same && document.owner == own && !document.removed
        };
        match self.known.values().find(of_key) {
            Some(known) if is_asked(known.document(), draft) => Ok(Some(known.id())),
            Some(known) => Err(Fault::conflict(format!(
                "the key {key:?} is that of the task {}, which is another: its image, command, options, semantics or name differ",
                known.document().name
            ))
            .hint("take another key, or forget that task: vistara task rm NAME")),
            None => Ok(None),
        }
    }

    /// What this node, as a keeper, has noted as over.
    pub(super) fn ends(&self, known: &Known) -> std::collections::BTreeMap<u32, End> {
        let keeper = known.keeper.as_ref().filter(|keeper| keeper.is_active());
        let of = |keeper: &Keeper| {
            (0..keeper.spec().replicas)
                .filter_map(|number| Some((number, keeper.record(number).end()?)))
                .collect()
        };
        keeper.map(of).unwrap_or_default()
    }

    /// The owner's node asks the keepers how a task has ended, until it knows.
    pub(super) async fn wait_for_end(&mut self, service: ServiceId, now: Duration) {
        let Some(own) = self.own() else { return };
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        let document = known.sealed.document();
        let waits = document.task.is_some() && document.owner == own && !document.removed;
        let done = matches!(
            &known.settled,
            Some(Settled {
                end: End::Done(_),
                ..
            })
        );
        if !waits || done || now < known.next_end {
            return;
        }
        known.next_end = now
            + match known.settled {
                Some(_) => ASK_LOST_EVERY,
                None => ASK_EVERY,
            };
        let keepers = known.keepers.clone();
        for node in keepers.into_iter().flat_map(|keepers| keepers.nodes) {
            if node != own && self.lives(node) {
                self.send(service, node, About::End, ToNode::Status);
            }
        }
        self.settle(service).await;
    }

    /// A keeper has said how a task has ended, as far as it knows.
    pub(super) async fn heard_end(
        &mut self,
        from: NodeId,
        service: ServiceId,
        status: Status,
        end: Option<End>,
    ) {
        self.heard_who(from, service, status).await;
        if let Some(known) = self.known.get_mut(&service) {
            match end {
                Some(end) => known.noted.insert(from, end),
                None => known.noted.remove(&from),
            };
        }
        self.settle(service).await;
    }

    /// Writes down how a task of this owner has ended, once that is known.
    async fn settle(&mut self, service: ServiceId) {
        let (Some(own), Some(known)) = (self.own(), self.known.get(&service)) else {
            return;
        };
        let Some(keepers) = known.keepers.as_ref() else {
            return;
        };
        let others = (known.noted.iter()).filter(|(node, _)| keepers.nodes.contains(node));
        let noted = others
            .map(|(_, end)| *end)
            .chain(self.ends(known).get(&0).copied());
        let Some(end) = end_of(keepers, noted) else {
            return;
        };
        let document = known.document();
        if known.settled.is_some_and(|settled| settled.end == end)
            || document.owner != own
            || document.removed
        {
            return;
        }
        let settled = Settled {
            end,
            heard_s: now_s(),
        };
        tracing::info!(
            service = super::id_text(service),
            name = document.name,
            ?end,
            "a task is over"
        );
        let store = self.store.clone();
        let stored = blocking(move || store.put_end(service, &settled)).await;
        match stored {
            Ok(Ok(())) => {
                if let Some(known) = self.known.get_mut(&service) {
                    known.settled = Some(settled);
                }
            }
            // Keepers know; it is asked for again.
            Ok(Err(error)) => {
                tracing::warn!(%error, "how a task has ended could not be written down");
            }
            Err(fault) => {
                tracing::warn!(
                    error = fault.0.message,
                    "how a task has ended could not be written down"
                );
            }
        }
    }

    /// Removes the owner's tasks that were over long ago, or were too many.
    pub(super) async fn forget_tasks(&mut self) {
        let Some(own) = self.own() else { return };
        let over = self.known.values().filter_map(|known| {
            let document = known.document();
            let task = document.task.as_ref()?;
            let mine = document.owner == own && !document.removed;
            let chosen = task.key != super::id_text(known.id());
            Some((known.id(), chosen, known.settled.filter(|_| mine)?.heard_s))
        });
        for service in outdated(over.collect(), now_s()) {
            if let Err(fault) = self.remove_one(service).await {
                tracing::warn!(
                    service = super::id_text(service),
                    error = fault.0.message,
                    "an old task stays"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn ended_tasks_are_forgotten_after_a_day_and_beyond_their_number_unless_somebody_chose_the_key()
    {
        let day = KEPT.as_secs();
        let over = |service: u128, chosen, heard| (ServiceId(service), chosen, heard);
        let two = || vec![over(1, true, 1000), over(2, false, 1000)];
        assert_eq!(outdated(two(), 1000 + day), []);
        assert_eq!(outdated(two(), 1001 + day), [ServiceId(1), ServiceId(2)]);
        assert_eq!(outdated(two(), 1), [], "a clock that was set back");
        let many = u64::try_from(UNNAMED_KEPT).unwrap_or(0);
        let mut all: Vec<_> = (0..=many)
            .map(|number| over(u128::from(number), false, 5000 + number))
            .collect();
        all.extend((1..100).map(|number| over(1000 + number, true, 4000)));
        assert_eq!(outdated(all, 6000), [ServiceId(0)], "the oldest one");
    }

    #[test]
    fn a_made_up_name_is_one_whatever_the_image_is_called() {
        for (called, name) in [
            ("web", "web-5e2f9c"),
            ("", "task-5e2f9c"),
            ("--", "task-5e2f9c"),
            ("-a-", "a-5e2f9c"),
        ] {
            assert_eq!(made_up(called, "5e2f9c0a71b3"), name);
        }
        assert_eq!(
            made_up(&"a".repeat(99), "5e2f9c0a71b3").len(),
            NAME_BYTES_MAX
        );
    }

    #[test]
    fn a_program_is_told_its_key_and_attempt_whatever_was_said_before() {
        let mut env = vec![
            "VISTARA_TASK_KEY=other".to_owned(),
            "VISTARA_TASK_KEYS=kept".to_owned(),
        ];
        tell_program(&mut env, "a=b", 3);
        assert_eq!(
            env,
            [
                "VISTARA_TASK_KEYS=kept",
                "VISTARA_TASK_KEY=a=b",
                "VISTARA_TASK_ATTEMPT=3"
            ]
        );
    }
}
