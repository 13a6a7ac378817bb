//! `vistara bench`: measurements of this host.

use crate::arguments::BenchCommand;
use crate::failure::Failure;
use vistara_api::Client;

/// Runs the measurements.
pub(crate) async fn bench(_client: &Client, command: &BenchCommand) -> Result<u8, Failure> {
    let BenchCommand::Run { .. } = command;
    Err(Failure::new("bench: not part of this version yet"))
}
