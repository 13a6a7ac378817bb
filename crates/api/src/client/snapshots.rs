//! Machines that are held still, captured, restored and forked.

use super::{Client, ClientError, encode};
use crate::types::{
    CreateSnapshotRequest, ForkRequest, Forked, Machine, PackedSnapshot, RestoreRequest, Snapshot,
    WantedSnapshot,
};

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

    /// Keeps a machine that runs as it is at this moment; it goes on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn create_snapshot(
        &self,
        machine: &str,
        request: &CreateSnapshotRequest,
    ) -> Result<Snapshot, ClientError> {
        let path = format!("/v1/machines/{}/snapshots", encode(machine));
        self.post(&path, request).await
    }

    /// Snapshots, newest first.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.get("/v1/snapshots").await
    }

    /// Removes a snapshot; gives its id. Machines restored from it go on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_snapshot(&self, snapshot: &str) -> Result<String, ClientError> {
        let path = format!("/v1/snapshots/{}", encode(snapshot));
        self.delete(&path).await
    }

    /// A new machine that goes on from a snapshot; answers when it runs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn restore(
        &self,
        snapshot: &str,
        request: &RestoreRequest,
    ) -> Result<Machine, ClientError> {
        let path = format!("/v1/snapshots/{}/restore", encode(snapshot));
        self.post(&path, request).await
    }

    /// Copies of a machine that runs; answers when they run or have failed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn fork(&self, machine: &str, request: &ForkRequest) -> Result<Forked, ClientError> {
        self.post(&format!("/v1/machines/{}/fork", encode(machine)), request)
            .await
    }

    /// Has a snapshot made one file, whose bytes are then got as a blob's.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pack_snapshot(&self, snapshot: &str) -> Result<PackedSnapshot, ClientError> {
        self.post(&format!("/v1/snapshots/{}/pack", encode(snapshot)), &())
            .await
    }

    /// How much of a snapshot the node lacks; it is given as a blob is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn offer_snapshot(
        &self,
        packed: &PackedSnapshot,
    ) -> Result<WantedSnapshot, ClientError> {
        self.post("/v1/snapshots/offer", packed).await
    }

    /// Has the snapshot put in place whose file is all there.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn import_snapshot(&self, packed: &PackedSnapshot) -> Result<Snapshot, ClientError> {
        self.post("/v1/snapshots/import", packed).await
    }
}
