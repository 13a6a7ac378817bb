//! Requests about guest kernels.

use super::{Client, ClientError, encode};
use crate::types::{AddKernelRequest, Kernel};

impl Client {
    /// Guest kernels.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn kernels(&self) -> Result<Vec<Kernel>, ClientError> {
        self.get("/v1/kernels").await
    }

    /// Adds a guest kernel; answers when it is unpacked.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn add_kernel(&self, request: &AddKernelRequest) -> Result<Kernel, ClientError> {
        self.post("/v1/kernels", request).await
    }

    /// Removes a guest kernel.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_kernel(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/kernels/{}", encode(name));
        self.delete(&path).await
    }

    /// Makes a guest kernel the default.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn default_kernel(&self, name: &str) -> Result<Kernel, ClientError> {
        self.post(&format!("/v1/kernels/{}/default", encode(name)), &())
            .await
    }
}
