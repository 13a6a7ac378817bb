//! Running a relay for others: its key, its lock, and its end. It needs no node, and is none.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;
use vistara_mesh::{Identity, IdentityError, RelayError, RelayOptions, RelayServer};
use vistara_model::NodeId;

/// How often it says what it does, if that has changed.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// What a relay is told when it begins.
#[derive(Debug, Clone)]
pub struct RelayPlan {
    /// Directory of its key. Made with mode 0700 where absent.
    pub dir: PathBuf,
    /// Where to listen, TCP and UDP. Port 0 takes any.
    pub listen: SocketAddr,
    /// Under which addresses others reach it, where they are not the host's own; port 0 means the one at which it listens.
    pub named: Vec<SocketAddr>,
    /// Whom it serves; anybody where empty.
    pub allow: BTreeSet<NodeId>,
    /// Most nodes at a time.
    pub nodes_max: usize,
    /// What one node may send, in bytes a second.
    pub rate_bytes_per_s: NonZeroU32,
}

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayFault {
    /// Its directory could not be made or locked.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Another one uses the same directory, so the same key.
    #[error("another relay runs with the key in {0:?}")]
    Taken(PathBuf),
    /// Its key could not be had.
    #[error("the relay has no key")]
    Key(#[from] IdentityError),
    /// It could not begin.
    #[error("the relay cannot begin")]
    Begin(#[from] RelayError),
}

fn identity(dir: &PathBuf) -> Result<(Identity, File), RelayFault> {
    let io = |operation, path: PathBuf| {
        move |source| RelayFault::Io {
            operation,
            path,
            source,
        }
    };
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(dir)
        .map_err(io("make", dir.clone()))?;
    let path = dir.join("lock");
    let lock = File::create(&path).map_err(io("open", path.clone()))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Err(RelayFault::Taken(dir.clone())),
        Err(std::fs::TryLockError::Error(source)) => return Err(io("lock", path)(source)),
    }
    Ok((Identity::open(dir)?, lock))
}

/// Relays until it is told to leave by SIGTERM or SIGINT. `began` hears what nodes are told to use it.
///
/// # Errors
/// [`RelayFault`]; nothing listens then.
pub async fn run_relay(plan: RelayPlan, began: impl FnOnce(Vec<String>)) -> Result<(), RelayFault> {
    let (identity, _lock) = identity(&plan.dir)?;
    let server = RelayServer::open(RelayOptions {
        identity,
        listen: plan.listen,
        allow: plan.allow,
        clients_max: plan.nodes_max,
        rate_bytes_per_s: plan.rate_bytes_per_s,
    })?;
    let here = server.listen().port();
    let named = plan.named.iter().map(|address| vistara_mesh::Relay {
        key: server.id(),
        address: match address.port() {
            0 => SocketAddr::new(address.ip(), here),
            _ => *address,
        },
    });
    let mut relays: Vec<_> = named.collect();
    if relays.is_empty() {
        relays = server.relays();
    }
    began(relays.iter().map(ToString::to_string).collect());
    let mut told = server.counts();
    let mut tick = tokio::time::interval(SAY_EVERY);
    let left = crate::service::terminated();
    tokio::pin!(left);
    loop {
        tokio::select! {
            () = &mut left => break,
            _ = tick.tick() => {
                let counts = server.counts();
                if counts != told {
                    tracing::info!(nodes = counts.clients, forwarded_bytes = counts.forwarded_bytes, refused = counts.refused, "the relay");
                    told = counts;
                }
            }
        }
    }
    server.close().await;
    Ok(())
}
