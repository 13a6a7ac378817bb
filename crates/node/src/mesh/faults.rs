//! What goes wrong between nodes, as the interface's one error body.

use crate::fault::{Fault, chain};
use vistara_api::ErrorKind;
use vistara_control::Refusal;
use vistara_mesh::{IdentityError, LinkError, PeersError, TicketError, TokenError};
use vistara_model::AuthorityError;

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Fault {
        Fault::new(ErrorKind::Denied, refusal.to_string()).hint(refusal.hint())
    }
}

impl From<IdentityError> for Fault {
    fn from(error: IdentityError) -> Fault {
        Fault::new(ErrorKind::Host, chain(&error))
    }
}

impl From<PeersError> for Fault {
    fn from(error: PeersError) -> Fault {
        let kind = match &error {
            PeersError::Io { .. } | PeersError::Damaged { .. } => ErrorKind::Host,
            PeersError::TooMany | PeersError::NameTaken(..) => ErrorKind::Conflict,
        };
        Fault::new(kind, chain(&error))
    }
}

impl From<TicketError> for Fault {
    fn from(error: TicketError) -> Fault {
        Fault::user(chain(&error))
    }
}

impl From<AuthorityError> for Fault {
    fn from(error: AuthorityError) -> Fault {
        Fault::user(error.to_string())
    }
}

impl From<TokenError> for Fault {
    fn from(error: TokenError) -> Fault {
        let kind = match &error {
            TokenError::Text | TokenError::TooLarge | TokenError::Terms | TokenError::Make(_) => {
                ErrorKind::User
            }
            TokenError::Signature | TokenError::Check(_) => ErrorKind::Denied,
        };
        Fault::new(kind, chain(&error))
    }
}

impl From<LinkError> for Fault {
    fn from(error: LinkError) -> Fault {
        match &error {
            LinkError::Bind { .. } => Fault::new(ErrorKind::Host, chain(&error))
                .hint("choose another port: vistara node ticket --listen ADDRESS:PORT"),
            LinkError::Key(_) => Fault::user(error.to_string()),
            LinkError::Unknown(_) => Fault::new(ErrorKind::NotFound, error.to_string())
                .hint("`vistara nodes` lists those that were joined"),
            LinkError::Away { .. } => Fault::new(ErrorKind::Peer, error.to_string()).hint(
                "is it running, and does its address still hold? `vistara node ticket` there prints the present one",
            ),
            LinkError::Closed => Fault::conflict(error.to_string()),
        }
    }
}
