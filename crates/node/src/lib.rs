//! The node: it gathers facts, asks `vistara-control` what to do, and has the mechanisms do it.
//!
//! One process serves one state directory. It owns the machines' records and logs, but not their lives: machines outlive
//! it, and the next node takes them over from their directories.
//!
//! Invariants: each machine has exactly one task that changes it ([`machine`]); what a user may see of it is published
//! after it is on disk; no request waits while a lock is held.

mod baseline;
mod doctor;
mod fault;
mod fence;
mod images;
mod linger;
mod logbook;
mod machine;
mod mesh;
mod node;
mod options;
mod receipts;
mod relay;
mod request;
mod service;
mod services;
mod snapshots;
mod stock;
mod templates;
mod view;
mod volumes;

/// What `vistara bench` measures, and measures against.
pub use baseline::{PLACEMENT_POLICIES, QuietNodes, placement_times, raw_agent_ready};
pub use fault::NodeError;
/// For the program that guards copies of services.
pub use fence::{GuardProgram, stand as stand_guard};
pub use options::{NodeOptions, TemplateLimits, Vmms};
pub use relay::{RelayFault, RelayPlan, run_relay};
pub use service::{openapi, run};
/// For whoever copies a machine's disk, which is mostly holes.
pub use vistara_host::files::clone_sparse;
/// For whoever starts a node that is to outlive it.
pub use vistara_host::launch::close_descriptors_on_exec;
/// For whoever measures against bare monitors.
pub use vistara_machine::VmmError;
/// For whoever builds a kernel that is then added to a node.
pub use vistara_machine::boot::own as own_kernel;
pub use vistara_machine::firecracker::{CpuTemplate, CpuTemplateError, RawFirecracker, RawRun};
pub use vistara_machine::qemu::{RawFork, RawTemplate, bare_program, raw_boot, raw_nanos_boot};
/// For whoever serves strangers beside a node.
pub use vistara_mesh::{Crowd, InCrowd};
