//! The disk that takes a machine's writes: a sparse raw file with an empty file system, copied from a template.
//!
//! A template is made once per size by the host's `mkfs.ext4`; a copy shares its blocks where the host's file system can
//! (`FICLONE`), else only the template's data is copied, some hundred kilobytes, and the rest stays a hole. Either way
//! it takes milliseconds and no space to speak of.

use super::BootError;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vistara_host::files::clone_sparse;
use vistara_model::Bytes;

/// Version of how templates are made; part of their names, so that old ones are not used.
const TEMPLATE_FORMAT: u32 = 1;
/// Smaller ones have no room for files beside the file system's own tables.
const SIZE_MIN: Bytes = Bytes::mib(32);
/// What ext4 holds with 4 KiB blocks.
const SIZE_MAX: Bytes = Bytes::gib(16 * 1024);
/// Where `mkfs.ext4` is found; users other than root often lack `/usr/sbin` in their PATH.
const MKFS: [&str; 3] = ["mkfs.ext4", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"];

/// Templates of empty file systems, one per size.
#[derive(Debug, Clone)]
pub struct OverlayTemplates {
    dir: PathBuf,
}

impl OverlayTemplates {
    /// Templates kept in `dir`, which is made if absent.
    ///
    /// # Errors
    /// [`BootError::Io`].
    pub fn open(dir: &Path) -> Result<OverlayTemplates, BootError> {
        fs::create_dir_all(dir).map_err(BootError::io("make directory", dir))?;
        Ok(OverlayTemplates {
            dir: dir.to_owned(),
        })
    }

    /// Writes an empty upper layer of `size`, rounded up to whole mebibytes, to `dest`, which must not exist. Takes
    /// milliseconds once the template of that size exists; the file is sparse.
    ///
    /// # Errors
    /// [`BootError::Absent`] where `mkfs.ext4` is missing, [`BootError::Size`], [`BootError::Io`]; where `dest` did not
    /// exist, it does not exist then.
    pub fn create(&self, size: Bytes, dest: &Path) -> Result<(), BootError> {
        if size < SIZE_MIN || size > SIZE_MAX {
            return Err(BootError::Size(format!(
                "a writable disk of {size} cannot be made: it takes {SIZE_MIN} to {SIZE_MAX}"
            )));
        }
        let size = Bytes::mib(size.to_mib_ceil());
        let name = format!("ext4-v{TEMPLATE_FORMAT}-{}m.raw", size.to_mib_ceil());
        let template = self.dir.join(name);
        let mut copied = clone_sparse(&template, dest);
        // The template of this size is not made yet (or `dest` has no directory, as the second try then tells).
        if copied
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::NotFound)
        {
            self.make_template(size, &template)?;
            copied = clone_sparse(&template, dest);
        }
        copied.map_err(BootError::io("copy the empty disk to", dest))
    }

    /// Makes a template beside its place and moves it there: two processes may do so at once, the later one wins.
    fn make_template(&self, size: Bytes, template: &Path) -> Result<(), BootError> {
        let file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)
            .map_err(BootError::io("create a file in", &self.dir))?;
        let error = || BootError::io("write", file.path());
        file.as_file().set_len(size.0).map_err(error())?;
        make_file_system(file.path())?;
        file.as_file().sync_all().map_err(error())?;
        file.persist(template)
            .map_err(|e| BootError::io("write", template)(e.error))?;
        Ok(())
    }
}

/// An empty ext4 file system without reserved blocks. The tables are zero already, as the file is one hole, and the guest
/// is told not to zero them again.
///
/// It has a journal: mounting takes as long with it as without (`docs/internals/boot-time.md`), and a machine that was
/// killed can be started again on what it wrote. It is small, as all of it is written to the host's disk in time.
fn make_file_system(path: &Path) -> Result<(), BootError> {
    const ARGUMENTS: &[&str] = &[
        "-q",
        "-F",
        "-b",
        "4096",
        "-m",
        "0",
        "-J",
        "size=8",
        "-O",
        "^resize_inode",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1,nodiscard,root_owner=0:0",
        "-L",
        "vistara-upper",
    ];
    let mut output = None;
    for program in MKFS {
        let run = Command::new(program)
            .args(ARGUMENTS)
            .arg(path)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output();
        match run {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => {
                output = Some(other.map_err(BootError::io("run", Path::new(program)))?);
                break;
            }
        }
    }
    match output {
        Some(output) if output.status.success() => Ok(()),
        Some(output) => Err(BootError::Command {
            command: "mkfs.ext4".to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
        None => Err(BootError::Absent {
            program: "mkfs.ext4",
            mend: "run: sudo apt-get install e2fsprogs".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn has_mkfs() -> bool {
        let found = MKFS
            .iter()
            .any(|program| Command::new(program).arg("-V").output().is_ok());
        if !found {
            println!("SKIP: mkfs.ext4 is not installed (apt-get install e2fsprogs)");
        }
        found
    }

    #[test]
    fn an_upper_layer_is_sparse_and_equal_to_its_template() {
        if !has_mkfs() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let templates = OverlayTemplates::open(&dir.path().join("t")).unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        templates.create(Bytes::gib(1), &one).unwrap();
        templates.create(Bytes(Bytes::gib(1).0 - 5), &two).unwrap();
        let meta = fs::metadata(&one).unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 8 << 20, "{} blocks", meta.blocks());
        assert_eq!(fs::read_dir(dir.path().join("t")).unwrap().count(), 1);
        let head = |path: &Path| fs::read(path).unwrap()[1024..2048].to_vec();
        assert_eq!(head(&one), head(&two));
        // The ext4 magic, in the superblock at 1,024 bytes.
        assert_eq!(head(&one)[56..58], [0x53, 0xef]);
    }

    #[test]
    fn a_file_that_is_there_already_is_not_touched() {
        if !has_mkfs() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("disk");
        fs::write(&dest, "precious").unwrap();
        let templates = OverlayTemplates::open(dir.path()).unwrap();
        assert!(templates.create(Bytes::mib(64), &dest).is_err());
        assert_eq!(fs::read(&dest).unwrap(), b"precious");
    }

    #[test]
    fn sizes_that_no_file_system_fits_are_refused_with_the_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let templates = OverlayTemplates::open(dir.path()).unwrap();
        for size in [Bytes(0), Bytes::mib(31), Bytes::gib(17 << 10)] {
            let error = templates.create(size, &dir.path().join("x")).unwrap_err();
            assert!(error.to_string().contains("32.0 MiB"), "{error}");
        }
    }
}
