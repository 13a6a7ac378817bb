//! `vistara node`: the daemon itself, and asking a running one to leave.

use crate::arguments::{NodeArguments, NodeSubcommand};
use crate::connect;
use crate::failure::Failure;
use crate::mesh_commands;
use crate::output::{print, print_json};
use crate::places::Places;
use std::time::Duration;
use vistara_model::Bytes;

/// What the daemon needs to know.
#[derive(Debug)]
pub(crate) struct NodeOptions {
    /// Where its socket and state are; both directories exist.
    pub(crate) places: Places,
    /// How long it stays without work; for ever where absent.
    pub(crate) idle_exit: Option<Duration>,
    /// What machines that are kept ready may take; what suits the host where absent.
    pub(crate) warm_memory: Option<Bytes>,
}

/// Runs the daemon until it is asked to leave. Called outside any runtime; leaving because another node holds the lock
/// is no failure.
fn run_node(options: NodeOptions) -> Result<(), Failure> {
    let NodeOptions {
        places,
        idle_exit,
        warm_memory,
    } = options;
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env(crate::environment::LOG)
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot start the node's threads: {error}")))?;
    // Guests that see another processor than they should would be found out too late.
    let cpu_template = crate::environment::path(crate::environment::CPU_TEMPLATE)
        .map(|path| vistara_node::CpuTemplate::read(&path))
        .transpose()
        .map_err(|error| {
            Failure::new(format!(
                "the node cannot start: {:#}",
                anyhow::Error::from(error)
            ))
            .hint(format!(
                "mend the file, or unset {}",
                crate::environment::CPU_TEMPLATE
            ))
        })?;
    let options = vistara_node::NodeOptions {
        state_dir: places.state_dir,
        socket: places.socket,
        idle_exit,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        vmms: vistara_node::Vmms::Detect,
        qemu: crate::environment::path(crate::environment::QEMU),
        virtiofsd: crate::environment::path(crate::environment::VIRTIOFSD),
        firecracker: crate::environment::path(crate::environment::FIRECRACKER),
        jailer: crate::environment::path(crate::environment::JAILER),
        slirp4netns: crate::environment::path(crate::environment::SLIRP4NETNS),
        cpu_template,
        boot_bound: vistara_node::NodeOptions::BOOT_BOUND,
        template_limits: None,
        warm_memory,
    };
    match runtime.block_on(vistara_node::run(options)) {
        Ok(()) => Ok(()),
        Err(vistara_node::NodeError::AlreadyServed(_)) => Ok(()),
        Err(error) => Err(Failure::new(format!(
            "the node cannot start: {:#}",
            anyhow::Error::from(error)
        ))),
    }
}

/// `vistara node` without a subcommand: becomes the daemon.
pub(crate) fn become_node(arguments: &NodeArguments, places: Places) -> Result<u8, Failure> {
    if arguments.background {
        // Out of the terminal's session: neither its signals nor its end concern a node. It fails only for the leader of
        // a process group, which is out already.
        let _ = rustix::process::setsid();
    }
    places.prepare()?;
    let warm_memory = match arguments.warm_memory {
        Some(bytes) => Some(bytes),
        None => crate::environment::bytes(crate::environment::WARM_MEMORY)?,
    };
    run_node(NodeOptions {
        places,
        idle_exit: arguments.idle_exit,
        warm_memory,
    })?;
    Ok(0)
}

/// `vistara node stop` and `vistara node status`.
pub(crate) async fn manage(command: &NodeSubcommand, places: &Places) -> Result<u8, Failure> {
    match command {
        NodeSubcommand::Join {
            name,
            grant,
            ticket,
        } => {
            let client = connect::or_start(places).await?;
            let (ticket, name, grant) = (ticket.clone(), name.clone(), grant.clone());
            return mesh_commands::join(&client, ticket, name, grant).await;
        }
        NodeSubcommand::Leave { node } => {
            let client = connect::or_start(places).await?;
            return mesh_commands::leave(&client, node.as_deref()).await;
        }
        NodeSubcommand::Ticket { listen } => {
            let client = connect::or_start(places).await?;
            return mesh_commands::ticket(&client, listen.clone()).await;
        }
        NodeSubcommand::Terms(options) => {
            let client = connect::or_start(places).await?;
            return mesh_commands::terms(&client, options).await;
        }
        NodeSubcommand::Stop | NodeSubcommand::Status { .. } => {}
    }
    let client = connect::running(places).await?;
    match (command, client) {
        (
            NodeSubcommand::Join { .. }
            | NodeSubcommand::Leave { .. }
            | NodeSubcommand::Ticket { .. }
            | NodeSubcommand::Terms(_),
            _,
        ) => Ok(0),
        (NodeSubcommand::Stop, None) => {
            crate::failure::eprint_line("no node runs");
            Ok(0)
        }
        (NodeSubcommand::Stop, Some(client)) => {
            client
                .shutdown()
                .await
                .map_err(Failure::at("cannot stop the node"))?;
            // It has left when nobody answers any more; a command typed next must not meet it on its way out.
            for _ in 0..STOP_TRIES_MAX {
                if connect::running(places).await?.is_none() {
                    return Ok(0);
                }
                tokio::time::sleep(STOP_RETRY_EVERY).await;
            }
            Err(Failure::new(
                "the node was asked to leave and still answers after 10 s",
            ))
        }
        (NodeSubcommand::Status { json: false }, None) => {
            print("no node runs; the next command that needs one starts it\n")?;
            Ok(1)
        }
        (NodeSubcommand::Status { json: true }, None) => {
            print_json(&serde_json::Value::Null)?;
            Ok(1)
        }
        (NodeSubcommand::Status { json }, Some(client)) => {
            let version = client.version().await?;
            if *json {
                print_json(&version)?;
            } else {
                print(&format!(
                    "version   {}\npid       {}\nstarted   {}\nsocket    {}\nstate     {}\nmachines  {}\n",
                    version.version,
                    version.pid,
                    version.started_at,
                    places.socket.display(),
                    version.state_dir,
                    version.machines_active
                ))?;
            }
            Ok(0)
        }
    }
}

/// How often to look whether a node has left, and how many times: 10 s in all, as long as a stop may take.
const STOP_RETRY_EVERY: Duration = Duration::from_millis(10);
const STOP_TRIES_MAX: u32 = 1000;
