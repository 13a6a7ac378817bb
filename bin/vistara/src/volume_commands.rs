//! `vistara volume …`: volumes that the node keeps under names.

use crate::failure::Failure;
use crate::listing::{self, Form, remove_each};
use crate::output::print;
use crate::text::{ago, visible};
use clap::{Args, Subcommand};
use vistara_api::{Client, CreateVolumeRequest, Volume};
use vistara_model::Bytes;

/// `volume`.
#[derive(Debug, Args)]
pub(crate) struct VolumeOptions {
    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

/// `volume …`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        /// Names only
        #[arg(short, long)]
        quiet: bool,
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Make a volume, unless it is there; `run -v NAME:/dir` does so, too
    Create {
        /// Up to 31 letters, digits, '.', '-' and '_'
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Remove volumes, and all that is on them
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// `vistara volume`.
pub(crate) async fn volume(client: &Client, command: &VolumeCommand) -> Result<u8, Failure> {
    match command {
        VolumeCommand::Ls { quiet, json } => {
            list(&client.volumes().await?, Form::of(*quiet, *json))
        }
        VolumeCommand::Create { name } => {
            let request = CreateVolumeRequest { name: name.clone() };
            let made = client.create_volume(&request).await?;
            print(&format!("{}\n", visible(&made.name, false)))?;
            Ok(0)
        }
        VolumeCommand::Rm { names } => {
            remove_each(names, async |name| client.remove_volume(name).await).await
        }
    }
}

fn list(volumes: &[Volume], form: Form) -> Result<u8, Failure> {
    let now = jiff::Timestamp::now();
    let head = ["NAME", "SIZE", "STORED", "CHANGED", "MACHINE"];
    listing::list(
        volumes,
        form,
        |volume| &volume.name,
        &head,
        |volume| {
            vec![
                volume.name.clone(),
                Bytes(volume.size_bytes).to_string(),
                Bytes(volume.stored_bytes).to_string(),
                ago(&volume.changed_at, now),
                volume.machine.clone().unwrap_or_default(),
            ]
        },
    )
}
