//! How a monitor is set apart from the host and from other machines' monitors, beyond its user and its cgroup.
//!
//! What can be had here is found by trying, once, with the program itself: a QEMU that needs files which nobody thought of, or a
//! host that forbids a kind of namespace, must not keep machines from starting. What does not hold is said in
//! [`crate::VmRecord::fences`].

use super::state;
use crate::{LaunchPlan, resolver};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vistara_host::facts;
use vistara_host::files::{OutputBox, memory_file};
use vistara_host::launch::Launch;
use vistara_host::mounts::Bind;
use vistara_host::process::ProcessEnd;
use vistara_host::root::{Root, Shown};
use vistara_model::Accelerator;

/// Where systems keep programs, libraries and firmware: nothing in them is anybody's own.
const SYSTEM: [&str; 9] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix/store",
    "/gnu/store",
];
/// What QEMU opens beside: where libraries lie, and devices. Those that are not there are not shown.
const FILES: [&str; 4] = ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"];
/// Shown to those that use it, and as it is then: it goes with its module.
const KVM: &str = "/dev/kvm";
/// Where it looks for name servers, and the directory to which that leads: one of the machine's own, since the file changes.
const NAME_SERVERS: (&str, &str) = ("/etc/resolv.conf", "/run/resolver");
/// Where it sees its own process.
const PROC: &str = "/proc";
/// The user of a trial, whose rights nobody needs.
const NOBODY: (u32, u32) = (65_534, 65_534);
/// How long a trial may take: QEMU begins in well under a second where the host is not very busy.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a trial's complaints that are kept, and characters of them that are told.
const COMPLAINTS: u64 = 16 << 10;
const TOLD: usize = 300;

/// What holds here.
#[derive(Debug)]
pub(super) enum Apart {
    /// Process and network namespaces, and a root directory of its own.
    Rooted(Arc<Root>),
    /// The namespaces, and a `/proc` in which there is nothing but itself; why not the root directory.
    Namespaces(String),
    /// Neither, and why.
    Nothing(String),
}

impl Apart {
    /// Tries what holds for this program. Takes as long as QEMU takes to begin, some 50 ms, and at most twice
    /// [`TRIAL_LIMIT`].
    pub(super) async fn find(program: &Path) -> Apart {
        if !facts::may_make_namespaces() {
            return Apart::Nothing("the node has no right to make namespaces".to_owned());
        }
        let shown = shown(program);
        let prepared = tokio::task::spawn_blocking(move || Root::prepare(&shown)).await;
        let prepared = match prepared {
            Ok(prepared) => prepared.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let no_root = match prepared {
            Ok(root) => {
                let apart = Apart::Rooted(Arc::new(root));
                match apart.holds(program).await {
                    Ok(()) => return apart,
                    Err(why) => why,
                }
            }
            Err(why) => why,
        };
        tracing::warn!(reason = %no_root, "QEMU gets no root directory of its own");
        let apart = Apart::Namespaces(no_root);
        match apart.holds(program).await {
            Ok(()) => apart,
            Err(why) => {
                tracing::warn!(reason = %why, "QEMU gets no process and network namespaces of its own");
                Apart::Nothing(why)
            }
        }
    }

    /// Whether QEMU makes a machine so, and ends when it is told to.
    async fn holds(&self, program: &Path) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let mut launch = Launch::new(program);
        let machine = "-M microvm -accel tcg -m 16M -nodefaults -no-user-config -display none -S";
        launch.args = machine.split(' ').map(Into::into).collect();
        launch.args.extend(["-qmp".into(), "stdio".into()]);
        let mut input = memory_file().map_err(text)?;
        input
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")
            .and_then(|()| input.rewind())
            .map_err(text)?;
        let errors = OutputBox::new(COMPLAINTS).map_err(text)?;
        launch.input = Some(input);
        launch.errors = Some(errors.writer().map_err(text)?);
        launch.uid_gid = facts::is_root().then_some(NOBODY);
        self.separate(false, &mut launch);
        let started = tokio::task::spawn_blocking(move || launch.start()).await;
        let started = started.map_err(|error| error.to_string())?;
        let process = started
            .map_err(|error| format!("{error}: {}", error.source))?
            .process;
        let end = match tokio::time::timeout(TRIAL_LIMIT, process.wait()).await {
            Ok(end) => end.map_err(text)?,
            Err(_) => {
                process.kill().map_err(text)?;
                process.wait().await.map_err(text)?;
                return Err("a trial did not end".to_owned());
            }
        };
        match end {
            ProcessEnd::Exited(0) => Ok(()),
            end => Err(format!("a trial failed: {end:?} {}", errors.tail(TOLD))),
        }
    }

    fn separate(&self, networked: bool, launch: &mut Launch) {
        match self {
            Apart::Rooted(root) => launch.root = Some(root.clone()),
            Apart::Namespaces(_) => {}
            Apart::Nothing(_) => return,
        }
        launch.own_processes = true;
        launch.own_network = !networked;
        launch.proc_at = Some(PROC.into());
    }

    /// Sets this plan's monitor apart, and says what that leaves open. Blocks on files.
    ///
    /// # Errors
    /// Where the machine's directory takes no more, or a mount cannot be made.
    pub(super) fn set(
        &self,
        plan: &LaunchPlan,
        launch: &mut Launch,
        fences: &mut Vec<String>,
    ) -> io::Result<()> {
        let networked = plan.nic.is_some();
        self.separate(networked, launch);
        if matches!(self, Apart::Rooted(_)) && plan.accelerator == Accelerator::Kvm {
            let shown = Bind::of_device(Path::new(KVM), Path::new(KVM));
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{KVM}: {error}"));
            launch.binds.push(shown.map_err(named)?);
        }
        match self {
            Apart::Rooted(_) if networked => {
                let own = plan.dir.join(state::RESOLVER);
                resolver::make(&own)?;
                let shown = Bind::new(&File::open(&own)?, Path::new(NAME_SERVERS.1), true)?;
                launch.binds.push(shown);
            }
            Apart::Rooted(_) => {}
            Apart::Namespaces(why) => fences.push(format!("no root directory of its own: {why}")),
            Apart::Nothing(why) => fences.push(format!(
                "no root directory, process or network namespace of its own: {why}"
            )),
        }
        if networked && !matches!(self, Apart::Nothing(_)) {
            fences.push("the host's network: its user-mode networking speaks from there".into());
        }
        Ok(())
    }
}

/// What QEMU needs of the host's files. Everything else it is handed open.
fn shown(program: &Path) -> Shown {
    let mut dirs: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    if !dirs.iter().any(|dir| program.starts_with(dir))
        && let Some(home) = program.parent()
    {
        dirs.push(home.to_owned());
        // Where one that was not installed by the system looks for its firmware.
        let above = home.parent().unwrap_or(home);
        dirs.extend(["share", "lib"].map(|name| above.join(name)));
    }
    dirs.retain(|dir| dir.is_dir());
    let files = FILES.iter().map(PathBuf::from);
    Shown {
        dirs,
        files: files.filter(|file| file.exists()).collect(),
        places: vec![NAME_SERVERS.1.into(), PROC.into()],
        file_places: vec![KVM.into()],
        links: vec![(
            NAME_SERVERS.0.into(),
            Path::new(NAME_SERVERS.1).join(resolver::NAME),
        )],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_the_system_shows_no_more_than_the_system() {
        let usual = shown(Path::new("/usr/bin/qemu-system-x86_64"));
        assert!(usual.dirs.contains(&"/usr".into()));
        assert!(
            usual
                .dirs
                .iter()
                .all(|dir| SYSTEM.iter().any(|known| dir == Path::new(known)))
        );
        assert!(usual.files.iter().all(|file| file.exists()));
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "share", "secret"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let own = shown(&dir.path().join("bin/qemu-system-x86_64"));
        let more = &own.dirs[usual.dirs.len()..];
        assert_eq!(more, [dir.path().join("bin"), dir.path().join("share")]);
    }

    #[tokio::test]
    async fn a_program_that_does_not_start_so_is_told_and_not_used_so() {
        if !facts::may_make_namespaces() {
            return println!("SKIP: namespaces take root");
        }
        match Apart::find(Path::new("/bin/false")).await {
            Apart::Nothing(why) => assert!(why.contains("Exited(1)"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}
