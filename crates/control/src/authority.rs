//! Who may do what on a node over the mesh: pure functions over facts, and nothing by default.
//!
//! The owner comes over the local socket and is not asked. Anybody else needs a live grant of this node with the right that
//! the request [needs](requirement), stays within the grant's limits, sees only machines of its own, and gets nothing of the
//! host: no directories, no ports, no named volumes. A request that this table does not know needs what nobody can have.

use vistara_model::{Bytes, GrantTerms, MachineSpec, Network, NodeId, PortMapping, Right};

/// What a request needs of a caller who is not the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// No grant: the handler looks at what its owner has signed, and at this node's own grant in that.
    Partner,
    /// Any live grant.
    Any,
    /// A grant with this right.
    Right(Right),
    /// A grant with this right, and that the machine named in the path is the caller's own (or the caller is an admin).
    OwnMachine,
    /// Only the owner may, at the node itself.
    OwnerOnly,
}

/// What a request needs: its method, and its path cut at each slash, without the leading `v1`.
///
/// A table with no default but refusal: a path that is added to the interface is closed to others until it is added here.
pub fn requirement(method: &str, path: &[&str]) -> Requirement {
    match (method, path) {
        // Between nodes that look after a service or run copies of it, which need not have granted each other anything.
        ("POST", ["services", "message"]) => Requirement::Partner,
        ("GET", ["version" | "facts"]) => Requirement::Any,
        ("GET" | "POST", ["machines"])
        | ("POST", ["explain" | "offers"] | ["offers", _, "take"])
        | ("DELETE", ["offers", _]) => Requirement::Right(Right::Run),
        ("GET" | "DELETE", ["machines", _])
        | ("POST", ["machines", _, "stop" | "kill" | "pause" | "resume"])
        | (
            "GET",
            [
                "machines",
                _,
                "wait" | "logs" | "console" | "stats" | "stat" | "attach" | "exec" | "port"
                | "receipt",
            ],
        )
        | ("GET" | "PUT", ["machines", _, "archive"]) => Requirement::OwnMachine,
        // Who may run an image may read it.
        ("GET", ["images" | "image"] | ["image", "parts"] | ["blobs", _]) => {
            Requirement::Right(Right::Run)
        }
        ("POST", ["images", "pull" | "import" | "offer" | "assemble"]) | ("PUT", ["blobs", _]) => {
            Requirement::Right(Right::Images)
        }
        ("DELETE", ["image"])
        | ("POST", ["images", "tag" | "prune"])
        | ("GET", ["doctor" | "metrics" | "kernels" | "templates"])
        | ("POST", ["templates"] | ["templates", "prune"])
        | ("DELETE", ["templates", _])
        // Somebody's memory, and a monitor's state that is read as it comes: for those who may do everything with machines.
        | ("GET", ["snapshots"])
        | ("POST", ["snapshots", "offer" | "import"] | ["snapshots", _, "pack" | "restore"])
        | ("DELETE", ["snapshots", _]) => Requirement::Right(Right::Admin),
        // Kernels and their modules are named by paths of the host; grants, peers and the node's end are its owner's.
        _ => Requirement::OwnerOnly,
    }
}

/// How it stands with a grant in the node's own books. A signature alone is not enough: what is not in the books is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Given, and not taken back.
    Live,
    /// Taken back.
    Revoked,
    /// Not in the books.
    Unknown,
}

/// What a grant's machines take now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Those that are there. One that has ended counts until it is removed: its disk and its output stay.
    pub machines: u64,
    /// The guests' memory of those that have not ended, together.
    pub memory: Bytes,
}

/// A question of a caller who is not the owner.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// This node.
    pub node: NodeId,
    /// What the grant promises, read from a token whose signature was this node's; absent where there was no such token.
    pub terms: Option<&'a GrantTerms>,
    /// How it stands with that grant.
    pub standing: Standing,
    /// Seconds since 1970.
    pub now_s: u64,
    /// What the request needs.
    pub requirement: Requirement,
}

/// Why a caller is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing was shown.
    #[error("this node serves only those whom its owner has given a grant")]
    NoGrant,
    /// It is for another node.
    #[error("the grant is for another node")]
    OtherNode,
    /// It is not in the books.
    #[error("this node does not know the grant")]
    Unknown,
    /// Taken back.
    #[error("the grant was revoked")]
    Revoked,
    /// Over.
    #[error("the grant has expired")]
    Expired,
    /// It lacks a right.
    #[error("the grant does not give the right to {0}")]
    Right(Right),
    /// Nobody's but the owner's.
    #[error("only the node's owner may do this, at the node itself")]
    OwnerOnly,
    /// Too many machines.
    #[error(
        "the grant allows {allowed} machines at a time, and {used} are there, those that have ended and were not removed included"
    )]
    Machines {
        /// The limit.
        allowed: u64,
        /// What is there.
        used: u64,
    },
    /// Too much memory.
    #[error(
        "the grant allows {allowed} of memory, {used} are in use, and {asked} more are asked for"
    )]
    Memory {
        /// The limit.
        allowed: Bytes,
        /// What is in use.
        used: Bytes,
        /// What is asked for.
        asked: Bytes,
    },
    /// Too much disk.
    #[error(
        "the grant allows {allowed} of images, {used} were brought in under it and are there, and {asked} more are to come"
    )]
    Disk {
        /// The limit.
        allowed: Bytes,
        /// What is there.
        used: Bytes,
        /// What is to come.
        asked: Bytes,
    },
    /// The network.
    #[error("the grant does not give the right to use the node's network")]
    Network,
    /// Something of the host.
    #[error("{0} of the node's host cannot be used from another node")]
    Host(&'static str),
}

impl Refusal {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Refusal::NoGrant
            | Refusal::OtherNode
            | Refusal::Unknown
            | Refusal::Revoked
            | Refusal::Expired
            | Refusal::Right(_) => {
                "ask its owner for `vistara grant --to KEY --for run …`, with the key that `vistara id` prints here; then `vistara grant keep TOKEN`"
            }
            Refusal::OwnerOnly => "ask its owner to do it",
            Refusal::Machines { .. } | Refusal::Memory { .. } => {
                "remove machines that are not needed (`vistara ps -a`, `vistara rm`; `vistara run --rm` leaves none), or ask its owner for a larger grant"
            }
            Refusal::Disk { .. } => {
                "ask its owner for a larger grant (`vistara grant --max-disk …`), or to remove images that you sent"
            }
            Refusal::Network => {
                "add --network none, or ask its owner for a grant with the right `network`"
            }
            Refusal::Host(_) => "copy files with `vistara cp`, and leave -v out",
        }
    }
}

/// Which right a requirement comes down to; none for what any grant gives or no grant can.
pub fn right(requirement: Requirement) -> Option<Right> {
    match requirement {
        Requirement::Right(right) => Some(right),
        Requirement::OwnMachine => Some(Right::Run),
        Requirement::Partner | Requirement::Any | Requirement::OwnerOnly => None,
    }
}

/// Whether a grant has a right: who is an admin has all.
pub fn has_right(terms: &GrantTerms, right: Right) -> bool {
    terms.rights.contains(&right) || terms.rights.contains(&Right::Admin)
}

/// Whether a caller who is not the owner may ask this. Whose machine it is, and how much is asked for, come after.
///
/// # Errors
/// [`Refusal`].
pub fn authorize<'a>(question: &Question<'a>) -> Result<&'a GrantTerms, Refusal> {
    let terms = question.terms.ok_or(Refusal::NoGrant)?;
    if terms.node != question.node {
        return Err(Refusal::OtherNode);
    }
    match question.standing {
        Standing::Live => {}
        Standing::Revoked => return Err(Refusal::Revoked),
        Standing::Unknown => return Err(Refusal::Unknown),
    }
    if question.now_s > terms.until_s {
        return Err(Refusal::Expired);
    }
    if question.requirement == Requirement::OwnerOnly {
        return Err(Refusal::OwnerOnly);
    }
    match right(question.requirement) {
        Some(right) if !has_right(terms, right) => Err(Refusal::Right(right)),
        Some(_) | None => Ok(terms),
    }
}

/// Whether one more machine of this size stays within a grant.
///
/// # Errors
/// [`Refusal::Machines`], [`Refusal::Memory`].
pub fn within_quota(terms: &GrantTerms, usage: Usage, asked: Bytes) -> Result<Usage, Refusal> {
    let after = Usage {
        machines: usage.machines.saturating_add(1),
        memory: Bytes(usage.memory.0.saturating_add(asked.0)),
    };
    match terms.limits.machines_max {
        Some(allowed) if after.machines > allowed => {
            let used = usage.machines;
            return Err(Refusal::Machines { allowed, used });
        }
        _ => {}
    }
    match terms.limits.memory_max {
        Some(allowed) if after.memory > allowed => Err(Refusal::Memory {
            allowed,
            used: usage.memory,
            asked,
        }),
        _ => Ok(after),
    }
}

/// Whether so many more bytes of images stay within a grant; gives how many there are afterwards.
///
/// # Errors
/// [`Refusal::Disk`].
pub fn within_disk(terms: &GrantTerms, used: Bytes, asked: Bytes) -> Result<Bytes, Refusal> {
    let after = Bytes(used.0.saturating_add(asked.0));
    match terms.limits.disk_max {
        Some(allowed) if after > allowed => Err(Refusal::Disk {
            allowed,
            used,
            asked,
        }),
        _ => Ok(after),
    }
}

/// Whether a machine of somebody else's would use nothing of the host, or its network only where that was granted: behind a
/// host's network lie its own loopback and its neighbours.
///
/// # Errors
/// [`Refusal::Host`], [`Refusal::Network`].
pub fn leaves_host_alone(spec: &MachineSpec, may_use_network: bool) -> Result<(), Refusal> {
    if spec.network != Network::None && !may_use_network {
        return Err(Refusal::Network);
    }
    if !spec.volumes.is_empty() {
        return Err(Refusal::Host("directories"));
    }
    if !spec.named_volumes.is_empty() {
        return Err(Refusal::Host("volumes"));
    }
    // What the owner has set aside, and for what, is the owner's.
    if spec.huge_pages {
        return Err(Refusal::Host("huge pages"));
    }
    // Where the caller's own host leads to through the mesh; a number of the caller's choice could be somebody's.
    let reachable = |port: &PortMapping| !port.host_address.is_loopback() || port.host_port != 0;
    if spec.ports.iter().any(reachable) {
        return Err(Refusal::Host("ports"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
