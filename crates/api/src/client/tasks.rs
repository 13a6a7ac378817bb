//! Requests about tasks.

use super::{Client, ClientError, encode};
use crate::types::*;

impl Client {
    /// Has a program run to its end on one of several nodes, or finds the task of the same key. Answers once most of those that
    /// look after it know of it.
    ///
    /// # Errors
    /// [`ClientError`], as every method here.
    pub async fn create_task(&self, request: &CreateTaskRequest) -> Result<Task, ClientError> {
        self.post("/v1/tasks", request).await
    }

    /// The tasks that this node knows.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn tasks(&self) -> Result<Vec<Task>, ClientError> {
        self.get("/v1/tasks").await
    }

    /// One of them.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn task(&self, task: &str) -> Result<Task, ClientError> {
        self.get(&format!("/v1/tasks/{}", encode(task))).await
    }

    /// Ends a task that runs, and forgets it; answers with the nodes that have not heard of it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove_task(&self, task: &str) -> Result<Vec<ServiceNode>, ClientError> {
        self.delete(&format!("/v1/tasks/{}", encode(task))).await
    }
}
