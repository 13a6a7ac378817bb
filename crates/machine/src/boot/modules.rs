//! Which kernel modules a guest loads, in which order, found among a kernel's.
//!
//! A Debian package carries no `modules.dep` (depmod makes it at installation), so the order comes from what each module
//! says of itself. What is loaded at which stage of the guest's life is a contract with the agent: it reads
//! `/modules/order`, lines of `<stage> <file>`, and loads a stage's files in that order when it needs the stage.

use super::unpack::{MODULE_BYTES_MAX, decompress, read_bounded};
use super::{BootError, elf};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The stages and what each loads, beside what these depend on.
///
/// `boot` is loaded before the root is mounted and must be complete; the others as a machine has such a device.
const STAGES: &[(&str, &[&str])] = &[
    (
        REQUIRED_STAGE,
        &[
            "virtio_ring",
            "virtio",
            "virtio_mmio",
            "virtio_console",
            "virtio_blk",
            "squashfs",
            "ext4",
            "overlay",
        ],
    ),
    ("net", &["failover", "net_failover", "virtio_net"]),
    ("share", &["fuse", "virtiofs"]),
    ("vsock", &["vmw_vsock_virtio_transport"]),
    ("rng", &["virtio_rng"]),
    ("balloon", &["virtio_balloon"]),
];
const REQUIRED_STAGE: &str = "boot";

/// The names of all stages.
pub(crate) fn stages() -> impl Iterator<Item = &'static str> {
    STAGES.iter().map(|(stage, _)| *stage)
}

/// Most modules looked at in a kernel's directory. Debian's full kernel has about 4,000.
const MODULES_MAX: usize = 50_000;

/// Most modules that a guest loads. Debian's cloud kernel needs 13; the bound also keeps the search's depth small.
const NEEDED_MAX: usize = 256;

/// A module kept with a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedModule {
    /// The stage that first needs it.
    pub stage: String,
    /// Its name, with `_` for `-`; its file is `<name>.ko`.
    pub name: String,
}

/// What was found for every stage.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Resolved {
    /// In load order, with the bytes to load.
    pub(crate) modules: Vec<(StagedModule, Vec<u8>)>,
    /// Wanted by a stage other than `boot`, and neither built in nor there.
    pub(crate) missing: Vec<String>,
}

/// The modules under a directory, and the names of those that are built in, by what `modules.builtin` in it says.
#[derive(Debug, Default)]
pub(crate) struct ModuleIndex {
    files: BTreeMap<String, PathBuf>,
    builtin: Option<BTreeSet<String>>,
}

/// The name of the module in this file: without directory and endings, `-` as `_`.
fn module_name(file_name: &str) -> Option<String> {
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|ending| file_name.strip_suffix(ending))?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (!stem.is_empty() && stem.bytes().all(plain)).then(|| stem.replace('-', "_"))
}

impl ModuleIndex {
    /// Reads the names under `dir`, which may be a tree. Symbolic links are not followed.
    pub(crate) fn scan(dir: &Path) -> Result<ModuleIndex, BootError> {
        let mut index = ModuleIndex::default();
        let mut open = vec![dir.to_owned()];
        while let Some(dir) = open.pop() {
            let error = || BootError::io("read directory", &dir);
            for entry in std::fs::read_dir(&dir).map_err(error())? {
                let entry = entry.map_err(error())?;
                let kind = entry.file_type().map_err(error())?;
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if kind.is_dir() {
                    open.push(entry.path());
                } else if name == "modules.builtin" {
                    let text = read_bounded(&entry.path(), MODULE_BYTES_MAX)?;
                    let text = String::from_utf8_lossy(&text).into_owned();
                    let names = text
                        .lines()
                        .filter_map(|line| module_name(line.rsplit('/').next().unwrap_or(line)));
                    index.builtin = Some(names.collect());
                } else if kind.is_file()
                    && let Some(module) = module_name(&name)
                {
                    index.files.insert(module, entry.path());
                }
                if index.files.len() + open.len() > MODULES_MAX {
                    return Err(BootError::malformed(
                        &dir,
                        "directory of modules",
                        format!("it holds more than {MODULES_MAX} modules"),
                    ));
                }
            }
        }
        Ok(index)
    }

    /// Finds what the stages need. `kernel` names the kernel in errors.
    ///
    /// Where there are neither modules nor a list of what is built in, everything is taken to be built in.
    pub(crate) fn resolve(&self, kernel: &str) -> Result<Resolved, BootError> {
        let mut resolved = Resolved::default();
        if self.files.is_empty() && self.builtin.is_none() {
            return Ok(resolved);
        }
        let mut seen = BTreeSet::new();
        for (stage, wanted) in STAGES {
            for name in *wanted {
                let before = (seen.clone(), resolved.modules.len());
                match self.visit(name, stage, kernel, &mut seen, &mut resolved) {
                    Err(BootError::ModuleMissing { module, .. }) if *stage != REQUIRED_STAGE => {
                        seen = before.0;
                        resolved.modules.truncate(before.1);
                        resolved.missing.push(module);
                    }
                    other => other?,
                }
            }
        }
        resolved.missing.sort();
        resolved.missing.dedup();
        Ok(resolved)
    }

    /// Depth first, so that what a module depends on comes before it. A circle ends at what has been seen.
    fn visit(
        &self,
        name: &str,
        stage: &str,
        kernel: &str,
        seen: &mut BTreeSet<String>,
        resolved: &mut Resolved,
    ) -> Result<(), BootError> {
        let is_builtin = match &self.builtin {
            Some(names) => names.contains(name),
            // Without a list, what is not there as a file is taken to be built in.
            None => !self.files.contains_key(name),
        };
        if is_builtin || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            return Err(BootError::ModuleMissing {
                kernel: kernel.to_owned(),
                module: name.to_owned(),
            });
        };
        let damaged = |reason: String| BootError::malformed(path, "kernel module", reason);
        if seen.len() > NEEDED_MAX {
            return Err(damaged(format!(
                "it belongs to a chain of over {NEEDED_MAX} dependencies"
            )));
        }
        let packed = read_bounded(path, MODULE_BYTES_MAX)?;
        let data = decompress(&packed, MODULE_BYTES_MAX).map_err(|e| damaged(e.to_string()))?;
        for depended in elf::module_depends(&data).map_err(|e| damaged(e.to_string()))? {
            self.visit(&depended, stage, kernel, seen, resolved)?;
        }
        let slim = elf::slim_module(&data).map_err(|e| damaged(e.to_string()))?;
        let module = StagedModule {
            stage: stage.to_owned(),
            name: name.to_owned(),
        };
        resolved.modules.push((module, slim));
        Ok(())
    }
}

/// The text of `/modules/order`.
pub(crate) fn order_file(modules: &[StagedModule]) -> String {
    modules
        .iter()
        .map(|module| format!("{} {}.ko\n", module.stage, module.name))
        .collect()
}

#[cfg(test)]
mod tests;
