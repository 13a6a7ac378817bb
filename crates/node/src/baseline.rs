//! What `vistara bench` measures against, where that takes a guest's agent; and what it measures of a node's parts.

mod peers;
mod placing;

pub use peers::QuietNodes;
pub use placing::{PLACEMENT_POLICIES, placement_times};

use crate::fault::chain;
use std::time::Duration;
use vistara_guest_client::ConnectOptions;
use vistara_machine::VmmError;
use vistara_machine::firecracker::RawRun;

/// Longest that a bare guest's agent may take to answer once it listens.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Waits until the agent in a bare Firecracker's guest has answered: the moment at which ours are ready, too.
///
/// # Errors
/// [`VmmError::Launch`].
pub async fn raw_agent_ready(run: &RawRun) -> Result<(), VmmError> {
    let stream = run.open_channel().await?;
    let options = ConnectOptions {
        hello_timeout: ANSWER_LIMIT,
    };
    vistara_guest_client::connect(stream, options)
        .await
        .map(drop)
        .map_err(|error| VmmError::Launch {
            step: "greeting the bare guest",
            message: chain(&error),
        })
}
