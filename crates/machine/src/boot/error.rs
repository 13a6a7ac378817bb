//! Why a boot payload could not be made.

use std::path::{Path, PathBuf};

/// Why a kernel, an initramfs or an overlay disk could not be made or found.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be handled.
    #[error("{operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it was taken for, or is damaged.
    #[error("{path:?} is no usable {what}: {reason}")]
    Malformed {
        /// Which file, or which member of an archive.
        path: PathBuf,
        /// What it should have been.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel cannot be started directly (no PVH entry).
    #[error(
        "the kernel in {0:?} cannot be started directly: it has no PVH entry note; build it with CONFIG_PVH=y"
    )]
    NoPvhEntry(PathBuf),
    /// A module that the guest needs is neither in the kernel nor among its modules.
    #[error(
        "kernel {kernel} lacks {module}: it is neither built in nor among its modules; use a kernel that has it, or name its modules with --modules"
    )]
    ModuleMissing {
        /// The kernel's name.
        kernel: String,
        /// The module.
        module: String,
    },
    /// A name that may not be a kernel's.
    #[error(
        "{0:?} is not a kernel name: it takes 1 to 100 of a-z A-Z 0-9 _ . + - and begins with a letter or digit"
    )]
    Name(String),
    /// There is no kernel of this name.
    #[error("there is no kernel {name:?}; known: {}", list_or_none(.known))]
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// Names of those that exist.
        known: Vec<String>,
    },
    /// The store holds no kernel at all.
    #[error("there is no guest kernel yet; run: vistara kernel add debian")]
    NoKernel,
    /// A program of the host is missing.
    #[error("{program} is not installed; {mend}")]
    Absent {
        /// Which program.
        program: &'static str,
        /// The command that mends it.
        mend: String,
    },
    /// A program of the host failed.
    #[error("{command} failed: {message}")]
    Command {
        /// The command line.
        command: String,
        /// The end of what it said, or that its time ran out.
        message: String,
    },
    /// A size out of bounds.
    #[error("{0}")]
    Size(String),
}

fn list_or_none(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl BootError {
    /// An [`BootError::Io`] for use with `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| BootError::Io {
            operation,
            path,
            source,
        }
    }

    /// A [`BootError::Malformed`].
    pub(crate) fn malformed(
        path: &Path,
        what: &'static str,
        reason: impl Into<String>,
    ) -> BootError {
        BootError::Malformed {
            path: path.to_owned(),
            what,
            reason: reason.into(),
        }
    }
}
