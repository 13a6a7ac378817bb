//! What the kernel runs and how: the keys in the root of a boot disk's file system.
//!
//! Nothing is read from a manifest here; [`crate::tfs::Reader::keys`] shows what a disk has.

use crate::tfs::{Label, Value, VolumeId};
use std::collections::HashSet;
use std::net::Ipv4Addr;

/// Bytes of all arguments and the environment together, as on Linux (a quarter of the usual 8 MiB stack).
pub const ARGUMENT_BYTES_MAX: usize = 2 << 20;

/// What a Nanos machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Manifest {
    /// The program's path in the tree, absolute.
    pub program: Vec<u8>,
    /// The program's arguments, its own name first. Where empty, the kernel gives the program's path as the name.
    pub arguments: Vec<Vec<u8>>,
    /// Names and values; names are not empty, have no `=`, and occur once.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the program starts, absolute; the root if there is none.
    pub working_directory: Option<Vec<u8>>,
    /// Volumes on other disks.
    pub mounts: Vec<Mount>,
    /// Network settings; none leaves the kernel to ask by DHCP if there is a device.
    pub network: Network,
    /// How long the program waits for an address, in seconds; none starts it at once.
    pub wait_for_address_s: Option<u32>,
    /// Ends through QEMU's `isa-debug-exit`. Without it a `microvm` does not end at all; Firecracker has none and needs
    /// none.
    pub debug_exit: bool,
    /// The root is never written; errors of `EROFS` to the program.
    pub read_only_root: bool,
    /// Where kernel modules are, if any are to be loaded: in the directory `klib` there.
    pub klibs: Option<KlibsFrom>,
    /// Exit codes that are told as 0.
    pub expected_exit: Option<ExitMatch>,
    /// Exit codes after which the machine starts again.
    pub reboot_on_exit: Option<ExitMatch>,
    /// Exit codes after which the machine stays, with nothing running.
    pub idle_on_exit: Option<ExitMatch>,
    /// Further keys, written as they are. None may be one that this type writes itself.
    pub further: Vec<(Vec<u8>, Value)>,
}

/// A volume and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Which volume.
    pub volume: MountSource,
    /// The directory, absolute. It must exist in the root's tree and not be the root itself; the kernel says otherwise on
    /// its console only, and goes on without the volume.
    pub directory: Vec<u8>,
    /// Nothing is written.
    pub read_only: bool,
}

/// By what a volume is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSource {
    /// Its label.
    Label(Label),
    /// Its identity.
    Id(VolumeId),
}

/// The first interface's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// DHCP.
    #[default]
    Automatic,
    /// A fixed address.
    Static {
        /// The machine's address.
        address: Ipv4Addr,
        /// Its network's mask.
        netmask: Ipv4Addr,
        /// The way out. Without one the kernel takes the network's first address, or its last if that is its own.
        gateway: Option<Ipv4Addr>,
    },
}

/// The file system that has the kernel's modules. Either way the boot file system must have the kernel itself as `kernel`,
/// for its symbols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlibsFrom {
    /// The boot file system.
    Boot,
    /// The root file system.
    Root,
}

/// Some of the exit codes. The kernel compares the lowest eight bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitMatch {
    /// All of them.
    Any,
    /// One.
    Only(u8),
    /// All but one.
    AllBut(u8),
    /// Several.
    OneOf(Vec<u8>),
}

/// Why a manifest cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A path that is not absolute, or has a NUL.
    #[error("the {what} {path:?} is not an absolute path")]
    Path {
        /// Whose path.
        what: &'static str,
        /// The path.
        path: String,
    },
    /// A NUL ends arguments and variables.
    #[error("{0:?} has a NUL")]
    Nul(String),
    /// No name of a variable.
    #[error("{0:?} is no name of a variable")]
    Variable(String),
    /// Arguments and environment together exceed [`ARGUMENT_BYTES_MAX`].
    #[error("arguments and environment have more than {ARGUMENT_BYTES_MAX} bytes")]
    TooLong,
    /// Two of one name: variables, volumes or keys.
    #[error("there are two settings for {0:?}")]
    Duplicate(String),
    /// A mount directory that the kernel would misread.
    #[error("no volume can be mounted at {0:?}")]
    MountDirectory(String),
    /// A volume with no label cannot be found by it.
    #[error("a volume that is mounted by its label needs one")]
    NoLabel,
}

impl Manifest {
    /// The root's keys, in the order in which they are written.
    pub fn keys(&self) -> Result<Vec<(Vec<u8>, Value)>, ManifestError> {
        let mut keys = Vec::new();
        let mut put = |key: &str, value: Value| keys.push((key.as_bytes().to_vec(), value));
        self.check_arguments()?;
        absolute("program", &self.program)?;
        put("program", Value::text(&self.program));
        if !self.arguments.is_empty() {
            let arguments = self.arguments.iter().map(Value::text).collect();
            put("arguments", Value::Vector(arguments));
        }
        // Even if there is none: kernel modules stop the kernel where they find no environment.
        put("environment", self.environment()?);
        if let Some(directory) = &self.working_directory {
            absolute("working directory", directory)?;
            put("cwd", Value::text(directory));
        }
        if !self.mounts.is_empty() {
            put("mounts", self.mounts()?);
        }
        let interface = self.interface();
        if !interface.is_empty() {
            put("en1", Value::Tuple(interface));
        }
        for (key, wanted) in [
            ("debug_exit", self.debug_exit),
            ("readonly_rootfs", self.read_only_root),
        ] {
            if wanted {
                put(key, Value::text("t"));
            }
        }
        match self.klibs {
            Some(KlibsFrom::Boot) => put("klibs", Value::text("bootfs")),
            Some(KlibsFrom::Root) => put("klibs", Value::text("rootfs")),
            None => {}
        }
        for (key, codes) in [
            ("expected_exit_code", &self.expected_exit),
            ("reboot_on_exit", &self.reboot_on_exit),
            ("idle_on_exit", &self.idle_on_exit),
        ] {
            if let Some(codes) = codes {
                put(key, codes.value());
            }
        }
        keys.extend(self.further.iter().cloned());
        let mut names = HashSet::from([&b"children"[..]]);
        for (key, _) in &keys {
            if !names.insert(key) {
                return Err(ManifestError::Duplicate(shown(key)));
            }
        }
        Ok(keys)
    }

    fn check_arguments(&self) -> Result<(), ManifestError> {
        let variables = self
            .environment
            .iter()
            .flat_map(|(name, value)| [name, value]);
        let mut bytes = 0;
        for text in self.arguments.iter().chain(variables) {
            if text.contains(&0) {
                return Err(ManifestError::Nul(shown(text)));
            }
            bytes += text.len() + 1;
        }
        match bytes > ARGUMENT_BYTES_MAX {
            true => Err(ManifestError::TooLong),
            false => Ok(()),
        }
    }

    fn environment(&self) -> Result<Value, ManifestError> {
        let mut names = HashSet::new();
        for (name, _) in &self.environment {
            if name.is_empty() || name.contains(&b'=') {
                return Err(ManifestError::Variable(shown(name)));
            }
            if !names.insert(name) {
                return Err(ManifestError::Duplicate(shown(name)));
            }
        }
        let variables = self.environment.iter();
        Ok(Value::Tuple(
            variables
                .map(|(name, value)| (name.clone(), Value::text(value)))
                .collect(),
        ))
    }

    fn mounts(&self) -> Result<Value, ManifestError> {
        let mut mounts: Vec<(Vec<u8>, Value)> = Vec::new();
        for mount in &self.mounts {
            absolute("mount directory", &mount.directory)?;
            // The kernel takes what follows the first ":ro" for the flag, wherever it stands.
            let misread = mount.directory.windows(3).any(|part| part == b":ro");
            if misread || mount.directory.iter().all(|byte| *byte == b'/') {
                return Err(ManifestError::MountDirectory(shown(&mount.directory)));
            }
            let volume = match &mount.volume {
                MountSource::Label(label) if label.as_bytes().is_empty() => {
                    return Err(ManifestError::NoLabel);
                }
                MountSource::Label(label) => label.as_bytes().to_vec(),
                MountSource::Id(id) => id.to_string().into_bytes(),
            };
            if mounts.iter().any(|(other, _)| *other == volume) {
                return Err(ManifestError::Duplicate(shown(&volume)));
            }
            let mut directory = mount.directory.clone();
            if mount.read_only {
                directory.extend_from_slice(b":ro");
            }
            mounts.push((volume, Value::Text(directory)));
        }
        Ok(Value::Tuple(mounts))
    }

    fn interface(&self) -> Vec<(Vec<u8>, Value)> {
        let mut settings = Vec::new();
        let mut put = |key: &str, value: String| {
            settings.push((key.as_bytes().to_vec(), Value::text(value)));
        };
        match self.network {
            Network::Automatic => {}
            Network::Static {
                address,
                netmask,
                gateway,
            } => {
                put("ipaddr", address.to_string());
                put("netmask", netmask.to_string());
                if let Some(gateway) = gateway {
                    put("gateway", gateway.to_string());
                }
            }
        }
        if let Some(seconds) = self.wait_for_address_s {
            put("exec_wait_for_ip4_secs", seconds.to_string());
        }
        settings
    }
}

impl ExitMatch {
    fn value(&self) -> Value {
        match self {
            ExitMatch::Any => Value::text("*"),
            ExitMatch::Only(code) => Value::text(code.to_string()),
            ExitMatch::AllBut(code) => Value::text(format!("!{code}")),
            ExitMatch::OneOf(codes) => Value::Vector(
                codes
                    .iter()
                    .map(|code| Value::text(code.to_string()))
                    .collect(),
            ),
        }
    }
}

fn absolute(what: &'static str, path: &[u8]) -> Result<(), ManifestError> {
    if path.first() == Some(&b'/') && !path.contains(&0) {
        return Ok(());
    }
    let path = shown(path);
    Err(ManifestError::Path { what, path })
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            program: b"/bin/hello".to_vec(),
            ..Manifest::default()
        }
    }

    fn get(manifest: &Manifest, key: &str) -> Option<Value> {
        let keys = Value::Tuple(manifest.keys().unwrap());
        keys.get(key.as_bytes()).cloned()
    }

    #[test]
    fn what_is_not_asked_for_is_not_written() {
        let keys = manifest().keys().unwrap();
        let program = (b"program".to_vec(), Value::text("/bin/hello"));
        let environment = (b"environment".to_vec(), Value::Tuple(Vec::new()));
        assert_eq!(keys, [program, environment]);
    }

    #[test]
    fn a_fixed_address_and_the_wait_for_it_belong_to_the_interface() {
        let mut manifest = manifest();
        manifest.network = Network::Static {
            address: Ipv4Addr::new(10, 0, 2, 15),
            netmask: Ipv4Addr::new(255, 255, 255, 0),
            gateway: None,
        };
        manifest.wait_for_address_s = Some(5);
        let interface = get(&manifest, "en1").unwrap();
        assert_eq!(interface.get(b"ipaddr"), Some(&Value::text("10.0.2.15")));
        assert_eq!(interface.get(b"gateway"), None);
        let wait = interface.get(b"exec_wait_for_ip4_secs");
        assert_eq!(wait, Some(&Value::text("5")));
    }

    #[test]
    fn a_mount_says_which_volume_where_and_whether_it_is_written() {
        let mut manifest = manifest();
        manifest.mounts = vec![
            Mount {
                volume: MountSource::Label(Label::new("data").unwrap()),
                directory: b"/srv/data".to_vec(),
                read_only: false,
            },
            Mount {
                volume: MountSource::Id(VolumeId([0xab; 16])),
                directory: b"/etc/secret".to_vec(),
                read_only: true,
            },
        ];
        let mounts = get(&manifest, "mounts").unwrap();
        assert_eq!(mounts.get(b"data"), Some(&Value::text("/srv/data")));
        let secret = mounts.get(b"abababab-abab-abab-abab-abababababab");
        assert_eq!(secret, Some(&Value::text("/etc/secret:ro")));
        for wrong in [&b"/"[..], b"relative", b"/a:rough"] {
            manifest.mounts[0].directory = wrong.to_vec();
            assert!(manifest.keys().is_err());
        }
    }

    #[test]
    fn what_the_kernel_would_misread_is_refused() {
        let refused = |change: fn(&mut Manifest)| {
            let mut manifest = manifest();
            change(&mut manifest);
            manifest.keys().unwrap_err()
        };
        refused(|m| m.program = b"hello".to_vec());
        refused(|m| m.arguments = vec![b"a\0b".to_vec()]);
        refused(|m| m.environment = vec![(b"A=B".to_vec(), Vec::new())]);
        refused(|m| m.environment = vec![(b"A".to_vec(), Vec::new()); 2]);
        refused(|m| m.arguments = vec![vec![b'x'; 3 << 20]]);
        refused(|m| m.further = vec![(b"program".to_vec(), Value::Null)]);
        refused(|m| m.further = vec![(b"children".to_vec(), Value::Null)]);
    }

    #[test]
    fn exit_codes_are_written_as_the_kernel_compares_them() {
        assert_eq!(ExitMatch::AllBut(3).value(), Value::text("!3"));
        assert_eq!(ExitMatch::Any.value(), Value::text("*"));
    }
}
