//! Requests about named volumes.

use super::{Client, ClientError, encode};
use crate::types::{CreateVolumeRequest, Volume};

impl Client {
    /// Named volumes, by name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.get("/v1/volumes").await
    }

    /// Makes a volume, unless there is one of this name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn create_volume(
        &self,
        request: &CreateVolumeRequest,
    ) -> Result<Volume, ClientError> {
        self.post("/v1/volumes", request).await
    }

    /// Removes a volume and all that is on it; gives its name.
    ///
    /// # Errors
    /// [`ClientError`]; a conflict where a machine has it.
    pub async fn remove_volume(&self, name: &str) -> Result<String, ClientError> {
        let path = format!("/v1/volumes/{}", encode(name));
        self.delete(&path).await
    }
}
