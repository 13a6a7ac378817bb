//! QEMU's `microvm` machine behind the [`Vmm`] contract, with KVM or with QEMU's own translation (TCG).
//!
//! Only this module names QEMU. It does not choose an accelerator and does not probe KVM: it is told the verdict, which may
//! be remembered from before, and looks only whether its monitors may still open the device.
//!
//! A machine is one QEMU process in a session, a cgroup and namespaces of its own, with nothing but the descriptors it was
//! given: disks, kernel and sockets are opened here, so that its user needs no right to any file. Its two sockets (agent's
//! channel, machine protocol) lie in the machine's directory and are listened on by QEMU itself: any later process that may
//! enter the directory can take the machine over.

mod apart;
mod baseline;
mod command;
mod console;
mod qmp;
mod raw_fork;
mod snapshot;
mod start;
mod state;
mod virtiofsd;
mod vm;

pub use baseline::{bare_program, raw_boot, raw_nanos_boot};
pub use raw_fork::{RawFork, RawTemplate};

use crate::{
    Adoption, Capabilities, CaptureInfo, LaunchPlan, Start, Vm, VmEnd, VmRecord, Vmm, VmmError,
};
use apart::Apart;
use qmp::{Qmp, RunState};
use state::BackendRecord;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use virtiofsd::Virtiofsd;
use vistara_host::cgroup::{Cgroup, Cgroups};
use vistara_host::files::OutputBox;
use vistara_host::process::{ProcessHandle, ProcessIdentity};
use vistara_host::{facts, sockets};
use vistara_model::{Accelerator, Bytes, KvmVerdict, MachineId, VmmKind};
use vm::{CLEANUP_LIMIT, Parts, QemuVm};

/// What QEMU takes beyond the guest's memory, at most, as far as we have seen; [`crate::Fence::memory_max`] must leave room
/// for it. Under TCG that is mostly translated code.
pub const OVERHEAD_MAX: Bytes = Bytes::mib(384);

/// The oldest QEMU whose options we know.
const VERSION_MIN: (u32, u32) = (7, 0);

/// How long a question to the program may take: some milliseconds, and many seconds on a busy host whose disk is slow. One that does
/// not answer counts as absent until somebody looks again.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Most virtual CPUs: what `microvm` takes under every accelerator without further devices.
const VCPUS_MAX: u32 = 64;

/// What [`QemuVmm::detect`] is told.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// `qemu-system-x86_64`; looked for in `PATH` where absent.
    pub program: Option<PathBuf>,
    /// `virtiofsd`; looked for in `PATH`, `/usr/libexec` and `/usr/lib/qemu` where absent.
    pub virtiofsd: Option<PathBuf>,
    /// The KVM probe's verdict: KVM is offered only if it works.
    pub kvm: KvmVerdict,
}

/// QEMU on this host.
pub struct QemuVmm {
    capabilities: Capabilities,
    /// Why KVM is not among the accelerators.
    no_kvm: Option<String>,
    tools: Arc<Tools>,
}

/// What a launch uses of the host.
struct Tools {
    program: PathBuf,
    apart: Apart,
    virtiofsd: Option<Virtiofsd>,
    cgroups: Result<Cgroups, String>,
    tsc_khz: Option<u32>,
    boot_id: String,
    version: String,
}

impl QemuVmm {
    /// Finds QEMU and what else it needs, and asks their versions; takes some 150 ms, and never more than 80 s.
    ///
    /// # Errors
    /// [`VmmError::Absent`] where there is no QEMU, [`VmmError::Unsupported`] where it is too old.
    pub async fn detect(options: QemuOptions) -> Result<QemuVmm, VmmError> {
        let absent = || VmmError::Absent {
            what: "qemu-system-x86_64".to_owned(),
            mend: "install it with: apt-get install qemu-system-x86".to_owned(),
        };
        let program = match options.program {
            Some(path) => path,
            None => find_program("qemu-system-x86_64").ok_or_else(absent)?,
        };
        let version = version(&program).await?.ok_or_else(absent)?;
        if version_number(&version).is_none_or(|found| found < VERSION_MIN) {
            return Err(VmmError::Unsupported {
                kind: VmmKind::Qemu,
                reason: format!(
                    "version {version} is older than {}.{}",
                    VERSION_MIN.0, VERSION_MIN.1
                ),
            });
        }
        // As it is found from another root directory, in which what leads to it may be missing.
        let program = program.canonicalize().unwrap_or(program);
        let virtiofsd = Virtiofsd::find(options.virtiofsd.as_deref(), is_root());
        let (apart, virtiofsd) = tokio::join!(Apart::find(&program), virtiofsd);
        let looked =
            tokio::task::spawn_blocking(|| (Cgroups::detect(), facts::tsc_khz(), facts::boot_id()));
        let (cgroups, tsc_khz, boot_id) = looked.await.map_err(|error| VmmError::Launch {
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
        let mut accelerators = Vec::new();
        let no_kvm = match options.kvm {
            KvmVerdict::Works => vistara_host::kvm::monitors_may_open().err(),
            KvmVerdict::Absent(why) | KvmVerdict::Broken(why) => Some(why),
        };
        match &no_kvm {
            Some(reason) => tracing::info!(%reason, "machines run under translation, without KVM"),
            None => accelerators.push(Accelerator::Kvm),
        }
        accelerators.push(Accelerator::Tcg);
        Ok(QemuVmm {
            capabilities: Capabilities {
                kind: VmmKind::Qemu,
                version: version.clone(),
                accelerators,
                shares: virtiofsd.as_ref().map(drop).map_err(String::clone),
                user_network: Ok(()),
                network_rate: Err(
                    "its user-mode network has no bound on what goes through it".to_owned()
                ),
                pause: true,
                vcpus_max: VCPUS_MAX,
                own_root: Err("QEMU runs in the host's root directory".to_owned()),
                capture: Ok(()),
                cpu_template: None,
            },
            no_kvm,
            tools: Arc::new(Tools {
                program,
                apart,
                virtiofsd: virtiofsd.ok(),
                cgroups,
                tsc_khz,
                boot_id,
                version,
            }),
        })
    }

    /// Refuses what this backend cannot do, before anything is started.
    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        let unsupported = |reason: String| VmmError::Unsupported {
            kind: VmmKind::Qemu,
            reason,
        };
        if !self.capabilities.accelerators.contains(&plan.accelerator) {
            let why = self.no_kvm.as_deref().unwrap_or("it is not known");
            return Err(unsupported(format!(
                "the accelerator {} does not work on this host: {why}",
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
        if plan.rates.network_per_s.is_some() {
            let no_rate = |reason| unsupported(format!("a bound on the network: {reason}"));
            self.capabilities.network_rate.clone().map_err(no_rate)?;
        }
        let fork = match &plan.start {
            Start::Linux(_) | Start::Nanos(_) => false,
            Start::Fork(capture) => {
                if let Some(difference) = capture.info().difference(&info(&self.tools, plan)) {
                    return Err(unsupported(format!(
                        "going on from a machine of another kind: {difference}"
                    )));
                }
                true
            }
        };
        let nanos = matches!(plan.start, Start::Nanos(_));
        if nanos && (plan.capturable || !plan.shares.is_empty()) {
            return Err(unsupported(
                "capturing a unikernel, or sharing directories with one".to_owned(),
            ));
        }
        if (fork || plan.capturable) && !plan.shares.is_empty() {
            return Err(unsupported(
                "capturing or forking a machine with shared directories".to_owned(),
            ));
        }
        if (fork || plan.capturable) && plan.huge_pages {
            return Err(unsupported(crate::vmm::CAPTURED_HUGE_PAGES.to_owned()));
        }
        if fork && plan.capturable {
            return Err(unsupported("capturing a fork".to_owned()));
        }
        for share in &plan.shares {
            if share.tag.is_empty() || share.tag.len() > virtiofsd::TAG_LEN_MAX {
                return Err(unsupported(format!(
                    "the share tag {:?}: it takes 1 to {} bytes",
                    share.tag,
                    virtiofsd::TAG_LEN_MAX
                )));
            }
        }
        Ok(())
    }
}

fn is_root() -> bool {
    vistara_host::facts::is_root()
}

/// A program of this name in `PATH`.
fn find_program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|path| path.is_absolute() && path.is_file())
}

/// What the program says of its version; `None` where it is not there.
async fn version(program: &Path) -> Result<Option<String>, VmmError> {
    let mut command = tokio::process::Command::new(program);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let failed = |message: String| VmmError::Launch {
        step: "asking QEMU for its version",
        message,
    };
    let output = match tokio::time::timeout(ANSWER_LIMIT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(Err(error)) => return Err(failed(format!("{}: {error}", program.display()))),
        Err(_) => return Err(failed(format!("{} does not answer", program.display()))),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.lines().next().unwrap_or_default();
    match words.split_once("version ") {
        Some((_, version)) => Ok(Some(version.trim().chars().take(80).collect())),
        None => Err(failed(format!("{} is not QEMU", program.display()))),
    }
}

/// Major and minor number of a version such as `7.2.22 (Debian …)`.
fn version_number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn io_error(operation: &'static str, path: &Path) -> impl Fn(std::io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::Io {
        operation,
        path: path.clone(),
        source,
    }
}

#[async_trait::async_trait]
impl Vmm for QemuVmm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, plan: &LaunchPlan) -> Result<(), VmmError> {
        QemuVmm::check(self, plan)
    }

    fn kept_console(&self, dir: &Path, limit: usize) -> Vec<u8> {
        let text = state::read_console(dir);
        text[text.len().saturating_sub(limit)..].to_vec()
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
                step: "starting QEMU",
                message: "the runtime is shutting down".to_owned(),
            })
        })?;
        Ok(Box::new(vm))
    }

    async fn adopt(&self, dir: &Path, record: &VmRecord) -> Result<Adoption, VmmError> {
        let backend: BackendRecord =
            serde_json::from_value(record.backend.clone()).unwrap_or_default();
        let identity = ProcessIdentity {
            pid: record.pid,
            start_ticks: record.pid_start_ticks,
            boot_id: record.boot_id.clone(),
        };
        let process = ProcessHandle::adopt(&identity).map_err(io_error(
            "looking for",
            Path::new(&format!("/proc/{}", record.pid)),
        ))?;
        let Some(process) = process else {
            return Ok(Adoption::Gone(self.gone(dir, record, &backend).await));
        };
        let connected = match sockets::connect_in(dir, state::QMP_SOCKET) {
            Ok(stream) => handshake(stream).await,
            Err(error) => Err(format!("{}: {error}", state::QMP_SOCKET)),
        };
        let (qmp, status) = match connected {
            Ok(connected) => connected,
            // It may have gone meanwhile, or be a child of ours that is dead and not yet waited for.
            Err(message) => {
                match tokio::time::timeout(Duration::from_millis(100), process.wait()).await {
                    Ok(Ok(_)) => return Ok(Adoption::Gone(self.gone(dir, record, &backend).await)),
                    _ => {
                        return Err(VmmError::Control {
                            operation: "taking the machine over",
                            message,
                        });
                    }
                }
            }
        };
        let parts = Parts {
            dir: dir.to_owned(),
            record: record.clone(),
            helpers: adopt_helpers(&backend, &record.boot_id),
            backend,
            // Its standard error; readable where we are its user or root.
            output: OutputBox::reopen(Path::new(&format!("/proc/{}/fd/2", record.pid))).ok(),
            process,
            printed: state::open_output(dir),
            // The files were the earlier process's.
            capture: None,
        };
        let held = status == RunState::Paused;
        Ok(Adoption::Running(Box::new(QemuVm::new(parts, qmp, held))))
    }

    async fn sweep(&self, id: &MachineId, dir: &Path) -> Result<(), VmmError> {
        if let Some(record) = state::read_launch(dir)
            && record.boot_id == self.tools.boot_id
        {
            let backend: BackendRecord =
                serde_json::from_value(record.backend.clone()).unwrap_or_default();
            let identity = ProcessIdentity {
                pid: record.pid,
                start_ticks: record.pid_start_ticks,
                boot_id: record.boot_id.clone(),
            };
            let at = PathBuf::from(format!("/proc/{}", record.pid));
            let found = ProcessHandle::adopt(&identity).map_err(io_error("looking for", &at))?;
            if let Some(process) = found {
                process.kill().map_err(io_error("killing", &at))?;
                let gone = tokio::time::timeout(CLEANUP_LIMIT, process.wait()).await;
                gone.map_err(|_| io_error("killing", &at)(std::io::ErrorKind::TimedOut.into()))?
                    .map_err(io_error("watching", &at))?;
            }
            vm::clean_up(&adopt_helpers(&backend, &record.boot_id), None).await;
        }
        let left = self
            .tools
            .cgroups
            .as_ref()
            .ok()
            .and_then(|groups| groups.find(id.as_ref()));
        if let Some(cgroup) = left {
            let at = cgroup.dirs().first().cloned().unwrap_or_default();
            cgroup
                .destroy(CLEANUP_LIMIT)
                .await
                .map_err(io_error("removing the cgroup", &at))?;
        }
        state::remove_live_files(dir);
        Ok(())
    }
}

impl QemuVmm {
    /// Cleans up after a machine that is gone, and tells how it went as far as that is known.
    async fn gone(&self, dir: &Path, record: &VmRecord, backend: &BackendRecord) -> VmEnd {
        let end = state::read_end(dir);
        if record.boot_id != self.tools.boot_id {
            state::remove_live_files(dir);
            return end.unwrap_or(VmEnd::Crashed {
                message: "the host was restarted".to_owned(),
            });
        }
        let cgroup = Cgroup::from_dirs(backend.cgroup.clone());
        let over_limit = cgroup.out_of_memory_kills().is_some_and(|kills| kills > 0);
        vm::clean_up(&adopt_helpers(backend, &record.boot_id), Some(&cgroup)).await;
        state::remove_live_files(dir);
        end.unwrap_or_else(|| VmEnd::Crashed {
            message: if over_limit {
                "QEMU was killed because the machine exceeded its memory limit on the host"
                    .to_owned()
            } else {
                "QEMU was gone when the node came back; nobody saw how it ended".to_owned()
            },
        })
    }
}

/// The memory that a guest gets: QEMU takes whole MiB.
fn guest_memory(plan: &LaunchPlan) -> Bytes {
    Bytes::mib(plan.memory.to_mib_ceil())
}

/// What a fork must have in common with this machine.
fn info(tools: &Tools, plan: &LaunchPlan) -> CaptureInfo {
    CaptureInfo {
        kind: VmmKind::Qemu,
        version: tools.version.clone(),
        accelerator: plan.accelerator,
        cpu: match plan.accelerator {
            // Translation shows the same processor everywhere.
            Accelerator::Tcg => String::new(),
            Accelerator::Kvm => facts::cpu_model(),
        },
        counter_khz: tools.tsc_khz,
        vcpus: plan.vcpus,
        memory: guest_memory(plan),
        disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
        nic: plan.nic.is_some(),
        // They are the process's.
        without_bounds: true,
    }
}

fn adopt_helpers(backend: &BackendRecord, boot_id: &str) -> Vec<ProcessHandle> {
    let found = backend.helper_identities(boot_id);
    found
        .iter()
        .filter_map(|identity| ProcessHandle::adopt(identity).ok().flatten())
        .collect()
}

/// Greets a running QEMU, within the limit of a question.
async fn greet(stream: std::os::unix::net::UnixStream) -> Result<Qmp, String> {
    let stream = tokio::net::UnixStream::from_std(stream).map_err(|error| error.to_string())?;
    tokio::time::timeout(qmp::REPLY_LIMIT, Qmp::handshake(stream))
        .await
        .map_err(|_| format!("QEMU did not answer within {:?}", qmp::REPLY_LIMIT))?
        .map_err(|error| error.to_string())
}

/// Greets a running QEMU and asks its state, each within the limit of a question.
async fn handshake(stream: std::os::unix::net::UnixStream) -> Result<(Qmp, RunState), String> {
    let qmp = greet(stream).await?;
    let status = qmp.status().await.map_err(|error| error.to_string())?;
    Ok((qmp, status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        assert_eq!(version_number("7.2.22 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(version_number("10.0.0"), Some((10, 0)));
        assert_eq!(version_number("none"), None);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_absent_with_the_command_that_mends_it() {
        let options = QemuOptions {
            program: Some("/no/such/qemu".into()),
            virtiofsd: None,
            kvm: KvmVerdict::Works,
        };
        match QemuVmm::detect(options).await {
            Err(VmmError::Absent { mend, .. }) => assert!(mend.contains("apt-get"), "{mend}"),
            other => panic!("{:?}", other.err()),
        }
    }
}
