//! Requests about templates.

use super::{Client, ClientError, encode};
use crate::types::{CreateTemplateRequest, CreatedTemplate, Pruned, Template};

impl Client {
    /// Templates, newest first.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get("/v1/templates").await
    }

    /// Makes a template unless it is there; answers when it is ready, which takes as long as a boot.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn create_template(
        &self,
        request: &CreateTemplateRequest,
    ) -> Result<CreatedTemplate, ClientError> {
        self.post("/v1/templates", request).await
    }

    /// Removes a template by its key or an unambiguous beginning of it; gives the whole key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_template(&self, key: &str) -> Result<String, ClientError> {
        let path = format!("/v1/templates/{}", encode(key));
        self.delete(&path).await
    }

    /// Removes the templates from which no running machine was forked and that were not used for so long.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn prune_templates(&self, unused_ms: u64, all: bool) -> Result<Pruned, ClientError> {
        let path = format!("/v1/templates/prune?unused_ms={unused_ms}&all={all}");
        self.post(&path, &()).await
    }
}
