//! From a record to a running unikernel.

use super::super::Record;
use super::super::prepare::{OVERLAY, Stopwatch, blocking, plan};
use super::disk::{self, Telling};
use crate::fault::{Fault, chain};
use crate::node::Node;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use vistara_image::{Asked, Image, Wishes};
use vistara_machine::boot::NanosKernel;
use vistara_machine::{Disk, NanosBoot, Start, Vm, Vmm};
use vistara_model::{ProgramFacts, ProgramKind, VmmKind};

/// Makes its disk and launches it. The message of a failure is for the user.
pub(crate) async fn launch(
    node: &Node,
    record: &Record,
    dir: &Path,
    image: Image,
    vmm: &dyn Vmm,
    watch: &mut Stopwatch,
) -> Result<Arc<dyn Vm>, String> {
    let mechanisms = node.mechanisms();
    let begin = Instant::now();
    let path = dir.join(OVERLAY);
    let kernel = {
        let (record, path) = (record.clone(), path.clone());
        blocking(move || {
            let kernel = mechanisms.nanos.default_kernel()?.ok_or_else(|| {
                Fault::user("there is no Nanos kernel on this node any more")
                    .hint("vistara kernel add nanos FILE")
            })?;
            let asked = Asked::new(&record.argv, &record.env, &record.working_dir);
            let facts = mechanisms.images.program_facts(&image, &asked)?.program;
            let program = program(&facts)?;
            let wishes = Wishes {
                argv: &record.argv,
                env: &record.env,
                working_dir: &record.working_dir,
            };
            let base = mechanisms.images.unikernel_disk(&image, &facts, &wishes)?;
            let telling = match record.provisional {
                true => Some(telling(&kernel)?),
                false => None,
            };
            disk::write(&record, program, &base.path, &path, telling)
                .map_err(|message| Fault::new(vistara_api::ErrorKind::Host, message))?;
            Ok(kernel)
        })
        .await
        .inspect_err(|_| {
            // Half a disk is nobody's; the machine's directory goes with the machine.
            let _ = std::fs::remove_file(dir.join(OVERLAY));
        })?
    };
    watch.note("unikernel disk", begin);
    let begin = Instant::now();
    let start = Start::Nanos(NanosBoot {
        kernel: match record.backend.vmm {
            VmmKind::Firecracker => kernel.firecracker_path,
            VmmKind::Qemu | VmmKind::Fake => kernel.path,
        },
    });
    let mut disks = vec![Disk {
        path,
        read_only: false,
    }];
    let volumes = node.volumes();
    for volume in record.spec.named_volumes.clone() {
        let (volumes, name) = (volumes.clone(), volume.name);
        disks.push(Disk {
            path: blocking(move || volumes.get_or_make(&name)).await?,
            read_only: volume.read_only,
        });
    }
    let mut plan = plan(node, record, dir, start, disks);
    plan.shares.clear();
    if record.provisional {
        // What was sent could not be taken back.
        plan.nic = None;
    }
    let vm = vmm.launch(&plan).await.map_err(|error| chain(&error));
    watch.note("launch", begin);
    // The trees of both disks were in memory; not before the launch, as the guest would wait for it.
    tokio::task::spawn_blocking(vistara_host::memory::give_back);
    let vm = vm?;
    Ok(Arc::from(vm))
}

/// The files by which this kernel tells of its program's calls.
fn telling(kernel: &NanosKernel) -> Result<Telling, Fault> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| {
            let message = format!("reading {} failed: {error}", path.display());
            Fault::new(vistara_api::ErrorKind::Host, message)
        })
    };
    let klibs = (kernel.klibs.as_deref())
        .ok_or_else(|| Fault::user("the Nanos kernel has no modules any more"))?;
    Ok(Telling {
        kernel: read(&kernel.path)?,
        module: read(&klibs.join(vistara_nanos::calls::MODULE))?,
    })
}

/// The program's path on the disk.
fn program(facts: &ProgramFacts) -> Result<&str, Fault> {
    match &facts.kind {
        ProgramKind::Elf => Ok(&facts.path),
        // The choice refuses these before; the image may have been replaced since.
        ProgramKind::Script { .. } | ProgramKind::Missing | ProgramKind::Other { .. } => {
            Err(Fault::user(format!(
                "{} is not a program that a unikernel can run",
                facts.path
            ))
            .hint("leave --hypervisor out to run it in a Linux guest"))
        }
    }
}
