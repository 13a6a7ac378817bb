//! `vistara node` as typed.

use crate::arguments::duration;
use clap::{Args, Subcommand};
use std::time::Duration;
use vistara_model::Bytes;

/// `node`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodeArguments {
    #[command(subcommand)]
    pub(crate) command: Option<NodeSubcommand>,
    #[command(flatten)]
    pub(crate) service: ServiceOptions,
    /// Leave the terminal's session first (the CLI starts nodes so)
    #[arg(long, hide = true)]
    pub(crate) background: bool,
}

/// How the daemon runs.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServiceOptions {
    /// Leave once nothing has run and nobody has asked for so long; stay where not given
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) idle_exit: Option<Duration>,
    /// Memory for machines that are kept ready for images which are run again and again; 0 for none [default: a thirty-second
    /// of the host's, at most 1g]
    #[arg(long, value_name = "SIZE")]
    pub(crate) warm_memory: Option<Bytes>,
}

/// `node …`.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeSubcommand {
    /// Make this node's key, where it has none, and print its id
    Init,
    /// Run the node: here, as `vistara node` does, or in the background
    Start {
        /// In the background, until it is stopped
        #[arg(short, long)]
        detach: bool,
        #[command(flatten)]
        service: ServiceOptions,
    },
    /// Ask the running node to leave; machines go on
    Stop,
    /// Show the node on one page: what runs, where it is reached, whom it knows
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Join another node: from now on it is kept connected, and --on NODE reaches it
    Join {
        /// What to call it here
        #[arg(long)]
        name: Option<String>,
        /// The token that its owner gave to this node
        #[arg(long, value_name = "TOKEN")]
        grant: Option<String>,
        /// What `vistara node ticket` prints there, or its id and any address: ID@ADDRESS:PORT; its id alone where it was heard of
        /// in the network, or is in the local one
        #[arg(value_name = "TICKET")]
        ticket: String,
    },
    /// Forget a node, or all of them, and listen no longer
    Leave {
        /// The one to forget
        #[arg(value_name = "NODE")]
        node: Option<String>,
    },
    /// Take nothing new that others place here; what runs goes on
    Drain,
    /// Take something again
    Undrain,
    /// Listen for other nodes, also after a restart, and print what they type to join this one
    Ticket {
        /// Where; port 0 takes any (default: all addresses, the same port as before)
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: Option<String>,
    },
    /// Say where this node is, how it is reached, what it costs and whether it takes anything; print what it says
    Terms(crate::mesh_commands::TermsOptions),
}
