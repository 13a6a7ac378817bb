//! Requests about placement.

use super::{Client, ClientError};
use crate::types::*;

impl Client {
    /// The same client, whose machines are made under an offer.
    #[must_use]
    pub fn under(self, offer: impl Into<String>) -> Client {
        Client {
            offer: Some(offer.into()),
            ..self
        }
    }

    /// What the node states about itself.
    ///
    /// # Errors
    /// [`ClientError`], as every method here.
    pub async fn facts(&self) -> Result<NodeStatement, ClientError> {
        self.get("/v1/facts").await
    }

    /// What the owner has the node say of itself.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn terms(&self) -> Result<NodeTerms, ClientError> {
        self.get("/v1/mesh/terms").await
    }

    /// Has the node say something else of itself.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn set_terms(&self, terms: &NodeTerms) -> Result<NodeTerms, ClientError> {
        self.post("/v1/mesh/terms", terms).await
    }

    /// Asks for an offer.
    ///
    /// # Errors
    /// [`ClientError`]; nothing is held then.
    pub async fn ask_offer(&self, request: &OfferRequest) -> Result<OfferAnswer, ClientError> {
        self.post("/v1/offers", request).await
    }

    /// Takes an offer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn take_offer(&self, request: &str) -> Result<(), ClientError> {
        self.post(&format!("/v1/offers/{request}/take"), &()).await
    }

    /// Gives an offer back.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn release_offer(&self, request: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/offers/{request}")).await
    }

    /// Has a node chosen for a machine, among this one and those that have given a grant; it holds a place for it.
    ///
    /// # Errors
    /// [`ClientError`], which says why nobody takes it.
    pub async fn place(&self, request: &PlaceRequest) -> Result<Placed, ClientError> {
        self.post("/v1/place", request).await
    }
}
