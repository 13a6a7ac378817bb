//! Nodes that are only there, for `vistara bench mesh`: real nodes with everything that a node has but machines, many of them in
//! one process.

use crate::{NodeOptions, Vmms};
use std::path::Path;
use std::sync::Arc;
use vistara_api::Client;
use vistara_machine::fake::{FakeEnd, FakeVmm};
use vistara_model::Bytes;

/// Nodes without machines. They vanish when this is dropped, as killed ones would.
#[derive(Debug)]
pub struct QuietNodes {
    runtime: Option<tokio::runtime::Runtime>,
    /// A client of each.
    pub clients: Vec<Client>,
}

impl QuietNodes {
    /// Starts so many, each with a state directory and a socket of its own in `dir`. They may not answer yet.
    ///
    /// # Errors
    /// Those of starting threads.
    pub fn start(count: usize, dir: &Path) -> std::io::Result<QuietNodes> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let mut clients = Vec::new();
        for number in 0..count {
            let socket = dir.join(format!("{number}.sock"));
            clients.push(Client::new(socket.clone()));
            let options = NodeOptions {
                state_dir: dir.join(number.to_string()),
                socket,
                idle_exit: None,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                vmms: Vmms::Given(Arc::new(FakeVmm::new(Arc::new(|_| FakeEnd::Off)))),
                qemu: None,
                virtiofsd: None,
                firecracker: None,
                jailer: None,
                slirp4netns: None,
                cpu_template: None,
                boot_bound: NodeOptions::BOOT_BOUND,
                template_limits: None,
                guard: None,
                warm_memory: Some(Bytes(0)),
            };
            // One that does not start does not answer.
            runtime.spawn(async move { drop(crate::run(options).await) });
        }
        Ok(QuietNodes {
            runtime: Some(runtime),
            clients,
        })
    }
}

impl Drop for QuietNodes {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
