//! Image names and the part of an image's configuration that a machine honours.

use crate::Digest;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not an image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageRefError {
    /// Not of the form `[registry/]repository[:tag][@digest]`.
    #[error(
        "{0:?} is not an image name ({1}); write [REGISTRY/]NAME[:TAG][@sha256:DIGEST], in lower case"
    )]
    Malformed(String, &'static str),
}

/// An image's name, complete: `registry/repository:tag` or `registry/repository@digest`.
///
/// Short names are completed as docker completes them: `debian` is `docker.io/library/debian:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    /// `docker.io`, `localhost:5000`, ….
    pub registry: String,
    /// `library/debian`, ….
    pub repository: String,
    /// `latest`, ….; absent only where a digest is given.
    pub tag: Option<String>,
    /// The manifest's digest, where it is pinned.
    pub digest: Option<Digest>,
}

impl ImageRef {
    /// The name as users type it: without `docker.io/library/`.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let short = full.strip_prefix("docker.io/").unwrap_or(&full);
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ImageRefError;
    fn try_from(text: String) -> Result<Self, ImageRefError> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(value: ImageRef) -> String {
        value.to_string()
    }
}

fn is_path_component(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    edge(part.chars().next())
        && edge(part.chars().next_back())
        && part
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
}

impl FromStr for ImageRef {
    type Err = ImageRefError;
    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        let error = |why| ImageRefError::Malformed(text.to_owned(), why);
        if text.is_empty() || text.len() > 512 {
            return Err(error("it is empty or longer than 512 characters"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse()
                        .map_err(|_| error("its digest is not sha256:<64 hex digits>"))?,
                ),
            ),
            None => (text, None),
        };
        let (head, tail) = match rest.split_once('/') {
            Some((head, tail)) if head.contains(['.', ':']) || head == "localhost" => (head, tail),
            _ => ("docker.io", rest),
        };
        let (name, tag) = match tail.rsplit_once(':') {
            Some((name, tag)) => (name, Some(tag.to_owned())),
            None => (tail, None),
        };
        if let Some(tag) = &tag {
            let first = tag
                .bytes()
                .next()
                .is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
            let rest = tag
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
            if !first || !rest || tag.len() > 128 {
                return Err(error("its tag is not of letters, digits, _ . and -"));
            }
        }
        let host_ok = head
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".:-[]".contains(&b));
        let host_edge = head
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric() || b == b'[');
        if !host_edge || !host_ok || head.contains("..") {
            return Err(error("its registry is not a host name"));
        }
        if !name.split('/').all(is_path_component) {
            return Err(error(
                "a part of its name is empty, upper case, or has an odd character",
            ));
        }
        let registry = if head == "index.docker.io" {
            "docker.io"
        } else {
            head
        };
        let repository = if registry == "docker.io" && !name.contains('/') {
            format!("library/{name}")
        } else {
            name.to_owned()
        };
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag,
        };
        Ok(ImageRef {
            registry: registry.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

/// A processor architecture, by its OCI (Go) name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Architecture(pub String);

impl Architecture {
    /// The architecture that this program was built for.
    pub fn host() -> Architecture {
        Architecture(
            match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            }
            .to_owned(),
        )
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an image says about how to run it (the `config` object of an OCI image configuration).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// First words of the command line.
    pub entrypoint: Vec<String>,
    /// Words after the entry point, replaced by the user's command.
    pub cmd: Vec<String>,
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid`, or empty for root.
    pub user: String,
    /// Where the program starts; empty means `/`.
    pub working_dir: String,
    /// Signal that asks the program to end, such as `SIGTERM`; empty means that.
    pub stop_signal: String,
    /// Ports that the program listens on, such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Directories that the image wants to outlive the machine.
    pub volumes: Vec<String>,
    /// Free labels.
    pub labels: std::collections::BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_names_are_completed_as_docker_completes_them() {
        for (short, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("bitnami/redis:7", "docker.io/bitnami/redis:7"),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("ghcr.io/x/y:v1", "ghcr.io/x/y:v1"),
        ] {
            assert_eq!(short.parse::<ImageRef>().unwrap().to_string(), full);
        }
        assert_eq!(
            "debian".parse::<ImageRef>().unwrap().familiar(),
            "debian:latest"
        );
    }

    #[test]
    fn a_name_with_a_digest_needs_no_tag() {
        let text = format!("debian@sha256:{}", "a".repeat(64));
        let name: ImageRef = text.parse().unwrap();
        assert_eq!((name.tag, name.digest.is_some()), (None, true));
    }

    #[test]
    fn names_that_would_be_paths_or_options_are_refused() {
        for bad in [
            "",
            "Debian",
            "a//b",
            "../x",
            "-x",
            "a:",
            "a:b c",
            "a@sha256:12",
            "/a",
            "a/",
            "localhost:5000/",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_that_parses_prints_to_itself(text in "[a-z0-9./:@_-]{1,40}") {
            if let Ok(name) = text.parse::<ImageRef>() {
                prop_assert_eq!(name.to_string().parse::<ImageRef>().unwrap(), name);
            }
        }
    }
}
