//! A node's key, and how often the node has started with it.
//!
//! `identity` holds the secret key: made at the first start, mode 0600, never made again. A node whose key is missing,
//! damaged, or open to others does not start its mesh: to make a new key silently would make it another node, which its
//! peers would no longer know, and to use one that others could read would let them be it.

use crate::files;
use iroh::SecretKey;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vistara_model::NodeId;

const KEY_FILE: &str = "identity";
const GENERATION_FILE: &str = "generation";
/// First line of the key's file.
const HEAD: &str = "vistara-key-1";
/// The key's file is two short lines.
const KEY_BYTES_MAX: u64 = 256;

/// Why a node has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or made.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Others can read the key, or could have put it there.
    #[error("the key {path:?} cannot be trusted: {why}")]
    Open {
        /// The key.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It is not a key.
    #[error("the key {0:?} is damaged: put a copy of it back")]
    Damaged(PathBuf),
    /// There was one, and it is gone.
    #[error(
        "the key {0:?} is gone, though this node has had one: put a copy of it back, or remove the whole directory to become another node"
    )]
    Gone(PathBuf),
    /// The count of starts is not a number.
    #[error("{0:?} does not hold a number: write one there that is larger than any before")]
    Generation(PathBuf),
}

/// Who this node is, in this start.
#[derive(Clone)]
pub struct Identity {
    secret: SecretKey,
    generation: u64,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        write!(
            f,
            "Identity({}, start {})",
            self.id().short(),
            self.generation
        )
    }
}

impl Identity {
    /// Reads the key in `dir`, or makes it at the first start, and counts this start. The caller holds the lock of the
    /// node's state: nobody else writes here. Blocks on files.
    ///
    /// # Errors
    /// [`IdentityError`]; nothing was replaced then.
    pub fn open(dir: &Path) -> Result<Identity, IdentityError> {
        let key = dir.join(KEY_FILE);
        let counter = dir.join(GENERATION_FILE);
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io {
                operation,
                path,
                source,
            }
        };
        let before = match files::read(&counter).map_err(io("read", &counter))? {
            None => None,
            Some(bytes) => Some(
                std::str::from_utf8(&bytes)
                    .ok()
                    .and_then(|text| text.trim().parse::<u64>().ok())
                    .filter(|count| *count < u64::MAX)
                    .ok_or_else(|| IdentityError::Generation(counter.clone()))?,
            ),
        };
        let secret = match (load(&key)?, before) {
            (Some(secret), _) => secret,
            (None, Some(_)) => return Err(IdentityError::Gone(key)),
            (None, None) => make(&key).map_err(io("make", &key))?,
        };
        let generation = before.unwrap_or(0) + 1;
        files::replace(&counter, format!("{generation}\n").as_bytes())
            .map_err(io("write", &counter))?;
        Ok(Identity { secret, generation })
    }

    /// The public key.
    pub fn id(&self) -> NodeId {
        NodeId::from_bytes(*self.secret.public().as_bytes())
    }

    /// How many times the node has started with this key, this time included. What was promised to an earlier start is
    /// not owed by this one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn secret(&self) -> &SecretKey {
        &self.secret
    }
}

fn load(path: &Path) -> Result<Option<SecretKey>, IdentityError> {
    let open = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path);
    let io = |source| IdentityError::Io {
        operation: "read",
        path: path.to_owned(),
        source,
    };
    let file = match open {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let meta = file.metadata().map_err(io)?;
    let refuse = |why: String| {
        Err(IdentityError::Open {
            path: path.to_owned(),
            why,
        })
    };
    let uid = rustix::process::geteuid().as_raw();
    if meta.uid() != uid {
        return refuse(format!(
            "it belongs to user {}, the node runs as {uid}",
            meta.uid()
        ));
    }
    if meta.mode() & 0o077 != 0 {
        return refuse(format!(
            "others may use it (mode {:o}); if nobody has, `chmod 600` it",
            meta.mode() & 0o777
        ));
    }
    let mut text = String::new();
    let damaged = || IdentityError::Damaged(path.to_owned());
    file.take(KEY_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(|_| damaged())?;
    parse(&text).map(Some).ok_or_else(damaged)
}

fn parse(text: &str) -> Option<SecretKey> {
    let digits = text
        .strip_prefix(HEAD)?
        .strip_prefix('\n')?
        .strip_suffix('\n')?;
    // The same form as a node's id: 64 lowercase digits.
    let bytes: NodeId = digits.parse().ok()?;
    Some(SecretKey::from_bytes(bytes.as_bytes()))
}

fn make(path: &Path) -> io::Result<SecretKey> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    let fresh = path.with_extension("new");
    // Left by a start that was cut short before there was a key.
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)?;
    writeln!(file, "{HEAD}\n{}", NodeId::from_bytes(bytes))?;
    file.sync_all()?;
    // A link, not a rename: a key that is there is never replaced.
    std::fs::hard_link(&fresh, path)?;
    std::fs::remove_file(&fresh)?;
    files::sync_dir(path)?;
    Ok(SecretKey::from_bytes(&bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_key_is_made_once_for_its_owner_alone_and_each_start_counts() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::open(dir.path()).unwrap();
        let mode = std::fs::metadata(dir.path().join(KEY_FILE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = Identity::open(dir.path()).unwrap();
        assert_eq!(first.id(), second.id());
        assert_eq!((first.generation(), second.generation()), (1, 2));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        Identity::open(dir.path()).unwrap();
        let key = dir.path().join(KEY_FILE);
        let before = std::fs::read(&key).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::open(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Open { .. }), "{error}");
        assert_eq!(std::fs::read(&key).unwrap(), before);
    }

    #[test]
    fn a_key_that_is_damaged_or_gone_is_never_made_again() {
        let dir = tempfile::tempdir().unwrap();
        Identity::open(dir.path()).unwrap();
        let key = dir.path().join(KEY_FILE);
        for text in ["", "vistara-key-1\n", "vistara-key-1\nabc\n", "x"] {
            std::fs::write(&key, text).unwrap();
            let error = Identity::open(dir.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Damaged(_)), "{error}");
            assert_eq!(std::fs::read_to_string(&key).unwrap(), text);
        }
        std::fs::remove_file(&key).unwrap();
        let error = Identity::open(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Gone(_)), "{error}");
        assert!(!key.exists());
    }

    #[test]
    fn a_link_in_the_keys_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&other, dir.path().join(KEY_FILE)).unwrap();
        assert!(Identity::open(dir.path()).is_err());
    }
}
