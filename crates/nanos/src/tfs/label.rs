//! What a file system is known by: a label and a 16-byte identity.

use super::encoding::Cursor;
use super::error::Damage;
use std::fmt;

/// Bytes of a label; a NUL follows it on the disk.
const LABEL_BYTES_MAX: usize = 31;

/// A file system's label, by which a manifest mounts it: at most 31 bytes, possibly none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Label(Vec<u8>);

/// Why something is no label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// More than 31 bytes.
    #[error("a label has at most {LABEL_BYTES_MAX} bytes")]
    TooLong,
    /// A NUL ends a label on the disk.
    #[error("a label has no NUL")]
    Nul,
    /// A first `%` means the number of a drive in a manifest.
    #[error("a label does not begin with %")]
    Percent,
}

impl Label {
    /// Checks `bytes`.
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Label, LabelError> {
        let bytes = bytes.as_ref();
        if bytes.len() > LABEL_BYTES_MAX {
            return Err(LabelError::TooLong);
        }
        if bytes.contains(&0) {
            return Err(LabelError::Nul);
        }
        if bytes.first() == Some(&b'%') {
            return Err(LabelError::Percent);
        }
        Ok(Label(bytes.to_vec()))
    }

    /// No label.
    pub fn none() -> Label {
        Label(Vec::new())
    }

    /// The bytes, without the NUL.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads a label and its NUL as the disk has it.
    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Label, Damage> {
        let mut bytes = Vec::new();
        loop {
            match cursor.byte()? {
                0 => return Ok(Label(bytes)),
                _ if bytes.len() == LABEL_BYTES_MAX => return Err(Damage::Label),
                byte => bytes.push(byte),
            }
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// The 16 bytes that tell one file system from every other. `Display` is the form that a manifest may use in place of a
/// label: `00112233-4455-6677-8899-aabbccddeeff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumeId(pub [u8; 16]);

impl fmt::Display for VolumeId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                out.write_str("-")?;
            }
            write!(out, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_that_the_disk_cannot_hold_is_refused() {
        assert!(Label::new([b'a'; 31]).is_ok());
        assert_eq!(Label::new([b'a'; 32]), Err(LabelError::TooLong));
        assert_eq!(Label::new(b"a\0b"), Err(LabelError::Nul));
        assert_eq!(Label::new("%1"), Err(LabelError::Percent));
    }

    #[test]
    fn an_identity_is_shown_as_the_kernel_compares_it() {
        let id = VolumeId(std::array::from_fn(|at| (at * 0x11) as u8));
        assert_eq!(id.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
    }
}
