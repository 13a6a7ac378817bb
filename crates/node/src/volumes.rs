//! Volumes that the node keeps under names: `volumes/NAME.img` in its state directory, each a file system of Nanos whose
//! label is the name. They outlive machines. That one machine at a time has a volume is seen to where machines are made.

use crate::fault::{Answer, Fault, chain};
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vistara_api::ErrorKind;
use vistara_model::{Bytes, NamedVolume};
use vistara_nanos::tfs::{Label, VolumeId};
use vistara_nanos::{DiskOptions, Volume};

/// What a new volume can hold. Its file has holes: it takes what was written.
const SIZE: Bytes = Bytes::gib(1);

/// How a volume's file ends, and one that is being made.
const SUFFIX: &str = ".img";
const FRESH: &str = ".new";

/// A volume that is there.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) name: String,
    /// What it can hold.
    pub(crate) size: Bytes,
    /// What its file takes.
    pub(crate) stored: Bytes,
    pub(crate) changed_ns: u64,
}

/// The directory of volumes.
#[derive(Debug, Clone)]
pub(crate) struct Volumes {
    dir: PathBuf,
}

impl Volumes {
    pub(crate) fn new(dir: PathBuf) -> Volumes {
        Volumes { dir }
    }

    /// The file of the volume of this name, made empty if it is not there. Blocks on files.
    pub(crate) fn get_or_make(&self, name: &str) -> Answer<PathBuf> {
        let path = self.path(name)?;
        if path.exists() {
            return Ok(path);
        }
        let failed = |error: &dyn std::error::Error| {
            let message = format!("the volume {name:?} could not be made: {}", chain(error));
            Fault::new(ErrorKind::Host, message)
        };
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| Fault::internal(&error))?;
        // Two may be making it at once: each makes its own, and one of them becomes the volume.
        let fresh = self
            .dir
            .join(format!("{name}-{:032x}{FRESH}", u128::from_ne_bytes(id)));
        let made = make(&fresh, name, id);
        let placed = made.and_then(|()| match fs::hard_link(&fresh, &path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        });
        // What cannot be removed now is swept away when the node starts.
        let _ = fs::remove_file(&fresh);
        placed.map_err(|error| failed(error.as_ref()))?;
        Ok(path)
    }

    fn path(&self, name: &str) -> Answer<PathBuf> {
        if !NamedVolume::is_name(name) {
            return Err(Fault::user(format!("{name:?} is not a volume's name")).hint(
                "a name has up to 31 letters, digits, '.', '-' and '_', and begins with a letter or a digit",
            ));
        }
        Ok(self.dir.join(format!("{name}{SUFFIX}")))
    }

    /// The volume of this name.
    pub(crate) fn find(&self, name: &str) -> Answer<Kept> {
        match kept(&self.path(name)?, name) {
            Ok(kept) => Ok(kept),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Fault::new(
                ErrorKind::NotFound,
                format!("there is no volume {name:?}"),
            )
            .hint("see `vistara volume ls`")),
            Err(error) => Err(self.unreadable(&error)),
        }
    }

    /// All volumes, by name.
    pub(crate) fn list(&self) -> Answer<Vec<Kept>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|error| self.unreadable(&error))? {
            let entry = entry.map_err(|error| self.unreadable(&error))?;
            let file = entry.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(SUFFIX));
            let Some(name) = name.filter(|name| NamedVolume::is_name(name)) else {
                continue;
            };
            match kept(&entry.path(), name) {
                Ok(kept) => all.push(kept),
                // Removed between the listing and the look.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.unreadable(&error)),
            }
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }

    /// Removes a volume that no machine has.
    pub(crate) fn remove(&self, name: &str) -> Answer<()> {
        self.find(name)?;
        fs::remove_file(self.path(name)?).map_err(|error| {
            let message = format!("the volume {name:?} could not be removed: {error}");
            Fault::new(ErrorKind::Host, message)
        })
    }

    /// Removes what an earlier node was making.
    pub(crate) fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry
                .file_name()
                .as_encoded_bytes()
                .ends_with(FRESH.as_bytes())
            {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn unreadable(&self, error: &io::Error) -> Fault {
        let message = format!("the volumes in {:?} cannot be read: {error}", self.dir);
        Fault::new(ErrorKind::Host, message)
    }
}

fn kept(path: &Path, name: &str) -> io::Result<Kept> {
    let data = fs::metadata(path)?;
    let changed = data.mtime().saturating_mul(1_000_000_000);
    Ok(Kept {
        name: name.to_owned(),
        size: SIZE,
        stored: Bytes(data.blocks().saturating_mul(512)),
        changed_ns: u64::try_from(changed).unwrap_or(0),
    })
}

/// An empty file system on the disk, or an error and perhaps a part of one.
fn make(path: &Path, name: &str, id: [u8; 16]) -> Result<(), Box<dyn std::error::Error>> {
    let options = DiskOptions {
        id: VolumeId(id),
        label: Label::new(name)?,
        free_bytes: SIZE.0,
    };
    let volume = Volume::create(BufWriter::new(File::create(path)?), &options)?;
    let (out, _) = volume.finish()?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_nanos::tfs::{Limits, Reader};

    #[test]
    fn a_volume_is_made_once_empty_and_labelled_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().to_owned());
        let path = volumes.get_or_make("data").unwrap();
        let reader = Reader::open(File::open(&path).unwrap(), 0, &Limits::default()).unwrap();
        assert_eq!(reader.label().as_bytes(), b"data");
        assert!(reader.entries(reader.root()).unwrap().is_empty());
        assert!(fs::metadata(&path).unwrap().len() >= SIZE.0);
        let before = fs::read(&path).unwrap()[..4096].to_vec();
        assert_eq!(volumes.get_or_make("data").unwrap(), path);
        assert_eq!(fs::read(&path).unwrap()[..4096], before);
        assert!(volumes.get_or_make("../data").is_err());
    }

    #[test]
    fn what_is_made_is_listed_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().to_owned());
        volumes.get_or_make("b").unwrap();
        volumes.get_or_make("a").unwrap();
        fs::write(dir.path().join("c-00.new"), "half of one").unwrap();
        fs::write(dir.path().join("-x.img"), "not a volume's name").unwrap();
        let names = || -> Vec<String> {
            let all = volumes.list().unwrap().into_iter();
            all.map(|kept| kept.name).collect()
        };
        assert_eq!(names(), ["a", "b"]);
        let kept = volumes.find("a").unwrap();
        assert!(kept.stored.0 > 0 && kept.stored.0 < kept.size.0, "{kept:?}");
        assert!(kept.changed_ns > 0);
        volumes.remove("a").unwrap();
        assert_eq!(names(), ["b"]);
        assert_eq!(volumes.remove("a").unwrap_err().0.kind, ErrorKind::NotFound);
        volumes.sweep().unwrap();
        assert!(!dir.path().join("c-00.new").exists());
        assert_eq!(names(), ["b"]);
    }

    #[test]
    fn many_may_make_one_volume_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().to_owned());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| volumes.get_or_make("data").unwrap());
            }
        });
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }
}
