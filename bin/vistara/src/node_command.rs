//! `vistara node`: the daemon itself, starting it and asking a running one to leave.

use crate::connect;
use crate::failure::{Failure, eprint_line};
use crate::mesh_commands;
use crate::node_arguments::{NodeArguments, NodeSubcommand, ServiceOptions};
use crate::node_page;
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
        guard: Some(vistara_node::GuardProgram {
            // As it is now, though another version may take its place in the file system.
            program: "/proc/self/exe".into(),
            args: vec![crate::GUARD.into()],
        }),
        warm_memory,
    };
    match runtime.block_on(vistara_node::run(options)) {
        Ok(()) => Ok(()),
        Err(vistara_node::NodeError::AlreadyServed(_)) => {
            // Of two that were started at once, one; or somebody's mistake, who reads this.
            eprint_line("a node runs already; `vistara node status` shows it");
            Ok(())
        }
        Err(error) => Err(Failure::new(format!(
            "the node cannot start: {:#}",
            anyhow::Error::from(error)
        ))),
    }
}

/// With what options this process is to become the daemon; nothing where it is to speak with one.
pub(crate) fn to_become(arguments: &NodeArguments) -> Option<&ServiceOptions> {
    match &arguments.command {
        None => Some(&arguments.service),
        Some(NodeSubcommand::Start {
            detach: false,
            service,
        }) => Some(service),
        Some(_) => None,
    }
}

/// `vistara node` and `vistara node start`: becomes the daemon.
pub(crate) fn become_node(
    service: &ServiceOptions,
    arguments: &NodeArguments,
    places: Places,
) -> Result<u8, Failure> {
    if arguments.background {
        // Out of the terminal's session: neither its signals nor its end concern a node. It fails only for the leader of
        // a process group, which is out already.
        let _ = rustix::process::setsid();
    }
    places.prepare()?;
    let warm_memory = match service.warm_memory {
        Some(bytes) => Some(bytes),
        None => crate::environment::bytes(crate::environment::WARM_MEMORY)?,
    };
    run_node(NodeOptions {
        places,
        idle_exit: service.idle_exit,
        warm_memory,
    })?;
    Ok(0)
}

/// `vistara node start -d`.
async fn start(service: &ServiceOptions, places: &Places) -> Result<u8, Failure> {
    if let Some(client) = connect::running(places).await? {
        let version = client.version().await?;
        eprint_line(&format!("a node runs already (pid {})", version.pid));
        eprint_line(
            "hint: one that a command started leaves when it is idle, unless it listens for others; `vistara node stop` first has this one begin anew",
        );
        return Ok(0);
    }
    let mut options = Vec::new();
    if let Some(time) = service.idle_exit {
        options.push(format!("--idle-exit={}ms", time.as_millis()));
    }
    if let Some(bytes) = service.warm_memory {
        options.push(format!("--warm-memory={}", bytes.0));
    }
    let client = connect::start(places, &options).await?;
    let version = client.version().await?;
    eprint_line(&format!(
        "the node runs (pid {}); its log is {}",
        version.pid,
        places.log_file().display()
    ));
    Ok(0)
}

async fn stop(places: &Places) -> Result<u8, Failure> {
    let Some(client) = connect::running(places).await? else {
        eprint_line("no node runs");
        return Ok(0);
    };
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

/// `vistara node …` that is not the daemon itself.
pub(crate) async fn manage(command: &NodeSubcommand, places: &Places) -> Result<u8, Failure> {
    match command {
        NodeSubcommand::Start { service, .. } => start(service, places).await,
        NodeSubcommand::Stop => stop(places).await,
        NodeSubcommand::Status { json } => {
            let client = connect::running(places).await?;
            node_page::status(client, *json, places).await
        }
        NodeSubcommand::Init => {
            let client = connect::or_start(places).await?;
            mesh_commands::init(&client).await
        }
        NodeSubcommand::Join {
            name,
            grant,
            ticket,
        } => {
            let client = connect::or_start(places).await?;
            let (ticket, name, grant) = (ticket.clone(), name.clone(), grant.clone());
            mesh_commands::join(&client, ticket, name, grant).await
        }
        NodeSubcommand::Leave { node } => {
            let client = connect::or_start(places).await?;
            mesh_commands::leave(&client, node.as_deref()).await
        }
        NodeSubcommand::Drain => {
            let client = connect::or_start(places).await?;
            mesh_commands::drain(&client, true).await
        }
        NodeSubcommand::Undrain => {
            let client = connect::or_start(places).await?;
            mesh_commands::drain(&client, false).await
        }
        NodeSubcommand::Ticket { listen } => {
            let client = connect::or_start(places).await?;
            mesh_commands::ticket(&client, listen.clone()).await
        }
        NodeSubcommand::Terms(options) => {
            let client = connect::or_start(places).await?;
            mesh_commands::terms(&client, options).await
        }
    }
}

/// How often to look whether a node has left, and how many times: 10 s in all, as long as a stop may take.
const STOP_RETRY_EVERY: Duration = Duration::from_millis(10);
const STOP_TRIES_MAX: u32 = 1000;
