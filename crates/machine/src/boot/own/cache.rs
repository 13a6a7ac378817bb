//! The directory in which kernels are built: one build at a time, and nothing half made is ever found.

use super::super::BootError;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";
const WORK: &str = "work-";
const RESULT: &str = "built-";

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

    /// Removes earlier results.
    pub(super) fn clear_others(&self) -> Result<(), BootError> {
        self.clear(|name| name.starts_with(RESULT))
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
        cache.clear_others().unwrap();
        assert!(!cache.result("1").exists());
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
