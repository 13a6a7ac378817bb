//! One machine: its record on disk, the task that owns it, and the handle through which others ask it for things.
//!
//! ```text
//! service ──Command──► actor ──Event──► control::Lifecycle ──Effect──► actor ──► Vm, Agent
//!                        ▲                                                │
//!                        └── prepare task, session task, wait task ◄──────┘
//! ```
//! The actor alone changes the record; each change is on disk before it is published.

mod actor;
mod handle;
mod names;
mod prepare;
mod record;
mod recording;
mod session;
mod unikernel;

pub(crate) use actor::{Actor, Origin, STOP_GRACE};
pub(crate) use handle::{Command, Handle, HeldInput, Shared, Snapshot};
pub(crate) use names::made_up_name;
pub(crate) use prepare::{MACHINE_UIDS, MONITOR_PIDS, OVERHEAD, UID_BASE};
pub(crate) use prepare::{OVERLAY, disks, fork, guest_config, likely_config, plan};
pub(crate) use record::{
    Continues, CopyOf, Loaded, Record, Step, load, machine_dirs, make_dir, now_ns,
};
pub(crate) use session::{exit_status, guest_stages};
pub(crate) use unikernel::KERNEL_LOG;
