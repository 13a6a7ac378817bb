//! The books of what this node has granted: one file that is replaced as a whole. A token counts only while its grant stands
//! here.

use super::now_s;
use crate::fault::{Answer, Fault};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use vistara_api::ErrorKind;
use vistara_control::Standing;
use vistara_model::{GrantId, GrantTerms, NodeId};

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Most grants that are kept; those that expired long ago make room.
const GRANTS_MAX: usize = 10_000;
/// How long an expired grant is still shown: a month.
const EXPIRED_KEPT_S: u64 = 30 * 24 * 3600;

/// One grant in the books.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Given {
    pub(crate) terms: GrantTerms,
    /// Seconds since 1970.
    pub(crate) given_s: u64,
    #[serde(default)]
    pub(crate) revoked_s: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    grants: Vec<Given>,
}

/// The books.
#[derive(Debug)]
pub(crate) struct Ledger {
    path: PathBuf,
    grants: Vec<Given>,
}

impl Ledger {
    /// Reads `grants.json` in `dir`; there may be none. A damaged one is left alone and stops the mesh: without the books
    /// a revoked token could not be told from a good one.
    pub(crate) fn open(dir: &Path) -> Answer<Ledger> {
        let path = dir.join("grants.json");
        let damaged = |why: String| {
            Fault::new(
                ErrorKind::Host,
                format!("{path:?} does not hold grants: {why}"),
            )
            .hint("put a copy back, or remove it: every grant is void then")
        };
        let grants = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(damaged(error.to_string())),
            Ok(bytes) => match serde_json::from_slice::<Kept>(&bytes) {
                Ok(kept) if kept.format == FORMAT => kept.grants,
                Ok(kept) => return Err(damaged(format!("its format is {}", kept.format))),
                Err(error) => return Err(damaged(error.to_string())),
            },
        };
        Ok(Ledger { path, grants })
    }

    /// All, in the order in which they were given.
    pub(crate) fn all(&self) -> &[Given] {
        &self.grants
    }

    /// How it stands with one.
    pub(crate) fn standing(&self, id: &GrantId) -> Standing {
        match self.grants.iter().find(|given| given.terms.id == *id) {
            None => Standing::Unknown,
            Some(given) if given.revoked_s.is_some() => Standing::Revoked,
            Some(_) => Standing::Live,
        }
    }

    /// Whether somebody holds a grant that stands.
    pub(crate) fn has_live_grant(&self, holder: &NodeId, now_s: u64) -> bool {
        self.grants.iter().any(|given| {
            given.terms.holder == *holder
                && given.revoked_s.is_none()
                && now_s <= given.terms.until_s
        })
    }

    /// Enters a grant. Blocks.
    pub(crate) fn give(&mut self, terms: GrantTerms) -> Answer<Given> {
        let now = now_s();
        let mut grants = self.grants.clone();
        grants.retain(|given| given.terms.until_s.saturating_add(EXPIRED_KEPT_S) >= now);
        if grants.len() >= GRANTS_MAX {
            return Err(Fault::conflict(format!(
                "this node keeps {GRANTS_MAX} grants and gives no more"
            ))
            .hint("wait until some have expired"));
        }
        let given = Given {
            terms,
            given_s: now,
            revoked_s: None,
        };
        grants.push(given.clone());
        self.save(grants)?;
        Ok(given)
    }

    /// Takes one back. Blocks.
    pub(crate) fn revoke(&mut self, id: &GrantId, now_s: u64) -> Answer<Given> {
        let mut grants = self.grants.clone();
        let given = grants.iter_mut().find(|given| given.terms.id == *id);
        let given = given.ok_or_else(|| {
            Fault::new(ErrorKind::NotFound, format!("there is no grant {id}"))
                .hint("`vistara grant ls` lists them")
        })?;
        given.revoked_s.get_or_insert(now_s);
        let given = given.clone();
        self.save(grants)?;
        Ok(given)
    }

    fn save(&mut self, grants: Vec<Given>) -> Answer<()> {
        let kept = Kept {
            format: FORMAT,
            grants,
        };
        let write = || {
            let bytes = serde_json::to_vec_pretty(&kept).map_err(std::io::Error::other)?;
            let fresh = self.path.with_extension("new");
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&bytes)?;
            // A revocation that a power cut undoes would be none.
            file.sync_all()?;
            std::fs::rename(&fresh, &self.path)?;
            match self.path.parent() {
                Some(dir) => std::fs::File::open(dir)?.sync_all(),
                None => Ok(()),
            }
        };
        write().map_err(|error| {
            Fault::new(
                ErrorKind::Host,
                format!("cannot write {:?}: {error}", self.path),
            )
        })?;
        self.grants = kept.grants;
        Ok(())
    }
}
