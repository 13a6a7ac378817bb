//! A unikernel's own disk: its image's files, and what this machine is told.

use super::super::Record;
use super::super::prepare::{GATEWAY, GUEST_ADDRESS, NAME_SERVER, PREFIX};
use super::provisional::CALLS;
use std::fs::File;
use std::io::BufWriter;
use std::net::Ipv4Addr;
use std::path::Path;
use vistara_model::{NamedVolume, Network};
use vistara_nanos::disk::DiskOptions;
use vistara_nanos::manifest::{self, ExitMatch, Manifest, Mount, MountSource};
use vistara_nanos::tfs::{Label, Value, VolumeId};
use vistara_nanos::{Changes, calls, klog, remaster};

/// Codes with which the kernel itself ends: after a fault, on an impossible manifest, in its debugger. They end the monitor,
/// so that they are told from the program's, which restart the machine and are on the disk.
const KERNELS_OWN: std::ops::RangeInclusive<u8> = 125..=127;
/// Bytes of the buffer for writing disks.
const BUFFER: usize = 1 << 20;

/// What a kernel needs on the disk to tell of its program's calls.
pub(crate) struct Telling {
    pub(crate) kernel: Vec<u8>,
    pub(crate) module: Vec<u8>,
}

/// Writes the disk of the machine to `to` from its image's. A run that is provisional needs `telling`. Blocks on files.
pub(crate) fn write(
    record: &Record,
    program: &str,
    base: &Path,
    to: &Path,
    telling: Option<Telling>,
) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::error::Error| {
        format!(
            "the unikernel's disk: {what}: {}",
            crate::fault::chain(error)
        )
    };
    let from = File::open(base).map_err(|error| failed("opening its image's", &error))?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(to)
        .map_err(|error| failed("making it", &error))?;
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| error.to_string())?;
    let options = DiskOptions {
        id: VolumeId(id),
        label: Label::none(),
        free_bytes: record.spec.disk.0,
    };
    let mut manifest = manifest(record, program);
    manifest.mounts = mounts(record)?;
    let changes = Changes {
        files: names(record),
        // The kernel mounts nothing on what is not there.
        directories: (record.spec.named_volumes.iter())
            .map(|volume| volume.guest_path.as_bytes().to_vec())
            .collect(),
        modified: u32::try_from(record.created_ns / 1_000_000_000).ok(),
        boot: telling
            .map(|Telling { kernel, module }| calls::tell(&mut manifest, &CALLS, kernel, module)),
    };
    let written = remaster(
        from,
        BufWriter::with_capacity(BUFFER, file),
        &options,
        &manifest,
        &changes,
    );
    written.map_err(|error| failed("writing it", &error))?;
    let mut disk = File::options()
        .read(true)
        .write(true)
        .open(to)
        .map_err(|error| failed("opening it", &error))?;
    klog::clear(&mut disk).map_err(|error| failed("clearing its record", &error))
}

/// The files by which programs know names, as a Linux guest has them.
fn names(record: &Record) -> Vec<(Vec<u8>, Vec<u8>)> {
    let address = match record.spec.network {
        Network::User => GUEST_ADDRESS,
        Network::None => Ipv4Addr::LOCALHOST,
    };
    let hosts = format!("127.0.0.1\tlocalhost\n{address}\t{}\n", record.hostname);
    let resolver = match record.spec.network {
        Network::User => format!("nameserver {NAME_SERVER}\n"),
        Network::None => String::new(),
    };
    [
        ("etc/hostname", format!("{}\n", record.hostname)),
        ("etc/hosts", hosts),
        ("etc/resolv.conf", resolver),
    ]
    .map(|(path, text)| (path.as_bytes().to_vec(), text.into_bytes()))
    .into()
}

fn mounts(record: &Record) -> Result<Vec<Mount>, String> {
    let mount = |volume: &NamedVolume| {
        let label = Label::new(&volume.name).map_err(|error| error.to_string())?;
        Ok(Mount {
            volume: MountSource::Label(label),
            directory: volume.guest_path.as_bytes().to_vec(),
            read_only: volume.read_only,
        })
    };
    record.spec.named_volumes.iter().map(mount).collect()
}

fn manifest(record: &Record, program: &str) -> Manifest {
    let mut environment: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut set = |name: &str, value: &str| {
        let name = name.as_bytes();
        if !environment.iter().any(|(known, _)| known == name) {
            environment.push((name.to_vec(), value.as_bytes().to_vec()));
        }
    };
    // The last of two counts, as in a Linux guest.
    for variable in record.env.iter().rev() {
        set(&variable.name, &variable.value);
    }
    set(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    set("HOME", "/root");
    set("HOSTNAME", &record.hostname);
    Manifest {
        program: program.as_bytes().to_vec(),
        arguments: record
            .argv
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        environment,
        working_directory: (!record.working_dir.is_empty())
            .then(|| record.working_dir.as_bytes().to_vec()),
        network: match record.spec.network {
            // It has no device then: what it sent could not be taken back.
            _ if record.provisional => manifest::Network::Automatic,
            Network::User => manifest::Network::Static {
                address: GUEST_ADDRESS,
                netmask: Ipv4Addr::from(u32::MAX << (32 - u32::from(PREFIX))),
                gateway: Some(GATEWAY),
            },
            Network::None => manifest::Network::Automatic,
        },
        debug_exit: true,
        read_only_root: record.spec.read_only,
        reboot_on_exit: Some(ExitMatch::OneOf(
            (0..=u8::MAX)
                .filter(|code| !KERNELS_OWN.contains(code))
                .collect(),
        )),
        // So that the kernel says when a program has tried to make a process.
        further: vec![(b"log_level".to_vec(), Value::text("warn"))],
        ..Manifest::default()
    }
}
