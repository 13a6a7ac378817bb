//! Tasks over the interface: a program that is run to its end, found again by its key.

use super::App;
use super::services::{Heard, all_named, begun, copy, draft, gather, named, one, removed};
use crate::fault::{Answer, Fault};
use crate::services::{DraftTask, Kind, Shown, id_text};
use axum::Json;
use axum::extract::{Path, State};
use vistara_api::{
    CreateServiceRequest, CreateTaskRequest, ErrorBody, ServiceNode, Task, TaskSemantics, TaskState,
};
use vistara_control::services::{End, ServiceId, end_of};
use vistara_mesh::service;
use vistara_model::MachineState;

/// Has a program run to its end on one of several nodes. Answers once most of those that look after it know of it; where there is a
/// task of its key, with that one.
#[utoipa::path(
    post,
    path = "/v1/tasks",
    request_body = CreateTaskRequest,
    responses((status = 200, body = Task), (status = "4XX", body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub(super) async fn create(
    State(app): State<App>,
    Json(wish): Json<CreateTaskRequest>,
) -> Answer<Json<Task>> {
    if wish.name.as_deref() == Some("") {
        return Err(Fault::user("a task's name has at least one letter").hint("leave it out"));
    }
    if wish.machine.retry_safe && wish.semantics == TaskSemantics::AtMostOnce {
        return Err(
            Fault::user("a program that may be run again is no at-most-once task")
                .hint("leave `retry_safe` out, or ask for at-least-once"),
        );
    }
    let task = DraftTask {
        semantics: match wish.semantics {
            TaskSemantics::AtMostOnce => service::TaskSemantics::AtMostOnce,
            TaskSemantics::AtLeastOnce => service::TaskSemantics::AtLeastOnce,
        },
        key: wish.key,
    };
    let copies = CreateServiceRequest {
        name: wish.name.unwrap_or_default(),
        replicas: 1,
        machine: wish.machine,
        nodes: wish.nodes,
        policy: wish.policy,
        rules: wish.rules,
        regions: wish.regions,
        capabilities: wish.capabilities,
        price_micros_max: wish.price_micros_max,
        apart: false,
    };
    let draft = draft(&app, copies, Some(task)).await?;
    let made = app.services.create(draft).await?;
    let (shown, heard) = begun(&app, made, Kind::Task).await?;
    Ok(Json(view(&app, &shown, heard).await?))
}

async fn view(app: &App, shown: &Shown, heard: Heard) -> Answer<Task> {
    let document = shown.sealed.document();
    let Some(task) = &document.task else {
        return Err(Fault::conflict("it is a service"));
    };
    let own = app.mesh.open().await?.identity.id();
    let keepers = heard.newest.as_ref().map(|keeping| keeping.keepers.clone());
    let keepers = keepers.or_else(|| shown.keepers.clone());
    let noted = heard.ends.iter().filter_map(|ends| ends.get(&0).copied());
    let heard_end = (keepers.as_ref()).and_then(|keepers| end_of(keepers, noted));
    // Its owner's node remembers it though no keeper answers; a loss may turn out to have been none.
    let settled = shown.settled.map(|settled| settled.end);
    let done = settled.filter(|end| matches!(end, End::Done(_)));
    let end = done.or(heard_end).or(settled);
    let copy = copy(app, &heard, 0).await?;
    let mut shown_task = Task {
        id: id_text(ServiceId(document.service)),
        name: document.name.clone(),
        owner: document.owner.to_string(),
        own: document.owner == own,
        image_id: document.image.to_string(),
        semantics: match task.semantics {
            service::TaskSemantics::AtMostOnce => TaskSemantics::AtMostOnce,
            service::TaskSemantics::AtLeastOnce => TaskSemantics::AtLeastOnce,
        },
        key: task.key.clone(),
        state: TaskState::Waiting,
        node: None,
        machine: None,
        machine_state: None,
        attempt: copy.generation,
        exit_code: None,
        message: copy.message,
        epoch: keepers.as_ref().map_or(0, |keepers| keepers.epoch),
        keepers: all_named(app, keepers.into_iter().flat_map(|keepers| keepers.nodes)).await?,
        nodes: all_named(app, document.nodes.iter().map(|one| one.node)).await?,
        unattended: heard.newest.is_none(),
    };
    match end {
        Some(End::Done(outcome)) => {
            let ran = heard.copies.get(&(0, outcome.node));
            let ran = ran.filter(|copy| copy.generation == outcome.generation);
            shown_task.state = TaskState::Done;
            shown_task.node = Some(named(app, outcome.node).await?);
            shown_task.machine = ran.and_then(|copy| copy.machine.clone());
            shown_task.machine_state = ran.map(|copy| copy.state.clone());
            shown_task.attempt = outcome.generation.0;
            shown_task.exit_code = Some(outcome.exit_code);
            shown_task.message = None;
        }
        Some(End::Lost) => {
            shown_task.state = TaskState::Lost;
            shown_task.message = Some("it may have begun, and nobody knows how it went".to_owned());
        }
        None if holds(&heard, &copy.state) => {
            shown_task.state = TaskState::Running;
            shown_task.node = copy.node;
            shown_task.machine = copy.machine;
            shown_task.machine_state = Some(copy.state);
        }
        None => {}
    }
    Ok(shown_task)
}

/// Whether some node has it: by its keepers, or by what it says itself, beyond asking for it and beyond what an earlier
/// attempt left.
fn holds(heard: &Heard, state: &str) -> bool {
    let slots = heard.newest.iter().flat_map(|keeping| &keeping.slots);
    let held = slots.into_iter().any(|slot| slot.holder.is_some());
    let left = [
        super::services::EMPTY,
        crate::services::ASKING,
        &MachineState::Ended.to_string(),
    ];
    held || !left.contains(&state)
}

/// The tasks that this node knows: its owner's, and those that it looks after or runs.
#[utoipa::path(get, path = "/v1/tasks", responses((status = 200, body = Vec<Task>)))]
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Task>>> {
    let mut all = Vec::new();
    for shown in app.services.show(Kind::Task, None).await? {
        let heard = gather(&app, &shown).await;
        all.push(view(&app, &shown, heard).await?);
    }
    all.sort_by(|one, other| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
    Ok(Json(all))
}

/// Everything known of one task.
#[utoipa::path(
    get,
    path = "/v1/tasks/{task}",
    params(("task" = String, Path, description = "Name, id, or unambiguous beginning of an id")),
    responses((status = 200, body = Task), (status = 404, body = ErrorBody))
)]
pub(super) async fn inspect(
    State(app): State<App>,
    Path(task): Path<String>,
) -> Answer<Json<Task>> {
    let shown = one(&app, Kind::Task, &task).await?;
    let heard = gather(&app, &shown).await;
    Ok(Json(view(&app, &shown, heard).await?))
}

/// Ends a task that runs, and forgets it. Answers with the nodes that have not said so: what runs there ends with its lease, and
/// they are told when they are back.
#[utoipa::path(
    delete,
    path = "/v1/tasks/{task}",
    params(("task" = String, Path, description = "Name, id, or unambiguous beginning of an id")),
    responses((status = 200, body = Vec<ServiceNode>), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(task): Path<String>,
) -> Answer<Json<Vec<ServiceNode>>> {
    Ok(Json(removed(&app, Kind::Task, &task).await?))
}
