//! The Linux payload: kernel, initramfs and command line for one machine.
//!
//! The initramfs is an uncompressed `newc` archive: `/init` (the agent), `/dev/console`, `/modules/<name>.ko` and
//! `/modules/order`. It is the same for all machines with the same kernel and agent, and kept under a name made of what
//! is in it, so a stale one is never found.

use super::cpio::Archive;
use super::modules::order_file;
use super::unpack::{MODULE_BYTES_MAX, read_bounded};
use super::{BootError, Kernel};
use crate::LinuxBoot;
use sha2::{Digest as _, Sha256};
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

/// Version of the initramfs's layout; part of its name.
const INITRAMFS_FORMAT: u32 = 1;
/// How many initramfs images are kept: a few kernels times the agent's last few versions, some MB each.
const INITRAMFS_KEPT: usize = 8;
/// One used this recently may be about to be opened by a monitor, and is kept whatever the count.
const INITRAMFS_FRESH: Duration = Duration::from_secs(3600);

/// Mode of an initramfs: there is no secret in it.
const FOR_ALL: u32 = 0o644;

/// Words for every guest kernel. `docs/internals/boot-time.md` has the measurements.
///
/// - `quiet`: a line on the serial console costs about as much as printing it on a real one.
/// - `panic=-1 reboot=t`: a panic or an exit of the agent ends the machine at once, by triple fault, which every monitor
///   understands.
/// - `cryptomgr.notests`: the ciphers' self-tests.
/// - `noreplace-smp`: leaves the kernel's locks as they are, rather than patching them out on one processor.
pub(crate) const CMDLINE: &str = "quiet panic=-1 reboot=t cryptomgr.notests noreplace-smp";

/// Where a guest's writes to its root go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UpperLayer {
    /// To the machine's second disk (`/dev/vdb`), made by [`super::overlay::OverlayTemplates`].
    Disk,
    /// To the guest's memory; gone with the machine.
    Memory,
}

impl UpperLayer {
    /// The value of `vistara.overlay=`, which the agent reads.
    fn word(self) -> &'static str {
        match self {
            UpperLayer::Disk => "/dev/vdb",
            UpperLayer::Memory => "tmpfs",
        }
    }
}

/// Makes what a Linux guest is booted with, and keeps the initramfs images it has made.
#[derive(Debug, Clone)]
pub struct LinuxPayload {
    cache: PathBuf,
    agent: &'static [u8],
    /// The agent's SHA-256. Reading some MiB for it at each start would take as long as all else that is prepared.
    digest: Arc<OnceLock<[u8; 32]>>,
}

impl LinuxPayload {
    /// A payload maker for this agent (an ELF program, PID 1 in the guest), whose initramfs images are kept in `cache`, which
    /// is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(cache: &Path, agent: &'static [u8]) -> Result<LinuxPayload, BootError> {
        fs::create_dir_all(cache).map_err(BootError::io("make directory", cache))?;
        Ok(LinuxPayload {
            cache: cache.to_owned(),
            agent,
            digest: Arc::default(),
        })
    }

    /// The boot of a machine with this kernel and this upper layer. The first call for a kernel writes an initramfs, later
    /// ones find it.
    ///
    /// # Errors
    /// [`BootError::Io`], [`BootError::Malformed`].
    pub fn prepare(&self, kernel: &Kernel, upper: UpperLayer) -> Result<LinuxBoot, BootError> {
        let boot = self.planned(kernel, upper);
        let initramfs = &boot.initramfs;
        // Marked as used now, so that it is not among the old ones; if that fails it is not there.
        let found = fs::File::options()
            .write(true)
            .open(initramfs)
            .and_then(|file| {
                // Earlier versions kept it from others.
                file.set_permissions(Permissions::from_mode(FOR_ALL))?;
                file.set_modified(SystemTime::now())
            });
        if found.is_err() {
            self.write(initramfs, &initramfs_bytes(kernel, self.agent)?)?;
            self.remove_old();
        }
        Ok(boot)
    }

    /// What [`LinuxPayload::prepare`] gives, whose initramfs need not be there: nothing is written, and none looked for.
    pub fn planned(&self, kernel: &Kernel, upper: UpperLayer) -> LinuxBoot {
        let digest = self
            .digest
            .get_or_init(|| Sha256::digest(self.agent).into());
        LinuxBoot {
            kernel: kernel.vmlinux(),
            initramfs: self.cache.join(format!("{}.cpio", key(kernel, digest))),
            cmdline: format!(
                "{CMDLINE} vistara.root=/dev/vda vistara.overlay={} vistara.channel=virtio-serial",
                upper.word()
            ),
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), BootError> {
        let error = || BootError::io("write", path);
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.cache)
            .map_err(error())?;
        file.write_all(bytes).map_err(error())?;
        // A monitor that runs as a user of its own need not have a copy.
        let for_all = Permissions::from_mode(FOR_ALL);
        file.as_file().set_permissions(for_all).map_err(error())?;
        // Synced, as after a power cut a name with nothing behind it would boot nothing.
        file.as_file().sync_all().map_err(error())?;
        file.persist(path).map_err(|e| error()(e.error))?;
        Ok(())
    }

    /// Removes what was used longest ago, beyond the number kept. Failures are left for the next time.
    fn remove_old(&self) {
        let Ok(entries) = fs::read_dir(&self.cache) else {
            return;
        };
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort_by(|one, other| other.cmp(one));
        for (used, path) in files.into_iter().skip(INITRAMFS_KEPT) {
            if used.elapsed().is_ok_and(|age| age > INITRAMFS_FRESH) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// A name made of everything that is in the initramfs; `agent` is the agent's digest.
fn key(kernel: &Kernel, agent: &[u8; 32]) -> String {
    let record = &kernel.record;
    let mut hash = Sha256::new();
    hash.update(INITRAMFS_FORMAT.to_le_bytes());
    // The modules belong to the kernel's build, and the build's banner is in the vmlinux.
    hash.update(record.vmlinux_sha256.as_bytes());
    hash.update(record.added_unix_s.to_le_bytes());
    hash.update(order_file(&record.modules).as_bytes());
    hash.update(agent);
    hex::encode(&hash.finalize()[..16])
}

fn initramfs_bytes(kernel: &Kernel, agent: &[u8]) -> Result<Vec<u8>, BootError> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, agent);
    archive.directory("modules");
    for module in &kernel.record.modules {
        let file_name = format!("{}.ko", module.name);
        let path = kernel.modules().join(&file_name);
        let data = read_bounded(&path, MODULE_BYTES_MAX)?;
        archive.file(&format!("modules/{file_name}"), 0o644, &data);
    }
    let order = order_file(&kernel.record.modules);
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

#[cfg(test)]
mod tests;
