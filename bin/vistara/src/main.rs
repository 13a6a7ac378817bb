//! The `vistara` program: the command line, and the node's daemon (`vistara node`).
//!
//! The command line speaks to a node over its socket and through the public interface alone; where no node runs, it
//! starts one in the background ([`connect`]). Data goes to standard output, everything else to standard error.

mod arguments;
mod bench_boot;
mod bench_command;
mod bench_fork;
mod bench_mesh;
mod bench_raw;
mod connect;
mod copy;
mod deploy_command;
mod doctor_command;
mod environment;
mod exec_command;
mod failure;
mod forward;
mod gateway;
mod hac;
mod hypercore_commands;
mod image_commands;
mod image_transfer;
mod kernel_build;
mod kernel_commands;
mod listing;
mod logs_command;
mod machine_commands;
mod mesh_commands;
mod node_arguments;
mod node_command;
mod node_page;
mod output;
mod place;
mod places;
mod program_options;
mod progress;
mod published;
mod receipt_commands;
mod receipts;
mod relay_command;
mod replicas;
mod run_command;
mod run_options;
mod service_commands;
mod session;
mod snapshot_commands;
mod stats_command;
mod task_commands;
mod template_commands;
mod text;
mod volume_commands;

use arguments::{Command, CommandLine};
use clap::{CommandFactory, Parser};
use failure::Failure;
use places::{Facts, Places};
use std::process::ExitCode;
use vistara_api::Client;

/// The word for a guard of copies' leases, which nodes start and nobody types.
pub(crate) const GUARD: &str = "guard-of-a-lease";

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == GUARD) {
        // Nothing of the rest: it must be small, and there at once.
        if let Some(dir) = words.next() {
            vistara_node::stand_guard(std::path::Path::new(&dir));
        }
        return ExitCode::SUCCESS;
    }
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => {
            // As docker: where the exit code is a program's, our own faults keep away from its codes.
            let passes_codes = error.use_stderr() && passes_exit_codes(std::env::args());
            let _ = error.print();
            return ExitCode::from(match (error.use_stderr(), passes_codes) {
                (false, _) => 0,
                (true, true) => failure::OWN_FAULT,
                (true, false) => 2,
            });
        }
    };
    let own_code = match &line.command {
        Command::Run(_) | Command::Exec(_) | Command::Attach(_) => failure::OWN_FAULT,
        Command::Task(options) if options.command.passes_exit_code() => failure::OWN_FAULT,
        _ => 1,
    };
    let result = execute(line);
    session::terminal::restore();
    ExitCode::from(match result {
        Ok(code) => code,
        Err(failure) => {
            failure.print();
            failure.code.unwrap_or(own_code)
        }
    })
}

/// Whether the first word that is a command is one whose exit code is a program's.
fn passes_exit_codes(arguments: impl Iterator<Item = String>) -> bool {
    let mut arguments = arguments.skip(1);
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--socket" | "--state-dir" | "--on" => {
                let _ = arguments.next();
            }
            option if option.starts_with('-') => {}
            "task" | "tasks" => {
                let command = arguments.find(|word| !word.starts_with('-'));
                return command.is_some_and(|word| matches!(word.as_str(), "run" | "wait"));
            }
            command => return matches!(command, "run" | "exec" | "attach"),
        }
    }
    false
}

fn execute(line: CommandLine) -> Result<u8, Failure> {
    let translated = match &line.command {
        Command::Spawn(options) => Some(hypercore_commands::spawn(options)?),
        Command::Cluster(options) => Some(hypercore_commands::cluster(options)?),
        _ => None,
    };
    // What was said of the node is said of the translated command, too.
    let line = match translated {
        Some(other) => CommandLine {
            place: arguments::Place {
                on: line.place.on.or(other.place.on),
                ..line.place
            },
            command: other.command,
        },
        None => line,
    };
    if let Command::Completion(options) = &line.command {
        let mut script = Vec::new();
        clap_complete::generate(
            options.shell,
            &mut CommandLine::command(),
            "vistara",
            &mut script,
        );
        output::print(&String::from_utf8_lossy(&script))?;
        return Ok(0);
    }
    let places = Places::resolve(&Facts::gather(line.place.socket, line.place.state_dir))?;
    if let Command::Node(arguments) = &line.command
        && let Some(service) = node_command::to_become(arguments)
    {
        return node_command::become_node(service, arguments, places);
    }
    if let Command::Relay(options) = line.command {
        return relay_command::relay(options, &places);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start", error))?;
    let result = runtime.block_on(command(line.command, &places, line.place.on));
    // A thread may wait in a read of the terminal for ever; it ends with the process.
    runtime.shutdown_background();
    result
}

async fn command(command: Command, places: &Places, on: Option<String>) -> Result<u8, Failure> {
    let begin = std::time::Instant::now();
    if on.is_some() && (is_local(&command) || kernel_build::is_build(&command)) {
        return Err(
            Failure::new("--on is for commands about machines and images")
                .hint("type this command on the other node"),
        );
    }
    match &command {
        Command::Version(options) => return version(options.json, places).await,
        Command::Node(arguments) => {
            return match &arguments.command {
                Some(command) => node_command::manage(command, places).await,
                None => Err(Failure::new("the node runs outside the command line")),
            };
        }
        _ => {}
    }
    let command = match command {
        Command::Gateway(options) => return gateway::gateway(options, places, on).await,
        command => command,
    };
    // Before a node is started: it would not wait so long for something to do.
    let built = match &command {
        Command::Kernel(options) => kernel_build::prepare(&options.command).await?,
        _ => None,
    };
    let client = connect::or_start(places).await?;
    if let Some(built) = built {
        return kernel_build::add(&client, built).await;
    }
    let result = match command {
        Command::Bench(options) => bench_command::bench(&client, places, &options.command).await,
        Command::Deploy(options) => deploy_command::deploy(&client, &options, on).await,
        Command::Run(options) if options.replicas_agree.is_some() => {
            if on.as_deref().is_some_and(|node| node != place::ANY) {
                return Err(Failure::new(
                    "--replicas-agree asks several nodes, and --on names one",
                )
                .hint("leave --on out; --region and --capable narrow the choice")
                .code(2));
            }
            replicas::run(&client, &options).await
        }
        command => {
            let (target, on) = match (&command, on) {
                (Command::Run(options), on)
                    if on.as_deref() == Some(place::ANY)
                        || (on.is_none() && options.place.any()) =>
                {
                    place::place(&client, options).await?
                }
                (_, Some(node)) if node == place::ANY => {
                    return Err(Failure::new("--on any is for `vistara run`")
                        .hint("`vistara nodes` lists the nodes to choose from"));
                }
                (Command::Run(options), Some(_)) if options.place.any() => {
                    return Err(Failure::new(
                        "--on says which node, and the other options how one is to be chosen",
                    )
                    .hint("leave out either, or say --on any")
                    .code(2));
                }
                (_, Some(node)) => (client.on(&node), Some(node)),
                (_, None) => (client.clone(), None),
            };
            let done = with_node(command, &target, begin.elapsed()).await;
            match &on {
                Some(node) => done.map_err(|failure| failure.on(node)),
                None => done,
            }
        }
    };
    connect::warn_of_other_version(&client);
    result
}

/// Whether a command is about this node itself.
fn is_local(command: &Command) -> bool {
    matches!(
        command,
        Command::Version(_)
            | Command::Node(_)
            | Command::Relay(_)
            | Command::Nodes(_)
            | Command::Id(_)
            | Command::Grant(_)
            | Command::Service(_)
            | Command::Task(_)
            | Command::Bench(_)
            | Command::Completion(_)
    )
}

async fn with_node(
    command: Command,
    client: &Client,
    connect_time: std::time::Duration,
) -> Result<u8, Failure> {
    match command {
        Command::Run(options) => run_command::run(client, &options, connect_time).await,
        Command::Explain(options) => run_command::explain(client, &options).await,
        Command::Ps(options) => machine_commands::ps(client, &options).await,
        Command::Logs(options) => logs_command::logs(client, &options).await,
        Command::Attach(options) => exec_command::attach(client, &options).await,
        Command::Exec(options) => exec_command::exec(client, &options).await,
        Command::Cp(options) => copy::cp(client, &options).await,
        Command::Stop(options) => machine_commands::stop(client, &options).await,
        Command::Kill(options) => machine_commands::kill(client, &options).await,
        Command::Pause(options) => machine_commands::pause(client, &options).await,
        Command::Resume(options) => machine_commands::resume(client, &options).await,
        Command::Fork(options) => snapshot_commands::fork(client, &options).await,
        Command::Snapshot(options) => snapshot_commands::snapshot(client, &options.command).await,
        Command::Rm(options) => machine_commands::rm(client, &options).await,
        Command::Inspect(options) => machine_commands::inspect(client, &options).await,
        Command::Stats(options) => stats_command::stats(client, &options).await,
        Command::Wait(options) => machine_commands::wait(client, &options).await,
        Command::Receipt(options) => receipt_commands::receipt(client, &options).await,
        Command::Images(options) => image_commands::images(client, options).await,
        Command::Pull(options) => image_commands::pull(client, &options).await,
        Command::Rmi(options) => image_commands::remove(client, &options).await,
        Command::Tag(options) => image_commands::tag(client, &options).await,
        Command::Import(options) => image_commands::import(client, &options).await,
        Command::Kernel(options) => kernel_commands::kernel(client, &options.command).await,
        Command::Template(options) => template_commands::template(client, &options.command).await,
        Command::Volume(options) => volume_commands::volume(client, &options.command).await,
        Command::Service(options) => service_commands::service(client, &options.command).await,
        Command::Task(options) => task_commands::task(client, &options.command).await,
        Command::Doctor(options) => doctor_command::doctor(client, &options).await,
        Command::Nodes(options) => mesh_commands::nodes(client, &options).await,
        Command::Id(options) => mesh_commands::id(client, &options).await,
        Command::Grant(options) => mesh_commands::grant(client, *options).await,
        // Done before: they choose their node themselves, or need none.
        Command::Bench(_)
        | Command::Completion(_)
        | Command::Version(_)
        | Command::Node(_)
        | Command::Relay(_)
        | Command::Deploy(_)
        | Command::Gateway(_)
        | Command::Spawn(_)
        | Command::Cluster(_) => Ok(0),
    }
}

/// `vistara version`: starts no node for it.
async fn version(json: bool, places: &Places) -> Result<u8, Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let node = match connect::running(places).await? {
        Some(client) => Some(client.version().await?),
        None => None,
    };
    if json {
        output::print_json(&serde_json::json!({
            "version": own,
            "api": vistara_api::API_VERSION,
            "node": node,
        }))?;
    } else {
        let node = match node {
            Some(node) => format!(
                "{} (interface {}, pid {})",
                node.version, node.api, node.pid
            ),
            None => "not running".to_owned(),
        };
        output::print(&format!(
            "vistara {own} (interface {})\nnode    {node}\n",
            vistara_api::API_VERSION
        ))?;
    }
    Ok(0)
}
