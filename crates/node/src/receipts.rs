//! Receipts of machines that have ended: what goes into one, when there is none, and the signature.
//!
//! One is made once, when the machine's task writes that it is over, and lies in the machine's record from then on: a later
//! node finds it there or finds a machine that has not ended. What it says was known before the end: what was asked
//! ([`Asked`], when the machine was made), what ran ([`Ran`], when it was launched), whether the program's own end was
//! heard. A machine whose end nobody saw gets none, and the reason in its place.

use crate::fault::{Answer, Fault, chain};
use crate::logbook::{Tallies, Tally};
use crate::machine::Record;
use crate::mesh::Mesh;
use crate::node::Mechanisms;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use vistara_image::Image;
use vistara_machine::VmUsage;
use vistara_model::{
    Architecture, Digest, EndReason, ExitStatus, Network, NodeId, Payload, RECEIPT_FORMAT, Receipt,
    ReceiptEnd, ReceiptHow, ReceiptOutput, ReceiptRan, ReceiptRequest, ReceiptStream, ReceiptTimes,
    ReceiptUsage, TEXT_BYTES_MAX, VmmKind, is_nonce, is_short,
};

/// What a machine's record keeps for its receipt, and then the receipt.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Proof {
    pub(crate) asked: Asked,
    pub(crate) ran: Option<Ran>,
    /// Whether the program's own end was heard, after all that it printed.
    pub(crate) exit_heard: bool,
    /// Whether some of what it printed may have been read by nobody: its end was learned from what it left behind, a node that
    /// read it died, or it was ended while it still spoke.
    pub(crate) cut: bool,
    /// Whether no node was there when the machine went.
    pub(crate) unseen: bool,
    /// When the program of a run in the place of an undone one began; the record's own time is the undone one's.
    pub(crate) began_again_ns: Option<u64>,
    pub(crate) receipt: Option<Kept>,
}

/// What was asked for, as far as nothing else of the record says it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Asked {
    /// Of the request's body.
    pub(crate) digest: Option<Digest>,
    pub(crate) nonce: Option<String>,
    manifest: Option<Digest>,
    architecture: Option<Architecture>,
}

/// What ran it, as far as nothing else of the record says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ran {
    vmm_version: Option<String>,
    kernel_digest: Option<Digest>,
}

/// What became of a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kept {
    /// It was made.
    Signed(String),
    /// There is none, and why.
    Missing(String),
}

/// What a monitor used at last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LastUsage {
    usage: VmUsage,
    peak: Option<u64>,
}

impl LastUsage {
    /// Of a machine that runs still; none where it is gone.
    pub(crate) fn of(vm: &dyn vistara_machine::Vm) -> Option<LastUsage> {
        let (usage, record) = (vm.usage(), vm.record());
        let peak = match record.kind {
            VmmKind::Qemu | VmmKind::Firecracker => vistara_host::facts::memory_peak(record.pid),
            // It is a part of this process.
            VmmKind::Fake => None,
        };
        (usage != VmUsage::default()).then_some(LastUsage { usage, peak })
    }
}

impl Asked {
    /// A request with this body, and this image for it.
    pub(crate) fn new(
        digest: Option<Digest>,
        nonce: Option<&String>,
        image: &Image,
    ) -> Answer<Asked> {
        if nonce.is_some_and(|nonce| !is_nonce(nonce)) {
            return Err(Fault::user(
                "the nonce is not one: it takes 32 lowercase hexadecimal digits",
            ));
        }
        Ok(Asked {
            digest,
            nonce: nonce.cloned(),
            manifest: image.manifest.clone(),
            architecture: Some(image.architecture.clone()),
        })
    }
}

impl Proof {
    /// Of a machine that was asked for so.
    pub(crate) fn of(asked: Asked) -> Proof {
        Proof {
            asked,
            ..Proof::default()
        }
    }

    /// Of one that goes on from another: nobody asked for it as for that one.
    pub(crate) fn of_copy(&self) -> Proof {
        Proof::of(Asked {
            digest: None,
            nonce: None,
            ..self.asked.clone()
        })
    }

    /// The program begins anew.
    pub(crate) fn begin_again(&mut self) {
        *self = Proof::of(std::mem::take(&mut self.asked));
    }
}

impl Ran {
    /// What a machine that is launched now runs on. Blocks on files.
    pub(crate) fn now(mechanisms: &Mechanisms, record: &Record) -> Ran {
        let vmm = mechanisms.vmm(record.backend.vmm);
        let kernel = || {
            let name = record.kernel.as_deref()?;
            match record.backend.payload {
                Payload::Linux => Some(mechanisms.kernels.get(name).ok()?.record.vmlinux_sha256),
                Payload::Nanos => {
                    let kernel = mechanisms.nanos.default_kernel().ok()??;
                    (kernel.record.name == name).then_some(kernel.record.kernel_sha256)
                }
            }
        };
        // The guest of one that goes on from another booted before: under this name there may be another kernel now.
        let digits = kernel().filter(|_| record.continues.is_none());
        Ran {
            vmm_version: vmm.map(|vmm| vmm.capabilities().version.clone()),
            kernel_digest: digits.and_then(|digits| format!("sha256:{digits}").parse().ok()),
        }
    }
}

/// SHA-256 of a command: its words, each followed by a zero byte.
pub(crate) fn command_digest(argv: &[String]) -> Digest {
    let mut hash = Sha256::new();
    for word in argv {
        hash.update(word.as_bytes());
        hash.update([0]);
    }
    Digest::from_sha256(hash.finalize().into())
}

/// The digest of a request's body.
pub(crate) fn body_digest(body: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(body).into())
}

/// Makes the receipt of a machine that has just ended, or says why there is none.
pub(crate) async fn make(
    mesh: &Mesh,
    record: &Record,
    tallies: Tallies,
    usage: Option<LastUsage>,
) -> Kept {
    let end = match ended(record) {
        Ok(end) => end,
        Err(why) => return Kept::Missing(why),
    };
    let open = match mesh.open().await {
        Ok(open) => open,
        Err(fault) => {
            let why = fault.0.message;
            tracing::error!(machine = %record.id, error = why, "a receipt cannot be signed");
            return Kept::Missing(format!("this node could not sign when it ended: {why}"));
        }
    };
    let receipt = state(open.identity.id(), record, end, &tallies, usage);
    match vistara_mesh::receipt::sign(&open.identity, &receipt) {
        Ok(text) => Kept::Signed(text),
        Err(error) => {
            let why = chain(&error);
            tracing::error!(machine = %record.id, error = why, "a receipt could not be made");
            Kept::Missing(format!("what is to be said of it does not make one: {why}"))
        }
    }
}

/// How it ended, where somebody saw its program begin and end.
fn ended(record: &Record) -> Result<ReceiptEnd, String> {
    let never = "its program never began";
    let end = match &record.end {
        None => return Err("it has not ended".to_owned()),
        Some(EndReason::PrepareFailed { message } | EndReason::BootFailed { message }) => {
            return Err(format!("{never}: {message}"));
        }
        Some(EndReason::Lost { message }) => {
            return Err(format!("nobody saw how it ended: {message}"));
        }
        Some(end) => end,
    };
    let failed = matches!(end, EndReason::StartFailed { .. });
    if began_ns(record).is_none() && !failed {
        return Err(never.to_owned());
    }
    if record.proof.unseen && !record.proof.exit_heard && !failed {
        return Err("nobody saw how it ended: no node was running then".to_owned());
    }
    let (how, status, out_of_memory) = match end {
        EndReason::Exited {
            status,
            out_of_memory,
        } => match status {
            ExitStatus::Code(_) => (ReceiptHow::Exited, None, *out_of_memory),
            ExitStatus::Signal(_) => (ReceiptHow::Signaled, Some(*status), *out_of_memory),
        },
        EndReason::StartFailed { .. } => (ReceiptHow::StartFailed, None, false),
        EndReason::Stopped { status } => (ReceiptHow::Stopped, *status, false),
        EndReason::TimedOut => (ReceiptHow::TimedOut, None, false),
        EndReason::GuestPanic { .. } => (ReceiptHow::GuestPanic, None, false),
        EndReason::VmmFailed { .. } => (ReceiptHow::MonitorFailed, None, false),
        EndReason::PrepareFailed { .. } | EndReason::BootFailed { .. } | EndReason::Lost { .. } => {
            return Err(never.to_owned());
        }
    };
    Ok(ReceiptEnd {
        how,
        exit_code: end.exit_code(),
        signal: status.and_then(|status| match status {
            ExitStatus::Signal(number) => Some(number),
            ExitStatus::Code(_) => None,
        }),
        out_of_memory,
    })
}

/// When the program whose end this is began: a run that was undone is none.
fn began_ns(record: &Record) -> Option<u64> {
    match record.undone {
        Some(_) => record.proof.began_again_ns,
        None => record.started_ns,
    }
}

/// A text as far as receipts take one.
fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn stream(tally: &Tally) -> ReceiptStream {
    ReceiptStream {
        digest: tally.digest(),
        bytes: tally.bytes,
        missing_bytes: tally.missing,
    }
}

fn state(
    node: NodeId,
    record: &Record,
    end: ReceiptEnd,
    tallies: &Tallies,
    usage: Option<LastUsage>,
) -> Receipt {
    let spec = &record.spec;
    let Proof { asked, ran, .. } = &record.proof;
    // A fork or a restored snapshot has the other's owner, who need not be who asked for it.
    let owner = (record.owner.as_ref()).filter(|_| record.continues.is_none());
    let to_the_end = record.proof.exit_heard && !record.proof.cut;
    let ms = |ns: u64| ns / 1_000_000;
    let ended_ns = record.ended_ns.unwrap_or(record.created_ns);
    let failed = end.how == ReceiptHow::StartFailed;
    let (stdout, stderr) = (stream(&tallies.stdout), stream(&tallies.stderr));
    let whole = |stream: &ReceiptStream| stream.digest.is_some() && stream.missing_bytes == 0;
    Receipt {
        format: RECEIPT_FORMAT,
        node,
        machine: record.id.clone(),
        generation: record.generation.0,
        request: ReceiptRequest {
            digest: asked.digest.clone(),
            nonce: asked.nonce.clone(),
            caller: owner.map(|owner| owner.node),
            grant: owner.map(|owner| owner.grant.clone()),
            image: cut(&spec.image.to_string()),
            image_id: record.image_id.clone(),
            manifest: asked.manifest.clone(),
            architecture: (asked.architecture.clone()).filter(|name| !name.0.is_empty()),
            command: is_short(&record.argv).then(|| record.argv.clone()),
            command_digest: command_digest(&record.argv),
            cpu_millis: spec.cpus.millis,
            memory_bytes: spec.memory.0,
            disk_bytes: spec.disk.0,
            network: spec.network != Network::None,
            stdin: spec.stdin,
            timeout_ms: (spec.timeout)
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        },
        ran: ReceiptRan {
            hypervisor: record.hypervisor,
            vmm: record.backend.vmm.to_string(),
            vmm_version: (ran.as_ref())
                .and_then(|ran| ran.vmm_version.as_deref())
                .map(cut)
                .filter(|version| !version.is_empty()),
            payload: record.backend.payload.to_string(),
            accelerator: record.backend.accelerator.to_string(),
            kernel: record.kernel.as_deref().map(cut),
            kernel_digest: ran.as_ref().and_then(|ran| ran.kernel_digest.clone()),
            template: record.template.as_deref().map(cut),
            parent: (record.continues.as_ref()).map(|from| cut(&from.parent)),
            undone: record.undone.is_some(),
            second_run: record.retried,
        },
        end,
        output: ReceiptOutput {
            complete: (to_the_end || failed) && whole(&stdout) && whole(&stderr),
            stdout,
            stderr,
            terminal: spec.tty.is_some(),
            merged: record.backend.payload == Payload::Nanos,
        },
        usage: ReceiptUsage {
            cpu_ms: usage
                .map(|last| u64::try_from(last.usage.cpu_time.as_millis()).unwrap_or(u64::MAX)),
            memory_bytes: usage.map(|last| last.usage.resident_bytes),
            memory_peak_bytes: usage.and_then(|last| last.peak),
            run_ms: began_ns(record).map_or(0, |began| ms(ended_ns).saturating_sub(ms(began))),
        },
        times: ReceiptTimes {
            asked_ms: ms(record.created_ns),
            began_ms: began_ns(record).filter(|_| !failed).map(ms),
            ended_ms: ms(ended_ns),
        },
    }
}

/// The receipt of a machine, or why there is none, for whoever asks.
pub(crate) fn of(record: &Record) -> Result<&str, Fault> {
    let name = &record.name;
    match (&record.proof.receipt, record.ended_ns) {
        (Some(Kept::Signed(text)), _) => Ok(text),
        (Some(Kept::Missing(why)), _) => Err(Fault::conflict(format!(
            "there is no receipt of machine {name}: {why}"
        ))),
        (None, None) => Err(Fault::conflict(format!(
            "machine {name} has not ended, and has no receipt yet"
        ))
        .hint(format!("wait for its end: vistara wait {name}"))),
        (None, Some(_)) => Err(Fault::conflict(format!(
            "there is no receipt of machine {name}: it ended before this node made receipts"
        ))),
    }
}

#[cfg(test)]
mod tests;
