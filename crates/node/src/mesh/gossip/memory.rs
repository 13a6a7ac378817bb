//! Members that were alive when this node last ran: whom it asks first when those that it has joined are gone. Their signed
//! cards, in one file that is replaced as a whole; one that cannot be read is as good as none.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use vistara_mesh::card::Card;

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Most that are remembered: any of them leads to all others.
pub(super) const REMEMBERED_MAX: usize = 64;
/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 256 << 10;

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    members: Vec<String>,
}

/// Replaces the file, durably. It is its user's alone: it says whom this node knows. Blocks.
pub(super) fn write(path: &Path, cards: &[Arc<[u8]>]) -> std::io::Result<()> {
    let kept = Kept {
        format: FORMAT,
        members: cards.iter().map(|card| STANDARD.encode(card)).collect(),
    };
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(&serde_json::to_vec(&kept)?)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// The cards in the file, each of them verified again, and as they were signed. Blocks.
pub(super) fn read(path: &Path) -> Vec<(Card, Arc<[u8]>)> {
    let length = std::fs::metadata(path).map_or(0, |file| file.len());
    if length == 0 || length > FILE_BYTES_MAX {
        return Vec::new();
    }
    let kept = std::fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok())
        .filter(|kept| kept.format == FORMAT);
    let Some(kept) = kept else {
        tracing::warn!(
            ?path,
            "remembered members cannot be read; they are found again"
        );
        return Vec::new();
    };
    (kept.members.iter())
        .take(REMEMBERED_MAX)
        .filter_map(|text| {
            let bytes = STANDARD.decode(text).ok()?;
            Some((Card::read(&bytes).ok()?, Arc::from(bytes)))
        })
        .collect()
}
