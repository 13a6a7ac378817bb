//! The lab: a virtual machine in which `/dev/kvm` truly works, on hosts where it does not: QEMU translating code and
//! emulating AMD's SVM, a Debian kernel, and the host's own files under a layer of memory. It runs one command as root and
//! gives back its output and status. `docs/internals/lab.md` is the user's page.
//!
//! Invariants: nothing of a run outlives it, whatever ends it (children die with this process; sockets have no names);
//! nothing in the lab changes the host's files, but those in directories shared on purpose.
//!
//! `options` reads the command line, `host` and `kernel` find or make what a run needs, `command` decides what is started
//! (pure), `run` starts it and waits, `suite` runs the real-machine tests inside. The programs of the machine itself lie in
//! `tests/lab`.

mod command;
mod host;
mod initramfs;
mod kernel;
mod options;
mod run;
mod suite;

use anyhow::Result;
use options::{Options, What};
use std::path::Path;

/// The lab itself failed, not its command.
const STATUS_FAILED: u8 = 125;

pub(crate) const USAGE: &str = options::USAGE;

/// `cargo xtask lab …`: the status to end with.
pub(crate) fn main(root: &Path, words: &[&str]) -> u8 {
    let status = Options::parse(words).and_then(|options| act(root, options));
    match status {
        Ok(status) => status,
        Err(error) => {
            eprintln!("lab: {error:#}");
            STATUS_FAILED
        }
    }
}

fn act(root: &Path, options: Options) -> Result<u8> {
    let lab = Lab::prepare(root)?;
    match &options.what {
        What::Prepare => {
            println!("{}", lab.kernel.release);
            Ok(0)
        }
        What::Command(words) => lab.run(&options, words, &[]),
        What::Tests(arguments) => suite::run(root, &lab, &options, arguments),
    }
}

/// What every run needs.
struct Lab {
    /// The repository, which must be seen inside.
    root: std::path::PathBuf,
    programs: host::Programs,
    kernel: kernel::Kernel,
}

impl Lab {
    fn prepare(root: &Path) -> Result<Lab> {
        let programs = host::Programs::find()?;
        let kernel = kernel::prepare(&root.join("target/lab"), &programs)?;
        Ok(Lab {
            root: root.to_owned(),
            programs,
            kernel,
        })
    }

    /// Runs a command; `env` is added to what the options and the caller's environment give.
    fn run(&self, options: &Options, words: &[String], env: &[(String, String)]) -> Result<u8> {
        let dir = std::env::current_dir()?;
        let mut environment = command::environment(std::env::vars_os(), &options.env);
        environment.extend(env.iter().cloned());
        let mut needed = vec![self.root.clone(), dir.clone()];
        needed.extend(options.shares.iter().cloned());
        let plan = command::Plan {
            memory_mib: options.memory_mib,
            cpus: options.cpus,
            kernel: self.kernel.image.clone(),
            initramfs: self.kernel.initramfs.clone(),
            modules: self.kernel.modules.clone(),
            cgroup: options.cgroup,
            fresh_tmp: !needed.iter().any(|path| path.starts_with("/tmp")),
            shares: options.shares.clone(),
            limit: options.timeout,
            script: command::script(&dir, &environment, words)?,
        };
        run::run(&self.programs, &plan, options.console)
    }
}
