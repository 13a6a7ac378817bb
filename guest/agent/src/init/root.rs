//! File systems: the image under a writable layer as the root, the kernel's own, and what programs expect to find.

use super::{tolerate, wait_for};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};
use std::ffi::CStr;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vistara_guest_protocol::GuestConfig;

const LOWER: &str = "/lower";
const WRITABLE: &str = "/writable";
const NEW_ROOT: &str = "/root.new";

/// The usual fence around file systems that hold no programs and no devices.
const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// A directory that may be there already.
fn directory(path: &str) -> io::Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> io::Result<()> {
    directory(target)?;
    mount(source, target, kind, flags, options).map_err(|error| {
        io::Error::other(format!("mounting {source} ({kind}) at {target}: {error}"))
    })
}

/// Mounts what the agent itself needs, in the initial RAM disk.
pub(super) fn mount_kernel_file_systems() -> io::Result<()> {
    mount_at("proc", "/proc", "proc", PLAIN, c"")?;
    mount_at("sysfs", "/sys", "sysfs", PLAIN, c"")?;
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        c"mode=0755",
    )
}

/// Makes the image on `device` the root, under a writable layer on `overlay` (a device with ext4, or `tmpfs`). Gives
/// the layer's directory where it is on a disk.
pub(super) fn enter(device: &str, overlay: &str) -> io::Result<Option<OwnedFd>> {
    appear(device)?;
    let device = &disk_with(device, is_squashfs);
    mount_at(
        device,
        LOWER,
        "squashfs",
        MountFlags::RDONLY | MountFlags::NOATIME,
        c"",
    )?;
    let on_disk = overlay != "tmpfs";
    if on_disk {
        appear(overlay)?;
        let overlay = &disk_with(overlay, is_ext4);
        mount_at(overlay, WRITABLE, "ext4", MountFlags::NOATIME, c"")?;
    } else {
        mount_at(
            "tmpfs",
            WRITABLE,
            "tmpfs",
            MountFlags::NOATIME,
            c"mode=0755",
        )?;
    }
    directory(&format!("{WRITABLE}/upper"))?;
    directory(&format!("{WRITABLE}/work"))?;
    let layers = c"lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work";
    mount_at("overlay", NEW_ROOT, "overlay", MountFlags::NOATIME, layers)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let layer = if on_disk {
        Some(rustix::fs::open(WRITABLE, flags, Mode::empty())?)
    } else {
        None
    };
    for name in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW_ROOT}{name}");
        directory(&target)?;
        mount_move(name, &target)?;
    }
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(layer)
}

/// Whether the file system's mark stands at this place of a disk.
fn has_mark(device: &str, place: u64, mark: &[u8]) -> bool {
    let mut found = vec![0; mark.len()];
    fs::File::open(device)
        .and_then(|disk| disk.read_exact_at(&mut found, place))
        .is_ok_and(|()| found == mark)
}

fn is_squashfs(device: &str) -> bool {
    has_mark(device, 0, b"hsqs")
}

fn is_ext4(device: &str) -> bool {
    has_mark(device, 0x438, &[0x53, 0xef])
}

/// The disk that was named, if it holds the right file system, else the first one that does: kernels number virtio disks
/// in the order in which they are probed, which drivers, monitors and their load order change.
fn disk_with(named: &str, right: fn(&str) -> bool) -> String {
    if right(named) {
        return named.to_owned();
    }
    let others = (b'a'..=b'z').map(|letter| format!("/dev/vd{}", char::from(letter)));
    let found = others
        .filter(|device| Path::new(device).exists())
        .find(|device| right(device));
    // Where there is none, mounting the named one says what is wrong with it.
    found.unwrap_or_else(|| named.to_owned())
}

fn appear(device: &str) -> io::Result<()> {
    let absent = || io::Error::other(format!("the disk {device} did not appear"));
    wait_for(|| Path::new(device).exists().then_some(())).ok_or_else(absent)
}

/// Mounts what programs expect. A guest without one of these still runs most of them.
pub(super) fn mount_for_programs() {
    for (name, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        tolerate(name, std::os::unix::fs::symlink(target, name));
    }
    let private = MountFlags::NOSUID | MountFlags::NOEXEC;
    let nosuid = MountFlags::NOSUID | MountFlags::NODEV;
    let terminals = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    tolerate(
        "terminals",
        mount_at("devpts", "/dev/pts", "devpts", private, terminals),
    );
    tolerate(
        "shared memory",
        mount_at("shm", "/dev/shm", "tmpfs", nosuid, c"mode=1777"),
    );
    tolerate(
        "queues",
        mount_at("mqueue", "/dev/mqueue", "mqueue", PLAIN, c""),
    );
    tolerate(
        "control groups",
        mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", PLAIN, c"nsdelegate"),
    );
}

/// Mounts a host directory.
pub(super) fn mount_volume(tag: &str, path: &Path, read_only: bool) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    Ok(mount(tag, path, "virtiofs", flags, c"")?)
}

/// Whether the root can only be read.
pub(super) fn is_read_only() -> io::Result<bool> {
    let flags = rustix::fs::statvfs("/")?.f_flag;
    Ok(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Lets the root be written that [`make_read_only`] has closed.
pub(super) fn make_writable() -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::NOATIME;
    Ok(mount_remount("/", flags, c"")?)
}

/// Makes a mount read-only, its file system's other mounts not.
pub(super) fn make_read_only(path: &Path) -> io::Result<()> {
    match mount_remount(
        path,
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOATIME,
        c"",
    ) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::INVAL) => {
            mount_bind(path, path)?;
            Ok(mount_remount(
                path,
                MountFlags::BIND | MountFlags::RDONLY,
                c"",
            )?)
        }
        Err(error) => Err(error.into()),
    }
}

/// The files by which programs know names, and what is in them. They are the host's, whatever the image has.
#[derive(Debug)]
pub(super) struct Names([(&'static str, String); 3]);

impl Names {
    /// What a configuration makes of them.
    pub(super) fn of(config: &GuestConfig) -> Names {
        let mut hosts = String::from(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
             ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
        );
        // Writing to a string does not fail.
        if !config.hostname.is_empty() {
            let own = config
                .network
                .as_ref()
                .and_then(|network| network.addresses.first());
            let own = own.map_or_else(
                || "127.0.1.1".to_owned(),
                |(address, _)| address.to_string(),
            );
            let _ = writeln!(hosts, "{own}\t{}", config.hostname);
        }
        for entry in &config.hosts {
            let _ = writeln!(hosts, "{}\t{}", entry.address, entry.names.join(" "));
        }
        let mut resolver = String::new();
        if let Some(network) = &config.network {
            for server in &network.dns {
                let _ = writeln!(resolver, "nameserver {server}");
            }
            if !network.search.is_empty() {
                let _ = writeln!(resolver, "search {}", network.search.join(" "));
            }
        }
        Names([
            ("/etc/hostname", format!("{}\n", config.hostname)),
            ("/etc/hosts", hosts),
            ("/etc/resolv.conf", resolver),
        ])
    }

    /// Writes them, in place of whatever is there; where `ahead` is there, what differs from it. Under emulation making a
    /// file takes some ten milliseconds, cutting one to nothing before it is filled some five, and writing over it one.
    pub(super) fn write(&self, ahead: Option<&Names>) -> io::Result<()> {
        if ahead.is_none() {
            directory("/etc")?;
        }
        for (index, (path, text)) in self.0.iter().enumerate() {
            match ahead.map(|ahead| &ahead.0[index].1) {
                None => write_file(path, text)?,
                Some(there) if there == text => {}
                Some(there) if there.len() == text.len() => {
                    let file = fs::File::options().write(true).open(path)?;
                    file.write_all_at(text.as_bytes(), 0)?;
                }
                Some(_) => fs::write(path, text)?,
            }
        }
        Ok(())
    }
}

/// Writes a file in place of whatever is there: a symbolic link of the image's may lead nowhere.
fn write_file(path: &str, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_guest_protocol::NetworkConfig;

    #[test]
    fn names_of_equal_length_make_files_of_equal_length_and_the_same_resolver() {
        let named = |hostname: &str| {
            Names::of(&GuestConfig {
                hostname: hostname.to_owned(),
                network: Some(NetworkConfig {
                    mac: None,
                    addresses: vec![([10, 0, 2, 15].into(), 24)],
                    gateways: Vec::new(),
                    dns: vec![[10, 0, 2, 3].into()],
                    search: vec!["lan".to_owned()],
                    mtu: None,
                }),
                ..GuestConfig::default()
            })
        };
        let (one, other) = (named("000000000000"), named("8d78ce93e87b"));
        for ((path, one), (_, other)) in one.0.iter().zip(&other.0) {
            assert_eq!(one.len(), other.len(), "{path}");
        }
        assert_eq!(one.0[2], other.0[2]);
        assert_eq!(other.0[2].1, "nameserver 10.0.2.3\nsearch lan\n");
        assert!(other.0[1].1.ends_with("\n10.0.2.15\t8d78ce93e87b\n"));
        assert_eq!(other.0[0].1, "8d78ce93e87b\n");
    }
}
