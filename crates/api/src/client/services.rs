//! Requests about services.

use super::{Client, ClientError, encode};
use crate::types::*;

impl Client {
    /// Has copies of a machine run among nodes. Answers once most of those that look after it know of it.
    ///
    /// # Errors
    /// [`ClientError`], as every method here; there is no such service then.
    pub async fn create_service(
        &self,
        request: &CreateServiceRequest,
    ) -> Result<Service, ClientError> {
        self.post("/v1/services", request).await
    }

    /// The services that this node knows.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn services(&self) -> Result<Vec<Service>, ClientError> {
        self.get("/v1/services").await
    }

    /// One of them.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn service(&self, service: &str) -> Result<Service, ClientError> {
        self.get(&format!("/v1/services/{}", encode(service))).await
    }

    /// Wants another number of copies.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scale_service(
        &self,
        service: &str,
        request: &ScaleServiceRequest,
    ) -> Result<Service, ClientError> {
        self.post(&format!("/v1/services/{}/scale", encode(service)), request)
            .await
    }

    /// Removes a service with all its copies; answers with the nodes that have not heard of it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_service(&self, service: &str) -> Result<Vec<ServiceNode>, ClientError> {
        self.delete(&format!("/v1/services/{}", encode(service)))
            .await
    }
}
