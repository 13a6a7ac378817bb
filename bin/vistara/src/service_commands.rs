//! `vistara service …`: copies of a program that run somewhere among nodes, whichever of them die.

use crate::failure::{Failure, eprint_line};
use crate::listing::{self, Form};
use crate::output::{print, print_json};
use crate::program_options::{HERE, ProgramOptions, nodes};
use crate::text::{short_id, table, visible};
use clap::{Args, Subcommand};
use vistara_api::{
    Client, ClientError, CreateServiceRequest, ScaleServiceRequest, Service, ServiceCopy,
    ServiceNode,
};

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
    /// The service as JSON instead of its name
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) program: ProgramOptions,
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
    let program = options.program.read(client).await?;
    let name = match (&options.name, program.named) {
        (Some(name), _) => name.clone(),
        (None, Some(named)) => name_of(&named),
        (None, None) => {
            return Err(Failure::new("a service needs a name").hint("give it one: --name NAME"));
        }
    };
    let request = CreateServiceRequest {
        name,
        replicas: options.replicas,
        machine: program.machine,
        nodes: program.nodes,
        policy: program.policy,
        rules: program.rules,
        regions: options.program.place.region.clone(),
        capabilities: options.program.place.capable.clone(),
        price_micros_max: options.program.place.max_price,
        apart: options.apart,
    };
    let service = client.create_service(&request).await?;
    match options.json {
        true => print_json(&service)?,
        false => print(&format!("{}\n", visible(&service.name, false)))?,
    }
    Ok(0)
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
    remove_all(services, async |typed| client.remove_service(typed).await).await
}

/// Removes one after the other, and says which nodes have not heard of it.
pub(crate) async fn remove_all(
    all: &[String],
    remove: impl AsyncFn(&str) -> Result<Vec<ServiceNode>, ClientError>,
) -> Result<u8, Failure> {
    let mut failures = listing::Failures::default();
    for typed in all {
        match remove(typed).await {
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

/// Who looks after something, in a word each.
pub(crate) fn keepers(keepers: &[ServiceNode]) -> String {
    let life = |node: &ServiceNode| match node.life.as_str() {
        "alive" | HERE => String::new(),
        other => format!(" ({other})"),
    };
    let names = keepers.iter().map(|node| node.name.clone() + &life(node));
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
                keepers(&service.keepers),
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
            false => keepers(&service.keepers),
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
