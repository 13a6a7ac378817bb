//! How a command fails: one line that says what failed and why, a hint, and an exit code.

use crate::text::visible;
use std::fmt::Display;
use vistara_api::{ClientError, ErrorBody, ErrorKind};

/// Exit code of our own and the host's faults where a program's exit code is passed through, as docker has it.
pub(crate) const OWN_FAULT: u8 = 125;
/// Exit code of a task that is lost: it may have begun, and nobody knows how it went.
pub(crate) const TASK_LOST: u8 = 123;
/// Exit code after a reader closed our output: what a shell reports for a program that SIGPIPE ended.
pub(crate) const OUTPUT_CLOSED: u8 = 141;

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What failed, and why; empty where everything has been said.
    pub(crate) message: String,
    /// What to type.
    pub(crate) hint: Option<String>,
    /// Exit code, where the fault has one of its own.
    pub(crate) code: Option<u8>,
    /// The node's word for it.
    pub(crate) kind: Option<ErrorKind>,
    /// Whether the connection to the node was lost, so that nobody knows how it went.
    pub(crate) lost: bool,
}

impl Failure {
    /// A failure in words.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure {
            message: message.into(),
            hint: None,
            code: None,
            kind: None,
            lost: false,
        }
    }

    /// Something failed for this reason.
    pub(crate) fn because(what: impl Display, why: impl Display) -> Failure {
        Failure::new(format!("{what}: {why}"))
    }

    /// An end with this exit code and without a word: all has been said, or nobody listens.
    pub(crate) fn silent(code: u8) -> Failure {
        Failure {
            code: Some(code),
            ..Failure::new("")
        }
    }

    /// With a hint.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// With an exit code.
    pub(crate) fn code(mut self, code: u8) -> Failure {
        self.code = Some(code);
        self
    }

    /// The node's error.
    pub(crate) fn refused(body: &ErrorBody) -> Failure {
        Failure {
            message: body.message.clone(),
            hint: body.hint.clone().or_else(|| usual_hint(body.kind)),
            code: body.exit_code,
            kind: Some(body.kind),
            lost: false,
        }
    }

    /// The connection broke off.
    pub(crate) fn lost(self) -> Failure {
        Failure { lost: true, ..self }
    }

    /// The same, of a request that went to another node, for whose troubles this host's doctor and log are of no use.
    pub(crate) fn on(self, node: &str) -> Failure {
        if self.lost {
            return Failure {
                message: format!("the node {node} is lost: {}", self.message),
                hint: Some(format!(
                    "its machines go on without it: `vistara nodes` says when it answers again, `vistara --on {node} ps` lists them then"
                )),
                ..self
            };
        }
        let usual = self.kind.and_then(usual_hint);
        match self.kind {
            Some(kind @ (ErrorKind::Host | ErrorKind::Internal)) if self.hint == usual => {
                let word = match kind {
                    ErrorKind::Host => "`vistara doctor`, typed there, says what its host lacks",
                    _ => "the end of node.log in its state directory there says more",
                };
                Failure {
                    message: format!("the node {node}: {}", self.message),
                    hint: Some(word.to_owned()),
                    ..self
                }
            }
            _ => self,
        }
    }

    /// Something failed at the node.
    pub(crate) fn at(what: impl Display) -> impl FnOnce(ClientError) -> Failure {
        move |error| {
            let failure = Failure::from(error);
            Failure {
                message: format!("{what}: {}", failure.message),
                ..failure
            }
        }
    }

    /// Prints it.
    pub(crate) fn print(&self) {
        if !self.message.is_empty() {
            eprint_line(&format!("vistara: {}", visible(&self.message, true)));
        }
        if let Some(hint) = &self.hint {
            eprint_line(&format!("hint: {}", visible(hint, true)));
        }
    }
}

/// What to do about a fault for which the node gave no better hint.
fn usual_hint(kind: ErrorKind) -> Option<String> {
    match kind {
        ErrorKind::User | ErrorKind::Conflict | ErrorKind::StartFailed => None,
        ErrorKind::NotFound => Some(
            "`vistara ps -a` lists machines, `vistara images` lists images".to_owned(),
        ),
        ErrorKind::ImageNotFound => {
            Some("`vistara images pull IMAGE` fetches it; `vistara images` lists those here".to_owned())
        }
        ErrorKind::Host => Some("`vistara doctor` says what this host lacks".to_owned()),
        ErrorKind::Peer => Some("try again; check the network and the name".to_owned()),
        ErrorKind::Denied => Some("`vistara doctor` says which permissions are missing".to_owned()),
        ErrorKind::Internal => {
            Some("this is a fault in vistara; please report it with the end of node.log in the state directory".to_owned())
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        match &error {
            ClientError::Refused(body) => Failure::refused(body),
            ClientError::Unreachable { source, .. } => Failure::because(&error, source)
                .hint("is the node running? `vistara version` shows it"),
            ClientError::Broken { .. } => Failure::new(error.to_string())
                .hint(
                    "machines go on without the node; `vistara ps` starts one again and lists them",
                )
                .lost(),
        }
    }
}

impl From<std::io::Error> for Failure {
    /// An error of writing our own output, the only kind that commands pass on without words of their own.
    fn from(error: std::io::Error) -> Failure {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Failure::silent(OUTPUT_CLOSED)
        } else {
            Failure::because("cannot write the output", error)
        }
    }
}

impl From<crate::places::PlacesError> for Failure {
    fn from(error: crate::places::PlacesError) -> Failure {
        Failure::new(error.message).hint(error.hint)
    }
}

/// A line on standard error, where a broken one is no reason to fail.
pub(crate) fn eprint_line(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_own_hint_and_exit_code_win() {
        let failure = Failure::refused(&ErrorBody {
            kind: ErrorKind::StartFailed,
            message: "no such program".to_owned(),
            hint: Some("look".to_owned()),
            exit_code: Some(127),
        });
        assert_eq!(failure.code, Some(127));
        assert_eq!(failure.hint.as_deref(), Some("look"));
    }

    #[test]
    fn what_fails_on_another_node_is_not_looked_for_here() {
        let lost = || {
            Failure::from(ClientError::Broken {
                operation: "reading",
                message: "end".to_owned(),
            })
        };
        assert!(lost().hint.is_some_and(|hint| !hint.contains("--on")));
        let lost = lost().on("far");
        assert!(lost.message.contains("far") && lost.message.contains("end"));
        assert!(lost.hint.is_some_and(|hint| hint.contains("--on far ps")));
        let body = |hint: Option<&str>| ErrorBody {
            kind: ErrorKind::Internal,
            message: "broken".to_owned(),
            hint: hint.map(str::to_owned),
            exit_code: None,
        };
        let internal = Failure::refused(&body(None)).on("far");
        assert!(internal.hint.is_some_and(|hint| hint.contains("there")));
        let own = Failure::refused(&body(Some("look"))).on("far");
        assert_eq!(own.hint.as_deref(), Some("look"));
    }

    #[test]
    fn a_reader_that_went_away_is_no_message() {
        let failure = Failure::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!((failure.message.as_str(), failure.code), ("", Some(141)));
    }
}
