//! The command line as typed: every command and option. Nothing is decided here; `run`'s own options are in
//! [`crate::run_options`].

use crate::bench_mesh::BenchMeshOptions;
use crate::deploy_command::DeployOptions;
use crate::gateway::GatewayOptions;
use crate::hypercore_commands::{ClusterOptions, SpawnOptions};
use crate::mesh_commands::{GrantOptions, IdOptions, NodesOptions};
use crate::node_arguments::NodeArguments;
use crate::receipt_commands::ReceiptOptions;
use crate::relay_command::RelayCommand;
use crate::run_options::RunOptions;
use crate::service_commands::ServiceOptions;
use crate::snapshot_commands::{ForkOptions, SnapshotOptions};
use crate::task_commands::TaskOptions;
use crate::template_commands::TemplateOptions;
use crate::volume_commands::VolumeOptions;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Vistara runs programs from container images in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(
    name = "vistara",
    version,
    max_term_width = 100,
    after_long_help = crate::environment::help()
)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command has.
#[derive(Debug, Clone, Args)]
pub(crate) struct Place {
    /// Socket of the node
    #[arg(long, global = true, value_name = "PATH", env = crate::environment::SOCKET, help_heading = "Global options", hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
    /// State directory of the node
    #[arg(long, global = true, value_name = "DIR", env = crate::environment::STATE_DIR, help_heading = "Global options", hide_env_values = true)]
    pub(crate) state_dir: Option<PathBuf>,
    /// Another node, through this one: a name or a beginning of an id, as `vistara nodes` lists them; for `run` also `any`
    #[arg(
        long,
        global = true,
        value_name = "NODE",
        help_heading = "Global options"
    )]
    pub(crate) on: Option<String>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program in a new machine
    Run(Box<RunOptions>),
    /// Run what a hac.toml describes, and replace what ran under its name
    Deploy(Box<DeployOptions>),
    /// List machines
    #[command(visible_alias = "list")]
    Ps(PsOptions),
    /// Show what a machine printed
    Logs(LogsOptions),
    /// Attach to a running machine's program
    Attach(AttachOptions),
    /// Run another program in a running machine
    Exec(ExecOptions),
    /// Copy files between a machine and this host
    Cp(CpOptions),
    /// Stop machines: ask their programs to end, and after a while insist
    Stop(StopOptions),
    /// Kill machines, or send their programs a signal
    Kill(KillOptions),
    /// Hold machines still
    Pause(MachinesOptions),
    /// Let paused machines go on
    #[command(visible_alias = "unpause")]
    Resume(MachinesOptions),
    /// Make live copies of a running machine
    Fork(ForkOptions),
    /// Manage snapshots: machines at one moment, kept on disk
    Snapshot(SnapshotOptions),
    /// Remove ended machines
    Rm(RmOptions),
    /// Show everything known of machines or images, as JSON
    Inspect(InspectOptions),
    /// Show what machines use
    Stats(StatsOptions),
    /// Wait until machines end, and print their exit codes
    Wait(WaitOptions),
    /// Show a machine's receipt, or check one
    Receipt(ReceiptOptions),
    /// Manage images (alone: list them)
    #[command(visible_alias = "image")]
    Images(ImagesOptions),
    /// Fetch an image from a registry
    #[command(hide = true)]
    Pull(PullOptions),
    /// Remove images
    #[command(hide = true)]
    Rmi(RemoveImageOptions),
    /// Give an image another name
    #[command(hide = true)]
    Tag(TagOptions),
    /// Take in an image archive
    #[command(hide = true)]
    Import(ImportOptions),
    /// Manage guest kernels
    Kernel(KernelOptions),
    /// Manage templates: ready machines from which others are forked
    Template(TemplateOptions),
    /// Manage named volumes
    #[command(visible_alias = "volumes")]
    Volume(VolumeOptions),
    /// Manage services: copies of a program that run among several nodes, whichever of them die
    #[command(visible_alias = "services")]
    Service(ServiceOptions),
    /// Manage tasks: programs that run to their end on one of several nodes, at most once or at least once
    #[command(visible_alias = "tasks")]
    Task(TaskOptions),
    /// Say what this host has and lacks for running machines
    Doctor(DoctorOptions),
    /// Say which hypervisor a program would get, and why, without running it
    Explain(Box<RunOptions>),
    /// Print a completion script for a shell
    Completion(CompletionOptions),
    /// Print the versions of this program and of the node
    Version(VersionOptions),
    /// Run the node in the foreground, or manage a running one
    Node(NodeArguments),
    /// Relay between nodes that cannot reach each other: for anybody, or for those that are allowed
    Relay(RelayCommand),
    /// List the nodes that this one has joined
    Nodes(NodesOptions),
    /// Print this node's id: its public key, by which others know it
    Id(IdOptions),
    /// Let another node in, or manage what was granted
    Grant(Box<GrantOptions>),
    /// Answer hypercore's HTTP calls, to whoever has a token
    Gateway(GatewayOptions),
    /// Measure this host
    Bench(BenchOptions),
    /// hypercore's: `deploy`
    #[command(hide = true)]
    Spawn(SpawnOptions),
    /// hypercore's: `node join`, `run --on any`, `ps`, `stop`, `logs`, `nodes`
    #[command(hide = true)]
    Cluster(ClusterOptions),
}

/// `ps`.
#[derive(Debug, Args)]
pub(crate) struct PsOptions {
    /// Ended machines, too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Only machines that match: name=…, state=…, image=…, id=…, label=NAME[=value]
    #[arg(short, long = "filter", value_name = "KEY=VALUE")]
    pub(crate) filters: Vec<String>,
    /// Whole ids and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
}

/// `logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsOptions {
    /// Go on as the machine prints more
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only what was printed since: a time (2026-01-31T12:00:00Z) or an age (10m, 2h)
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Only so many lines from the end
    #[arg(short = 'n', long, value_name = "N", value_parser = tail)]
    pub(crate) tail: Option<Tail>,
    /// The time before each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// One JSON object a line instead of the bytes
    #[arg(long)]
    pub(crate) json: bool,
    /// The guest's console instead: its kernel's and its boot's messages
    #[arg(long, conflicts_with_all = ["follow", "since", "tail", "timestamps", "json"])]
    pub(crate) console: bool,
    /// Machine, by id, name or beginning of its id
    pub(crate) machine: String,
}

/// `--tail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Everything.
    All,
    /// So many lines.
    Lines(u64),
}

fn tail(text: &str) -> Result<Tail, String> {
    if text == "all" {
        return Ok(Tail::All);
    }
    text.parse()
        .map(Tail::Lines)
        .map_err(|_| "write a number of lines, or all".to_owned())
}

/// `attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachOptions {
    /// Do not send standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// What was printed before, too
    #[arg(long)]
    pub(crate) from_start: bool,
    /// Machine, by id, name or beginning of its id
    pub(crate) machine: String,
}

/// `exec`.
#[derive(Debug, Args)]
#[command(override_usage = "vistara exec [OPTIONS] MACHINE [--] COMMAND [ARGUMENT]...")]
pub(crate) struct ExecOptions {
    /// Send standard input even from a terminal
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Start it and leave it
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(crate) detach: bool,
    /// Environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME[=value]")]
    pub(crate) env: Vec<String>,
    /// Environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// User in the guest: name or uid, with :group or :gid
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Machine and command line; everything after the machine is the command's
    #[arg(value_name = "MACHINE COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    pub(crate) words: Vec<String>,
}

/// `cp`.
#[derive(Debug, Args)]
#[command(
    override_usage = "vistara cp [OPTIONS] MACHINE:PATH DEST|-\n       vistara cp [OPTIONS] SRC|- MACHINE:PATH"
)]
pub(crate) struct CpOptions {
    /// Follow a symbolic link at SRC
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// Keep user and group ids
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// No progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// What to copy: MACHINE:PATH, a path here, or - for a tar stream on standard input
    #[arg(value_name = "SRC", allow_hyphen_values = false)]
    pub(crate) source: String,
    /// Where to: MACHINE:PATH, a path here, or - for a tar stream on standard output
    #[arg(value_name = "DEST")]
    pub(crate) destination: String,
}

/// `stop`.
#[derive(Debug, Args)]
pub(crate) struct StopOptions {
    /// How long programs have to end by themselves: seconds, or 500ms, 1m (default 10 s)
    #[arg(short, long, alias = "timeout", value_name = "TIME", value_parser = duration)]
    pub(crate) time: Option<Duration>,
    /// Signal to ask with (default: the image's, else TERM)
    #[arg(short, long)]
    pub(crate) signal: Option<String>,
    /// Machines
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `kill`.
#[derive(Debug, Args)]
pub(crate) struct KillOptions {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    /// Machines
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `pause` and `resume`.
#[derive(Debug, Args)]
pub(crate) struct MachinesOptions {
    /// Machines
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `rm`.
#[derive(Debug, Args)]
pub(crate) struct RmOptions {
    /// Running ones, too: kill them first; and do not mind those that are not there
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Machines
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    /// What the names mean; a machine before an image where not given
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<InspectKind>,
    /// Machines or images
    #[arg(required = true, value_name = "MACHINE|IMAGE")]
    pub(crate) names: Vec<String>,
}

/// `inspect --type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InspectKind {
    /// A machine.
    Machine,
    /// An image.
    Image,
}

/// `stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsOptions {
    /// One measurement, over a second
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// A JSON array; without --no-stream one array a second, each on its line
    #[arg(long)]
    pub(crate) json: bool,
    /// Machines; all that run where none is given
    #[arg(value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `wait`.
#[derive(Debug, Args)]
pub(crate) struct WaitOptions {
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Machines
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

/// `images`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ImagesOptions {
    #[command(subcommand)]
    pub(crate) command: Option<ImagesCommand>,
    #[command(flatten)]
    pub(crate) list: ListImagesOptions,
}

/// `images …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImagesCommand {
    /// List images
    #[command(visible_alias = "list")]
    Ls(ListImagesOptions),
    /// Fetch an image from a registry
    Pull(PullOptions),
    /// Fetch an image from nodes that were joined, from all that have it at once
    Fetch(FetchOptions),
    /// Take in an image: an OCI layout, a `docker save` archive or a root file system
    #[command(alias = "load")]
    Import(ImportOptions),
    /// Remove images
    Rm(RemoveImageOptions),
    /// Remove images that no machine uses
    Prune(PruneOptions),
    /// Give an image another name
    Tag(TagOptions),
    /// Show everything known of images, as JSON
    Inspect(InspectImageOptions),
}

/// `images ls`.
#[derive(Debug, Args)]
pub(crate) struct ListImagesOptions {
    /// Ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Whole ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
}

/// `images fetch`.
#[derive(Debug, Args)]
pub(crate) struct FetchOptions {
    /// From these only: names, or beginnings of ids
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub(crate) from: Vec<String>,
    /// Print the image's id and nothing else
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Name, id, or unambiguous beginning of an id, as the nodes that have it know it
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

/// `images pull`.
#[derive(Debug, Args)]
pub(crate) struct PullOptions {
    /// Speak plain HTTP to the registry
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Print the image's id and nothing else
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Image: [REGISTRY/]NAME[:TAG][@DIGEST]
    pub(crate) image: String,
}

/// `images import`.
#[derive(Debug, Args)]
pub(crate) struct ImportOptions {
    /// Name for the image
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Print the image's id and nothing else
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// An archive (plain or compressed), a directory (OCI layout or root file system), or - for standard input
    #[arg(value_name = "FILE|DIR|-")]
    pub(crate) source: String,
    /// Name for the image (as --name)
    #[arg(value_name = "NAME", hide = true, conflicts_with = "name")]
    pub(crate) reference: Option<String>,
}

/// `images rm`.
#[derive(Debug, Args)]
pub(crate) struct RemoveImageOptions {
    /// Even where ended machines use it; and do not mind those that are not there
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// `images prune`.
#[derive(Debug, Args)]
pub(crate) struct PruneOptions {
    /// Also those with a name
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Accepted for scripts; nothing is asked anyway
    #[arg(short, long, hide = true)]
    pub(crate) force: bool,
    /// The answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `images tag`.
#[derive(Debug, Args)]
pub(crate) struct TagOptions {
    /// Image
    pub(crate) image: String,
    /// Its other name
    pub(crate) name: String,
}

/// `images inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectImageOptions {
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// `kernel`.
#[derive(Debug, Args)]
pub(crate) struct KernelOptions {
    #[command(subcommand)]
    pub(crate) command: KernelCommand,
}

/// `kernel …`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// List guest kernels
    #[command(visible_alias = "list")]
    Ls {
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Add a guest kernel
    Add {
        /// Name (default: the kernel's version)
        #[arg(long)]
        name: Option<String>,
        /// Directory of its modules, where it is a Linux kernel that needs any and is not a .deb
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
        /// Directory of its modules, where it is a Nanos kernel
        #[arg(long, value_name = "DIR", conflicts_with = "modules")]
        klibs: Option<PathBuf>,
        /// Make it the default
        #[arg(long)]
        default: bool,
        /// debian (fetched with apt); a file with a Linux kernel: a .deb, a bzImage or a vmlinux; or nanos and a file with a
        /// Nanos kernel
        #[arg(value_name = "debian|FILE|nanos FILE", required = true, num_args = 1..=2)]
        source: Vec<String>,
    },
    /// Build a small, fast Linux guest kernel out of Debian's source, and add it (takes many minutes, once)
    Build(BuildKernelOptions),
    /// Remove guest kernels
    Rm {
        /// Kernels
        #[arg(required = true, value_name = "KERNEL")]
        names: Vec<String>,
    },
    /// Make a guest kernel the default
    Default {
        /// Kernel
        name: String,
    },
}

/// `kernel build`.
#[derive(Debug, Args)]
pub(crate) struct BuildKernelOptions {
    /// Name (default: the kernel's version)
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Make it the default also where another was chosen
    #[arg(long)]
    pub(crate) default: bool,
    /// Directory to build in, in a vistara-kernel of its own; 2.5 GB are needed meanwhile (default: /var/cache for root,
    /// ~/.cache for others)
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Compilers at a time (default: as many as there are processors)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) jobs: Option<u16>,
}

/// `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorOptions {
    /// The report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Probe again instead of using what is remembered
    #[arg(long)]
    pub(crate) fresh: bool,
}

/// `completion`.
#[derive(Debug, Args)]
pub(crate) struct CompletionOptions {
    /// Shell
    pub(crate) shell: clap_complete::Shell,
}

/// `version`.
#[derive(Debug, Args)]
pub(crate) struct VersionOptions {
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchOptions {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

/// `bench boot --vs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Baseline {
    /// The monitor by itself
    Raw,
}

/// `bench …`.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Run the measurements
    Run {
        /// The results as JSON
        #[arg(long)]
        json: bool,
        /// How often each is repeated
        #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
        /// The image whose `echo` is run; the first one here where absent
        #[arg(value_name = "IMAGE")]
        image: Option<String>,
    },
    /// Forks against the least that the same monitor needs for one, in turn
    Fork {
        /// The results as JSON
        #[arg(long)]
        json: bool,
        /// Whose forks
        #[arg(long, value_enum, default_value = "qemu")]
        hypervisor: crate::bench_fork::Hypervisor,
        /// How often each is repeated
        #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
        /// The image whose machines are forked; the first one here where absent
        #[arg(value_name = "IMAGE")]
        image: Option<String>,
    },
    /// Many forks at once, against as many by the least that the same monitor needs
    Burst {
        /// The results as JSON
        #[arg(long)]
        json: bool,
        /// Whose forks
        #[arg(long, value_enum, default_value = "qemu")]
        hypervisor: crate::bench_fork::Hypervisor,
        /// How many at once
        #[arg(short = 'n', long = "count", value_name = "N,…", value_delimiter = ',', default_value = "1,10,100", value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: Vec<u32>,
        /// The image whose machines are forked; the first one here where absent
        #[arg(value_name = "IMAGE")]
        image: Option<String>,
    },
    /// Two nodes of the benchmark's own: commands on the other one, placement, images, and what an idle node costs
    Mesh(Box<BenchMeshOptions>),
    /// The same static program as a unikernel and in a Linux guest: time to its first line, and memory
    Boot {
        /// A Linux guest in Firecracker to its agent's answer instead, against a bare Firecracker with the same kernel and disks
        #[arg(long, value_name = "WHAT", conflicts_with = "hypervisor")]
        vs: Option<Baseline>,
        /// What is measured: nanovms, linux
        #[arg(
            long,
            value_name = "NAMES",
            value_delimiter = ',',
            default_value = "nanovms,linux"
        )]
        hypervisor: Vec<String>,
        /// The results as JSON
        #[arg(long)]
        json: bool,
        /// How often each is repeated
        #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
    },
}

/// A duration as options take it: a bare number is seconds, else `500ms`, `30s`, `5m`, `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let error = || "write a time such as 30s, 5m, 1h30m, or a number of seconds".to_owned();
    let seconds = text.parse::<f64>().ok();
    if let Some(seconds) = seconds {
        return Duration::try_from_secs_f64(seconds).map_err(|_| error());
    }
    let span: jiff::SignedDuration = text.parse().map_err(|_| error())?;
    Duration::try_from(span).map_err(|_| error())
}

#[cfg(test)]
#[path = "arguments_tests.rs"]
mod tests;
