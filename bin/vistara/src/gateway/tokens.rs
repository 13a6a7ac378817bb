//! The gateway's tokens: who may ask. A token is `vistara-gateway-ID-SECRET`; kept is the SHA-256 of its secret, which is 256
//! random bits, so that nobody who reads the file can ask, and no slow hash is needed.
//!
//! The file is read anew for each request: a token that was revoked is of no use from then on.

use crate::failure::Failure;
use crate::places::Places;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

/// What a token begins with, so that one that got lost is recognized.
const PREFIX: &str = "vistara-gateway-";
/// Digits of a token's id.
const ID_DIGITS: usize = 16;
/// Digits of a token's secret.
const SECRET_DIGITS: usize = 64;
/// Largest file of tokens, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most tokens: each is compared with, for each request.
const TOKENS_MAX: usize = 1000;
/// The version of the file's form.
const FORMAT: u32 = 1;

/// One token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    /// Its name, which its maker gave it.
    pub(crate) name: String,
    /// Its id. Machines that were made with it are labelled so.
    pub(crate) id: String,
    /// When it was made.
    pub(crate) created_at: String,
    /// SHA-256 of its secret, in hexadecimal digits.
    secret_sha256: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    format: u32,
    tokens: Vec<Token>,
}

/// The tokens of one state directory.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    path: PathBuf,
}

impl Tokens {
    /// Those beside this node's state.
    pub(crate) fn of(places: &Places) -> Tokens {
        Tokens {
            path: places.state_dir.join("gateway-tokens.json"),
        }
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Result<Vec<Token>, Failure> {
        let what = || format!("cannot read {}", self.path.display());
        let file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Failure::because(what(), error)),
        };
        let mode = file
            .metadata()
            .map_err(|error| Failure::because(what(), error))?
            .mode();
        if mode & 0o077 != 0 {
            return Err(
                Failure::because(what(), "others may read or write it").hint(format!(
                    "`chmod 600 {}` after a look at whose tokens are in it",
                    self.path.display()
                )),
            );
        }
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(|error| Failure::because(what(), error))?;
        let file: File =
            serde_json::from_slice(&bytes).map_err(|error| Failure::because(what(), error))?;
        if file.format != FORMAT {
            return Err(Failure::because(
                what(),
                format!(
                    "it is of version {}, and this program knows {FORMAT}",
                    file.format
                ),
            ));
        }
        Ok(file.tokens)
    }

    /// Makes a token; what it gives is shown once.
    pub(crate) fn create(&self, name: &str, now: String) -> Result<String, Failure> {
        let mut random = [0; (ID_DIGITS + SECRET_DIGITS) / 2];
        getrandom::fill(&mut random)
            .map_err(|error| Failure::because("cannot make a token", error))?;
        let digits = hex(&random);
        let (id, secret) = digits.split_at(ID_DIGITS);
        let token = Token {
            name: name.to_owned(),
            id: id.to_owned(),
            created_at: now,
            secret_sha256: hex(&Sha256::digest(secret.as_bytes())),
        };
        self.change(|tokens| {
            if tokens.iter().any(|other| other.name == name) {
                return Err(
                    Failure::new(format!("there is a token {name} already")).hint(format!(
                        "`vistara gateway token rm {name}` revokes it, or choose another name"
                    )),
                );
            }
            if tokens.len() >= TOKENS_MAX {
                return Err(
                    Failure::new(format!("there are {TOKENS_MAX} tokens already"))
                        .hint("`vistara gateway token rm NAME` revokes one"),
                );
            }
            tokens.push(token);
            tokens.sort_by(|one, other| one.name.cmp(&other.name));
            Ok(())
        })?;
        Ok(format!("{PREFIX}{id}-{secret}"))
    }

    /// Revokes a token by its name or id.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Failure> {
        self.change(|tokens| {
            let before = tokens.len();
            tokens.retain(|token| token.name != name && token.id != name);
            if tokens.len() == before {
                return Err(Failure::new(format!("there is no token {name}"))
                    .hint("`vistara gateway token ls` lists them"));
            }
            Ok(())
        })
    }

    /// Replaces the file as a whole, alone.
    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Token>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let what = || format!("cannot write {}", self.path.display());
        let failed = |error: std::io::Error| Failure::because(what(), error);
        let open = |path: &PathBuf| {
            std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(path)
        };
        let lock = open(&self.path.with_extension("lock")).map_err(failed)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| failed(error.into()))?;
        let mut tokens = self.all()?;
        change(&mut tokens)?;
        let text = serde_json::to_vec_pretty(&File {
            format: FORMAT,
            tokens,
        })
        .map_err(|error| Failure::because(what(), error))?;
        let new = self.path.with_extension("new");
        // One that was left by a crash may have another mode.
        let _ = std::fs::remove_file(&new);
        let mut file = open(&new).map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        std::fs::rename(&new, &self.path).map_err(failed)
    }
}

/// The token that an `Authorization` header shows. All are compared with, each in the same time.
pub(crate) fn find(tokens: &[Token], header: &[u8]) -> Option<Token> {
    let header = std::str::from_utf8(header).ok()?;
    let (scheme, shown) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (id, secret) = shown.trim().strip_prefix(PREFIX)?.split_once('-')?;
    if id.len() != ID_DIGITS || secret.len() != SECRET_DIGITS {
        return None;
    }
    let shown = hex(&Sha256::digest(secret.as_bytes()));
    let mut found = None;
    for token in tokens {
        let same_secret = same(token.secret_sha256.as_bytes(), shown.as_bytes());
        if same_secret & same(token.id.as_bytes(), id.as_bytes()) {
            found = Some(token);
        }
    }
    found.cloned()
}

/// Whether two texts are the same, in a time that depends on their lengths alone.
fn same(one: &[u8], other: &[u8]) -> bool {
    let differ = one
        .iter()
        .zip(other)
        .fold(0, |differ, (a, b)| std::hint::black_box(differ | (a ^ b)));
    (one.len() == other.len()) & (differ == 0)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scene() -> (tempfile::TempDir, Tokens) {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens {
            path: dir.path().join("gateway-tokens.json"),
        };
        (dir, tokens)
    }

    fn shown(tokens: &Tokens, header: &str) -> Option<String> {
        find(&tokens.all().unwrap(), header.as_bytes()).map(|token| token.name)
    }

    #[test]
    fn a_token_counts_until_it_is_revoked_and_its_secret_is_not_kept() {
        let (dir, tokens) = scene();
        let one = tokens.create("one", "now".to_owned()).unwrap();
        let two = tokens.create("two", "now".to_owned()).unwrap();
        assert_ne!(one, two);
        assert!(tokens.create("one", "now".to_owned()).is_err());
        assert_eq!(
            shown(&tokens, &format!("Bearer {one}")).as_deref(),
            Some("one")
        );
        assert_eq!(
            shown(&tokens, &format!("bearer {two}")).as_deref(),
            Some("two")
        );
        let path = dir.path().join("gateway-tokens.json");
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(!kept.contains(one.rsplit('-').next().unwrap()), "{kept}");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        tokens.remove("one").unwrap();
        assert_eq!(shown(&tokens, &format!("Bearer {one}")), None);
        assert!(tokens.remove("one").is_err());
        assert_eq!(
            shown(&tokens, &format!("Bearer {two}")).as_deref(),
            Some("two")
        );
    }

    #[test]
    fn what_is_not_exactly_a_token_is_none() {
        let (_dir, tokens) = scene();
        let good = tokens.create("one", "now".to_owned()).unwrap();
        let other = tokens.create("two", "now".to_owned()).unwrap();
        let (id, _) = good.rsplit_once('-').unwrap();
        let (_, secret) = other.rsplit_once('-').unwrap();
        for header in [
            String::new(),
            good.clone(),
            format!("Basic {good}"),
            format!("Bearer{good}"),
            format!("Bearer {}", &good[..good.len() - 1]),
            format!("Bearer {good}0"),
            format!("Bearer {}", good.to_uppercase()),
            format!("Bearer {id}-{secret}"),
            format!("Bearer {id}-"),
            "Bearer vistara-gateway--".to_owned(),
            format!("Bearer {}", "x".repeat(9000)),
        ] {
            assert_eq!(shown(&tokens, &header), None, "{header}");
        }
        assert_eq!(find(&tokens.all().unwrap(), b"Bearer \xff\xfe"), None);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let (dir, tokens) = scene();
        tokens.create("one", "now".to_owned()).unwrap();
        let path = dir.path().join("gateway-tokens.json");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let failure = tokens.all().unwrap_err();
        assert!(failure.hint.is_some_and(|hint| hint.contains("chmod 600")));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "{}").unwrap();
        assert!(tokens.all().is_err());
    }
}
