//! What nodes say before they speak HTTP: length-prefixed frames (`docs/formats/mesh.md`).
//!
//! A connection begins with a [`Hello`] each way on its first stream. Every other stream begins with one [`Open`] from the
//! dialler and is HTTP/1.1 from there on. Decoding is pure, bounded and total: no bytes make it panic, and trailing bytes
//! are an error.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vistara_model::NodeId;

/// The protocol's name in the handshake (ALPN); its number changes when older nodes could not follow.
pub const ALPN: &[u8] = b"vistara/1";
/// Version within the protocol: fields may be read of a later one only where both know them.
pub const VERSION: u16 = 1;
/// Largest frame's body: a token of [`TOKEN_BYTES_MAX`] and some fields.
pub const FRAME_BYTES_MAX: usize = 12 << 10;
/// Largest token: a grant has some hundred bytes, narrowed a few times some thousand.
pub const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Why bytes are not the frame they should be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended or broke.
    #[error("the stream broke")]
    Io(#[from] std::io::Error),
    /// It is longer than any frame.
    #[error("a frame of {0} bytes is longer than any")]
    TooLong(usize),
    /// It is none of ours.
    #[error("a frame makes no sense")]
    Malformed,
}

/// The first word of each side of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the sender.
    pub version: u16,
    /// How often the sender has started ([`crate::Identity::generation`]).
    pub generation: u64,
}

/// The first word on a stream. The sender's key is not in it: the connection proves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Whom it is meant for.
    pub target: [u8; 32],
    /// Which start of the target it is meant for.
    pub generation: u64,
    /// Never used twice by this sender.
    pub nonce: [u8; 16],
    /// Milliseconds since 1970 after which it is void.
    pub deadline_ms: u64,
    /// The token by which the sender may ask, if it has one.
    pub token: Option<Vec<u8>>,
}

impl Open {
    /// Whom it is meant for.
    pub fn target(&self) -> NodeId {
        NodeId::from_bytes(self.target)
    }
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    if body.len() > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(body.len()));
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) | Err(_) => Err(FrameError::Malformed),
    }
}

/// Reads a [`Hello`]'s body.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::Malformed`].
pub fn decode_hello(body: &[u8]) -> Result<Hello, FrameError> {
    decode(body)
}

/// Reads an [`Open`]'s body.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::Malformed`].
pub fn decode_open(body: &[u8]) -> Result<Open, FrameError> {
    let open: Open = decode(body)?;
    match &open.token {
        Some(token) if token.len() > TOKEN_BYTES_MAX => Err(FrameError::TooLong(token.len())),
        _ => Ok(open),
    }
}

/// A frame's bytes: its length (little-endian, 4 bytes) and its body.
///
/// # Errors
/// [`FrameError::TooLong`] where it has no place in a frame.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_stdvec(value).map_err(|_| FrameError::Malformed)?;
    if body.len() > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(body.len()));
    }
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads one frame's body.
///
/// # Errors
/// [`FrameError::Io`], [`FrameError::TooLong`].
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, FrameError> {
    let length = stream.read_u32_le().await? as usize;
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// Writes one frame.
///
/// # Errors
/// [`FrameError`].
pub async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &T,
) -> Result<(), FrameError> {
    stream.write_all(&encode(value)?).await?;
    Ok(stream.flush().await?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn open() -> Open {
        Open {
            target: [1; 32],
            generation: 3,
            nonce: [2; 16],
            deadline_ms: 5,
            token: Some(vec![9; 100]),
        }
    }

    #[tokio::test]
    async fn a_frame_is_read_as_it_was_written() {
        let mut bytes = Vec::new();
        write(&mut bytes, &open()).await.unwrap();
        let body = read(&mut bytes.as_slice()).await.unwrap();
        assert_eq!(decode_open(&body).unwrap(), open());
    }

    #[test]
    fn a_frame_cut_short_or_with_more_behind_it_is_refused() {
        let bytes = encode(&open()).unwrap();
        for end in 4..bytes.len() {
            assert!(decode_open(&bytes[4..end]).is_err(), "{end}");
        }
        let mut more = bytes[4..].to_vec();
        more.push(0);
        assert!(matches!(decode_open(&more), Err(FrameError::Malformed)));
    }

    #[tokio::test]
    async fn a_length_beyond_the_bound_is_refused_before_memory_is_taken() {
        let bytes = u32::MAX.to_le_bytes();
        assert!(matches!(
            read(&mut bytes.as_slice()).await,
            Err(FrameError::TooLong(_))
        ));
    }

    #[test]
    fn a_token_beyond_its_bound_is_refused() {
        let open = Open {
            token: Some(vec![0; TOKEN_BYTES_MAX + 1]),
            ..open()
        };
        let bytes = encode(&open).unwrap();
        assert!(matches!(
            decode_open(&bytes[4..]),
            Err(FrameError::TooLong(_))
        ));
    }
}
