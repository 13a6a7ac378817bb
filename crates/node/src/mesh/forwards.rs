//! Ports of this host that lead into machines on other nodes: kept in one file, served again after a restart, and over when
//! their machine is.
//!
//! Each connection is a client of the far node's like any other, through this node's own socket.

use super::lock;
use crate::fault::{Answer, Fault, blocking};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use vistara_api::{Client, ClientError, ErrorKind, Forward};
use vistara_model::NodeId;

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Forwards of one node: each has a listener and a request that waits for its machine's end, which takes a stream of the
/// mesh.
const FORWARDS_MAX: usize = 64;
/// Connections through all forwards at a time: each takes a stream, too. A connection between nodes has 256 of them; a
/// quarter is left for commands.
const CONNECTIONS_MAX: usize = 128;
/// Times in a row that a node must deny a machine before it counts as gone: a clock that is off, or too many requests, is
/// denied as well, and passes.
const DENIED_MAX: u32 = 30;
/// Pause before a port that was taken, or a node that was away, is tried again.
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    id: String,
    node: NodeId,
    machine: String,
    listen: SocketAddr,
    guest_port: u16,
}

#[derive(Serialize, Deserialize)]
struct Book {
    format: u32,
    forwards: Vec<Kept>,
}

struct Served {
    kept: Kept,
    stop: CancellationToken,
    trouble: Option<String>,
}

/// All forwards of this node.
pub(crate) struct Forwards {
    path: PathBuf,
    client: Client,
    served: Mutex<Vec<Served>>,
    /// Held while the file is written, so that the last one to write says what there is then.
    saving: tokio::sync::Mutex<()>,
    slots: Arc<Semaphore>,
}

fn shown(served: &Served) -> Forward {
    let kept = &served.kept;
    Forward {
        id: kept.id.clone(),
        node: kept.node.to_string(),
        machine: kept.machine.clone(),
        listen: kept.listen.to_string(),
        guest_port: kept.guest_port,
        trouble: served.trouble.clone(),
    }
}

impl Forwards {
    /// Nothing is served yet. `client` reaches this very node.
    pub(crate) fn new(dir: PathBuf, client: Client) -> Arc<Forwards> {
        Arc::new(Forwards {
            path: dir.join("forwards.json"),
            client,
            served: Mutex::default(),
            saving: tokio::sync::Mutex::default(),
            slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        })
    }

    /// Serves what an earlier start left.
    pub(crate) fn resume(self: &Arc<Self>) {
        let book = match std::fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => Err(error.to_string()),
            Ok(bytes) => serde_json::from_slice::<Book>(&bytes).map_err(|error| error.to_string()),
        };
        match book {
            Ok(book) if book.format == FORMAT => {
                for kept in book.forwards.into_iter().take(FORWARDS_MAX) {
                    self.serve(kept, None);
                }
            }
            Ok(book) => {
                tracing::error!(path = %self.path.display(), format = book.format, "forwards of another version are not served");
            }
            Err(error) => {
                tracing::error!(path = %self.path.display(), error, "forwards cannot be read and are not served");
            }
        }
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Forward> {
        lock(&self.served).iter().map(shown).collect()
    }

    /// Has a port lead into a machine.
    pub(crate) async fn add(
        self: &Arc<Self>,
        node: NodeId,
        machine: String,
        listen: SocketAddr,
        guest_port: u16,
    ) -> Answer<Forward> {
        if lock(&self.served).len() >= FORWARDS_MAX {
            return Err(Fault::conflict(format!(
                "this node forwards {FORWARDS_MAX} ports and no more"
            )));
        }
        let taken = |error: std::io::Error| {
            Fault::conflict(format!("the port {listen} cannot be listened on: {error}"))
                .hint("choose another: -p HOST:GUEST, or 0 for any")
        };
        let listener = TcpListener::bind(listen).await.map_err(taken)?;
        let listen = listener.local_addr().map_err(taken)?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| Fault::internal(&error))?;
        let kept = Kept {
            id: format!("{:016x}", u64::from_be_bytes(random)),
            node,
            machine,
            listen,
            guest_port,
        };
        self.serve(kept.clone(), Some(listener));
        if let Err(fault) = self.save().await {
            self.drop_one(&kept.id);
            return Err(fault);
        }
        let served = lock(&self.served);
        let one = served.iter().find(|one| one.kept.id == kept.id);
        // It may be over already, with its machine.
        one.map(shown)
            .ok_or_else(|| Fault::conflict("the machine is over"))
    }

    /// Ends one.
    pub(crate) async fn remove(&self, id: &str) -> Answer<()> {
        if !self.drop_one(id) {
            return Err(Fault::new(
                ErrorKind::NotFound,
                format!("there is no forward {id:?}"),
            ));
        }
        self.save().await
    }

    fn drop_one(&self, id: &str) -> bool {
        let mut served = lock(&self.served);
        let Some(index) = served.iter().position(|one| one.kept.id == id) else {
            return false;
        };
        served.remove(index).stop.cancel();
        true
    }

    async fn save(&self) -> Answer<()> {
        let _saving = self.saving.lock().await;
        let path = self.path.clone();
        let book = Book {
            format: FORMAT,
            forwards: (lock(&self.served).iter())
                .map(|one| one.kept.clone())
                .collect(),
        };
        blocking(move || {
            let fresh = path.with_extension("new");
            serde_json::to_vec(&book)
                .map_err(std::io::Error::other)
                .and_then(|bytes| std::fs::write(&fresh, bytes))
                .and_then(|()| std::fs::rename(&fresh, &path))
                .map_err(|error| {
                    Fault::new(ErrorKind::Host, format!("cannot write {path:?}: {error}"))
                })
        })
        .await?
    }

    fn trouble(&self, id: &str, trouble: Option<String>) {
        let mut served = lock(&self.served);
        if let Some(one) = served.iter_mut().find(|one| one.kept.id == id) {
            one.trouble = trouble;
        }
    }

    fn serve(self: &Arc<Self>, kept: Kept, listener: Option<TcpListener>) {
        let stop = CancellationToken::new();
        lock(&self.served).push(Served {
            kept: kept.clone(),
            stop: stop.clone(),
            trouble: None,
        });
        let forwards = Arc::clone(self);
        // It ends with its machine, when it is removed, or with the node.
        tokio::spawn(async move {
            let client = forwards.client.on(kept.node.to_string());
            let served = async {
                tokio::select! {
                    () = accept(&forwards, &client, &kept, listener, &stop) => {}
                    () = machine_over(&client, &kept.machine) => {}
                }
            };
            if stop.run_until_cancelled(served).await.is_none() {
                return;
            }
            forwards.drop_one(&kept.id);
            if let Err(fault) = forwards.save().await {
                tracing::warn!(
                    error = fault.0.message,
                    "an ended forward is still in the file"
                );
            }
        });
    }
}

/// Waits until a machine has ended, is gone, or is not this node's any more.
async fn machine_over(client: &Client, machine: &str) {
    let mut denied = 0;
    loop {
        let waited = client.wait(machine).await;
        if is_over(waited.as_ref().err(), &mut denied) {
            return;
        }
        // The node is away, and the machine goes on without it.
        tokio::time::sleep(AGAIN).await;
    }
}

/// Whether a machine is over, as waiting for it has ended; `denied` counts how often in a row it was denied.
fn is_over(error: Option<&ClientError>, denied: &mut u32) -> bool {
    match error {
        None => return true,
        Some(ClientError::Refused(body)) => match body.kind {
            ErrorKind::NotFound => return true,
            ErrorKind::Denied => *denied += 1,
            _ => *denied = 0,
        },
        Some(_) => *denied = 0,
    }
    *denied >= DENIED_MAX
}

async fn accept(
    forwards: &Forwards,
    client: &Client,
    kept: &Kept,
    mut listener: Option<TcpListener>,
    stop: &CancellationToken,
) {
    loop {
        let bound = match listener.take() {
            Some(bound) => bound,
            None => match TcpListener::bind(kept.listen).await {
                Ok(bound) => {
                    forwards.trouble(&kept.id, None);
                    bound
                }
                Err(error) => {
                    forwards.trouble(&kept.id, Some(error.to_string()));
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            },
        };
        // A place first: who comes when there is none waits in the kernel's queue.
        let Ok(slot) = Arc::clone(&forwards.slots).acquire_owned().await else {
            return;
        };
        let accepted = bound.accept().await;
        listener = Some(bound);
        let Ok((mut near, _)) = accepted else {
            // Too many files are open; some will be closed.
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        let (client, machine, port) = (client.clone(), kept.machine.clone(), kept.guest_port);
        let copy = async move {
            let _slot = slot;
            if let Err(error) = copy(&client, &machine, port, &mut near).await {
                tracing::debug!(error, "a forwarded connection broke");
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(copy));
    }
}

async fn copy(
    client: &Client,
    machine: &str,
    port: u16,
    near: &mut TcpStream,
) -> Result<(), String> {
    let mut far = (client.port(machine, port).await).map_err(|error| error.to_string())?;
    let copied = tokio::io::copy_bidirectional(near, &mut far).await;
    copied.map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_denied_for_a_moment_is_not_over() {
        let refused = |kind| {
            let body = Fault::new(kind, "no").0;
            ClientError::Refused(body)
        };
        let mut denied = 0;
        assert!(is_over(None, &mut denied));
        assert!(is_over(Some(&refused(ErrorKind::NotFound)), &mut denied));
        for _ in 1..DENIED_MAX {
            assert!(!is_over(Some(&refused(ErrorKind::Denied)), &mut denied));
        }
        assert!(!is_over(Some(&refused(ErrorKind::Peer)), &mut denied));
        for _ in 1..DENIED_MAX {
            assert!(!is_over(Some(&refused(ErrorKind::Denied)), &mut denied));
        }
        assert!(is_over(Some(&refused(ErrorKind::Denied)), &mut denied));
    }
}
