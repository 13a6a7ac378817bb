//! Virtual machines: the [`Vmm`] contract, the monitors that fulfil it, and the payloads they boot.
//!
//! Only this crate names QEMU and Firecracker. It does as it is told: which monitor, payload and accelerator to use is
//! decided in `vistara-control`, and what runs inside a guest is the agent's business.

pub mod boot;
mod capture;
pub mod fake;
pub mod firecracker;
pub mod qemu;
mod resolver;
mod vmm;

pub use capture::{Capture, CaptureError, CaptureInfo, sparse_digest, sparse_pieces};
pub use vmm::{
    Adoption, AtRest, BalloonReport, Capabilities, ChannelStream, Disk, Fence, GuestShare,
    LaunchPlan, LinuxBoot, NanosBoot, Nic, OutputStream, Quiet, Snapshot, Start, Vm, VmEnd,
    VmRecord, VmUsage, Vmm, VmmError,
};
