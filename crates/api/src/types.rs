//! The bodies of requests and answers. Sizes are bytes, times are RFC 3339 in UTC, durations are milliseconds.

mod forwards;
mod parts;
mod placing;
mod receipts;
mod services;
mod snapshots;
mod tasks;
mod volumes;

pub use forwards::{Forward, ForwardRequest, PORT_STREAM};
pub use parts::{ImageParts, LayerPart, ReceivedBlob, WantedLayer, WantedParts};
pub use placing::{
    NodeStatement, NodeTerms, OfferAnswer, OfferRequest, PlaceRequest, Placed, StatedFacts,
};
pub use receipts::{VerifiedReceipt, VerifyReceiptRequest};
pub use services::{
    CopyOfService, CreateServiceRequest, ScaleServiceRequest, Service, ServiceCopy, ServiceNode,
};
pub use snapshots::{
    CreateSnapshotRequest, ForkRequest, Forked, PackedSnapshot, RestoreRequest, Snapshot,
    WantedSnapshot,
};
pub use tasks::{CreateTaskRequest, Task, TaskSemantics, TaskState};
pub use volumes::{CreateVolumeRequest, Volume};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// What kind of fault an error is; the CLI's exit code and tone follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request itself is wrong.
    User,
    /// The thing named does not exist.
    NotFound,
    /// The image named is not on this node (pull it).
    ImageNotFound,
    /// The thing is not in a state that allows this.
    Conflict,
    /// Something on this host is absent, broken or full.
    Host,
    /// A registry or another node misbehaved.
    Peer,
    /// The caller may not do this.
    Denied,
    /// A program could not be started in the guest.
    StartFailed,
    /// A fault of our own.
    Internal,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What kind of fault.
    pub kind: ErrorKind,
    /// What failed and why, one layer after another.
    pub message: String,
    /// What to type or do next, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The exit code a command line should end with, where the fault has one of its own (125, 126, 127).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The program's version.
    pub version: String,
    /// The interface's version.
    pub api: String,
    /// Process id of the node.
    pub pid: u32,
    /// When the node started.
    pub started_at: String,
    /// Where it keeps its state.
    pub state_dir: String,
    /// Machines that are not ended.
    pub machines_active: u64,
}

/// `POST /v1/machines`: one machine that runs one program. Everything but the image has a default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunRequest {
    /// Image name, id, or id prefix.
    pub image: String,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// Replaces the image's entry point; an empty list clears it.
    pub entrypoint: Option<Vec<String>>,
    /// Name of the machine; made up where absent.
    pub name: Option<String>,
    /// CPUs, such as `"1.5"`.
    pub cpus: Option<String>,
    /// Memory, such as `"512m"`.
    pub memory: Option<String>,
    /// Size of the writable layer, such as `"10g"`.
    pub disk: Option<String>,
    /// `NAME=value`, added to the image's.
    pub env: Vec<String>,
    /// User in the guest.
    pub user: Option<String>,
    /// Working directory in the guest.
    pub working_dir: Option<String>,
    /// Host name in the guest.
    pub hostname: Option<String>,
    /// Root file system read-only.
    pub read_only: bool,
    /// `HOSTDIR:GUESTDIR[:ro]`.
    pub volumes: Vec<String>,
    /// `[ADDRESS:]HOST:GUEST[/udp]`.
    pub ports: Vec<String>,
    /// `user` (default) or `none`.
    pub network: Option<String>,
    /// A terminal of this size.
    pub tty: Option<TerminalSize>,
    /// Keep standard input open for an attached client.
    pub stdin: bool,
    /// Remove the machine when it ends.
    pub auto_remove: bool,
    /// Longest run in milliseconds.
    pub timeout_ms: Option<u64>,
    /// `auto`, `firecracker`, `nanovms` or `qemu`.
    pub hypervisor: Option<String>,
    /// Signal name or number that asks the program to end.
    pub stop_signal: Option<String>,
    /// Guest kernel by name.
    pub kernel: Option<String>,
    /// Boot the machine, even where it could be forked from a template.
    pub no_template: bool,
    /// The program may be run a second time, from its beginning, without harm: where a unikernel turns out to be the wrong
    /// choice, it is run again on Linux.
    pub retry_safe: bool,
    /// Most bytes in a second through each disk: a number with `k`, `m` or `g`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_rate: Option<String>,
    /// Most reads and writes in a second of each disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_ops: Option<u32>,
    /// Most bytes in a second through the network, each way. Takes Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_rate: Option<String>,
    /// Whether the guest's memory is to be of the huge pages (2 MiB) that the host has set aside. Such a machine boots, and
    /// cannot be forked or captured; its memory is rounded up to whole pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// Whether the guest's kernel tells on its console what it does (`GET /v1/machines/{machine}/console`). Such a machine boots.
    #[serde(default)]
    pub console: bool,
    /// 32 random hexadecimal digits, which the receipt repeats: so that no receipt of another request passes for this
    /// one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Set by a client that will attach at once: a machine that removes itself waits some seconds for it, so that the
    /// client hears of its end even where it failed at once.
    pub attach: bool,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What was chosen for a machine, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Choice {
    /// The hypervisor as users name it: `firecracker`, `nanovms` or `qemu`.
    pub hypervisor: String,
    /// The monitor: `qemu`, `firecracker`.
    pub vmm: String,
    /// What it boots: `linux`, `nanos`.
    pub payload: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Each rule that fired, in order, in words.
    pub reasons: Vec<String>,
}

/// One step of a start, for `--timings`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timing {
    /// What was done: a stable short name.
    pub step: String,
    /// When it began, in milliseconds after the request arrived at the node.
    pub begin_ms: f64,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
}

/// A machine as listings and `inspect` show it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Image name as the user would type it.
    pub image: String,
    /// Image id.
    pub image_id: String,
    /// The full command line that runs in it.
    pub command: Vec<String>,
    /// `preparing`, `booting`, `running`, `paused`, `stopping`, `ended`.
    pub state: String,
    /// Counts replacements under this id.
    pub generation: u64,
    /// When it was asked for.
    pub created_at: String,
    /// When its program started.
    pub started_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Exit code, once ended.
    pub exit_code: Option<u8>,
    /// Why it ended where that is not just its exit code, or what troubles it while it runs.
    pub message: Option<String>,
    /// Published ports, such as `127.0.0.1:8080->80/tcp`.
    pub ports: Vec<String>,
    /// What runs it.
    pub choice: Option<Choice>,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// The node whose user it belongs to, by its id; absent for those of the node's owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Which copy of a service it is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<CopyOfService>,
}

/// `GET /v1/machines/{machine}`: everything known of one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MachineDetail {
    /// What listings show.
    #[serde(flatten)]
    pub machine: Machine,
    /// CPUs.
    pub cpus: f64,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Writable layer in bytes.
    pub disk_bytes: u64,
    /// Names of environment variables. Values may be secrets and are not shown.
    pub env_names: Vec<String>,
    /// User in the guest.
    pub user: String,
    /// Working directory.
    pub working_dir: String,
    /// Host name in the guest.
    pub hostname: String,
    /// Root file system read-only.
    pub read_only: bool,
    /// `HOSTDIR:GUESTDIR[:ro]`.
    pub volumes: Vec<String>,
    /// `user` or `none`.
    pub network: String,
    /// Whether the program has a terminal.
    pub tty: bool,
    /// Removed when it ends.
    pub auto_remove: bool,
    /// Guest kernel by name.
    pub kernel: Option<String>,
    /// The template it was forked from; absent where it booted.
    pub template: Option<String>,
    /// Whether it was forked before it was asked for, and kept ready.
    #[serde(default)]
    pub warm: bool,
    /// The machine or snapshot that it goes on from; absent where its program began in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Process id of the monitor, while it runs.
    pub vmm_pid: Option<u32>,
    /// Which fences hold the monitor.
    pub fences: Vec<String>,
    /// Steps of its start.
    pub timings: Vec<Timing>,
    /// Its directory on the host.
    pub dir: String,
}

/// `POST /v1/machines/{machine}/stop`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StopRequest {
    /// How long the program has to end by itself; 10 s where absent.
    pub grace_ms: Option<u64>,
    /// Signal to ask with, by name or number; the image's where absent.
    pub signal: Option<String>,
}

/// `POST /v1/machines/{machine}/kill`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KillRequest {
    /// Signal by name or number; KILL where absent, which takes the whole machine down.
    pub signal: Option<String>,
}

/// `GET /v1/machines/{machine}/wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitAnswer {
    /// The exit code.
    pub exit_code: u8,
    /// Why, where the code alone does not say.
    pub message: Option<String>,
}

/// One event of `GET /v1/machines/{machine}/logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum LogEvent {
    /// Output of the program.
    Output {
        /// `stdout` or `stderr`.
        stream: String,
        /// When the node received it.
        time: String,
        /// The bytes, in base64.
        data: String,
    },
    /// Something was not recorded, and why.
    Gap {
        /// Bytes that are missing.
        bytes: u64,
        /// Why.
        reason: String,
    },
}

/// `POST /v1/machines/{machine}/exec` (the first text message of its WebSocket).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExecRequest {
    /// The command line.
    pub command: Vec<String>,
    /// `NAME=value`, added to the machine's.
    pub env: Vec<String>,
    /// User; the machine's where absent.
    pub user: Option<String>,
    /// Working directory; the machine's where absent.
    pub working_dir: Option<String>,
    /// A terminal of this size.
    pub tty: Option<TerminalSize>,
    /// Whether standard input will be sent.
    pub stdin: bool,
}

/// The first text message on `GET /v1/machines/{machine}/attach`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AttachRequest {
    /// Send what was printed before, too.
    pub from_start: bool,
    /// Whether standard input will be sent. One client at a time may.
    pub stdin: bool,
    /// Say the receipt before the end.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub receipt: bool,
}

/// `GET /v1/machines/{machine}/stats` (each event, or the one answer).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// Machine id.
    pub id: String,
    /// Machine name.
    pub name: String,
    /// CPU time used in the guest since boot, in milliseconds.
    pub cpu_ms: u64,
    /// CPU use since the last sample in percent of one CPU; absent on the first.
    pub cpu_percent: Option<f64>,
    /// Memory in use in the guest, caches not counted, in bytes.
    pub memory_used_bytes: u64,
    /// Memory of the guest, in bytes.
    pub memory_total_bytes: u64,
    /// Memory the monitor holds on the host, in bytes.
    pub host_resident_bytes: u64,
    /// Processes in the guest.
    pub processes: u64,
    /// Writable layer in use, in bytes.
    pub disk_used_bytes: u64,
    /// Received by the guest, in bytes.
    pub net_rx_bytes: u64,
    /// Sent by the guest, in bytes.
    pub net_tx_bytes: u64,
    /// What the guest's balloon device tells, where it has one (Firecracker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
}

/// What a guest's balloon device tells of its memory, each ten seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Balloon {
    /// What the balloon shall hold, in bytes.
    pub target_bytes: u64,
    /// What it holds, and the host has back, in bytes.
    pub held_bytes: u64,
    /// What the guest uses for nothing, in bytes; absent until it has told.
    pub free_bytes: Option<u64>,
    /// What new programs could have without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Caches that the guest could give back at once, in bytes.
    pub caches_bytes: Option<u64>,
    /// Page faults that waited for a disk, since its boot.
    pub major_faults: Option<u64>,
}

/// What a path in a guest is (`HEAD`-like, `GET /v1/machines/{machine}/stat?path=`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathStat {
    /// Whether it exists.
    pub exists: bool,
    /// Whether it is a directory, links followed.
    pub is_dir: bool,
    /// Permission bits.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Where it leads, if it is a symbolic link.
    pub link_target: Option<String>,
}

/// An image as listings show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// `sha256:…` of its configuration.
    pub id: String,
    /// Names that lead to it.
    pub names: Vec<String>,
    /// Architecture, such as `amd64`.
    pub architecture: String,
    /// When it was built, as it says itself.
    pub created: Option<String>,
    /// Compressed layers in bytes.
    pub size_bytes: u64,
    /// Root disk in bytes.
    pub disk_bytes: u64,
    /// Entry point and command.
    pub entrypoint: Vec<String>,
    /// Command.
    pub cmd: Vec<String>,
    /// Environment.
    pub env: Vec<String>,
    /// User.
    pub user: String,
    /// Working directory.
    pub working_dir: String,
    /// Machines, ended ones included, that use it.
    pub machines: u64,
}

/// `POST /v1/images/pull`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PullRequest {
    /// Image name.
    pub image: String,
    /// Speak plain HTTP to the registry.
    pub insecure: bool,
    /// Directory of docker's `config.json`; the caller's own, since the node may run as another user.
    pub docker_config_dir: Option<String>,
}

/// One event of a pull or an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum ImageEvent {
    /// A short name of the step that begins: `resolving`, `verifying`, `building disk`, ….
    Step {
        /// The step.
        step: String,
    },
    /// A layer on its way.
    Layer {
        /// Its digest.
        digest: String,
        /// Bytes here already.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Over: the image.
    Done {
        /// The image.
        image: Image,
    },
    /// Over: it failed.
    Failed {
        /// How.
        error: ErrorBody,
    },
}

/// `DELETE /v1/images/{image}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedImage {
    /// Names that no longer lead to it.
    pub untagged: Vec<String>,
    /// Its id, where it is gone altogether.
    pub deleted: Option<String>,
}

/// `POST /v1/images/prune` and `POST /v1/templates/prune`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pruned {
    /// What was removed.
    pub deleted: Vec<String>,
    /// Bytes freed.
    pub freed_bytes: u64,
}

/// A guest kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kernel {
    /// Its name on this node.
    pub name: String,
    /// What it is the kernel of: `linux` or `nanos`.
    pub payload: String,
    /// Its version: of Linux, as `uname -r` prints it; of Nanos, the beginning of its digest where it does not say.
    pub version: String,
    /// Whether machines with this payload get it unless they ask for another.
    pub default: bool,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// The kernel that is booted, on the node's host.
    pub path: String,
}

/// `POST /v1/kernels`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AddKernelRequest {
    /// `debian` (fetched with apt), or a path on the node's host: a `.deb`, a bzImage or a vmlinux; for Nanos, a kernel image.
    pub source: String,
    /// What it is the kernel of: `linux` (default) or `nanos`.
    pub payload: Option<String>,
    /// Name; the kernel's version where absent.
    pub name: Option<String>,
    /// Directory of its modules, for a kernel that needs any and is not a `.deb`.
    pub modules_dir: Option<String>,
    /// Directory of a Nanos kernel's modules.
    pub klibs_dir: Option<String>,
    /// Make it the default among those of its payload.
    pub default: bool,
}

/// A ready machine, captured before it ran anything, from which others are forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name: a digest of everything that a fork shares with it.
    pub key: String,
    /// The image's name.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The guest kernel's name.
    pub kernel: String,
    /// The monitor and its version.
    pub vmm: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// Size of the guest's writable layer.
    pub disk_bytes: u64,
    /// Whether the guest has a network interface.
    pub network: bool,
    /// When it was made.
    pub created_at: String,
    /// When it was used last.
    pub used_at: String,
    /// How long it took to be made.
    pub making_ms: u64,
    /// What it takes on the node's disk; zero where it is not written yet, or could not be.
    pub stored_bytes: u64,
    /// What it takes of the host's memory; zero until it is used.
    pub resident_bytes: u64,
    /// Machines forked from it that have not ended. They do not need it any more.
    pub machines: u64,
    /// Machines forked from it that are kept ready for requests to come.
    #[serde(default)]
    pub warm: u32,
}

/// `POST /v1/templates`: what the machines are like that are to be forked. Everything but the image has `run`'s default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CreateTemplateRequest {
    /// Image name, id, or id prefix.
    pub image: String,
    /// The program that its guest reads ahead; the image's own where empty. It is not run.
    pub command: Vec<String>,
    /// CPUs, such as `"1.5"`.
    pub cpus: Option<String>,
    /// Memory, such as `"512m"`.
    pub memory: Option<String>,
    /// Size of the writable layer, such as `"10g"`.
    pub disk: Option<String>,
    /// `user` (default) or `none`.
    pub network: Option<String>,
    /// Guest kernel by name.
    pub kernel: Option<String>,
    /// `auto`, `firecracker`, `nanovms` or `qemu`.
    pub hypervisor: Option<String>,
}

/// The answer to `POST /v1/templates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedTemplate {
    /// The template, ready.
    pub template: Template,
    /// Whether it was made for this request; it was there before otherwise.
    pub created: bool,
    /// How long this request took.
    pub took_ms: u64,
}

/// One line of `GET /v1/doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Need {
    /// Short name.
    pub name: String,
    /// `works`, `absent` or `broken`.
    pub state: String,
    /// What was found.
    pub detail: String,
    /// The command that mends it.
    pub mend: Option<String>,
    /// Whether machines cannot run without it.
    pub required: bool,
}

/// `GET /v1/doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// Every need.
    pub needs: Vec<Need>,
    /// Whether machines can run here.
    pub ready: bool,
}

/// `POST /v1/explain`: which hypervisor a request would get, without running it. The body is a [`RunRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// What would run it.
    pub choice: Choice,
    /// The full command line.
    pub command: Vec<String>,
    /// How it would start, in words: forked, from which template, or booted, and why.
    pub start: String,
    /// Guest memory that it would get, in bytes.
    pub memory_bytes: u64,
    /// What is known of the program; absent where the image could not be looked at.
    pub program: Option<ProgramFacts>,
}

/// What is known of one program of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgramFacts {
    /// The path at which it was found; the first word of the command where it was not.
    pub path: String,
    /// The file behind that path, links followed; empty where there is none.
    pub file: String,
    /// `elf`, `script`, `missing`, or `other` for what cannot be executed or understood.
    pub kind: String,
    /// The executable that the rest speaks of: the program itself, or a script's interpreter.
    pub executable: String,
    /// `static`, `static-pie` or `dynamic`.
    pub linkage: Option<String>,
    /// How many libraries it loads when it starts.
    pub libraries: u64,
    /// Libraries that the image does not have.
    pub missing: Vec<String>,
    /// Languages that it is known to be made with or to run.
    pub runtimes: Vec<String>,
    /// Whether it may create processes: `no`, `in_libraries`, `on_demand` or `yes`.
    pub may_create: String,
    /// How sure that is: `certain`, `likely` or `guess`.
    pub confidence: String,
    /// Why it is not surer.
    pub doubt: Option<String>,
    /// What speaks for it: the strongest first, some of many.
    pub evidence: Vec<String>,
    /// What practice showed instead.
    pub correction: Option<String>,
    /// Files, directories and links of the whole image.
    pub image_entries: u64,
    /// Bytes of all its files.
    pub image_bytes: u64,
}
