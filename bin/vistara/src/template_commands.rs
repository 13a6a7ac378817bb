//! `vistara template …`: ready machines from which `run` forks others.

use crate::arguments::duration;
use crate::failure::{Failure, eprint_line};
use crate::listing::{self, Form, remove_each};
use crate::output::{print, print_json};
use crate::run_options::{checked, head_and_command};
use crate::text::{ago, short_id, visible};
use clap::{Args, Subcommand};
use std::time::Duration;
use vistara_api::{Client, CreateTemplateRequest, Template};
use vistara_model::{Bytes, Cpus, Hypervisor};

/// `template`.
#[derive(Debug, Args)]
pub(crate) struct TemplateOptions {
    #[command(subcommand)]
    pub(crate) command: TemplateCommand,
}

/// `template …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls {
        /// Whole keys only
        #[arg(short, long)]
        quiet: bool,
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Make a template ahead, so that the first run is fast too
    Create(Box<CreateOptions>),
    /// Remove templates; machines forked from them go on
    Rm {
        /// Keys, or beginnings of them that only one has
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
    },
    /// Remove templates from which no running machine was forked
    Prune {
        /// Only those that were not used for so long: 30m, 12h, 48h
        #[arg(long, value_name = "TIME", value_parser = duration)]
        unused_for: Option<Duration>,
        /// Also those whose forks run
        #[arg(short, long)]
        all: bool,
        /// The answer as JSON
        #[arg(long)]
        json: bool,
    },
}

/// `template create`. Machines of the same image, kernel and sizes are forked from it.
#[derive(Debug, Args)]
#[command(override_usage = "vistara template create [OPTIONS] IMAGE [--] [COMMAND [ARGUMENT]...]")]
pub(crate) struct CreateOptions {
    /// CPUs, such as 2 or 0.5
    #[arg(long, value_name = "N", value_parser = checked::<Cpus>)]
    cpus: Option<String>,
    /// Memory, such as 512m
    #[arg(short, long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    memory: Option<String>,
    /// Size of the writable layer, such as 10g
    #[arg(long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    disk: Option<String>,
    /// Network: user (outward through the host) or none
    #[arg(long, alias = "net", value_name = "NAME", value_parser = ["user", "none"])]
    network: Option<String>,
    /// Guest kernel, as `vistara kernel ls` names it
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<String>,
    /// What runs it: auto, firecracker, nanovms or qemu
    #[arg(long, value_name = "NAME", value_parser = checked::<Hypervisor>)]
    hypervisor: Option<String>,
    /// The template's key and nothing else
    #[arg(short, long)]
    quiet: bool,
    /// The answer as JSON
    #[arg(long)]
    json: bool,
    /// Image, and the program whose files are read ahead where it is not the image's own; it is not run
    #[arg(value_name = "IMAGE COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    words: Vec<String>,
}

/// `vistara template`.
pub(crate) async fn template(client: &Client, command: &TemplateCommand) -> Result<u8, Failure> {
    match command {
        TemplateCommand::Ls { quiet, json } => {
            list(&client.templates().await?, Form::of(*quiet, *json))
        }
        TemplateCommand::Create(options) => create(client, options).await,
        TemplateCommand::Rm { keys } => {
            remove_each(keys, async |key| client.remove_template(key).await).await
        }
        TemplateCommand::Prune {
            unused_for,
            all,
            json,
        } => {
            let unused = unused_for.unwrap_or_default();
            let unused_ms = u64::try_from(unused.as_millis()).unwrap_or(u64::MAX);
            let pruned = client.prune_templates(unused_ms, *all).await?;
            if *json {
                print_json(&pruned)?;
                return Ok(0);
            }
            let mut text = String::new();
            for key in &pruned.deleted {
                text.push_str(&format!("deleted {}\n", visible(key, false)));
            }
            text.push_str(&format!("freed {}\n", Bytes(pruned.freed_bytes)));
            print(&text)?;
            Ok(0)
        }
    }
}

async fn create(client: &Client, options: &CreateOptions) -> Result<u8, Failure> {
    let (image, command) = head_and_command(&options.words);
    let request = CreateTemplateRequest {
        image: image.to_owned(),
        command: command.to_vec(),
        cpus: options.cpus.clone(),
        memory: options.memory.clone(),
        disk: options.disk.clone(),
        network: options.network.clone(),
        kernel: options.kernel.clone(),
        hypervisor: options.hypervisor.clone(),
    };
    let made = client.create_template(&request).await?;
    if options.json {
        print_json(&made)?;
        return Ok(0);
    }
    print(&format!("{}\n", visible(&made.template.key, false)))?;
    if !options.quiet {
        eprint_line(&if made.created {
            format!("made in {:.2} s", made.took_ms as f64 / 1000.0)
        } else {
            "it was there already".to_owned()
        });
    }
    Ok(0)
}

fn list(templates: &[Template], form: Form) -> Result<u8, Failure> {
    let now = jiff::Timestamp::now();
    let head = [
        "KEY", "IMAGE", "CPUS", "MEMORY", "DISK", "NETWORK", "STORED", "RESIDENT", "USED",
        "MACHINES", "WARM",
    ];
    listing::list(
        templates,
        form,
        |template| &template.key,
        &head,
        |template| {
            vec![
                short_id(&template.key).to_owned(),
                template.image.clone(),
                template.vcpus.to_string(),
                Bytes(template.memory_bytes).to_string(),
                Bytes(template.disk_bytes).to_string(),
                if template.network { "user" } else { "none" }.to_owned(),
                Bytes(template.stored_bytes).to_string(),
                Bytes(template.resident_bytes).to_string(),
                ago(&template.used_at, now),
                template.machines.to_string(),
                template.warm.to_string(),
            ]
        },
    )
}
