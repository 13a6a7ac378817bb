//! What the lab uses of this host, each with the Debian package that has it.

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where programs are besides `PATH`, which often lacks the directories for administrators.
const SYSTEM_DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
const VIRTIOFSD_PLACES: [&str; 4] = [
    "/usr/lib/qemu/virtiofsd",
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/libexec/qemu/virtiofsd",
];

/// The two programs called virtiofsd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// QEMU's own up to version 7, in C.
    C,
    /// The one that followed, in Rust.
    Rust,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Virtiofsd {
    pub(super) program: PathBuf,
    pub(super) dialect: Dialect,
}

#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) qemu: PathBuf,
    pub(super) virtiofsd: Virtiofsd,
    pub(super) setpriv: PathBuf,
    pub(super) depmod: PathBuf,
    /// One that needs no library.
    pub(super) busybox: PathBuf,
}

impl Programs {
    /// Fails with everything that is missing, and the one command that mends it.
    pub(super) fn find() -> Result<Programs> {
        if std::env::consts::ARCH != "x86_64" {
            bail!(
                "the lab emulates AMD's SVM, and its kernel comes from this host's packages: x86-64 only"
            );
        }
        // In a user namespace virtiofsd may not open others' files as the overlay asks it to (O_NOATIME): tried, nothing
        // could be executed.
        if !rustix::process::geteuid().is_root() {
            bail!("it takes root, since all of the host's files are served to the machine");
        }
        let mut packages = vec![];
        let mut need = |name: &str, package: &'static str| {
            let found = find(name);
            if found.is_none() && !packages.contains(&package) {
                packages.push(package);
            }
            found.unwrap_or_default()
        };
        let qemu = need("qemu-system-x86_64", "qemu-system-x86");
        let setpriv = need("setpriv", "util-linux");
        let depmod = need("depmod", "kmod");
        let busybox = need("busybox", "busybox-static");
        let virtiofsd = find("virtiofsd").or_else(|| {
            let mut places = VIRTIOFSD_PLACES.iter().map(PathBuf::from);
            places.find(|path| path.is_file())
        });
        if virtiofsd.is_none() {
            packages.push("qemu-system-common (from Debian 13: virtiofsd)");
        }
        if packages.is_empty() && !is_static(&busybox) {
            packages.push("busybox-static");
        }
        let (Some(program), true) = (virtiofsd, packages.is_empty()) else {
            bail!("missing here; run: apt-get install {}", packages.join(" "));
        };
        let dialect = dialect(&program);
        Ok(Programs {
            qemu,
            virtiofsd: Virtiofsd { program, dialect },
            setpriv,
            depmod,
            busybox,
        })
    }
}

/// A program in `PATH` or where administrators' programs are.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// Whether an ELF file names no interpreter. The loader's path stands near the file's beginning.
fn is_static(program: &Path) -> bool {
    std::fs::read(program).is_ok_and(|bytes| {
        let head = &bytes[..bytes.len().min(4096)];
        !head.windows(7).any(|part| part == b"/ld-lin")
    })
}

fn dialect(program: &Path) -> Dialect {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let text = output.map_or(String::new(), |output| {
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    });
    // QEMU's tells which version of the kernel's interface it speaks.
    if text.contains("FUSE") || text.contains("QEMU") {
        Dialect::C
    } else {
        Dialect::Rust
    }
}
