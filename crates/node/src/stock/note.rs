//! The note in the directory of a machine of the stock: all that is known of it once its node was killed.
//!
//! It is written before the launch and goes with the directory. A node that cannot use the monitor leaves both alone: nobody
//! else would find the machine any more.

use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use vistara_model::VmmKind;

const FILE: &str = "stock.json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Its monitor, as text: another version may know others.
    pub(crate) vmm: String,
    pub(crate) slot: u32,
    /// The host's boot in which it was started: no machine outlives that.
    boot_id: Option<String>,
}

impl Note {
    pub(crate) fn new(vmm: VmmKind, slot: u32) -> Note {
        Note {
            vmm: vmm.to_string(),
            slot,
            boot_id: vistara_host::facts::boot_id().ok(),
        }
    }

    /// Whether its machine may still run: the host was not restarted since.
    pub(crate) fn may_run(&self) -> bool {
        match (&self.boot_id, vistara_host::facts::boot_id()) {
            (Some(then), Ok(now)) => *then == now,
            _ => true,
        }
    }

    pub(crate) fn is_of(&self, kind: VmmKind) -> bool {
        self.vmm == kind.to_string()
    }

    /// Puts the note into `dir`, all of it or none. Blocks on files.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        let fresh = dir.join("stock.json.new");
        std::fs::write(&fresh, bytes)?;
        std::fs::rename(&fresh, dir.join(FILE))
    }

    /// The note in `dir`, if there is one. It is whole before its machine is launched. Blocks on files.
    pub(crate) fn read(dir: &Path) -> Option<Note> {
        let bytes = std::fs::read(dir.join(FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}
