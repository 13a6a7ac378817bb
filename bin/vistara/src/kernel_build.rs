//! `vistara kernel build`: our own guest kernel, built by this process and as its user, then added to the node as any file.

use crate::arguments::{BuildKernelOptions, Command, KernelCommand};
use crate::environment;
use crate::failure::{Failure, eprint_line};
use crate::output::print;
use crate::text::visible;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::error::Error as _;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;
use vistara_api::{AddKernelRequest, Client};
use vistara_node::own_kernel::{self, BuildError, BuildStep, BuiltKernel, OwnKernel};

/// Where it is no terminal, a line is printed each time that so many more per cent are done.
const PER_CENT_TOLD: u8 = 10;

/// A kernel that is ready to be added.
pub(crate) struct Ready {
    built: BuiltKernel,
    name: Option<String>,
    default: bool,
}

/// Whether the command builds a kernel, which is done on this host only.
pub(crate) fn is_build(command: &Command) -> bool {
    matches!(command, Command::Kernel(options) if matches!(options.command, KernelCommand::Build(_)))
}

/// Builds, if that is what is to be done.
pub(crate) async fn prepare(command: &KernelCommand) -> Result<Option<Ready>, Failure> {
    let KernelCommand::Build(options) = command else {
        return Ok(None);
    };
    if let Some(name) = &options.name {
        own_kernel::check_name(name)
            .map_err(|error| Failure::because("cannot name the kernel so", error))?;
    }
    let kernel = OwnKernel {
        cache: cache(options)?,
        jobs: options.jobs.map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            usize::from,
        ),
    };
    let built = tokio::task::spawn_blocking(move || {
        let mut view = View::new();
        let built = own_kernel::build(&kernel, &mut |step| view.show(&step));
        view.clear();
        built
    });
    let built = built
        .await
        .map_err(|error| Failure::because("the build broke off", error))?
        .map_err(|error| failure(&error))?;
    if !built.unknown_options.is_empty() {
        eprint_line(&format!(
            "note: {} does not know {} options by our names for them (other versions do)",
            built.source,
            built.unknown_options.len()
        ));
    }
    Ok(Some(Ready {
        built,
        name: options.name.clone(),
        default: options.default,
    }))
}

/// Adds what was built to the node.
pub(crate) async fn add(client: &Client, ready: Ready) -> Result<u8, Failure> {
    let text = |path: &std::path::Path| path.display().to_string();
    let request = AddKernelRequest {
        source: text(&ready.built.vmlinux),
        payload: None,
        name: ready.name,
        modules_dir: Some(text(&ready.built.modules)),
        klibs_dir: None,
        default: ready.default,
    };
    let kernel = client
        .add_kernel(&request)
        .await
        .map_err(Failure::at("cannot add the kernel"))?;
    let name = visible(&kernel.name, false);
    eprint_line(&if kernel.default {
        format!(
            "machines boot {name} from now on; another: vistara kernel default NAME, or run --kernel NAME"
        )
    } else {
        format!(
            "the default stays what it was: another kernel was chosen, or this one lacks a driver that some machines need; this one: vistara kernel default {name}, or run --kernel {name}"
        )
    });
    print(&format!("{name}\n"))?;
    Ok(0)
}

/// Where the build makes its `vistara-kernel`.
fn cache(options: &BuildKernelOptions) -> Result<PathBuf, Failure> {
    if let Some(dir) = &options.cache {
        return Ok(dir.clone());
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/cache"));
    }
    let home = || environment::path("HOME").map(|home| home.join(".cache"));
    environment::path("XDG_CACHE_HOME")
        .or_else(home)
        .filter(|dir| dir.is_absolute())
        .ok_or_else(|| {
            Failure::new("cannot tell where to build: neither HOME nor XDG_CACHE_HOME is set")
                .hint("say where, with --cache DIR")
        })
}

fn failure(error: &BuildError) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(of) = cause {
        message.push_str(&format!(": {of}"));
        cause = of.source();
    }
    let failure = Failure::new(message);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// How far the build is: a line that changes on a terminal, some lines elsewhere.
enum View {
    Bar(ProgressBar),
    Lines { told: u8 },
}

impl View {
    fn new() -> View {
        if !std::io::stderr().is_terminal() {
            return View::Lines { told: 0 };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        View::Bar(bar)
    }

    fn show(&mut self, step: &BuildStep) {
        let words = match step {
            BuildStep::Waiting => "waiting for another build to end".to_owned(),
            BuildStep::Downloading(source) => format!("downloading {}", visible(source, false)),
            BuildStep::Unpacking => "unpacking the source".to_owned(),
            BuildStep::Configuring => "configuring".to_owned(),
            BuildStep::Compiling(per_cent) => format!("compiling: about {per_cent} %"),
            BuildStep::Found => "it was built before".to_owned(),
        };
        match self {
            View::Bar(bar) => bar.set_message(words),
            View::Lines { told } => {
                if let BuildStep::Compiling(per_cent) = step
                    && *per_cent != 0
                {
                    if *per_cent < told.saturating_add(PER_CENT_TOLD) {
                        return;
                    }
                    *told = *per_cent;
                }
                eprint_line(&words);
            }
        }
    }

    fn clear(&self) {
        if let View::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
