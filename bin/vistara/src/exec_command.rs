//! `vistara exec` and `vistara attach`: the streams of a program in a machine that runs already.

use crate::arguments::{AttachOptions, ExecOptions};
use crate::failure::{Failure, OWN_FAULT, eprint_line};
use crate::run_options::{add_term, callers, environment_of, head_and_command};
use crate::session::signals::Signals;
use crate::session::{self, End, Plan, Subject, terminal};
use std::io::IsTerminal;
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{AttachRequest, Client, ClientError, ErrorKind, ExecRequest};

/// `vistara exec`.
pub(crate) async fn exec(client: &Client, options: &ExecOptions) -> Result<u8, Failure> {
    let (machine, command) = head_and_command(&options.words);
    if command.is_empty() {
        return Err(
            Failure::new("exec: which command? It comes after the machine").hint(format!(
                "`vistara exec -it {machine} sh` opens a shell where the image has one"
            )),
        );
    }
    let on_terminal = terminal::stdin_is_terminal();
    let mut env = environment_of(&options.env_file, &options.env, &callers)?;
    if options.tty {
        add_term(&mut env, &callers);
    }
    let request = ExecRequest {
        command: command.to_vec(),
        env,
        user: options.user.clone(),
        working_dir: options.workdir.clone(),
        tty: options.tty.then(terminal::size),
        stdin: options.interactive && !options.detach,
    };
    let mut streams = client.exec(machine, &request).await?;
    if options.detach {
        return match streams.output.next().await? {
            Some(StreamItem::Event(StreamEvent::Failed { error })) => Err(Failure::refused(&error)),
            _ => Ok(0),
        };
    }
    let mut signals =
        Signals::install().map_err(|error| Failure::because("cannot start", error))?;
    let raw = options.tty && options.interactive && on_terminal;
    let plan = Plan {
        subject: Subject::Executed,
        machine: machine.to_owned(),
        stdin: request.stdin,
        raw,
        resize: options.tty && (raw || std::io::stdout().is_terminal()),
        quiet: false,
        detail: false,
        console: false,
        count: false,
    };
    let report = session::follow(client, streams, plan, &mut signals, None).await?;
    if let End::Exited {
        message: Some(message),
        ..
    } = &report.end
    {
        terminal::notice(message);
    }
    report.exit_code(machine)
}

/// `vistara attach`.
pub(crate) async fn attach(client: &Client, options: &AttachOptions) -> Result<u8, Failure> {
    let detail = client.machine(&options.machine).await?;
    if detail.machine.state == "ended" {
        return Err(Failure::new(format!(
            "cannot attach to {}: it has ended",
            options.machine
        ))
        .hint(format!(
            "`vistara logs {}` shows what it printed",
            options.machine
        ))
        .code(OWN_FAULT));
    }
    let mut request = AttachRequest {
        from_start: options.from_start,
        stdin: !options.no_stdin,
        receipt: false,
    };
    let mut signals =
        Signals::install().map_err(|error| Failure::because("cannot start", error))?;
    let streams = match client.attach(&detail.machine.id, &request).await {
        // Its input is closed, or somebody else has it: its output can be had all the same.
        Err(ClientError::Refused(body)) if request.stdin && body.kind == ErrorKind::Conflict => {
            terminal::notice(&format!("{}; attaching without input", body.message));
            request.stdin = false;
            client.attach(&detail.machine.id, &request).await?
        }
        result => result?,
    };
    let raw = detail.tty && request.stdin && terminal::stdin_is_terminal();
    let plan = Plan {
        subject: Subject::Attached,
        machine: detail.machine.id.clone(),
        stdin: request.stdin,
        raw,
        resize: detail.tty && (raw || std::io::stdout().is_terminal()),
        quiet: false,
        detail: false,
        console: false,
        count: false,
    };
    let report = session::follow(client, streams, plan, &mut signals, None).await?;
    match &report.end {
        End::Exited {
            message: Some(message),
            ..
        } => terminal::notice(message),
        End::Detached => eprint_line("\ndetached"),
        End::Exited { message: None, .. }
        | End::Failed(_)
        | End::OutputClosed(_)
        | End::Left(_)
        | End::Lost(_) => {}
    }
    report.exit_code(&detail.machine.name)
}
