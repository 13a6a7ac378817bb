//! What `service create` and `task run` have in common: a program for machines on whichever of several nodes, and the choice of
//! those nodes.

use crate::failure::{Failure, eprint_line};
use crate::image_commands;
use crate::image_transfer;
use crate::place::{PlaceOptions, policy};
use crate::run_options::{ImageSource, callers, checked, environment_of, head_and_command};
use crate::text::visible;
use clap::Args;
use std::path::PathBuf;
use vistara_api::{Client, ErrorKind, PeerNode, PullRequest, RunRequest};
use vistara_model::{Bytes, Cpus, Hypervisor};

/// Below so many nodes one that dies takes the majority with it.
const KEEPERS_GOOD: usize = 3;
/// What stands for this node among those that are named.
pub(crate) const HERE: &str = "here";

/// A program, and where it may run.
#[derive(Debug, Args)]
pub(crate) struct ProgramOptions {
    /// Only on these nodes; `here` is this one
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub(crate) nodes: Vec<String>,
    /// CPUs of each machine, such as 2 or 0.5
    #[arg(long, value_name = "N", value_parser = checked::<Cpus>)]
    pub(crate) cpus: Option<String>,
    /// Memory of each machine, such as 512m
    #[arg(short, long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) memory: Option<String>,
    /// Size of each machine's writable layer, such as 10g
    #[arg(long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) disk: Option<String>,
    /// Environment variable; NAME alone takes the caller's value. Every node that may run it can read it
    #[arg(short, long, value_name = "NAME[=value]")]
    pub(crate) env: Vec<String>,
    /// Environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User in the guest: name or uid, with :group or :gid
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Program that gets the command as arguments, instead of the image's; "" for none
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Root file system read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// What runs it: auto, firecracker, nanovms or qemu
    #[arg(long, value_name = "NAME", value_parser = checked::<Hypervisor>)]
    pub(crate) hypervisor: Option<String>,
    /// Network: user (outward through the host) or none
    #[arg(long, alias = "net", value_name = "NAME", value_parser = ["user", "none"])]
    pub(crate) network: Option<String>,
    /// Label
    #[arg(short, long = "label", value_name = "NAME[=value]")]
    pub(crate) labels: Vec<String>,
    /// Signal that asks the program to end
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Boot each machine, even where it could be forked from a template
    #[arg(long)]
    pub(crate) no_template: bool,
    /// No progress and no notices
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) place: PlaceOptions,
    /// Image, and the command that replaces its own; everything after the image is the command's
    #[arg(value_name = "IMAGE COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    pub(crate) words: Vec<String>,
}

/// What a request for a service or a task is made of.
pub(crate) struct Program {
    /// What its image was called, where it had a name.
    pub(crate) named: Option<String>,
    pub(crate) machine: RunRequest,
    pub(crate) nodes: Vec<String>,
    pub(crate) policy: Option<String>,
    pub(crate) rules: Option<String>,
}

impl ProgramOptions {
    fn machine(&self, image: &str, command: &[String]) -> Result<RunRequest, Failure> {
        let label = |label: &String| match label.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (label.clone(), String::new()),
        };
        let entrypoint = self.entrypoint.as_ref();
        Ok(RunRequest {
            image: image.to_owned(),
            command: command.to_vec(),
            entrypoint: entrypoint.map(|program| match program.is_empty() {
                true => Vec::new(),
                false => vec![program.clone()],
            }),
            cpus: self.cpus.clone(),
            memory: self.memory.clone(),
            disk: self.disk.clone(),
            env: environment_of(&self.env_file, &self.env, &callers)?,
            user: self.user.clone(),
            working_dir: self.workdir.clone(),
            read_only: self.read_only,
            network: self.network.clone(),
            hypervisor: self.hypervisor.clone(),
            stop_signal: self.stop_signal.clone(),
            no_template: self.no_template,
            labels: self.labels.iter().map(label).collect(),
            ..RunRequest::default()
        })
    }

    /// Sees to it that the image is here and on the nodes, and reads the rest.
    pub(crate) async fn read(&self, client: &Client) -> Result<Program, Failure> {
        let (typed, command) = head_and_command(&self.words);
        let (image, named) = match ImageSource::parse(typed) {
            ImageSource::Path(path) => {
                let image = image_commands::import_path(client, &path, None, self.quiet).await?;
                (image, None)
            }
            ImageSource::Named(name) => match client.image(&name).await {
                Ok(image) => (image, Some(name)),
                Err(error) => match error.body().map(|body| body.kind) {
                    Some(ErrorKind::ImageNotFound | ErrorKind::NotFound) => {
                        let request = PullRequest {
                            image: name.clone(),
                            insecure: false,
                            docker_config_dir: crate::environment::docker_config_dir()
                                .map(|dir| dir.to_string_lossy().into_owned()),
                        };
                        image_commands::pull_image(client, &request, self.quiet).await?;
                        (client.image(&name).await?, Some(name))
                    }
                    _ => return Err(error.into()),
                },
            },
        };
        let nodes = nodes(client, &self.nodes, &image.id, self.quiet).await?;
        if nodes.len() < KEEPERS_GOOD && !self.quiet {
            eprint_line(&format!(
                "vistara: with {} nodes nobody is left to look after it when one dies; it takes {KEEPERS_GOOD}",
                nodes.len()
            ));
        }
        let (policy, rules) = policy(self.place.place.as_ref())?;
        Ok(Program {
            machine: self.machine(&image.id, command)?,
            named,
            nodes,
            policy,
            rules,
        })
    }
}

fn called(node: &PeerNode) -> String {
    let name = node.name.clone();
    name.unwrap_or_else(|| node.id.get(..12).unwrap_or(&node.id).to_owned())
}

/// Whether a node may be given copies: it has granted that, and takes part in the network.
fn is_usable(node: &PeerNode) -> Result<(), &'static str> {
    let runs = |grant: &vistara_api::Grant| {
        grant
            .rights
            .iter()
            .any(|right| right == "run" || right == "admin")
    };
    match &node.grant {
        None => Err("it has given no grant"),
        Some(grant) if grant.state != "live" => Err("its grant has expired"),
        Some(grant) if !runs(grant) => Err("its grant does not give the right to run"),
        Some(_) => match node.life.as_deref() {
            Some("alive") => Ok(()),
            Some(_) => Err("it does not answer"),
            None => Err("it takes no part in the network"),
        },
    }
}

/// The nodes for a service or a task, each with the image: those that were named, or this one and all that are usable.
pub(crate) async fn nodes(
    client: &Client,
    typed: &[String],
    image: &str,
    quiet: bool,
) -> Result<Vec<String>, Failure> {
    let known = client.nodes().await?;
    let own = client.mesh().await?.id;
    let is = |node: &PeerNode, text: &String| {
        node.name.as_ref() == Some(text) || (!text.is_empty() && node.id.starts_with(text.as_str()))
    };
    let mut chosen: Vec<&PeerNode> = Vec::new();
    let mut here = typed.is_empty();
    for text in typed {
        if text == HERE || *text == own {
            here = true;
            continue;
        }
        let mut found = known.iter().filter(|node| is(node, text));
        match (found.next(), found.next()) {
            (Some(node), None) => chosen.push(node),
            (Some(_), Some(_)) => {
                return Err(Failure::new(format!("{text:?} is several nodes"))
                    .hint("type more of the id; see `vistara nodes`"));
            }
            (None, _) => {
                return Err(Failure::new(format!("there is no node {text:?}"))
                    .hint("`vistara nodes` lists them; `here` is this one"));
            }
        }
    }
    if typed.is_empty() {
        chosen.extend(known.iter().filter(|node| node.grant.is_some()));
    }
    let mut ids: Vec<String> = here.then_some(own).into_iter().collect();
    for node in chosen {
        let ready = match is_usable(node) {
            Err(why) => Err(Failure::new(why)),
            Ok(()) => bring(client, node, image, quiet).await,
        };
        match ready {
            Ok(()) => ids.push(node.id.clone()),
            Err(failure) if typed.is_empty() => {
                if !quiet {
                    let called = called(node);
                    eprint_line(&format!(
                        "vistara: {} is left out: {}",
                        visible(&called, false),
                        visible(&failure.message, false)
                    ));
                }
            }
            Err(failure) => return Err(failure.on(&called(node))),
        }
    }
    Ok(ids)
}

/// Sees to it that a node has the image: the node that made the service may be gone when a copy starts there.
async fn bring(client: &Client, node: &PeerNode, image: &str, quiet: bool) -> Result<(), Failure> {
    let target = client.on(&node.id);
    if client.image(image).await.is_ok() && target.image(image).await.is_ok() {
        return Ok(());
    }
    image_transfer::send_own(&target, image, quiet)
        .await
        .map(drop)
}
