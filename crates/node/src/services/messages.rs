//! What this node and others ask of each other about services, and what comes of the answers.

use super::{About, EVENTS_MAX, Event, Kind, Task, post, store};
use crate::fault::{Answer, Fault};
use std::sync::Arc;
use std::time::Duration;
use vistara_api::ErrorKind;
use vistara_control::services::ServiceId;
use vistara_control::services::wire::{self, FromNode, Status, ToNode};
use vistara_model::NodeId;

impl Task {
    /// Carries what this node has said to itself, until it has nothing more to say.
    pub(super) async fn say_to_itself(&mut self) {
        let Some(own) = self.own() else { return };
        // What it says makes it say more, a few times; the rest comes next.
        for _ in 0..EVENTS_MAX {
            let Some((service, about, body)) = self.inner.pop_front() else {
                return;
            };
            let Some(known) = self.known.get(&service) else {
                continue;
            };
            let request = wire::Request {
                service,
                version: known.document().version,
                document: None,
                body,
            };
            let answer = self.asked(own, request).await;
            let answer = answer.map_err(|fault| fault.0.message);
            self.answered(own, service, about, answer).await;
        }
    }

    /// Sends something to a node, this one included, that is named in the service's document.
    pub(super) fn send(&mut self, service: ServiceId, to: NodeId, about: About, body: ToNode) {
        if self.own() == Some(to) {
            self.inner.push_back((service, about, body));
            return;
        }
        let Some(known) = self.known.get(&service) else {
            return;
        };
        let request = wire::Request {
            service,
            version: known.document().version,
            document: None,
            body,
        };
        let (mesh, bytes) = (Arc::clone(&self.mesh), Arc::clone(&known.bytes));
        let events = self.events.clone();
        // Bounded by its own time limit; who asks asks again.
        tokio::spawn(async move {
            let answer = post::ask(&mesh, to, request, &bytes).await;
            let answered = Event::Answered {
                from: to,
                service,
                about,
                answer,
            };
            // The node may be leaving.
            let _ = events.send(answered).await;
        });
    }

    pub(super) async fn asked(
        &mut self,
        from: NodeId,
        request: wire::Request,
    ) -> Answer<wire::Answer> {
        let open = self.opened().await?;
        let service = request.service;
        if let Some(bytes) = &request.document {
            self.hear_document(&open, bytes).await?;
        }
        let Some(known) = self.known.get(&service) else {
            return Ok(wire::Answer {
                version: 0,
                document: None,
                body: FromNode::Unknown,
            });
        };
        let version = known.document().version;
        let mut answer = wire::Answer {
            version,
            document: (version > request.version).then(|| known.bytes.to_vec()),
            body: FromNode::Nothing,
        };
        if version < request.version {
            // Nothing is done on the strength of what is not the newest.
            answer.body = FromNode::Unknown;
            return Ok(answer);
        }
        if known.document().removed {
            // Its last document says so; as long as something of it is here, it has not quite been heard.
            if self.has_copies(service) {
                answer.version = version - 1;
            }
            return Ok(answer);
        }
        if !known.document().names(&from) {
            return Err(Fault::new(
                ErrorKind::Denied,
                "the service's owner does not name this node as one that may ask",
            ));
        }
        answer.body = match request.body {
            ToNode::Status => match Kind::of(known.document()) {
                Kind::Service => FromNode::Status(self.status(service)),
                Kind::Task => FromNode::Task {
                    ends: self.ends(known),
                    status: self.status(service),
                },
            },
            ToNode::Release { request } => {
                self.release(service, request);
                FromNode::Nothing
            }
            ToNode::NotRun {
                slot,
                generation,
                largest,
                why,
            } => {
                self.not_run(from, slot, generation, largest, why);
                FromNode::Nothing
            }
            body => match self.stands(service) {
                Err(fault) => FromNode::Refused(wire::words(&fault.0.message)),
                Ok(()) => match body {
                    ToNode::Describe => FromNode::Nothing,
                    ToNode::Keeper(question) => match self.kept(service, from, question).await? {
                        Some(answer) => FromNode::Keeper(answer),
                        None => FromNode::Nothing,
                    },
                    ToNode::Offer { request } => self.offer(service, request).await,
                    ToNode::Take { request } => self.take(service, request),
                    ToNode::Run {
                        request,
                        slot,
                        generation,
                        keepers,
                    } => {
                        self.run_slot(from, request, slot, generation, keepers)
                            .await?
                    }
                    ToNode::Status | ToNode::Release { .. } | ToNode::NotRun { .. } => {
                        FromNode::Nothing
                    }
                },
            },
        };
        Ok(answer)
    }

    pub(super) async fn answered(
        &mut self,
        from: NodeId,
        service: ServiceId,
        about: About,
        answer: Result<wire::Answer, String>,
    ) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(why) => {
                tracing::debug!(
                    node = from.short(),
                    service = store::text(service),
                    why,
                    "a node does not answer about a service"
                );
                return;
            }
        };
        if let (Some(bytes), Ok(open)) = (&answer.document, self.opened().await)
            && let Err(fault) = self.hear_document(&open, bytes).await
        {
            tracing::debug!(
                node = from.short(),
                error = fault.0.message,
                "a document is thrown away"
            );
        }
        let Some(known) = self.known.get_mut(&service) else {
            return;
        };
        // Who never took it, or has forgotten it altogether, keeps nothing of what is removed.
        let nothing_there = known.document().removed
            && matches!(answer.body, FromNode::Unknown)
            && answer.version == 0;
        let told = match nothing_there {
            true => known.document().version,
            false => answer.version,
        };
        known.told.insert(from, told);
        if known.document().removed {
            // This may have been the last one to hear of it.
            self.forget_due = Duration::ZERO;
        }
        match answer.body {
            FromNode::Keeper(answer) => self.heard_keeper(from, service, answer).await,
            FromNode::Status(status) => match about {
                About::Who => self.heard_who(from, service, status).await,
                About::Other | About::Begin | About::Document | About::Keeper | About::End => {}
            },
            FromNode::Task { status, ends } => match about {
                About::Who => self.heard_who(from, service, status).await,
                About::End => {
                    let end = ends.get(&0).copied();
                    self.heard_end(from, service, status, end).await;
                }
                About::Other | About::Begin | About::Document | About::Keeper => {}
            },
            FromNode::Refused(why) => match about {
                About::Keeper => {
                    known.refusing.insert(from);
                }
                About::Begin => {
                    tracing::warn!(node = from.short(), why, "a node does not keep a service");
                }
                About::Other | About::Document | About::Who | About::End => {}
            },
            FromNode::Nothing => match about {
                About::Keeper => {
                    known.refusing.remove(&from);
                }
                About::Begin => {
                    known.to_begin.remove(&from);
                }
                About::Other | About::Document | About::Who | About::End => {}
            },
            FromNode::Unknown | FromNode::Offered { .. } => {}
        }
    }

    /// How it stands here.
    pub(super) fn status(&self, service: ServiceId) -> Status {
        let Some(known) = self.known.get(&service) else {
            return Status::default();
        };
        Status {
            keeping: self.keeping(known),
            copies: self.shown_copies(known),
        }
    }
}
