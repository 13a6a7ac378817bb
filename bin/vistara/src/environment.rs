//! Every environment variable that the program reads, in one place.
//!
//! `docs/guide/environment.md` is made from [`VARIABLES`]; a test fails when the two differ. No other file calls
//! `std::env::var`, except that `run --env NAME` copies a variable of the caller's choosing through [`of_caller`].

use crate::failure::Failure;
use std::path::PathBuf;
use vistara_model::Bytes;

/// Socket of the node.
pub(crate) const SOCKET: &str = "VISTARA_SOCKET";
/// State directory of the node.
pub(crate) const STATE_DIR: &str = "VISTARA_STATE_DIR";
/// What the node logs.
pub(crate) const LOG: &str = "VISTARA_LOG";
/// QEMU's program.
pub(crate) const QEMU: &str = "VISTARA_QEMU";
/// virtiofsd's program.
pub(crate) const VIRTIOFSD: &str = "VISTARA_VIRTIOFSD";

/// Firecracker's program.
pub(crate) const FIRECRACKER: &str = "VISTARA_FIRECRACKER";
/// What Firecracker's guests see of the processor.
pub(crate) const CPU_TEMPLATE: &str = "VISTARA_CPU_TEMPLATE";
/// The program of Firecracker's jailer.
pub(crate) const JAILER: &str = "VISTARA_JAILER";
/// slirp4netns's program.
pub(crate) const SLIRP4NETNS: &str = "VISTARA_SLIRP4NETNS";
/// What machines that are kept ready may take.
pub(crate) const WARM_MEMORY: &str = "VISTARA_WARM_MEMORY";

/// One variable and its meaning, for the reference page.
#[derive(Debug)]
pub(crate) struct Variable {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it does, in a sentence or two.
    pub(crate) meaning: &'static str,
}

/// Every variable.
pub(crate) const VARIABLES: &[Variable] = &[
    Variable {
        name: SOCKET,
        meaning: "Socket on which the node listens, as `--socket`. At most 107 bytes.",
    },
    Variable {
        name: STATE_DIR,
        meaning: "Directory that holds the node's machines, images and kernels, as `--state-dir`. A directory other than the default implies its own socket, `run/node.sock` in it.",
    },
    Variable {
        name: LOG,
        meaning: "What the node logs: `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `vistara_node=debug`.",
    },
    Variable {
        name: QEMU,
        meaning: "QEMU's program, where the node should not take the `qemu-system-x86_64` of its `PATH`.",
    },
    Variable {
        name: VIRTIOFSD,
        meaning: "virtiofsd's program, where it is in none of the usual places; volumes need it.",
    },
    Variable {
        name: FIRECRACKER,
        meaning: "Firecracker's program, where the node should not take the `firecracker` of `/opt/vistara/bin` or of its `PATH`.",
    },
    Variable {
        name: JAILER,
        meaning: "The program of Firecracker's jailer, where it is neither beside Firecracker nor in those places.",
    },
    Variable {
        name: SLIRP4NETNS,
        meaning: "slirp4netns's program, where it is not on the node's `PATH`; the network of Firecracker's machines needs it.",
    },
    Variable {
        name: CPU_TEMPLATE,
        meaning: "File with a processor template of Firecracker's, as its `cpu-template-helper` writes one: Firecracker's guests see the processor so, alike on hosts that differ.",
    },
    Variable {
        name: WARM_MEMORY,
        meaning: "Memory that the node may use for machines that it keeps ready for images which are run again and again, as `node --warm-memory`: `512m`, `2g`, or `0` for none.",
    },
    Variable {
        name: "XDG_RUNTIME_DIR",
        meaning: "Where the socket of an ordinary user is by default: `$XDG_RUNTIME_DIR/vistara/node.sock`. Not used when it belongs to somebody else; then, and where it is not set, it is `/tmp/vistara-<uid>/node.sock`.",
    },
    Variable {
        name: "XDG_DATA_HOME",
        meaning: "Where the state of an ordinary user is by default: `$XDG_DATA_HOME/vistara`.",
    },
    Variable {
        name: "HOME",
        meaning: "Stands in for the two above: state in `~/.local/share/vistara`, registry credentials in `~/.docker`.",
    },
    Variable {
        name: "DOCKER_CONFIG",
        meaning: "Directory of docker's `config.json`, from which registry credentials are read.",
    },
    Variable {
        name: "TERM",
        meaning: "Passed to a program that gets a terminal (`-t`), unless `--env TERM=…` says otherwise.",
    },
];

/// The variables as `--help` shows them.
pub(crate) fn help() -> String {
    let mut text = "Environment:".to_owned();
    for variable in VARIABLES {
        text.push_str(&format!(
            "\n  {}\n          {}",
            variable.name, variable.meaning
        ));
    }
    text
}

/// A variable of [`VARIABLES`] that holds a path; an empty one counts as not set.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

/// A variable of [`VARIABLES`] that holds a number of bytes; an empty one counts as not set.
pub(crate) fn bytes(name: &str) -> Result<Option<Bytes>, Failure> {
    let Some(text) = of_caller(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let parsed = text.parse().map(Some);
    parsed.map_err(|error| Failure::because(format!("{name} is {text:?}"), error))
}

/// The caller's value of a variable, where it has one that is UTF-8.
pub(crate) fn of_caller(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Directory of docker's credentials, where there is one.
pub(crate) fn docker_config_dir() -> Option<PathBuf> {
    path("DOCKER_CONFIG")
        .or_else(|| path("HOME").map(|home| home.join(".docker")))
        .and_then(|dir| std::path::absolute(dir).ok())
        .filter(|dir| dir.join("config.json").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> String {
        let mut text = "# Environment variables\n\nA flag, where there is one, takes precedence over its variable.\n\n| Variable | Meaning |\n| --- | --- |\n".to_owned();
        for variable in VARIABLES {
            text.push_str(&format!("| `{}` | {} |\n", variable.name, variable.meaning));
        }
        text.push_str("\nThis page is made from `bin/vistara/src/environment.rs`; `VISTARA_WRITE_PAGES=1 cargo test -p vistara` writes it.\n");
        text
    }

    #[test]
    fn the_reference_page_names_every_variable() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/guide/environment.md"
        );
        if std::env::var_os("VISTARA_WRITE_PAGES").is_some() {
            std::fs::write(path, page()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), page());
    }
}
