//! Of what a template is made, and the key that follows from it.

use crate::machine::{MACHINE_UIDS, MONITOR_PIDS, OVERHEAD, Record, UID_BASE};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vistara_image::ImageStore;
use vistara_machine::boot::overlay::OverlayTemplates;
use vistara_machine::{Disk, Fence, LaunchPlan, LinuxBoot, Nic, Start, Vmm};
use vistara_model::{Accelerator, Bytes, Digest, EnvVar, MachineId, MachineSpec, Network, Rates};

/// Version of how templates are made; part of their keys.
const RECIPE: u32 = 2;
/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 32;
/// Users as which machines to be captured run, one after the other: above the machines' own. Below them systemd-nspawn
/// gives users to containers (`UIDS-GIDS` of systemd: up to 0x6fff_ffff). Far more than are made at once.
const UID_FIRST: u32 = UID_BASE + MACHINE_UIDS;
const UIDS: u32 = 4096;

/// What of a machine says from which template it can be forked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) image_id: &'a Digest,
    pub(crate) spec: &'a MachineSpec,
    /// The kernel's name, for listings.
    pub(crate) kernel: Option<&'a str>,
    pub(crate) accelerator: Accelerator,
    /// The program that the template's guest reads before it is captured, and the environment whose `PATH` finds it.
    pub(crate) argv: &'a [String],
    pub(crate) env: &'a [EnvVar],
}

impl<'a> Shape<'a> {
    /// That of a machine that is accepted.
    pub(crate) fn of(record: &'a Record) -> Shape<'a> {
        Shape {
            image_id: &record.image_id,
            spec: &record.spec,
            kernel: record.kernel.as_deref(),
            accelerator: record.backend.accelerator,
            argv: &record.argv,
            env: &record.env,
        }
    }
}

/// The host's part in a template.
pub(crate) struct Parts {
    /// The image's root disk.
    pub(crate) root: PathBuf,
    pub(crate) boot: LinuxBoot,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) overlays: OverlayTemplates,
    /// Where the image may vanish from meanwhile.
    pub(crate) images: ImageStore,
    /// Whether monitors run as users of their own.
    pub(crate) is_root: bool,
    pub(crate) boot_bound: Duration,
}

/// Everything a template is made of, and nothing else.
pub(crate) struct Blueprint {
    pub(super) image_id: Digest,
    pub(super) image: String,
    pub(super) kernel: String,
    pub(super) accelerator: Accelerator,
    pub(super) vcpus: u32,
    pub(super) memory: Bytes,
    /// Size of the writable disk.
    pub(super) disk: Bytes,
    pub(super) network: bool,
    /// Files that the image's programs read first.
    pub(super) read_ahead: Vec<String>,
    pub(super) parts: Parts,
}

impl Blueprint {
    pub(crate) fn new(shape: Shape<'_>, parts: Parts) -> Blueprint {
        Blueprint {
            image_id: shape.image_id.clone(),
            image: shape.spec.image.familiar(),
            kernel: shape.kernel.unwrap_or_default().to_owned(),
            accelerator: shape.accelerator,
            vcpus: shape.spec.cpus.vcpus(),
            memory: shape.spec.memory,
            disk: shape.spec.disk,
            network: shape.spec.network == Network::User,
            read_ahead: read_ahead(shape.argv, shape.env),
            parts,
        }
    }

    /// A name made of everything that a fork shares with the template.
    pub(crate) fn key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let capabilities = self.parts.vmm.capabilities();
        let boot = &self.parts.boot;
        part(&RECIPE.to_le_bytes());
        part(self.image_id.to_string().as_bytes());
        // The name of the initramfs is a digest of kernel, modules and agent.
        part(boot.initramfs.as_os_str().as_encoded_bytes());
        part(boot.cmdline.as_bytes());
        part(capabilities.kind.to_string().as_bytes());
        part(capabilities.version.as_bytes());
        part(
            capabilities
                .cpu_template
                .as_deref()
                .unwrap_or_default()
                .as_bytes(),
        );
        part(self.accelerator.to_string().as_bytes());
        part(&self.vcpus.to_le_bytes());
        part(&self.memory.0.to_le_bytes());
        part(&self.disk.0.to_le_bytes());
        part(&[u8::from(self.network)]);
        hash.finalize().to_hex()[..KEY_DIGITS].to_owned()
    }

    /// How the machine that is to be captured starts: as any fork's, with a name, an address and a user that no fork keeps.
    pub(super) fn plan(&self, id: MachineId, dir: &Path, overlay: PathBuf) -> LaunchPlan {
        LaunchPlan {
            id,
            dir: dir.to_owned(),
            accelerator: self.accelerator,
            vcpus: self.vcpus,
            memory: self.memory,
            start: Start::Linux(self.parts.boot.clone()),
            huge_pages: false,
            capturable: true,
            disks: vec![
                Disk {
                    path: self.parts.root.clone(),
                    read_only: true,
                },
                Disk {
                    path: overlay,
                    read_only: false,
                },
            ],
            nic: self.network.then(|| Nic {
                ports: Vec::new(),
                mac: [0x02, 0, 0, 0, 0, 1],
            }),
            shares: Vec::new(),
            // A template runs nothing of anybody's; each fork gets its own.
            rates: Rates::default(),
            fence: Fence {
                uid_gid: self.parts.is_root.then(own_user),
                memory_max: Bytes(self.memory.0.saturating_add(OVERHEAD.0)),
                pids_max: MONITOR_PIDS + self.vcpus,
                // A fork's quota is its own.
                cpu_millis: None,
            },
        }
    }
}

fn own_user() -> (u32, u32) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let user = UID_FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % UIDS;
    (user, user)
}

/// Where the program may lie: what a template's guest reads before it is captured.
fn read_ahead(argv: &[String], env: &[EnvVar]) -> Vec<String> {
    let Some(program) = argv.first() else {
        return Vec::new();
    };
    if program.starts_with('/') {
        return vec![program.clone()];
    }
    let path = env.iter().find(|variable| variable.name == "PATH");
    path.map_or("", |variable| &variable.value)
        .split(':')
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| format!("{}/{program}", dir.trim_end_matches('/')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_to_be_captured_run_as_users_that_nobody_else_gives() {
        for _ in 0..2 * UIDS {
            let (user, group) = own_user();
            assert_eq!(user, group);
            // systemd's containers end where the machines begin, which end before these.
            assert!(user >= UID_BASE + MACHINE_UIDS, "{user}");
            // systemd leaves the upper half alone, as some programs take its numbers for negative ones.
            assert!(user < 1 << 31, "{user}");
        }
    }

    #[test]
    fn a_program_is_read_where_its_path_may_find_it() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let argv: Vec<String> = words(&["python3", "-V"]);
        let env: Vec<EnvVar> = vec!["PATH=/usr/local/bin/:bin:/bin".parse().unwrap()];
        assert_eq!(
            read_ahead(&argv, &env),
            ["/usr/local/bin/python3", "/bin/python3"]
        );
        let absolute: Vec<String> = words(&["/opt/app"]);
        assert_eq!(read_ahead(&absolute, &env), ["/opt/app"]);
        assert_eq!(read_ahead(&argv, &[]), [] as [&str; 0]);
    }
}
