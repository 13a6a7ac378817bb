//! What of services is on disk: `services/ID/` of the state directory.
//!
//! `document` is the newest sealed document; `keepers.json` who looks after the service, as far as this node has heard;
//! `keeper.json` what this node knows as a keeper; `late.json` which nodes the owner has yet to tell that the service is removed;
//! `end.json` how the owner's task has ended. Each is replaced as a whole and forced to the disk before anybody is
//! answered on the strength of it. A directory without a good document is nobody's. All of this blocks on files.

use super::tasks::Settled;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vistara_control::services::{KeeperState, Keepers, ServiceId};
use vistara_mesh::service::SealedDocument;
use vistara_model::NodeId;

/// Version of the files' form.
const FORMAT: u32 = 1;
const DOCUMENT: &str = "document";
const KEEPERS: &str = "keepers.json";
const KEEPER: &str = "keeper.json";
const LATE: &str = "late.json";
const END: &str = "end.json";

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    format: u32,
    value: T,
}

/// Everything that is kept of one service.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) document: SealedDocument,
    pub(super) keepers: Option<Keepers>,
    pub(super) keeper: Option<KeeperState>,
    /// Of a removed service its owner tells these, which may not have heard.
    pub(super) late: Vec<NodeId>,
    /// How the owner's task has ended.
    pub(super) settled: Option<Settled>,
}

/// Where services are kept.
#[derive(Debug, Clone)]
pub(super) struct Store(PathBuf);

/// A service's number, as it is written.
pub(crate) fn text(service: ServiceId) -> String {
    format!("{:032x}", service.0)
}

/// What a node finds at its start.
#[derive(Default)]
pub(super) struct Kept {
    /// What can be read.
    pub(super) services: Vec<Stored>,
    /// What cannot: this node may have promised something there, and promises nothing else.
    pub(super) damaged: BTreeSet<ServiceId>,
}

fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, dir.join(name))?;
    File::open(dir)?.sync_all()
}

fn write<T: Serialize>(dir: &Path, name: &str, value: T) -> io::Result<()> {
    let format = FORMAT;
    let bytes = serde_json::to_vec(&Versioned { format, value }).map_err(io::Error::other)?;
    replace(dir, name, &bytes)
}

/// None where there is no such file.
fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    let bytes = match std::fs::read(dir.join(name)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let read: Versioned<T> = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
    match read.format {
        FORMAT => Ok(Some(read.value)),
        other => Err(io::Error::other(format!(
            "its format is {other}, and this version reads {FORMAT}"
        ))),
    }
}

impl Store {
    pub(super) fn new(state_dir: &Path) -> Store {
        Store(state_dir.join("services"))
    }

    fn dir(&self, service: ServiceId) -> PathBuf {
        self.0.join(text(service))
    }

    /// Whether there is anything.
    pub(super) fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.0).map_or(true, |mut entries| entries.next().is_none())
    }

    /// All that is kept. What cannot be read is reported and left: it may be a promise.
    pub(super) fn all(&self) -> Kept {
        let mut all = Kept::default();
        let Ok(entries) = std::fs::read_dir(&self.0) else {
            return all;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let named = u128::from_str_radix(&name.to_string_lossy(), 16).map(ServiceId);
            match load(&entry.path()) {
                Ok(Some(stored)) if entry.file_name() == *text(id(&stored.document)) => {
                    all.services.push(stored);
                }
                Ok(Some(_)) => {
                    tracing::error!(path = %entry.path().display(), "a service lies where another belongs");
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(path = %entry.path().display(), %error, "what is kept of a service cannot be read; this node looks after it no more until the directory is mended or, 20 s after the node's end, removed");
                    all.damaged.extend(named);
                }
            }
        }
        all
    }

    pub(super) fn put_document(&self, document: &SealedDocument) -> io::Result<()> {
        let dir = self.dir(id(document));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&dir)?;
        replace(&dir, DOCUMENT, document.bytes())
    }

    pub(super) fn put_keepers(&self, service: ServiceId, keepers: &Keepers) -> io::Result<()> {
        write(&self.dir(service), KEEPERS, keepers)
    }

    pub(super) fn put_keeper(&self, service: ServiceId, state: &KeeperState) -> io::Result<()> {
        write(&self.dir(service), KEEPER, state)
    }

    pub(super) fn put_late(&self, service: ServiceId, late: &[NodeId]) -> io::Result<()> {
        write(&self.dir(service), LATE, late)
    }

    pub(super) fn put_end(&self, service: ServiceId, settled: &Settled) -> io::Result<()> {
        write(&self.dir(service), END, settled)
    }

    /// The service is wanted no more: nothing but its last document stays, for those that have not heard.
    pub(super) fn strip(&self, service: ServiceId) -> io::Result<()> {
        for name in [KEEPERS, KEEPER, END] {
            match std::fs::remove_file(self.dir(service).join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Forgets it altogether.
    pub(super) fn remove(&self, service: ServiceId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.dir(service)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// When the document was written.
    pub(super) fn written(&self, service: ServiceId) -> Option<std::time::SystemTime> {
        let meta = std::fs::metadata(self.dir(service).join(DOCUMENT)).ok()?;
        meta.modified().ok()
    }
}

pub(super) fn id(document: &SealedDocument) -> ServiceId {
    ServiceId(document.document().service)
}

fn load(dir: &Path) -> io::Result<Option<Stored>> {
    let bytes = match std::fs::read(dir.join(DOCUMENT)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(Stored {
        document: SealedDocument::read(&bytes).map_err(io::Error::other)?,
        keepers: read(dir, KEEPERS)?,
        keeper: read(dir, KEEPER)?,
        late: read(dir, LATE)?.unwrap_or_default(),
        settled: read(dir, END)?,
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use vistara_control::services::{Ballot, End, Outcome, Record, Semantics, Spec};
    use vistara_mesh::Identity;
    use vistara_mesh::service::{Eligible, Placement, ServiceDocument};
    use vistara_model::{Bytes, Cpus, Generation, Hypervisor};

    fn sealed(dir: &Path) -> SealedDocument {
        let identity = Identity::open(dir).unwrap();
        let document = ServiceDocument {
            service: 7,
            version: 3,
            owner: identity.id(),
            name: "web".to_owned(),
            replicas: 2,
            removed: false,
            image: format!("sha256:{}", "ab".repeat(32)).parse().unwrap(),
            memory: Bytes(64 << 20),
            cpus: Cpus::ONE,
            hypervisor: Hypervisor::Auto,
            request: b"{}".to_vec(),
            placement: Placement::default(),
            nodes: vec![Eligible {
                node: identity.id(),
                token: None,
            }],
            task: None,
        };
        document.seal(&identity).unwrap()
    }

    #[test]
    fn what_a_keeper_has_promised_is_read_back_and_damage_is_not_taken_for_nothing_promised() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let document = sealed(dirs[0].path());
        let service = id(&document);
        let node = NodeId::from_bytes([9; 32]);
        let keepers = Keepers {
            epoch: 4,
            nodes: vec![node],
        };
        let record = Record {
            largest: Generation(8),
            held: Some((Generation(8), node)),
            outcome: Some(Outcome {
                node,
                generation: Generation(8),
                exit_code: 3,
            }),
            ..Record::default()
        };
        let state = KeeperState {
            node,
            spec: Spec {
                service,
                version: 3,
                replicas: 2,
                semantics: Semantics::Service,
            },
            keepers: keepers.clone(),
            records: BTreeMap::from([(0, record), (1, record)]),
            promised: Some(Ballot(5, node)),
            accepted: Some((Ballot(5, node), keepers.clone())),
            moved: Some(keepers.clone()),
        };
        let settled = Settled {
            end: End::Lost,
            heard_s: 5,
        };
        let store = Store::new(dirs[1].path());
        assert!(store.is_empty() && store.all().services.is_empty());
        store.put_document(&document).unwrap();
        store.put_keepers(service, &keepers).unwrap();
        store.put_keeper(service, &state).unwrap();
        store.put_end(service, &settled).unwrap();
        let all = store.all().services;
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].document, document);
        assert_eq!(all[0].keepers.as_ref(), Some(&keepers));
        assert_eq!(all[0].keeper.as_ref(), Some(&state));
        assert_eq!(all[0].settled, Some(settled));

        let path = store.dir(service).join(KEEPER);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(store.all().services.is_empty(), "it is left alone");
        assert_eq!(store.all().damaged, BTreeSet::from([service]));
        store.strip(service).unwrap();
        store.put_late(service, &[node]).unwrap();
        let stripped = store.all().services;
        assert!(stripped[0].keeper.is_none() && stripped[0].settled.is_none());
        assert_eq!(store.all().services[0].late, [node]);
        store.remove(service).unwrap();
        assert!(store.is_empty());
    }
}
