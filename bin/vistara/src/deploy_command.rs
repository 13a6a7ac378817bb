//! `vistara deploy`: a machine as a `hac.toml` describes it, under the file's name. Deployed again, it is left alone where nothing
//! changed, and replaced where something did.
//!
//! What the file says becomes the words of a `vistara run -d`, which is what then happens, so that there is one meaning of
//! each option. What was deployed is told by two labels of the machine ([`plan`]). Nothing is remembered here.

mod plan;

use crate::failure::{Failure, eprint_line};
use crate::forward;
use crate::hac::{self, Hac};
use crate::output::{print, print_json};
use crate::place::{self, PlaceOptions};
use crate::published;
use crate::run_command;
use crate::run_options::{ImageSource, PullPolicy, RunOptions, checked};
use crate::text::{command_line, visible};
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use plan::{CONTENT, NAME, State, content, plan};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vistara_api::{Client, ErrorKind, Machine, RunRequest, StopRequest};
use vistara_model::{Hypervisor, MachineName};

/// How long another node has to say whether it has the machine: with `--on any` all are asked at once.
const ASK_TIME_MAX: Duration = Duration::from_secs(5);
/// How many nodes are asked whether they have it; a user with grants of more names the node.
const NODES_ASKED_MAX: usize = 64;

/// `deploy`.
#[derive(Debug, Args)]
pub(crate) struct DeployOptions {
    /// Say what would be done, and which `vistara run` it is, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Say on standard error which hypervisor and which node were chosen, and why
    #[arg(long)]
    pub(crate) explain: bool,
    /// The outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress and no notices
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Replace the machine of this name also where nothing changed, or where it was not deployed
    #[arg(long)]
    pub(crate) replace: bool,
    /// Name of the machine, instead of the file's
    #[arg(long, value_parser = checked::<MachineName>)]
    pub(crate) name: Option<String>,
    /// Publish a port: [ADDRESS:]HOST:GUEST[/udp], or GUEST alone for any free host port
    #[arg(short, long = "publish", alias = "ports", value_name = "PORTS")]
    pub(crate) publish: Vec<String>,
    /// Environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME[=value]")]
    pub(crate) env: Vec<String>,
    /// Environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// What runs it: auto, firecracker, nanovms or qemu
    #[arg(long, value_name = "NAME", value_parser = checked::<Hypervisor>)]
    pub(crate) hypervisor: Option<String>,
    /// When to fetch the image; with `always`, an image that has changed is a change
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub(crate) pull: PullPolicy,
    /// How long the program of the machine that is replaced has to end by itself: seconds, or 500ms, 1m (default 10 s)
    #[arg(short, long, value_name = "TIME", value_parser = crate::arguments::duration)]
    pub(crate) time: Option<Duration>,
    #[command(flatten)]
    pub(crate) place: PlaceOptions,
    /// The file
    #[arg(value_name = "FILE", default_value = "hac.toml")]
    pub(crate) file: PathBuf,
}

/// `vistara deploy`. `on` is what `--on` says.
pub(crate) async fn deploy(
    local: &Client,
    options: &DeployOptions,
    on: Option<String>,
) -> Result<u8, Failure> {
    let hac = read(&options.file)?;
    if !options.quiet {
        for note in &hac.notes {
            let file = options.file.display();
            let text = format!("{file}:{}: {}", note.line, note.text);
            eprint_line(&format!("vistara: {}", visible(&text, false)));
        }
    }
    let name = name(&hac, options)?;
    let run = run_options(&words(&hac, &name, options, Shown::Whole)?)?;
    let (client, node, existing) = target(local, options, &run, &name, on).await?;
    let done = on_node(&client, options, &hac, &name, run, existing).await;
    let (state, machine) = match &node {
        Some(node) => done.map_err(|failure| failure.on(node))?,
        None => done?,
    };
    report(&client, options, &hac, &name, node, state, machine).await?;
    Ok(0)
}

fn read(file: &Path) -> Result<Hac, Failure> {
    let what = || format!("cannot read {}", file.display());
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|opened| {
            opened
                .take(hac::FILE_BYTES_MAX as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(|error| {
            Failure::because(what(), error).hint("`vistara deploy FILE` names another one")
        })?;
    if bytes.len() > hac::FILE_BYTES_MAX {
        return Err(Failure::because(
            what(),
            format!("it has more than {} bytes", hac::FILE_BYTES_MAX),
        ));
    }
    let text = String::from_utf8(bytes).map_err(|_| Failure::because(what(), "it is not UTF-8"))?;
    hac::read(&text).map_err(|fault| {
        let place = match fault.line {
            Some(line) => format!("{}:{line}", file.display()),
            None => file.display().to_string(),
        };
        Failure {
            hint: fault.hint,
            ..Failure::because(place, fault.message)
        }
    })
}

fn name(hac: &Hac, options: &DeployOptions) -> Result<String, Failure> {
    let hint = "give it one, with `vistara deploy --name NAME` or name = \"…\" below [spacecore]";
    match (&options.name, &hac.name) {
        (Some(name), _) => Ok(name.clone()),
        (None, Some(name)) => hac::machine_name(name).ok_or_else(|| {
            Failure::new(format!("no machine can have the name {name:?}")).hint(hint)
        }),
        (None, None) => {
            Err(Failure::new(format!("{} has no name", options.file.display())).hint(hint))
        }
    }
}

/// Whether values that may be secrets are in the words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Whole,
    WithoutValues,
}

/// The command line of the `vistara run` that it is.
fn words(
    hac: &Hac,
    name: &str,
    options: &DeployOptions,
    shown: Shown,
) -> Result<Vec<String>, Failure> {
    let mut words = vec!["vistara".to_owned(), "run".to_owned(), "-d".to_owned()];
    let mut option = |flag: &str, value: &str| words.push(format!("{flag}={value}"));
    option("--name", name);
    for (flag, value) in [
        ("--cpus", &hac.cpus),
        ("--memory", &hac.memory),
        ("--disk", &hac.disk),
        ("--stop-signal", &hac.stop_signal),
        ("--hypervisor", &options.hypervisor),
        ("--place", &options.place.place),
    ] {
        if let Some(value) = value {
            option(flag, value);
        }
    }
    for (label, value) in [
        (NAME, &hac.name),
        ("hac.description", &hac.description),
        ("hac.version", &hac.version),
    ] {
        if let Some(value) = value {
            option("--label", &format!("{label}={value}"));
        }
    }
    for port in &options.publish {
        option("--publish", port);
    }
    for variable in &options.env {
        match (shown, variable.split_once('=')) {
            (Shown::WithoutValues, Some((name, _))) => option("--env", &format!("{name}=…")),
            _ => option("--env", variable),
        }
    }
    for file in &options.env_file {
        let Some(file) = file.to_str() else {
            return Err(Failure::new(format!("{} is not UTF-8", file.display())));
        };
        option("--env-file", file);
    }
    for region in &options.place.region {
        option("--region", region);
    }
    for label in &options.place.capable {
        option("--capable", label);
    }
    if let Some(price) = options.place.max_price {
        option("--max-price", &price.to_string());
    }
    match options.pull {
        PullPolicy::Missing => {}
        PullPolicy::Always => option("--pull", "always"),
        PullPolicy::Never => option("--pull", "never"),
    }
    if !hac.command.is_empty() {
        option("--entrypoint", "");
    }
    if shown == Shown::Whole {
        for (given, flag) in [(options.quiet, "--quiet"), (options.explain, "--explain")] {
            if given {
                words.push(flag.to_owned());
            }
        }
    }
    words.push("--".to_owned());
    words.push(hac.image.clone());
    if !hac.command.is_empty() {
        words.push("--".to_owned());
        words.extend(hac.command.iter().cloned());
    }
    Ok(words)
}

fn run_options(words: &[String]) -> Result<RunOptions, Failure> {
    use clap::Parser;
    let line = crate::arguments::CommandLine::try_parse_from(words)
        .map_err(|error| Failure::new(error.to_string().trim_end().to_owned()))?;
    match line.command {
        crate::arguments::Command::Run(options) => Ok(*options),
        _ => Err(Failure::new("a deployment is a `vistara run`")),
    }
}

/// Where it goes, and what of this name is there.
async fn target(
    local: &Client,
    options: &DeployOptions,
    run: &RunOptions,
    name: &str,
    on: Option<String>,
) -> Result<(Client, Option<String>, Option<Machine>), Failure> {
    match on {
        Some(node) if node != place::ANY => {
            if options.place.any() {
                return Err(Failure::new(
                    "--on says which node, and the other options how one is to be chosen",
                )
                .hint("leave out either, or say --on any")
                .code(2));
            }
            let client = local.on(&node);
            let existing = named(&client, name)
                .await
                .map_err(|error| Failure::from(error).on(&node))?;
            Ok((client, Some(node), existing))
        }
        None if !options.place.any() => {
            let existing = named(local, name).await?;
            Ok((local.clone(), None, existing))
        }
        // Where it is deployed already is where it is deployed again.
        Some(_) | None => {
            let mut found = everywhere(local, name).await?;
            match (found.pop(), found.is_empty()) {
                (Some((client, node, machine)), true) => Ok((client, node, Some(machine))),
                (Some(_), false) => Err(Failure::new(format!(
                    "several nodes have a machine that is called {name}"
                ))
                .hint("say which one is meant, with --on NODE; without --on it is this node's")),
                (None, _) if options.dry_run => Ok((local.clone(), None, None)),
                (None, _) => {
                    let (client, node) = place::place(local, run).await?;
                    Ok((client, node, None))
                }
            }
        }
    }
}

/// The machine of exactly this name.
async fn named(client: &Client, name: &str) -> Result<Option<Machine>, vistara_api::ClientError> {
    let machines = client.machines(true).await?;
    Ok(machines.into_iter().find(|machine| machine.name == name))
}

/// Those of this name here and on the nodes that have given a grant and answer.
async fn everywhere(
    local: &Client,
    name: &str,
) -> Result<Vec<(Client, Option<String>, Machine)>, Failure> {
    let mut found: Vec<_> = named(local, name)
        .await?
        .map(|machine| (local.clone(), None, machine))
        .into_iter()
        .collect();
    let nodes = local.nodes().await?;
    let asked = nodes
        .into_iter()
        .filter(|node| node.grant.is_some() && node.state == "connected")
        .take(NODES_ASKED_MAX);
    let mut answers: FuturesUnordered<_> = asked
        .map(|node| async {
            let client = local.on(&node.id);
            let answer = tokio::time::timeout(ASK_TIME_MAX, named(&client, name)).await;
            (client, node.name.unwrap_or(node.id), answer)
        })
        .collect();
    while let Some((client, node, answer)) = answers.next().await {
        match answer {
            Ok(Ok(Some(machine))) => found.push((client, Some(node), machine)),
            Ok(Ok(None)) => {}
            Ok(Err(_)) | Err(_) => eprint_line(&format!(
                "vistara: {} does not say whether it has {name}",
                visible(&node, false)
            )),
        }
    }
    Ok(found)
}

async fn on_node(
    client: &Client,
    options: &DeployOptions,
    hac: &Hac,
    name: &str,
    run: RunOptions,
    existing: Option<Machine>,
) -> Result<(State, Option<Machine>), Failure> {
    let mut request = if options.dry_run {
        // Nothing is pulled or taken in.
        let run = RunOptions {
            pull: PullPolicy::Never,
            ..run_options(&words(hac, name, options, Shown::Whole)?)?
        };
        let mut request = run_command::request(&run)?;
        if let (ImageSource::Path(path), Some(machine)) =
            (ImageSource::parse(&request.image), &existing)
        {
            let text = format!(
                "{}: it is not looked at whether it has changed",
                path.display()
            );
            eprint_line(&format!("vistara: {}", visible(&text, false)));
            request.image = machine.image_id.clone();
        }
        request
    } else {
        run_command::prepare(client, &run).await?
    };
    let content = content(&request)?;
    request.labels.insert(CONTENT.to_owned(), content.clone());
    let image_id = match client.image(&request.image).await {
        Ok(image) => Some(image.id),
        Err(_) => None,
    };
    let state = plan(
        existing.as_ref(),
        &content,
        hac.name.as_deref(),
        image_id.as_deref(),
        options.replace,
    )?;
    if options.dry_run || state == State::Unchanged {
        if options.explain && state != State::Unchanged {
            explain_dry(client, &request).await?;
        }
        return Ok((state, existing));
    }
    // All that can be known beforehand is found out before the old machine goes.
    let explanation = run_command::with_image(client, &run, &request, async |request| {
        client.explain(request).await
    })
    .await?;
    if options.explain {
        eprint_line(run_command::explain_text(&explanation).trim_end());
    }
    if let Some(old) = &existing {
        retire(client, options, old).await?;
    }
    match run_command::launch(client, &run, &request).await {
        Ok(machine) => Ok((state, Some(machine))),
        Err(failure) if existing.is_some() => Err(Failure {
            message: format!(
                "{name} does not run: its old machine is gone, and the new one cannot start: {}",
                failure.message
            ),
            hint: failure
                .hint
                .or_else(|| Some(format!("`vistara logs {name}` may say more"))),
            ..failure
        }),
        Err(failure) => Err(failure),
    }
}

/// Takes the old machine down: its program is asked to end, and has its time.
async fn retire(client: &Client, options: &DeployOptions, old: &Machine) -> Result<(), Failure> {
    if old.state != "ended" {
        if !options.quiet {
            eprint_line(&format!(
                "stopping the machine that {} was",
                visible(&old.name, false)
            ));
        }
        let request = StopRequest {
            grace_ms: options
                .time
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            signal: None,
        };
        match client.stop(&old.id, &request).await {
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            // It may have ended meanwhile; if not, it is not removed either.
            Err(error)
                if error
                    .body()
                    .is_some_and(|body| body.kind == ErrorKind::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match client.remove_machine(&old.id, false).await {
        Ok(()) => Ok(()),
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(Failure::at(format!("cannot replace {}", old.name))(error)),
    }
}

fn is_gone(error: &vistara_api::ClientError) -> bool {
    error
        .body()
        .is_some_and(|body| body.kind == ErrorKind::NotFound)
}

async fn explain_dry(client: &Client, request: &RunRequest) -> Result<(), Failure> {
    match client.explain(request).await {
        Ok(explanation) => eprint_line(run_command::explain_text(&explanation).trim_end()),
        Err(error)
            if error
                .body()
                .is_some_and(|body| body.kind == ErrorKind::ImageNotFound) =>
        {
            eprint_line("the image is not here yet: nothing is known about what would run it");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

async fn report(
    client: &Client,
    options: &DeployOptions,
    hac: &Hac,
    name: &str,
    node: Option<String>,
    state: State,
    machine: Option<Machine>,
) -> Result<(), Failure> {
    let mut machine = machine;
    if let Some(machine) = &mut machine {
        forward::show(&forward::known(client).await, machine);
    }
    // A dry run's machine is the old one, whose addresses say nothing of the new one's.
    let told = machine.filter(|_| !options.dry_run || state == State::Unchanged);
    let addresses = told
        .as_ref()
        .map(|machine| published::addresses(&machine.ports))
        .unwrap_or_default();
    let url = published::url(&addresses, None);
    let command = match options.dry_run {
        true => {
            let mut words = words(hac, name, options, Shown::WithoutValues)?;
            if let Some(node) = &node {
                words.splice(1..1, ["--on".to_owned(), node.clone()]);
            }
            Some(command_line(&words))
        }
        false => None,
    };
    if options.json {
        let warnings: Vec<_> = hac
            .notes
            .iter()
            .map(|note| serde_json::json!({"line": note.line, "text": note.text}))
            .collect();
        return print_json(&serde_json::json!({
            "name": name,
            "state": state,
            "dry_run": options.dry_run,
            "command": command,
            "id": told.as_ref().map(|machine| &machine.id),
            "url": url,
            "ports": told.as_ref().map(|machine| &machine.ports),
            "image_id": told.as_ref().map(|machine| &machine.image_id),
            "node": node,
            "warnings": warnings,
        }));
    }
    if !options.quiet {
        let on = node.map_or_else(String::new, |node| format!(" on {}", visible(&node, false)));
        eprint_line(&format!("{name} {}{on}", state.words(options.dry_run)));
    }
    if let Some(command) = command {
        print(&format!("{}\n", visible(&command, false)))?;
    } else if let Some(machine) = &told {
        print(&format!("{}\n", machine.id))?;
        if let Some(url) = url {
            print(&format!("{url}\n"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
