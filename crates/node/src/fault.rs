//! Errors at the edge: every layer's error becomes the one body that the interface has, its causes in one line.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::error::Error;
use std::path::PathBuf;
use vistara_api::{ErrorBody, ErrorKind};
use vistara_control::{AdmissionError, ChoiceError, LookupError, ProgramError};
use vistara_guest_client::{AgentError, RefusalKind};
use vistara_image::ImageError;
use vistara_machine::VmmError;
use vistara_machine::boot::BootError;

/// Why a node could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file or directory could not be made ready.
    #[error("{operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Another node serves this state directory.
    #[error("another node is serving {0:?}")]
    AlreadyServed(PathBuf),
    /// The image store could not be opened.
    #[error("the image store could not be opened")]
    Images(#[source] ImageError),
    /// The kernel store could not be opened.
    #[error("the kernel store could not be opened")]
    Kernels(#[source] BootError),
}

/// An answer that is not a success.
#[derive(Debug, Clone)]
pub(crate) struct Fault(pub(crate) ErrorBody);

pub(crate) type Answer<T> = Result<T, Fault>;

/// Runs work that blocks, off the runtime's threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Answer<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Fault::internal(&error))
}

/// An error with its causes, one after another.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let layer = error.to_string();
        if !text.contains(&layer) {
            text.push_str(": ");
            text.push_str(&layer);
        }
        cause = error.source();
    }
    text
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Fault {
        Fault(ErrorBody {
            kind,
            message: message.into(),
            hint: None,
            exit_code: None,
        })
    }

    pub(crate) fn user(message: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::User, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Conflict, message)
    }

    /// What was typed leads to none of these, which go by these (`ids`, `keys`).
    pub(crate) fn lookup(error: LookupError, what: &str, by: &str) -> Fault {
        match error {
            LookupError::NotFound(typed) => {
                Fault::new(ErrorKind::NotFound, format!("there is no {what} {typed:?}"))
            }
            LookupError::Ambiguous { prefix, count } => Fault::user(format!(
                "{prefix:?} is the beginning of {count} {what}s' {by}; type more of it"
            )),
        }
    }

    pub(crate) fn internal(error: &dyn Error) -> Fault {
        Fault::new(ErrorKind::Internal, chain(error))
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Fault {
        self.0.hint = Some(hint.into());
        self
    }

    fn status(&self) -> StatusCode {
        match self.0.kind {
            ErrorKind::User | ErrorKind::StartFailed => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound | ErrorKind::ImageNotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Host => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Peer => StatusCode::BAD_GATEWAY,
            ErrorKind::Denied => StatusCode::FORBIDDEN,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        (self.status(), Json(self.0)).into_response()
    }
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Fault {
        use vistara_image::ErrorKind as Image;
        let kind = match error.kind() {
            Image::NotFound => ErrorKind::ImageNotFound,
            Image::User | Image::Refused | Image::Architecture => ErrorKind::User,
            Image::Denied => ErrorKind::Denied,
            Image::Peer => ErrorKind::Peer,
            Image::Host | Image::NoSpace => ErrorKind::Host,
        };
        let mut fault = Fault::new(kind, chain(&error));
        fault.0.hint = error.hint();
        fault
    }
}

impl From<BootError> for Fault {
    fn from(error: BootError) -> Fault {
        let (kind, hint) = match &error {
            BootError::UnknownKernel { .. } => {
                (ErrorKind::NotFound, Some("see `vistara kernel ls`"))
            }
            BootError::Name(_)
            | BootError::Malformed { .. }
            | BootError::NoPvhEntry(_)
            | BootError::Size(_) => (ErrorKind::User, None),
            BootError::NoKernel => (ErrorKind::Host, Some("vistara kernel add debian")),
            BootError::ModuleMissing { .. }
            | BootError::Absent { .. }
            | BootError::Command { .. }
            | BootError::Io { .. } => (ErrorKind::Host, None),
        };
        let mut fault = Fault::new(kind, chain(&error));
        fault.0.hint = hint.map(str::to_owned);
        fault
    }
}

impl From<VmmError> for Fault {
    fn from(error: VmmError) -> Fault {
        let kind = match &error {
            VmmError::Absent { .. } | VmmError::Launch { .. } | VmmError::Io { .. } => {
                ErrorKind::Host
            }
            VmmError::Unsupported { .. } => ErrorKind::User,
            VmmError::PortTaken(_) | VmmError::Ended => ErrorKind::Conflict,
            VmmError::Control { .. } => ErrorKind::Internal,
        };
        Fault::new(kind, chain(&error))
    }
}

impl From<ChoiceError> for Fault {
    fn from(error: ChoiceError) -> Fault {
        Fault::new(ErrorKind::Host, error.to_string()).hint(error.hint())
    }
}

impl From<AdmissionError> for Fault {
    fn from(error: AdmissionError) -> Fault {
        let kind = match &error {
            AdmissionError::MemoryTooSmall { .. } | AdmissionError::DiskSize { .. } => {
                ErrorKind::User
            }
            AdmissionError::MemoryShort { .. } | AdmissionError::CpusShort { .. } => {
                ErrorKind::Host
            }
        };
        Fault::new(kind, error.to_string())
    }
}

impl From<ProgramError> for Fault {
    fn from(error: ProgramError) -> Fault {
        Fault::user(error.to_string())
    }
}

impl From<LookupError> for Fault {
    fn from(error: LookupError) -> Fault {
        Fault::lookup(error, "machine", "ids").hint("see `vistara ps -a`")
    }
}

impl From<AgentError> for Fault {
    fn from(error: AgentError) -> Fault {
        let kind = match &error {
            AgentError::Refused(refusal) => match refusal.kind {
                RefusalKind::NotFound => ErrorKind::NotFound,
                RefusalKind::Invalid | RefusalKind::Unsupported => ErrorKind::User,
                RefusalKind::Denied => ErrorKind::Denied,
                RefusalKind::Busy => ErrorKind::Conflict,
                RefusalKind::Failed => ErrorKind::Internal,
            },
            AgentError::TooLong | AgentError::Source(_) => ErrorKind::User,
            AgentError::Silent(_)
            | AgentError::Version { .. }
            | AgentError::Closed
            | AgentError::Io(_)
            | AgentError::Broken(_)
            | AgentError::Off => ErrorKind::Conflict,
        };
        Fault::new(kind, chain(&error))
    }
}
