//! `vistara task …`: programs that are run to their end on one of several nodes, whichever of them die.

use crate::failure::{Failure, TASK_LOST, eprint_line};
use crate::listing::{self, Form};
use crate::logs_command;
use crate::output::{print, print_json};
use crate::program_options::{HERE, ProgramOptions};
use crate::service_commands::{keepers, remove_all};
use crate::text::{short_id, visible};
use clap::{Args, Subcommand};
use std::time::Duration;
use vistara_api::{Client, CreateTaskRequest, Task, TaskSemantics, TaskState};

/// How often a task that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// `task`.
#[derive(Debug, Args)]
pub(crate) struct TaskOptions {
    #[command(subcommand)]
    pub(crate) command: TaskCommand,
}

/// `task …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TaskCommand {
    /// Have a program run to its end on this node or one of those that have given it a grant, and wait for that
    Run(Box<RunTaskOptions>),
    /// List tasks
    #[command(visible_alias = "list")]
    Ls {
        /// Names only
        #[arg(short, long)]
        quiet: bool,
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show a task as JSON
    Inspect {
        /// By name, id or beginning of its id
        #[arg(value_name = "TASK")]
        task: String,
    },
    /// Wait for a task's end, and end with its exit code
    Wait {
        /// By name, id or beginning of its id
        #[arg(value_name = "TASK")]
        task: String,
    },
    /// End tasks that run, and forget them with their keys
    Rm {
        /// By name, id or beginning of their ids
        #[arg(required = true, value_name = "TASK")]
        tasks: Vec<String>,
    },
}

impl TaskCommand {
    /// Whether its exit code is the program's.
    pub(crate) fn passes_exit_code(&self) -> bool {
        match self {
            TaskCommand::Run(_) | TaskCommand::Wait { .. } => true,
            TaskCommand::Ls { .. } | TaskCommand::Inspect { .. } | TaskCommand::Rm { .. } => false,
        }
    }
}

/// `task run`.
#[derive(Debug, Args)]
#[command(override_usage = "vistara task run [OPTIONS] IMAGE [--] [COMMAND [ARGUMENT]...]")]
pub(crate) struct RunTaskOptions {
    /// Should its node be lost, report the task lost and never begin it again; this is how it is unless said otherwise
    #[arg(long, conflicts_with = "at_least_once")]
    pub(crate) at_most_once: bool,
    /// Should its node be lost, run it again elsewhere, until it has ended once
    #[arg(long)]
    pub(crate) at_least_once: bool,
    /// Idempotency key: asked for again with it, the same task is found and not run a second time, until a day after its end
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Its name: lower-case letters, digits and '-'; made up from the image's where not given
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Return at once with the task's name
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// The task as JSON: with -d instead of its name, otherwise after its end instead of what it printed
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) program: ProgramOptions,
}

/// `vistara task`.
pub(crate) async fn task(client: &Client, command: &TaskCommand) -> Result<u8, Failure> {
    match command {
        TaskCommand::Run(options) => run(client, options).await,
        TaskCommand::Ls { quiet, json } => list(&client.tasks().await?, Form::of(*quiet, *json)),
        TaskCommand::Inspect { task } => {
            print_json(&client.task(task).await?)?;
            Ok(0)
        }
        TaskCommand::Wait { task } => code(&ended(client, task, true).await?),
        TaskCommand::Rm { tasks } => {
            remove_all(tasks, async |typed| client.remove_task(typed).await).await
        }
    }
}

async fn run(client: &Client, options: &RunTaskOptions) -> Result<u8, Failure> {
    let mut program = options.program.read(client).await?;
    // Its name is made up from this one.
    if let Some(named) = program.named {
        program.machine.image = named;
    }
    let request = CreateTaskRequest {
        name: options.name.clone(),
        semantics: match options.at_least_once {
            true => TaskSemantics::AtLeastOnce,
            false => TaskSemantics::AtMostOnce,
        },
        key: options.key.clone(),
        machine: program.machine,
        nodes: program.nodes,
        policy: program.policy,
        rules: program.rules,
        regions: options.program.place.region.clone(),
        capabilities: options.program.place.capable.clone(),
        price_micros_max: options.program.place.max_price,
    };
    let task = client.create_task(&request).await?;
    if options.detach {
        match options.json {
            true => print_json(&task)?,
            false => print(&format!("{}\n", visible(&task.name, false)))?,
        }
        return Ok(0);
    }
    let quiet = options.program.quiet;
    let task = ended(client, &task.id, quiet).await?;
    match options.json {
        true => print_json(&task)?,
        false => show_output(client, &task, quiet).await?,
    }
    code(&task)
}

/// Waits until a task is over, and says on standard error what becomes of it.
async fn ended(client: &Client, typed: &str, quiet: bool) -> Result<Task, Failure> {
    let mut said = String::new();
    loop {
        let task = client.task(typed).await.map_err(|error| {
            let failure = Failure::from(error);
            match failure.lost {
                true => failure.hint("the task goes on; wait for it again: vistara task wait TASK"),
                false => failure,
            }
        })?;
        match task.state {
            TaskState::Done | TaskState::Lost => return Ok(task),
            TaskState::Waiting | TaskState::Running => {}
        }
        let words = how(&task);
        if words != said && !quiet {
            eprint_line(&visible(&format!("{}: {words}", task.name), false));
            said = words;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What the command line ends with.
fn code(task: &Task) -> Result<u8, Failure> {
    match (task.state, task.exit_code) {
        (TaskState::Done, Some(code)) => Ok(code),
        (TaskState::Lost, _) => Err(Failure::new(format!(
            "the task {} is lost: its node is, it may have begun, and nobody knows how it went; it is not run again",
            task.name
        ))
        .hint("see what it has done before you ask for it anew; --at-least-once has a task run again by itself")
        .code(TASK_LOST)),
        (TaskState::Done | TaskState::Waiting | TaskState::Running, _) => Err(Failure::new(
            format!("the task {} is not over, or without an exit code", task.name),
        )),
    }
}

/// What a task printed, in one piece after its end: where it ran may change until then.
async fn show_output(client: &Client, task: &Task, quiet: bool) -> Result<(), Failure> {
    let (Some(node), Some(machine)) = (&task.node, &task.machine) else {
        if !quiet && task.state == TaskState::Done {
            eprint_line(
                "vistara: what the task printed cannot be had: its node does not answer, or its machine is removed",
            );
        }
        return Ok(());
    };
    let shown = match node.life == HERE {
        true => logs_command::printed(client, machine).await,
        false => logs_command::printed(&client.on(&node.id), machine).await,
    };
    match shown {
        Err(failure) if failure.code.is_none() => {
            // The task is done all the same.
            let words = failure.on(&node.name).message;
            eprint_line(&format!(
                "vistara: what the task printed cannot be had: {}",
                visible(&words, false)
            ));
            Ok(())
        }
        shown => shown,
    }
}

/// How it is, in words.
fn how(task: &Task) -> String {
    let on = task.node.as_ref().map_or("-", |node| &node.name);
    let words = match (task.state, task.exit_code) {
        (TaskState::Waiting, _) => "waiting".to_owned(),
        (TaskState::Running, _) => format!("running on {on}"),
        (TaskState::Done, Some(code)) => format!("done ({code})"),
        (TaskState::Done, None) => "done".to_owned(),
        (TaskState::Lost, _) => "lost".to_owned(),
    };
    match &task.message {
        Some(message) => format!("{words}: {message}"),
        None => words,
    }
}

fn list(tasks: &[Task], form: Form) -> Result<u8, Failure> {
    let head = [
        "NAME",
        "ID",
        "STATE",
        "NODE",
        "ATTEMPT",
        "SEMANTICS",
        "KEEPERS",
        "OWNER",
    ];
    listing::list(
        tasks,
        form,
        |task| &task.name,
        &head,
        |task| {
            let node = task.node.as_ref().map(|node| node.name.clone());
            vec![
                task.name.clone(),
                short_id(&task.id).to_owned(),
                how(task),
                node.unwrap_or_else(|| "-".to_owned()),
                task.attempt.to_string(),
                match task.semantics {
                    TaskSemantics::AtMostOnce => "at-most-once".to_owned(),
                    TaskSemantics::AtLeastOnce => "at-least-once".to_owned(),
                },
                match task.unattended {
                    true => "nobody answers".to_owned(),
                    false => keepers(&task.keepers),
                },
                match task.own {
                    true => HERE.to_owned(),
                    false => short_id(&task.owner).to_owned(),
                },
            ]
        },
    )
}
