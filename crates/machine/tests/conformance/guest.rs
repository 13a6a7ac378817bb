//! A tiny Linux guest for the suite: busybox, a script as init, and the few modules it needs.
//!
//! Kernel: `VISTARA_TEST_KERNELS` names a kernel store (its default kernel is used), or `VISTARA_TEST_VMLINUX` an
//! uncompressed kernel and `VISTARA_TEST_MODULES` a directory with its modules. Without these the tests are skipped.

use std::io::Write;
use std::path::{Path, PathBuf};
use vistara_machine::LinuxBoot;
use vistara_machine::boot::KernelStore;

/// Modules in the order in which they load; those beyond the channel's are loaded by the guest's `load`.
const MODULES: [&str; 14] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "fuse",
    "virtiofs",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// How the guest hears its host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    /// By the first port of a virtio-serial device.
    Port,
    /// By port 1024 of a vsock, on which [`BRIDGE`] listens.
    Vsock,
}

const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc; $B mount -t sysfs sys /sys
$B --install -s /bin; export PATH=/bin
echo "guest begins" > /dev/ttyS0
for m in virtio_ring virtio virtio_mmio virtio_console; do insmod /m/$m.ko 2>/dev/null; done
if [ -x /bridge ]; then
  for m in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do insmod /m/$m.ko; done
  mkfifo /tmp/in /tmp/out
  /bridge /tmp/in /tmp/out &
  exec 3<>/tmp/in 4<>/tmp/out
else
  until P=$(ls /dev/vport*p1 2>/dev/null); do usleep 2000; done
  until command exec 3<>$P; do usleep 2000; done 2>/dev/null
  exec 4>&3
fi
while :; do
  while read -r line <&3; do case "$line" in
    off) [ -x /bridge ] && reboot -f; poweroff -f;;
    reboot) reboot -f;;
    panic) echo c > /proc/sysrq-trigger;;
    load) for m in failover net_failover virtio_net virtio_blk virtio_rng fuse virtiofs; do insmod /m/$m.ko 2>/dev/null; done
      echo loaded >&4;;
    "sh "*) eval "${line#sh }" >&4 2>&1; printf '\ndone %s\n' $? >&4;;
    *) echo "$line" >&4;;
  esac; done
  usleep 5000
done
"#;

/// Carries bytes between two pipes and whoever connected last to port 1024.
const BRIDGE: &str = r#"
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
int main(int argc, char **argv) {
    int in = open(argv[1], O_RDWR), out = open(argv[2], O_RDWR), l = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_port = 1024, .svm_cid = VMADDR_CID_ANY};
    char b[4096];
    if (bind(l, (struct sockaddr *)&a, sizeof a) || listen(l, 4)) return 1;
    for (;;) {
        int c = accept(l, 0, 0);
        for (;;) {
            struct pollfd p[] = {{c, POLLIN}, {out, POLLIN}, {l, POLLIN}};
            if (poll(p, 3, -1) < 0 || p[2].revents) break;
            if (p[0].revents) {
                ssize_t n = read(c, b, sizeof b);
                if (n <= 0) break;
                write(in, b, n);
            }
            if (p[1].revents) {
                ssize_t n = read(out, b, sizeof b);
                if (n > 0 && send(c, b, n, MSG_NOSIGNAL) < 0) break;
            }
        }
        close(c);
    }
}
"#;

/// What is booted, or why it cannot be.
pub(crate) fn boot() -> Result<LinuxBoot, String> {
    boot_with(Channel::Port)
}

/// What is booted with this channel, or why it cannot be.
pub(crate) fn boot_with(channel: Channel) -> Result<LinuxBoot, String> {
    let (kernel, modules) = kernel()?;
    if channel == Channel::Vsock && find(&modules, "vmw_vsock_virtio_transport.ko").is_none() {
        // One that has everything built in has no modules at all.
        let mut others = std::fs::read_dir(&modules).map_err(|error| error.to_string())?;
        if others.next().is_some() {
            return Err("the kernel was added without its vsock modules: add it again".to_owned());
        }
    }
    boot_of(kernel, &modules, channel)
}

/// The same of this kernel and its modules.
pub(crate) fn boot_of(
    kernel: PathBuf,
    modules: &Path,
    channel: Channel,
) -> Result<LinuxBoot, String> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .ok_or("no busybox (apt-get install busybox-static)")?;
    let mut archive = Archive(Vec::new());
    for name in ["bin", "dev", "proc", "sys", "m", "mnt", "tmp"] {
        archive.entry(name, 0o040_755, b"");
    }
    archive.entry("init", 0o100_755, INIT.as_bytes());
    archive.entry("bin/busybox", 0o100_755, &busybox);
    let mut modular = false;
    for name in MODULES {
        // What a kernel has built in has no file.
        // As a store names it, or as some packages do.
        let names = [
            format!("{name}.ko"),
            format!("{}.ko", name.replace('_', "-")),
        ];
        if let Some(path) = names.iter().find_map(|file| find(modules, file)) {
            modular = true;
            let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
            archive.entry(&format!("m/{name}.ko"), 0o100_644, &bytes);
        }
    }
    let mut name = "suite-initramfs".to_owned();
    if channel == Channel::Vsock {
        archive.entry("bridge", 0o100_755, &compiled("bridge", BRIDGE)?);
        name.push_str("-vsock");
    }
    if !modular {
        name.push_str("-builtin");
    }
    archive.entry("TRAILER!!!", 0, b"");
    let initramfs = kept(&name, &archive.0).map_err(|error| error.to_string())?;
    Ok(LinuxBoot {
        kernel,
        initramfs,
        cmdline: "quiet panic=-1 reboot=t cryptomgr.notests noreplace-smp".to_owned(),
    })
}

/// A static program, compiled once for all tests.
pub(crate) fn compiled(name: &str, text_of_it: &str) -> Result<Vec<u8>, String> {
    let text = |error: std::io::Error| error.to_string();
    let source = kept(&format!("{name}.c"), text_of_it.as_bytes()).map_err(text)?;
    let program = source.with_extension("built");
    let age = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified());
    if !matches!((age(&program), age(&source)), (Ok(built), Ok(written)) if built >= written) {
        let dir = tempfile::tempdir_in(source.parent().unwrap()).map_err(text)?;
        let new = dir.path().join(name);
        let built = std::process::Command::new("gcc")
            .args(["-static", "-O1", "-o"])
            .args([&new, &source])
            .status();
        if !built.is_ok_and(|status| status.success()) {
            return Err("no C compiler (apt-get install gcc)".to_owned());
        }
        std::fs::rename(new, &program).map_err(text)?;
    }
    std::fs::read(program).map_err(text)
}

/// A file with this content in Cargo's own directory for tests' files. Tests run side by side: it is written once under a
/// name of its own and then renamed, so that none sees half of it.
fn kept(name: &str, content: &[u8]) -> std::io::Result<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir)?;
    let path = dir.join(name);
    if std::fs::read(&path).is_ok_and(|found| found == content) {
        return Ok(path);
    }
    let mut new = tempfile::Builder::new().prefix("suite-").tempfile_in(dir)?;
    new.write_all(content)?;
    // As a node's own payloads are: the monitor's user may read it.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    new.as_file().set_permissions(mode)?;
    new.persist(&path).map_err(|error| error.error)?;
    Ok(path)
}

fn kernel() -> Result<(PathBuf, PathBuf), String> {
    if let Some(store) = std::env::var_os("VISTARA_TEST_KERNELS") {
        let store = KernelStore::open(Path::new(&store)).map_err(|error| error.to_string())?;
        let kernel = store
            .default_kernel()
            .map_err(|error| error.to_string())?
            .ok_or("the kernel store is empty")?;
        return Ok((kernel.vmlinux(), kernel.modules()));
    }
    match (
        std::env::var_os("VISTARA_TEST_VMLINUX"),
        std::env::var_os("VISTARA_TEST_MODULES"),
    ) {
        (Some(kernel), Some(modules)) => Ok((kernel.into(), modules.into())),
        _ => Err(
            "no kernel: set VISTARA_TEST_KERNELS, or VISTARA_TEST_VMLINUX and VISTARA_TEST_MODULES"
                .to_owned(),
        ),
    }
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if entry.file_name() == name {
            return Some(path);
        }
    }
    None
}

/// A cpio archive in the kernel's format ("newc").
struct Archive(Vec<u8>);

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            0,
            mode as usize,
            0,
            0,
            1,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        let fields: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        self.0
            .extend_from_slice(format!("070701{fields}{name}\0").as_bytes());
        self.pad();
        self.0.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
