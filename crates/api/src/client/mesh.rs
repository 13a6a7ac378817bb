//! Other nodes: through the local one.

use super::{Client, ClientError, empty, encode};
use crate::mesh::*;
use hyper::Request;
use hyper_util::rt::TokioIo;

impl Client {
    /// The same client, whose every request goes to another node, through the one that listens on the socket: `node` is
    /// an id, an unambiguous beginning of one, or a name given when it was joined.
    pub fn on(&self, node: impl Into<String>) -> Client {
        Client {
            socket: self.socket.clone(),
            server_version: std::sync::Arc::default(),
            on: Some(node.into()),
            offer: None,
        }
    }

    /// The node that requests go to, where it is not the local one.
    pub fn node(&self) -> Option<&str> {
        self.on.as_deref()
    }

    /// A connection to the other node, as bytes.
    pub(super) async fn node_stream(
        &self,
        node: &str,
    ) -> Result<hyper::upgrade::Upgraded, ClientError> {
        let request = Request::builder()
            .uri(format!("/v1/nodes/{}/stream", encode(node)))
            .header("host", "vistara")
            .header("connection", "upgrade")
            .header("upgrade", NODE_STREAM)
            .body(empty())
            .map_err(|error| ClientError::broken("making the request", error))?;
        let stream = self.connect().await?;
        let response = self.exchange(TokioIo::new(stream), request).await?;
        hyper::upgrade::on(response)
            .await
            .map_err(|error| ClientError::broken("connecting to the other node", error))
    }

    /// The node on one page.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<NodeStatus, ClientError> {
        self.get("/v1/status").await
    }

    /// This node among others. Makes its key where it has none.
    ///
    /// # Errors
    /// [`ClientError`], as every method here.
    pub async fn mesh(&self) -> Result<MeshStatus, ClientError> {
        self.get("/v1/mesh").await
    }

    /// Listens for others from now on, also after a restart.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn mesh_listen(&self, request: &ListenRequest) -> Result<MeshStatus, ClientError> {
        self.post("/v1/mesh", request).await
    }

    /// Listens no longer, and forgets every node that was joined.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn mesh_leave(&self) -> Result<(), ClientError> {
        self.delete("/v1/mesh").await
    }

    /// The nodes that were joined.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn nodes(&self) -> Result<Vec<PeerNode>, ClientError> {
        self.get("/v1/nodes").await
    }

    /// Joins a node; answers when it is connected.
    ///
    /// # Errors
    /// [`ClientError`]; the node is not remembered then.
    pub async fn join(&self, request: &JoinRequest) -> Result<PeerNode, ClientError> {
        self.post("/v1/nodes", request).await
    }

    /// Forgets a node that was joined.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn forget_node(&self, node: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/nodes/{}", encode(node))).await
    }

    /// What this node has granted.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn grants(&self) -> Result<Vec<Grant>, ClientError> {
        self.get("/v1/grants").await
    }

    /// Lets somebody in.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn grant(&self, request: &GrantRequest) -> Result<GivenGrant, ClientError> {
        self.post("/v1/grants", request).await
    }

    /// Takes a grant back, by its id.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn revoke(&self, grant: &str) -> Result<Grant, ClientError> {
        self.delete(&format!("/v1/grants/{}", encode(grant))).await
    }

    /// Remembers a token that another node gave to this one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn keep_grant(&self, request: &KeepGrantRequest) -> Result<PeerNode, ClientError> {
        self.post("/v1/grants/keep", request).await
    }

    /// A token that allows less.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn narrow(&self, request: &NarrowRequest) -> Result<NarrowedGrant, ClientError> {
        self.post("/v1/grants/narrow", request).await
    }
}
