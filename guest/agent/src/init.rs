//! The agent as PID 1: from the initial RAM disk to a machine that serves its host, and off again.
//!
//! The order is by need: drivers, root, channel; then, while the agent's greeting travels, what programs will want.
//! Everything that may fail without spoiling the guest is reported on the console and passed over. The agent never
//! returns from here: the machine reboots, which ends a monitor that was started so.

mod ahead;
mod freezer;
mod modules;
mod network;
mod renew;
mod root;

use crate::files::refusal;
use crate::link::Channel;
use crate::server::Server;
use crate::{Options, sys};
use modules::Modules;
use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vistara_guest_protocol::{GuestConfig, Mark, PORT_NAME, Refusal, RefusalKind, Stage};

/// How long a device may take to appear after its driver was loaded.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked for.
const DEVICE_LOOK: Duration = Duration::from_millis(1);

/// Age in milliseconds of the working set that is never thrown out: the kernel's documentation recommends a second
/// (admin-guide/mm/multigen_lru), about as long as a person bears a machine that does not answer.
const WORKING_SET_MS: &str = "1000";

/// Microseconds since the kernel started.
pub(crate) fn since_boot_us() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// Tells whoever reads the console.
fn console(message: &str) {
    // There is nobody to tell that the console does not work.
    let _ = writeln!(io::stderr(), "vistara agent: {message}");
}

/// Reports a failure that the guest can live with.
fn tolerate(what: &str, result: Result<(), impl std::fmt::Display>) {
    if let Err(error) = result {
        console(&format!("{what}: {error}"));
    }
}

/// Waits until `look` finds something.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + DEVICE_PATIENCE;
    loop {
        let found = look();
        if found.is_some() || Instant::now() > until {
            return found;
        }
        std::thread::sleep(DEVICE_LOOK);
    }
}

/// The words of the kernel's command line that are ours.
#[derive(Debug, Default, PartialEq, Eq)]
struct CommandLine {
    root: Option<String>,
    overlay: Option<String>,
    channel: Option<String>,
}

impl CommandLine {
    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let mut words = text.split_whitespace().rev();
            words
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
                .map(str::to_owned)
        };
        Self {
            root: value("vistara.root"),
            overlay: value("vistara.overlay"),
            channel: value("vistara.channel"),
        }
    }
}

/// The machine that the agent keeps, as PID 1 of it.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The stages reached before the loop began.
    pub(crate) timings: Vec<Mark>,
    modules: Modules,
    overlay: Option<OwnedFd>,
    volumes: Vec<PathBuf>,
    prepared: bool,
    /// What was done before a capture and need not be done again.
    ahead: Ahead,
    /// What holds the processes still, where they are held.
    frozen: Option<freezer::Frozen>,
}

/// What a guest that is to be captured does before it is told who it is.
#[derive(Debug, Default)]
struct Ahead {
    /// It may have been captured since: others have the same random generator.
    captured: bool,
    network: Option<network::Ready>,
    /// The files of names as they were written; they are ours, and nobody else has seen them.
    names: Option<root::Names>,
}

/// Runs the guest until it is switched off.
pub fn run() -> ! {
    let start = Mark {
        stage: Stage::AgentStart,
        at_us: since_boot_us(),
    };
    std::panic::set_hook(Box::new(|panic| {
        console(&format!("the agent panicked: {panic}"));
        reboot();
    }));
    if let Err(error) = live(start) {
        console(&format!("the guest cannot go on: {error}"));
    }
    reboot();
}

fn reboot() -> ! {
    loop {
        // The root user's PID 1 may always do this.
        let _ = rustix::system::reboot(RebootCommand::Restart);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn live(start: Mark) -> io::Result<()> {
    let mark = |stage| Mark {
        stage,
        at_us: since_boot_us(),
    };
    let mut timings = vec![start];
    root::mount_kernel_file_systems()?;
    tolerate(
        "protecting the agent from want of memory",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    let words = CommandLine::parse(&fs::read_to_string("/proc/cmdline")?);
    let mut modules = Modules::read()?;
    modules.load("boot");
    timings.push(mark(Stage::ModulesLoaded));
    let overlay = match &words.root {
        Some(device) => root::enter(device, words.overlay.as_deref().unwrap_or("tmpfs"))?,
        None => None,
    };
    timings.push(mark(Stage::RootMounted));
    let channel = open_channel(
        words.channel.as_deref().unwrap_or("virtio-serial"),
        &mut modules,
    )?;
    let machine = Machine {
        timings,
        modules,
        overlay,
        volumes: Vec::new(),
        prepared: false,
        ahead: Ahead::default(),
        frozen: None,
    };
    Server::new(channel, Options::default(), Some(machine))?.run()
}

fn open_channel(name: &str, modules: &mut Modules) -> io::Result<Channel> {
    if let Some(port) = name.strip_prefix("vsock:") {
        modules.load("vsock");
        let port = port
            .parse()
            .map_err(|_| io::Error::other("the vsock port is not a number"))?;
        return Channel::vsock(port);
    }
    let absent = || io::Error::other(format!("there is no port {PORT_NAME}"));
    Channel::port(wait_for(find_port).ok_or_else(absent)?)
}

/// Opens the port with our name. Its entry, its name and its device appear one after the other.
fn find_port() -> Option<OwnedFd> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            return rustix::fs::open(
                Path::new("/dev").join(entry.file_name()),
                flags,
                Mode::empty(),
            )
            .ok();
        }
    }
    None
}

impl Machine {
    /// Does, while the greeting travels, what any guest will need next.
    pub(crate) fn prepare(&mut self) {
        if std::mem::replace(&mut self.prepared, true) {
            return;
        }
        root::mount_for_programs();
        end_thrashing();
        if network::has_device() {
            self.modules.load("net");
        }
    }

    /// Does what no program waits for, once the main program runs. The kernel's random generator has been seeded by
    /// then, by the CPU and by the host.
    pub(crate) fn settle(&mut self) {
        self.modules.load("rng");
        self.modules.load("balloon");
    }

    /// Does what every machine that goes on from this one would do again: drivers, names to be replaced, files that are
    /// read first.
    pub(crate) fn prepare_for_capture(&mut self, read_ahead: &[String], likely: &GuestConfig) {
        self.ahead.captured = true;
        self.prepare();
        self.settle();
        match network::get_ready(likely.network.as_ref()) {
            Ok(ready) => self.ahead.network = Some(ready),
            Err(error) => console(&format!("the network: {error}")),
        }
        // Over the image's own files they would be copied up again and again.
        let names = root::Names::of(likely);
        match names.write(None) {
            Ok(()) => self.ahead.names = Some(names),
            Err(error) => console(&format!("writing names to /etc: {error}")),
        }
        ahead::read(read_ahead);
    }

    /// Obeys the host's configuration. What a program would miss is a refusal, the rest a warning.
    pub(crate) fn configure(&mut self, config: &GuestConfig) -> Result<Vec<String>, Refusal> {
        let mut warnings = Vec::new();
        self.prepare();
        if config.wall_clock_ns > 0
            && let Err(error) = set_clock(config.wall_clock_ns)
        {
            warnings.push(format!("setting the clock: {error}"));
        }
        let seeded = match config.entropy.is_empty() {
            true => Err(io::Error::other("the host gave no bytes for it")),
            false => seed(&config.entropy),
        };
        if let Err(error) = seeded {
            if self.ahead.captured {
                // Every fork would draw the same keys.
                return Err(refusal("seeding the random generator of a fork", &error));
            }
            if !config.entropy.is_empty() {
                warnings.push(format!("seeding the random generator: {error}"));
            }
        }
        if let Err(error) = rustix::system::sethostname(config.hostname.as_bytes()) {
            warnings.push(format!(
                "setting the host name {:?}: {error}",
                config.hostname
            ));
        }
        network::configure(self.ahead.network.as_ref(), config.network.as_ref())
            .map_err(|error| refusal("the network", &error))?;
        let ahead = self.ahead.names.take();
        if let Err(error) = root::Names::of(config).write(ahead.as_ref()) {
            warnings.push(format!("writing names to /etc: {error}"));
        }
        if !config.volumes.is_empty() {
            self.modules.load("share");
        }
        for volume in &config.volumes {
            let path = PathBuf::from(&volume.path);
            if !path.is_absolute() || path.parent().is_none() {
                let message = format!("{:?} is no place for a volume", volume.path);
                return Err(Refusal {
                    kind: RefusalKind::Invalid,
                    message,
                });
            }
            root::mount_volume(&volume.tag, &path, volume.read_only).map_err(|error| {
                refusal(&format!("mounting a volume at {}", volume.path), &error)
            })?;
            self.volumes.push(path);
        }
        if config.root_read_only {
            root::make_read_only(Path::new("/"))
                .map_err(|error| refusal("making the root read-only", &error))?;
        }
        Ok(warnings)
    }

    /// Leaves every disk as it should be found. Nothing runs any more.
    pub(crate) fn leave(&mut self) {
        for volume in self.volumes.drain(..).rev() {
            tolerate(
                "unmounting a volume",
                rustix::mount::unmount(&volume, UnmountFlags::DETACH),
            );
        }
        if let Some(overlay) = &self.overlay {
            tolerate("syncing the disk", rustix::fs::syncfs(overlay));
        }
    }
}

/// Has the kernel kill for want of memory while the guest still answers. It would otherwise throw programs' own code out of
/// its cache to find memory, and read it again and again from the compressed root: a guest without swap stands still so
/// for minutes. Its multi-generation LRU keeps what was used just now, and kills where that leaves nothing.
fn end_thrashing() {
    let generations = Path::new("/sys/kernel/mm/lru_gen");
    if !generations.exists() {
        // Kernels before 6.1, and those built without; they still kill, late.
        return;
    }
    for (file, value) in [("enabled", "y"), ("min_ttl_ms", WORKING_SET_MS)] {
        tolerate(
            "keeping the guest from thrashing",
            fs::write(generations.join(file), value),
        );
    }
}

/// Sets the clock, to nanoseconds since 1970.
pub(crate) fn set_clock(wall_clock_ns: u64) -> io::Result<()> {
    let now = Timespec {
        tv_sec: i64::try_from(wall_clock_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: (wall_clock_ns % 1_000_000_000) as _,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}

/// Gives the kernel's random generator new bytes.
fn seed(bytes: &[u8]) -> io::Result<()> {
    let device = fs::File::open("/dev/urandom")?;
    for part in bytes.chunks(sys::ENTROPY_MAX) {
        sys::add_entropy(device.as_fd(), part)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_a_kind_on_the_command_line_counts() {
        let words = CommandLine::parse(
            "quiet vistara.root=/dev/vda vistara.root=/dev/vdb vistara.rootx=1\n",
        );
        assert_eq!(words.root.as_deref(), Some("/dev/vdb"));
        assert_eq!(words.overlay, None);
    }
}
