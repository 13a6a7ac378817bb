//! What a store does for somebody who is not its owner: it asks before it takes anything, and takes no name away.

use super::{Added, Files, ImageStore, blocking};
use crate::ImageError;
use std::fmt::Debug;
use std::sync::Arc;
use vistara_model::Digest;

/// Who says whether somebody may add to a store, and takes note of it.
pub trait Admission: Debug + Send + Sync {
    /// Asked before any of these blobs is taken; with `arrived`, right after they were unpacked from an archive, whose
    /// layers are not known before. Blocks.
    ///
    /// # Errors
    /// [`ImageError::NotAdmitted`]: nothing is taken, and what has arrived goes again.
    fn admit(&self, blobs: &[(Digest, u64)], arrived: bool) -> Result<(), ImageError>;

    /// Whether it was this one who brought a blob, so that it may go with an image that is refused.
    fn brought(&self, digest: &Digest) -> bool;
}

impl ImageStore {
    /// The same store for somebody else: each blob is admitted first, and an image gets only names that no other has.
    #[must_use]
    pub fn for_guest(&self, guest: Arc<dyn Admission>) -> ImageStore {
        ImageStore {
            guest: Some(guest),
            ..self.clone()
        }
    }

    /// Whether a blob is here whole.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.files.blob_bytes(digest).is_some()
    }

    /// Removes a blob that is no image's: one that came by itself, and was taken out. Blocks.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn drop_blob(&self, digest: &Digest) -> Result<(), ImageError> {
        let path = self.files.blob(digest);
        std::fs::remove_file(&path).map_err(|error| ImageError::io("remove", &path, error))
    }
}

/// Asks for what an operation has added.
pub(super) fn admit_added(
    guest: Option<&Arc<dyn Admission>>,
    files: &Files,
    added: &Added,
) -> Result<(), ImageError> {
    guest.map_or(Ok(()), |guest| guest.admit(&added.blobs(files), true))
}

/// Asks for what is to be fetched.
pub(crate) async fn admit(
    guest: Option<&Arc<dyn Admission>>,
    blobs: Vec<(Digest, u64)>,
) -> Result<(), ImageError> {
    let Some(guest) = guest.cloned() else {
        return Ok(());
    };
    blocking(move |_| guest.admit(&blobs, false)).await
}
