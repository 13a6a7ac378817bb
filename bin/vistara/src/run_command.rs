//! `vistara run` and `vistara explain`: from a command line to a program that runs, and to its exit code.

use crate::environment;
use crate::failure::{Failure, eprint_line};
use crate::forward;
use crate::image_commands;
use crate::image_transfer;
use crate::output::{print, print_json};
use crate::receipt_commands;
use crate::receipts::Expected;
use crate::run_options::{ImageSource, PullPolicy, RunOptions, Surroundings, callers};
use crate::session::signals::{Came, Signals};
use crate::session::{self, End, Plan, Report, Subject, terminal};
use crate::text::{command_line, table, visible};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{
    AttachRequest, Client, ClientError, ErrorKind, Explanation, Machine, PullRequest, RunRequest,
    StopRequest, Timing,
};
use vistara_model::Bytes;

/// Machines of ours whose start was interrupted get this long to end.
const INTERRUPTED_GRACE: Duration = Duration::from_secs(3);

/// `vistara run`.
pub(crate) async fn run(
    client: &Client,
    options: &RunOptions,
    connect_time: Duration,
) -> Result<u8, Failure> {
    let request = prepare(client, options).await?;
    if options.explain {
        let explanation = with_image(client, options, &request, async |request| {
            client.explain(request).await
        })
        .await?;
        eprint_line(explain_text(&explanation).trim_end());
    }
    if options.detach {
        detached(client, options, &request).await
    } else {
        foreground(client, options, &request, connect_time).await
    }
}

/// `vistara explain`.
pub(crate) async fn explain(client: &Client, options: &RunOptions) -> Result<u8, Failure> {
    let request = prepare(client, options).await?;
    let explanation = with_image(client, options, &request, async |request| {
        client.explain(request).await
    })
    .await?;
    if options.json {
        print_json(&explanation)?;
    } else {
        print(&explain_text(&explanation))?;
    }
    Ok(0)
}

/// The request, with the image as typed.
pub(crate) fn request(options: &RunOptions) -> Result<RunRequest, Failure> {
    // An input that is at its end from the start is none, and who names a unikernel knows that it has none: neither is a
    // reason against one.
    let implied = !terminal::stdin_is_terminal()
        && !terminal::stdin_is_null()
        && options.hypervisor.as_deref() != Some("nanovms");
    let stdin = !options.no_stdin && (options.interactive || implied);
    options.request(&Surroundings {
        variable: &callers,
        working_dir: std::env::current_dir().unwrap_or_else(|_| "/".into()),
        terminal: if options.tty {
            terminal::size()
        } else {
            vistara_api::TerminalSize {
                rows: 24,
                columns: 80,
            }
        },
        // A detached program's input is for those who attach later, and only where it was asked for.
        stdin: if options.detach {
            options.interactive
        } else {
            stdin
        },
    })
}

/// The request, with the image at the node where it is a path or is always pulled.
pub(crate) async fn prepare(client: &Client, options: &RunOptions) -> Result<RunRequest, Failure> {
    let mut request = request(options)?;
    match ImageSource::parse(&request.image) {
        ImageSource::Path(path) => {
            let image = image_commands::import_path(client, &path, None, options.quiet).await?;
            request.image = image.id;
        }
        ImageSource::Named(name) if options.pull == PullPolicy::Always => {
            image_commands::pull_image(client, &pull_request(&name, options), options.quiet)
                .await?;
        }
        ImageSource::Named(_) => {}
    }
    Ok(request)
}

fn pull_request(image: &str, options: &RunOptions) -> PullRequest {
    PullRequest {
        image: image.to_owned(),
        insecure: options.insecure,
        docker_config_dir: environment::docker_config_dir()
            .map(|dir| dir.to_string_lossy().into_owned()),
    }
}

/// Whether it failed for want of an image that may be pulled.
fn may_pull(error: &ClientError, options: &RunOptions) -> bool {
    options.pull != PullPolicy::Never
        && error
            .body()
            .is_some_and(|body| body.kind == ErrorKind::ImageNotFound)
}

async fn fetch(client: &Client, options: &RunOptions, image: &str) -> Result<(), Failure> {
    // What is here need not come from a registry, which the other node may not even reach.
    if client.node().is_some()
        && image_transfer::send_own(client, image, options.quiet)
            .await?
            .is_some()
    {
        return Ok(());
    }
    if !options.quiet {
        eprint_line(&format!(
            "image {} is not here yet: pulling it",
            visible(image, false)
        ));
    }
    image_commands::pull_image(client, &pull_request(image, options), options.quiet).await?;
    Ok(())
}

/// Asks; where the image is not there, pulls it and asks again. So an image that is there costs no question.
pub(crate) async fn with_image<T>(
    client: &Client,
    options: &RunOptions,
    request: &RunRequest,
    ask: impl AsyncFn(&RunRequest) -> Result<T, ClientError>,
) -> Result<T, Failure> {
    match ask(request).await {
        Err(error) if may_pull(&error, options) => {
            fetch(client, options, &request.image).await?;
            Ok(ask(request).await?)
        }
        result => Ok(result?),
    }
}

async fn detached(
    client: &Client,
    options: &RunOptions,
    request: &RunRequest,
) -> Result<u8, Failure> {
    let machine = launch(client, options, request).await?;
    if options.json {
        print_json(&machine)?;
    } else {
        print(&format!("{}\n", machine.id))?;
    }
    Ok(0)
}

/// Makes a machine, publishes its ports, and comes back when its program runs, or could not.
pub(crate) async fn launch(
    client: &Client,
    options: &RunOptions,
    request: &RunRequest,
) -> Result<Machine, Failure> {
    let machine = with_image(client, options, request, async |request| {
        client.run(request).await
    })
    .await?;
    if let Err(failure) = forward::publish(client, request, &machine).await {
        return Err(abandon(client, &machine, failure).await);
    }
    // As docker, come back when the program runs, so that the next command may use it, or when it could not.
    started(client, machine).await
}

/// Waits until the program of a machine runs, or could not.
pub(crate) async fn started(client: &Client, machine: Machine) -> Result<Machine, Failure> {
    let mut streams = match client.attach(&machine.id, &AttachRequest::default()).await {
        Ok(streams) => streams,
        // It ran and is over, and was not to be kept.
        Err(error)
            if error
                .body()
                .is_some_and(|body| body.kind == ErrorKind::NotFound) =>
        {
            return Ok(machine);
        }
        Err(error) => return Err(error.into()),
    };
    loop {
        match streams.output.next().await? {
            Some(StreamItem::Event(StreamEvent::Started { machine })) => return Ok(*machine),
            Some(StreamItem::Event(StreamEvent::Failed { error })) => {
                return Err(Failure::refused(&error));
            }
            Some(StreamItem::Event(StreamEvent::Notice { message })) => terminal::notice(&message),
            // It never ran: the port was taken, the guest did not boot.
            Some(StreamItem::Event(StreamEvent::Exited {
                exit_code: 125,
                message: Some(message),
            })) => {
                return Err(Failure::refused(&vistara_api::ErrorBody {
                    kind: ErrorKind::Host,
                    message,
                    hint: None,
                    exit_code: Some(125),
                }));
            }
            Some(
                StreamItem::Event(StreamEvent::Exited { .. } | StreamEvent::Receipt { .. })
                | StreamItem::Stdout(_)
                | StreamItem::Stderr(_),
            )
            | None => return Ok(machine),
        }
    }
}

async fn foreground(
    client: &Client,
    options: &RunOptions,
    request: &RunRequest,
    connect_time: Duration,
) -> Result<u8, Failure> {
    if options.tty && options.interactive && !terminal::stdin_is_terminal() && !options.quiet {
        eprint_line(
            "vistara: standard input is not a terminal: -t gives the program one that cannot be typed on as usual",
        );
    }
    let mut request = request.clone();
    let expected = match &options.receipt {
        Some(_) => Some(Expected::of(&mut request)?),
        None => None,
    };
    let request = &request;
    // From here on a signal must not leave a machine behind that nobody knows of.
    let mut signals =
        Signals::install().map_err(|error| Failure::because("cannot start", error))?;
    let mut early = None;
    let mut asked_at = Instant::now();
    let mut asked = session::patiently(client.run(request), &mut signals, &mut early).await?;
    if let Err(error) = &asked
        && may_pull(error, options)
        && early.is_none()
    {
        tokio::select! {
            result = fetch(client, options, &request.image) => result?,
            number = first_end(&mut signals) => {
                return Err(Failure::silent(128u8.saturating_add(number)));
            }
        }
        asked_at = Instant::now();
        asked = session::patiently(client.run(request), &mut signals, &mut early).await?;
    }
    let machine = asked?;
    if let Err(failure) = forward::publish(client, request, &machine).await {
        return Err(abandon(client, &machine, failure).await);
    }
    let accepted_at = Instant::now();
    let attach = AttachRequest {
        from_start: true,
        stdin: request.stdin,
        receipt: expected.is_some(),
    };
    let attached = session::patiently(
        client.attach(&machine.id, &attach),
        &mut signals,
        &mut early,
    )
    .await;
    let streams = match attached {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => return Err(abandon(client, &machine, error.into()).await),
        Err(left) => return Err(abandon(client, &machine, left).await),
    };
    let raw = options.tty && options.interactive && terminal::stdin_is_terminal();
    let plan = Plan {
        subject: Subject::Own,
        machine: machine.id.clone(),
        stdin: request.stdin,
        raw,
        resize: options.tty && (raw || std::io::stdout().is_terminal()),
        quiet: options.quiet,
        detail: options.rm && (options.timings || options.json),
        console: options.console,
        count: expected.is_some(),
    };
    let mut report = session::follow(client, streams, plan, &mut signals, early).await?;
    let ended_at = Instant::now();
    after(options, &machine, &report);
    let clocks = Clocks {
        connect: connect_time,
        asked_at,
        accepted_at,
        ended_at,
    };
    summarize(client, options, &machine, &mut report, &clocks).await;
    if let (Some(path), Some(expected)) = (&options.receipt, &expected) {
        receipt_commands::keep(client, path, expected, &machine, &report).await?;
    }
    report.exit_code(&machine.name)
}

/// The number of the next signal that asks us to end.
pub(crate) async fn first_end(signals: &mut Signals) -> u8 {
    loop {
        if let Came::End(_, number) = signals.next().await {
            return number;
        }
    }
}

/// A machine that we cannot follow is not left behind unseen.
pub(crate) async fn abandon(client: &Client, machine: &Machine, failure: Failure) -> Failure {
    let request = StopRequest {
        grace_ms: Some(INTERRUPTED_GRACE.as_millis() as u64),
        signal: None,
    };
    match client.stop(&machine.id, &request).await {
        Ok(_) => failure,
        Err(_) => {
            let name = visible(&machine.name, false);
            failure.hint(format!("`vistara rm -f {name}` removes what is left of it"))
        }
    }
}

/// What there is to say when the program has ended.
fn after(options: &RunOptions, machine: &Machine, report: &Report) {
    match &report.end {
        End::Exited {
            message: Some(message),
            ..
        } => terminal::notice(message),
        End::Detached if !options.quiet => {
            let name = visible(&machine.name, false);
            eprint_line(&format!(
                "\ndetached; `vistara attach {name}` comes back, `vistara stop {name}` ends it"
            ));
        }
        End::Exited { message: None, .. }
        | End::Failed(_)
        | End::Detached
        | End::OutputClosed(_)
        | End::Left(_)
        | End::Lost(_) => {}
    }
}

struct Clocks {
    connect: Duration,
    asked_at: Instant,
    accepted_at: Instant,
    ended_at: Instant,
}

/// `--timings` and `--json`.
async fn summarize(
    client: &Client,
    options: &RunOptions,
    machine: &Machine,
    report: &mut Report,
    clocks: &Clocks,
) {
    if !options.timings && !options.json {
        return;
    }
    // With --rm it is gone by now, or soon: what was known at its start has the steps that led there.
    let detail = match report.detail.take() {
        Some(detail) => detail.await.ok().flatten(),
        None => client.machine(&machine.id).await.ok(),
    };
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let since = |at: Instant| ms(at.saturating_duration_since(clocks.asked_at));
    let mut steps = vec![
        Timing {
            step: "connect".to_owned(),
            begin_ms: -ms(clocks.connect),
            took_ms: ms(clocks.connect),
        },
        Timing {
            step: "accepted".to_owned(),
            begin_ms: 0.0,
            took_ms: since(clocks.accepted_at),
        },
    ];
    let in_node = detail.as_ref().map(|detail| detail.timings.clone());
    steps.extend(in_node.into_iter().flatten());
    for (step, at) in [
        ("program started", report.started_at),
        ("first output", report.first_output_at),
        ("over", Some(clocks.ended_at)),
    ] {
        if let Some(at) = at {
            steps.push(Timing {
                step: step.to_owned(),
                begin_ms: 0.0,
                took_ms: since(at),
            });
        }
    }
    let template = detail.as_ref().and_then(|detail| detail.template.clone());
    let warm = detail.as_ref().is_some_and(|detail| detail.warm);
    if options.timings {
        eprint_line(&match &template {
            Some(key) if warm => format!("warm, from the stock of template {key}"),
            Some(key) => format!("forked from template {key}"),
            None => "booted".to_owned(),
        });
        eprint_line(timings_text(&steps).trim_end());
    }
    if options.json {
        let last = detail
            .map(|detail| detail.machine)
            .or_else(|| report.machine.clone())
            .unwrap_or_else(|| machine.clone());
        let (exit_code, message) = match &report.end {
            End::Exited { code, message } => (Some(*code), message.clone()),
            End::Failed(body) => (body.exit_code, Some(body.message.clone())),
            End::Detached | End::OutputClosed(_) | End::Left(_) | End::Lost(_) => (None, None),
        };
        let summary = serde_json::json!({
            "id": last.id,
            "name": last.name,
            "image": last.image,
            "image_id": last.image_id,
            "exit_code": exit_code,
            "message": message,
            "choice": last.choice,
            "template": template,
            "warm": warm,
            "started_at": last.started_at,
            "ended_at": last.ended_at,
            "timings": steps,
        });
        eprint_line(&summary.to_string());
    }
}

fn timings_text(steps: &[Timing]) -> String {
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            vec![
                step.step.clone(),
                format!("{:>9.1}", step.begin_ms),
                format!("{:>9.1}", step.took_ms),
            ]
        })
        .collect();
    table(&["STEP", "BEGIN ms", "TOOK ms"], &rows)
}

pub(crate) fn explain_text(explanation: &Explanation) -> String {
    let choice = &explanation.choice;
    let mut text = format!(
        "hypervisor   {}\nmonitor      {}\npayload      {}\naccelerator  {}\nmemory       {}\ncommand      {}\nstart        {}\n",
        choice.hypervisor,
        choice.vmm,
        choice.payload,
        choice.accelerator,
        Bytes(explanation.memory_bytes),
        command_line(&explanation.command),
        explanation.start
    );
    for (index, reason) in choice.reasons.iter().enumerate() {
        let head = if index == 0 { "because" } else { "" };
        text.push_str(&format!("{head:<11}  {reason}\n"));
    }
    visible(&text, true)
}
