//! Drivers from the initial RAM disk, by stages: `/modules/order` lists `STAGE FILE` in the order of loading.
//!
//! Later stages are loaded after the root has changed, so the old root is kept by a descriptor. A stage is loaded once.

use super::tolerate;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

/// The drivers that are there.
#[derive(Debug)]
pub(super) struct Modules {
    directory: Option<OwnedFd>,
    order: Vec<(String, String)>,
}

impl Modules {
    /// Reads the list. A kernel that has everything built in comes without one.
    pub(super) fn read() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open("/modules", flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => {
                return Ok(Self {
                    directory: None,
                    order: Vec::new(),
                });
            }
            Err(error) => return Err(error.into()),
        };
        let mut list = String::new();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        File::from(rustix::fs::openat(
            &directory,
            "order",
            flags,
            Mode::empty(),
        )?)
        .read_to_string(&mut list)?;
        let order = list.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        });
        Ok(Self {
            order: order.collect(),
            directory: Some(directory),
        })
    }

    /// Loads a stage's drivers, and removes their files to free the memory. A driver that does not load is reported:
    /// whatever needs it will fail with words of its own.
    pub(super) fn load(&mut self, stage: &str) {
        let Some(directory) = &self.directory else {
            return;
        };
        self.order.retain(|(of, name)| {
            if of == stage {
                tolerate(&format!("loading {name}"), load(directory, name));
            }
            of != stage
        });
    }
}

fn load(directory: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::unlinkat(directory, name, AtFlags::empty())?)
}
