//! What `vistara bench` measures against, where that takes a guest's agent; and what it measures of a node's parts.

mod peers;
mod placing;

pub use peers::QuietNodes;
pub use placing::{PLACEMENT_POLICIES, placement_times};

use crate::fault::chain;
use crate::machine::guest_stages;
use std::time::Duration;
use vistara_guest_client::ConnectOptions;
use vistara_machine::VmmError;
use vistara_machine::firecracker::RawRun;

/// Longest that a bare guest's agent may take to answer once it listens.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Waits until the agent in a bare Firecracker's guest has answered: the moment at which ours are ready, too. The stages of the
/// guest's boot, by name, as the guest tells them.
///
/// # Errors
/// [`VmmError::Launch`].
pub async fn raw_agent_ready(run: &RawRun) -> Result<Vec<(&'static str, Duration)>, VmmError> {
    let stream = run.open_channel().await?;
    let options = ConnectOptions {
        hello_timeout: ANSWER_LIMIT,
    };
    let greeted = vistara_guest_client::connect(stream, options).await;
    let (_agent, welcome) = greeted.map_err(|error| VmmError::Launch {
        step: "greeting the bare guest",
        message: chain(&error),
    })?;
    let stages = guest_stages(&welcome.timings).into_iter();
    Ok(stages
        .map(|(name, _, took)| (name, Duration::from_micros(took)))
        .collect())
}
