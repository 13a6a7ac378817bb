//! Another machine out of a captured one: everything by which machines are told apart is made anew while every program is
//! held still.
//!
//! What a program has in its own memory, such as a random generator that it seeded before, is not ours to change: it is the
//! same in all machines that go on from there.

use super::{Machine, freezer, network, root, seed, set_clock};
use crate::files::refusal;
use rustix::mount::UnmountFlags;
use std::fs;
use std::io;
use std::path::Path;
use vistara_guest_protocol::{GuestConfig, Refusal};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const FRESH_BOOT_ID: &str = "/dev/vistara.boot-id";
const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

impl Machine {
    /// Holds every process still. After an error all go on.
    pub(crate) fn freeze(&mut self) -> io::Result<()> {
        if self.frozen.is_none() {
            self.frozen = Some(freezer::freeze()?);
        }
        Ok(())
    }

    /// Lets what is held go on.
    pub(crate) fn thaw(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.thaw();
        }
    }

    /// Becomes another machine. What would let two machines pass for one is a refusal, the rest a warning.
    pub(crate) fn renew(&mut self, config: &GuestConfig) -> Result<Vec<String>, Refusal> {
        let mut warnings = Vec::new();
        // First: the time that was sent grows old.
        let on_time = match config.wall_clock_ns {
            0 => Ok(()),
            now => set_clock(now),
        };
        let seeded = match config.entropy.is_empty() {
            true => Err(io::Error::other("the host gave no bytes for it")),
            false => seed(&config.entropy),
        };
        seeded.map_err(|error| refusal("seeding the random generator of a fork", &error))?;
        rustix::system::sethostname(config.hostname.as_bytes())
            .map_err(|error| refusal("setting the host name of a fork", &error.into()))?;
        if let Some(network) = &config.network {
            network::renew(network).map_err(|error| refusal("the network of a fork", &error))?;
        }
        let mut warn = |what: &str, result: io::Result<()>| {
            if let Err(error) = result {
                warnings.push(format!("{what}: {error}"));
            }
        };
        warn("setting the clock", on_time);
        // Nothing runs that could use the moment in which it may be written.
        let read_only = root::is_read_only()
            .map_err(|error| refusal("looking at the root of a fork", &error))?;
        if read_only {
            root::make_writable()
                .map_err(|error| refusal("writing to the read-only root of a fork", &error))?;
        }
        warn("writing names to /etc", root::Names::of(config).write(None));
        let identified = new_machine_id();
        if read_only {
            root::make_read_only(Path::new("/"))
                .map_err(|error| refusal("making the root of a fork read-only again", &error))?;
        }
        identified.map_err(|error| refusal("replacing the machine's id in a fork", &error))?;
        warn("the boot's id", new_boot_id());
        Ok(warnings)
    }
}

fn random<const BYTES: usize>() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives the guest another id where it has one. An image whose file is empty or missing leaves that to its programs.
fn new_machine_id() -> io::Result<()> {
    let id = hex(&random::<16>()?) + "\n";
    for path in MACHINE_IDS.map(Path::new) {
        // A link leads to the other, or out of what is ours.
        let is_file = fs::symlink_metadata(path).is_ok_and(|data| data.is_file());
        if is_file && fs::read(path).is_ok_and(|text| text.trim_ascii().len() == 32) {
            fs::write(path, &id)?;
        }
    }
    Ok(())
}

/// The kernel makes its boot's id once, and lets nobody change it: another file is laid over it.
fn new_boot_id() -> io::Result<()> {
    let mut bytes = random::<16>()?;
    // A random UUID (RFC 4122, section 4.4), as the kernel's own is.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hex(&bytes);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &digits[part]);
    // In memory, where programs do not look; its name goes once it is mounted.
    fs::write(FRESH_BOOT_ID, parts.join("-") + "\n")?;
    // One that an earlier renewal laid there; mostly there is none.
    let _ = rustix::mount::unmount(BOOT_ID, UnmountFlags::DETACH);
    let laid = rustix::mount::mount_bind(FRESH_BOOT_ID, BOOT_ID);
    fs::remove_file(FRESH_BOOT_ID)?;
    laid?;
    Ok(())
}
