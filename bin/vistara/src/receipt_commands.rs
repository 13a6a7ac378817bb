//! `vistara receipt MACHINE` and `vistara receipt verify FILE`.

use crate::failure::{Failure, OWN_FAULT, eprint_line};
use crate::output::{print, print_json};
use crate::receipts::{Check, Expected, Seen, ask, check_run, is_partial, signed_by};
use crate::session::{End, Report};
use crate::text::{command_line, visible};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use vistara_api::{Client, ErrorKind, Machine};
use vistara_model::{Digest, Receipt, ReceiptHow, ReceiptStream};

/// Bytes of a file that are read to be taken for a receipt: more than any has, so that the node says that it is too long.
const RECEIPT_BYTES_READ: u64 = 1 << 20;
/// Bytes of output that are hashed at once.
const PIECE: usize = 64 << 10;

/// `receipt`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct ReceiptOptions {
    #[command(subcommand)]
    pub(crate) command: Option<ReceiptCommand>,
    /// Machine that has ended, by id, name or beginning of its id
    #[arg(required = true)]
    machine: Option<String>,
    /// Write it to this file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// `receipt …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ReceiptCommand {
    /// Check a receipt: the signature, whose it is, and what else is asked for
    Verify(VerifyOptions),
}

/// `receipt verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyOptions {
    /// The receipt; - for standard input
    file: PathBuf,
    /// It must be of this node: a key, or a name or beginning of an id that `vistara nodes` lists
    #[arg(long, value_name = "KEY|NAME")]
    node: Option<String>,
    /// It must be of this image: the digest of its configuration (its id) or of its manifest
    #[arg(long, value_name = "DIGEST")]
    image: Option<Digest>,
    /// What the program printed must be what is in this file; - for standard input
    #[arg(long, value_name = "FILE")]
    stdout: Option<PathBuf>,
    /// The exit code must be this
    #[arg(long, value_name = "N")]
    exit: Option<u8>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// `vistara receipt`.
pub(crate) async fn receipt(client: &Client, options: &ReceiptOptions) -> Result<u8, Failure> {
    match (&options.command, &options.machine) {
        (Some(ReceiptCommand::Verify(options)), _) => verify(client, options).await,
        (None, Some(machine)) => {
            let text = client.receipt(machine).await?;
            match &options.output {
                Some(path) => write(path, &text)?,
                None => print(&text)?,
            }
            Ok(0)
        }
        (None, None) => Err(Failure::new("name a machine, or say `verify FILE`").code(2)),
    }
}

/// Writes a receipt to a file.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| {
        Failure::because(
            format!("cannot write the receipt to {}", path.display()),
            error,
        )
    })
}

/// Writes the run's receipt to a file, if it is one and fits what was seen. Where there is none the program's exit code is
/// not passed on: a script that asks for a receipt counts on it.
pub(crate) async fn keep(
    client: &Client,
    path: &Path,
    expected: &Expected,
    machine: &Machine,
    report: &Report,
) -> Result<(), Failure> {
    let exit_code = match &report.end {
        End::Exited { code, .. } => Some(*code),
        End::Failed(body) => body.exit_code,
        End::Detached | End::OutputClosed(_) | End::Left(_) | End::Lost(_) => None,
    };
    let Some(code) = exit_code else {
        let name = visible(&machine.name, false);
        let says = format!(
            "no receipt was written: the run was not followed to its end (`vistara receipt {name}` has it then, if the machine is kept)"
        );
        if let End::Detached = report.end {
            // Its code would be 0, as of one whose receipt was written.
            return Err(Failure::new(says).code(OWN_FAULT));
        }
        eprint_line(&format!("vistara: {says}"));
        return Ok(());
    };
    let done = match &report.receipt {
        Some(Ok(text)) => {
            let seen = Seen {
                node: client.node(),
                expected,
                exit_code,
                heard: &report.heard,
            };
            match check_run(client, text, &seen).await {
                Ok(receipt) => {
                    if is_partial(&receipt) {
                        eprint_line(
                            "vistara: by the receipt it is not known whether the output is complete",
                        );
                    }
                    write(path, text)
                }
                Err(failure) => Err(failure),
            }
        }
        Some(Err(why)) => Err(Failure::new(why.clone())),
        None => Err(Failure::new(
            "the node sent no receipt; it may be an older one",
        )),
    };
    done.map_err(|failure| Failure {
        message: format!(
            "the program ended with exit code {code}, but no receipt was written: {}",
            failure.message
        ),
        code: Some(OWN_FAULT),
        ..failure
    })
}

fn open(path: &Path) -> Result<Box<dyn Read>, Failure> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(std::io::stdin()));
    }
    match std::fs::File::open(path) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(unreadable(path, error)),
    }
}

fn unreadable(path: &Path, error: std::io::Error) -> Failure {
    Failure::because(format!("cannot read {}", path.display()), error)
}

fn digest_of(path: &Path) -> Result<Digest, Failure> {
    let (mut file, mut hash) = (open(path)?, Sha256::new());
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(Digest::from_sha256(hash.finalize().into())),
            Ok(count) => hash.update(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(path, error)),
        }
    }
}

async fn verify(client: &Client, options: &VerifyOptions) -> Result<u8, Failure> {
    if options.file.as_os_str() == "-"
        && (options.stdout.as_deref()).is_some_and(|path| path.as_os_str() == "-")
    {
        return Err(
            Failure::new("standard input cannot be both the receipt and the output").code(2),
        );
    }
    let mut bytes = Vec::new();
    (open(&options.file)?.take(RECEIPT_BYTES_READ))
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(&options.file, error))?;
    // What is no text is none of a receipt either; the node says so.
    let text = String::from_utf8_lossy(&bytes);
    let (mut verified, receipt) = match ask(client, &text, None).await {
        Ok(answer) => answer,
        // Only what the node says of the receipt itself.
        Err(failure) if failure.kind == Some(ErrorKind::User) => {
            let check = Check::new("receipt", false, failure.message);
            return tell(options.json, &[check], None);
        }
        Err(failure) => return Err(failure),
    };
    if let Some(node) = &options.node {
        // A name that is nobody's, or of several nodes, says nothing of the receipt: that is a failure and no answer.
        (verified, _) = ask(client, &text, Some(node)).await?;
    }
    let mut checks = vec![signed_by(&verified)];
    if let Some(node) = &options.node {
        let is = verified.is_node == Some(true);
        let says = match is {
            true => format!("it is of {node}"),
            false => format!("it is not of {node}, but of {}", verified.node),
        };
        checks.push(Check::new("node", is, says));
    }
    if let Some(image) = &options.image {
        checks.push(image_check(&receipt, image));
    }
    if let Some(path) = &options.stdout {
        checks.push(stdout_check(&receipt, path)?);
    }
    if let Some(code) = options.exit {
        let told = receipt.end.exit_code;
        let says = match told == code {
            true => format!("{told}, as asked"),
            false => format!("{told}, and not {code}"),
        };
        checks.push(Check::new("exit", told == code, says));
    }
    tell(options.json, &checks, Some(&receipt))
}

fn image_check(receipt: &Receipt, wanted: &Digest) -> Check {
    let request = &receipt.request;
    let says = if request.image_id == *wanted {
        return Check::new("image", true, "its configuration is the one asked for");
    } else if request.manifest.as_ref() == Some(wanted) {
        return Check::new("image", true, "its manifest is the one asked for");
    } else {
        match &request.manifest {
            Some(manifest) => format!(
                "another: its configuration is {}, its manifest {manifest}",
                request.image_id
            ),
            None => format!("another: its configuration is {}", request.image_id),
        }
    };
    Check::new("image", false, says)
}

fn stdout_check(receipt: &Receipt, path: &Path) -> Result<Check, Failure> {
    let found = digest_of(path)?;
    let output = &receipt.output;
    let name = path.display();
    let (holds, says) = match &output.stdout.digest {
        None => (false, "its digest is not in the receipt".to_owned()),
        Some(digest) if *digest != found => (
            false,
            format!("{name} is something else: {found}, and not {digest}"),
        ),
        Some(_) if output.complete => (true, format!("what is in {name}, and that is all of it")),
        Some(_) => (
            true,
            format!("what is in {name}; whether the program printed more is not known"),
        ),
    };
    Ok(Check::new("stdout", holds, says))
}

/// Says how all came out; the exit code.
fn tell(json: bool, checks: &[Check], receipt: Option<&Receipt>) -> Result<u8, Failure> {
    let good = checks.iter().all(|check| check.holds);
    if json {
        print_json(&serde_json::json!({
            "valid": good,
            "checks": checks,
            "receipt": receipt,
        }))?;
    } else {
        let mut text = String::new();
        for check in checks {
            let word = if check.holds { "yes" } else { "NO " };
            let says = visible(&check.says, false);
            text.push_str(&format!("{word} {:<10} {says}\n", check.check));
        }
        if let Some(receipt) = receipt {
            text.push_str(&summary(receipt));
        }
        print(&text)?;
    }
    Ok(if good { 0 } else { 1 })
}

fn time(ms: u64) -> String {
    let time = i64::try_from(ms).map(Timestamp::from_millisecond);
    match time {
        Ok(Ok(time)) => time.to_string(),
        Ok(Err(_)) | Err(_) => format!("{ms} ms after 1970"),
    }
}

fn stream(stream: &ReceiptStream) -> String {
    let digest = match &stream.digest {
        Some(digest) => digest.to_string(),
        None => "digest not known".to_owned(),
    };
    match stream.missing_bytes {
        0 => format!("{} bytes, {digest}", stream.bytes),
        missing => format!("{} bytes, {missing} more were lost, {digest}", stream.bytes),
    }
}

/// What a receipt says, in lines.
fn summary(receipt: &Receipt) -> String {
    let Receipt {
        request, ran, end, ..
    } = receipt;
    let how = match end.how {
        ReceiptHow::Exited => "the program ended",
        ReceiptHow::Signaled => "a signal ended the program",
        ReceiptHow::StartFailed => "the program could not be started",
        ReceiptHow::Stopped => "it was stopped",
        ReceiptHow::TimedOut => "its time was over",
        ReceiptHow::GuestPanic => "the guest's kernel panicked",
        ReceiptHow::MonitorFailed => "its monitor died",
    };
    let memory = match end.out_of_memory {
        true => ", out of memory",
        false => "",
    };
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "?".to_owned());
    let whom = match (&request.caller, &request.grant) {
        (Some(caller), Some(grant)) => format!("{caller}, under the grant {grant}"),
        (Some(caller), None) => caller.to_string(),
        (None, _) => "the node's owner".to_owned(),
    };
    let command = match &request.command {
        Some(words) => command_line(words),
        None => format!("not told; {}", request.command_digest),
    };
    let mut on = format!(
        "{} ({} {}, {}, {}, kernel {})",
        ran.hypervisor,
        ran.vmm,
        known(&ran.vmm_version),
        ran.accelerator,
        ran.payload,
        known(&ran.kernel)
    );
    if ran.undone {
        on.push_str("; it was tried as a unikernel before, which was undone");
    } else if ran.second_run {
        on.push_str("; it is a second run, and the first one's output is part of this one's");
    }
    let mut output = match receipt.output.complete {
        true => "complete",
        false => "whether that is all is not known",
    }
    .to_owned();
    if receipt.output.terminal {
        output.push_str("; a terminal: both streams are standard output");
    }
    if receipt.output.merged {
        output.push_str("; standard error is part of standard output");
    }
    let usage = &receipt.usage;
    let cpu = match usage.cpu_ms {
        Some(ms) => format!("{ms} ms of processor time"),
        None => "processor time not known".to_owned(),
    };
    let held = match usage.memory_peak_bytes.or(usage.memory_bytes) {
        Some(bytes) => format!(", {} MiB of memory", bytes >> 20),
        None => String::new(),
    };
    let rows = [
        ("machine", receipt.machine.to_string()),
        ("asked by", whom),
        ("image", format!("{} ({})", request.image, request.image_id)),
        ("command", command),
        ("ran on", on),
        ("end", format!("exit code {}: {how}{memory}", end.exit_code)),
        ("stdout", stream(&receipt.output.stdout)),
        ("stderr", stream(&receipt.output.stderr)),
        ("output", output),
        ("usage", format!("{} ms; {cpu}{held}", usage.run_ms)),
        (
            "time",
            format!(
                "asked {}, over {}",
                time(receipt.times.asked_ms),
                time(receipt.times.ended_ms)
            ),
        ),
    ];
    let mut text = String::new();
    for (name, value) in rows {
        text.push_str(&format!("    {name:<10} {}\n", visible(&value, false)));
    }
    text
}
