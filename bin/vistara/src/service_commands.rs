//! `vistara service …`: copies of a program that run somewhere among nodes, whichever of them die.

use crate::failure::{Failure, eprint_line};
use crate::image_commands;
use crate::image_transfer;
use crate::listing::{self, Form};
use crate::output::{print, print_json};
use crate::place::{PlaceOptions, policy};
use crate::run_options::{ImageSource, callers, checked, environment_of, head_and_command};
use crate::text::{short_id, table, visible};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use vistara_api::{
    Client, CreateServiceRequest, ErrorKind, PeerNode, PullRequest, RunRequest,
    ScaleServiceRequest, Service, ServiceCopy, ServiceNode,
};
use vistara_model::{Bytes, Cpus, Hypervisor};

/// Below so many nodes one that dies takes the majority with it.
const KEEPERS_GOOD: usize = 3;
/// What stands for this node among those that are named.
const HERE: &str = "here";

/// `service`.
#[derive(Debug, Args)]
pub(crate) struct ServiceOptions {
    #[command(subcommand)]
    pub(crate) command: ServiceCommand,
}

/// `service …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// Have copies of a program run among this node and those that have given it a grant
    Create(Box<CreateOptions>),
    /// List services
    #[command(visible_alias = "list")]
    Ls {
        /// Names only
        #[arg(short, long)]
        quiet: bool,
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show a service with its copies and the nodes that look after it
    Inspect {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// By name, id or beginning of its id
        #[arg(value_name = "SERVICE")]
        service: String,
    },
    /// Change how many copies there are, and where they may run: anew among the nodes that have given a grant by now
    Scale {
        /// Only on these nodes from now on; `here` is this one
        #[arg(long, value_name = "NODE", value_delimiter = ',')]
        nodes: Vec<String>,
        /// No progress and no notices
        #[arg(short, long)]
        quiet: bool,
        /// By name, id or beginning of its id
        #[arg(value_name = "SERVICE")]
        service: String,
        /// How many copies
        #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(0..=256))]
        replicas: u32,
    },
    /// Remove services with all their copies
    Rm {
        /// By name, id or beginning of their ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
}

/// `service create`.
#[derive(Debug, Args)]
#[command(override_usage = "vistara service create [OPTIONS] IMAGE [--] [COMMAND [ARGUMENT]...]")]
pub(crate) struct CreateOptions {
    /// Its name: lower-case letters, digits and '-'; the image's where not given
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// How many copies
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=256))]
    pub(crate) replicas: u32,
    /// Never two copies on one node; otherwise there are two only where there are too few nodes
    #[arg(long)]
    pub(crate) apart: bool,
    /// Only on these nodes; `here` is this one
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub(crate) nodes: Vec<String>,
    /// CPUs of each copy, such as 2 or 0.5
    #[arg(long, value_name = "N", value_parser = checked::<Cpus>)]
    pub(crate) cpus: Option<String>,
    /// Memory of each copy, such as 512m
    #[arg(short, long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) memory: Option<String>,
    /// Size of each copy's writable layer, such as 10g
    #[arg(long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) disk: Option<String>,
    /// Environment variable; NAME alone takes the caller's value. Every node of the service can read it
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
    /// Boot each copy, even where it could be forked from a template
    #[arg(long)]
    pub(crate) no_template: bool,
    /// No progress and no notices
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The service as JSON instead of its name
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) place: PlaceOptions,
    /// Image, and the command that replaces its own; everything after the image is the command's
    #[arg(value_name = "IMAGE COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    pub(crate) words: Vec<String>,
}

/// `vistara service`.
pub(crate) async fn service(client: &Client, command: &ServiceCommand) -> Result<u8, Failure> {
    match command {
        ServiceCommand::Create(options) => create(client, options).await,
        ServiceCommand::Ls { quiet, json } => {
            list(&client.services().await?, Form::of(*quiet, *json))
        }
        ServiceCommand::Inspect { json, service } => {
            let service = client.service(service).await?;
            match json {
                true => print_json(&service)?,
                false => print(&whole(&service))?,
            }
            Ok(0)
        }
        ServiceCommand::Scale {
            nodes,
            quiet,
            service,
            replicas,
        } => scale(client, service, *replicas, nodes, *quiet).await,
        ServiceCommand::Rm { services } => remove(client, services).await,
    }
}

impl CreateOptions {
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
}

/// A service's name from its image's: what comes after the last slash, without tag and digest.
fn name_of(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or_default();
    let bare = last.split(['@', ':']).next().unwrap_or_default();
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let name: String = (bare.to_ascii_lowercase().chars())
        .map(|letter| if plain(letter) { letter } else { '-' })
        .collect();
    let name = name.trim_matches('-');
    name[..name.len().min(40)].to_owned()
}

async fn create(client: &Client, options: &CreateOptions) -> Result<u8, Failure> {
    let (typed, command) = head_and_command(&options.words);
    let (image, named) = match ImageSource::parse(typed) {
        ImageSource::Path(path) => {
            let image = image_commands::import_path(client, &path, None, options.quiet).await?;
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
                    image_commands::pull_image(client, &request, options.quiet).await?;
                    (client.image(&name).await?, Some(name))
                }
                _ => return Err(error.into()),
            },
        },
    };
    let name = match (&options.name, named) {
        (Some(name), _) => name.clone(),
        (None, Some(named)) => name_of(&named),
        (None, None) => {
            return Err(Failure::new("a service needs a name").hint("give it one: --name NAME"));
        }
    };
    let nodes = nodes(client, &options.nodes, &image.id, options.quiet).await?;
    if nodes.len() < KEEPERS_GOOD && !options.quiet {
        eprint_line(&format!(
            "vistara: with {} nodes nobody is left to look after the service when one dies; it takes {KEEPERS_GOOD}",
            nodes.len()
        ));
    }
    let (policy, rules) = policy(options.place.place.as_ref())?;
    let request = CreateServiceRequest {
        name,
        replicas: options.replicas,
        machine: options.machine(&image.id, command)?,
        nodes,
        policy,
        rules,
        regions: options.place.region.clone(),
        capabilities: options.place.capable.clone(),
        price_micros_max: options.place.max_price,
        apart: options.apart,
    };
    let service = client.create_service(&request).await?;
    match options.json {
        true => print_json(&service)?,
        false => print(&format!("{}\n", visible(&service.name, false)))?,
    }
    Ok(0)
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

/// The nodes for a service, each with the image: those that were named, or this one and all that are usable.
async fn nodes(
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

async fn scale(
    client: &Client,
    typed: &str,
    replicas: u32,
    on: &[String],
    quiet: bool,
) -> Result<u8, Failure> {
    let service = client.service(typed).await?;
    // Those that are away keep their place: they may be back.
    let fresh = nodes(client, on, &service.image_id, quiet).await?;
    let mut all = fresh;
    if on.is_empty() {
        let before = service.nodes.iter().map(|node| node.id.clone());
        let away = before.filter(|id| !all.contains(id)).collect::<Vec<_>>();
        let granted = client.nodes().await?;
        let still = |id: &String| {
            granted
                .iter()
                .any(|node| node.id == *id && node.grant.is_some())
        };
        all.extend(away.into_iter().filter(still));
        let had_here = service.nodes.iter().any(|node| node.life == HERE);
        let own = client.mesh().await?.id;
        all.retain(|id| *id != own || had_here);
    }
    let request = ScaleServiceRequest {
        replicas,
        nodes: Some(all),
    };
    let service = client.scale_service(typed, &request).await?;
    print(&format!("{}\n", visible(&service.name, false)))?;
    Ok(0)
}

async fn remove(client: &Client, services: &[String]) -> Result<u8, Failure> {
    let mut failures = listing::Failures::default();
    for typed in services {
        match client.remove_service(typed).await {
            Ok(late) => {
                print(&format!("{}\n", visible(typed, false)))?;
                for node in late {
                    let what = match node.life.as_str() {
                        "alive" | HERE => "has not said yet that nothing is left of it there",
                        _ => {
                            "is away: what ran there ends with its lease, and it is told when it is back"
                        }
                    };
                    eprint_line(&format!("vistara: {} {what}", visible(&node.name, false)));
                }
            }
            Err(error) => failures.add(typed, error.into()),
        }
    }
    failures.code()
}

fn keepers(service: &Service) -> String {
    let life = |node: &ServiceNode| match node.life.as_str() {
        "alive" | HERE => String::new(),
        other => format!(" ({other})"),
    };
    let names = service
        .keepers
        .iter()
        .map(|node| node.name.clone() + &life(node));
    names.collect::<Vec<_>>().join(", ")
}

fn list(services: &[Service], form: Form) -> Result<u8, Failure> {
    let head = ["NAME", "ID", "RUNNING", "EPOCH", "KEEPERS", "OWNER"];
    listing::list(
        services,
        form,
        |service| &service.name,
        &head,
        |service| {
            vec![
                service.name.clone(),
                short_id(&service.id).to_owned(),
                format!("{}/{}", service.running, service.wanted),
                match service.unattended {
                    true => format!("{} (nobody answers)", service.epoch),
                    false => service.epoch.to_string(),
                },
                keepers(service),
                match service.own {
                    true => HERE.to_owned(),
                    false => short_id(&service.owner).to_owned(),
                },
            ]
        },
    )
}

fn row(copy: &ServiceCopy) -> Vec<String> {
    let machine = copy.machine.as_deref().map(short_id);
    vec![
        copy.slot.to_string(),
        copy.generation.to_string(),
        copy.node
            .as_ref()
            .map_or_else(|| "-".to_owned(), |node| node.name.clone()),
        machine.unwrap_or("-").to_owned(),
        copy.state.clone(),
        copy.restarts.to_string(),
        copy.message.clone().unwrap_or_default(),
    ]
}

fn whole(service: &Service) -> String {
    let owner = match service.own {
        true => HERE,
        false => &service.owner,
    };
    let nodes = service
        .nodes
        .iter()
        .map(|node| format!("{} ({})", node.name, node.life));
    let nodes = nodes.collect::<Vec<_>>().join(", ");
    let rows: Vec<Vec<String>> = service.copies.iter().map(row).collect();
    let mut text = format!(
        "name     {}\nid       {}\nowner    {owner}\nimage    {}\nrunning  {} of {}\nversion  {}\nepoch    {}\nkeepers  {}\nnodes    {nodes}\n\n",
        service.name,
        service.id,
        service.image_id,
        service.running,
        service.wanted,
        service.version,
        service.epoch,
        match service.unattended {
            true => "nobody answers".to_owned(),
            false => keepers(service),
        },
    );
    text.push_str(&table(
        &[
            "SLOT",
            "GENERATION",
            "NODE",
            "MACHINE",
            "STATE",
            "RESTARTS",
            "MESSAGE",
        ],
        &rows,
    ));
    visible(&text, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_called_after_its_image() {
        for (image, name) in [
            ("debian", "debian"),
            ("docker.io/library/Nginx_Web:1.2", "nginx-web"),
            ("ghcr.io/a/b@sha256:00", "b"),
            ("localhost:5000/x:y", "x"),
        ] {
            assert_eq!(name_of(image), name);
        }
    }
}
