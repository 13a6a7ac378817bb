//! The host's name servers, written where a monitor's network finds them that does not see the host's files.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// The file's name.
pub(crate) const NAME: &str = "resolv.conf";
/// Where the host has it.
const HOST: &str = "/etc/resolv.conf";
/// Bytes that are taken: three servers, and what people write beside them.
const BYTES_MAX: u64 = 64 << 10;

/// The addresses of the host's name servers, as they are written; empty where the host has none.
fn of_host() -> Vec<u8> {
    let mut text = Vec::new();
    let read =
        File::open(HOST).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut text).map(drop));
    if let Err(error) = read {
        tracing::debug!(%error, "the host has no name servers");
    }
    text
}

/// Makes `dir`, if it is not there, with the host's name servers in it. Everybody may read both.
///
/// # Errors
/// The system's.
pub(crate) fn make(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    let path = dir.join(NAME);
    fs::write(&path, of_host())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
}

/// Writes there what the host has by now, where that is something else. Blocks on files.
pub(crate) fn keep(dir: &Path) {
    let (path, now) = (dir.join(NAME), of_host());
    match fs::read(&path) {
        Ok(known) if known != now => {
            if let Err(error) = fs::write(&path, now) {
                tracing::warn!(%error, path = %path.display(), "a machine does not hear of new name servers");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_written_again_and_nothing_is_made_for_those_that_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        keep(&etc);
        assert!(!etc.exists());
        make(&etc).unwrap();
        let path = etc.join(NAME);
        assert_eq!(fs::read(&path).unwrap(), of_host());
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        keep(&etc);
        assert_eq!(fs::read(&path).unwrap(), of_host());
    }
}
