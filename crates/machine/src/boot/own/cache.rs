//! The directory in which kernels are built: one build at a time, and nothing half made is ever found.
//!
//! What was built is run as a kernel, and what is left over is removed: so the directory must be this user's, closed to
//! others' writing, and made by a build, which its mark says. Any other is refused as it is.

use super::super::BootError;
use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";
const WORK: &str = "work-";
const RESULT: &str = "built-";
/// The mark: a file that backup programs know, too (<https://bford.info/cachedir/>), in words of our own.
const MARK: &str = "CACHEDIR.TAG";
const MARK_TEXT: &str = "Signature: 8a477f597d28d172789f06886806bc55\n# Here `vistara kernel build` compiles kernels, and removes what it finds.\n";

/// The cache, held.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    lock: File,
}

/// A place for one build, gone when it is dropped.
#[derive(Debug)]
pub(super) struct Work(tempfile::TempDir);

impl Work {
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Cache {
    /// Makes the directory if absent, and waits until no other build holds it; `waits` is told once if that takes a while.
    pub(super) fn hold(dir: &Path, waits: &mut dyn FnMut()) -> Result<Cache, BootError> {
        // Compiled from here, it is run as a kernel: nobody else may write to it.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(BootError::io("make directory", dir))?;
        let dir = &ours(dir)?;
        let path = dir.join(LOCK);
        let lock = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(BootError::io("open", &path))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            waits();
            flock(&lock, FlockOperation::LockExclusive)
                .map_err(|error| BootError::io("lock", &path)(error.into()))?;
        }
        let cache = Cache {
            dir: dir.to_owned(),
            lock,
        };
        // The lock says that whoever made these has ended.
        cache.clear(|name| name.starts_with(WORK))?;
        Ok(cache)
    }

    /// The same hold once more.
    pub(super) fn again(&self) -> Result<Cache, BootError> {
        let lock = self.lock.try_clone();
        Ok(Cache {
            dir: self.dir.clone(),
            lock: lock.map_err(BootError::io("hold", &self.dir))?,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    pub(super) fn work(&self) -> Result<Work, BootError> {
        tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(&self.dir)
            .map(Work)
            .map_err(BootError::io("make directory in", &self.dir))
    }

    pub(super) fn result(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{RESULT}{key}"))
    }

    /// Removes all results, so that there is room for another, and its place is free.
    pub(super) fn clear_results(&self, key: &str) -> Result<(), BootError> {
        self.clear(|name| name.starts_with(RESULT))?;
        let place = self.result(key);
        match fs::symlink_metadata(&place) {
            Err(_) => Ok(()),
            Ok(_) => fs::remove_dir_all(&place).map_err(BootError::io("remove", &place)),
        }
    }

    fn clear(&self, which: impl Fn(&str) -> bool) -> Result<(), BootError> {
        let error = || BootError::io("read directory", &self.dir);
        for entry in fs::read_dir(&self.dir).map_err(error())? {
            let entry = entry.map_err(error())?;
            if which(&entry.file_name().to_string_lossy()) {
                // A compiler that outlived its build may still write there for a moment: what stays goes the next time.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }
}

/// Sees that the directory is one of ours, or an empty one, which it then marks. Gives it without symbolic links.
fn ours(dir: &Path) -> Result<PathBuf, BootError> {
    let refused = |reason: &str| {
        BootError::malformed(dir, "directory to build kernels in", reason.to_owned())
    };
    let is = fs::symlink_metadata(dir).map_err(BootError::io("look at", dir))?;
    if !is.is_dir() {
        return Err(refused("it is no directory"));
    }
    if is.uid() != geteuid().as_raw() {
        return Err(refused("it belongs to another user"));
    }
    if is.mode() & 0o022 != 0 {
        return Err(refused("others may write to it"));
    }
    // Read before the mark is: a build that runs has marked it before it made anything else.
    let entries = fs::read_dir(dir).map_err(BootError::io("read directory", dir))?;
    let foreign = entries
        .filter_map(Result::ok)
        .any(|entry| entry.file_name() != MARK);
    let path = dir.join(MARK);
    let is_marked = fs::read(&path).is_ok_and(|text| text == MARK_TEXT.as_bytes());
    if !is_marked && foreign {
        return Err(refused(
            "there are files in it, and no build of a kernel made it",
        ));
    }
    if !is_marked {
        // Not truncated: another build may do the same, and what it has written stays whole.
        File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .and_then(|mut file| file.write_all(MARK_TEXT.as_bytes()))
            .map_err(BootError::io("write", &path))?;
    }
    fs::canonicalize(dir).map_err(BootError::io("find", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn what_a_killed_build_left_is_gone_and_what_was_built_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let cache = Cache::hold(&root, &mut || {}).unwrap();
        let killed = cache.work().unwrap().0.keep();
        fs::write(killed.join("half"), "").unwrap();
        fs::create_dir(cache.result("1")).unwrap();
        drop(cache);
        let cache = Cache::hold(&root, &mut || panic!("nobody holds it")).unwrap();
        assert!(!killed.exists());
        assert!(cache.result("1").exists());
        cache.clear_results("2").unwrap();
        assert!(!cache.result("1").exists());
    }

    #[test]
    fn a_directory_that_no_build_made_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = ["work-2024", "built-site"].map(|name| dir.path().join(name));
        for dir in &theirs {
            fs::create_dir(dir).unwrap();
        }
        let error = Cache::hold(dir.path(), &mut || {}).unwrap_err().to_string();
        assert!(error.contains("no build of a kernel made it"), "{error}");
        assert!(theirs.iter().all(|dir| dir.exists()));
        assert!(!dir.path().join(LOCK).exists());
        // Nor is it ours for a mark of others' caches.
        fs::write(
            dir.path().join(MARK),
            "Signature: 8a477f597d28d172789f06886806bc55\n",
        )
        .unwrap();
        assert!(Cache::hold(dir.path(), &mut || {}).is_err());
        assert!(theirs.iter().all(|dir| dir.exists()));
    }

    #[test]
    fn a_directory_that_others_can_write_to_or_put_in_its_place_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("cache");
        drop(Cache::hold(&root, &mut || {}).unwrap());
        for (mode, good) in [(0o770, false), (0o702, false), (0o755, true)] {
            fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Cache::hold(&root, &mut || {}).is_ok(), good, "{mode:o}");
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&root, &link).unwrap();
        let error = Cache::hold(&link, &mut || {}).unwrap_err().to_string();
        assert!(error.contains("it is no directory"), "{error}");
        if geteuid().is_root() {
            std::os::unix::fs::chown(&root, Some(61_007), None).unwrap();
            let error = Cache::hold(&root, &mut || {}).unwrap_err().to_string();
            assert!(error.contains("belongs to another user"), "{error}");
        } else {
            println!("SKIP: only root can make a directory of another user's");
        }
    }

    #[test]
    fn a_second_build_says_that_it_waits_and_goes_on_when_the_first_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let first = Cache::hold(&root, &mut || {}).unwrap();
        let also = first.again().unwrap();
        let (says, hears) = mpsc::channel();
        let second = std::thread::spawn(move || {
            let held = Cache::hold(&root, &mut || says.send("waits").unwrap()).map(drop);
            held.unwrap();
            says.send("holds").unwrap();
        });
        let patience = Duration::from_secs(20);
        assert_eq!(hears.recv_timeout(patience), Ok("waits"));
        drop(first);
        assert!(hears.recv_timeout(Duration::from_millis(100)).is_err());
        drop(also);
        assert_eq!(hears.recv_timeout(patience), Ok("holds"));
        second.join().unwrap();
    }
}
