//! Services.

use super::RunRequest;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/services`: have copies of a machine run among nodes, whoever of them dies.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CreateServiceRequest {
    /// What it is called: lower-case letters, digits and `-`.
    pub name: String,
    /// How many copies.
    pub replicas: u32,
    /// What each copy's machine is asked for with. Its image must be on this node; it gets nothing of any host: no
    /// directories, volumes or ports.
    pub machine: RunRequest,
    /// Ids of the nodes that may run copies and look after them: this one, or such as have given it a grant, and have the
    /// image.
    pub nodes: Vec<String>,
    /// The policy by which they are chosen: see `POST /v1/place`.
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
    /// Never two copies on one node; else only where there are too few nodes.
    pub apart: bool,
}

/// `POST /v1/services/{service}/scale`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScaleServiceRequest {
    /// How many copies from now on.
    pub replicas: u32,
    /// On which nodes from now on; on the same where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Vec<String>>,
}

/// A service, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// 32 hexadecimal digits.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// The node whose owner's it is, by its id.
    pub owner: String,
    /// Whether that is this node.
    pub own: bool,
    /// Image of the copies, by its id.
    pub image_id: String,
    /// How often it was changed.
    pub version: u64,
    /// How many copies are wanted.
    pub wanted: u32,
    /// How many run.
    pub running: u32,
    /// Who looks after it; nobody is known where it is empty.
    pub keepers: Vec<ServiceNode>,
    /// Counts changes of those.
    pub epoch: u64,
    /// Who may run copies, and look after it.
    pub nodes: Vec<ServiceNode>,
    /// Its copies.
    pub copies: Vec<ServiceCopy>,
    /// Whether nobody that looks after it has answered: what is shown may be old.
    pub unattended: bool,
}

/// A node of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceNode {
    /// Its id.
    pub id: String,
    /// What this node calls it.
    pub name: String,
    /// How it is: `here`, `alive`, `suspect`, `dead`, `left`, or `unknown`.
    pub life: String,
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceCopy {
    /// Its slot, from 0.
    pub slot: u32,
    /// Counts who has had the slot.
    pub generation: u64,
    /// Who has it now; absent where nobody does.
    pub node: Option<ServiceNode>,
    /// Its machine there, by id.
    pub machine: Option<String>,
    /// `empty`, `asking`, `starting`, a machine's state, `resting` after its program has ended, or `stopping`; `away` where its
    /// node does not say.
    pub state: String,
    /// How often its program was started again there.
    pub restarts: u32,
    /// What troubles it.
    pub message: Option<String>,
}

/// Which copy of a service a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyOfService {
    /// The service's number.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// Which slot.
    pub slot: u32,
    /// Under which generation of it.
    pub generation: u64,
}
