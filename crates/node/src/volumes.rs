//! Volumes that the node keeps under names: `volumes/NAME.img` in its state directory, each a file system of Nanos whose
//! label is the name. They outlive machines. That one machine at a time has a volume is seen to where machines are made.

use crate::fault::{Answer, Fault, chain};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;
use vistara_api::ErrorKind;
use vistara_model::{Bytes, NamedVolume};
use vistara_nanos::tfs::{Label, VolumeId};
use vistara_nanos::{DiskOptions, Volume};

/// What a new volume can hold. Its file has holes: it takes what was written.
const SIZE: Bytes = Bytes::gib(1);

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
        // Names were checked when the request came; a path is made of none that was not.
        if !NamedVolume::is_name(name) {
            return Err(Fault::user(format!("{name:?} is not a volume's name")));
        }
        let path = self.dir.join(format!("{name}.img"));
        if path.exists() {
            return Ok(path);
        }
        let failed = |error: &dyn std::error::Error| {
            Fault::new(
                ErrorKind::Host,
                format!("the volume {name:?} could not be made: {}", chain(error)),
            )
        };
        // Half a volume of an earlier node is nobody's. A volume's name never ends in this.
        let fresh = self.dir.join(format!("{name}.img.new"));
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| Fault::internal(&error))?;
        let options = DiskOptions {
            id: VolumeId(id),
            label: Label::new(name).map_err(|error| failed(&error))?,
            free_bytes: SIZE.0,
        };
        let file = File::create(&fresh).map_err(|error| failed(&error))?;
        let volume =
            Volume::create(BufWriter::new(file), &options).map_err(|error| failed(&error))?;
        let (out, _) = volume.finish().map_err(|error| failed(&error))?;
        let file = out
            .into_inner()
            .map_err(|error| failed(&error.into_error()))?;
        file.sync_all().map_err(|error| failed(&error))?;
        fs::rename(&fresh, &path).map_err(|error| failed(&error))?;
        Ok(path)
    }
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
}
