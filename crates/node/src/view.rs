//! From what the node keeps to what the interface shows.

use crate::machine::{Record, Snapshot, Step};
use crate::templates::Listed;
use jiff::Timestamp;
use vistara_api::{
    Balloon, Choice, CopyOfService, Image, Kernel, Machine, MachineDetail, Need, ProgramFacts,
    Template, Timing,
};
use vistara_machine::BalloonReport;
use vistara_machine::boot::NanosKernel;
use vistara_model::{ImageFacts, MayCreate, NeedState, Network, Payload, ProgramKind, VolumeMount};

/// Nanoseconds since 1970 as RFC 3339.
pub(crate) fn time(ns: u64) -> String {
    Timestamp::from_nanosecond(i128::from(ns))
        .unwrap_or(Timestamp::UNIX_EPOCH)
        .to_string()
}

pub(crate) fn choice(choice: &vistara_control::Choice) -> Choice {
    Choice {
        hypervisor: choice.hypervisor.to_string(),
        vmm: choice.backend.vmm.to_string(),
        payload: choice.backend.payload.to_string(),
        accelerator: choice.backend.accelerator.to_string(),
        reasons: choice.reasons.clone(),
    }
}

pub(crate) fn balloon(report: BalloonReport) -> Balloon {
    Balloon {
        target_bytes: report.target,
        held_bytes: report.held,
        free_bytes: report.free,
        available_bytes: report.available,
        caches_bytes: report.caches,
        major_faults: report.major_faults,
    }
}

fn recorded_choice(record: &Record) -> Choice {
    Choice {
        hypervisor: record.hypervisor.to_string(),
        vmm: record.backend.vmm.to_string(),
        payload: record.backend.payload.to_string(),
        accelerator: record.backend.accelerator.to_string(),
        reasons: record.reasons.clone(),
    }
}

pub(crate) fn machine(snapshot: &Snapshot) -> Machine {
    let record = &snapshot.record;
    Machine {
        id: record.id.to_string(),
        name: record.name.to_string(),
        image: record.spec.image.familiar(),
        image_id: record.image_id.to_string(),
        command: record.argv.clone(),
        state: record.state.to_string(),
        generation: record.generation.0,
        created_at: time(record.created_ns),
        started_at: record.started_ns.map(time),
        ended_at: record.ended_ns.map(time),
        exit_code: (record.ended_ns.and(record.end.as_ref()))
            .map(vistara_model::EndReason::exit_code),
        message: match record.ended_ns {
            Some(_) => record
                .end
                .as_ref()
                .and_then(vistara_model::EndReason::message),
            None => snapshot.trouble.clone(),
        },
        ports: record.spec.ports.iter().map(ToString::to_string).collect(),
        choice: Some(recorded_choice(record)),
        labels: record.spec.labels.clone(),
        owner: record.owner.as_ref().map(|owner| owner.node.to_string()),
        service: record.copy_of.as_ref().map(|copy| CopyOfService {
            id: copy.service.clone(),
            name: copy.name.clone(),
            slot: copy.number,
            generation: copy.generation.0,
        }),
    }
}

fn volume(volume: &VolumeMount) -> String {
    let mode = if volume.read_only { ":ro" } else { "" };
    format!("{}:{}{mode}", volume.host_path, volume.guest_path)
}

fn timing(step: &Step) -> Timing {
    Timing {
        step: step.step.clone(),
        begin_ms: step.begin_us as f64 / 1000.0,
        took_ms: step.took_us as f64 / 1000.0,
    }
}

pub(crate) fn detail(snapshot: &Snapshot, dir: &std::path::Path) -> MachineDetail {
    let record = &snapshot.record;
    let spec = &record.spec;
    let mut timings: Vec<Timing> = record.timings.iter().map(timing).collect();
    timings.sort_by(|one, other| one.begin_ms.total_cmp(&other.begin_ms));
    MachineDetail {
        machine: machine(snapshot),
        cpus: f64::from(spec.cpus.millis) / 1000.0,
        memory_bytes: spec.memory.0,
        disk_bytes: spec.disk.0,
        env_names: record
            .env
            .iter()
            .map(|variable| variable.name.clone())
            .collect(),
        user: record.user.clone(),
        working_dir: record.working_dir.clone(),
        hostname: record.hostname.clone(),
        read_only: spec.read_only,
        volumes: (spec.volumes.iter().map(volume))
            .chain(spec.named_volumes.iter().map(ToString::to_string))
            .collect(),
        network: match spec.network {
            Network::User => "user".to_owned(),
            Network::None => "none".to_owned(),
        },
        tty: spec.tty.is_some(),
        auto_remove: spec.auto_remove,
        kernel: record.kernel.clone(),
        template: record.template.clone(),
        warm: record.warm,
        parent: record.continues.as_ref().map(|from| from.parent.clone()),
        vmm_pid: record.vm.as_ref().map(|vm| vm.pid),
        fences: record
            .vm
            .as_ref()
            .map(|vm| vm.fences.clone())
            .unwrap_or_default(),
        timings,
        dir: dir.display().to_string(),
    }
}

pub(crate) fn image(image: &vistara_image::Image, machines: u64) -> Image {
    Image {
        id: image.id.to_string(),
        names: image
            .names
            .iter()
            .map(vistara_model::ImageRef::familiar)
            .collect(),
        architecture: image.architecture.to_string(),
        created: image.created.clone(),
        size_bytes: image.size_bytes,
        disk_bytes: image.disk_bytes,
        entrypoint: image.config.entrypoint.clone(),
        cmd: image.config.cmd.clone(),
        env: image.config.env.clone(),
        user: image.config.user.clone(),
        working_dir: image.config.working_dir.clone(),
        machines,
    }
}

pub(crate) fn template(listed: &Listed, machines: u64, warm: u32) -> Template {
    let kept = &listed.kept;
    Template {
        key: kept.key.clone(),
        image: kept.image.clone(),
        image_id: kept.image_id.to_string(),
        kernel: kept.kernel.clone(),
        vmm: kept.vmm.clone(),
        vcpus: kept.vcpus,
        memory_bytes: kept.memory_bytes,
        disk_bytes: kept.disk_bytes,
        network: kept.network,
        created_at: time(kept.created_ns),
        used_at: time(listed.used_ns),
        making_ms: kept.making_us / 1000,
        stored_bytes: listed.disk_bytes,
        resident_bytes: listed.resident_bytes,
        machines,
        warm,
    }
}

pub(crate) fn snapshot(listed: &crate::snapshots::Listed) -> vistara_api::Snapshot {
    let about = listed.about.as_ref();
    let record = about.ok().map(|about| &about.record);
    vistara_api::Snapshot {
        id: listed.id.clone(),
        name: listed.name().map(str::to_owned),
        machine: record.map(|record| record.name.to_string()),
        machine_id: record.map(|record| record.id.to_string()),
        image: record.map(|record| record.spec.image.familiar()),
        memory_bytes: record.map_or(0, |record| record.spec.memory.0),
        created_at: about.ok().map(|about| time(about.created_ns)),
        base: about.ok().and_then(|about| about.base.clone()),
        pause_ms: about.map_or(0.0, |about| about.pause_us as f64 / 1000.0),
        stored_bytes: listed.stored_bytes,
        problem: about.err().map(|unusable| unusable.0.clone()),
    }
}

pub(crate) fn kernel(kernel: &vistara_machine::boot::Kernel) -> Kernel {
    Kernel {
        name: kernel.record.name.clone(),
        payload: Payload::Linux.to_string(),
        version: kernel.record.release.clone(),
        default: kernel.is_default,
        size_bytes: kernel.record.vmlinux_bytes,
        path: kernel.vmlinux().display().to_string(),
    }
}

pub(crate) fn nanos_kernel(kernel: &NanosKernel) -> Kernel {
    Kernel {
        name: kernel.record.name.clone(),
        payload: Payload::Nanos.to_string(),
        version: kernel.record.version.clone(),
        default: kernel.is_default,
        size_bytes: kernel.record.kernel_bytes,
        path: kernel.path.display().to_string(),
    }
}

/// Of what speaks for a program's making of processes, so much is shown.
const EVIDENCE_SHOWN: usize = 8;

pub(crate) fn program(facts: &ImageFacts) -> ProgramFacts {
    let program = &facts.program;
    let processes = &program.processes;
    ProgramFacts {
        path: program.path.clone(),
        file: program.file.clone(),
        kind: match &program.kind {
            ProgramKind::Elf => "elf",
            ProgramKind::Script { .. } => "script",
            ProgramKind::Missing => "missing",
            ProgramKind::Other { .. } => "other",
        }
        .to_owned(),
        executable: program.executable.clone(),
        linkage: program.linkage.map(|linkage| linkage.to_string()),
        libraries: program.libraries.len() as u64,
        missing: program.missing.clone(),
        runtimes: program.runtimes.iter().map(ToString::to_string).collect(),
        may_create: match processes.may_create {
            MayCreate::No => "no",
            MayCreate::InLibraries => "in_libraries",
            MayCreate::OnDemand => "on_demand",
            MayCreate::Yes => "yes",
        }
        .to_owned(),
        confidence: processes.confidence.to_string(),
        doubt: processes.doubt.clone(),
        evidence: (processes.evidence.iter())
            .take(EVIDENCE_SHOWN)
            .map(ToString::to_string)
            .collect(),
        correction: (facts.correction.as_ref()).map(|correction| correction.seen.clone()),
        image_entries: facts.entries,
        image_bytes: facts.size.0,
    }
}

pub(crate) fn need(need: &vistara_model::Need) -> Need {
    Need {
        name: need.name.clone(),
        state: match need.state {
            NeedState::Works => "works",
            NeedState::Absent => "absent",
            NeedState::Broken => "broken",
        }
        .to_owned(),
        detail: need.detail.clone(),
        mend: need.mend.clone(),
        required: need.required,
    }
}

/// Whether machines can run on a host with these needs.
pub(crate) fn ready(needs: &[vistara_model::Need]) -> bool {
    needs
        .iter()
        .all(|need| !need.required || need.state == NeedState::Works)
}
