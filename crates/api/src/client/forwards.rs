//! Requests about published ports of machines on other nodes.

use super::{Client, ClientError, empty, encode};
use crate::types::{Forward, ForwardRequest, PORT_STREAM};
use hyper::Request;

impl Client {
    /// A connection to a port that a machine publishes, as bytes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn port(
        &self,
        machine: &str,
        guest_port: u16,
    ) -> Result<hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>, ClientError> {
        let request = Request::builder()
            .uri(format!(
                "/v1/machines/{}/port?guest={guest_port}",
                encode(machine)
            ))
            .header("host", "vistara")
            .header("connection", "upgrade")
            .header("upgrade", PORT_STREAM)
            .body(empty())
            .map_err(|error| ClientError::broken("making the request", error))?;
        let response = self.send(request).await?;
        hyper::upgrade::on(response)
            .await
            .map(hyper_util::rt::TokioIo::new)
            .map_err(|error| ClientError::broken("connecting to the port", error))
    }

    /// Ports of this host that lead into machines on other nodes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn forwards(&self) -> Result<Vec<Forward>, ClientError> {
        self.get("/v1/forwards").await
    }

    /// Has a port of this host lead into a machine on another node, until that one ends.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn forward(&self, request: &ForwardRequest) -> Result<Forward, ClientError> {
        self.post("/v1/forwards", request).await
    }

    /// Ends a forward.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_forward(&self, id: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/forwards/{}", encode(id))).await
    }
}
