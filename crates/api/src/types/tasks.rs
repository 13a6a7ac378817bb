//! Tasks.

use super::{RunRequest, ServiceNode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What becomes of a task whose node is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TaskSemantics {
    /// It is reported lost, and never begun a second time.
    #[default]
    AtMostOnce,
    /// It is run again elsewhere until it has ended once.
    AtLeastOnce,
}

/// `POST /v1/tasks`: have a program run to its end on one of these nodes. Where there is a task of its key already, and it asks
/// for the same, that one is the answer, also when it is over; where it asks for something else that is a conflict.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CreateTaskRequest {
    /// What it is called: lower-case letters, digits and `-`. Made up from the image's name where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What becomes of it when its node is lost.
    pub semantics: TaskSemantics,
    /// Its idempotency key: 1 to 128 letters, digits and marks of ASCII, without spaces. Its id where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What its machine is asked for with, as for a service's copies.
    pub machine: RunRequest,
    /// Ids of the nodes that may run it and look after it: see `POST /v1/services`.
    pub nodes: Vec<String>,
    /// The policy by which one is chosen: see `POST /v1/place`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Or a policy file of hypercore's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<String>,
    /// Any of these regions.
    pub regions: Vec<String>,
    /// All of these labels and capabilities.
    pub capabilities: Vec<String>,
    /// Most that a GiB of memory may cost for an hour.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_micros_max: Option<u64>,
}

/// How a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// No node runs it yet, or again.
    Waiting,
    /// A node has it.
    Running,
    /// Its program has ended.
    Done,
    /// It may have begun, nobody knows how it went, and it is not begun again. Where its node comes back and knows, it is done.
    Lost,
}

/// A task, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// 32 hexadecimal digits.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// The node whose owner's it is, by its id.
    pub owner: String,
    /// Whether that is this node.
    pub own: bool,
    /// Its image, by id.
    pub image_id: String,
    /// What becomes of it when its node is lost.
    pub semantics: TaskSemantics,
    /// Its idempotency key.
    pub key: String,
    /// How it is.
    pub state: TaskState,
    /// Who has it, or has run it to its end.
    pub node: Option<ServiceNode>,
    /// Its machine there, by id.
    pub machine: Option<String>,
    /// How that is, in a word: see a service's copy.
    pub machine_state: Option<String>,
    /// The largest generation under which a node was given it: what its program finds as `VISTARA_TASK_ATTEMPT`.
    pub attempt: u64,
    /// Its program's exit code, where it is done.
    pub exit_code: Option<u8>,
    /// What troubles it.
    pub message: Option<String>,
    /// Who looks after it; nobody is known where it is empty.
    pub keepers: Vec<ServiceNode>,
    /// Counts changes of those.
    pub epoch: u64,
    /// Who may run it, and look after it.
    pub nodes: Vec<ServiceNode>,
    /// Whether nobody that looks after it has answered: what is shown may be old.
    pub unattended: bool,
}
