//! Firecracker behind the [`Vmm`] contract, set apart by its jailer.
//!
//! Only this module names Firecracker. It does not choose an accelerator and does not probe KVM: it is told the verdict, which
//! may be remembered from before.
//!
//! A machine is one Firecracker process: the first of a process namespace, in a session, a cgroup, a mount and a network
//! namespace of its own, and, by the jailer, in a root directory in which there is nothing but the machine's files, as a user
//! of its own. What is shown there is mounted in its own mount namespace, so that the host's mounts never change and nothing
//! has to be undone. Its two sockets (API, agent's channel) lie in that directory: any later process that may enter it can
//! take the machine over.
//!
//! Differences from QEMU that its owner may notice: a guest cannot be waited for when the host's disk is full (its writes
//! fail); there is no power button; no host directories; a network only as root.

mod api;
mod baseline;
mod channel;
mod configure;
mod console;
mod cpu_template;
mod network;
mod snapshot;
mod stage;
mod start;
mod state;
mod types;
mod version;
mod vm;

use crate::{
    Adoption, Capabilities, CaptureInfo, LaunchPlan, Start, Vm, VmEnd, VmRecord, Vmm, VmmError,
};
use api::Api;
pub use baseline::{RawFirecracker, RawRun};
use console::Console;
pub use cpu_template::{CpuTemplate, CpuTemplateError};
use network::UserNetwork;
use state::BackendRecord;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use version::Version;
use vistara_host::cgroup::{Cgroup, Cgroups};
use vistara_host::facts;
use vistara_host::files::OutputBox;
use vistara_host::process::{ProcessEnd, ProcessHandle, ProcessIdentity};
use vistara_model::{Accelerator, Bytes, KvmVerdict, MachineId, Rates, VmmKind};
use vm::{CLEANUP_LIMIT, FirecrackerVm, Parts, clean_up};

/// What Firecracker takes beyond the guest's memory, at most, as far as we have seen; [`crate::Fence::memory_max`] must leave
/// room for it: page tables, its own heap, and what the jailer copies.
pub const OVERHEAD_MAX: Bytes = Bytes::mib(64);

/// How long a question to the program may take: some milliseconds, and many seconds on a busy host whose disk is slow. One that does
/// not answer counts as absent until somebody looks again.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Most virtual CPUs that it takes.
const VCPUS_MAX: u32 = 32;

/// Where it lies on hosts that were set up by us; looked at before `PATH`.
const OWN_DIR: &str = "/opt/vistara/bin";

/// What [`FirecrackerVmm::detect`] is told.
#[derive(Debug, Clone)]
pub struct FirecrackerOptions {
    /// `firecracker`; looked for in `/opt/vistara/bin` and `PATH` where absent.
    pub program: Option<PathBuf>,
    /// `jailer`; looked for beside `firecracker`, then as that, where absent.
    pub jailer: Option<PathBuf>,
    /// `slirp4netns`; looked for as that where absent.
    pub slirp4netns: Option<PathBuf>,
    /// What guests see of the processor; all that KVM offers where absent.
    pub cpu_template: Option<CpuTemplate>,
    /// The KVM probe's verdict: machines run only if it works.
    pub kvm: KvmVerdict,
}

/// Firecracker on this host.
pub struct FirecrackerVmm {
    capabilities: Capabilities,
    /// Why KVM is not among the accelerators.
    no_kvm: Option<String>,
    tools: Arc<Tools>,
}

/// What a launch uses of the host.
struct Tools {
    program: PathBuf,
    /// Its file's name, as the jailer puts it into paths.
    program_name: String,
    /// The jailer, or why it cannot be used.
    jailer: Result<PathBuf, String>,
    /// What gives machines a network, or why nothing does.
    network: Result<UserNetwork, String>,
    version: Version,
    cpu_template: Option<CpuTemplate>,
    cgroups: Result<Cgroups, String>,
    boot_id: String,
}

impl FirecrackerVmm {
    /// Finds Firecracker and its jailer, and asks their versions; takes some 10 ms, and never more than 60 s.
    ///
    /// Where KVM does not work it is found all the same, with no accelerator: every plan is refused with the reason.
    ///
    /// # Errors
    /// [`VmmError::Absent`] where there is no Firecracker, [`VmmError::Unsupported`] where it is too old.
    pub async fn detect(options: FirecrackerOptions) -> Result<FirecrackerVmm, VmmError> {
        let absent = || VmmError::Absent {
            what: "firecracker".to_owned(),
            mend: format!(
                "put firecracker and jailer of https://github.com/firecracker-microvm/firecracker/releases into {OWN_DIR} or into PATH"
            ),
        };
        let program = match options.program {
            Some(path) => path,
            None => find_program("firecracker", None).ok_or_else(absent)?,
        };
        // The jailer names directories after it.
        let program = std::fs::canonicalize(&program).map_err(|_| absent())?;
        let answer = ask_version(&program).await?.ok_or_else(absent)?;
        let unsupported = |reason: String| VmmError::Unsupported {
            kind: VmmKind::Firecracker,
            reason,
        };
        let version = Version::parse(&answer).ok_or_else(|| {
            unsupported(format!(
                "{} is not Firecracker: it says {answer:?}",
                program.display()
            ))
        })?;
        if version < Version::OLDEST {
            return Err(unsupported(format!(
                "version {version} is older than {}",
                Version::OLDEST
            )));
        }
        let jailer = options
            .jailer
            .or_else(|| find_program("jailer", program.parent()));
        let jailer = jailer_for(jailer, version).await;
        if let Err(reason) = &jailer
            && facts::is_root()
        {
            tracing::warn!(%reason, "machines get no root directory of their own");
        }
        let looked = tokio::task::spawn_blocking(|| (Cgroups::detect(), facts::boot_id()));
        let (cgroups, boot_id) = looked.await.map_err(|error| VmmError::Launch {
            step: "looking at the host",
            message: error.to_string(),
        })?;
        let boot_id = boot_id.map_err(io_error(
            "reading",
            Path::new("/proc/sys/kernel/random/boot_id"),
        ))?;
        if let Err(reason) = &cgroups {
            tracing::warn!(%reason, "machines get no cgroups; resource limits of processes take their place");
        }
        let no_kvm = match options.kvm {
            // The jailer gives each machine a device of its own.
            KvmVerdict::Works if jailer.is_ok() => None,
            KvmVerdict::Works => vistara_host::kvm::monitors_may_open().err(),
            KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => Some(why),
        };
        // Where no machine runs, none needs a network, and to try one takes some milliseconds.
        let network = match &no_kvm {
            None => UserNetwork::find(options.slirp4netns).await,
            Some(_) => Err("no machine of Firecracker's runs here".to_owned()),
        };
        if let Err(reason) = &network
            && no_kvm.is_none()
        {
            tracing::warn!(%reason, "Firecracker's machines get no network");
        }
        let program_name = program.file_name().unwrap_or_default().to_string_lossy();
        Ok(FirecrackerVmm {
            capabilities: Capabilities {
                kind: VmmKind::Firecracker,
                version: version.to_string(),
                accelerators: if no_kvm.is_none() {
                    vec![Accelerator::Kvm]
                } else {
                    Vec::new()
                },
                shares: Err("Firecracker has no device for host directories".to_owned()),
                user_network: network.as_ref().map(|_| ()).map_err(Clone::clone),
                network_rate: Ok(()),
                own_root: jailer.as_ref().map(|_| ()).map_err(Clone::clone),
                pause: true,
                vcpus_max: VCPUS_MAX,
                capture: match version.resets_forks_vsock() {
                    true => Ok(()),
                    false => Err(format!(
                        "the channel to a fork's guest is dead in Firecracker {version}; 1.10 mended that"
                    )),
                },
                cpu_template: (options.cpu_template.as_ref())
                    .map(|template| template.digest().to_owned()),
            },
            no_kvm,
            tools: Arc::new(Tools {
                program_name: program_name.into_owned(),
                program,
                jailer,
                network,
                version,
                cpu_template: options.cpu_template,
                cgroups,
                boot_id,
            }),
        })
    }

    /// Refuses what this backend cannot do, before anything is started.
    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        let unsupported = |reason: String| VmmError::Unsupported {
            kind: VmmKind::Firecracker,
            reason,
        };
        if !self.capabilities.accelerators.contains(&plan.accelerator) {
            let why = match plan.accelerator {
                Accelerator::Kvm => self.no_kvm.as_deref().unwrap_or("it is not known"),
                Accelerator::Tcg => "Firecracker runs guests with KVM only",
            };
            return Err(unsupported(format!(
                "the accelerator {} does not work here: {why}",
                plan.accelerator
            )));
        }
        if plan.vcpus == 0 || plan.vcpus > VCPUS_MAX {
            return Err(unsupported(format!(
                "{} vCPUs: it takes 1 to {VCPUS_MAX}",
                plan.vcpus
            )));
        }
        if !plan.shares.is_empty() {
            self.capabilities.shares.clone().map_err(unsupported)?;
        }
        if plan.nic.is_some() {
            let no_network = |reason| unsupported(format!("a network: {reason}"));
            self.capabilities.user_network.clone().map_err(no_network)?;
            if plan.fence.uid_gid.is_none() {
                return Err(no_network(
                    "a machine that runs as the node itself has no network namespace".to_owned(),
                ));
            }
        }
        if plan.huge_pages && (plan.capturable || matches!(plan.start, Start::Fork(_))) {
            return Err(unsupported(crate::vmm::CAPTURED_HUGE_PAGES.to_owned()));
        }
        if plan.capturable || matches!(plan.start, Start::Fork(_)) {
            self.capabilities.capture.clone().map_err(unsupported)?;
        }
        match &plan.start {
            Start::Linux(_) => {}
            Start::Nanos(_) if plan.capturable => {
                return Err(unsupported("capturing a unikernel".to_owned()));
            }
            Start::Nanos(_) => {}
            Start::Fork(_) if plan.capturable => {
                return Err(unsupported("capturing a fork".to_owned()));
            }
            Start::Fork(capture) => {
                if let Some(difference) = capture.info().difference(&info(&self.tools, plan)) {
                    return Err(unsupported(format!(
                        "going on from a machine of another kind: {difference}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Cleans up after a machine that is gone, and tells how it went as far as that is known.
    async fn gone(
        &self,
        dir: &Path,
        record: &VmRecord,
        backend: BackendRecord,
        seen: std::io::Result<ProcessEnd>,
    ) -> VmEnd {
        let cgroup = Cgroup::from_dirs(backend.cgroup.clone());
        let same_boot = record.boot_id == self.tools.boot_id;
        let at = dir.to_owned();
        let read = tokio::task::spawn_blocking(move || {
            let known = state::read_end(&at);
            if known.is_some() || !same_boot {
                return known;
            }
            let console = Console::open(&at);
            let end = vm::read_end(seen, &backend, &console, "");
            state::write_end(&at, &end);
            if let Err(error) = console.keep() {
                tracing::warn!(%error, dir = %at.display(), "a machine's console could not be kept");
            }
            Some(end)
        });
        let end = read.await.unwrap_or_default();
        clean_up(dir, same_boot.then_some(&cgroup)).await;
        end.unwrap_or(VmEnd::Crashed {
            message: "the host was restarted".to_owned(),
        })
    }
}

/// A program of this name: beside another, in our own directory, or in `PATH`.
fn find_program(name: &str, beside: Option<&Path>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = [beside.map(Path::to_owned), Some(PathBuf::from(OWN_DIR))];
    own.into_iter()
        .flatten()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|path| path.is_absolute() && path.is_file())
}

/// What the program says of its version; `None` where it is not there.
async fn ask_version(program: &Path) -> Result<Option<String>, VmmError> {
    let mut command = tokio::process::Command::new(program);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let failed = |message: String| VmmError::Launch {
        step: "asking Firecracker for its version",
        message,
    };
    match tokio::time::timeout(ANSWER_LIMIT, command.output()).await {
        Ok(Ok(output)) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let line = text.lines().next().unwrap_or_default();
            Ok(Some(line.chars().take(80).collect()))
        }
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Ok(Err(error)) => Err(failed(format!("{}: {error}", program.display()))),
        Err(_) => Err(failed(format!("{} does not answer", program.display()))),
    }
}

/// The jailer, if it is there and of Firecracker's version: the two are released together and know each other's arguments.
async fn jailer_for(found: Option<PathBuf>, version: Version) -> Result<PathBuf, String> {
    let path = found.ok_or("there is no jailer beside it")?;
    let answer = ask_version(&path)
        .await
        .map_err(|error| error.to_string())?;
    let answer = answer.ok_or_else(|| format!("{} is not there", path.display()))?;
    let says = answer.replacen("Jailer", "Firecracker", 1);
    match Version::parse(&says) {
        Some(found) if found == version => Ok(path),
        _ => Err(format!(
            "{} is not the jailer of version {version}: it says {answer:?}",
            path.display()
        )),
    }
}

/// What a fork must have in common with this machine.
fn info(tools: &Tools, plan: &LaunchPlan) -> CaptureInfo {
    CaptureInfo {
        kind: VmmKind::Firecracker,
        version: tools.version.to_string(),
        accelerator: plan.accelerator,
        cpu: match &tools.cpu_template {
            Some(template) => format!("{} as {}", facts::cpu_model(), template.digest()),
            None => facts::cpu_model(),
        },
        // The state says by which counter the guest tells the time, and Firecracker has KVM go on with it.
        counter_khz: None,
        vcpus: plan.vcpus,
        memory: Bytes::mib(plan.memory.to_mib_ceil()),
        disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
        nic: plan.nic.is_some(),
        without_bounds: plan.rates == Rates::default(),
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl Fn(std::io::Error) -> VmmError + use<> {
    let path = path.to_owned();
    move |source| VmmError::Io {
        operation,
        path: path.clone(),
        source,
    }
}

fn identity(record: &VmRecord) -> ProcessIdentity {
    ProcessIdentity {
        pid: record.pid,
        start_ticks: record.pid_start_ticks,
        boot_id: record.boot_id.clone(),
    }
}

#[async_trait::async_trait]
impl Vmm for FirecrackerVmm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        FirecrackerVmm::check(self, plan)
    }

    fn kept_console(&self, dir: &Path, limit: usize) -> Vec<u8> {
        Console::open(dir).last(limit)
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<Box<dyn Vm>, VmmError> {
        self.check(plan)?;
        // In a task of its own: a caller that goes away in the middle must not leave a machine that nobody knows.
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (tools, plan) = (self.tools.clone(), plan.clone());
        tokio::spawn(async move {
            let result = start::start(&tools, &plan).await;
            if let Err(Ok(vm)) = sender.send(result)
                && let Err(error) = vm.kill().await
            {
                tracing::error!(%error, id = %plan.id, "a machine that nobody waits for cannot be ended");
            }
        });
        let vm = receiver.await.unwrap_or_else(|_| {
            Err(VmmError::Launch {
                step: "starting Firecracker",
                message: "the runtime is shutting down".to_owned(),
            })
        })?;
        Ok(Box::new(vm))
    }

    async fn adopt(&self, dir: &Path, record: &VmRecord) -> Result<Adoption, VmmError> {
        let backend: BackendRecord =
            serde_json::from_value(record.backend.clone()).unwrap_or_default();
        let at = PathBuf::from(format!("/proc/{}", record.pid));
        let process =
            ProcessHandle::adopt(&identity(record)).map_err(io_error("looking for", &at))?;
        let Some(process) = process else {
            let unseen = Ok(ProcessEnd::Unknown);
            return Ok(Adoption::Gone(
                self.gone(dir, record, backend, unseen).await,
            ));
        };
        // It may be dead and not yet waited for, as a child of ours is. Whether its API answers does not matter: it can be
        // spoken with through its channel, watched, held and killed without.
        let gone = tokio::time::timeout(Duration::from_millis(20), process.wait()).await;
        if let Ok(Ok(end)) = gone {
            return Ok(Adoption::Gone(
                self.gone(dir, record, backend, Ok(end)).await,
            ));
        }
        let network = match &backend.network {
            Some(helper) => Some(
                helper
                    .adopt(&record.boot_id)
                    .map_err(io_error("looking for the network of", &at))?,
            ),
            None => None,
        };
        let of_monitor = |fd: u32| PathBuf::from(format!("/proc/{}/fd/{fd}", record.pid));
        let in_memory = !backend.unikernel && !dir.join(state::LIVE_CONSOLE).exists();
        let console_box = in_memory.then(|| std::fs::File::open(of_monitor(1)).ok());
        Ok(Adoption::Running(Box::new(FirecrackerVm::new(Parts {
            dir: dir.to_owned(),
            record: record.clone(),
            backend,
            process,
            errors: OutputBox::reopen(&of_monitor(2)).ok(),
            console: Console::open(dir).with_box(console_box.flatten()),
            printed: state::open_output(dir),
            network,
        }))))
    }

    async fn sweep(&self, id: &MachineId, dir: &Path) -> Result<(), VmmError> {
        if let Some(record) = state::read_launch(dir)
            && record.boot_id == self.tools.boot_id
        {
            let at = PathBuf::from(format!("/proc/{}", record.pid));
            let found =
                ProcessHandle::adopt(&identity(&record)).map_err(io_error("looking for", &at))?;
            if let Some(process) = found {
                process.kill().map_err(io_error("killing", &at))?;
                let gone = tokio::time::timeout(CLEANUP_LIMIT, process.wait()).await;
                gone.map_err(|_| io_error("killing", &at)(std::io::ErrorKind::TimedOut.into()))?
                    .map_err(io_error("watching", &at))?;
            }
        }
        let groups = self.tools.cgroups.as_ref().ok();
        if let Some(cgroup) = groups.and_then(|groups| groups.find(id.as_ref())) {
            let at = cgroup.dirs().first().cloned().unwrap_or_default();
            cgroup
                .destroy(CLEANUP_LIMIT)
                .await
                .map_err(io_error("removing the cgroup", &at))?;
        }
        clean_up(dir, None).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_is_not_there_is_absent_with_what_mends_it() {
        let options = FirecrackerOptions {
            program: Some("/no/such/firecracker".into()),
            jailer: None,
            slirp4netns: None,
            cpu_template: None,
            kvm: KvmVerdict::Works,
        };
        match FirecrackerVmm::detect(options).await {
            Err(VmmError::Absent { mend, .. }) => assert!(mend.contains("releases"), "{mend}"),
            other => panic!("{:?}", other.err()),
        }
    }

    #[tokio::test]
    async fn another_program_is_not_taken_for_firecracker() {
        let options = FirecrackerOptions {
            program: Some("/bin/true".into()),
            jailer: None,
            slirp4netns: None,
            cpu_template: None,
            kvm: KvmVerdict::Works,
        };
        let refused = FirecrackerVmm::detect(options).await.err().unwrap();
        assert!(matches!(refused, VmmError::Unsupported { .. }), "{refused}");
    }
}
