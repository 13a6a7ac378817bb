//! Machines that are held still.

use super::{Client, ClientError, encode};
use crate::types::Machine;

impl Client {
    /// Holds a machine still.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pause(&self, machine: &str) -> Result<Machine, ClientError> {
        self.post(&format!("/v1/machines/{}/pause", encode(machine)), &())
            .await
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn resume(&self, machine: &str) -> Result<Machine, ClientError> {
        self.post(&format!("/v1/machines/{}/resume", encode(machine)), &())
            .await
    }
}
