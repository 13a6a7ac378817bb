//! Requests about images' parts.

use super::{Client, ClientError, Events, empty, encode};
use crate::types::{ImageEvent, ImageParts, ReceivedBlob, WantedParts};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::Method;
use hyper::body::Frame;

impl Client {
    /// The client of the local node, where this one's requests go to another.
    #[must_use]
    pub fn local(&self) -> Client {
        Client::new(self.socket.clone())
    }

    /// What an image is made of.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn image_parts(&self, image: &str) -> Result<ImageParts, ClientError> {
        self.get(&format!("/v1/image/parts?image={}", encode(image)))
            .await
    }

    /// Which layers of an image the node wants.
    ///
    /// # Errors
    /// [`ClientError`]; of kind `user` where the parts make no image that runs there.
    pub async fn offer_image(&self, parts: &ImageParts) -> Result<WantedParts, ClientError> {
        self.post("/v1/images/offer", parts).await
    }

    /// Has an image put together whose layers are all there; the last event is `done` or `failed`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn assemble_image(
        &self,
        parts: &ImageParts,
    ) -> Result<Events<ImageEvent>, ClientError> {
        self.events(Self::json_request(
            Method::POST,
            "/v1/images/assemble",
            parts,
        )?)
        .await
    }

    /// A piece of a blob: exactly `length` bytes, unless the blob ends before.
    ///
    /// # Errors
    /// [`ClientError`], also where more comes than was asked for.
    pub async fn blob(&self, digest: &str, from: u64, length: u64) -> Result<Bytes, ClientError> {
        let path = format!("/v1/blobs/{}?from={from}&length={length}", encode(digest));
        let request = Self::request(Method::GET, &path, empty(), "application/octet-stream")?;
        let answer = self.send(request).await?;
        let most = usize::try_from(length).unwrap_or(usize::MAX);
        Limited::new(answer.into_body(), most)
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| ClientError::broken("reading a layer", error))
    }

    /// Gives the node a blob's bytes from `from` on; says how many of it are there afterwards.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send_blob(
        &self,
        digest: &str,
        bytes: u64,
        from: u64,
        pieces: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<ReceivedBlob, ClientError> {
        let path = format!("/v1/blobs/{}?bytes={bytes}&from={from}", encode(digest));
        let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data)));
        let body = BodyExt::boxed_unsync(body);
        self.call(Self::request(
            Method::PUT,
            &path,
            body,
            "application/octet-stream",
        )?)
        .await
    }
}
