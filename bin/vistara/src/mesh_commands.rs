//! `vistara id`, `grant`, `nodes` and `node join|leave|ticket`: this node among others.

use crate::arguments::duration;
use crate::failure::{Failure, eprint_line};
use crate::output::{print, print_json};
use crate::text::{table, visible};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use vistara_api::{
    Client, Grant, GrantRequest, JoinRequest, KeepGrantRequest, ListenRequest, NarrowRequest,
    PeerNode,
};
use vistara_model::Bytes;

/// `id`.
#[derive(Debug, Args)]
pub(crate) struct IdOptions {
    /// As JSON, with where the node may be reached
    #[arg(long)]
    json: bool,
}

/// `nodes`.
#[derive(Debug, Args)]
pub(crate) struct NodesOptions {
    /// A JSON array
    #[arg(long)]
    json: bool,
    /// Ids only
    #[arg(short, long)]
    quiet: bool,
}

/// `grant`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct GrantOptions {
    #[command(subcommand)]
    command: Option<GrantCommand>,
    #[command(flatten)]
    give: GiveOptions,
}

/// `grant --to …`.
#[derive(Debug, Args)]
struct GiveOptions {
    /// To whom: the key that `vistara id` prints there
    #[arg(long, value_name = "KEY", required = true)]
    to: Option<String>,
    /// For what: run, network (their machines use this node's network), images, admin
    #[arg(
        long = "for",
        value_name = "RIGHTS",
        value_delimiter = ',',
        required = true
    )]
    rights: Vec<String>,
    /// Until when: a time (2026-12-31T12:00:00Z), or for how long (8h, 30m)
    #[arg(long, value_name = "TIME", value_parser = moment, required = true)]
    until: Option<Timestamp>,
    /// Most memory of all their machines together, such as 4g
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Bytes>,
    /// Most machines at a time; those that have ended count until they are removed
    #[arg(long, value_name = "N")]
    max_machines: Option<u64>,
    /// Most of images' layers brought in under it, such as 10g
    #[arg(long, value_name = "SIZE")]
    max_disk: Option<Bytes>,
    /// The grant and its token as JSON
    #[arg(long)]
    json: bool,
}

/// `grant …`.
#[derive(Debug, Subcommand)]
enum GrantCommand {
    /// List what was granted, and what is used of it
    #[command(visible_alias = "list")]
    Ls {
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Take grants back: what goes on under them is cut off at once
    Revoke {
        /// Grants, by their ids
        #[arg(required = true, value_name = "GRANT")]
        grants: Vec<String>,
    },
    /// Keep a token that another node's owner gave to this one
    Keep {
        /// The token
        #[arg(value_name = "TOKEN")]
        token: String,
    },
    /// Make a token that allows less, without asking anybody
    Narrow {
        /// For these only
        #[arg(long = "for", value_name = "RIGHTS", value_delimiter = ',')]
        rights: Option<Vec<String>>,
        /// Not after this: a time, or for how long
        #[arg(long, value_name = "TIME", value_parser = moment)]
        until: Option<Timestamp>,
        /// At most this much memory
        #[arg(long, value_name = "SIZE")]
        max_memory: Option<Bytes>,
        /// At most so many machines
        #[arg(long, value_name = "N")]
        max_machines: Option<u64>,
        /// At most so much of images
        #[arg(long, value_name = "SIZE")]
        max_disk: Option<Bytes>,
        /// For somebody else: only the holder can pass it on, and only once
        #[arg(long, value_name = "KEY")]
        to: Option<String>,
        /// The token
        #[arg(value_name = "TOKEN")]
        token: String,
    },
}

/// A time, or how long from now.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let span = duration(text)
        .map_err(|_| "write a time such as 2026-12-31T12:00:00Z, or for how long: 8h".to_owned())?;
    Timestamp::now()
        .checked_add(span)
        .map_err(|_| "this lies too far ahead".to_owned())
}

fn size(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

fn of(used: Option<String>, max: Option<String>) -> String {
    match (used, max) {
        (Some(used), Some(max)) => format!("{used} of {max}"),
        (Some(used), None) => used,
        (None, Some(max)) => max,
        (None, None) => "any".to_owned(),
    }
}

/// `vistara id`.
pub(crate) async fn id(client: &Client, options: &IdOptions) -> Result<u8, Failure> {
    let status = client.mesh().await?;
    if options.json {
        print_json(&status)?;
    } else {
        print(&format!("{}\n", status.id))?;
    }
    Ok(0)
}

/// `vistara nodes`.
pub(crate) async fn nodes(client: &Client, options: &NodesOptions) -> Result<u8, Failure> {
    let nodes = client.nodes().await?;
    if options.json {
        print_json(&nodes)?;
        return Ok(0);
    }
    if options.quiet {
        let ids: String = nodes.iter().map(|node| format!("{}\n", node.id)).collect();
        print(&ids)?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    print(&table(
        &[
            "NODE",
            "NAME",
            "STATE",
            "KNOWN",
            "ADDRESS",
            "GRANTED",
            "UNTIL",
            "FREE",
            "HYPERVISORS",
            "REGION",
            "PRICE",
        ],
        &rows,
    ))?;
    Ok(0)
}

/// What the network believes of a node, and how it stands between it and this one where that says something else.
fn state(node: &PeerNode) -> String {
    let link = match &node.reason {
        Some(reason) => format!("{}: {}", node.state, visible(reason, false)),
        None => node.state.clone(),
    };
    match node.life.as_deref() {
        None => link,
        Some("alive") if node.state == "connected" || node.state == "idle" => "alive".to_owned(),
        Some("alive") => format!("alive, but {link}"),
        Some(life) => life.to_owned(),
    }
}

fn row(node: &PeerNode) -> Vec<String> {
    let grant = node.grant.as_ref();
    let facts = node.facts.as_ref();
    vec![
        node.id.chars().take(12).collect(),
        node.name.clone().unwrap_or_default(),
        state(node),
        node.known.clone(),
        match (node.way.as_deref(), node.addresses.first()) {
            (Some("relayed"), _) => "through a relay".to_owned(),
            (_, Some(address)) => address.clone(),
            (_, None) if !node.relays.is_empty() => "through a relay".to_owned(),
            (_, None) => String::new(),
        },
        grant.map_or_else(|| "nothing".to_owned(), |grant| grant.rights.join(",")),
        grant.map(|grant| grant.until.clone()).unwrap_or_default(),
        facts.map_or_else(String::new, |facts| {
            if facts.draining {
                return "draining".to_owned();
            }
            of(
                Some(size(facts.memory_free_bytes)),
                Some(size(facts.memory_bytes)),
            )
        }),
        facts
            .map(|facts| facts.hypervisors.join(","))
            .unwrap_or_default(),
        facts
            .and_then(|facts| facts.region.as_deref())
            .map(|region| visible(region, false))
            .unwrap_or_default(),
        facts
            .map(|facts| facts.price_micros.to_string())
            .unwrap_or_default(),
    ]
}

/// `vistara grant …`.
pub(crate) async fn grant(client: &Client, options: GrantOptions) -> Result<u8, Failure> {
    match options.command {
        None => give(client, &options.give).await,
        Some(GrantCommand::Ls { json }) => list(client, json).await,
        Some(GrantCommand::Revoke { grants }) => {
            for grant in grants {
                client
                    .revoke(&grant)
                    .await
                    .map_err(Failure::at(format!("cannot revoke {grant}")))?;
            }
            Ok(0)
        }
        Some(GrantCommand::Keep { token }) => {
            let node = client.keep_grant(&KeepGrantRequest { token }).await?;
            eprint_line(&format!("kept for the node {}", called(&node)));
            Ok(0)
        }
        Some(GrantCommand::Narrow {
            rights,
            until,
            max_memory,
            max_machines,
            max_disk,
            to,
            token,
        }) => {
            let request = NarrowRequest {
                token,
                rights,
                until: until.map(|time| time.to_string()),
                memory: max_memory.map(|bytes| bytes.0.to_string()),
                machines: max_machines,
                disk: max_disk.map(|bytes| bytes.0.to_string()),
                to,
            };
            print(&format!("{}\n", client.narrow(&request).await?.token))?;
            Ok(0)
        }
    }
}

async fn give(client: &Client, options: &GiveOptions) -> Result<u8, Failure> {
    let request = GrantRequest {
        to: options.to.clone().unwrap_or_default(),
        rights: options.rights.clone(),
        until: options
            .until
            .map(|time| time.to_string())
            .unwrap_or_default(),
        memory: options.max_memory.map(|bytes| bytes.0.to_string()),
        machines: options.max_machines,
        disk: options.max_disk.map(|bytes| bytes.0.to_string()),
    };
    let given = client.grant(&request).await?;
    if options.json {
        print_json(&given)?;
    } else {
        print(&format!("{}\n", given.token))?;
        if client.mesh().await?.ticket.is_none() {
            eprint_line("hint: this node does not listen yet: `vistara node ticket` has it do so");
        }
    }
    Ok(0)
}

async fn list(client: &Client, json: bool) -> Result<u8, Failure> {
    let grants = client.grants().await?;
    if json {
        print_json(&grants)?;
        return Ok(0);
    }
    let row = |grant: &Grant| {
        vec![
            grant.id.clone(),
            grant.holder.chars().take(12).collect(),
            grant.rights.join(","),
            grant.state.clone(),
            grant.until.clone(),
            of(
                grant.machines_used.map(|count| count.to_string()),
                grant.machines_max.map(|count| count.to_string()),
            ),
            of(
                grant.memory_used_bytes.map(size),
                grant.memory_max_bytes.map(size),
            ),
            of(
                grant.disk_used_bytes.map(size),
                grant.disk_max_bytes.map(size),
            ),
        ]
    };
    let rows: Vec<Vec<String>> = grants.iter().map(row).collect();
    print(&table(
        &[
            "GRANT", "HOLDER", "FOR", "STATE", "UNTIL", "MACHINES", "MEMORY", "IMAGES",
        ],
        &rows,
    ))?;
    Ok(0)
}

fn called(node: &PeerNode) -> String {
    let id: String = node.id.chars().take(12).collect();
    match &node.name {
        Some(name) => format!("{name} ({id})"),
        None => id,
    }
}

/// `vistara node join`.
pub(crate) async fn join(
    client: &Client,
    ticket: String,
    name: Option<String>,
    grant: Option<String>,
) -> Result<u8, Failure> {
    let request = JoinRequest {
        ticket,
        name,
        grant,
    };
    let node = client
        .join(&request)
        .await
        .map_err(Failure::at("cannot join"))?;
    eprint_line(&format!("joined {}", called(&node)));
    if node.grant.is_none() {
        let id = client.mesh().await?.id;
        eprint_line(&format!(
            "hint: it serves this node once its owner has typed: vistara grant --to {id} --for run --until 24h"
        ));
    }
    Ok(0)
}

/// `vistara node terms`.
#[derive(Debug, Args)]
pub(crate) struct TermsOptions {
    /// Where it is, such as eu-west
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
    /// What a GiB of memory costs for an hour, in millionths of the currency that its users and you agreed on
    #[arg(long, value_name = "PRICE")]
    price: Option<u64>,
    /// What it is called: ssd, gpu, …; in place of what was said before
    #[arg(long, value_name = "LABEL", value_delimiter = ',')]
    label: Vec<String>,
    /// Largest machine taken, such as 4g
    #[arg(long, value_name = "SIZE")]
    max_machine: Option<Bytes>,
    /// Take nothing new that others place
    #[arg(long, conflicts_with = "no_drain")]
    drain: bool,
    /// Take something again
    #[arg(long)]
    no_drain: bool,
    /// Speak with the joined nodes only: say nothing of this node to the rest of their network, and hear nothing of it
    #[arg(long, conflicts_with = "no_private")]
    private: bool,
    /// Take part in the network again
    #[arg(long)]
    no_private: bool,
    /// Be reached through this relay, as `vistara relay` prints it; several are tried; in place of what was said before, and none
    /// with an empty word
    #[arg(long, value_name = "RELAY", value_delimiter = ',')]
    relay: Vec<String>,
    /// Tell the local network where this node is, and hear who else is there
    #[arg(long, conflicts_with = "no_local_discovery")]
    local_discovery: bool,
    /// Say nothing there any more
    #[arg(long)]
    no_local_discovery: bool,
}

/// `vistara node terms`: what this node says of itself to those who may use it.
pub(crate) async fn terms(client: &Client, options: &TermsOptions) -> Result<u8, Failure> {
    let mut terms = client.terms().await?;
    let before = terms.clone();
    if let Some(region) = &options.region {
        terms.region = Some(region.clone()).filter(|region| !region.is_empty());
    }
    if let Some(price) = options.price {
        terms.price_micros = price;
    }
    if !options.label.is_empty() {
        terms.labels.clone_from(&options.label);
        terms.labels.retain(|label| !label.is_empty());
    }
    if let Some(size) = options.max_machine {
        terms.memory_max_bytes = Some(size.0);
    }
    terms.draining = (terms.draining || options.drain) && !options.no_drain;
    if !options.relay.is_empty() {
        terms.relays.clone_from(&options.relay);
        terms.relays.retain(|relay| !relay.is_empty());
    }
    terms.local_discovery =
        (terms.local_discovery || options.local_discovery) && !options.no_local_discovery;
    terms.private = (terms.private || options.private) && !options.no_private;
    if terms != before {
        terms = client
            .set_terms(&terms)
            .await
            .map_err(Failure::at("cannot set the node's terms"))?;
    }
    print_json(&terms)?;
    Ok(0)
}

/// `vistara node init`.
pub(crate) async fn init(client: &Client) -> Result<u8, Failure> {
    let status = client
        .mesh()
        .await
        .map_err(Failure::at("cannot make this node's key"))?;
    print(&format!("{}\n", status.id))?;
    if status.on {
        eprint_line("hint: it listens; `vistara node ticket` prints what others type to join it");
    } else {
        eprint_line(
            "hint: `vistara node ticket` has it listen for others, `vistara node join TICKET` joins one",
        );
    }
    Ok(0)
}

/// `vistara node drain` and `vistara node undrain`.
pub(crate) async fn drain(client: &Client, draining: bool) -> Result<u8, Failure> {
    let mut terms = client.terms().await?;
    if terms.draining != draining {
        terms.draining = draining;
        client
            .set_terms(&terms)
            .await
            .map_err(Failure::at("cannot set the node's terms"))?;
    }
    let running = client.version().await?.machines_active;
    eprint_line(&match draining {
        true => format!("takes nothing new that others place here; machines that go on: {running}"),
        false => "takes what is placed here".to_owned(),
    });
    Ok(0)
}

/// `vistara node leave`.
pub(crate) async fn leave(client: &Client, node: Option<&str>) -> Result<u8, Failure> {
    match node {
        Some(node) => client
            .forget_node(node)
            .await
            .map_err(Failure::at("cannot leave"))?,
        None => client
            .mesh_leave()
            .await
            .map_err(Failure::at("cannot leave"))?,
    }
    Ok(0)
}

/// `vistara node ticket`.
pub(crate) async fn ticket(client: &Client, listen: Option<String>) -> Result<u8, Failure> {
    let status = client
        .mesh_listen(&ListenRequest { listen })
        .await
        .map_err(Failure::at("cannot listen for others"))?;
    match &status.ticket {
        Some(ticket) => {
            print(&format!("{ticket}\n"))?;
            if status.relay.is_none() && !status.relays.is_empty() {
                let why = status.relay_trouble.as_deref();
                let why = why.map_or_else(
                    || "it does not answer".to_owned(),
                    |why| visible(why, false),
                );
                eprint_line(&format!(
                    "vistara: this node is not connected to its relay, so that nobody reaches it by that: {why}"
                ));
            }
            Ok(0)
        }
        None => Err(
            Failure::new("this host has no address at which others could reach it")
                .hint("say which: vistara node ticket --listen ADDRESS:PORT"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_how_long_from_now() {
        let hour = moment("1h").unwrap_or_default();
        let left = hour.duration_since(Timestamp::now()).as_secs();
        assert!((3590..=3600).contains(&left), "{left}");
        assert_eq!(
            moment("2026-12-31T12:00:00Z").map(|time| time.to_string()),
            Ok("2026-12-31T12:00:00Z".to_owned())
        );
        assert!(moment("tomorrow").is_err());
    }
}
