//! `vistara snapshot …` and `vistara fork`: machines at one moment, and those that go on from there.

use crate::failure::{Failure, eprint_line};
use crate::image_transfer;
use crate::listing::{self, Form, remove_each};
use crate::output::{print, print_json};
use crate::text::{ago, short_id, visible};
use clap::{Args, Subcommand};
use vistara_api::{Client, CreateSnapshotRequest, ForkRequest, Machine, RestoreRequest, Snapshot};
use vistara_model::Bytes;

/// `snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotOptions {
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

/// `snapshot …`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Keep a running machine as it is now; it goes on
    Create {
        /// Name for the snapshot
        #[arg(long)]
        name: Option<String>,
        /// Keep only what differs from this snapshot, which has to stay as long as the new one does
        #[arg(long, value_name = "SNAPSHOT")]
        base: Option<String>,
        /// The snapshot's id and nothing else
        #[arg(short, long)]
        quiet: bool,
        /// The snapshot as JSON
        #[arg(long)]
        json: bool,
        /// Machine, by id, name or beginning of its id
        machine: String,
    },
    /// List snapshots
    #[command(visible_alias = "list")]
    Ls {
        /// Ids only
        #[arg(short, long)]
        quiet: bool,
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots; machines restored from them go on
    Rm {
        /// Snapshots, by id, name or beginning of an id
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
    /// Get a snapshot from another node; with --on, give that node one of this node's. Needs the right `admin` there
    Fetch {
        /// The node that has it (default: this one, where --on names another)
        #[arg(long, value_name = "NODE")]
        from: Option<String>,
        /// Name for it here (default: the one that it has)
        #[arg(long)]
        name: Option<String>,
        /// The snapshot's id and nothing else
        #[arg(short, long)]
        quiet: bool,
        /// The snapshot as JSON
        #[arg(long)]
        json: bool,
        /// Snapshot, by id, name or beginning of its id
        snapshot: String,
    },
    /// Make a new machine that goes on from a snapshot
    Restore {
        /// Name for the machine
        #[arg(long)]
        name: Option<String>,
        /// Host name in the machine (default: from its id)
        #[arg(long)]
        hostname: Option<String>,
        /// Publish a port, as `run` does; none are published otherwise
        #[arg(short, long = "publish", value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
        ports: Vec<String>,
        /// Remove the machine when it ends
        #[arg(long)]
        rm: bool,
        /// The machine as JSON
        #[arg(long)]
        json: bool,
        /// Snapshot, by id, name or beginning of its id
        snapshot: String,
    },
}

/// `fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkOptions {
    /// How many copies
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// Name for the copy, where it is one
    #[arg(long)]
    name: Option<String>,
    /// Publish a port of each, as `run` does: with several copies leave the host's out (-p 80). None are published otherwise
    #[arg(short, long = "publish", value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    ports: Vec<String>,
    /// Remove the copies when they end
    #[arg(long)]
    rm: bool,
    /// The answer as JSON
    #[arg(long)]
    json: bool,
    /// Nothing but the copies' ids
    #[arg(short, long)]
    quiet: bool,
    /// Machine, by id, name or beginning of its id
    machine: String,
}

/// `vistara snapshot`.
pub(crate) async fn snapshot(client: &Client, command: &SnapshotCommand) -> Result<u8, Failure> {
    match command {
        SnapshotCommand::Create {
            name,
            base,
            quiet,
            json,
            machine,
        } => {
            let request = CreateSnapshotRequest {
                name: name.clone(),
                base: base.clone(),
            };
            let made = client.create_snapshot(machine, &request).await?;
            if *json {
                print_json(&made)?;
                return Ok(0);
            }
            print(&format!("{}\n", visible(&made.id, false)))?;
            if !quiet {
                eprint_line(&format!(
                    "{}; the machine was held still for {:.0} ms",
                    Bytes(made.stored_bytes),
                    made.pause_ms
                ));
            }
            Ok(0)
        }
        SnapshotCommand::Ls { quiet, json } => {
            list(&client.snapshots().await?, Form::of(*quiet, *json))
        }
        SnapshotCommand::Rm { snapshots } => {
            remove_each(snapshots, async |snapshot| {
                client.remove_snapshot(snapshot).await
            })
            .await
        }
        SnapshotCommand::Fetch {
            from,
            name,
            quiet,
            json,
            snapshot,
        } => {
            let (from, name) = (from.as_deref(), name.as_deref());
            let fetched =
                image_transfer::fetch_snapshot(client, snapshot, from, name, *quiet || *json)
                    .await?;
            if name.is_some() && fetched.name.as_deref() != name {
                let called = fetched.name.as_deref().unwrap_or(&fetched.id);
                eprint_line(&format!(
                    "vistara: it was there already, as {}",
                    visible(called, false)
                ));
            }
            if *json {
                print_json(&fetched)?;
            } else {
                print(&format!("{}\n", visible(&fetched.id, false)))?;
            }
            Ok(0)
        }
        SnapshotCommand::Restore {
            name,
            hostname,
            ports,
            rm,
            json,
            snapshot,
        } => {
            let request = RestoreRequest {
                name: name.clone(),
                hostname: hostname.clone(),
                ports: ports.clone(),
                auto_remove: *rm,
            };
            let machine = client.restore(snapshot, &request).await?;
            if *json {
                print_json(&machine)?;
            } else {
                print(&format!("{}\n", machine.id))?;
            }
            Ok(0)
        }
    }
}

fn list(snapshots: &[Snapshot], form: Form) -> Result<u8, Failure> {
    let now = jiff::Timestamp::now();
    let text = |text: &Option<String>| visible(text.as_deref().unwrap_or("-"), false);
    let head = [
        "ID", "NAME", "MACHINE", "IMAGE", "MEMORY", "STORED", "BASE", "CREATED", "PROBLEM",
    ];
    listing::list(
        snapshots,
        form,
        |snapshot| &snapshot.id,
        &head,
        |snapshot| {
            vec![
                short_id(&snapshot.id).to_owned(),
                text(&snapshot.name),
                text(&snapshot.machine),
                text(&snapshot.image),
                Bytes(snapshot.memory_bytes).to_string(),
                Bytes(snapshot.stored_bytes).to_string(),
                match &snapshot.base {
                    Some(base) => short_id(base).to_owned(),
                    None => "-".to_owned(),
                },
                snapshot
                    .created_at
                    .as_deref()
                    .map_or_else(|| "-".to_owned(), |time| ago(time, now)),
                text(&snapshot.problem),
            ]
        },
    )
}

/// `vistara fork`.
pub(crate) async fn fork(client: &Client, options: &ForkOptions) -> Result<u8, Failure> {
    let request = ForkRequest {
        count: options.count,
        name: options.name.clone(),
        ports: options.ports.clone(),
        auto_remove: options.rm,
    };
    let forked = client.fork(&options.machine, &request).await?;
    let failed = |machine: &&Machine| machine.started_at.is_none();
    let count = forked.machines.iter().filter(failed).count();
    if options.json {
        print_json(&forked)?;
    } else {
        let running = forked.machines.iter().filter(|machine| !failed(machine));
        let ids: String = running.map(|machine| machine.id.clone() + "\n").collect();
        print(&ids)?;
        if !options.quiet {
            eprint_line(&format!(
                "{} in {:.0} ms; the machine was held still for {:.0} ms",
                forked.machines.len() - count,
                forked.took_ms,
                forked.pause_ms
            ));
        }
    }
    for machine in forked.machines.iter().filter(failed) {
        let why = machine.message.as_deref().unwrap_or("nobody knows why");
        eprint_line(&format!(
            "vistara: the copy {} did not go on: {}",
            visible(&machine.name, false),
            visible(why, false)
        ));
    }
    let missing = options.count as usize != forked.machines.len();
    if missing {
        eprint_line(&format!(
            "vistara: {} of {} copies could not be made; see the node's log",
            options.count as usize - forked.machines.len(),
            options.count
        ));
    }
    Ok(u8::from(count > 0 || missing))
}
