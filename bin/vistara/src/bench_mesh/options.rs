//! What `vistara bench mesh` can be told.

use crate::arguments::duration;
use clap::Args;
use std::time::Duration;
use vistara_model::Bytes;

/// `bench mesh --link`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchLink {
    /// This host's loopback, as fast as its processors are
    Loopback,
    /// A cable between two network namespaces, of a rate that `--rate` says; takes root, `ip` and `tc`
    Namespace,
}

/// `bench mesh --only`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MeshPart {
    /// Commands in a machine on another node against the same on its own
    Exec,
    /// The choice of a node among many
    Placement,
    /// An image from node to node against iperf3
    Images,
    /// What a node costs that does nothing and knows others
    Idle,
}

/// `bench mesh`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchMeshOptions {
    /// The results as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// How many commands are executed on each way
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) count: u32,
    /// Measure only these: exec, placement, images, idle
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    pub(crate) only: Vec<MeshPart>,
    /// What lies between the two nodes
    #[arg(long, value_enum, default_value = "loopback")]
    pub(crate) link: BenchLink,
    /// Rate of a cable, in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rate: u32,
    /// Nodes that placement knows
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub(crate) known: u32,
    /// Size of the image that travels
    #[arg(long, value_name = "BYTES", default_value = "256m")]
    pub(crate) size: Bytes,
    /// How often it travels each way
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) transfers: u32,
    /// Nodes that the idle one knows
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(crate) peers: u32,
    /// How long it is watched
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub(crate) watch: Duration,
    /// The image in whose machine commands are executed, which has `true`; the first one here where absent
    #[arg(value_name = "IMAGE")]
    pub(crate) image: Option<String>,
}
