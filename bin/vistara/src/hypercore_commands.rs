//! The commands of hypercore that are spelled otherwise here: they are translated, with the new spelling as a hint, or answered
//! with what to type. `attach`, `list`, `stop ID` and `logs` are commands here anyway.

use crate::arguments::CommandLine;
use crate::failure::{Failure, eprint_line};
use crate::run_options::checked;
use crate::text::{command_line, visible};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use vistara_model::{Cpus, ImageRef, PortMapping};

/// `spawn`.
#[derive(Debug, Args)]
pub(crate) struct SpawnOptions {
    /// hypercore's hypervisor: firecracker, cloudhypervisor, runc or docker
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// The file
    #[arg(long, value_name = "FILE", default_value = "hac.toml")]
    hac: PathBuf,
    #[command(flatten)]
    unused: UnusedOptions,
}

/// What hypercore needs to be told, and nothing here does.
#[derive(Debug, Args)]
struct UnusedOptions {
    #[arg(long, hide = true)]
    containerd_socket: Option<String>,
    #[arg(long, hide = true)]
    containerd_ns: Option<String>,
}

/// `cluster`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ClusterOptions {
    #[command(subcommand)]
    command: Option<ClusterCommand>,
    /// Whatever hypercore's own `cluster` takes
    #[arg(value_name = "ADDRESS", num_args = 0.., trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// `cluster …`.
#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Run an image on a node that has room
    Spawn(Box<ClusterSpawnOptions>),
    /// List machines
    List(AskedNode),
    /// Stop a machine
    Stop {
        #[arg(long)]
        id: String,
        #[command(flatten)]
        node: AskedNode,
    },
    /// Show what a machine printed
    Logs {
        #[arg(long)]
        id: String,
        #[command(flatten)]
        node: AskedNode,
    },
    /// List nodes
    Metrics(AskedNode),
}

/// hypercore's way to say which node is asked.
#[derive(Debug, Args)]
struct AskedNode {
    #[arg(long, value_name = "ADDRESS")]
    grpc_bind_addr: Option<String>,
}

/// `cluster spawn`.
#[derive(Debug, Args)]
struct ClusterSpawnOptions {
    /// CPUs
    #[arg(long, default_value = "1", value_parser = checked::<Cpus>)]
    cpu: String,
    /// Memory in megabytes
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    mem: u32,
    /// Image
    #[arg(long, value_parser = checked::<ImageRef>)]
    image_ref: String,
    /// Ports, as 443:3000,80:8080
    #[arg(long, value_delimiter = ',', value_parser = checked::<PortMapping>)]
    ports: Vec<String>,
    /// Variables, as NAME=value,NAME=value
    #[arg(long, value_delimiter = ',')]
    env: Vec<String>,
    /// File with a policy
    #[arg(long)]
    policy: Option<String>,
    #[command(flatten)]
    node: AskedNode,
}

/// The words of the command here, and those that may be shown, where values that may be secrets are left out.
#[derive(Debug, PartialEq, Eq)]
struct Translated {
    words: Vec<String>,
    shown: Vec<String>,
    notes: Vec<&'static str>,
}

impl Translated {
    fn new(words: impl IntoIterator<Item = impl Into<String>>) -> Translated {
        let words: Vec<String> = words.into_iter().map(Into::into).collect();
        Translated {
            shown: words.clone(),
            words,
            notes: Vec::new(),
        }
    }

    fn add(&mut self, word: impl Into<String>) {
        let word = word.into();
        self.shown.push(word.clone());
        self.words.push(word);
    }

    fn note(mut self, there: bool, note: &'static str) -> Translated {
        if there {
            self.notes.push(note);
        }
        self
    }

    /// Says the new spelling, and reads it.
    fn line(self) -> Result<CommandLine, Failure> {
        for note in self.notes {
            eprint_line(&format!("vistara: {note}"));
        }
        let spelled = command_line(&self.shown);
        eprint_line(&format!(
            "hint: hypercore's command is `vistara {}` here",
            visible(&spelled, false)
        ));
        CommandLine::try_parse_from(std::iter::once("vistara".to_owned()).chain(self.words))
            .map_err(|error| Failure::new(error.to_string().trim_end().to_owned()))
    }
}

/// `vistara spawn`.
pub(crate) fn spawn(options: &SpawnOptions) -> Result<CommandLine, Failure> {
    of_spawn(options)?.line()
}

/// `vistara cluster …`.
pub(crate) fn cluster(options: &ClusterOptions) -> Result<CommandLine, Failure> {
    of_cluster(options)?.line()
}

fn of_spawn(options: &SpawnOptions) -> Result<Translated, Failure> {
    let mut words = Translated::new(["deploy"]);
    match options.provider.as_deref() {
        None => {}
        Some("firecracker") => words.add("--hypervisor=firecracker"),
        Some("cloudhypervisor") => {
            return Err(
                Failure::new("there is no cloudhypervisor here: firecracker, qemu and nanovms run machines")
                    .hint("`vistara deploy FILE` takes the one that suits, and `vistara explain IMAGE` says which"),
            );
        }
        Some(containers @ ("runc" | "docker")) => {
            return Err(Failure::new(format!(
                "{containers} runs containers, and here each program has a machine of its own"
            ))
            .hint("`vistara deploy FILE` runs it in one"));
        }
        Some(other) => {
            return Err(Failure::new(format!("{other:?} is no provider"))
                .hint("`vistara deploy FILE` takes the hypervisor that suits, `--hypervisor NAME` a certain one"));
        }
    }
    let Some(file) = options.hac.to_str() else {
        return Err(Failure::new(format!(
            "{} is not UTF-8",
            options.hac.display()
        )));
    };
    words.add("--");
    words.add(file);
    Ok(words.note(
        options.unused.containerd_socket.is_some() || options.unused.containerd_ns.is_some(),
        "--containerd-socket and --containerd-ns have no effect: there is no containerd here",
    ))
}

fn of_cluster(options: &ClusterOptions) -> Result<Translated, Failure> {
    let asked = |node: &AskedNode| node.grpc_bind_addr.is_some();
    let note =
        "--grpc-bind-addr has no effect: this host's node is asked, or the one that --on names";
    Ok(match &options.command {
        None => return Err(joined(&options.words)),
        Some(ClusterCommand::Spawn(options)) => {
            let mut words = Translated::new(["--on", "any", "run", "-d"]);
            words.add(format!("--cpus={}", options.cpu));
            words.add(format!("--memory={}m", options.mem));
            for port in &options.ports {
                words.add(format!("--publish={port}"));
            }
            if let Some(policy) = &options.policy {
                // What is a name here is a file there.
                let path = if policy.contains('/') {
                    policy.clone()
                } else {
                    format!("./{policy}")
                };
                words.add(format!("--place={path}"));
            }
            for variable in &options.env {
                words.words.push(format!("--env={variable}"));
                let name = variable
                    .split_once('=')
                    .map_or(variable.as_str(), |(name, _)| name);
                words.shown.push(format!("--env={name}=…"));
            }
            words.add("--");
            words.add(options.image_ref.clone());
            words.note(asked(&options.node), note)
        }
        Some(ClusterCommand::List(node)) => Translated::new(["ps"]).note(asked(node), note),
        Some(ClusterCommand::Stop { id, node }) => {
            Translated::new(["stop", "--", id]).note(asked(node), note)
        }
        Some(ClusterCommand::Logs { id, node }) => {
            Translated::new(["logs", "--", id]).note(asked(node), note)
        }
        Some(ClusterCommand::Metrics(node)) => Translated::new(["nodes"]).note(asked(node), note),
    })
}

/// Joining takes a ticket, which an address cannot stand for.
fn joined(words: &[String]) -> Failure {
    if words.is_empty() || words.iter().all(|word| word.starts_with('-')) {
        Failure::new("a node serves others once it is told to, and needs no cluster to be started")
            .hint("`vistara node ticket` prints what others type to join it; `vistara gateway` answers hypercore's HTTP calls")
    } else {
        Failure::new("a node is joined by a ticket, which holds its key: an address alone could be anybody's")
            .hint("type `vistara node ticket` there, and `vistara node join TICKET` here")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Command;

    fn parsed(line: &str) -> Command {
        let words = line.split_whitespace();
        CommandLine::try_parse_from(words)
            .unwrap_or_else(|error| panic!("{line}: {error}"))
            .command
    }

    fn translated(line: &str) -> Result<Translated, Failure> {
        match parsed(line) {
            Command::Spawn(options) => of_spawn(&options),
            Command::Cluster(options) => of_cluster(&options),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn hypercores_commands_become_ours() {
        for (line, want) in [
            ("vistara spawn", "deploy -- hac.toml"),
            (
                "vistara spawn --provider firecracker --hac ./a/hac.toml",
                "deploy --hypervisor=firecracker -- ./a/hac.toml",
            ),
            (
                "vistara cluster spawn --grpc-bind-addr 192.0.2.1:8000 --ports 443:3000,80:8080 --image-ref registry.example/next:latest",
                "--on any run -d --cpus=1 --memory=512m --publish=443:3000 --publish=80:8080 -- registry.example/next:latest",
            ),
            (
                "vistara cluster spawn --cpu 2 --mem 1024 --image-ref a --policy low-latency.json --env A=1,B=2",
                "--on any run -d --cpus=2 --memory=1024m --place=./low-latency.json --env=A=1 --env=B=2 -- a",
            ),
            ("vistara cluster list", "ps"),
            ("vistara cluster stop --id 00ff", "stop -- 00ff"),
            ("vistara cluster logs --id 00ff", "logs -- 00ff"),
            ("vistara cluster metrics --grpc-bind-addr x", "nodes"),
        ] {
            let found = translated(line).unwrap();
            assert_eq!(found.words.join(" "), want, "{line}");
            let whole = format!("vistara {want}");
            parsed(&whole);
        }
    }

    #[test]
    fn the_new_spelling_is_shown_without_values_of_variables() {
        let line = "vistara cluster spawn --image-ref a --env KEY=hunter2";
        let shown = translated(line).unwrap().shown.join(" ");
        assert!(
            shown.contains("--env=KEY=…") && !shown.contains("hunter2"),
            "{shown}"
        );
    }

    #[test]
    fn what_has_no_counterpart_is_answered_with_what_to_type() {
        for (line, hint) in [
            ("vistara spawn --provider cloudhypervisor", "vistara deploy"),
            ("vistara spawn --provider docker", "vistara deploy"),
            ("vistara spawn --provider x", "vistara deploy"),
            ("vistara cluster", "vistara node ticket"),
            ("vistara cluster 192.0.2.1:7946", "vistara node join"),
            (
                "vistara cluster --cluster-bind-addr :7946 192.0.2.1:7946 --cluster-base-url x",
                "vistara node join",
            ),
        ] {
            let failure = translated(line).unwrap_err();
            assert!(
                failure.hint.is_some_and(|given| given.contains(hint)),
                "{line}"
            );
        }
    }

    #[test]
    fn commands_that_are_spelled_alike_need_no_translation() {
        assert!(matches!(parsed("vistara attach 00ff"), Command::Attach(_)));
        assert!(matches!(parsed("vistara list"), Command::Ps(_)));
        assert!(matches!(parsed("vistara stop 00ff"), Command::Stop(_)));
        assert!(matches!(parsed("vistara logs 00ff"), Command::Logs(_)));
    }
}
