//! Every decision that Vistara takes, as pure functions: no clock, no socket, no disk, no randomness.
//!
//! Facts and events come in as arguments, decisions and effects go out as values that can be printed and tested. Who
//! gathers the facts and carries out the effects is `vistara-node`; the simulation drives this same code.

mod admission;
mod authority;
mod choice;
mod command;
mod eviction;
mod idle;
mod lifecycle;
mod lookup;
pub mod membership;
pub mod placement;
mod provisional;
mod retry;
pub mod services;
mod stock;

pub use admission::{AdmissionError, Capacity, DISK_MAX, DISK_MIN, Demand, MEMORY_MIN, admit};
pub use authority::{
    Question, Refusal, Requirement, Standing, Usage, authorize, has_right, leaves_host_alone,
    requirement, right, within_disk, within_quota,
};
pub use choice::{Choice, ChoiceError, Request, choose};
pub use command::{Program, ProgramError, program};
pub use eviction::{Held, evict, unused_since};
pub use idle::{IdlePolicy, Presence};
pub use lifecycle::{Effect, Event, Lifecycle, VmGone};
pub use lookup::{LookupError, lookup};
pub use provisional::{
    HELD_BYTES_MAX, PROVISIONAL_END, ProvisionalRun, Verdict, provisional_calls, provisional_max,
    rerun_follows,
};
pub use retry::{AfterUnikernel, Ended, after_unikernel};
pub use stock::{Arrivals, Bustle, Memory, QUIET, Room, Want, allot, may_fill};
