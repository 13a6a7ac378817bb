//! The lab's kernel: Debian's cloud kernel, unpacked under `target/lab`, and an initramfs with the modules that the first
//! stage loads.
//!
//! The kernel store of the product keeps only the modules that guests need, so that it cannot serve here. In order: the
//! package named by `VISTARA_LAB_KERNEL`; what was unpacked before; the package that apt downloads.

use super::host::Programs;
use super::initramfs::Archive;
use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A `linux-image-*.deb` to use instead of what apt has.
const PACKAGE_VARIABLE: &str = "VISTARA_LAB_KERNEL";
/// The package that depends on the newest cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Loaded before anything else, with their options; others by whoever needs them.
const MODULES: [(&str, &str); 8] = [
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("fuse", ""),
    ("virtiofs", ""),
    ("overlay", ""),
    // Polling for a halted guest takes the only processor from those who would wake it.
    ("kvm", "halt_poll_ns=0"),
    ("kvm_amd", ""),
    ("tun", ""),
];
const FIRST_STAGE: &str = include_str!("../../../tests/lab/first-stage");
const SECOND_STAGE: &str = include_str!("../../../tests/lab/second-stage");

#[derive(Debug, Clone)]
pub(super) struct Kernel {
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) initramfs: PathBuf,
    /// What stands in `/lib/modules` inside.
    pub(super) modules: PathBuf,
}

/// Finds or fetches the kernel in `dir`.
pub(super) fn prepare(dir: &Path, programs: &Programs) -> Result<Kernel> {
    fs::create_dir_all(dir).with_context(|| format!("make {dir:?}"))?;
    let named = std::env::var_os(PACKAGE_VARIABLE).map(PathBuf::from);
    let (tree, release) = match named {
        Some(package) => unpack(&package, dir, programs)
            .with_context(|| format!("{PACKAGE_VARIABLE}={}", package.display()))?,
        None => match unpacked(dir)? {
            Some(found) => found,
            None => download(dir, programs)?,
        },
    };
    let modules = tree.join("lib/modules");
    let archive = archive(&modules.join(&release), programs)?;
    let initramfs = tree.join("initramfs");
    write_if_other(&initramfs, &archive)?;
    Ok(Kernel {
        image: tree.join(format!("boot/vmlinuz-{release}")),
        initramfs,
        modules,
        release,
    })
}

/// The newest kernel that is complete in `dir`: directories come under their release's name when they are.
fn unpacked(dir: &Path) -> Result<Option<(PathBuf, String)>> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).with_context(|| format!("read {dir:?}"))? {
        let path = entry.with_context(|| format!("read {dir:?}"))?.path();
        let release = path.file_name().unwrap_or_default().to_string_lossy();
        if path.join(format!("boot/vmlinuz-{release}")).is_file() {
            let changed = fs::metadata(&path).and_then(|data| data.modified());
            found.push((changed.ok(), path.clone(), release.into_owned()));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, path, release)| (path, release)))
}

fn download(dir: &Path, programs: &Programs) -> Result<(PathBuf, String)> {
    let advice = format!(
        "run: apt-get update. Where Debian's packages are out of reach, bring a linux-image-*-cloud-amd64 package and say {PACKAGE_VARIABLE}=FILE.deb"
    );
    let listing = output(Command::new("apt-cache").args(["depends", META_PACKAGE]))
        .with_context(|| format!("ask apt for {META_PACKAGE}; {advice}"))?;
    let package = concrete_package(&listing)
        .with_context(|| format!("apt knows no kernel under {META_PACKAGE}; {advice}"))?;
    eprintln!("lab: fetching {package} with apt-get (once)");
    let scratch = scratch(dir)?;
    // As root, apt drops to its own user, which cannot write to a directory of ours.
    let mut apt = Command::new("apt-get");
    apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(scratch.path());
    output(&mut apt).with_context(|| format!("download {package}; {advice}"))?;
    let entries = fs::read_dir(scratch.path()).context("read the scratch directory")?;
    let file = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"));
    unpack(&file.context("apt-get left no package")?, dir, programs)
}

/// The kernel's package by what `apt-cache depends` prints.
fn concrete_package(listing: &str) -> Option<&str> {
    let names = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .map(str::trim)
        .find(|name| name.starts_with("linux-image-"))
}

/// Unpacks a kernel package to a directory named after its release, unless it is there.
fn unpack(package: &Path, dir: &Path, programs: &Programs) -> Result<(PathBuf, String)> {
    let scratch = scratch(dir)?;
    let fresh = scratch.path().join("tree");
    output(Command::new("dpkg-deb").arg("-x").args([package, &fresh]))?;
    // Where /usr is merged into the root, later packages have their modules there only.
    if !fresh.join("lib/modules").exists() && fresh.join("usr/lib/modules").exists() {
        fs::rename(fresh.join("usr/lib"), fresh.join("lib")).context("move the modules")?;
    }
    let names = fs::read_dir(fresh.join("lib/modules")).context("it is no kernel package")?;
    let names: Vec<String> = names
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let [release] = &names[..] else {
        bail!("it has modules for {names:?}, not for one kernel");
    };
    output(
        Command::new(&programs.depmod)
            .arg("-b")
            .arg(&fresh)
            .arg(release),
    )?;
    let tree = dir.join(release);
    // Another run may have been first: a complete directory is what is wanted, whoever made it.
    if let Err(error) = fs::rename(&fresh, &tree)
        && !tree.join(format!("boot/vmlinuz-{release}")).is_file()
    {
        return Err(error).with_context(|| format!("make {tree:?}"));
    }
    Ok((tree, release.clone()))
}

/// Gone with its handle. One whose process was killed is removed by the next: no kernel takes an hour to unpack.
fn scratch(dir: &Path) -> Result<tempfile::TempDir> {
    const PREFIX: &str = "scratch-";
    const AGE_MAX: std::time::Duration = std::time::Duration::from_secs(3600);
    for entry in fs::read_dir(dir)
        .with_context(|| format!("read {dir:?}"))?
        .flatten()
    {
        let age = entry.metadata().and_then(|data| data.modified());
        let age = age.ok().and_then(|changed| changed.elapsed().ok());
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if ours && age.is_some_and(|age| age > AGE_MAX) {
            // Two may try at once; what stays is tried again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(PREFIX)
        .tempdir_in(dir)
        .context("make a scratch directory")
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = match command.env("LC_ALL", "C").output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("this host has no {name}: the lab is made of Debian's packages")
        }
        other => other.with_context(|| format!("run {name}"))?,
    };
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed: {}", words.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The initramfs: busybox, the two stages, and the modules in the order in which they load.
fn archive(modules: &Path, programs: &Programs) -> Result<Vec<u8>> {
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {path:?}"))
    };
    let dependencies = read("modules.dep")?;
    let order = load_order(&dependencies, &read("modules.builtin")?)?;
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "host", "memory", "root", "modules"] {
        archive.directory(name);
    }
    let busybox = fs::read(&programs.busybox)
        .with_context(|| format!("read {}", programs.busybox.display()))?;
    archive.program("bin/busybox", &busybox);
    archive.program("init", FIRST_STAGE.as_bytes());
    archive.program("second-stage", SECOND_STAGE.as_bytes());
    let mut lines = String::new();
    for (path, options) in order {
        let name = format!("{}.ko", stem(path));
        let content = module(&modules.join(path))?;
        archive.program(&format!("modules/{name}"), unsigned(&content));
        lines.push_str(&format!("{name} {options}\n"));
    }
    archive.program("modules/order", lines.as_bytes());
    Ok(archive.finish())
}

/// A module's content, unpacked.
fn module(path: &Path) -> Result<Vec<u8>> {
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    let (program, package) = match &*ending {
        "ko" => return fs::read(path).with_context(|| format!("read {path:?}")),
        "xz" => ("xz", "xz-utils"),
        "zst" => ("zstd", "zstd"),
        _ => bail!("{path:?} is packed in an unknown way"),
    };
    let output = Command::new(program)
        .args(["-d", "-c"])
        .arg(path)
        .output()
        .with_context(|| format!("run {program} (apt-get install {package})"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {path:?}");
    }
    Ok(output.stdout)
}

/// A module without the signature at its end, which the kernel would check: slow where code is translated, and the kernel's
/// own package has been checked by apt.
fn unsigned(module: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"~Module signature appended~\n";
    // The kernel's `struct module_signature`: its last four bytes are the signature's length.
    const TRAILER_BYTES: usize = 12;
    let whole = || {
        let rest = module.strip_suffix(MARK)?;
        let length: [u8; 4] = rest.last_chunk().copied()?;
        let signature = usize::try_from(u32::from_be_bytes(length)).ok()?;
        rest.get(..rest.len().checked_sub(TRAILER_BYTES + signature)?)
    };
    whole().unwrap_or(module)
}

/// A module's name: `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn stem(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The files of [`MODULES`] and of all they need, each after what it needs, with their options. What is built into the
/// kernel is left out.
fn load_order<'a>(dependencies: &'a str, builtin: &str) -> Result<Vec<(&'a str, &'static str)>> {
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut paths: BTreeMap<String, &str> = BTreeMap::new();
    for (path, rest) in dependencies.lines().filter_map(|line| line.split_once(':')) {
        needs.insert(path, rest.split_whitespace().collect());
        paths.insert(stem(path), path);
    }
    fn add<'a>(path: &'a str, needs: &BTreeMap<&'a str, Vec<&'a str>>, order: &mut Vec<&'a str>) {
        if order.contains(&path) {
            return;
        }
        // Each line names all, also those that the named ones need: the last is needed by the others.
        for needed in needs.get(path).into_iter().flatten().rev() {
            add(needed, needs, order);
        }
        order.push(path);
    }
    let mut order = vec![];
    for (name, _) in MODULES {
        match paths.get(name) {
            Some(path) => add(path, &needs, &mut order),
            None if builtin.lines().any(|path| stem(path) == name) => {}
            None => bail!("this kernel has no module {name}"),
        }
    }
    let options = |path: &str| {
        let name = stem(path);
        let found = MODULES.iter().find(|(module, _)| *module == name);
        found.map_or("", |(_, options)| options)
    };
    Ok(order
        .into_iter()
        .map(|path| (path, options(path)))
        .collect())
}

/// Replaces a file as a whole, so that a run beside this one reads the old or the new.
fn write_if_other(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    let dir = path.parent().context("a file has a directory")?;
    let mut fresh = tempfile::NamedTempFile::new_in(dir).context("write the initramfs")?;
    std::io::Write::write_all(&mut fresh, content).context("write the initramfs")?;
    // Temporary files are their user's only; another user's run may read this one.
    fresh
        .as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))
        .context("write the initramfs")?;
    fresh
        .persist(path)
        .with_context(|| format!("write {path:?}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/virtio/virtio_pci.ko: kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko
kernel/virtio/virtio_ring.ko: kernel/virtio/virtio.ko
kernel/virtio/virtio.ko:
kernel/char/virtio_console.ko: kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko
kernel/fuse/fuse.ko:
kernel/fuse/virtiofs.ko: kernel/fuse/fuse.ko kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko
kernel/overlayfs/overlay.ko:
kernel/kvm/kvm.ko.xz:
kernel/kvm/kvm-amd.ko.xz: kernel/kvm/kvm.ko.xz
kernel/net/other.ko:
";

    #[test]
    fn modules_load_after_what_they_need_with_their_options() {
        let order = load_order(DEPENDENCIES, "kernel/net/tun.ko\n").unwrap();
        let names: Vec<String> = order.iter().map(|(path, _)| stem(path)).collect();
        let expected = [
            "virtio",
            "virtio_ring",
            "virtio_pci",
            "virtio_console",
            "fuse",
            "virtiofs",
            "overlay",
            "kvm",
            "kvm_amd",
        ];
        assert_eq!(names, expected);
        assert_eq!(order[7], ("kernel/kvm/kvm.ko.xz", "halt_poll_ns=0"));
        assert_eq!(order[8].1, "");
    }

    #[test]
    fn a_module_that_is_missing_is_named() {
        let fault = load_order(DEPENDENCIES, "").unwrap_err().to_string();
        assert_eq!(fault, "this kernel has no module tun");
    }

    #[test]
    fn a_signature_is_cut_off_and_only_that() {
        let mut signed = b"code".to_vec();
        signed.extend(b"SIG");
        signed.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
        signed.extend(b"~Module signature appended~\n");
        assert_eq!(unsigned(&signed), b"code");
        assert_eq!(unsigned(b"code"), b"code");
        let short = b"\0\0\xff\xff~Module signature appended~\n";
        assert_eq!(unsigned(short), short);
    }

    #[test]
    fn apt_names_the_kernel_behind_the_package_that_follows_it() {
        let listing =
            "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Suggests: x\n";
        assert_eq!(
            concrete_package(listing),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(concrete_package("linux-image-cloud-amd64\n"), None);
    }
}
