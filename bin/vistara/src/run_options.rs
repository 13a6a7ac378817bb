//! The options of `run` (and of `explain`), and the request they make.

use crate::arguments::duration;
use crate::environment;
use crate::failure::Failure;
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use vistara_api::{RunRequest, TerminalSize};
use vistara_model::{Bytes, Cpus, Hypervisor, MachineName, NamedVolume, PortMapping, VolumeMount};

/// Largest file of environment variables, in bytes; what a kernel passes to a program is smaller.
const ENV_FILE_BYTES_MAX: u64 = 4 << 20;

/// `run`.
#[derive(Debug, Args)]
#[command(override_usage = "vistara run [OPTIONS] IMAGE [--] [COMMAND [ARGUMENT]...]")]
pub(crate) struct RunOptions {
    /// Return at once with the machine's id; it goes on by itself
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Send standard input even from a terminal (a pipe or a file is sent anyway, see --no-stdin)
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Never send standard input
    #[arg(long, conflicts_with = "interactive")]
    pub(crate) no_stdin: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Name of the machine
    #[arg(long, value_parser = checked::<MachineName>)]
    pub(crate) name: Option<String>,
    /// CPUs, such as 2 or 0.5
    #[arg(long, value_name = "N", value_parser = checked::<Cpus>)]
    pub(crate) cpus: Option<String>,
    /// Memory, such as 512m
    #[arg(short, long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) memory: Option<String>,
    /// Size of the writable layer, such as 10g
    #[arg(long, value_name = "SIZE", value_parser = checked::<Bytes>)]
    pub(crate) disk: Option<String>,
    /// Environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME[=value]")]
    pub(crate) env: Vec<String>,
    /// Environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User in the guest: name or uid, with :group or :gid
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Program that gets the command as arguments, instead of the image's; "" for none
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Remove the machine when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Host directory in the guest; or, for a unikernel, a volume that the node keeps under a NAME without a slash
    #[arg(short, long = "volume", value_name = "HOSTDIR|NAME:GUESTDIR[:ro]")]
    pub(crate) volumes: Vec<String>,
    /// Host name in the guest
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Root file system read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Longest run, such as 30s or 5m; then the machine is stopped and the exit code is 124
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// When to fetch the image
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub(crate) pull: PullPolicy,
    /// No progress and no notices
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// With -d the machine as JSON; otherwise, after the end, a JSON summary as the last line of standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// What runs it: auto, firecracker, nanovms or qemu
    #[arg(long, value_name = "NAME", value_parser = checked::<Hypervisor>)]
    pub(crate) hypervisor: Option<String>,
    /// Say on standard error which hypervisor was chosen, and why
    #[arg(long)]
    pub(crate) explain: bool,
    /// Publish a port: [ADDRESS:]HOST:GUEST[/udp], or GUEST alone for any free host port
    #[arg(short, long = "publish", alias = "ports", value_name = "PORTS")]
    pub(crate) publish: Vec<String>,
    /// Network: user (outward through the host) or none
    #[arg(long, alias = "net", value_name = "NAME", value_parser = ["user", "none"])]
    pub(crate) network: Option<String>,
    /// Most bytes in a second through each disk, such as 20m
    #[arg(long, value_name = "BYTES")]
    pub(crate) disk_rate: Option<String>,
    /// Most reads and writes in a second of each disk
    #[arg(long, value_name = "N")]
    pub(crate) disk_ops: Option<u32>,
    /// Most bytes in a second through the network, each way (takes Firecracker)
    #[arg(long, value_name = "BYTES")]
    pub(crate) network_rate: Option<String>,
    /// Guest memory of the huge pages (2 MiB) that the host has set aside; the machine boots and cannot be forked
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// The guest's kernel tells on its console what it does, and that is shown on standard error before the program's output; the
    /// machine boots
    #[arg(long)]
    pub(crate) console: bool,
    /// Label
    #[arg(short, long = "label", value_name = "NAME[=value]")]
    pub(crate) labels: Vec<String>,
    /// Signal that asks the program to end
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Guest kernel, as `vistara kernel ls` names it
    #[arg(long, value_name = "KERNEL")]
    pub(crate) kernel: Option<String>,
    /// The program may be run a second time without harm: `auto` then tries a unikernel more readily
    #[arg(long)]
    pub(crate) retry_safe: bool,
    /// Boot the machine, even where it could be forked from a template
    #[arg(long)]
    pub(crate) no_template: bool,
    /// After the end, say on standard error how long each step of the start took
    #[arg(long)]
    pub(crate) timings: bool,
    /// After the end, write what the node signed about the run to this file; with --replicas-agree, into this directory what
    /// each node signed
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    pub(crate) receipt: Option<PathBuf>,
    /// Run it on N joined nodes, without input, and take the answer (exit code and standard output) that M of them agree on
    #[arg(
        long,
        value_name = "M/N",
        conflicts_with_all = ["detach", "tty", "interactive", "name", "publish", "volumes", "timings", "json"]
    )]
    pub(crate) replicas_agree: Option<crate::replicas::Quorum>,
    /// Speak plain HTTP to the registry
    #[arg(long)]
    pub(crate) insecure: bool,
    #[command(flatten)]
    pub(crate) place: crate::place::PlaceOptions,
    /// Image, and the command that replaces its own; everything after the image is the command's.
    /// The image may also be oci:DIR, oci-archive:FILE, docker-archive:FILE or rootfs:FILE
    #[arg(value_name = "IMAGE COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    pub(crate) words: Vec<String>,
}

/// `--pull`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    /// Every time.
    Always,
    /// Where it is not here.
    Missing,
    /// Not at all.
    Never,
}

/// Where the image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ImageSource {
    /// On the node or in a registry, by name.
    Named(String),
    /// A file or directory here.
    Path(PathBuf),
}

impl ImageSource {
    /// Reads the path forms; anything else is a name. The scheme is a promise of what is there; the node looks for
    /// itself.
    pub(crate) fn parse(text: &str) -> ImageSource {
        for scheme in ["oci-archive", "oci", "docker-archive", "rootfs"] {
            if let Some(path) = text
                .strip_prefix(scheme)
                .and_then(|rest| rest.strip_prefix(':'))
            {
                return ImageSource::Path(path.strip_prefix("//").unwrap_or(path).into());
            }
        }
        ImageSource::Named(text.to_owned())
    }
}

/// The first word, and the rest without a leading `--`.
pub(crate) fn head_and_command(words: &[String]) -> (&str, &[String]) {
    match words {
        [] => ("", &[]),
        [head, rest @ ..] => match rest {
            [dashes, rest @ ..] if dashes == "--" => (head, rest),
            rest => (head, rest),
        },
    }
}

/// What a request takes from its surroundings.
pub(crate) struct Surroundings<'a> {
    /// The caller's environment.
    pub(crate) variable: &'a dyn Fn(&str) -> Option<String>,
    /// Against which relative host paths count.
    pub(crate) working_dir: PathBuf,
    /// The terminal's size, asked for only with `-t`.
    pub(crate) terminal: TerminalSize,
    /// Whether standard input will be sent.
    pub(crate) stdin: bool,
}

impl RunOptions {
    /// The request, with the image as typed.
    pub(crate) fn request(&self, around: &Surroundings<'_>) -> Result<RunRequest, Failure> {
        let (image, command) = head_and_command(&self.words);
        let mut env = environment_of(&self.env_file, &self.env, around.variable)?;
        if self.tty {
            add_term(&mut env, around.variable);
        }
        Ok(RunRequest {
            image: image.to_owned(),
            command: command.to_vec(),
            entrypoint: self.entrypoint.as_ref().map(|program| {
                if program.is_empty() {
                    Vec::new()
                } else {
                    vec![program.clone()]
                }
            }),
            name: self.name.clone(),
            cpus: self.cpus.clone(),
            memory: self.memory.clone(),
            disk: self.disk.clone(),
            env,
            user: self.user.clone(),
            working_dir: self.workdir.clone(),
            hostname: self.hostname.clone(),
            read_only: self.read_only,
            volumes: each(&self.volumes, |text| volume(text, &around.working_dir))?,
            ports: each(&self.publish, port)?,
            network: self.network.clone(),
            tty: self.tty.then_some(around.terminal),
            stdin: around.stdin,
            auto_remove: self.rm,
            timeout_ms: self
                .timeout
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            hypervisor: self.hypervisor.clone(),
            stop_signal: self.stop_signal.clone(),
            kernel: self.kernel.clone(),
            no_template: self.no_template,
            retry_safe: self.retry_safe,
            disk_rate: self.disk_rate.clone(),
            disk_ops: self.disk_ops,
            network_rate: self.network_rate.clone(),
            huge_pages: self.huge_pages,
            console: self.console,
            labels: self
                .labels
                .iter()
                .map(|label| match label.split_once('=') {
                    Some((name, value)) => (name.to_owned(), value.to_owned()),
                    None => (label.clone(), String::new()),
                })
                .collect::<BTreeMap<_, _>>(),
            // Of who asks for a receipt.
            nonce: None,
            // A detached run attaches too, until the program runs or could not.
            attach: true,
        })
    }
}

fn each<T>(texts: &[String], read: impl Fn(&str) -> Result<T, Failure>) -> Result<Vec<T>, Failure> {
    texts.iter().map(|text| read(text)).collect()
}

/// An option whose text the model must be able to read; the node gets the text.
pub(crate) fn checked<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<String, String> {
    text.parse::<T>()
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

/// `HOST:GUEST[:OPTIONS]` with an absolute host path, or a volume's name as it is, which has no slash. Of docker's options, `z` and `Z` mean nothing here.
fn volume(text: &str, working_dir: &Path) -> Result<String, Failure> {
    let mut parts = text.splitn(3, ':');
    let (host, guest) = match (parts.next(), parts.next()) {
        (Some(host), Some(guest)) if !host.is_empty() => (host, guest),
        _ => {
            return Err(Failure::new(format!(
                "{text:?} is not a volume: write HOSTDIR:GUESTDIR or HOSTDIR:GUESTDIR:ro"
            )));
        }
    };
    let mut read_only = false;
    for option in parts.next().into_iter().flat_map(|all| all.split(',')) {
        match option {
            "ro" => read_only = true,
            "rw" | "z" | "Z" => {}
            other => {
                return Err(Failure::new(format!(
                    "{text:?} is not a volume: its option {other:?} is not ro or rw"
                )));
            }
        }
    }
    let mode = if read_only { ":ro" } else { "" };
    if !host.contains('/') && host != "." && host != ".." {
        let whole = format!("{host}:{guest}{mode}");
        return match whole.parse::<NamedVolume>() {
            Ok(_) => Ok(whole),
            Err(error) => Err(Failure::new(error.to_string())
                .hint(format!("for the directory, write ./{host}:{guest}"))),
        };
    }
    let host = working_dir.join(host);
    let host: PathBuf = host.components().collect();
    let Some(host) = host.to_str() else {
        return Err(Failure::new(format!("{text:?} is not UTF-8")));
    };
    let whole = format!("{host}:{guest}{mode}");
    match whole.parse::<VolumeMount>() {
        Ok(_) => Ok(whole),
        Err(error) => Err(Failure::new(error.to_string())),
    }
}

/// A published port; a bare guest port gets any free host port.
fn port(text: &str) -> Result<String, Failure> {
    let whole = if text.contains(':') {
        text.to_owned()
    } else {
        format!("0:{text}")
    };
    match whole.parse::<PortMapping>() {
        Ok(_) => Ok(whole),
        Err(_) => Err(Failure::new(
            vistara_model::SpecError::Port(text.to_owned()).to_string(),
        )),
    }
}

/// The environment of `--env-file` and `--env`, in this order, each as `NAME=value`; a name without a value takes the
/// caller's, and is left out where the caller has none.
pub(crate) fn environment_of(
    files: &[PathBuf],
    given: &[String],
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<String>, Failure> {
    let mut lines = Vec::new();
    for file in files {
        let what = || format!("cannot read --env-file {}", file.display());
        let mut text = String::new();
        std::fs::File::open(file)
            .and_then(|file| {
                use std::io::Read;
                file.take(ENV_FILE_BYTES_MAX).read_to_string(&mut text)
            })
            .map_err(|error| Failure::because(what(), error))?;
        lines.extend(
            text.lines()
                .map(|line| line.trim_start().to_owned())
                .filter(|line| !line.is_empty() && !line.starts_with('#')),
        );
    }
    lines.extend(given.iter().cloned());
    let mut env = Vec::new();
    for line in lines {
        let whole = match line.split_once('=') {
            Some(_) => line,
            None => match variable(&line) {
                Some(value) => format!("{line}={value}"),
                None => continue,
            },
        };
        if whole.starts_with('=') || whole.contains('\0') {
            return Err(Failure::new(
                vistara_model::SpecError::Env(whole).to_string(),
            ));
        }
        env.push(whole);
    }
    Ok(env)
}

/// A program with a terminal is told of which kind it is.
pub(crate) fn add_term(env: &mut Vec<String>, variable: &dyn Fn(&str) -> Option<String>) {
    if !env.iter().any(|line| line.starts_with("TERM=")) {
        let term = variable("TERM").unwrap_or_else(|| "xterm".to_owned());
        env.push(format!("TERM={term}"));
    }
}

/// The caller's environment, for [`Surroundings`].
pub(crate) fn callers(name: &str) -> Option<String> {
    environment::of_caller(name)
}
