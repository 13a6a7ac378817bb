//! Where a node's socket and state are. The CLI and the node both ask here, so that they always find each other.
//!
//! | | root | anybody else |
//! | --- | --- | --- |
//! | state | `/var/lib/vistara` | `$XDG_DATA_HOME/vistara`, else `~/.local/share/vistara` |
//! | socket | `/run/vistara/node.sock` | `$XDG_RUNTIME_DIR/vistara/node.sock`, else `/tmp/vistara-<uid>/node.sock` |
//!
//! A state directory other than the default implies its own socket, `<state>/run/node.sock`, unless that is given too.
//! The rules are a pure function of [`Facts`]; only [`Facts::gather`] and [`Places::prepare`] touch the system.

use crate::environment;
use rustix::fs::Mode;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket in bytes: `sun_path` holds 108 with its final NUL.
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What the rules depend on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// `--socket` or its variable.
    pub(crate) socket: Option<PathBuf>,
    /// `--state-dir` or its variable.
    pub(crate) state_dir: Option<PathBuf>,
    /// Effective user id.
    pub(crate) uid: u32,
    /// `XDG_RUNTIME_DIR`, where it is this user's own directory.
    pub(crate) xdg_runtime_dir: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub(crate) xdg_data_home: Option<PathBuf>,
    /// `HOME`.
    pub(crate) home: Option<PathBuf>,
    /// Working directory, against which relative paths count.
    pub(crate) working_dir: PathBuf,
}

impl Facts {
    /// The facts of this process.
    pub(crate) fn gather(socket: Option<PathBuf>, state_dir: Option<PathBuf>) -> Facts {
        let uid = rustix::process::geteuid().as_raw();
        let own_dir = |dir: &PathBuf| {
            std::fs::metadata(dir).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid)
        };
        Facts {
            socket: socket.filter(|path| !path.as_os_str().is_empty()),
            state_dir: state_dir.filter(|path| !path.as_os_str().is_empty()),
            uid,
            xdg_runtime_dir: environment::path("XDG_RUNTIME_DIR").filter(own_dir),
            xdg_data_home: environment::path("XDG_DATA_HOME"),
            home: environment::path("HOME"),
            working_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }
}

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places {
    /// The node's socket.
    pub(crate) socket: PathBuf,
    /// The node's state.
    pub(crate) state_dir: PathBuf,
    /// Whether the user named the socket: then its directory is the user's to guard.
    pub(crate) socket_is_given: bool,
}

/// Why there is no good place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PlacesError {
    /// What is wrong.
    pub(crate) message: String,
    /// What to type.
    pub(crate) hint: String,
}

impl Places {
    /// Applies the rules.
    pub(crate) fn resolve(facts: &Facts) -> Result<Places, PlacesError> {
        let absolute = |path: &Path| clean(&facts.working_dir.join(path));
        let xdg = |dir: &Option<PathBuf>| dir.clone().filter(|dir| dir.is_absolute());
        let default_state = if facts.uid == 0 {
            Some(PathBuf::from("/var/lib/vistara"))
        } else {
            xdg(&facts.xdg_data_home)
                .or_else(|| xdg(&facts.home).map(|home| home.join(".local/share")))
                .map(|dir| dir.join("vistara"))
        };
        let given_state = facts.state_dir.as_deref().map(absolute);
        let Some(state_dir) = given_state.clone().or_else(|| default_state.clone()) else {
            return Err(PlacesError {
                message: "cannot tell where to keep state: neither HOME nor XDG_DATA_HOME is set"
                    .to_owned(),
                hint: "say where, with --state-dir DIR".to_owned(),
            });
        };
        let own_state = given_state.is_some() && given_state != default_state;
        let socket = match &facts.socket {
            Some(socket) => absolute(socket),
            None if own_state => state_dir.join("run/node.sock"),
            None if facts.uid == 0 => PathBuf::from("/run/vistara/node.sock"),
            None => match xdg(&facts.xdg_runtime_dir) {
                Some(dir) => dir.join("vistara/node.sock"),
                None => PathBuf::from(format!("/tmp/vistara-{}/node.sock", facts.uid)),
            },
        };
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_BYTES_MAX {
            return Err(PlacesError {
                message: format!(
                    "the socket's path {} has {length} bytes; the system allows {SOCKET_PATH_BYTES_MAX}",
                    socket.display()
                ),
                hint: "give a shorter one, with --socket PATH".to_owned(),
            });
        }
        Ok(Places {
            socket,
            state_dir,
            socket_is_given: facts.socket.is_some(),
        })
    }

    /// The log of a node that was started in the background.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.state_dir.join("node.log")
    }

    /// Makes the state and the socket's directories, both for this user alone.
    pub(crate) fn prepare(&self) -> Result<(), PlacesError> {
        for dir in [Some(self.state_dir.as_path()), self.socket.parent()]
            .into_iter()
            .flatten()
        {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|error| PlacesError {
                    message: format!("cannot make the directory {}: {error}", dir.display()),
                    hint: "give others, with --state-dir DIR and --socket PATH".to_owned(),
                })?;
        }
        self.check_socket_dir()
    }

    /// Refuses a socket directory that somebody else could have put there or could replace the socket in. One that does
    /// not exist is fine, and so is one that the user named.
    pub(crate) fn check_socket_dir(&self) -> Result<(), PlacesError> {
        let Some(dir) = self.socket.parent().filter(|_| !self.socket_is_given) else {
            return Ok(());
        };
        let Ok(meta) = std::fs::symlink_metadata(dir) else {
            return Ok(());
        };
        let uid = rustix::process::geteuid().as_raw();
        let refuse = |why: &str| {
            Err(PlacesError {
                message: format!("{} cannot be trusted with the socket: {why}", dir.display()),
                hint: format!(
                    "remove {} or give another socket, with --socket PATH",
                    dir.display()
                ),
            })
        };
        // A link in /tmp may be anybody's; one in /run or in the user's own directory was made by its owner.
        if dir.starts_with("/tmp") && meta.is_symlink() {
            return refuse("it is a symbolic link");
        }
        let Ok(meta) = std::fs::metadata(dir) else {
            return refuse("it is a link to nowhere");
        };
        if meta.uid() != uid && meta.uid() != 0 {
            return refuse("it belongs to another user");
        }
        if Mode::from_raw_mode(meta.mode()).intersects(Mode::WGRP | Mode::WOTH) {
            return refuse("others may write to it");
        }
        Ok(())
    }
}

/// The same path without `.` and doubled slashes; `..` stays, since it may cross a link.
fn clean(path: &Path) -> PathBuf {
    path.components()
        .filter(|part| *part != std::path::Component::CurDir)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Facts {
        Facts {
            uid: 1000,
            home: Some("/home/u".into()),
            working_dir: "/home/u/w".into(),
            ..Facts::default()
        }
    }

    fn check(facts: &Facts, socket: &str, state: &str) {
        let places = Places::resolve(facts).unwrap();
        assert_eq!(
            (places.socket, places.state_dir),
            (socket.into(), state.into())
        );
    }

    #[test]
    fn root_uses_the_systems_directories_whatever_xdg_says() {
        let mut facts = Facts {
            uid: 0,
            xdg_runtime_dir: Some("/run/user/0".into()),
            xdg_data_home: Some("/root/data".into()),
            ..user()
        };
        check(&facts, "/run/vistara/node.sock", "/var/lib/vistara");
        facts.home = None;
        check(&facts, "/run/vistara/node.sock", "/var/lib/vistara");
    }

    #[test]
    fn a_user_has_its_own_directories() {
        let mut facts = user();
        check(
            &facts,
            "/tmp/vistara-1000/node.sock",
            "/home/u/.local/share/vistara",
        );
        facts.xdg_runtime_dir = Some("/run/user/1000".into());
        facts.xdg_data_home = Some("/data".into());
        check(&facts, "/run/user/1000/vistara/node.sock", "/data/vistara");
        facts.xdg_data_home = Some("relative".into());
        check(
            &facts,
            "/run/user/1000/vistara/node.sock",
            "/home/u/.local/share/vistara",
        );
    }

    #[test]
    fn another_state_directory_implies_another_socket() {
        let mut facts = Facts {
            state_dir: Some("./state".into()),
            ..user()
        };
        check(&facts, "/home/u/w/state/run/node.sock", "/home/u/w/state");
        facts.socket = Some("s.sock".into());
        check(&facts, "/home/u/w/s.sock", "/home/u/w/state");
        facts.socket = None;
        facts.state_dir = Some("/home/u/.local/share/vistara".into());
        check(
            &facts,
            "/tmp/vistara-1000/node.sock",
            "/home/u/.local/share/vistara",
        );
    }

    #[test]
    fn a_socket_path_that_the_system_would_cut_off_is_refused() {
        let long = |count: usize| Facts {
            socket: Some(format!("/{}", "s".repeat(count - 1)).into()),
            ..user()
        };
        assert!(Places::resolve(&long(107)).is_ok());
        let error = Places::resolve(&long(108)).unwrap_err();
        assert!(error.message.contains("108 bytes"), "{error:?}");
        assert!(error.hint.contains("--socket"));
    }

    #[test]
    fn without_a_home_the_user_is_told_to_name_a_directory() {
        let facts = Facts {
            home: None,
            ..user()
        };
        assert!(
            Places::resolve(&facts)
                .unwrap_err()
                .hint
                .contains("--state-dir")
        );
    }

    #[test]
    fn a_default_socket_directory_that_others_may_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mut places = Places {
            socket: dir.path().join("node.sock"),
            state_dir: dir.path().join("state"),
            socket_is_given: false,
        };
        places.prepare().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(
            places
                .check_socket_dir()
                .unwrap_err()
                .message
                .contains("others may write")
        );
        places.socket_is_given = true;
        places.check_socket_dir().unwrap();
    }
}
