//! The one place that speaks to the host's kernel: KVM probe, fenced processes, cgroups, facts, sparse files, sockets.
//!
//! It knows nothing of machines or of Vistara's other crates. `unsafe` is allowed module by module, each with its reason.

mod birth;
pub mod cgroup;
pub mod facts;
pub mod files;
pub mod foreign;
pub mod frames;
pub mod hugepages;
pub mod kvm;
pub mod launch;
pub mod memory;
pub mod mounts;
pub mod netns;
pub mod process;
pub mod root;
pub mod sockets;
