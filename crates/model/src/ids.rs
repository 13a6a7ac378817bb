//! Identifiers. Each is its own type so that one never fits where another goes.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not the identifier it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// A machine id is 32 lowercase hexadecimal digits.
    #[error("{0:?} is not a machine id: it takes 32 lowercase hexadecimal digits")]
    MachineId(String),
    /// A machine name is refused.
    #[error(
        "{0:?} is not a machine name: it takes 1 to 63 of a-z A-Z 0-9 _ . - and begins with a letter or digit"
    )]
    MachineName(String),
    /// A digest is `sha256:` and 64 lowercase hexadecimal digits.
    #[error("{0:?} is not a digest: it takes \"sha256:\" and 64 lowercase hexadecimal digits")]
    Digest(String),
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

macro_rules! text_type {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

/// A machine's id: 128 random bits as 32 lowercase hexadecimal digits. Unique for ever, never reused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);
text_type!(MachineId);

impl MachineId {
    /// How many digits a listing shows.
    pub const SHORT_LEN: usize = 12;

    /// The id made of these random bytes.
    pub fn from_random(bytes: [u8; 16]) -> MachineId {
        MachineId(hex::encode(bytes))
    }

    /// The first twelve digits, as listings show them.
    pub fn short(&self) -> &str {
        &self.0[..Self::SHORT_LEN]
    }
}

impl FromStr for MachineId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() == 32 && is_lower_hex(text) {
            Ok(MachineId(text.to_owned()))
        } else {
            Err(IdError::MachineId(text.to_owned()))
        }
    }
}

/// A machine's name, given by the user or made up; unique on a node among the machines it keeps.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);
text_type!(MachineName);

impl FromStr for MachineName {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let body = text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        let head = text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if body && head && text.len() <= 63 {
            Ok(MachineName(text.to_owned()))
        } else {
            Err(IdError::MachineName(text.to_owned()))
        }
    }
}

/// The SHA-256 digest of some content, in the OCI form `sha256:<64 hex digits>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);
text_type!(Digest);

impl Digest {
    /// The digest whose 32 bytes these are.
    pub fn from_sha256(bytes: [u8; 32]) -> Digest {
        Digest(format!("sha256:{}", hex::encode(bytes)))
    }

    /// The 64 hexadecimal digits, without the algorithm.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first twelve hexadecimal digits, as listings show them.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && is_lower_hex(hex) => Ok(Digest(text.to_owned())),
            _ => Err(IdError::Digest(text.to_owned())),
        }
    }
}

/// How many times a machine has been replaced under one id; a reply carries it, so that an old copy is never believed.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_name_may_not_begin_with_a_dash_or_hold_a_slash() {
        assert!("web-1".parse::<MachineName>().is_ok());
        for bad in ["", "-web", "a/b", "a b", "../x", &"x".repeat(64)] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_digest_is_lowercase_sha256_only() {
        let good = Digest::from_sha256([0xab; 32]).to_string();
        assert_eq!(good.parse::<Digest>().unwrap().hex().len(), 64);
        for bad in [
            good.to_uppercase(),
            good.replace("sha256", "md5"),
            "sha256:../../x".into(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?}");
        }
    }
}
