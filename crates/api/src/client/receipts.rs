//! Requests about receipts.

use super::{Client, ClientError, empty, encode};
use crate::types::*;
use hyper::Method;

impl Client {
    /// The receipt of a machine that has ended, as its node signed it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] where there is none, with the reason.
    pub async fn receipt(&self, machine: &str) -> Result<String, ClientError> {
        let path = format!("/v1/machines/{}/receipt", encode(machine));
        let request = Self::request(Method::GET, &path, empty(), "application/json")?;
        let body = Self::whole(self.send(request).await?).await?;
        String::from_utf8(body.into())
            .map_err(|error| ClientError::broken("reading the receipt", error))
    }

    /// Whether this is a receipt, and whose word.
    ///
    /// # Errors
    /// [`ClientError::Refused`] where it is none, with the reason.
    pub async fn verify_receipt(
        &self,
        request: &VerifyReceiptRequest,
    ) -> Result<VerifiedReceipt, ClientError> {
        self.post("/v1/receipts/verify", request).await
    }
}
