//! The server of shared directories: one `virtiofsd` for each share, started by us, ended with its machine.
//!
//! There are two programs of this name. QEMU's own (up to 7.2, in C) needs root and fences itself; the one that followed
//! (in Rust) also runs for ordinary users.

use crate::GuestShare;
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use vistara_host::launch::Launch;

/// Where distributions put it, besides `PATH`.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/libexec/qemu/virtiofsd",
];

/// Longest tag that the device has room for.
pub(super) const TAG_LEN_MAX: usize = 36;

/// A `virtiofsd` that can serve here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Virtiofsd {
    program: PathBuf,
    dialect: Dialect,
    root: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    /// QEMU's, in C.
    C,
    /// The later one, in Rust.
    Rust,
}

impl Virtiofsd {
    /// Finds the program, or says why shares cannot be had.
    pub(super) async fn find(configured: Option<&Path>, root: bool) -> Result<Virtiofsd, String> {
        let program = match configured {
            Some(path) => path.to_owned(),
            None => super::find_program("virtiofsd")
                .or_else(|| PLACES.iter().map(PathBuf::from).find(|path| path.is_file()))
                .ok_or("virtiofsd is not installed (apt-get install virtiofsd)")?,
        };
        let mut command = tokio::process::Command::new(&program);
        command
            .arg("--version")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(Duration::from_secs(5), command.output())
            .await
            .map_err(|_| format!("{} does not answer", program.display()))?
            .map_err(|error| format!("{} cannot be started: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        // QEMU's tells which kernel interface it speaks.
        let dialect = if text.contains("FUSE") || text.contains("Fabrice") || text.contains("QEMU")
        {
            Dialect::C
        } else {
            Dialect::Rust
        };
        if dialect == Dialect::C && !root {
            return Err(format!(
                "{} needs root; the newer one does not (apt-get install virtiofsd)",
                program.display()
            ));
        }
        Ok(Virtiofsd {
            program,
            dialect,
            root,
        })
    }

    /// How to start it for this share, its front end connecting to `listener`.
    pub(super) fn launch(&self, share: &GuestShare, listener: OwnedFd) -> Launch {
        let mut launch = Launch::new(&self.program);
        let fd = listener.as_raw_fd();
        launch.args = match self.dialect {
            Dialect::C => {
                // The option's own syntax has commas in it; a backslash takes their meaning.
                let mut source = OsString::from("source=");
                source.push(escaped(&share.path));
                vec![
                    format!("--fd={fd}").into(),
                    "-f".into(),
                    "--rlimit-nofile=0".into(),
                    "-o".into(),
                    source,
                    "-o".into(),
                    "sandbox=namespace,cache=auto,xattr".into(),
                ]
            }
            Dialect::Rust => {
                let sandbox = if self.root { "namespace" } else { "none" };
                let mut args: Vec<OsString> = vec![
                    format!("--fd={fd}").into(),
                    "--shared-dir".into(),
                    share.path.clone().into(),
                    format!("--sandbox={sandbox}").into(),
                    "--rlimit-nofile=0".into(),
                    "--xattr".into(),
                ];
                if share.read_only && !self.root {
                    args.push("--readonly".into());
                }
                args
            }
        };
        launch.inherit = vec![listener];
        // It acts with the guest's users on the files, and fences itself: namespaces, an empty root, seccomp.
        launch.keep_capabilities = self.root;
        if share.read_only && self.root {
            launch.read_only = vec![share.path.clone()];
        }
        launch
    }
}

fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes().iter();
    OsString::from_vec(
        bytes
            .flat_map(|byte| match byte {
                b',' | b'\\' => vec![b'\\', *byte],
                byte => vec![*byte],
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_comma_stays_one_option() {
        assert_eq!(escaped(Path::new("/a,b\\c")), OsString::from("/a\\,b\\\\c"));
    }
}
