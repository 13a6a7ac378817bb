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
/// Forwards of one node: each has a listener and a request that waits for its machine's end.
const FORWARDS_MAX: usize = 256;
/// Connections through one forward at a time: each takes a stream of the mesh, of which a connection between nodes has 256.
const CONNECTIONS_MAX: usize = 128;
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
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            let client = forwards.client.on(kept.node.to_string());
            tokio::select! {
                () = accept(&forwards, &client, &kept, listener, &stop) => {}
                () = machine_over(&client, &kept.machine) => {}
            }
            forwards.drop_one(&kept.id);
            if let Err(fault) = forwards.save().await {
                tracing::warn!(
                    error = fault.0.message,
                    "an ended forward is still in the file"
                );
            }
        }));
    }
}

/// Waits until a machine has ended, is gone, or is not this node's any more.
async fn machine_over(client: &Client, machine: &str) {
    loop {
        match client.wait(machine).await {
            Ok(_) => return,
            Err(ClientError::Refused(body))
                if matches!(body.kind, ErrorKind::NotFound | ErrorKind::Denied) =>
            {
                return;
            }
            // The node is away, and the machine goes on without it.
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

async fn accept(
    forwards: &Forwards,
    client: &Client,
    kept: &Kept,
    mut listener: Option<TcpListener>,
    stop: &CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
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
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
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
